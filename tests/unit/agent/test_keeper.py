"""Shows what a domain's keeper promises of its directory: claims, images, certificates, releases.

Real directories and journals throughout; the domain is the only one of its run.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from agentkit import (
    HASTY,
    RUN,
    Alone,
    content,
    image,
    layout_of,
    memory,
    open_fds,
    plan,
    settled_fds,
)

from handfast.agent.keeper import Image, Keeper
from handfast.checkpoint.validated import Validated
from handfast.core import events
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Certificate, Staged
from handfast.core.retain import Keep
from handfast.errors import Damaged, FormatError, HandfastError, SaveFailed, Superseded
from handfast.store.claims import domain_path
from handfast.store.journal import Journal
from handfast.store.manifest import Manifest
from handfast.store.manifest import decode as decode_manifest
from handfast.store.manifest import encode as encode_manifest
from handfast.store.pins import pin
from handfast.store.shelf import Shelf
from handfast.testing.faults import Crash, Fault, FaultyFiles

ONE, TWO, THREE = Epoch(1, 1), Epoch(1, 2), Epoch(1, 3)
MEBI = 1 << 20


def saved(root: str, *epochs: Epoch, keep: int = 9) -> Alone:
    """A domain that has saved these epochs."""
    alone = Alone(root)
    alone.open(keep=Keep(newest=keep))
    for epoch in epochs:
        alone.save(epoch)
    return alone


def manifest_of(root: str, epoch: Epoch) -> Path:
    """The manifest of an epoch, in whichever incarnation."""
    name = f"{epoch.generation}-{epoch.step}.manifest"
    (found,) = Path(domain_path(root, "rank0")).glob(f"*/manifests/{name}")
    return found


def data_of(root: str, epoch: Epoch) -> Path:
    """The data file of an epoch."""
    name = f"{epoch.generation}-{epoch.step}.*"
    (found,) = Path(domain_path(root, "rank0")).glob(f"*/chunks/{name}")
    return found


def tree(root: str) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


# --- claims -----------------------------------------------------------------------------------


def test_a_successor_knows_all_that_its_predecessor_had_said(root: str) -> None:
    first = saved(root, ONE, TWO)
    first.close()
    keeper, member = Keeper.claim(HASTY, root, "rank0")
    keeper.directory.close()
    assert member.incarnation == first.member.incarnation + 1
    assert [copy.epoch for copy in member.retained] == [ONE, TWO]
    assert member.retained == first.member.retained
    assert member.restored == first.member.restored
    assert not member.lost


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    """Put a sound manifest of the very same epoch there, that nobody voted for."""
    other = str(path.parents[4].with_name("other"))
    alone = saved(other)
    alone.write(TWO, seed=77)
    alone.close()
    shutil.copy(manifest_of(other, TWO), path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, "its manifest is missing"),
        (lambda path: path.write_bytes(b""), "cut"),
        (flip, "do not have the digest"),
        (swap, "stamped for"),
    ],
    ids=["deleted", "emptied", "flipped", "swapped"],
)
def test_a_lost_copy_is_reported_and_never_offered(
    root: str, harm: Callable[[Path], object], said: str
) -> None:
    first = saved(root, ONE, TWO)
    first.close()
    harm(manifest_of(root, TWO))
    second = Alone(root)
    assert [copy.epoch for copy in second.member.retained] == [ONE]
    assert [item.epoch for item in second.member.lost] == [TWO]
    assert said in second.member.lost[0].reason
    second.open(2, ONE)  # the report says so, and recovery takes the epoch that is there
    second.close()


def test_a_sound_manifest_with_another_digest_than_was_voted_for_is_lost(root: str) -> None:
    """Shows that a copy of the right name, stamp and hash is not enough: the vote names its digest.

    An attempt that failed late, or an agent that woke up after its successor, can leave one.
    """
    first = saved(root, ONE)
    first.take(events.Captured(TWO))
    first.write(TWO)
    first.take(events.Persisted(TWO, "0" * 32))
    first.close()
    keeper, member = Keeper.claim(HASTY, root, "rank0")
    keeper.directory.close()
    assert [item.epoch for item in member.lost] == [TWO]
    assert member.lost[0].reason == "its manifest is not the attested one"


@pytest.mark.parametrize("file", ["/1/manifests", "/1/chunks"])
def test_an_error_of_a_read_that_passes_costs_no_epoch(root: str, file: str) -> None:
    """Shows that each call of a claim and of a check may fail once, and that a lasting one tells.

    BAD and LOST are for good: a release takes away what is called so.
    """
    saved(root, ONE, TWO).close()
    for k in itertools.count(1):
        files = FaultyFiles(HASTY, k, errno.EIO, path=file)
        try:
            alone = Alone(root, files)
        except (SaveFailed, Damaged):  # no claim: nothing is called lost, and another one is made
            assert files.fired
            continue
        assert [copy.epoch for copy in alone.member.retained] == [ONE, TWO]
        if not files.fired:
            break
        alone.close()
    for k in itertools.count(1):
        files.fired = False
        files.arm(k)
        alone.keeper.check(alone.member, TWO)
        if not files.fired:
            break
    assert k > 3
    files.lasting = True
    files.arm(1)
    with pytest.raises(Damaged, match="EIO"):
        alone.keeper.check(alone.member, TWO)
    alone.close()


def test_a_record_of_a_later_handfast_stops_the_claim_and_changes_nothing(root: str) -> None:
    """Shows that an old agent after a new one says what it can't read, where, and what to do."""
    alone = saved(root, ONE)
    alone.keeper.directory.journal.append(msgspec.msgpack.encode(["enlightened", 7]))
    alone.keeper.directory.journal.sync()
    alone.close()
    before = tree(root)
    for _ in range(2):
        with pytest.raises(FormatError) as caught:
            Keeper.claim(HASTY, root, "rank0")
        assert domain_path(root, "rank0") in str(caught.value)
        assert "enlightened" in str(caught.value)
        assert "use the release of handfast that wrote it" in str(caught.value)
        assert not isinstance(caught.value, Damaged)
    after = tree(root)
    assert {path: after[path] for path in before} == before
    # What came to be besides are claims that never acted: an empty incarnation each.
    added = {Path(path).name for path in after.keys() - before.keys()}
    assert added <= {"journal"}


