"""OCDBT stores that TensorStore wrote (golden/write_orbax.py), and frames that were damaged."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit.extent import Reader
from handfast.audit.formats import ocdbt
from handfast.audit.formats.crc32c import crc32c
from handfast.audit.formats.ocdbt import Database, read_database
from handfast.audit.place import look

GOLDEN = Path(__file__).parent / "golden" / "ocdbt"
SHORT = 16  # bytes of a value that lies in a node


def read(path: Path, reader: Reader) -> Database:
    """Read the store that is a directory."""
    return read_database(look(path, reader), "")


def written() -> dict[str, bytes]:
    """What the writer put into the stores."""
    values = {key: f"{key:04d}".encode() for key in range(100)}
    return {f"layer.{k:03d}/0.0": v * (1 if k % 3 else 6) for k, v in values.items()}


def test_all_values_of_the_newest_version_are_found(reader: Reader) -> None:
    """In a tree of several levels, whose nodes and values lie in several files."""
    found = read(GOLDEN / "tall", reader)
    assert {key: value.bytes() for key, value in found.values.items()} == written()
    assert found.problems == ()
    inside = {key for key, value in found.values.items() if value.start < 0}
    assert inside == {key for key, value in written().items() if len(value) <= SHORT}
    assert len(found.reaches) > 1


def test_the_newest_of_several_manifests_counts(reader: Reader) -> None:
    """Where there is one a version, the first names none of them."""
    found = read(GOLDEN / "numbered", reader)
    assert {key: value.bytes() for key, value in found.values.items()} == written()


def test_a_store_may_be_empty(reader: Reader) -> None:
    """A root that is nowhere: no key, and nothing wrong."""
    found = read(GOLDEN / "empty", reader)
    assert (found.values, found.reaches, found.problems) == ({}, {}, ())
    assert found.committed > 0


def test_without_a_manifest_it_is_said(tmp_path: Path, reader: Reader) -> None:
    """Neither the first one, nor one with a number, may be missing."""
    shutil.copytree(GOLDEN / "numbered", tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("manifest.0*"):
        path.unlink()
    (problem,) = read(tmp_path, reader).problems
    assert "missing" in problem
    (tmp_path / "manifest.ocdbt").unlink()
    (problem,) = read(tmp_path, reader).problems
    assert "manifest.ocdbt: missing" in problem


def test_a_manifest_by_number_can_not_point_on(tmp_path: Path, reader: Reader) -> None:
    """Else a hostile one would lead in circles."""
    shutil.copytree(GOLDEN / "numbered", tmp_path, dirs_exist_ok=True)
    newest = max(tmp_path.glob("manifest.0*"))
    shutil.copy(tmp_path / "manifest.ocdbt", newest)
    (problem,) = read(tmp_path, reader).problems
    assert "points to other manifests" in problem


def test_a_damaged_node_hides_only_what_is_below(tmp_path: Path, reader: Reader) -> None:
    """The rest is read all the same, and the node is named. A root's damage hides everything."""
    shutil.copytree(GOLDEN / "tall", tmp_path, dirs_exist_ok=True)
    whole = read(tmp_path, reader)
    left = set()
    for file, end in whole.reaches.items():
        saved = (tmp_path / file).read_bytes()
        for at in range(40, end, 80):
            (tmp_path / file).write_bytes(saved[:at] + bytes([saved[at] ^ 1]) + saved[at + 1 :])
            with Reader() as again:
                found = read(tmp_path, again)
            assert (found.values.keys() == whole.values.keys()) == (not found.problems)
            assert all(file in problem for problem in found.problems)
            left.add(len(found.values))
        (tmp_path / file).write_bytes(saved)
    assert {0, 100} < left


def test_a_missing_file_of_nodes_is_said(tmp_path: Path, reader: Reader) -> None:
    """Not the root's file alone: any that is referred to."""
    shutil.copytree(GOLDEN / "tall", tmp_path, dirs_exist_ok=True)
    for file in read(tmp_path, reader).reaches:
        (tmp_path / file).rename(tmp_path / "aside")
        with Reader() as again:
            found = read(tmp_path, again)
        assert file in found.reaches
        assert found.problems or len(found.values) == 100
        (tmp_path / "aside").rename(tmp_path / file)


# Stores made by hand


def varints(*numbers: int) -> bytes:
    """Small numbers."""
    return bytes(numbers)


def framed(magic: int, body: bytes, *, version: int = 0, length: int = 0) -> bytes:
    """A manifest or a node, not packed."""
    head = magic.to_bytes(4, "big") + (length or 18 + len(body)).to_bytes(8, "little")
    data = head + bytes([version, 0]) + body
    return data + crc32c(data).to_bytes(4, "little")


