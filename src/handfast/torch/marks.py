"""What a step leaves on the gradients that it has consumed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from handfast.torch.tensors import local

__all__ = ["MARK", "Mark", "gradients", "mark_consumed", "version_of"]

MARK = "_handfast_consumed"
"""The attribute of a gradient that holds its mark."""


class Mark(NamedTuple):
    """What a step leaves on a gradient that it has consumed."""

    version: tuple[int, int]
    lasting: bool  # it was there at an earlier step, or was zeroed since: no zero_grad() drops it


def mark_consumed(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Mark every gradient of an optimizer, as a hook that runs after its step."""
    for _, gradient in gradients(optimizer):
        version, before = version_of(gradient), getattr(gradient, MARK, None)
        if before is None or before.version != version:  # else it is of this very step
            setattr(gradient, MARK, Mark(version, before is not None))


def gradients(optimizer: Optimizer) -> Iterator[tuple[Tensor, Any]]:
    """The parameters that have a gradient, with it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter, parameter.grad


def version_of(gradient: Any) -> tuple[int, int]:
    """What every change of it raises that autograd sees."""
    # FSDP2 accumulates into the local part, zero_grad() works on the whole: each counts for itself.
    return gradient._version, local(gradient)._version
