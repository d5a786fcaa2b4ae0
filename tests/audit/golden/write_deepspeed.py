"""Writes the golden checkpoints of DeepSpeed, each by the library itself, on CPUs and gloo.

    python tests/audit/golden/write_deepspeed.py [VARIANT ...]

Written with DeepSpeed 0.19.8 and torch 2.13.0 (install torch first, then ``pip install deepspeed``
with the constraint that torch stays as it is; no compiler is needed). Every variant trains a model
of a few hundred parameters for real, with gradient accumulation, and saves two steps. What it
refuses to overwrite is golden; the programs that DeepSpeed puts beside each run
(``zero_to_fp32.py`` and the like) are taken away again.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import deepspeed.checkpoint.ds_to_universal as universal
import torch
import torch.multiprocessing as processes
from torch import distributed, nn

HERE = Path(__file__).parent / "deepspeed"
FEATURES = 7
BATCH = 4


class Variant(NamedTuple):
    """What differs between the golden runs. ``steps`` are saved; ``tensor`` ranks share a model."""

    stage: int
    precision: str
    world: int
    tensor: int = 1
    optimizer: str = "adamw"
    accumulate: int = 1
    scheduler: bool = True
    steps: tuple[int, ...] = (2, 4)
    scale_power: int = 8
    persist: int = 10
    frozen: bool = False


VARIANTS = {
    "zero0-fp32-dp2": Variant(0, "fp32", 2, scheduler=False, steps=(4,)),
    "zero0-bf16-dp2": Variant(0, "bf16", 2, steps=(3,)),
    "zero1-bf16-dp2": Variant(1, "bf16", 2, accumulate=2),
    "zero1-bf16-dp2-mp2": Variant(1, "bf16", 4, tensor=2, steps=(3,)),
    "zero2-fp16-dp3": Variant(2, "fp16", 3, scale_power=20, steps=(6, 10)),
    "zero2-fp32-dp2": Variant(
        2, "fp32", 2, optimizer="sgd", scheduler=False, frozen=True, steps=(4,)
    ),
    "zero3-bf16-dp2": Variant(3, "bf16", 2, steps=(2, 3)),
    "zero3-fp32-dp3": Variant(3, "fp32", 3, persist=0, scheduler=False, frozen=True, steps=(4,)),
}
UNIVERSAL = ("zero1-bf16-dp2", "zero3-bf16-dp2", "zero1-bf16-dp2-mp2")
"""Those whose last step is converted, too."""


class Block(nn.Module):
    """Odd sizes, so that partitions are padded and parameters cross from rank to rank."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, FEATURES)
        self.norm = nn.LayerNorm(FEATURES)
        self.inner = nn.Linear(FEATURES, 13)
        self.outer = nn.Linear(13, 3)
        self.register_buffer("seen", torch.zeros(3))
        if frozen:
            self.embedding.weight.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of a batch of tokens."""
        with torch.no_grad():
            self.seen += 1
        hidden = torch.tanh(self.inner(self.norm(self.embedding(tokens))))
        return self.outer(hidden).float().pow(2).mean()


class Grid:
    """Tensor-parallel ranks side by side: what DeepSpeed asks of a model-parallel unit."""

    def __init__(self, tensor: int) -> None:
        rank, world = distributed.get_rank(), distributed.get_world_size()
        self.size, self.model, self.data = tensor, rank % tensor, rank // tensor
        self.replicas = world // tensor
        for first in range(0, world, tensor):
            ranks = list(range(first, first + tensor))
            group = distributed.new_group(ranks)
            if rank in ranks:
                self.model_group = group
        for first in range(tensor):
            ranks = list(range(first, world, tensor))
            group = distributed.new_group(ranks)
            if rank in ranks:
                self.data_group = group

    def get_model_parallel_rank(self) -> int:
        """Which share of the model this rank has."""
        return self.model

    def get_model_parallel_world_size(self) -> int:
        """How many share a model."""
        return self.size

    def get_model_parallel_group(self) -> Any:
        """Those that share this model."""
        return self.model_group

    def get_data_parallel_rank(self) -> int:
        """Which copy of the model this rank is in."""
        return self.data

    def get_data_parallel_world_size(self) -> int:
        """How many copies there are."""
        return self.replicas

    def get_data_parallel_group(self) -> Any:
        """Those that have the same share."""
        return self.data_group


def settings(variant: Variant) -> dict[str, Any]:
    """DeepSpeed's configuration of a variant."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": variant.accumulate,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000,
        "zero_optimization": {"stage": variant.stage},
    }
    if variant.stage == 3:
        made["zero_optimization"]["stage3_param_persistence_threshold"] = variant.persist
    if variant.precision == "bf16":
        made["bf16"] = {"enabled": True}
    if variant.precision == "fp16":
        made["fp16"] = {
            "enabled": True,
            "initial_scale_power": variant.scale_power,
            "loss_scale_window": 100,
            "hysteresis": 1,
        }
    if variant.scheduler:
        made["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 3},
        }
    return made


