"""A link over UDP, which loses, doubles and reorders: one peer a socket.

The handshake and the words of a change are sent again until the peer shows that it heard them.
**Data is not**: a value that is lost stays lost, and what takes its place is the application's to
say. Each value is taken at most once. What is not taken ``patience`` ticks after the peer has named
its last old frame is given up, so that a change goes on. Nothing that is refused ends the link,
but for a later life of the peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from handfast.fleet.link.drive import ROOM, Driver
from handfast.link.end import End
from handfast.link.frame import HEADER, KIND_AT, Kind, LinkError, Reason
from handfast.link.session import Record

__all__ = ["TICK_S", "Address", "Datagram"]

TICK_S: Final = 0.25
"""How often what was not heard is said again, in seconds."""

LARGEST: Final = 65_507 - HEADER
"""The most bytes of data in a datagram over IPv4 (RFC 791, RFC 768)."""

Address: TypeAlias = tuple[Any, ...]


class Datagram(Driver, asyncio.DatagramProtocol):
    """A link over one UDP socket: ``async with Datagram(end, store, local=…, peer=…) as link``.

    A listener leaves ``peer`` out. It answers a handshake where that came from; once the link is
    open, both ends speak to where the last frame of its session came from, which nobody else can
    have sent. Who shakes hands anew does so in a new life: the peer holds on to the old one else.
    """

    def __init__(
        self,
        end: End,
        store: Callable[[Record], None],
        *,
        local: Address = ("127.0.0.1", 0),
        peer: Address | None = None,
        tick_s: float = TICK_S,
        patience: int = 4,
    ) -> None:
        super().__init__(end, store, self._write)
        end.most = min(end.most, LARGEST)
        self._dials = peer is not None
        self._local = local
        self._peer = peer
        self._tick_s = tick_s
        self._patience = patience
        self._frames: asyncio.Queue[tuple[bytes, Address]] = asyncio.Queue(ROOM)
        self._transport: asyncio.DatagramTransport | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def address(self) -> Address:
        """Where this end listens."""
        transport = self._transport
        if transport is None:
            raise RuntimeError("not open: enter it by `async with`")
        address: Address = transport.get_extra_info("sockname")
        return address

    def datagram_received(self, data: bytes, address: Address) -> None:
        """Hold a datagram until its turn; where there is no room, it is as if it were lost."""
        try:
            self._frames.put_nowait((data, address))
        except asyncio.QueueFull:
            self.end.refused[Reason.FULL] += 1

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=self._local
        )
        self._tasks = [asyncio.create_task(part()) for part in (self._listen, self._repeat)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.fail(None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._transport is not None:
            self._transport.close()

    def _write(self, frame: bytes) -> None:
        if self._transport is not None and self._peer is not None:
            self._transport.sendto(frame, self._peer)

    async def _listen(self) -> None:
        try:
            await self.begin()
            while True:
                await self._next(*await self._frames.get())
        except Exception as error:  # a later life, the store's, a codec's: all who wait hear it
            self.fail(error)

    async def _next(self, data: bytes, address: Address) -> None:
        before = self._peer
        if not self._dials and not self._opened.is_set():  # a handshake may be anybody's, or old
            self._peer = address
        try:
            taken = await self.hear(data)
        except LinkError as error:
            self._peer = before
            if error.reason is Reason.ANEW:
                raise
            return
        if data[KIND_AT] >= Kind.WORD:
            self._peer = address
        for each in taken:
            if self.values.full():
                self.end.refused[Reason.FULL] += 1
            else:
                await self.arrive(each)

    async def _repeat(self) -> None:
        waited = 0
        while not self._down.is_set():
            await asyncio.sleep(self._tick_s)
            await self._do(self.end.again)
            waited = waited + 1 if self.end.draining else 0
            if waited >= self._patience:
                await self._do(self.end.give_up)
