"""Values that lie in files: dense or with strides, and read block by block.

No tensor is in memory. A reader keeps few files open at a time, and sees it when one was replaced
between two looks: a training may go on beside an audit.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Final, Literal, NamedTuple, Protocol, Self

import msgspec

from handfast.audit.room import MEMORY
from handfast.errors import Damaged, FormatError, HandfastError
from handfast.store.files import GONE_BAD, Posix, describe, read_into
from handfast.store.image import DTYPES

__all__ = [
    "DENSE",
    "DIMENSIONS",
    "SIZES",
    "Extent",
    "Held",
    "Lost",
    "Range",
    "Reader",
    "Source",
    "dense",
    "inside",
    "repeats",
]

SIZES: Final[dict[str, int]] = {
    **{name: size for name, (size, _) in DTYPES.items()},
    **dict.fromkeys(("qint8", "quint8", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), 1),
    "bits16": 2,
    "qint32": 4,
}
"""Bytes of an element, by torch's names of the dtypes (torch 2.13, c10/core/ScalarType.h)."""

DIMENSIONS = 64
"""Dimensions that a tensor has at most: as many as torch's own iterators take."""

WHOLE: Final = 32 << 20
"""Bytes of a tensor with strides that are put in order at a time, and that one may span to be read
whole before it is."""

DENSE: Final = 64
"""Times its elements that a tensor with strides may span for that."""

ROOM: Final = 1 << 20
"""Bytes that are read in one piece, gaps and all, of one that spans more."""

PAGE: Final = 4096
"""Bytes that the system reads anyway: gaps up to this long are read over."""

MOST_REPEATED: Final = 1 << 36
"""Bytes that a tensor may have beyond what its storage has: more is a hostile shape."""

