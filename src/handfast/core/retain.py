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

    A domain goes by what it knows to have converged, and other domains may know of others: so it
    keeps whatever is newer than the last of its ``newest``, converged or not.

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
    converged: Collection[Epoch],
    keep: Keep,
    pinned: Collection[Epoch],
    void: Collection[Epoch],
    doubted: Collection[Epoch],
) -> tuple[Epoch, ...]:
    """List, lowest first, the epochs that may be released now; ``retained`` comes in their order.

    ``line`` is the highest epoch known converged in this domain's tier on the living timeline, or
    None during a recovery. ``converged`` are all that were ever known converged in it: only they
    count as history, for what is torn would be kept in their place. ``void`` are epochs that can
    never be available, ``doubted`` those whose copy here was found BAD: it is no reason to release
    another, nor worth keeping.
    """
    if line is None:
        return ()
    gone, epochs = set(void), [copy.epoch for copy in retained]
    if line in epochs and line not in doubted:
        gone.update(_superseded(epochs, line, timeline, converged, keep, doubted))
    return tuple([epoch for epoch in epochs if epoch in gone and epoch not in pinned])


def _superseded(
    epochs: Sequence[Epoch],
    line: Epoch,
    timeline: Sequence[Branch],
    converged: Collection[Epoch],
    keep: Keep,
    doubted: Collection[Epoch],
) -> list[Epoch]:
    """List what lies below the line, and is not wanted, the newest first."""
    gone: list[Epoch] = []
    kept, every = 0, keep.every
    for epoch in reversed(epochs):
        if epoch > line:
            continue
        wanted = kept < keep.newest or (every is not None and epoch.step % every == 0)
        living = wanted and epoch != GENESIS and epoch not in doubted and eligible(epoch, timeline)
        if not living and epoch != line:
            gone.append(epoch)
        elif living and kept < keep.newest and epoch in converged:
            kept += 1
    return gone
