"""Shows that what an audit does not go into is said, and is no fault of a checkpoint."""

from pathlib import Path

import pytest

from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.place import DEEP, Place, look
from handfast.audit.run import audit
from handfast.errors import FormatError


def seen(path: Path) -> Place:
    """A look at a directory."""
    with Reader() as reader:
        return look(path, reader)


def test_a_linked_directory_is_not_followed_and_said(tmp_path: Path) -> None:
    """One elsewhere; a link to what is looked at anyway, or to a file, hides nothing."""
    home = tmp_path / "home"
    for folder in (home / "step_1", tmp_path / "far"):
        folder.mkdir(parents=True)
        (folder / "model.pt").write_bytes(b"")
    (home / "far").symlink_to(tmp_path / "far")
    (home / "latest").symlink_to("step_1")
    (home / "all").symlink_to(home)
    (home / "broken").symlink_to("nowhere")
    (home / "file.pt").symlink_to(tmp_path / "far" / "model.pt")
    place = seen(home)
    assert place.unseen == {"far": "not followed: a link to a directory"}
    assert [*place.files] == ["file.pt", "step_1/model.pt"]
    assert place.without({"file.pt"}).unseen == place.unseen


def test_what_lies_too_deep_is_said(tmp_path: Path) -> None:
    """The directory that is not gone into any more; a link to what is below it, too."""
    deep = tmp_path.joinpath(*["d"] * (DEEP + 2))
    deep.mkdir(parents=True)
    (deep / "model.pt").write_bytes(b"")
    (tmp_path / "link").symlink_to(deep)
    assert seen(tmp_path).unseen == {
        "/".join(["d"] * (DEEP + 1)): f"not looked at: deeper than {DEEP} levels",
        "link": "not followed: a link to a directory",
    }


def test_a_file_of_more_than_is_read_is_said_to_be_that(tmp_path: Path) -> None:
    """It may be sound."""
    (tmp_path / "index.json").write_bytes(b"1234")
    place = seen(tmp_path)
    assert place.bytes("index.json", 4) == b"1234"
    says = r"index\.json: not read: too many objects: 4 bytes, .* 3 are read"
    with pytest.raises(FormatError, match=says):
        place.bytes("index.json", 3)


@pytest.mark.parametrize("linked", [True, False])
def test_an_audit_has_a_hint_of_it(linked: bool, tmp_path: Path) -> None:
    """And none where all was looked at."""
    home = tmp_path / "home"
    home.mkdir()
    if linked:
        (home / "step_3").symlink_to(tmp_path)
    found = [(f.code, f.strength, f.step, f.says) for f in audit(home).findings]
    told = (Code.UNSEEN, Strength.HINT, "step_3", "not followed: a link to a directory")
    assert found == ([told] if linked else [])
