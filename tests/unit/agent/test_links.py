"""Shows that agents stay linked, in order and without doubles, whatever the network does to them.

Real sockets on the loopback, real processes where one is stopped or killed, and a user-space proxy
that cuts, swallows and heals. Nothing here depends on how long anything takes.
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import msgspec
import pytest

from handfast.agent.joining import life_of
from handfast.agent.links import Address, Links, Pace
from handfast.agent.speech import CODECS, MAX_SAID, SPOKEN, Said
from handfast.link.end import End
from handfast.link.frame import MAX_BODY, cut
from handfast.link.records import Records
from handfast.link.session import Persist, Send, Session
from handfast.link.trust import Secret
from handfast.store.files import Files, Posix

RECORDS = tempfile.TemporaryDirectory()
NUMBERS = itertools.count()
MAX_LONG = MAX_SAID - len("domain")
SECRET = b"the secret of one run, 32 bytes."
QUICK = Pace(beat=0.05, silent=0.6, handshake=2.0, backoff=0.01, backoff_most=0.05)
PATIENT = Pace(beat=0.05, silent=60.0, handshake=60.0, backoff=0.01, backoff_most=0.05)


class Agent:
    """Links that write down all that happens: ("up", peer), ("down", peer), (peer, payload)."""

    def __init__(
        self,
        me: str,
        *,
        secret: bytes = SECRET,
        run: str = "run",
        pace: Pace = PATIENT,
        disk: Files | None = None,
        **more: Any,
    ) -> None:
        self.me = me
        self.options = {"secret": secret, "run": run, "pace": pace, **more}
        self.events: list[tuple[str, Any]] = []
        self.address: Address = ("", 0)
        self.records = Records(f"{RECORDS.name}/{next(NUMBERS)}", disk)
        self.links = Links(
            secret=secret,
            run=run,
            me=life_of(me),
            records=self.records,
            on_said=lambda peer, said: self.events.append((peer, said.body)),
            on_up=lambda peer: self.events.append(("up", peer)),
            on_down=lambda peer: self.events.append(("down", peer)),
            pace=pace,
            **more,
        )

    def again(self) -> Self:
        """The same life with other connections, and the records that it has."""
        born = type(self)(self.me, **self.options)
        born.links._records, born.links._life = self.records, self.links._life
        return born

    def send(self, peer: str, payload: bytes) -> bool:
        return self.links.send(peer, Said("domain", payload))

    def got(self, peer: str) -> list[bytes]:
        return [what for kind, what in self.events if kind == peer]

    def lives(self, peer: str) -> list[list[bytes]]:
        """What came from ``peer``, one list for each time that its link was up."""
        lives: list[list[bytes]] = []
        up = False
        for kind, what in self.events:
            if (kind, what) == ("up", peer):
                assert not up, "up twice without a down"
                lives.append([])
                up = True
            elif (kind, what) == ("down", peer):
                assert up, "down without an up"
                up = False
            elif kind == peer:
                assert up, "a message outside of a link's life"
                lives[-1].append(what)
        return lives


@contextlib.asynccontextmanager
async def mesh(*agents: Agent, linked: bool = True) -> AsyncIterator[dict[str, Address]]:
    """The agents listening and, where ``linked``, each knowing all others."""
    peers = {}
    for agent in agents:
        agent.address = peers[agent.me] = await agent.links.listen("127.0.0.1")
    try:
        if linked:
            for agent in agents:
                agent.links.set_peers(peers)
            await until(lambda: all(len(a.links.up) == len(agents) - 1 for a in agents))
        yield peers
    finally:
        for agent in agents:
            await agent.links.close()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.002)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test in a loop, and show that it leaves no task behind."""

    async def main() -> None:
        async with asyncio.timeout(60):
            await work
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(main())


