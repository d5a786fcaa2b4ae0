"""Starting a job's ranks as a launcher would, killing them, and seeing them end."""

from __future__ import annotations

import glob
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Literal, NamedTuple, NoReturn

import msgspec

from handfast.agent.frames import peer
from handfast.errors import HandfastError
from handfast.testing.exact.moments import Moment, read_moments
from handfast.testing.exact.process import Fresh, Process, Warm
from handfast.testing.exact.task import HUNG, UNGUARDED, Packed, Task, go_on, stands

__all__ = ["How", "JobFailed", "Kill", "Launch", "Start", "own_agents"]

How = Literal["kill", "terminate"]

PAUSE_S: Final = 0.01
PATIENCE_S: Final = 1.0
"""So long ranks may go on once one of them is gone."""
SLACK_S: Final = 30.0
"""More than its limit that a rank has to say where it hangs."""
DRAIN_S: Final = 30.0
"""So long an agent may take to end by itself."""
TAIL: Final = 4000
"""Characters of what a rank wrote that are shown."""


class JobFailed(HandfastError):
    """The job that was to be tried out did not do its part: it raised, hung, or never saved."""


class Kill(NamedTuple):
    """After which step, by which signal, and which rank; None: all of them."""

    step: int
    how: How
    victim: int | None


class Launch(NamedTuple):
    """What all starts share: agents are met in ``runtime``, and the job saves at ``run``."""

    job: Packed
    steps: int
    ranks: int
    limit_s: float
    warm: bool
    runtime: str = ""
    run: str = ""


