"""What a run's own journals tell for planning, and what only the clocks of its files hint at.

There is no clock in a journal, on purpose: nothing may hang on one. So what can be *counted* is
how generations ended: how far each domain's votes had come, which agents a new generation found
replaced, how often a domain skipped, how many updates were done again. *Not known* is how long
anything took, when a generation ended, and whether it crashed or stopped in good order (an
orderly end drains, so it tears nothing, and counts among the ends here).

The files' times of modification are *hints*: each is one host's clock, a copy of the run may have
lost them, and only epochs that are still retained have files.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

import msgspec

from handfast.checkpoint.survey import Found, Survey
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Frozen, Restored, Skipped, Staged
from handfast.store.files import reading

__all__ = ["Hints", "History", "Life", "history"]


class Life(msgspec.Struct, frozen=True):
    """One generation, as the journals have it when the next one had begun, or as it stands.

    ``newest`` is the greatest epoch of it that any domain has STAGED, and ``missing`` are the
    domains that had no word on that one, neither STAGED nor SKIP. ``epochs`` counts the epochs
    that any domain voted on, ``staged`` and ``skipped`` the votes. ``base`` is None where no
    restore certificate of it is known. ``replaced`` are the domains whose agent the next
    generation found to be another incarnation. ``again`` counts the updates past the next
    generation's base that some domain had voted on; None where that base is of an older
    generation, or there is no next.
    """

    generation: int
    base: Epoch | None
    newest: Epoch | None
    missing: tuple[str, ...]
    epochs: int
    staged: int
    skipped: int
    ended: bool
    replaced: tuple[str, ...]
    again: int | None

    @property
    def torn(self) -> bool:
        """Say whether it ended between the first vote on its newest epoch and the last."""
        return self.ended and bool(self.missing)


class Hints(msgspec.Struct, frozen=True):
    """What modification times of manifests suggest, in seconds; None where there are too few.

    ``spread`` is the median over ``epochs`` of how long after the first domain's manifest the last
    one was written, ``interval`` the median time from one epoch's first manifest to the next's.
    """

    epochs: int
    spread: float | None
    interval: float | None


class History(msgspec.Struct, frozen=True):
    """All generations of a run that its journals know, oldest first.

    ``unread`` are domains of the configuration that are not here, or can't be read: no generation
    is judged without them. ``steps`` is the median distance of epochs that follow each other.
    ``hosts`` names each domain's host. ``lost`` counts copies that were attested, not released,
    and are not there.
    """

    run: str
    domains: tuple[str, ...]
    hosts: tuple[str, ...]
    unread: tuple[str, ...]
    lives: tuple[Life, ...]
    steps: float | None
    lost: int
    hints: Hints

    @property
    def ends(self) -> tuple[Life, ...]:
        """Give the generations that ended and had voted on something."""
        return tuple(life for life in self.lives if life.ended and life.epochs)

    @property
    def votes(self) -> tuple[int, int]:
        """Count the votes of all generations: STAGED, SKIP."""
        return sum(x.staged for x in self.lives), sum(x.skipped for x in self.lives)

    @property
    def struck(self) -> dict[str, int]:
        """Count, over the ends, which hosts' agents were found replaced together."""
        every = sorted(set(self.hosts))
        found: Counter[str] = Counter()
        for hosts in self._replaced():
            found["all" if hosts == every else ", ".join(hosts) or "none"] += 1
        return dict(found)

    @property
    def together(self) -> tuple[float, float] | None:
        """Give the share of ends at which all hosts' agents were found replaced, and what it would
        be if hosts were struck independently, each as often as it was. None for a single host.

        The first far above the second is what common shocks look like.
        """
        hosts, ends = sorted(set(self.hosts)), self._replaced()
        if len(hosts) < 2 or not ends:
            return None
        single = (sum(host in end for end in ends) / len(ends) for host in hosts)
        return sum(end == hosts for end in ends) / len(ends), math.prod(single)

    def _replaced(self) -> list[list[str]]:
        host = dict(zip(self.domains, self.hosts, strict=True))
        return [sorted({host[d] for d in life.replaced}) for life in self.lives if life.ended]


def history(survey: Survey) -> History:
    """Read what the journals of a run tell; raises HandfastError where files can't be looked at."""
    places = [f for f in survey.places if f is not None and f.member is not None]
    whole = not survey.absent
    epochs = sorted({e for f in places for e in f.votes if e != GENESIS})
    steps = [b.step - a.step for a, b in pairwise(epochs) if a.generation == b.generation]
    return History(
        run=survey.run,
        domains=tuple(d.id for d in survey.domains),
        hosts=tuple(d.host for d in survey.domains),
        unread=survey.absent,
        lives=tuple(_lives(places)) if whole else (),
        steps=median(steps) if steps else None,
        lost=sum(len(f.member.lost) for f in places if f.member is not None),
        hints=_hints(places),
    )


def _lives(places: Sequence[Found]) -> Iterator[Life]:
    froze: dict[int, dict[str, int]] = {}  # generation -> domain -> incarnation
    bases: dict[int, Epoch] = {}
    for found in places:
        for record in found.records:
            if isinstance(record, Frozen):
                froze.setdefault(record.generation, {})[found.id] = record.incarnation
            elif isinstance(record, Restored):
                bases[record.certificate.generation] = record.certificate.base
    begun = sorted(froze)
    for generation, after in zip(begun, [*begun[1:], None], strict=True):
        votes = [_votes(f, generation) for f in places]
        newest = max((e for v in votes for e, staged in v.items() if staged), default=None)
        base, begin = bases.get(after or 0), Epoch(generation, 0)
        yield Life(
            generation=generation,
            base=bases.get(generation),
            newest=newest,
            missing=tuple(
                f.id for f, v in zip(places, votes, strict=True) if newest and newest not in v
            ),
            epochs=len({epoch for v in votes for epoch in v}),
            staged=sum(staged for v in votes for staged in v.values()),
            skipped=sum(not staged for v in votes for staged in v.values()),
            ended=after is not None,
            replaced=_replaced(froze[generation], froze[after]) if after is not None else (),
            again=newest.step - base.step if newest and base and base >= begin else None,
        )


def _votes(found: Found, generation: int) -> Mapping[Epoch, bool]:
    """A domain's votes of one generation: was it STAGED?"""
    return {
        record.epoch: isinstance(record, Staged)
        for record in found.records
        if isinstance(record, Staged | Skipped) and record.epoch.generation == generation
    }


def _replaced(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(d for d, number in after.items() if d in before and number > before[d])


def _hints(places: Iterable[Found]) -> Hints:
    """Look when the manifests of epochs that every domain still has were last written."""
    written: list[dict[Epoch, float]] = []
    for found in places:
        with reading(f"{found.root}/domains/{found.name}"):
            written.append({e: os.stat(at.path).st_mtime for e, at in found.entries.items()})
    common = sorted(set.intersection(*map(set, written))) if written else []
    first = {epoch: min(times[epoch] for times in written) for epoch in common}
    spreads = [max(times[epoch] for times in written) - first[epoch] for epoch in common]
    pairs = [(a, b) for a, b in pairwise(common) if a.generation == b.generation]
    gaps = [first[b] - first[a] for a, b in pairs]
    return Hints(
        len(common),
        median(spreads) if spreads and len(written) > 1 else None,
        median(gaps) if gaps and min(gaps) > 0 else None,
    )
