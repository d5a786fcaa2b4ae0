"""Domains at work in one loop, and a witness of everything that leaves them.

The witness knows, from the calls that are made, which bytes of each journal are durable. Whatever a
domain sends, shows or does is held against the records in them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from agentkit import NBYTES, begin, born, image, until

from handfast.agent.domain import DomainHost
from handfast.agent.keeper import Image
from handfast.agent.snapshot import Snapshot
from handfast.agent.speech import Said
from handfast.core import events
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import (
    Accepted,
    Bad,
    Configured,
    Converged,
    Declined,
    Frozen,
    Message,
    Record,
    Released,
    Restored,
    Skipped,
    Staged,
    Valid,
    decode_message,
    decode_record,
    unpack,
)
from handfast.store.claims import domain_path, incarnations
from handfast.store.files import Files
from handfast.store.journal import scan
from handfast.store.shelf import named_epoch
from handfast.testing.faults import Hasty


class Witness(Hasty):
    """Files that know what is durable, and remember every breach of the order.

    ``slow`` seconds pass in each sync of a journal, so that all that is too early comes to light.
    """

    def __init__(self, root: str, slow: float = 0.0) -> None:
        self.root = root
        self.slow = slow
        self.durable: dict[str, int] = {}
        self.breaches: list[str] = []
        self.seen = 0

    def fdatasync(self, fd: int) -> None:
        path, size = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size
        time.sleep(self.slow)
        super().fdatasync(fd)
        self.durable[path] = size

    def fsync(self, fd: int) -> None:
        """A successor settles its predecessor's journal so."""
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith("/journal"):
            self.durable[path] = os.fstat(fd).st_size

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        name = os.path.basename(target)
        if name.endswith(".released"):
            epoch = named_epoch(name.removesuffix(".released"))
            said = self.records(target.split("/domains/")[1].split("/")[0])
            released = {e for r in said if isinstance(r, Released) for e in r.epochs}
            never = epoch not in {r.epoch for r in said if isinstance(r, Staged)}
            self.check(epoch in released or never, f"{name} went before the record")
        elif "/certificates/" in target:
            shown = msgspec.json.decode(Path(target).read_bytes())
            epoch = Epoch(shown["generation"], shown["step"])
            known = _lines(self.records(name.removesuffix(".json")))
            self.check(epoch in known, f"{name} shows {epoch} before the record")

    def check(self, holds: bool, breach: str) -> None:
        self.seen += 1
        if not holds:
            self.breaches.append(breach)

    def records(self, name: str) -> list[Record]:
        """All durable records of a domain, oldest first."""
        path = domain_path(self.root, name)
        found: list[Record] = []
        for number in incarnations(self, path):
            journal = f"{path}/{number}/journal"
            found += _read(journal, self.durable.get(journal, 0))
        return found

    def sent(self, name: str, message: Message) -> None:
        """Hold a message against what its sender has made durable."""
        said, me = self.records(name), message.sender
        for fact in message.facts:
            if isinstance(fact, Converged):
                known = fact in said or fact.certificate.epoch in _lines(said)
            elif isinstance(fact, Restored):
                known = fact in said
            elif isinstance(fact, Declined) or _speaker(fact) != me:
                continue
            else:
                known = fact in said
            self.check(known, f"{name} sent {fact} before its record")
        shown = message.knows
        voted = {r.epoch for r in said if isinstance(r, Staged | Skipped)}
        for _, epoch, mask in shown.votes:
            self.check(
                not unpack(mask) >> me & 1 or epoch in voted, f"{name} shows a vote on {epoch}"
            )
        restored = {r.certificate.generation for r in said if isinstance(r, Restored)}
        self.check(not shown.restored or message.generation in restored, f"{name} shows a restore")
        for epoch in shown.lines:
            self.check(epoch is None or epoch in _lines(said), f"{name} shows the line {epoch}")

    def told(self, name: str, now: Snapshot) -> None:
        """Hold a snapshot against what its domain has made durable."""
        said = self.records(name)
        staged = {r.epoch for r in said if isinstance(r, Staged)}
        skipped = {r.epoch for r in said if isinstance(r, Skipped)}
        lines = _lines(said)
        for epoch in now.retained:
            self.check(epoch in staged or epoch == GENESIS, f"{name} is told it retains {epoch}")
        for outcome in now.outcomes:
            voted = outcome.epoch in (skipped if outcome.problem else staged)
            self.check(voted, f"{name} is told of {outcome} before the vote")
        if now.resumed is not None:
            self.check(Restored(now.resumed) in said, f"{name} may load before the certificate")
        if now.line is not None:
            self.check(now.line.epoch in lines, f"{name} is told that {now.line.epoch} converged")


def _speaker(fact: object) -> int:
    if isinstance(fact, Accepted):
        return fact.shard
    assert isinstance(fact, Frozen | Staged | Skipped | Valid | Bad)
    return fact.domain


def _lines(said: list[Record]) -> set[Epoch]:
    """The epochs that these records say have converged: by a certificate of either kind."""
    found = {r.certificate.epoch for r in said if isinstance(r, Converged)}
    found |= {r.certificate.base for r in said if isinstance(r, Restored)}
    return found | ({GENESIS} if any(isinstance(r, Configured) for r in said) else set())


