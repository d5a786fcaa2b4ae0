"""Shows that zip archives are read by their directory, and that damage in them is found."""

from __future__ import annotations

import contextlib
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchkit import rezipped, save

from handfast.audit import archive
from handfast.audit.archive import read_archive
from handfast.audit.extent import Reader
from handfast.errors import Damaged, FormatError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of torch.save with a few tensors."""
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    return save(path, {n: torch.arange(n * 7, dtype=torch.int16) for n in range(5)})


def test_records_lie_where_zipfile_finds_them(saved: str, reader: Reader) -> None:
    """Shows names, lengths, checksums and bytes of each against Python's own module."""
    found = read_archive(reader, saved)
    assert found.damage == ()
    whole = Path(saved).read_bytes()
    with zipfile.ZipFile(saved) as expected:
        assert list(found.records) == expected.namelist()
        for name, record in found.records.items():
            info = expected.getinfo(name)
            assert (record.nbytes, record.crc) == (info.file_size, info.CRC)
            assert record.bytes(1 << 20) == expected.read(name)
            assert whole[record.start : record.start + record.nbytes] == expected.read(name)
            assert record.header == info.header_offset


def test_no_record_is_read_for_the_directory(
    saved: str, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that only the end of the file is looked at until a record's bytes are asked for."""
    looked: list[tuple[int, int]] = []
    real = reader.read
    monkeypatch.setattr(
        reader,
        "read",
        lambda path, into, at: (looked.append((at, len(into))), real(path, into, at)),
    )
    monkeypatch.setattr(archive, "COMMENT", 0)
    found = read_archive(reader, saved)
    last = max(record.header for record in found.records.values())
    assert looked
    assert min(at for at, _ in looked) > last


def test_checksums_of_all_records_are_held_against_their_bytes(
    saved: str, reader: Reader, tmp_path: Path
) -> None:
    """Shows that a flipped bit in each record is found and named, and progress is told."""
    told: list[tuple[int, int]] = []
    found = read_archive(reader, saved)
    assert [*found.verify_crc(lambda done, total: told.append((done, total)))] == []
    total = sum(record.nbytes for record in found.records.values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for name, record in found.records.items():
        if record.nbytes:
            spoilt = bytearray(Path(saved).read_bytes())
            spoilt[record.start + record.nbytes // 2] ^= 4
            path = tmp_path / "spoilt.pt"
            path.write_bytes(spoilt)
            with Reader() as other:
                copy = read_archive(other, str(path))
                (error,) = copy.verify_crc()
                assert f"{path}: {name}: its bytes, from byte {record.header:,}" in str(error)
                with pytest.raises(Damaged, match="CRC-32"):
                    copy.records[name].bytes(1 << 20)


def test_large_records_are_checked_in_pieces(
    saved: str, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the checksum of a record does not depend on how it is read."""
    monkeypatch.setattr(archive, "PIECE", 3)
    assert [*read_archive(reader, saved).verify_crc()] == []


def test_every_shorter_file_is_damaged(saved: str, tmp_path: Path) -> None:
    """Shows it for each length, to the byte."""
    whole = Path(saved).read_bytes()
    path = tmp_path / "cut.pt"
    for length in [*range(0, len(whole), 97), *range(len(whole) - 200, len(whole))]:
        path.write_bytes(whole[:length])
        with Reader() as reader, pytest.raises(Damaged, match=r"cut\.pt: .*What to do"):
            read_archive(reader, str(path))


@given(st.data())
def test_a_directory_that_was_changed_raises_only_what_is_told(
    saved: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Shows it for bytes of the file's end that were changed, then read as far as can be."""
    whole = bytearray(Path(saved).read_bytes())
    with Reader() as reader:
        start = max(record.header for record in read_archive(reader, saved).records.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(start, len(whole) - 1))
        whole[at] = data.draw(st.sampled_from((0, 0xFF, whole[at] ^ 1, whole[at] ^ 0x80)))
    path = tmp_path_factory.mktemp("changed") / "model.pt"
    path.write_bytes(whole)
    with Reader() as reader, contextlib.suppress(FormatError):
        found = read_archive(reader, str(path))
        for record in found.records.values():
            with contextlib.suppress(FormatError):
                record.bytes(1 << 20)
        assert all(isinstance(error, Damaged) for error in found.verify_crc())
    path.unlink()


def test_a_record_of_which_the_header_is_gone_is_damaged(
    saved: str, tmp_path: Path, reader: Reader
) -> None:
    """Shows it for a header that was overwritten, and for one of another record."""
    whole = bytearray(Path(saved).read_bytes())
    name, record = next(item for item in read_archive(reader, saved).records.items()
                        if item[0].endswith("data/3"))  # fmt: skip
    for at, byte in ((record.header, 0), (record.header + 30, 0x41)):
        spoilt = bytearray(whole)
        spoilt[at] = byte
        path = tmp_path / f"{at}.pt"
        path.write_bytes(spoilt)
        found = read_archive(reader, str(path))
        assert found.damage == ()
        with pytest.raises(Damaged, match=rf"{name}: byte {record.header:,}: its header is gone"):
            found.records[name].bytes(100)
        assert [str(error) for error in found.verify_crc()] == [
            f"{path}: {name}: byte {record.header:,}: its header is gone. {archive.TO_DO}"
        ]


def entry_of(whole: bytes, name: str) -> int:
    """Where the directory has the entry of a record."""
    return whole.rindex(name.encode()) - 46


def test_a_record_that_goes_beyond_the_records_is_damaged(
    saved: str, tmp_path: Path, reader: Reader
) -> None:
    """Shows it where the directory's length is too large, and where the header's fields are."""
    whole = bytearray(Path(saved).read_bytes())
    name = "model/data/4"
    at = entry_of(whole, name)
    path = tmp_path / "long.pt"
    struct.pack_into("<II", whole, at + 20, 1 << 20, 1 << 20)
    path.write_bytes(whole)
    found = read_archive(reader, str(path))
    assert (
        [str(error).split(". What")[0] for error in found.damage]
        == [
            str(error).split(". What")[0]
            for error in found.damage
            if f"{name}: it takes" in str(error)
        ]
        != []
    )
    whole = bytearray(Path(saved).read_bytes())
    record = read_archive(reader, saved).records[name]
    struct.pack_into("<H", whole, record.header + 28, 60_000)  # the length of its extra fields
    path = tmp_path / "pushed.pt"
    path.write_bytes(whole)
    found = read_archive(reader, str(path))
    assert found.damage == ()
    with pytest.raises(Damaged, match=f"{name}: it takes bytes"):
        found.records[name].bytes(1 << 20)


def test_a_record_that_goes_into_the_next_is_damaged(
    saved: str, tmp_path: Path, reader: Reader
) -> None:
    """Shows that no bytes are of two records, so that a file has no more of them than its size."""
    whole = bytearray(Path(saved).read_bytes())
    name = "model/data/3"
    at, record = entry_of(whole, name), read_archive(reader, saved).records[name]
    after = read_archive(reader, saved).records["model/data/4"]
    longer = after.header + 1 - record.start
    struct.pack_into("<II", whole, at + 20, longer, longer)
    path = tmp_path / "long.pt"
    path.write_bytes(whole)
    found = read_archive(reader, str(path))
    with pytest.raises(Damaged, match=f"{name}: it takes bytes"):
        found.records[name].bytes(1 << 20)
    struct.pack_into("<II", whole, at + 20, 1 << 12, 1 << 12)
    path = tmp_path / "longer.pt"
    path.write_bytes(whole)
    (damage,) = read_archive(reader, str(path)).damage
    assert "where the next begins" in str(damage)


def test_two_records_of_one_name_are_damage(tmp_path: Path, reader: Reader) -> None:
    """Shows that both are named by where they lie, since readers differ on which one they take."""
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as made, warnings.catch_warnings(action="ignore"):
        made.writestr("a/data/0", b"one")
        made.writestr("a/data/1", b"two")
        made.writestr("a/data/0", b"three")
    found = read_archive(reader, str(path))
    assert list(found.records) == ["a/data/0", "a/data/1"]
    (error,) = found.damage
    assert "a/data/0: two records have this name, at bytes 0 and" in str(error)


@pytest.mark.parametrize(
    ("back", "bytes_", "says"),
    [
        (98, b"PK\6\7", "the directory's end is gone"),
        (34, b"\xff" * 8, "it points beyond the end"),
        (66, b"\x63", "records, and should name 99"),
        (50, b"\x63", "the directory should take bytes"),
    ],
)
def test_an_end_that_does_not_fit_is_damage(
    saved: str, tmp_path: Path, reader: Reader, back: int, bytes_: bytes, says: str
) -> None:
    """Shows it for the fields of what ends an archive, so many bytes before the file's end."""
    whole = bytearray(Path(saved).read_bytes())
    whole[len(whole) - back : len(whole) - back + len(bytes_)] = bytes_
    path = tmp_path / "end.pt"
    path.write_bytes(whole)
    with pytest.raises(Damaged, match=rf"end\.pt: .*{says}.*What to do"):
        read_archive(reader, str(path))


def test_what_is_compressed_is_named_and_not_read(
    saved: str, tmp_path: Path, reader: Reader
) -> None:
    """Shows that the reason and the way out are told; checksums are of the others."""
    path = rezipped(saved, tmp_path / "small.pt", method=zipfile.ZIP_DEFLATED)
    found = read_archive(reader, path)
    assert all(record.packed for record in found.records.values())
    with pytest.raises(FormatError, match=r"data/1: it is compressed or .*zip -0") as raised:
        found.records["model/data/1"].bytes(100)
    assert not isinstance(raised.value, Damaged)
    assert [*found.verify_crc()] == []


def test_limits_are_held(saved: str, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows it for a record that is read whole, and for the directory."""
    found = read_archive(reader, saved)
    with pytest.raises(FormatError, match=r"data/4: not read: too many objects: 56 bytes, and 55"):
        found.records["model/data/4"].bytes(55)
    monkeypatch.setattr(archive, "DIRECTORY_MOST", 100)
    with pytest.raises(FormatError, match=r"not read: too many objects: .* 100 are read"):
        read_archive(reader, saved)


def test_archives_with_comments_or_without_zip64_are_read(tmp_path: Path, reader: Reader) -> None:
    """Shows it for what other programs write, and for a comment that looks like the end."""
    path = tmp_path / "plain.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a/ß", b"one")
        made.comment = b"PK\x05\x06 and more"
    found = read_archive(reader, str(path))
    assert found.records["a/ß"].bytes(9) == b"one"
    path = tmp_path / "empty.zip"
    with zipfile.ZipFile(path, "w"):
        pass
    assert read_archive(reader, str(path)).records == {}


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """What torch writes of a storage beyond four gigabytes, with a hole in its place."""
    path = tmp_path / "large.pt"
    with torch.serialization.skip_data():
        save(path, [torch.empty((4 << 30) + 5, dtype=torch.int8), torch.arange(3)])
    return path


def test_archives_beyond_four_gigabytes_are_read(large: Path, reader: Reader) -> None:
    """Shows it for a record that is larger, and for those that lie behind it."""
    found = read_archive(reader, str(large))
    assert found.damage == ()
    with zipfile.ZipFile(large) as expected:
        assert list(found.records) == expected.namelist()
        for name, record in found.records.items():
            info = expected.getinfo(name)
            assert (record.nbytes, record.header) == (info.file_size, info.header_offset)
    assert found.records["large/data/1"].header > 4 << 30
    assert found.records["large/byteorder"].bytes(9) == b"little"
    last = bytearray(1)
    found.records["large/data/0"].read(memoryview(last), (4 << 30) + 4)
    with pytest.raises(Damaged, match="and it has 4,294,967,301"):
        found.records["large/data/0"].read(memoryview(last), (4 << 30) + 5)


def test_a_large_number_that_is_missing_is_damage(large: Path, reader: Reader) -> None:
    """Shows it for a directory whose field for large numbers was spoilt."""
    size = large.stat().st_size
    with large.open("r+b") as file:
        file.seek(size - 4096)
        tail = file.read()
        at = tail.index(b"large/data/0", tail.index(b"PK\x01\x02")) + len("large/data/0")
        assert tail[at : at + 2] == b"\1\0"  # the field's number
        file.seek(size - 4096 + at)
        file.write(b"\2\0")
    with pytest.raises(Damaged, match="a number of a large record is missing"):
        read_archive(reader, str(large))
