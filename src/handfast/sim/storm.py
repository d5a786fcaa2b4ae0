"""One seed, from the founding of a run through gusts and lulls to the calm that it is judged in."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from random import Random
from typing import Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration, Roster
from handfast.core.retain import Keep
from handfast.laws.goals import SOMETIMES
from handfast.laws.invariants import EVENTUALLY, STANDSTILL
from handfast.sim.agenda import SECOND
from handfast.sim.job import Job, Round
from handfast.sim.ledger import Breach
from handfast.sim.weather import KINDS, Weather
from handfast.sim.words import Teller
from handfast.sim.world import Entry, World, shape

__all__ = ["GOALS", "Outcome", "Plan", "draw", "storm", "sum_up"]

ALSO: Final = (
    "loss", "doubling", "long tails", "loose steps", "forgone saves", "declining ranks",
    "waiting saves",
)  # fmt: skip
"""Kinds of trouble that don't strike at an instant."""

GOALS: Final = (
    *SOMETIMES, "launches overlap", "a late rank is refused a generation",
    "a frozen agent is replaced", "an agent sees its successor", "a record falls behind a seal",
    "a crash in the middle of a sync", "a journal's end is torn", "a journal's sync fails",
    "an image fails: no space left", "an image fails: fsync: input/output error",
    "a message is lost", "a message comes twice", "a message is overtaken",
    "a message is very late", "a message goes over a slow link", "an old message comes again",
    "a copy rots", "a copy vanishes", "a disk is slow",
    "the network is cut", "a host loses power", "a host is preempted", "a clock jumps",
    "a disk hangs", "a member is fenced", "a stale trainer wakes up", "a calm resumes",
    "nothing could be resumed", "somebody is away, and named",
)  # fmt: skip
"""What a swarm of seeds must reach, or it has shown little."""

TAIL: Final = 60
GUSTS: Final = 3


class Plan(msgspec.Struct, frozen=True):
    """What a seed has drawn: the job, the troubles, the user's wishes."""

    shards: int
    hosts: int
    tiers: tuple[tuple[str, int, int], ...]
    keep: Keep
    window: int
    stores: int
    kinds: tuple[str, ...]
    fanout: int

    def configuration(self) -> Configuration:
        """Build the job's configuration."""
        tiers = {name: (copies, need) for name, copies, need in self.tiers}
        return shape(self.shards, self.hosts, self.fanout, **tiers)


class Outcome(msgspec.Struct, frozen=True):
    """What came of a seed.

    ``events`` were taken from the queue, ``turns`` are calls of ``step``, ``seconds`` are virtual.
    ``laws`` are those that were broken, ``found`` how; ``tail`` the transcript's end, or all of it.
    """

    seed: int
    plan: Plan
    digest: str
    events: int
    turns: int
    seconds: float
    goals: dict[str, int]
    laws: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()


def draw(seed: int) -> Plan:
    """Draw a plan. Every choice comes from the one seed."""
    chance = Random(f"plan/{seed}")  # noqa: S311 - a simulation, and no secret
    tiers = chance.choice(
        [
            (("dir", 1, 1),), (("dir", 1, 1),), (("dir", 2, 1),), (("dir", 2, 2),),
            (("dir", 1, 1), ("mem", 1, 1)), (("dir", 2, 2), ("mem", 1, 1)),
        ]
    )  # fmt: skip
    copies = sum(n for _, n, _ in tiers)
    shards = chance.choice([1, 2, 3, 4] if copies == 1 else [1, 2, 3] if copies == 2 else [1, 2])
    kinds = tuple(kind for kind in (*KINDS, *ALSO) if chance.random() < 0.45)
    return Plan(
        shards=shards,
        hosts=chance.choice([0, max(2, shards)]),
        tiers=tiers,
        keep=chance.choice([Keep(1), Keep(1), Keep(2), Keep(3, every=40)]),
        window=chance.choice([1, 2, 2]),
        stores=chance.choice([1, 1, 2]),
        kinds=kinds,
        fanout=chance.choice([0, 2]),  # jobs are small here: else none would have a tree
    )


