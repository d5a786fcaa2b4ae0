"""Shows what a power loss leaves of the real store: crash model L, on a disk in memory.

After every prefix of what was done and every subset of what was not synced by then
(`handfast.testing.powerloss` says which, and what is assumed), the store is opened by the real
code. Nothing torn is counted, nothing that somebody was told is gone, and the next life goes on.
Counts are printed: pytest shows them with -s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import deletion
import inplace
import lab
import pytest

from handfast.core.lattice import Epoch
from handfast.errors import SaveFailed
from handfast.store.claims import identify
from handfast.store.directory import Directory, claim
from handfast.store.files import Posix, make_directory, write_file
from handfast.store.journal import FRAME, HEADER, Journal, scan
from handfast.store.shelf import Shelf
from handfast.testing.powerloss import STALE, Disk, crashes
from handfast.testing.stores import DirectorySuite

ENOUGH = 40_000
PLENTY = 250_000  # four times
DOINGS = [name for name in lab.STORIES if name != lab.LOOKS]


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with lab.small_world():
        yield


@pytest.mark.parametrize("name", DOINGS)
def test_a_power_loss_at_any_moment_loses_nothing_that_was_told(name: str) -> None:
    """Shows it for a first start, saves, releases, successors, readers, rounds and exports."""
    found = lab.try_all(lab.told(name), limit=10)
    print(f"{name}: {found.crashes:,} crashes, {found.different:,} different")
    assert found.crashes > 20
    assert found.lost == ""


def tales(most: int, first: int = 0) -> int:
    """Judge made-up stories until there were so many crashes; returns how many."""
    seed, total, different = first, 0, 0
    while total < most:
        found = lab.try_all(lab.Tale(seed).disk, limit=10, sampled=100)
        assert found.lost == "", f"Tale({seed}): {found.lost}"
        seed, total, different = seed + 1, total + found.crashes, different + found.different
    print(f"tales {first} to {seed - 1}: {total:,} crashes, {different:,} different")
    return total


def test_kills_and_power_losses_one_after_the_other_lose_nothing() -> None:
    """Shows the same where processes were killed at any call before, and the power lost before.

    A kill leaves what no sync has promised where a successor reads it: it must not build on it.
    """
    assert tales(ENOUGH) >= ENOUGH


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", [1000, 2000, 3000, 4000])
def test_a_million_crashes(first: int) -> None:
    """Shows the same for many more, in four parts."""
    assert tales(PLENTY, first) >= PLENTY


SITES = deletion.sites()
DOOR = [site for site in SITES if site.function.startswith("Posix.")]
LINES = [site for site in SITES if site.path == "fleet/gate/overrides.py"]
"""A line that is appended: tests/unit/fleet/test_gate_overrides.py looks when it is synced."""
INNER = [site for site in SITES if site not in (*DOOR, *LINES)]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """What each sync, and each temporary name, is there for; printed when all were taken out."""
    rows: list[str] = []
    yield rows
    print("", *rows, sep="\n")


@pytest.mark.parametrize("site", INNER, ids=lambda site: f"{site.path}:{site.function}")
def test_without_any_one_sync_something_is_lost(site: deletion.Site, table: list[str]) -> None:
    """Shows, by taking each sync out of the source in turn, that none is there for nothing.

    And so that the tests above would notice if one were forgotten.
    """
    with deletion.without(site):
        for name in DOINGS:
            found = lab.try_all(lab.told(name), limit=8, sampled=40)
            if found.lost:
                table.append(f"{site}\n    {name}, {found.crashes:,} crashes: {found.lost}")
                return
    pytest.fail(f"nothing was lost without {site}")


@pytest.mark.parametrize("kind", inplace.KINDS)
def test_without_a_temporary_name_something_is_lost(kind: str, table: list[str]) -> None:
    """Shows it for each file that is named once it is durable, by writing it in place instead."""
    for name in DOINGS:
        disk = inplace.InPlace(*lab.there(name), kind=kind)
        lab.STORIES[name](disk, disk)
        found = lab.try_all(disk, limit=8, sampled=40)
        if found.lost:
            table.append(f"{kind}, in place\n    {name}, {found.crashes:,} crashes: {found.lost}")
            return
    pytest.fail(f"nothing was lost with {kind} in place")


def test_every_file_that_gets_a_name_is_of_one_kind() -> None:
    """Shows that what is written in place above is all that the source names, line by line."""
    named = set()
    for name in DOINGS:
        disk = inplace.InPlace(*lab.there(name))
        lab.STORIES[name](disk, disk)
        named |= disk.named
    assert {line for line, _ in named} == inplace.SITES
    for _, path in named:
        kinds = [kind for kind, end in inplace.KINDS.items() if re.fullmatch(f".*{end}", path)]
        assert len(kinds) == 1, (path, kinds)


def test_every_sync_is_at_the_door_or_taken_out() -> None:
    """Shows that the search for syncs finds them: the door's three, and each of these rooms'."""
    assert sorted(site.function for site in DOOR) == [
        "Posix.fdatasync", "Posix.fsync", "Posix.fsync_dir",
    ]  # fmt: skip
    assert {site.path for site in INNER} == {
        "agent/keeper.py", "checkpoint/export.py", "checkpoint/rounds.py", "fleet/identity.py",
        "link/life.py", "link/records.py", "store/claims.py", "store/directory.py",
        "store/files.py", "store/journal.py", "store/pins.py",
    }  # fmt: skip
    assert {site.path for site in LINES} == {"fleet/gate/overrides.py"}


@pytest.mark.parametrize("deleted", [None, *DOOR], ids=str)
def test_the_door_hands_each_sync_to_the_system(
    deleted: deletion.Site | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a sync of the store is one of the system's, of that very file or directory.

    A disk in memory stands in the door's place, so it can't miss these three.
    """
    seen: list[tuple[str, int]] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd, n=name: seen.append((n, os.fstat(fd).st_ino)))
    with deletion.without(deleted) if deleted else contextlib.nullcontext():
        files, path = Posix(), str(tmp_path / "file")
        fd = files.create(path)
        files.fsync(fd)
        files.fdatasync(fd)
        files.fsync_dir(str(tmp_path))
        files.close(fd)
    file, home = os.stat(path).st_ino, os.stat(tmp_path).st_ino
    expected = {"fsync": ("fsync", file), "fdatasync": ("fdatasync", file),
                "fsync_dir": ("fsync", home)}  # fmt: skip
    missed = deleted.function.removeprefix("Posix.") if deleted else ""
    assert seen == [call for name, call in expected.items() if name != missed]


