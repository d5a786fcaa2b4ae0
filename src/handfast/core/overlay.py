"""The tree: whose attestations are rolled up to whom, and whom a certificate is passed on to.

The domains of a tier, in configuration order, are cut into aligned blocks of k, k^2, k^3 ...
domains, k a power of two; the last of a size may be short. A block is led by its first domain. Who
holds the votes of all the blocks that it leads tells the leader of the next greater one. So every
domain but the first has one above it, and an epoch takes n - 1 messages up and n - 1 down, over as
many hops each as the tree is deep: the most digits other than 0 that a place below n has in base k.
(Tree aggregation, as in MPI's binomial trees, which this is for k = 2; 2(n - 1) messages is what
Dwork and Skeen showed to be the least for commitment without failures.)

Aligned blocks are the inner nodes of :func:`~handfast.core.messages.merkle_root` over the tier's
attestations. So what the first domain ends up with is the root that gossip would have found.

A block of domains that all staged an epoch is a conjunction of stable facts, and stable itself. So
the tree may be left, doubled and rebuilt at any time, and whatever else is heard joins in.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

__all__ = ["FANOUT", "Tree"]

FANOUT: Final = 8
"""How many blocks make the next greater one, where a configuration does not say."""
_kept = lru_cache(1 << 16)  # asked at each step, of the few places that a process speaks for


class Tree:
    """The shape of the tree over tiers that lie in one piece each, in configuration order.

    ``spans`` has the (first, end) of each tier's places. The first domain of each further tier
    hangs on that of the first tier, and has only certificates to tell it.
    Raises ``ValueError`` for a ``fanout`` that is no power of two above 1.
    """

    __slots__ = ("fanout", "spans")

    def __init__(self, spans: tuple[tuple[int, int], ...], fanout: int) -> None:
        if fanout < 2 or fanout.bit_count() > 1:
            raise ValueError(f"a tree's fanout is a power of two above 1, not {fanout}")
        self.spans = spans
        self.fanout = fanout

    @_kept
    def span(self, at: int) -> tuple[int, int]:
        """Find the (first, end) of the tier that a place lies in."""
        return next(span for span in self.spans if at < span[1])

    @_kept
    def block(self, at: int) -> tuple[int, int]:
        """Give the (first, end) of the greatest block that a domain leads; itself, at least."""
        first, end = self.span(at)
        width = 1
        while (at - first) % (width * self.fanout) == 0 and at + width < end:
            width *= self.fanout
        return at, min(at + width, end)

    @_kept
    def above(self, at: int) -> int | None:
        """Find whom a domain tells of its block; None for the first of all."""
        first, _ = self.span(at)
        if at == first:
            return self.spans[0][0] if at != self.spans[0][0] else None
        width = self.fanout
        while (at - first) % width == 0:
            width *= self.fanout
        return at - (at - first) % width

    def below(self, at: int) -> tuple[int, ...]:
        """List whose blocks a domain waits for, and the first of the other tiers."""
        first, end = self.block(at)
        width, found = 1, []
        while first + width < end:
            found += [at + j * width for j in range(1, self.fanout) if at + j * width < end]
            width *= self.fanout
        others = [start for start, _ in self.spans[1:]] if at == self.spans[0][0] else []
        return (*found, *others)

    def next_to(self, at: int) -> tuple[int, ...]:
        """List who is above and below a domain: whom it talks to."""
        above = self.above(at)
        return self.below(at) if above is None else (above, *self.below(at))

    def leaders(self, at: int) -> Iterator[int]:
        """List who is above, who is above that one, and so on up to the first of all."""
        above = self.above(at)
        while above is not None:
            yield above
            above = self.above(above)

    def aligned(self, first: int, end: int) -> bool:
        """Say whether these places, which are there, are an inner node of the Merkle tree."""
        start, stop = self.span(first)
        width = 1 << (end - first - 1).bit_length()
        return (first - start) % width == 0 and end == min(first + width, stop)

    def joins(self, left: tuple[int, int], right: tuple[int, int]) -> bool:
        """Say whether two inner nodes of a tier are the two halves of one above."""
        start, stop = self.span(left[0])
        width = left[1] - left[0]
        whole = width.bit_count() == 1 and (left[0] - start) % (2 * width) == 0
        return whole and right == (left[1], min(left[1] + width, stop))

    def depth(self) -> int:
        """Count the hops from the farthest domain to the first of its tier."""
        return max(
            sum(first <= above for above in self.leaders(at))
            for first, end in self.spans for at in range(first, end)
        )  # fmt: skip
