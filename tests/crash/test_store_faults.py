"""Shows what is left when the k-th call of a store's operation fails, for every k, or is its last.

The loop is SQLite's: fail call 1, then call 2, and on, until a run in which nothing failed. After
each fault: the error says what to do, older epochs read back whole, a fresh claim works and may
write the epoch that failed, what was left behind is not touched, and no file is synced again
after a sync of it failed.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from handfast.core.lattice import Epoch
from handfast.errors import HandfastError, Refused, SaveFailed
from handfast.store.claims import identify
from handfast.store.directory import Directory, claim
from handfast.store.files import Files
from handfast.store.pins import pin, pins
from handfast.store.shelf import Shelf
from handfast.testing.faults import Call, Crash, Fault, FaultyFiles, Hasty
from handfast.testing.stores import picture, save

FILES = Hasty()
MEBI = 1 << 20
RUN, NAME, SHARD = "run-1", "rank0", 0

OLD, DELTA, NEW, NEXT = Epoch(1, 1), Epoch(1, 2), Epoch(2, 3), Epoch(3, 4)
SIZE = MEBI * 5 // 4  # two chunks, of which the second never changes
LAYOUT = picture(0, nbytes=SIZE)[0]
IMAGES = {
    epoch: picture(epoch.step, nbytes=SIZE, frozen=MEBI // 2)[1]
    for epoch in (OLD, DELTA, NEW, NEXT)
}


class Base:
    """A domain as a suite's `save` wants it, under a root that already has two epochs or none."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.run, self.shard = RUN, SHARD
        self.path = root / "domains" / NAME

    @property
    def domain(self) -> str:
        return Shelf(FILES, self.root, NAME).identity.id

    def claim(self, files: Files = FILES) -> Directory:
        return claim(files, self.root, NAME)

    def save(self, tier: Directory, epoch: Epoch, parent: Epoch | None = None) -> None:
        entry = Shelf(FILES, self.root, NAME).entry(parent) if parent else None
        manifest = entry.sound() if entry else None
        save(tier, self, epoch, IMAGES[epoch], LAYOUT, parent=manifest, verify="full")

    def reads(self, epoch: Epoch) -> bool:
        """Whether an epoch is here; if so, it must be right to the last byte."""
        into = bytearray(LAYOUT.nbytes)
        try:
            Shelf(FILES, self.root, NAME).read(epoch, into)
        except Refused:
            return False
        assert into == IMAGES[epoch]
        return True


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain with a full epoch, a delta on it, and two records."""
    base = Base(tmp_path_factory.mktemp("template"))
    identify(FILES, base.root, NAME, run=RUN, shard=SHARD)
    with closing(base.claim()) as tier:
        base.save(tier, OLD)
        base.save(tier, DELTA, OLD)
        for record in (b"STAGED 1/1", b"STAGED 1/2"):
            tier.journal.append(record)
        tier.journal.sync()
    return Path(base.root)


def copied(template: Path, root: Path) -> Base:
    """A copy of the template that costs no disk: its files are never written again."""
    shutil.copytree(template, root, copy_function=os.link)
    return Base(root)


# The operations.


def op_identify(base: Base, files: FaultyFiles) -> None:
    identify(files, base.root, NAME, run=RUN, shard=SHARD)


def op_claim(base: Base, files: FaultyFiles) -> None:
    with closing(base.claim(files)) as tier:
        assert tier.history == (b"STAGED 1/1", b"STAGED 1/2")


def op_full(base: Base, files: FaultyFiles) -> None:
    with closing(claimed(base, files)) as tier:
        base.save(tier, NEW)


def op_delta(base: Base, files: FaultyFiles) -> None:
    with closing(claimed(base, files)) as tier:
        base.save(tier, NEW, DELTA)


def op_journal(base: Base, files: FaultyFiles) -> None:
    with closing(claimed(base, files)) as tier:
        tier.journal.append(b"STAGED 2/3")
        tier.journal.sync()
        assert tier.current()


def op_release(base: Base, files: FaultyFiles) -> None:
    with closing(claimed(base, files)) as tier:
        tier.may_clean = True
        tier.release([OLD])


def op_pin(base: Base, files: FaultyFiles) -> None:
    pin(files, base.root, NAME, DELTA, "export").release()


def claimed(base: Base, files: FaultyFiles) -> Directory:
    """A directory whose claim is past: what may fail is what comes after it."""
    k = files.fail_at
    files.arm(0)
    tier = base.claim(files)
    files.arm(k)
    return tier


OPERATIONS = [op_identify, op_claim, op_full, op_delta, op_journal, op_release, op_pin]
FAULTS = [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), ("short", False)]


def runs(
    template: Path, scratch: Path, fault: Fault, *, after: bool
) -> Iterator[tuple[Base, FaultyFiles]]:
    """Fresh copies with the k-th call failing, until a run has no failure left."""
    for k in range(1, 400):
        files = FaultyFiles(FILES, fail_at=k, error=fault, after=after)
        root = scratch / str(k)
        yield copied(template, root), files
        shutil.rmtree(root)
        if not files.fired:
            return
    pytest.fail("the loop never came to a run without a fault")


def synced_again(calls: list[Call]) -> list[str]:
    """Files that were synced once more after a sync of them had failed."""
    failed: set[str] = set()
    again = []
    for call in calls:
        if call.kind in ("fsync", "fdatasync"):
            if call.path in failed:
                again.append(call.path)
            if call.failed:
                failed.add(call.path)
    return again


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check_aftermath(base: Base, *, released: bool) -> None:
    """Older epochs are whole; a fresh claim works, writes the epoch that failed, and touches
    nothing that it found."""
    assert base.reads(DELTA)
    assert base.reads(OLD) or released
    identify(FILES, base.root, NAME, run=RUN, shard=SHARD)
    found = snapshot(base.path)
    with closing(base.claim()) as tier:
        assert tier.history[:2] == (b"STAGED 1/1", b"STAGED 1/2")
        base.save(tier, NEW, DELTA)
        base.save(tier, NEXT, NEW)
        assert tier.current()
    assert all(path.read_bytes() == data for path, data in found.items())
    assert all(map(base.reads, (DELTA, NEW, NEXT)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("fault", "after"), FAULTS)
def test_any_call_may_fail(
    template: Path, tmp_path: Path, operation: Callable[..., None], fault: Fault, after: bool
) -> None:
    """Shows that each single error ends in a clear message and costs at most the new epoch."""
    count = 0
    for base, files in runs(template, tmp_path, fault, after=after):
        problem = ""
        try:
            operation(base, files)
        except HandfastError as error:
            problem = str(error)
        if problem:
            assert files.fired
            assert "What to do" in problem
            count += 1
        assert synced_again(files.calls) == []
        check_aftermath(base, released=operation is op_release)
    assert count > 2 or fault == "short"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("after", [False, True])
def test_any_call_may_be_the_last(
    template: Path, tmp_path: Path, operation: Callable[..., None], after: bool
) -> None:
    """Shows that a crash at each call, or right after it, costs at most the new epoch."""
    for base, files in runs(template, tmp_path, "crash", after=after):
        try:
            operation(base, files)
        except Crash:
            assert files.fired
        check_aftermath(base, released=operation is op_release)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("parent", [None, DELTA])
def test_an_epoch_that_failed_may_be_tried_again_by_the_same_owner(
    template: Path, tmp_path: Path, fault: Fault, parent: Epoch | None
) -> None:
    """Shows that the next try takes new names, and neither writes nor syncs what was left."""
    for base, files in runs(template, tmp_path, fault, after=False):
        tier = claimed(base, files)
        try:
            base.save(tier, NEW, parent)
        except SaveFailed:
            left = snapshot(base.path)
            base.save(tier, NEW, parent)
            assert all(path.read_bytes() == data for path, data in left.items())
        files.arm(0)
        tier.journal.append(b"STAGED 2/3")
        tier.journal.sync()
        tier.close()
        assert synced_again(files.calls) == []
        assert base.reads(NEW)
        assert base.reads(DELTA)


def remaining(base: Base) -> set[str]:
    return {
        str(path.relative_to(base.path))
        for kind in ("chunks", "manifests")
        for path in base.path.glob(f"*/{kind}/*")
    }


@pytest.mark.parametrize("fault", ["crash", errno.EIO])
@pytest.mark.parametrize("after", [False, True])
def test_release_is_taken_up_where_it_stopped(
    template: Path, tmp_path: Path, fault: Fault, after: bool
) -> None:
    """Shows that a release that failed anywhere took nothing that is needed, and ends the same."""
    ends: list[set[str]] = []
    for base, files in runs(template, tmp_path, fault, after=after):
        with closing(base.claim()) as tier:
            base.save(tier, NEW)
        with contextlib.suppress(Crash, HandfastError), closing(claimed(base, files)) as tier:
            tier.may_clean = True
            tier.release([OLD, DELTA])
        assert base.reads(NEW)
        base.reads(OLD)
        with closing(base.claim()) as tier:
            tier.may_clean = True
            for _ in range(2):
                tier.release([OLD, DELTA])
                ends.append(remaining(base))
        assert base.reads(NEW)
        assert not base.reads(OLD)
    assert all(end == {"2/manifests/2-3.manifest", "2/chunks/2-3.safetensors"} for end in ends)


def test_a_reader_and_a_release_see_one_another(template: Path, tmp_path: Path) -> None:
    """Shows that wherever a pin falls into a release, the reader is refused or reads in peace."""
    outcomes = set()
    for k in range(1, 400):
        base = copied(template, tmp_path / str(k))
        held: list[bool] = []

        def hold(base: Base = base, held: list[bool] = held) -> None:
            try:
                pin(FILES, base.root, NAME, OLD, "export")
            except Refused:
                held.append(False)
            else:
                held.append(True)

        files = FaultyFiles(FILES, fail_at=k, error=hold)
        with closing(claimed(base, files)) as tier:
            tier.may_clean = True
            kept = tier.release([OLD])
        if held == [True]:
            assert base.reads(OLD)
            assert [found.epoch for found in pins(FILES, base.root, NAME)] == [OLD]
        elif held == [False]:
            assert pins(FILES, base.root, NAME) == ()
        outcomes.add((held == [True], kept == (OLD,)))
        if not files.fired:
            break
    assert outcomes == {(True, True), (False, False)}


def test_a_release_and_a_reader_see_one_another(template: Path, tmp_path: Path) -> None:
    """Shows the same from the other side: wherever a release falls into a pin."""
    outcomes = set()
    for k in range(1, 400):
        base = copied(template, tmp_path / str(k))

        def release(base: Base = base) -> None:
            with closing(base.claim()) as tier:
                tier.may_clean = True
                tier.release([OLD])

        files = FaultyFiles(FILES, fail_at=k, error=release)
        try:
            pin(files, base.root, NAME, OLD, "export")
            held = True
        except Refused:
            held = False
        assert base.reads(OLD) == held or not files.fired
        outcomes.add(held)
        if not files.fired:
            break
    assert outcomes == {True, False}


def test_two_that_identify_at_once_agree(tmp_path: Path) -> None:
    """Shows that wherever another process falls into it, both are told the same identity."""
    for k in range(1, 400):
        root = str(tmp_path / str(k))
        others: list[str] = []

        def other(root: str = root, others: list[str] = others) -> None:
            others.append(identify(FILES, root, NAME, run=RUN, shard=SHARD).id)

        files = FaultyFiles(FILES, fail_at=k, error=other)
        mine = identify(files, root, NAME, run=RUN, shard=SHARD).id
        assert others in ([], [mine])
        assert os.listdir(f"{root}/domains/{NAME}") == ["domain.json"]
        if not files.fired:
            return
    pytest.fail("the loop never came to a run without another process")


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EROFS, "short", "crash"])
@pytest.mark.parametrize("after", [False, True])
def test_any_call_of_a_first_start_may_fail(tmp_path: Path, fault: Fault, after: bool) -> None:
    """Shows that a first start that failed is simply made again."""
    for k in range(1, 400):
        root = str(tmp_path / str(k))
        files = FaultyFiles(FILES, fail_at=k, error=fault, after=after)
        told = None
        try:
            told = identify(files, root, NAME, run=RUN, shard=SHARD)
            claim(files, root, NAME).close()
        except (HandfastError, Crash):
            assert files.fired
        assert synced_again(files.calls) == []
        found = identify(FILES, root, NAME, run=RUN, shard=SHARD)
        assert told in (None, found)
        with closing(claim(FILES, root, NAME)) as tier:
            assert tier.history == ()
        if not files.fired:
            return
    pytest.fail("the loop never came to a run without a fault")


def in_order(files: FaultyFiles, *steps: str) -> None:
    """Check that calls came in this order; a step is a call's name and the end of its path.

    Each step is looked for behind the one before, and `!` in front of one says that it has not
    come before it. So whichever call is left out or moved, a step is not found.
    """
    calls = [f"{call.kind} {call.path}" for call in files.calls]
    at = 0
    for step in steps:
        kind, end = step.removeprefix("!").split()
        hits = [n for n, call in enumerate(calls) if call.split()[0] == kind if call.endswith(end)]
        later = [n for n in hits if n >= at]
        assert later, f"{step} does not come after {calls[:at]}"
        assert not step.startswith("!") or later == hits, f"{step} comes too early: {calls}"
        at = later[0] + 1


def test_identity_and_claim_are_durable_before_they_are_used(tmp_path: Path) -> None:
    """Shows the order that a first start, and a claim on a predecessor's journal, must keep."""
    files = FaultyFiles(FILES)
    root = str(tmp_path)
    identify(files, root, NAME, run=RUN, shard=SHARD)
    in_order(
        files, "mkdir /domains", f"fsync_dir {root}", "mkdir /rank0", "fsync_dir /domains",
        "create .tmp", "fsync .tmp", "!link /domain.json", "fsync_dir /rank0", "!open /domain.json",
    )  # fmt: skip
    claim(FILES, root, NAME).close()
    files = FaultyFiles(FILES)
    claim(files, root, NAME).close()
    in_order(
        files, "mkdir /2", "fsync_dir /rank0", "!fsync /1/journal", "!pread /1/journal",
        "!create /2/journal", "pwrite /2/journal", "fdatasync /2/journal", "pwrite /2/journal",
        "fdatasync /2/journal", "fsync_dir /2",
    )  # fmt: skip


