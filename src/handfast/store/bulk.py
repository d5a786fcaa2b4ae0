"""Bulk: the bytes of images between memory and files, as fast as the medium takes them.

Several threads move spans of a few MiB at once, and each span is hashed by the thread that moves
it, while it is in the processor's cache. Whole blocks go past the page cache where the file system
allows: that would cost a second copy of each byte, and would push out what the training has there.
"""

import errno
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from handfast.store.files import Files, closing, read_into, reading, write_all
from handfast.store.image import BLOCK

__all__ = ["Count", "Held", "Scratch", "Source", "Span", "Tap", "draw", "pour", "share_out", "tap"]

Item = TypeVar("Item")


class Span(NamedTuple):
    """Bytes ``start`` to ``end`` of an image, which lie at byte ``at`` of a file."""

    start: int
    end: int
    at: int


@runtime_checkable
class Source(Protocol):
    """An image's bytes, wherever they are."""

    def lend(self, span: Span) -> AbstractContextManager[memoryview]:
        """Lend some of them, until the context ends. Several threads may ask at once."""


class Held:
    """An image that is in memory, whole."""

    def __init__(self, image: memoryview) -> None:
        self._image = image

    def lend(self, span: Span) -> AbstractContextManager[memoryview]:
        """See the port."""
        return self._image[span.start : span.end]


def share_out(work: Callable[[Item], None], items: Sequence[Item], lanes: int) -> None:
    """Do some work for each item: in their order, or by so many threads at once.

    Raises the first error of a thread once all have stopped; what was not begun by then never is.
    """
    if min(lanes, len(items)) <= 1:
        for item in items:
            work(item)
        return
    failed = threading.Event()

    def do(item: Item) -> None:
        if failed.is_set():
            return
        try:
            work(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(min(lanes, len(items)), "lane") as pool:
        for _ in pool.map(do, items):
            pass


def pour(
    files: Files,
    fd: int,
    image: Source,
    spans: Sequence[Span],
    each: Callable[[Span, memoryview], None],
) -> None:
    """Write spans of an image into a new file, and do something with each while it is at hand.

    All but the last one end with a whole block. Raises OSError; nothing is synced.
    """
    nbytes = max(span.at + span.end - span.start for span in spans)
    files.allocate(fd, nbytes)
    direct = files.direct(fd, True)
    tails: list[tuple[bytes, int]] = []

    def move(span: Span) -> None:
        with image.lend(span) as block:
            each(span, block)
            odd = len(block) % BLOCK if direct else 0
            if odd:  # no whole block: it goes through the cache, behind all others
                tails.append((bytes(block[-odd:]), span.at + len(block) - odd))
            write(block[: len(block) - odd], span.at)

    def write(block: memoryview, at: int) -> None:
        try:
            write_all(files, fd, block, at)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            files.direct(fd, False)  # not from this memory, or not after all
            write_all(files, fd, block, at)

    share_out(move, spans, files.lanes)
    if tails:
        files.direct(fd, False)
        for tail, at in tails:
            write_all(files, fd, tail, at)


class Tap(NamedTuple):
    """A data file that is read, open once through the page cache, and once past it if `past`."""

    path: str
    fd: int
    past: int | None = None


def tap(
    files: Files, stack: ExitStack, path: str, *, past: bool = False, medium: bool = False
) -> Tap:
    """Open a data file until the stack ends.

    With `past`, what is not nearly all in the page cache is read past it, where the file system
    has such a way. With `medium` nothing is left in the cache, as far as the system drops it: what
    is read is what the medium holds. Raises HandfastError; Damaged where the file is gone.
    """
    with reading(path):
        fd = stack.enter_context(closing(files, files.open(path)))
        if medium:
            files.forget(fd)
        if medium or (past and not files.cached(fd)):  # a page that is mapped is never dropped
            second = stack.enter_context(closing(files, files.open(path)))
            if files.direct(second, True):
                return Tap(path, fd, second)
    return Tap(path, fd)


def draw(files: Files, source: Tap, into: memoryview, offset: int) -> int:
    """Fill a buffer as far as the file goes, past the cache where the tap does; returns the count.

    Past the cache, the buffer and the offset begin on a block's boundary. Raises OSError.
    """
    whole = 0
    if source.past is not None:
        try:
            whole = read_into(files, source.past, into[: len(into) // BLOCK * BLOCK], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # that is: not from here, or not after all
                raise
    return whole + read_into(files, source.fd, into[whole:], offset + whole)


class Count:
    """Bytes that several threads have moved, told to whoever wants to hear: done, and in all."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._done = total, 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count so many more."""
        if self._progress is not None:
            with self._lock:  # so that it only rises, and is called by one thread at a time
                self._done += nbytes
                self._progress(self._done, self._total)


class Scratch:
    """Buffers for what is read to be looked at: one a thread, each made once and used again."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    @contextmanager
    def lend(self) -> Iterator[memoryview]:
        """Lend a buffer, which begins on a block's boundary."""
        with self._lock:
            buffer = self._free.pop() if self._free else memoryview(mmap.mmap(-1, self._nbytes))
        try:
            yield buffer
        finally:
            with self._lock:
                self._free.append(buffer)
