"""One process and all that it starts, in a session of its own, which is ended as a group.

What it says goes to a file, and not through a pipe: nobody has to read it, and who outlives the
process may go on writing. So that a flood does not fill the disk, whoever waits looks at the files
meanwhile, and empties one that has grown too long. Its end is put beside it, and not back into it:
what the process says meanwhile would stand before that, and may be its last words.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

__all__ = ["MOST", "Child", "tail", "undisturbed"]

MOST: Final = 16 << 20
"""A file of what is said is emptied once it has more bytes, and its end is put beside it."""

GRACE_S: Final = 5.0  # how long a process that was killed may take to be gone
LINES: Final = 5
LINE: Final = 300
NEAR_THE_END: Final = 1 << 16  # bytes
BEFORE: Final = ".before"  # added to a file's name: its end when it was last emptied
LOOK_S: Final = 0.05  # from one look at what is said to the next


class Child:
    """A process that was started, and is in the list ``among`` until it was ended.

    What it says is added to the files ``out`` and ``err``. ``flooded``: one of them had more than
    :data:`MOST` bytes. Raises OSError, and ValueError for arguments that no program can be given.
    """

    def __init__(
        self,
        argv: Sequence[str],
        among: list[Child],
        *,
        env: Mapping[str, str],
        cwd: str,
        out: str,
        err: str,
    ) -> None:
        self._among = among
        self._fd = -1
        self.out, self.err = out, err
        self.flooded = False
        with open(out, "ab") as said, open(err, "ab") as complained, undisturbed():
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=complained,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
            among.append(self)
            self._fd = os.pidfd_open(self._process.pid)

    def wait(self, seconds: float) -> bool:
        """Wait until it ended by itself, and say whether it did. It is not reaped yet.

        Meanwhile none of those that it is among fills the disk with what it says.
        """
        watch = select.poll()
        watch.register(self._fd, select.POLLIN)
        until = time.monotonic() + seconds
        while not watch.poll(max(0.0, min(LOOK_S, until - time.monotonic())) * 1000):
            for each in self._among:
                each._shorten()
            if time.monotonic() >= until:
                return False
        return True

    def ask_to_stop(self) -> None:
        """SIGTERM to its group. Its number is nobody else's: it is reaped by :meth:`end` alone."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def end(self) -> int:
        """SIGKILL its group, whatever is left of it; gives how it ended, as Popen has it."""
        with undisturbed():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # it hangs within the kernel
                self._process.wait(GRACE_S)
            if self._fd >= 0:
                os.close(self._fd)
            self._among.remove(self)
            self._shorten()
        return self._process.returncode or 0

    def _shorten(self) -> None:
        """Empty a file that is too long, and put its end beside it; who writes there goes on."""
        with suppress(OSError):  # it is a program's to remove, and a full disk has no room for more
            for path in (self.out, self.err):
                if os.path.getsize(path) > MOST:
                    self.flooded = True
                    end = _end(path)
                    os.truncate(path, 0)
                    with open(f"{path}{BEFORE}", "wb") as file:
                        file.write(end)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and its like wait for the end of the body: what it starts must not be lost."""
    if threading.current_thread() is not threading.main_thread():  # it hears none
        yield
        return
    told: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers if callable(signal.getsignal(n))}
    try:
        for number in before:
            signal.signal(number, lambda number, _: told.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in told:
        signal.raise_signal(late)


def tail(path: str) -> tuple[str, ...]:
    """The last lines of a file of what was said, none of them blank, each cut to a length."""
    said = _end(f"{path}{BEFORE}") + b"\n" + _end(path)
    lines = said.decode(errors="replace").splitlines()
    return tuple(line.strip()[:LINE] for line in lines if line.strip())[-LINES:]


def _end(path: str) -> bytes:
    """The end of a file; empty where there is none."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - NEAR_THE_END))
        return file.read(NEAR_THE_END)
    return b""