class Start:
    """One start of all ranks, the one of this ``number`` in its run; errors call it ``name``."""

    def __init__(
        self, launch: Launch, folder: str, name: str, number: int, kill: Kill | None = None
    ) -> None:
        self.name = name
        self._launch = launch
        self._kill = kill
        self._folders = [os.path.join(folder, f"rank-{rank}") for rank in range(launch.ranks)]
        self._ranks: list[Process] = []
        self._deadline = time.monotonic() + launch.limit_s + SLACK_S
        port = _free_port() if launch.ranks > 1 else 0
        try:
            for rank, home in enumerate(self._folders):
                os.makedirs(home)
                self._ranks.append(self._begin(rank, home, number, port))
        except BaseException:
            self._end()
            raise

    def _begin(self, rank: int, home: str, number: int, port: int) -> Process:
        launch = self._launch
        task = Task(
            job=launch.job,
            search=tuple(sys.path),
            run=launch.run,
            steps=launch.steps,
            folder=home,
            stop=self._kill.step if self._kill else None,
            seed=number * launch.ranks + rank,
            limit_s=launch.limit_s,
        )
        path = os.path.join(home, "task")
        with open(path, "wb") as file:
            file.write(msgspec.msgpack.encode(task))
        begin = Warm if launch.warm else Fresh
        return begin(path, os.path.join(home, "output"), self._environment(rank, port))

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        """Ours, with what torchrun sets: a job of one process has none of that."""
        found = {**os.environ, "XDG_RUNTIME_DIR": self._launch.runtime}
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self._launch.ranks,
            "LOCAL_WORLD_SIZE": self._launch.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if port:
            return found | {name: str(value) for name, value in place.items()}
        return {name: value for name, value in found.items() if name not in place}

    def done(self) -> list[list[Moment]]:
        """Wait until the job has ended, or kill it where it is to be killed: each rank's moments.

        Raises JobFailed where a rank raised, or took too long.
        """
        try:
            self._until(self._over)
            if self._kill is not None:
                self._strike(self._kill)
        finally:
            self._end()
        return list(map(read_moments, self._folders))

    def _over(self) -> bool:
        codes = [process.status() for process in self._ranks]
        if any(codes):
            self._fail([rank for rank, code in enumerate(codes) if code])
        stand = list(map(stands, self._folders))
        over = all(code == 0 or still for code, still in zip(codes, stand, strict=True))
        if over and self._kill is not None and not all(stand):
            raise JobFailed(
                f"{self.name}: {self._who(stand.index(False))} ended without a save of step "
                f"{self._kill.step}, which an uninterrupted one had: it was not killed"
            )
        return over

    def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if time.monotonic() > self._deadline:
                raise JobFailed(self._hung(self._running()[0]))
            time.sleep(PAUSE_S)

    def _running(self) -> list[int]:
        return [rank for rank, process in enumerate(self._ranks) if process.status() is None]

    def _strike(self, kill: Kill) -> None:
        victims = range(len(self._ranks)) if kill.victim is None else [kill.victim]
        for rank in victims:
            if kill.how == "kill":
                self._ranks[rank].kill()
            else:
                self._ranks[rank].terminate()
        for rank, home in enumerate(self._folders):
            if kill.how == "terminate" or rank not in victims:
                go_on(home)
        self._until(lambda: set(victims).isdisjoint(self._running()))
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        """Let ranks that have lost another one go on for as long as a launcher would let them."""
        soon = time.monotonic() + PATIENCE_S
        while self._running() and time.monotonic() < soon:
            time.sleep(PAUSE_S)

    def _end(self) -> None:
        """Kill what is left, the workers of loaders too, and wait for it."""
        for process in self._ranks:
            process.kill()
            process.wait()

    # --- what went wrong ------------------------------------------------------------------------

    def _fail(self, failed: Sequence[int]) -> NoReturn:
        """Raise JobFailed: what the ranks say that failed first; the others fail after them."""
        hung = [rank for rank in failed if _tail(os.path.join(self._folders[rank], HUNG))]
        if hung:
            raise JobFailed(self._hung(hung[0]))
        self._wait_for_all()
        raise JobFailed("\n".join(map(self._failed, failed)))

    def _failed(self, rank: int) -> str:
        code = self._ranks[rank].status() or 0
        how = f"ended with status {code}" if code >= 0 else f"was ended by signal {-code}"
        output = os.path.join(self._folders[rank], "output")
        said = _tail(output) or "nothing was written"
        if not os.path.exists(output):  # a fork imports the main script before it is a rank
            said = f"it ended before it came to the job, as where {UNGUARDED}"
        return f"{self.name}: {self._who(rank)} {how} {self._when(rank)}:\n{said}"

    def _hung(self, rank: int) -> str:
        where = _tail(os.path.join(self._folders[rank], HUNG)) or "it did not say where it is"
        return (
            f"{self.name}: {self._who(rank)} did not end within {self._launch.limit_s:g} s "
            f"(timeout_s), {self._when(rank)}. What to do: fewer steps, a smaller job or a longer "
            f"timeout_s, if it does not hang:\n{where}"
        )

    def _who(self, rank: int) -> str:
        return f"rank {rank}" if self._launch.ranks > 1 else "the job"

    def _when(self, rank: int) -> str:
        told = read_moments(self._folders[rank])
        if not told:
            return "before restore() had returned"
        what = "restore() at step" if told[-1].what == "restored" else "save of step"
        return f"after the {what} {told[-1].step}"


def _tail(path: str) -> str:
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()[-TAIL:]
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def own_agents() -> Iterator[str]:
    """Give a directory where agents meet trainers; those that are left in it end with it."""
    with tempfile.TemporaryDirectory(prefix="handfast-") as runtime:
        try:
            yield runtime
        finally:
            for path in glob.glob(f"{runtime}/handfast/*/agent"):
                _end_agent(path)


def _end_agent(path: str) -> None:
    """End the agent of this socket: what it is still doing nobody will ask for."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(path)
            process = os.pidfd_open(peer(line)[0])
    except OSError:  # it has ended
        return
    poll = select.poll()  # select() takes no descriptor above 1023, and a test session has many
    poll.register(process, select.POLLIN)
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if poll.poll(DRAIN_S * 1000):
                return
    finally:
        os.close(process)
