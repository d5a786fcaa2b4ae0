"""The most memory that a save and a restore take beyond the state, by the kernel's accounting.

All processes of a contestant are added up, its agent or background process too: anonymous and
shared pages, one that two processes map counted once, sampled every 10 ms; the page cache is not in
it. ``resident`` are the kernel's own peaks (VmHWM), which miss nothing and count a shared page in
each process. The limit of a save that returns before it has written is one copy of the state.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from benchmarks.common.figures import Figure, Setting
from benchmarks.common.peers import HANDFAST, STREAMED, open_saver, undone
from benchmarks.common.processes import Sampler
from benchmarks.common.ranks import Rank, on_ranks
from benchmarks.common.state import change, make_state, size

VARIES = ("mib",)
PEERS = ("dcp-thread", "dcp-process", "dcp", "safetensors", "torch", "torchsnapshot", "orbax")
MIB = 1 << 20


class Seen(NamedTuple):
    """What a rank did, on CLOCK_MONOTONIC; ``resident`` is by how much its VmHWM rose, in bytes."""

    ready: float
    saves: list[tuple[float, float]]
    loads: list[tuple[float, float]]
    state: int
    resident: int


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure each contestant in a job of its own, one after the other."""
    for name in (HANDFAST, STREAMED, *(peer for peer in PEERS if peer in setting.peers)):
        sampler = Sampler()
        with sampler.running():
            (seen,) = on_ranks(1, setting.home, partial(_use, name, setting))
        yield from _figures(name, setting, sampler, seen)


def _figures(name: str, setting: Setting, sampler: Sampler, seen: Seen) -> Iterator[Figure]:
    base = sampler.peak(seen.ready - 0.2, seen.ready)
    whole = seen.state / MIB
    saving, loading = (
        tuple((sampler.peak(*span) - base) / MIB for span in spans)
        for spans in (seen.saves, seen.loads)
    )
    figure = Figure(
        question="memory",
        who=name,
        what="save",
        unit="MiB",
        values=saving,
        at={"mib": setting.mib, "small": setting.small, "ranks": 1},
        beside="the state",
        ratios=tuple(value / whole for value in saving),
        undone=undone(name),
    )
    yield figure
    if name == HANDFAST:
        beyond = tuple(value - whole for value in saving)
        yield replace(figure, what="save, beyond one copy", values=beyond, beside="", ratios=())
    yield replace(
        figure, what="load", values=loading, ratios=tuple(value / whole for value in loading)
    )
    resident = ((seen.resident + sampler.resident(seen.ready)) / MIB,)
    yield replace(figure, what="resident", values=resident, ratios=(resident[0] / whole,))


def _use(name: str, setting: Setting, rank: Rank) -> Seen:
    state = make_state(setting.mib, setting.small)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak until now
    before = _peak()
    time.sleep(0.3)  # for samples of what is there without a saver
    ready = time.monotonic()
    saver = open_saver(name, setting.home, state, rank)
    spans: dict[str, list[tuple[float, float]]] = {"save": [], "load": []}
    for _ in range(setting.repeat):
        change(state.values())
        began = time.monotonic()
        saver.save()
        saver.finish()
        spans["save"].append((began, time.monotonic()))
        saver.settle()
    for _ in range(min(2, setting.repeat)):  # memory varies little
        began = time.monotonic()
        saver.load()
        time.sleep(Sampler.PAUSE_S * 3)
        spans["load"].append((began, time.monotonic()))
    peak = _peak()
    saver.close()
    return Seen(ready, spans["save"], spans["load"], size(state.values()), peak - before)


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
