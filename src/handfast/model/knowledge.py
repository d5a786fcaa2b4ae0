"""What members can know: computed on every point of small systems, not asserted.

A *point* is a state that a system can reach; an agent can't tell points apart in which its own
*view* (its local history) is the same. It **knows** what holds at all points that it can't tell
from this one. E is "everyone knows"; **C**, common knowledge, is the greatest X with X = E(fact
and X) (J. Y. Halpern and Y. Moses, *Knowledge and common knowledge in a distributed environment*,
J. ACM 37(3), 1990; R. Fagin, J. Y. Halpern, Y. Moses and M. Y. Vardi, *Reasoning About Knowledge*,
1995). Sets of points are masks, bit i for point i.

What converging reaches instead is **concurrent knowledge** (P. Panangaden and K. Taylor,
*Concurrent common knowledge: defining agreement for asynchronous systems*, Distributed Computing
6(2), 1992): points are consistent cuts of runs, and an agent knows that *some* cut through where
it stands has the fact. Its common form can be reached without any clock, if every run brings the
fact to everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import combinations, permutations, product
from operator import and_
from typing import Generic, TypeVar

import msgspec

from handfast.model.explore import Model

__all__ = ["Convergence", "Cut", "Cuts", "Handshake", "Rules", "Structure", "Talk", "followers",
    "reachable"]  # fmt: skip

P = TypeVar("P", bound=Hashable)
L = TypeVar("L")
View = Callable[[P], Hashable]


def reachable(model: Model[P, L]) -> list[P]:
    """Give every state that a model can reach, each once, nearest first."""
    found = dict.fromkeys(model.initial())
    ahead = list(found)
    for state in ahead:
        for _, after in model.moves(state):
            if after not in found:
                found[after] = None
                ahead.append(after)
    return ahead


class Structure(Generic[P]):
    """A Kripke structure: points, and the view that each agent has of them."""

    def __init__(self, points: Sequence[P], views: Sequence[View[P]]) -> None:
        self.points = tuple(points)
        self.everywhere = (1 << len(self.points)) - 1
        self.classes = [_classes(self.points, view) for view in views]

    def where(self, holds: Callable[[P], bool]) -> int:
        """Give the points at which something holds."""
        return _mask(holds(point) for point in self.points)

    def knows(self, agent: int, fact: int) -> int:
        """Give the points at which an agent knows a fact: K_i."""
        return sum(mask for mask in self.classes[agent] if not mask & ~fact)

    def everyone(self, fact: int) -> int:
        """Give the points at which every agent knows a fact: E."""
        return reduce(and_, (self.knows(agent, fact) for agent in range(len(self.classes))))

    def common(self, fact: int) -> int:
        """Give the points at which a fact is common knowledge: the greatest X = E(fact and X)."""
        known, before = self.everywhere, -1
        while known != before:
            known, before = self.everyone(fact & known), known
        return known

    def depth(self, point: int, fact: int) -> int:
        """Give the greatest k with E^k of a fact at a point, -1 where it does not hold.

        Raises ValueError where there is none, which is where it is common knowledge.
        """
        if self.common(fact) >> point & 1:
            raise ValueError("the fact is common knowledge there: no depth is the last")
        deep = -1
        while fact >> point & 1:
            fact, deep = self.everyone(fact), deep + 1
        return deep


def _classes(points: Iterable[P], view: Callable[[P], Hashable]) -> list[int]:
    classes: dict[Hashable, int] = {}
    for i, point in enumerate(points):
        seen = view(point)
        classes[seen] = classes.get(seen, 0) | 1 << i
    return list(classes.values())


# The handshake of two parties


class Talk(msgspec.Struct, frozen=True):
    """Two local histories ("staged", and the numbers of messages heard), and what is on its way."""

    a: tuple[str | int, ...] = ()
    b: tuple[str | int, ...] = ()
    air: tuple[int, ...] = ()

    @property
    def delivered(self) -> int:
        """Give how many messages have been heard, each the answer to the one before."""
        return max((n for n in (*self.a, *self.b) if isinstance(n, int)), default=0)

    @property
    def staged(self) -> bool:
        """Say whether both have staged: the fact to be known, true once and for ever."""
        return "staged" in self.a and "staged" in self.b


class Handshake:
    """Offer, echo, bind, and on: message n + 1 answers message n; odd ones go from a to b.

    Nobody speaks before it has staged. Any message may be lost, delayed, sent again and doubled;
    nobody has a clock. A view is a party's whole history (a copy heard again changes nothing).
    """

    views: tuple[View[Talk], ...] = (lambda talk: talk.a, lambda talk: talk.b)

    def __init__(self, messages: int) -> None:
        self.messages = messages

    def initial(self) -> Iterator[Talk]:
        """Begin with nothing staged and nothing said."""
        yield Talk()

    def moves(self, talk: Talk) -> Iterator[tuple[str, Talk]]:
        """Stage, say what the history entitles to, hear, lose."""
        for me, mine in (("a", talk.a), ("b", talk.b)):
            if "staged" not in mine:
                yield f"{me} stages", msgspec.structs.replace(talk, **{me: (*mine, "staged")})
        for number in range(1, self.messages + 1):
            speaker, listener = (talk.a, talk.b) if number % 2 else (talk.b, talk.a)
            hears = "b" if number % 2 else "a"
            rest = tuple(n for n in talk.air if n != number)
            if number in talk.air:
                yield f"{number} is lost", msgspec.structs.replace(talk, air=rest)
                fresh = listener if number in listener else (*listener, number)
                after = msgspec.structs.replace(talk, air=rest, **{hears: fresh})
                yield f"{hears} hears {number}", after
            elif "staged" in speaker and (number == 1 or number - 1 in speaker):
                air = tuple(sorted((*talk.air, number)))
                yield f"{number} is sent", msgspec.structs.replace(talk, air=air)


# Rules of acting together


class Rules:
    """Every pair of rules by which two agents could switch on their views alone, one by one.

    A rule is any set of views: who sees one of them is switched. Rules that would switch back are
    among them, which makes what holds of all the stronger. ``after[i]`` are the points that can
    follow point i, itself among them.
    """

    def __init__(self, structure: Structure[P], after: Sequence[int]) -> None:
        self.structure = structure
        self.after = after

    def every(self) -> Iterator[tuple[int, int]]:
        """Give, for each pair of rules, the points at which the one, and the other, is switched."""
        mine, theirs = self.structure.classes
        yield from product(list(_unions(mine)), list(_unions(theirs)))

    def simultaneous(self, pair: tuple[int, int]) -> bool:
        """Say whether no point of any run finds one switched and the other not."""
        return pair[0] == pair[1]

    def mixes(self, pair: tuple[int, int], *, gated: bool) -> bool:
        """Say whether some frame is interpreted under another epoch than it was sent under.

        A frame sent at one point may arrive at any later one. With the gate it carries its
        sender's epoch, and who is at another one refuses it.
        """
        return any(sent != met for sent, met in self._accepted(pair, gated))

    def meets(self, pair: tuple[int, int], *, gated: bool) -> bool:
        """Say whether some frame of the new epoch is taken at the new epoch."""
        return (True, True) in self._accepted(pair, gated)

    def _accepted(self, pair: tuple[int, int], gated: bool) -> set[tuple[bool, bool]]:
        """The epochs (sender's, receiver's) under which frames are taken."""
        found = set()
        for sender, receiver in (pair, pair[::-1]):
            for point, after in enumerate(self.after):
                sent = bool(sender >> point & 1)
                if after & receiver:
                    found.add((sent, True))
                if after & ~receiver:
                    found.add((sent, False))
        return {(sent, met) for sent, met in found if sent == met or not gated}


def _unions(masks: Sequence[int]) -> Iterator[int]:
    for size in range(len(masks) + 1):
        for chosen in combinations(masks, size):
            yield sum(chosen)


def followers(model: Model[P, L], points: Sequence[P]) -> list[int]:
    """Give for each point the mask of those that can follow it, itself among them."""
    index = {point: i for i, point in enumerate(points)}
    after = [1 << i for i in range(len(points))]
    steps = [[index[to] for _, to in model.moves(point)] for point in points]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(points))):
            reached = after[i]
            for to in steps[i]:
                reached |= after[to]
            changed = changed or reached != after[i]
            after[i] = reached
    return after


# Concurrent knowledge, on the cuts of runs

Vote = tuple[int, int]
"""Who voted, and STAGED or SKIPPED."""

Event = tuple[int, int, tuple[Vote, ...]]
"""From whom, how long that one's history was (0 for an own vote), and the votes that it brings."""

