"""Lineages: training histories, each a name for what followed step by step from what was before."""

from __future__ import annotations

from typing import NamedTuple

from handfast.model.optimizer import Index
from handfast.store.manifest import Fork, Stamp

__all__ = ["History", "index_of"]


class History(NamedTuple):
    """The lineage that is being trained, and where it began; nothing came before "main"."""

    lineage: str = "main"
    forks: tuple[Fork, ...] = ()

    @classmethod
    def of(cls, stamp: Stamp) -> History:
        """The history that an epoch was saved in."""
        return cls(stamp.lineage, stamp.forks)

    def fork(self, lineage: str, run: str, at: Index, why: str) -> History:
        """Open another lineage at an epoch of this one.

        Raises ValueError for a name that was borne before: what goes by it would be two histories.
        """
        if lineage in {self.lineage, *(name for f in self.forks for name in (f.lineage, f.of))}:
            raise ValueError(
                f"lineage={lineage!r}: epoch {at.generation}/{at.step} came from a lineage of that "
                "name: give what begins here a new one"
            )
        began = Fork(lineage, run, self.lineage, at.generation, at.step, why)
        return History(lineage, (*self.forks, began))


def index_of(stamp: Stamp) -> Index:
    """The index that a stamp carries."""
    return Index(stamp.lineage, stamp.generation, stamp.step, stamp.configuration)
