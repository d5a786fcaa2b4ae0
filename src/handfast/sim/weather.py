"""Storms: what breaks, how often, and only the kinds that a seed has drawn.

Each seed turns kinds of trouble on and off by itself (swarm testing, Groce et al., *Swarm Testing*,
ISSTA 2012): a run with everything on reaches less than many runs with some things on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from handfast.core import events as ev
from handfast.sim.agenda import MS, SECOND
from handfast.sim.agent import Agent, Trap
from handfast.sim.disk import Disk
from handfast.sim.job import Job

__all__ = ["KINDS", "Weather"]


class Weather:
    """Strikes a job's world by chance, at the mean intervals of ``KINDS``.

    ``blowing`` is False in a lull. ``losses`` bounds the copies that are damaged.
    """

    def __init__(self, job: Job, kinds: tuple[str, ...]) -> None:
        self.job = job
        self.world = job.world
        self.chance = job.world.chance
        self.kinds = kinds
        self.blowing = False
        self.over = False
        self.losses = self.chance.choice([1, 1, 3])
        network = self.world.network
        self.fair = (0.0, 0.0, 0.0)
        self.foul = (
            self.chance.choice([0.02, 0.1, 0.3]) if "loss" in kinds else 0.0,
            self.chance.choice([0.02, 0.2]) if "doubling" in kinds else 0.0,
            self.chance.choice([0.01, 0.05]) if "long tails" in kinds else 0.0,
        )
        network.spread_us = self.chance.choice([MS, 5 * MS, 40 * MS])
        job.lingers = "stale trainers" in kinds
        job.loose = "loose steps" in kinds
        job.forgoes = 0.05 if "forgone saves" in kinds else 0.0

    def begin(self) -> None:
        """Let every kind that was drawn strike now and then from now on."""
        for kind in self.kinds:
            if kind in KINDS:
                self._plan(kind)

    def gust(self, blowing: bool) -> None:
        """Begin or end a gust."""
        self.blowing = blowing
        network = self.world.network
        network.loss, network.twice, network.tail = self.foul if blowing else self.fair
        self.job.fussy = 0.08 if blowing and "declining ranks" in self.kinds else 0.0

    def end(self) -> None:
        """Make everything well that is not gone."""
        self.over = True
        self.gust(False)
        self.world.network.heal()
        for disk in self.world.disks.values():
            disk.slow, disk.full, disk.failing = 1, False, False
            self.world.unpark(disk)
        self.job.away.clear()

    def _plan(self, kind: str) -> None:
        mean = KINDS[kind][0]
        self.world.agenda.after(int(self.chance.expovariate(1 / mean)), self._strike, kind)

    def _strike(self, kind: str) -> None:
        if self.over:
            return
        if self.blowing:
            KINDS[kind][1](self)
        self._plan(kind)

    def _some(self) -> Agent | None:
        agents = self.world.here()
        return self.chance.choice(agents) if agents else None

    def _disk(self) -> Disk:
        return self.chance.choice([d for d in self.world.disks.values() if not d.fenced])

    def _hosts(self) -> list[str]:
        return list(dict.fromkeys(d.host for d in self.world.disks.values() if not d.fenced))

    def _for(self, least_us: int, most_us: int, undo: Callable[..., None], *args: object) -> None:
        self.world.agenda.after(self.chance.randint(least_us, most_us), undo, *args)

    # --- the network

    def cut_one_way(self) -> None:
        """A partition of some hosts from the others, in one direction or in both."""
        hosts = self._hosts()
        side = self.chance.sample(hosts, self.chance.randint(1, max(1, len(hosts) // 2)))
        links = [(a, b) for a in side for b in hosts if b not in side]
        if self.chance.random() < 0.4:
            links += [(b, a) for a, b in links]
        if links:
            self.world.network.cut.update(links)
            self.world.goals["the network is cut"] += 1
            self.world.note("network", f"{' '.join(side)} can't be heard")
            self._for(SECOND, 8 * SECOND, self.world.network.cut.difference_update, links)

    def slow_link(self) -> None:
        """One direction of one link is a hundred times slower for a while."""
        hosts = self._hosts()
        if len(hosts) > 1:
            a, b = self.chance.sample(hosts, 2)
            self.world.network.slow[a, b] = 100
            self._for(SECOND, 10 * SECOND, self._hasten, (a, b))

    def _hasten(self, link: tuple[str, str]) -> None:
        self.world.network.slow.pop(link, None)

    def replay(self) -> None:
        """Something that was sent at any time comes again: any generation, any incarnation."""
        self.world.network.replay()

    def greet(self) -> None:
        """A link comes up again."""
        agent = self._some()
        if agent is None or agent.shown.roster is None or not agent.shown.generation:
            return
        if others := agent.shown.roster.neighbours[agent.shown.me]:
            agent.take(ev.Greet(self.chance.choice(others)))

    # --- agents and hosts

    def crash(self) -> None:
        """An agent's process ends."""
        if agent := self._some():
            self.world.crash(agent)

    def trap(self) -> None:
        """An agent's process will end, or freeze, between two effects of its next batch."""
        if agent := self._some():
            freeze = "frozen agents" in self.kinds and self.chance.random() < 0.5
            agent.trap = Trap(self.chance.choice([0, 0, 1, 2, 4]), freeze)
            if freeze:
                self._for(SECOND // 2, 4 * SECOND, self._replace, agent)
                self._for(SECOND, 12 * SECOND, self._thaw, agent)

    def freeze(self) -> None:
        """An agent is frozen; it may be replaced in the meantime, and wakes late."""
        if agent := self._some():
            agent.asleep = True
            self.world.note(agent.name, "is frozen")
            if self.chance.random() < 0.6:
                self._for(SECOND // 2, 4 * SECOND, self._replace, agent)
            self._for(SECOND, 12 * SECOND, self._thaw, agent)

    def _replace(self, agent: Agent) -> None:
        if agent.asleep and agent.alive and not agent.disk.fenced:
            self.world.boot(agent.disk)

    def _thaw(self, agent: Agent) -> None:
        if agent.asleep and agent.alive:
            self.world.note(agent.name, "wakes up")
            agent.wake()

    def power(self) -> None:
        """A host, or a rack of two, loses power, and comes back."""
        hosts = self._hosts()
        rack = self.chance.sample(hosts, min(len(hosts), self.chance.choice([1, 1, 2])))
        self.world.note(" ".join(rack), "loses power")
        self.world.goals["a host loses power"] += 1
        for host in rack:
            self._out(host)

    def _out(self, host: str) -> None:
        self.job.away[host] = self.world.agenda.now + self.chance.randint(SECOND, 6 * SECOND)
        for agent in [a for a in self.world.agents.values() if a.disk.host == host]:
            self.world.crash(agent)
        for zombie in [a for a in self.world.zombies if a.disk.host == host]:
            self.world.crash(zombie)
        for round_ in self.job.rounds[-3:]:
            for shard, rank in round_.ranks.items():
                home = round_.roster.configuration.domains[round_.roster.homes[shard]]
                if home.host == host and rank.alive:
                    self.job.kill(rank)

    def preempt(self) -> None:
        """A host is taken away with notice: all save once more, then it is gone for a while."""
        host = self.chance.choice(self._hosts())
        self.world.note(host, "is to be preempted")
        self.world.goals["a host is preempted"] += 1
        if self.job.rounds:
            for rank in self.job.rounds[-1].ranks.values():
                if rank.alive and not rank.asleep:
                    self.job.save(rank, steps=1)
        self._for(SECOND // 10, SECOND, self._out, host)

    def jump(self) -> None:
        """A host's wall clock is set."""
        self.world.goals["a clock jumps"] += 1
        seconds = self.chance.choice([-3600, -20, -2, 2, 20, 3600])
        self.world.jump(self.chance.choice(self._hosts()), max(-20, seconds) * SECOND)

    # --- disks

    def slow_disk(self) -> None:
        """A disk is twenty times slower for a while."""
        disk = self._disk()
        disk.slow = 20
        self.world.goals["a disk is slow"] += 1
        self._for(SECOND, 8 * SECOND, self._restore, disk)

    def full(self) -> None:
        """A disk is full for a while."""
        disk = self._disk()
        disk.full = True
        self._for(SECOND, 6 * SECOND, self._restore, disk)

    def _restore(self, disk: Disk) -> None:
        disk.slow, disk.full = 1, False

    def stuck(self) -> None:
        """A disk hangs: what was begun ends once it goes on."""
        disk = self._disk()
        disk.stuck = True
        self.world.goals["a disk hangs"] += 1
        self._for(SECOND, 8 * SECOND, self.world.unpark, disk)

    def failing(self) -> None:
        """The next sync of a disk fails: that of an image, or of the journal itself."""
        self._disk().failing = True

    def damage(self) -> None:
        """A copy rots, or is gone."""
        disks = [disk for disk in self.world.disks.values() if not disk.fenced]
        held = [(disk, epoch) for disk in disks for epoch in self.world.damageable(disk)]
        if held and self.losses:
            self.losses -= 1
            newest = [(disk, max(d[1] for d in held if d[0] is disk)) for disk, _ in held]
            disk, epoch = self.chance.choice(self.chance.choice([held, newest]))
            self.world.spoil(disk, epoch, vanish=self.chance.random() < 0.4)

    # --- people, and the job

    def read(self) -> None:
        """A reader pins an epoch, or lets go of what it had pinned."""
        if agent := self._some():
            held = [copy.epoch for copy in agent.shown.retained]
            agent.disk.pins = tuple(
                self.chance.sample(held, min(len(held), self.chance.randint(0, 1)))
            )
            self.world.look(agent.disk)

    def fence(self) -> None:
        """The engine gives up one domain, once in a run, and puts an empty one in its place."""
        world = self.world
        if not world.changes and world.ledger.resumed and len(world.disks) > 1:
            world.goals["a member is fenced"] += 1
            heir = world.fence(self._disk())
            world.boot(heir)
            self.job.relaunch()

    def kill(self) -> None:
        """A rank is killed."""
        if self.job.rounds:
            ranks = [r for r in self.job.rounds[-1].ranks.values() if r.alive]
            if ranks:
                self.job.kill(self.chance.choice(ranks))

    def oversleep(self) -> None:
        """A trainer is frozen; it may find its round long past when it wakes."""
        if self.job.rounds:
            rank = self.chance.choice(list(self.job.rounds[-1].ranks.values()))
            rank.asleep = True
            self._for(SECOND, 10 * SECOND, self.job.wake, rank)

    def launch(self) -> None:
        """Somebody starts the job once more, having asked only some of the members."""
        agents = list(self.world.agents.values())
        asked = self.chance.sample(agents, self.chance.randint(0, len(agents)))
        store = self.chance.randrange(len(self.job.stores))
        round_ = self.job.launch(store=store, asked=asked)
        for rank in round_.ranks.values():
            self._for(MS, 3 * SECOND, self.job.start, rank)

    def roll_back(self) -> None:
        """The job is started anew from an older step, which abandons what came after it."""
        steps = [
            {c.epoch.step for c in agent.shown.retained} for agent in self.world.agents.values()
        ]
        common = sorted(set.intersection(*steps)) if steps else []
        if common:
            self.job.relaunch(want=self.chance.choice(common))


KINDS: Final[Mapping[str, tuple[int, Callable[[Weather], None]]]] = {
    "partitions": (6 * SECOND, Weather.cut_one_way),
    "slow links": (6 * SECOND, Weather.slow_link),
    "replays": (SECOND // 2, Weather.replay),
    "greetings": (3 * SECOND, Weather.greet),
    "crashes": (4 * SECOND, Weather.crash),
    "cuts": (3 * SECOND, Weather.trap),
    "frozen agents": (6 * SECOND, Weather.freeze),
    "power": (12 * SECOND, Weather.power),
    "preemption": (12 * SECOND, Weather.preempt),
    "clocks": (5 * SECOND, Weather.jump),
    "slow disks": (6 * SECOND, Weather.slow_disk),
    "full disks": (8 * SECOND, Weather.full),
    "stuck disks": (8 * SECOND, Weather.stuck),
    "failing syncs": (8 * SECOND, Weather.failing),
    "damage": (8 * SECOND, Weather.damage),
    "readers": (3 * SECOND, Weather.read),
    "fencing": (40 * SECOND, Weather.fence),
    "killed ranks": (8 * SECOND, Weather.kill),
    "stale trainers": (6 * SECOND, Weather.oversleep),
    "overlapping launches": (8 * SECOND, Weather.launch),
    "rollbacks": (15 * SECOND, Weather.roll_back),
}
"""What can strike: the mean interval in a gust, and the deed."""
