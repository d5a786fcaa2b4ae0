"""Shows that no bytes, whoever wrote them, make an audit fail, hang, or run anything."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.audit.matrix import GOLDEN, VARIANTS, files

from handfast.audit.finding import Code, Strength
from handfast.audit.formats import FORMATS
from handfast.audit.found import Found
from handfast.audit.place import Place
from handfast.audit.run import audit

EACH = 3
HEAVY = 200


def spoiled(data: bytes, chance: random.Random) -> bytes:
    """Bytes with a few of them changed, cut out, doubled, or taken from elsewhere."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not made:
            break
        at, span = chance.randrange(len(made)), chance.choice((1, 2, 4, 8, 64))
        match chance.randrange(5):
            case 0:
                made[at : at + span] = chance.randbytes(len(made[at : at + span]))
            case 1:
                del made[at : at + span]
            case 2:
                made[at:at] = made[at : at + span]
            case 3:
                made[at : at + span] = b"\xff" * len(made[at : at + span])
            case _:
                other = chance.randrange(len(made))
                made[at : at + span] = made[other : other + span]
    return bytes(made)


def spoil(variant: str, home: Path, times: int) -> int:
    """Audit a run with one file spoiled, for each of its kinds of files; says how often."""
    chance = random.Random(variant)
    root = home / "run"
    shutil.copytree(GOLDEN / variant, root)
    done = 0
    for name in files(root):
        path, whole = root / name, (root / name).read_bytes()
        for _ in range(times):
            path.write_bytes(spoiled(whole, chance))
            audit(root, deep=True)
            done += 1
        path.write_bytes(whole)
    assert not [path for path in home.rglob("EXECUTED") if path.exists()]
    return done


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_spoiled_files_are_told_and_never_raised(variant: str, tmp_path: Path) -> None:
    """Whatever a file of a format has become: an audit says so, or finds nothing, and ends."""
    assert spoil(variant, tmp_path, EACH) >= EACH


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS.values())
def test_spoiled_files_many_more(variant: str, tmp_path: Path) -> None:
    """The same, with as many as there is time for."""
    assert spoil(variant, tmp_path, HEAVY) >= HEAVY


def test_a_reader_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of this program in one format leaves the other formats as they are."""

    def failing(place: Place) -> Iterator[Found]:
        yield from ()
        raise KeyError(len(place.files))

    monkeypatch.setattr("handfast.audit.run.FORMATS", (failing, *FORMATS))
    shutil.copytree(GOLDEN / "torch/bare", tmp_path / "run")
    told = audit(tmp_path / "run")
    (finding,) = [f for f in told.findings if f.strength is not Strength.HINT]
    assert (finding.code, finding.strength) == (Code.UNREADABLE, Strength.STRONG)
    assert "KeyError" in finding.says
    assert "report this" in finding.says
    assert any(listed.steps for listed in told.found)


def test_odd_files_and_directories_are_no_trouble(tmp_path: Path) -> None:
    """Pipes, sockets, dangling links, loops, names of no text, a million levels' worth of depth."""
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.pt", "wb") as file:
        file.write(b"PK\x03\x04")
    deep = tmp_path
    for _ in range(40):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "model.pt").write_bytes(b"\x80\x02}.")
    (tmp_path / "latest").write_text("../../../../etc/passwd")
    told = audit(tmp_path)
    assert told.sound is False
