"""Epochs, their vectors, the recovery line, and the greatest consistent vector.

A *vector* holds one epoch a domain, always in the same order of domains. Vectors are ordered
componentwise; they form a distributive lattice whose meet is the minimum and whose join is the
maximum of each component (B. A. Davey and H. A. Priestley, *Introduction to Lattices and Order*,
2nd ed., 2002: products of chains, adjunctions). That consistency of a distributed state is a
matter of this *epoch lattice* is the idea of P. Borrill, arXiv 2603.02603; we had its abstract
only, so the definitions here are our own construction. A vector is *consistent* when it lies on
the diagonal (the same epoch everywhere) and *mixed* otherwise. The diagonal is a sublattice. The
mixed vectors are not even closed: (1,2) and (2,1) meet in (1,1).

What can be recovered is a matter of *retained sets*, not of a vector: :func:`recovery_line` is
the greatest epoch that every domain still holds, never the minimum of the newest ones, which
some domain may have released or never finished.

Not every system wants the diagonal. Bounded staleness and firmware that speaks its own version
and one before are *difference constraints* ``v_i - v_j <= c`` over steps; the diagonal is the
case of c = 0 both ways. :func:`greatest_below` and :func:`greatest_retained` find the greatest
vector that keeps them, or the constraints that contradict each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import TypeAlias, TypeVar

import msgspec

__all__ = [
    "GENESIS", "Conflict", "Constraint", "Epoch", "Skew", "Solution", "Vector",
    "ceiling", "consistent", "diagonal", "floor", "greatest_below", "greatest_retained", "join",
    "leq", "mask", "meet", "mixed", "recoverable", "recovery_line", "skew", "violated",
    "without",
]  # fmt: skip


class Epoch(msgspec.Struct, frozen=True, order=True, array_like=True, gc=False):
    """A generation (one life of the job) and a step (completed optimizer updates)."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"{self.generation}/{self.step}"


GENESIS = Epoch(0, 0)

Vector: TypeAlias = tuple[Epoch, ...]

# The laws hold for vectors of bare steps just as well, and the constraints below speak of those.
_T = TypeVar("_T", Epoch, int)


# Vectors


def meet(a: Sequence[_T], b: Sequence[_T]) -> tuple[_T, ...]:
    """Return the greatest vector below both: the minimum, domain by domain.

    Raises ValueError when the vectors are not of the same domains (their lengths differ).
    """
    return tuple(min(x, y) for x, y in _pairs(a, b))


def join(a: Sequence[_T], b: Sequence[_T]) -> tuple[_T, ...]:
    """Return the least vector above both: the maximum, domain by domain.

    Raises ValueError when the vectors are not of the same domains (their lengths differ).
    """
    return tuple(max(x, y) for x, y in _pairs(a, b))


def leq(a: Sequence[_T], b: Sequence[_T]) -> bool:
    """Tell whether no domain is further in ``a`` than in ``b``; a partial order.

    Raises ValueError when the vectors are not of the same domains (their lengths differ).
    """
    return all(x <= y for x, y in _pairs(a, b))


def diagonal(epoch: Epoch, domains: int) -> Vector:
    """Return the consistent vector that has ``epoch`` in each of so many domains."""
    return (epoch,) * domains


def floor(vector: Sequence[Epoch]) -> Epoch:
    """Return the epoch of the greatest consistent vector below ``vector``: its minimum.

    It is the upper adjoint of the diagonal: ``diagonal(e) <= v`` exactly when ``e <= floor(v)``.
    It says where rolling back would end *if* every domain still held that epoch; whether they
    do is known to :func:`recovery_line` only. Raises ValueError for a vector of no domains.
    """
    return min(_some(vector))


def ceiling(vector: Sequence[Epoch]) -> Epoch:
    """Return the epoch of the least consistent vector above ``vector``: its maximum.

    It is the lower adjoint of the diagonal: ``v <= diagonal(e)`` exactly when
    ``ceiling(v) <= e``. Raises ValueError for a vector of no domains.
    """
    return max(_some(vector))


def consistent(vector: Sequence[Epoch]) -> bool:
    """Tell whether every domain is at the same epoch.

    Raises ValueError for a vector of no domains: of nothing, nothing is vouched for.
    """
    return floor(vector) == ceiling(vector)


def mixed(vector: Sequence[Epoch]) -> bool:
    """Tell whether two domains are at different epochs. Raises ValueError as `consistent` does."""
    return not consistent(vector)


class Skew(msgspec.Struct, frozen=True):
    """How far the domains of a vector are apart. A normal condition, never an error.

    ``distinct`` counts the epochs in the vector (1 = consistent), ``generations`` the lives of
    the job that they come from. ``steps`` is the greatest step less the least, in completed
    optimizer updates, *along one timeline*; it is None where that is not known. Steps of two
    generations can't be subtracted: the later one resumed from a base that the vector does not
    show, so 1/100 and 2/80 may be twenty updates apart or on two timelines, one of which was
    abandoned, and 1/100 and 2/100 are different states at the same label.
    """

    distinct: int
    generations: int
    steps: int | None


