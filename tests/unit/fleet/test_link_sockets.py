"""Shows links over real sockets, with a relay between that does what it likes."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from linkkit import BACK, KEYED, KEYS, A, B, Side

from handfast.core.lattice import Epoch
from handfast.errors import HandfastError, Refused
from handfast.fleet.link import stream
from handfast.fleet.link.datagram import LARGEST, Datagram
from handfast.fleet.link.drive import ROOM
from handfast.fleet.link.stream import Stream
from handfast.link import switch as sw
from handfast.link.end import End
from handfast.link.frame import LinkError, Reason
from handfast.link.session import Record, Send, Taking
from handfast.link.switch import Spoken

HOST = "127.0.0.1"
Meddle = Callable[[int, bytes], list[bytes]]
"""What a relay does to the n-th bytes of a direction."""


def settled(end: End, to: Epoch) -> bool:
    """Whether an end is through with a change, and knows that its peer is, too."""
    state = end.switch
    through = state is not None and state.now.epoch == to and state.next is None
    return through and sw.phase(state) is sw.Phase.OLD  # not None here


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.005)


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


# TCP


async def relayed(
    body: Callable[[Stream, Stream], Awaitable[None]], meddle: Meddle, *, many: int = 1 << 16
) -> tuple[Side, Side]:
    """Run two ends over TCP, with a relay between that meddles with what the dialer sends."""
    sides = Side(0), Side(1)
    ends: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    pumps: list[asyncio.Task[None]] = []

    async def pump(reader: Any, writer: Any, change: Meddle) -> None:
        count = 0
        with suppress(OSError):
            while data := await reader.read(many):
                for part in change(count, data):
                    writer.write(part)
                count += 1
                await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async def relay(reader: Any, writer: Any) -> None:
        up = await asyncio.open_connection(*servers[0].sockets[0].getsockname())
        pumps.append(asyncio.create_task(pump(reader, up[1], meddle)))
        pumps.append(asyncio.create_task(pump(up[0], writer, lambda _, data: [data])))

    async def arrived(reader: Any, writer: Any) -> None:
        ends.put_nowait((reader, writer))

    servers = [await asyncio.start_server(each, HOST, 0) for each in (arrived, relay)]
    try:
        dialed = await asyncio.open_connection(*servers[1].sockets[0].getsockname())
        heard = await ends.get()
        one = Stream(*dialed, sides[0].end, sides[0].disk.append)
        other = Stream(*heard, sides[1].end, sides[1].disk.append)
        async with one, other:
            await body(one, other)
        await asyncio.gather(*pumps)
    finally:
        for server in servers:
            server.close()
    return sides


@pytest.mark.parametrize("many", [1 << 16, 7])
def test_a_stream_goes_through_an_upgrade_and_a_rollback(many: int) -> None:
    """In pieces of seven bytes, too: no value is lost, each is read under its own epoch."""

    async def body(one: Stream, other: Stream) -> None:
        await asyncio.gather(one.opened(), other.opened())
        for number, to in enumerate((B, BACK)):
            await one.send(f"{number} before")
            await asyncio.gather(one.change(to), other.change(to))
            await one.send(f"{number} meanwhile")
            await asyncio.gather(one.changed(), other.changed())
            await until(lambda to=to: settled(one.end, to.epoch) and settled(other.end, to.epoch))
            await one.send(f"{number} after")
            await other.send("back")
        taken = [await other.take() for _ in range(6)]
        assert [value for _, value in taken] == [
            f"{number} {when}" for number in (0, 1) for when in ("before", "meanwhile", "after")
        ]
        assert [taken[i][0] for i in (0, 2, 3, 5)] == [A.epoch, B.epoch, B.epoch, BACK.epoch]
        assert (await one.take())[0] == B.epoch

    async def test() -> None:
        one, other = await relayed(body, lambda _, data: [data], many=many)
        assert not one.end.refused
        assert not other.end.refused
        assert len(one.disk) == len(other.disk) == 6

    run(test())


def cut(data: bytes) -> list[bytes]:
    """End the connection."""
    raise ConnectionError


async def talk(one: Stream, other: Stream) -> None:
    """Send values one by one, each taken before the next, and every one as it was sent."""
    await asyncio.gather(one.opened(), other.opened())
    for number in range(50):
        await one.send(f"{number}")
        assert await other.take() == (A.epoch, f"{number}")


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (lambda n, data: [data[:-1] + bytes([data[-1] ^ 1])] if n == 2 else [data], Reason.MAC),
        (lambda n, data: [b"GET / HTTP/1.1\r\n" * 5, data] if n == 2 else [data], Reason.MAGIC),
        (lambda n, data: [data, data] if n == 2 else [data], Reason.LATE),
        (lambda n, data: [data[:9] + b"\xff" * 3 + data[12:]] if n == 0 else [data],
         Reason.LENGTH),
        (lambda n, data: cut(data) if n == 2 else [data], None),
    ],
)  # fmt: skip
def test_a_stream_that_is_meddled_with_goes_down(meddle: Meddle, reason: Reason | None) -> None:
    """Nothing is taken that was not sent, and the reason is there to be read."""

    async def body(one: Stream, other: Stream) -> None:
        with pytest.raises(HandfastError, match="the link is down"):
            await talk(one, other)
        await until(lambda: other.error is not None)
        if reason is not None:
            assert isinstance(other.error, LinkError)
            assert other.error.reason is reason
            assert other.end.refused == {reason: 1}
        else:
            assert str(other.error).startswith("the peer closed it")

    async def test() -> None:
        await relayed(body, meddle)

    run(test())


Talk = Callable[[Stream], Awaitable[None]]


async def joined(spoken: tuple[tuple[Spoken, ...], ...], talks: tuple[Talk, Talk]) -> list[str]:
    """Run two ends over TCP, each until it leaves; give what they died of, "" of one that did not.

    There is no relay between, which would make a reset gentler.
    """

    async def one(who: int, reader: Any, writer: Any) -> str:
        side = Side(who, spoken[who], order=True)
        try:
            async with Stream(reader, writer, side.end, side.disk.append) as link:
                await link.opened()
                await talks[who](link)
        except HandfastError as error:
            return str(error)
        return ""

    others: asyncio.Queue[asyncio.Task[str]] = asyncio.Queue()

    async def arrived(reader: Any, writer: Any) -> None:
        task = asyncio.create_task(one(1, reader, writer))
        others.put_nowait(task)
        await task

    server = await asyncio.start_server(arrived, HOST, 0)
    try:
        dialed = one(0, *await asyncio.open_connection(*server.sockets[0].getsockname()))
        mine = await dialed
        return [mine, await (await others.get())]
    finally:
        server.close()


def test_who_waited_for_a_change_may_leave_at_once() -> None:
    """The other end comes through, too, and hears why the link is down; by no error of a socket,
    though it says more than the one that leaves ever reads."""
    through = []

    async def leaves(link: Stream) -> None:
        for to in (B, BACK):
            await link.change(to)
            await link.changed()
            assert link.end.switch is not None
            assert link.end.switch.now == to
            assert link.end.switch.next is None
            await until(lambda to=to: settled(link.end, to.epoch))
        for _ in range(ROOM + 5):
            await link.take()  # so it is known to be under way

    async def stays(link: Stream) -> None:
        for to in (B, BACK):
            await link.change(to)
            await link.changed()
            through.append(to)
            await until(lambda to=to: settled(link.end, to.epoch))
        while True:
            await link.send("x" * 60_000)
            await asyncio.sleep(0)

    async def test() -> None:
        for talks, who in (((leaves, stays), 1), ((stays, leaves), 0)):
            died = await joined(((A,), (A,)), talks)
            assert died[who] == "the link is down: the peer closed it. What to do: shake hands anew"
            assert died[1 - who] == ""

    run(test())
    assert through == [B, BACK] * 2


def test_the_last_to_be_through_is_so_though_its_peer_has_left() -> None:
    """The first leaves as soon as it is through; the other's change was heard whole."""

    async def change(link: Stream) -> None:
        await link.change(B)
        await link.changed()

    async def test() -> None:
        for _ in range(20):
            assert await joined(((A,), (A,)), (change, change)) == ["", ""]

    run(test())


