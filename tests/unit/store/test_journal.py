"""Shows that a journal loses nothing that was synced, invents nothing, and hides no damage."""

import errno
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handfast.errors import Damaged, FormatError, SaveFailed
from handfast.store.files import Posix
from handfast.store.journal import (
    FRAME,
    HEADER,
    MARKER,
    RECORD_MAX,
    TORN_MAX,
    Journal,
    Scan,
    scan,
)
from handfast.testing.faults import Fault, FaultyFiles, Hasty

FILES = Posix()

RECORDS = (b"one", b"", MARKER * 3, b"\0" * 40, b"five")


def written(path: Path, batches: tuple[tuple[bytes, ...], ...]) -> list[int]:
    """A journal with a sync after each batch; returns the length at each sync."""
    journal = Journal.create(FILES, str(path))
    lengths = [journal.length]
    for batch in batches:
        for record in batch:
            journal.append(record)
        journal.sync()
        lengths.append(journal.length)
    journal.close()
    return lengths


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@given(batches=st.lists(st.lists(st.binary(max_size=60)), max_size=5))
@settings(max_examples=60, deadline=None)
def test_records_come_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[bytes]]
) -> None:
    """Shows that what was appended is what is read, whatever the bytes."""
    path = tmp_path_factory.mktemp("j") / "journal"
    lengths = written(path, tuple(map(tuple, batches)))
    found = scan(FILES, str(path))
    assert found.records == tuple(record for batch in batches for record in batch)
    assert (found.length, found.torn) == (path.stat().st_size, False)
    assert lengths[-1] == found.length


def test_the_bytes_are_those_of_the_format_document(path: Path) -> None:
    """Shows that a reader that knows only docs/format.md reads what is written."""
    lengths = written(path, (RECORDS[:2], RECORDS[2:]))
    data = path.read_bytes()

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")

    assert (data[:6], number(6, 2), number(12, 4)) == (b"HFJRNL", 1, zlib.crc32(data[:12]))
    at, seed = 16, number(12, 4)
    for sequence, record in enumerate(RECORDS):
        end = at + 28 + number(at + 24, 4)
        assert data[at : at + 4] == b"\xf1HF\x0a"
        assert number(at + 4, 4) == zlib.crc32(data[at + 8 : end], seed)
        assert number(at + 8, 8) == sequence
        assert number(at + 16, 8) == lengths[0 if sequence < 2 else 1]
        assert data[at + 28 : end] == record
        at = end
    assert at == len(data)


