"""Shows that a directory keeps epochs whole, finds every damage, and shares no file by mistake."""

import contextlib
import errno
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest
import xxhash
from safetensors import safe_open

from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import (
    Damaged,
    FormatError,
    HandfastError,
    Refused,
    SaveFailed,
    Superseded,
)
from handfast.store.bulk import Held, Span
from handfast.store.claims import Identity, identify, lengths_now, read_identity
from handfast.store.delta import SOURCES_MAX
from handfast.store.directory import Directory, claim
from handfast.store.files import Posix, closing
from handfast.store.journal import Journal
from handfast.store.manifest import Manifest
from handfast.store.pins import pin, pins
from handfast.store.port import Tier, Verify
from handfast.store.shelf import Shelf
from handfast.testing.faults import FaultyFiles
from handfast.testing.stores import DirectorySuite, Home, picture, save

MEBI = 1 << 20
FILES = Posix()


class Local:
    """A domain in a directory, as the suite wants it."""

    def __init__(self, root: Path, name: str = "rank0", run: str = "run-1", shard: int = 0) -> None:
        self.root, self.name, self.run, self.shard = str(root), name, run, shard
        self.domain = identify(FILES, self.root, name, run=run, shard=shard).id
        self.path = root / "domains" / name

    def claim(self) -> Directory:
        return claim(FILES, self.root, self.name)

    def shelf(self) -> Shelf:
        return Shelf(FILES, self.root, self.name)


class TestDirectory(DirectorySuite):
    """The tier port's conformance suite, over real files."""

    def home(self, scratch: Path) -> Home:
        return Local(scratch)


def test_a_directory_is_a_tier(tmp_path: Path) -> None:
    """Shows, to the type checker and the reader, that a Directory fills the port."""
    tier: Tier = Local(tmp_path).claim()
    assert tier.incarnation == 1


# Identity


def test_an_identity_is_made_once(tmp_path: Path) -> None:
    """Shows that a domain keeps its id for as long as its disk, and a new disk is a new domain."""
    first = Local(tmp_path / "a").domain
    assert Local(tmp_path / "a").domain == first
    assert Local(tmp_path / "b").domain != first
    assert first.startswith("rank0-")
    assert os.listdir(tmp_path / "a/domains/rank0") == ["domain.json"]


def test_another_runs_shard_is_refused(tmp_path: Path) -> None:
    """Shows that a directory of another run or shard is not taken over (lm-resiliency#77)."""
    Local(tmp_path)
    for changes in ({"run": "run-2"}, {"shard": 1}):
        with pytest.raises(Refused, match="is the home of shard 0 of run run-1") as refused:
            Local(tmp_path, **changes)
        assert refused.value.verdict is Verdict.FOREIGN


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a\0", "é", "x" * 201])
def test_a_domains_name_is_one_plain_path_segment(tmp_path: Path, name: str) -> None:
    """Shows that no name can lead out of the run's directory."""
    with pytest.raises(ValueError, match="can't name a domain"):
        identify(FILES, str(tmp_path), name, run="r", shard=0)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_of_an_identity_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Shows that a domain never takes itself for another one after bit rot."""
    home = Local(tmp_path)
    file = home.path / "domain.json"
    data = file.read_bytes()
    whole = read_identity(FILES, home.root, home.name)
    for at, bit in itertools.product(range(len(data)), (1, 32)):
        file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        with contextlib.suppress(FormatError):
            assert read_identity(FILES, home.root, home.name) == whole
    for cut in range(len(data)):
        file.write_bytes(data[:cut])
        with pytest.raises(Damaged, match="What to do"):
            read_identity(FILES, home.root, home.name)


def test_a_lost_identity_is_not_made_anew_over_old_incarnations(tmp_path: Path) -> None:
    """Shows that a domain with a past and no name is loud, not a fresh start."""
    home = Local(tmp_path)
    home.claim()
    (home.path / "domain.json").unlink()
    with pytest.raises(Damaged, match="missing, though incarnations are there"):
        Local(tmp_path)


def test_a_newer_identity_says_which_handfast_reads_it(tmp_path: Path) -> None:
    """Shows that a domain of a later format is refused by name, not misread."""
    home = Local(tmp_path)
    raw = msgspec.json.encode({"format": 2, "id": "x"})
    check = xxhash.xxh3_128_hexdigest(raw)
    (home.path / "domain.json").write_bytes(
        msgspec.json.encode({"check": check, "identity": msgspec.Raw(raw)})
    )
    with pytest.raises(FormatError, match="format 2; this handfast reads format 1"):
        home.claim()


def test_a_directory_that_is_no_run_is_a_clear_error(tmp_path: Path) -> None:
    """Shows that nothing is created where a reader only looks."""
    with pytest.raises(Damaged, match=r"domain\.json: can't be read: .*ENOENT"):
        Shelf(FILES, str(tmp_path), "rank0")
    assert list(tmp_path.iterdir()) == []


def test_a_copied_domain_under_another_name_is_foreign(tmp_path: Path) -> None:
    """Shows that `cp -r rank0 rank1` does not make a second shard."""
    home = Local(tmp_path)
    shutil.copytree(home.path, home.path.parent / "rank1")
    with pytest.raises(Refused, match="is the identity of the domain rank0"):
        Shelf(FILES, home.root, "rank1")


# Claims and seals


def test_claims_that_start_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    """Shows that threads that race for one domain never share an incarnation."""
    home = Local(tmp_path)
    found: list[Directory] = []
    threads = [threading.Thread(target=lambda: found.append(home.claim())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.incarnation for each in found) == list(range(1, 9))
    assert [each.incarnation for each in found if each.current()] == [8]


@pytest.mark.parametrize("kind", ["fsync_dir", "mkdir", "create", "pwrite", "fdatasync"])
def test_a_claim_that_failed_leaves_nothing_unless_it_could_be_read(
    tmp_path: Path, kind: str
) -> None:
    """Shows that tries on a full disk do not pile up, and that a journal with a header, which a
    successor may have sealed, stays."""
    home = Local(tmp_path)
    home.claim().journal.append(b"one")
    before = sorted(home.path.rglob("*"))
    files = FaultyFiles(FILES, 2 if kind == "mkdir" else 1, errno.ENOSPC, kinds=(kind,))
    with pytest.raises(SaveFailed, match="ENOSPC"):
        claim(files, home.root, home.name)
    assert (sorted(home.path.rglob("*")) == before) == (kind != "fdatasync")
    after = home.claim()
    assert after.incarnation == (3 if kind == "fdatasync" else 2)
    assert after.history == (b"one",)


def test_a_flipped_byte_in_a_sealed_journal_is_always_found(tmp_path: Path) -> None:
    """Shows that a successor's seal leaves no tail in which damage could hide."""
    home = Local(tmp_path)
    old = home.claim()
    for record in (b"one", b"two"):
        old.journal.append(record)
    old.journal.sync()
    home.claim()
    file = home.path / "1/journal"
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(FormatError, match="journal"):
            home.shelf().records()
    for cut in range(len(data)):
        file.write_bytes(data[:cut])
        with pytest.raises(Damaged, match="journal"):
            home.shelf().records()
    file.unlink()
    with pytest.raises(Damaged, match="journal"):
        home.claim()
    file.write_bytes(data + b"whatever came later")
    assert home.shelf().records() == (b"one", b"two")


