"""What the ranks bring to a round, or find in one epoch: histories that can't be of one training.

Each rank loads by hand what it likes, and a save asks no other rank. So they are held against each
other where all ranks meet: at the next restore.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.store.manifest import Fork, Stamp

__all__ = ["NOTHING", "Brought", "found", "sources", "unlike", "warn"]

logger = logging.getLogger("handfast")


class Brought(msgspec.Struct, frozen=True):
    """The lineage that a rank goes on as, "" where it brings nothing that is known, and the epochs
    that this came from, by what was loaded.
    """

    lineage: str = ""
    sources: dict[str, str] = {}

    def __str__(self) -> str:
        where = ", ".join(f"{what}: {at}" for what, at in self.sources.items())
        return f"{self.lineage or 'nothing known'}{where and f' ({where})'}"


NOTHING: Final = Brought()


def found(stamp: Stamp) -> Brought:
    """What one rank's shard of an epoch is of."""
    return Brought(stamp.lineage, sources(stamp.forks))


def sources(forks: Iterable[Fork]) -> dict[str, str]:
    """Where lineages began, by what began them."""
    return {f"{f.why} of {f.run}": f"{f.of} {Epoch(f.generation, f.step)}" for f in forks}


def unlike(said: Sequence[Brought]) -> bool:
    """Whether ranks bring different lineages, or loaded the same from different epochs. Stages of a
    pipeline may load what others do not.
    """
    at: dict[str, set[str]] = defaultdict(set)
    for one in said:
        for what, where in one.sources.items():
            at[what].add(where)
    return len({one.lineage for one in said}) > 1 or any(len(places) > 1 for places in at.values())


def warn(said: Sequence[Brought], what: str) -> None:
    """Warn where that is so, of ``what`` they have it in."""
    if unlike(said):
        logger.warning(
            "the ranks do not have one history in %s: %s. Where each has loaded its shard of "
            "another epoch that is a mixture, and where one has loaded for all, the epochs of the "
            "others bear no word of it. What to do: guard.load the same on every rank, with step= "
            "and lineage=",
            what,
            "; ".join(f"rank {rank}: {one}" for rank, one in enumerate(said)),
        )
