"""A mesh of authenticated connections between the agents of a run, over TCP.

Each is a link gated by epochs (:mod:`handfast.link`): what is said is read under the epoch that it
was said under (:mod:`~handfast.agent.speech`), so an old and a new agent run side by side. A link
carries what is said in order and at most once, and may lose any of it: what is sent while a
link is down or its queue full is dropped, because the protocol sends again by state, not by history
(DESIGN section 2, Edges). A link that comes up is therefore the moment to tell the peer where one
stands, which is what ``on_up`` is for.

Each pair has one connection: the lower id dials, the other waits. Timers decide only when to dial
again and when to give a connection up; whether a peer is reachable says nothing about what it has
persisted or attested, and must change no protocol state.
"""

import asyncio
import errno
import logging
import random
import socket
from collections import Counter, deque
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handfast.agent.speech import CODECS, MAX_SAID, SPOKEN, Said, words_at
from handfast.core.lattice import Epoch
from handfast.errors import HandfastError
from handfast.link.end import Effect, End, Taken
from handfast.link.frame import MAX_BODY, LinkError, Reason, cut
from handfast.link.life import Node
from handfast.link.records import Records
from handfast.link.session import Persist, Send, Session
from handfast.link.switch import Spoken
from handfast.link.trust import Secret

__all__ = ["Address", "Links", "Pace"]

logger = logging.getLogger(__name__)

Address = tuple[str, int]
"""Host and port."""

_READ = 1 << 16
_QUEUE_MESSAGES = 1024
_QUEUE_BYTES = 32 << 20
_SHAKES = 16
"""The most frames of one handshake; two are enough."""
_GREETING = 64
"""The most connections that may stand in the handshake at once: strangers hold no more."""


@dataclass(frozen=True)
class Pace:
    """When timers fire, in seconds. They resend and reconnect; they decide nothing."""

    beat: float = 2.0
    """After so long without a message of ours, a heartbeat is sent."""
    silent: float = 8.0
    """After so long without a byte from the peer, the connection is given up and dialed again."""
    handshake: float = 5.0
    """So long a connection may take to be made, and then to be authenticated."""
    backoff: float = 0.05
    """The first pause before dialing again; doubled each time, between a half and all of it."""
    backoff_most: float = 2.0


