"""What all ranks of the job probably hold alike, as far as one rank can see it.

DDP keeps its parameters alike, and buffers that it broadcasts. Optimizer state is alike if every
rank steps every parameter in the same way: what one rank can see of that is in :func:`steps_alike`.
Nothing rests on this but who stores what: what a rank leaves to another is compared, by digest, in
every save, before it counts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.torch.names import clean

__all__ = [
    "STATE_KEYS",
    "Replica",
    "ddp_ids",
    "ddp_modules",
    "find_replicas",
    "parts_of",
    "steps_alike",
]

STATE_KEYS = frozenset(
    (
        *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "step_size", "eta", "mu"),
        *("mu_product", "ax", "row_var", "col_var", "variance"),
        *("d", "prev_flat_grad", "H_diag", "t"),
    )
)
"""State that torch's own optimizers keep.

Under other keys there may be what is a rank's own, such as the error that compressed gradients
leave behind.
"""


@dataclass(frozen=True, slots=True)
class Replica:
    """A DDP module, with the ids of the tensors that it can keep alike on all ranks of the job."""

    name: str
    module: Any
    parameters: frozenset[int]
    buffers: frozenset[int]
    held: tuple[Tensor, ...] = field(compare=False)  # the parameters themselves

    def alike(self, grads: bool) -> tuple[bool, bool]:
        """Whether all ranks hold the parameters alike now, and so the buffers.

        A communication hook may reduce over a part of the job, or not at all (torch's own local
        SGD does), and under ``no_sync()`` each rank goes its own way. Rank 0's buffers win at the
        next forward pass, unless the last one was without gradients or in an accumulation.
        """
        apart = getattr(self.module, "_comm_hooks", ())
        if apart or not (grads or self.module.require_backward_grad_sync):
            return False, False
        return True, not grads and not self.unsynced

    @property
    def unsynced(self) -> bool:
        """Whether the next forward pass does not broadcast the buffers."""
        return not self.module.require_forward_param_sync


def ddp_modules(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every DDP module in a module, with its name there."""
    for name, module in root.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            yield clean(root, name), module


def parts_of(root: nn.Module) -> list[nn.Module]:
    """A module and all in it, those that stand there twice twice: a third of what ``modules()``
    takes, for saves.
    """
    found: list[nn.Module] = [root]
    for module in found:  # it grows on the way
        if module._modules:
            found += [part for part in module._modules.values() if part is not None]
    return found


def ddp_ids(root: nn.Module) -> list[int]:
    """Which DDP modules there are now: one that is wrapped anew changes neither names nor tensors.

    Without a process group there is no job to be alike over, and nobody has to look.
    """
    if not _grouped():
        return []
    wrapper = nn.parallel.DistributedDataParallel
    return [id(part) for part in parts_of(root) if isinstance(part, wrapper)]


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def find_replicas(root: nn.Module) -> list[Replica]:
    """What DDP keeps alike over all of the job: parameters, and buffers if it broadcasts them."""
    if not _grouped():
        return []
    found = []
    for name, ddp in ddp_modules(root):
        everywhere = ddp.process_group.size() == torch.distributed.get_world_size()
        sides = (
            ddp.module.named_parameters(remove_duplicate=False) if everywhere else (),
            ddp.module.named_buffers(remove_duplicate=False)
            if everywhere and ddp.broadcast_buffers
            else (),
        )
        ignored = set(ddp.parameters_to_ignore)
        held, buffers = (tuple(t for key, t in side if key not in ignored) for side in sides)
        found.append(Replica(name, ddp, _ids(held), _ids(buffers), held))
    return found


def _ids(tensors: Iterable[Tensor]) -> frozenset[int]:
    return frozenset(map(id, tensors))


def steps_alike(replicas: Sequence[Replica], optimizers: Sequence[Optimizer]) -> bool:
    """Whether the state of DDP's parameters is alike on all ranks, for all that can be seen here.

    Optimizers that share their work out over the ranks (ZeRO, Muon's reference) keep the state of
    a parameter on one of them, and torch's own can be used so. Therefore it is so only if torch's
    own optimizers in the state, without a hook or a ``step`` of somebody else, together step every
    parameter of every DDP module that requires a gradient, and if all of these have state by now,
    or none has: one that no batch has used yet looks like one that is another rank's to step.
    """
    own = filter(_is_torchs_own, optimizers)
    groups = (group["params"] for optimizer in own for group in optimizer.param_groups)
    if not _trained(replicas) <= _ids(chain.from_iterable(groups)):
        return False
    lasting: set[int] = set()
    begun: set[int] = set()
    for optimizer in filter(_is_torchs_own, optimizers):
        begun.update(map(id, optimizer.state))
        for group in optimizer.param_groups:
            if type(optimizer) is not torch.optim.SGD or group["momentum"] != 0:
                lasting.update(map(id, group["params"]))  # SGD without momentum has no state at all
    expected = _trained(replicas) & lasting
    return expected <= begun or expected.isdisjoint(begun)


def _trained(replicas: Iterable[Replica]) -> set[int]:
    return {id(p) for replica in replicas for p in replica.held if p.requires_grad}


def _is_torchs_own(optimizer: Optimizer) -> bool:
    """Whether it is of torch's own classes, and nobody has changed what its step does."""
    kind = type(optimizer)
    if (
        not kind.__module__.startswith("torch.optim.")
        or vars(torch.optim).get(kind.__name__) is not kind
    ):
        return False
    step: Any = optimizer.step
    if hasattr(step, "_wrapped_by_lr_sched"):  # a scheduler counts the steps
        step = step.__wrapped__
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return not hooked and getattr(step, "__func__", step) is kind.step