def skew(vector: Sequence[Epoch], *, one_timeline: bool = False) -> Skew:
    """Measure how far the domains are apart. Raises ValueError for a vector of no domains.

    ``one_timeline`` says that all of them are known to lie on one; of one generation they do.
    """
    low, high = floor(vector), ceiling(vector)
    generations = len({epoch.generation for epoch in vector})
    return Skew(
        distinct=len(frozenset(vector)),
        generations=generations,
        steps=high.step - low.step if generations == 1 or one_timeline else None,
    )


def _pairs(a: Sequence[_T], b: Sequence[_T]) -> Iterator[tuple[_T, _T]]:
    if len(a) != len(b):
        raise ValueError(
            f"vectors of {len(a)} and {len(b)} domains can't be compared: "
            "give both one component for each domain of the same configuration"
        )
    return zip(a, b, strict=True)


def _some(vector: Sequence[Epoch]) -> Sequence[Epoch]:
    if not vector:
        raise ValueError("a vector of no domains has no epoch: give one component for each domain")
    return vector


def mask(domains: Sequence[int], size: int) -> int:
    """Write domains as a mask, in time linear in their number and the size."""
    bits = bytearray(b"0" * size)
    for i in domains:
        bits[size - 1 - i] = 49  # the digit 1
    return int(bits or b"0", 2)


# Retained sets


def recoverable(retained: Sequence[Collection[Epoch]]) -> tuple[Epoch, ...]:
    """Return the epochs that are in every set, newest first.

    A set is what one domain still holds, or, where a shard has several copies, the union of what
    their domains hold. The intersection is empty when the sets have nothing in common, as happens
    when each domain keeps its own newest k. Raises ValueError without any set: the
    intersection of none would be every epoch.
    """
    if not retained:
        raise ValueError("no domain was asked what it retains: give one set for each domain")
    return tuple(sorted(frozenset.intersection(*map(frozenset, retained)), reverse=True))


def recovery_line(retained: Sequence[Collection[Epoch]]) -> Epoch | None:
    """Return the greatest epoch that every domain retains, or None when they share none.

    It is the maximum of the intersection, never the minimum of the newest (the design,
    section 1). ChainerMN resumed "the maximum common snapshot" in this way in 2017. Which epochs
    may be offered at all (the chain of bases) is decided before, by who fills the sets.
    Raises ValueError as :func:`recoverable` does.
    """
    return next(iter(recoverable(retained)), None)


def without(retained: Sequence[Collection[Epoch]], epoch: Epoch) -> tuple[int, ...]:
    """Return the domains (their indices) that do not retain ``epoch``.

    For an epoch above the recovery line this is the reason why it is not the line.
    """
    return tuple(i for i, held in enumerate(retained) if epoch not in held)


# Difference constraints


class Constraint(msgspec.Struct, frozen=True, order=True, array_like=True):
    """``v_i - v_j <= bound``: domain i may be at most ``bound`` steps ahead of domain j.

    A negative bound obliges i to stay behind j. Its text reads ``v2 - v0 <= 1``.
    """

    i: int
    j: int
    bound: int

    def __str__(self) -> str:
        return f"v{self.i} - v{self.j} <= {self.bound}"


class Solution(msgspec.Struct, frozen=True):
    """The greatest vector that keeps every constraint: one step a domain."""

    vector: tuple[int, ...]


class Conflict(msgspec.Struct, frozen=True):
    """No vector keeps the constraints.

    ``edges`` contradict each other, or what the domains have, and none of them can be spared:
    without any one the rest could be kept. There may be other such sets. They are empty when the
    domain had nothing to begin with. ``domain`` is one that they leave without a step, and the
    edges stand in the order of the reasons, from that domain backwards.
    """

    domain: int
    edges: tuple[Constraint, ...]

    def __str__(self) -> str:
        why = f" under {', '.join(map(str, self.edges))}" if self.edges else ": it retains nothing"
        return f"domain {self.domain} is left without a step{why}"


