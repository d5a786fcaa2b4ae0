"""What the hardware can do: bytes written past the page cache and synced, and bytes read.

A few threads, large aligned spans of touched memory, a file that is laid out beforehand. Where a
file system refuses O_DIRECT the page cache is used, and :attr:`Disk.how` says so.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Disk", "forget", "remember"]

THREADS = 4
SPAN = 8 << 20


class Disk:
    """One file of a disk, as long as a piece of memory, whole pages."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self._memory = path, memory
        self._direct = _takes_direct(path)
        self.how = "O_DIRECT" if self._direct else "page cache: O_DIRECT is refused here"

    def write(self) -> None:
        """Write a new file, sync it, and its directory."""
        self.path.unlink(missing_ok=True)
        with _opened(self.path, os.O_RDWR | os.O_CREAT | self._direct) as fd:
            os.posix_fallocate(fd, 0, len(self._memory))
            self._spread(lambda span, at: os.pwrite(fd, span, at))
            os.fsync(fd)
        with _opened(self.path.parent, os.O_RDONLY) as fd:
            os.fsync(fd)

    def read(self) -> None:
        """Read it through the page cache."""
        with _opened(self.path, os.O_RDONLY) as fd:
            self._spread(lambda span, at: os.preadv(fd, [span], at))

    def read_direct(self) -> None:
        """Read it past the page cache."""
        with _opened(self.path, os.O_RDONLY | self._direct) as fd:
            self._spread(lambda span, at: os.preadv(fd, [span], at))

    def _spread(self, move: Callable[[memoryview, int], int]) -> None:
        whole = memoryview(self._memory)

        def one(at: int) -> None:
            span = whole[at : at + SPAN]
            if (moved := move(span, at)) != len(span):
                raise OSError(f"{self.path}: {moved} of {len(span)} bytes at {at}")

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, range(0, len(whole), SPAN)))


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _takes_direct(path: Path) -> int:
    """Give the flag, or 0 where the file system does not know it."""
    try:
        with _opened(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT):
            return os.O_DIRECT
    except OSError:
        return 0


def forget(home: Path) -> None:
    """Write out and drop every page that is cached of the files below a directory."""
    for path in home.rglob("*"):
        if path.is_file():
            with _opened(path, os.O_RDONLY) as fd:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def remember(home: Path) -> None:
    """Read every file below a directory, so that the page cache has it."""
    piece = memoryview(bytearray(SPAN))
    for path in home.rglob("*"):
        if path.is_file():
            with _opened(path, os.O_RDONLY) as fd:
                while os.readv(fd, [piece]):
                    pass