def test_a_lost_incarnation_is_found(tmp_path: Path) -> None:
    """Shows that a directory that was deleted whole is missed."""
    home = Local(tmp_path)
    home.claim().journal.append(b"one")
    home.claim()
    shutil.rmtree(home.path / "1")
    with pytest.raises(Damaged, match="1/journal"):
        home.claim()


def test_a_lost_journal_beside_manifests_is_found(tmp_path: Path) -> None:
    """Shows that an unsealed incarnation can't lose its votes in silence."""
    home = Local(tmp_path)
    layout, image = picture(1)
    save(home.claim(), home, Epoch(1, 1), image, layout)
    journal = home.path / "1/journal"
    journal.write_bytes(journal.read_bytes()[:20])
    for spoil in (lambda: None, journal.unlink):
        spoil()
        with pytest.raises(Damaged, match="missing or cut, though manifests are there"):
            home.claim()


def test_a_journal_cut_at_every_byte_loses_the_newest_records_only(tmp_path: Path) -> None:
    """Shows that what a domain remembers after a crash is a prefix of what it recorded."""
    home = Local(tmp_path)
    whole: tuple[bytes, ...] = ()
    for number in (1, 2):
        tier = home.claim()
        for word in (b"a", b"b", b"c"):
            whole += (b"%d%s" % (number, word),)
            tier.journal.append(whole[-1])
        tier.journal.sync()
    file = home.path / "2/journal"
    data = file.read_bytes()
    seen = set()
    for cut in range(len(data) + 1):
        file.write_bytes(data[:cut])
        found = home.shelf().records()
        assert found == whole[: len(found)]
        seen.add(len(found))
    assert seen == {3, 4, 5, 6}


def test_a_history_can_be_read_as_it_was_at_any_moment(tmp_path: Path) -> None:
    """Shows that the lengths of the journals are enough to see a domain as it was, whatever it has
    recorded, written and claimed since; also where the first record was half-way on the disk.
    """
    home = Local(tmp_path)
    layout, image = picture(1)
    whole: tuple[bytes, ...] = ()
    moments = [(lengths_now(FILES, str(home.path)), whole)]
    for number in (1, 2):
        tier = home.claim()
        for word in (b"a", b"b"):
            whole += (b"%d%s" % (number, word),)
            tier.journal.append(whole[-1])
            tier.journal.sync()
            moments.append((lengths_now(FILES, str(home.path)), whole))
        save(tier, home, Epoch(number, 1), image, layout)
    for then, history in moments:
        assert home.shelf().records(then) == history
    file, last = home.path / "2/journal", moments[-1][0]
    data, seen = file.read_bytes(), set()
    for length in range(len(data) + 1):
        found = home.shelf().records(last | {2: length})
        assert found == whole[: len(found)]
        seen.add(len(found))
    assert seen == {2, 3, 4}