Histories = tuple[tuple[Event, ...], ...]
"""One a domain."""

STAGED, SKIPPED = 1, 0


class Cut(msgspec.Struct, frozen=True):
    """A run, by its number, and how far each domain's history is in this cut of it."""

    run: int
    histories: Histories


class Convergence:
    """Domains vote once, STAGED or SKIP, and tell each other all they hold.

    What a domain hears is all that the other held after its first k events; what brings nothing
    new is no event of its history. Messages go along ``edges`` (all pairs, unless given), may
    overtake each other, and come at any later time or never. Who holds STAGED of all has the
    certificate; who holds a SKIP needs no more.
    """

    def __init__(self, domains: int, edges: Sequence[tuple[int, int]] | None = None) -> None:
        self.domains = domains
        pairs = permutations(range(domains), 2) if edges is None else edges
        self.edges = frozenset(frozenset(pair) for pair in pairs)

    def initial(self) -> Iterator[Histories]:
        """Begin before any vote."""
        yield ((),) * self.domains

    def moves(self, state: Histories) -> Iterator[tuple[str, Histories]]:
        """Vote, or hear something new."""
        for i, mine in enumerate(state):
            held = self.held(mine)
            if i not in held:
                for vote, word in ((STAGED, "stages"), (SKIPPED, "skips")):
                    yield f"{i} {word}", _longer(state, i, (i, 0, ((i, vote),)))
            for j, theirs in enumerate(state):
                if frozenset((i, j)) in self.edges and SKIPPED not in held.values():
                    for k in range(1, len(theirs) + 1):
                        said = self.held(theirs[:k])
                        if not said.keys() <= held.keys():
                            heard = (j, k, tuple(sorted(said.items())))
                            yield f"{i} hears {j}", _longer(state, i, heard)

    def held(self, history: Sequence[Event]) -> dict[int, int]:
        """Give the votes that a history holds, by who cast them."""
        return {who: vote for _, _, votes in history for who, vote in votes}

    def certain(self, history: Sequence[Event]) -> bool:
        """Say whether a history holds the certificate."""
        votes = self.held(history)
        return len(votes) == self.domains and SKIPPED not in votes.values()

    def converged(self, cut: Cut) -> bool:
        """Say whether all have staged: the fact that is to become known."""
        own = (self.held(mine).get(i) for i, mine in enumerate(cut.histories))
        return all(vote == STAGED for vote in own)


