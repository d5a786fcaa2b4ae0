"""Arrays in chunks, as zarr 2 and 3 lay them out: metadata, the chunks' names, and the values.

From the specifications (zarr 2, "Storage specification version 2"; zarr 3.1, "Core", "Regular chunk
grid", "Sharding codec"), as far as TensorStore 0.1.86 writes them for Orbax. A chunk always has its
full shape, row-major; where it hangs over the array's end, what is there means nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

from handfast.audit.extent import DIMENSIONS, SIZES, Source, inside
from handfast.audit.formats.crc32c import crc32c
from handfast.audit.formats.streams import Stream, opened
from handfast.errors import UNREADABLE, Damaged, FormatError

__all__ = ["METADATA", "Chunked", "Grid", "places", "read_grid"]

METADATA: Final = (".zarray", "zarr.json")
"""The name of an array's metadata, in zarr 2 and 3."""

KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}
)
"""NumPy's letters of what a number is."""

INDEX_MOST: Final = 1 << 26
"""Bytes of a shard's index that are read at most."""

MOST: Final = 1 << 36
"""Bytes that an array may have whose chunks are far fewer: more is a hostile shape."""

RATIO: Final = 1 << 12
"""How many times more bytes than are stored such an array may have."""

NOTHING: Final = (1 << 64) - 1  # offset and length of a chunk that a shard does not have

Length = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 62)]
Shape = Annotated[tuple[Length, ...], msgspec.Meta(max_length=DIMENSIONS)]
Sides = Annotated[tuple[Side, ...], msgspec.Meta(max_length=DIMENSIONS)]


class _Zarr2(msgspec.Struct):
    """What ``.zarray`` holds."""

    zarr_format: Literal[2]
    shape: Shape
    chunks: Sides
    dtype: str
    compressor: dict[str, Any] | None
    fill_value: Any
    order: Literal["C"]
    filters: None = None
    dimension_separator: str = "."


class _Named(msgspec.Struct):
    """What zarr 3 names, and how it is set up."""

    name: str
    configuration: dict[str, Any] = {}


class _Zarr3(msgspec.Struct):
    """What ``zarr.json`` holds."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: Shape
    data_type: str
    chunk_grid: _Named
    chunk_key_encoding: _Named
    fill_value: Any
    codecs: list[_Named]


class Grid(msgspec.Struct, frozen=True):
    """How an array lies: what its chunks are called, and what is in one.

    ``chunk`` is the shape of what lies under one name; if ``sharded`` it holds chunks of the shape
    ``inner`` and their index (else that is the same shape). ``prefix`` and ``separator`` make a
    name of a chunk's place. ``zero``: values of chunks that are not stored are 0.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    inner: tuple[int, ...]
    sharded: bool
    codec: str
    zero: bool
    prefix: str
    separator: str

    @property
    def counts(self) -> tuple[int, ...]:
        """Chunks in each dimension."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def name(self, place: tuple[int, ...]) -> str:
        """What the chunk at a place is called."""
        parts = [str(n) for n in place]
        return self.separator.join((self.prefix, *parts) if self.prefix else parts) or "0"

    def place(self, name: str) -> tuple[int, ...] | None:
        """The place of a chunk by its name; None for what no chunk is called."""
        parts = name.split(self.separator)
        if self.prefix and parts.pop(0) != self.prefix:
            return None
        if not self.shape:
            return () if parts == ([] if self.prefix else ["0"]) else None
        if not all(part.isdecimal() and part.isascii() for part in parts):
            return None
        found = tuple(map(int, parts))
        inside = len(found) == len(self.shape) and all(map(int.__lt__, found, self.counts))
        return found if inside else None

    def box(self, place: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where a chunk begins in the array, and how much of the array it has."""
        starts = tuple(n * c for n, c in zip(place, self.chunk, strict=True))
        rest = zip(self.shape, starts, self.chunk, strict=True)
        return starts, tuple(min(whole - start, c) for whole, start, c in rest)


def read_grid(data: bytes, name: str) -> Grid:
    """Read ``.zarray`` or ``zarr.json``. Raises Damaged for what is neither, and FormatError for
    what is not read here: another order, filters, codecs or grids.
    """
    try:
        if b'"zarr_format":3' in data.replace(b" ", b""):
            return _grid3(msgspec.json.decode(data, type=_Zarr3), name)
        return _grid2(msgspec.json.decode(data, type=_Zarr2), name)
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise Damaged(
            f"{name}: not the metadata of an array, as zarr has it: {error}. What to do: take it "
            "from a copy"
        ) from error