@functools.lru_cache(maxsize=4096)
def _read(journal: str, length: int) -> tuple[Record, ...]:
    if not length:
        return ()
    return tuple(decode_record(data) for data in scan(Hasty(), journal, length).records[1:])


class Way:
    """The way from one domain of a mesh to the others."""

    def __init__(self, mesh: Mesh, n: int) -> None:
        self.mesh, self.n = mesh, n

    def __call__(self, said: Said) -> None:
        self.mesh.route(self.n, said)

    def has_words(self, domain: str) -> bool:
        return domain not in self.mesh.mute


class Mesh:
    """All domains of one run, in one loop; messages pass through ``deliver``.

    ``files`` are those of domain 0, if they are other ones. ``lose`` says which messages are lost.
    """

    def __init__(self, root: str, size: int, files: Files | None = None, slow: float = 0.0) -> None:
        self.root = root
        self.witness = Witness(root, slow)
        self.files = files
        self.among = born(root, size)
        self.names = [f"rank{n}" for n in range(size)]
        self.hosts: dict[int, DomainHost] = {}
        self.shown: dict[int, Snapshot] = {}
        self.messages: list[tuple[int, int, Message]] = []
        self.lose: Callable[[int, int, Message], bool] = lambda *_: False
        self.mute: set[str] = set()  # domains whose agents have no words
        self.deaf = False  # whether words beside the protocol are lost
        self.images: list[Image] = []

    async def open(self, n: int, files: Files | None = None) -> DomainHost:
        """Claim a domain and let it work."""
        if files is None:
            files = self.files if n == 0 and self.files is not None else self.witness

        def tell(now: Snapshot) -> None:
            self.witness.told(self.names[n], now)
            self.shown[n] = now

        host = await DomainHost.open(
            files, self.root, self.names[n], route=Way(self, n),
            notify=tell,
        )  # fmt: skip
        self.hosts[n] = host
        self.shown.pop(n, None)
        return host

    def route(self, n: int, said: Said) -> None:
        at = self.among.index(said.domain)
        assert at is not None
        if said.word:
            if (host := self.hosts.get(at)) is not None and not self.deaf:
                asyncio.get_running_loop().call_soon(host.hear, said.body)
            return
        message = decode_message(said.body)
        self.messages.append((n, at, message))
        self.witness.sent(self.names[n], message)
        host = self.hosts.get(at)
        if host is not None and not self.lose(n, at, message):
            asyncio.get_running_loop().call_soon(host.post, events.Received(message))

    async def begin(
        self, generation: int, *who: int, drain_s: float = 10.0, **options: Any
    ) -> None:
        """Let domains begin a generation."""
        for n in who or tuple(self.hosts):
            await self.hosts[n].begin(begin(self.among, generation, **options), drain_s)

    async def restore(self, generation: int, **options: Any) -> Epoch:
        """Begin, accept what is proposed, and wait for the certificate; gives the base."""
        await self.begin(generation, **options)
        await asyncio.gather(*(self.accept(n, generation) for n in self.hosts))
        bases = {now.resumed.base for now in self.shown.values() if now.resumed}
        assert len(bases) == 1
        return bases.pop()

    async def accept(self, n: int, generation: int) -> None:
        """Take part in a restore as a rank that can load whatever is proposed."""

        def ready() -> bool:
            now = self.shown.get(n)
            return now is not None and now.generation == generation and bool(
                now.proposal or now.resumed
            )  # fmt: skip

        await until(ready, f"the proposal at {n}")
        proposal = self.shown[n].proposal
        if proposal is not None:
            copy = proposal.copies[n]
            self.hosts[n].post(events.Accept(generation, proposal.epoch, copy))
        await until(lambda: self.shown[n].resumed is not None, f"the certificate at {n}")

    def image(self, seed: int, nbytes: int = NBYTES) -> Image:
        """An image that is closed with the mesh."""
        self.images.append(image(seed, nbytes))
        return self.images[-1]

    async def save(self, epoch: Epoch, *who: int) -> list[events.Refuse | None]:
        """Hand over an image of an epoch at each domain, or at these."""
        hosts = [self.hosts[n] for n in who] if who else list(self.hosts.values())
        seed = epoch.generation * 1000 + epoch.step
        staging = (host.stage(epoch, self.image(seed), b"objects") for host in hosts)
        return list(await asyncio.gather(*staging))

    async def converged(self, epoch: Epoch, *who: int) -> None:
        """Wait until these domains, or all, know that an epoch has converged."""

        def holds() -> bool:
            lines = [self.shown[n].line for n in who or self.hosts]
            return all(line is not None and line.epoch >= epoch for line in lines)

        await until(holds, f"the convergence of {epoch}")

    def journaled(self, n: int) -> list[Record]:
        """What a domain has made durable."""
        path = domain_path(self.root, self.names[n])
        found: list[Record] = []
        for number in incarnations(self.witness, path):
            read = scan(self.witness, f"{path}/{number}/journal")
            found += [decode_record(data) for data in read.records[1:]]
        return found

    async def close(self) -> None:
        """End all domains; no image is in use any more, and no order was broken."""
        for host in self.hosts.values():
            await host.close()
        self.hosts.clear()
        for held in self.images:
            assert held.busy is None
            held.close()
        self.images.clear()
        assert not self.witness.breaches, self.witness.breaches