FILES = varints(1, 1, 0) + b"n"  # a table of one file, whose name is all of its path


def manifest(root: tuple[int, int, int], *, height: int = 0, **frame: int) -> bytes:
    """A manifest of one version, whose root lies in the file n."""
    config = bytes(16) + varints(0, 0, 0, 4, 0)
    counts = varints(0, 0, 0) + bytes(8)
    return framed(
        0x0CDB3A2A, config + FILES + varints(1, 1, height, *root) + counts + varints(0), **frame
    )


def leaf(keys: bytes, *, height: int = 0, files: bytes = FILES) -> bytes:
    """A node; ``keys`` is what follows its table of files."""
    return framed(0x0CDB20DE, bytes([height]) + files + keys)


def store(tmp_path: Path, node: bytes, first: bytes = b"") -> Path:
    """A store of one node."""
    (tmp_path / "n").write_bytes(node)
    (tmp_path / "manifest.ocdbt").write_bytes(first or manifest((0, 0, len(node))))
    return tmp_path


def test_a_store_made_by_hand_is_read(tmp_path: Path, reader: Reader) -> None:
    """Two keys that share a prefix, with values in the node."""
    node = leaf(varints(2, 1, 2, 1) + b"a1" + b"2" + varints(1, 1, 0, 0) + b"xy")
    found = read(store(tmp_path, node), reader)
    assert {key: value.bytes() for key, value in found.values.items()} == {"a1": b"x", "a2": b"y"}


@pytest.mark.parametrize(
    ("node", "match"),
    [
        (leaf(varints(0)), "it has 0 keys"),
        (leaf(varints(1, 1) + b"a" + varints(1, 0) + b"x", height=1), "it is of height 1"),
        (leaf(varints(2, 9, 1, 1) + b"ab"), "shares 9 bytes"),
        (leaf(varints(1, 1) + b"a" + varints(1, 1, 5, 0)), "refers to file 5"),
        (framed(0x0CDB20DF, b""), "should begin with 0cdb20de"),
        (framed(0x0CDB20DE, b"", length=99), "it says that it has 99 bytes"),
        (framed(0x0CDB20DE, b"", version=7), "of version 7"),
    ],
)
def test_a_node_that_is_none_is_named(
    node: bytes, match: str, tmp_path: Path, reader: Reader
) -> None:
    """Its checksum fits, so that it was written this way: refused all the same."""
    found = read(store(tmp_path, node), reader)
    assert found.values == {}
    (problem,) = found.problems
    assert match in problem
    assert "What to do" in problem or "byte" in problem


@pytest.mark.parametrize(
    ("name", "node", "match"),
    [
        ("NODE_MOST", leaf(varints(1, 1) + b"a" + varints(1, 0) + b"x"), "at most"),
        ("NODES_MOST", leaf(varints(1, 1) + b"a" + varints(1, 0) + b"x"), "read at most"),
        ("TEXT_MOST", leaf(varints(2, 1, 1, 1) + b"ab" + varints(0, 0, 0, 0)), "names have more"),
    ],
)
def test_limits_hold(
    name: str, node: bytes, match: str, tmp_path: Path,
    reader: Reader, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of nodes, their size and the names in them: a hostile store takes no more than that."""
    monkeypatch.setattr(ocdbt, name, 0)
    found = read(store(tmp_path, node), reader)
    assert match in found.problems[0]


@given(st.data())
def test_any_damage_is_a_problem_and_never_an_error(data: st.DataObject) -> None:
    """Whatever byte of the manifest changes, and even if its checksum is made to fit again."""
    name = data.draw(st.sampled_from(["tall", "numbered", "empty"]))
    manifest = bytearray((GOLDEN / name / "manifest.ocdbt").read_bytes())
    at = data.draw(st.integers(0, len(manifest) - 1))
    manifest[at] ^= data.draw(st.integers(1, 255))
    fitting = data.draw(st.booleans())
    if fitting:
        manifest[-4:] = crc32c(manifest[:-4]).to_bytes(4, "little")
    with Reader() as reader:
        place = look(GOLDEN / name, reader)
        changed = Spoilt(place.reader, str(GOLDEN / name / "manifest.ocdbt"), bytes(manifest))
        place.reader = changed
        found = read_database(place, "")
    assert found.problems or fitting


class Spoilt(Reader):
    """Reads one file as other bytes of the same length."""

    def __init__(self, under: Reader, path: str, data: bytes) -> None:
        super().__init__()
        self._under, self._path, self._bytes = under, path, data

    def read(self, path: str, into: memoryview, at: int) -> None:
        if path == self._path:
            into[:] = self._bytes[at : at + len(into)]
        else:
            self._under.read(path, into, at)