def heard(link: Stream) -> sw.Word | None:
    """The newest word of the peer."""
    return link.end.switch.peer if link.end.switch is not None else None


def test_a_change_that_the_peer_leaves_is_not_waited_for() -> None:
    """Whoever waits for it is told, also where it is itself that closes the link."""

    async def waits(link: Stream) -> None:
        await link.changed()  # none was asked for
        await link.change(B)
        await link.changed()

    async def leaves(link: Stream) -> None:
        await until(lambda: heard(link) is not None)

    async def test() -> None:
        died = await joined(((A,), (A,)), (waits, leaves))
        assert died == ["the link is down: the peer closed it. What to do: shake hands anew", ""]

    run(test())


@pytest.mark.parametrize("when", ["in the offers", "in the words"])
def test_both_ends_name_two_bundles_of_one_number(when: str) -> None:
    """Whoever sees it first has said its own before it closes, and resets nothing."""
    wrong = Spoken(B.epoch, "bundle x")
    offered = when == "in the offers"
    spoken = ((A, B), (A, wrong)) if offered else ((A,), (A,))

    def talks(to: Spoken) -> Talk:
        async def talk(link: Stream) -> None:
            await link.change(to)
            while True:  # both are in the middle of a sentence
                await link.send("x" * 60_000)
                await asyncio.sleep(0)

        return talk

    async def test() -> None:
        died = await joined(spoken, (talks(B), talks(wrong)))
        for at, (mine, theirs) in enumerate(((B, wrong), (wrong, B))):
            what = f"epoch 1/2 is bundle {mine.digest} here and {theirs.digest} at the peer"
            assert f"the link is down: digest: {what}" in died[at]

    run(test())


