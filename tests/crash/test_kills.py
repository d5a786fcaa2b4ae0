"""Shows what a SIGKILL at any system call of a save, a recovery and a release leaves: model P.

The kernel goes on, and writes what it was given: nothing here says anything of power losses.
A real process on real files is killed as it enters its k-th call of each kind, by strace, for
every k; then the real code opens what it left. Nothing attested is gone or torn, and the next
life goes on.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest

from handfast.testing.faults import Hasty

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="there is no strace")
DEEDS = ("save", "recover", "release")
SAMPLE = 15  # kills a deed in `make test`


class Victims:
    """The process that forks them, and its answers."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("victims.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self.lives = 0

    def live(self, deed: str, *trace: str) -> tuple[str, tuple[object, ...], str]:
        """Let one live under strace: (where, what it was told, what strace wrote)."""
        self.lives += 1
        root = f"{self.scratch}/{self.lives}"
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(f"{deed} {root}\n".encode())
        told = []
        log = self.scratch / "strace"
        while (line := self.server.stdout.readline().strip()) != b"ended":
            assert line, "the victims' parent has ended"
            if line.startswith(b"ready "):
                tracer = self._trace(int(line.split()[1]), log, trace)
            else:
                told.append(pickle.loads(bytes.fromhex(line.decode())))
        tracer.wait(20)
        return root, tuple(told), log.read_text()

    def _trace(self, pid: int, log: Path, trace: tuple[str, ...]) -> subprocess.Popen[bytes]:
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)  # or it would be told to go on before it has stopped
        argv = ["strace", "-f", "-o", str(log), "-p", str(pid), *trace]
        tracer = subprocess.Popen(argv, stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        with tracer.stderr as said:
            assert b"attached" in said.readline()
        os.kill(pid, signal.SIGCONT)
        return tracer

    def end(self) -> None:
        """Let the parent go."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(10)
        assert self.server.stdout is not None
        self.server.stdout.close()


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[Victims]:
    """Victims of one test."""
    made = Victims(tmp_path)
    yield made
    made.end()


def calls(victims: Victims, deed: str) -> list[tuple[str, int]]:
    """Every system call of a deed, by its name and how many of that name it is the last of."""
    root, _, log = victims.live(deed, "-e", "trace=all", "-e", "signal=none")
    shutil.rmtree(root)
    names = Counter(re.findall(r"^\d+ +(\w+)\(", log, re.MULTILINE))
    names.pop("exit_group", None)
    return [(name, k) for name, count in sorted(names.items()) for k in range(1, count + 1)]


def kill_at(victims: Victims, deed: str, name: str, k: int) -> bool:
    """Kill a victim at its k-th call of a name, and judge what it left; says whether it died."""
    kill = f"inject={name}:signal=SIGKILL:when={k}"
    root, told, log = victims.live(deed, "-e", f"trace={name}", "-e", kill)
    with lab.small_world():
        lab.judge(Hasty(), told, goes_on=True, root=root)
    shutil.rmtree(root)
    return "+++ killed by SIGKILL +++" in log


@pytest.mark.parametrize("deed", DEEDS)
def test_a_process_may_be_killed_at_many_of_its_calls(deed: str, victims: Victims) -> None:
    """Shows it for some of all calls, from the first to the last."""
    every = calls(victims, deed)
    chosen = every[:: max(1, len(every) // SAMPLE)]
    died = [kill_at(victims, deed, name, k) for name, k in chosen]
    print(f"{deed}: {len(every)} system calls, {sum(died)} kills")
    assert sum(died) >= len(chosen) - 2  # how often memory is asked for varies a little


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("deed", DEEDS)
def test_a_process_may_be_killed_at_every_call(deed: str, victims: Victims) -> None:
    """Shows it for every call."""
    every = calls(victims, deed)
    died = [kill_at(victims, deed, name, k) for name, k in every]
    print(f"{deed}: {len(every)} system calls, {sum(died)} kills")
    assert sum(died) >= len(every) * 0.95