def test_a_claim_that_fails_leaves_no_descriptor_open(root: str) -> None:
    alone = saved(root, ONE)
    alone.keeper.directory.journal.append(b"\x93nonsense")
    alone.keeper.directory.journal.sync()
    alone.close()
    before = settled_fds()
    with pytest.raises(FormatError):
        Keeper.claim(HASTY, root, "rank0")
    assert open_fds() == before


# --- commits ----------------------------------------------------------------------------------


def test_a_commit_is_in_the_journal_before_it_returns(root: str) -> None:
    files = FaultyFiles(HASTY)
    alone = Alone(root, files)
    alone.open()
    files.calls.clear()
    alone.keeper.commit([Staged(0, ONE, "d1"), Staged(0, TWO, "d2")])
    assert [call.kind for call in files.calls] == [
        "pwrite",
        "pwrite",
        "fdatasync",
        "listdir",
        "leads_to",
    ]
    alone.close()


def test_a_commit_finds_the_successor_that_claimed_meanwhile(root: str) -> None:
    alone = saved(root)
    keeper, _ = Keeper.claim(HASTY, root, "rank0")
    with pytest.raises(Superseded, match="a later agent has claimed"):
        alone.keeper.commit([Staged(0, ONE, "d1")])
    alone.close()
    keeper.directory.close()


@pytest.mark.parametrize("kind", ["pwrite", "fdatasync"])
def test_a_journal_that_failed_once_takes_nothing_more(root: str, kind: str) -> None:
    files = FaultyFiles(HASTY, error=errno.EIO, kinds=(kind,), path="/journal")
    alone = Alone(root, files)
    alone.open()
    files.arm(1)
    for _ in range(2):
        with pytest.raises(SaveFailed, match="journal"):
            alone.keeper.commit([Staged(0, ONE, "d1")])
    alone.close()


# --- images -----------------------------------------------------------------------------------