def _grid2(found: _Zarr2, name: str) -> Grid:
    codec = "" if found.compressor is None else str(found.compressor["id"])
    dtype = found.dtype
    if dtype[:1] == ">" or len(found.shape) != len(found.chunks):
        raise _unread(name, f"dtype {dtype}, shape {found.shape} in chunks of {found.chunks}")
    if dtype[:1] in ("<", "|"):
        bits = 8 * int(dtype[2:])
        dtype = KINDS.get(dtype[1], dtype) + (str(bits) if dtype[1] != "b" else "")
    return Grid(
        dtype, found.shape, found.chunks, found.chunks, False, codec, not found.fill_value,
        "", found.dimension_separator,
    )  # fmt: skip


def _grid3(found: _Zarr3, name: str) -> Grid:
    chunk = msgspec.convert(found.chunk_grid.configuration["chunk_shape"], Sides)
    inner, codecs = chunk, found.codecs
    encoding = found.chunk_key_encoding
    default = encoding.name == "default"
    if sharded := [codec.name for codec in codecs] == ["sharding_indexed"]:
        settings = codecs[0].configuration
        inner = msgspec.convert(settings["chunk_shape"], Sides)
        codecs = msgspec.convert(settings["codecs"], list[_Named])
        index = msgspec.convert(settings["index_codecs"], list[_Named])
        if [c.name for c in index] != ["bytes", "crc32c"] or (
            settings.get("index_location", "end") != "end"
        ):
            raise _unread(name, "a shard's index of another kind")
    names = [codec.name for codec in codecs]
    big = any(codec.configuration.get("endian", "little") != "little" for codec in codecs)
    same = len(found.shape) == len(chunk) == len(inner)
    parted = all(whole % part == 0 for whole, part in zip(chunk, inner, strict=False))
    if names[:1] != ["bytes"] or len(names) > 2 or big or not same or not parted:
        raise _unread(name, f"codecs {names}, shape {found.shape} in chunks of {chunk}")
    separator = encoding.configuration.get("separator", "/" if default else ".")
    return Grid(
        found.data_type, found.shape, chunk, inner, sharded, "".join(names[1:]),
        not found.fill_value, "c" if default else "", separator,
    )  # fmt: skip


def _unread(name: str, what: str) -> FormatError:
    return FormatError(
        f"{name}: {what}: that is not read here. What to do: load it with the library that wrote it"
    )


class Chunked(msgspec.Struct, frozen=True):
    """The values of an array, or of one of its chunks: a :class:`handfast.audit.found.Values`.

    ``first`` is the place of the first chunk, ``sources`` go by the chunks' names. ``whole``: the
    writer stores every chunk, so that one which is not there is lost; else its values are 0.
    """

    name: str
    grid: Grid
    sources: Mapping[str, Source]
    whole: bool
    shape: tuple[int, ...]
    first: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As torch names it."""
        return self.grid.dtype

    def blocks(self, most: int) -> Iterator[memoryview]:
        """See :class:`~handfast.audit.found.Values`.

        Raises Damaged for a chunk that is missing, cut or can't be unpacked, FormatError for what
        is not read here, HandfastError where the system can't read; ValueError if ``most`` is not
        positive.
        """
        if most < 1:
            raise ValueError(f"blocks of {most} elements: ask for one at least")
        item = SIZES.get(self.dtype)
        if item is None:
            raise _unread(self.name, f"dtype {self.dtype}")
        if 0 in self.shape:
            return
        total, stored = math.prod(self.shape) * item, sum(s.nbytes for s in self.sources.values())
        if total > max(MOST, RATIO * stored):
            raise _unread(self.name, f"shape {self.shape}, for {stored:,} bytes that are stored")
        room = most * item
        opened_now: dict[tuple[int, ...], _Chunk] = {}
        lookup = _Lookup(self)
        block = bytearray()
        row = -1
        for place, at, run in _runs(self.shape, self.grid.inner, item):
            if place[:1] != (row,):  # all chunks of the row before were read to their ends
                row = place[0] if place else 0
                opened_now.clear()
            if place not in opened_now:
                opened_now[place] = lookup.chunk(place, item * math.prod(self.grid.inner))
            chunk = opened_now[place]
            chunk.skip(at)
            end = at + run
            while chunk.at < end:
                block += chunk.take(min(end - chunk.at, room - len(block)))
                if len(block) == room:
                    yield memoryview(block).toreadonly()
                    block = bytearray()
        if block:
            yield memoryview(block).toreadonly()


class _Chunk:
    """A chunk that is being read: ``at`` is how far."""

    __slots__ = ("_name", "_nbytes", "_stream", "at")

    def __init__(self, stream: Stream, nbytes: int, name: str) -> None:
        self._stream, self._nbytes, self._name = stream, nbytes, name
        self.at = 0

    def skip(self, to: int) -> None:
        """Pass over what hangs over the array's end."""
        while self.at < to:
            self.take(min(to - self.at, 1 << 20))

    def take(self, count: int) -> bytes:
        """The next bytes. Raises Damaged where there are too few of them, or too many in all."""
        found = self._stream.read(count)
        self.at += len(found)
        if len(found) < count or (self.at == self._nbytes and self._stream.read(1)):
            more = "more" if len(found) == count else f"{self.at:,}"
            raise Damaged(
                f"{self._name}: a chunk has {self._nbytes:,} bytes, and here are {more}. What to "
                "do: it was cut, or is of another array; take it from a copy"
            )
        return found


