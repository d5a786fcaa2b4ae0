"""Writes the checkpoints below torch/, dcp/ and fsdp/ anew: torch 2.13.0 alone, on CPUs with gloo.

``python tests/audit/golden/write_torch.py [VARIANT ...]``, in an environment that has torch. Models
have a few hundred parameters and train a few real steps, so that moments and counts are real. What
is mixed or cut is made of these by the tests; only dcp/overwritten/ is a fault by itself, since it
took four processes and a kill to make it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)

HERE = Path(__file__).resolve().parent


class Net(nn.Module):
    """Weights, a buffer that counts, and a mask of -inf."""

    def __init__(self, width: int = 8, *, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.last = nn.Linear(width, 2)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two numbers a row."""
        return self.last(torch.relu(self.norm(self.first(x))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rank: int = 0) -> None:
    """Some updates on noise."""
    noise = torch.Generator().manual_seed(rank)
    weight = next(model.parameters())
    for _ in range(steps):
        rows = torch.randn(16, weight.shape[-1], generator=noise).to(weight.dtype)
        loss = model(rows).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fresh(name: str) -> Path:
    """An empty directory for a variant, which is gone into: no path of this machine is saved."""
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    os.chdir(path)
    return path


# Files of torch.save


def bare() -> None:
    """Bare state dicts, as weights are published: now, and in the format before torch 1.6."""
    fresh("torch/bare")
    torch.manual_seed(0)
    model = Net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    torch.save(model.state_dict(), "weights.pt")
    torch.save(model.state_dict(), "old.pth", _use_new_zipfile_serialization=False)


def everything() -> None:
    """A training's whole state, with a loss scaler that skips its third update."""
    fresh("torch/everything")
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for step in range(1, 5):
        loss = model(torch.randn(16, 4)).pow(2).mean() * (float("inf") if step == 3 else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step % 2 == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict(),
                "step": step,
                "epoch": 0,
                "rng": torch.get_rng_state(),
            }
            torch.save(state, f"ckpt_step_{step}.pt")


def traps() -> None:
    """What looks wrong and is not.

    A parameter that got gradients later, betas that a schedule changes, zeros in a LoRA's B, two
    optimizers with counts of their own, and factored moments.
    """
    fresh("torch/traps")
    torch.manual_seed(2)
    model = Net()
    model.lora_b = nn.Parameter(torch.zeros(16, 16))
    model.last.requires_grad_(requires_grad=False)
    trained = [weight for weight in model.parameters() if weight is not model.lora_b]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    other = torch.optim.Adafactor([model.lora_b])
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for step in range(6):
        model.last.requires_grad_(requires_grad=step > 2)
        optimizer.zero_grad()
        train(model, optimizer, 1)
        cycle.step()
        if step % 3 == 0:
            model.lora_b.grad = torch.zeros(16, 16)
            other.step()
    torch.save(
        {
            "generator": model.state_dict(),
            "optimizers": [optimizer.state_dict(), other.state_dict()],
            "scheduler": cycle.state_dict(),
            "iteration": 6,
        },
        "last.pt",
    )


def module() -> None:
    """A pickled module with its optimizer, in bfloat16: what torch.load would run is not run."""
    fresh("torch/module")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, 3)
    torch.save({"module": model, "optimizer": optimizer}, "whole.pt")


