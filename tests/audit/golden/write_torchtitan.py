"""Writes the checkpoints below torchtitan/ anew: TorchTitan 0.3.0's own manager, torch 2.13.0.

``python tests/audit/golden/write_torchtitan.py`` in an environment that has them, on CPUs with
gloo. Its trainer and its loader need devices and data, so the states of these two are written here,
with the keys that theirs have.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.optimizer import ParamGroupConfig

HERE = Path(__file__).resolve().parent


class State:
    """The trainer's, or the loader's: whatever it is given."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        """As it is now."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was then."""
        self.state.update(state)


def run(rank: int, world: int, folder: str, whole: bool) -> None:
    """Four updates, saved after two and four, the last time its weights alone if not ``whole``."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    if world > 1:
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    group = ParamGroupConfig(
        pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2, "betas": (0.9, 0.95)}
    )
    config = OptimizersContainer.Config(param_groups=[group], implementation="for-loop")
    optimizers = OptimizersContainer(config, model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
        optimizers=optimizers, training_steps=4
    )
    trainer = State(step=0, ntokens_seen=0)
    manager = CheckpointManager(
        CheckpointManager.Config(enable=True, interval=2, last_save_model_only=not whole),
        dataloader=State(**{f"dp_rank_{rank}": b"", "world_size": world}),
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={"train_state": trainer},
        sd_adapter=None,
        base_folder=".",
    )
    for step in range(1, 5):
        optimizers.zero_grad()
        model(torch.randn(4, 3)).pow(2).mean().backward()
        optimizers.step()
        schedulers.step()
        trainer.state |= {"step": step, "ntokens_seen": 12 * step}
        loader = manager.states["dataloader"]
        loader.state[f"dp_rank_{rank}"] = pickle.dumps({"_num_yielded": step})
        manager.save(step, last_step=step == 4)
    manager.close()
    dist.destroy_process_group()


def main() -> None:
    """Two and three ranks with all there is; one that ends with its weights alone; or some."""
    for name, world, whole in (("two", 2, True), ("three", 3, True), ("weights", 1, False)):
        if name not in (sys.argv[1:] or name):
            continue
        path = HERE / "torchtitan" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        os.chdir(path)
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(run, (world, folder, whole), world, start_method="spawn")


if __name__ == "__main__":
    main()