def test_what_was_written_is_found_sound_and_takes_no_memory(root: str) -> None:
    """Shows that a copy is judged by all of its bytes, and that none of them is kept: whoever
    loads it reads it there."""
    alone = saved(root, ONE, TWO)
    before = open_fds()
    told: list[tuple[int, int]] = []
    for epoch in (ONE, TWO):
        manifest = alone.keeper.check(alone.member, epoch, lambda *at: told.append(at))
        assert manifest.stamp.epoch == epoch
        assert manifest.objects == b"objects"
        assert told[-1] == (layout_of().nbytes, layout_of().nbytes)
        assert held(root, manifest) == content(epoch.step)
    assert open_fds() == before
    alone.close()


def held(root: str, manifest: Manifest) -> bytes:
    """What a trainer finds where its agent has found a copy valid."""
    copy = Validated(Shelf(HASTY, root, "rank0"), manifest)
    return bytes(copy.read(range(manifest.image_bytes)))


def test_the_bytes_of_another_epoch_are_refused(root: str) -> None:
    """Shows that neither data nor manifest of another step pass for the one that was attested."""
    alone = saved(root, ONE, TWO)
    before = settled_fds()
    shutil.copy(data_of(root, ONE), data_of(root, TWO))
    with pytest.raises(Damaged, match="chunk 0 of epoch 1/2"):
        alone.keeper.check(alone.member, TWO)
    shutil.copy(manifest_of(root, ONE), manifest_of(root, TWO))
    with pytest.raises(HandfastError, match="stamped for epoch 1/1, found as epoch 1/2"):
        alone.keeper.check(alone.member, TWO)
    assert open_fds() == before
    alone.close()


def test_a_manifest_that_nobody_voted_for_is_refused_within_one_life_too(root: str) -> None:
    """Shows it of a sound one of the very same epoch and incarnation: the vote names its digest."""
    alone = saved(root, ONE, TWO)
    path = manifest_of(root, TWO)
    voted = decode_manifest(path.read_bytes())
    other = msgspec.structs.replace(voted, environment={"handfast": "another"})
    path.write_bytes(encode_manifest(other))
    before = settled_fds()
    with pytest.raises(Damaged, match="was voted for"):
        alone.keeper.check(alone.member, TWO)
    assert open_fds() == before
    alone.close()


def test_a_copy_that_is_gone_or_was_never_held_is_said_to_be(root: str) -> None:
    alone = saved(root, ONE)
    with pytest.raises(FormatError, match="no copy of 1/2: it is not retained"):
        alone.keeper.check(alone.member, TWO)
    manifest_of(root, ONE).unlink()
    with pytest.raises(FormatError, match="no copy of 1/1: its manifest is missing"):
        alone.keeper.check(alone.member, ONE)
    alone.close()


def test_a_lack_of_memory_is_not_held_against_the_copy(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that no epoch is called bad because the node can't read it just now."""
    alone = saved(root, ONE)

    def none(*_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("handfast.store.bulk.mmap.mmap", none)
    with pytest.raises(HandfastError, match=r"ENOMEM.*free memory on this node") as caught:
        alone.keeper.check(alone.member, ONE)
    assert not isinstance(caught.value, FormatError)
    alone.close()


def test_only_memory_that_is_large_enough_and_sealed_is_taken() -> None:
    before = settled_fds()
    small = memory(0, 10)
    with pytest.raises(FormatError, match="too small"):
        Image(small, plan(3 * MEBI))
    os.close(small)
    loose = os.memfd_create("loose")
    os.truncate(loose, MEBI)
    with pytest.raises(FormatError, match="sealed"):
        Image(loose, plan())
    os.close(loose)
    image(1).close()
    assert open_fds() == before


def test_unchanged_chunks_are_referred_to_only_while_their_epoch_is_retained(root: str) -> None:
    alone = saved(root)
    size = 3 * MEBI
    alone.save(ONE, seed=1, nbytes=size)
    assert alone.keeper.parent is not None
    alone.save(TWO, seed=1, nbytes=size)  # the same bytes: nothing is written again
    assert not list(Path(root).rglob("1-2.safetensors"))
    assert alone.keeper.parent.stamp.parent == ONE
    alone.member = msgspec.structs.replace(
        alone.member, retained=tuple(c for c in alone.member.retained if c.epoch != TWO)
    )
    alone.save(THREE, seed=1, nbytes=size)
    assert alone.keeper.parent.stamp.parent is None
    assert list(Path(root).rglob("1-3.safetensors"))
    alone.close()


# --- certificates -----------------------------------------------------------------------------


def certificate(step: int) -> Certificate:
    return Certificate(RUN, "c" * 32, "directory", Epoch(1, step), f"{step:032x}")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, "short", "crash"])
