"""Processes side by side, each worked out once to all its states: what a search walks over.

A :class:`Network` is the parallel composition of named parts, in which an event happens in all the
parts that have it in their alphabet, at once, or not at all (Hoare's concurrency, 1985,
chapter 2). It means what :meth:`Network.term` means in the algebra, and its states are tuples of
small numbers, one a part; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from functools import reduce
from itertools import product
from typing import TypeAlias

import msgspec

from handfast.model.process import TAU, Parallel, Process, transitions

__all__ = ["Automaton", "Network", "State", "automaton"]

State: TypeAlias = tuple[int, ...]


class Automaton(msgspec.Struct, frozen=True):
    """One process with all its states: from state i, ``edges[i]`` as (event, state) pairs."""

    terms: tuple[Process, ...]
    edges: tuple[tuple[tuple[Hashable, int], ...], ...]

    @property
    def alphabet(self) -> frozenset[Hashable]:
        """The visible events that it can ever do."""
        return frozenset(event for row in self.edges for event, _ in row if event is not TAU)


def automaton(term: Process, most: int = 50_000) -> Automaton:
    """Work out every state that a term can reach; state 0 is the term.

    Raises ValueError for more than ``most`` states: there may be no end to them.
    """
    numbers = {term: 0}
    terms, edges = [term], []
    for each in terms:  # which grows meanwhile
        row = []
        for event, after in transitions(each):
            if after not in numbers:
                if len(terms) == most:
                    raise ValueError(f"a process with more than {most:,} states: bound its epochs")
                numbers[after] = len(terms)
                terms.append(after)
            row.append((event, numbers[after]))
        edges.append(tuple(row))
    return Automaton(tuple(terms), tuple(edges))


class Network:
    """Parts in parallel; ``explore`` takes it as a model, with events as labels.

    ``starts`` are the parts' first states, in their order, where they are not all 0.
    """

    def __init__(self, parts: Mapping[str, Process], refused: Mapping[str, frozenset[Hashable]]):
        """Compose ``parts``; ``refused`` adds events to a part's alphabet that it never does."""
        self.parts = {name: automaton(term) for name, term in parts.items()}
        self.alphabets = {
            name: part.alphabet | refused.get(name, frozenset())
            for name, part in self.parts.items()
        }
        sharing: dict[Hashable, list[int]] = {}
        for i, name in enumerate(self.parts):
            for event in self.alphabets[name]:
                sharing.setdefault(event, []).append(i)
        self._tables = [
            [_row(i, row, sharing) for row in part.edges]
            for i, part in enumerate(self.parts.values())
        ]

    def initial(self) -> Iterator[State]:
        """Every part at its beginning."""
        yield (0,) * len(self.parts)

    def moves(self, state: State) -> Iterator[tuple[Hashable, State]]:
        """Give every event that all who share it can do now."""
        tables = self._tables
        for i, at in enumerate(state):
            for event, sharers, targets in tables[i][at][0]:
                if len(sharers) == 1:
                    for target in targets:
                        yield event, (*state[:i], target, *state[i + 1 :])
                    continue
                ways = [targets]
                for j in sharers[1:]:
                    found = tables[j][state[j]][1].get(event)
                    if found is None:
                        break
                    ways.append(found)
                else:
                    for way in product(*ways):
                        after = list(state)
                        for j, target in zip(sharers, way, strict=True):
                            after[j] = target
                        yield event, tuple(after)

    def term(self) -> Process:
        """Give the same system as one term of the algebra."""

        def both(
            left: tuple[Process, frozenset[Hashable]], right: tuple[Process, frozenset[Hashable]]
        ) -> tuple[Process, frozenset[Hashable]]:
            return Parallel(left[0], right[0], left[1] & right[1]), left[1] | right[1]

        pairs = [(part.terms[0], self.alphabets[name]) for name, part in self.parts.items()]
        return reduce(both, pairs)[0]


_Led: TypeAlias = tuple[Hashable, tuple[int, ...], tuple[int, ...]]


def _row(
    part: int, edges: tuple[tuple[Hashable, int], ...], sharing: Mapping[Hashable, list[int]]
) -> tuple[tuple[_Led, ...], dict[Hashable, tuple[int, ...]]]:
    """Prepare a state: the events that this part is the first to share, and all by event."""
    targets: dict[Hashable, tuple[int, ...]] = {}
    for event, target in edges:
        targets[event] = (*targets.get(event, ()), target)
    led = [
        (event, tuple(sharing.get(event, (part,))), found)
        for event, found in targets.items()
        if event is TAU or sharing[event][0] == part
    ]
    return tuple(led), targets