def test_a_journal_of_another_domain_is_foreign(tmp_path: Path) -> None:
    """Shows that a swapped journal is not read as this domain's history."""
    one, two = Local(tmp_path), Local(tmp_path, "rank1", shard=1)
    one.claim()
    two.claim()
    shutil.copy(two.path / "1/journal", one.path / "1/journal")
    with pytest.raises(Refused, match="is the journal of incarnation 1 of rank1-"):
        one.claim()


def test_a_journal_of_another_incarnation_is_foreign(tmp_path: Path) -> None:
    """Shows that a journal moved between incarnations is not read as that one's."""
    home = Local(tmp_path)
    home.claim()
    home.claim()
    shutil.copy(home.path / "1/journal", home.path / "2/journal")
    with pytest.raises(Refused, match="is the journal of incarnation 1"):
        home.claim()


def test_a_journal_that_does_not_begin_with_a_seal_is_refused(tmp_path: Path) -> None:
    """Shows that a sound journal of some other use is not read as a domain's history."""
    home = Local(tmp_path)
    os.mkdir(home.path / "1")
    journal = Journal.create(FILES, str(home.path / "1/journal"))
    journal.append(b"not a seal")
    journal.close()
    with pytest.raises(FormatError, match="its first record is no seal"):
        home.claim()


# Damage


def saved(home: Local) -> tuple[Directory, bytearray, Manifest]:
    """Three epochs in two incarnations: full, delta on it, and a delta on that."""
    layout, first = picture(1, frozen=2 * MEBI)
    parent = save(home.claim(), home, Epoch(1, 1), first, layout).manifest
    tier = home.claim()
    for step, seed in ((2, 2), (3, 3)):
        _, image = picture(seed, frozen=2 * MEBI)
        parent = save(tier, home, Epoch(2, step), image, layout, parent=parent).manifest
    return tier, image, parent


def epoch_files(home: Local, manifest: Manifest) -> list[Path]:
    """Every file that an epoch lies in."""
    entry = home.shelf().manifests()[manifest.stamp.epoch]
    return [Path(entry.path), *(home.path / source for source in manifest.sources)]


def refuses(home: Local, epoch: Epoch, stale: bytes = bytes(4 * MEBI)) -> HandfastError:
    """The error of reading an epoch, which must come before the buffer is handed on.

    `stale` is what an earlier use left in the buffer.
    """
    with pytest.raises(HandfastError) as found:
        home.shelf().read(epoch, bytearray(stale))
    return found.value


def own_bytes(home: Local, manifest: Manifest, file: Path) -> list[range]:
    """The bytes of a data file that this epoch refers to."""
    source = str(file.relative_to(home.path))
    unit, size = manifest.chunk_bytes, manifest.image_bytes
    return [
        range(p.at, p.at + min((p.first + p.count) * unit, size) - p.first * unit)
        for p in manifest.pieces
        if manifest.sources[p.source] == source
    ]


def test_a_flipped_byte_is_always_found(tmp_path: Path) -> None:
    """Shows that one flipped bit, anywhere in a file of an epoch, never loads in silence.

    torch.load, safetensors, DCP, TorchSnapshot and Orbax each load it (20 of 20 trials).
    """
    home = Local(tmp_path)
    _, image, manifest = saved(home)
    draw = random.Random(7)
    for file in epoch_files(home, manifest):
        data = file.read_bytes()
        spans = own_bytes(home, manifest, file) or [range(len(data))]
        places = [at for span in spans for at in (span[0], span[-1])]
        places += [draw.choice(draw.choice(spans)) for _ in range(60)]
        for at in places:
            with file.open("r+b") as handle:
                handle.seek(at)
                handle.write(bytes([data[at] ^ (1 << draw.randrange(8))]))
            error = refuses(home, Epoch(2, 3))
            assert str(file) in str(error)
            with file.open("r+b") as handle:
                handle.seek(at)
                handle.write(data[at : at + 1])
    into = bytearray(len(image))
    home.shelf().read(Epoch(2, 3), into)
    assert into == image


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, -1])
def test_a_truncated_file_is_always_found(tmp_path: Path, length: int) -> None:
    """Shows that a short file is no epoch, also one of zero bytes (metaseq#53)."""
    home = Local(tmp_path)
    _, image, manifest = saved(home)
    for file in epoch_files(home, manifest):
        data = file.read_bytes()
        end = max(span[-1] for span in own_bytes(home, manifest, file) or [range(len(data))])
        file.write_bytes(data[: min(length, end) if length >= 0 else end])
        error = refuses(home, Epoch(2, 3), stale=image)  # the missing bytes stand there already
        assert isinstance(error, Damaged)
        assert str(file) in str(error)
        file.write_bytes(data)
    home.shelf().read(Epoch(2, 3))


WILD = 1 << 43  # bytes, of which a file system that has holes stores none


def test_a_manifest_whose_length_went_wild_is_one_bad_epoch(tmp_path: Path) -> None:
    """Shows that it takes no memory and no time, and that the other epochs are there as before."""
    home = Local(tmp_path)
    tier, _, _ = saved(home)
    os.truncate(home.path / "2/manifests/2-2.manifest", WILD)
    entries = tier.manifests()
    assert [epoch for epoch, entry in entries.items() if entry.manifest] == [
        Epoch(1, 1), Epoch(2, 3)
    ]  # fmt: skip
    wild = entries[Epoch(2, 2)]
    assert wild.verdict is Verdict.CORRUPT
    assert "2-2.manifest: more than " in wild.problem
    tier.read(Epoch(2, 3))
    before = chunk_files(home)
    tier.may_clean = True
    tier.release([Epoch(1, 1)])
    assert chunk_files(home) == before  # what the bad one refers to is not known


