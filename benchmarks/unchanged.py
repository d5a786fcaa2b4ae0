"""What a save costs when nine tenths of the state stay as they were: frozen weights, adapters.

Each lap saves once with every byte changed, and once with a tenth of them. ``written`` are the
bytes that went to the disk, by the kernel's count over all processes, as a share of the state's;
the limit is a tenth. No peer leaves out what is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from msgspec.structs import replace
from torch import Tensor

from benchmarks.common.contest import Race, contest, timed
from benchmarks.common.figures import Figure, Setting, beside
from benchmarks.common.peers import HANDFAST, open_saver
from benchmarks.common.processes import written
from benchmarks.common.ranks import Rank
from benchmarks.common.state import change, make_state, size

VARIES = ("mib",)
FROZEN = 0.9
ALL, TENTH = "all changed", "a tenth changed"


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it: seconds, and the share of the state that was written."""
    found = {
        what: [figure for figure in figures if figure.what == what]
        for figures in [contest("unchanged", replace(setting, ranks=1), _enter)]
        for what in ("durable", "written")
    }
    yield from beside(found["durable"], ALL, {})
    for figure in found["written"]:
        yield replace(figure, unit="%", values=tuple(100 * value for value in figure.values))


@contextmanager
def _enter(setting: Setting, rank: Rank) -> Iterator[Race]:
    state = make_state(setting.mib, setting.small)
    whole = size(state.values())
    live, room = [], whole * (1 - FROZEN)
    for tensor in state.values():
        taken = min(tensor.numel(), int(room // tensor.element_size()))
        if taken:
            live.append(tensor[:taken])
        room -= taken * tensor.element_size()
    with closing(open_saver(HANDFAST, setting.home, state, rank)) as saver:

        def save() -> None:
            saver.save()
            saver.finish()

        def turn(changed: list[Tensor]) -> Mapping[str, float]:
            change(changed)
            before = written()
            took = timed(save)
            saver.settle()
            return {"durable": took, "written": (written() - before) / whole}

        turns = {ALL: lambda: turn([*state.values()]), TENTH: lambda: turn(live)}
        yield Race(turns, lambda: None)
