"""What the rules say of the nodes that are there: one sentence for each fault, for people.

Nodes with equal values are judged once. So the cost is one look at each node, and then for each
rule d of its distinct values, or d^2 ordered pairs of them; never n^2 links.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain, product
from types import MappingProxyType
from typing import TypeAlias

import msgspec

from handfast.fleet.compat import words
from handfast.fleet.compat.meaning import Results, answer, expanded, gap, reads, results
from handfast.fleet.compat.rules import (
    ABSENT,
    Exact,
    Level,
    Place,
    Probed,
    Rule,
    Rules,
    Scope,
)

__all__ = ["Ruling", "Verdicts", "judge", "natural"]

Facts: TypeAlias = Mapping[str, str | None]
Values: TypeAlias = tuple[str | None, ...]
Sides: TypeAlias = dict[Values, list[str]]


class Ruling(msgspec.Struct, frozen=True):
    """What one rule says against some nodes, in one sentence.

    ``nodes`` are all whom it is about, in their natural order; ``place`` is empty for a rule
    about one node. ``unknown``: it could not be told whether the rule is broken.
    """

    rule: str
    level: Level
    sentence: str
    nodes: tuple[str, ...]
    place: str = ""
    unknown: bool = False


class Verdicts(msgspec.Struct, frozen=True):
    """What was found; nothing is listed that is fine.

    What refuses comes first, and of one level what is known to be broken before what is unknown.
    ``unjudged`` names the rules that had nothing to say here: no node has their facts, or no place
    of their scope was given. ``nodes`` were looked at, of which ``distinct`` have different
    values, and ``looks`` counts the values and ordered pairs of values that rules were held
    against.
    """

    rulings: tuple[Ruling, ...]
    unjudged: tuple[str, ...]
    nodes: int
    distinct: int
    looks: int

    @property
    def level(self) -> Level:
        """The worst of them."""
        found = {ruling.level for ruling in self.rulings}
        return next((bad for bad in (Level.REFUSE, Level.WARN) if bad in found), Level.FINE)


class _Flock(msgspec.Struct):
    """Nodes whose values are equal, as far as the rules look."""

    facts: dict[str, str | None]
    names: list[str]


_Spot: TypeAlias = tuple[Place, list[_Flock], list[_Flock]]


class _Court:
    """Judges rule by rule, place by place, and counts how often it looked."""

    def __init__(self, rules: Rules, probed: Results, whose: str) -> None:
        self.rules = rules
        self.probed = probed
        self.whose = whose
        self.looks = 0
        self.judged: set[str] = set()

    def rule(self, rule: Rule, spots: Iterable[_Spot]) -> Iterator[Ruling]:
        """All that a rule says of the places of its scope."""
        for place, first, second in spots:
            if rule.scope is Scope.NODE:
                yield from self._nodes(rule, first)
            else:
                yield from self._pairs(rule, place, first, second)

    def _nodes(self, rule: Rule, flocks: list[_Flock]) -> Iterator[Ruling]:
        left, right = reads(rule)
        facts = tuple(dict.fromkeys((*left, *right)))
        for values, names in _sides(flocks, facts).items():
            self.looks += 1
            at = dict(zip(facts, values, strict=True))
            first, second = _take(at, left), _take(at, right)
            if ABSENT not in values:
                self.judged.add(rule.name)
            found = answer(rule, first, second, self.probed)
            if not found.holds:
                subject = words.runs(self.rules, names, at)
                yield self._ruling(rule, found.holds, subject, found.why, names, at=at)

    def _pairs(
        self, rule: Rule, place: Place, first: list[_Flock], second: list[_Flock]
    ) -> Iterator[Ruling]:
        left, right = reads(rule)
        below = rule.body.below if isinstance(rule.body, Exact) else ""
        sides = [_sides(first, left, below)]
        if left != right or first is not second:
            sides.append(_sides(second, right, below))
        if not (isinstance(rule.body, Exact) and rule.body.absent_differs):
            sides = [{v: names for v, names in s.items() if ABSENT not in v} for s in sides]
        if not all(sides):  # nobody is there to be held against
            return
        for facts, side in zip((left, right), sides, strict=False):
            yield from self._gaps(rule, place, facts, side)
        clients, servers = sides[0], sides[-1]
        if isinstance(rule.body, Exact):
            if clients and servers:
                yield from self._alike(rule, place, _merged(clients, servers))
            return
        for (a, those), (b, these) in product(clients.items(), servers.items()):
            self.looks += 1
            self.judged.add(rule.name)
            found = answer(rule, a, b, self.probed)
            if not found.holds:
                one, other = zip(left, a, strict=True), zip(right, b, strict=True)
                subject = words.meets(self.rules, rule, (those, one), (these, other))
                names = natural({*those, *these})
                yield self._ruling(rule, found.holds, subject, found.why, names, place)

    def _gaps(
        self, rule: Rule, place: Place, facts: tuple[str, ...], sides: Sides
    ) -> Iterator[Ruling]:
        """Say once of each value that keeps the rule from being judged that it does; drop it."""
        for values, names in tuple(sides.items()):
            self.looks += 1
            if why := next(filter(None, map(partial(gap, rule), facts, values)), ""):
                self.judged.add(rule.name)
                del sides[values]
                subject = words.runs(self.rules, names, dict(zip(facts, values, strict=True)))
                yield self._ruling(rule, None, subject, why, names, place)

    def _alike(self, rule: Rule, place: Place, sides: Sides) -> Iterator[Ruling]:
        """One sentence for all values that should be one; d of them are compared at once."""
        self.looks += len(sides)
        if any(ABSENT not in values for values in sides):
            self.judged.add(rule.name)
        if len(sides) > 1:
            subject = words.differ(self.rules, place, reads(rule)[0][0], sides)
            names = natural(chain.from_iterable(sides.values()))
            yield self._ruling(rule, False, subject, "", names, place)

    def _ruling(
        self,
        rule: Rule,
        holds: bool | None,
        subject: str,
        why: str,
        names: Sequence[str],
        place: Place | None = None,
        at: Facts = MappingProxyType({}),
    ) -> Ruling:
        bad = Level.WARN if holds is None and not rule.require_known else rule.mode
        sentence = words.sentence(self.rules, rule, subject, why, self.whose, at)
        where = place.name if place else ""
        return Ruling(rule.name, bad, sentence, tuple(names), where, holds is None)


def judge(
    rules: Rules,
    nodes: Mapping[str, Facts],
    *,
    places: Iterable[Place] = (),
    probed: Iterable[Probed] = (),
    whose: str = "",
) -> Verdicts:
    """Judge nodes, by their facts, each alone and together in places.

    ``nodes`` gives each node (or rank) its facts; one that is not there is absent, one that is
    None unknown. A pattern stands for the facts that any of them has; one that is a node's fact
    itself, and None, says that all it could stand for there is unknown, which is said once. Rules
    about one node and about the fleet need no place; those of other scopes are judged in each place
    of theirs. ``probed`` are the results that must-probe rules ask for.
    ``whose`` wants the rules kept, in the sentences: "bundle b7"; else the file's name stands.
    The order of nodes, places and rules changes nothing. Raises ValueError for a place with a node
    that is not there.
    """
    rules = expanded(rules, chain.from_iterable(nodes.values()))
    facts = sorted({fact for rule in rules.rules for fact in chain(*reads(rule))})
    flocks, of = _grouped(nodes, facts)
    fleet = Place(Scope.FLEET, "fleet", tuple(nodes))
    spots: dict[Scope, list[_Spot]] = defaultdict(list)
    spots[Scope.NODE].append((fleet, flocks, flocks))
    spots[Scope.FLEET].append((fleet, flocks, flocks))
    for place in sorted(places, key=lambda each: (each.scope, _natural_key(each.name))):
        first = _within(place, place.nodes, of, flocks)
        second = _within(place, place.servers, of, flocks) if place.servers else first
        spots[place.scope].append((place, first, second))
    court = _Court(rules, results(probed), whose or rules.name)
    ordered = sorted(rules.rules, key=lambda each: each.name)
    found = [ruling for rule in ordered for ruling in court.rule(rule, spots[rule.scope])]
    found.sort(key=lambda ruling: (ruling.level is not Level.REFUSE, ruling.unknown))
    found = list(dict.fromkeys(found))  # of who is on both sides of a link it is said once
    names = dict.fromkeys(rule.name for rule in ordered)
    unjudged = tuple(name for name in names if name not in court.judged)
    return Verdicts(tuple(found), unjudged, len(nodes), len(flocks), court.looks)


def natural(names: Iterable[str]) -> list[str]:
    """Sort names as people count: node-2 before node-10."""
    return sorted(names, key=_natural_key)


@lru_cache(maxsize=1 << 16)  # each name is sorted once a rule
def _natural_key(name: str) -> tuple[tuple[tuple[str, int], ...], str]:
    """Take a name apart into what is between its numbers, and the numbers; then node-1, node-01."""
    parts = re.findall(r"(\D*)(\d*)", name)
    return tuple((word, int(digits or "-1")) for word, digits in parts), name


def _grouped(
    nodes: Mapping[str, Facts], facts: Sequence[str]
) -> tuple[list[_Flock], dict[str, int]]:
    """Put nodes with equal values together; also which of the flocks each node is of."""
    seen: dict[Values, list[str]] = defaultdict(list)
    for name in natural(nodes):
        have = nodes[name]
        seen[tuple([have.get(fact, ABSENT) for fact in facts])].append(name)
    flocks = [_Flock(dict(zip(facts, at, strict=True)), names) for at, names in seen.items()]
    return flocks, {name: n for n, each in enumerate(flocks) for name in each.names}


def _within(
    place: Place, names: Iterable[str], of: Mapping[str, int], flocks: Sequence[_Flock]
) -> list[_Flock]:
    """The flocks of a place's nodes, with only these nodes."""
    inside: dict[int, list[str]] = defaultdict(list)
    for name in natural(set(names)):
        if name not in of:
            raise ValueError(
                f"{place.scope} {place.name} has the node {name}, which is not among those that "
                "are judged: give its facts, or leave it out"
            )
        inside[of[name]].append(name)
    return [_Flock(flocks[n].facts, found) for n, found in sorted(inside.items())]


def _sides(flocks: Iterable[_Flock], facts: tuple[str, ...], below: str = "") -> Sides:
    """The distinct values of some facts, and who has them.

    Who knows nothing of what is ``below`` a pattern is among them for the pattern only.
    """
    found: Sides = defaultdict(list)
    for each in flocks:
        values = tuple([each.facts[fact] for fact in facts])
        if below in ("", *facts) or values != (None,) or each.facts[below] is not None:
            found[values] += each.names
    return {values: natural(names) for values, names in found.items()}


def _merged(one: Sides, other: Sides) -> Sides:
    return {
        values: natural({*one.get(values, ()), *other.get(values, ())}) for values in one | other
    }


def _take(at: Mapping[str, str | None], facts: Iterable[str]) -> Values:
    return tuple([at[fact] for fact in facts])
