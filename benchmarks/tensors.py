"""What each tensor adds to the time that a save keeps the training waiting, after the first save.

Small tensors of one KiB each, in a plain dict, and as a module's parameters with AdamW's moments
and counters. The time of the module's own ``state_dict()``, which no saver can spare, is measured
in the same lap and taken off. The limit: one ``_foreach_copy_`` of the same tensors, each into
memory that was touched. Peer: DCP, whose figure is its whole save, to the same disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from benchmarks.common.contest import Race, Turn, contest, timed
from benchmarks.common.figures import Figure, Setting, beside
from benchmarks.common.peers import HANDFAST, Saver, open_saver, undone
from benchmarks.common.ranks import Rank
from benchmarks.common.state import SMALL, change, make_state
from handfast.torch import Checkpointer

VARIES = ()
PEERS = ("dcp",)
MOST = 10_000
"""Tensors that a peer is still asked for: it takes seconds, and a minute for more."""
LIMIT = "_foreach_copy_"
DICT, MODULE = "of a dict", "of a module and AdamW"


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure each count, in microseconds a tensor."""
    for count in setting.tensors:
        one = replace(setting, small=count, mib=max(1, count >> 10), ranks=1)
        found = [
            replace(
                figure,
                unit="us",
                values=tuple(value / count * 1e6 for value in figure.values),
                at={"tensors": count},
            )
            for figure in contest("tensors", one, _enter)
        ]
        yield from beside(found, LIMIT, {figure.who: undone(figure.who) for figure in found})


@contextmanager
def _enter(setting: Setting, rank: Rank) -> Iterator[Race]:
    plain = make_state(setting.mib, setting.small)
    plain = dict(list(plain.items())[-setting.small :])  # the small ones alone
    copies = [torch.empty_like(tensor).zero_() for tensor in plain.values()]
    model, optimizer = _training(setting.small // 4)
    live = [*model.parameters(), *_moments(optimizer)]
    turns: dict[str, Turn] = {
        LIMIT: lambda: {DICT: timed(lambda: torch._foreach_copy_(copies, [*plain.values()]))},
    }
    with ExitStack() as stack:
        kept = stack.enter_context(closing(open_saver(HANDFAST, setting.home, plain, rank)))
        both = {"model": model, "optimizer": optimizer}
        keeper = Checkpointer(setting.home / "module", both, rng=False)
        keeper.restore()
        stack.callback(keeper.close, 600)
        steps = iter(range(1, 1 << 30))

        def whole() -> Mapping[str, float]:
            own = timed(model.state_dict)
            took = timed(lambda: keeper.save(next(steps)))
            keeper.wait_until_finished(600)
            return {MODULE: max(0.0, took - own), "state_dict() itself": own}

        turns[HANDFAST] = lambda: {**_save(kept), **whole()}
        for name in PEERS:
            if name in setting.peers and setting.small <= MOST:
                saver = stack.enter_context(closing(open_saver(name, setting.home, plain, rank)))
                turns[name] = partial(_save, saver)

        def before() -> None:
            with torch.no_grad():
                change(plain.values())
                change(live)

        yield Race(turns, before)


def _save(saver: Saver) -> Mapping[str, float]:
    took = timed(saver.save)
    saver.finish()
    saver.settle()
    return {DICT: took}


def _training(parameters: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make so many parameters, and an AdamW that has stepped: four tensors each."""
    model = nn.ParameterList(torch.rand(SMALL) for _ in range(max(1, parameters)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.rand(SMALL)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]
