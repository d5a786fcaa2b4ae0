"""A link over a stream that keeps order, TCP say: a frame that does not fit ends it.

Nothing is sent twice: what a stream does not bring, its end shows. Only a frame of an epoch that
is not taken, or that its codec can't read, is refused and counted and the link goes on.

Whoever closes it says so, and reads on, a moment at the most, until the peer has closed it, too. A
socket that is closed while there is something unread in it resets the connection (RFC 1122,
4.2.2.13), which takes from the peer what it has not read yet: why it was refused, say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from handfast.errors import HandfastError
from handfast.fleet.link.drive import Driver
from handfast.link.end import End
from handfast.link.frame import HEADER, LinkError, Reason, read_header
from handfast.link.session import Record

__all__ = ["PARTING_S", "Stream"]

PARTING_S: Final = 2.0
"""How long the end that closes waits for the peer to close it, too, in seconds."""

PIECE: Final = 1 << 16  # bytes that are let go at a time
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
            await self._task

    async def _run(self) -> None:
        listening = asyncio.create_task(self._listen())
        await self._down.wait()
        listening.cancel()
        await asyncio.wait([listening])
        await self._part()

    async def _listen(self) -> None:
        try:
            await self.begin()
            while True:
                await self._writer.drain()
                await self._next()
        except asyncio.IncompleteReadError:
            self.fail(HandfastError("the peer closed it"))
        except ConnectionError as error:  # so did its system: it died, say
            self.fail(HandfastError(f"the peer closed it ({error})"))
        except Exception as error:  # the connection's, the store's, a codec's: all who wait hear it
            self.fail(error)

    async def _part(self) -> None:
        """Close, when the peer has heard all that was said; what still comes is let go."""
        try:
            async with asyncio.timeout(PARTING_S):
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                    while await self._reader.read(PIECE):
                        pass
                self._writer.close()
                await self._writer.wait_closed()
        except OSError:  # it hears nothing any more
            self._writer.transport.abort()

    async def _next(self) -> None:
        head = await self._reader.readexactly(HEADER)
        try:
            header = read_header(head, self.end.bound)
        except LinkError as error:
            self.end.refused[error.reason] += 1
            raise
        body = await self._reader.readexactly(header.length)
        try:
            for taken in await self.hear(head + body):
                await self.arrive(taken)
        except LinkError as error:
            strange = error.reason is Reason.EPOCH and self.end.switch is None
            if error.reason not in _PASSED or strange:  # no epoch in common: no link
                raise
