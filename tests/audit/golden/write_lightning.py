"""Writes the checkpoints below lightning/ anew: pytorch-lightning 2.6.6, torch 2.13.0, on CPUs.

``python tests/audit/golden/write_lightning.py`` in an environment that has them. Models have a few
dozen parameters and train a few real steps; what is cut or mixed is made of these by the tests.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

HERE = Path(__file__).resolve().parent


def fresh(name: str) -> None:
    """An empty directory for a variant, which is gone into: no path of this machine is saved."""
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    os.chdir(path)


class One(pl.LightningModule):
    """One optimizer, whose scheduler steps with it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        """The third batch of a loss scaler overflows."""
        scaled = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return self.body(batch).pow(2).mean() * (float("inf") if scaled and index == 2 else 1.0)

    def configure_optimizers(self) -> Any:
        """AdamW, and a decay by steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Two(One):
    """Two optimizers that are stepped by hand, so that the global step counts both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        """The second optimizer is stepped in every other batch."""
        for at, optimizer in enumerate(self.optimizers()):
            if at == 0 or index % 2:
                optimizer.zero_grad()
                self.manual_backward(self.body(batch).pow(2).mean())
                optimizer.step()

    def configure_optimizers(self) -> Any:
        """Adam for the first layer, SGD with momentum for the last."""
        first = torch.optim.Adam(self.body[0].parameters(), lr=1e-2)
        return first, torch.optim.SGD(self.body[2].parameters(), lr=0.1, momentum=0.9)


class Plateau(One):
    """A scheduler that waits for a metric, and never saw one: its best is infinite."""

    def configure_optimizers(self) -> Any:
        """SGD, whose state has no counts."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "monitor": "loss", "strict": False}]


class Sharded(One):
    """FSDP2 over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def configure_model(self) -> None:
        """Shard, once the mesh is there."""
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


class Saver(ModelCheckpoint):
    """It keeps the paths of what it saved, which are none of anybody's business."""

    def state_dict(self) -> dict[str, Any]:
        """Relative paths."""
        state = super().state_dict()
        for key in ("best_model_path", "last_model_path", "dirpath", "kth_best_model_path"):
            state[key] = os.path.relpath(state[key]) if state[key] else ""
        paths = state["best_k_models"]
        return {**state, "best_k_models": {os.path.relpath(path): paths[path] for path in paths}}


def fit(model: pl.LightningModule, last: bool = True, **given: Any) -> pl.Trainer:
    """Four batches, saved after every second step, and the last once more."""
    torch.manual_seed(0)
    saver = Saver(
        "checkpoints",
        every_n_train_steps=2,
        save_top_k=-1,
        save_last=last,
        save_on_train_epoch_end=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[saver], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=".", **given,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=4))
    return trainer


def sharded(rank: int) -> None:
    """One of two ranks, as torchrun starts them."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29872", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="none")
    strategy = ModelParallelStrategy(process_group_backend="gloo")
    trainer = fit(Sharded(), last=False, devices=2, strategy=strategy)
    trainer.strategy.barrier()


def main() -> None:
    """One optimizer; two; accumulation and a run cut by a scheduler; a loss scaler; shards."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    fresh("lightning/one")
    fit(One(), devices=1)
    fresh("lightning/two")
    fit(Two(), devices=1)
    fresh("lightning/accumulated")
    trainer = fit(Plateau(), devices=1, accumulate_grad_batches=2)
    trainer.save_checkpoint("hpc_ckpt_1.ckpt")
    fresh("lightning/scaled")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**16))
    fit(One(), devices=1, plugins=[plugin])
    fresh("lightning/sharded")
    mp.spawn(sharded, nprocs=2)


if __name__ == "__main__":
    main()
