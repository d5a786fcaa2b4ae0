"""A small seeded world around the real `member.step`: a network, disks, trainers and rounds.

Nothing here knows the protocol. The network loses, doubles, reorders, delays and replays whatever
was ever sent, of any generation, round or incarnation. A journal is the list of records that were
synced; a crash may cut a batch of effects at any boundary: inside the records, before the sends,
between two of them, before the applies. Agents come back as new incarnations from the journal.
Jobs are started anew, at will overlapping, by one or two engines' stores. Copies rot and vanish,
persisting fails, ranks decline or never answer, readers pin, and a member may be fenced.

After every call of `step` all laws of `handfast.laws.invariants` are held against the truth.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.converge import Ballot, Tally
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import (
    Change,
    Configuration,
    Domain,
    Entrant,
    Formation,
    Roster,
    RoundRecord,
    allocate,
    form,
)
from handfast.core.messages import (
    Configured,
    Lost,
    Record,
    Staged,
    decode_message,
    decode_record,
    encode,
)
from handfast.core.retain import Keep
from handfast.core.state import Member, Peers
from handfast.laws.goals import reached
from handfast.laws.invariants import (
    ALWAYS,
    EVENTUALLY,
    STANDSTILL,
    Truth,
    Turn,
    Written,
    breaches,
)
from handfast.laws.steps import OF_A_STEP
from handfast.model.scenarios import shape
from handfast.model.tell import brief

HEARING = (
    *(law for law in ALWAYS if law.__name__[:3] in ("s1_", "s2_", "s9_")),
    *OF_A_STEP,
)


class Breach(AssertionError):
    """A law is broken; `.laws` names which."""

    def __init__(self, found: tuple[str, ...], story: list[str]) -> None:
        self.laws = {words.split(":")[0].split("_")[0] for words in found}
        super().__init__("\n".join((*found, "after:", *story[-400:])))


SHAPES = {
    "one": shape(1, dir=(1, 1)),
    "two": shape(2, dir=(1, 1)),
    "three": shape(3, dir=(1, 1)),
    "four": shape(4, dir=(1, 1)),
    "either": shape(2, dir=(2, 1)),
    "both": shape(2, dir=(2, 2)),
    "tiers": shape(2, dir=(1, 1), mem=(1, 1)),
    "tower": shape(1, dir=(2, 2), mem=(1, 1)),
    "tree": shape(4, fanout=2, dir=(1, 1)),
    "trees": shape(2, fanout=2, dir=(2, 2), mem=(1, 1)),
}
LARGE = {
    "ragged": shape(6, fanout=2, dir=(1, 1)),
    "wood": shape(12, dir=(1, 1)),
    "copse": shape(8, fanout=2, dir=(2, 2)),
}


@dataclass
class Image:
    digest: str
    sound: bool = True


@dataclass
class Node:
    """One domain: its disk, its journal, and its agent's member while that is up."""

    domain: Domain
    member: Member | None = None
    incarnation: int = 0
    records: list[Record] = field(default_factory=list)
    images: dict[Epoch, Image] = field(default_factory=dict)
    todo: list[ev.Action] = field(default_factory=list)
    pins: tuple[Epoch, ...] = ()
    unread: bool = False
    turns: int = 0
    armed: int | None = None
    fenced: bool = False

    @property
    def id(self) -> str:
        return self.domain.id


@dataclass
class Round:
    """One start of the job: what its trainers tell the agents."""

    name: str
    generation: int
    roster: Roster
    founding: bool
    changes: tuple[Change, ...]
    want: int | None
    alive: dict[int, bool] = field(default_factory=dict)
    step: dict[int, int] = field(default_factory=dict)

    def begin(self, keep: Keep, window: int) -> ev.Begin:
        return ev.Begin(
            self.generation, self.name, self.roster, self.founding, self.changes, self.want, keep,
            window,
        )  # fmt: skip


KEEP = Keep(2)


