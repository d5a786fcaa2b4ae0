"""The lattice for very many domains: what :mod:`handfast.core.lattice` does, on bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import and_, or_

import msgspec

from handfast.core.lattice import Epoch, Skew, mask

__all__ = ["Wide", "wide_line"]


class Wide(msgspec.Struct, frozen=True, array_like=True):
    """A vector of ``size`` domains, as its cuts: (epoch, mask of who is there or above), ascending.

    Each mask is a proper part of the one before, and the first has everybody (as in Birkhoff's
    representation; Davey and Priestley, ch. 5). Few epochs are about at one time, so that is few
    ints, to meet is AND and to join is OR. What it means is said by the plain functions above.
    """

    size: int
    cuts: tuple[tuple[Epoch, int], ...]

    @staticmethod
    def of(vector: Sequence[Epoch]) -> Wide:
        """Take a vector of one epoch a domain. Raises ValueError for one of no domains."""
        if not vector:
            raise ValueError("a vector of no domains has no epoch: give one for each domain")
        at: dict[Epoch, list[int]] = {}
        for i, epoch in enumerate(vector):
            at.setdefault(epoch, []).append(i)
        cuts, above = [], 0
        for epoch in sorted(at, reverse=True):
            above |= mask(at[epoch], len(vector))
            cuts.append((epoch, above))
        return Wide(len(vector), tuple(reversed(cuts)))

    def vector(self) -> tuple[Epoch, ...]:
        """Give back one epoch a domain."""
        found = [self.cuts[0][0]] * self.size
        for epoch, above in self.cuts[1:]:
            for i, bit in enumerate(reversed(f"{above:b}")):
                if bit == "1":
                    found[i] = epoch
        return tuple(found)

    def above(self, epoch: Epoch) -> int:
        """Mask the domains that are at an epoch or above it."""
        return next((above for at, above in self.cuts if at >= epoch), 0)

    def meet(self, other: Wide) -> Wide:
        """Give the greatest vector below both. Raises ValueError where the sizes differ."""
        return self._merge(other, and_)

    def join(self, other: Wide) -> Wide:
        """Give the least vector above both. Raises ValueError where the sizes differ."""
        return self._merge(other, or_)

    def _merge(self, other: Wide, how: Callable[[int, int], int]) -> Wide:
        epochs = self._epochs(other)
        cuts = [(epoch, how(self.above(epoch), other.above(epoch))) for epoch in epochs]
        last = (cuts[-1][0], 0)
        return Wide(self.size, tuple(a for a, b in pairwise((*cuts, last)) if a[1] != b[1]))

    def _epochs(self, other: Wide) -> list[Epoch]:
        if self.size != other.size:
            raise ValueError(f"vectors of {self.size} and {other.size} domains can't be compared")
        return sorted({epoch for epoch, _ in (*self.cuts, *other.cuts)})

    def leq(self, other: Wide) -> bool:
        """Tell whether no domain is further here. Raises ValueError where the sizes differ."""
        return not any(self.above(e) & ~other.above(e) for e in self._epochs(other))

    def floor(self) -> Epoch:
        """Give the epoch of the greatest consistent vector below."""
        return self.cuts[0][0]

    def ceiling(self) -> Epoch:
        """Give the epoch of the least consistent vector above."""
        return self.cuts[-1][0]

    def skew(self, *, one_timeline: bool = False) -> Skew:
        """Measure how far the domains are apart; see :func:`handfast.core.lattice.skew`."""
        generations = len({epoch.generation for epoch, _ in self.cuts})
        apart = self.ceiling().step - self.floor().step
        return Skew(
            len(self.cuts), generations, apart if generations == 1 or one_timeline else None
        )


def wide_line(retained: Mapping[Epoch, int], size: int) -> Epoch | None:
    """Find the recovery line, where ``retained`` masks who of ``size`` domains holds each epoch."""
    everyone = (1 << size) - 1
    return max((epoch for epoch, held in retained.items() if held == everyone), default=None)