def looped(function: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def runner() -> None:
        run(function())

    runner.__doc__ = function.__doc__
    return runner


class Proxy:
    """A network cable between a dialer and ``target`` that can be cut, or swallow what it gets."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.swallows = False
        self.refuses = False
        self.address: Address = ("", 0)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.address = self._server.sockets[0].getsockname()[:2]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break all connections that there are now, as a reset does."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(*self.target)
        self._writers |= {writer, there[1]}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pipe(reader, there[1]), self._pipe(there[0], writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                if not self.swallows:
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.transport.abort()


# -- the ordinary life -------------------------------------------------------------------------


@looped
async def test_messages_pass_in_order_in_both_directions() -> None:
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        sent = [b"%d" % index * 100 for index in range(500)]
        for payload in sent:
            assert a.send("b", payload)
            assert b.send("a", payload)
        await until(lambda: len(a.got("b")) == len(b.got("a")) == 500)
        assert a.got("b") == b.got("a") == sent
        assert a.events[0] == ("up", "b")
        assert a.links.epoch("b") == SPOKEN[-1].epoch
        assert a.links.epoch("nobody") is None


@looped
async def test_a_full_mesh_of_eight_delivers_all_in_order_once() -> None:
    agents = [Agent(f"agent-{index}") for index in range(8)]
    sent = [b"%d" % index for index in range(50)]
    async with mesh(*agents):
        for payload in sent:
            for agent in agents:
                for peer in agent.links.up:
                    assert agent.send(peer, payload)
        others = {a.me: [o.me for o in agents if o is not a] for a in agents}
        await until(lambda: all(len(a.got(o)) == 50 for a in agents for o in others[a.me]))
        for agent in agents:
            for other in others[agent.me]:
                assert agent.lives(other) == [sent]
        # one connection a pair: every link came up once, and none replaced another
        assert sum(agent.links.counters["up"] for agent in agents) == 8 * 7
        assert sum(agent.links.counters["replaced"] for agent in agents) == 0


@looped
async def test_a_message_of_the_largest_size_passes_and_a_larger_one_is_refused() -> None:
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        assert a.send("b", bytes(MAX_LONG))
        await until(lambda: b.got("a"))
        assert len(b.got("a")[0]) == MAX_LONG
        with pytest.raises(ValueError, match="at most"):
            a.send("b", bytes(MAX_LONG + 1))
        assert a.send("b", b"still up")
        await until(lambda: b.got("a")[1:] == [b"still up"])


@looped
async def test_what_is_sent_while_a_link_is_down_is_dropped_and_counted() -> None:
    a = Agent("a")
    async with mesh(a, linked=False):
        assert not a.send("b", b"lost")
        assert a.links.counters["dropped_down"] == 1


@looped
async def test_an_agent_that_nobody_answers_dials_until_it_is_there() -> None:
    """Backoff, not giving up: the peer starts long after the first dial."""
    a, b = Agent("a"), Agent("b")
    async with mesh(b, linked=False):
        address = b.address
        await b.links.close()
        a.links.set_peers({"b": address})
        await until(lambda: a.links.counters["unreachable"] >= 3)
        late = Agent("b")
        await late.links.listen(*address)
        late.links.set_peers({"a": ("127.0.0.1", 1)})
        await until(lambda: a.links.up == {"b"} == {"b"} and late.links.up == {"a"})
        await late.links.close()
    await a.links.close()


@looped
async def test_an_old_and_a_new_agent_run_side_by_side() -> None:
    """Each link speaks the highest epoch that both ends have; the old one is told no words."""
    a, b, c = Agent("a", spoken=SPOKEN[:1]), Agent("b"), Agent("c")
    async with mesh(a, b, c):
        old, new = (each.epoch for each in SPOKEN)
        assert a.links.epoch("b") == b.links.epoch("a") == a.links.epoch("c") == old
        assert b.links.epoch("c") == new
        for peer in ("a", "c"):
            assert b.links.send(peer, Said("domain", b"word", word=True)) == (peer == "c")
            assert b.send(peer, b"x")
        await until(lambda: a.got("b") == [b"x"] and c.got("b") == [b"word", b"x"])
        assert b.links.counters["unsayable"] == 1


@looped
async def test_agents_without_an_epoch_in_common_are_kept_apart_by_name() -> None:
    """Nothing is read by a guess; both count why."""
    a, b = Agent("a", spoken=SPOKEN[:1]), Agent("b", spoken=SPOKEN[1:])
    async with mesh(a, b, linked=False) as peers:
        a.links.set_peers(peers)
        b.links.set_peers(peers)
        await until(lambda: a.links.counters["refused_epoch"] >= 2)
        assert b.links.counters["refused_epoch"] >= 1
        assert a.links.up == b.links.up == frozenset()


@looped
async def test_what_no_epoch_says_is_counted_and_harms_no_link() -> None:
    """A peer's own nonsense, under a right MAC."""
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        end = a.links._links["b"].end
        real = end.codecs
        for body in (b"\xc1", msgspec.msgpack.encode((7, "domain", b"x"))):
            end.codecs = dict.fromkeys(real, SimpleNamespace(encode=lambda _, body=body: body))
            assert a.send("b", b"x")
            await asyncio.sleep(0.05)
        end.codecs = real
        assert a.send("b", b"sense")
        await until(lambda: b.got("a") == [b"sense"])
        assert b.links.counters["refused_codec"] == 2
        assert b.links.counters["down"] == 0


@looped
async def test_an_older_life_of_a_peer_is_refused() -> None:
    """It was frozen, and its successor has spoken since."""
    b, old = Agent("b"), Agent("a")
    new = Agent("a")
    async with mesh(b, new), mesh(old, linked=False):
        b.links.set_peers({"a": old.address})
        old.links.set_peers({"b": b.address})
        await until(lambda: b.links.counters["refused_incarnation"] >= 2)
        assert old.events == []


class Full(Posix):
    """A disk that is full for a while."""

    full = False

    def fdatasync(self, fd: int) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super().fdatasync(fd)


@looped
async def test_what_can_t_be_recorded_is_no_link() -> None:
    """It is told why, and the link comes up by itself where the disk has room again."""
    disk, told = Full(), []
    a = Agent("a")
    b = Agent("b", disk=disk, on_refused=lambda peer, why: told.append((peer, why)))
    async with mesh(a, b):
        pass
    disk.full = True
    born, b = Agent("a"), b.again()
    async with mesh(born, b, linked=False) as peers:
        born.links.set_peers(peers)
        b.links.set_peers(peers)
        await until(lambda: b.links.counters["refused_unwritten"] >= 2)
        assert born.links.up == b.links.up == frozenset()
        assert told[-1][0] == "a"
        assert "No space left" in told[-1][1]
        disk.full = False
        await until(lambda: born.links.up == {"b"} and b.links.up == {"a"})


async def tampered(reason: str) -> None:
    """Send a frame to an open link that was changed, comes before its turn, or twice."""
    b = Agent("b")
    async with mesh(b, linked=False):
        b.links.set_peers({"a": ("127.0.0.1", 1)})
        dialer, _, writer = await handshake(b.address, "a", "b")
        one, two = (
            effect.frame
            for word in (b"one", b"two")
            for effect in dialer.end.send(Said("domain", word))
            if isinstance(effect, Send)
        )
        hurt = {"mac": one[:-1] + bytes([one[-1] ^ 1]), "gap": two, "late": one * 2}
        writer.write(hurt[reason])
        await until(lambda: b.links.counters[f"refused_{reason}"])
        await until(lambda: b.links.counters["down"])
        assert b.got("a") == ([b"one"] if reason == "late" else [])
        writer.transport.abort()


@pytest.mark.parametrize("reason", ["mac", "gap", "late"])
def test_a_frame_that_was_changed_lost_or_doubled_ends_the_link(reason: str) -> None:
    """A stream keeps order, so whoever carries it has not."""
    run(tampered(reason))


@looped
async def test_a_dialer_outlives_whatever_goes_wrong() -> None:
    """An error that nobody thought of is counted, and the peer is dialed again."""
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b, linked=False) as peers:
        real, broken = a.links._end, [3]

        def end(*args: Any, **options: Any) -> Any:
            if broken[0]:
                broken[0] -= 1
                raise RuntimeError("can't start new thread")
            return real(*args, **options)

        a.links._end = end  # it fails three times
        a.links.set_peers(peers)
        b.links.set_peers(peers)
        await until(lambda: a.links.up == {"b"} and b.links.up == {"a"})
        assert a.links.counters["failed"] == 3
        b.links._end = end  # it fails once, of who accepts
        broken[0] = 1
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection(*b.address)
            assert await reader.read(64) == b""
        writer.transport.abort()


