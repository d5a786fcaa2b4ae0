"""Exchange domains: one representative of all states that differ by who is who (Ip and Dill 1996).

**Why it is sound.** Let every domain hold a shard of its own, in one tier that needs them all, let
there be no tree, let digests say nothing of who wrote (``Rules.alike``), and let the links be the
same under the permutation. Then ``step`` treats domain i of a state as it treats domain p(i) of the
permuted state: it compares ids and indices for equality alone, masks and rows are of members, and
of whatever is ordered (epochs, generations, incarnations) nothing names a domain. One thing is
computed from ids in an order: Merkle roots. But a certificate is only written once all n domains
have staged, or once rank s accepted domain s's copy for every s; with equal digests its leaves
are ``id_i = digest`` for every i, in the order of the configuration: the same root whoever came
first. So a permutation of places, indices and masks is an automorphism of the transition system,
and of every law, since the laws quantify over domains. That orbits add up to all states is a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, permutations
from operator import itemgetter
from typing import Any

import msgspec

from handfast.core import events as ev
from handfast.core import messages as ms
from handfast.core.converge import Ballot, Tally
from handfast.core.membership import Roster, bits
from handfast.core.recover import Check, Recovery
from handfast.core.state import Member, Peer, Peers
from handfast.model.place import Place
from handfast.model.protocol import Protocol, State

__all__ = ["Symmetry"]

_replace = msgspec.structs.replace


class Symmetry:
    """The permutations of a model's domains that keep its links; ``canonical`` for a search.

    Raises ValueError for a model of which domains can't be exchanged.
    """

    def __init__(self, model: Protocol) -> None:
        self.model = model
        roster = next(iter(model.rosters.values()))
        if model.heir or not model.rules.alike or not _uniform(roster):
            raise ValueError("only domains with a shard each, all needed, digests alike")
        links = model.links
        self.ways = [
            _Way(model, way)
            for way in permutations(range(model.size))
            if way != tuple(range(model.size))
            and (links is None or {(way[a], way[b]) for a, b in links} == links)
        ]

    def canonical(self, state: State) -> State:
        """Give the least of all states that are this one with domains exchanged."""
        return state if state[0] < 0 else min([state, *(way.state(state) for way in self.ways)])

    def orbit(self, state: State) -> int:
        """Count the states that are this one with domains exchanged."""
        return len({state, *(way.state(state) for way in self.ways)}) if state[0] >= 0 else 1


def _uniform(roster: Roster) -> bool:
    domains = roster.configuration.domains
    alike = len(roster.tiers) == 1 and [d.shard for d in domains] == list(range(roster.size))
    return alike and roster.tree is None


class _Way:
    """One permutation: domain i becomes domain ``to[i]``."""

    def __init__(self, model: Protocol, to: Sequence[int]) -> None:
        self.model = model
        self.to = tuple(to)
        self.back = tuple(self.to.index(i) for i in range(len(to)))
        self.ids = {model.ids[i]: model.ids[p] for i, p in enumerate(self.to)}
        self.places: dict[int, int] = {}
        self.airs: dict[int, int] = {}

    def state(self, state: State) -> State:
        size = self.model.size
        places = [self.place(state[1 + i]) for i in self.back]
        airs = [self.air(state[1 + size + i]) for i in self.back]
        return (state[0], *places, *airs)

    def place(self, number: int) -> int:
        found = self.places.get(number)
        if found is None:
            place = self.model.places.values[number]
            found = self.places[number] = self.model.place_number(self._place(place))
        return found

    def air(self, number: int) -> int:
        found = self.airs.get(number)
        if found is None:
            air = self.model.air
            told = [self._value(air.messages.values[m]) for m in air.queues.values[number]]
            found = self.airs[number] = air.number([air.message(value) for value in told])
        return found

    # --- values, by their types

    def _place(self, place: Place) -> Place:
        return _replace(
            place,
            id=self.ids[place.id],
            member=self._member(place.member),
            records=self._all(place.records),
            todo=self._all(place.todo),
            ghost=self._member(place.ghost),
        )

    def _member(self, member: Member | None) -> Member | None:
        if member is None or member.roster is None:
            return member and _replace(member, id=self.ids[member.id])
        return _replace(
            member,
            id=self.ids[member.id],
            me=self.to[member.me],
            tallies=self._all(member.tallies),
            recovery=member.recovery and self._value(member.recovery),
            peers=self._peers(member.peers),
        )

    def _peers(self, peers: Peers) -> Peers:
        heard = [(self.to[at], self._value(peer)) for at, peer in peers.heard]
        return Peers(tuple(sorted(heard, key=itemgetter(0))))

    def _all(self, values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple([self._value(value) for value in values])

    def _row(self, row: Sequence[Any]) -> tuple[Any, ...]:
        return tuple([row[i] for i in self.back])

    def _mask(self, mask: int) -> int:
        return sum(1 << self.to[i] for i in bits(mask))

    def _bytes(self, mask: bytes) -> bytes:
        return ms.pack(self._mask(ms.unpack(mask)))

    def _value(self, value: Any) -> Any:
        """Exchange domains in a value; what names none is as it was."""
        to = self.to
        match value:
            case ms.Frozen() | ms.Staged() | ms.Skipped() | ms.Valid() | ms.Bad():
                return _replace(value, domain=to[value.domain])
            case ms.Accepted():
                return _replace(value, shard=to[value.shard], copy=to[value.copy])
            case ms.Declined():
                return _replace(value, shard=to[value.shard])
            case ms.Message():
                return _replace(
                    value, sender=to[value.sender], facts=self._facts(value.facts),
                    knows=self._value(value.knows),
                )  # fmt: skip
            case ms.Knows():
                return _replace(
                    value,
                    frozen=self._bytes(value.frozen),
                    checks=tuple((epoch, self._bytes(mask)) for epoch, mask in value.checks),
                    accepted=self._bytes(value.accepted),
                    declined=self._bytes(value.declined),
                    votes=tuple((t, epoch, self._bytes(mask)) for t, epoch, mask in value.votes),
                )
            case Ballot():
                votes, skips = (sorted(self._all(said), key=_domain)
                                for said in (value.votes, value.skips))  # fmt: skip
                return Ballot(value.epoch, tuple(votes), tuple(skips))
            case Tally():
                return Tally(value.line, self._all(value.ballots))
            case Peer():
                return _replace(value, knows=self._value(value.knows))
            case Check():
                reasons = tuple(sorted((to[i], reason) for i, reason in value.reasons))
                return Check(value.epoch, self._mask(value.valid), self._mask(value.bad), reasons)
            case Recovery():
                return Recovery(
                    value.generation,
                    self._row([report and self._value(report) for report in value.reports]),
                    self._all(value.checks),
                    self._row([said and self._value(said) for said in value.accepted]),
                    tuple(sorted(self._all(value.declined), key=lambda said: said.shard)),
                )  # fmt: skip
            case ev.Propose():
                copies = self._row([self._mask(mask) for mask in value.copies])
                return _replace(value, copies=copies)
            case _:
                return value

    def _facts(self, facts: Sequence[ms.Fact]) -> tuple[ms.Fact, ...]:
        """Exchange domains in facts, and list them as a member does: of one kind and epoch by
        domain. Their order changes no outcome; it would only make equal states look unequal."""
        runs = groupby(self._all(facts), key=lambda f: (type(f), getattr(f, "epoch", None)))
        return tuple(fact for _, run in runs for fact in sorted(run, key=_domain))


def _domain(fact: Any) -> int:
    return getattr(fact, "domain", getattr(fact, "shard", 0))
