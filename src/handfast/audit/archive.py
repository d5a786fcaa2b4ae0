"""Zip archives, read by their central directory: where each record lies, and no more.

Records that are stored as they are can be read; torch writes all so that hold tensors. Layout:
PKWARE's APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to
4.3.16 (its end, and zip64's), 4.5.3 (zip64's extra field).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Final, NamedTuple

from handfast.audit.extent import Reader, inside
from handfast.audit.room import BEYOND
from handfast.errors import Damaged, FormatError
from handfast.store.port import Progress

__all__ = ["MAGIC", "Archive", "Record", "read_archive"]

MAGIC: Final = b"PK\x03\x04"
"""What a zip archive begins with: the first record's header."""

_LOCAL: Final = struct.Struct("<4s22xHH")  # magic, and the lengths of the name and the extra fields
_ENTRY: Final = struct.Struct("<4s4xHH4xIIIHHH8xI")
_END: Final = struct.Struct("<4s6xHIIH")
_LOCATOR: Final = struct.Struct("<4s4xQ4x")
_END64: Final = struct.Struct("<4s28xQQQ")
_ENTRY_MAGIC, _END_MAGIC = b"PK\x01\x02", b"PK\x05\x06"
_LOCATOR_MAGIC, _END64_MAGIC = b"PK\x06\x07", b"PK\x06\x06"

COMMENT: Final = 0xFFFF
FULL2, FULL4 = 0xFFFF, 0xFFFF_FFFF  # the number is in zip64's field
ENCRYPTED: Final = 1  # a flag

DIRECTORY_MOST: Final = 1 << 28
"""Bytes of a central directory that are read at most: some three million records."""

PIECE: Final = 8 << 20
"""Bytes that are checked at a time."""

PACKED: Final = (
    "it is compressed or encrypted, which torch does to nothing that it saves. What to do: unpack "
    "the archive, and pack it again without (zip -0)"
)

TO_DO: Final = "What to do: the file was cut, or overwritten in part; take it from a copy"


class Record:
    """A record: a :class:`handfast.audit.extent.Source`. Two are the same only if one object.

    ``header`` is the offset of its header in the file, ``crc`` the CRC-32 of its bytes as the
    directory has it; 0 where none was worked out, which torch leaves so for all records with
    ``set_crc32_options(False)``, and for storages under ``skip_data`` (torch 2.13,
    torch/serialization.py). ``packed``: it is compressed or encrypted, and can't be read. Where its
    bytes begin stands in the header, which is read when they are; before ``end`` they end.
    """

    __slots__ = ("_key", "_path", "_reader", "_start", "crc", "end", "header", "key", "name",
                 "nbytes", "packed")  # fmt: skip

    def __init__(self, reader: Reader, path: str, key: bytes, entry: _Entry, end: int) -> None:
        self._reader, self._path, self._key, self.end = reader, path, key, end
        self._start = -1
        self.key = key.decode("utf-8", "replace")
        self.name = f"{path}: {self.key}"
        self.header, self.nbytes, self.crc, self.packed = entry

    @property
    def start(self) -> int:
        """The offset in the file of its first byte. Raises Damaged where no header is in place."""
        if self._start < 0:
            size = _LOCAL.size + len(self._key)
            head = self._reader.bytes(self._path, self.header, size)
            magic, named, extra = _LOCAL.unpack_from(head)
            if magic != MAGIC or named != len(self._key) or head[_LOCAL.size :] != self._key:
                raise Damaged(f"{self.name}: byte {self.header:,}: its header is gone. {TO_DO}")
            start = self.header + size + extra
            if start + self.nbytes > self.end:
                raise self._too_long(start)
            self._start = start
        return self._start

    def damage(self) -> Damaged | None:
        """What is wrong where it goes on beyond its end, by the directory alone."""
        least = self.header + _LOCAL.size + len(self._key)
        return self._too_long(least) if least + self.nbytes > self.end and not self.packed else None

    def _too_long(self, start: int) -> Damaged:
        return Damaged(
            f"{self.name}: it takes bytes {start:,} to {start + self.nbytes:,} of the file, which "
            f"is beyond byte {self.end:,}, where the next begins or the records end. {TO_DO}"
        )

    def read(self, into: memoryview, at: int) -> None:
        """See the port. Damaged as well where its header is gone; FormatError if it is packed."""
        inside(self, len(into), at)
        if self.packed:
            raise FormatError(f"{self.name}: {PACKED}")
        if into:
            self._reader.read(self._path, into, self.start + at)

    def bytes(self, most: int) -> bytes:
        """All its bytes, held against their CRC-32. Raises Damaged; FormatError beyond ``most``."""
        if self.nbytes > most:
            raise FormatError(
                f"{self.name}: {BEYOND}: {self.nbytes:,} bytes, and {most:,} are read at most. "
                "What to do: if you trust its writer, split what it saves"
            )
        buffer = bytearray(self.nbytes)
        self.read(memoryview(buffer), 0)
        if self.crc and (found := zlib.crc32(buffer)) != self.crc:
            raise Damaged(self.differs(found))
        return bytes(buffer)

    def differs(self, crc: int) -> str:
        """What to say if its bytes have another CRC-32."""
        return (
            f"{self.name}: its bytes, from byte {self.header:,} of the file on, have the CRC-32 "
            f"{crc:08x}, and {self.crc:08x} was written. What to do: they were damaged since; take "
            "the file from a copy"
        )


