"""OCDBT, TensorStore's key-value store in a directory: which keys it has, and where values lie.

From the format's public description (TensorStore 0.1.86, kvstore/ocdbt, "Storage format"). The
manifest names the root of each version's B+tree, and nodes name nodes or values. Manifest and nodes
are framed: magic, length, version, how the body is packed, and a CRC-32C behind it. Values are not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from handfast.audit.extent import Held, Range, Source
from handfast.audit.formats.crc32c import crc32c
from handfast.audit.formats.streams import unpacked
from handfast.audit.formats.wire import Cursor
from handfast.audit.place import Place
from handfast.errors import Damaged, FormatError, HandfastError

__all__ = ["MANIFEST", "Database", "Value", "read_database"]

MANIFEST: Final = "manifest.ocdbt"

NODE_MOST: Final = 1 << 28
"""Bytes of a node that are read, and that it may unpack to. Orbax's have 100 MB at most."""

NODES_MOST: Final = 1 << 16
KEYS_MOST: Final = 1 << 24
ARITY: Final = 1 << 20
"""Keys of a node at most (kvstore/ocdbt/format/btree_codec.h)."""

TEXT_MOST: Final = 1 << 28
"""Bytes of all keys of a node, put together from what they share."""

NODE: Final = 0x0CDB20DE
ROOT: Final = 0x0CDB3A2A
CODECS: Final = ("", "zstd")
CRC: Final = 4
NOWHERE: Final = (1 << 64) - 1  # where the root of an empty store lies

_NUMBERED: Final = re.compile(r"manifest\.[0-9a-f]{16}")


class Value(NamedTuple):
    """A value: the path in the place of the file that it lies in, and from which byte on.

    ``start`` is -1 where a node has the value itself; then ``path`` is the node's file.
    """

    source: Source
    path: str
    start: int

    def bytes(self) -> bytes:
        """All of it. Raises as its source does."""
        found = bytearray(self.source.nbytes)
        self.source.read(memoryview(found), 0)
        return bytes(found)


class Database(msgspec.Struct, frozen=True):
    """What the newest version of a store has.

    ``values`` go by key. ``reaches`` says of each file that it refers to, by its path in the place,
    up to which byte; files of older versions' roots are among them. ``problems`` say which nodes
    can't be read: what is below them is not known. ``committed`` is when the version was, in
    nanoseconds since 1970 by its writer's clock; 0 where that is not known.
    """

    values: Mapping[str, Value]
    reaches: Mapping[str, int]
    problems: tuple[str, ...]
    committed: int = 0


def read_database(place: Place, folder: str) -> Database:
    """Read the store in a directory: its manifest and its nodes, and no values.

    Nothing is raised: what can't be read is among the problems.
    """
    reading = _Reading(place, folder)
    try:
        ahead = reading.roots()
        while ahead:
            ahead += reading.node(ahead.pop())
    except HandfastError as error:
        reading.problems.append(str(error))
    problems = tuple(reading.problems)
    return Database(reading.values, reading.reaches, problems, reading.committed)


class _At(NamedTuple):
    """Where something lies: a file's path in the place, bytes, and what paths in it begin with."""

    path: str
    start: int
    nbytes: int
    base: str


class _Ahead(NamedTuple):
    """A node that is still to be read, its height, and what its keys begin with."""

    at: _At
    height: int
    prefix: bytes


