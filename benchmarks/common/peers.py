"""Who saves: handfast and the usual ways, each used as its own documentation says.

All take one rank's tensors and put them back into the same live tensors. What a peer leaves undone
is part of it, and is printed beside its figures. A peer that is not installed is left out by name.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from benchmarks.common.ranks import Rank
from benchmarks.common.state import State
from handfast.torch import Checkpointer

__all__ = ["HANDFAST", "PEERS", "STREAMED", "Handfast", "Saver", "missing", "open_saver", "undone"]

HANDFAST: Final = "handfast"
STREAMED: Final = "handfast, images=0"


class Saver(Protocol):
    """One way to save, over the live tensors of one rank; ``home`` is its own directory."""

    undone: ClassVar[str]
    """What others do and it does not, in a few words."""
    needs: ClassVar[tuple[str, str]]
    """A module, and the name by which pip knows it; empty for what comes with torch."""

    def __init__(self, home: Path, state: State, rank: Rank) -> None: ...

    def save(self) -> None:
        """Save, and return when training may go on."""

    def busy(self) -> bool:
        """Whether the last save is still under way."""

    def finish(self) -> None:
        """Wait until the last save is as durable as this one ever makes it."""

    def settle(self) -> None:
        """Tidy up after the last save; nobody times it."""

    def load(self) -> None:
        """Put the last save into the live tensors."""

    def close(self) -> None:
        """Leave nothing running."""


class Handfast:
    """handfast: a save is finished when it is persisted, settled when it converged."""

    undone = ""
    needs = ("", "")
    images = 1

    def __init__(self, home: Path, state: State, rank: Rank) -> None:  # noqa: ARG002 - a Saver's
        self._path, self._state = home, state
        self.keeper = self._open()
        self.step = self.keeper.restore()

    def _open(self) -> Checkpointer:
        return Checkpointer(self._path, self._state, rng=False, images=self.images)

    def save(self) -> None:
        self.step += 1
        self.last = self.keeper.save(self.step)

    def busy(self) -> bool:
        return self.last.phase == "staged"

    def finish(self) -> None:
        self.last.persisted(600)

    def settle(self) -> None:
        self.last.converged(600)

    def load(self) -> None:
        self.keeper.restore(require=True)

    def load_in_place(self) -> None:
        """The same, with each byte read once: what a start can do."""
        self.keeper.restore(require=True, in_place=True)

    def reopen(self) -> None:
        """Leave, and come back as a job does that is started again."""
        self.keeper.close()
        self.keeper = self._open()

    def close(self) -> None:
        self.keeper.close(600)


class Streamed(Handfast):
    """handfast without memory for a second state: its ``save`` returns when it is persisted."""

    images = 0


class Plain:
    """What saves at once and has nothing to wait for but the disk."""

    undone = ""
    needs = ("", "")

    def __init__(self, home: Path, state: State, rank: Rank) -> None:
        self._home, self._state = home, state
        self._path = home / f"rank{rank.rank}"

    def busy(self) -> bool:
        return False

    def finish(self) -> None:
        return

    def settle(self) -> None:
        return

    def close(self) -> None:
        return

    def _put(self, loaded: dict[str, Any]) -> None:
        for name, value in loaded.items():
            self._state[name].copy_(value)


class TorchSave(Plain):
    """``torch.save`` of each rank's tensors to a file of its own, and an fsync of that."""

    undone = "hash, sync of the directory, any word with other ranks"

    def save(self) -> None:
        torch.save(self._state, self._path)

    def finish(self) -> None:
        _sync(self._path)

    def load(self) -> None:
        self._put(torch.load(self._path, weights_only=True))


class Safetensors(Plain):
    """safetensors' ``save_file`` of each rank's tensors, and an fsync of the file."""

    undone = TorchSave.undone
    needs = ("safetensors", "safetensors")

    def save(self) -> None:
        import_module("safetensors.torch").save_file(self._state, self._path)

    def finish(self) -> None:
        _sync(self._path)

    def load(self) -> None:
        self._put(import_module("safetensors.torch").load_file(self._path))


