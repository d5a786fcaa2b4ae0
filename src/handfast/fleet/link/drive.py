"""What a stream and a datagram transport have in common: doing an end's effects, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from handfast.core.lattice import Epoch
from handfast.errors import HandfastError, Refused
from handfast.link.end import Effect, End, Opened, Taken
from handfast.link.session import Persist, Record, Send
from handfast.link.switch import Spoken

__all__ = ["ROOM", "Driver"]

ROOM: Final = 256
"""How many frames, or values that nobody took yet, a transport holds."""


class Driver:
    """Does what an end asks for: one thing at a time, and nothing before what must be durable.

    ``store`` makes a record durable before it returns; it runs in a thread. What it raises ends
    the link. ``put`` gives one frame to the wire.
    """

    def __init__(
        self, end: End, store: Callable[[Record], None], put: Callable[[bytes], None]
    ) -> None:
        self.end = end
        self.error: Exception | None = None
        """Why the link is down; None while it is not, or where it was closed here."""
        self.values: asyncio.Queue[Taken] = asyncio.Queue(ROOM)
        self._store = store
        self._put = put
        self._turn = asyncio.Lock()
        self._opened = asyncio.Event()
        self._through = asyncio.Event()  # the link is open, and no change is asked for
        self._down = asyncio.Event()
        self._came = asyncio.Event()  # a value, since somebody looked
        self._asking: set[asyncio.Task[Any]] = set()

    async def begin(self) -> None:
        """Begin the handshake."""
        await self._do(self.end.begin)

    async def opened(self) -> None:
        """Wait until the handshake is done. Raises HandfastError where the link goes down."""
        await self._unless_down(self._opened.wait())

    async def send(self, value: Any) -> None:
        """Send a value under the epoch that is spoken; see :meth:`End.send`."""
        self._must_be_up()
        await self._do(lambda: self.end.send(value))

    async def change(self, to: Spoken) -> None:
        """Ask for a change of epoch, which goes on by itself; see :meth:`End.change`.

        Raises Refused, too, where the peer has asked for this number with another digest. Then
        nothing is recorded, and the link is as it was.
        """
        self._must_be_up()
        # who gives up waiting has asked all the same: half of it would be in the way for ever
        asking = asyncio.ensure_future(self._do(lambda: self._ask(to)))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        await asyncio.shield(asking)

    async def changed(self) -> None:
        """Wait until this end is through with the change that it asked for, if it did.

        It takes the new epoch alone then. The peer may still be on its way, but all that it waits
        for of this end is said. Raises HandfastError where the link goes down before.
        """
        await self._unless_down(self._through.wait())

    async def take(self) -> tuple[Epoch, Any]:
        """Wait for the peer's next value. Raises HandfastError once the link is down."""
        while self.values.empty():
            self._came.clear()
            await self._unless_down(self._came.wait())
        taken = self.values.get_nowait()
        return taken.epoch, taken.value

    async def arrive(self, taken: Taken) -> None:
        """Hold a value until somebody takes it; waits where there is no room."""
        await self.values.put(taken)
        self._came.set()

    async def hear(self, frame: bytes) -> Sequence[Taken]:
        """Give a frame to the end, and what it took of it. Raises LinkError."""
        return await self._do(lambda: self.end.receive(frame))

    def fail(self, error: Exception | None) -> None:
        """Say that the link is down; the first word on why it is counts."""
        if not self._down.is_set():
            self.error = error
            self._down.set()

    def _ask(self, to: Spoken) -> Sequence[Effect]:
        peer = self.end.switch.peer if self.end.switch is not None else None
        theirs = peer.next if peer is not None else None
        if theirs is not None and theirs.epoch == to.epoch and theirs.digest != to.digest:
            raise Refused(
                f"epoch {to.epoch} is bundle {to.digest} here and {theirs.digest[:80]} at the peer",
                verdict=None,
                remedy="ask for what the peer did, or take the link down and give a new number",
            )
        return self.end.change(to)

    async def _do(self, what: Callable[[], Sequence[Effect]]) -> list[Taken]:
        taken = []
        async with self._turn:
            effects = deque(what())
            while effects:
                effect = effects.popleft()
                if isinstance(effect, Persist):
                    await self._write_down(effect.record)
                    effects.extend(self.end.persisted(effect.record))
                elif isinstance(effect, Send):
                    if not self._down.is_set():  # else nobody hears it
                        self._put(effect.frame)
                elif isinstance(effect, Opened):
                    self._opened.set()
                else:
                    taken.append(effect)
            switch = self.end.switch
            if switch is not None and switch.next is None:
                self._through.set()
            else:
                self._through.clear()
        return taken

    async def _write_down(self, record: Record) -> None:
        try:
            await asyncio.to_thread(self._store, record)
        except Exception as error:  # what follows from the record must never be said
            self.fail(error)
            raise

    async def _unless_down(self, wanted: Any) -> Any:
        wait = asyncio.ensure_future(wanted)
        down = asyncio.ensure_future(self._down.wait())
        try:
            await asyncio.wait((wait, down), return_when=asyncio.FIRST_COMPLETED)
            if wait.done():
                return wait.result()
        finally:
            wait.cancel()
            down.cancel()
        return self._must_be_up()

    def _must_be_up(self) -> None:
        if self._down.is_set():
            raise HandfastError(
                f"the link is down: {self.error or 'it was closed'}. What to do: shake hands anew"
            ) from self.error