class Archive(NamedTuple):
    """An archive's records by their names (the last one of a name), and what is wrong with them."""

    path: str
    records: Mapping[str, Record]
    damage: tuple[Damaged, ...]

    def verify_crc(self, progress: Progress | None = None) -> Iterator[Damaged]:
        """Read all records with a checksum, and yield one error for each that it does not fit.

        Packed ones are left out. Raises HandfastError where the system can't read.
        """
        checked = [record for record in self.records.values() if record.crc and not record.packed]
        total = sum(record.nbytes for record in checked)
        done = 0
        buffer = memoryview(bytearray(min(PIECE, total)))
        for record in checked:
            crc = 0
            try:
                for at in range(0, record.nbytes, PIECE):
                    part = buffer[: min(PIECE, record.nbytes - at)]
                    record.read(part, at)
                    crc = zlib.crc32(part, crc)
            except Damaged as error:
                yield error
            else:
                if crc != record.crc:
                    yield Damaged(record.differs(crc))
            done += record.nbytes
            if progress is not None:
                progress(done, total)


class _Entry(NamedTuple):
    """What the directory says of a record."""

    header: int
    nbytes: int
    crc: int
    packed: bool


class _Directory(NamedTuple):
    """Where the central directory lies, and how many records it says that it names."""

    start: int
    nbytes: int
    named: int


def read_archive(reader: Reader, path: str) -> Archive:
    """Read an archive's directory, and nothing else.

    Raises Damaged where the directory is not whole, FormatError for one that is larger than is
    read, and as :meth:`Reader.read` does.
    """
    where = _find(reader, path)
    data = reader.bytes(path, where.start, where.nbytes)
    records: dict[str, Record] = {}
    every: list[Record] = []
    damage: list[Damaged] = []
    at = 0
    while at < len(data):
        key, entry, at = _entry(data, at, f"{path}: byte {where.start + at:,}")
        record = Record(reader, path, key, entry, where.start)
        if record.key in records:
            damage.append(
                Damaged(
                    f"{record.name}: two records have this name, at bytes "
                    f"{records[record.key].header:,} and {record.header:,}. What to do: nobody "
                    "can say which one is meant; take the file from a copy"
                )
            )
        records[record.key] = record
        every.append(record)
    if len(every) != where.named:
        raise Damaged(
            f"{path}: byte {where.start:,}: the directory names {len(every):,} records, and should "
            f"name {where.named:,}. {TO_DO}"
        )
    every.sort(key=lambda record: record.header)
    for record, following in pairwise(every):
        record.end = min(record.end, following.header)
    damage += filter(None, map(Record.damage, every))
    return Archive(path, records, tuple(damage))


