"""Scenarios as text: commands, ``----``, and what came of them.

A script is a list of blocks with an empty line between them. In each, lines with ``#`` are for the
reader, the others up to ``----`` are commands, and what follows is what happened; a block without
``----`` is not told. Messages wait until they are delivered or dropped by name, disks and ranks are
prompt, and there is no chance: so what a script tells is the protocol, and nothing else. Nor is
anything that somebody wrote passed over: a word that means nothing ends the script. After
etcd-io/raft's interaction tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from itertools import chain
from random import Random
from typing import Final

from handfast.core import events as ev
from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration, Domain
from handfast.core.retain import Keep
from handfast.core.view import view
from handfast.sim.agent import Agent
from handfast.sim.disk import Disk
from handfast.sim.job import STEP, Job, Rank, Round
from handfast.sim.network import Packet
from handfast.sim.words import Teller
from handfast.sim.world import Entry, World

__all__ = ["LINE", "VERBS", "play"]

LINE: Final = "----"
SHOWN: Final = 80  # characters of a wrong line
MOST: Final = 999
"""The most that ``keep=``, ``window=`` and ``stores=`` may say."""


class _Steady(Random):
    """No chance: everything takes as long as it can least take, and the first is chosen."""

    def random(self) -> float:
        """Always 0."""
        return 0.0


def play(text: str) -> str:
    """Play a script, and give it with what really happened below each ``----``.

    Raises ``ValueError`` for a command that is none, with its line, or where there is none at all;
    and :class:`~handfast.sim.ledger.Breach` where a law is broken.
    """
    stage = _Stage()
    done: list[str] = []
    came: list[str] = []
    below = False
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        try:
            if not words:
                came, below = [], False
            elif below:
                _outcome(words[0])
                continue
            elif words == [LINE]:
                done += [line, *(came or ["(nothing)"])]
                below = True
                continue
            elif not words[0].startswith("#"):
                came += stage.do(*words)
        except ValueError as error:
            raise ValueError(f"line {number}, {line[:SHOWN]!r}: {error}") from error
        done.append(line)
    if not stage.founded:
        raise ValueError("there is no command in it; a script begins with `nodes`")
    stage.world.ledger.judge()
    return "\n".join(done)


def _outcome(first: str) -> None:
    """Hold a line below ``----`` by its first word: a command or a remark would be lost there."""
    if first in VERBS or first == LINE or first.startswith("#"):
        raise ValueError(
            f"below `{LINE}` stands what came of the commands above, up to an empty line; "
            "put one before this line"
        )


class _Stage:
    world: World
    job: Job
    teller: Teller

    def __init__(self) -> None:
        self.founded = False
        self._told = 0

    def do(self, verb: str, *words: str) -> list[str]:
        """Carry out one command, and say what came of it."""
        if verb not in VERBS:
            raise ValueError(f"no such verb; there are {', '.join(VERBS)}")
        if self.founded == (verb == "nodes"):
            raise ValueError("a script begins with `nodes`, and has no other")
        try:
            said = VERBS[verb](self, list(words)) or []
        except ValueError as error:
            ways = re.findall(f"`{verb}\\b[^`]*`", VERBS[verb].__doc__ or "")
            raise ValueError(f"{error}; it is written {' or '.join(ways)}") from error
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
        for key in told:
            if sum(word.startswith(f"{key}=") for word in words) > 1:
                raise ValueError(f"{key}= is there twice")
        tier, shard = "dir", 0
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                name, slash, where = word.partition("/")
                shard = _whole(where) if slash else shard
                domains.append(Domain(_name(name), tier, shard, name))
                need.setdefault(tier, 1)
                shard += 1
            elif key == "tier":
                tier, shard = _name(value), 0
                need.setdefault(tier, 1)
            elif key == "need":
                need[tier] = _whole(value, 1, MOST)
            elif key in told:
                told[key] = _whole(value, 1, MOST)
            else:
                raise ValueError(f"there is no {key}= here")
        if not domains:
            raise ValueError("there is no domain in it")
        shards = 1 + max(domain.shard for domain in domains)
        if shards > len(domains):
            raise ValueError(
                f"shard {shards - 1} can't be: shards are held from 0 on, without gaps"
            )
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
        held = [*self.world.agents.values(), *self.world.zombies]
        for agent in held:
            if name in (agent.id, agent.name):
                return agent
        up = ", ".join(agent.name for agent in held) or "none"
        raise ValueError(f"no agent of {name} is up; up: {up}")

    def _disk(self, name: str) -> Disk:
        if name not in self.world.disks:
            there = ", ".join(self.world.disks)
            raise ValueError(f"there is no domain {name!r}; there are {there}")
        return self.world.disks[name]

    def _member(self, name: str) -> Disk:
        disk = self._disk(name)
        if disk.fenced:
            raise ValueError(f"{name} is fenced, and {name}+ in its place")
        return disk

    def _copy(self, words: list[str]) -> tuple[Disk, Epoch]:
        """Read `a 1/10`, a copy that is there."""
        name, word = _some(words, 2, 2)
        disk, epoch = self._disk(name), _epoch(word)
        if epoch not in disk.images:
            held = ", ".join(map(str, sorted(disk.images))) or "none"
            raise ValueError(f"{name} has no copy of {epoch}; it has: {held}")
        return disk, epoch

    def _round(self, told: Mapping[str, str]) -> Round:
        rounds = self.job.rounds
        if not rounds:
            raise ValueError("nothing was launched yet")
        return rounds[_whole(told.get("round", str(len(rounds))), 1, len(rounds), "round") - 1]

    def _ranks(self, round_: Round, words: list[str]) -> list[Rank]:
        """Find ranks by their numbers; without any, all that have not ended."""
        living = [rank for rank in round_.ranks.values() if rank.alive]
        last = len(round_.ranks) - 1
        ranks = [round_.ranks[_whole(word, 0, last, "rank")] for word in words] or living
        if ended := [str(rank.shard) for rank in ranks if not rank.alive]:
            raise ValueError(f"of {round_.name} these ranks have ended: {', '.join(ended)}")
        if not ranks:
            raise ValueError(f"all ranks of {round_.name} have ended")
        return ranks

    # --- the job

    def launch(self, words: list[str]) -> None:
        """Start the job: `launch [0 1] [want=STEP] [store=1] [asked=a,b]`.

        `0 1` are the ranks that begin now (all, by default; `-`: none). `want=` is a step to go
        back to, `store=` the engine, `asked=` the domains whose reports it sees.
        """
        told, ranks = _options(words, "want", "store", "asked")
        asked = (
            [self._agent(name) for name in told["asked"].split(",")] if "asked" in told else None
        )
        want = _whole(told["want"]) if "want" in told else None
        store = _whole(told.get("store", "1"), 1, len(self.job.stores), "store") - 1
        for old in self.job.rounds:
            for rank in old.ranks.values():
                rank.alive = rank.alive and rank.step is None  # a job that runs is ended first
        round_ = self.job.launch(want=want, store=store, asked=asked)
        for rank in [] if ranks == ["-"] else self._ranks(round_, ranks):
            self.job.start(rank)

    def start(self, words: list[str]) -> None:
        """Let ranks of a launch begin now: `start [0 1] [round=1]`; all, by default."""
        told, ranks = _options(words, "round")
        for rank in self._ranks(self._round(told), ranks):
            self.job.start(rank)

    def save(self, words: list[str]) -> None:
        """Let ranks make ten steps and save: `save [0 1] [round=1] [forgo]`.

        All that have not ended, by default.
        """
        told, said = _options(words, "round")
        numbers = [word for word in said if word != "forgo"]
        for rank in self._ranks(self._round(told), numbers):
            if rank.step is None:
                raise ValueError(f"rank {rank.shard} has resumed nothing")
            self.job.save(rank, forgo="forgo" in said, steps=STEP)

    def kill(self, words: list[str]) -> None:
        """Kill ranks: `kill 1 [round=1]`."""
        told, ranks = _options(words, "round")
        for rank in self._ranks(self._round(told), _some(ranks)):
            self.job.kill(rank)

    def decline(self, words: list[str]) -> None:
        """Let every rank decline what is proposed: `decline`; no more of it: `decline no`."""
        if words not in ([], ["no"]):
            raise ValueError(f"{' '.join(words)!r} means nothing here")
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
        meant = self._meant(words)
        for packet in [packet for packet in self.world.network.past if meant(packet)]:
            self.world.agenda.after(0, self.world.deliver, packet)

    def _take(self, words: list[str]) -> list[Packet]:
        network, meant = self.world.network, self._meant(words)
        taken = [packet for packet in network.held if meant(packet)]
        network.held = [packet for packet in network.held if not meant(packet)]
        return taken

    def _meant(self, words: list[str]) -> Callable[[Packet], bool]:
        """Read which messages are meant: all, or those of links, with `*` for any name."""
        links = [_link(word) for word in words]
        for name in chain(*links):
            if not any(fnmatchcase(domain, name) for domain in self.world.disks):
                self._disk(name)  # there is none: it says so
        return lambda packet: (
            not links
            or any(
                fnmatchcase(packet.source, source) and fnmatchcase(packet.target, target)
                for source, target in links
            )
        )

    def partition(self, words: list[str]) -> None:
        """Cut links, one way each: `partition a>b b>a`."""
        for source, target in map(_link, _some(words)):
            self.world.network.cut.add((self._disk(source).host, self._disk(target).host))

    def heal(self, words: list[str]) -> None:
        """Mend all links: `heal`."""
        _some(words, 0, 0)
        self.world.network.heal()

    def tick(self, words: list[str]) -> None:
        """Let members send again what peers seem to lack: `tick [a]`."""
        for name in words or list(self.world.agents):
            self._agent(name).take(ev.Tick())

    def calm(self, words: list[str]) -> None:
        """Deliver everything, and tick, until nobody has anything new: `calm`."""
        _some(words, 0, 0)
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
        told, names = _options(words, "keep")
        keep = _whole(told.get("keep", "0"))
        for name in _some(names):
            self.world.crash(self._agent(name), keep)

    def boot(self, words: list[str]) -> None:
        """Start a domain's agent, as a new incarnation: `boot a`."""
        for name in _some(words):
            self.world.boot(self._member(name))

    def begin(self, words: list[str]) -> None:
        """Let a trainer greet the new agent of its domain: `begin a [round=1]`."""
        told, names = _options(words, "round")
        for agent in map(self._agent, _some(names)):
            (rank,) = self._ranks(self._round(told), [str(agent.disk.domain.shard)])
            self.job.begin(rank, agent)

    def freeze(self, words: list[str]) -> None:
        """Stop an agent where it is: `freeze a`."""
        for name in _some(words):
            self._agent(name).asleep = True

    def wake(self, words: list[str]) -> None:
        """Let a frozen agent go on: `wake a.1`."""
        for name in _some(words):
            agent = self._agent(name)
            if not agent.asleep:
                raise ValueError(f"{agent.name} is not frozen")
            agent.wake()

    def disk(self, words: list[str]) -> None:
        """Change a disk: `disk a stuck | full | failing | well`."""
        name, how = _some(words, 2, 2)
        disk = self._disk(name)
        if how not in ("stuck", "full", "failing", "well"):
            raise ValueError(f"a disk can't be {how!r}")
        disk.full, disk.failing = how == "full", how == "failing"
        if how == "stuck":
            disk.stuck = True
        else:
            self.world.unpark(disk)

    def rot(self, words: list[str]) -> None:
        """Damage a copy: `rot a 1/10`."""
        self.world.spoil(*self._copy(words), vanish=False)

    def vanish(self, words: list[str]) -> None:
        """Remove a copy behind everybody's back: `vanish a 1/10`."""
        self.world.spoil(*self._copy(words), vanish=True)

    def pin(self, words: list[str]) -> None:
        """Let a reader hold epochs, and no others: `pin a [1/10]`."""
        name, *epochs = _some(words)
        disk = self._disk(name)
        disk.pins = tuple(map(_epoch, epochs))
        self.world.look(disk)

    def fence(self, words: list[str]) -> None:
        """Let the engine give up a domain, and put an empty one in its place: `fence a`.

        Another one has to hold its shard: what nobody has any more is lost, whoever decides it.
        """
        founders = self.world.ledger.rosters[0].ids  # they have genesis, and an heir has nothing
        for disk in map(self._member, _some(words)):
            name, shard = disk.domain.id, disk.domain.shard
            holders = [d for d in self.world.disks.values() if d.domain.shard == shard
                       and not d.fenced and (d.images or d.domain.id in founders)]  # fmt: skip
            if holders in ([], [disk]):
                raise ValueError(f"nobody but {name} holds shard {shard}: it would be lost")
            self.world.boot(self.world.fence(disk))

    # --- looking

    def show(self, words: list[str]) -> list[str]:
        """Show what all members know: `show`; what is on its way: `show held`; `show journal a`."""
        match words:
            case []:
                return [self._known(disk) for disk in self.world.disks.values() if not disk.fenced]
            case ["held"]:
                held = self.world.network.held
                return [f"{p.source} > {p.target}: {self.teller.message(p.message)}" for p in held]
            case ["journal", name]:
                return [f"  {self.teller.fact(record)}" for record in self._disk(name).records]
        raise ValueError(f"{' '.join(words)!r} can't be shown")

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