class _Reading:
    """What was found so far."""

    def __init__(self, place: Place, folder: str) -> None:
        self.place, self.folder = place, folder
        self.values: dict[str, Value] = {}
        self.reaches: dict[str, int] = {}
        self.problems: list[str] = []
        self.committed = 0
        self._nodes = 0

    def roots(self) -> list[_Ahead]:
        """The newest version's root; none of an empty store. Raises HandfastError."""
        body = self._manifest(MANIFEST)
        if _configured(body):
            there = (os.path.basename(path) for path in self.place.within(self.folder))
            body = self._manifest(max(filter(_NUMBERED.fullmatch, there), default="manifest.*"))
            if _configured(body):
                raise body.damaged("it points to other manifests, and is one of those")
        files = _files(body)
        count = body.varint()
        body.varints(count)  # generations, in order
        heights = body.take(count)
        names, starts, sizes = (body.varints(count) for _ in range(3))
        body.varints(3 * count)  # how many keys and bytes there are
        if count:
            self.committed = [body.fixed(8) for _ in range(count)][-1]
        places = [at for at in zip(names, starts, sizes, strict=True) if at[1] != NOWHERE]
        roots = [self._at(body, "", files, at) for at in places]
        return [_Ahead(roots[-1], heights[-1], b"")] if count and starts[-1] != NOWHERE else []

    def node(self, ahead: _Ahead) -> list[_Ahead]:
        """Read a node, and give those below it. What can't be read is a problem, and said here."""
        self._nodes += 1
        if self._nodes > NODES_MOST or len(self.values) > KEYS_MOST:
            raise FormatError(
                f"{self.place.absolute(self.folder)}: more than {NODES_MOST:,} nodes or "
                f"{KEYS_MOST:,} keys, which are read at most. What to do: audit a part of it"
            )
        path, start, nbytes, _ = ahead.at
        name = f"{self.place.absolute(path)}: the node at byte {start:,}"
        try:
            if path not in self.place.files:
                raise Damaged(f"{name}: the file is missing. What to do: take it from a copy")
            if nbytes > NODE_MOST:
                raise FormatError(f"{name}: it has {nbytes:,} bytes, and {NODE_MOST:,} at most")
            data = self.place.reader.bytes(self.place.absolute(path), start, nbytes)
            body = _body(data, NODE, name)
            height = body.fixed(1)
            if height != ahead.height:
                raise body.damaged(f"it is of height {height}, and should be of {ahead.height}")
            files = _files(body)
            count = body.varint()
            if not 0 < count <= ARITY:
                raise body.damaged(f"it has {count:,} keys, and a node has 1 to {ARITY:,}")
            if height:
                return self._inner(body, ahead, files, count)
            self._leaf(body, ahead, files, count)
        except HandfastError as error:
            self.problems.append(str(error))
        return []

    def _inner(
        self, body: Cursor, ahead: _Ahead, files: list[tuple[str, str]], count: int
    ) -> list[_Ahead]:
        shared, fresh = body.varints(max(0, count - 1)), body.varints(count)
        common = body.varints(count)
        keys = _keys(body, shared, fresh)
        places = zip(*(body.varints(count) for _ in range(3)), strict=True)
        return [
            _Ahead(
                self._at(body, ahead.at.base, files, at), ahead.height - 1, ahead.prefix + key[:own]
            )
            for key, own, at in zip(keys, common, places, strict=True)
        ]

    def _leaf(self, body: Cursor, ahead: _Ahead, files: list[tuple[str, str]], count: int) -> None:
        shared, fresh = body.varints(max(0, count - 1)), body.varints(count)
        keys = _keys(body, shared, fresh)
        sizes = body.varints(count)
        outside = body.varints(count)
        there = sum(outside)
        numbers, starts = iter(body.varints(there)), iter(body.varints(there))
        for key, size, out in zip(keys, sizes, outside, strict=True):
            text = (ahead.prefix + key).decode("utf-8", "backslashreplace")
            name = f"{self.place.absolute(self.folder)}: {text}"
            if not out:
                self.values[text] = Value(Held(body.take(size), name), ahead.at.path, -1)
                continue
            at = self._at(body, ahead.at.base, files, (next(numbers), next(starts), size))
            file = self.place.absolute(at.path)
            source = Range(self.place.reader, file, at.start, size, f"{file}: {text}")
            self.values[text] = Value(source, at.path, at.start)

    def _manifest(self, name: str) -> Cursor:
        path = f"{self.folder}/{name}" if self.folder else name
        if path not in self.place.files:
            raise Damaged(f"{self.place.absolute(path)}: missing. What to do: take it from a copy")
        return _body(self.place.bytes(path), ROOT, self.place.absolute(path))

    def _at(
        self, body: Cursor, before: str, files: list[tuple[str, str]], at: tuple[int, int, int]
    ) -> _At:
        number, start, nbytes = at
        if number >= len(files):
            raise body.damaged(f"it refers to file {number}, and names {len(files)}")
        base, own = files[number]
        path = os.path.normpath(f"{self.folder}/{before}{base}{own}").lstrip("/")
        self.reaches[path] = max(self.reaches.get(path, 0), start + nbytes)
        return _At(path, start, nbytes, before + base)


def _body(data: bytes, magic: int, name: str) -> Cursor:
    """What is framed, unpacked. Raises Damaged where frame or CRC are wrong."""
    head = Cursor(data, name)
    if head.left < CRC or int.from_bytes(head.take(4), "big") != magic:
        raise head.damaged(f"it should begin with {magic:08x}")
    if (length := head.fixed(8)) != len(data):
        raise head.damaged(f"it says that it has {length:,} bytes, and has {len(data):,}")
    found, said = crc32c(data[:-CRC]), int.from_bytes(data[-CRC:], "little")
    if found != said:
        raise head.damaged(f"its bytes have the CRC-32C {found:08x}, and {said:08x} was written")
    version, packed = head.varint(), head.varint()
    if version or packed >= len(CODECS):
        raise FormatError(
            f"{name}: of version {version}, packed in way {packed}. What to do: use a "
            "later handfast"
        )
    body = head.take(head.left - CRC)
    return Cursor(unpacked(body, CODECS[packed], NODE_MOST, name), name)


def _configured(body: Cursor) -> bool:
    """Pass over a manifest's configuration; whether the versions are in manifests with numbers."""
    body.take(16)  # the store's id
    numbered = body.varint()
    body.varints(2)  # how large values in nodes, and nodes, may be
    body.take(1)  # the version tree's arity
    if body.varint():
        body.take(4)  # the level of zstd
    return bool(numbered)


def _files(body: Cursor) -> list[tuple[str, str]]:
    """A table of files: what goes over to the nodes in each, and the rest of its path."""
    count = body.varint()
    shared, fresh = body.varints(max(0, count - 1)), body.varints(count)
    bases = body.varints(count)
    paths = _keys(body, shared, fresh)
    return [
        (os.fsdecode(path[:base]), os.fsdecode(path[base:]))
        for path, base in zip(paths, bases, strict=True)
    ]


def _keys(body: Cursor, shared: list[int], fresh: list[int]) -> list[bytes]:
    """Strings that each begin as the one before does."""
    found: list[bytes] = []
    left = TEXT_MOST
    for kept, length in zip((0, *shared), fresh, strict=False):
        before = found[-1] if found else b""
        if kept > len(before):
            raise body.damaged(f"a name shares {kept} bytes with one of {len(before)}")
        found.append(before[:kept] + body.take(length))
        left -= kept + length
        if left < 0:
            raise body.damaged(f"its names have more than {TEXT_MOST:,} bytes")
    return found
