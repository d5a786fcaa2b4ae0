"""Values with a checksum to themselves: whoever reads to the end has them held against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import msgspec

from handfast.audit.extent import SIZES, Extent
from handfast.errors import Damaged

__all__ = ["Checked"]


class Checked(msgspec.Struct, frozen=True):
    """An extent of which ``crc`` was written down: a :class:`handfast.audit.found.Values`.

    ``summed(block, before)`` is the checksum of bytes that follow others; ``differs(found)`` is
    what to raise for another one than was written.
    """

    extent: Extent
    crc: int
    summed: Callable[[memoryview, int], int]
    differs: Callable[[int], Damaged]

    @property
    def dtype(self) -> str:
        """See the port."""
        return self.extent.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See the port."""
        return self.extent.shape

    def blocks(self, most: int) -> Iterator[memoryview]:
        """See the port. Raises Damaged as well, before the last block, where the checksum of all is
        another.
        """
        crc = 0
        left = math.prod(self.shape) * SIZES.get(self.dtype, 1)  # of none it has no blocks
        for block in self.extent.blocks(most):
            crc, left = self.summed(block, crc), left - block.nbytes
            if not left and crc != self.crc:
                raise self.differs(crc)
            yield block
