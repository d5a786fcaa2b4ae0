"""The processes of a run, children of children and agents too: found by a mark, and accounted.

The mark is a variable of the environment, which every process that is started here inherits, and
an agent that left its parents still has.
"""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Sampler", "as_installed", "is_agent", "mark", "marked", "scratch", "written"]

_NAME = "HANDFAST_BENCHMARK"
PATIENCE_S = 20.0


def mark() -> None:
    """Mark all that this process starts from now on."""
    os.environ.setdefault(_NAME, secrets.token_hex(8))


def as_installed(place: Path) -> None:
    """Let all that this process starts keep compiled files, as an installation has them."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(place.absolute())


def marked() -> list[int]:
    """Give the process ids of what was started under our mark and has not ended."""
    word = f"{_NAME}={os.environ[_NAME]}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            with suppress(OSError):  # it has just ended, or is somebody else's
                if word in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
    return found


def is_agent(pid: int) -> bool:
    """Say whether a process is an agent of handfast's."""
    with suppress(OSError):
        return b"handfast.agent" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """Give a new directory below ``home``; its agents have ended before it goes."""
    with tempfile.TemporaryDirectory(prefix="handfast-bench-", dir=home) as place:
        try:
            yield Path(place)
        finally:
            _await_end()


def _await_end() -> None:
    """Wait for the agents under our mark to end by themselves; then end those that did not."""
    deadline = time.monotonic() + PATIENCE_S
    while left := [pid for pid in marked() if is_agent(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def written() -> int:
    """Bytes that the marked processes and this one have caused to be written to disks so far."""
    return sum(_table(pid, "io").get("write_bytes", 0) for pid in {*marked(), os.getpid()})


class Sampler:
    """Memory of the marked processes, sampled: ``samples`` are (CLOCK_MONOTONIC, bytes).

    Bytes are anonymous pages and shared ones; a page that several processes map counts once (the
    kernel's Pss), and so does one of a memfd that is held and not mapped. The page cache is not in
    it.
    """

    PAUSE_S = 0.01
    LOOK_S = 0.25

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._peaks: dict[int, tuple[float, int]] = {}
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[Sampler]:
        """Sample while the block runs."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        pids, looked = marked(), time.monotonic()
        while not self._over.wait(self.PAUSE_S):
            now = time.monotonic()
            if now - looked > self.LOOK_S:
                pids, looked = marked(), now
            self.samples.append((now, _memory(pids)))
            for pid in pids:
                first, before = self._peaks.get(pid, (now, 0))
                self._peaks[pid] = first, max(before, _table(pid, "status").get("VmHWM", 0))

    def peak(self, since: float, until: float) -> int:
        """Give the most bytes of a sample within two times, or else of the first one after them.

        Raises ValueError if there is none.
        """
        within = [size for at, size in self.samples if since <= at <= until]
        return max(within or [size for at, size in self.samples if at > until][:1])

    def resident(self, since: float) -> int:
        """Add up the most that each process which came after a time had resident (VmHWM)."""
        return sum(peak for first, peak in self._peaks.values() if first > since)


def _memory(pids: list[int]) -> int:
    tables = [_table(pid, "smaps_rollup") for pid in pids]
    mapped = sum(table.get("Pss_Shmem", 0) for table in tables)
    held = sum({inode: size for pid in pids for inode, size in _memfds(pid)}.values())
    return sum(table.get("Pss_Anon", 0) for table in tables) + max(mapped, held)


def _memfds(pid: int) -> Iterator[tuple[int, int]]:
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            if os.readlink(path).startswith("/memfd:"):
                found = os.stat(path)
                yield found.st_ino, found.st_blocks * 512


def _table(pid: int, name: str) -> dict[str, int]:
    """Read ``/proc/PID/name``: sizes in bytes by their names; empty for a process that is gone."""
    found = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            key, _, rest = line.partition(":")
            words = rest.split()
            if words and words[0].isdecimal():
                found[key] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found
