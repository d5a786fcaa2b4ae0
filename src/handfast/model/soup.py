"""The composed protocol over a soup of facts: a network that forgets nothing and promises nothing.

Whatever anyone has ever written into its journal may be heard by anyone in that round, at any time,
in any order, again and again, or never. So nothing is in the air, and what members know of each
other's knowledge is nothing: what is left of a state are journals, disks, and what was heard.

**Why a law that holds here holds over every network** (reordering, loss, doubling, any links):

1. What is known of peers decides what is sent to them, and nothing that is written or done. So it
   is left out of a place.
2. A message tells what its sender has just written, or holds; and that are facts which members of
   its round have written before, or lines that their journals come to. This is held: of each step
   what it sends, and in every state that all that a member could tell a peer that knows nothing
   stands in the soup. Journals only grow, so what was sent long ago stands there, too.
3. A member joins all facts of a message before it concludes anything. So facts that come to
   nothing yet may as well come one by one, before the others; those that come to something, two
   certificates say, are heard singly and in every company. A test goes through all companies.

**What is heard for nothing is heard later** (a reduction: Lipton 1975). If all that comes of
hearing is that it was heard, nobody else can tell, and since the soup only grows, nobody takes the
chance away; so it may as well be heard right before that member does, writes or asks for anything
the next time, and what it does not even need for that, later still. A move is such a block: what
was heard in silence, and what came of it. Laws of a step are held of every single one; laws of two
members, and 2, of all that could have been heard in silence by then.

That each state over the exact network is one of the soup's is a test, too, for 1 and all the rest.
It is not so the other way round: a breach found here may be one that no network can bring about,
and a goal that is met here may be met nowhere else. That all settle in the end is said on condition
that whatever was written is heard in the end (what gossip owes: L5). Rolled-up votes and declines
are never written, so trees and declines are not for the soup. What a member does with a message as
a whole, with many facts, a greeting or a past life, is searched over the exact network alone.

The set of all messages ever sent is the network of TLA+'s Paxos and of IronFleet; here it is one of
facts, since what is sent is what was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Final, TypeAlias

import msgspec

from handfast.core import events as ev
from handfast.core import gossip
from handfast.core import messages as ms
from handfast.core.fold import fold
from handfast.core.membership import Roster
from handfast.core.recover import Phase
from handfast.core.state import Member, Peers
from handfast.model.judge import Table
from handfast.model.place import Errand, Place, Rules, Taken
from handfast.model.protocol import Move, Protocol, State, Way

__all__ = ["At", "Soup", "erased"]

_replace = msgspec.structs.replace
_SAID: Final = (ms.Frozen, ms.Staged, ms.Skipped, ms.Valid, ms.Bad, ms.Accepted, ms.Restored)

At: TypeAlias = tuple[str, int, str]
"""A round as a message names it: its configuration, its generation, and its name."""

_Soup: TypeAlias = tuple[At, int] | None
"""The round that a place is in, and the number of all that was said in it."""


class Soup(Protocol):
    """A scenario to be searched over whatever its members may ever hear. See the module."""

    def __init__(
        self,
        rules: Rules,
        founding: Roster,
        *,
        fenced: str = "",
        heir: str = "",
        begun: Sequence[Place] = (),
    ) -> None:
        if rules.bounds.declines or any(r.roster.tree is not None for r in rules.rounds):
            raise ValueError("rolled-up votes and declines are never written: not for the soup")
        self._journals: Table[tuple[tuple[At, ms.Fact], ...]] = Table()
        self._wrote: list[int] = []
        self._bodies: Table[Place] = Table()
        self._shows: list[int] = []
        self._facts: Table[frozenset[ms.Fact]] = Table()
        self._soups: dict[tuple[int, tuple[int, ...]], _Soup] = {}
        self._messages: dict[tuple[int, At, tuple[ms.Fact, ...]], int] = {}
        self._hearings: dict[tuple[int, _Soup], tuple[Way, ...]] = {}
        self._silences: dict[tuple[int, _Soup], dict[int, tuple[ev.Event, ...]]] = {}
        self._blocks: dict[tuple[int, _Soup, bool], tuple[Way, ...]] = {}
        self._choirs: Table[tuple[int, ...]] = Table()
        self._agreed: dict[tuple[int, int], str] = {}
        super().__init__(rules, founding, fenced=fenced, heir=heir, links=(), begun=begun)

    def place_number(self, place: Place) -> int:
        """Number a place, without what it knows of others' knowledge."""
        number = super().place_number(erased(place))
        if number == len(self._wrote):
            self._wrote.append(self._journals.number(tuple(dict.fromkeys(_written(place)))))
            self._shows.append(self._bodies.number(_body(place)))
        return number

    def moves(self, state: State) -> Iterator[tuple[Move, State]]:
        """Give every block of a state: a member hears in silence, and then something comes of it.

        A tick would only send, and all is sent already.
        """
        if state[0] < 0:
            return
        pots, changed = self._pots(state), self._changed(state)
        choirs = []
        for who in range(self.size):
            place = state[1 + who]
            for way in self._block(who, place, pots, changed):
                if way.step and not self._may_save(state, way.step):
                    continue
                after = self._after(state, who, way, -1)
                if after is not None:
                    yield way.move, after
            silent = self._silence(who, place, self._stir(place, pots))
            choirs.append(self._choirs.number(tuple(sorted({self._words[p] for p in silent}))))
        yield from self._disagree(choirs)
        if self.heir and not changed:
            yield from self._change(state)

    def heard(self, state: State, who: int) -> tuple[At, frozenset[ms.Fact]] | None:
        """Give the round that a place of a state is in, and all facts that can be heard there."""
        soup = self._stir(state[1 + who], self._pots(state))
        return soup and (soup[0], self._facts.values[soup[1]])

    def silent(self, state: State, who: int) -> Mapping[int, tuple[ev.Event, ...]]:
        """Give all that a place may have become by hearing in silence, and by hearing what."""
        place = state[1 + who]
        return self._silence(who, place, self._stir(place, self._pots(state)))

    # --- what can be heard

    def _pots(self, state: State) -> tuple[int, ...]:
        """Give the journals there are, whoever wrote them."""
        return tuple(sorted({self._wrote[place] for place in state[1 : 1 + self.size]}))

    def _stir(self, place: int, pots: tuple[int, ...]) -> _Soup:
        """Find what was said in the round that a place is in.

        Its ghost hears the same. What a ghost could hear of an older round would come to nothing:
        all that it writes is behind its successor's seal.
        """
        key = (place, pots)
        if key not in self._soups:
            member = self.places.values[place].member
            at = _at(member) if member else None
            said = [pair for pot in pots for pair in self._journals.values[pot]]
            facts = frozenset(fact for then, fact in said if then == at)
            self._soups[key] = at and (at, self._facts.number(facts))
        return self._soups[key]

    def _hear_all(self, who: int, place: int, soup: _Soup) -> tuple[Way, ...]:
        key = (place, soup)
        ways = self._hearings.get(key)
        if ways is None:
            ways = self._hearings[key] = tuple(self._hearing(who, place, soup))
        return ways

    def _hearing(self, who: int, place: int, soup: _Soup) -> Iterator[Way]:
        """Work out all that can be heard at a place, and hold 2 of the module."""
        here = self.places.values[place]
        for way in self._tick(who, place):
            if here.fresh or way.breach:  # whatever comes first, should it say nothing, wakes it up
                yield way
        if soup is None or here.member is None:
            return
        at, facts = soup[0], self._facts.values[soup[1]]
        for fact in gossip.lacking(here.member, ms.Knows()):
            if fact not in facts:
                yield _breach(who, place, "tells", _untold(here, fact))
        loud = []
        for fact in sorted(facts, key=_in_a_message):
            ways = self._told(who, place, at, (fact,))
            yield from ways
            if not all(self._muted(place, way) for way in ways):
                loud.append(fact)
        asleep = () if here.member.open else tuple(f for f in facts if isinstance(f, ms.Converged))
        company = sorted({*loud, *asleep}, key=_in_a_message)
        for size in range(2, len(company) + 1 if loud else 0):
            for together in combinations(company, size):
                yield from self._told(who, place, at, together)

    def _told(self, who: int, place: int, at: At, facts: tuple[ms.Fact, ...]) -> tuple[Way, ...]:
        """Let facts be heard in one message; nothing, where there is nobody who could send it."""
        key = (who, at, facts)
        number = self._messages.get(key, -1)
        if number < 0:
            roster = self.rosters[at[0]]
            sender = next((i for i, name in enumerate(roster.ids) if self.at[name] != who), None)
            if sender is None:
                return ()
            told = ms.Message(sender, 0, at[1], at[2], at[0], facts, ms.Knows())
            number = self._messages[key] = self.air.message(told)
        return self._hear(who, place, number)

    def _way(self, who: int, errand: Errand, taken: Taken, faults: tuple[str, ...]) -> Way:
        """Work out where an errand leads, and hold 2 of the module: of all that it sends."""
        way = super()._way(who, errand, taken, faults)
        if way.breach:
            return way
        for turn in taken.turns:
            told = [fact for send in turn.effects.send for fact in send.message.facts]
            if told and (at := _at(turn.after)):
                said: set[object] = {fact for then, fact in _written(taken.place) if then == at}
                said.update(gossip.lacking(turn.after, ms.Knows()))
                for fact in told:
                    if fact not in said:
                        return way._replace(breach=_untold(taken.place, fact))
        return way

    # --- what is heard in silence

    def _muted(self, place: int, way: Way) -> bool:
        """Say whether all that comes of hearing something is that it was heard."""
        heard = isinstance(way.move.event, ev.Received | ev.Tick) and way.move.cut is None
        idle = not (way.seen or way.cost or way.breach or way.still)
        return heard and idle and self._shows[way.place] == self._shows[place]

    def _silence(self, who: int, place: int, soup: _Soup) -> dict[int, tuple[ev.Event, ...]]:
        """Find what a place may become by hearing in silence, with the least that it takes."""
        key = (place, soup)
        found = self._silences.get(key)
        if found is None:
            found = self._silences[key] = {place: ()}
            waiting = [place]
            for here in waiting:  # which grows meanwhile
                for way in self._hear_all(who, here, soup):
                    if self._muted(here, way) and way.place not in found:
                        event = way.move.event
                        found[way.place] = (*found[here], *([event] if event else []))
                        waiting.append(way.place)
                        self.met.update(way.goals)
        return found

    def _block(self, who: int, place: int, pots: tuple[int, ...], changed: bool) -> tuple[Way, ...]:
        """Work out what may come of hearing, and of everything else that a place can do."""
        soup = self._stir(place, pots)
        key = (place, soup, changed)
        ways = self._blocks.get(key)
        if ways is not None:
            return ways
        kept: list[Way] = []
        led: dict[tuple[object, ...], list[Mapping[int, object]]] = {}
        for here, heard in self._silence(who, place, soup).items():
            for way in (*self._hear_all(who, here, soup), *self._plan(who, here, changed)):
                if self._muted(here, way):
                    continue
                ends = led.setdefault(
                    (way.cost, way.seen, way.step, way.breach, way.move.calm, way.still), []
                )
                if any(way.place in end for end in ends):
                    continue  # with less heard it came to the same, and the rest may come later
                ends.append(self._silence(who, way.place, self._stir(way.place, pots)))
                kept.append(way._replace(move=_replace(way.move, heard=heard)))
        ways = self._blocks[key] = tuple(kept)
        return ways

    def _disagree(self, choirs: Sequence[int]) -> Iterator[tuple[Move, State]]:
        """Hold the laws of two members over all that each may have heard in silence."""
        for who, one in enumerate(choirs):
            for other in choirs[:who]:
                why = self._agreed.get((one, other))
                if why is None:
                    words = (self._choirs.values[one], self._choirs.values[other])
                    said = (self.judge.pair(a, b) for a in words[0] for b in words[1])
                    why = self._agreed[one, other] = next((w for w in said if w), "")
                if why:
                    move = _breach(who, 0, "hears", why).move
                    yield move, (-1, self.breaches.number(why))


