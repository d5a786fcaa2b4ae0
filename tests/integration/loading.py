"""A deed: a training over torchdata's own loader, the real one; see :mod:`trainers`."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from trainers import Desk

from handfast.torch import Checkpointer

ITEMS, BATCH = 20, 4


class Training:
    """A model with dropout over shuffled items: each step hangs on every random stream."""

    def __init__(self, workers: int, seed: int) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        items = torch.arange(ITEMS, dtype=torch.float32)
        self.loader = StatefulDataLoader(items, BATCH, shuffle=True, num_workers=workers)
        self._batches = self._endless()

    def state(self) -> dict[str, object]:
        """One epoch."""
        return {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}

    def _endless(self) -> Iterator[torch.Tensor]:
        while True:
            yield from self.loader

    def step(self) -> tuple[list[float], float]:
        """Take a step; gives the items that it saw, and the loss."""
        batch = next(self._batches)
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
    desk: Desk, path: str, workers: int, seed: int, until: int
) -> tuple[int, list[tuple[list[float], float]]]:
    """Restore, train until a step, and save there; gives where it began, and each step."""
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
    training = Training(workers, seed)
    desk.checkpointer = Checkpointer(path, training.state(), every=until)
    start = desk.checkpointer.restore()
    seen = [training.step() for _ in range(start, until)]
    desk.checkpointer.save(until).converged(60)
    training.end()
    return start, seen
