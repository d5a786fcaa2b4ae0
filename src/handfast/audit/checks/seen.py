"""One look at each tensor, whose outcome all checks share: a digest, and what numbers are in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Final

import msgspec
import xxhash

from handfast.audit.extent import repeats
from handfast.audit.found import Role, Tensor, Values
from handfast.errors import HandfastError

__all__ = ["Look", "Seen"]

BLOCK: Final = 1 << 18
"""Elements that are looked at together."""

SAMPLE: Final = 1 << 16
"""Elements, from the first on, that are looked at of each tensor where not all are."""

NUMBERS: Final = frozenset({Role.PARAMETER, Role.MASTER, Role.FIRST, Role.SECOND, Role.MOMENTUM})
"""What has to hold finite numbers."""

_ZEROS: Final = bytes(16 * BLOCK)


class Seen(msgspec.Struct):
    """What was seen of a tensor: all of it, where ``whole``.

    ``digest`` is over its dtype, its shape and the bytes that were read; ``zero``: they are all 0.
    ``nans``, ``infinite`` and ``negative`` count numbers, and ``least`` is the smallest, where
    numbers were looked at. ``problem`` says why it could not be read.
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


class Look:
    """Looks at tensors, once: at all of each with ``deep``, else at how it begins.

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
        try:
            from handfast.audit import numbers
        except ImportError:
            return
        self.numbers = numbers

    def at(self, tensor: Tensor) -> Seen:
        """What there is to see of a tensor."""
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = (tensor, self._look(tensor))  # it stays, and so does its id
        return self._seen[id(tensor)][1]

    def blocks(self, values: Values) -> Iterator[memoryview]:
        """A tensor's bytes, as far as they are to be looked at. Raises as the values do.

        Of one that repeats its storage only the first block: a few bytes can stand for any number.
        """
        once = not self.deep or repeats(values)
        for block in values.blocks(BLOCK if self.deep else SAMPLE):
            self.nbytes += block.nbytes
            self._progress(block.nbytes)
            yield block.cast("B")
            if once:
                return

    def _look(self, tensor: Tensor) -> Seen:
        values, seen = tensor.values, Seen()
        digest = xxhash.xxh3_128(f"{values.dtype} {values.shape}".encode())
        counts = (
            self.numbers is not None
            and tensor.role in NUMBERS
            and values.dtype in self.numbers.FLOATS
        )
        try:
            for block in self.blocks(values):
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