@pytest.mark.parametrize("name", ["2/journal", "domain.json"])
def test_a_domain_whose_file_went_wild_is_damaged(tmp_path: Path, name: str) -> None:
    """Shows that this is said, and that it is not the memory of whoever looks that finds it out."""
    home = Local(tmp_path)
    saved(home)
    os.truncate(home.path / name, WILD)
    with pytest.raises(Damaged, match=name):
        home.shelf().records()


def test_what_stands_behind_a_sealed_length_is_never_read(tmp_path: Path) -> None:
    """Shows that a sealed journal that grew wild is as good as before."""
    home = Local(tmp_path)
    home.claim().journal.append(b"one")
    home.claim()
    os.truncate(home.path / "1/journal", WILD)
    assert home.shelf().records() == (b"one",)


def test_a_pin_whose_length_went_wild_holds_all_the_same(tmp_path: Path) -> None:
    """Shows that what can't be read whole is not read, and frees nothing."""
    home = Local(tmp_path)
    tier, _, _ = saved(home)
    held = pin(FILES, home.root, home.name, Epoch(2, 2), "export")
    os.truncate(held.path, WILD)
    assert [p.holder for p in pins(FILES, home.root, home.name)] == [None]
    assert tier.release([Epoch(2, 2)]) == (Epoch(2, 2),)


def test_a_deleted_file_is_always_found(tmp_path: Path) -> None:
    """Shows that a lost data file is named, and a lost manifest is a missing epoch."""
    home = Local(tmp_path)
    _, _, manifest = saved(home)
    manifest_file, *data_files = epoch_files(home, manifest)
    for file in data_files:
        file.rename(tmp_path / "away")
        assert f"{file}: can't be read" in str(refuses(home, Epoch(2, 3)))
        (tmp_path / "away").rename(file)
    manifest_file.unlink()
    error = refuses(home, Epoch(2, 3))
    assert isinstance(error, Refused)
    assert error.verdict is Verdict.MISSING
    assert Epoch(2, 3) not in home.shelf().manifests()


def exchange(one: Path, two: Path) -> None:
    """Swap two files' names."""
    spare = one.with_name("spare")
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


def test_a_file_of_another_epoch_is_always_found(tmp_path: Path) -> None:
    """Shows that a manifest is held against its name, and data against their hashes."""
    home = Local(tmp_path)
    tier = home.claim()
    for step in (1, 2):
        layout, image = picture(step)
        save(tier, home, Epoch(1, step), image, layout)
    for kind, end, verdict in (
        ("manifests", ".manifest", Verdict.MIXED),
        ("chunks", ".safetensors", None),
    ):
        pair = [home.path / "1" / kind / f"1-{step}{end}" for step in (1, 2)]
        exchange(*pair)
        for step in (1, 2):
            error = refuses(home, Epoch(1, step))
            assert isinstance(error, Refused if verdict else Damaged)
            assert home.shelf().manifests()[Epoch(1, step)].verdict is verdict
        exchange(*pair)
    exchange(*(home.path / f"1/manifests/1-{step}.manifest" for step in (1, 2)))
    exchange(*(home.path / f"1/chunks/1-{step}.safetensors" for step in (1, 2)))
    for step in (1, 2):
        assert "stamped for epoch" in str(refuses(home, Epoch(1, step)))


def test_a_file_of_another_shard_is_always_found(tmp_path: Path) -> None:
    """Shows that a neighbour's epoch, whole and sound, is not accepted as one's own."""
    one, two = Local(tmp_path), Local(tmp_path, "rank1", shard=1)
    for seed, home in enumerate((one, two)):
        layout, image = picture(seed)
        save(home.claim(), home, Epoch(1, 1), image, layout)
    exchange(*(home.path / "1/chunks/1-1.safetensors" for home in (one, two)))
    assert isinstance(refuses(one, Epoch(1, 1)), Damaged)
    exchange(*(home.path / "1/manifests/1-1.manifest" for home in (one, two)))
    for home in (one, two):
        error = refuses(home, Epoch(1, 1))
        assert isinstance(error, Refused)
        assert error.verdict is Verdict.FOREIGN
        entry = home.shelf().manifests()[Epoch(1, 1)]
        assert (entry.verdict, entry.manifest) == (Verdict.FOREIGN, None)


def test_another_runs_epoch_is_foreign(tmp_path: Path) -> None:
    """Shows that the same rank's file of another run is refused (lm-resiliency#77)."""
    one, two = Local(tmp_path / "a"), Local(tmp_path / "b", run="run-2")
    for home in (one, two):
        layout, image = picture(1)
        save(home.claim(), home, Epoch(1, 1), image, layout)
    for kind in ("chunks", "manifests"):
        shutil.copytree(two.path / "1" / kind, one.path / "1" / kind, dirs_exist_ok=True)
    assert "stamped for run run-2, found as run run-1" in str(refuses(one, Epoch(1, 1)))


