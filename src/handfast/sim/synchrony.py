"""How soon all know, once the network keeps a promise that nobody knows of.

Dwork, Lynch and Stockmeyer's partial synchrony (J. ACM 35(2), 1988): until an unknown moment
messages are lost or late at will; from then on each takes at most `delay`. Nothing in the protocol
knows the moment or the delay, and safety needs neither. The bound is *conditional*: nobody crashes
after the moment, and whoever lacks something of a peer's ticks at least every `tick`.

**The bounds.** What a member believes of a peer is what that peer has shown in this life, so never
too much. Hence what one end of a link holds and the other lacks is sent with the next tick at the
latest, and held by both `tick + delay` later (or the receiver knows more by then). So an epoch
whose votes were all durable at the moment is known to have converged by all within

- gossip: ``D (tick + delay)``, D being the diameter of the links: each link of the way may wait for
  a tick;
- a tree: ``tick + 2 depth delay``: only what the storm swallowed waits for a tick. A domain that
  comes to hold its whole block, or to know of a certificate, tells the next one at once.

A recovery that all had begun is over within ``3 D (tick + delay) + check + accept``: reports,
judgements and acceptances travel one after the other, a copy is read within `check`, and a rank
answers within `accept`. Each candidate that turns out BAD costs ``D (tick + delay) + check`` more:
another one is read, and judged. Where a member came back in the storm with nothing but its journal,
peers believe what its past life had shown until they hear of this one: one `delay` more. All of it
is for jobs of one tier: where there are several, certificates cross from one to another besides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Final

import msgspec

from handfast.core import events as ev
from handfast.core import gossip
from handfast.core import member as door
from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration, Roster
from handfast.core.messages import Converged, Message, Record, Restored
from handfast.core.state import Member
from handfast.sim.agenda import SECOND, Agenda
from handfast.sim.scale import opening

__all__ = ["Synchronous", "Timed"]

STORM: Final = 30 * SECOND
"""The moment, which the members can't know."""
PATIENCE: Final = 200
"""So many ticks after the moment nobody is waited for any more."""
BEFORE: Final = Epoch(1, 10)
"""An epoch that converged before the storm: so all have heard of one another in this life."""
EPOCH: Final = Epoch(1, 20)


class Timed(msgspec.Struct, frozen=True):
    """How long after the moment the last member knew, and the bound; both in microseconds."""

    took_us: int
    bound_us: int