def _find(reader: Reader, path: str) -> _Directory:
    """Find the directory by what stands at the file's end."""
    end, found = _end(reader, path)
    if end >= _LOCATOR.size:
        magic, end64 = _LOCATOR.unpack(reader.bytes(path, end - _LOCATOR.size, _LOCATOR.size))
        if magic == _LOCATOR_MAGIC:
            if end64 + _END64.size > end:
                raise Damaged(f"{path}: byte {end:,}: it points beyond the end. {TO_DO}")
            end = end64
            magic, count, nbytes, start = _END64.unpack(reader.bytes(path, end, _END64.size))
            if magic != _END64_MAGIC:
                raise Damaged(f"{path}: byte {end:,}: the directory's end is gone. {TO_DO}")
            found = _Directory(start, nbytes, count)
    start, nbytes, _ = found
    if start + nbytes != end:
        raise Damaged(
            f"{path}: the directory should take bytes {start:,} to {start + nbytes:,}, and what "
            f"ends it stands at byte {end:,}. {TO_DO}"
        )
    if nbytes > DIRECTORY_MOST:
        raise FormatError(
            f"{path}: {BEYOND}: a directory of {nbytes:,} bytes, and {DIRECTORY_MOST:,} are read "
            "at most. What to do: if you trust its writer, split what it saves"
        )
    return found


def _end(reader: Reader, path: str) -> tuple[int, _Directory]:
    """Where the directory's end stands, and what it says."""
    size = reader.size(path)
    tail_at = max(0, size - _END.size - COMMENT)
    tail = reader.bytes(path, tail_at, size - tail_at)
    at = tail.rfind(_END_MAGIC)
    while at >= 0:
        if at + _END.size <= len(tail):
            _, count, nbytes, start, comment = _END.unpack_from(tail, at)
            if tail_at + at + _END.size + comment == size:
                return tail_at + at, _Directory(start, nbytes, count)
        at = tail.rfind(_END_MAGIC, 0, at)
    raise Damaged(
        f"{path}: no zip directory at its end, byte {size:,}: the file was cut, or never written "
        "whole. What to do: take it from a copy"
    )


def _entry(data: bytes, at: int, where: str) -> tuple[bytes, _Entry, int]:
    """A record's name and entry, and the offset of the next one in the directory."""
    lengths = _ENTRY.unpack_from(data, at)[6:9] if at + _ENTRY.size <= len(data) else (len(data),)
    end = at + _ENTRY.size + sum(lengths)
    if end > len(data) or data[at : at + 4] != _ENTRY_MAGIC:
        raise Damaged(f"{where}: the directory is damaged there. {TO_DO}")
    _, flags, method, crc, stored, nbytes, named, extra, _, header = _ENTRY.unpack_from(data, at)
    after = at + _ENTRY.size + named
    name = data[at + _ENTRY.size : after]
    wide = [*_zip64(data[after : after + extra])]
    numbers = [nbytes, stored, header]
    for place, number in enumerate(numbers):
        if number == FULL4:
            if not wide:
                raise Damaged(f"{where}: a number of a large record is missing. {TO_DO}")
            numbers[place] = wide.pop(0)
    nbytes, stored, header = numbers
    packed = bool(flags & ENCRYPTED or method or stored != nbytes)
    return name, _Entry(header, nbytes, crc, packed), end


def _zip64(fields: bytes) -> tuple[int, ...]:
    """The eight-byte numbers of zip64's extra field; none where there is no such field."""
    at = 0
    while at + 4 <= len(fields):
        kind, size = struct.unpack_from("<HH", fields, at)
        if kind == 1:
            body = fields[at + 4 : at + 4 + size]
            return tuple(n for (n,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8]))
        at += 4 + size
    return ()
