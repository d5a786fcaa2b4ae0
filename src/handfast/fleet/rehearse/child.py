"""One process and all that it starts, in a session of its own, which is ended as a group."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

__all__ = ["Child", "tail", "undisturbed"]

GRACE_S: Final = 5.0  # how long a process that was killed may take to be gone
LINES: Final = 5
LINE: Final = 300
NEAR_THE_END: Final = 1 << 16  # bytes


class Child:
    """A process that was started, and is in the list ``among`` until it was ended.

    What it says is added to the files ``out`` and ``err``. Raises OSError, and ValueError for
    arguments that no program can be given.
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
        """Wait until it ended by itself, and say whether it did. It is not reaped yet."""
        watch = select.poll()
        watch.register(self._fd, select.POLLIN)
        return bool(watch.poll(max(0.0, seconds) * 1000))

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
        return self._process.returncode or 0


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
    """The last lines of a file, none of them blank, each cut to a length."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - NEAR_THE_END))
        lines = file.read().decode(errors="replace").splitlines()
    return tuple(line.strip()[:LINE] for line in lines if line.strip())[-LINES:]
