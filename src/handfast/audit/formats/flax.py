"""flax's own checkpoints: one file of msgpack a step, from before Orbax; and its weights.

By flax 0.12.8: ``training/checkpoints.py`` writes ``checkpoint_tmp`` and renames it to
``checkpoint_N``; ``serialization.py`` packs a tree of dicts, with arrays as extensions that hold a
shape, a dtype's name and the bytes. Nothing says what a file should hold, and there is no checksum.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from handfast.audit.extent import Extent, Range, Reader, Source, dense, inside
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.optax import Meaning, Path, meaning
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Step, Tensor
from handfast.audit.place import Place
from handfast.errors import Damaged, HandfastError

__all__ = ["find"]

NAME: Final = re.compile(r"(.*checkpoint_)([0-9]+)|.+\.msgpack")
UNDONE: Final = "checkpoint_tmp"

WINDOW: Final = 1 << 14
"""Bytes that are read at once: between two arrays there are but names."""

NODES_MOST: Final = 1 << 22
DEPTH: Final = 64
TEXT_MOST: Final = 1 << 16

NUMBERS: Final = {
    0xCA: ("float32", 4), 0xCB: ("float64", 8), 0xCC: ("uint8", 1), 0xCD: ("uint16", 2),
    0xCE: ("uint32", 4), 0xCF: ("uint64", 8), 0xD0: ("int8", 1), 0xD1: ("int16", 2),
    0xD2: ("int32", 4), 0xD3: ("int64", 8),
}  # fmt: skip
"""Types of msgpack that are numbers, in big-endian order, with their bytes."""

ARRAY, SCALAR = 1, 3  # extensions
CHUNKED: Final = "__msgpack_chunked_array__"

RULE: Final = (
    "flax.training.checkpoints.latest_checkpoint: of the files {name}N the greatest number, "
    "whatever is in it (flax 0.12.8)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield what is in each directory that has such files."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path in place.files:
        folder, name = os.path.split(path)
        if NAME.fullmatch(name) and _begins(place, path):
            homes[folder].append(path)
    for folder, paths in sorted(homes.items()):
        yield _found(place, folder, paths)


def _begins(place: Place, path: str) -> bool:
    """Whether a file begins as a map of msgpack does, or is empty, where it should be one."""
    if not place.files[path].nbytes:
        return not path.endswith(".msgpack")
    try:
        first = place.reader.bytes(place.absolute(path), 0, 1)[0]
    except HandfastError:
        return False
    return first & 0xF0 == 0x80 or first in (0xDE, 0xDF)


def _number(path: str) -> int | None:
    match = NAME.fullmatch(os.path.basename(path))
    return int(match[2]) if match and match[2] else None


def _found(place: Place, folder: str, paths: Sequence[str]) -> Found:
    order = sorted(paths, key=lambda path: (_number(path) or 0, path))
    steps = [_step(place, path) for path in order]
    taken: dict[str, str] = {}
    for path in order:
        match = NAME.fullmatch(os.path.basename(path))
        if match and match[1]:
            taken[match[1]] = path  # the last of a prefix
    resume = [Resume("all processes", path, RULE.format(name=name)) for name, path in taken.items()]
    found = Found("flax", folder, steps, resume, frozenset(paths))
    undone = f"{folder}/{UNDONE}" if folder else UNDONE
    if undone in place.files:
        found.files |= {undone}
        says = f"{undone} was never renamed: a save died, or is still going on"
        found.findings = [Finding(Code.LEFTOVER, Strength.HINT, folder, says, (undone,))]
    return found


def _step(place: Place, path: str) -> Step:
    step, part = Step(path, _number(path)), Part(path)
    part.nbytes, part.saved = place.files[path]
    scan = _Scan(place.reader, place.absolute(path))
    try:
        scan.root()
    except HandfastError as error:
        part.problem = str(error)
    sense = meaning({at: values.dtype for at, values in scan.arrays.items()}, scan.empty)
    step.scaled = sense.scaled
    part.tensors = [
        Tensor(".".join(at), sense.leaves[at].role, values, sense.leaves[at].of)
        for at, values in scan.arrays.items()
    ]
    part.valueless = scan.passed
    counters = list(_counters(scan, sense))
    if step.number is not None:
        label = os.path.basename(path)
        counters.append(Counter(Clock.DIRECTORY, step.number, label, updates=False))
    part.counters = counters
    step.parts = [part]
    return step


def _counters(scan: _Scan, sense: Meaning) -> Iterator[Counter]:
    for count in sense.counts:
        values = scan.arrays[count.path]
        try:
            value = _whole(values) if values.shape == () else None
        except HandfastError:
            value = None  # that it can't be read is told by itself
        if value is not None:
            label = ".".join(count.path)
            yield Counter(count.clock, value, label, count.updates, count.skips)


class _Scan:
    """A file of msgpack that is gone through: ``arrays`` by their paths, and ``empty`` leaves.

    Numbers by themselves are arrays without dimensions, where they lie. Values are passed over; of
    texts and of what is neither array nor number, no more is known than the paths: ``passed``.
    """

    def __init__(self, reader: Reader, path: str) -> None:
        self._reader, self._path = reader, path
        self._size = reader.size(path)
        self._at = self._start = 0
        self._window = b""
        self._left = NODES_MOST
        self._chunked: list[Path] = []
        self.arrays: dict[Path, Extent] = {}
        self.empty: list[Path] = []
        self.passed: list[str] = []

    def root(self) -> None:
        """Go through it. Raises Damaged where it is cut, or is not what flax writes."""
        self._node((), 0)
        if self._at != self._size:
            raise self._wrong(f"{self._size - self._at:,} bytes more than belong to it")
        for path in self._chunked:
            self._put_together(path)

    def _node(self, path: Path, depth: int) -> None:
        self._left -= 1
        if depth > DEPTH or self._left < 0:
            raise self._wrong(f"more than {DEPTH} levels, or {NODES_MOST:,} values")
        tag = self._take(1)[0]
        if tag & 0xF0 == 0x80 or tag in (0xDE, 0xDF):
            self._map(path, depth, self._number(2 << tag - 0xDE) if tag > 0xD0 else tag & 0xF)
        elif tag & 0xF0 == 0x90 or tag in (0xDC, 0xDD):
            count = self._number(2 << tag - 0xDC) if tag > 0xD0 else tag & 0xF
            for place in range(count):
                self._node((*path, str(place)), depth + 1)
        elif tag in NUMBERS:
            dtype, size = NUMBERS[tag]
            self._add(path, dtype, (), size, swapped=True)
        elif tag < 0x80 or tag >= 0xE0:
            self._at -= 1
            self._add(path, "int8", (), 1)
        elif 0xC7 <= tag <= 0xC9 or 0xD4 <= tag <= 0xD8:
            size = self._number(1 << tag - 0xC7) if tag < 0xD0 else 1 << tag - 0xD4
            kind, end = self._take(1)[0], self._at + size
            if kind in (ARRAY, SCALAR):
                self._array(path)
            else:
                self.passed.append(".".join(path))
            self._go(end)
        else:
            size = self._length(tag)
            if size:
                self.passed.append(".".join(path))
            self._go(self._at + size)

    def _map(self, path: Path, depth: int, count: int) -> None:
        if not count:
            self.empty.append(path)
        for _ in range(count):
            size = self._length(self._take(1)[0])
            if size > TEXT_MOST:
                raise self._wrong(f"a name of {size:,} bytes")
            key = self._take(size).decode("utf-8", "backslashreplace")
            if key == CHUNKED:
                self._chunked.append(path)
            self._node((*path, key), depth + 1)

    def _array(self, path: Path) -> None:
        """An extension's bytes are msgpack again: a shape, a dtype's name, and the values."""
        if self._take(1) != b"\x93" or (dimensions := self._take(1)[0] ^ 0x90) > 0xF:
            raise self._wrong("an array should be there")
        shape = tuple(self._plain() for _ in range(dimensions))
        dtype = self._take(self._length(self._take(1)[0])).decode("utf-8", "backslashreplace")
        self._add(path, dtype, shape, self._length(self._take(1)[0]))

    def _add(
        self, path: Path, dtype: str, shape: tuple[int, ...], size: int, swapped: bool = False
    ) -> None:
        start = self._at
        self._go(start + size)  # of what was cut nothing is told but that
        source = Range(self._reader, self._path, start, size, f"{self._path}: {'.'.join(path)}")
        self.arrays[path] = Extent(source, dtype, shape, dense(shape), 0, swapped)

    def _put_together(self, path: Path) -> None:
        """An array of more than a gigabyte: its shape, and flat chunks of it."""
        parts: dict[str, list[Extent]] = {"shape": [], "chunks": []}
        for kind, found in parts.items():
            while (key := (*path, kind, str(len(found)))) in self.arrays:
                found.append(self.arrays.pop(key))
        shape = tuple(_whole(extent) for extent in parts["shape"])
        chunks = parts["chunks"]
        if not chunks:
            raise self._wrong(f"{'.'.join(path)}: a large array without chunks")
        source = _Joined([chunk.source for chunk in chunks])
        self.arrays[path] = Extent(source, chunks[0].dtype, shape, dense(shape))

    def _plain(self) -> int:
        """A number that is not below 0."""
        tag = self._take(1)[0]
        if tag < 0x80:
            return tag
        if not 0xCC <= tag <= 0xCF:
            raise self._wrong("a size should be there")
        return self._number(1 << tag - 0xCC)

    def _length(self, tag: int) -> int:
        """The bytes of a string, or of what has none of its own: nil and the two truths."""
        if tag & 0xE0 == 0xA0:
            return tag & 0x1F
        if 0xC4 <= tag <= 0xC6:
            return self._number(1 << tag - 0xC4)
        if 0xD9 <= tag <= 0xDB:
            return self._number(1 << tag - 0xD9)
        if tag in (0xC0, 0xC2, 0xC3):
            return 0
        raise self._wrong(f"a value of type {tag:#04x}, which flax writes nowhere")

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "big")

    def _go(self, to: int) -> None:
        if to > self._size:
            raise self._wrong(
                f"a value goes on to byte {to:,}, and the file ends there: it was cut"
            )
        self._at = to

    def _take(self, count: int) -> bytes:
        ahead = self._at - self._start
        if ahead < 0 or ahead + count > len(self._window):
            self._start, ahead = self._at, 0
            size = max(count, min(WINDOW, self._size - self._at))
            self._window = self._reader.bytes(self._path, self._at, size)
        self._at += count
        return self._window[ahead : ahead + count]

    def _wrong(self, what: str) -> Damaged:
        return Damaged(
            f"{self._path}: byte {self._at:,}: {what}. What to do: it was damaged since it was "
            "written, or never written whole; take it from a copy"
        )


class _Joined:
    """Sources one after the other: a :class:`handfast.audit.extent.Source`."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.nbytes for part in parts))
        self.name, self.nbytes = parts[0].name, self._ends[-1]

    def read(self, into: memoryview, at: int) -> None:
        """See the port."""
        inside(self, len(into), at)
        while into:
            place = bisect_right(self._ends, at)
            part, start = self._parts[place], self._ends[place] - self._parts[place].nbytes
            count = min(len(into), self._ends[place] - at)
            part.read(into[:count], at - start)
            into, at = into[count:], at + count


def _whole(values: Extent) -> int:
    """A whole number that stands alone."""
    signed = values.dtype.startswith("int")
    return int.from_bytes(b"".join(map(bytes, values.blocks(1))), "little", signed=signed)
