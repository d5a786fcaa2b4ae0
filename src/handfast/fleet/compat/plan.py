"""What rules compile to, for nodes that have a choice: difference constraints over cuts.

A node's fact takes one of its *options*, the oldest first: an index. Rules over an order (exact,
adjacent, minimum) are closed under meet and join of these, and compile to the constraints of
:mod:`handfast.core.lattice` over the *cuts* of the index: cut i is 1 where the index is at least i,
else 0. So ``cut i+1 - cut i <= 0``, and "a client at i or above needs a server at j or above" is
``client's cut i - server's cut j <= 0``. In cuts, rules that measure one fact by different scales
(the whole text here, the minor version there) are exact together, which no one index for it is.

Matrices and probes are predicates on pairs, not closed, and compile to nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise, product
from typing import TypeAlias

import msgspec

from handfast.core.lattice import Constraint
from handfast.errors import FormatError, Refused
from handfast.fleet.compat import words
from handfast.fleet.compat.judge import natural
from handfast.fleet.compat.meaning import gap, place_of, reads
from handfast.fleet.compat.rules import ABSENT, Adjacent, Exact, Minimum, Place, Rule, Scope
from handfast.fleet.compat.versions import compare, sort_key

__all__ = ["NEVER", "Flock", "Menu", "Options", "Plan", "Tie", "compiled", "ordered"]

NEVER = 0
"""The cut that nothing reaches."""

KINDS = 400
"""Of nodes, at most: each pair of kinds is compiled for each rule; 200 take 3 s on one core."""

Options: TypeAlias = Mapping[str, Mapping[str, Collection[str]]]


class Menu(msgspec.Struct, frozen=True):
    """A fact of some nodes: its options, oldest first, and the number of its cut 0."""

    fact: str
    at: int
    options: tuple[str, ...]


class Flock(msgspec.Struct, frozen=True):
    """Nodes that could have the same, in the same places. What one of them may run, all may."""

    names: tuple[str, ...]
    menus: dict[str, Menu]


class Tie(msgspec.Struct, frozen=True):
    """A rule between menus of two flocks (by number; they may be one), and its constraints.

    ``place`` is empty for a rule about one node.
    """

    rule: Rule
    place: str
    first: int
    second: int
    left: tuple[Menu, ...]
    right: tuple[Menu, ...]
    edges: tuple[Constraint, ...]


class Plan(msgspec.Struct, frozen=True):
    """All flocks and ties; ``chains`` hold the cuts of each menu in order, ``size`` counts cuts."""

    flocks: tuple[Flock, ...]
    ties: tuple[Tie, ...]
    chains: tuple[Constraint, ...]
    size: int

    @property
    def menus(self) -> Iterator[Menu]:
        """All menus, in the order of their cuts."""
        return chain.from_iterable(each.menus.values() for each in self.flocks)

    def cuts(self, at: Mapping[int, int]) -> list[int]:
        """Turn an index for each menu (by the number of its cut 0) into cuts."""
        found = [0] * self.size
        for menu in self.menus:
            found[menu.at : menu.at + at[menu.at] + 1] = [1] * (at[menu.at] + 1)
        return found


def compiled(rules: Sequence[Rule], options: Options, places: Iterable[Place]) -> Plan:
    """Compile rules for nodes with options; see `choose.choose` for what is raised."""
    fleet = Place(Scope.FLEET, "fleet", tuple(options))
    spots = [fleet, *sorted(places, key=lambda each: (each.scope, each.name, each.nodes))]
    sides = [(set(spot.nodes), set(spot.servers or spot.nodes)) for spot in spots]
    for spot, (nodes, servers) in zip(spots, sides, strict=True):
        for name in natural((nodes | servers) - options.keys()):
            raise ValueError(
                f"{spot.scope} {spot.name} has the node {name}, which is not among those that "
                "are chosen for: give its options, or leave it out"
            )
    flocks = _flocks(rules, options, sides)
    if len(flocks) > KINDS:
        raise Refused(
            f"{len(flocks):,} kinds of nodes, by what they could have and where they are; at most "
            f"{KINDS} are chosen for, pair by pair",
            verdict=None,
            remedy="choose for some of them, or let nodes that are alike have the same options",
        )
    menus = [menu for each in flocks for menu in each.menus.values()]
    return Plan(
        flocks,
        tuple(tie for rule in rules for tie in _ties(rule, flocks, spots, sides)),
        tuple(
            Constraint(s.at + i, s.at + i - 1, 0) for s in menus for i in range(1, len(s.options))
        ),
        1 + sum(len(menu.options) for menu in menus),
    )


def _flocks(
    rules: Sequence[Rule], options: Options, sides: Sequence[tuple[set[str], set[str]]]
) -> tuple[Flock, ...]:
    facts = sorted({fact for rule in rules for fact in chain(*reads(rule))})
    equal: dict[tuple[object, ...], list[str]] = {}
    for name in natural(options):
        could = tuple(tuple(sorted(set(options[name].get(fact, ())))) for fact in facts)
        where = tuple((name in nodes, name in servers) for nodes, servers in sides)
        equal.setdefault((could, where), []).append(name)
    flocks = []
    at = NEVER + 1
    for names in equal.values():
        menus = {}
        for fact in facts:
            found = ordered(rules, fact, set(options[names[0]].get(fact, ())), names)
            menus[fact] = Menu(fact, at, found)
            at += len(found)
        flocks.append(Flock(tuple(names), menus))
    return tuple(flocks)


def _ties(
    rule: Rule,
    flocks: Sequence[Flock],
    spots: Sequence[Place],
    sides: Sequence[tuple[set[str], set[str]]],
) -> Iterator[Tie]:
    alone = rule.scope is Scope.NODE
    left, right = reads(rule)
    differs = isinstance(rule.body, Exact) and rule.body.absent_differs
    for spot, (nodes, servers) in zip(spots, sides, strict=True):
        if not (spot is spots[0] if alone else spot.scope is rule.scope):
            continue
        first = [n for n, each in enumerate(flocks) if each.names[0] in nodes]
        second = [n for n, each in enumerate(flocks) if each.names[0] in servers]
        for a, b in zip(first, first, strict=True) if alone else product(first, second):
            one = tuple(flocks[a].menus[fact] for fact in left)
            other = tuple(flocks[b].menus[fact] for fact in right)
            if differs or all(menu.options != (ABSENT,) for menu in (*one, *other)):
                place = "" if alone else spot.name
                yield Tie(rule, place, a, b, one, other, tuple(_edges(rule, one, other)))


def ordered(
    rules: Sequence[Rule], fact: str, options: Collection[str], names: Sequence[str]
) -> tuple[str, ...]:
    """Order options by the releases that a rule lists where it lists all, else as versions."""
    if not options:
        return (ABSENT,)
    for body in (rule.body for rule in rules if fact in chain(*reads(rule))):
        if isinstance(body, Adjacent) and body.releases:
            placed = {option: place_of(body, option) for option in options}
            found = sorted(options, key=lambda each: (placed[each] or 0, sort_key(each)))
            if None not in placed.values() and all(
                placed[a] != placed[b] or compare(a, b) == -1 for a, b in pairwise(found)
            ):
                return tuple(found)
    found = sorted(options, key=sort_key)
    for a, b in pairwise(found):
        if compare(a, b) != -1:
            raise FormatError(
                f"{fact} of {words.several(names)}: {a!r} and {b!r} can't be ordered, so neither "
                "is the greater. What to do: leave one out, or list the releases in a rule"
            )
    return tuple(found)


def _edges(rule: Rule, left: Sequence[Menu], right: Sequence[Menu]) -> Iterator[Constraint]:
    """Compile a rule between menus: what can't be judged is passed over, and then its order."""
    body = rule.body
    for menu in (*left, *right):
        for i, option in enumerate(menu.options):
            if gap(rule, menu.fact, option):
                yield from _implies(menu, i, menu, i + 1)
    if isinstance(body, Exact):
        for one, other in pairwise((*left, *right)):
            yield from _equal(rule, one, other)
    elif isinstance(body, Adjacent):
        yield from _behind(rule, body, left[0], right[0], 0 if body.never_ahead else body.width)
        yield from _behind(rule, body, right[0], left[0], body.width)
    elif isinstance(body, Minimum):
        rows = {"": body.version} if body.version else body.versions
        for key, low in rows.items():
            i = _first(rule, left[-1], key) if key else 0
            if i < len(left[-1].options):
                yield from _implies(left[-1], i, left[0], _first(rule, left[0], low or ""))