# -- who is let in -----------------------------------------------------------------------------


class Dialer:
    """An open connection of somebody who dials by hand."""

    def __init__(self, end: End, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.end, self.reader, self.writer = end, reader, writer
        self.arrived = bytearray()

    def do(self, effects: Sequence[object]) -> None:
        waiting = deque(effects)
        while waiting:
            effect = waiting.popleft()
            if isinstance(effect, Persist):
                waiting.extend(self.end.persisted(effect.record))
            elif isinstance(effect, Send):
                self.writer.write(effect.frame)


async def handshake(
    target: Address, me: str, peer: str, *, secret: bytes = SECRET
) -> tuple[Dialer, asyncio.StreamReader, asyncio.StreamWriter]:
    """Dial as ``me``, whether that is our turn or not. Ends open, or raises ConnectionError."""
    session = Session(
        Secret(secret, me), life_of(me), SPOKEN, peers={peer}, dialer=True, realm="run"
    )
    reader, writer = await asyncio.open_connection(*target)
    dialer = Dialer(End(session, CODECS, most=MAX_BODY), reader, writer)
    try:
        dialer.do(dialer.end.begin())
        while dialer.end.switch is None:
            data = await reader.read(65536)
            if not data:
                raise ConnectionResetError("refused")
            dialer.arrived += data
            while (frame := cut(dialer.arrived)) is not None:
                dialer.do(dialer.end.receive(frame))
    except BaseException:
        writer.transport.abort()
        raise
    return dialer, reader, writer


@looped
async def test_when_both_sides_dial_only_the_lower_ids_connection_stands() -> None:
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        with pytest.raises(ConnectionError):
            await handshake(a.address, "b", "a")
        assert a.links.counters["refused_peer"] == 1
        a.send("b", b"undisturbed")
        await until(lambda: b.got("a"))
        assert a.lives("b") == [[]]
        assert b.lives("a") == [[b"undisturbed"]]


@looped
async def test_a_wrong_secret_and_a_wrong_run_get_nowhere_lm_resiliency_77() -> None:
    a, b = Agent("a"), Agent("b")
    thief = Agent("0", secret=b"guessed: thirty-two bytes of it.")
    foreign = Agent("1", run="another run")
    async with mesh(a, b, linked=False) as peers, mesh(thief, foreign, linked=False) as others:
        for agent in (a, b, thief, foreign):
            agent.links.set_peers(peers | others)
        await until(lambda: "b" in a.links.up and "a" in b.links.up)
        await until(lambda: b.links.counters["refused_signature"] >= 2)
        await until(lambda: b.links.counters["refused_realm"] >= 2)
        assert thief.events == foreign.events == []
        assert a.links.up == {"b"}
        assert b.links.up == {"a"}


@looped
async def test_a_holder_of_the_secret_that_is_no_peer_is_refused() -> None:
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        with pytest.raises(ConnectionError):
            await handshake(b.address, "aa", "b")
        b.links.set_peers({})
        assert b.links.up == frozenset()
        assert b.events[-1] == ("down", "a")
        await until(lambda: ("down", "b") in a.events)
        refused = b.links.counters["refused_peer"]
        await until(lambda: b.links.counters["refused_peer"] > refused + 2)
        assert b.links.up == frozenset()
        b.links.set_peers({"a": a.address})
        await until(lambda: b.links.up == {"a"} and a.links.up == {"b"})


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 5000,
    b"\x00\x00\x10\x01\x00\x00\x01" + bytes(8),
    bytes(100_000),
    random.Random(7).randbytes(3000),
    b"\x89HFL\x00\x01\x00\x01\xff\xff\xff\xff" + bytes(52),
    b"\x89HFL\x00\x01\x00\x04\x00\x00\x10\x01" + bytes(52),
    b"",
]


