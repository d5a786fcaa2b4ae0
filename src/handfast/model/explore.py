"""Explicit-state search: every reachable state, the shortest way to each, and what holds there.

Three kinds of properties, after Stateright's (J. Nadal, *Stateright*): **always** holds in every
reachable state; **sometimes** in at least one, or the search has shown little; **eventually** means
that from every reachable state one that satisfies it can still be reached by *calm* moves (AG EF
over a part of the moves: what remains once faults have stopped). In a finite system it is the
same as being reached in the end if of whatever can happen again and again, each move in each state,
each does happen again and again (strong fairness of every single move, which is much).

The search is breadth first, so that the first breach has a shortest trace. What is not explored
because of a limit is counted as the *frontier*, and nothing is claimed about it.
"""

from __future__ import annotations

import hashlib
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec

__all__ = ["Breach", "Model", "Report", "Trace", "explore"]

S = TypeVar("S", bound=Hashable)
L = TypeVar("L")
State = TypeVar("State", bound=Hashable)
Label = TypeVar("Label", covariant=True)


class Model(Protocol[State, Label]):
    """A transition system: where it begins, and what can happen in a state."""

    def initial(self) -> Iterable[State]:
        """Give the initial states."""

    def moves(self, state: State) -> Iterable[tuple[Label, State]]:
        """Give every move out of a state, always in the same order, with where it leads."""


class Trace(msgspec.Struct, Generic[S, L], frozen=True):
    """A shortest way to a state: ``labels[i]`` leads from ``states[i]`` to ``states[i + 1]``.

    With symmetry each state is the representative of its orbit, so a label names a move of that
    one.
    """

    states: tuple[S, ...]
    labels: tuple[L, ...]

    def __len__(self) -> int:
        return len(self.labels)


class Breach(msgspec.Struct, Generic[S, L], frozen=True):
    """A property that does not hold, and a shortest way to where it does not."""

    law: str
    trace: Trace[S, L]


class Report(msgspec.Struct, Generic[S, L], frozen=True):
    """What a search found.

    ``states`` are distinct, ``transitions`` all that were followed, ``depth`` is the length of the
    longest shortest path. ``frontier`` counts the states that were seen and not followed: 0 where
    the search was exhaustive. ``unmet`` are the *sometimes* that held nowhere. ``seconds`` and
    ``bytes_per_state`` are measured, the latter over the search's own tables, states included
    where they are kept.
    """

    states: int
    transitions: int
    depth: int
    frontier: int
    breaches: tuple[Breach[S, L], ...]
    unmet: tuple[str, ...]
    seconds: float
    bytes_per_state: float

    @property
    def exhaustive(self) -> bool:
        """Say whether every reachable state was followed."""
        return self.frontier == 0

    @property
    def sound(self) -> bool:
        """Say whether every property holds, as far as was searched."""
        return not self.breaches and not self.unmet

    @property
    def per_second(self) -> float:
        """Distinct states a second."""
        return self.states / self.seconds if self.seconds else 0.0