def test_an_epoch_moved_to_another_incarnation_is_mixed(tmp_path: Path) -> None:
    """Shows that a manifest counts only where its own incarnation put it."""
    home = Local(tmp_path)
    layout, image = picture(1)
    save(home.claim(), home, Epoch(1, 1), image, layout)
    home.claim()
    shutil.copy(home.path / "1/manifests/1-1.manifest", home.path / "2/manifests")
    assert "stamped for incarnation 1, found as incarnation 2" in str(refuses(home, Epoch(1, 1)))


def test_names_that_nobody_knows_are_left_alone(tmp_path: Path) -> None:
    """Shows that an operator's notes and half-written names are no epochs."""
    home = Local(tmp_path)
    home.claim()
    for name in ("notes.txt", "1-1.manifest.tmp", "01-1.manifest", "1-1.manifest.released"):
        (home.path / "1/manifests" / name).write_bytes(b"?")
    assert home.shelf().manifests() == {}


# Deltas


class Attentive(Posix):
    """Notes when clean pages are dropped and when a file is read, by its name."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def forget(self, fd: int) -> None:
        self.seen.append(("forget", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        super().forget(fd)

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        self.seen.append(("pread", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        return super().pread(fd, into, offset)


def test_what_counts_is_what_the_medium_holds(tmp_path: Path) -> None:
    """Before a byte of a save is held against its hash, the page cache is told to drop it: a bad
    disk must not be covered by what was just written. A restore takes what is in the cache, for
    that is what it loads, and it is held against its hash."""
    home, files = Local(tmp_path), Attentive()
    directory = claim(files, home.root, home.name)
    layout, image = picture(1)
    written = save(directory, home, Epoch(1, 1), image, layout)
    name = "1-1.safetensors"
    assert files.seen.index(("forget", f"{name}.tmp")) < files.seen.index(("pread", f"{name}.tmp"))
    into = bytearray(written.manifest.image_bytes)
    directory.read(Epoch(1, 1), memoryview(into), digest=written.digest)
    assert ("pread", name) in files.seen
    assert ("forget", name) not in files.seen


def test_what_is_read_once_leaves_the_page_cache_alone(tmp_path: Path) -> None:
    """Shows that a load reads past the cache what is not in it, and that a copy which is only
    verified is in it then, for the load that follows."""
    home, files = Local(tmp_path), Posix()
    layout, image = picture(1, nbytes=40 * MEBI)
    save(claim(files, home.root, home.name), home, Epoch(1, 1), image, layout)
    found = home.shelf().manifests()[Epoch(1, 1)].sound()
    loaded = bytearray(found.image_bytes)

    def take(start: int, data: memoryview) -> None:
        loaded[start : start + len(data)] = data

    data = home.path / "1/chunks/1-1.safetensors"
    with closing(files, files.open(str(data))) as fd:
        files.forget(fd)
        if files.cached(fd):
            pytest.skip("this file system keeps its pages")
        home.shelf().visit(found, take)
        assert loaded == image[: found.image_bytes]
        with closing(files, files.open(str(data))) as other:
            if files.direct(other, True):
                assert not files.cached(fd)
        home.shelf().verify(found)
        assert files.cached(fd)


class Rotting(Posix):
    """A disk that changes one byte of each data file once it was synced."""

    def __init__(self, at: int) -> None:
        self.at = at

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if "/chunks/" in path:
            with open(path, "r+b") as file:
                file.seek(self.at, os.SEEK_SET if self.at >= 0 else os.SEEK_END)
                file.write(b"rot")
                os.fsync(file.fileno())


@pytest.mark.parametrize("at", [0, -3])
def test_a_sample_has_the_first_chunk_and_the_last(tmp_path: Path, at: int) -> None:
    """Shows that what is read back by default is more than one place: where writing began, and
    where it ended."""
    home = Local(tmp_path)
    layout, image = picture(1, nbytes=40 * MEBI)
    tier = claim(Rotting(at), home.root, home.name)
    with pytest.raises(SaveFailed, match="differs from its hash"):
        save(tier, home, Epoch(1, 1), image, layout, verify="sampled")
    assert home.shelf().manifests() == {}


def test_a_part_can_be_read_alone(tmp_path: Path) -> None:
    """What was asked for is there, verified; damage that is far from it is not even seen."""
    home = Local(tmp_path)
    tier = home.claim()
    layout, image = picture(1, nbytes=40 * MEBI)
    save(tier, home, Epoch(1, 1), image, layout)
    with (home.path / "1/chunks/1-1.safetensors").open("r+b") as handle:
        handle.seek(2 * MEBI)
        handle.write(b"rot")
    into = bytearray(layout.nbytes)
    tier.read(Epoch(1, 1), into, only=[range(17 * MEBI, 17 * MEBI + 8), range(3, 3)])
    assert into[17 * MEBI : 17 * MEBI + 8] == image[17 * MEBI : 17 * MEBI + 8]
    assert not any(into[: 16 * MEBI])
    with pytest.raises(Damaged, match="chunk 2 "):
        tier.read(Epoch(1, 1), into, only=[range(3 * MEBI, 3 * MEBI + 1)])


class Watched:
    """An image that counts how often its bytes are looked at."""

    def __init__(self, image: bytearray) -> None:
        self._held = Held(memoryview(image))
        self.looked = 0

    def lend(self, span: Span) -> AbstractContextManager[memoryview]:
        self.looked += span.end - span.start
        return self._held.lend(span)


@pytest.mark.parametrize("still", [0, 8, 9, 70])
def test_what_has_changed_altogether_is_hashed_as_it_is_written(tmp_path: Path, still: int) -> None:
    """Shows that an image of which all has changed is gone through once, and a little; that any run
    of chunks which stayed the same is found; and that it is referred to where that is worth it."""
    home = Local(tmp_path)
    tier = home.claim()
    layout, image = picture(1, nbytes=70 * MEBI)
    parent = save(tier, home, Epoch(1, 1), image, layout, verify="fsync").manifest
    before = bytes(image)
    start = 37 * MEBI if still < 70 else len(layout.header)
    for at in range(len(layout.header), layout.nbytes, 4096):
        if not start <= at < start + still * MEBI:
            image[at] ^= 1
    seen = Watched(image)
    written = save(tier, home, Epoch(1, 2), seen, layout, parent=parent, verify="fsync")
    whole = layout.nbytes
    referred = still >= 9  # an eighth
    fresh = max(0, 71 - still) if referred else 71
    assert (fresh - 1) * MEBI < written.bytes_written < fresh * MEBI + 4096
    looks = {0: 1.0}.get(still, 1.0 + fresh * MEBI / whole)  # hashed, and then written
    assert looks * whole - 2 * MEBI < seen.looked < (looks + 0.3) * whole
    into = bytearray(layout.nbytes)
    tier.read(Epoch(1, 2), into)
    assert into == image
    tier.read(Epoch(1, 1), into)
    assert into == before


class Restless(Watched):
    """An image of which a byte changes once it was looked at for so many bytes."""

    def __init__(self, image: bytearray, after: int, at: int) -> None:
        super().__init__(image)
        self._image, self._after, self._at = image, after, at

    def lend(self, span: Span) -> AbstractContextManager[memoryview]:
        if self.looked >= self._after:
            self._image[self._at] ^= 1
            self._after = 1 << 60
        return super().lend(span)


@pytest.mark.parametrize("verify", ["fsync", "sampled", "full"])
def test_an_image_that_changes_between_its_hash_and_its_writing_is_no_epoch(
    tmp_path: Path, verify: Verify
) -> None:
    """Shows that a delta, whose image is hashed before it is written, holds what it was hashed as:
    with `images=0` another thread of the training made epochs that nothing could read again."""
    home = Local(tmp_path)
    tier = home.claim()
    layout, image = picture(1, nbytes=24 * MEBI)
    parent = save(tier, home, Epoch(1, 1), image, layout).manifest
    for at in range(4 * MEBI, 9 * MEBI, 4096):
        image[at] ^= 1
    seen = Restless(image, layout.nbytes + 2 * MEBI, 8 * MEBI)  # all was hashed by then
    with pytest.raises(SaveFailed, match=r"changed while it was written.*no other thread"):
        save(tier, home, Epoch(1, 2), seen, layout, parent=parent, verify=verify)
    assert set(home.shelf().manifests()) == {Epoch(1, 1)}
    save(tier, home, Epoch(1, 3), image, layout, parent=parent, verify=verify)
    tier.read(Epoch(1, 3))


def test_chains_stay_short(tmp_path: Path) -> None:
    """Shows that an epoch never comes to lie in more files than a restore should open."""
    home = Local(tmp_path)
    tier = home.claim()
    layout, image = picture(1, nbytes=24 * MEBI)
    parent: Manifest | None = None
    most = 0
    for step in range(1, SOURCES_MAX + 4):
        image[step * MEBI] ^= 1
        parent = save(
            tier, home, Epoch(1, step), image, layout, parent=parent, verify="fsync"
        ).manifest
        most = max(most, len(parent.sources))
        tier.release([Epoch(1, step - 1)])
    assert most == SOURCES_MAX
    into = bytearray(layout.nbytes)
    tier.read(parent.stamp.epoch, into)
    assert into == image


def test_rot_in_the_parent_does_not_spread(tmp_path: Path) -> None:
    """Shows that a delta whose referenced bytes no longer read back right is written in full."""
    home = Local(tmp_path)
    tier = home.claim()
    layout, image = picture(1)
    parent = save(tier, home, Epoch(1, 1), image, layout).manifest
    with (home.path / "1/chunks/1-1.safetensors").open("r+b") as handle:
        handle.seek(MEBI)
        handle.write(b"rot")
    child = save(tier, home, Epoch(1, 2), image, layout, parent=parent, verify="full")
    assert child.manifest.sources == ("1/chunks/1-2.r1.safetensors",)
    tier.read(Epoch(1, 2))
    assert isinstance(refuses(home, Epoch(1, 1)), Damaged)


def test_another_structure_is_written_in_full(tmp_path: Path) -> None:
    """Shows that a changed image size makes a full image, not a wrong reference."""
    home = Local(tmp_path)
    tier = home.claim()
    layout, image = picture(1)
    parent = save(tier, home, Epoch(1, 1), image, layout).manifest
    layout, image = picture(1, nbytes=2 * MEBI)
    child = save(tier, home, Epoch(1, 2), image, layout, parent=parent)
    assert child.manifest.sources == ("1/chunks/1-2.safetensors",)


def test_a_full_image_is_a_safetensors_file(tmp_path: Path) -> None:
    """Shows that nobody is locked in: the file opens with the safetensors library."""
    home = Local(tmp_path)
    layout, image = picture(1)
    save(home.claim(), home, Epoch(1, 1), image, layout)
    slot = next(slot for slot in layout.slots if slot.spec.path == "model/weights")
    file = home.path / "1/chunks/1-1.safetensors"
    with safe_open(file, framework="numpy") as opened:
        assert opened.get_tensor("model/weights").tobytes() == image[slot.start :][: slot.nbytes]


# Releasing and pins


def chunk_files(home: Local) -> list[str]:
    return sorted(str(p.relative_to(home.path)) for p in home.path.glob("*/chunks/*"))


def test_release_keeps_what_a_retained_manifest_refers_to(tmp_path: Path) -> None:
    """Shows that data go with the last manifest that needs them, across incarnations."""
    home = Local(tmp_path)
    tier, image, _ = saved(home)
    tier.may_clean = True
    tier.release([Epoch(1, 1), Epoch(2, 2)])
    assert chunk_files(home) == ["1/chunks/1-1.safetensors", "2/chunks/2-3.delta"]
    into = bytearray(len(image))
    tier.read(Epoch(2, 3), into)
    assert into == image
    tier.release([Epoch(2, 3)])
    assert chunk_files(home) == []
    assert list(home.path.glob("*/manifests/*")) == []


def test_a_superseded_owner_releases_nothing(tmp_path: Path) -> None:
    """Shows that retention stops with the claim of a successor."""
    home = Local(tmp_path)
    tier, _, _ = saved(home)
    home.claim()
    with pytest.raises(Superseded, match="a later one has claimed"):
        tier.release([Epoch(2, 2)])
    tier.read(Epoch(2, 2))


def test_a_manifest_that_can_not_be_read_holds_all_data(tmp_path: Path) -> None:
    """Shows that what an unreadable manifest may refer to is kept until it goes itself."""
    home = Local(tmp_path)
    tier, _, _ = saved(home)
    (home.path / "2/manifests/2-3.manifest").write_bytes(b"rot")
    before = chunk_files(home)
    tier.release([Epoch(2, 2)])
    assert chunk_files(home) == before
    tier.release([Epoch(2, 3)])
    assert chunk_files(home) == ["1/chunks/1-1.safetensors"]


def test_what_failed_writes_left_is_swept(tmp_path: Path) -> None:
    """Shows that a disk does not fill with the leftovers of crashes."""
    home = Local(tmp_path)
    home.claim()
    left = [home.path / "1/chunks" / name for name in ("9-9.safetensors", "9-9.delta.tmp")]
    left.append(home.path / "1/manifests/9-9.manifest.tmp")
    for file in left:
        file.write_bytes(b"half")
    tier = home.claim()
    tier.release([])
    assert all(file.exists() for file in left)
    tier.may_clean = True
    tier.release([])
    assert not any(file.exists() for file in left)


def test_what_can_not_be_removed_keeps_nothing_else_from_going(tmp_path: Path) -> None:
    """Shows that somebody's folder among the chunks is named, stays, and costs no space besides."""
    home = Local(tmp_path)
    tier, image, _ = saved(home)
    tier.may_clean = True
    (home.path / "1/chunks/0-old").mkdir()
    with pytest.raises(SaveFailed, match=r"1/chunks/0-old: .*EISDIR.*What to do: .*move it away"):
        tier.release([Epoch(1, 1), Epoch(2, 2)])
    assert chunk_files(home) == [
        "1/chunks/0-old", "1/chunks/1-1.safetensors", "2/chunks/2-3.delta"
    ]  # fmt: skip
    assert not list(home.path.glob("*/manifests/*.released"))
    into = bytearray(len(image))
    tier.read(Epoch(2, 3), into)
    assert into == image
    (home.path / "1/chunks/0-old").rmdir()
    tier.release([])