@looped
async def test_garbage_from_strangers_harms_no_link() -> None:
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        for garbage in GARBAGE * 5:
            reader, writer = await asyncio.open_connection(*b.address)
            writer.write(garbage)
            if garbage:
                with contextlib.suppress(ConnectionError):
                    while await reader.read(4096):
                        pass
            writer.transport.abort()
        a.send("b", b"x")
        await until(lambda: b.got("a") == [b"x"])
        assert a.lives("b") == [[]]
        counters = b.links.counters
        assert counters["refused_magic"] == 25
        assert counters["refused_length"] == 10
        await until(lambda: b.links._greeting == 0)


@looped
async def test_strangers_who_say_nothing_hold_a_bounded_number_of_connections() -> None:
    b = Agent("b")
    async with mesh(b, linked=False):
        strangers = [await asyncio.open_connection(*b.address) for _ in range(100)]
        await until(lambda: b.links.counters["refused_busy"] == 36)
        assert b.links._greeting == 64
        for _, writer in strangers:
            writer.transport.abort()
        await until(lambda: b.links._greeting == 0)
        a = Agent("a")
        b.links.set_peers({"a": ("127.0.0.1", 1)})
        a.links.set_peers({"b": b.address})
        await until(lambda: b.links.up == {"a"})
        await a.links.close()


