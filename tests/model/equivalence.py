"""When two processes are the same: strongly bisimilar, or able to do the same sequences.

Strong bisimilarity (Park 1981; Milner 1989) by refining a partition until it is stable; equality of
traces (Hoare 1985, chapter 1) by following both as sets of states, silent moves closed over.
"""

from collections.abc import Hashable, Iterator

from handfast.model.network import Automaton, automaton
from handfast.model.process import TAU, Process

MOST = 4_000


def bisimilar(p: Process | Automaton, q: Process | Automaton) -> bool:
    """Whether each can follow every move of the other, silent ones included, for ever."""
    one, other = (x if isinstance(x, Automaton) else automaton(x, MOST) for x in (p, q))
    shift = len(one.terms)
    edges = [*one.edges, *(tuple((a, shift + t) for a, t in row) for row in other.edges)]
    block = [0] * len(edges)
    while True:
        seen: dict[tuple[int, frozenset[tuple[Hashable, int]]], int] = {}
        finer = [
            seen.setdefault((block[i], frozenset((a, block[t]) for a, t in row)), len(seen))
            for i, row in enumerate(edges)
        ]
        if len(seen) == len(set(block)):
            return block[0] == block[shift]
        block = finer


def same_traces(p: Process, q: Process) -> bool:
    """Whether both can do the same sequences of visible events."""
    one, other = automaton(p, MOST), automaton(q, MOST)
    begin = (_closed(one, {0}), _closed(other, {0}))
    seen, ahead = {begin}, [begin]
    while ahead:
        left, right = ahead.pop()
        ways, others = dict(_after(one, left)), dict(_after(other, right))
        if ways.keys() != others.keys():
            return False
        for event, states in ways.items():
            pair = (states, others[event])
            if pair not in seen:
                seen.add(pair)
                ahead.append(pair)
    return True


def _closed(of: Automaton, states: set[int]) -> frozenset[int]:
    ahead = list(states)
    found = set(states)
    while ahead:
        for event, target in of.edges[ahead.pop()]:
            if event is TAU and target not in found:
                found.add(target)
                ahead.append(target)
    return frozenset(found)


def _after(of: Automaton, states: frozenset[int]) -> Iterator[tuple[Hashable, frozenset[int]]]:
    targets: dict[Hashable, set[int]] = {}
    for state in states:
        for event, target in of.edges[state]:
            if event is not TAU:
                targets.setdefault(event, set()).add(target)
    for event, found in targets.items():
        yield event, _closed(of, found)
