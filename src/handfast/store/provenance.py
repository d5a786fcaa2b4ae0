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

__all__ = ["NOTHING", "Brought", "brought", "found", "mixed", "ranks", "spell_mixed", "unlike"]


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

    A component stands by its run, so that stages of two may be joined on purpose; what goes on as
    the lineage that it was of stands by its path alone, too: it can be of one run only. Epochs go
    by their numbers, as a run has each once, whatever each rank calls its lineage; those that came
    by one name, as two towers may, are put in one order.
    """
    found: dict[str, set[Epoch]] = defaultdict(set)
    runs: dict[str, str] = {}
    for fork in forks:
        found[f"{fork.why} of {fork.run}"].add(Epoch(fork.generation, fork.step))
    for one in came:
        kept = [one.path] if one.lineage == lineage else []
        for what in (*kept, f"{one.path} of {one.run}"):
            found[what].add(Epoch(one.generation, one.step))
        runs |= dict.fromkeys(kept, f" of run {one.run}")
    return Brought(
        lineage,
        {
            what: ", ".join(map(str, sorted(epochs))) + runs.get(what, "")
            for what, epochs in found.items()
        },
    )


def found(stamp: Stamp) -> Brought:
    """What one rank's shard of an epoch is of."""
    return brought(stamp.lineage, stamp.forks, stamp.came)


def mixed(said: Sequence[Brought]) -> dict[str, dict[str, list[int]]]:
    """Find what ranks have loaded from different epochs: by what it is, who has it from where.

    Stages of a pipeline may load what others do not.
    """
    if all(one == said[0] for one in said):  # as nearly always, of however many ranks
        return {}
    places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, one in enumerate(said):
        for what, where in one.sources.items():
            places[what][where].append(rank)
    return {what: dict(by) for what, by in places.items() if len(by) > 1}


def spell_mixed(said: Sequence[Brought]) -> list[str]:
    """Spell out what ranks have loaded from different epochs: a line for each component."""
    return [
        f"{what}: " + " against ".join(f"{where} on {ranks(at)}" for where, at in by.items())
        for what, by in sorted(mixed(said).items())
    ]


def ranks(some: Sequence[int]) -> str:
    """Name ranks, the first of them where they are many."""
    more = f" and {len(some) - 8} more" if len(some) > 8 else ""
    return f"rank {', '.join(map(str, some[:8]))}{more}"


def unlike(said: Sequence[Brought]) -> bool:
    """Whether ranks bring different lineages, or loaded the same from different epochs."""
    return len({one.lineage for one in said}) > 1 or bool(mixed(said))
