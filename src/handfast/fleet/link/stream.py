"""A link over a stream that keeps order, TCP say: a frame that does not fit ends it.

Nothing is sent twice: what a stream does not bring, its end shows. Only a frame of an epoch that
is not taken, or that its codec can't read, is refused and counted and the link goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from handfast.fleet.link.drive import Driver
from handfast.link.end import End
from handfast.link.frame import HEADER, MAX_BODY, LinkError, Reason, read_header
from handfast.link.session import Record

__all__ = ["Stream"]

_PASSED: Final = (Reason.EPOCH, Reason.CODEC)


class Stream(Driver):
    """A link over a connected stream: ``async with Stream(reader, writer, end, store) as link``.

    The body of a frame is read only once its header is right, so a peer makes this end hold at
    most one frame of the bound.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        end: End,
        store: Callable[[Record], None],
    ) -> None:
        super().__init__(end, store, writer.write)
        self._reader = reader
        self._writer = writer
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.fail(None)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _run(self) -> None:
        try:
            await self.begin()
            while True:
                await self._writer.drain()
                await self._next()
        except Exception as error:  # the connection's, the store's, a codec's: all who wait hear it
            self.fail(error)
        finally:
            self._writer.close()

    async def _next(self) -> None:
        head = await self._reader.readexactly(HEADER)
        try:
            header = read_header(head, MAX_BODY)
        except LinkError as error:
            self.end.refused[error.reason] += 1
            raise
        body = await self._reader.readexactly(header.length)
        try:
            for taken in await self.hear(head + body):
                await self.values.put(taken)
        except LinkError as error:
            strange = error.reason is Reason.EPOCH and self.end.switch is None
            if error.reason not in _PASSED or strange:  # no epoch in common: no link
                raise
