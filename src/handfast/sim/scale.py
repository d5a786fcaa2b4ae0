"""What an epoch costs a job of n domains, by n real members that take turns hop by hop.

A hop is a round: all that was sent in one arrives in the next, but for what is lost. Disks take no
time. When nothing is under way and somebody still lacks something, all members tick. So hops and
messages are the protocol's own, whatever a network would make of them. Which way votes take is the
roster's to say: gossip, or a tree where a configuration has one.

The members start in an open generation, as their journals would have them. How a generation begins
is not played here: every member holds the reports of all, which is n x n words in one process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from random import Random
from typing import Final

import msgspec

from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.fold import boot
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import (
    Branch,
    Configured,
    Copy,
    Frozen,
    Message,
    Record,
    Report,
    RestoreCertificate,
    Restored,
    encode,
)
from handfast.core.retain import Keep
from handfast.core.state import Member
from handfast.core.view import view

__all__ = ["Cost", "Crowd", "job", "opening"]

PATIENCE: Final = 400
"""After so many rounds of ticks a job that is not quiet is given up."""


class Cost(msgspec.Struct, frozen=True):
    """What one epoch took: ``hops`` and ``told`` messages until the last member knew.

    ``messages`` were sent until everybody was quiet, ``size`` bytes of them on the wire, in so many
    ``ticks`` of all members. ``waiting``: how many domains were named while some were away.
    """

    domains: int
    hops: int
    told: int
    ticks: int
    messages: int
    size: int
    waiting: int = 0


def job(domains: int, **how: int) -> Configuration:
    """Give a job of so many shards, a domain each, in one tier; ``how`` are further wishes."""
    held = tuple(Domain(f"d{i}", "dir", i, f"host{i}") for i in range(domains))
    return Configuration("run", domains, held, (("dir", 1),), **how)


class Crowd:
    """All members of a job. ``loss`` is the share of messages that never arrive."""

    def __init__(self, configuration: Configuration, *, loss: float = 0.0, seed: int = 0) -> None:
        self.size = len(configuration.domains)
        self.loss = loss
        self._chance = Random(f"scale/{seed}")  # noqa: S311 - a simulation, and no secret
        self._young = _open(configuration)
        roster = self._young.roster
        ids = roster.ids if roster is not None else ()
        rename = msgspec.structs.replace
        self.members = [rename(self._young, id=id_, me=i) for i, id_ in enumerate(ids)]
        self._away: Collection[int] = ()
        self._sent: list[tuple[int, Message]] = []
        self._step = 0
        self._messages = self._size = 0
        self._weigh = True

    def epoch(self, away: Collection[int] = (), *, weigh: bool = True) -> Cost:
        """Save once, and go on until all know and nobody sends any more.

        Those that are ``away`` crash before their image is durable. The others wait for log2 n
        rounds of ticks, which don't count; then those come back, empty-handed, and their trainers
        save again. Only where one is to ``weigh`` messages are they encoded.
        """
        self._weigh = weigh
        self._step += 10
        epoch = Epoch(1, self._step)
        self._messages = self._size = 0
        self._away = away
        for at in range(self.size):
            self._save(at, epoch)
        waiting = 0
        if away:
            self._quiet(epoch, self.size.bit_length())
            first = next(at for at in range(self.size) if at not in away)
            waiting = len(view(self.members[first]).blocked_by)
            self._messages = self._size = 0
            self._away = ()
            for at in away:
                self._return(at, epoch)
        hops, told, ticks = self._quiet(epoch)
        return Cost(self.size, hops, told, ticks, self._messages, self._size, waiting)

    def _save(self, at: int, epoch: Epoch) -> None:
        self._take(at, ev.Captured(epoch))
        self._take(at, ev.Persisted(epoch, f"{at}:{epoch}"))

    def _return(self, at: int, epoch: Epoch) -> None:
        """Come back as a new incarnation, greet the neighbours, and save."""
        old, young = self.members[at], self._young
        self.members[at] = msgspec.structs.replace(
            old, incarnation=old.incarnation + 1, peers=young.peers, persisting=(), last=None
        )
        for peer in old.roster.neighbours[at] if old.roster is not None else ():
            self._take(at, ev.Greet(peer))
        self._save(at, epoch)

    def _take(self, at: int, event: ev.Event) -> None:
        if at not in self._away:
            self.members[at], effects = door.step(self.members[at], event)
            self._sent += [(send.to, send.message) for send in effects.send]

    def _quiet(self, epoch: Epoch, most: int = PATIENCE) -> tuple[int, int, int]:
        """Go on until nobody sends; give hops and messages until all here knew, and the ticks."""
        hops = last = told = ticks = 0
        knew = self._know(epoch)
        while ticks < most:
            while self._sent:
                hops += 1
                for to, message in self._arriving():
                    self._take(to, ev.Received(message))
                if not knew and (knew := self._know(epoch)):
                    last, told = hops, self._messages
            for at in range(self.size):
                self._take(at, ev.Tick())
            if not any(to not in self._away for to, _ in self._sent):
                self._sent.clear()
                break
            ticks += 1
        return last, told, ticks

    def _arriving(self) -> Iterator[tuple[int, Message]]:
        sent, self._sent = self._sent, []
        for to, message in sent:
            self._messages += 1
            if self._weigh:
                self._size += len(encode(message))
            if not self.loss or self._chance.random() >= self.loss:
                yield to, message

    def _know(self, epoch: Epoch) -> bool:
        lines = (m.tallies[0].line for i, m in enumerate(self.members) if i not in self._away)
        return all(line is not None and line.epoch == epoch for line in lines)


def opening(roster: Roster, at: int) -> list[Record]:
    """Give the journal of a domain whose generation, the first, has just begun."""
    report = Report((Copy(GENESIS, ""),), (), None, ())
    certificate = RestoreCertificate(
        roster.configuration.run, roster.digest, 1, "round", GENESIS,
        (Branch(1, GENESIS, "round"),), roster.homes, "",
    )  # fmt: skip
    return [
        Configured(roster.configuration, True),
        Frozen(at, 1, 1, "round", roster.digest, report),
        Restored(certificate),
    ]


def _open(configuration: Configuration) -> Member:
    """Boot the first member of a job."""
    roster = Roster(configuration)
    member = boot(roster.ids[0], 1, opening(roster, 0))
    return msgspec.structs.replace(member, keep=Keep(1), pinned=(), window=2)