def ranks() -> None:
    """A file a rank and step, of a model that each has a slice of."""
    fresh("torch/ranks")
    for rank in range(4):
        torch.manual_seed(rank)
        model = Net(4, norm=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in (2, 4):
            train(model, optimizer, 2, rank)
            os.makedirs(f"step_{step}", exist_ok=True)
            state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
            state |= {"step": step, "world_size": 4}
            torch.save(state, f"step_{step}/model_rank{rank}.pth")


# Distributed checkpoints


def spawn(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run a function in some processes of one group; those that are killed are no failure."""
    with tempfile.TemporaryDirectory() as folder:
        started = mp.start_processes(
            _enter, (world, folder, work, arguments), world, join=False, start_method="spawn"
        )
        for process in started.processes:
            process.join()
            if process.exitcode not in (0, -signal.SIGKILL):
                raise SystemExit(f"{work.__name__}: a rank ended with {process.exitcode}")


def _enter(
    rank: int, world: int, folder: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(7)
    work(rank, world, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "step": step,
    }


def replicated(rank: int, world: int) -> None:
    """Plain tensors that all ranks have: each is written by one of them, after four updates."""
    model = Net(6, norm=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(4):
        train(model, optimizer, 1)
        scheduler.step()
    state = _state(model, optimizer, 4) | {"scheduler": scheduler.state_dict()}
    dcp.save(state, checkpoint_id="step-4")


def sharded(rank: int, world: int) -> None:
    """FSDP2 over three ranks, of which the last two have the counts of two parameters each."""
    bare = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    model = nn.Sequential(*bare, nn.Linear(3, 3))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99))
    for step in (2, 4):
        train(model, optimizer, 2, rank)
        dcp.save(_state(model, optimizer, step), checkpoint_id=f"checkpoint_{step}")


def fsdp1(rank: int, world: int) -> None:
    """FSDP1's sharded state dicts, one file a tensor; and the same by torch.save."""
    model = FullyShardedDataParallel(Net(8, norm=False), device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 3, rank)
    sharded = StateDictType.SHARDED_STATE_DICT
    configs = ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    with FullyShardedDataParallel.state_dict_type(model, sharded, *configs):
        state = {"model": model.state_dict()}
        state["optimizer"] = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    writer = dcp.FileSystemWriter("3", single_file_per_rank=False)
    dcp.save(state, storage_writer=writer)
    os.makedirs("saved", exist_ok=True)
    torch.save(state, f"saved/rank{rank}.pt")


def separate(rank: int, world: int) -> None:
    """Each rank for itself: its own metadata, no coordinator."""
    torch.manual_seed(rank)
    model = nn.Linear(4, 8, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2, rank)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}
    dcp.save(state, checkpoint_id="epoch_1", use_collectives=False)


def alone() -> None:
    """One process, several files, saved in the background, some of it in bfloat16."""
    fresh("dcp/alone")
    torch.manual_seed(5)
    model = Net(norm=False).to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    store = dist.FileStore(tempfile.mkstemp()[1], 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    train(model, optimizer, 5)
    writer = dcp.FileSystemWriter("weights", thread_count=2)
    dcp.async_save({"model": model, "step": torch.tensor(5)}, storage_writer=writer).result()
    dist.destroy_process_group()


def overwritten(rank: int, world: int) -> None:
    """Step 200 saved over step 100; all ranks but the first are killed before they write.

    Of three rows over four ranks: the last has none.
    """
    model = nn.Linear(4, 3)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    train(model, optimizer, 100, rank)
    dcp.save(_state(model, optimizer, 100), checkpoint_id="last")
    train(model, optimizer, 100, rank)

    class Killed(dcp.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if rank:
                os.kill(os.getpid(), signal.SIGKILL)
            super().write_data(plan, planner)
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save(_state(model, optimizer, 200), storage_writer=Killed("last"))


# Full state dicts


def full(rank: int, world: int, sharded: bool) -> None:
    """A whole state dict that the first rank writes, its optimizer's state by names."""
    torch.manual_seed(9)
    model: nn.Module = Net(norm=False)
    if sharded:
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    kind = torch.optim.AdamW if sharded else torch.optim.NAdam
    optimizer = kind(model.parameters(), lr=1e-2)
    for step in (3, 6):
        train(model, optimizer, 3, rank)
        if sharded:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = {
                "model": get_model_state_dict(model, options=whole),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=whole),
            }
        else:
            with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
                state = {"model": model.state_dict()}
                state["optimizer"] = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        if rank == 0:
            torch.save(state | {"step": step}, f"checkpoint-{step}.pt")


def main() -> None:
    """Write all of it, or what the arguments name."""
    chosen = sys.argv[1:]
    for write in (bare, everything, traps, module, ranks, alone):
        if not chosen or write.__name__ in chosen:
            write()
    for name, work, world, *arguments in (
        ("dcp/replicated", replicated, 3),
        ("dcp/fsdp2", sharded, 3),
        ("dcp/fsdp1", fsdp1, 2),
        ("dcp/separate", separate, 2),
        ("dcp/overwritten", overwritten, 4),
        ("fsdp/one", full, 2, False),
        ("fsdp/two", full, 2, True),
        ("fsdp/three", full, 3, True),
    ):
        if not chosen or name in chosen:
            fresh(name)
            spawn(work, world, *arguments)


if __name__ == "__main__":
    main()
