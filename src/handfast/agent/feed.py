"""An image that comes piece by piece, through a window of memory that is smaller than itself.

The writer asks for the bytes that it wants, in its threads; the trainer is told, in its calls, what
is wanted and where to put it, and says what is there. So a trainer that has no memory for a second
state waits in its save for the disk, and needs some pieces only.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

from handfast.errors import SaveFailed
from handfast.store.bulk import Span

__all__ = ["Feed", "Want"]


WORD_S: Final = 1.0
"""Seconds after which a trainer hears from its agent, whether a piece is wanted or not."""


class Want(NamedTuple):
    """Bytes ``start`` to ``end`` of the image, to be put at byte ``at`` of the window."""

    at: int
    start: int
    end: int


class Feed:
    """Fills :class:`handfast.store.bulk.Source` from a trainer's window of whole pieces.

    ``lend`` is for the writer's threads, all else for the loop in which it was made.
    """

    def __init__(self, window: memoryview, piece: int) -> None:
        self.key = os.urandom(8).hex()
        """Tells what this one was given from what another was."""
        self._window, self._piece = window, piece
        self._free = list(range(0, len(window) - piece + 1, piece))
        if not self._free:
            raise ValueError(f"a window of {len(window)} bytes for pieces of {piece}")
        self._wanted: list[Want] = []
        self._there: set[int] = set()
        self._over = ""
        self._change = threading.Condition()
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()

    @contextmanager
    def lend(self, span: Span) -> Iterator[memoryview]:
        """Wait for a piece. Raises SaveFailed once no more will come."""
        size = span.end - span.start
        if size > self._piece:
            raise ValueError(f"{size} bytes in pieces of {self._piece}")
        with self._change:
            self._change.wait_for(lambda: self._free or self._over)
            self._go_on()
            at = self._free.pop()
            self._wanted.append(Want(at, span.start, span.end))
            self._loop.call_soon_threadsafe(self._asked.set)
            self._change.wait_for(lambda: at in self._there or self._over)
            self._go_on()
            self._there.remove(at)
        try:
            yield self._window[at : at + size]
        finally:
            with self._change:
                self._free.append(at)
                self._change.notify_all()

    def _go_on(self) -> None:
        if self._over:
            raise SaveFailed(self._over)

    async def wanted(self, there: Sequence[int]) -> list[Want]:
        """Hear what is there, and wait for what is wanted next.

        Nothing, once all was taken, and where nothing is for a while: a disk may be slow, and
        whoever waits is to know that this agent is not.
        """
        with self._change:
            self._there.update(there)
            self._change.notify_all()
        while True:
            try:
                await asyncio.wait_for(self._asked.wait(), WORD_S)
            except TimeoutError:
                return []
            with self._change:
                if self._over:
                    return []
                self._asked.clear()  # it may have been set for what was found by then
                found, self._wanted = self._wanted, []
            if found:
                return found

    def end(self, why: str) -> None:
        """Let nobody wait for another piece: all is taken, or the trainer has gone."""
        with self._change:
            self._over = why
            self._wanted.clear()
            self._change.notify_all()
        self._asked.set()