def kernel_fails(monkeypatch: pytest.MonkeyPatch, *ends: str) -> list[str]:
    """Let every real sync of such a path fail by EIO from now on; gives what it was asked for."""
    asked = []
    for name, real in (("fsync", os.fsync), ("fdatasync", os.fdatasync)):

        def sync(fd: int, real: Callable[[int], None] = real) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if re.search("|".join(ends), path):
                asked.append(path)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        monkeypatch.setattr(os, name, sync)
    return asked


def test_the_door_hands_on_each_error_of_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that what the kernel says of a file, of its data or of a directory is not swallowed."""
    files = Posix()
    fd = files.create(str(tmp_path / "file"))
    asked = kernel_fails(monkeypatch, "")
    for sync in (
        lambda: files.fsync(fd),
        lambda: files.fdatasync(fd),
        lambda: files.fsync_dir(str(tmp_path)),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            sync()
    files.close(fd)
    assert len(asked) == 3


@pytest.mark.parametrize(
    "end", [r"/chunks/1-2\..*", r"/chunks$", r"/1-2\.manifest.*", r"/manifests$", r"/journal$"]
)
def test_no_vote_is_given_where_the_kernel_fails_a_sync(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows it for each sync of a save, at the system's own edge: no epoch, no certificate."""
    said: list[object] = []
    agent = lab.Agent(Posix(), said.append, str(tmp_path))
    agent.open(1)
    agent.save(Epoch(1, 1))
    asked = kernel_fails(monkeypatch, end)
    with pytest.raises(SaveFailed, match="Input/output error"):
        agent.save(Epoch(1, 2))
    agent.keeper.directory.close()
    assert asked
    assert [fact.epoch for fact in said if isinstance(fact, lab.Kept)] == [Epoch(1, 1)]
    assert b'"step":1,' in (tmp_path / "certificates" / f"{lab.NAME}.json").read_bytes()


