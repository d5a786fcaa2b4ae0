"""What the files of a step count by themselves, and what its name says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from handfast.audit.found import Clock, Part, Step
from handfast.audit.found import Counter as Read

__all__ = ["Count", "counted", "epochs", "goes_with", "greatest", "named", "told"]

STEPS: Final = (
    "step", "global_step", "steps", "current_step", "train_step", "iteration", "iter", "iter_num",
    "global_iter", "n_iter", "it", "num_updates", "update",
)  # fmt: skip
"""Keys at the top of a file that say its step; of several the first."""

_WORDS: Final = r"(?P<word>global_?step|step|iter|update|checkpoint|ckpt)[a-z]*[ ._=-]?0*"


class Count(NamedTuple):
    """A number, and where it was read, in words; ``sure``: the word for it is one for steps."""

    value: int
    where: str
    part: str = ""
    sure: bool = False


def counted(step: Step) -> Count | None:
    """The step that its files count: by a counter at their top, else by optimizers that are alike.

    A counter that starts anew in each epoch is not gone by: the name and an optimizer say another
    step. None where they say none, and where its format has a name for it and holds counts against
    that.
    """
    if not step.free and step.number is not None:
        return None
    found, made = told(step), greatest(step, Clock.OPTIMIZER)
    if found is not None and made is not None and step.number is not None:
        found = made if abs(made.value - step.number) <= 1 else found
    if found is None:
        every = [_count(part, one) for part, one in _read(step) if one.clock is Clock.OPTIMIZER]
        found = every[0] if len({one.value for one in every}) == 1 else None
    return found if found is not None and found.value > 0 else None


def told(step: Step) -> Count | None:
    """What a counter at the top of a step's files says; the greatest, where ranks differ."""
    every: dict[str, list[Count]] = {}
    for part, one in _read(step):
        if one.clock is Clock.TRAINER and one.path in STEPS:
            every.setdefault(one.path, []).append(_count(part, one)._replace(sure=True))
    first = next((every[key] for key in STEPS if key in every), None)
    return max(first, key=lambda one: one.value) if first else None


def greatest(step: Step, clock: Clock) -> Count | None:
    """The greatest count of a clock: several optimizers may take turns."""
    every = (_count(part, one) for part, one in _read(step) if one.clock is clock)
    return max(every, key=lambda one: one.value, default=None)


def epochs(step: Step) -> set[int]:
    """The counts of epochs that its files have."""
    return {
        one.value
        for _, one in _read(step)
        if one.clock is Clock.TRAINER and one.path.rpartition("/")[2] == "epoch"
    }


def named(step: Step) -> Count | None:
    """The number in a step's name, where the word before it is one for steps or checkpoints.

    None where it may be one of epochs or of layers, or thousands of steps.
    """
    if step.number is None:
        return None
    found = Count(step.number, f"its name says {step.number}")
    near = "/".join((step.parts[0].path if step.parts else step.path).split("/")[-2:])
    if not step.path or re.search(rf"(?<!\d)0*{step.number}(?!\d)", near) is None:
        return found  # of the directory that is looked at
    said = re.search(rf"{_WORDS}{step.number}(?![\dkmb])", near, re.IGNORECASE)
    return found._replace(sure=said["word"][0] not in "cC") if said else None


def _read(step: Step) -> Iterator[tuple[Part, Read]]:
    return ((part, counter) for part in step.parts for counter in part.counters)


def _count(part: Part, counter: Read) -> Count:
    return Count(counter.value, f"{counter.path} in {part.path} is {counter.value}", part.path)


def goes_with(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether counts have one distance to numbers, or are in one proportion to them.

    The last one may be what such a proportion comes to in whole updates.
    """
    (first, counted), (number, count) = pairs[0], pairs[-1]
    return len({count - number for number, count in pairs}) == 1 or (
        counted > 0 < first
        and all(count * first == counted * number for number, count in pairs[:-1])
        and (count * first == counted * number or count == counted * number // first)
    )