def test_who_asks_second_for_a_number_with_another_bundle_is_refused() -> None:
    """Both digests are named, nothing is recorded, and the link can still be changed."""
    wrong = Spoken(B.epoch, "bundle x")

    async def first(link: Stream) -> None:
        await link.change(B)
        await link.changed()

    async def second(link: Stream) -> None:
        await until(lambda: (word := heard(link)) is not None and word.next is not None)
        with pytest.raises(Refused, match="epoch 1/2 is bundle bundle x here and bundle b at"):
            await link.change(wrong)
        await first(link)

    async def test() -> None:
        assert await joined(((A,), (A,)), (first, second)) == ["", ""]

    run(test())


def test_a_peer_that_does_not_close_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hang for ever; then it is told nothing more."""
    monkeypatch.setattr(stream, "PARTING_S", 0.05)
    side = Side(0)

    async def test() -> None:
        ended = asyncio.Event()

        async def hangs(reader: Any, writer: Any) -> None:
            await ended.wait()
            writer.close()

        server = await asyncio.start_server(hangs, HOST, 0)
        dialed = await asyncio.open_connection(*server.sockets[0].getsockname())
        async with Stream(*dialed, side.end, side.disk.append):
            pass
        assert dialed[1].is_closing()
        ended.set()
        server.close()

    run(test())


# UDP


class Relay(asyncio.DatagramProtocol):
    """Loses, doubles, delays, changes and plays back, by chance."""

    def __init__(self, seed: int, server: tuple[str, int], old: list[bytes]) -> None:
        self.random = random.Random(seed)
        self.server, self.old = server, old
        self.dialer: Any = None
        self.seen: list[bytes] = []
        self.held: list[tuple[bytes, Any]] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        if address != self.server:
            self.dialer = address
        to = self.dialer if address == self.server else self.server
        self.seen.append(data)
        chance = self.random.random()
        if chance < 0.15:
            return
        if chance < 0.3:
            self.held.append((data, to))
            return
        if chance < 0.4:
            hurt = bytearray(data)
            hurt[self.random.randrange(len(hurt))] ^= 1 << self.random.randrange(8)
            self.transport.sendto(bytes(hurt), to)
        self.transport.sendto(data, to)
        if chance > 0.8:
            self.transport.sendto(data, to)
        for late in (self.old, self.seen):
            if late and chance > 0.7:
                self.transport.sendto(self.random.choice(late), to)
        if len(self.held) > 2:
            self.random.shuffle(self.held)
            self.transport.sendto(*self.held.pop())


async def over_udp(seed: int, old: list[bytes], life: int) -> list[bytes]:
    """A link over a bad network, through an upgrade and a rollback; give all that was said."""
    sides = Side(0, life=life), Side(1, life=life)
    other = Datagram(sides[1].end, sides[1].disk.append, tick_s=0.01)
    async with other:
        loop = asyncio.get_running_loop()
        transport, relay = await loop.create_datagram_endpoint(
            lambda: Relay(seed, other.address, old), local_addr=(HOST, 0)
        )
        peer = transport.get_extra_info("sockname")
        one = Datagram(sides[0].end, sides[0].disk.append, peer=peer, tick_s=0.01)
        async with one:
            await asyncio.gather(one.opened(), other.opened())
            for to in (B, BACK):
                await asyncio.gather(*(link.change(to) for link in (one, other)))
                for number in range(20):
                    await one.send(f"{to.epoch} {number}")
                    await asyncio.sleep(0)
                await until(lambda to=to: all(settled(x.end, to.epoch) for x in (one, other)))
            await one.send("last")
        taken = []
        while not other.values.empty():
            taken.append(await other.take())
        values = [value for _, value in taken]
        assert len(set(values)) == len(values)
        assert {epoch for epoch, _ in taken} <= {A.epoch, B.epoch, BACK.epoch}
        assert len(values) > 10
        assert other.end.refused.total() > 0
        assert Reason.EPOCH not in other.end.refused
        assert Reason.CODEC not in other.end.refused
        transport.close()
    assert isinstance(relay, Relay)
    return relay.seen


@pytest.mark.parametrize("seed", range(4))
def test_datagrams_through_a_hostile_relay(seed: int) -> None:
    """Both come through, each value is taken at most once and by its own epoch's codec; and what
    was said in another session is played into this one."""

    async def test() -> None:
        old = await over_udp(seed, [], life=1)
        await over_udp(seed + 100, old, life=2)

    run(test())


def test_a_later_life_ends_a_datagram_link() -> None:
    """And what waits for it is told so; a listener answers the later one in a new session."""

    async def test() -> None:
        sides = Side(0), Side(1)
        async with Datagram(sides[1].end, sides[1].disk.append, tick_s=0.01) as other:
            async with Datagram(
                sides[0].end, sides[0].disk.append, peer=other.address, tick_s=0.01
            ) as one:
                await asyncio.gather(one.opened(), other.opened())
            with pytest.raises(HandfastError, match="it was closed"):
                await one.take()
            born = Side(0, life=2)
            async with Datagram(born.end, born.disk.append, peer=other.address, tick_s=0.01):
                with pytest.raises(HandfastError, match=r"anew.*life 2.*shake hands anew"):
                    await other.take()

    run(test())


def test_what_nobody_takes_is_let_go_and_counted() -> None:
    """A datagram link holds so many values, and no more."""

    async def test() -> None:
        side = Side(1)
        link = Datagram(side.end, side.disk.append)
        for _ in range(ROOM + 3):
            link.datagram_received(b"x", (HOST, 1))
        assert side.end.refused == {Reason.FULL: 3}
        with pytest.raises(RuntimeError, match="async with"):
            _ = link.address

    run(test())


def test_a_store_that_fails_ends_the_link() -> None:
    """Nothing is said that was to be durable first."""

    def store(record: Record) -> None:
        raise OSError("no space")

    async def test() -> None:
        side = Side(0)
        sent = []
        link = Datagram(side.end, store, peer=(HOST, 9))
        link._write = sent.append  # to see what would be said
        with pytest.raises(OSError, match="no space"):
            await link.begin()
        with pytest.raises(HandfastError, match="down: no space"):
            await link.opened()
        assert not sent

    run(test())


ID = KEYS[0].id


@pytest.mark.parametrize(
    "peers", [None, ID, [None], {"node1"}, {ID.upper()}, {ID[1:]}, {ID + "\n"}]
)
def test_what_is_no_key_is_no_peer(peers: Any) -> None:
    """It is told at once, and not by a handshake that never ends."""
    with pytest.raises(ValueError, match=r"(peers is|is no key of a peer).*What to do: give"):
        KEYED[0].expect(peers)
    KEYED[0].expect({KEYS[1].id})
    KEYED[0].expect([])


# Who gives up, and who meddles with addresses


def test_a_change_that_nobody_waits_for_any_more_goes_on_all_the_same() -> None:
    """The store is slow and its caller gives up: half of a change would be in the way for ever."""

    async def test() -> None:
        sides = Side(0), Side(1)
        async with Datagram(sides[1].end, sides[1].disk.append, tick_s=0.01) as other:
            held = threading.Event()

            def slow(record: Record) -> None:
                if isinstance(record, Taking):
                    held.wait(20)
                sides[0].disk.append(record)

            async with Datagram(sides[0].end, slow, peer=other.address, tick_s=0.01) as one:
                await asyncio.gather(one.opened(), other.opened())
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await one.change(B)
                held.set()
                await other.change(B)
                await asyncio.gather(one.changed(), other.changed())
                await until(lambda: settled(one.end, B.epoch) and settled(other.end, B.epoch))

    run(test())


@pytest.mark.parametrize("turns", range(6))
def test_a_value_that_nobody_waits_for_any_more_is_kept(turns: int) -> None:
    """Whoever gives up just as it comes has not taken it: the next one has."""

    async def body(one: Stream, other: Stream) -> None:
        await asyncio.gather(one.opened(), other.opened())
        for number in range(5):
            waits = asyncio.create_task(other.take())
            await asyncio.sleep(0)
            await one.send(f"{number}")
            await until(lambda w=waits: not other.values.empty() or w.done())
            for _ in range(turns):
                await asyncio.sleep(0)
            waits.cancel()
            try:
                taken = await waits
            except asyncio.CancelledError:
                taken = await other.take()
            assert taken == (A.epoch, f"{number}")

    async def test() -> None:
        await relayed(body, lambda _, data: [data])

    run(test())


class Thief(asyncio.DatagramProtocol):
    """Somebody with a socket, who writes down what comes."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.heard.append(data)


