"""Priming: what a first backward pass changes for good is changed before the restore.

DDP rebuilds its buckets after its first iteration, and so changes the order in which gradients are
reduced. A job that resumes runs that first iteration again, in the other order: with four gloo
ranks its first step differed in the last bits though every byte of state was right. One throwaway
forward and backward before the restore makes the resumed job's order that of the job it continues:
on every start, the first too, or else the very first step of all is the one that differs. With a
static graph DDP rebuilds them one iteration later, so that there it takes two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch.optim import Optimizer

from handfast.torch.alike import ddp_modules
from handfast.torch.capture import capture
from handfast.torch.rng import read_generator, read_streams, write_generator, write_streams
from handfast.torch.tensors import copy_into, local
from handfast.torch.tree import Kind, nodes

__all__ = ["prime"]

FN: Final = "give one forward and backward, such as lambda: loss_fn(model(batch)).backward()"


def prime(state: Mapping[str, object], fn: Callable[[], object]) -> None:
    """Run ``fn``, one forward and backward, and take back all that it did to the state.

    It is run twice where a DDP module of the state has ``static_graph=True``. Parameters, buffers
    (also those that are not saved), the random streams and generators are put back, gradients are
    dropped; ``fn`` must step no optimizer, scheduler or loader, and what it does to other
    attributes of modules, or outside of them, stays. After that it raises whatever ``fn`` raises,
    and ValueError where ``fn`` gave a fresh optimizer state (it is emptied again), or left no
    parameter of the state's modules a gradient.
    """
    found = nodes(state)
    modules = [node.value for node in found if node.kind is Kind.MODULE]
    weights = [p for module in modules for p in module.parameters()]
    static = any(ddp.static_graph for module in modules for _, ddp in ddp_modules(module))
    fresh = [n.value for n in found if isinstance(n.value, Optimizer) and not n.value.state]
    stepped, reached = [], True
    streams = read_streams()
    generators = [node.value for node in found if node.kind is Kind.GENERATOR]
    drawn = [read_generator(generator) for generator in generators]
    parts = [part for module in modules for part in module.modules()]
    buffers = [(part, *named) for part in parts for named in part.named_buffers(recurse=False)]
    held = list(capture(state, rng=False).tensors)
    with torch.no_grad():
        held += [local(buffer) for _, _, buffer in buffers]
        before = [tensor.clone() for tensor in held]
    try:
        for _ in range(2 if static else 1):
            fn()
        reached = any(p.grad is not None for p in weights)
    finally:
        copy_into(held, before)
        for part, name, buffer in buffers:
            setattr(part, name, buffer)  # fn may have put another one in its place
        for optimizer in fresh:
            if optimizer.state:
                stepped.append(type(optimizer).__name__)
                optimizer.state.clear()
        for node in found:
            if node.kind is Kind.MODULE or isinstance(node.value, Optimizer):
                node.value.zero_grad(set_to_none=True)
        for generator, mark in zip(generators, drawn, strict=True):
            write_generator(generator, mark)
        write_streams(streams)
    if stepped:
        raise ValueError(f"prime(fn): fn stepped an optimizer ({', '.join(stepped)}): {FN}")
    if not reached and any(p.requires_grad for p in weights):
        raise ValueError(
            f"prime(fn): no parameter of the state has a gradient after fn: {FN}. Leave out "
            "zero_grad(): gradients are dropped anyway"
        )
