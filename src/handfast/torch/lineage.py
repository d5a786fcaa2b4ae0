"""Lineages: training histories, each a name for what followed step by step from what was before."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from handfast.model.optimizer import Index
from handfast.store.manifest import Fork, Stamp

__all__ = ["History", "index_of"]


class History(NamedTuple):
    """The lineage that is being trained, and where it began; nothing came before "main".

    One that began with weights of several epochs has a fork for each of them, by the one name.
    """

    lineage: str = "main"
    forks: tuple[Fork, ...] = ()

    @classmethod
    def of(cls, stamp: Stamp) -> History:
        """The history that an epoch was saved in."""
        return cls(stamp.lineage, stamp.forks)

    def joined(self, others: Iterable[History]) -> History:
        """This history with all beginnings: also those that others of its lineage name."""
        forks = chain(self.forks, *(each.forks for each in others if each.lineage == self.lineage))
        return History(self.lineage, tuple(dict.fromkeys(forks)))

    def began(self) -> tuple[Fork, ...]:
        """Where the lineage itself began, at each of the epochs that it began with."""
        return tuple(fork for fork in self.forks if fork.lineage == self.lineage)

    def onward(self, lineage: str, run: str, at: Index, why: str) -> History:
        """What an epoch of this history goes on as: itself, or a ``lineage`` that begins there.

        One that is named again goes on: a script says at each start what it said at the first.
        Raises ValueError for the name of one that came before: two histories would go by it.
        """
        if lineage in ("", self.lineage):
            return self
        if lineage in {name for f in self.forks for name in (f.lineage, f.of)}:
            raise ValueError(
                f"lineage={lineage!r}: epoch {at.generation}/{at.step} came from a lineage of that "
                "name: give what begins here a new one"
            )
        began = Fork(lineage, run, self.lineage, at.generation, at.step, why)
        return History(lineage, (*self.forks, began))


def index_of(stamp: Stamp) -> Index:
    """The index that a stamp carries."""
    return Index(stamp.lineage, stamp.generation, stamp.step, stamp.configuration)