def test_a_journal_cut_at_every_byte_is_cut_at_a_record(path: Path) -> None:
    """Shows that a crash in the middle of an append loses that record only."""
    written(path, tuple((record,) for record in RECORDS))
    data = path.read_bytes()
    ends = [HEADER]
    for record in RECORDS:
        ends.append(ends[-1] + FRAME + len(record))
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        found = scan(FILES, str(path))
        whole = sum(end <= cut for end in ends) - 1
        assert found.records == RECORDS[: max(whole, 0)]
        assert found.torn == (cut > 0 and cut not in ends)
        assert found.length == (ends[whole] if whole >= 0 else 0)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_flipped_bit_is_found_or_lies_in_the_torn_tail(path: Path, batch: int) -> None:
    """Shows that bit rot is loud, but for the last sync's records, which may be a torn append."""
    batches = tuple(RECORDS[at : at + batch] for at in range(0, len(RECORDS), batch))
    lengths = written(path, batches)
    data = path.read_bytes()
    kept = sum(map(len, batches[:-1]))
    for at in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            if at < lengths[-2]:
                with pytest.raises(FormatError, match=str(path)):
                    scan(FILES, str(path))
            else:
                found = scan(FILES, str(path))
                assert found.torn
                assert kept <= len(found.records) < len(RECORDS)
                assert found.records == RECORDS[: len(found.records)]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_overwritten_bytes_never_invent_a_record(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Shows that whatever stands in the file, what is read is a prefix of what was written."""
    path = tmp_path_factory.mktemp("j") / "journal"
    written(path, (RECORDS[:2], RECORDS[2:]))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=80)) + whole[at + 5 :])
    try:
        found = scan(FILES, str(path))
    except FormatError:
        return
    assert found.records == RECORDS[: len(found.records)]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_writes_that_no_sync_promised_may_be_lost_in_any_order(path: Path, lost: int) -> None:
    """Shows that a power loss that kept a later record and lost an earlier one is no damage."""
    first = written(path, ((b"promised",),))[-1]
    journal = Journal.create(FILES, f"{path}2")
    journal.append(b"promised")
    journal.sync()
    for record in (b"aaaa", b"bbbb", b"cccc"):
        journal.append(record)
    data = bytearray(Path(f"{path}2").read_bytes())
    at = first + lost * (FRAME + 4)
    data[at : at + FRAME + 4] = bytes(FRAME + 4)
    path.write_bytes(data)
    found = scan(FILES, str(path))
    assert found.records == (b"promised", b"aaaa", b"bbbb")[: 1 + lost]
    assert (found.torn, found.length) == (True, at)


def test_damage_names_the_file_the_byte_and_the_way_out(path: Path) -> None:
    """Shows that an operator is told where to look and what to do."""
    lengths = written(path, ((b"one",), (b"two",)))
    data = bytearray(path.read_bytes())
    data[lengths[0] + FRAME] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=rf"{path}: damaged at byte 16: record 0 .*What to do"):
        scan(FILES, str(path))


def test_a_record_that_stands_twice_is_damage(path: Path) -> None:
    """Shows that a frame that is sound but out of its place is not read on."""
    lengths = written(path, ((b"one",), (b"two",)))
    data = path.read_bytes()
    path.write_bytes(data + data[lengths[1] :])
    with pytest.raises(Damaged, match="record 1 stands where 2 belongs"):
        scan(FILES, str(path))


def test_a_record_that_holds_another_journal_is_not_read_as_one(path: Path) -> None:
    """Shows that frames inside a torn record are no proof of damage: checksums are a file's own."""
    written(path, ((b"one",), (b"two",), (b"three",)))
    inner = path.read_bytes()
    outer = path.with_name("outer")
    lengths = written(outer, ((b"x",), (inner,)))
    data = bytearray(outer.read_bytes())
    data[lengths[1] + 8] ^= 1
    outer.write_bytes(data)
    found = scan(FILES, str(outer))
    assert (found.records, found.torn) == ((b"x",), True)


def test_a_sealed_journal_ends_at_its_seal(path: Path) -> None:
    """Shows that what was appended after a successor's seal is void, and before it is guarded."""
    lengths = written(path, ((b"one",), (b"two",), (b"late",)))
    found = scan(FILES, str(path), limit=lengths[2])
    assert (found.records, found.length, found.torn) == ((b"one", b"two"), lengths[2], False)
    data = bytearray(path.read_bytes())
    data[lengths[2] - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match="record 1 can't be read"):
        scan(FILES, str(path), limit=lengths[2])
    path.write_bytes(data[: lengths[1]])
    with pytest.raises(Damaged, match=f"though it was sealed at {lengths[2]}"):
        scan(FILES, str(path), limit=lengths[2])
    path.unlink()
    assert scan(FILES, str(path), limit=0).records == ()


def test_a_missing_journal_is_damage(path: Path) -> None:
    """Shows that a journal that is gone is never an empty one."""
    with pytest.raises(Damaged, match="ENOENT"):
        scan(FILES, str(path))


@pytest.mark.parametrize("data", [b"", b"HFJRNL\1", bytes(7), bytes(16)])
def test_a_header_that_never_became_durable_is_torn(path: Path, data: bytes) -> None:
    """Shows that a creator's death before its first sync leaves an empty journal, not an error."""
    path.write_bytes(data)
    found = scan(FILES, str(path))
    assert (found.records, found.length, found.torn) == ((), 0, bool(data))


def test_records_without_a_header_are_damage(path: Path) -> None:
    """Shows that a zeroed first block is loud: the header was durable before any record."""
    written(path, ((b"one",),))
    path.write_bytes(bytes(HEADER) + path.read_bytes()[HEADER:])
    with pytest.raises(Damaged, match="header's checksum"):
        scan(FILES, str(path))


@pytest.mark.parametrize(
    ("head", "problem"),
    [(b"HFJRNL\2\0", "format 2; this handfast reads format 1"), (b"SQLite\1\0", "not a journal")],
)
def test_foreign_files_are_refused_by_name(path: Path, head: bytes, problem: str) -> None:
    """Shows that a later format, or another program's file, is not read as damage."""
    body = head + b"abcd"
    path.write_bytes(body + zlib.crc32(body).to_bytes(4, "little"))
    with pytest.raises(FormatError, match=problem):
        scan(FILES, str(path))


def test_a_journal_is_never_created_over_another(path: Path) -> None:
    """Shows that two writers can't come to share a journal."""
    written(path, ((b"one",),))
    with pytest.raises(SaveFailed, match="EEXIST"):
        Journal.create(FILES, str(path))
    assert scan(FILES, str(path)).records == (b"one",)


def test_a_record_has_a_largest_size(path: Path) -> None:
    """Shows that a record that no reader would accept is not written."""
    journal = Journal.create(FILES, str(path))
    with pytest.raises(ValueError, match="at most"):
        journal.append(bytes(RECORD_MAX + 1))
    journal.append(b"small")
    assert scan(FILES, str(path)).records == (b"small",)


def test_a_closed_journal_takes_nothing(path: Path) -> None:
    """Shows that close is final, and may be repeated."""
    journal = Journal.create(FILES, str(path))
    journal.close()
    journal.close()
    with pytest.raises(SaveFailed, match="it was closed"):
        journal.append(b"late")


@pytest.mark.parametrize("kind", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_the_first_error_ends_a_journal(path: Path, kind: str, error: int) -> None:
    """Shows that no append or sync is tried again where one failed (fsyncgate)."""
    files = FaultyFiles(FILES, fail_at=3, error=error, kinds=(kind,))
    journal = Journal.create(files, str(path))
    journal.append(b"one")
    journal.sync()
    with pytest.raises(SaveFailed, match=rf"{path}: .*{errno.errorcode[error]}.*What to do"):
        [(journal.append(b"two"), journal.sync()) for _ in range(2)]
    calls = len(files.calls)
    for again in (lambda: journal.append(b"three"), journal.sync):
        with pytest.raises(SaveFailed, match="takes no more records"):
            again()
    assert len(files.calls) == calls
    assert scan(FILES, str(path)).records[:1] == (b"one",)
    journal.close()


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, "short"])
def test_every_call_of_a_journal_may_fail(tmp_path: Path, fault: Fault) -> None:
    """Shows that whatever call fails, a synced record stays, and no file is synced again."""
    for k in range(1, 20):
        path = str(tmp_path / str(k))
        files = FaultyFiles(FILES, fail_at=k, error=fault)
        synced: tuple[bytes, ...] = ()
        problem = ""
        try:
            journal = Journal.create(files, path)
            for record in (b"one", b"two"):
                journal.append(record)
                journal.sync()
                synced += (record,)
            journal.close()
        except SaveFailed as error:
            problem = str(error)
        failed = [at for at, call in enumerate(files.calls) if call.failed]
        assert bool(failed) == (path in problem)
        if failed and files.calls[failed[0]].kind == "fdatasync":
            assert "fdatasync" not in [call.kind for call in files.calls[failed[0] + 1 :]]
        if FILES.exists(path):
            assert scan(FILES, path).records[: len(synced)] == synced
        if not files.fired:
            assert synced == (b"one", b"two")
            assert k > 3
            return
    pytest.fail("the loop never came to a run without a fault")


def test_a_long_journal_is_read_in_pieces_and_a_long_tail_is_no_torn_one(path: Path) -> None:
    """Shows that the bound on what a crash may leave is kept by the writer, and held by the reader,
    wherever records cross the border of a piece."""
    files = FaultyFiles(Hasty())
    journal = Journal.create(files, str(path))
    records = tuple(bytes([n]) * (RECORD_MAX - n) for n in range(6))
    for record in records:
        journal.append(record)
    assert [call.kind for call in files.calls].count("fdatasync") == 2  # the header's, and one more
    journal.close()
    whole = scan(FILES, str(path))
    assert whole.records == records
    assert not whole.torn
    assert scan(FILES, str(path), whole.length).records == records
    os.truncate(path, whole.length + TORN_MAX - 1)
    assert scan(FILES, str(path)) == Scan(records, whole.length, torn=True)
    os.truncate(path, whole.length + TORN_MAX)
    with pytest.raises(Damaged, match=f"damaged at byte {whole.length}: .*no crash leaves"):
        scan(FILES, str(path))
