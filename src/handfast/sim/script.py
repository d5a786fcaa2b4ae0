"""Scenarios as text: commands, ``----``, and what came of them.

A script is a list of blocks with an empty line between them. In each, lines with ``#`` are for the
reader, the others up to ``----`` are commands, and what follows is what happened; a block without
``----`` is not told. Messages wait until they are delivered or dropped by name, disks and ranks are
prompt, and there is no chance: so what a script tells is the protocol, and nothing else. After
etcd-io/raft's interaction tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from random import Random
from typing import Final

from handfast.core import events as ev
from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration, Domain
from handfast.core.retain import Keep
from handfast.core.view import view
from handfast.sim.agent import Agent
from handfast.sim.disk import Disk
from handfast.sim.job import STEP, Job, Round
from handfast.sim.network import Packet
from handfast.sim.words import Teller
from handfast.sim.world import Entry, World

__all__ = ["VERBS", "play"]

LINE: Final = "----"


class _Steady(Random):
    """No chance: everything takes as long as it can least take, and the first is chosen."""

    def random(self) -> float:
        """Always 0."""
        return 0.0


def play(text: str) -> str:
    """Play a script, and give it with what really happened below each ``----``.

    Raises ``ValueError`` for a command that is none, with its line, and
    :class:`~handfast.sim.ledger.Breach` where a law is broken.
    """
    blocks = text.strip("\n").split("\n\n")
    stage = _Stage()
    at, done = 1, []
    for block in blocks:
        lines = block.split("\n")
        commands = lines[: lines.index(LINE)] if LINE in lines else lines
        came: list[str] = []
        for offset, line in enumerate(commands):
            if line and not line.startswith("#"):
                try:
                    came += stage.do(line)
                except (KeyError, IndexError, ValueError) as error:
                    raise ValueError(f"line {at + offset}, {line!r}: {error}") from error
        played = [*commands, LINE, *(came or ["(nothing)"])] if LINE in lines else commands
        done.append("\n".join(played))
        at += len(lines) + 1
    if stage.founded:
        stage.world.ledger.judge()
    return "\n\n".join(done) + "\n"


class _Stage:
    world: World
    job: Job
    teller: Teller

    def __init__(self) -> None:
        self.founded = False
        self._told = 0

    def do(self, line: str) -> list[str]:
        """Carry out one command, and say what came of it."""
        verb, *words = line.split()
        if verb not in VERBS:
            raise ValueError(f"no such verb; there are {', '.join(VERBS)}")
        if not self.founded and verb != "nodes":
            raise ValueError("a script begins with `nodes`")
        said = VERBS[verb](self, words) or []
        self.world.agenda.run()
        log = self.world.log[self._told :]
        self._told = len(self.world.log)
        idle = _unmoved if verb == "calm" else _idle
        return [*(self.teller.line(*entry[1:]) for entry in log if not idle(entry)), *said]

    # --- the cast

    def nodes(self, words: list[str]) -> None:
        """Found a world: `nodes a b [tier=mem [need=1] x y] [keep=2] [window=2] [stores=2]`.

        A name is a domain of its tier's next shard, `c/0` one of shard 0. They are in tier `dir`;
        `tier=` begins another, `need=` says how many copies of a shard an epoch needs there.
        `keep=` and `window=` are those of a Checkpointer, `stores=` is the number of engines.
        """
        domains: list[Domain] = []
        need: dict[str, int] = {}
        told = {"keep": 2, "window": 2, "stores": 1}
        tier, shard = "dir", 0
        for word in words:
            key, _, value = word.partition("=")
            if key == "tier":
                tier, shard = value, 0
            elif key == "need":
                need[tier] = int(value)
            elif value:
                told[key] = int(value)
            else:
                name, _, where = word.partition("/")
                shard = int(where) if where else shard
                domains.append(Domain(name, tier, shard, name))
                need.setdefault(tier, 1)
                shard += 1
        shards = 1 + max(domain.shard for domain in domains)
        configuration = Configuration("run", shards, tuple(domains), tuple(need.items()))
        self.world = World(configuration, _Steady(), keep=Keep(told["keep"]), window=told["window"])
        self.world.network.hold = True
        self.job = Job(self.world, told["stores"])
        self.teller = Teller(self.world.ledger.rosters)
        self.founded = True
        for disk in self.world.disks.values():
            self.world.boot(disk)

    def _agent(self, name: str) -> Agent:
        """Find the agent that speaks for a domain; `a.1` may be one that was replaced."""
        domain, _, life = name.partition(".")
        held = [*self.world.agents.values(), *self.world.zombies]
        for agent in held:
            if agent.id == domain and (not life or agent.incarnation == int(life)):
                return agent
        raise ValueError(f"no agent of {name} is up")

    def _disk(self, name: str) -> Disk:
        return self.world.disks[name]

    def _round(self, told: Mapping[str, str]) -> Round:
        return self.job.rounds[int(told.get("round", len(self.job.rounds))) - 1]

    # --- the job

    def launch(self, words: list[str]) -> None:
        """Start the job: `launch [0 1] [want=STEP] [store=1] [asked=a,b]`.

        `0 1` are the ranks that begin now (all, by default; `-`: none). `want=` is a step to go
        back to, `store=` the engine, `asked=` the domains whose reports it sees.
        """
        told, ranks = _options(words)
        asked = (
            [self._agent(name) for name in told["asked"].split(",")] if "asked" in told else None
        )
        want = int(told["want"]) if "want" in told else None
        for old in self.job.rounds:
            for rank in old.ranks.values():
                rank.alive = rank.alive and rank.step is None  # a job that runs is ended first
        round_ = self.job.launch(want=want, store=int(told.get("store", 1)) - 1, asked=asked)
        self._start(round_, ranks)

    def start(self, words: list[str]) -> None:
        """Let ranks of a launch begin now: `start 1 [round=1]`."""
        told, ranks = _options(words)
        self._start(self._round(told), ranks)

    def _start(self, round_: Round, ranks: list[str]) -> None:
        for shard in [int(rank) for rank in ranks if rank != "-"] or (
            [] if ranks else round_.ranks
        ):
            self.job.start(round_.ranks[shard])

    def save(self, words: list[str]) -> None:
        """Let ranks make ten steps and save: `save [0 1] [round=1] [forgo]`; all, by default."""
        told, ranks = _options(words)
        round_, forgo = self._round(told), "forgo" in ranks
        for shard in [int(rank) for rank in ranks if rank != "forgo"] or list(round_.ranks):
            if round_.ranks[shard].step is None:
                raise ValueError(f"rank {shard} has resumed nothing")
            self.job.save(round_.ranks[shard], forgo=forgo, steps=STEP)

    def kill(self, words: list[str]) -> None:
        """Kill ranks: `kill 1`."""
        told, ranks = _options(words)
        for rank in ranks:
            self.job.kill(self._round(told).ranks[int(rank)])

    def decline(self, words: list[str]) -> None:
        """Let every rank decline what is proposed: `decline`; no more of it: `decline no`."""
        self.job.fussy = 0.0 if words else 1.0

    # --- the network

    def deliver(self, words: list[str]) -> None:
        """Deliver what waits, or some: `deliver [a>b] [a>*]`."""
        for packet in self._take(words):
            self.world.agenda.after(0, self.world.deliver, packet)

    def drop(self, words: list[str]) -> None:
        """Lose what waits, or some: `drop [a>b]`."""
        self._take(words)

    def replay(self, words: list[str]) -> None:
        """Deliver again all that was ever sent, or some: `replay [a>b]`."""
        for packet in [p for p in self.world.network.past if _matches(p, words)]:
            self.world.agenda.after(0, self.world.deliver, packet)

    def _take(self, words: list[str]) -> list[Packet]:
        network = self.world.network
        taken = [packet for packet in network.held if _matches(packet, words)]
        network.held = [packet for packet in network.held if not _matches(packet, words)]
        return taken

    def partition(self, words: list[str]) -> None:
        """Cut links, one way each: `partition a>b b>a`."""
        for word in words:
            source, _, target = word.partition(">")
            self.world.network.cut.add((self._disk(source).host, self._disk(target).host))

    def heal(self, _: list[str]) -> None:
        """Mend all links: `heal`."""
        self.world.network.heal()

    def tick(self, words: list[str]) -> None:
        """Let members send again what peers seem to lack: `tick [a]`."""
        for name in words or list(self.world.agents):
            self._agent(name).take(ev.Tick())

    def calm(self, _: list[str]) -> None:
        """Deliver everything, and tick, until nobody has anything new: `calm`."""
        world = self.world
        self.deliver([])
        world.network.hold = False
        world.agenda.run()
        moved = True
        while moved:
            at = len(world.log)
            self.tick([])
            world.agenda.run()
            moved = not all(map(_unmoved, world.log[at:]))
        world.network.hold = True

    # --- agents and disks

    def crash(self, words: list[str]) -> None:
        """End an agent: `crash a [keep=1]`; of what is not synced so many records stay, or none."""
        told, names = _options(words)
        for name in names:
            self.world.crash(self._agent(name), int(told.get("keep", 0)))

    def boot(self, words: list[str]) -> None:
        """Start a domain's agent, as a new incarnation: `boot a`."""
        for name in words:
            self.world.boot(self._disk(name))

    def begin(self, words: list[str]) -> None:
        """Let a trainer greet the new agent of its domain: `begin a [round=1]`."""
        told, names = _options(words)
        for agent in map(self._agent, names):
            self.job.begin(self._round(told).ranks[agent.disk.domain.shard], agent)

    def freeze(self, words: list[str]) -> None:
        """Stop an agent where it is: `freeze a`."""
        for name in words:
            self._agent(name).asleep = True

    def wake(self, words: list[str]) -> None:
        """Let a frozen agent go on: `wake a.1`."""
        for name in words:
            self._agent(name).wake()

    def disk(self, words: list[str]) -> None:
        """Change a disk: `disk a stuck | full | failing | well`."""
        disk = self._disk(words[0])
        disk.full, disk.failing = words[1] == "full", words[1] == "failing"
        if words[1] == "stuck":
            disk.stuck = True
        else:
            self.world.unpark(disk)

    def rot(self, words: list[str]) -> None:
        """Damage a copy: `rot a 1/10`."""
        self.world.spoil(self._disk(words[0]), _epoch(words[1]), vanish=False)

    def vanish(self, words: list[str]) -> None:
        """Remove a copy behind everybody's back: `vanish a 1/10`."""
        self.world.spoil(self._disk(words[0]), _epoch(words[1]), vanish=True)

    def pin(self, words: list[str]) -> None:
        """Let a reader hold epochs, and no others: `pin a [1/10]`."""
        disk = self._disk(words[0])
        disk.pins = tuple(map(_epoch, words[1:]))
        self.world.look(disk)

    def fence(self, words: list[str]) -> None:
        """Let the engine give up a domain, and put an empty one in its place: `fence a`."""
        self.world.boot(self.world.fence(self._disk(words[0])))

    # --- looking

    def show(self, words: list[str]) -> list[str]:
        """Show what all members know: `show`; what is on its way: `show held`; `show journal a`."""
        if words == ["held"]:
            held = self.world.network.held
            return [f"{p.source} > {p.target}: {self.teller.message(p.message)}" for p in held]
        if words:
            return [f"  {self.teller.fact(record)}" for record in self._disk(words[1]).records]
        return [self._known(disk) for disk in self.world.disks.values() if not disk.fenced]

    def _known(self, disk: Disk) -> str:
        name = disk.domain.id
        agent = self.world.agents.get(name)
        if agent is None:
            return f"{name:<6} is down"
        member, seen = agent.shown, view(agent.shown)
        held = " ".join(str(copy.epoch) for copy in member.retained) or "nothing"
        waits = f", waits for {' '.join(seen.blocked_by)}" if seen.blocked_by else ""
        return (
            f"{name:<6} generation {member.generation}, {seen.phase}{waits}; "
            f"holds {held}; line {seen.converged or '-'}"
        )


