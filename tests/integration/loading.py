"""A deed: a training over torchdata's own loader, the real one; see :mod:`trainers`."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DistributedSampler, SubsetRandomSampler
from trainers import Desk

from handfast.torch import Checkpointer

ITEMS, BATCH = 20, 4
SAMPLERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "": lambda _: None,
    "distributed": lambda items: DistributedSampler(items, num_replicas=1, rank=0),
    "seeded": lambda items: SubsetRandomSampler(range(len(items)), generator=torch.Generator()),
}


class Training:
    """A model with dropout over shuffled items: each step hangs on every random stream."""

    def __init__(self, workers: int, seed: int, sampler: str = "") -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        items = torch.arange(ITEMS, dtype=torch.float32)
        self.sampler = SAMPLERS[sampler](items)
        shuffle = self.sampler is None
        self.loader = StatefulDataLoader(
            items, BATCH, shuffle=shuffle, sampler=self.sampler, num_workers=workers
        )
        self.at = 0
        self._batches = self._endless()

    def state(self) -> dict[str, object]:
        """One epoch."""
        return {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}

    def _endless(self) -> Iterator[torch.Tensor]:
        while True:
            self._tell(self.at * BATCH // ITEMS)
            yield from self.loader

    def _tell(self, epoch: int) -> None:
        """What an ordinary loop does before it iterates."""
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)
        elif isinstance(self.sampler, SubsetRandomSampler):
            self.sampler.generator.manual_seed(7 + epoch)

    def step(self) -> tuple[list[float], float]:
        """Take a step; gives the items that it saw, and the loss."""
        batch = next(self._batches)
        self.at += 1
        loss = self.model(batch[:, None]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return batch.tolist(), loss.item()

    def end(self) -> None:
        """Let the workers go: killed with their trainer, they would find out only after a while."""
        self._batches.close()
        self.loader._iterator = None
        gc.collect()


def over_a_loader(
    desk: Desk, path: str, workers: int, seed: int, until: int, sampler: str = ""
) -> tuple[int, list[tuple[list[float], float]]]:
    """Restore, train until a step, and save there; gives where it began, and each step."""
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
    training = Training(workers, seed, sampler)
    desk.checkpointer = Checkpointer(path, training.state(), every=until)
    start = training.at = desk.checkpointer.restore()
    seen = [training.step() for _ in range(start, until)]
    desk.checkpointer.save(until).converged(60)
    training.end()
    return start, seen