class _Link:
    """One authenticated connection to one peer, with what waits to be said on it."""

    def __init__(
        self, end: End, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.end = end
        self.reader = reader
        self.writer = writer
        self.arrived = bytearray()
        self.queue: deque[Said] = deque()
        self.queued = 0
        self.filled = asyncio.Event()

    @property
    def peer(self) -> str:
        """Who is at the other end, proved."""
        return self.end.session.bound.theirs.key

    def offer(self, said: Said) -> bool:
        """Queue what is to be said, unless that would break the bounds."""
        if len(self.queue) >= _QUEUE_MESSAGES or self.queued + len(said.body) > _QUEUE_BYTES:
            return False
        self.queue.append(said)
        self.queued += len(said.body)
        self.filled.set()
        return True

    def put(self, effects: Sequence[Effect]) -> list[Said]:
        """Write the frames of an open link, and give what was taken of the peer's."""
        taken = []
        for effect in effects:
            if isinstance(effect, Send):
                self.writer.write(effect.frame)
            elif isinstance(effect, Taken):
                taken.append(effect.value)
        return taken

    async def pump(self, beat: float) -> None:
        """Send what is queued, and a heartbeat where nothing is; ends with the connection."""
        try:
            while True:
                if self.queue:
                    said = self.queue.popleft()
                    self.queued -= len(said.body)
                    self.put(self.end.send(said))
                else:
                    self.filled.clear()
                    try:
                        async with asyncio.timeout(beat):
                            await self.filled.wait()
                        continue
                    except TimeoutError:
                        self.put(self.end.beat())
                await self.writer.drain()
        finally:
            self.writer.transport.abort()


def _another(error: OSError) -> bool:
    """Tell errors that are not the address's; where several were tried, asyncio gives no number."""
    number = None if isinstance(error, socket.gaierror) else error.errno
    return number not in (None, errno.EADDRNOTAVAIL)


class Links:
    """This agent's links to its peers. To be used from within one running event loop.

    ``secret`` and ``run`` are what all agents of a run share, ``me`` is this agent's label and its
    life, ``records`` what it must not forget of its peers' lives, ``spoken`` the epochs that it
    offers. ``on_said(peer, said)``, ``on_up(peer)`` and ``on_down(peer)`` are called in the loop
    and must not block; what a peer says comes only between its ``on_up`` and its ``on_down``.
    ``on_refused(peer, why)`` tells of a peer that is who it says and can't be linked. A callback
    that raises is logged and counted, and harms no link.

    ``counters`` counts by name what happened: ``up``, ``down``, ``replaced``, ``silent``, ``lost``,
    ``unreachable``, ``failed``, ``dropped_down``, ``dropped_full``, ``unsayable``,
    ``callback_failed``, ``refused_busy``, ``refused_timeout``, ``refused_unwritten`` and
    ``refused_<reason>`` for each :class:`Reason`.
    """

    def __init__(
        self,
        *,
        secret: bytes,
        run: str,
        me: Node,
        records: Records,
        on_said: Callable[[str, Said], None],
        on_up: Callable[[str], None],
        on_down: Callable[[str], None],
        on_refused: Callable[[str, str], None] = lambda _, __: None,
        spoken: tuple[Spoken, ...] = SPOKEN,
        pace: Pace | None = None,
    ) -> None:
        self._trust = Secret(secret, me.key)
        self._run = run
        self._me = me.key
        self._life = me
        self._records = records
        self._on_said = on_said
        self._on_up = on_up
        self._on_down = on_down
        self._on_refused = on_refused
        self._spoken = spoken
        self._pace = pace or Pace()
        self._server: asyncio.Server | None = None
        self._peers: dict[str, Address] = {}
        self._links: dict[str, _Link] = {}
        self._dialers: dict[str, asyncio.Task[object]] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._greeting = 0
        self._closed = False
        self.counters: Counter[str] = Counter()

    @property
    def up(self) -> frozenset[str]:
        """The peers whose link is up now, as far as this side knows."""
        return frozenset(self._links)

    def epoch(self, peer: str) -> Epoch | None:
        """The epoch spoken with ``peer``, or None while its link is down."""
        link = self._links.get(peer)
        return None if link is None else link.end.sending

    async def listen(self, host: str, port: int = 0) -> Address:
        """Wait for peers on ``host``; port 0 takes a free one. Returns the address listened on.

        Raises HandfastError where this node has no such address, OSError for all else.
        """
        try:
            self._server = await asyncio.start_server(self._accepted, host, port, limit=_READ)
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and _another(error):
                raise
            raise HandfastError(
                f"no agent can listen on {host!r}: {error}. What to do: set HANDFAST_BIND to an "
                "address of this node, by which the others reach it"
            ) from error
        bound: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return bound

    def set_peers(self, peers: Mapping[str, Address]) -> None:
        """Say who the peers are and where they listen; what is not listed is dropped and refused.

        A peer of another address than before is dialed there; a peer that only waited for our
        dial, or dials us, keeps its link until the new process brings its own.
        """
        old, self._peers = self._peers, {p: a for p, a in peers.items() if p != self._me}
        for peer in old:
            if peer not in self._peers or (peer > self._me and self._peers[peer] != old[peer]):
                dialer = self._dialers.pop(peer, None)
                if dialer is not None:
                    dialer.cancel()
                self._drop(peer)
        for peer, address in self._peers.items():
            if peer > self._me and peer not in self._dialers and not self._closed:
                self._dialers[peer] = self._start(self._keep_dialing(peer, address))

    def send(self, peer: str, said: Said) -> bool:
        """Queue what is to be said; False where it was dropped: the link is down, its queue full,
        or the epoch that it speaks has no form for this.

        Raises ValueError for what is longer than MAX_SAID.
        """
        if len(said.domain) + len(said.body) > MAX_SAID:
            raise ValueError(f"at most {MAX_SAID} bytes are said at once, not {len(said.body)}")
        link = self._links.get(peer)
        why = ""
        if link is None:
            why = "dropped_down"
        elif said.word and not words_at(link.end.sending):
            why = "unsayable"
        elif not link.offer(said):
            why = "dropped_full"
        if why:
            self.counters[why] += 1
        return not why

    async def close(self) -> None:
        """Drop all links and end all tasks. No callback comes after this was called."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.sleep(0)  # the aborted transports close their sockets in the loop's next turn

    # -- connections -----------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed or self._greeting >= _GREETING:
            self._count("refused_busy", "too many connections stand in the handshake")
            writer.transport.abort()
            return
        lower = {peer for peer in self._peers if peer < self._me}
        try:
            end = self._end(lower, dialer=False)
        except Exception:
            writer.transport.abort()
            raise
        task = self._start(self._converse(end, reader, writer))
        # a task that is cancelled before its first step never reaches its own clean-up
        task.add_done_callback(lambda _: writer.transport.abort())

    async def _keep_dialing(self, peer: str, address: Address) -> None:
        failures = 0
        while True:
            try:
                lived = await self._dial(peer, address)
            except Exception:  # whatever it is, the peer must be dialed again
                self.counters["failed"] += 1
                logger.exception("dialing agent %s at %s failed", peer, address)
                lived = 0.0
            # a link that breaks as soon as it is up is no reason to hurry
            failures = 0 if lived > self._pace.backoff_most else min(failures + 1, 30)
            most = min(self._pace.backoff * 2**failures, self._pace.backoff_most)
            await asyncio.sleep(most * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, no secret

    async def _dial(self, peer: str, address: Address) -> float:
        end = self._end({peer}, dialer=True)
        try:
            async with asyncio.timeout(self._pace.handshake):
                reader, writer = await asyncio.open_connection(*address, limit=_READ)
        except OSError as error:
            self._count("unreachable", f"agent {peer} at {address}: {error}")
            return 0.0
        return await self._converse(end, reader, writer)

    def _end(self, expect: Container[str], *, dialer: bool) -> End:
        session = Session(
            self._trust,
            self._life,
            self._spoken,
            peers=expect,
            dialer=dialer,
            realm=self._run,
            known=self._records,
        )
        return End(session, CODECS, most=MAX_BODY, order=True)

    async def _converse(
        self, end: End, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> float:
        """Serve one connection from handshake to end; returns the seconds that it was up."""
        clock = asyncio.get_running_loop().time
        link, began, where = _Link(end, reader, writer), 0.0, writer.get_extra_info("peername")
        try:
            if await self._greet(link):
                began = clock()
                self._adopt(link)
                await self._exchange(link)
        except LinkError as error:
            self._count(f"refused_{error.reason}", f"a connection with {where}: {error}")
            self._refuse(end.session.met, str(error))
        except HandfastError as error:
            self._count("refused_unwritten", f"a connection with {where}: {error}")
            self._refuse(end.session.met, str(error))
        except OSError as error:
            self._count("lost", f"the connection with {where}: {error!r}")
        finally:
            writer.transport.abort()
            if began:
                self._down(link)
        return clock() - began if began else 0.0

    def _refuse(self, peer: str, why: str) -> None:
        """Tell why a peer can't be linked, if it is none that is linked; an offer may be old."""
        if peer in self._peers and peer not in self._links:
            self._call(self._on_refused, peer, why)

    async def _greet(self, link: _Link) -> bool:
        """The handshake; False where the other end left or was too slow."""
        self._greeting += 1
        try:
            async with asyncio.timeout(self._pace.handshake):
                await self._do(link, link.end.begin())
                heard = 0
                while link.end.switch is None:
                    frame = cut(link.arrived, link.end.bound)
                    if frame is not None:
                        heard += 1
                        if heard > _SHAKES:
                            raise LinkError(Reason.FULL, f"{heard} frames, and no end of it")
                        await self._do(link, link.end.receive(frame))
                        await link.writer.drain()
                        continue
                    data = await link.reader.read(_READ)
                    if not data:
                        return False
                    link.arrived += data
                return True
        except TimeoutError:
            self._count("refused_timeout", f"no handshake within {self._pace.handshake} s")
            return False
        finally:
            self._greeting -= 1

    async def _do(self, link: _Link, effects: Sequence[Effect]) -> None:
        """Do what a handshake asks for: what follows from a record is said once it is durable."""
        waiting = deque(effects)
        while waiting:
            effect = waiting.popleft()
            if isinstance(effect, Persist):
                if self._records.news(effect.record):
                    await asyncio.to_thread(self._records, effect.record)
                waiting.extend(link.end.persisted(effect.record))
            else:
                link.put([effect])

    async def _exchange(self, link: _Link) -> None:
        """Take and say until either direction fails or the link is replaced."""
        pump = asyncio.create_task(link.pump(self._pace.beat))
        try:
            while self._links.get(link.peer) is link:
                frame = cut(link.arrived)
                if frame is not None:
                    for said in self._take(link, frame):
                        self._call(self._on_said, link.peer, said)
                    continue
                async with asyncio.timeout(self._pace.silent):
                    data = await link.reader.read(_READ)
                if not data:
                    return
                link.arrived += data
        except TimeoutError:
            # half open, or frozen: all that follows from it is a new connection
            self._count("silent", f"nothing from {link.peer} for {self._pace.silent} s")
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    def _take(self, link: _Link, frame: bytes) -> list[Said]:
        """Take a frame; what its epoch's codec can't read is counted, and harms no link."""
        try:
            return link.put(link.end.receive(frame))
        except LinkError as error:
            if error.reason is not Reason.CODEC:
                raise
            self._count("refused_codec", f"a frame from {link.peer}: {error}")
            return []

    # -- who is up -------------------------------------------------------------------------

    def _adopt(self, link: _Link) -> None:
        if link.peer in self._links:
            self.counters["replaced"] += 1
            self._drop(link.peer)
        if link.peer in self._peers:
            self._links[link.peer] = link
            self.counters["up"] += 1
            self._call(self._on_up, link.peer)

    def _drop(self, peer: str) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.writer.transport.abort()
            self._down(link)

    def _down(self, link: _Link) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
            self.counters["down"] += 1
            self._call(self._on_down, link.peer)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        if self._closed:
            return
        try:
            callback(*args)
        except Exception:
            self.counters["callback_failed"] += 1
            logger.exception("a callback of the links of %s failed", self._me)

    def _count(self, name: str, message: str) -> None:
        """Count, and log the 1st, 2nd, 4th, 8th ...: a stranger must not fill the log."""
        self.counters[name] += 1
        count = self.counters[name]
        if count & (count - 1) == 0:
            logger.warning("%s: %s (%d so far)", name, message, count)
