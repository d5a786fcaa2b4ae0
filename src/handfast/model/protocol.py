"""The composed protocol as a transition system over the real member.

A state is a tuple of small ints: what was spent of the bounds, one number a place
(:mod:`handfast.model.place`), and one number for what is in the air to each place. Numbers stand
for values in the tables of the model, so equal states are equal tuples, and what can happen to a
place, alone or on a message, is worked out once for each place and message that ever meet.

**The network** is :mod:`handfast.model.air`: what is sent arrives late, in any order or in bounded
disorder, twice, or never.

**Time.** A tick is taken freely once nothing else is left that can happen without a fault: no
message that would change anything for its receiver, no work, no rank of the last round that could
go on (maximal progress, as in timed process algebras: Hennessy and Regan 1995). Before that it is
``early``, and bounded. A tick only sends (S15), and what it sends are facts that are true anyway.

Laws are held after each step (:mod:`handfast.model.judge`). Where one breaks the step leads to a
state of its own, ``(-1, number)``, out of which nothing leads.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from handfast.core import events as ev
from handfast.core import gossip
from handfast.core.membership import Roster
from handfast.core.recover import Phase
from handfast.laws import goals, invariants
from handfast.laws.truth import Truth
from handfast.model import place as local
from handfast.model.air import Air
from handfast.model.judge import Judge, Table
from handfast.model.place import FAULTS, Errand, Place, Rules, Taken

__all__ = ["Move", "Protocol", "State", "Way"]

State = tuple[int, ...]


class Move(msgspec.Struct, frozen=True):
    """One move: who took which event, where a crash cut it, and whether it needs no fault.

    ``heard`` is what it took in before that, in the same move.
    """

    who: int
    event: ev.Event | None
    what: str
    cut: int | None
    calm: bool
    heard: tuple[ev.Event, ...] = ()


class Way(NamedTuple):
    """Where a move of one place leads: what it becomes, sends, spends, and reaches.

    ``still``: it changes nothing, and is a move only where what it does breaks a law.
    """

    move: Move
    place: int
    posts: tuple[tuple[int, int], ...]
    cost: int
    seen: int
    step: int
    breach: str
    goals: tuple[str, ...]
    still: bool = False


class Protocol:
    """A scenario to be searched. See the module.

    ``heir`` may take the place of ``fenced``, one of the founding configuration's domains, once a
    change is recorded. ``links`` are the pairs that can hear each other, None for all. ``begun``:
    where all are to stand at first, with nothing in the air; else on empty disks.
    """

    def __init__(
        self,
        rules: Rules,
        founding: Roster,
        *,
        fenced: str = "",
        heir: str = "",
        links: Iterable[tuple[int, int]] | None = None,
        stale: bool = False,
        ordered: bool = True,
        begun: Sequence[Place] = (),
    ) -> None:
        self.rules = rules
        self.fenced, self.heir = fenced, heir
        self.begun = tuple(begun)
        rosters = list(dict.fromkeys([founding, *(round_.roster for round_ in rules.rounds)]))
        self.ids = (*founding.ids, *([heir] if heir else []))
        self.size = len(self.ids)
        self.at = {name: i for i, name in enumerate(self.ids)}
        self.rosters = {roster.digest: roster for roster in rosters}
        self.links = None if links is None else frozenset(links) | {(b, a) for a, b in links}
        self.judge = Judge(self.ids, rosters, rules.keep)
        self.places: Table[Place] = Table()
        senders = {r.digest: tuple(self.at[name] for name in r.ids) for r in rosters}
        self.air = Air(self.places, senders, ordered=ordered, stale=stale)
        self.spent: Table[tuple[int, ...]] = Table()
        self.costs: Table[tuple[str, ...]] = Table()
        self.breaches: Table[str] = Table()
        self.met: set[str] = set()
        self._parts: list[int] = []
        self._words: list[int] = []
        self._calmed: list[tuple[object, ...] | None] = []
        self._lost: dict[int, int] = {}
        self._plans: dict[tuple[int, int, bool], tuple[Way, ...]] = {}
        self._heard: dict[tuple[int, int], tuple[Way, ...]] = {}
        self._ticks: dict[int, tuple[Way, ...]] = {}
        self._pay: dict[tuple[int, int], int] = {}
        self._settled: dict[tuple[int, ...], bool] = {}
        self.costs.number(())

    # --- the model

    def initial(self) -> Iterator[State]:
        """All founding domains are up with empty disks; an heir is not there yet."""
        places = [self.place_number(place) for place in self.begun]
        for name in self.ids if not places else ():
            new = Place(name, trainers=(None,) * len(self.rules.rounds))
            up = new if name == self.heir else local.boot(self.rules, new).place
            places.append(self.place_number(up))
        spent = self.spent.number((0,) * len(FAULTS))
        air = self.air.queues.number(())
        yield (spent, *places, *([air] * self.size))

    def moves(self, state: State) -> Iterator[tuple[Move, State]]:
        """Give every move out of a state: messages first, then what places do, then ticks."""
        if state[0] < 0:
            return
        quiet = yield from self._arrivals_of(state)
        quiet = yield from self._errands_of(state, quiet)
        if quiet or self.rules.bounds.early:
            for who in range(self.size):
                for way in self._tick(who, state[1 + who]):
                    after = self._after(state, who, way, -1, "" if quiet else "early")
                    if after is not None:
                        yield way.move, after

    def _arrivals_of(self, state: State) -> Generator[tuple[Move, State], None, bool]:
        """Let what is in the air arrive; says whether nothing of it would change anything."""
        quiet = True
        for who in range(self.size):
            for message, first in self.air.arriving(state[1 + self.size + who]):
                if not (first or self.rules.bounds.overtakes):
                    continue
                for way in self._hear(who, state[1 + who], message):
                    quiet = quiet and not (way.move.calm and first)
                    after = self._after(state, who, way, message, "" if first else "overtakes")
                    if after is not None:
                        yield way.move, after
                    if self.rules.bounds.echoes:
                        after = self._after(state, who, way, -1, "echoes")
                        if after is not None:
                            yield way.move, after
                if first and self.air.ordered:
                    quiet = yield from self._lose(state, who, message, quiet)
        return quiet

    def _errands_of(self, state: State, quiet: bool) -> Generator[tuple[Move, State], None, bool]:
        """Let each place do what it can; says whether nothing was left but to wait."""
        changed = self._changed(state)
        for who in range(self.size):
            for way in self._plan(who, state[1 + who], changed):
                if way.step and not self._may_save(state, way.step):
                    continue
                quiet = quiet and not way.move.calm
                after = self._after(state, who, way, -1)
                if after is not None:
                    yield way.move, after
        if self.heir and not changed:
            yield from self._change(state)
        return quiet

    def _lose(
        self, state: State, who: int, message: int, quiet: bool
    ) -> Generator[tuple[Move, State], None, bool]:
        """Lose a message: at a fault's price, or for nothing where its receiver would not care."""
        idle = not any(way.move.calm for way in self._hear(who, state[1 + who], message))
        fault = 0 if idle else self.costs.number(("losses",))
        spent = self._spend(state[0], fault) if fault else state[0]
        if spent >= 0:
            after = list(state)
            at = 1 + self.size + who
            after[0], after[at] = spent, self.air.take(state[at], message)
            event = ev.Received(self.air.messages.values[message])
            yield Move(who, event, "is lost", None, idle), tuple(after)
        return quiet and not idle

    def sound(self, state: State) -> bool:
        """Say whether every law held on the way here; :meth:`breach` says which did not."""
        return state[0] >= 0

    def breach(self, state: State) -> str:
        """Say which law is broken, and how."""
        return self.breaches.values[state[1]] if state[0] < 0 else ""

    def anew(self, state: State) -> bool:
        """Hold all laws over the whole truth of a state, and without any memory."""
        truth = self._truth(state)
        return state[0] >= 0 and not invariants.breaches(truth)

    def settled(self, state: State) -> bool:
        """Say whether all are up in the last round, agree, have converged in it, and are silent.

        These are the laws that are to hold eventually, over members that can hear each other; or
        nothing is left to restore: then no living epoch that the last round would take is intact.
        """
        if state[0] < 0:
            return True
        places = state[1 : 1 + self.size]
        here = [place for place in places if self.places.values[place].member]
        if any(self.places.values[place].down for place in places):
            return False
        shown = [self._calmed[place] for place in here]
        if not shown or any(calm is None or calm != shown[0] for calm in shown):
            return False  # most states end here
        found = self._settled.get(places)
        if found is None:
            found = self._settled[places] = self._settles(state)
        return found

    # --- numbers

    def place_number(self, place: Place) -> int:
        """Number a place, with what can be asked of it."""
        number = self.places.number(place)
        if number == len(self._parts):
            self._parts.append(self.judge.part(place))
            self._words.append(self.judge.word(place))
            self._calmed.append(self._calm(place))
        return number

    def _calm(self, place: Place) -> tuple[object, ...] | None:
        """Show what members must agree on in the end; None of a place that is not settled.

        Where ranks save, something has to converge in the last round.
        """
        member, last = place.member, self.rules.rounds[-1]
        if member is None or (member.generation, member.round) != (last.generation, last.name):
            return None
        if member.told is not None and member.told[0] is Phase.EXHAUSTED:
            return ("hopeless",)
        lines = tuple(tally.line.epoch if tally.line else None for tally in member.tallies)
        least = last.generation if self.rules.bounds.epochs else 0
        restless = sum(1 << peer for peer in self._peers(member.me) if
                       gossip.restless(member) >> peer & 1)  # fmt: skip
        converged = all(line is not None and line.generation >= least for line in lines)
        return lines if member.open and converged and not restless else None

    def _peers(self, me: int) -> Sequence[int]:
        return [i for i in range(self.size) if self.links is None or (me, i) in self.links]

    def unsettled(self, state: State) -> list[str]:
        """Name the laws that are to hold eventually, and do not hold in a state."""
        truth = self._truth(state)
        return [law.__name__ for law in invariants.EVENTUALLY if [*law(truth)]]

    def _truth(self, state: State) -> Truth:
        places = state[1 : 1 + self.size]
        held = [self.places.values[place].member for place in places]
        truth = self.judge.truth([self._parts[place] for place in places], self.ids)
        return msgspec.structs.replace(truth, members=tuple(m for m in held if m is not None))

    def _settles(self, state: State) -> bool:
        truth = self._truth(state)
        if not all(member.open for member in truth.members):
            want = self.rules.rounds[-1].want
            return all(want not in (None, epoch.step) for epoch in truth.restorable)
        laws = [law for law in invariants.EVENTUALLY if self.links is None or law is not _L5]
        return not invariants.breaches(truth, tuple(laws))

    # --- where moves lead

    def _after(
        self, state: State, who: int, way: Way, message: int, fault: str = ""
    ) -> State | None:
        cost = self._also(way.cost, fault) if fault else way.cost
        spent = self._spend(state[0], cost) if cost else state[0]
        if spent < 0:
            return None
        if way.breach:
            return -1, self.breaches.number(way.breach)
        if way.goals:
            self.met.update(way.goals)
        size = self.size
        after = list(state)
        after[0] = spent
        before, place = state[1 + who], way.place
        after[1 + who] = place
        if message >= 0:
            after[1 + size + who] = self.air.take(after[1 + size + who], message)
        if place != before:
            after[1 + size + who] = self.air.prune(place, after[1 + size + who])
        for to, post in way.posts:
            after[1 + size + to] = self.air.post(after[1 + to], after[1 + size + to], post)
        found = self._judge(state, after, who, way.seen)
        if found:
            return -1, self.breaches.number(found)
        return None if way.still else tuple(after)

    def _judge(self, state: State, after: Sequence[int], who: int, seen: int) -> str:
        before, place = state[1 + who], after[1 + who]
        words, parts = self._words, self._parts
        if words[place] != words[before]:
            for other in range(self.size):
                if other != who:
                    found = self.judge.pair(words[place], words[after[1 + other]])
                    if found:
                        return found
        if seen or parts[place] != parts[before]:
            held = tuple([parts[p] for p in after[1 : 1 + self.size]])
            return self.judge.all(held, seen, self._configurations(after[0]))
        return ""

    def _changed(self, state: State) -> bool:
        return bool(self.heir) and self.spent.values[state[0]][_CHANGES] > 0

    def _configurations(self, spent: int) -> int:
        return 1 + (self.spent.values[spent][_CHANGES] if self.heir else 0)

    def _spend(self, spent: int, cost: int) -> int:
        """Pay for a move; -1 where a bound does not allow it."""
        key = (spent, cost)
        found = self._pay.get(key)
        if found is None:
            counts = list(self.spent.values[spent])
            for fault in self.costs.values[cost]:
                counts[FAULTS.index(fault)] += 1
            limits = [getattr(self.rules.bounds, fault) for fault in FAULTS]
            most = all(count <= limit for count, limit in zip(counts, limits, strict=True))
            found = self._pay[key] = self.spent.number(tuple(counts)) if most else -1
        return found

    def _also(self, cost: int, fault: str) -> int:
        return self.costs.number((*self.costs.values[cost], fault))

    def _may_save(self, state: State, step: int) -> bool:
        """Say whether a rank may go on in the last round: so many steps, and those lost."""
        if step <= self.rules.bounds.epochs:
            return True
        lost = 0
        for place in state[1 : 1 + self.size]:
            mask = self._lost.get(place)
            if mask is None:
                mask = self._lost[place] = local.lost_steps(self.rules, self.places.values[place])
            lost |= mask
        return step <= self.rules.bounds.epochs + lost.bit_count()

    # --- what places can do

    def _hear(self, who: int, place: int, message: int) -> tuple[Way, ...]:
        key = (place, message)
        ways = self._heard.get(key)
        if ways is None:
            here = self.places.values[place]
            event = ev.Received(self.air.messages.values[message])
            errands = [Errand(here, event)] if here.member is not None else []
            if here.ghost is not None:
                errands.append(Errand(here, event, calm=False, ghost=True))
            ways = self._heard[key] = self._ways(who, place, errands)
        return ways

    def _plan(self, who: int, place: int, changed: bool) -> tuple[Way, ...]:
        key = (place, who, changed)
        ways = self._plans.get(key)
        if ways is None:
            here = self.places.values[place]
            errands = local.errands(self.rules, here, changed)
            ways = self._plans[key] = self._ways(who, place, errands)
        return ways

    def _tick(self, who: int, place: int) -> tuple[Way, ...]:
        ways = self._ticks.get(place)
        if ways is None:
            here = self.places.values[place]
            errands = [Errand(here, ev.Tick())] if here.member is not None else []
            ways = self._ticks[place] = self._ways(who, place, errands)
        return ways

    def _ways(self, who: int, place: int, errands: Iterable[Errand]) -> tuple[Way, ...]:
        """Work out where errands lead; what changes nothing is no move."""
        found: dict[tuple[object, ...], Way] = {}
        bounds = self.rules.bounds
        for errand in errands:
            if not all(getattr(bounds, fault) for fault in errand.faults):
                continue
            for taken in self._outcomes(errand):
                faults = errand.faults
                if taken.cut is not None:
                    faults = (*faults, "crashes")
                way = self._way(who, errand, taken, faults)
                if way.place == place and not (way.posts or way.breach):
                    if way.cost == 0 and way.step <= bounds.epochs:
                        self.met.update(way.goals)
                    if not way.seen:
                        continue
                    # not calm: nobody is to wait for what changes nothing
                    move = msgspec.structs.replace(way.move, calm=False)
                    way = way._replace(still=True, move=move)
                key = (way.place, way.posts, way.cost, way.step, way.seen, way.breach)
                found.setdefault(key, way)
        return tuple(found.values())

    def _outcomes(self, errand: Errand) -> Iterator[Taken]:
        rules, place, event = self.rules, errand.place, errand.event
        if event is None:
            if place.down:
                yield local.boot(rules, place)
            else:
                yield local.crash(rules, place) if "crashes" in errand.faults else Taken(place)
            return
        if errand.ghost:
            yield local.haunt(place, event)
            return
        whole = local.take(rules, place, event)
        yield whole
        bounds = rules.bounds
        if bounds.crashes and place.incarnation < bounds.lives:
            yield from local.cuts(rules, place, event, whole)

    def _way(self, who: int, errand: Errand, taken: Taken, faults: tuple[str, ...]) -> Way:
        breach = ""
        met: list[str] = []
        for turn in taken.turns:
            met += goals.reached(turn)
            breach = breach or self.judge.step(who, taken.place, turn)
        posts = tuple(
            (to, number)
            for send in taken.sends
            for to, number in [self._address(send)]
            if self.links is None or (who, to) in self.links
        )
        move = Move(who, errand.event, errand.what, taken.cut, errand.calm and taken.cut is None)
        seen = self.judge.look(who, taken.turns, taken.deeds)
        number, cost = self.place_number(taken.place), self.costs.number(faults)
        return Way(move, number, posts, cost, seen, errand.step, breach, tuple(met))

    def _address(self, send: ev.Send) -> tuple[int, int]:
        roster = self.rosters[send.message.configuration]
        return self.at[roster.ids[send.to]], self.air.message(send.message)

    def _change(self, state: State) -> Iterator[tuple[Move, State]]:
        """Let the engine record that one domain is gone for good, and its heir takes its place."""
        spent = self._spend(state[0], self.costs.number(("changes",)))
        if spent < 0:
            return
        old, new = self.at[self.fenced], self.at[self.heir]
        gone = self.places.values[state[1 + old]]
        spoilt = {image.epoch for image in gone.images if gone.attested(image.epoch)}
        gone = msgspec.structs.replace(
            gone, member=None, todo=(), ghost=None, down=False,
            spoilt=tuple(sorted({*gone.spoilt, *spoilt})),
        )  # fmt: skip
        heir = local.boot(self.rules, self.places.values[state[1 + new]]).place
        after = list(state)
        after[0] = spent
        after[1 + old], after[1 + new] = self.place_number(gone), self.place_number(heir)
        for who in (old, new):
            after[1 + self.size + who] = self.air.prune(after[1 + who], after[1 + self.size + who])
        held = tuple([self._parts[place] for place in after[1 : 1 + self.size]])
        found = self.judge.all(held, 0, self._configurations(spent))
        move = Move(old, None, f"is fenced, {self.heir} takes its place", None, True)
        yield move, tuple(after) if not found else (-1, self.breaches.number(found))


_CHANGES: Final = FAULTS.index("changes")
_L5: Final = invariants.l5_traffic_quiesces
