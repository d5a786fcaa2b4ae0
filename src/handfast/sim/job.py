"""The job: engines that launch rounds; ranks that train, save, accept, decline, die and oversleep.

An engine's store keeps one record by compare-and-set; each rank asks it for the round's generation
by itself, as late as it likes. Ranks step together, as collectives make them, or each for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from handfast.core import events as ev
from handfast.core.lattice import Epoch
from handfast.core.membership import Change, Entrant, Formation, Roster, RoundRecord, allocate, form
from handfast.core.messages import Configured
from handfast.sim.agenda import MS, SECOND
from handfast.sim.agent import Agent
from handfast.sim.world import World

__all__ = ["Job", "Rank", "Round"]

STEP: Final = 10
TRAIN_US: Final = 600 * MS
LATER_US: Final = 150 * MS


@dataclass(slots=True, eq=False)
class Rank:
    """A trainer process; ``step`` is None before it resumed. ``waits``: for the others' step."""

    round: Round
    shard: int
    alive: bool = True
    asleep: bool = False
    step: int | None = None
    waits: bool = False
    missed: list[tuple[Callable[..., None], tuple[object, ...]]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Round:
    """One start of the job. ``reported`` is what its members said before; 0: no generation yet."""

    name: str
    store: int
    reported: int
    roster: Roster
    founding: bool
    changes: tuple[Change, ...]
    want: int | None
    generation: int = 0
    ranks: dict[int, Rank] = field(default_factory=dict)


class Job:
    """Drives a world as a training job would.

    ``running``: ranks train, and whoever watches the job starts again what fell. ``fussy``: how
    often a rank declines; ``forgoes``: how often a step is not saved; ``waits``: a rank whose save
    is refused tries again; ``loose``: ranks step each for itself; ``lingers``: ranks of an old
    round are not killed, and go on.
    """

    def __init__(self, world: World, stores: int = 1) -> None:
        self.world = world
        self.stores: list[RoundRecord | None] = [None] * stores
        self.rounds: list[Round] = []
        self.running = False
        self.fussy = self.forgoes = 0.0
        self.waits = self.loose = self.lingers = False
        self.away: dict[str, int] = {}  # hosts that are out, and until when
        self._due = False
        world.told = self.hear

    # --- rounds

    def launch(
        self, *, want: int | None = None, store: int = 0, asked: list[Agent] | None = None,
        roster: Roster | None = None,
    ) -> Round:  # fmt: skip
        """Begin a round: look what the members that are asked report, and make its ranks."""
        world = self.world
        agents = list(world.agents.values()) if asked is None else asked
        reported = max((agent.shown.generation for agent in agents), default=0)
        roster = roster or world.roster
        round_ = Round(
            f"round{len(self.rounds) + 1}", store, reported, roster, self._founding(),
            world.changes, want,
        )  # fmt: skip
        round_.ranks = {s: Rank(round_, s) for s in range(roster.configuration.shards)}
        if self.rounds and any(rank.alive for rank in self.rounds[-1].ranks.values()):
            world.goals["launches overlap"] += 1
        self.rounds.append(round_)
        world.note(round_.name, f"is launched{'' if want is None else f', for step {want}'}")
        return round_

    def _founding(self) -> bool:
        """Ask the core whether this start founds the run, as the ranks of a job would."""
        world = self.world
        first = world.ledger.rosters[0].configuration
        entrants = []
        for disk in world.disks.values():
            known = [r.configuration for r in disk.records if isinstance(r, Configured)]
            entrants.append(Entrant(disk.domain, known[-1] if known else None, 0))
        formed = form(entrants, shards=first.shards, need=first.need, run="run")
        return isinstance(formed, Formation) and formed.founding and not world.changes

    def relaunch(self, **how: int | None) -> Round:
        """Launch, end the ranks of the rounds before, and let the new ones start in their time."""
        for round_ in self.rounds[-2:]:
            for rank in round_.ranks.values():
                if rank.alive and not self.lingers:
                    rank.alive = False
                elif rank.alive:
                    rank.asleep = True
        round_ = self.launch(**how)  # type: ignore[arg-type]  # - by launch's own names
        for rank in round_.ranks.values():
            self._later(rank, 4 * LATER_US, self.start, rank)
        return round_

    def start(self, rank: Rank) -> None:
        """Let a rank ask for its round's generation, and begin with all agents of its shard."""
        round_ = rank.round
        record = allocate(self.stores[round_.store], round_.name, round_.reported)
        if record is None:
            self.world.goals["a late rank is refused a generation"] += 1
            self.world.note(round_.name, f"rank {rank.shard} comes too late for a generation")
            rank.alive = False
            return
        self.stores[round_.store] = record
        round_.generation = record.generation
        for agent in list(self.world.of_shard(rank.shard)):
            self.begin(rank, agent)

    def begin(self, rank: Rank, agent: Agent, **other: object) -> None:
        """Tell an agent that the round begins, if it is one of its members."""
        round_, world = rank.round, self.world
        if rank.alive and round_.generation and round_.roster.index(agent.id) is not None:
            event = ev.Begin(
                round_.generation, round_.name, round_.roster, round_.founding, round_.changes,
                round_.want, world.keep, world.window,
            )  # fmt: skip
            agent.take(msgspec.structs.replace(event, **other))

    def _later(self, rank: Rank, usual_us: int, do: Callable[..., None], *args: object) -> None:
        delay = int(usual_us * self.world.chance.expovariate(1.0)) + MS
        self.world.agenda.after(delay, self._if_awake, rank, do, args)

    def _if_awake(self, rank: Rank, do: Callable[..., None], args: tuple[object, ...]) -> None:
        if rank.asleep:
            rank.missed.append((do, args))
        elif rank.alive:
            do(*args)

    # --- ranks

    def rank_of(self, agent: Agent) -> Rank | None:
        """Find the rank that an agent's member works for."""
        name = agent.shown.round
        for round_ in reversed(self.rounds):
            if round_.name == name:
                return round_.ranks[agent.disk.domain.shard]
        return None

    def hear(self, agent: Agent, action: ev.Action) -> None:
        """Take what a member tells its rank."""
        rank = self.rank_of(agent)
        match action:
            case ev.Overtaken():
                self._overtaken(agent, action.generation)
            case ev.Propose() if rank:
                self._later(rank, LATER_US, self.answer, rank, agent, action)
            case ev.Resume(certificate=certificate) if rank and rank.step is None:
                rank.step = certificate.base.step
                if self.running:
                    self._later(rank, TRAIN_US, self.train, rank)
            case ev.Refuse() if rank and action.by and self.waits and self.running:
                self._later(rank, 4 * LATER_US, self._again, rank, agent, action.epoch)
            case ev.Stuck() if self.running and rank and rank.round is self.rounds[-1]:
                self._fail(rank.round)
            case _:
                pass

    def _overtaken(self, agent: Agent, generation: int) -> None:
        member = agent.shown
        for round_ in self.rounds:
            twin = member.generation == generation and round_.name != member.round
            rank = round_.ranks[agent.disk.domain.shard]
            if rank.alive and 0 < round_.generation < generation + twin:
                self.kill(rank, "stops: superseded")

    def answer(self, rank: Rank, agent: Agent, action: ev.Propose) -> None:
        """Compare the candidate with the live state, dry, and tell the shard's first domain."""
        member, chance = agent.shown, self.world.chance
        if member.roster is None or member.roster.homes[rank.shard] != member.me:
            return
        if chance.random() < self.fussy:
            agent.take(ev.Decline(action.generation, action.epoch, "another structure"))
            return
        mask = action.copies[rank.shard]
        copies = [i for i in range(mask.bit_length()) if mask >> i & 1]
        agent.take(ev.Accept(action.generation, action.epoch, chance.choice(copies)))

    def train(self, rank: Rank) -> None:
        """Make a step, as soon as the others have made theirs, and save."""
        if not self.running or not rank.alive or rank.step is None:
            return
        behind = any(
            other.step is None or other.step < rank.step for other in rank.round.ranks.values()
        )
        if behind and not self.loose:
            rank.waits = True
            return
        self.save(rank, forgo=self.world.chance.random() < self.forgoes)
        self._later(rank, TRAIN_US, self.train, rank)
        for other in rank.round.ranks.values():
            if other.waits:
                other.waits = False
                self._later(other, LATER_US, self.train, other)

    def save(self, rank: Rank, *, forgo: bool = False, steps: int = STEP) -> None:
        """Reach the next step, and hand the image to all agents of the shard."""
        if rank.step is None:
            return
        rank.step += steps
        epoch = Epoch(rank.round.generation, rank.step)
        for agent in list(self.world.of_shard(rank.shard)):
            agent.take(ev.Forgone(epoch, "not now") if forgo else ev.Captured(epoch))

    def _again(self, rank: Rank, agent: Agent, epoch: Epoch) -> None:
        if epoch.step == rank.step and self.running:
            agent.take(ev.Captured(epoch))

    def kill(self, rank: Rank, why: str = "is killed") -> None:
        """End a rank; whoever watches the job will launch it anew."""
        self.world.note(rank.round.name, f"rank {rank.shard} {why}")
        rank.alive = False
        if self.running and rank.round is self.rounds[-1]:
            self._fail(rank.round)

    def wake(self, rank: Rank) -> None:
        """Let a rank that was frozen go on with all that it missed."""
        rank.asleep = False
        missed, rank.missed = rank.missed, []
        if rank.alive and rank.round is not self.rounds[-1]:
            self.world.goals["a stale trainer wakes up"] += 1
            self.world.note(rank.round.name, f"rank {rank.shard} wakes up late")
        for do, args in missed:
            if rank.alive:
                do(*args)

    # --- whoever watches

    def watch(self) -> None:
        """Look after the job now and then: scheduler, launcher, and each trainer's library."""
        if not self.running:
            return
        world = self.world
        for disk in world.down():
            if self.away.get(disk.host, 0) <= world.agenda.now and not disk.failing:
                world.boot(disk)
        if self.rounds:
            newest = self.rounds[-1]
            for agent in list(world.agents.values()):
                if agent.shown.generation < newest.generation:
                    self.begin(newest.ranks[agent.disk.domain.shard], agent)
            if any(not rank.alive for rank in newest.ranks.values()):
                self._fail(newest)
        else:
            self._fail(None)
        world.agenda.after(SECOND, self.watch)

    def _fail(self, round_: Round | None) -> None:
        """Let the job be launched anew, once."""
        if not self._due:
            self._due = True
            delay = int(SECOND * (0.3 + self.world.chance.random()))
            self.world.agenda.after(delay, self._anew, round_)

    def _anew(self, round_: Round | None) -> None:
        self._due = False
        if self.running and (not self.rounds or round_ is self.rounds[-1]):
            self.relaunch(store=self.world.chance.randrange(len(self.stores)))
