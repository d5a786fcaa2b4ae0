"""Shows what a power loss leaves where two owners meet, or the last one's sync failed: model L.

An owner that is frozen, or claims at the same moment, may append while its successor claims: what
the successor builds on must be durable all the same. And what a failed sync left in the cache must
not be built on at all.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Iterable, Iterator

import deletion
import lab
import pytest

from handfast.core.lattice import Epoch
from handfast.core.messages import Skipped
from handfast.errors import HandfastError, Superseded
from handfast.store.claims import take
from handfast.testing.faults import Crash, FaultyFiles
from handfast.testing.powerloss import Disk, crashes

SYNCS = ("fsync", "fdatasync")
CHANGES = ("mkdir", "create", "pwrite", *SYNCS, "fsync_dir")
CHANGED = 12  # such calls that a claim makes, where there is one predecessor
SEAL = 10  # the one that appends its seal
LATE = [Skipped(0, Epoch(1, 2), "woke up late")]
MEETINGS = 20  # of two claims, in `make test`


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with lab.small_world():
        yield


def owned() -> tuple[Disk, lab.Agent]:
    """A domain that holds an epoch, and its owner."""
    disk = Disk("/disk/runs")
    owner = lab.Agent(disk, disk.tell)
    owner.open(1)
    owner.save(Epoch(1, 1))
    return disk, owner


def goes_on(heir: lab.Agent) -> None:
    """Build on what was inherited, if nobody else has claimed it since."""
    with contextlib.suppress(Superseded):
        heir.open(2)
        heir.save(Epoch(2, 3))


def judged(disk: Disk, since: int, what: object) -> int:
    """Lose the power at every moment behind this step; how many different things that left."""
    found = lab.try_all(disk, limit=6, sampled=6, since=since)
    assert found.lost == "", f"{what}: {found.lost}"
    return found.different


@pytest.mark.parametrize("syncs", [False, True], ids=["appends", "commits"])
def test_an_owner_that_wakes_up_in_a_claim_takes_nothing_from_the_heir(syncs: bool) -> None:
    """Shows it at every call of the heir's claim: of what came behind its sync it reads nothing.

    It read to the end: what nobody had synced was sealed, and after a power loss the journal was
    shorter than its seal, and the domain damaged for good.
    """
    counts = []
    for k in itertools.count(1):
        disk, frozen = owned()

        def wakes(frozen: lab.Agent = frozen) -> None:
            with contextlib.suppress(Superseded):
                frozen.commit(LATE) if syncs else frozen.append(LATE)

        files = FaultyFiles(disk, k, wakes)
        before = len(disk.steps)
        heir = lab.Agent(files, disk.tell)
        if not files.fired:
            break
        goes_on(heir)
        counts.append(judged(disk, before, f"call {k}"))
    print(f"woke up at {len(counts)} calls: {sum(counts):,} different crashes")
    assert len(counts) > 40


def meet(disk: Disk, pauses: int, dies: int, k: int) -> bool:
    """Two claim at once; the one is paused, goes on at the other's k-th call, and is killed.

    Both numbers count the changes that it makes. Says whether the other came so far.
    """
    paused, goes, over = threading.Event(), threading.Event(), threading.Event()

    def pause() -> None:
        paused.set()
        goes.wait()

    def other() -> None:
        dying = FaultyFiles(disk, dies, kinds=CHANGES)
        with contextlib.suppress(Crash):
            take(FaultyFiles(dying, pauses, pause, kinds=CHANGES), lab.ROOT, lab.NAME)
        paused.set()
        over.set()

    def let_go() -> None:
        goes.set()
        over.wait()

    thread = threading.Thread(target=other)
    thread.start()
    paused.wait()
    try:
        files = FaultyFiles(disk, k, let_go)
        goes_on(lab.Agent(files, disk.tell))
    finally:
        let_go()
        thread.join()
    return files.fired


def meetings(schedule: Iterable[tuple[int, int, int]]) -> None:
    """Let two claims meet by each of a schedule, and lose the power."""
    total = count = 0
    for pauses, dies, k in schedule:
        disk, owner = owned()
        owner.keeper.directory.close()
        before = len(disk.steps)
        if meet(disk, pauses, dies, k):
            count += 1
            total += judged(disk, before, (pauses, dies, k))
    print(f"{count} meetings: {total:,} different crashes")
    assert count > 0


EVERY = [
    (pauses, dies, k)
    for pauses, dies in itertools.combinations(range(1, CHANGED + 2), 2)
    for k in range(1, 60)
]


def test_of_two_that_claim_at_once_none_builds_on_what_the_other_has_not_synced() -> None:
    """Shows it where one is killed between the append of its seal and the sync, at every second
    call of the other; and for some other ways in which two claims meet.

    The seal came behind the other's sync, and was built on.
    """
    sealed = [way for way in EVERY if way[:2] == (SEAL, SEAL + 1)][::2]
    meetings([*sealed, *random.Random(3).sample(EVERY, MEETINGS)])


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_two_that_claim_at_once_in_every_way() -> None:
    """Shows it for each change where one is paused, or killed, and each of the other's calls."""
    meetings(EVERY)


