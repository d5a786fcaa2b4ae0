"""Start four ranks quickly, watch them, and end them: forked from a warm parent, or by torchrun.

The parent is Python's own fork server with torch loaded and no thread running; a fork of it is a
rank in well under a second, where torchrun needs about ten on two cores. Processes are killed by
pidfd, so never one that we did not start.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Protocol

from handfast.demo.job import Job

__all__ = ["PATIENCE_S", "Forked", "Ranks", "Torchrun", "end", "warm"]

PATIENCE_S = 0.1
"""How long ranks may run on after one died: torchrun looks at its workers as often as this."""

_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class Ranks(Protocol):
    """The processes of one start."""

    launches: int
    """How many starts this may grow to: torchrun restarts its ranks itself."""

    def kill(self, ranks: Iterable[int]) -> None:
        """SIGKILL these ranks, those gone already excepted."""

    def watch(self) -> list[int | None]:
        """The exit status of each rank so far; None while it runs."""

    def close(self) -> None:
        """SIGKILL what still runs, and wait for it."""


def warm() -> None:
    """Start the parent of all ranks, with torch loaded, unless it runs. Takes some seconds once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["handfast.demo.warm"])
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Forked:
    """Four ranks forked from the warm parent."""

    launches = 1

    def __init__(self, job: Job) -> None:
        warm()
        context = get_context("forkserver")
        self._processes: list[ForkServerProcess] = []
        self._handles: list[int] = []
        for rank in range(job.world):
            process = context.Process(target=_become, args=(job.encode(), rank), daemon=True)
            process.start()
            self._processes.append(process)
            self._handles.append(os.pidfd_open(process.pid or 0))

    def kill(self, ranks: Iterable[int]) -> None:
        """SIGKILL these ranks, those gone already excepted."""
        for rank in ranks:
            _strike(self._handles[rank])

    def watch(self) -> list[int | None]:
        """The exit status of each rank so far (negative: the signal); None while it runs."""
        return [process.exitcode for process in self._processes]

    def close(self) -> None:
        """SIGKILL what still runs, and wait for it."""
        for process, handle in zip(self._processes, self._handles, strict=True):
            _strike(handle)
            process.join()
            process.close()
            os.close(handle)
        self._processes, self._handles = [], []


def _become(job: str, rank: int) -> None:
    # Looked up in the child: the process that shows the demo never loads torch.
    from handfast.demo.rank import forked

    forked(Job.decode(job), rank)


class Torchrun:
    """The same ranks under torchrun, which restarts them itself, once."""

    launches = 2

    def __init__(self, job: Job) -> None:
        self._world = job.world
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(job.world), "--max-restarts", "1"]
        command += ["-m", "handfast.demo.rank", job.encode()]
        output = Path(job.run, "output", f"{job.launch:04}-torchrun.txt")
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **_SETTINGS},
                start_new_session=True,
            )

    def kill(self, ranks: Iterable[int]) -> None:
        """SIGKILL these ranks; all of them means the job, torchrun included."""
        doomed = set(ranks)
        if len(doomed) == self._world:
            self.close()
            return
        for handle, rank in self._workers():
            if rank in doomed:
                _strike(handle)
            os.close(handle)

    def watch(self) -> list[int | None]:
        """torchrun's own exit status, once for each rank; None while it runs."""
        return [self._process.poll()] * self._world

    def close(self) -> None:
        """SIGKILL torchrun, then what it started: it can start nothing any more."""
        if self._process.poll() is None:
            workers = self._workers()
            self._process.kill()
            for handle, _ in workers:
                _strike(handle)
                os.close(handle)
        self._process.wait()

    def _workers(self) -> list[tuple[int, int]]:
        """A handle and the rank of each child of torchrun."""
        pid = self._process.pid
        found: list[tuple[int, int]] = []
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            # The handle first: what is read afterwards is read of the process that it holds.
            handle = os.pidfd_open(int(child))
            entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            rank = next((int(e[5:]) for e in entries if e.startswith(b"RANK=")), -1)
            found.append((handle, rank))
        return found


def _strike(handle: int) -> None:
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return  # gone already: what was wanted


def end(ranks: Ranks) -> None:
    """Let ranks that lost a peer run on as long as torchrun would, then end them."""
    time.sleep(PATIENCE_S)
    ranks.close()
