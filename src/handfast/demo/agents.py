"""The agents of a run: found as a trainer finds them, and ended by a handle on the process."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from handfast.agent import process
from handfast.demo.job import Job
from handfast.errors import HandfastError

__all__ = ["agent_pids", "end_agents"]


def agent_pids(job: Job) -> list[int]:
    """The process ids of the agents that live, one a node at most."""
    found: list[int] = []
    for node in sorted({job.node(rank) for rank in range(job.world)}):
        with contextlib.suppress(HandfastError, OSError):
            client = process.connect(f"{os.path.realpath(job.disks)}\n{node}")
            if client is not None:
                found.append(client.agent_pid)
                client.close()
    return found


def end_agents(pids: Iterable[int], how: signal.Signals) -> None:
    """Send a signal to these agents, those gone already excepted."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            handle = os.pidfd_open(pid)
            try:
                # Looked at while the handle is held: it is of this very process.
                if b"handfast.agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    signal.pidfd_send_signal(handle, how)
            finally:
                os.close(handle)
