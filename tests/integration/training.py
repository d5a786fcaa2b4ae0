"""A small training of which every part matters: what the tests of this room save and resume."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

WIDTH = 8


class Loader:
    """Batches in an order that is drawn anew each epoch; it can say where it is."""

    def __init__(self, rows: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.data = torch.randn(rows, 2, WIDTH, generator=generator)
        self.order: list[int] = []
        self.epochs = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.next()

    def next(self) -> Tensor:
        """The next batch."""
        if not self.order:
            self.order = random.sample(range(len(self.data)), len(self.data))
            self.epochs += 1
        return self.data[self.order.pop()]

    def state_dict(self) -> dict[str, Any]:
        """The last batch consumed, not the last one fetched."""
        return {"order": list(self.order), "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where it was."""
        self.order, self.epochs = list(state["order"]), state["epochs"]


class Average:
    """A user's own object: a running mean of the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take a step's weights in."""
        self.count += 1
        for name, value in model.named_parameters():
            self.shadow[name].lerp_(value, 0.1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and a count."""
        return {"shadow": self.shadow, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place of another."""
        self.shadow, self.count = state["shadow"], state["count"]


class Training:
    """A model, its optimizer and scheduler; ``full`` adds a loader, a scaler, and an average.

    ``kind`` is "plain", "ddp" or "fsdp"; ``rank`` makes the random streams differ.
    """

    def __init__(
        self,
        kind: str = "plain",
        *,
        rank: int = 0,
        full: bool = False,
        width: int = WIDTH,
        depth: int = 1,
        norm: bool = False,
        optimizer: str = "AdamW",
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
        static: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(WIDTH, width)]
        if norm:
            layers.append(nn.BatchNorm1d(width))
        for _ in range(depth):
            layers += [nn.GELU(), nn.Dropout(0.2), nn.Linear(width, width)]
        self.model: nn.Module = nn.Sequential(*layers, nn.Linear(width, WIDTH)).to(dtype)
        self.dtype = dtype
        if kind == "fsdp":
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(self.model)
        elif kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.model, static_graph=static)
        groups: Any = self.model.parameters()
        if optimizer == "groups":
            named = list(self.model.parameters())
            groups = [{"params": named[:1], "lr": 1e-2}, {"params": named[1:]}]
        self.shared = optimizer == "shared"
        if self.shared:  # ZeRO by hand: each of two ranks steps every other parameter
            groups = list(self.model.parameters())[rank::2]
        one_of: dict[str, Any] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
        self.optimizer = one_of.get(optimizer, torch.optim.AdamW)(groups, lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.9)
        self.loader = Loader() if full else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        self.average = Average(self.model) if full else None
        self.counts: dict[str, Any] = {"tokens": 0}
        self.full = full
        self.more: dict[str, object] = {}
        torch.manual_seed(100 + rank)
        random.seed(100 + rank)
        np.random.seed(100 + rank)

    def state(self) -> dict[str, object]:
        """All that makes up one epoch."""
        state: dict[str, object] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }
        if self.full:
            state |= {"loader": self.loader, "scaler": self.scaler, "average": self.average}
            state["counts"] = self.counts
        return state | self.more

    def loss(self) -> Tensor:
        """A loss that hangs on all random streams and on the loader."""
        x = torch.randn(4, WIDTH) if self.loader is None else self.loader.next()
        x = (x * random.uniform(0.5, 1.5) + float(np.random.rand())).to(self.dtype)
        return (self.model(x) - x).square().mean()

    def step(self) -> float:
        """One completed update."""
        loss = self.loss()
        (self.model if self.shared else self.optimizer).zero_grad()
        if self.full:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        for index, parameter in enumerate(self.model.parameters() if self.shared else ()):
            torch.distributed.broadcast(parameter.data, index % 2)
        self.scheduler.step()
        if self.average is not None:
            self.average.update(self.model)
            self.counts["tokens"] += 4
        return float(loss.detach())

    def digest(self) -> str:
        """A digest of every bit of it, this rank's part, and of the random streams."""
        return digest(
            {
                **{name: part.state_dict() for name, part in self.parts().items()},
                "counts": self.counts,
                "torch": torch.get_rng_state(),
                "python": random.getstate(),
                "numpy": np.random.get_state(),
            }
        )

    def parts(self) -> dict[str, Any]:
        """Everything that has a ``state_dict``."""
        return {k: v for k, v in self.state().items() if hasattr(v, "state_dict")}


def digest(value: object) -> str:
    """A digest of a tree of values, to the last bit."""
    found = hashlib.blake2b(digest_size=8)

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value
            found.update(f"{local.dtype}{tuple(local.shape)}".encode())
            flat = local.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(repr(key).removeprefix("'module.").encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, np.ndarray):
            found.update(value.tobytes())
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()
