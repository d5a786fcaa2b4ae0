"""The composed protocol over a soup of facts: a network that forgets nothing and promises nothing.

Whatever anyone has ever written into its journal may be heard by anyone in that round, at any time,
in any order, again and again, or never. So nothing is in the air, and what members know of each
other's knowledge is nothing: what is left of a state are journals, disks, and what was heard.

**Why a law that holds here holds over every network** (reordering, loss, doubling, any links):

1. What is known of peers decides what is sent to them, and nothing that is written or done. So it
   is left out of a place.
2. A message tells what its sender holds, and that are facts which members of its round have written
   before, or lines that their journals come to. This is held in every state: all that a member
   could tell a peer that knows nothing stands in the soup. Journals only grow, so what was sent
   long ago stands there, too.
3. Facts that come in one message lead where they lead if they come one by one, in some order: a
   test goes through them.

That each state of the exact network is one of the soup's is a test, too. It is not so the other way
round: a breach found here may be one that no network can bring about, and a goal that is met here
may be met nowhere else. That all settle in the end is said on condition that whatever was written
is heard in the end (what gossip owes: L5). Rolled-up votes and declines are never written, so trees
and declines are not for the soup.

The exact network of one set of all messages ever sent is that of TLA+'s Paxos and of IronFleet;
here it is one of facts, since what is sent is what was written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Final

import msgspec

from handfast.core import gossip
from handfast.core import messages as ms
from handfast.core.fold import fold
from handfast.core.membership import Roster
from handfast.core.state import Member, Peers
from handfast.model.judge import Table
from handfast.model.place import Place, Rules
from handfast.model.protocol import Move, Protocol, State, Way

__all__ = ["Soup", "erased"]

_replace = msgspec.structs.replace
_SAID: Final = (ms.Frozen, ms.Staged, ms.Skipped, ms.Valid, ms.Bad, ms.Accepted, ms.Restored)

At = tuple[str, int, str]
"""A round as a message names it: its configuration, its generation, and its name."""


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
        self._soups: Table[frozenset[ms.Fact]] = Table()
        self._stirred: dict[tuple[int, tuple[int, ...]], tuple[tuple[At, int], ...]] = {}
        self._hearings: dict[tuple[int, tuple[tuple[At, int], ...]], tuple[Way, ...]] = {}
        super().__init__(rules, founding, fenced=fenced, heir=heir, links=(), begun=begun)

    def place_number(self, place: Place) -> int:
        """Number a place, without what it knows of others' knowledge."""
        number = super().place_number(erased(place))
        if number == len(self._wrote):
            self._wrote.append(self._journals.number(tuple(dict.fromkeys(_written(place)))))
        return number

    def heard(self, state: State, who: int) -> Iterator[tuple[At, frozenset[ms.Fact]]]:
        """Give what can be heard by a place of a state: for each round that it is in, the facts."""
        for at, soup in self._stir(state[1 + who], self._pots(state)):
            yield at, self._soups.values[soup]

    def _arrivals_of(self, state: State) -> Generator[tuple[Move, State], None, bool]:
        """Let any fact be heard. Never quiet: a tick would only send, and all is sent already."""
        pots = self._pots(state)
        for who in range(self.size):
            place = state[1 + who]
            key = (place, self._stir(place, pots))
            ways = self._hearings.get(key)
            if ways is None:
                ways = self._hearings[key] = tuple(self._hearing(who, *key))
            for way in ways:
                after = self._after(state, who, way, -1)
                if after is not None:
                    yield way.move, after
        return False

    def _pots(self, state: State) -> tuple[int, ...]:
        """Give the journals there are, whoever wrote them."""
        return tuple(sorted({self._wrote[place] for place in state[1 : 1 + self.size]}))

    def _stir(self, place: int, pots: tuple[int, ...]) -> tuple[tuple[At, int], ...]:
        """Find what was said in the rounds that a place is in."""
        key = (place, pots)
        found = self._stirred.get(key)
        if found is None:
            here = self.places.values[place]
            rounds = dict.fromkeys(at for m in (here.member, here.ghost) if m and (at := _at(m)))
            said = [pair for pot in pots for pair in self._journals.values[pot]]
            found = self._stirred[key] = tuple(
                (at, self._soups.number(frozenset(fact for then, fact in said if then == at)))
                for at in rounds
            )
        return found

    def _hearing(self, who: int, place: int, soups: tuple[tuple[At, int], ...]) -> Iterator[Way]:
        """Work out all that can be heard at a place, and hold 2 of the module."""
        here = self.places.values[place]
        if here.fresh:  # whatever comes first, should it say nothing, wakes it up
            yield from self._tick(who, place)
        for at, soup in soups:
            facts = self._soups.values[soup]
            for member in (here.member, here.ghost):
                tells = gossip.lacking(member, ms.Knows()) if member and _at(member) == at else ()
                for fact in tells:
                    if fact not in facts:
                        why = f"s1_told_is_written: {here.id} can tell {fact}: nobody wrote it"
                        move = Move(who, None, "tells", None, False)
                        yield Way(move, place, (), 0, 0, 0, why, (), still=True)
            for fact in sorted(facts, key=repr):
                if (message := self._message(who, at, fact)) is not None:
                    yield from self._hear(who, place, message)

    def _message(self, who: int, at: At, fact: ms.Fact) -> int | None:
        """Number the message that tells one fact; None where there is nobody who could send it."""
        roster = self.rosters[at[0]]
        sender = next((i for i, name in enumerate(roster.ids) if self.at[name] != who), None)
        if sender is None:
            return None
        return self.air.message(ms.Message(sender, 0, at[1], at[2], at[0], (fact,), ms.Knows()))


def erased(place: Place) -> Place:
    """Forget what a place knows of others' knowledge."""
    member, ghost = (
        m and _replace(m, peers=Peers(), turned=-1) for m in (place.member, place.ghost)
    )
    if member == place.member and ghost == place.ghost:
        return place
    return _replace(place, member=member, ghost=ghost)


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