class World:
    """Domains, engines' stores, a network, and the truth about them."""

    def __init__(
        self, configuration: Configuration, *, keep: Keep = KEEP, window: int = 2, stores: int = 1
    ) -> None:
        self.rosters = [Roster(configuration)]
        self.nodes = {d.id: Node(d) for d in configuration.domains}
        self.stores: list[RoundRecord | None] = [None] * stores
        self.changes: tuple[Change, ...] = ()
        self.rounds: list[Round] = []
        self.keep, self.window = keep, window
        self.journal: list[Written] = []
        self.spoilt: set[tuple[str, Epoch]] = set()
        self.published: list[tuple[str, object]] = []
        self.stuck: dict[str, ev.Stuck] = {}
        self.resumed: list[tuple[str, object]] = []
        self.sent: list[tuple[str, bytes]] = []
        self.pending: list[int] = []
        self.story: list[str] = []
        self.goals: Counter[str] = Counter()
        self.turns = 0
        self.stirred = False
        self.laws = ALWAYS
        self.fussy = 0.0  # how often a rank declines
        self.exchanges = 0
        for node in self.nodes.values():
            self.boot(node)

    # --- what is true

    def truth(self, turn: Turn | None = None) -> Truth:
        nodes = self.nodes.values()
        return Truth(
            rosters=tuple(self.rosters),
            journal=tuple(self.journal),
            sound=frozenset((n.id, e, i.digest) for n in nodes for e, i in n.images.items()
                            if i.sound),
            spoilt=frozenset(self.spoilt),
            published=tuple(self.published),
            resumed=tuple(self.resumed),
            pinned=frozenset((n.id, e) for n in nodes for e in n.pins),
            keep=self.keep,
            members=tuple(n.member for n in nodes if n.member is not None and not n.fenced),
            turn=turn,
            exchanges=self.exchanges,
        )  # fmt: skip

    def judge(self, turn: Turn | None = None, laws: tuple = ALWAYS) -> None:
        truth = self.truth(turn)
        if found := breaches(truth, laws):
            raise Breach(found, self.story)
        if turn is not None:
            self.goals.update(reached(turn))

    # --- one domain

    def run(self, node: Node, event: ev.Event) -> None:
        """Take one event, carry out its effects in their order, or crash somewhere among them."""
        if node.member is None:
            return
        before = node.member
        after, effects = door.step(before, event)
        self.turns += 1
        node.turns += 1
        todo = [*effects.persist, *effects.send, *effects.apply]
        cut = len(todo)
        if node.armed is not None and todo:
            cut = node.armed % (len(todo) + 1)
            node.armed = None
            self.story.append(f"  the next is cut after {cut} of {len(todo)} effects")
        crashed = cut < len(todo)
        self.story.append(f"{node.id}.{node.incarnation} {brief(event)} -> "
                          f"{', '.join(map(brief, todo))}")  # fmt: skip
        persist, send = effects.persist[:cut], effects.send[: max(0, cut - len(effects.persist))]
        apply = effects.apply[: max(0, cut - len(effects.persist) - len(effects.send))]
        for record in persist:
            assert decode_record(encode(record)) == record
            node.records.append(record)
            self.journal.append(Written(node.id, before.incarnation, record))
        for message in send:
            self.post(message, after)
        node.member = None if crashed else after
        for action in apply:
            self.apply(node, action)
        if crashed:
            node.todo.clear()
        done = ev.Effects(persist, send, apply)
        # What is only heard can break no law of the journals and the disks.
        laws = self.laws if persist or apply or self.stirred else HEARING
        self.stirred = False
        self.judge(Turn(before, event, after, done, node.turns == 1, crashed), laws)
        if persist and not crashed:
            again = door.boot(node.id, node.incarnation, node.records, after.lost)
            assert durable(again) == durable(after), f"{durable(again)}\n{durable(after)}"
        elif not crashed:
            assert durable(before) == durable(after), f"{durable(before)}\n{durable(after)}"

    def post(self, send: ev.Send, member: Member) -> None:
        assert member.roster is not None
        data = encode(send.message)
        assert decode_message(data) == send.message
        self.pending.append(len(self.sent))
        self.sent.append((member.roster.ids[send.to], data))

    def apply(self, node: Node, action: ev.Action) -> None:
        match action:
            case ev.Persist() | ev.Check() | ev.Propose():
                node.todo.append(action)
            case ev.Publish():
                self.published.append((node.id, action.certificate))
            case ev.Resume():
                self.resumed.append((node.id, action.certificate))
                for round_ in self.rounds:
                    shard = node.domain.shard
                    if round_.name == action.certificate.round and round_.alive.get(shard):
                        round_.step.setdefault(shard, action.certificate.base.step)
            case ev.Stuck():
                self.stuck[node.id] = action
            case ev.Release():
                for epoch in action.epochs:
                    node.images.pop(epoch, None)
            case _:
                pass

    def crash(self, node: Node) -> None:
        self.story.append(f"{node.id}.{node.incarnation} crashes")
        node.member = None
        node.todo.clear()

    def boot(self, node: Node) -> None:
        node.incarnation += 1
        node.armed = None
        records = [decode_record(encode(record)) for record in node.records]
        held = door.boot(node.id, node.incarnation, records).retained
        lost = tuple(
            Lost(copy.epoch, "missing")
            for copy in held
            if copy.epoch != GENESIS and copy.epoch not in node.images
        )
        node.member = door.boot(node.id, node.incarnation, records, lost)
        node.unread, node.turns = True, 0
        self.story.append(f"{node.id}.{node.incarnation} boots")

    def work(self, node: Node, at: int = 0, *, fail: bool = False, decline: bool = False) -> None:
        """Do one thing that the agent was asked for: persist, check, or ask the rank."""
        action = node.todo.pop(at)
        match action:
            case ev.Persist():
                if fail:
                    self.run(node, ev.Failed(action.epoch, "no space"))
                    return
                digest = f"{node.id}:{node.incarnation}:{action.epoch}"
                if not self.attested(node, action.epoch):
                    node.images[action.epoch] = Image(digest)
                self.run(node, ev.Persisted(action.epoch, digest))
            case ev.Check():
                image = node.images.get(action.epoch)
                reason = "missing" if image is None else "" if image.sound else "damaged"
                self.run(node, ev.Checked(action.generation, action.epoch, reason))
            case ev.Propose():
                self.answer(node, action, decline)

    def answer(self, node: Node, action: ev.Propose, decline: bool) -> None:
        shard = node.domain.shard
        for round_ in self.rounds:
            if round_.generation == action.generation and round_.alive.get(shard):
                if decline:
                    self.run(node, ev.Decline(action.generation, action.epoch, "other structure"))
                else:
                    copy = action.copies[shard].bit_length() - 1
                    self.run(node, ev.Accept(action.generation, action.epoch, copy))
                return

    def attested(self, node: Node, epoch: Epoch) -> bool:
        return any(isinstance(r, Staged) and r.epoch == epoch for r in node.records)

    # --- damage, readers

    def spoil(self, node: Node, epoch: Epoch, *, vanish: bool) -> None:
        self.story.append(f"{node.id}: {epoch} {'vanishes' if vanish else 'rots'}")
        self.stirred = True
        self.spoilt.add((node.id, epoch))
        if vanish:
            del node.images[epoch]
        else:
            node.images[epoch].sound = False

    def pin(self, node: Node, *epochs: Epoch) -> None:
        node.pins = epochs
        self.look(node)

    def look(self, node: Node) -> None:
        """Let the agent read which pins there are; after a boot that may take a while."""
        node.unread = False
        self.run(node, ev.Pinned(node.pins))

    def put_back(self, node: Node, other: "World") -> None:
        """Put a domain's directory in the place of what this world has of that domain.

        The other world is a copy of this one that went on apart, so that S6 is broken from then on,
        by hand: a generation has begun twice. Nothing else may break.
        """
        self.story.append(f"{node.id} is taken from a copy of the run")
        self.nodes[node.id] = node
        ours = [written for written in self.journal if written.domain != node.id]
        self.journal = ours + [written for written in other.journal if written.domain == node.id]
        self.published = [(domain, c) for domain, c in self.published if domain != node.id]
        self.resumed = [(domain, c) for domain, c in self.resumed if domain != node.id]
        self.laws = tuple(law for law in ALWAYS if not law.__name__.startswith("s6_"))
        self.stirred = True

    # --- rounds

    def launch(
        self, *, want: int | None = None, store: int = 0, asked: list[Node] | None = None,
        roster: Roster | None = None,
    ) -> Round:  # fmt: skip
        """Begin a new round of an engine: allocate its generation from what members report."""
        name = f"round{len(self.rounds)}"
        nodes = list(self.nodes.values()) if asked is None else asked
        reported = max((n.member.generation for n in nodes if n.member), default=0)
        record = allocate(self.stores[store], name, reported)
        assert record is not None
        self.stores[store] = record
        roster = roster or self.rosters[-1]
        round_ = Round(name, record.generation, roster, self.founding(), self.changes, want)
        round_.alive = dict.fromkeys(range(roster.configuration.shards), True)
        self.rounds.append(round_)
        self.story.append(f"{name}: generation {record.generation}, want {want}")
        return round_

    def founding(self) -> bool:
        """Ask the core whether this start founds the run, as the ranks of a job would."""
        first = self.rosters[0].configuration
        entrants = []
        for node in self.nodes.values():
            known = [r.configuration for r in node.records if isinstance(r, Configured)]
            entrants.append(Entrant(node.domain, known[-1] if known else None, 0))
        formed = form(entrants, shards=first.shards, need=first.need, run="run")
        return isinstance(formed, Formation) and formed.founding and not self.changes

    def begin(self, round_: Round, node: Node, **other: object) -> None:
        if node.fenced or node.id not in round_.roster.ids:
            return
        if round_.alive.get(node.domain.shard):
            event = round_.begin(self.keep, self.window)
            self.run(node, msgspec.structs.replace(event, **other))

    def save(self, round_: Round, shard: int, *, forgo: bool = False) -> None:
        """Let one rank reach its next step, and hand its image to all domains of its shard."""
        round_.step[shard] += 10
        epoch = Epoch(round_.generation, round_.step[shard])
        for node in self.nodes.values():
            if node.domain.shard == shard and not node.fenced:
                self.run(node, ev.Forgone(epoch, "skipped") if forgo else ev.Captured(epoch))

    def change(self, node: Node) -> None:
        """Let the engine record that one domain is gone for good, and a new one takes its place."""
        old = self.rosters[-1].configuration
        self.crash(node)
        node.fenced = self.stirred = True
        self.spoilt |= {(node.id, epoch) for epoch in node.images if self.attested(node, epoch)}
        heir = msgspec.structs.replace(node.domain, id=f"{node.id}+")
        domains = tuple(heir if d.id == node.id else d for d in old.domains)
        new = msgspec.structs.replace(old, domains=domains)
        self.changes += (Change(old.digest(), new.digest(), (node.id,)),)
        self.rosters.append(Roster(new))
        self.nodes[heir.id] = Node(heir)
        self.story.append(f"{node.id} is fenced, {heir.id} takes its place")
        self.boot(self.nodes[heir.id])

    # --- the network

    def deliver(self, at: int) -> None:
        to, data = self.sent[at]
        node = self.nodes[to]
        if not node.fenced:
            self.run(node, ev.Received(decode_message(data)))

    # --- calm

    def here(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.member is not None and not n.fenced]

    def drain(self, rng: random.Random) -> None:
        """Deliver all that is under way, and do all that was asked for, until nothing is left."""
        while True:
            busy = [node for node in self.here() if node.todo]
            if self.pending and (not busy or rng.random() < 0.7):
                self.deliver(self.pending.pop(rng.randrange(len(self.pending))))
            elif busy:
                self.work(rng.choice(busy), decline=rng.random() < self.fussy)
            else:
                return

    def settle(self, rng: random.Random) -> None:
        """Tick all members and deliver everything until a tick sends nothing more."""
        self.drain(rng)
        for _ in range(60):
            sent = len(self.sent)
            for node in self.here():
                self.run(node, ev.Tick())
            if not self.pending:
                return
            self.exchanges += 1
            self.drain(rng)
            if all(self.nodes[to].member is None for to, _ in self.sent[sent:]):
                return

    def calm(self, rng: random.Random, away: int = 0) -> bool:
        """End the storm: all up but some, fair links, a new round; judge what must come of it.

        Says whether the job resumed; it may not only where no eligible epoch is left.
        """
        nodes = [node for node in self.nodes.values() if not node.fenced]
        for node in nodes:
            node.armed = None
            if node.member is None:
                self.boot(node)
            self.look(node)
        self.fussy = 0.0
        round_ = self.launch()
        for node in nodes[:away]:
            self.crash(node)
        rng.shuffle(nodes)
        for node in nodes:
            self.begin(round_, node)
        self.exchanges = 0
        self.settle(rng)
        if away:
            self.judge(laws=STANDSTILL)
            return False
        if not any(node.member.open for node in nodes):
            return self.hopeless(round_)
        self.judge(laws=EVENTUALLY[:-1])
        for _ in range(2):
            self.exchanges = 0
            for shard in round_.step:
                self.save(round_, shard)
            self.settle(rng)
            self.judge(laws=EVENTUALLY)
        lines = {t.line.epoch.generation for n in nodes for t in n.member.tallies if t.line}
        assert lines == {round_.generation}, "nothing converged in the calm"
        return True

    def hopeless(self, round_: Round) -> bool:
        """Nothing was restored: then no living epoch is left intact for every shard."""
        truth = self.truth()
        if found := truth.restorable:
            raise Breach((f"l3_recovery: {found} could be restored and was not",), self.story)
        return False


