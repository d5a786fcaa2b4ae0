"""Contestants in turn, lap by lap, so that a drift of the machine meets all of them.

Before each turn every dirty page of the machine is written out, so that nobody pays for another's,
all ranks meet, and the state is changed. The first lap warms up and does not count. A job is as
fast as its slowest rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch.distributed as dist
from msgspec.structs import replace

from benchmarks.common.figures import Figure, Setting
from benchmarks.common.processes import scratch
from benchmarks.common.ranks import Rank, on_ranks

__all__ = ["Race", "Turn", "contest", "timed"]

Turn = Callable[[], Mapping[str, float]]
"""What a contestant does in one lap; gives its figures by name, in seconds say."""


class Race(NamedTuple):
    """Contestants by name, and what is done before each turn."""

    turns: Mapping[str, Turn]
    before: Callable[[], None]


Enter = Callable[[Setting, Rank], AbstractContextManager[Race]]


def timed(work: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def contest(question: str, setting: Setting, enter: Enter, *, threads: int = 0) -> list[Figure]:
    """Hold a race on the ranks of a setting; gives the slowest rank's seconds of each lap."""
    with scratch(setting.home) as home:
        deed = partial(_race, enter, replace(setting, home=home))
        found = on_ranks(setting.ranks, home, deed, threads=threads)
    return [
        Figure(
            question=question,
            who=who,
            what=what,
            unit="s",
            values=tuple(map(max, zip(*(each[who, what] for each in found), strict=True))),
            at={"mib": setting.mib, "small": setting.small, "ranks": setting.ranks},
        )
        for who, what in found[0]
    ]


def _race(enter: Enter, setting: Setting, rank: Rank) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    with enter(setting, rank) as race:
        for who, what, value in _laps(race, setting.repeat):
            found.setdefault((who, what), []).append(value)
    return found


def _laps(race: Race, repeat: int) -> Iterator[tuple[str, str, float]]:
    for number in range(repeat + 1):
        for who, turn in race.turns.items():
            race.before()
            os.sync()
            dist.barrier()
            for what, value in turn().items():
                if number:
                    yield who, what, value