def test_a_published_certificate_is_the_old_one_or_the_new_one(root: str, error: Fault) -> None:
    """Shows that at no failing call a script that follows certificates reads half a file, and that
    the next one is published all the same."""
    alone = Alone(root)
    path = Path(root) / "certificates" / "rank0.json"
    alone.keeper.publish("rank0", certificate(1))
    for k in itertools.count(1):
        files = FaultyFiles(HASTY, fail_at=k, error=error)
        alone.keeper.files = files
        with contextlib.suppress(SaveFailed, Crash):
            alone.keeper.publish("rank0", certificate(2))
        shown = msgspec.json.decode(path.read_bytes())
        assert shown["step"] in (1, 2)
        assert shown["root"] == certificate(shown["step"]).root
        alone.keeper.files = HASTY
        alone.keeper.publish("rank0", certificate(1))
        assert msgspec.json.decode(path.read_bytes())["step"] == 1
        if not files.fired:
            break
    assert k > (1 if error == "short" else 5)
    assert os.listdir(path.parent) == ["rank0.json"]
    (path.parent / "rank0.json.17.tmp").touch()  # of an incarnation that was killed
    other = path.parent / "rank0.json.x.json"  # of another domain
    other.touch()
    alone.keeper.publish("rank0", certificate(1))
    assert sorted(os.listdir(path.parent)) == ["rank0.json", other.name]
    alone.close()


def test_a_frozen_owner_puts_no_older_certificate_over_its_successors(root: str) -> None:
    """Shows it for a successor that comes at any call, be it the rename: it finds the claim, or its
    temporary file is gone. And that the frozen one leaves nothing behind."""
    for k in itertools.count(1):
        here = f"{root}/{k}"
        frozen = Alone(here)

        def succeeds(here: str = here) -> None:
            heir = Alone(here)
            heir.keeper.publish("rank0", certificate(5))
            heir.close()

        files = FaultyFiles(HASTY, k, succeeds)
        frozen.keeper.files = frozen.keeper.directory.files = files
        with contextlib.suppress(Superseded, SaveFailed):
            frozen.keeper.publish("rank0", certificate(1))
        frozen.close()
        if not files.fired:
            break
        home = Path(here) / "certificates"
        assert os.listdir(home) == ["rank0.json"]
        assert msgspec.json.decode((home / "rank0.json").read_bytes())["step"] == 5, files.calls
    assert k > 10


# --- releases ---------------------------------------------------------------------------------


def test_a_new_generation_sweeps_what_was_never_voted_for_and_nothing_else(root: str) -> None:
    first = saved(root, ONE, TWO)
    first.take(events.Captured(THREE))
    first.write(THREE)  # persisted, and killed before the vote
    first.close()
    stray = Path(domain_path(root, "rank0")) / "1" / "chunks" / "1-4.safetensors.tmp"
    stray.write_bytes(b"half")
    second = Alone(root)
    second.keeper.release((ONE,))
    assert stray.exists()  # nothing of a predecessor goes before a certificate
    assert ONE in second.keeper.directory.manifests()
    second.open(2, TWO, keep=Keep(newest=9))
    second.keeper.resume(second.member, TWO)
    assert sorted(second.keeper.directory.manifests()) == [ONE, TWO]
    names = {Path(path).name for path in tree(root)}
    assert not {name for name in names if name.startswith(("1-3", "1-4"))}
    for epoch in (ONE, TWO):
        manifest = second.keeper.check(second.member, epoch)
        assert held(root, manifest) == content(epoch.step)
    assert second.keeper.parent is not None
    assert second.keeper.parent.stamp.epoch == TWO
    second.close()