@pytest.mark.parametrize("path", ["1-1.manifest.released", "2-2.manifest.released"])
def test_a_manifest_that_will_not_go_keeps_its_data_and_no_other(tmp_path: Path, path: str) -> None:
    """Shows that of several epochs those that can be released are."""
    home = Local(tmp_path)
    tier, _, _ = saved(home)
    tier.may_clean = True
    tier.files = FaultyFiles(FILES, 1, errno.EPERM, kinds=("rename",), path=path)
    with pytest.raises(SaveFailed, match="EPERM"):
        tier.release([Epoch(1, 1), Epoch(2, 2)])
    left = Epoch(1, 1) if path.startswith("1-1") else Epoch(2, 2)
    assert list(tier.manifests()) == [left, Epoch(2, 3)]
    tier.read(left)
    tier.read(Epoch(2, 3))


def test_a_write_in_progress_is_not_swept(tmp_path: Path) -> None:
    """Shows that a release from another thread takes neither the new file nor its parent's."""
    home = Local(tmp_path)
    tier = home.claim()
    layout, first = picture(1, frozen=2 * MEBI)
    _, second = picture(2, frozen=2 * MEBI)
    parent = save(tier, home, Epoch(1, 1), first, layout).manifest
    released: list[object] = []

    def progress(done: int, total: int) -> None:
        thread = threading.Thread(target=lambda: released.append(tier.release([Epoch(1, 1)])))
        thread.start()
        thread.join()

    stamp = msgspec.structs.replace(parent.stamp, step=2)
    child = tier.write(
        stamp, layout, second, objects=b"", aliases={}, environment={}, replicated=(),
        structure="", parent=parent, progress=progress,
    )  # fmt: skip
    assert child.manifest.sources == ("1/chunks/1-2.delta", "1/chunks/1-1.safetensors")
    assert released
    assert list(tier.manifests()) == [Epoch(1, 2)]
    into = bytearray(layout.nbytes)
    tier.read(Epoch(1, 2), into)
    assert into == second