def durable(member: Member) -> Member:
    """Show what of a member its journal holds: without peers' words, settings, and work begun."""
    mine = 1 << max(member.me, 0)
    votes = [Staged(member.me, copy.epoch, copy.digest) for copy in member.retained]
    tallies = tuple(
        Tally(
            tally.line,
            tuple(
                Ballot(b.epoch, own, tuple(s for s in b.skips if s.domain == member.me))
                for b in tally.ballots
                if (b.staged | b.skipped) & mine
                for own in [tuple(v for v in votes if v.epoch == b.epoch)]
            ),
        )
        for tally in member.tallies
    )
    recovery = member.recovery
    if recovery is not None and member.roster is not None:
        checks = tuple(
            msgspec.structs.replace(
                c, valid=c.valid & mine, bad=c.bad & mine,
                reasons=tuple(r for r in c.reasons if r[0] == member.me),
            )
            for c in recovery.checks
            if (c.valid | c.bad) & mine
        )  # fmt: skip
        recovery = msgspec.structs.replace(
            recovery,
            reports=tuple(r if i == member.me else None for i, r in enumerate(recovery.reports)),
            checks=checks,
            accepted=tuple(
                a if member.roster.homes[s] == member.me else None
                for s, a in enumerate(recovery.accepted)
            ),
            declined=(),
        )
    return msgspec.structs.replace(
        member, tallies=tallies, recovery=recovery, peers=Peers(), turned=-1,
        keep=None, window=2, pinned=None, told=None, checking=None, persisting=(), last=None,
    )  # fmt: skip


