"""Shows that a run of format 1, journals and all, is read and gone on with by every later handfast.

The core's records are pinned here: a tag or a field that changes its name, its place or its meaning
makes every run in the world unreadable, and these tests red.
"""

import hashlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import handfast
from handfast.agent.keeper import Keeper
from handfast.checkpoint.rounds import allocate_in, peek
from handfast.checkpoint.validated import Validated
from handfast.core.lattice import Epoch
from handfast.core.messages import Record, decode_record, encode
from handfast.store.files import Posix
from handfast.store.pins import pinned
from handfast.store.shelf import Shelf

HERE = Path(__file__).parent
INDEX: dict[str, Any] = json.loads((HERE / "run1.json").read_text())
NAMES = tuple(INDEX["records"])
FILES = Posix()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the golden run, to be gone on with."""
    return Path(shutil.copytree(HERE / "run1", tmp_path / "run1"))


def test_the_files_are_the_golden_ones() -> None:
    """Whoever rewrites one to make a test pass fails here, and no file is there unchecked."""
    there = {
        str(path.relative_to(HERE / "run1")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (HERE / "run1").rglob("*")
        if path.is_file()
    }
    assert there == INDEX["files"]


def within(old: Any, new: Any) -> bool:
    """Whether all that was told then is told now; fields may have been added."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(within(old[k], new.get(k)) for k in old)
    if isinstance(old, list):
        return len(old) == len(new) and all(map(within, old, new))
    return bool(old == new)


@pytest.mark.parametrize("name", NAMES)
def test_every_record_means_what_it_meant(name: str, writer: ModuleType) -> None:
    """Field by field, by name; and what is written today has the bytes of then."""
    read = writer.records(HERE / "run1", name)
    assert within(INDEX["records"][name], read)
    for data in Shelf(FILES, str(HERE / "run1"), name).records():
        assert encode(decode_record(data)) == data


def test_every_kind_of_record_is_there() -> None:
    """A kind that is not pinned could change its name unseen."""
    kinds = {record["kind"] for name in NAMES for record in INDEX["records"][name]}
    assert kinds == {kind.__name__ for kind in Record.__args__}


def test_the_run_is_looked_at_and_verified(root: Path) -> None:
    """By the commands' own way: line, timeline, verdicts, every byte."""
    run = handfast.open(root)
    assert run.latest() == Epoch(2, 50)
    status = run.status()
    assert (status.generation, status.line) == (2, Epoch(2, 50))
    assert status.timeline == ((2, Epoch(1, 20)), (1, Epoch(0, 0)))
    assert run.verify().sound


def test_members_boot_from_it_and_images_are_whole(root: Path, writer: ModuleType) -> None:
    """The next life of each domain: what it holds, doubts and knows, to the byte."""
    for shard, name in enumerate(NAMES):
        keeper, member = Keeper.claim(FILES, str(root), name)
        told = {r["epoch"]["step"]: r["digest"] for r in INDEX["records"][name] if "digest" in r}
        assert (member.incarnation, member.generation, member.round) == (3, 2, "b2" * 16)
        assert [(c.epoch, c.digest) for c in member.retained] == [
            (Epoch(1, 20), told[20]), (Epoch(2, 50), told[50]),
        ]  # fmt: skip
        assert member.lost == ()
        assert member.restored is not None
        assert (member.restored.base, member.restored.copies) == (Epoch(1, 20), (0, 1))
        assert [t.line.epoch for t in member.tallies if t.line] == [Epoch(2, 50)]
        for copy in member.retained:
            held = Validated(keeper.directory, keeper.check(member, copy.epoch))
            size = held.manifest.image_bytes
            assert held.read(range(size)) == writer.content(copy.epoch, shard)
        keeper.directory.close()


def test_the_next_round_counts_on(root: Path) -> None:
    """The record of rounds is read: a new launch is given 3, the old ones nothing."""
    found = [peek(FILES, str(root), "node", n) for n in range(len(NAMES))]
    assert [(p.run, p.generation, p.problem) for p in found] == [("90a1d0", 2, "")] * 2
    assert allocate_in(FILES, str(root), "c3" * 16, 2) == 3
    with pytest.raises(handfast.Superseded):
        allocate_in(FILES, str(root), "a1" * 16, 2)


def test_a_reader_still_holds_its_epoch(root: Path) -> None:
    """The pin of then counts."""
    assert list(pinned(FILES, f"{root}/domains/{NAMES[0]}")) == [Epoch(2, 50)]