def _some(words: list[str], least: int = 1, most: int | None = None) -> list[str]:
    if len(words) < least:
        raise ValueError("something is missing behind the verb" if not words else "too few words")
    if most is not None and len(words) > most:
        raise ValueError(f"{words[most]!r} is too much")
    return words


def _options(words: list[str], *names: str) -> tuple[dict[str, str], list[str]]:
    told: dict[str, str] = {}
    for name, equals, value in (word.partition("=") for word in words):
        if equals and name not in names:
            raise ValueError(f"there is no {name}= here")
        if equals and told.setdefault(name, value) != value:
            raise ValueError(f"{name}= is there twice")
    return told, [word for word in words if "=" not in word]


def _whole(word: str, least: int = 0, most: int | None = None, what: str = "whole number") -> int:
    number = int(word) if re.fullmatch("[0-9]{1,18}", word) else -1
    if number < least or (most is not None and number > most):
        span = f"from {least} up" if most is None else f"from {least} to {most}"
        raise ValueError(f"{word!r} is no {what} {span}")
    return number


def _name(word: str) -> str:
    if word in VERBS or not re.fullmatch(r"\w[\w-]*", word):
        raise ValueError(f"{word!r} can't be a name: letters, digits, _ and (not first) -, no verb")
    return word


def _link(word: str) -> tuple[str, str]:
    source, arrow, target = word.partition(">")
    if not arrow:
        raise ValueError(f"{word!r} is no link, as a>b is")
    return source, target


def _epoch(word: str) -> Epoch:
    parts = re.fullmatch("([0-9]{1,18})/([0-9]{1,18})", word)
    if parts is None:
        raise ValueError(f"{word!r} is no epoch, as 1/10 is")
    return Epoch(int(parts[1]), int(parts[2]))


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
