"""Shows the rows of the table in docs/survival.md: what dies, and what is left of a training.

The scene is always the same. A trainer has saved step 1, which has converged, and has handed the
image of step 2 over; its agent is writing that image, and its disk has come to a halt. Then
something dies, the disk goes on, and the training is started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from handfast.core.messages import Staged, decode_record
from handfast.store.files import Posix
from handfast.store.shelf import Shelf

ROOM = Path(__file__).parent
TRAINER = str(ROOM.parent / "unit" / "agent" / "plain_trainer.py")
HELD_AGENT = str(ROOM / "held_agent.py")
PLACE = "import sys; from handfast.agent.process import *; print(meeting_place(sys.argv[1]))"
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


class Scene:
    """One node: its trainers, its agent, and a disk that can be halted."""

    def __init__(self, home: Path, root: str) -> None:
        self.root = root
        self.held = home / "held"
        self.env = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(home),
            "PLAIN_KEY": "survival",
            "PLAIN_LOG": str(home / "agent.log"),
            "PLAIN_AGENT": HELD_AGENT,
            "HELD_AGENT": str(self.held),
            "HANDFAST_NODE": "node0",
        }
        self.started: list[subprocess.Popen[str]] = []

    def trainer(
        self, before: Sequence[str] = (), after: Sequence[str] = (), terminal: int = -1
    ) -> subprocess.Popen[str]:
        """A trainer in a session of its own, behind a command or at a terminal."""

        def take_terminal() -> None:
            if terminal >= 0:
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs us may ignore it
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            [*before, sys.executable, TRAINER, self.root, *after],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.env,
            start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509 - this process has one thread here
            pass_fds=(terminal,) if terminal >= 0 else (),
        )
        self.started.append(process)
        assert hear(process) == "ready"
        return process

    def meeting_place(self) -> str:
        """Where trainers and agent meet, found as docs/survival.md says."""
        found = subprocess.run(
            [sys.executable, "-c", PLACE, "survival"],
            env=self.env,
            check=True,
            capture_output=True,
            text=True,
        )
        return found.stdout.strip()

    def halt(self) -> None:
        """Bring the disk to a halt where images are written."""
        self.held.with_suffix(".reached").unlink(missing_ok=True)
        self.held.with_suffix(".new").write_text("pwrite /chunks/")
        self.held.with_suffix(".new").rename(self.held)

    def play(self, process: subprocess.Popen[str]) -> None:
        """Play the scene, up to the moment at which something dies."""
        assert do(process, "restore") == "0/0"
        assert do(process, "save 1") == "1/1"
        assert do(process, "converged 1 1") == "1/1"
        self.halt()
        assert do(process, "save 2") == "1/2"
        until(self.held.with_suffix(".reached").exists)
        assert self.votes() == ["1/1"]

    def go_on(self) -> None:
        """Let the disk go on."""
        self.held.unlink()

    def votes(self) -> list[str]:
        """The epochs that the domain has attested, as its journals say."""
        records = Shelf(Posix(), self.root, "rank-00000").records()
        found = [decode_record(data) for data in records]
        return [str(record.epoch) for record in found if isinstance(record, Staged)]

    def agents(self) -> list[int]:
        """The agents of this scene that live, by their environment."""
        mark = f"HELD_AGENT={self.held}".encode()
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if (
                    b"held_agent.py" in command
                    and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
                ):
                    found.append(pid)
        return found

    def resumes(self, at: str) -> None:
        """Start the training again, and see it resume there, save, and end."""
        process = self.trainer()
        assert do(process, "restore") == at
        generation = self.generation()
        assert do(process, "save 3") == f"{generation}/3"
        assert do(process, f"converged {generation} 3") == f"{generation}/3"
        assert do(process, "close") == "closed"
        until(lambda: not self.agents())  # which ended by itself

    def generation(self) -> int:
        return int((Path(self.root) / "round.json").read_text().split(",")[1])

    def end(self) -> None:
        """Leave nothing behind."""
        self.held.unlink(missing_ok=True)
        for process in self.started:
            process.kill()
            process.wait(30)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        for pid in self.agents():
            os.kill(pid, signal.SIGKILL)


def do(process: subprocess.Popen[str], line: str) -> str:
    """Tell a trainer something, and hear its answer."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return hear(process)


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A node with a short runtime directory; nothing of it is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="hf-") as home:
        found = Scene(Path(home), str(tmp_path / "run"))
        yield found
        found.end()


