"""How fast a state becomes durable: bytes a second from the call of save to the last sync.

The limit: as many bytes from touched, page-aligned memory written by a few threads with O_DIRECT
into a file laid out beforehand, fsync of the file and of its directory. handfast hashes, reads a
sample back and votes within its figure. Peers: as durable as they make it, files synced where that
can be done from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

from msgspec.structs import replace

from benchmarks.common.contest import Race, Turn, contest, timed
from benchmarks.common.figures import Figure, Setting, beside
from benchmarks.common.limits import Disk
from benchmarks.common.peers import HANDFAST, Saver, open_saver, undone
from benchmarks.common.ranks import Rank
from benchmarks.common.state import change, flat, make_state

VARIES = ("mib", "ranks")
PEERS = ("safetensors", "torch", "dcp", "torchsnapshot", "orbax")
LIMIT = "raw write"


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it, and give rates."""
    found = [
        replace(figure, unit="GiB/s", values=tuple(setting.gib / s for s in figure.values))
        for figure in contest("durable", setting, _enter)
    ]
    yield from beside(found, LIMIT, {figure.who: undone(figure.who) for figure in found})


@contextmanager
def _enter(setting: Setting, rank: Rank) -> Iterator[Race]:
    state = make_state(setting.mib, setting.small, rank.rank)
    disk = Disk(setting.home / f"raw{rank.rank}", flat(state))
    with ExitStack() as stack:
        turns: dict[str, Turn] = {LIMIT: lambda: {"durable": timed(disk.write)}}
        for name in (HANDFAST, *(peer for peer in PEERS if peer in setting.peers)):
            saver = stack.enter_context(closing(open_saver(name, setting.home, state, rank)))
            turns[name] = partial(_save, saver)
        yield Race(turns, lambda: change(state.values()))


def _save(saver: Saver) -> Mapping[str, float]:
    def all_of_it() -> None:
        saver.save()
        saver.finish()

    took = timed(all_of_it)
    saver.settle()
    return {"durable": took}