def test_an_old_offer_from_elsewhere_diverts_nobody_who_dials() -> None:
    """It was recorded, and is rightly signed; what is said goes where the caller said."""

    async def test() -> None:
        recorded = Side(1)
        recorded.do(recorded.end.begin())
        sides = Side(0), Side(1)
        loop = asyncio.get_running_loop()
        transport, thief = await loop.create_datagram_endpoint(Thief, local_addr=(HOST, 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind((HOST, 0))
            there = free.getsockname()
        one = Datagram(sides[0].end, sides[0].disk.append, peer=there, tick_s=0.01)
        other = Datagram(sides[1].end, sides[1].disk.append, local=there, tick_s=0.01)
        async with one:
            transport.sendto(recorded.out[0], one.address)  # the real one is not up yet
            await until(lambda: len(sides[0].disk) == 2)
            async with other:
                await asyncio.gather(one.opened(), other.opened())
                await one.send("to the right one")
                assert (await other.take())[1] == "to the right one"
                for address in (one.address, other.address):
                    transport.sendto(recorded.out[0], address)
                await one.send("still")
                assert (await other.take())[1] == "still"
        assert not thief.heard
        transport.close()

    run(test())


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Datagram, Datagram]]:
    """Who dials and who listens, over a link that is open."""
    sides = Side(0), Side(1)
    async with (
        Datagram(sides[1].end, sides[1].disk.append, tick_s=0.01) as other,
        Datagram(sides[0].end, sides[0].disk.append, peer=other.address, tick_s=0.01) as one,
    ):
        await asyncio.gather(one.opened(), other.opened())
        yield one, other