def violated(vector: Sequence[int], constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
    """Return the constraints that ``vector`` breaks, in their order.

    Raises ValueError for a constraint on a domain that the vector does not have.
    """
    _check(len(vector), constraints)
    return tuple(c for c in constraints if vector[c.i] - vector[c.j] > c.bound)


def greatest_below(top: Sequence[int], constraints: Sequence[Constraint]) -> Solution | Conflict:
    """Find the greatest vector between 0 and ``top`` that keeps every constraint.

    The solutions are closed under meet and join (difference constraints are both min- and
    max-closed; Jeavons and Cooper 1995), so that if there is one, there is a greatest. It is found
    as the Bellman-Ford algorithm finds shortest paths: lower ``v_i`` to ``v_j + bound`` wherever
    it is above, until nothing is. The outcome depends on the set of constraints, not on their
    order. Time O(constraints x log domains) where no bound is negative, else O(domains x
    constraints); for a conflict, times the length of the chain of reasons.

    Raises ValueError for a constraint on a domain that ``top`` does not have.
    """
    return _solve([range(step + 1) for step in top], constraints, patience=len(top))


def greatest_retained(
    retained: Sequence[Collection[int]], constraints: Sequence[Constraint]
) -> Solution | Conflict:
    """Find the greatest vector of retained steps (one of each set) that keeps every constraint.

    The same descent, over the sets: ``v_i`` falls to the greatest retained step that is at most
    ``v_j + bound``. With the constraints of the diagonal it finds the recovery line. When a set
    is exhausted there is no solution. Time O(steps retained x constraints of a domain), times
    the length of the chain of reasons for a conflict.

    Raises ValueError for a constraint on a domain that ``retained`` does not have.
    """
    levels = [sorted(frozenset(steps)) for steps in retained]
    return _solve(levels, constraints, patience=sum(map(len, levels)))


def _solve(
    levels: Sequence[Sequence[int]], constraints: Sequence[Constraint], patience: int
) -> Solution | Conflict:
    """Descend; shrink a conflict until each of its edges is needed (Chinneck's deletion filter).

    An edge that was needed once stays so: dropping others later only makes a conflict harder.
    """
    _check(len(levels), constraints)
    for domain, steps in enumerate(levels):
        if not steps:
            return Conflict(domain, ())
    outcome = _descend(levels, constraints, patience)
    if isinstance(outcome, Conflict):  # so that it names the same, whatever the order
        outcome = _descend(levels, sorted(frozenset(constraints)), patience)
    if isinstance(outcome, Conflict):
        for edge in outcome.edges:
            rest = [other for other in outcome.edges if other != edge]
            smaller = _descend(levels, rest, patience)
            if isinstance(smaller, Conflict):
                outcome = smaller
    return outcome


class _Cause:
    """Why a domain is where it is: an edge, and what had lowered the domain at its other end."""

    __slots__ = ("before", "depth", "edge")

    def __init__(self, edge: Constraint, before: _Cause | None) -> None:
        self.edge = edge
        self.before = before
        self.depth: int = before.depth + 1 if before else 1

    def chain(self) -> Iterator[Constraint]:
        cause: _Cause | None = self
        while cause:
            yield cause.edge
            cause = cause.before


def _descend(
    levels: Sequence[Sequence[int]], edges: Sequence[Constraint], patience: int
) -> Solution | Conflict:
    """Lower each domain along its ascending ``levels`` until every edge holds or one has none.

    *Right*: a solution w below v stays below, since w_i <= w_j + bound <= v_j + bound. So what
    is reached is the greatest solution, and where a level runs out there is none.

    *Ends*: every lowering leaves a level behind, so there are at most as many as levels. Where
    the levels are all integers up to a top, that can be long, and a chain of causes as long as
    there are domains (``patience``) ends it: it names a domain twice, lower the second time, so
    that the edges between sum to less than 0 and would lower each other for ever.

    *In time*: the lowest goes first, as in Dijkstra's algorithm; where no bound is negative it is
    not lowered again, unless by a gap in its levels. Where one is, they go in rounds, the lowest of
    a round first, in Bellman and Ford's way: lowest first alone may take exponentially long.

    *The reasons*: the edges of the chain alone, in turn, do the same again; so they conflict.
    """
    at = [steps[-1] for steps in levels]
    causes: list[_Cause | None] = [None] * len(levels)
    leaving: list[list[Constraint]] = [[] for _ in levels]
    for edge in edges:
        leaving[edge.j].append(edge)
    rounds = any(edge.bound < 0 for edge in edges)
    waiting = [(0, step, j) for j, step in enumerate(at)]
    heapify(waiting)
    changed = [True] * len(levels)
    while waiting:
        turn, _, j = heappop(waiting)
        if not changed[j]:
            continue
        changed[j] = False
        for edge in leaving[j]:
            i, limit = edge.i, at[j] + edge.bound
            if at[i] <= limit:
                continue
            cause = _Cause(edge, causes[j])
            below = _at_most(levels[i], limit)
            if below is None or cause.depth >= patience:
                return Conflict(i, tuple(dict.fromkeys(cause.chain())))
            at[i], causes[i], changed[i] = below, cause, True
            heappush(waiting, (turn + rounds, below, i))
    return Solution(tuple(at))


def _at_most(steps: Sequence[int], limit: int) -> int | None:
    """Find the greatest of the ascending steps that is no greater than a limit."""
    if isinstance(steps, range):  # from 0 on, without gaps
        return limit if limit >= 0 else None
    place = bisect_right(steps, limit)
    return steps[place - 1] if place else None


def _check(domains: int, constraints: Sequence[Constraint]) -> None:
    for c in constraints:
        if not (0 <= c.i < domains and 0 <= c.j < domains):
            raise ValueError(
                f"{c} names a domain that is not there: the domains are numbered from 0 "
                f"and there are {domains} of them"
            )