def train(rank: int, name: str, folder: str, meeting: str) -> None:
    """One rank's training."""
    variant = VARIANTS[name]
    logging.disable(logging.WARNING)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(variant.world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=variant.world
    )
    grid = Grid(variant.tensor) if variant.tensor > 1 else None
    torch.manual_seed(variant.stage)
    model = Block(variant.frozen)
    if grid is not None and grid.model:  # all but what is replicated is this rank's own share
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if not key.startswith("norm"):
                    parameter.add_(0.01)
    if grid is not None:
        for parameter in model.norm.parameters():
            parameter.register_hook(partial(share, grid=grid))
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if variant.optimizer == "sgd":
        optimizer = torch.optim.SGD(wanted, lr=0.01, momentum=0.9)
    else:
        groups = [
            {"params": [p for p in wanted if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in wanted if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings(variant), mpu=grid
    )
    if grid is not None:
        engine.module.universal_checkpoint_info = {
            "universal_checkpoint_version": 0.2,
            "tp_replicated_parameter_patterns": ["norm\\..*"],
        }
    torch.manual_seed(100 + (grid.data if grid is not None else rank))
    for _ in range(max(variant.steps)):
        for _ in range(variant.accumulate):
            loss = engine(torch.randint(0, 11, (BATCH, 5)))
            engine.backward(loss)
            engine.step()
        if engine.global_steps in variant.steps:
            engine.save_checkpoint(folder, client_state={"epoch": 1})
    distributed.barrier()
    distributed.destroy_process_group()


def share(gradient: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Give what is replicated the same gradient on all tensor-parallel ranks, as Megatron does."""
    mean = gradient.float()
    distributed.all_reduce(mean, group=grid.get_model_parallel_group())
    return (mean / grid.size).to(gradient.dtype)


def convert(folder: Path, step: int) -> None:
    """Make a universal checkpoint of a step, as ``ds_to_universal`` does."""
    sys.argv = [
        "ds_to_universal", "--input_folder", str(folder / f"global_step{step}"),
        "--output_folder", str(folder / f"global_step{step}_universal"),
        "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state",
    ]  # fmt: skip
    universal.main(universal.parse_arguments())


def main() -> None:
    """Write what is asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    for name in parser.parse_args().variants:
        folder = HERE / name
        if folder.exists():
            raise SystemExit(f"{folder} is there already, and golden: remove it first")
        with tempfile.TemporaryDirectory() as place:
            processes.spawn(
                train,
                (name, str(Path(place) / "run"), str(Path(place) / "meeting")),
                nprocs=VARIANTS[name].world,
            )
            run = Path(place) / "run"
            if name in UNIVERSAL:
                convert(run, max(VARIANTS[name].steps))
            for program in run.glob("*.py"):
                program.unlink()
            shutil.copytree(run, folder)


if __name__ == "__main__":
    main()
