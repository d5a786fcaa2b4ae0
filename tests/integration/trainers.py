"""Trainers under a test's control: processes that do, one after another, what they are told.

Each forks from a helper that has torch loaded. A deed is a function of a module of this room; its
first argument is the trainer's :class:`Desk`. What it raises is raised again in the test.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import multiprocessing as mp

from handfast.agent import process

PRELOAD = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "handfast.torch"]

Deed = Callable[..., Any]


class Gone(Exception):
    """The trainer has ended, or does not answer in time."""


class Desk:
    """What a trainer has before it: deeds put their things here."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.warnings: list[str] = []

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no deed has made {name!r} yet")


class Trainer:
    """The test's end of one trainer."""

    def __init__(self, rank: int, size: int, meet: str, env: dict[str, str]) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.rank = rank
        self._pipe, theirs = context.Pipe()
        everything = {**os.environ, **env}
        args = (theirs, rank, size, meet, everything)
        self.process = context.Process(target=_serve, args=args)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid or 0

    def tell(self, deed: Deed, *args: Any, **options: Any) -> None:
        """Let it begin a deed."""
        try:
            self._pipe.send((deed, args, options))
        except OSError as error:
            raise Gone(f"rank {self.rank} has ended") from error

    def hear(self, timeout: float = 60.0) -> Any:
        """What the deed gave; raises what it raised, or Gone."""
        if not self._pipe.poll(timeout):
            raise Gone(f"rank {self.rank} does not answer within {timeout:g} s")
        try:
            failed, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(10)
            raise Gone(f"rank {self.rank} has ended: {self.process.exitcode}") from None
        if not failed:
            return result
        kind, args, fields = result
        error = kind.__new__(kind, *args)
        error.__dict__.update(fields)
        raise error

    def busy(self, seconds: float = 0.0) -> bool:
        """Whether the deed has given nothing yet."""
        return not self._pipe.poll(seconds)

    def do(self, deed: Deed, *args: Any, **options: Any) -> Any:
        """Do a deed and wait for it."""
        self.tell(deed, *args, **options)
        return self.hear()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL, see it end."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.process.join(10)

    def end(self) -> None:
        """Kill it if it is still there."""
        self.kill()
        self._pipe.close()


class Job(list[Trainer]):
    """All ranks of one start."""

    def all(self, deed: Deed, *args: Any, **options: Any) -> list[Any]:
        """Let every rank do a deed at once; gives what each gave."""
        for trainer in self:
            trainer.tell(deed, *args, **options)
        return [trainer.hear() for trainer in self]

    def each_raises(self, deed: Deed, *args: Any, **options: Any) -> list[Exception]:
        """Let every rank do a deed that must fail on each; gives the errors."""
        for trainer in self:
            trainer.tell(deed, *args, **options)
        return [raised_by(trainer) for trainer in self]

    def kill(self) -> None:
        """Kill every rank, all before the first is waited for."""
        for trainer in self:
            if trainer.process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer.pid, signal.SIGKILL)
        for trainer in self:
            trainer.kill()


def raised_by(trainer: Trainer) -> Exception:
    """The error that a trainer's deed ends with."""
    try:
        result = trainer.hear()
    except Gone:
        raise
    except Exception as error:
        return error
    raise AssertionError(f"rank {trainer.rank} raised nothing and gave {result!r}")


def _serve(pipe: Connection, rank: int, size: int, meet: str, env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.setpgid(0, 0)
    desk = Desk(rank, size)
    _prepare(desk, meet)
    while True:
        try:
            deed, args, options = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (False, deed(desk, *args, **options))
        except Exception as error:
            answer = (True, (type(error), error.args, dict(error.__dict__)))
        try:
            pipe.send(answer)
        except Exception as error:  # what can't be sent is said
            pipe.send((True, (RuntimeError, (f"{answer!r}: {error!r}",), {})))


def _prepare(desk: Desk, meet: str) -> None:
    """Two cores are shared by all; warnings of handfast's are kept for the test to read."""
    import logging

    import torch

    torch.set_num_threads(1)
    errors = Path(meet).parent / f"stderr.{desk.rank}"
    sys.stderr = errors.open("a", buffering=1)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            desk.warnings.append(record.getMessage())

    logging.getLogger("handfast").addHandler(Keep(logging.WARNING))
    if desk.size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=desk.rank, world_size=desk.size
        )