@pytest.mark.parametrize("parent", [None, DELTA])
def test_nothing_is_named_before_it_is_durable(
    template: Path, tmp_path: Path, parent: Epoch | None
) -> None:
    """Shows the order of a write: data before the manifest, and each synced before its name."""
    base = copied(template, tmp_path / "copy")
    files = FaultyFiles(FILES)
    with closing(base.claim(files)) as tier:
        files.calls.clear()
        base.save(tier, NEW, parent)
    data = "/2-3.delta" if parent else "/2-3.safetensors"
    in_order(
        files, f"create {data}.tmp", f"fsync {data}.tmp", f"pread {data}.tmp", f"!rename {data}",
        "fsync_dir /chunks", "!create /2-3.manifest.tmp", "fsync /2-3.manifest.tmp",
        "pread /2-3.manifest.tmp", "!rename /2-3.manifest", "fsync_dir /manifests",
    )  # fmt: skip


def test_data_go_only_after_their_manifest_is_durably_gone(template: Path, tmp_path: Path) -> None:
    """Shows the order of a release, and of a pin: each looks for the other after its own mark."""
    base = copied(template, tmp_path / "copy")
    files = FaultyFiles(FILES)
    with closing(base.claim(files)) as tier:
        tier.may_clean = True
        base.save(tier, NEW)
        files.calls.clear()
        tier.release([OLD, DELTA])
    in_order(
        files, "exists /pins", "!rename /1-1.manifest.released", "rename /1-2.manifest.released",
        "exists /pins", "fsync_dir /manifests", "!open .manifest", f"listdir /{NAME}",
        "!unlink /1-1.safetensors", "unlink /1-2.delta", "!unlink /1-1.manifest.released",
    )  # fmt: skip
    files = FaultyFiles(FILES)
    pin(files, base.root, NAME, NEW, "export").release()
    in_order(
        files, "mkdir /pins", f"fsync_dir /{NAME}", "create .json.tmp", "fsync .json.tmp",
        "!rename .json", "fsync_dir /pins", "!listdir /manifests", "unlink .json",
        "fsync_dir /pins",
    )  # fmt: skip


class Lying(Hasty):
    """A disk that reports success and keeps other bytes in one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.paths: dict[int, str] = {}

    def create(self, path: str) -> int:
        fd = super().create(path)
        self.paths[fd] = path
        return fd

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if self.path in self.paths.get(fd, ""):
            data = bytes(len(data))
        return super().pwrite(fd, data, offset)


@pytest.mark.parametrize("path", ["/chunks/", "/manifests/"])
@pytest.mark.parametrize("level", ["sampled", "full"])
def test_a_disk_that_keeps_other_bytes_is_found_before_the_vote(
    template: Path, tmp_path: Path, path: str, level: str
) -> None:
    """Shows that the read-back finds what fsync swore to, and leaves nothing behind."""
    base = copied(template, tmp_path / "copy")
    with closing(base.claim(Lying(path))) as tier:
        told = pytest.raises(SaveFailed, match="does not read back right")
        with told:
            save(tier, base, NEW, IMAGES[NEW], LAYOUT, verify=level)
    assert not base.reads(NEW)
    assert [name for name in remaining(base) if name.startswith("2/")] == []
