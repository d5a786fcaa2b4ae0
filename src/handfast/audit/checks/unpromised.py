"""Counts that no format promises to go together: a free name, a trainer's, an optimizer's ...

A scheduler may count epochs, an optimizer every fourth batch. So what a step has is held against
what the other steps of its run have, and only where these say nothing against what is plausible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from handfast.audit.counted import Count, epochs, goes_with, greatest, named, told
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.found import Clock, Step

__all__ = ["Counts", "counts", "unpromised"]

OTHERS: Final = 2
"""Other steps at least that tell how two counts go together."""

Counts = Mapping[str, Count]
"""What there is of a name, a counter at the top, an optimizer and a scheduler."""

_NAME, _STEP, _OPTIMIZER, _SCHEDULER = "name", "step", "optimizer", "scheduler"

_PAIRS: Final = (
    (_NAME, _STEP),
    (_STEP, _OPTIMIZER),
    (_NAME, _OPTIMIZER),
    (_STEP, _SCHEDULER),
    (_OPTIMIZER, _SCHEDULER),
)


def counts(step: Step) -> Counts:
    """What a free step counts, by what counts it; nothing of one whose format promises it."""
    if not step.free:
        return {}
    name = named(step)
    near = name is not None and any(abs(name.value - epoch) <= 1 for epoch in epochs(step))
    found = {
        _NAME: None if near else name,
        _STEP: told(step),
        _OPTIMIZER: greatest(step, Clock.OPTIMIZER),
        _SCHEDULER: greatest(step, Clock.SCHEDULER),
    }
    return {what: count for what, count in found.items() if count is not None}


def unpromised(at: int, steps: Sequence[Step], every: Sequence[Counts]) -> Iterator[Finding]:
    """Find whether a step's counts contradict each other, or its name: a hint. By its place.

    They do where the other steps of the run show how the two go together, and it does not; or, with
    nothing to go by, where they are more than one apart, and are both said to be of steps or too
    near to each other to be of two units.
    """
    step, here = steps[at], every[at]
    surer = (f.code is Code.COUNTERS and f.strength is not Strength.HINT for f in step.findings)
    if any(surer):
        return
    others = [each for nth, each in enumerate(every) if nth != at]
    said: set[str] = set()
    for one, other in _PAIRS:
        if not {one, other} <= here.keys() or said & {one, other}:
            continue
        if abs(here[one].value - here[other].value) <= 1:
            continue
        there = [
            (each[one].value, each[other].value) for each in others if {one, other} <= each.keys()
        ]
        sure = here[one].sure and here[other].sure
        if _apart((here[one].value, here[other].value), there, sure=sure):
            if step.scaled and _OPTIMIZER in (one, other) and _skipped(here, one, other, others):
                continue
            said |= {one, other}
            parts = tuple(filter(None, dict.fromkeys((here[one].part, here[other].part))))
            says = f"{here[one].where}, and {here[other].where}: they are not of one step"
            yield Finding(Code.COUNTERS, Strength.HINT, step.path, says, parts)


def _skipped(here: Counts, one: str, other: str, others: Sequence[Counts]) -> bool:
    """Whether an optimizer is behind by what a loss scaler may have skipped, not another's."""
    made = here[_OPTIMIZER].value
    twins = {each[_OPTIMIZER].value for each in others if _OPTIMIZER in each}
    return made < max(here[one].value, here[other].value) and made not in twins


def _apart(pair: tuple[int, int], others: Sequence[tuple[int, int]], *, sure: bool) -> bool:
    if len(others) >= OTHERS and goes_with(others):
        return not goes_with([*others, pair])
    return sure or 2 * min(pair) > max(pair)