@looped
async def test_a_stranger_who_never_finishes_its_handshake_is_dropped() -> None:
    b = Agent("b", pace=Pace(handshake=0.05))
    async with mesh(b, linked=False):
        reader, writer = await asyncio.open_connection(*b.address)
        while await reader.read(4096):  # its HELLO, then the end
            pass
        writer.transport.abort()
        assert b.links.counters["refused_timeout"] == 1


# -- what the network does ---------------------------------------------------------------------


@looped
async def test_a_cut_cable_is_dialed_again_and_both_sides_are_told() -> None:
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b, linked=False), Proxy(b.address) as cable:
        a.links.set_peers({"b": cable.address})
        b.links.set_peers({"a": a.address})
        for life in range(1, 6):
            await until(lambda: "b" in a.links.up and "a" in b.links.up)
            await until(lambda n=life: a.send("b", b"%d" % n) and b.got("a")[-1:])
            await until(lambda n=life: len(b.lives("a")) == n and b.lives("a")[-1])
            cable.cut()
            await until(lambda n=life: len(a.lives("b")) == n and a.events[-1] == ("down", "b"))
        assert a.links.counters["down"] == 5


@looped
async def test_a_partition_that_swallows_all_is_noticed_by_heartbeats_and_healed() -> None:
    """No byte passes and no connection breaks: only silence tells."""
    a, b = Agent("a", pace=QUICK), Agent("b", pace=QUICK)
    async with mesh(a, b, linked=False), Proxy(b.address) as cable:
        a.links.set_peers({"b": cable.address})
        b.links.set_peers({"a": a.address})
        await until(lambda: "b" in a.links.up and "a" in b.links.up)
        cable.swallows = True
        a.send("b", b"into the void")
        await until(lambda: a.events[-1] == ("down", "b") and b.events[-1] == ("down", "a"))
        assert a.links.counters["silent"] + b.links.counters["silent"] >= 1
        cable.swallows = False
        cable.cut()
        await until(lambda: "b" in a.links.up and "a" in b.links.up)
        a.send("b", b"healed")
        await until(lambda: b.got("a") == [b"healed"])


async def idle(beat: float) -> int:
    """How many lives an idle link has while 2.5 times the silence that would end it passes."""
    pace = Pace(beat=beat, silent=0.4, handshake=2.0, backoff=0.01, backoff_most=0.05)
    a, b = Agent("a", pace=pace), Agent("b", pace=pace)
    async with mesh(a, b):
        await asyncio.sleep(1.0)
        return max(len(a.lives("b")), len(b.lives("a")))


@looped
async def test_an_idle_link_lives_on_by_its_heartbeats() -> None:
    assert await idle(beat=1000) > 1
    for _ in range(5):  # a machine that stalls for long may end even this link, but not each time
        if await idle(beat=0.02) == 1:
            return
    pytest.fail("heartbeats did not keep the link up")


