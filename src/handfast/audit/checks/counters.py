"""Counters of one step that disagree: between parts, and between clocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.found import Clock, Counter, Step

__all__ = ["TOGETHER", "clocks", "counters", "own", "parameters", "together"]

SHOWN: Final = 6

STEPS: Final = 3
"""Steps in which counts that are as far apart in each go together."""

TOGETHER: Final = (
    f"; in {STEPS} steps at least they are as far apart: so they are where a training went on from "
    "weights alone, or began to train a part later"
)


class _Read(NamedTuple):
    part: str
    counter: Counter

    def __str__(self) -> str:
        counter = self.counter
        return f"{self.part}: {counter.path} = {counter.value} ({counter.clock})"


def together(steps: Sequence[Step], counted: Callable[[Step], Mapping[object, int]]) -> set[int]:
    """In which steps, by their places, what they counted is as far apart as in two others at least.

    In steps that counted as much, which may be copies, it is once.
    """
    apart: dict[object, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for at, step in enumerate(steps):
        counts = counted(step)
        most, least = (each(counts.values(), default=0) for each in (max, min))
        if most > least:
            lags = frozenset((what, most - count) for what, count in counts.items())
            apart[lags][most].append(at)
    alike = (places for places in apart.values() if len(places) >= STEPS)
    return {at for places in alike for each in places.values() for at in each}


def clocks(step: Step) -> dict[object, int]:
    """What each clock of a step counted of updates, at most."""
    return {one.counter.clock: one.counter.value for one in _heads(_read(step))}


def parameters(step: Step) -> dict[object, int]:
    """How many updates each parameter of a step has had."""
    every = (counter for part in step.parts for counter in part.counters)
    return {one.path: one.value for one in every if one.clock is Clock.PARAMETER}


def own(step: Step, *, steady: bool) -> Iterator[Finding]:
    """What the format itself found; where its parameters' counts go together it may be no fault."""
    for finding in step.findings:
        loose = steady and finding.code is Code.COUNTERS and not step.guessed
        yield _loose(finding) if loose else finding


def _loose(finding: Finding) -> Finding:
    return msgspec.structs.replace(
        finding, strength=Strength.HINT, says=f"{finding.says}{TOGETHER}"
    )


def counters(step: Step, *, steady: bool) -> Iterator[Finding]:
    """Hold against each other what counts the updates of one step.

    The same counter in two parts is one fact written twice: certain. Two clocks that count updates
    agree in every sound checkpoint of the format: strong, as somebody may have renamed a directory.
    What a loss scaler skips may make a counter lag, never lead. Parameters that got gradients
    later, or not in every step, have smaller counts: so only the greatest of an optimizer counts,
    and the same parameter in two parts. Clocks that go together (``steady``) are a hint.
    """
    read = _read(step)
    apart = list(_twice(step, read))
    yield from apart
    if not apart:  # else it would be said once more for each clock
        yield from map(_loose, _between(step, read)) if steady else _between(step, read)


def _read(step: Step) -> list[_Read]:
    return [_Read(part.path, counter) for part in step.parts for counter in part.counters]


def _heads(read: Sequence[_Read]) -> list[_Read]:
    """What is greatest of each clock that counts updates."""
    by_clock: dict[Clock, list[_Read]] = defaultdict(list)
    for one in read:
        if one.counter.updates:
            by_clock[one.counter.clock].append(one)
    return [max(group, key=lambda one: one.counter.value) for group in by_clock.values()]


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
    heads = _heads(read)
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
