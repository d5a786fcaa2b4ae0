"""One look at each tensor, whose outcome all checks share: a digest, and what numbers are in it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Final

import msgspec
import xxhash

from handfast.audit.checked import Checked
from handfast.audit.extent import DENSE, SIZES, Extent, Range, repeats
from handfast.audit.found import Role, Tensor, Values
from handfast.errors import HandfastError

__all__ = ["READS", "Look", "Seen", "same"]

BLOCK: Final = 1 << 18
"""Elements that are looked at together."""

SAMPLE: Final = 1 << 16
"""Elements, from the first on, that are looked at of each tensor where not all are."""

READS: Final = 8
"""Times that the bytes of one storage, or of one file that is all tensors, are read at most,
through whichever tensors lie there."""

NUMBERS: Final = frozenset({Role.PARAMETER, Role.MASTER, Role.FIRST, Role.SECOND, Role.MOMENTUM})
"""What has to hold finite numbers."""

_ZEROS: Final = bytes(16 * BLOCK)


class Seen(msgspec.Struct):
    """What was seen of a tensor: all of it, where ``whole``.

    ``digest`` is over its dtype, its shape and the bytes that were read; ``zero``: they are all 0.
    ``nans``, ``infinite`` and ``negative`` count numbers, and ``least`` is the smallest, where
    numbers were looked at. ``problem`` says why it could not be read; ``spared``: it was not, since
    its storage had been read ``READS`` times.
    """

    digest: bytes = b""
    whole: bool = True
    zero: bool = True
    nbytes: int = 0
    nans: int = 0
    infinite: int = 0
    negative: int = 0
    least: float = math.inf
    problem: str = ""
    spared: bool = False

    @property
    def lost(self) -> bool:
        """Whether nothing can be told of it."""
        return bool(self.problem) or self.spared


class Look:
    """Looks at tensors, once: at all of each with ``deep``, else at how it begins.

    Tensors of the same values at the same place are looked at together.
    ``numbers`` is None where NumPy is missing, so that only bits can be compared. ``nbytes`` is
    what was read so far; ``cut`` counts the tensors that were not looked at to their end.
    """

    def __init__(
        self, *, deep: bool = False, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        self.deep = deep
        self.nbytes = self.cut = 0
        self.numbers: ModuleType | None = None
        self._progress = progress
        self._seen: dict[int, tuple[Tensor, Seen]] = {}
        self._alike: dict[object, Seen] = {}
        self._spent: dict[object, int] = defaultdict(int)
        try:
            from handfast.audit import numbers
        except ImportError:
            return
        self.numbers = numbers

    def at(self, tensor: Tensor) -> Seen:
        """What there is to see of a tensor."""
        if id(tensor) not in self._seen:
            counts = (
                self.numbers is not None
                and tensor.role in NUMBERS
                and tensor.values.dtype in self.numbers.FLOATS
            )
            key = type(tensor.values), same(tensor.values), counts
            if key not in self._alike:
                self._alike[key] = self._look(tensor.values, counts)
            self._seen[id(tensor)] = (tensor, self._alike[key])  # it stays, and so does its id
        return self._seen[id(tensor)][1]

    def pairs(self, one: Values, other: Values) -> Iterator[tuple[memoryview, memoryview]]:
        """The bytes of two tensors of one shape, side by side, as far as they are to be looked at.

        None where the storages of both were read often enough. Raises as the values do.
        """
        may = [self._may(values) for values in (one, other)]
        if any(may):
            yield from zip(self._blocks(one), self._blocks(other), strict=False)  # to the first end

    def _blocks(self, values: Values) -> Iterator[memoryview]:
        """Of one that repeats its storage only the first block: a few bytes can stand for any
        number.
        """
        once = not self.deep or repeats(values)
        for block in values.blocks(BLOCK if self.deep else SAMPLE):
            self.nbytes += block.nbytes
            self._progress(block.nbytes)
            yield block.cast("B")
            if once:
                return

    def _may(self, values: Values) -> bool:
        """Whether what a tensor lies in was read so little that it may be read once more."""
        one, item = same(values), SIZES.get(values.dtype, 1)
        nbytes = max(0, math.prod(values.shape)) * item
        home, whole = _home(one, nbytes)
        if self._spent[home] >= READS * whole > 0:
            return False
        if not self.deep or repeats(values):
            nbytes = min(nbytes, (BLOCK if self.deep else SAMPLE) * item)
        if type(one) is Extent and len(one.shape) == len(one.stride):
            nbytes = max(nbytes, min(one.span() * item, whole) // DENSE)  # read for few of them
        self._spent[home] += nbytes
        return True

    def _look(self, values: Values, counts: bool) -> Seen:
        if not self._may(values):
            self.cut += 1
            return Seen(whole=False, spared=True)
        seen = Seen()
        digest = xxhash.xxh3_128(f"{values.dtype} {values.shape}".encode())
        try:
            for block in self._blocks(values):
                digest.update(block)
                seen.nbytes += len(block)
                seen.zero = seen.zero and block == _ZEROS[: len(block)]
                if counts:
                    self._count(block, values.dtype, seen)
        except HandfastError as error:
            seen.problem = str(error)
        seen.digest = digest.digest()
        most = BLOCK if self.deep else SAMPLE
        seen.whole = (self.deep and not repeats(values)) or math.prod(values.shape) <= most
        self.cut += not seen.whole
        return seen

    def _count(self, block: memoryview, dtype: str, seen: Seen) -> None:
        if self.numbers is None or not len(block):
            return
        nans, infinite, negative, least = self.numbers.census(block, dtype)
        seen.nans += nans
        seen.infinite += infinite
        seen.negative += negative
        seen.least = min(seen.least, least)


def same(values: Values) -> Extent | int:
    """What two tensors have in common that are the same values at the same place."""
    if type(values) is Checked:
        return values.extent
    return values if type(values) is Extent else id(values)


def _home(values: Extent | int, nbytes: int) -> tuple[object, int]:
    """What the values of a tensor lie in, and its bytes: a storage, or a file; else themselves."""
    if type(values) is not Extent:
        return values, nbytes
    source = values.source
    if type(source) is not Range:
        return source, source.nbytes
    try:
        return source.path, source.reader.size(source.path)
    except HandfastError:
        return source, source.nbytes  # that it can't be read is told when it is
