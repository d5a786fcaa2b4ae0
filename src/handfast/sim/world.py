"""Domains, their disks and agents, and the network between them, in virtual time.

Nothing here knows the protocol: what members ask for is done, slowly, perhaps wrongly, or never.
Who launches, trains and reads is in :mod:`handfast.sim.job`, who breaks things in
:mod:`handfast.sim.weather`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Final

import msgspec

from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Change, Configuration, Domain, Roster
from handfast.core.messages import Lost
from handfast.core.retain import Keep
from handfast.laws.goals import reached
from handfast.laws.truth import Turn
from handfast.sim.agenda import MS, SECOND, Agenda
from handfast.sim.agent import Agent
from handfast.sim.disk import Disk, Image
from handfast.sim.ledger import Ledger
from handfast.sim.network import Network, Packet

__all__ = ["Entry", "World", "shape"]

SYNC_US: Final = 3 * MS
IMAGE_US: Final = 80 * MS
TICK_US: Final = SECOND
Entry = tuple[int, str, ev.Event | str, ev.Effects]
"""When, who, what it took or what befell it, and what came of it."""


def shape(shards: int, hosts: int = 0, fanout: int = 0, **tiers: tuple[int, int]) -> Configuration:
    """Build a configuration: each tier as (copies of every shard, how many are needed).

    Copy c of shard s lies on host (s + c) modulo ``hosts``; 0 hosts: one for each domain.
    ``fanout`` is that of the tree that votes go up.
    """
    domains: list[Domain] = []
    for tier, (copies, _) in tiers.items():
        for shard in range(shards):
            for copy in range(copies):
                name = f"{tier}{shard}{chr(97 + copy) if copies > 1 else ''}"
                host = (shard + copy) % hosts if hosts else len(domains)
                domains.append(Domain(name, tier, shard, f"host{host}"))
    need = tuple((tier, k) for tier, (_, k) in tiers.items())
    return Configuration("run", shards, tuple(domains), need, fanout)


class World:
    """All of it. ``told`` hears the actions that are for a rank; ``goals`` counts what happened.

    ``ticking``: agents send again by timers of their own, each by its host's wall clock, which
    ``jump`` sets back and forth; ``back`` is how far the clock of a host was set back.
    ``heard`` counts messages that came to an agent.
    """

    def __init__(
        self, configuration: Configuration, chance: Random, *, keep: Keep, window: int
    ) -> None:
        roster = Roster(configuration)
        self.chance = chance
        self.keep, self.window = keep, window
        self.agenda = Agenda()
        self.goals: Counter[str] = Counter()
        self.network = Network(self.agenda, chance, self.deliver, self.goals)
        self.ledger = Ledger(roster, keep)
        self.changes: tuple[Change, ...] = ()
        self.disks: dict[str, Disk] = {}
        self.agents: dict[str, Agent] = {}
        self.zombies: list[Agent] = []
        self.told: Callable[[Agent, ev.Action], None] = lambda *_: None
        self.log: list[Entry] = []
        self.heard = 0
        self.ticking = False
        self.back: dict[str, int] = {}
        self.parked: list[tuple[Disk, Callable[..., None], tuple[object, ...]]] = []
        for domain in configuration.domains:
            self._found(domain)

    def _found(self, domain: Domain) -> None:
        disk = self.disks[domain.id] = Disk(domain, domain.host)
        self.ledger.images[domain.id] = disk.images

    @property
    def roster(self) -> Roster:
        """The engine's latest configuration."""
        return self.ledger.rosters[-1]

    def here(self) -> list[Agent]:
        """List the agents that are up and not frozen."""
        return [agent for agent in self.agents.values() if not agent.asleep]

    def down(self) -> list[Disk]:
        """List the domains that nobody speaks for, or is about to."""
        return [
            disk
            for disk in self.disks.values()
            if disk.domain.id not in self.agents
            and not disk.fenced
            and disk.claimed <= disk.sealed + bool(disk.claimed)
        ]

    def of_shard(self, shard: int) -> Iterator[Agent]:
        """List the agents of a shard's domains."""
        return (a for a in self.agents.values() if a.disk.domain.shard == shard)

    def note(self, who: str, what: str) -> None:
        """Write down what befell somebody."""
        self.log.append((self.agenda.now, who, what, ev.Effects()))

    # --- lives

    def boot(self, disk: Disk) -> None:
        """Claim the next incarnation, then read what the predecessors left, and seal it."""
        disk.claimed += 1
        self.agenda.after(self._delay(disk, MS), self._read, disk, disk.claimed)

    def _read(self, disk: Disk, incarnation: int) -> None:
        id_ = disk.domain.id
        if disk.claimed != incarnation or disk.fenced:
            return
        disk.sealed = incarnation - 1
        if (old := self.agents.pop(id_, None)) is not None:
            self.zombies.append(old)
            self.goals["a frozen agent is replaced"] += 1
        member = door.boot(id_, incarnation, disk.records)
        gone = [c.epoch for c in member.retained
                if c.epoch != GENESIS and c.epoch not in disk.images]  # fmt: skip
        if gone:
            lost = [Lost(epoch, "missing") for epoch in gone]
            member = door.boot(id_, incarnation, disk.records, lost)
        agent = self.agents[id_] = Agent(disk, member, self)
        self.ledger.shown[id_] = member
        self.note(f"{id_}.{incarnation}", "boots")
        self.agenda.after(self._delay(disk, 20 * MS), self.look, disk)
        if self.ticking:
            self._wind(agent)

    def crash(self, agent: Agent, kept: int | None = None) -> None:
        """End an agent; of an unsynced batch ``kept`` records, by chance if None, are durable."""
        unsynced = len(agent.unsynced)
        if kept is None:
            kept = self.chance.randint(0, unsynced)
        if unsynced:
            self.goals["a crash in the middle of a sync"] += 1
            if 0 < kept < unsynced:
                self.goals["a journal's end is torn"] += 1
        agent.crash(kept)

    def fell(self, agent: Agent, why: str) -> None:
        """Hear that an agent has ended (the agent's port)."""
        self.note(agent.name, why)
        if "seal" in why:
            self.goals["a record falls behind a seal"] += 1
        elif "successor" in why:
            self.goals["an agent sees its successor"] += 1
        if self.agents.get(agent.id) is agent:
            del self.agents[agent.id]
            del self.ledger.shown[agent.id]
        elif agent in self.zombies:
            self.zombies.remove(agent)

    def fence(self, disk: Disk) -> Disk:
        """Let the engine record that a domain never comes back, and a new one takes its place."""
        id_ = disk.domain.id
        if (agent := self.agents.get(id_)) is not None:
            self.crash(agent)
        for zombie in [agent for agent in self.zombies if agent.disk is disk]:
            self.crash(zombie)
        disk.fenced = True
        disk.sealed = disk.claimed
        old = self.roster.configuration
        heir = msgspec.structs.replace(disk.domain, id=f"{id_}+")
        domains = tuple(heir if d.id == id_ else d for d in old.domains)
        new = msgspec.structs.replace(old, domains=domains)
        self.changes += (Change(old.digest(), new.digest(), (id_,)),)
        self.ledger.rosters.append(Roster(new))
        self._found(heir)
        self.note(id_, f"is fenced; {heir.id} takes its place")
        self.ledger.spoil(id_, *(e for e in disk.images if e in disk.attested))
        return self.disks[heir.id]

    # --- the port of agents

    def sync(self, agent: Agent) -> None:
        """Sync an agent's batch; where that fails it is over, and any part may be durable."""
        disk = agent.disk
        delay = self._delay(disk, SYNC_US)
        if agent.trap is not None and agent.trap.left == 0:  # and no freeze, or it were sprung
            self.agenda.after(delay // 2, self._cut, agent)
        if disk.failing:
            disk.failing = False
            self.goals["a journal's sync fails"] += 1
            self.agenda.after(delay, self._fail, agent)
        elif disk.stuck:
            self.parked.append((disk, agent.synced, ()))
        else:
            self.agenda.after(delay, agent.synced)

    def _fail(self, agent: Agent) -> None:
        if agent.alive:
            self.note(agent.name, "its sync fails")
            self.crash(agent)

    def _cut(self, agent: Agent) -> None:
        if agent.alive:
            self.crash(agent)

    def wrote(self, agent: Agent, turn: Turn) -> None:
        """Judge a step, once its records are durable."""
        self.log.append((self.agenda.now, agent.name, turn.event, turn.effects))
        if self.agents.get(agent.id) is agent:
            self.ledger.shown[agent.id] = turn.after
        self.ledger.turn(agent.id, agent.incarnation, turn)
        if turn.effects.persist or turn.effects.apply or turn.first:
            self.goals.update(reached(turn))

    def send(self, agent: Agent, send: ev.Send) -> None:
        """Post a message."""
        roster = agent.shown.roster
        if roster is not None:
            target = roster.ids[send.to]
            link = (agent.disk.host, self.disks[target].host)
            self.network.send(Packet(agent.id, target, send.message), link)

    def act(self, agent: Agent, action: ev.Action) -> None:
        """Do what a member asks for, or tell the rank."""
        disk = agent.disk
        match action:
            case ev.Persist(epoch=epoch):
                self._later(disk, IMAGE_US, self._persist, agent, epoch)
            case ev.Check(epoch=epoch):
                self._later(disk, IMAGE_US, self._check, agent, action.generation, epoch)
            case ev.Release(epochs=epochs):
                for epoch in epochs:
                    disk.images.pop(epoch, None)
            case ev.Publish():
                self.ledger.did(agent.id, action)
            case ev.Resume():
                self.ledger.did(agent.id, action)
                self.told(agent, action)
            case ev.Propose() | ev.Stuck() | ev.Overtaken() | ev.Refuse():
                self.told(agent, action)
            case _:  # a message that was rejected is counted and logged, and nothing else
                pass

    # --- disks

    def _delay(self, disk: Disk, usual_us: int) -> int:
        return int(usual_us * (0.5 + self.chance.random())) * disk.slow

    def _later(self, disk: Disk, usual_us: int, do: Callable[..., None], *args: object) -> None:
        if disk.stuck:
            self.parked.append((disk, do, args))
        else:
            self.agenda.after(self._delay(disk, usual_us), do, *args)

    def unpark(self, disk: Disk) -> None:
        """Let what hangs on a stuck disk go on."""
        disk.stuck = False
        waiting = [(do, args) for d, do, args in self.parked if d is disk]
        self.parked = [entry for entry in self.parked if entry[0] is not disk]
        for do, args in waiting:
            self.agenda.after(MS, do, *args)

    def _persist(self, agent: Agent, epoch: Epoch) -> None:
        disk = agent.disk
        if not agent.alive:
            return
        if disk.full or disk.failing:
            why = "no space left" if disk.full else "fsync: input/output error"
            self.goals[f"an image fails: {why}"] += 1
            disk.failing = False
            agent.take(ev.Failed(epoch, why))
            return
        digest = f"{agent.id}.{agent.incarnation}:{epoch}"
        if epoch not in disk.attested and disk.claimed == agent.incarnation:
            disk.images[epoch] = Image(digest)
        agent.take(ev.Persisted(epoch, digest))

    def _check(self, agent: Agent, generation: int, epoch: Epoch) -> None:
        image = agent.disk.images.get(epoch)
        reason = "missing" if image is None else "" if image.sound else "damaged"
        agent.take(ev.Checked(generation, epoch, reason))

    def damageable(self, disk: Disk) -> list[Epoch]:
        """List the sound copies whose damage is a loss: attested, and in nobody's hands.

        A copy that was read, and found sound, does not rot before that is written down: what is
        loaded is the memory that was validated, so it would be damage of the next reading only.
        """
        agents = [a for a in (*self.agents.values(), *self.zombies) if a.disk is disk]
        read = [e.epoch for a in agents for e in a.pending if isinstance(e, ev.Checked)]
        sound = [epoch for epoch, image in disk.images.items() if image.sound]
        return [epoch for epoch in sound if epoch in disk.attested and epoch not in read]

    def spoil(self, disk: Disk, epoch: Epoch, *, vanish: bool) -> None:
        """Damage a copy that was attested, or let it vanish."""
        self.note(disk.domain.id, f"{epoch} {'vanishes' if vanish else 'rots'}")
        if vanish:
            del disk.images[epoch]
        else:
            disk.images[epoch].sound = False
        self.goals["a copy vanishes" if vanish else "a copy rots"] += 1
        self.ledger.spoil(disk.domain.id, epoch)

    def look(self, disk: Disk) -> None:
        """Let the agent read which pins there are."""
        if (agent := self.agents.get(disk.domain.id)) is not None:
            agent.take(ev.Pinned(disk.pins))

    # --- the network, and time

    def deliver(self, packet: Packet) -> None:
        """Let a message come to its target, if an agent is there."""
        agent = self.agents.get(packet.target)
        if agent is not None:
            self.heard += 1
            agent.take(ev.Received(packet.message))

    def start_clocks(self) -> None:
        """Let agents send again by themselves from now on."""
        self.ticking = True
        for agent in self.agents.values():
            self._wind(agent)

    def _wind(self, agent: Agent) -> None:
        """Set an agent's timer, by its host's wall clock."""
        delay = int(TICK_US * (0.5 + self.chance.random())) + self.back.pop(agent.disk.host, 0)
        self.agenda.after(delay, self._tock, agent)

    def jump(self, host: str, by_us: int) -> None:
        """Set a host's wall clock: forth, and timers are due at once; back, and they are late."""
        self.note(host, f"its clock jumps by {by_us / SECOND:+.1f} s")
        if by_us < 0:
            self.back[host] = -by_us
        for agent in [a for a in self.agents.values() if a.disk.host == host and by_us > 0]:
            agent.take(ev.Tick())

    def _tock(self, agent: Agent) -> None:
        if agent.alive and self.ticking:
            agent.take(ev.Tick())
            self._wind(agent)

    def settle(self) -> int:
        """Let everything under way end, and ticks have their say, until nothing more is sent.

        Gives the number of exchanges that it took.
        """
        self.agenda.run()
        for exchanges in range(60):
            heard = self.heard
            for agent in list(self.agents.values()):
                agent.take(ev.Tick())
            self.agenda.run()
            if self.heard == heard:
                return exchanges
        return 60

    @property
    def lines(self) -> Mapping[str, Epoch | None]:
        """Give what each member that is up knows converged in its own tier."""
        found = {}
        for id_, agent in self.agents.items():
            member = agent.shown
            tally = member.tallies[member.roster.tier_of[member.me]] if member.roster else None
            found[id_] = tally.line.epoch if tally and tally.line else None
        return found