class Launcher:
    """Starts jobs on nodes that are only names, and ends everything that it started."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.starts = 0
        self.trainers: list[Trainer] = []

    def start(self, ranks: int, nodes: int, env: dict[str, str]) -> Job:
        """Start the ranks of one job, ``ranks / nodes`` on each node."""
        self.starts += 1
        meet = str(self.home / f"meet-{self.starts}-{secrets.token_hex(4)}")
        each = ranks // nodes
        job = Job()
        for rank in range(ranks):
            place = {
                "LOCAL_RANK": str(rank % each),
                "LOCAL_WORLD_SIZE": str(each),
                "HANDFAST_NODE": f"node{rank // each}",
                "HANDFAST_BIND": "127.0.0.1",
            }
            job.append(Trainer(rank, ranks, meet, place | env))
        self.trainers += job
        return job

    def end(self) -> None:
        """Leave nothing behind."""
        for trainer in self.trainers:
            trainer.end()
        end_agents()


def agents(node: str = "") -> list[int]:
    """The agents that this test has started and that are still there; of one node, or of all."""
    wanted = {f"HANDFAST_TEST_ID={os.environ['HANDFAST_TEST_ID']}".encode()}
    if node:
        wanted.add(f"HANDFAST_NODE={node}".encode())
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            variables = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has just ended
            continue
        agent = b"handfast.agent" in command or b"held_agent.py" in command
        if agent and wanted <= variables and state not in "ZX":
            found.append(pid)
    return found


def end_agents() -> None:
    """Kill every agent of this test, stopped ones too."""
    for pid in agents():
        os.kill(pid, signal.SIGKILL)


class HeldAgent:
    """The agent of a run on one node, with a disk that stops when the test says so."""

    def __init__(self, home: Path, path: str, node: str = "node0") -> None:
        self._file = home / f"held-{node}"
        log = str(home / f"held-{node}.log")
        argv = (sys.executable, str(Path(__file__).with_name("held_agent.py")))
        before = os.environ.get("HANDFAST_NODE")
        os.environ |= {"HELD_AGENT": str(self._file), "HANDFAST_NODE": node}
        try:
            with process.connect_or_start(f"{path}\n{node}", log, argv=argv) as client:
                self.pid = client.agent_pid
        finally:
            os.environ.pop("HANDFAST_NODE")
            if before is not None:
                os.environ["HANDFAST_NODE"] = before

    def hold(self, call: str, path: str = "") -> None:
        """From now on let this call wait, on paths that contain ``path``."""
        self._file.with_suffix(".reached").unlink(missing_ok=True)
        whole = self._file.with_suffix(".new")
        whole.write_text(f"{call} {path}")
        whole.rename(self._file)

    def reached(self) -> None:
        """Wait until a call is being held."""
        eventually(self._file.with_suffix(".reached").exists)

    def free(self) -> None:
        """Let everything go on."""
        self._file.unlink()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it; after SIGKILL see it end."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            eventually(lambda: self.pid not in agents())


def at_rest(run: Path) -> None:
    """Wait until a run's directory stays as it is: certificates are published, epochs released."""
    seen: list[Path] = []

    def same() -> bool:
        before = list(seen)
        time.sleep(0.1)
        seen[:] = sorted(run.rglob("*"))
        return seen == before

    eventually(same)


def eventually(ready: Callable[[], object], limit: float = 30.0) -> None:
    """Wait until something is so; fails where it never is."""
    deadline = time.monotonic() + limit
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {limit:g} s")
        time.sleep(0.01)
