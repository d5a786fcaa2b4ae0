"""Shows what members can know of each other, computed on every point of small systems.

What is said of the handshake, of switching together, and of the certificate, each beside a system
in which it is otherwise, so that none of it follows from how it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest

from handfast.core.link import Edge, edge
from handfast.model import exhibits
from handfast.model.knowledge import (
    Convergence,
    Cuts,
    Handshake,
    Rules,
    Structure,
    Talk,
    followers,
    reachable,
)

STAR = ((0, 1), (0, 2))


def handshake(messages: int) -> tuple[Structure[Talk], int]:
    """The structure of a handshake, and where both have staged."""
    model = Handshake(messages)
    talk = Structure(reachable(model), model.views)
    return talk, talk.where(lambda point: point.staged)


@pytest.mark.parametrize("messages", range(1, 8))
def test_m_delivered_messages_give_e_to_the_m_minus_1_and_never_c(messages: int) -> None:
    """At every point, not just at the last; and one more message is never the last one needed."""
    talk, staged = handshake(messages)
    seen = set()
    for i, point in enumerate(talk.points):
        if point.staged and point.delivered:
            assert talk.depth(i, staged) == point.delivered - 1
            seen.add(point.delivered)
    assert seen == set(range(1, messages + 1))
    assert talk.common(staged) == 0
    levels = [staged]
    for _ in range(messages + 1):
        levels.append(talk.everyone(levels[-1]))
    assert levels[messages] == 0  # E^messages holds nowhere
    assert all(less & ~more == 0 for more, less in pairwise(levels))


def test_what_all_see_is_common_knowledge() -> None:
    """In a system where both see everything; there no depth is the last."""
    talk, _ = handshake(2)
    public = Structure(talk.points, [lambda point: point, lambda point: point.staged])
    staged = public.where(lambda point: point.staged)
    assert public.common(staged) == staged
    with pytest.raises(ValueError, match="common knowledge"):
        public.depth(staged.bit_length() - 1, staged)
    assert public.depth(0, staged) == -1


class Held(NamedTuple):
    """What one side of an edge holds."""

    offered: bool = False
    theirs: bool = False
    echoed: bool = False

    @property
    def edge(self) -> Edge:
        """The state that the shipped table gives it."""
        return edge(**self._asdict(), skipped=False)


class Edges:
    """Two members that resend what they hold, by the shipped table; old messages come late."""

    def initial(self) -> Iterator[tuple[Held, Held]]:
        yield Held(), Held()

    def moves(self, state: tuple[Held, Held]) -> Iterator[tuple[str, tuple[Held, Held]]]:
        for me in (0, 1):
            mine, other = state[me], state[1 - me]
            after = [mine._replace(offered=True)]
            if other.offered:
                after.append(mine._replace(theirs=True))
            if other.theirs:  # as its message says, which may say less: see the line above
                after.append(mine._replace(theirs=mine.theirs or other.offered, echoed=True))
                after.append(mine._replace(echoed=True))
            for now in after:
                if now != mine:
                    yield "", (now, other) if me == 0 else (other, now)


def test_the_shipped_edge_says_what_a_member_knows() -> None:
    """HEARD and REFLECTED: the peer's vote; ECHOED and REFLECTED: that the peer knows mine."""
    points = reachable(Edges())
    both = Structure(points, [lambda p: p[0], lambda p: p[1]])
    for me in (0, 1):
        mine = both.where(lambda p, me=me: p[me].offered)
        theirs = both.where(lambda p, me=me: p[1 - me].offered)
        heard = both.where(lambda p, me=me: p[me].edge in (Edge.HEARD, Edge.REFLECTED))
        echoed = both.where(lambda p, me=me: p[me].edge in (Edge.ECHOED, Edge.REFLECTED))
        offered = both.where(lambda p, me=me: p[me].edge is not Edge.NONE)
        assert heard == both.knows(me, theirs) & offered
        assert echoed == both.knows(me, both.knows(1 - me, mine)) & offered
        assert both.common(mine & theirs) == 0
    assert {p[0].edge for p in points} == set(Edge) - {Edge.VOID}


# Switching together


def rules_of(messages: int) -> Rules:
    """All rules over the views of a handshake."""
    talk, _ = handshake(messages)
    return Rules(talk, followers(Handshake(messages), talk.points))


@pytest.mark.parametrize("messages", [1, 2, 3, 4])
def test_no_rule_switches_both_at_once_but_never_and_always(messages: int) -> None:
    """Every pair of sets of views is tried; what never goes apart is known in common."""
    rules = rules_of(messages)
    pairs = list(rules.every())
    views = [len(classes) for classes in rules.structure.classes]
    assert len(pairs) == 2 ** sum(views)
    together = [pair for pair in pairs if rules.simultaneous(pair)]
    assert together == [(0, 0), (rules.structure.everywhere,) * 2]