def test_a_listener_answers_where_the_last_frame_of_its_session_came_from() -> None:
    """A peer's address may change under an open link; nobody else has its frames."""

    async def test() -> None:
        async with opened() as (one, other):
            (effect,) = one.end.send("from elsewhere")
            assert isinstance(effect, Send)
            loop = asyncio.get_running_loop()
            transport, moved = await loop.create_datagram_endpoint(Thief, local_addr=(HOST, 0))
            transport.sendto(effect.frame, other.address)
            assert (await other.take())[1] == "from elsewhere"
            await other.send("back there")
            await until(lambda: bool(moved.heard))
            transport.close()

    run(test())


def test_what_is_longer_than_a_datagram_is_the_callers_error() -> None:
    """It would vanish without a word."""

    async def test() -> None:
        async with opened() as (one, other):
            room = LARGEST - len(str(A.epoch)) - 1
            with pytest.raises(ValueError, match="this link's bound is"):
                await one.send("x" * (room + 1))
            await one.send("x" * room)
            assert len((await other.take())[1]) == room

    run(test())


def test_a_datagram_link_gives_its_socket_back_however_it_ends() -> None:
    """Where the store fails as something is repeated, too."""

    async def test() -> None:
        side = Side(0)

        def store(record: Record) -> None:
            raise OSError(28, "No space left on device")

        link = Datagram(side.end, store, peer=(HOST, 9), tick_s=0.01)
        async with link:
            with pytest.raises(HandfastError, match="No space left"):
                await link.opened()
        assert link._transport is not None
        assert link._transport.is_closing()

    run(test())
