"""Where a run first left the way of another one, by the prints of both."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from handfast.testing.exact.moments import Moment, Print
from handfast.testing.exact.result import COUNTED, TRAINED, Difference

__all__ = ["Place", "Ranks", "Split", "left_of", "noise_of", "split_of"]

Ranks = Sequence[Sequence[Moment]]
"""The moments of one start, rank by rank."""

Place = tuple[int, str]
"""A rank, and a path on it."""

CAUSES: Final = (
    "loader position",
    "random stream",
    "extra",
    "scheduler",
    "scaler",
    "object",
    "value",
    "tensor",
    "step counter",
    "moment",
    "hyperparameter",
    "module state",
    "buffer",
    "parameter",
)
"""Which of two that differ at once is told first: the one that others rather follow from."""
NOTHING: Final = "nothing"


class Split(NamedTuple):
    """Where two runs part: in which start, and at which save the stored state first differs.

    ``first`` are the differences that are the oldest of those which last until then, ``then`` the
    other ones of the stored state.
    """

    start: int
    step: int
    first: tuple[Difference, ...]
    then: tuple[Difference, ...]


def noise_of(one: Ranks, other: Ranks) -> set[Place]:
    """Everything that differs between two uninterrupted runs, anywhere."""
    return {
        (rank, path)
        for rank, (was, now) in enumerate(zip(one, other, strict=True))
        for moment in now
        for path in _unlike(_by_step(was), moment)
    }


def split_of(
    truth: Ranks,
    starts: Sequence[Ranks],
    without: Collection[Place] = (),
    *,
    loadable: bool = True,
) -> Split | None:
    """Find where the starts of a run leave the way of another one; None where they never do.

    They do at a save whose stored state differs, ``without`` some of it, or what is trained and is
    not stored; or, unless ``loadable`` is False, what is not stored, could have been loaded, and is
    another one until the end of that start. What differed before then, and all the time until then,
    is told first: of what is not stored only what moves with the training, for all else is no state
    that could be lost.
    """
    for number, start in enumerate(starts):
        ranks = _ranks(truth, start, without)
        steps = [step for rank in ranks if (step := rank.departs(loadable)) is not None]
        if steps:
            return _split(ranks, number, min(steps))
    return None


def left_of(
    truth: Ranks, starts: Sequence[Ranks], without: Collection[Place] = ()
) -> tuple[Difference, ...]:
    """What is not stored, moves, and is another one at the end of a start: some may matter."""
    for start in starts:
        ranks = _ranks(truth, start, without)
        if found := [d for rank in ranks for d in rank.left()]:
            return tuple(sorted(found, key=_order))
    return ()


def _ranks(truth: Ranks, start: Ranks, without: Collection[Place]) -> list[_Rank]:
    pairs = enumerate(zip(truth, start, strict=True))
    return [_Rank(was, now, rank, without) for rank, (was, now) in pairs]


def _split(ranks: Sequence[_Rank], number: int, step: int) -> Split:
    found = [(at, d) for rank in ranks for at, d in rank.lasting(step)]
    since = min(at for at, _ in found)
    first = sorted((d for at, d in found if at == since), key=_order)
    later = (d for at, d in found if at != since and (d.stored or d.belongs))
    then = sorted(later, key=_order)
    if not any(d.stored for d in (*first, *then)):  # what counts then has nothing to follow from
        first.sort(key=lambda d: not d.belongs)
    return Split(number, step, tuple(first), tuple(then))


def _order(difference: Difference) -> tuple[int, str]:
    return CAUSES.index(difference.kind), difference.path


class _Rank:
    """One rank of one start, beside the same rank of an uninterrupted run."""

    def __init__(
        self,
        truth: Sequence[Moment],
        moments: Sequence[Moment],
        rank: int,
        without: Collection[Place],
    ) -> None:
        self._truth = _by_step(truth)
        self._moments = moments
        self._rank = rank
        self._moving = _moving(truth)
        self._unlike = [
            {path for path in _unlike(self._truth, moment) if (rank, path) not in without}
            for moment in moments
        ]

    def departs(self, loadable: bool) -> int | None:
        """The first save at which something differs that is stored, or trained, or loadable."""
        for at, (moment, paths) in enumerate(zip(self._moments, self._unlike, strict=True)):
            if moment.what == "saved" and any(self._counts(path, at, loadable) for path in paths):
                return moment.step
        return None

    def _counts(self, path: str, at: int, loadable: bool) -> bool:
        leaf = self._moments[at].prints.get(path)
        if leaf is None or leaf.stored or path not in self._moving:
            return self._stored(path, self._moments[at])
        if leaf.kind == TRAINED:
            return True
        alone = loadable and leaf.loadable and not path.endswith(COUNTED)
        return alone and all(path in later for later in self._unlike[at:])

    def left(self) -> Iterator[Difference]:
        """What is not stored, and differs at the end."""
        if self._moments:
            yield from (d for _, d in self.lasting(self._moments[-1].step) if not d.stored)

    def lasting(self, step: int) -> Iterator[tuple[int, Difference]]:
        """What differs at a save, from when on it did so without a break, and as it was then."""
        last = max((at for at, m in enumerate(self._moments) if m.step <= step), default=-1)
        for path in self._unlike[last] if last >= 0 else ():
            since = last
            while since and path in self._unlike[since - 1]:
                since -= 1
            moment = self._moments[since]
            if path in self._moving or self._stored(path, moment):
                yield moment.step - (moment.what == "restored"), self._difference(path, moment)

    def _stored(self, path: str, moment: Moment) -> bool:
        was, now = self._pair(path, moment)
        return any(side is not None and side.stored for side in (was, now))

    def _pair(self, path: str, moment: Moment) -> tuple[Print | None, Print | None]:
        return self._truth[moment.step].prints.get(path), moment.prints.get(path)

    def _difference(self, path: str, moment: Moment) -> Difference:
        was, now = self._pair(path, moment)
        known = now or was
        if known is None:
            raise ValueError(f"{path} is on neither side")
        return Difference(
            path=path,
            kind=known.kind,
            stored=known.stored,
            rank=self._rank,
            step=moment.step,
            restored=moment.what == "restored",
            expected=was.text if was else NOTHING,
            found=now.text if now else NOTHING,
            largest=_largest(was, now),
            sampled=len(known.sample),
            size=known.size,
            loadable=known.loadable,
        )


def _by_step(moments: Sequence[Moment]) -> dict[int, Moment]:
    return {moment.step: moment for moment in moments}


def _unlike(truth: Mapping[int, Moment], moment: Moment) -> set[str]:
    """The paths that two moments of one step have otherwise.

    What is not stored counts only where both have it: a variable may not be there yet.
    """
    then = truth.get(moment.step)
    if then is None:
        return set()
    was, now = then.prints, moment.prints
    alone = {path for path in was.keys() ^ now.keys() if (was.get(path) or now[path]).stored}
    return alone | {
        path for path in was.keys() & now.keys() if was[path].digest != now[path].digest
    }


def _moving(moments: Sequence[Moment]) -> set[str]:
    """The paths that change from one moment to another."""
    seen: dict[str, bytes] = {}
    moving = set()
    for moment in moments:
        for path, leaf in moment.prints.items():
            if seen.setdefault(path, leaf.digest) != leaf.digest:
                moving.add(path)
    return moving


def _largest(was: Print | None, now: Print | None) -> float | None:
    """The largest difference of the elements that were kept; None where they can't be compared."""
    if was is None or now is None or not was.sample or was.size != now.size:
        return None
    apart = [abs(a - b) for a, b in zip(was.sample, now.sample, strict=True) if a != b]
    return math.nan if any(map(math.isnan, apart)) else max(apart, default=0.0)