def test_what_is_withdrawn_leaves_nothing_and_the_epoch_before_is_the_parent(root: str) -> None:
    """Validators refuse epochs for days: the disk does not fill, and unchanged bytes are still
    referred to where they are. What a reader holds by mistake stays as long as it does."""
    alone = saved(root)
    size = 3 * MEBI
    alone.save(ONE, seed=1, nbytes=size)
    before = tree(root)
    for step in (2, 3, 4):
        alone.write(Epoch(1, step), seed=2, nbytes=size)
        assert alone.keeper.parent is not None
        alone.keeper.withdraw(alone.keeper.parent)
        assert tree(root) == before
    looked_at, last = Epoch(1, 5), Epoch(1, 6)
    alone.write(looked_at, seed=2, nbytes=size)
    held = pin(HASTY, root, "rank0", looked_at, "curiosity")
    alone.keeper.withdraw(alone.keeper.parent)
    assert looked_at in alone.keeper.directory.manifests()
    held.release()
    alone.keeper.release(())
    assert sorted(alone.keeper.directory.manifests()) == [ONE]
    alone.save(last, seed=1, nbytes=size)
    assert alone.keeper.parent.stamp.parent == ONE
    assert not list(Path(root).rglob("1-6.safetensors"))
    alone.close()


def test_what_was_released_and_not_yet_removed_is_swept(root: str) -> None:
    """Shows that an agent killed between the record and the unlink leaves nothing for ever."""
    first = saved(root, ONE, TWO, keep=1)
    assert [copy.epoch for copy in first.member.retained] == [TWO]
    first.close()
    second = Alone(root)
    assert ONE in second.keeper.directory.manifests()
    second.open(2, TWO)
    second.keeper.resume(second.member, TWO)
    assert sorted(second.keeper.directory.manifests()) == [TWO]
    second.close()


def test_a_release_keeps_what_a_reader_holds(root: str) -> None:
    """And the next one takes it, once the reader is done: nobody need ask for it again."""
    alone = saved(root, ONE, TWO)
    held = pin(HASTY, root, "rank0", ONE, "evaluation")
    assert alone.keeper.pinned() == (ONE,)
    alone.keeper.release((GENESIS, ONE))
    assert sorted(alone.keeper.directory.manifests()) == [ONE, TWO]
    held.release()
    alone.keeper.release(())
    assert sorted(alone.keeper.directory.manifests()) == [TWO]
    alone.close()


def test_a_release_that_failed_is_made_up_for_by_the_next(root: str) -> None:
    """Shows that an epoch that the journal has let go is not forgotten by an error of a moment,
    which names the place that is at fault."""
    alone = saved(root, ONE, TWO)
    pin(HASTY, root, "rank0", ONE, "evaluation").release()
    alone.keeper.directory.files = FaultyFiles(
        HASTY, 1, errno.EACCES, kinds=("listdir",), path="/pins"
    )
    with pytest.raises(HandfastError, match=r"rank0/pins: can't be read: .*EACCES"):
        alone.keeper.release((ONE,))
    assert sorted(alone.keeper.directory.manifests()) == [ONE, TWO]
    alone.keeper.release(())
    assert sorted(alone.keeper.directory.manifests()) == [TWO]
    alone.close()


def test_what_is_left_over_goes_later_where_a_new_generation_could_not_sweep_it(root: str) -> None:
    first = saved(root, ONE, TWO)
    first.take(events.Captured(THREE))
    first.write(THREE)
    first.close()
    second = Alone(root)
    second.open(2, TWO, keep=Keep(newest=9))
    second.keeper.directory.files = FaultyFiles(HASTY, 1, errno.EIO, kinds=("rename",))
    with pytest.raises(SaveFailed, match=r"1-3\.manifest: .*EIO"):
        second.keeper.resume(second.member, TWO)
    second.keeper.release(())
    assert sorted(second.keeper.directory.manifests()) == [ONE, TWO]
    second.close()


def test_pins_that_can_t_be_listed_are_an_error_that_names_the_place(root: str) -> None:
    alone = saved(root, ONE)
    pin(HASTY, root, "rank0", ONE, "evaluation")
    alone.keeper.files = FaultyFiles(HASTY, 1, errno.EACCES, kinds=("listdir",), path="/pins")
    with pytest.raises(HandfastError, match="pins"):
        alone.keeper.pinned()
    alone.close()


@pytest.fixture
def root(tmp_path: Path) -> str:
    """The directory of a run."""
    return str(tmp_path / "run")


def test_a_journal_is_created_once(root: str) -> None:
    """Shows that no agent appends to a journal that another one wrote."""
    alone = saved(root)
    with pytest.raises(SaveFailed, match="exists"):
        Journal.create(HASTY, alone.keeper.directory.journal.path)
    alone.close()