@looped
async def test_in_a_storm_of_cuts_every_life_of_a_link_is_in_order_without_doubles() -> None:
    """Cuts at random moments may lose messages, but never repeat or reorder them in one life."""
    chaos = random.Random(11)
    agents = [Agent(name) for name in "abcd"]
    async with contextlib.AsyncExitStack() as stack:
        peers = await stack.enter_async_context(mesh(*agents, linked=False))
        cables = []
        for agent in agents:
            through = dict(peers)
            for name in peers:
                cable = await stack.enter_async_context(Proxy(peers[name]))
                cables.append(cable)
                through[name] = cable.address
            agent.links.set_peers(through)
        count = 0
        for _ in range(60):
            for _ in range(20):
                count += 1
                for agent in agents:
                    for peer in agent.links.up:
                        agent.send(peer, b"%d" % count)
                await asyncio.sleep(0)
            await asyncio.sleep(0.002)
            chaos.choice(cables).cut()
        await until(lambda: all(len(agent.links.up) == 3 for agent in agents))
        for agent in agents:
            for peer in agent.links.up:
                agent.send(peer, b"%d" % (count + 1))
        last = b"%d" % (count + 1)
        for agent in agents:
            for peer in set("abcd") - {agent.me}:
                await until(lambda a=agent, p=peer: a.got(p)[-1:] == [last])
                for life in agent.lives(peer):
                    numbers = [int(payload) for payload in life]
                    assert numbers == sorted(set(numbers))
        assert sum(agent.links.counters["down"] for agent in agents) > 10


# -- slow, frozen, dead and reborn peers -------------------------------------------------------


@looped
async def test_a_peer_that_reads_nothing_blocks_no_other_and_holds_bounded_memory() -> None:
    b, c = Agent("b"), Agent("c")
    async with mesh(b, c, linked=False) as peers:
        b.links.set_peers(peers | {"a": ("127.0.0.1", 1)})
        c.links.set_peers(peers)
        _, _, stalled = await handshake(b.address, "a", "b")
        await until(lambda: b.links.up == {"a", "c"})
        sent = 0
        while b.send("a", bytes(1 << 20)):
            sent += 1
            await asyncio.sleep(0)
            assert sent < 100  # the bound is in bytes, and far below this
        assert b.links.counters["dropped_full"] == 1
        for index in range(1000):
            assert b.send("c", b"%d" % index)
        await until(lambda: len(c.got("b")) == 1000)
        assert not b.send("a", bytes(1 << 20))
        stalled.transport.abort()
        await until(lambda: b.links.up == {"c"})


@looped
async def test_the_queue_of_a_link_is_bounded_in_messages_too() -> None:
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        taken = sum(a.send("b", b"") for _ in range(5000))  # without a turn of the loop
        assert taken == 1024
        assert a.links.counters["dropped_full"] == 5000 - 1024
        await until(lambda: len(b.got("a")) == 1024)


SCRIPT = Path(__file__).with_name("linked_process.py")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


