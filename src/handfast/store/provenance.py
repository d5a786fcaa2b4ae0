"""What each rank's part of an epoch came from, and whether these can be of one training.

Each rank loads by hand what it likes, and neither a load nor a save asks another. But what was
loaded is in every stamp, and so it can be held against what the others say: at a restore, by
``handfast verify``, and by the first shard's agent once an epoch is persisted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.store.manifest import Fork, Source, Stamp

__all__ = ["NOTHING", "Brought", "brought", "found", "mixed", "unlike"]


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


def brought(lineage: str, forks: Iterable[Fork], came: Iterable[Source]) -> Brought:
    """What goes on as ``lineage``, which began at ``forks``, with what ``came`` from epochs.

    What goes on as the lineage that it was of stands by its path: it can be of one epoch only.
    What has begun another stands by its run, too: so two may be joined on purpose.
    """
    sources = {f"{f.why} of {f.run}": f"{f.of} {Epoch(f.generation, f.step)}" for f in forks}
    for one in came:
        at = f"{one.lineage} {Epoch(one.generation, one.step)}"
        if one.lineage == lineage:
            sources[one.path] = f"{at} of run {one.run}"
        else:
            sources[f"{one.path} of {one.run}"] = at
    return Brought(lineage, sources)


def found(stamp: Stamp) -> Brought:
    """What one rank's shard of an epoch is of."""
    return brought(stamp.lineage, stamp.forks, stamp.came)


def mixed(said: Sequence[Brought]) -> dict[str, dict[str, list[int]]]:
    """Find what ranks have loaded from different epochs: by what it is, who has it from where.

    Stages of a pipeline may load what others do not.
    """
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, one in enumerate(said):
        for what, where in one.sources.items():
            places[what][where].append(rank)
    return {what: dict(by) for what, by in places.items() if len(by) > 1}


def unlike(said: Sequence[Brought]) -> bool:
    """Whether ranks bring different lineages, or loaded the same from different epochs."""
    return len({one.lineage for one in said}) > 1 or bool(mixed(said))
