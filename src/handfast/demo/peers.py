"""The usual ways to save a sharded training, each used as its documentation says.

None of them is given a handicap: files are renamed into place where that is the custom, barriers
stand where the recipes put them, and each rank saves and loads every component that handfast does.
None is given what its users do not have either: a stamp that says which step a file is of is
compared by nobody.
"""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from handfast.demo.job import Job
from handfast.demo.savers import Saver
from handfast.demo.training import Training, local

__all__ = ["SAVERS", "DcpOneDirectory", "DcpPerStep", "TorchSaveLatest", "TorchSavePerStep"]


def _streams() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "python": random.getstate()}


def _set_streams(streams: Mapping[str, Any]) -> None:
    torch.set_rng_state(streams["torch"])
    version, words, gauss = streams["python"]
    random.setstate((version, tuple(words), gauss))


def _collect(training: Training) -> dict[str, Any]:
    """This rank's whole state for `torch.save`: local shards by name, and plain values."""
    parameters = dict(training.model.named_parameters())
    return {
        "model": {name: local(p).detach() for name, p in parameters.items()},
        "optimizer": {
            name: {key: local(value) for key, value in training.optimizer.state[p].items()}
            for name, p in parameters.items()
        },
        "scheduler": training.scheduler.state_dict(),
        "loader": training.loader.state_dict(),
        "streams": _streams(),
    }


def _spread(training: Training, saved: Mapping[str, Any]) -> None:
    """The inverse of `_collect`, into the live objects."""
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            local(parameter).copy_(saved["model"][name])
            moments = {
                key: _like(value, parameter) for key, value in saved["optimizer"][name].items()
            }
            training.optimizer.state[parameter] = moments
    training.scheduler.load_state_dict(saved["scheduler"])
    training.optimizer.param_groups[0]["lr"] = training.scheduler.get_last_lr()[0]
    training.loader.load_state_dict(saved["loader"])
    _set_streams(saved["streams"])


def _like(saved: Tensor, parameter: Tensor) -> Tensor:
    """A moment as AdamW would have made it, sharded as its parameter is, holding ``saved``."""
    if saved.ndim == 0:
        return saved
    moment = torch.zeros_like(parameter)
    local(moment).copy_(saved)
    return moment


def _write(path: Path, content: bytes | dict[str, Any]) -> None:
    """Write to a temporary name, then rename: no reader sees half a file."""
    draft = path.with_name(path.name + ".tmp")
    if isinstance(content, bytes):
        draft.write_bytes(content)
    else:
        torch.save(content, draft)
    os.replace(draft, path)


class TorchSaveLatest:
    """One file a rank, each renamed into place over the last; then rank 0 writes ``latest``.

    The barrier before ``latest`` is the careful form: it never names a step that a rank has not
    written. The step to go on from is the one in rank 0's file, told to all.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._folder = Path(training.job.run, "checkpoints")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / f"rank{training.rank}.pt"

    def restore(self) -> int:
        """What this rank's file holds, at rank 0's step; nothing before the first ``latest``."""
        if not (self._folder / "latest").exists():
            return 0
        saved = torch.load(self._file, weights_only=True)
        _spread(self._training, saved)
        # All ranks count on from one step: the job would hang if each went on from its own.
        step = torch.tensor(saved["step"])
        dist.broadcast(step, src=0)
        return int(step)

    def save(self, step: int) -> None:
        """Write this rank's file; when all have, rank 0 says which step they are of."""
        _write(self._file, {**_collect(self._training), "step": step})
        dist.barrier()
        if self._training.rank == 0:
            _write(self._folder / "latest", str(step).encode())

    def close(self) -> None:
        """Nothing is under way."""