def _in_a_message(fact: ms.Fact) -> tuple[int, str]:
    """Order facts as in messages: what opens a generation, what raises a line, and the rest."""
    rank = 0 if isinstance(fact, ms.Restored) else 1 if isinstance(fact, ms.Converged) else 2
    return rank, repr(fact)


def _untold(place: Place, fact: object) -> str:
    return f"s1_told_is_written: {place.id} tells {fact}, and nobody wrote it"


def _breach(who: int, place: int, what: str, why: str) -> Way:
    return Way(Move(who, None, what, None, False), place, (), 0, 0, 0, why, (), still=True)


def erased(place: Place) -> Place:
    """Forget what a place knows of others' knowledge."""
    member, ghost = (
        m and _replace(m, peers=Peers(), turned=-1) for m in (place.member, place.ghost)
    )
    if member == place.member and ghost == place.ghost:
        return place
    return _replace(place, member=member, ghost=ghost)


def _body(place: Place) -> Place:
    """Leave of a place what others can see, and what it has asked for: all but what it heard.

    That nothing is left to restore is told to its rank, and is no errand of anybody.
    """
    ghost = place.ghost and Member(place.ghost.id, place.ghost.incarnation)
    told = place.member.told if place.member else None
    stuck = told is not None and told[0] is Phase.EXHAUSTED
    member = Member(place.id, place.incarnation, told=told) if stuck else None
    return _replace(place, member=member, ghost=ghost, fresh=False)


def _at(member: Member) -> At | None:
    if member.roster is None or not member.generation:
        return None
    return member.roster.digest, member.generation, member.round


def _written(place: Place) -> Iterator[tuple[At, ms.Fact]]:
    """List the words of a journal, and the lines that it comes to, by the round of each."""
    state = Member(place.id, place.incarnation)
    for record in place.records:
        state = fold(state, record)
        at = _at(state)
        if at is None:
            continue
        if isinstance(record, _SAID):
            yield at, record
        for tally in state.tallies if state.open else ():
            if tally.line is not None:
                yield at, ms.Converged(tally.line)