class _Storm:
    def __init__(self, seed: int, plan: Plan) -> None:
        self.plan = plan
        self.chance = Random(f"storm/{seed}")  # noqa: S311 - a simulation, and no secret
        self.world = World(plan.configuration(), self.chance, keep=plan.keep, window=plan.window)
        self.job = Job(self.world, plan.stores)
        self.job.waits = "waiting saves" in plan.kinds
        self.weather = Weather(self.job, plan.kinds)

    def blow(self) -> None:
        """Let the job run through gusts and lulls."""
        world, job = self.world, self.job
        for disk in world.disks.values():
            world.boot(disk)
        job.running = True
        world.start_clocks()
        job.watch()
        self.weather.begin()
        for _ in range(GUSTS):
            for blowing in (False, True):
                self.weather.gust(blowing)
                world.agenda.run(world.agenda.now + self.chance.randint(6, 14) * SECOND)

    def calm(self) -> None:
        """End the storm, and judge what must come of it."""
        world, job = self.world, self.job
        self.weather.end()
        job.running = world.ticking = False
        job.waits = False
        for round_ in job.rounds:
            for rank in round_.ranks.values():
                rank.alive = False
        for agent in [*world.agents.values(), *world.zombies]:
            agent.trap = None
            agent.wake()
        world.agenda.run()
        for disk in world.down():
            world.boot(disk)
        world.agenda.run()
        if len(world.agents) > 1 and self.chance.random() < 0.15:
            self._standstill()
        round_ = self._launch()
        exchanges = world.settle()
        if not any(agent.shown.open for agent in world.agents.values()):
            self._hopeless()
            return
        world.goals["a calm resumes"] += 1
        world.ledger.judge(EVENTUALLY[:-1], exchanges)
        for _ in range(2):
            for rank in round_.ranks.values():
                job.save(rank)
            exchanges = world.settle()
            world.ledger.judge(EVENTUALLY, exchanges)
        epoch = Epoch(round_.generation, round_.ranks[0].step or 0)
        if set(world.lines.values()) != {epoch}:
            raise Breach((f"l1_progress: {epoch} did not converge in the calm: {world.lines}",))

    def _launch(self) -> Round:
        round_ = self.job.launch()
        for rank in round_.ranks.values():
            self.job.start(rank)
        return round_

    def _standstill(self) -> None:
        """With a domain away nobody gets on, all name it, and all fall silent."""
        world = self.world
        away = next(iter(world.agents.values()))
        round_ = self.job.launch()
        world.crash(away)
        for rank in round_.ranks.values():
            self.job.start(rank)
        world.settle()
        world.ledger.judge(STANDSTILL)
        world.goals["somebody is away, and named"] += 1
        for rank in round_.ranks.values():
            rank.alive = False
        world.boot(away.disk)
        world.agenda.run()

    def _hopeless(self) -> None:
        """Nothing was restored: then no living epoch is left intact for every shard."""
        self.world.goals["nothing could be resumed"] += 1
        if left := self.world.ledger.truth().restorable:
            raise Breach((f"l3_recovery: {left} could be restored and was not",))


def storm(
    seed: int, *, plan: Plan | None = None, thorough: bool = False, transcript: bool = False
) -> Outcome:
    """Run one seed; ``thorough`` holds every law after every step, ``transcript`` tells all of it.

    A breach is part of the outcome, not an exception.
    """
    plan = plan or draw(seed)
    run = _Storm(seed, plan)
    world = run.world
    world.ledger.thorough = thorough
    laws: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    try:
        run.blow()
        run.calm()
        world.ledger.judge()
    except Breach as breach:
        laws, found = breach.laws, breach.found
    tail = world.log if transcript else world.log[-TAIL:] if laws else []
    turns = sum(1 for _, _, event, _ in world.log if not isinstance(event, str))
    return Outcome(
        seed, plan, digest(world.log), world.agenda.done, turns, world.agenda.now / SECOND,
        dict(world.goals), laws, found, tuple(Teller(world.ledger.rosters).lines(tail)),
    )  # fmt: skip


def digest(log: list[Entry]) -> str:
    """Hash a log, whole: 32 hexadecimal characters."""
    hasher = blake2b(digest_size=16)
    encoder = msgspec.msgpack.Encoder(enc_hook=_name)
    buffer = bytearray()
    for entry in log:
        encoder.encode_into(entry, buffer)
        hasher.update(buffer)
    return hasher.hexdigest()


def _name(value: object) -> str:
    if isinstance(value, Roster):
        return value.digest
    # what msgspec asks of a hook for what it does not know
    raise NotImplementedError(f"{type(value).__name__} is no part of a log")


def sum_up(outcomes: list[Outcome]) -> Counter[str]:
    """Count the goals that a swarm has met."""
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(outcome.goals)
    return total