def _longer(state: Histories, i: int, event: Event) -> Histories:
    return (*state[:i], (*state[i], event), *state[i + 1 :])


class Cuts(Structure[Cut]):
    """The consistent cuts of a system's runs, and what is known concurrently.

    With ``fair`` a run ends only where nothing new can be heard; else also anywhere before, as
    when messages are lost for ever.
    """

    def __init__(self, model: Convergence, *, fair: bool) -> None:
        states = reachable(model)
        ends = [s for s in states if not fair or next(iter(model.moves(s)), None) is None]
        points = [Cut(run, cut) for run, end in enumerate(ends) for cut in _cuts(end)]
        super().__init__(points, [_local(i) for i in range(model.domains)])
        self._blocks = [_numbers((p.run, p.histories[i]) for p in points)
            for i in range(model.domains)]  # fmt: skip

    def supposes(self, agent: int, fact: int) -> int:
        """Give the cuts through whose local state some cut of the same run has the fact: P_i."""
        blocks = self._blocks[agent]
        held = bin(fact)[:1:-1]
        hit = {block for block, bit in zip(blocks, held, strict=False) if bit == "1"}
        return _mask(block in hit for block in blocks)

    def concurrently(self, fact: int) -> int:
        """Give the cuts at which every agent knows concurrently: all of K_i P_i."""
        agents = range(len(self.classes))
        return reduce(and_, (self.knows(i, self.supposes(i, fact)) for i in agents))

    def concurrent_common(self, fact: int) -> int:
        """Give the cuts of concurrent common knowledge: the greatest X = K_i P_i (fact and X)."""
        known, before = self.everywhere, -1
        while known != before:
            known, before = self.concurrently(fact & known), known
        return known


def _local(i: int) -> View[Cut]:
    return lambda cut: cut.histories[i]


def _cuts(end: Histories) -> Iterator[Histories]:
    """Every cut of a run in which nothing is heard that was not sent."""
    for lengths in product(*(range(len(mine) + 1) for mine in end)):
        cut = tuple(mine[:length] for mine, length in zip(end, lengths, strict=True))
        if all(k <= lengths[j] for mine in cut for j, k, _ in mine):
            yield cut


def _numbers(keys: Iterable[Hashable]) -> list[int]:
    """Number keys in order of appearance, equal ones alike."""
    seen: dict[Hashable, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


def _mask(flags: Iterable[bool]) -> int:
    return int("".join("1" if flag else "0" for flag in flags)[::-1] or "0", 2)
