"""The goals, as data: each in the words that it was set in, and what has to be measured for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec

from benchmarks.common.figures import Figure, short
from benchmarks.common.peers import HANDFAST, STREAMED

__all__ = ["GOALS", "Goal", "Judged", "judge"]


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """One goal. It is met where what ``of`` names is ``most`` at most, or ``least`` at least.

    ``of`` is a figure's median, its ratio to what ``beside`` begins the name of, or the share: its
    inverse, where seconds stand for a rate. ``tensors`` are the counts, from and to, for which it
    is meant. Without a limit it is measured and stated. ``question`` is empty where nothing is
    there to be measured.
    """

    text: str
    question: str = ""
    what: str = ""
    who: str = HANDFAST
    beside: str = ""
    of: Literal["median", "ratio", "share"] = "median"
    most: float | None = None
    least: float | None = None
    tensors: tuple[int, int] = (0, 1 << 60)


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A goal held against one figure of a run; ``verdict`` is met, missed, stated or unmeasured."""

    goal: str
    at: str
    measured: str
    verdict: Literal["met", "missed", "stated", "unmeasured"]


_BLOCKING = "blocking time of save: at most 1.15 x a warm memcpy of the same bytes"
_DURABLE = "durable, hashed bytes per second: at least 0.95 of the O_DIRECT reference"
_KNOWN = "certified after the last byte is durable, 4 agents on loopback: at most 5 ms"
_TREE = "the same: at most 2 x the same tree's round trips"
_WARM = "verified restore into live tensors, warm: at most 1.3 x safetensors' unverified load"
_COLD = "the same, cold: at least 0.85 of the raw cold read"
_IN_PLACE = "the same, cold, in_place=True: at least 0.95 of the raw cold read"
_MEMORY = "extra memory, staging: at most 1.0 x state + 64 MiB"
_TIER = "extra memory, with the memory tier retained: at most 2.0 x state"
_STREAM = "extra memory, streaming: at most 256 MiB"
_TENSORS = "cost per tensor after the first save: at most 2 us up to 10,000 tensors"
_MANY = "cost per tensor after the first save: at most 8 us at 100,000"
_BYTES = "90 % of the state unchanged: at most 10.5 % of the bytes written"
_MATCH = "90 % of the state unchanged: the time to match"
_FREE = "slow-down of training steps while an epoch persists, a core free: at most 3 %"
_APART = "the same, the agent on a core of its own (HANDFAST_CPUS): at most 3 %"
_BUSY = "slow-down of training steps where no core is free: measured and stated"
_IMPORT = "import of handfast: at most 100 ms"
_BEYOND = "import of handfast.torch: at most torch + 50 ms"
_EVENTS = "core.member.step: at least 150,000 events/s on one core"
_DICT, _MODULE = "of a dict", "of a module and AdamW"

GOALS: Final = (
    Goal(text=_BLOCKING, question="blocking", what="blocked", of="ratio", most=1.15),
    Goal(text=_DURABLE, question="durable", what="durable", of="ratio", least=0.95),
    Goal(text=_KNOWN, question="certify", what="known", most=5),
    Goal(text=_TREE, question="certify", what="known", of="ratio", most=2),
    Goal(
        text=_WARM, question="restore", what="warm", beside="safetensors", of="ratio", most=1.3
    ),
    Goal(text=_COLD, question="restore", what="cold", beside="raw read", of="share", least=0.85),
    Goal(
        text=_IN_PLACE, question="restore", what="cold", who="handfast, in place",
        beside="raw read", of="share", least=0.95,
    ),
    Goal(text=_MEMORY, question="memory", what="save, beyond one copy", most=64),
    Goal(text=_TIER),
    Goal(text=_STREAM, question="memory", what="save", who=STREAMED, most=256),
    *(
        Goal(text=_TENSORS, question="tensors", what=what, most=2, tensors=(0, 10_000))
        for what in (_DICT, _MODULE)
    ),
    *(
        Goal(text=_MANY, question="tensors", what=what, most=8, tensors=(10_001, 100_000))
        for what in (_DICT, _MODULE)
    ),
    Goal(text=_BYTES, question="unchanged", who="a tenth changed", what="written", most=10.5),
    Goal(text=_MATCH, question="unchanged", who="a tenth changed", what="durable", of="ratio"),
    Goal(text=_FREE, question="training", what="a core free", of="ratio", most=1.03),
    Goal(
        text=_APART, question="training", what="a core free, kept apart", of="ratio", most=1.03
    ),
    Goal(text=_BUSY, question="training", what="no core free", of="ratio"),
    Goal(text=_IMPORT, question="imports", what="import", most=100),
    Goal(
        text=_BEYOND, question="imports", who="handfast.torch", what="import, beyond torch", most=50
    ),
    Goal(text=_EVENTS, question="protocol", who="member.step", what="steps", least=150_000),
)  # fmt: skip


def judge(figures: Sequence[Figure]) -> Iterator[Judged]:
    """Hold each goal against every figure that it speaks of, in the goals' order.

    A goal for which nothing was measured is said to be so.
    """
    for goal in GOALS:
        meant = [figure for figure in figures if _meant(goal, figure)]
        yield from (_judged(goal, figure) for figure in meant)
        if not meant:
            yield Judged(goal=goal.text, at="", measured="", verdict="unmeasured")


def _meant(goal: Goal, figure: Figure) -> bool:
    low, high = goal.tensors
    return (
        (figure.question, figure.who, figure.what) == (goal.question, goal.who, goal.what)
        and figure.beside.startswith(goal.beside)
        and low <= figure.at.get("tensors", low) <= high
    )


def _judged(goal: Goal, figure: Figure) -> Judged:
    value, shown = figure.median, f"{short(figure.median)} {figure.unit}"
    if goal.of != "median":
        ratio = figure.ratio or 0.0
        value = 1 / ratio if goal.of == "share" and ratio else ratio
        shown = f"{short(value)} x {figure.beside} ({shown})"
    verdict: Literal["met", "missed", "stated"] = "stated"
    if goal.most is not None or goal.least is not None:
        high = goal.most is None or value <= goal.most
        low = goal.least is None or value >= goal.least
        verdict = "met" if low and high else "missed"
    where = f"{figure.what}: " if figure.question == "tensors" else ""
    return Judged(goal=goal.text, at=where + figure.where, measured=shown, verdict=verdict)
