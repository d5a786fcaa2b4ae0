"""What an optimizer steps, and whose state and groups it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from handfast.torch.tensors import local

__all__ = ["begun", "inner", "is_no_update", "parameters", "shares", "trained", "weights"]


def weights(part: nn.Module) -> Iterator[Any]:
    """The parameters of a module, some of them again where they are tied: what
    ``Module.parameters`` gives, without their names, which take it as long again.
    """
    for module in part.modules():
        yield from filter(_there, module._parameters.values())


def _there(parameter: object) -> bool:
    return parameter is not None


def parameters(part: object) -> Iterator[Any]:
    """The parameters of a module or an optimizer; nothing for any other."""
    if isinstance(part, nn.Module):
        yield from weights(part)
    elif isinstance(part, Optimizer):
        for group in getattr(part, "param_groups", ()):  # a wrapper's may come later
            yield from group["params"]


def trained(optimizer: Optimizer) -> list[object]:
    """Those of an optimizer that are not frozen."""
    return [p for p in parameters(optimizer) if getattr(p, "requires_grad", False)]


def begun(optimizer: Optimizer) -> list[torch.Tensor]:
    """The parameters that it has moments of; not those of no step, as Adagrad makes them."""
    state: Mapping[Any, Any] = optimizer.state
    return [p for p, held in state.items() if isinstance(p, torch.Tensor) and _any_step(held)]


def _any_step(held: Any) -> bool:
    count = held.get("step", 1) if isinstance(held, Mapping) else 1
    return not isinstance(count, int | float | torch.Tensor) or bool(torch.as_tensor(count).any())


def is_no_update(optimizer: Optimizer) -> bool:
    """Whether a step is at rate 0, with gradients of zero, by one that has no state. So torch makes
    it one (``_init_optim_state`` in ``torch/distributed/checkpoint/state_dict.py``, 2.13).
    """
    groups = optimizer.param_groups
    if optimizer.state or any(group.get("lr", 1) != 0 for group in groups):
        return False
    given = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    return not any(part.layout != torch.strided or bool(part.any()) for part in given)


def inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Those that an optimizer has as attributes, or in boxes there: it steps these, as
    ``ZeroRedundancyOptimizer.optim`` is stepped, and they are asked by themselves.
    """
    for value in vars(optimizer).values():
        for one in value.values() if isinstance(value, dict) else _items(value):
            if isinstance(one, Optimizer) and one is not optimizer:
                yield one


def _items(value: object) -> Iterable[object]:
    return value if isinstance(value, list | tuple) else (value,)


def shares(one: Optimizer, other: Optimizer) -> bool:
    """Whether two have the very same state, or the very same groups, as a wrapper has."""
    return any(
        getattr(one, name, None) is getattr(other, name) for name in ("state", "param_groups")
    )
