"""How long a save keeps the training waiting, second save onwards.

The limit: one warm memcpy of as many bytes, one flat piece into another, both touched before, and
the one changed just now, as the state is. No save that returns with the state copied can be faster.
Peers: DCP's asynchronous saves, which copy as handfast does, and two that write all of it before
they return, not even synced. (What DCP's own save takes, all of which blocks, is in the question
``durable``.) With ``images=0`` handfast needs no memory for a second state, and blocks until the
epoch is persisted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import torch

from benchmarks.common.contest import Race, Turn, contest, timed
from benchmarks.common.figures import Figure, Setting, beside
from benchmarks.common.peers import HANDFAST, STREAMED, Saver, open_saver, undone
from benchmarks.common.ranks import Rank
from benchmarks.common.state import change, flat, make_state

VARIES = ("mib", "ranks")
PEERS = ("dcp-thread", "dcp-process", "torch", "safetensors")


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it."""
    found = contest("blocking", setting, _enter)
    told = {figure.who: undone(figure.who) for figure in found}
    late = {peer: f"fsync, {told[peer]}" for peer in ("torch", "safetensors") if peer in told}
    yield from beside(found, "memcpy", told | late)


@contextmanager
def _enter(setting: Setting, rank: Rank) -> Iterator[Race]:
    state = make_state(setting.mib, setting.small, rank.rank)
    source, target = (torch.frombuffer(flat(state), dtype=torch.float32) for _ in range(2))

    def memcpy() -> Mapping[str, float]:
        change([source])  # as the state is that the others copy
        return {"blocked": timed(lambda: target.copy_(source))}

    with ExitStack() as stack:
        turns: dict[str, Turn] = {"memcpy": memcpy}
        for name in (HANDFAST, STREAMED, *(peer for peer in PEERS if peer in setting.peers)):
            saver = stack.enter_context(closing(open_saver(name, setting.home, state, rank)))
            turns[name] = partial(_save, saver)
        yield Race(turns, lambda: change(state.values()))


def _save(saver: Saver) -> Mapping[str, float]:
    blocked = timed(saver.save)
    saver.finish()
    saver.settle()
    return {"blocked": blocked}