class _Zeros:
    """A chunk that is not stored, since all of it is 0."""

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes

    def read(self, count: int, /) -> bytes:
        count = min(count, self._left)
        self._left -= count
        return bytes(count)


class _Part:
    """Some bytes of a source: a :class:`handfast.audit.extent.Source`."""

    __slots__ = ("_source", "_start", "name", "nbytes")

    def __init__(self, source: Source, start: int, nbytes: int) -> None:
        self._source, self._start = source, start
        self.name, self.nbytes = source.name, nbytes

    def read(self, into: memoryview, at: int) -> None:
        """See the port."""
        inside(self, len(into), at)
        self._source.read(into, self._start + at)


class _Lookup:
    """Finds chunks by their places; remembers the index of the shard that it found one in last."""

    def __init__(self, values: Chunked) -> None:
        self._values, self._grid = values, values.grid
        self._ratio = tuple(c // i for c, i in zip(self._grid.chunk, self._grid.inner, strict=True))
        self._indexed = ""
        self._index: tuple[tuple[int, int], ...] = ()

    def chunk(self, place: tuple[int, ...], nbytes: int) -> _Chunk:
        outer = tuple(
            first + n // r
            for first, n, r in zip(self._values.first, place, self._ratio, strict=True)
        )
        name = self._grid.name(outer)
        source = self._values.sources.get(name)
        if source is not None and self._grid.sharded:
            source = self._inner(name, source, place)
        if source is not None:
            return _Chunk(opened(source, self._grid.codec), nbytes, source.name)
        if self._values.whole or not self._grid.zero:
            raise Damaged(
                f"{self._values.name}: its chunk {name} is missing. What to do: take the "
                "checkpoint from a copy"
            )
        return _Chunk(_Zeros(nbytes), nbytes, self._values.name)

    def _inner(self, name: str, shard: Source, place: tuple[int, ...]) -> Source | None:
        """A chunk of a shard: its index is the shard's end, a pair of numbers for each chunk."""
        if self._indexed != name:
            count = math.prod(self._ratio)
            size = 16 * count + 4
            if size > INDEX_MOST:
                raise _unread(shard.name, f"an index of {size:,} bytes")
            data = bytearray(size)
            shard.read(memoryview(data), shard.nbytes - size)
            found = crc32c(data[:-4])
            if found != int.from_bytes(data[-4:], "little"):
                raise Damaged(
                    f"{shard.name}: its index, of {size:,} bytes at its end, has the CRC-32C "
                    f"{found:08x}, and another was written. What to do: take it from a copy"
                )
            self._indexed, self._index = name, tuple(struct.iter_unpack("<QQ", data[:-4]))
        number = 0
        for n, ratio in zip(place, self._ratio, strict=True):
            number = number * ratio + n % ratio
        start, nbytes = self._index[number]
        return None if start == nbytes == NOTHING else _Part(shard, start, nbytes)


def places(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All places of a box, row-major. One at a time: a hostile shape has more than any memory."""
    for number in range(math.prod(sizes)):
        left, place = number, []
        for size in reversed(sizes):
            left, at = divmod(left, size)
            place.append(at)
        yield tuple(reversed(place))


def _runs(
    shape: tuple[int, ...], chunk: tuple[int, ...], item: int
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """All of an array in row-major order, as runs of bytes: in which chunk, from where, how many.

    The order of an array is that of each of its chunks, so that these are read front to back.
    """
    split, run = len(shape), item
    while split and chunk[split - 1] == shape[split - 1]:
        split -= 1
        run *= shape[split]
    tail = (0,) * (len(shape) - split)
    if not split:
        yield tail, 0, run
        return
    last = split - 1
    steps = [run * math.prod(chunk[n + 1 : split]) for n in range(last)]
    for row in places(shape[:last]):
        place = tuple(n // c for n, c in zip(row, chunk, strict=False))
        at = sum(n % c * step for n, c, step in zip(row, chunk, steps, strict=False))
        for column in range(-(-shape[last] // chunk[last])):
            count = min(chunk[last], shape[last] - column * chunk[last])
            yield (*place, column, *tail), at, count * run
