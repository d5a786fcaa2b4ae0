"""How an agent stays out of the training's way: below it on the processor, and within limits."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from handfast.errors import HandfastError
from handfast.store.files import Posix

__all__ = ["Manners", "Paced", "Pacer"]

logger = logging.getLogger(__name__)

NICE: Final = 5
SMALL: Final = 256 << 10
"""Writes of fewer bytes go at once: a vote does not wait behind an image."""
SPAN: Final = re.compile(r"(\d+)(?:-(\d+))?")


class Manners(NamedTuple):
    """``nice`` is added to the process's own niceness, by which Linux also orders its input and
    output; ``rate`` is the most bytes a second to write, if any; ``cpus`` are those to run on.
    """

    nice: int = NICE
    rate: float | None = None
    cpus: frozenset[int] | None = None

    @classmethod
    def told(cls) -> Manners:
        """Read HANDFAST_NICE, HANDFAST_WRITE_MBPS and HANDFAST_CPUS.

        Raises HandfastError, naming the variable, for what means nothing.
        """
        return cls(_nice(), _rate(), _cpus())

    def keep(self) -> None:
        """Let this process, and all threads that it starts from now on, be so."""
        os.nice(self.nice)
        # where sessions are scheduled as groups, a process is nice only within its own
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
            file.write(str(min(19, os.nice(0))))
        if self.cpus is not None:
            try:
                os.sched_setaffinity(0, self.cpus)
            except OSError as error:
                logger.warning("HANDFAST_CPUS is ignored: %s", error)

    def files(self) -> Posix:
        """Files whose writes keep to the limit."""
        return Posix() if self.rate is None else Paced(Pacer(self.rate))


class Pacer:
    """Lets so many bytes pass a second, over time; several threads share it."""

    def __init__(
        self,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = rate
        self._clock, self._sleep = clock, sleep
        self._free = clock()  # when all that was let pass will have taken its time
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        """Wait until it is this many bytes' turn."""
        with self._lock:
            now = self._clock()
            start = max(now, self._free)
            self._free = start + nbytes / self._rate
        if start > now:
            self._sleep(start - now)


class Paced(Posix):
    """The real calls, with images written no faster than a limit."""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write when it is these bytes' turn."""
        if len(data) >= SMALL:
            self._pacer.take(len(data))
        return super().pwrite(fd, data, offset)


def _nice() -> int:
    told = os.environ.get("HANDFAST_NICE") or str(NICE)
    if told.isdecimal() and int(told) <= 19:
        return int(told)
    raise HandfastError(
        f"HANDFAST_NICE={told!r} is no niceness. What to do: set a number from 0 (as the training "
        f"itself) to 19, or leave it unset ({NICE})"
    )


def _rate() -> float | None:
    told = os.environ.get("HANDFAST_WRITE_MBPS")
    if not told:
        return None
    with contextlib.suppress(ValueError):
        if 0 < (rate := float(told)) < float("inf"):
            return rate * 1e6
    raise HandfastError(
        f"HANDFAST_WRITE_MBPS={told!r} is no rate. What to do: set the most megabytes (10^6 bytes) "
        "a second that the agent of a node may write, or leave it unset"
    )


def _cpus() -> frozenset[int] | None:
    told = os.environ.get("HANDFAST_CPUS")
    if not told:
        return None
    spans = [SPAN.fullmatch(part.strip()) for part in told.split(",")]
    found = frozenset(
        cpu for span in spans if span for cpu in range(int(span[1]), int(span[2] or span[1]) + 1)
    )
    if found and all(spans):
        return found
    raise HandfastError(
        f"HANDFAST_CPUS={told!r} is no list of processors. What to do: set one such as 0-3,8 "
        "(those next to the network and the disks, say), or leave it unset"
    )