def test_a_pinned_epoch_stays_until_the_pin_goes(tmp_path: Path) -> None:
    """Shows that an export or an evaluation can't lose the epoch that it reads (orbax#394)."""
    home = Local(tmp_path)
    tier, _, _ = saved(home)
    held = pin(FILES, home.root, home.name, Epoch(2, 2), "export to s3")
    (found,) = pins(FILES, home.root, home.name)
    assert (found.epoch, found.holder) == (Epoch(2, 2), held.holder)
    assert found.holder is not None
    assert (found.holder.pid, found.holder.purpose) == (os.getpid(), "export to s3")
    assert tier.release([Epoch(2, 2), Epoch(2, 3)]) == (Epoch(2, 2),)
    tier.read(Epoch(2, 2))
    found.release()
    held.release()
    assert pins(FILES, home.root, home.name) == ()
    assert tier.release([Epoch(2, 2)]) == ()
    assert Epoch(2, 2) not in tier.manifests()


def test_pins_are_open_to_whoever_owns_the_domain(tmp_path: Path) -> None:
    """Shows that a careful root who reads a user's run does not stop its releases: pins/ has the
    mode of the domain's directory, and its owner where that may be given."""
    home = Local(tmp_path)
    saved(home)
    home.path.chmod(0o750)
    if os.geteuid() == 0:
        os.chown(home.path, 65534, 65533)
    before = os.umask(0o077)
    try:
        pin(FILES, home.root, home.name, Epoch(2, 2), "export")
    finally:
        os.umask(before)
    made, model = (home.path / "pins").stat(), home.path.stat()
    assert (made.st_mode, made.st_uid, made.st_gid) == (model.st_mode, model.st_uid, model.st_gid)