# --- storms: a seed decides everything


class Storm:
    """Drive a world at random. Every choice comes from the one seed."""

    def __init__(self, seed: int, name: str | None = None, **settings) -> None:
        self.rng = random.Random(f"{seed}/{name}")
        name = name or self.rng.choice(sorted(SHAPES))
        settings.setdefault("keep", self.rng.choice([Keep(1), Keep(1), Keep(2), Keep(4, every=40)]))
        settings.setdefault("window", self.rng.choice([1, 2, 2]))
        settings.setdefault("stores", self.rng.choice([1, 1, 2]))
        self.world = World({**SHAPES, **LARGE}[name], **settings)
        self.damage = self.rng.choice([0, 1, 1, 3])
        self.moves = {
            self.hear: 14, self.labour: 7, self.train: 5, self.start: 4, self.wake: 2,
            self.nag: 2, self.echo: 1, self.fall: 1, self.relaunch: 0.5, self.rot: 0.3,
            self.read: 0.3, self.kill: 0.3, self.fence: 0.06, self.meet: 0.5, self.look: 1,
        }  # fmt: skip

    def blow(self, moves: int) -> World:
        """Make so many random moves."""
        for _ in range(moves):
            move = self.rng.choices(list(self.moves), list(self.moves.values()))[0]
            move()
        return self.world

    def lull(self) -> None:
        """Let the job get on for a while: most are up, and most of what is sent arrives."""
        world, rng = self.world, self.rng
        world.fussy = 0.03
        for node in world.nodes.values():
            if node.member is None and not node.fenced and rng.random() < 0.9:
                world.boot(node)
        if rng.random() < 0.3:
            self.rot()
        steps = self.common()
        want = rng.choice(steps) if steps and rng.random() < 0.5 else None
        world.launch(want=want, store=rng.randrange(len(world.stores)))
        for node in world.here():
            world.look(node)
            world.begin(world.rounds[-1], node)
        world.settle(rng)
        for _ in range(rng.choice([0, 0, 1, 2, 3])):
            for shard in sorted(world.rounds[-1].step):
                world.save(world.rounds[-1], shard)
            for _ in range(rng.choice([0, 5, 40])):
                rng.choice([self.hear, self.labour])()
            if rng.random() < 0.5:
                world.settle(rng)

    def common(self) -> list[int]:
        """Name the steps of which every shard has an image: what a user may ask for."""
        shards = {node.domain.shard for node in self.world.nodes.values()}
        held = [
            {e.step for n in self.world.nodes.values() if n.domain.shard == s for e in n.images}
            for s in sorted(shards)
        ]
        return sorted(set.intersection(*held))

    def up(self) -> list[Node]:
        return self.world.here()

    def hear(self) -> None:
        world, rng = self.world, self.rng
        if not world.pending:
            return
        at = rng.randrange(len(world.pending))
        luck = rng.random()
        packet = world.pending[at] if luck < 0.1 else world.pending.pop(at)
        if luck < 0.9:
            world.deliver(packet)

    def echo(self) -> None:
        if self.world.sent:
            self.world.deliver(self.rng.randrange(len(self.world.sent)))

    def labour(self) -> None:
        busy = [node for node in self.up() if node.todo]
        if busy:
            node = self.rng.choice(busy)
            at = self.rng.randrange(len(node.todo))
            fail, decline = self.rng.random() < 0.1, self.rng.random() < 0.08
            self.world.work(node, at, fail=fail, decline=decline)

    def train(self) -> None:
        running = [(r, s) for r in self.world.rounds for s in r.step if r.alive[s]]
        if running:
            newest = [(r, s) for r, s in running if r is running[-1][0]]
            slowest = min(newest, key=lambda pair: pair[0].step[pair[1]])
            rank = slowest if self.rng.random() < 0.8 else self.rng.choice(running)
            self.world.save(*rank, forgo=self.rng.random() < 0.06)

    def start(self) -> None:
        up = self.up()
        if self.world.rounds and up:
            late = self.rng.random() < 0.15
            round_ = self.rng.choice(self.world.rounds) if late else self.world.rounds[-1]
            behind = [n for n in up if n.member.generation < round_.generation]
            other = {"want": self.rng.choice([None, 10, 20])} if self.rng.random() < 0.02 else {}
            self.world.begin(round_, self.rng.choice(behind or up), **other)

    def wake(self) -> None:
        down = [n for n in self.world.nodes.values() if n.member is None and not n.fenced]
        if down:
            self.world.boot(self.rng.choice(down))

    def look(self) -> None:
        if unread := [node for node in self.up() if node.unread]:
            self.world.look(self.rng.choice(unread))

    def nag(self) -> None:
        if up := self.up():
            self.world.run(self.rng.choice(up), ev.Tick())

    def meet(self) -> None:
        up = [node for node in self.up() if node.member.roster is not None]
        if up:
            node = self.rng.choice(up)
            if others := node.member.roster.neighbours[node.member.me]:
                self.world.run(node, ev.Greet(self.rng.choice(others)))

    def fall(self) -> None:
        if up := self.up():
            node = self.rng.choice(up)
            if self.rng.random() < 0.7:
                node.armed = self.rng.randrange(12)
            else:
                self.world.crash(node)

    def relaunch(self) -> None:
        world, rng = self.world, self.rng
        steps = self.common()
        want = rng.choice(steps) if steps and rng.random() < 0.3 else None
        asked = rng.sample(self.up(), rng.randint(0, len(self.up())))
        store = rng.randrange(len(world.stores))
        world.launch(want=want, store=store, asked=asked)

    def kill(self) -> None:
        if self.world.rounds:
            round_ = self.rng.choice(self.world.rounds[-2:])
            shard = self.rng.choice(sorted(round_.alive))
            self.world.story.append(f"rank {shard} of {round_.name} dies")
            round_.alive[shard] = False

    def rot(self) -> None:
        held = [
            (node, epoch)
            for node in self.world.nodes.values()
            for epoch, image in node.images.items()
            if image.sound and self.world.attested(node, epoch)
        ]
        if held and self.damage:
            self.damage -= 1
            self.world.spoil(*self.rng.choice(held), vanish=self.rng.random() < 0.4)

    def read(self) -> None:
        if up := self.up():
            node = self.rng.choice(up)
            held = [copy.epoch for copy in node.member.retained]
            count = self.rng.randint(0, min(1, len(held)))
            self.world.pin(node, *self.rng.sample(held, count))

    def fence(self) -> None:
        world = self.world
        if not world.changes and world.resumed and len(world.nodes) > 1:
            world.change(self.rng.choice(list(world.nodes.values())))


def storm(seed: int, name: str | None = None, moves: int = 50, **settings) -> World:
    """Run one seeded storm and the calm after it; raises :class:`Breach` where a law is broken.

    Gusts and lulls take turns, so that there is a history worth damaging.
    """
    tempest = Storm(seed, name, **settings)
    for _ in range(4):
        tempest.lull()
        world = tempest.blow(moves)
    if tempest.rng.random() < 0.15 and len(world.here()) > 1:
        world.calm(tempest.rng, away=1)
    world.calm(tempest.rng)
    return world