def _implies(one: Menu, i: int, other: Menu, j: int) -> Iterator[Constraint]:
    """Let one menu at i or above need the other at j or above; past its last, never."""
    if j and (one, i) != (other, j):
        yield Constraint(one.at + i, other.at + j if j < len(other.options) else NEVER, 0)


def _equal(rule: Rule, one: Menu, other: Menu) -> Iterator[Constraint]:
    """Pass over what the other can't have; then let each be as high as the other."""
    common = [option for option in one.options if option in other.options]
    places = [other.options.index(option) for option in common]
    _agree(rule, one, places)
    for menu in (one, other):
        for i, option in enumerate(menu.options):
            if option not in common:
                yield from _implies(menu, i, menu, i + 1)
    for option, j in zip(common, places, strict=True):
        i = one.options.index(option)
        yield from _implies(one, i, other, j)
        yield from _implies(other, j, one, i)


def _behind(rule: Rule, body: Adjacent, one: Menu, other: Menu, ahead: int) -> Iterator[Constraint]:
    """Let one menu be at most so far ahead of the other, on the rule's scale."""
    at = [place_of(body, option) for option in one.options]
    _agree(rule, one, [place for place in at if place is not None])
    theirs = [place_of(body, option) for option in other.options]
    for i, place in enumerate(at):
        if place is not None:
            near = (
                j for j, there in enumerate(theirs) if there is not None and there >= place - ahead
            )
            yield from _implies(one, i, other, next(near, len(theirs)))


def _first(rule: Rule, menu: Menu, low: str) -> int:
    """Where a menu reaches a version; what can't be compared with it is passed over anyway."""
    fits = [(compare(option, low) or 0) >= 0 for option in menu.options]
    _agree(rule, menu, list(fits))
    return len(fits) - sum(fits)


def _agree(rule: Rule, menu: Menu, places: list[int]) -> None:
    """Refuse to compile a rule that orders a menu's options otherwise than they stand."""
    if places != sorted(places):
        raise FormatError(
            f"rule {rule.name}: it orders {', '.join(menu.options)} of {menu.fact} in another way "
            "than other rules do, so none is the greatest. What to do: settle one order"
        )
