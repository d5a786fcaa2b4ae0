"""Retention: what a domain may forget, and what the user wants kept.

The rule of the protocol (S8) comes first: an epoch may go only below an own, known, retained,
converged epoch on the living timeline, and never between a freeze and its certificate. Within
that, :class:`Keep` says how much history the user pays for. One thing is stronger than the
design's text: an epoch that some shard has skipped in all of its domains is *void*; it can never
be available to anyone, so its other copies go at once, and a rank whose disk stays full does not
fill the disks of all the others (L6).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Branch, Copy
from handfast.core.recover import eligible

__all__ = ["Keep", "releasable"]


class Keep(msgspec.Struct, frozen=True, array_like=True):
    """Keep the ``newest`` converged epochs and, where given, every step divisible by ``every``.

    Raises ``ValueError`` for fewer than one, or a step interval below one.
    """

    newest: int = 3
    every: int | None = None

    def __post_init__(self) -> None:
        if self.newest < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"{self}: newest and every count from 1; an epoch must stay")


def releasable(
    retained: Sequence[Copy],
    *,
    line: Epoch | None,
    timeline: Sequence[Branch],
    keep: Keep,
    pinned: Collection[Epoch],
    void: Collection[Epoch],
    doubted: Collection[Epoch],
) -> tuple[Epoch, ...]:
    """List, lowest first, the epochs that may be released now.

    ``line`` is the highest epoch known converged in this domain's tier on the living timeline, or
    None during a recovery. ``void`` are epochs that can never be available, ``doubted`` those
    whose copy here was found BAD: it is no reason to release another, nor worth keeping.
    """
    epochs = sorted(copy.epoch for copy in retained)
    if line is None:
        return ()
    dead = [epoch for epoch in epochs if epoch in void and epoch not in pinned]
    if line not in epochs or line in doubted:
        return tuple(dead)
    past = [epoch for epoch in epochs if epoch <= line and epoch not in void]
    sound = [epoch for epoch in past if epoch != GENESIS and epoch not in doubted]
    living = [epoch for epoch in sound if eligible(epoch, timeline)]
    wanted = {line, *living[-keep.newest :]}
    if keep.every is not None:
        wanted.update(epoch for epoch in living if epoch.step % keep.every == 0)
    gone = [epoch for epoch in past if epoch not in wanted and epoch not in pinned]
    return tuple(sorted(dead + gone))
