"""Every state of a small fleet: real nodes of :mod:`handfast.core.rollout`, slots, boots and plans.

The network is a soup of facts, as in :mod:`handfast.model.soup`: whatever anyone has written may be
heard by anyone in that round, at any time, in any order, again, or never. What a node has heard and
not acted upon it may as well hear later, so of a machine its journal is kept, its slots, and what
this incarnation has proven; a move is what it hears in silence, and what it does then.

A machine has two slots, and a boot loader that may wake in either. A crash is a boot, and cuts what
is written anywhere. Probes find good all that :class:`Setting` does not call unfit. Declines are
never written, so they are not for the soup. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import msgspec

from handfast.core import events as ev
from handfast.core import messages as ms
from handfast.core import recover, rollout
from handfast.core.fold import fold
from handfast.core.lattice import Epoch
from handfast.core.membership import Change, Configuration, Domain, Roster
from handfast.core.rollout import Node
from handfast.core.state import Member

__all__ = ["LAWS", "Fleet", "Laws", "Machine", "Move", "Plan", "Setting", "World"]

_replace = msgspec.structs.replace
_SAID: Final = (ms.Frozen, ms.Staged, ms.Skipped, ms.Valid, ms.Bad, ms.Accepted, ms.Restored)


class Plan(msgspec.Struct, frozen=True):
    """One generation: the bundle that it aims at ("" only goes back), the step that it asks for,
    and whether an operator will finalise it.
    """

    bundle: str
    want: int | None = None
    final: bool = False


class Setting(msgspec.Struct, frozen=True):
    """A fleet of ``nodes``, its plans, and what may happen to it.

    ``begins`` is what every machine runs at first; ``unfit`` are (node, bundle) whose probes fail;
    ``boots`` is how often machines may boot, all together, beside those that they are asked for.
    The last plan is one without the last node where it ``leaves``: an engine has recorded that, on
    evidence that it can't act any more; without that evidence it is not ``fenced``. Or the last
    node ``joins`` with the last plan: it runs what all began with, and is told under which epoch
    the others hold that. The first plans that are ``over`` have ended, as they do where nothing
    goes wrong, before the search begins.
    """

    plans: tuple[Plan, ...]
    nodes: int = 2
    begins: str = "a"
    unfit: tuple[tuple[int, str], ...] = ()
    boots: int = 0
    over: int = 0
    leaves: bool = False
    fenced: bool = True
    joins: Epoch | None = None


class Machine(msgspec.Struct, frozen=True, array_like=True):
    """One node: its journal and slots outlive boots; ``runs`` is the slot that it woke in.

    ``lives`` are the bundles that its incarnations have proven, "" where the probes failed, and
    ``boots`` counts those that nobody asked for. A ``fenced`` one does nothing any more.
    """

    journal: tuple[ms.Record, ...]
    slots: tuple[str, str]
    lives: tuple[str, ...]
    runs: int = 0
    boots: int = 0
    fenced: bool = False


World: TypeAlias = "tuple[Machine, ...]"


class Move(msgspec.Struct, frozen=True):
    """Who does what; ``calm`` where it needs no fault."""

    who: int
    what: str
    calm: bool = True


class _Deed(msgspec.Struct, frozen=True):
    """What a node can do after hearing something: write records, or boot what it wants."""

    what: str
    records: tuple[ms.Record, ...] = ()
    wants: str = ""


class Fleet:
    """The transition system of a setting, for :func:`handfast.model.explore.explore`."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ids = tuple(f"node-{i}" for i in range(setting.nodes))
        first, then, gone = _roster(self.ids), _roster(self.ids[:-1]), self.ids[-1:]
        if setting.joins is not None:
            first, then, gone = then, first, ()
        change = Change(first.digest, then.digest, gone)
        changes = setting.leaves or setting.joins is not None
        last = len(setting.plans) - 1 if changes else len(setting.plans)
        self.begins = tuple(
            ev.Begin(
                at + 1,
                rollout.round_name(f"plan-{at + 1}", plan.bundle),
                (then if at >= last else first) if changes else _roster(self.ids),
                founding=True,
                changes=() if at < last else (change,),
                want=plan.want,
            )
            for at, plan in enumerate(setting.plans)
        )
        self._deeds: dict[tuple[int, Machine, frozenset[ms.Fact], bool], tuple[_Deed, ...]] = {}
        self._nodes: dict[tuple[int, Machine], Node] = {}
        self._said: dict[tuple[ms.Record, ...], tuple[tuple[int, ms.Fact], ...]] = {}

    def initial(self) -> Iterator[World]:
        """Machines that run what they ran before anybody rolled anything out."""
        first = self.setting.begins
        world: World = (Machine((), (first, ""), (first,)),) * self.setting.nodes
        good = "" if (self.setting.nodes - 1, first) in self.setting.unfit else first
        late = (_replace(world[0], lives=(good,)),) if self.setting.joins is not None else ()
        nodes = self.setting.nodes - len(late)
        world = world[:nodes]
        for at in range(self.setting.over):
            before = Setting(self.setting.plans[: at + 1], nodes, first, self.setting.unfit)
            world = Fleet(before).end(world)
        yield (*world, *late)

    def end(self, world: World) -> World:
        """Where the last plan ends if all do at once what there is to do."""
        laws = Laws(self)
        while not laws.ends(world):
            said = len(self.begins)
            moves = [(m, w) for m, w in self.moves(world) if m.calm]
            newest = [w for m, w in moves if m.what == f"begins plan {said}"]
            world = newest[0] if newest else moves[0][1]
        return world

    def moves(self, world: World) -> Iterator[tuple[Move, World]]:
        """Give what can happen: plans, facts that are heard, boots, an operator's word."""
        last = len(self.ids) - 1
        if self.setting.leaves and self.setting.fenced and not world[last].fenced:
            move = Move(last, "is fenced")
            yield move, _put(world, last, _replace(world[last], fenced=True))
        for who, machine in enumerate(world):
            if machine.fenced:
                continue
            for deed in self._all_deeds(world, who):
                if deed.wants:
                    yield from self._obeys(world, who, deed.wants)
                else:
                    yield from self._writes(world, who, machine, deed)
            if self._may_boot(world):
                spent = _replace(machine, boots=machine.boots + 1)
                for slot, digest in enumerate(machine.slots):
                    if digest:
                        move = Move(who, f"wakes in {digest}", calm=False)
                        yield move, _put(world, who, self._woken(who, spent, slot))

    def _may_boot(self, world: World) -> bool:
        return sum(machine.boots for machine in world) < self.setting.boots

    def node(self, who: int, machine: Machine) -> Node:
        """The node of a machine that has heard nothing yet in this incarnation."""
        key = who, machine
        if key not in self._nodes:
            node = rollout.boot(self.ids[who], len(machine.lives), machine.journal)
            self._nodes[key] = _replace(node, proven=machine.lives[-1])
        return self._nodes[key]

    def full(self, who: int, machine: Machine) -> bool:
        """Whether a machine wants a bundle, and has no slot for it."""
        node = self.node(who, machine)
        wants = rollout.wants(node)
        spare = machine.slots[1 - machine.runs]
        new = wants != "" and wants not in machine.slots
        return new and rollout.must_stay(node.member, spare)

    def hopeless(self, world: World) -> bool:
        """Whether what all have said of the last plan, as it is, leaves it no base."""
        count, roster = len(self.begins), self.begins[-1].roster
        held = recover.begin(roster, count)
        for who, machine in enumerate(world):
            for then, fact in self._facts(who, machine.journal):
                if then == count and isinstance(fact, ms.Frozen | ms.Valid | ms.Bad):
                    held = recover.join(held, fact)
        return recover.standing(roster, held).phase is recover.Phase.EXHAUSTED

    # --- what a node can do

    def _all_deeds(self, world: World, who: int) -> tuple[_Deed, ...]:
        machine, gone = world[who], world[-1].fenced
        generation = self.node(who, machine).member.generation
        facts = frozenset(
            fact
            for i, other in enumerate(world)
            if i != who
            for then, fact in self._facts(i, other.journal)
            if then == generation
        )
        key = (who, machine, facts, gone)
        if key not in self._deeds:
            self._deeds[key] = tuple(dict.fromkeys(self._find_deeds(*key)))
        return self._deeds[key]

    def _find_deeds(
        self, who: int, machine: Machine, facts: frozenset[ms.Fact], gone: bool
    ) -> Iterator[_Deed]:
        first = self.node(who, machine)
        generation = first.member.generation
        yield from self._begun(who, first, gone)
        if not generation:
            return
        begin = self._joining(who, self.begins[generation - 1])
        first, effects = rollout.step(first, begin)
        if effects.persist:  # what it does without hearing anything more
            yield _Deed("goes on", effects.persist)
            return
        silent, told = [first], sorted(facts, key=repr)
        for node in silent:  # which grows meanwhile
            if (digest := rollout.wants(node)) and (who, digest) not in self.setting.unfit:
                yield _Deed(f"boots {digest}", wants=digest)
            heard = [(f"hears {type(f).__name__}", self._message(who, node, f)) for f in told]
            for what, event in (*heard, *self._asked(who, node)):
                after, effects = rollout.step(node, event)
                after = _replace(after, member=_replace(after.member, peers=node.member.peers))
                if effects.persist:
                    yield _Deed(what, effects.persist)
                elif after not in silent:
                    silent.append(after)

    def _begun(self, who: int, node: Node, gone: bool) -> Iterator[_Deed]:
        """The plans that a node may begin; one without a node that has gone only once it has."""
        for number, begin in enumerate(self.begins):
            leaves = self.setting.leaves and begin.changes
            early = leaves and self.setting.fenced and not gone
            member = begin.roster.index(self.ids[who]) is not None
            if begin.generation > node.member.generation and member and not early:
                persist = rollout.step(node, self._joining(who, begin))[1].persist
                yield _Deed(f"begins plan {number + 1}", persist)

    def _joining(self, who: int, begin: ev.Begin) -> ev.Begin:
        """What a node that joins is told besides: under which epoch the others hold what it has."""
        at = self.setting.joins
        if at is None or who < len(self.ids) - 1:
            return begin
        return _replace(begin, founding=False, brought=(ms.Copy(at, self.setting.begins),))

    def _asked(self, who: int, node: Node) -> Iterator[tuple[str, rollout.Event]]:
        """What an operator and the node's own probes may say."""
        plan = self.setting.plans[node.member.generation - 1]
        if plan.final:
            yield "finalises", rollout.Finalise(plan.bundle)
        if (who, digest := rollout.wants(node)) in self.setting.unfit:
            yield f"can't have {digest}", rollout.Unfit(digest, "probes fail")

    def _message(self, who: int, node: Node, fact: ms.Fact) -> ev.Received:
        at = node.member
        configuration = self.begins[at.generation - 1].roster.digest
        sender = 1 if who == 0 else 0
        return ev.Received(
            ms.Message(sender, 0, at.generation, at.round, configuration, (fact,), ms.Knows())
        )

    def _facts(self, who: int, journal: tuple[ms.Record, ...]) -> tuple[tuple[int, ms.Fact], ...]:
        """List what a journal says, with the generation that each fact is of."""
        if journal not in self._said:
            state, said = Member(self.ids[who], 1), list[tuple[int, ms.Fact]]()
            for record in journal:
                state = fold(state, record)
                if isinstance(record, _SAID):
                    said.append((state.generation, record))
                if state.open and (line := state.tallies[0].line) is not None:
                    said.append((state.generation, ms.Converged(line)))
            self._said[journal] = tuple(dict.fromkeys(said))
        return self._said[journal]

    # --- where it leads

    def _writes(
        self, world: World, who: int, machine: Machine, deed: _Deed
    ) -> Iterator[tuple[Move, World]]:
        after = _replace(machine, journal=machine.journal + deed.records)
        yield Move(who, deed.what), _put(world, who, after)
        if self._may_boot(world):
            for count in range(1, len(deed.records) + 1):
                journal = machine.journal + deed.records[:count]
                cut = _replace(machine, journal=journal, boots=machine.boots + 1)
                move = Move(who, f"{deed.what}, and crashes after {count} records", calm=False)
                yield move, _put(world, who, self._woken(who, cut, cut.runs))

    def _obeys(self, world: World, who: int, digest: str) -> Iterator[tuple[Move, World]]:
        """Boot what is wanted, installed first over what need not stay."""
        machine, at = world[who], self.node(who, world[who]).member
        slots = machine.slots
        if digest not in slots:
            spare = 1 - machine.runs
            if rollout.must_stay(at, slots[spare]):
                return
            slots = (slots[0], digest) if spare else (digest, slots[1])
        machine = _replace(machine, slots=slots)
        yield (
            Move(who, f"boots {digest}"),
            _put(world, who, self._woken(who, machine, slots.index(digest))),
        )

    def _woken(self, who: int, machine: Machine, slot: int) -> Machine:
        """A new incarnation in a slot, whose bundle was probed."""
        digest = machine.slots[slot]
        good = digest if (who, digest) not in self.setting.unfit else ""
        return _replace(machine, lives=(*machine.lives, good), runs=slot)


