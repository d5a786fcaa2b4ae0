"""Shows that the algebra's terms obey CSP's laws: that its operators are the ones that it names.

Each law is held on random terms, recursive and silent ones among them, by comparing all states of
its two sides: up to strong bisimilarity where the law is that strong, or up to traces, which is
Hoare's model (*Communicating Sequential Processes*, 1985, chapters 1 to 3, and 5 for interrupts).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.equivalence import bisimilar, same_traces

from handfast.model.network import Automaton, Network, automaton
from handfast.model.process import (
    STOP,
    TAU,
    Choice,
    Hidden,
    Interrupted,
    Parallel,
    Prefix,
    Process,
    Undecided,
    choice,
    interleave,
    process,
    transitions,
)

EVENTS = "abc"
few = settings(max_examples=settings().max_examples // 4)  # of each of thirty laws
Events = frozenset[str]


@process
def clock(event: str) -> Process:
    """One event for ever."""
    return Prefix(event, clock(event))


@process
def turns(one: str, other: str) -> Process:
    """Two events, and the choice of beginning anew after the first."""
    return Prefix(one, Prefix(other, turns(one, other)) | turns(one, other))


event = st.sampled_from(EVENTS)
some = st.frozensets(event)
leaf = st.one_of(st.just(STOP), st.builds(clock, event), st.builds(turns, event, event))
term = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(Prefix, event, inner),
        st.builds(lambda p, q: p | q, inner, inner),
        st.builds(Undecided, inner, inner),
        st.builds(Parallel, inner, inner, some),
        st.builds(Hidden, inner, some),
        st.builds(Interrupted, inner, inner),
    ),
    max_leaves=5,
)

Law = Callable[[Process, Process, Process, str, str, Events, Events], tuple[Process, Process]]

STRONG: dict[str, Law] = {
    "choice is symmetric": lambda p, q, r, a, b, x, y: (p | q, q | p),
    "choice is associative": lambda p, q, r, a, b, x, y: ((p | q) | r, p | (q | r)),
    "choice of many is choice of two": lambda p, q, r, a, b, x, y: (choice(p, q, r), (p | q) | r),
    "STOP is choice's unit": lambda p, q, r, a, b, x, y: (p | STOP, p),
    "undecided is symmetric": lambda p, q, r, a, b, x, y: (
        Undecided(p, q),
        Undecided(q, p),
    ),
    "parallel is symmetric": lambda p, q, r, a, b, x, y: (
        Parallel(p, q, x),
        Parallel(q, p, x),
    ),
    "parallel is associative on one set": lambda p, q, r, a, b, x, y: (
        Parallel(Parallel(p, q, x), r, x),
        Parallel(p, Parallel(q, r, x), x),
    ),
    "interleaving is associative": lambda p, q, r, a, b, x, y: (
        interleave(interleave(p, q), r),
        interleave(p, interleave(q, r)),
    ),
    "STOP is interleaving's unit": lambda p, q, r, a, b, x, y: (interleave(p, STOP), p),
    "interleaving unfolds": lambda p, q, r, a, b, x, y: (
        interleave(Prefix(a, p), Prefix(b, q)),
        Prefix(a, interleave(p, Prefix(b, q))) | Prefix(b, interleave(Prefix(a, p), q)),
    ),
    "a shared event happens once": lambda p, q, r, a, b, x, y: (
        Parallel(Prefix(a, p), Prefix(a, q), x | {a}),
        Prefix(a, Parallel(p, q, x | {a})),
    ),
    "different shared events: deadlock": lambda p, q, r, a, b, x, y: (
        Parallel(Prefix(a, p), Prefix("d", q), x | {a, "d"}),
        STOP,
    ),
    "an own event goes ahead of a shared one": lambda p, q, r, a, b, x, y: (
        Parallel(Prefix("d", p), Prefix(a, q), x | {a}),
        Prefix("d", Parallel(p, Prefix(a, q), x | {a})),
    ),
    "nothing hidden": lambda p, q, r, a, b, x, y: (Hidden(p, frozenset()), p),
    "hiding twice": lambda p, q, r, a, b, x, y: (
        Hidden(Hidden(p, x), y),
        Hidden(p, x | y),
    ),
    "what is not hidden is seen": lambda p, q, r, a, b, x, y: (
        Hidden(Prefix("d", p), x),
        Prefix("d", Hidden(p, x)),
    ),
    "hiding goes into parallel, off what is shared": lambda p, q, r, a, b, x, y: (
        Hidden(Parallel(p, q, x), y - x),
        Parallel(Hidden(p, y - x), Hidden(q, y - x), x),
    ),
    "interrupts are associative": lambda p, q, r, a, b, x, y: (
        Interrupted(Interrupted(p, q), r),
        Interrupted(p, Interrupted(q, r)),
    ),
    "STOP interrupts nothing": lambda p, q, r, a, b, x, y: (Interrupted(p, STOP), p),
    "STOP can only be interrupted": lambda p, q, r, a, b, x, y: (
        Interrupted(STOP, p),
        p,
    ),
    "a catastrophe at any time": lambda p, q, r, a, b, x, y: (
        Interrupted(Prefix(a, p), Prefix("crash", q)),
        Prefix(a, Interrupted(p, Prefix("crash", q))) | Prefix("crash", q),
    ),
    "recursion unfolds": lambda p, q, r, a, b, x, y: (clock(a), Prefix(a, clock(a))),
}

BY_TRACES: dict[str, Law] = {
    "choice is idempotent": lambda p, q, r, a, b, x, y: (p | p, p),
    "undecided is idempotent": lambda p, q, r, a, b, x, y: (Undecided(p, p), p),
    "undecided is associative": lambda p, q, r, a, b, x, y: (
        Undecided(Undecided(p, q), r),
        Undecided(p, Undecided(q, r)),
    ),
    "prefix distributes": lambda p, q, r, a, b, x, y: (
        Prefix(a, Undecided(p, q)),
        Undecided(Prefix(a, p), Prefix(a, q)),
    ),
    "choice distributes over undecided": lambda p, q, r, a, b, x, y: (
        p | Undecided(q, r),
        Undecided(p | q, p | r),
    ),
    "parallel distributes over undecided": lambda p, q, r, a, b, x, y: (
        Parallel(p, Undecided(q, r), x),
        Undecided(Parallel(p, q, x), Parallel(p, r, x)),
    ),
    "who chooses does not show in traces": lambda p, q, r, a, b, x, y: (p | q, Undecided(p, q)),
    "what is hidden is not seen": lambda p, q, r, a, b, x, y: (
        Hidden(Prefix(a, p), x | {a}),
        Hidden(p, x | {a}),
    ),
    "hiding distributes over undecided": lambda p, q, r, a, b, x, y: (
        Hidden(Undecided(p, q), x),
        Undecided(Hidden(p, x), Hidden(q, x)),
    ),
}


@few
@pytest.mark.parametrize("law", STRONG)
@given(p=term, q=term, r=term, a=event, b=event, x=some, y=some)
def test_a_law_up_to_strong_bisimilarity(
    law: str, p: Process, q: Process, r: Process, a: str, b: str, x: Events, y: Events
) -> None:
    """Both sides can follow each other for ever, move by move."""
    left, right = STRONG[law](p, q, r, a, b, x, y)
    assert bisimilar(left, right)


@few
@pytest.mark.parametrize("law", BY_TRACES)
@given(p=term, q=term, r=term, a=event, b=event, x=some, y=some)
def test_a_law_up_to_traces(
    law: str, p: Process, q: Process, r: Process, a: str, b: str, x: Events, y: Events
) -> None:
    """Both sides can do the same sequences of visible events."""
    left, right = BY_TRACES[law](p, q, r, a, b, x, y)
    assert same_traces(left, right)


def test_what_is_no_law_is_told_from_one() -> None:
    """The comparison is not blind: each of these pairs differs, the last one not in its traces."""
    p, q = Prefix("b", STOP), Prefix("c", STOP)
    assert not same_traces(Parallel(p, q, frozenset("bc")), interleave(p, q))
    assert not same_traces(Hidden(p, frozenset("b")), p)
    assert not bisimilar(p | p | Undecided(p, p), p)
    early, late = Prefix("a", p) | Prefix("a", q), Prefix("a", p | q)
    assert same_traces(early, late)
    assert not bisimilar(early, late)


def test_a_silent_move_decides_no_choice() -> None:
    """So a process that is still making up its mind takes no other option away."""
    silent = Hidden(Prefix("a", Prefix("b", STOP)), frozenset("a"))
    (move, after), kept = transitions(silent | Prefix("c", STOP))
    assert move is TAU
    assert {event for event, _ in transitions(after)} == {"b", "c"}
    assert kept[0] == "c"


def test_recursion_must_be_guarded() -> None:
    """A process that calls itself before any event is refused, in words."""

    @process
    def lost(n: int) -> Process:
        return Choice((lost(n), Prefix("a", STOP)))

    with pytest.raises(ValueError, match="put an event before the call"):
        transitions(lost(0))
    with pytest.raises(TypeError, match="by position"):
        clock(event="a")


def test_a_process_without_end_is_refused() -> None:
    """States that never come to an end are told from many."""

    @process
    def count(n: int) -> Process:
        return Prefix(n, count(n + 1))

    with pytest.raises(ValueError, match="more than 100 states"):
        automaton(count(0), most=100)


small = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(Prefix, event, inner),
        st.builds(lambda p, q: p | q, inner, inner),
        st.builds(Undecided, inner, inner),
        st.builds(Hidden, inner, some),
    ),
    max_leaves=3,
)


@given(parts=st.lists(small, min_size=1, max_size=3), refused=st.lists(some, max_size=3))
def test_a_network_means_its_term(parts: list[Process], refused: list[Events]) -> None:
    """What is searched is the algebra's parallel composition, move for move."""
    names = [f"{i}" for i in range(len(parts))]
    network = Network(dict(zip(names, parts, strict=True)), dict(zip(names, refused, strict=False)))
    states = list(network.initial())
    numbers = {state: i for i, state in enumerate(states)}
    edges = []
    for state in states:  # which grows meanwhile
        for _, after in network.moves(state):
            if numbers.setdefault(after, len(states)) == len(states):
                states.append(after)
        edges.append(tuple((a, numbers[after]) for a, after in network.moves(state)))

    assert bisimilar(Automaton((STOP,) * len(states), tuple(edges)), network.term())