def test_the_worker_is_killed(scene: Scene) -> None:
    """Shows that an image that was handed over is persisted and attested with its trainer dead."""
    process = scene.trainer()
    scene.play(process)
    process.kill()
    process.wait()
    scene.go_on()
    until(lambda: scene.votes() == ["1/1", "1/2"])
    scene.resumes("1/2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_whole_process_group_is_killed(scene: Scene, number: int) -> None:
    """Shows that the agent is in no launcher's process group: what ends a job leaves it alone."""
    process = scene.trainer(before=["/bin/sh", "-c", '"$0" "$@"; exit 0'])
    scene.play(process)
    os.killpg(process.pid, number)
    process.wait(30)
    until(lambda: len(scene.agents()) == 1)
    scene.go_on()
    until(lambda: scene.votes() == ["1/1", "1/2"])
    scene.resumes("1/2")


def test_the_terminal_hangs_up(scene: Scene) -> None:
    """Shows that closing the window ends the training and not the save."""
    master, slave = os.openpty()
    process = scene.trainer(terminal=slave)
    os.close(slave)
    scene.play(process)
    os.close(master)
    assert process.wait(30) == -signal.SIGHUP
    scene.go_on()
    until(lambda: scene.votes() == ["1/1", "1/2"])
    scene.resumes("1/2")


def test_the_agent_is_killed(scene: Scene) -> None:
    """Shows that training goes on, and that the image, which is in the trainer's memory too, is
    handed to the next agent."""
    process = scene.trainer()
    scene.play(process)
    (agent,) = scene.agents()
    os.kill(agent, signal.SIGKILL)
    scene.go_on()
    assert do(process, "converged 1 2") == "1/2"
    assert do(process, "save 3") == "1/3"
    assert do(process, "converged 1 3") == "1/3"
    assert scene.votes() == ["1/1", "1/2", "1/3"]
    assert agent not in scene.agents()
    assert do(process, "close") == "closed"
    until(lambda: not scene.agents())


@pytest.mark.parametrize("first", ["trainer", "agent"])
def test_trainer_and_agent_are_killed(scene: Scene, first: str) -> None:
    """Shows that only the image that nobody had persisted is lost, and its half is no epoch."""
    process = scene.trainer()
    scene.play(process)
    (agent,) = scene.agents()
    for pid in (process.pid, agent) if first == "trainer" else (agent, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    scene.go_on()
    assert scene.votes() == ["1/1"]
    scene.resumes("1/1")
    assert not list(Path(scene.root).rglob("1-2*"))  # the half image was swept


def test_the_agent_is_told_to_end(scene: Scene) -> None:
    """Shows that SIGTERM waits for the image that is being persisted, and for its vote; training
    goes on with the next agent."""
    process = scene.trainer()
    scene.play(process)
    (agent,) = scene.agents()
    os.kill(agent, signal.SIGTERM)
    time.sleep(0.3)  # far more than an agent that did not wait would need
    assert scene.agents() == [agent]
    scene.go_on()
    until(lambda: agent not in scene.agents())
    assert scene.votes() == ["1/1", "1/2"]
    assert do(process, "converged 1 2") == "1/2"
    assert do(process, "save 3") == "1/3"
    assert do(process, "converged 1 3") == "1/3"
    assert scene.votes() == ["1/1", "1/2", "1/3"]
    assert do(process, "close") == "closed"
    until(lambda: not scene.agents())


def may_make_namespaces() -> bool:
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_make_namespaces(), reason="a PID namespace may not be made here")
def test_the_container_is_gone(scene: Scene) -> None:
    """Shows that with PID 1 of a namespace everything in it dies, the agent too, and that the
    persisted epochs are resumed outside of it; what was not persisted is lost."""
    process = scene.trainer(before=NAMESPACE)
    scene.play(process)
    assert len(scene.agents()) == 1
    process.kill()  # and with it the namespace's PID 1
    process.wait()
    until(lambda: not scene.agents())
    scene.go_on()
    assert scene.votes() == ["1/1"]
    scene.resumes("1/1")


@pytest.mark.skipif(not may_make_namespaces(), reason="a PID namespace may not be made here")
def test_the_container_is_gone_and_the_agent_was_outside(scene: Scene) -> None:
    """Shows that an agent which something else started beforehand is used, by trainers in a PID
    namespace too, and that it outlives that namespace, so that nothing is lost."""
    agent = subprocess.Popen(
        [sys.executable, HELD_AGENT, scene.meeting_place()], env=scene.env, start_new_session=True
    )
    scene.started.append(agent)
    until(Path(scene.meeting_place(), "agent").exists)
    process = scene.trainer(before=NAMESPACE)
    scene.play(process)
    process.kill()
    process.wait()
    assert scene.agents() == [agent.pid]
    scene.go_on()
    until(lambda: scene.votes() == ["1/1", "1/2"])
    scene.resumes("1/2")
    assert agent.wait(30) == 0
