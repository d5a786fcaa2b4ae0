"""A rank's state: 12 large tensors and many small ones, and the same bytes as one flat piece."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["SMALL", "State", "change", "flat", "make_state", "size"]

LARGE = 12
SMALL = 256
"""Elements of a small tensor: one KiB."""

State = dict[str, Tensor]


def make_state(mib: int, small: int, rank: int = 0) -> State:
    """Make ``mib`` MiB of float32 on the CPU, ``small`` of the tensors small.

    Names tell the rank, as they do where each owns a part: what is named alike on all ranks is
    taken for one and the same by some.
    """
    generator = torch.Generator().manual_seed(rank)
    large = max((mib << 18) - small * SMALL, LARGE) // LARGE
    sizes = {f"large{i}": large for i in range(LARGE)} | {f"small{i}": SMALL for i in range(small)}
    return {
        f"rank{rank}.{name}": torch.rand(count, generator=generator)
        for name, count in sizes.items()
    }


def change(tensors: Iterable[Tensor]) -> None:
    """Change every element, as an optimizer's step does: no chunk of the bytes stays the same."""
    torch._foreach_mul_(list(tensors), 1.0001)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of them all."""
    return sum(tensor.nbytes for tensor in tensors)


def flat(state: State) -> mmap.mmap:
    """Give one piece of page-aligned memory, whole pages, full of a state's bytes."""
    pages = -(-size(state.values()) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    at = 0
    whole = torch.frombuffer(memory, dtype=torch.float32)
    for tensor in state.values():
        whole[at : at + tensor.numel()] = tensor
        at += tensor.numel()
    return memory
