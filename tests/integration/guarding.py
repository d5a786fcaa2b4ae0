"""Deeds: what trainers do with the guard, and with validators of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trainers import Desk

import handfast
from handfast.store.manifest import Stamp
from handfast.torch import guard
from handfast.torch.validators import Staged


def load(desk: Desk, path: str, parts: Sequence[str], **options: Any) -> str:
    """Load parts of what was built by hand; gives the epoch."""
    held = desk.training.state()
    return str(guard.load(path, **{name: held[name] for name in parts}, **options).epoch)


def step(desk: Desk) -> str:
    """One update, unsaved; gives the digest."""
    desk.training.step()
    return str(desk.training.digest())


def swap(desk: Desk, *, back: bool = True) -> str:
    """Let other weights take the model's place for a while; gives its origin then."""
    model = desk.training.model
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor + 1 for name, tensor in kept.items()})
    if back:
        model.load_state_dict(kept)
    return origin(desk, "model")


def origin(desk: Desk, part: str) -> str:
    """Where a part came from, in words."""
    return str(guard.origin(desk.training.state()[part]))


def spoil(desk: Desk, value: float = float("nan")) -> None:
    """Let one weight of this rank's be no number."""
    _first(desk)[0] = value


def weight(desk: Desk) -> float:
    """The weight that :func:`spoil` sets."""
    return float(_first(desk)[0])


def _first(desk: Desk) -> torch.Tensor:
    found: Any = next(desk.training.model.parameters())
    local = found.to_local() if hasattr(found, "to_local") else found
    return local.detach().view(-1)


def histories(desk: Desk) -> int:
    """How many ranks this one knows to go on as no one history."""
    return len(desk.checkpointer._session.histories)


def stamps(path: str, step: int | None = None) -> list[Stamp]:
    """The stamps of all shards of an epoch."""
    return [shard.stamp for shard in handfast.open(path).inspect(step).shards]


# --- validators, in the examiner's process ------------------------------------------------------


def held(staged: Staged) -> str | None:
    """Wait while a file is there, and show that it waits."""
    flag = Path(os.environ["HELD_VALIDATOR"])
    while flag.exists():
        flag.with_suffix(".reached").touch()
        time.sleep(0.01)
    return None


def dies(staged: Staged) -> None:
    """Be killed, as where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def positive(staged: Staged) -> str | None:
    """A user's own rule."""
    return "it is below zero" if staged.extra < 0 else None