class Dcp(Plain):
    """``torch.distributed.checkpoint.save`` into a new directory each time."""

    undone = "hash, sync of the directory"

    def __init__(self, home: Path, state: State, rank: Rank) -> None:
        super().__init__(home, state, rank)
        self._rank, self._count = rank, 0
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="torch.distributed")  # of its own old names

    def _next(self) -> Path:
        self._count += 1
        return self._at(self._count)

    def _at(self, count: int) -> Path:
        return self._home / str(count)

    def save(self) -> None:
        dcp.save(self._state, checkpoint_id=self._next())

    def settle(self) -> None:
        if self._rank.rank == 0:
            shutil.rmtree(self._at(self._count - 1), ignore_errors=True)

    def load(self) -> None:
        dcp.load(self._state, checkpoint_id=self._at(self._count))


class DcpThread(Dcp):
    """``async_save`` in a thread, with a stager that is kept, so that its memory is reused."""

    kind = AsyncCheckpointerType.THREAD

    def __init__(self, home: Path, state: State, rank: Rank) -> None:
        super().__init__(home, state, rank)
        shared = self.kind is AsyncCheckpointerType.PROCESS
        on_cpu = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(on_cpu)
        self._future: Future[Any] | None = None

    def save(self) -> None:
        found = async_save(
            self._state,
            checkpoint_id=self._next(),
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
        )
        self._future = found if isinstance(found, Future) else found.upload_completion

    def busy(self) -> bool:
        return self._future is not None and not self._future.done()

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()

    def close(self) -> None:
        self._stager.close()


class DcpProcess(DcpThread):
    """``async_save`` in a process of its own, over shared memory."""

    kind = AsyncCheckpointerType.PROCESS


class TorchSnapshot(Plain):
    """``torchsnapshot.Snapshot.take``."""

    undone = "hash, fsync, sync of the directory"
    needs = ("torchsnapshot", "torchsnapshot-nightly")

    def __init__(self, home: Path, state: State, rank: Rank) -> None:
        super().__init__(home, state, rank)
        self._module = import_module("torchsnapshot")
        self._app = {"state": self._module.StateDict(**state)}
        self._at = str(home / "snapshot")

    def save(self) -> None:
        self._module.Snapshot.take(self._at, self._app)

    def load(self) -> None:
        self._module.Snapshot(self._at).restore(self._app)


class Orbax(Plain):
    """Orbax' ``PyTreeCheckpointer`` of NumPy arrays, each rank a checkpoint of its own."""

    undone = "a hash that a load verifies, any word with other ranks"
    needs = ("orbax.checkpoint", "orbax-checkpoint jax")

    def __init__(self, home: Path, state: State, rank: Rank) -> None:
        super().__init__(home, state, rank)
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._keeper = import_module("orbax.checkpoint").PyTreeCheckpointer()

    def save(self) -> None:
        tree = {name: tensor.numpy() for name, tensor in self._state.items()}
        self._keeper.save(self._path.absolute(), tree, force=True)

    def load(self) -> None:
        loaded = self._keeper.restore(self._path.absolute())
        self._put({name: torch.from_numpy(value) for name, value in loaded.items()})

    def close(self) -> None:
        self._keeper.close()


PEERS: Final[dict[str, type[Plain]]] = {
    "safetensors": Safetensors,
    "torch": TorchSave,
    "dcp": Dcp,
    "dcp-thread": DcpThread,
    "dcp-process": DcpProcess,
    "torchsnapshot": TorchSnapshot,
    "orbax": Orbax,
}
_SAVERS: Final[dict[str, Any]] = {HANDFAST: Handfast, STREAMED: Streamed, **PEERS}


def missing(peer: str) -> str:
    """Say how to install what a peer needs; empty where it is there."""
    module, package = PEERS[peer].needs
    with suppress(ModuleNotFoundError):
        if not module or find_spec(module) is not None:
            return ""
    return f"pip install {package}"


def open_saver(name: str, home: Path, state: State, rank: Rank) -> Saver:
    """Make a way to save, with a directory of its own below ``home``."""
    own = home / name
    own.mkdir(exist_ok=True)
    saver: Saver = _SAVERS[name](own, state, rank)
    return saver


def undone(name: str) -> str:
    """What a way to save leaves undone; empty for what is none."""
    return _SAVERS[name].undone if name in _SAVERS else ""


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