LETTERS: Final[dict[int, Literal["B", "H", "I", "Q"]]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Formats of a memoryview, by the bytes of an element."""

_FILES: Final = Posix()


class Source(Protocol):
    """A run of bytes that can be read anywhere."""

    @property
    def name(self) -> str:
        """What it is, for errors: the file, and the record in it."""
        ...

    @property
    def nbytes(self) -> int:
        """Its length."""
        ...

    def read(self, into: memoryview, at: int, /) -> None:
        """Fill a buffer with the bytes from ``at`` on; FormatError where they can't be had."""
        ...


class _Mark(NamedTuple):
    """What tells a file from another one that took its name, or that was written since."""

    device: int
    inode: int
    nbytes: int
    changed_ns: int


class _Open:
    """An open file, and how many read it at this moment."""

    __slots__ = ("fd", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


class Reader:
    """Opens files when they are asked for, and keeps the few open that were used last.

    Several threads may use one. All errors name the file. ``room`` is how many bytes of memory the
    objects of a pickle may take that is read with it.
    """

    def __init__(self, most: int = 32, *, room: int = MEMORY) -> None:
        self._most = most
        self.room = room
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._marks: dict[str, _Mark] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close all files; what is asked for later is opened again."""
        with self._lock:
            self._shed(0)

    def size(self, path: str) -> int:
        """The length of a file in bytes, as it was when it was opened first.

        Raises Damaged where the file is gone, HandfastError where it can't be opened.
        """
        with self._lend(path):
            return self._marks[path].nbytes

    def read(self, path: str, into: memoryview, at: int) -> None:
        """Fill a buffer with the bytes of a file from ``at`` on.

        Raises Damaged where the file is gone or ends too early, HandfastError where it can't be
        read, or was replaced since it was opened first.
        """
        with self._lend(path) as fd:
            with _looking(path):
                got = read_into(_FILES, fd, into, at)
            if got < len(into):
                self._check(path, fd)
        if got < len(into):
            raise Damaged(
                f"{path}: byte {at + got:,}: the file ends there, and {len(into) - got:,} bytes "
                "more should follow. What to do: it was cut, or never written whole; take it from "
                "a copy"
            )

    def bytes(self, path: str, at: int, nbytes: int) -> bytes:
        """Some bytes of a file; raises as :meth:`read` does."""
        buffer = bytearray(nbytes)
        self.read(path, memoryview(buffer), at)
        return bytes(buffer)

    def changed(self) -> list[str]:
        """The files, of those that were read, that are others now, or were written since.

        What was found in them may be of two saves: look again.
        """
        return sorted(path for path, mark in self._marks.items() if _mark_of(path) != mark)

    @contextmanager
    def _lend(self, path: str) -> Iterator[int]:
        with self._lock:
            if path not in self._open:
                self._open[path] = self._opened(path)
            entry = self._open[path]
            self._open.move_to_end(path)
            entry.users += 1
            self._shed(self._most)
        try:
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1

    def _opened(self, path: str) -> _Open:
        with _looking(path):
            fd = _FILES.open(path)
        try:
            self._check(path, fd)
        except HandfastError:
            os.close(fd)
            raise
        return _Open(fd)

    def _check(self, path: str, fd: int) -> None:
        """Raise HandfastError if an open file is not as it was when it was opened first."""
        mark = _mark_of(fd)
        if mark is None or self._marks.setdefault(path, mark) != mark:
            raise HandfastError(
                f"{path}: it was written or replaced while it was audited. What to do: audit it "
                "again once the save is over"
            )

    def _shed(self, most: int) -> None:
        """Close those that were not used for longest, and are not read now."""
        idle = [path for path, entry in self._open.items() if not entry.users]
        for path in idle[: max(0, len(self._open) - most)]:
            os.close(self._open.pop(path).fd)


def _close_all(entries: OrderedDict[str, _Open]) -> None:
    """Close what a reader that nobody has any more had open."""
    while entries:
        os.close(entries.popitem()[1].fd)


def _mark_of(file: str | int) -> _Mark | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return _Mark(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@contextmanager
def _looking(path: str) -> Iterator[None]:
    """Turn an OSError of the body into Damaged (the bytes are gone) or a plain HandfastError."""
    try:
        yield
    except OSError as error:
        text = f"{path}: can't be read: {describe(error)}. What to do: "
        if error.errno in GONE_BAD:
            raise Damaged(f"{text}take the file from a copy") from error
        raise HandfastError(f"{text}mend what the system reports there, and try again") from error


class Range:
    """Some bytes of a file. Two are the same only if they are one object."""

    __slots__ = ("_start", "name", "nbytes", "path", "reader")

    def __init__(self, reader: Reader, path: str, start: int, nbytes: int, name: str) -> None:
        self.reader, self.path, self._start = reader, path, start
        self.name, self.nbytes = name, nbytes

    def read(self, into: memoryview, at: int) -> None:
        """See the port. Damaged as well for what lies outside of it."""
        inside(self, len(into), at)
        self.reader.read(self.path, into, self._start + at)


class Held:
    """Bytes that are in memory anyway."""

    __slots__ = ("_data", "name", "nbytes")

    def __init__(self, data: bytes | bytearray | memoryview, name: str) -> None:
        self._data = memoryview(data)
        self.name, self.nbytes = name, len(data)

    def read(self, into: memoryview, at: int) -> None:
        """See the port."""
        inside(self, len(into), at)
        into[:] = self._data[at : at + len(into)]


class Lost:
    """Bytes that should be there and are not: what reads them is told why."""

    __slots__ = ("_problem", "name", "nbytes")

    def __init__(self, nbytes: int, problem: FormatError, name: str) -> None:
        self._problem = problem
        self.name, self.nbytes = name, nbytes

    def read(self, _into: memoryview, _at: int) -> None:
        """Raise what it was made with, anew."""
        raise type(self._problem)(str(self._problem))


def inside(source: Source, count: int, at: int) -> None:
    """Raise Damaged for bytes that lie outside of a source."""
    if at < 0 or at + count > source.nbytes:
        raise Damaged(
            f"{source.name}: bytes {at:,} to {at + count:,} are asked for, and it has "
            f"{source.nbytes:,}. What to do: the file was cut, or its parts are of two saves; take "
            "it from a copy"
        )


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a row-major tensor of some shape, in elements."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _Dim(NamedTuple):
    """A dimension: elements, and from one to the next the steps in the source and in a block."""

    size: int
    step: int
    into: int


class Extent(msgspec.Struct, frozen=True):
    """The values of a tensor in a source: a :class:`handfast.audit.found.Values`.

    ``stride`` and ``offset`` count elements, as torch does; the offset is from the source's
    beginning. ``swapped``: the bytes of each number are in big-endian order. Two extents are equal
    if they are the same values at the same place: tied tensors are.
    """

    source: Source
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    swapped: bool = False

    def check(self) -> None:
        """Raise FormatError for what no tensor is, Damaged for one that leaves its source."""
        item = SIZES.get(self.dtype)
        if item is None:
            raise FormatError(
                f"{self.source.name}: a tensor of the dtype {self.dtype!r}, which is not known "
                "here. What to do: use a later handfast"
            )
        numbers = (*self.shape, *self.stride, self.offset)
        fits = len(self.shape) == len(self.stride) <= DIMENSIONS
        if not fits or min(numbers) < 0 or max(numbers) >= 1 << 63:
            raise FormatError(
                f"{self.source.name}: a shape, a stride and an offset that no tensor has. What to "
                "do: take the file from a copy"
            )
        where = f"{self.source.name}: a tensor of shape {self.shape}, stride {self.stride}"
        end = (self.offset + self.span()) * item
        if end > self.source.nbytes:
            raise Damaged(
                f"{where} and dtype {self.dtype} from element {self.offset:,} on ends at byte "
                f"{end:,}, but there are {self.source.nbytes:,} bytes. What to do: the file was "
                "cut, or its parts are of two saves; take it from a copy"
            )
        if math.prod(self.shape) * item > self.source.nbytes + MOST_REPEATED:
            raise FormatError(
                f"{where} repeats its values more often than is read. What to do: if the shape is "
                "meant, save a tensor that is not expanded"
            )

    def blocks(self, most: int) -> Iterator[memoryview]:
        """See :class:`~handfast.audit.found.Values`. A block holds until the next is asked for.

        Raises Damaged and FormatError as :meth:`check` does, and HandfastError where the system
        can't read; ValueError if ``most`` is not positive.
        """
        if most < 1:
            raise ValueError(f"blocks of {most} elements: ask for one at least")
        self.check()
        total = math.prod(self.shape)
        if not total:
            return
        item = SIZES[self.dtype]
        dims = _merged(self.shape, self.stride)
        if len(dims) < 2 and all(step == 1 for _, step in dims):
            buffer = memoryview(bytearray(min(most, total) * item))
            for at in range(0, total, most):
                block = buffer[: min(most, total - at) * item]
                self.source.read(block, (self.offset + at) * item)
                yield self._ordered(block)
        else:
            for tile in self._in_order(dims, max(most, WHOLE // item)):
                for at in range(0, len(tile), most * item):
                    yield self._ordered(tile[at : at + most * item])

    def _in_order(self, dims: list[tuple[int, int]], most: int) -> Iterator[memoryview]:
        """The elements of a tensor with strides, row-major, at most so many at a time."""
        item, source, offset = SIZES[self.dtype], self.source, self.offset
        if self.span() * item <= min(WHOLE, DENSE * math.prod(self.shape) * item):
            whole = memoryview(bytearray(self.span() * item))
            source.read(whole, offset * item)
            source, offset = Held(whole, source.name), 0
        buffer = memoryview(bytearray(min(most, math.prod(self.shape)) * item))
        for at, tile in _tiles(dims, most):
            block = buffer[: math.prod(dim.size for dim in tile) * item]
            _gather(source, item, tile, offset + at, block)
            yield block

    def span(self) -> int:
        """Elements from the first to behind the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def _ordered(self, block: memoryview) -> memoryview:
        """A block with its numbers in little-endian order."""
        if self.swapped:
            unit = SIZES[self.dtype] // (2 if self.dtype.startswith("complex") else 1)
            for low in range(unit // 2):
                high = unit - 1 - low
                kept = bytes(block[low::unit])
                block[low::unit] = block[high::unit]
                block[high::unit] = kept
        return block.toreadonly()


def repeats(values: object) -> bool:
    """Whether a tensor has more bytes than its source: an expanded one, with a stride of 0."""
    if type(values) is not Extent:
        return False
    return math.prod(values.shape) * SIZES.get(values.dtype, 1) > values.source.nbytes


def _merged(shape: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes and steps, without dimensions of one element, and joined where they go on."""
    dims: list[tuple[int, int]] = []
    for size, step in zip(shape, stride, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * step:
            dims[-1] = (dims[-1][0] * size, step)
        else:
            dims.append((size, step))
    return dims


def _tiles(dims: list[tuple[int, int]], most: int) -> Iterator[tuple[int, list[_Dim]]]:
    """Row-major blocks of at most ``most`` elements: where each begins, and its dimensions."""
    inner, count = len(dims), 1
    while inner and count * dims[inner - 1][0] <= most:
        inner -= 1
        count *= dims[inner][0]
    tile = [_Dim(*dim, 0) for dim in dims[inner:]]
    into = 1
    for place in reversed(range(len(tile))):
        tile[place] = tile[place]._replace(into=into)
        into *= tile[place].size
    if not inner:
        yield 0, tile
        return
    rows, step = dims[inner - 1]
    at_once = most // count
    for outer in product(*(range(0, n * s, s) if s else [0] * n for n, s in dims[: inner - 1])):
        for row in range(0, rows, at_once):
            first = _Dim(min(at_once, rows - row), step, count)
            yield sum(outer) + row * step, [first, *tile]


def _gather(source: Source, item: int, dims: list[_Dim], at: int, block: memoryview) -> None:
    """Read elements from ``at`` on into their places in a block; all numbers count elements."""
    ahead = [([dim for dim in dims if dim.size > 1], at, 0)]
    while ahead:
        dims, at, to = ahead.pop()
        span = 1 + sum((dim.size - 1) * dim.step for dim in dims)
        if span * item <= ROOM:
            found = memoryview(bytearray(span * item))
            source.read(found, at * item)
            _copy(item, dims, found, block, to)
            continue
        widest = max(dims, key=lambda dim: dim.step)
        rest = [dim for dim in dims if dim is not widest]
        gap = widest.step * item
        useful = math.prod(dim.size for dim in rest) * item
        step = ROOM // gap if gap <= max(PAGE, 8 * useful) else 1
        step = min(max(step, 1), -(-widest.size // 2))
        for first in range(0, widest.size, step):
            part = widest._replace(size=min(step, widest.size - first))
            left = [part, *rest] if part.size > 1 else rest
            ahead.append((left, at + first * widest.step, to + first * widest.into))


def _copy(item: int, dims: list[_Dim], found: memoryview, block: memoryview, to: int) -> None:
    """Put elements that are in memory into their places in a block."""
    if item > max(LETTERS):  # complex128: two numbers of eight bytes
        dims = [_Dim(n, 2 * step, 2 * into) for n, step, into in dims] + [_Dim(2, 1, 1)]
        item, to = item // 2, 2 * to
    letter = LETTERS[item]
    source, target = found.cast(letter), block.cast(letter)
    *outer, inner = sorted(dims, key=lambda dim: dim.size) or [_Dim(1, 1, 1)]
    n, step, into = inner
    for places in product(*(range(dim.size) for dim in outer)):
        at = sum(place * dim.step for place, dim in zip(places, outer, strict=True))
        put = to + sum(place * dim.into for place, dim in zip(places, outer, strict=True))
        if step:
            row = source[at : at + (n - 1) * step + 1 : step]
        else:
            row = memoryview(bytes(source[at : at + 1]) * n).cast(letter)
        target[put : put + (n - 1) * into + 1 : into] = row
