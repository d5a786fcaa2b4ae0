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


def _stateful(items: torch.Tensor) -> Any:
    """torchdata's own, which counts what it gave."""
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    return StatefulDistributedSampler(items, num_replicas=1, rank=0)


SAMPLERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "stateful": _stateful,
    "": lambda _: None,
    "distributed": lambda items: DistributedSampler(items, num_replicas=1, rank=0),
    "seeded": lambda items: SubsetRandomSampler(range(len(items)), generator=torch.Generator()),
}


LATE = 4
"""The step from which a second loader gives the batches, if there is one."""


class Training:
    """A model with dropout over shuffled items: each step hangs on every random stream."""

    def __init__(
        self, workers: int, seed: int, sampler: str = "", later: str | None = None
    ) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        items = torch.arange(ITEMS, dtype=torch.float32)
        self.loaders = [
            StatefulDataLoader(
                items,
                BATCH,
                shuffle=not name,
                sampler=SAMPLERS[name](items),
                num_workers=workers,
                multiprocessing_context="fork" if workers else None,  # as a script has it on Linux
            )
            for name in (sampler, later)
            if name is not None
        ]
        self.at = 0
        self._batches = self._endless()

    def state(self) -> dict[str, object]:
        """One epoch."""
        return {"model": self.model, "optimizer": self.optimizer, "loaders": self.loaders}

    def _endless(self) -> Iterator[torch.Tensor]:
        while True:
            late = len(self.loaders) > 1 and self.at >= LATE
            loader = self.loaders[late]
            self._tell(loader.sampler, (self.at - late * LATE) * BATCH // ITEMS)
            for batch in loader:
                yield batch
                if self.at == LATE and len(self.loaders) > 1:
                    break  # and goes over to the other one

    def _tell(self, sampler: object, epoch: int) -> None:
        """What an ordinary loop does before it iterates."""
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        elif isinstance(sampler, SubsetRandomSampler):
            sampler.generator.manual_seed(7 + epoch)

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
        for loader in self.loaders:
            loader._iterator = None
        gc.collect()


def over_a_loader(
    desk: Desk,
    path: str,
    workers: int,
    seed: int,
    until: int,
    sampler: str = "",
    later: str | None = None,
) -> tuple[int, list[tuple[list[float], float]]]:
    """Restore, train until a step, and save there; gives where it began, and each step."""
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
    training = Training(workers, seed, sampler, later)
    desk.checkpointer = Checkpointer(path, training.state(), every=until)
    start = training.at = desk.checkpointer.restore()
    seen = [training.step() for _ in range(start, until)]
    desk.checkpointer.save(until).converged(60)
    training.end()
    return start, seen