def explore(
    model: Model[S, L],
    *,
    always: Mapping[str, Callable[[S], bool]] | None = None,
    sometimes: Mapping[str, Callable[[S], bool]] | None = None,
    eventually: Mapping[str, Callable[[S], bool]] | None = None,
    calm: Callable[[L], bool] = lambda _: True,
    canonical: Callable[[S], S] | None = None,
    digest: Callable[[S], bytes] | None = None,
    limit: int | None = None,
    depth: int | None = None,
    patience: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> Report[S, L]:
    """Search every state that a model can reach.

    ``canonical`` maps a state to the representative of its orbit under a symmetry of the model and
    of every property; ``digest`` makes the table keep 16 bytes a state in place of the state
    (states whose digests are equal are taken for equal: with n states the chance of any such
    mistake is below n^2 / 2^129). ``limit`` and ``depth`` bound the search. It ends with the
    ``patience``-th law that is broken, each counted once. ``progress(states, frontier, depth)`` is
    called now and then.

    Raises ValueError for *eventually* in a search that is bounded: what is behind the frontier is
    not known.
    """
    if eventually and (limit is not None or depth is not None):
        raise ValueError("eventually needs an exhaustive search: leave out limit and depth")
    edges = _Edges(calm, eventually) if eventually else None
    search = _Search(model, always or {}, sometimes or {}, edges, canonical, digest)
    search.run(limit, depth, patience, progress)
    found = list(search.breaches)
    if edges is not None and not found:
        found += edges.lost(len(search.parents))
    return Report(
        states=len(search.parents),
        transitions=search.transitions,
        depth=search.depth,
        frontier=len(search.waiting),
        breaches=tuple(Breach(law, search.trace(at)) for law, at in found),
        unmet=tuple(search.unmet),
        seconds=time.perf_counter() - search.began,
        bytes_per_state=search.nbytes() / max(1, len(search.parents)),
    )


class _Edges(Generic[S]):
    """The calm edges between states, and which states satisfy what must come in the end."""

    def __init__(
        self, calm: Callable[[Any], bool], laws: Mapping[str, Callable[[S], bool]]
    ) -> None:
        self.calm = calm
        self.laws = laws
        self.sources = array("I")
        self.targets = array("I")
        self.goals: dict[str, list[int]] = {law: [] for law in laws}

    def arrive(self, number: int, state: S) -> None:
        for law, holds in self.laws.items():
            if holds(state):
                self.goals[law].append(number)

    def lost(self, states: int) -> Iterator[tuple[str, int]]:
        """Find, for each law, the first state from which it can't be reached any more."""
        for law, goals in self.goals.items():
            first = self.reaching(goals, states).find(0)
            if first >= 0:
                yield law, first

    def reaching(self, goals: Sequence[int], states: int) -> bytearray:
        """Mark every state from which a goal can be reached."""
        counts = array("I", bytes(4 * (states + 1)))
        for target in self.targets:
            counts[target + 1] += 1
        for i in range(states):
            counts[i + 1] += counts[i]
        into = array("I", bytes(4 * len(self.sources)))
        at = counts[:]
        for source, target in zip(self.sources, self.targets, strict=True):
            into[at[target]] = source
            at[target] += 1
        marked = bytearray(states)
        queue = deque(goals)
        for goal in goals:
            marked[goal] = 1
        while queue:
            target = queue.popleft()
            for source in into[counts[target] : counts[target + 1]]:
                if not marked[source]:
                    marked[source] = 1
                    queue.append(source)
        return marked


class _Search(Generic[S, L]):
    """The tables of one search. A state is known by its number, in the order of discovery."""

    def __init__(
        self,
        model: Model[S, L],
        always: Mapping[str, Callable[[S], bool]],
        sometimes: Mapping[str, Callable[[S], bool]],
        edges: _Edges[S] | None,
        canonical: Callable[[S], S] | None,
        digest: Callable[[S], bytes] | None,
    ) -> None:
        self.model = model
        self.always = dict(always)
        self.unmet = dict(sometimes)
        self.canonical = canonical
        self.digest = digest
        self.numbers: dict[Any, int] = {}
        self.parents = array("I")
        self.ordinals = array("H")
        self.waiting: deque[tuple[int, S]] = deque()
        self.breaches: list[tuple[str, int]] = []
        self.edges = edges
        self.transitions = 0
        self.depth = 0
        self.began = time.perf_counter()

    def run(
        self,
        limit: int | None,
        depth: int | None,
        patience: int,
        progress: Callable[[int, int, int], None] | None,
    ) -> None:
        for ordinal, state in enumerate(self.model.initial()):
            self.arrive(state, None, ordinal)
        layer = len(self.waiting)
        most = sys.maxsize if limit is None else limit
        while self.waiting and len(self.breaches) < patience and len(self.parents) < most:
            if layer == 0:
                self.depth += 1
                if self.depth == depth:
                    return
                layer = len(self.waiting)
            layer -= 1
            number, state = self.waiting.popleft()
            if progress is not None and number % 4096 == 0:
                progress(len(self.parents), len(self.waiting), self.depth)
            self.follow(number, state)

    def follow(self, number: int, state: S) -> None:
        edges = self.edges
        for ordinal, (label, after) in enumerate(self.model.moves(state)):
            self.transitions += 1
            target = self.arrive(after, number, ordinal)
            if edges is not None and edges.calm(label):
                edges.sources.append(number)
                edges.targets.append(target)

    def arrive(self, state: S, parent: int | None, ordinal: int) -> int:
        if self.canonical is not None:
            state = self.canonical(state)
        key = state if self.digest is None else self.digest(state)
        number = self.numbers.setdefault(key, len(self.parents))
        if number < len(self.parents):
            return number
        self.parents.append(number if parent is None else parent)
        self.ordinals.append(ordinal)
        self.waiting.append((number, state))
        if self.edges is not None:
            self.edges.arrive(number, state)
        for law, holds in self.always.items():
            if not holds(state):
                self.breaches.append((law, number))
        for law, _ in self.breaches:
            self.always.pop(law, None)
        for name in [name for name, holds in self.unmet.items() if holds(state)]:
            del self.unmet[name]
        return number

    def trace(self, number: int) -> Trace[S, L]:
        """Follow the parents back, and the moves forth: the states need not have been kept."""
        way = [number]
        while self.parents[way[-1]] != way[-1]:
            way.append(self.parents[way[-1]])
        way.reverse()
        state = self._represent(_at(self.model.initial(), self.ordinals[way[0]]))
        states, labels = [state], []
        for step in way[1:]:
            label, after = _at(self.model.moves(state), self.ordinals[step])
            state = self._represent(after)
            states.append(state)
            labels.append(label)
        return Trace(tuple(states), tuple(labels))

    def _represent(self, state: S) -> S:
        return state if self.canonical is None else self.canonical(state)

    def nbytes(self) -> int:
        """Measure the tables; of kept states a sample, each with what it alone holds."""
        keys = len(self.numbers)
        step = max(1, keys // 1000)
        sample = [sys.getsizeof(key) for i, key in enumerate(self.numbers) if i % step == 0]
        each = sum(sample) / len(sample) if sample else 0.0
        tables = sys.getsizeof(self.numbers) + sum(
            len(table) * table.itemsize for table in (self.parents, self.ordinals)
        )
        if self.edges is not None:
            tables += 4 * (len(self.edges.sources) + len(self.edges.targets))
        return int(tables + keys * (each + sys.getsizeof(keys)))


T = TypeVar("T")


def _at(items: Iterable[T], ordinal: int) -> T:
    for i, item in enumerate(items):
        if i == ordinal:
            return item
    raise RuntimeError("the model does not give its moves in one order: no trace can be shown")


def digest_of(state: object) -> bytes:
    """Digest a state of plain values in 16 bytes, for ``explore(digest=)``."""
    return hashlib.blake2b(msgspec.msgpack.encode(state), digest_size=16).digest()