def test_a_missing_epoch_can_not_be_pinned(tmp_path: Path) -> None:
    """Shows that a reader never holds what is not there, and leaves no pin behind."""
    home = Local(tmp_path)
    home.claim()
    with pytest.raises(Refused, match="has no manifest"):
        pin(FILES, home.root, home.name, Epoch(1, 1), "evaluation")
    assert pins(FILES, home.root, home.name) == ()


def test_a_pin_that_can_not_be_read_holds_all_the_same(tmp_path: Path) -> None:
    """Shows that damage to a pin never frees what it holds."""
    home = Local(tmp_path)
    tier, _, _ = saved(home)
    with pin(FILES, home.root, home.name, Epoch(2, 2), "export") as held:
        Path(held.path).write_bytes(b"")
        assert [p.holder for p in pins(FILES, home.root, home.name)] == [None]
        assert tier.release([Epoch(2, 2)]) == (Epoch(2, 2),)
    assert tier.release([Epoch(2, 2)]) == ()


@pytest.mark.parametrize("verify", ["none", ""])
def test_an_unknown_level_is_refused(tmp_path: Path, verify: str) -> None:
    """Shows that a typo can't turn verification off."""
    home = Local(tmp_path)
    layout, image = picture(1)
    with pytest.raises(ValueError, match="choose fsync, sampled or full"):
        save(home.claim(), home, Epoch(1, 1), image, layout, verify=verify)


@pytest.mark.parametrize("spoil", [lambda i: i[:-1], lambda i: b"x" + i[1:]])
def test_an_image_that_is_not_its_layouts_is_refused(
    tmp_path: Path, spoil: Callable[[bytearray], bytearray]
) -> None:
    """Shows that a short image, or one without its header, leaves nothing behind."""
    home = Local(tmp_path)
    layout, image = picture(1)
    with pytest.raises(ValueError, match="image"):
        save(home.claim(), home, Epoch(1, 1), bytearray(spoil(image)), layout)
    assert chunk_files(home) == []


def test_identities_are_plain_values(tmp_path: Path) -> None:
    """Shows what is known of a domain before it is claimed."""
    home = Local(tmp_path, shard=3)
    found = read_identity(FILES, home.root, home.name)
    assert isinstance(found, Identity)
    assert (found.name, found.run, found.shard, found.format) == ("rank0", "run-1", 3, 1)