class TorchSavePerStep:
    """A directory a step, one file a rank; the newest directory with a file of each is resumed."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._root = Path(training.job.run, "checkpoints")
        self._root.mkdir(parents=True, exist_ok=True)
        self._keep = 3

    def restore(self) -> int:
        """The newest directory that holds a file of every rank."""
        world = self._training.job.world
        for step in _newest_first(self._root, self._training.job):
            folder = self._root / str(step)
            if all((folder / f"rank{rank}.pt").exists() for rank in range(world)):
                file = folder / f"rank{self._training.rank}.pt"
                _spread(self._training, torch.load(file, weights_only=True))
                return step
        return 0

    def save(self, step: int) -> None:
        """Write this rank's file of this step; keep the newest three directories."""
        folder = self._root / str(step)
        folder.mkdir(exist_ok=True)
        _write(folder / f"rank{self._training.rank}.pt", _collect(self._training))
        dist.barrier()
        if self._training.rank == 0:
            _prune(self._root, self._keep)

    def close(self) -> None:
        """Nothing is under way."""


def _steps(root: Path) -> list[int]:
    """The steps that have a directory, the newest first."""
    return sorted((int(e.name) for e in root.iterdir() if e.name.isdigit()), reverse=True)


def _newest_first(root: Path, job: Job) -> list[int]:
    """What may be resumed: all there is, or what is not above an operator's rollback."""
    return [step for step in _steps(root) if not job.rollback or step <= job.rollback]


def _prune(root: Path, keep: int) -> None:
    for step in _steps(root)[keep:]:
        shutil.rmtree(root / str(step), ignore_errors=True)


class DcpOneDirectory:
    """`torch.distributed.checkpoint` into one directory, overwritten: the default of `dcp.save`.

    State as in PyTorch's recipe: `get_state_dict` and `set_state_dict`, sharded by parameter name;
    what differs between ranks (the random streams) goes under a key of the rank.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._root = Path(training.job.run, "checkpoints")
        self._root.mkdir(parents=True, exist_ok=True)

    def _folder(self, step: int) -> Path:
        del step
        return self._root

    def _found(self) -> Path | None:
        return self._root if any(self._root.iterdir()) else None

    def restore(self) -> int:
        """What the directory holds, if it holds anything."""
        folder = self._found()
        dist.barrier()  # all look before the first one loads
        if folder is None:
            return 0
        training = self._training
        content = self._content(0)
        dcp.load(content, checkpoint_id=folder)
        set_state_dict(
            training.model,
            training.optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
        )
        training.scheduler.load_state_dict(content["scheduler"])
        training.loader.load_state_dict(content["loader"])
        _set_streams(content[f"streams{training.rank}"])
        return int(content["step"])

    def save(self, step: int) -> None:
        """One collective `dcp.save`."""
        dcp.save(self._content(step), checkpoint_id=self._folder(step))

    def _content(self, step: int) -> dict[str, Any]:
        training = self._training
        model, optimizer = get_state_dict(training.model, training.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": training.scheduler.state_dict(),
            "loader": training.loader.state_dict(),
            f"streams{training.rank}": _streams(),
            "step": step,
        }

    def close(self) -> None:
        """Nothing is under way."""


class DcpPerStep(DcpOneDirectory):
    """`torch.distributed.checkpoint` into a directory a step; resumed is the newest complete one.

    Complete is what has a ``.metadata`` file: DCP writes it last.
    """

    def _folder(self, step: int) -> Path:
        return self._root / str(step)

    def _found(self) -> Path | None:
        for step in _newest_first(self._root, self._training.job):
            if (self._root / str(step) / ".metadata").exists():
                return self._root / str(step)
        return None

    def save(self, step: int) -> None:
        """One collective `dcp.save`, then rank 0 keeps the newest three directories."""
        super().save(step)
        if self._training.rank == 0:
            _prune(self._root, 3)


SAVERS: dict[str, Callable[[Training], Saver]] = {
    "torch.save": TorchSaveLatest,
    "torch.save per step": TorchSavePerStep,
    "dcp": DcpOneDirectory,
    "dcp per step": DcpPerStep,
}
