"""How long a restore into the live tensors takes, from the page cache and from the disk.

handfast's is a whole round: the ranks meet, freeze, read and verify every byte, agree, and copy.
It is that of a Checkpointer that was just made, as at a start, its agent not yet running; ``again``
is one more of the same Checkpointer, and ``in place`` one that reads each byte once. The limit is a
raw read of as many bytes into touched memory by a few threads, through the page cache or past it,
whichever was faster. Peers verify nothing;
each copies what it read into the live tensors.

Warm means that every file was read just before, cold that every page of them was written out and
dropped (``posix_fadvise``). The live tensors hold zeros before each load, and what a load put
into them is compared with what was saved, bit for bit.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.common.contest import Race, Turn, contest, timed
from benchmarks.common.figures import Figure, Setting, beside
from benchmarks.common.limits import Disk, forget, remember
from benchmarks.common.peers import HANDFAST, Handfast, open_saver
from benchmarks.common.ranks import Rank
from benchmarks.common.state import State, flat, make_state

VARIES = ("mib", "ranks")
PEERS = ("safetensors", "torch", "dcp", "torchsnapshot", "orbax")
RAW, DIRECT = "raw read", "raw read, O_DIRECT"
AGAIN, IN_PLACE = "handfast, again", "handfast, in place"
OURS = (HANDFAST, AGAIN, IN_PLACE)


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it, warm and cold; handfast also beside safetensors."""
    found = contest("restore", setting, _enter)
    told = dict.fromkeys(PEERS, "any verification")
    for what in ("warm", "cold"):
        some = [figure for figure in found if figure.what == what]
        raw = min((f for f in some if f.who in (RAW, DIRECT)), key=lambda figure: figure.median)
        yield from beside(some, raw.who, told)
    some = [figure for figure in found if figure.who in (*OURS, "safetensors")]
    if len({figure.who for figure in some}) == 4:
        pairs = beside(some, "safetensors", told)
        yield from (figure for figure in pairs if figure.who != "safetensors")


@contextmanager
def _enter(setting: Setting, rank: Rank) -> Iterator[Race]:
    state = make_state(setting.mib, setting.small, rank.rank)
    raw = setting.home / "raw"
    raw.mkdir(exist_ok=True)
    memory = flat(state)
    disk = Disk(raw / str(rank.rank), memory)
    disk.write()
    turns: dict[str, Turn] = {
        RAW: partial(_both, partial(timed, disk.read), raw, rank),
        DIRECT: partial(_both, partial(timed, disk.read_direct), raw, rank),
    }
    with ExitStack() as stack:
        for name in (HANDFAST, *(peer for peer in PEERS if peer in setting.peers)):
            saver = stack.enter_context(closing(open_saver(name, setting.home, state, rank)))
            saver.save()
            saver.finish()
            saver.settle()
            load = partial(_load, saver.load, state, memory)
            own = setting.home / name
            if isinstance(saver, Handfast):
                in_place = partial(_load, saver.load_in_place, state, memory)
                turns[name] = partial(_both, load, own, rank, saver.reopen)
                turns[AGAIN] = partial(_both, load, own, rank)
                turns[IN_PLACE] = partial(_both, in_place, own, rank)
            else:
                turns[name] = partial(_both, load, own, rank)
        yield Race(turns, lambda: None)


def _both(
    load: Callable[[], float], files: Path, rank: Rank, ready: Callable[[], object] = tuple
) -> Mapping[str, float]:
    """Load what lies in the page cache, then what does not; ``ready`` is not timed."""
    took = {}
    for what, prepare in (("warm", remember), ("cold", forget)):
        ready()
        if rank.rank == 0:
            prepare(files)
        dist.barrier()
        took[what] = load()
    return took


def _load(load: Callable[[], None], state: State, saved: mmap.mmap) -> float:
    """Time a load over other values. Raises RuntimeError where it did not bring back every bit."""
    for tensor in state.values():
        tensor.zero_()
    took = timed(load)
    whole, at = torch.frombuffer(saved, dtype=torch.float32), 0
    for name, tensor in state.items():
        if not torch.equal(tensor, whole[at : at + tensor.numel()]):
            raise RuntimeError(f"{load} has not brought back {name}")
        at += tensor.numel()
    return took
