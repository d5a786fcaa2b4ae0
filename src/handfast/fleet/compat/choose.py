"""What all nodes could run together: the greatest versions that keep the rules, or why none do.

Rules over an order leave one greatest choice, which :mod:`handfast.core.lattice` finds (see
:mod:`plan`). A matrix or a probe that fails there splits what lies below in two: the client lower,
or the server. So with these the choice is one that no other is above, found from the top; in the
worst case that search is exponential, and it stops, saying so, after TRIES. The same search, asked
whether *some* ties can be kept, makes a clash minimal: nothing in it can be spared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain
from typing import Final

import msgspec

from handfast.core.lattice import Conflict, Solution, greatest_retained
from handfast.errors import Refused
from handfast.fleet.compat import words
from handfast.fleet.compat.meaning import Results, answer, expanded, reads, results
from handfast.fleet.compat.plan import Menu, Options, Plan, Tie, compiled
from handfast.fleet.compat.rules import ABSENT, Level, Matrix, MustProbe, Place, Probed, Rule, Rules

__all__ = ["TRIES", "Choice", "Clash", "Part", "choose"]

TRIES: Final = 10_000
DEAR: Final = 4_000  # constraints: with so many more, a try counts as one more


class Choice(msgspec.Struct, frozen=True):
    """A version for each node's facts that rules speak of, among what it could have.

    ``greatest``: no other choice that keeps the rules has any version higher. Without it, matrices
    or probes had a say: others may have one version higher, and then have another one lower.
    """

    values: dict[str, dict[str, str]]
    greatest: bool


class Part(msgspec.Struct, frozen=True):
    """One rule between some nodes and others; they are the same where it is about one node.

    ``sentence`` says what it needs, and what they have to choose from.
    """

    rule: str
    place: str
    nodes: tuple[str, ...]
    others: tuple[str, ...]
    sentence: str


class Clash(msgspec.Struct, frozen=True):
    """No versions that the nodes could have keep these together; without any one, some do.

    There may be other such sets.
    """

    parts: tuple[Part, ...]
    sentence: str


def choose(
    rules: Rules,
    options: Options,
    *,
    places: Iterable[Place] = (),
    probed: Iterable[Probed] = (),
) -> Choice | Clash:
    """Find versions that keep every rule which would refuse; rules that only warn are left out.

    ``options`` gives each node, for each fact, what it could have, in any order; what is fixed has
    one option, what is not there none. What a rule can't judge does not keep it. Nodes that could
    have the same, in the same places, get the same. A pattern stands for the facts that somebody
    has options for. The order of rules and nodes changes nothing.
    Raises FormatError where versions of a fact can't be ordered, or two orders contradict each
    other; Refused where matrices and probes leave more than TRIES to look through; ValueError for
    a place with a node that is not there.
    """
    every = expanded(rules, chain.from_iterable(options.values())).rules
    named = (r for r in every if not any(fact.endswith("*") for fact in reads(r)[0]))
    kept = sorted((r for r in named if r.mode is Level.REFUSE), key=lambda r: r.name)
    plan = compiled(kept, options, places)
    search = _Search(plan, results(probed))
    ties = range(len(plan.ties))
    found = search.choice(ties)
    return search.clash(rules, ties) if found is None else found


class _Search:
    """Looks for choices that keep some of a plan's ties, by their numbers."""

    def __init__(self, plan: Plan, probed: Results) -> None:
        self.plan = plan
        self.probed = probed
        self.tries = 0
        self.told: dict[tuple[str, tuple[str, ...], tuple[str, ...]], bool] = {}

    def choice(self, ties: Sequence[int]) -> Choice | None:
        """Find a choice, from the greatest downwards; None where there is none.

        What is highest in sum goes first, and is a bound for all below it: so none is above what
        is found.
        """
        kept = [self.plan.ties[n] for n in ties]
        ahead: list[tuple[int, int, dict[int, int], dict[int, int]]] = []
        seen: set[frozenset[tuple[int, int]]] = set()

        def below(tops: dict[int, int]) -> None:
            state = frozenset(tops.items())
            at = None if state in seen else self._greatest(kept, tops)
            seen.add(state)
            if at is not None:
                heappush(ahead, (-sum(at.values()), len(seen), tops, at))

        below({})
        while ahead:
            _, nth, tops, at = heappop(ahead)
            lower = self._broken(kept, at)
            if not lower:
                return self._spelled(at, greatest=nth == 1)
            for menu in lower:
                if at[menu.at]:  # else it has nothing older
                    below(tops | {menu.at: at[menu.at] - 1})
            if self.tries > TRIES:
                raise Refused(
                    f"more than {TRIES:,} ways to look through: so many matrices and probes leave, "
                    "or so many there are to make a clash small",
                    verdict=None,
                    remedy="give the nodes fewer options, or choose for fewer of them at once",
                )
        return None

    def _solve(self, ties: Iterable[Tie], tops: Mapping[int, int]) -> Solution | Conflict:
        """Find the greatest cuts, no menu's index above its top, as far as orders have a say."""
        held: list[Collection[int]] = [(0,)] * self.plan.size
        for menu in self.plan.menus:
            held[menu.at] = (1,)
            for i in range(1, tops.get(menu.at, len(menu.options) - 1) + 1):
                held[menu.at + i] = (0, 1)
        edges = tuple(dict.fromkeys(chain(self.plan.chains, *(tie.edges for tie in ties))))
        self.tries += 1 + len(edges) // DEAR
        return greatest_retained(held, edges)

    def _greatest(self, ties: Iterable[Tie], tops: Mapping[int, int]) -> dict[int, int] | None:
        """Turn the greatest cuts into the index of each menu."""
        found = self._solve(ties, tops)
        if isinstance(found, Conflict):
            return None
        ends = ((menu, menu.at + len(menu.options)) for menu in self.plan.menus)
        return {menu.at: sum(found.vector[menu.at : end]) - 1 for menu, end in ends}

    def _broken(self, ties: Iterable[Tie], at: Mapping[int, int]) -> list[Menu]:
        """The menus of the first matrix or probe that fails: one of them has to be lower."""
        for tie in ties:
            if isinstance(tie.rule.body, Matrix | MustProbe):
                a, b = (tuple([s.options[at[s.at]] for s in e]) for e in (tie.left, tie.right))
                if not self._holds(tie.rule, a, b):
                    return [*dict.fromkeys((*tie.left, *tie.right))]
        return []

    def _holds(self, rule: Rule, a: tuple[str, ...], b: tuple[str, ...]) -> bool:
        """Read a rule at two ends, once: a matrix may be long."""
        key = (rule.name, a, b)
        if key not in self.told:
            self.told[key] = answer(rule, a, b, self.probed).holds is True
        return self.told[key]

    def _spelled(self, at: Mapping[int, int], *, greatest: bool) -> Choice:
        values = {
            name: {
                fact: menu.options[at[menu.at]]
                for fact, menu in each.menus.items()
                if menu.options != (ABSENT,)
            }
            for each in self.plan.flocks
            for name in each.names
        }
        return Choice(values, greatest)

    def clash(self, rules: Rules, ties: Sequence[int]) -> Clash:
        """Drop rules, flocks of nodes, then tie after tie, as long as there is still no choice.

        What was needed once stays so: dropping others later only leaves more choices. Where orders
        alone leave none, the lattice's own conflict is where to begin.
        """
        every = [self.plan.ties[n] for n in ties]
        conflict = self._solve(every, {})
        if isinstance(conflict, Conflict):
            ties = [n for n in ties if not set(conflict.edges).isdisjoint(every[n].edges)]
        groups = [
            *(
                {n for n in ties if every[n].rule.name == name}
                for name in dict.fromkeys(tie.rule.name for tie in every)
            ),
            *(
                {n for n in ties if flock in (every[n].first, every[n].second)}
                for flock in range(len(self.plan.flocks))
            ),
            *({n} for n in ties),
        ]
        for group in groups:
            rest = [n for n in ties if n not in group]
            if len(rest) < len(ties) and self.choice(rest) is None:
                ties = rest
        parts = tuple(self._part(rules, every[n]) for n in ties)
        return Clash(parts, words.clash(part.sentence for part in parts))

    def _part(self, rules: Rules, tie: Tie) -> Part:
        nodes, others = (self.plan.flocks[n].names for n in (tie.first, tie.second))
        menus = dict.fromkeys(
            (menu.at, menu.fact, menu.options) for menu in (*tie.left, *tie.right)
        )
        could = [(fact, options) for _, fact, options in menus]
        said = words.need(rules, tie.rule, nodes, others, could)
        return Part(tie.rule.name, tie.place, nodes, others, said)
