"""Counters of one step that disagree: between parts, and between clocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.found import Clock, Counter, Step

__all__ = ["counters"]

SHOWN = 6


class _Read(NamedTuple):
    part: str
    counter: Counter

    def __str__(self) -> str:
        counter = self.counter
        return f"{self.part}: {counter.path} = {counter.value} ({counter.clock})"


def counters(step: Step) -> Iterator[Finding]:
    """Hold against each other what counts the updates of one step.

    The same counter in two parts is one fact written twice: certain. Two clocks that count updates
    agree in every sound checkpoint of the format: strong, as somebody may have renamed a directory.
    What a loss scaler skips may make a counter lag, never lead. Parameters that got gradients
    later, or not in every step, have smaller counts: so only the greatest of an optimizer counts,
    and the same parameter in two parts.
    """
    read = [_Read(part.path, counter) for part in step.parts for counter in part.counters]
    apart = list(_twice(step, read))
    yield from apart
    if not apart:  # else it would be said once more for each clock
        yield from _between(step, read)


def _twice(step: Step, read: Sequence[_Read]) -> Iterator[Finding]:
    same: dict[tuple[Clock, str], list[_Read]] = defaultdict(list)
    for one in read:
        same[one.counter.clock, one.counter.path].append(one)
    told: dict[tuple[Clock, tuple[int, ...]], list[list[_Read]]] = defaultdict(list)
    for (clock, _), group in same.items():
        if len({one.counter.value for one in group}) > 1:
            told[clock, tuple(one.counter.value for one in group)].append(group)
    for (clock, _), groups in told.items():
        group, more = groups[0], len(groups) - 1
        values = sorted({one.counter.value for one in group})
        said = ", ".join(map(str, values[:SHOWN])) + (" ..." if len(values) > SHOWN else "")
        also = f" (and {more} other counters of these parts)" if more else ""
        yield Finding(
            Code.COUNTERS,
            step.strength(Strength.CERTAIN if group[0].counter.updates else Strength.STRONG),
            step.path,
            f"one counter of the {clock} has the values {said}{also}: its parts are of different "
            "steps",
            tuple(dict.fromkeys(one.part for one in group)),
            _shown(group),
        )


def _between(step: Step, read: Sequence[_Read]) -> Iterator[Finding]:
    by_clock: dict[Clock, list[_Read]] = defaultdict(list)
    for one in read:
        if one.counter.updates:
            by_clock[one.counter.clock].append(one)
    heads = [max(group, key=lambda one: one.counter.value) for group in by_clock.values()]
    exact = [one for one in heads if not one.counter.skips]
    values = {one.counter.value for one in exact}
    if len(values) > 1:
        yield _disagree(step, heads, "clocks of one step say different updates")
        return
    most = next(iter(values), None)
    for one in heads:
        if most is None or not one.counter.skips:
            continue
        lag = most - one.counter.value
        if lag < 0:
            yield _disagree(step, heads, f"the {one.counter.clock} is ahead by {-lag} updates")
        elif lag > 0 and not step.scaled:
            what = f"the {one.counter.clock} lags by {lag} updates, and no loss scaler skips any"
            yield _disagree(step, heads, what)


def _disagree(step: Step, heads: Sequence[_Read], what: str) -> Finding:
    parts = tuple(dict.fromkeys(one.part for one in heads))
    strength = step.strength(Strength.STRONG)
    return Finding(Code.COUNTERS, strength, step.path, what, parts, _shown(heads))


def _shown(read: Sequence[_Read]) -> tuple[str, ...]:
    """One line a value, and then more of them, up to a few."""
    first = {one.counter.value: one for one in reversed(read)}
    shown = list(islice(first.values(), SHOWN))
    rest = (one for one in read if one not in shown)
    return tuple(map(str, [*shown, *islice(rest, SHOWN - len(shown))]))
