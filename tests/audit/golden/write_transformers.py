"""Writes the checkpoints below trainer/, accelerate/ and safetensors/ anew, on CPUs with gloo.

transformers 5.23.0, accelerate 1.15.0, safetensors 0.8.0, torch 2.13.0:
``python tests/audit/golden/write_transformers.py`` in an environment that has them. A Llama of two
thousand parameters trains a few real steps; what is cut or mixed is made of these by the tests.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

HERE = Path(__file__).resolve().parent


def fresh(name: str) -> None:
    """An empty directory for a variant, which is gone into: no path of this machine is saved."""
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    os.chdir(path)


def llama(width: int = 8) -> LlamaForCausalLM:
    """A model with an embedding of its own for its head."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A few rows of tokens."""

    def __len__(self) -> int:
        """Sixteen."""
        return 16

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        """One row, as its own label."""
        row = torch.arange(at, at + 4) % 16
        return {"input_ids": row, "labels": row}


def spawn(work: Callable[..., None], world: int) -> None:
    """Run a function in some processes, as torchrun starts them."""
    with tempfile.TemporaryDirectory() as folder:
        del folder
        mp.start_processes(_enter, (world, work), world, start_method="spawn")


def _enter(rank: int, world: int, work: Callable[..., None]) -> None:
    warnings.simplefilter("ignore")
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29871", "LOCAL_WORLD_SIZE": str(world)}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    work()


# Trainer


def trainer(every: int = 2, **given: Any) -> None:
    """Four updates, saved after some."""
    arguments = TrainingArguments(
        output_dir="out", max_steps=4, save_steps=every, per_device_train_batch_size=2,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, seed=3,
        dataloader_pin_memory=False,
        **given,
    )  # fmt: skip
    Trainer(model=llama(), args=arguments, train_dataset=Rows()).train()


def accumulated() -> None:
    """Two ranks, each update of two batches."""
    trainer(4, gradient_accumulation_steps=2, ddp_backend="gloo", learning_rate=1e-2)


def trainers() -> None:
    """One rank; two ranks; Adafactor in bfloat16; weights alone."""
    fresh("trainer/alone")
    trainer(learning_rate=1e-2)
    fresh("trainer/two")
    spawn(accumulated, 2)
    fresh("trainer/adafactor")
    trainer(4, optim="adafactor", bf16=True, lr_scheduler_type="cosine")
    fresh("trainer/weights")
    trainer(4, save_only_model=True)


# Accelerate


def accelerated(total: int = 1, first: int = 2, **given: Any) -> None:
    """Some updates of each model, saved with names that are given automatically."""
    project = ProjectConfiguration(project_dir=".", automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project, **given)
    rows = torch.utils.data.DataLoader(Rows(), batch_size=2, shuffle=True)
    trained = []
    for _ in range(total):
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trained.append(accelerator.prepare(model, optimizer, scheduler))
    rows = accelerator.prepare(rows)
    for count, batch in enumerate(rows, 1):
        with accelerator.accumulate(*(model for model, _, _ in trained)):
            for model, optimizer, scheduler in trained:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if count in (first, 4):
            accelerator.save_state()
        if count == 4:
            break
    accelerator.end_training()


def together() -> None:
    """Two ranks, which step their scheduler twice for each update."""
    accelerated(first=4)


def accelerates() -> None:
    """One rank; two ranks; two models with an accumulation of gradients."""
    fresh("accelerate/alone")
    accelerated()
    fresh("accelerate/two")
    spawn(together, 2)
    Accelerator().state._reset_state(reset_partial_state=True)
    fresh("accelerate/models")
    accelerated(2, 4, gradient_accumulation_steps=2)


# Weights


def weights() -> None:
    """Saved whole, and in shards with an index, and by safetensors itself."""
    fresh("safetensors/single")
    llama().to(torch.bfloat16).save_pretrained(".")
    fresh("safetensors/sharded")
    llama().save_pretrained(".", max_shard_size="2KB")
    fresh("safetensors/plain")
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "half": torch.ones(3, dtype=torch.float16),
        "eight": torch.ones(4).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(2.0, dtype=torch.float64),
        "yes": torch.tensor([True, False]),
    }
    save_file(tensors, "things.safetensors", {"step": "7"})


if __name__ == "__main__":
    weights()
    trainers()
    accelerates()