def failed_syncs() -> lab.Count:
    """Let each sync of an owner's life fail in turn; another claims; then the power is lost."""
    total = different = 0
    for k in itertools.count(1):
        disk = Disk("/disk/runs")
        files = FaultyFiles(disk, k, disk.fail_sync, kinds=SYNCS)
        with contextlib.suppress(HandfastError):
            owner = lab.Agent(files, disk.tell)
            owner.open(1, keep=2)
            owner.save(Epoch(1, 1))
            owner.save(Epoch(1, 2))
        if not files.fired:
            return lab.Count(total, different, "")
        before = len(disk.steps)
        goes_on(lab.Agent(disk, disk.tell))
        found = lab.try_all(disk, limit=6, sampled=10, since=before)
        total, different = total + found.crashes, different + found.different
        if found.lost:
            return lab.Count(total, different, f"sync {k} failed: {found.lost}")
    raise AssertionError


def test_what_a_failed_sync_left_in_the_cache_is_not_built_on() -> None:
    """Shows it for each sync of a file: its pages look clean, and will never be written.

    The next to claim syncs the same journal, for it can't know; that says nothing. So it drops the
    clean pages, and reads what the medium holds.
    """
    found = failed_syncs()
    print(f"failed syncs: {found.crashes:,} crashes, {found.different:,} different")
    assert found.different > 100
    assert found.lost == ""


def test_without_dropping_the_clean_pages_something_is_lost() -> None:
    """Shows that the test above would notice if a claim forgot to.

    What reads data back is held to it by `tests/unit/store/test_directory.py`.
    """
    found = [site for site in deletion.sites({"forget"}) if "files.forget" in site.call]
    (site,) = [site for site in found if site.path.startswith("store/claims")]
    assert {s.path for s in found} - {site.path} == {"store/bulk.py"}
    with deletion.without(site):
        assert "damaged at byte" in failed_syncs().lost


def test_a_sync_that_failed_is_no_promise_nor_is_the_next() -> None:
    """Shows the disk itself: such bytes are read until forgotten, and no crash leaves them."""
    disk = Disk("/disk")
    fd = disk.create("/disk/file")
    disk.fsync_dir("/disk")
    disk.pwrite(fd, b"old", 0)
    disk.fsync(fd)
    disk.pwrite(fd, b"new", 3)
    disk.fail_sync()
    with pytest.raises(OSError, match="Input/output error"):
        disk.fdatasync(fd)
    disk.fsync(fd)
    disk.tell("synced, it was said")
    assert disk.tree()["/disk/file"] == b"oldnew"
    left = {crash.files().tree()["/disk/file"] for crash in crashes(disk) if crash.told}
    assert left == {b"old" + bytes(3)}
    disk.forget(fd)
    assert disk.tree()["/disk/file"] == b"old" + bytes(3)
