"""Deeds: a model's weights as a user sees them, whole, and models that pairs of ranks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trainers import Desk

from handfast.torch import Checkpointer


def whole(desk: Desk) -> dict[str, Tensor]:
    """Every entry of the model's ``state_dict``, sharded ones put together, by its own name."""
    model = desk.training.model
    model = getattr(model, "module", model)
    return gathered(model)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a module's ``state_dict``; all ranks of its mesh ask for them."""
    found = {}
    for name, value in model.state_dict().items():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = full.detach().clone()
    return found


def of_four(desk: Desk, path: str, how: str) -> dict[str, Tensor]:
    """Save what four ranks hold in pairs; gives the whole tensors of this rank's model by key.

    ``hybrid`` shards it over each pair, which are copies of one another. ``pipeline`` has a stage
    a pair, whose keys both begin at 0; in ``stages`` each has a name of its own.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    torch.manual_seed(1)
    layers = [nn.Linear(8, 8) for _ in range(4)]
    stage = desk.rank // 2
    name = f"stage{stage}" if how == "stages" else "model"
    hybrid = how == "hybrid"
    model = nn.Sequential(*(layers if hybrid else layers[2 * stage : 2 * stage + 2]))
    fully_shard(model, mesh=mesh if hybrid else mesh["inner"])
    desk.checkpointer = Checkpointer(path, {name: model})
    desk.checkpointer.restore()
    desk.checkpointer.save(1).converged(30)
    return {f"{name}/{key}": value for key, value in gathered(model).items()}