def _idle(entry: Entry) -> bool:
    """Say whether something was heard, or a timer was due, and nothing came of it."""
    return isinstance(entry[2], ev.Received | ev.Tick) and entry[3] == ev.Effects()


def _unmoved(entry: Entry) -> bool:
    """Say whether nothing came of it but messages."""
    _, _, event, effects = entry
    done = [a for a in effects.apply if not isinstance(a, ev.Reject | ev.Overtaken)]
    return isinstance(event, ev.Received | ev.Tick) and not (effects.persist or done)


def _matches(packet: Packet, words: list[str]) -> bool:
    return not words or any(
        fnmatchcase(packet.source, source) and fnmatchcase(packet.target, target)
        for source, _, target in (word.partition(">") for word in words)
    )


def _options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    told = dict(word.split("=", 1) for word in words if "=" in word)
    return told, [word for word in words if "=" not in word]


def _epoch(word: str) -> Epoch:
    generation, _, step = word.partition("/")
    return Epoch(int(generation), int(step))


VERBS: Final[Mapping[str, Callable[[_Stage, list[str]], list[str] | None]]] = {
    "nodes": _Stage.nodes, "launch": _Stage.launch, "start": _Stage.start, "save": _Stage.save,
    "kill": _Stage.kill, "decline": _Stage.decline, "deliver": _Stage.deliver,
    "drop": _Stage.drop, "replay": _Stage.replay, "partition": _Stage.partition,
    "heal": _Stage.heal, "tick": _Stage.tick, "calm": _Stage.calm, "crash": _Stage.crash,
    "boot": _Stage.boot, "begin": _Stage.begin, "freeze": _Stage.freeze, "wake": _Stage.wake,
    "disk": _Stage.disk, "rot": _Stage.rot, "vanish": _Stage.vanish, "pin": _Stage.pin,
    "fence": _Stage.fence, "show": _Stage.show,
}  # fmt: skip
"""The verbs of scripts; each method's docstring shows how it is written."""
