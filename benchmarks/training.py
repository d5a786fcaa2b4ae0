"""By how much training slows down while an epoch is being persisted behind it.

A small training on the CPU takes steps with no save under way, then saves, and takes steps until
that is durable; the time of ``save`` itself is the question ``blocking``'s. The state is as large
as elsewhere, so that persisting lasts for many steps. Once torch has a thread less than there are
cores, so that one is free, and once it has them all; where all are busy, somebody must wait, and
how much is what this says. Peers: DCP's asynchronous saves.

*Kept apart* is handfast alone: the training on all cores but the last, which is its agent's
(``HANDFAST_CPUS``), as an operator can have it. That tells what is left once nobody takes turns on
a core: a disk may report all its writes to one core, and the work of those reports is done there,
whoever runs on it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import torch
from msgspec.structs import replace
from torch import nn

from benchmarks.common.contest import Enter, Race, Turn, contest
from benchmarks.common.figures import Figure, Setting
from benchmarks.common.peers import HANDFAST, Saver, open_saver, undone
from benchmarks.common.ranks import Rank
from benchmarks.common.state import change, make_state

VARIES = ("mib",)
PEERS = ("dcp-thread", "dcp-process")
WIDTH, BATCH = 384, 128
FREE, APART = "a core free", "a core free, kept apart"
LEAST = 16
"""Steps of a stretch at least."""
MOST_S = 2.0
"""Seconds of a stretch at most: of a save that takes longer the first so many are judged."""

Step = Callable[[], float]
"""Take one step; gives its seconds."""


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it with a core free, and with none."""
    cores = len(os.sched_getaffinity(0))
    ways: dict[str, tuple[int, Enter]] = {}
    if cores > 1:
        ways = {FREE: (cores - 1, _enter), APART: (cores - 1, _enter_apart)}
    ways["no core free"] = (cores, _enter)
    for how, (threads, enter) in ways.items():
        one = replace(setting, ranks=1)
        found = contest("training", one, enter, threads=threads)
        alone = {f.who: f for f in found if f.what == "alone"}
        for figure in found:
            if figure.what == "saving":
                values = [*zip(figure.values, alone[figure.who].values, strict=True)]
                yield replace(
                    figure,
                    what=how,
                    unit="ms",
                    values=tuple(each * 1e3 for each in figure.values),
                    at=figure.at | {"threads": threads},
                    beside="no save",
                    ratios=tuple(saving / none for saving, none in values),
                    undone=undone(figure.who),
                )


@contextmanager
def _enter_apart(setting: Setting, rank: Rank) -> Iterator[Race]:
    """The same for handfast, which gets the last core for its own."""
    *others, last = sorted(os.sched_getaffinity(0))
    os.environ["HANDFAST_CPUS"] = str(last)  # of this rank's process, which ends with the race
    os.sched_setaffinity(0, others)
    with _enter(replace(setting, peers=()), rank) as race:
        yield race


@contextmanager
def _enter(setting: Setting, rank: Rank) -> Iterator[Race]:
    state = make_state(setting.mib, setting.small)
    step = _training()
    with ExitStack() as stack:
        turns: dict[str, Turn] = {}
        for name in (HANDFAST, *(peer for peer in PEERS if peer in setting.peers)):
            saver = stack.enter_context(closing(open_saver(name, setting.home, state, rank)))
            turns[name] = partial(_stretches, saver, step)
        yield Race(turns, lambda: change(state.values()))


def _stretches(saver: Saver, step: Step) -> Mapping[str, float]:
    """Take steps with no save, during one, and as many with none again; seconds a step."""
    for _ in range(LEAST):
        step()
    before = [step() for _ in range(LEAST)]
    saver.save()
    during: list[float] = [step()]
    while saver.busy() and sum(during) < MOST_S:
        during.append(step())
    saver.finish()
    saver.settle()
    after = [step() for _ in during]
    return {"alone": sum(before + after) / len(before + after), "saving": sum(during) / len(during)}


def _training() -> Step:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.rand(BATCH, WIDTH)

    def step() -> float:
        began = time.perf_counter()
        loss = (model(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - began

    return step
