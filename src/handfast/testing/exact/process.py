"""One rank's process: a fresh interpreter, or a fork of one that has torch loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import get_context
from typing import Final, Protocol

__all__ = ["Fresh", "Process", "Warm"]

PRELOAD: Final = ["handfast.testing.exact.life", "torch._dynamo", "torch.distributed.fsdp"]
"""What takes seconds to import, and most trainings do."""


class Process(Protocol):
    """A process in a group of its own, with what it writes in a file."""

    def status(self) -> int | None:
        """How it has ended: its status, or less than 0 for a signal; None while it runs."""

    def terminate(self) -> None:
        """Send SIGTERM to the rank itself."""

    def kill(self) -> None:
        """Send SIGKILL to the rank, and to the workers that it has started."""

    def wait(self) -> None:
        """Wait for its end; nothing can be asked or sent afterwards."""


class Fresh:
    """A fresh interpreter, as any launcher starts it."""

    def __init__(self, task: str, output: str, environment: Mapping[str, str]) -> None:
        with open(output, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "handfast.testing.exact", task],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def status(self) -> int | None:
        """See the port. It keeps its id, so that nobody else's group can have it."""
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        found = os.waitid(os.P_PID, self._process.pid, how)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def terminate(self) -> None:
        """See the port."""
        self._process.terminate()

    def kill(self) -> None:
        """See the port."""
        os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """See the port."""
        self._process.wait()


class Warm:
    """A fork of the one process that has torch loaded; that is started with the first of them."""

    def __init__(self, task: str, output: str, environment: Mapping[str, str]) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._process = context.Process(target=_become, args=(task, output, dict(environment)))
        self._process.start()

    def status(self) -> int | None:
        """See the port."""
        return self._process.exitcode

    def terminate(self) -> None:
        """See the port."""
        self._process.terminate()

    def kill(self) -> None:
        """See the port. Workers of a rank that has ended find out by themselves."""
        if self.status() is None:
            with suppress(ProcessLookupError):  # it has no group yet
                os.killpg(self._process.pid or 0, signal.SIGKILL)
            self._process.kill()

    def wait(self) -> None:
        """See the port."""
        self._process.join()
        self._process.close()


def _become(task: str, output: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Looked up in the child: the process that compares never loads torch.
    from handfast.testing.exact.life import live

    live(task)