class Lockstep:
    """A shared clock, and a message that takes one tick, always: (has a staged, the time)."""

    def initial(self) -> Iterator[tuple[bool, int]]:
        yield from ((False, 0), (True, 0))

    def moves(self, at: tuple[bool, int]) -> Iterator[tuple[str, tuple[bool, int]]]:
        if at[1] < 2:
            yield "tick", (at[0], at[1] + 1)


def test_with_a_clock_and_sure_delivery_there_is_such_a_rule() -> None:
    """So the theorem is about the messages; and what the rule switches on is common knowledge."""
    points = reachable(Lockstep())
    sees = [lambda p: p, lambda p: (p[0] and p[1] > 0, p[1])]
    both = Structure(points, sees)
    rules = Rules(both, followers(Lockstep(), points))
    together = [pair for pair in rules.every() if rules.simultaneous(pair)]
    wanted = both.where(lambda p: p[0] and p[1] > 0)
    assert (wanted, wanted) in together
    for one, _ in together:
        assert both.common(one) == one


@pytest.mark.parametrize("messages", [2, 4])
def test_a_gate_lets_no_interaction_mix_and_knowledge_alone_does_not(messages: int) -> None:
    """Whatever the rules; and under the rule of knowledge frames of the new epoch get through."""
    rules = rules_of(messages)
    talk = rules.structure
    staged = talk.where(lambda point: point.staged)
    known = (talk.knows(0, staged), talk.knows(1, staged))
    assert all(0 < rule < talk.everywhere for rule in known)
    assert rules.mixes(known, gated=False)
    assert rules.meets(known, gated=True)
    for pair in rules.every():
        assert not rules.mixes(pair, gated=True)
        assert rules.mixes(pair, gated=False) != rules.simultaneous(pair)


def test_followers_are_found_by_walking() -> None:
    """Against a plain walk from each point."""
    model = Handshake(2)
    points = reachable(model)
    after = followers(model, points)
    for i, point in enumerate(points):
        ahead, seen = [point], {point}
        while ahead:
            for _, to in model.moves(ahead.pop()):
                if to not in seen:
                    seen.add(to)
                    ahead.append(to)
        assert {points[j] for j in range(len(points)) if after[i] >> j & 1} == seen


# The certificate, on consistent cuts


@pytest.mark.parametrize(("domains", "edges"), [(2, None), (3, STAR)])
def test_the_certificate_is_concurrent_common_knowledge_in_fair_runs(
    domains: int, edges: tuple[tuple[int, int], ...] | None
) -> None:
    """At the cuts where all hold it, exactly; common knowledge, and with loss for ever: nowhere."""
    model = Convergence(domains, edges)
    for fair in (True, False):
        cuts = Cuts(model, fair=fair)
        fact = cuts.where(model.converged)
        certain = cuts.where(lambda cut: all(map(model.certain, cut.histories)))
        assert 0 < certain.bit_count() < fact.bit_count()
        assert cuts.common(fact) == 0
        assert cuts.concurrent_common(fact) == (certain if fair else 0)
        for i in range(domains):  # who holds the certificate knows the fact, whatever comes
            own = cuts.where(lambda cut, i=i: model.certain(cut.histories[i]))
            assert own == cuts.knows(i, fact)


def test_an_edge_alone_is_no_knowledge_of_the_whole() -> None:
    """A leaf of a star that has heard the hub's own vote does not know that all have staged."""
    model = Convergence(3, STAR)
    cuts = Cuts(model, fair=True)
    fact = cuts.where(model.converged)
    heard = cuts.where(lambda cut: model.held(cut.histories[1]) == {0: 1, 1: 1})
    assert heard & fact
    assert heard & cuts.knows(1, fact) == 0


def test_each_fair_run_that_converges_has_one_cut_of_learning() -> None:
    """The cut that ends with each domain's learning is consistent: no message crosses it back."""
    model = Convergence(3, STAR)
    cuts = Cuts(model, fair=True)
    runs: dict[int, int] = {}
    for cut in cuts.points:
        newly = all(model.certain(h) and not model.certain(h[:-1]) for h in cut.histories)
        runs[cut.run] = runs.get(cut.run, 0) + newly
    assert set(runs.values()) == {0, 1}
    assert sum(runs.values()) == 202


def test_every_exhibit_holds() -> None:
    """What `handfast prove --exhibits` shows without a framework."""
    found = list(exhibits.exhibits())
    assert len(found) == 7
    assert all(exhibit.holds and exhibit.conditions for exhibit in found)
