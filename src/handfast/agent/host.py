"""The agent: one process a node, the home of its domains, in nobody's process group.

Trainers come and go; their images, the journals and the conversation with other agents stay. The
agent knows of training only what a trainer tells it: a round, a plan, an image of an epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from handfast.agent.domain import DomainHost
from handfast.agent.joining import Opened, Round, life_of, place_of_agents, records_of
from handfast.agent.keeper import Image, Plan, held_alike
from handfast.agent.links import Links
from handfast.agent.routes import Routes
from handfast.agent.seat import Seat
from handfast.agent.server import Server, Trainer
from handfast.agent.snapshot import encode as encode_snapshot
from handfast.agent.speech import SPOKEN, Said
from handfast.agent.witness import First, Witness
from handfast.core import events
from handfast.core.lattice import Epoch
from handfast.core.membership import Roster
from handfast.core.messages import decode_message
from handfast.core.verdict import Verdict
from handfast.errors import FormatError, Refused
from handfast.link.records import Records
from handfast.link.switch import Spoken
from handfast.store import manifest as codec
from handfast.store.claims import identify
from handfast.store.files import Files

__all__ = ["Agent"]

logger = logging.getLogger(__name__)

HANDOVER_S: Final = 5.0
REST_S: Final = 2.0  # that a trainer which leaves waits for what is still on its way to the disk
FIRST_S: Final = 5.0  # for whoever started the agent to find it, however short it lingers


def _taken(name: str, holder: int, newcomer: int) -> Refused:
    """Say who holds a domain; it may be the very process that asks."""
    what = f"process {holder} trains this run already, on {name}"
    remedy = "stop that job first, or give this one a path of its own"
    if holder == newcomer:
        what += ": that is this very process, by another Checkpointer"
        remedy = (
            "close() that one before another is made, or use it again: restore() may be called "
            "more than once. If nothing refers to it any more, start the process anew"
        )
    return Refused(what, verdict=Verdict.FOREIGN, shards=(name,), remedy=remedy)


def _first(host: DomainHost, shard: int | None = None) -> First:
    """Name a rank as the first of its node: another one of a domain's run, or the domain's own."""
    identity = host.keeper.directory.identity
    return First(identity.run, identity.shard if shard is None else shard)


class Agent:
    """Serves trainers on a Unix socket and talks to other agents over TCP.

    To be made within a running event loop. ``label`` names the node; ``linger_s`` is how long an
    agent without trainers stays when it was not told that they are done, ``handover_s`` how long a
    dying trainer may hold its domain against its successor, ``spoken`` which epochs of the agents'
    protocol are offered.
    """

    def __init__(
        self,
        listener: socket.socket,
        files: Files,
        *,
        label: str,
        linger_s: float = 60.0,
        handover_s: float = HANDOVER_S,
        spoken: tuple[Spoken, ...] = SPOKEN,
    ) -> None:
        self._label = label
        self._spoken = spoken
        self._place = place_of_agents(listener)
        self._listening: str = listener.getsockname()
        self._files = files
        self._linger_s = linger_s
        self._handover_s = handover_s
        self._seats: dict[tuple[str, str], Seat] = {}
        self._hosts: dict[str, DomainHost] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._routes = Routes(label, self._deliver)
        self._links: Links | None = None
        self._records: Records | None = None
        self._address = ("", 0)
        self._nonce = ""
        self._dialing = asyncio.Lock()
        self._witness = Witness()
        self._calls = {
            "open": self._open,
            "begin": self._begin,
            "plan": self._plan,
            "stage": self._stage,
            "feed": self._feed,
            "prove": self._prove,
            "skip": self._skip,
            "load": self._load,
            "manifest": self._manifest,
            "judged": self._judged,
            "accept": self._accept,
            "decline": self._decline,
            "status": self._status,
            "close": self._close,
        }
        self._idle_since: float | None = time.monotonic() + FIRST_S
        self._done = False
        self._stopping = asyncio.Event()
        self._server = Server(listener, on_call=self._on_call, on_gone=self._on_gone)

    # --- life ----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Work until told to stop, or until nobody needs this agent any more."""
        while not self._stopping.is_set() and not self._idle():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._stopping.wait()
        await self._shut()

    def stop(self) -> None:
        """Drain and end; for SIGTERM."""
        self._stopping.set()

    def _idle(self) -> bool:
        """Say whether the agent may end: settled and told so, or alone for too long.

        Whoever is connected may be just about to open a domain, so it is not alone with them.
        """
        if self._server.trainers:
            self._idle_since = None
            return False
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        busy = any(host.busy for host in self._hosts.values())
        settled = all(host.settled for host in self._hosts.values())
        alone = now - self._idle_since
        return not busy and ((self._done and settled) or alone > self._linger_s)

    async def _shut(self) -> None:
        await self._server.close()
        for seat in self._seats.values():
            seat.retire()
        for host in self._hosts.values():
            await host.drain()
        for host in self._hosts.values():
            await host.close()
        await asyncio.gather(*self._leaving)
        await self._unlink()

    # --- trainers ------------------------------------------------------------------------------

    async def _on_call(
        self, trainer: Trainer, name: str, fields: dict[str, Any], fds: list[int]
    ) -> dict[str, Any]:
        call = self._calls.get(name)
        if call is None:
            raise FormatError(f"this agent knows no call {name!r}: it is of another handfast")
        return await call(trainer, fields, fds)

    def _on_gone(self, trainer: Trainer) -> None:
        """A trainer died or left: what it handed over whole is persisted all the same."""
        for seat in self._seats.values():
            if seat.trainer is trainer:
                seat.trainer = None
                seat.retire()

    async def _open(self, trainer: Trainer, fields: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """Give a trainer its domain: claimed, booted, and reachable for this round."""
        root, name, run = fields["root"], fields["name"], fields["run"]
        seat = self._seats.setdefault((root, name), Seat(root, name))
        await self._take_seat(seat, trainer, fields.get("within_s", HANDOVER_S))
        # in a task of the agent's own: a claim must not be left half-way by a trainer that dies
        host = await asyncio.shield(asyncio.create_task(self._claim(seat, run, fields["shard"])))
        await self._meet(run, fields["nonce"], fields["secret"], fields["bind"], fields["port"])
        member = host.member
        opened = Opened(
            member.id,
            member.incarnation,
            max(member.generation, host.overtaken),
            member.roster.configuration if member.roster else None,
            self._label,
            self._address,
            self._place,
            (seat.root, seat.name),
        )
        return {"opened": msgspec.msgpack.encode(opened)}

    async def _claim(self, seat: Seat, run: str, shard: int) -> DomainHost:
        """Open a seat's domain, or find it open: sound, and still the one on the disk."""
        async with seat.lock:
            identity = await asyncio.to_thread(
                identify, self._files, seat.root, seat.name, run=run, shard=shard
            )
            host = seat.host
            if host is not None and (
                host.failure
                or host.member.id != identity.id
                or not await asyncio.to_thread(host.keeper.stands)
            ):
                self._hosts.pop(host.member.id, None)
                seat.host = None
                await host.close()
                await seat.rest()
            if seat.host is None:
                try:
                    seat.host = await DomainHost.open(
                        self._files, seat.root, seat.name,
                        route=self._routes, notify=seat.tell, witness=self._witness,
                    )  # fmt: skip
                except Exception:
                    await seat.rest()  # whoever asks again at once would wear the disk out
                    raise
                seat.opened_at = time.monotonic()
                self._hosts[identity.id] = seat.host
            return seat.host

    async def _take_seat(self, seat: Seat, trainer: Trainer, within_s: float) -> None:
        deadline = time.monotonic() + min(self._handover_s, within_s)
        while seat.trainer is not None and seat.trainer is not trainer:
            if time.monotonic() > deadline:
                raise _taken(seat.name, seat.trainer.pid, trainer.pid)
            await asyncio.sleep(0.05)
        seat.trainer = trainer
        self._done = False

    async def _meet(self, run: str, nonce: str, secret: bytes, bind: str, port: int) -> None:
        """Listen for the agents of this round, under its own secret."""
        async with self._dialing:
            if self._nonce == nonce:
                return
            await self._unlink()
            self._records = await asyncio.to_thread(records_of, self._listening, nonce)
            self._links = self._routes.links = Links(
                secret=secret,
                run=run,
                me=life_of(self._label),
                records=self._records,
                spoken=self._spoken,
                on_said=lambda _, said: self._deliver(said),
                on_up=self._on_up,
                on_down=lambda peer: logger.info("agent %s is away", peer),
                on_refused=self._on_refused,
            )
            try:
                self._address = await self._links.listen(bind, port)
            except OSError:
                self._address = await self._links.listen(bind, 0)
            self._nonce = nonce

    async def _begin(
        self, trainer: Trainer, fields: dict[str, Any], _: list[int]
    ) -> dict[str, Any]:
        host = self._own(trainer, fields)
        spec = msgspec.msgpack.decode(fields["round"], type=Round)
        self._routes.homes.update(spec.homes)
        self._leave_moved()
        if self._links is not None:
            others = {who: at for who, at in spec.agents.items() if who != self._label}
            self._links.set_peers(others)
        event = events.Begin(
            spec.generation,
            spec.nonce,
            Roster(spec.configuration),
            spec.founding,
            spec.changes,
            spec.want,
            spec.keep,
            spec.window,
        )
        await host.begin(event, spec.drain_s, spec.shelves, spec.by_trainer)
        return {}

    def _leave_moved(self) -> None:
        """Close domains that this round has given to other agents: they speak for them now.

        Ranks may change nodes while agents linger. What such a domain is still persisting is of a
        generation that its successor has sealed off; its memory goes with it.
        """
        for seat in self._seats.values():
            host = seat.host
            if host is None or seat.trainer is not None:
                continue
            home = self._routes.homes.get(host.member.id, self._label)
            if home != self._label:
                logger.info("%s has moved to agent %s", host.member.id, home)
                seat.host = None
                self._hosts.pop(host.member.id, None)
                self._leaving.add(task := asyncio.create_task(seat.leave(host)))
                task.add_done_callback(self._leaving.discard)

    async def _plan(
        self, trainer: Trainer, fields: dict[str, Any], fds: list[int]
    ) -> dict[str, Any]:
        """Receive the trainer's images: memory that outlives it."""
        host, seat = self._own(trainer, fields), self._seat_of(trainer)
        plan = msgspec.msgpack.decode(fields["plan"], type=Plan)
        seat.retire()
        for number, key in zip(fields["images"], fields["keys"], strict=True):
            seat.images[number] = Image(fds[0], plan, key)
            fds.pop(0)
        return {"free": host.keeper.directory.free_bytes()}

    async def _stage(
        self, trainer: Trainer, fields: dict[str, Any], _: list[int]
    ) -> dict[str, Any]:
        host, seat = self._own(trainer, fields), self._seat_of(trainer)
        epoch = Epoch(*fields["epoch"])
        image = seat.images.get(fields["image"])
        if image is None or image.key != fields["key"]:
            raise FormatError(f"{epoch}: image {fields['image']} was never handed over")
        if image.plan.leads:
            await self._speak(host, seat, image, epoch)
        else:  # who hands over piece by piece can't: so nobody is to wait for it
            self._witness.settle(_first(host), epoch)
        refusal = await host.stage(epoch, image, fields["objects"], fields["left"])
        if refusal is None:
            return {"taken": True, "reason": "", "by": (), "failed": False}
        failed = bool(host.failure)
        return {"taken": False, "reason": refusal.reason, "by": refusal.by, "failed": failed}

    async def _feed(self, trainer: Trainer, fields: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """Hear which pieces of an image are there; tell which are wanted, until all are taken."""
        epoch = Epoch(*fields["epoch"])
        wants, key = await self._own(trainer, fields).feed(epoch, fields["there"], fields["key"])
        return {"wants": wants, "key": key}

    async def _speak(self, host: DomainHost, seat: Seat, image: Image, epoch: Epoch) -> None:
        """Say what a first rank holds, of a new plan and to whoever has not heard it yet.

        An image is the agent's own to read for as long as its trainer waits for an answer.
        """
        first, plan = _first(host), image.plan
        if seat.spoken is plan and not self._witness.wanted(first, epoch):
            self._witness.settle(first, epoch)
            return
        found = await asyncio.to_thread(held_alike, image)
        if image not in seat.images.values():
            raise FormatError(f"{epoch}: its trainer has left meanwhile")
        self._witness.settle(first, epoch, found)
        seat.spoken = plan

    async def _prove(
        self, trainer: Trainer, fields: dict[str, Any], _: list[int]
    ) -> dict[str, Any]:
        host = self._own(trainer, fields)
        said = dict(zip(fields["paths"], fields["digests"], strict=True))
        same = await self._witness.same(
            host.member.id,
            _first(host, fields["first"]),
            Epoch(*fields["epoch"]),
            said,
            fields["wait_s"],
        )
        return {"same": same or [], "heard": same is not None}

    async def _skip(self, trainer: Trainer, fields: dict[str, Any], _: list[int]) -> dict[str, Any]:
        host, epoch = self._own(trainer, fields), Epoch(*fields["epoch"])
        self._witness.settle(_first(host), epoch)
        host.post(events.Forgone(epoch, fields["reason"]))
        return {}

    async def _load(self, _: Trainer, fields: dict[str, Any], __: list[int]) -> dict[str, Any]:
        """Give the manifest of a copy that is valid; whoever asks reads its bytes from there."""
        manifest = await self._host(fields).judge(Epoch(*fields["epoch"]))
        return {"manifest": codec.encode(manifest)}

    async def _manifest(self, _: Trainer, fields: dict[str, Any], __: list[int]) -> dict[str, Any]:
        """Give the manifest of a copy that is still to be judged."""
        host = self._host(fields)
        manifest = await host.judging.manifest(host.member, Epoch(*fields["epoch"]))
        return {"manifest": codec.encode(manifest)}

    async def _judged(
        self, trainer: Trainer, fields: dict[str, Any], _: list[int]
    ) -> dict[str, Any]:
        self._own(trainer, fields).judged(Epoch(*fields["epoch"]), fields["problem"])
        return {}

    async def _accept(
        self, trainer: Trainer, fields: dict[str, Any], _: list[int]
    ) -> dict[str, Any]:
        epoch = Epoch(*fields["epoch"])
        self._own(trainer, fields).post(events.Accept(fields["generation"], epoch, fields["copy"]))
        return {}

    async def _decline(
        self, trainer: Trainer, fields: dict[str, Any], _: list[int]
    ) -> dict[str, Any]:
        epoch = Epoch(*fields["epoch"])
        self._own(trainer, fields).post(
            events.Decline(fields["generation"], epoch, fields["reason"])
        )
        return {}

    async def _status(self, _: Trainer, __: dict[str, Any], ___: list[int]) -> dict[str, Any]:
        hosts = self._hosts.values()
        counters: Mapping[str, int] = self._links.counters if self._links else {}
        return {
            "agent": self._label,
            "pid": os.getpid(),
            "domains": [encode_snapshot(host.snapshot()) for host in hosts],
            "paths": [host.keeper.directory.path for host in hosts],
            "links": dict(counters),
            "spoken": {peer: str(self._links.epoch(peer)) for peer in self._links.up}
            if self._links
            else {},
        }

    async def _close(self, trainer: Trainer, _: dict[str, Any], __: list[int]) -> dict[str, Any]:
        """A trainer is done: once all are, and all is settled, so is this agent.

        It is told so when its directory is at rest, so that it may copy that, or remove it.
        """
        self._done = True
        hosts = [seat.host for seat in self._seats.values() if seat.trainer is trainer]
        self._on_gone(trainer)
        for host in hosts:
            if host is not None:
                await host.drain(REST_S)
        return {}

    def _own(self, trainer: Trainer, fields: dict[str, Any]) -> DomainHost:
        """The trainer's own domain; what it may only read is another's, too."""
        host = self._host(fields)
        if host is not self._seat_of(trainer).host:
            raise FormatError(f"{fields['domain']} is another trainer's: open it first")
        return host

    def _host(self, fields: dict[str, Any]) -> DomainHost:
        host = self._hosts.get(fields["domain"])
        if host is None:
            raise FormatError(f"{fields['domain']} is not open at this agent: open it first")
        return host

    def _seat_of(self, trainer: Trainer) -> Seat:
        for seat in self._seats.values():
            if seat.trainer is trainer:
                return seat
        raise FormatError(f"process {trainer.pid} has opened no domain: open it first")

    # --- other agents --------------------------------------------------------------------------

    def _deliver(self, said: Said) -> None:
        host = self._hosts.get(said.domain)
        if host is None:
            return
        try:
            if said.word:
                host.hear(said.body)
            else:
                host.post(events.Received(decode_message(said.body)))
        except msgspec.MsgspecError as error:
            logger.warning("a message for %s can't be read: %s", said.domain, error)

    async def _unlink(self) -> None:
        """Take all links down, and give back what is recorded of them."""
        if self._links is not None:
            await self._links.close()
            self._links = self._routes.links = None
            self._nonce = ""
        if self._records is not None:
            self._records.close()
            self._records = None

    def _on_refused(self, peer: str, why: str) -> None:
        """Tell the trainers why an agent that they wait for is not linked; "" once it is."""
        for trainer in self._server.trainers:
            trainer.push(f"unlinked {peer}", agent=peer, why=why)

    def _on_up(self, peer: str) -> None:
        """A link is up, perhaps again: greet every domain that lives there."""
        self._on_refused(peer, "")
        for host in self._hosts.values():
            roster = host.member.roster
            for domain, agent in self._routes.homes.items():
                at = roster.index(domain) if roster is not None and agent == peer else None
                if at is not None:
                    host.post(events.Greet(at))
