"""What ``torch.save`` writes, of any release since 0.1.10: what is in it, and where it lies.

A zip archive (since 1.6), or a row of pickles with the storages behind them. Nothing is executed,
and no storage is read. What looks alike and is something else is told apart. Facts: torch 2.13,
torch/serialization.py and torch/csrc/serialization.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Any, Final

import msgspec

from handfast.audit import pickles
from handfast.audit.archive import MAGIC, PACKED, Archive, Record, read_archive
from handfast.audit.extent import SIZES, Lost, Range, Reader, Source
from handfast.audit.pickles import Limits
from handfast.audit.room import BEYOND
from handfast.audit.torch_tree import tree
from handfast.errors import Damaged, FormatError
from handfast.store.image import HEADER_LIMIT
from handfast.store.port import Progress

__all__ = ["Kind", "TorchFile", "read_torch", "recognise"]

LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL: Final = 1001

HEAD: Final = 512
"""Bytes of a file that are looked at to know what it is."""

WINDOW: Final = 1 << 20
"""Bytes of a file of pickles that are read at first; twice as many as long as they are too few."""

SMALL: Final = 4096
"""Bytes of a record that holds one word."""

COPY: Final = "take the file from a copy"


class Kind(StrEnum):
    """What a file is, by its beginning and its directory."""

    ZIP = "a zip archive of torch.save"
    LEGACY = "a file of torch.save before torch 1.6"
    SCRIPT = "a TorchScript archive"
    EXPORTED = "an archive of torch.export"
    PACKAGE = "an archive of torch.package"
    OTHER_ZIP = "a zip archive, but none of torch's"
    TAR = "a tar file, as torch.save wrote before 0.1.10"
    PICKLE = "a pickle that torch.save did not write"
    SAFETENSORS = "a safetensors file"
    EMPTY = "an empty file"
    UNKNOWN = "no file that is known here"


_INSTEAD: Final = {
    Kind.SCRIPT: "save its state_dict() with torch.save",
    Kind.EXPORTED: "save its state_dict with torch.save",
    Kind.PACKAGE: "load it where its code is, and save the state with torch.save",
    Kind.TAR: "load it with torch, and save it again",
    Kind.EMPTY: "it was cut, or never written; " + COPY,
    Kind.UNKNOWN: "if torch wrote it, it was overwritten; " + COPY,
}


class TorchFile(msgspec.Struct, frozen=True, eq=False):
    """A file of torch.save: ``root`` is what was saved, as :mod:`handfast.audit.tree` has it.

    ``damage`` is what is wrong with its storages and tensors, as far as that can be known without
    reading them; each says so again when it is read. ``facts`` are what the file says of itself:
    of an archive "name" is the file's when it was written, without its ending. ``harmful`` is what
    it names that runs code where pickle loads it.
    """

    path: str
    kind: Kind
    root: Any
    damage: tuple[FormatError, ...]
    facts: Mapping[str, str]
    archive: Archive | None = None
    harmful: tuple[str, ...] = ()

    def verify_crc(self, progress: Progress | None = None) -> Iterator[Damaged]:
        """Read what has a checksum, and yield one error for each record that it does not fit.

        A file of the old format has none. Raises HandfastError where the system can't read.
        """
        return iter(()) if self.archive is None else self.archive.verify_crc(progress)


def recognise(reader: Reader, path: str) -> Kind:
    """What a file is, by its first bytes, and a zip archive by its directory.

    Raises Damaged for a zip archive whose directory is not whole; HandfastError, or Damaged where
    the file is gone, if it can't be read.
    """
    return _look(reader, path)[0]


def read_torch(reader: Reader, path: str, limits: Limits | None = None) -> TorchFile:
    """Read what a file says, and where its storages lie; none of them is read.

    Without ``limits`` they are the usual ones, with the reader's room.
    Raises FormatError, saying what it is, for a file that is none of torch.save's; Damaged where
    too little is left of it; HandfastError if it can't be read.
    """
    limits = Limits(room=reader.room) if limits is None else limits
    kind, archive = _look(reader, path)
    if kind is Kind.ZIP and archive is not None:
        return _read_zip(archive, limits)
    if kind is Kind.LEGACY:
        return _read_legacy(reader, path, limits)
    to_do = _INSTEAD.get(kind, "read it as what it is")
    raise (Damaged if kind is Kind.EMPTY else FormatError)(
        f"{path}: this is {kind}, and no file of torch.save. What to do: {to_do}"
    )


def _look(reader: Reader, path: str) -> tuple[Kind, Archive | None]:
    """What a file is, and the archive if it is one."""
    size = reader.size(path)
    head = reader.bytes(path, 0, min(size, HEAD))
    if not head:
        return Kind.EMPTY, None
    if head.startswith(MAGIC):
        archive = read_archive(reader, path)
        return _kind_of_zip(_names(archive)), archive
    if len(head) > 8 and head[8:9] == b"{":
        (length,) = struct.unpack_from("<Q", head)
        if 8 + length <= size and length <= HEADER_LIMIT:
            return Kind.SAFETENSORS, None
    with suppress(FormatError):
        if pickles.read(head).value == LEGACY_MAGIC:
            return Kind.LEGACY, None
    if head[257:262] == b"ustar":
        return Kind.TAR, None
    is_pickle = len(head) > 1 and head[0] == 0x80 and head[1] <= 5  # PROTO
    return Kind.PICKLE if is_pickle else Kind.UNKNOWN, None


# Zip archives


def _names(archive: Archive) -> dict[str, Record]:
    """The records by their names without the directory that the first one, and so all, are in."""
    top = next(iter(archive.records), "").partition("/")[0] + "/"
    return {
        name.removeprefix(top): record
        for name, record in archive.records.items()
        if name.startswith(top)
    }


def _kind_of_zip(names: Mapping[str, Record]) -> Kind:
    if "constants.pkl" in names:  # by which torch tells them, too
        return Kind.SCRIPT
    if "data.pkl" in names:
        return Kind.ZIP
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return Kind.EXPORTED
    return Kind.PACKAGE if ".data/extern_modules" in names else Kind.OTHER_ZIP


class _Records:
    """The storages of a zip archive."""

    def __init__(self, path: str, names: Mapping[str, Record], swapped: bool) -> None:
        self._path, self._names, self._swapped = path, names, swapped
        self._lost: dict[tuple[str, int], Source] = {}
        self.damage: list[FormatError] = []

    def find(self, key: str, dtype: str, numel: int) -> tuple[Source, bool]:
        """See the port."""
        nbytes = numel * SIZES[dtype]
        record = self._names.get(f"data/{key}")
        if record is not None and record.nbytes == nbytes and not record.packed:
            return record, self._swapped
        if (key, nbytes) not in self._lost:
            what = "is missing" if record is None else f"has {record.nbytes:,} bytes"
            problem: FormatError = Damaged(
                f"{self._path}: the record data/{key:.80} {what}, and a storage of {nbytes:,} "
                f"bytes should be in it. What to do: {COPY}"
            )
            if record is not None and record.packed:
                problem = FormatError(f"{record.name}: {PACKED}")
            self.damage.append(problem)
            self._lost[key, nbytes] = Lost(nbytes, problem, f"{self._path}: data/{key:.80}")
        return self._lost[key, nbytes], self._swapped


def _read_zip(archive: Archive, limits: Limits) -> TorchFile:
    path, names = archive.path, _names(archive)
    words = ("version", "byteorder", ".format_version", ".data/serialization_id")
    facts = {
        "name": next(iter(archive.records), "").partition("/")[0],
    } | {
        word.rpartition("/")[2].lstrip("."): names[word].bytes(SMALL).decode("ascii", "replace")
        for word in words
        if word in names
    }
    order = facts.get("byteorder", "little")
    if order not in ("little", "big"):
        raise FormatError(
            f"{path}: the record byteorder says {order!r:.80}, and not little or big. What to do: "
            f"{COPY}"
        )
    data = names["data.pkl"].bytes(limits.nbytes)
    name = names["data.pkl"].name
    storages = _Records(path, names, order == "big")
    read = pickles.read(data, limits=limits, name=name)
    made = tree(read.value, storages, name=name)
    damage = (*archive.damage, *storages.damage, *made.damage)
    return TorchFile(path, Kind.ZIP, made.root, damage, facts, archive, read.harmful)


# Rows of pickles


class _Row:
    """Pickles, one behind the other, of which nobody knows how long they are."""

    def __init__(self, reader: Reader, path: str, limits: Limits) -> None:
        self._reader, self._path, self._limits = reader, path, limits
        self._size = reader.size(path)
        self._window = WINDOW
        self.at = 0
        self._data, self._base = b"", 0
        self.harmful: tuple[str, ...] = ()

    def next(self) -> Any:
        """The value of the next one."""
        while True:
            try:
                found = pickles.read(
                    self._data, self.at - self._base, limits=self._limits, name=self._path,
                    base=self._base,
                )  # fmt: skip
            except pickles.Cut:
                if self._base + len(self._data) >= self._size:
                    raise
                if self._window > 2 * self._limits.nbytes:
                    raise FormatError(
                        f"{self._path}: byte {self.at:,}: {BEYOND}: a pickle of more than "
                        f"{self._limits.nbytes:,} bytes. What to do: if you trust its writer, "
                        "split what it saves"
                    ) from None
                self._base = self.at
                length = min(self._window, self._size - self.at)
                self._data = self._reader.bytes(self._path, self.at, length)
                self._window *= 2
            else:
                self.at = self._base + found.end
                self.harmful += found.harmful
                return found.value


class _Later:
    """A storage whose place is told when all before it are known: a source as any other."""

    __slots__ = ("found", "item", "name", "nbytes")

    def __init__(self, name: str, nbytes: int, item: int) -> None:
        self.name, self.nbytes, self.item = name, nbytes, item
        self.found: Source = Lost(
            nbytes, Damaged(f"{name}: the file does not list it. What to do: {COPY}"), name
        )

    def read(self, into: memoryview, at: int) -> None:
        """See the port."""
        self.found.read(into, at)


class _Behind:
    """The storages that lie behind a row of pickles, in the order of their keys."""

    def __init__(self, reader: Reader, path: str) -> None:
        self._reader, self._path = reader, path
        self._size = reader.size(path)
        self._asked: dict[str, _Later] = {}
        self.damage: list[FormatError] = []

    def find(self, key: str, dtype: str, numel: int) -> tuple[Source, bool]:
        """See the port. All that torch writes so is little-endian, on whatever machine."""
        if key not in self._asked:
            item = SIZES[dtype]
            self._asked[key] = _Later(f"{self._path}: storage {key:.80}", numel * item, item)
        return self._asked[key], False

    def lay_out(self, keys: Any, at: int) -> None:
        """Find the place of each; the first begins at byte ``at`` with its count of elements."""
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise FormatError(
                f"{self._path}: byte {at:,}: no list of storages before that. What to do: {COPY}"
            )
        for number, key in enumerate(keys):
            storage = self._asked.pop(key, None)
            end = self._end(storage, at)
            if storage is None or end is None:
                self._cut(storage, at, [self._asked.pop(late, None) for late in keys[number + 1 :]])
                break
            name, nbytes = storage.name, end - at - 8
            if nbytes == storage.nbytes:
                storage.found = Range(self._reader, self._path, at + 8, nbytes, name)
            else:
                self._lose(
                    f"{name}: it has {nbytes:,} bytes from byte {at + 8:,} on, and should have "
                    f"{storage.nbytes:,}. What to do: {COPY}", storage,
                )  # fmt: skip
            at = end
        for name in [storage.name for storage in self._asked.values()]:
            self.damage.append(Damaged(f"{name}: the file does not list it. What to do: {COPY}"))

    def _end(self, storage: _Later | None, at: int) -> int | None:
        """Where a storage ends, by the count before it; None where that is beyond the file."""
        if storage is None or at + 8 > self._size:
            return None
        (numel,) = struct.unpack("<q", self._reader.bytes(self._path, at, 8))
        end: int = at + 8 + numel * storage.item
        return end if at + 8 <= end <= self._size else None

    def _cut(self, first: _Later | None, at: int, rest: list[_Later | None]) -> None:
        """Give up a storage and all behind it."""
        if first is None:
            why = "a storage begins there that nothing speaks of, so nobody knows its size"
        else:
            why = f"{first.name} begins there, and the file ends at byte {self._size:,}"
        lost = [storage for storage in (first, *rest) if storage is not None]
        self._lose(
            f"{self._path}: byte {at:,}: {why}; {len(lost):,} storages are lost. What to do: "
            f"{COPY}",
            *lost,
        )

    def _lose(self, problem: str, *storages: _Later) -> None:
        self.damage.append(error := Damaged(problem))
        for storage in storages:
            storage.found = Lost(storage.nbytes, error, storage.name)


def _read_legacy(reader: Reader, path: str, limits: Limits) -> TorchFile:
    row = _Row(reader, path, limits)
    row.next()  # the magic number
    if row.next() != LEGACY_PROTOCOL:
        raise FormatError(
            f"{path}: a file of torch.save whose protocol is not {LEGACY_PROTOCOL}. What to do: "
            f"no torch ever wrote another; {COPY}"
        )
    about, value, keys = row.next(), row.next(), row.next()
    storages = _Behind(reader, path)
    made = tree(value, storages, name=path)
    storages.lay_out(keys, row.at)
    little = about.get("little_endian") if type(about) is dict else None
    facts = {} if little is None else {"byteorder": "little" if little else "big"}
    damage = (*storages.damage, *made.damage)
    return TorchFile(path, Kind.LEGACY, made.root, damage, facts, harmful=row.harmful)