async def start(started: list[subprocess.Popen[bytes]], me: str, peer: Address) -> Address:
    """A real agent process of id ``me`` that knows one peer, "b", and greets it when linked."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), me, *map(str, peer)], stdout=subprocess.PIPE
    )
    started.append(process)
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    return "127.0.0.1", int(line)


@pytest.mark.parametrize("me", ["a", "c"], ids=["it dials us", "we dial it"])
def test_a_frozen_peer_is_only_reconnected_to(
    me: str, processes: list[subprocess.Popen[bytes]]
) -> None:
    async def body() -> None:
        b = Agent("b", pace=QUICK)
        async with mesh(b, linked=False):
            address = await start(processes, me, b.address)
            b.links.set_peers({me: address})
            await until(lambda: b.got(me))
            os.kill(processes[0].pid, signal.SIGSTOP)
            await until(lambda: b.events[-1] == ("down", me))
            assert b.links.counters["silent"] >= 1
            os.kill(processes[0].pid, signal.SIGCONT)
            await until(lambda: len(b.lives(me)) >= 2 and b.lives(me)[-1])
            assert all(len(life) <= 1 for life in b.lives(me))

    run(body())


@pytest.mark.parametrize("me", ["a", "c"], ids=["it dials us", "we dial it"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_reborn_peer_takes_the_place_of_its_old_self(
    me: str, how: signal.Signals, processes: list[subprocess.Popen[bytes]]
) -> None:
    """A new process of the same id on another port is linked, though the old one may be frozen."""

    async def body() -> None:
        b = Agent("b")
        async with mesh(b, linked=False):
            b.links.set_peers({me: await start(processes, me, b.address)})
            await until(lambda: len(b.got(me)) == 1)
            os.kill(processes[0].pid, how)
            b.links.set_peers({me: await start(processes, me, b.address)})
            await until(lambda: len(b.got(me)) == 2)
            first, second = b.got(me)
            assert first != second  # each says its pid
            assert b.lives(me)[-1] == [second]
            assert b.events[0] == ("up", me)
            if how == signal.SIGSTOP:
                assert [e for e in b.events if e[0] in ("up", "down")] == [
                    ("up", me),
                    ("down", me),
                    ("up", me),
                ]
                assert b.links.counters["replaced"] == (1 if me == "a" else 0)

    run(body())


# -- mistakes and the end ----------------------------------------------------------------------


@looped
async def test_a_callback_that_raises_is_counted_and_harms_no_link() -> None:
    a = Agent("a")

    def fails(*_: object) -> None:
        raise KeyError("a bug of the layer above")

    b = Links(
        secret=SECRET, run="run", me=life_of("b"), records=Agent("b").records, on_said=fails,
        on_up=fails, on_down=fails,
    )  # fmt: skip
    address = await b.listen("127.0.0.1")
    a.links.set_peers({"b": address})
    b.set_peers({"a": ("127.0.0.1", 1)})
    await until(lambda: a.send("b", b"x"))
    await until(lambda: b.counters["callback_failed"] == 2)
    assert a.links.up == {"b"}
    await a.links.close()
    await until(lambda: b.counters["callback_failed"] == 3)
    await b.close()


async def stalled_peer(agent: Agent) -> Callable[[], Awaitable[None]]:
    """Fill a link to a peer that reads nothing, so that its pump stands in the middle of a send."""
    _, _, writer = await handshake(agent.address, "a", "m")
    await until(lambda: "a" in agent.links.up)
    while agent.send("a", bytes(1 << 20)):
        await asyncio.sleep(0)

    async def end() -> None:
        writer.transport.abort()
        await asyncio.sleep(0)

    return end


@looped
async def test_close_ends_whatever_stands_open_and_calls_nobody_after() -> None:
    """Linked, stalled, in the handshake from both sides, dialing a port that swallows: all end."""
    m = Agent("m")
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda r, w: held.append(w), "127.0.0.1", 0)
    async with mesh(m, linked=False):
        m.links.set_peers(
            {
                "a": ("127.0.0.1", 1),
                "x": ("127.0.0.1", 1),
                "y": ("192.0.2.1", 9),  # a network for documentation: nobody answers
                "z": silent.sockets[0].getsockname()[:2],
            }
        )
        end = await stalled_peer(m)
        _, greeting = await asyncio.open_connection(*m.address)
        await until(lambda: m.links._greeting == 2)
        events = list(m.events)
        await m.links.close()
        assert m.events == events
        assert m.links.up == frozenset()
        assert not m.send("a", b"x")
        m.links.set_peers({"b": ("127.0.0.1", 1)})
        await m.links.close()
        greeting.transport.abort()
        await end()
    silent.close()
    held[0].transport.abort()


@looped
async def test_close_right_after_a_connection_came_leaves_nothing_open() -> None:
    """The task that would serve it is cancelled before its first step."""
    b = Agent("b")
    arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    async with await asyncio.start_server(
        lambda *streams: arrived.set_result(streams), "127.0.0.1", 0
    ) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        b.links._accepted(*await arrived)
        await b.links.close()
        with contextlib.suppress(ConnectionError):
            assert await reader.read(4096) == b""
        writer.transport.abort()


@looped
async def test_no_message_comes_after_its_peer_was_dropped() -> None:
    """Not even one that had arrived in the same packet as the message that led to the drop."""
    a, b = Agent("a"), Agent("b")
    async with mesh(a, b):
        b.links._on_said = lambda peer, said: (
            b.events.append((peer, said.body)),
            b.links.set_peers({}),
        )
        for number in range(100):
            a.send("b", b"%d" % number)
        await until(lambda: ("down", "a") in b.events)
        await until(lambda: "b" not in a.links.up)
        assert b.lives("a") == [[b"0"]]