class Synchronous:
    """A job in a storm that ends at one moment.

    ``delay_us`` and ``tick_us`` are the network's promise and the members'; ``check_us`` and
    ``accept_us`` how long a copy is read and a rank takes to answer. The first domain's copies of
    the newest ``bad`` epochs, of two, are damaged. ``back`` members lose all but
    their journals in the storm. ``worst``: every message of the storm is lost, later ones take all
    of the delay, and each member ticks just before it would hear of the first one's word.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        delay_us: int,
        tick_us: int,
        check_us: int = 0,
        accept_us: int = 0,
        bad: int = 0,
        back: int = 0,
        worst: bool = False,
        seed: int = 0,
    ) -> None:
        self.roster = Roster(configuration)
        if len(self.roster.tiers) != 1:
            raise ValueError("the bounds are those of a job of one tier")
        self._bad = (EPOCH, BEFORE)[:bad]
        self.delay_us, self.tick_us = delay_us, tick_us
        self.check_us, self.accept_us, self.worst = check_us, accept_us, worst
        self._chance = Random(f"synchrony/{seed}")  # noqa: S311 - a simulation, and no secret
        self._agenda = Agenda()
        self._moment = self._learnt = 0
        self._loss = 1.0 if worst else self._chance.choice([0.2, 0.6, 0.95, 1.0])
        self.journals: list[list[Record]] = []
        self.members: list[Member] = []
        for at in range(self.roster.size):
            journal = opening(self.roster, at)
            self.journals.append(journal)
            self.members.append(door.boot(self.roster.ids[at], 1, journal))
        self._back = self._chance.sample(range(self.roster.size), back)
        self._gossips = self.roster.tree is None

    def converge(self) -> Timed:
        """Save an epoch in the storm; measure from its end until all know that it converged."""
        self._moment = 0
        self._save(BEFORE)
        for at in range(self.roster.size):
            self._agenda.after(self._chance.randrange(self.tick_us), self._tick, at)
        self._until(lambda member: not gossip.restless(member) and _knows(member, BEFORE))
        self._storm()
        self._save(EPOCH)
        took = self._until(lambda member: _knows(member, EPOCH))
        tree, hop = self.roster.tree, self.tick_us + self.delay_us
        if tree is None:
            return self._timed(took, diameter(self.roster) * hop)
        return self._timed(took, self.tick_us + 2 * tree.depth() * self.delay_us)

    def _save(self, epoch: Epoch) -> None:
        for at in range(self.roster.size):
            self._take(at, ev.Captured(epoch))
            self._take(at, ev.Persisted(epoch, f"{at}:{epoch}"))

    def restore(self) -> Timed:
        """Begin the next generation in a storm; measure from its end until all have resumed."""
        self._gossips = True
        self._storm()
        for at in range(self.roster.size):
            self._take(at, ev.Begin(2, "again", self.roster))
        took = self._until(lambda member: member.open and member.generation == 2)
        hop = diameter(self.roster) * (self.tick_us + self.delay_us)
        read = (1 + len(self._bad)) * self.check_us
        return self._timed(took, (3 + len(self._bad)) * hop + read + self.accept_us)

    def _timed(self, took_us: int, bound_us: int) -> Timed:
        return Timed(took_us, bound_us + (self.delay_us if self._back else 0))

    # --- the world

    def _storm(self) -> None:
        """Begin a storm, in which some members come back with nothing but their journals."""
        self._agenda = Agenda()  # what was under way is lost
        self._moment = STORM
        far = distances(self.roster, 0)
        for at in range(self.roster.size):
            phase = self._chance.randrange(self.tick_us)
            if self.worst:  # a microsecond too early for what comes from nearer to the first one
                late = far[at] * (self.delay_us - 1) if self._gossips else 0
                phase = (STORM + late - 1) % self.tick_us
            self._agenda.after(phase, self._tick, at)
        for at in self._back:
            self._agenda.after(self._chance.randrange(STORM), self._reboot, at)

    def _until(self, knows: Callable[[Member], bool]) -> int:
        """Run until all know; give the microseconds since the moment (0: before it).

        Where somebody does not in `PATIENCE` ticks, that long.
        """
        agenda, most = self._agenda, self._moment + PATIENCE * self.tick_us
        while not all(map(knows, self.members)):
            if agenda.now > most:
                return agenda.now - self._moment
            agenda.run(agenda.now + self.delay_us)
        return max(0, self._learnt - self._moment)

    def _tick(self, at: int) -> None:
        self._take(at, ev.Tick())
        self._agenda.after(self.tick_us, self._tick, at)

    def _reboot(self, at: int) -> None:
        old = self.members[at]
        self.members[at] = door.boot(old.id, old.incarnation + 1, self.journals[at])

    def _take(self, at: int, event: ev.Event) -> None:
        self.members[at], effects = door.step(self.members[at], event)
        if any(isinstance(record, Converged | Restored) for record in effects.persist):
            self._learnt = self._agenda.now
        self.journals[at] += effects.persist
        for send in effects.send:
            self._send(send.to, send.message)
        for action in effects.apply:
            self._act(at, action)

    def _act(self, at: int, action: ev.Action) -> None:
        match action:
            case ev.Check(generation=generation, epoch=epoch):
                reason = "damaged" if at == 0 and epoch in self._bad else ""
                verdict = ev.Checked(generation, epoch, reason)
                self._agenda.after(self.check_us, self._take, at, verdict)
            case ev.Propose(generation=generation, epoch=epoch, copies=copies):
                shard = self.roster.configuration.domains[at].shard
                if self.roster.homes[shard] == at:
                    copy = (copies[shard] & -copies[shard]).bit_length() - 1
                    event = ev.Accept(generation, epoch, copy)
                    self._agenda.after(self.accept_us, self._take, at, event)

    def _send(self, to: int, message: Message) -> None:
        now, chance = self._agenda.now, self._chance
        if now >= self._moment:
            delay = self.delay_us if self.worst else chance.randint(1, self.delay_us)
        elif chance.random() < self._loss:
            return
        else:  # late at will, but for that all is there soon after the moment
            delay = chance.randint(1, self._moment - now + self.delay_us)
        self._agenda.after(delay, self._take, to, ev.Received(message))


def _knows(member: Member, epoch: Epoch) -> bool:
    line = member.tallies[0].line
    return line is not None and line.epoch == epoch


def diameter(roster: Roster) -> int:
    """Find the greatest distance between two members."""
    return max(max(distances(roster, at)) for at in range(roster.size))


def distances(roster: Roster, start: int) -> list[int]:
    """Count the links from one member to each."""
    far = {start: 0}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        for peer in roster.neighbours[at]:
            if peer not in far:
                far[peer] = far[at] + 1
                queue.append(peer)
    return [far[at] for at in range(roster.size)]
