"""The demo's training under handfast: the ten lines, and an eye on the lattice for the report."""

import os
import threading

from handfast.core.lattice import Epoch
from handfast.core.view import Lattice
from handfast.demo.events import Log
from handfast.demo.job import Job
from handfast.demo.training import Training
from handfast.torch import Checkpointer

__all__ = ["Handfast", "place"]

_GLANCE_S = 0.02


def place(job: Job, rank: int) -> None:
    """Say where this rank runs: ``job.nodes`` nodes are played on one machine.

    Each has an agent of its own, and each rank a directory of its own, as on node-local disks.
    """
    local = job.world // job.nodes
    os.environ |= {
        "HANDFAST_NODE": job.node(rank),
        "HANDFAST_BIND": "127.0.0.1",
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
    }


class Handfast:
    """Saves through a Checkpointer; a thread tells the log whenever the lattice has changed."""

    def __init__(self, training: Training, log: Log) -> None:
        job = training.job
        self._log = log
        self._keeper = Checkpointer(job.disks, training.state, every=job.every)
        self._steps = job.steps
        self._rollback = job.rollback or None
        self._seen: Lattice | None = None
        self._done = threading.Event()
        self._eye = threading.Thread(target=self._watch, name="demo-lattice", daemon=True)

    def restore(self) -> int:
        """The recovery line of the whole job, or the step that the operator asks for."""
        step = self._keeper.restore(self._rollback)
        self._eye.start()
        return step

    def save(self, step: int) -> object:
        """Returns once the state is copied; the agent does the rest."""
        return self._keeper.save(step, force=step == self._steps)

    def close(self) -> None:
        """Wait until the last epoch has converged, and tell that too."""
        self._keeper.wait_until_finished(60.0)
        self._done.set()
        self._eye.join()
        self._glance()
        self._keeper.close()

    def _watch(self) -> None:
        while not self._done.wait(_GLANCE_S):
            self._glance()

    def _glance(self) -> None:
        """Tell the log of the lattice, if it has changed."""
        lattice = self._keeper.lattice
        if lattice == self._seen:
            return
        self._seen = lattice
        self._log.tell(
            "lattice",
            domains={
                f"{view.shard}": (_pair(view.staged), _pair(view.persisted), _pair(view.certified))
                for view in lattice.domains.values()
            },
            line=_pair(lattice.converged),
        )


def _pair(epoch: Epoch | None) -> tuple[int, int]:
    return (epoch.generation, epoch.step) if epoch is not None else (0, 0)