def test_a_tail_of_exactly_the_bound_is_not_left_unsynced() -> None:
    """Shows that no power loss leaves a journal whose writer kept the bound and whose reader,
    who calls so long a tail damage, does not."""
    disk = Disk("/disk")
    journal = Journal.create(disk, "/disk/journal")
    disk.fsync_dir("/disk")
    disk.tell("it is there")
    for _ in range(2):
        journal.append(bytes(lab.TAIL // 2 - FRAME))
    assert journal.length == HEADER + lab.TAIL
    found = [crash for crash in crashes(disk, limit=8, sampled=200) if crash.told]
    assert len(found) > 100
    for crash in found:
        scan(crash.files(), "/disk/journal")


# What was found by it


def test_a_header_of_garbage_is_a_journal_that_was_never_begun() -> None:
    """Shows that a journal is no loss whose length was stored, and its header not.

    It was taken for damage wherever something else than zeros lay there, and the run for lost.
    """
    disk = Disk("/disk")
    Journal.create(disk, "/disk/journal").close()
    found = set()
    for crash in crashes(disk):
        data = crash.files().tree().get("/disk/journal", b"")
        if len(data) == HEADER:
            found.add(data.strip(STALE) == b"")
            assert scan(crash.files(), "/disk/journal").records == ()
    assert found == {True, False}


def test_a_directory_whose_maker_died_is_made_durable_by_the_next() -> None:
    """Shows it for every directory on the way: only the last one was synced again."""
    disk = Disk("/disk")
    disk.mkdir("/disk/a")
    disk.mkdir("/disk/a/b")
    make_directory(disk, "/disk/a/b/c")
    disk.tell("it is there")
    assert all(crash.files().exists("/disk/a/b/c") for crash in crashes(disk) if crash.told)


def test_an_incarnation_of_which_half_is_left_keeps_nothing_from_being_released() -> None:
    """Shows that of two directories that a claim makes, one may come to the medium alone.

    Every release failed from then on, for good.
    """
    disk = Disk("/disk")
    home = Home(disk)
    home.claim().close()
    path = f"/disk/run/domains/rank0/{home.claim().incarnation}"
    disk.rmdir(f"{path}/chunks")
    tier = home.claim()
    tier.may_clean = True
    assert tier.release([]) == ()


# The disk itself


def kept_after(*done: str) -> set[tuple[bool, bytes]]:
    """What may be left of a small new file after some syncs: (is its name there?, its bytes)."""
    disk = Disk("/disk")
    fd = disk.create("/disk/file")
    disk.pwrite(fd, b"new", 0)
    for name in done:
        disk.fsync(fd) if name == "file" else disk.fsync_dir("/disk")
    disk.tell("synced")
    left = [crash.files().tree() for crash in crashes(disk) if crash.told]
    return {("/disk/file" in tree, tree.get("/disk/file", b"")) for tree in left}


def test_only_what_was_synced_is_kept() -> None:
    """Shows the four cases of a new file: no sync, the file's, the directory's, both."""
    torn = {b"", b"new", bytes(3), STALE * 3}
    assert kept_after() == {(False, b""), *((True, data) for data in torn)}
    assert kept_after("file") == {(False, b""), (True, b"new")}
    assert kept_after("directory") == {(True, data) for data in torn}
    assert kept_after("file", "directory") == {(True, b"new")}


def test_every_subset_is_tried() -> None:
    """Shows that n names that were not synced leave 2^n states, and torn sectors each of theirs."""
    disk = Disk("/disk")
    for n in range(8):
        disk.mkdir(f"/disk/{n}")
    assert len({crash.key for crash in crashes(disk)}) == 2**8
    disk = Disk("/disk")
    fd = disk.create("/disk/file")
    disk.fsync_dir("/disk")
    disk.pwrite(fd, bytes(range(256)) * 8, 0)
    disk.tell("all is written")
    left = {crash.files().tree()["/disk/file"] for crash in crashes(disk) if crash.told}
    # a length of its own, then four sectors, each written or not, over zeros or over stale bytes
    assert len(left) == 1 + 2 * 2**4 - 1


def test_a_rename_replaces_at_once() -> None:
    """Shows the one thing that is assumed: a name leads to the old file or to the new one."""
    disk = Disk("/disk")
    for name in ("old", "new"):
        write_file(disk, f"/disk/{name}", name.encode())
    disk.fsync_dir("/disk")
    disk.tell("both are there")
    disk.rename("/disk/new", "/disk/old")
    left = [crash.files().tree() for crash in crashes(disk) if crash.told]
    assert {"/disk/old": b"new"} in left
    assert all(tree in ({"/disk/old": b"new"}, {"/disk/new": b"new", "/disk/old": b"old"})
               for tree in left)  # fmt: skip


class Home:
    """A domain on a disk in memory, for the suite that every tier must pass."""

    run, shard = "run-1", 0

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.domain = identify(self.disk, "/disk/run", "rank0", run=self.run, shard=0).id

    def claim(self) -> Directory:
        """The next incarnation."""
        return claim(self.disk, "/disk/run", "rank0")


class TestDisk(DirectorySuite):
    """Shows that the disk in memory is one for the store, until its power is cut."""

    def home(self, scratch: Path) -> Home:
        """A domain of its own."""
        return Home(Disk("/disk"))


def test_what_a_crash_left_reads_as_any_disk() -> None:
    """Shows that after every power loss of a save the domain reads as one that was not cut."""
    disk = lab.told("saves")
    last = list(crashes(disk, limit=4, sampled=4))[-1].files()
    assert [str(epoch) for epoch in Shelf(last, lab.ROOT, lab.NAME).manifests()] == ["1/2"]