def _roster(ids: tuple[str, ...]) -> Roster:
    domains = tuple(Domain(name, "fleet", i, name) for i, name in enumerate(ids))
    return Roster(Configuration("fleet", len(ids), domains, (("fleet", 1),)))


def _put(world: World, at: int, machine: Machine) -> World:
    return (*world[:at], machine, *world[at + 1 :])


# --- what must hold in every state --------------------------------------------------------------


class Laws:
    """The invariants of a fleet, each a predicate over its worlds."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def _acting(self, world: World) -> list[ms.Copy | None]:
        return [
            rollout.acts(self._fleet.node(i, machine))
            for i, machine in enumerate(world)
            if not machine.fenced
        ]

    def f1_a_base_and_its_successor(self, world: World) -> bool:
        """Nodes that act do so under two bundles at most: the base of the newest plan that is
        certified anywhere, and what that plan aims at.
        """
        held = [self._fleet.node(i, machine).member.restored for i, machine in enumerate(world)]
        newest = max((c for c in held if c), key=lambda c: c.generation, default=None)
        if newest is None:
            return not any(self._acting(world))
        votes = [r for machine in world for r in machine.journal if isinstance(r, ms.Staged)]
        allowed = {vote.digest.partition("@")[0] for vote in votes if vote.epoch == newest.base}
        allowed.add(self._fleet.setting.plans[newest.generation - 1].bundle)
        return all(rollout.bundle(copy) in allowed for copy in self._acting(world) if copy)

    def f3_floors_only_rise(self, world: World) -> bool:
        """Nobody acts under what it has given up, nor below what is final."""
        floors = [
            r.certificate.epoch
            for machine in world
            for r in machine.journal
            if isinstance(r, ms.Converged) and self._is_floor(world, r.certificate.epoch)
        ]
        there = [machine for machine in world if not machine.fenced]
        for machine, copy in zip(there, self._acting(world), strict=True):
            gone = [e for r in machine.journal if isinstance(r, ms.Released) for e in r.epochs]
            if copy and (copy.epoch in gone or any(_below(copy.epoch, f) for f in floors)):
                return False
        return True

    def _is_floor(self, world: World, epoch: Epoch) -> bool:
        return any(
            isinstance(r, ms.Staged) and r.epoch == epoch and "@" not in r.digest
            for machine in world
            for r in machine.journal
        )

    def f7_confirmed_by_who_has_proven_it(self, world: World) -> bool:
        """A vote CONFIRMED is of a bundle that the incarnation it names has booted and proven."""
        return all(
            machine.lives[int(life) - 1 : int(life)] == (digest,)
            for machine in world
            for vote in machine.journal
            if isinstance(vote, ms.Staged) and "@" in vote.digest
            for digest, _, life in [vote.digest.partition("@")]
        )

    def f8_what_is_held_boots(self, world: World) -> bool:
        """Each machine has all bundles in its slots that it holds and may have to go back to."""
        for i, machine in enumerate(world):
            at = self._fleet.node(i, machine).member
            timeline = at.restored.timeline if at.restored is not None else ()
            held = [copy for copy in at.retained if recover.eligible(copy.epoch, timeline)]
            if not {rollout.bundle(copy) for copy in held} - {""} <= {*machine.slots}:
                return False
        return True

    def one_bundle_a_number(self, world: World) -> bool:
        """A number means one bundle, on every node and for ever."""
        meant: dict[Epoch, str] = {}
        votes = [r for machine in world for r in machine.journal if isinstance(r, ms.Staged)]
        return all(
            meant.setdefault(vote.epoch, digest) == digest
            for vote in votes
            for digest in [vote.digest.partition("@")[0]]
        )

    def converged_is_attested_by_all(self, world: World) -> bool:
        """What is reported converged every node of its configuration has attested, durably."""
        voted = [{r.epoch for r in m.journal if isinstance(r, ms.Staged)} for m in world]
        lines = [r.certificate for m in world for r in m.journal if isinstance(r, ms.Converged)]
        sizes = {begin.roster.digest: begin.roster.size for begin in self._fleet.begins}
        return all(
            line.epoch in each for line in lines for each in voted[: sizes[line.configuration]]
        )

    def ends(self, world: World) -> bool:
        """The last plan has converged, and is final where it was to be; or it says what is in the
        way: no bundle is left to begin from, or a slot with one that must stay.
        """
        plan, count = self._fleet.setting.plans[-1], len(self._fleet.setting.plans)
        there = [(i, machine) for i, machine in enumerate(world) if not machine.fenced]
        nodes = [self._fleet.node(i, machine) for i, machine in there]
        if any(node.member.generation != count for node in nodes):
            return False
        if all(node.member.open for node in nodes):
            if any(self._fleet.full(i, m) for i, m in there):
                return True
            lines = [node.member.tallies[0].line for node in nodes]
            reached = all(line is not None and line.epoch.generation == count for line in lines)
            final = all(rollout.final(node.member) for node in nodes)
            return not plan.bundle or (reached and (final or not plan.final))
        return self._fleet.hopeless(world)


def _below(epoch: Epoch, floor: Epoch) -> bool:
    return epoch < floor and epoch.step < floor.step - 1


LAWS: Final = (
    "f1_a_base_and_its_successor",
    "f3_floors_only_rise",
    "f7_confirmed_by_who_has_proven_it",
    "f8_what_is_held_boots",
    "one_bundle_a_number",
    "converged_is_attested_by_all",
)
