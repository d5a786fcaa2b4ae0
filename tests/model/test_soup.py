"""Show that the soup of facts hides nothing that a network can bring about.

What the module's docstring argues is gone through here, state by state, over the small jobs that
can be searched both ways.
"""

from __future__ import annotations

from itertools import combinations

import pytest
from msgspec.structs import replace

from handfast.core import events as ev
from handfast.core import gossip
from handfast.core import messages as ms
from handfast.model import place as local
from handfast.model.explore import explore
from handfast.model.place import FAULTS, Bounds, Place, Rules
from handfast.model.protocol import Protocol, State
from handfast.model.scenarios import SCENARIOS, Scenario, build, search
from handfast.model.soup import At, Soup, erased
from mutants import MUTANTS

OF_THE_NETWORK = ("losses", "overtakes", "echoes", "early", "agains")
"""Faults that the soup has for nothing; links that come up anew count among ``agains``."""


def over_a_soup(scenario: Scenario) -> Scenario:
    """Take a scenario out of its network."""
    return replace(scenario, soup=True, links=None, stale=False, ordered=True)


def soup(scenario: Scenario) -> Soup:
    model = build(over_a_soup(scenario))
    assert isinstance(model, Soup)
    return model


def states(model: Protocol) -> set[tuple[object, ...]]:
    """Search a model: its states, without the network and what members know of each other."""
    kept = [i for i, fault in enumerate(FAULTS) if fault not in OF_THE_NETWORK]
    seen: set[tuple[object, ...]] = set()
    places: dict[int, Place] = {}

    def look(state: State) -> bool:
        for number in state[1 : 1 + model.size]:
            if number not in places:
                places[number] = erased(model.places.values[number])
        spent = model.spent.values[state[0]]
        seen.add((*(spent[i] for i in kept), *map(places.__getitem__, state[1 : 1 + model.size])))
        return model.sound(state)

    found = explore(model, always={"every law": look})
    assert found.exhaustive
    assert found.sound
    return seen


@pytest.mark.parametrize(
    "name",
    ["crash", "any order", "overlap", "stale", "path", "change", "again",
     *(pytest.param(name, marks=pytest.mark.heavy)
       for name in ("network", "tie", "rot", "both", "pins", "retry", "forgone", "epochs", "ghost",
                    "restart", "any order crash", "failures", "passed by", "saving"))],
)  # fmt: skip
def test_whatever_a_network_leads_to_the_soup_leads_to(name: str) -> None:
    """Of all states that are reached over the exact network, with its losses and its order, none
    is missed; and there are far fewer."""
    exact, over = build(SCENARIOS[name]), soup(SCENARIOS[name])
    assert not states(exact) - states(over)
    assert len(over.places.values) < len(exact.places.values)


@pytest.mark.parametrize(
    "name", ["crash", "overlap", pytest.param("path", marks=pytest.mark.heavy),
             pytest.param("rot", marks=pytest.mark.heavy)],
)  # fmt: skip
def test_facts_that_come_together_lead_where_they_lead_one_by_one(name: str) -> None:
    """In one message, whole or cut by a crash: there is an order in which they come to the same."""
    model = soup(SCENARIOS[name])
    met: dict[tuple[int, At, frozenset[ms.Fact]], None] = {}

    def look(state: State) -> bool:
        for who in range(model.size):
            place = state[1 + who]
            met.update(dict.fromkeys((place, at, facts) for at, facts in model.heard(state, who)))
        return model.sound(state)

    assert explore(model, always={"every law": look}).sound
    batches = 0
    for number, at, facts in met:
        place = model.places.values[number]
        if place.member is None or (place.member.generation, place.member.round) != at[1:]:
            continue
        new = sorted(facts - {*gossip.lacking(place.member, ms.Knows())}, key=_in_a_message)
        singly = {each for fact in new for each in comes_to(model.rules, place, at, (fact,))}
        if not singly - {place}:
            continue
        reached = closure(model.rules, place, at, new)
        for size in range(2, len(new) + 1):
            for batch in combinations(new, size):
                batches += 1
                assert comes_to(model.rules, place, at, batch) <= reached
    assert batches > 100


def _in_a_message(fact: ms.Fact) -> tuple[int, str]:
    """Order facts as a message does: what opens a generation, what raises its line, the votes."""
    return [ms.Restored, ms.Converged].index(type(fact)) if isinstance(
        fact, ms.Restored | ms.Converged
    ) else 2, repr(fact)  # fmt: skip


def comes_to(rules: Rules, place: Place, at: At, facts: tuple[ms.Fact, ...]) -> set[Place]:
    """Take facts in one message: what the place becomes, and what if a crash cuts it."""
    member = place.member
    assert member is not None
    sender = 1 if member.me == 0 else 0
    event = ev.Received(ms.Message(sender, 0, at[1], at[2], at[0], facts, ms.Knows()))
    whole = local.take(rules, place, event)
    cut = local.cuts(rules, place, event, whole) if rules.bounds.crashes else ()
    return {erased(taken.place) for taken in (whole, *cut)}


def closure(rules: Rules, place: Place, at: At, facts: list[ms.Fact]) -> set[Place]:
    """Take facts one by one, in every order, each as often as one likes; a crash ends it."""
    reached, waiting = {place}, [place]
    lives = place.incarnation
    while waiting:
        here = waiting.pop()
        if rules.bounds.crashes:
            reached.add(erased(local.crash(rules, here).place))
        for fact in facts:
            new = comes_to(rules, here, at, (fact,)) - reached
            reached |= new
            waiting += [each for each in new if each.incarnation == lives]
    return reached


def test_a_word_that_nobody_wrote_is_found() -> None:
    """Held in every state: what can be told stands in a journal. One that is told before is not."""
    told_early = next(m for m in MUTANTS if m.name == "votes_before_its_first_freeze_is_written")
    with pytest.MonkeyPatch.context() as patch:
        told_early.plant(patch)
        found = search(over_a_soup(SCENARIOS["window"]))
    assert "s1_told_is_written" in found.breach
    assert found.story[-1].endswith("tells")


def test_what_is_never_written_is_not_for_the_soup() -> None:
    """Rolled-up votes and declines are refused, not searched without."""
    for name in ("tree", "decline"):
        with pytest.raises(ValueError, match="not for the soup"):
            soup(SCENARIOS[name])


def test_where_all_begins_may_lie_behind_a_recovery() -> None:
    """A job that has recovered is searched over a soup as over a network."""
    assert not states(build(SCENARIOS["saving"])) - states(soup(SCENARIOS["saving"]))


def test_nothing_that_is_known_of_peers_is_left_in_a_place() -> None:
    """Neither of a member nor of its ghost."""
    model = soup(replace(SCENARIOS["ghost"], bounds=Bounds(crashes=1, ghosts=1)))
    explore(model, always={"every law": model.sound}, limit=2_000)
    assert any(place.ghost is not None for place in model.places.values)
    assert all(place == erased(place) for place in model.places.values)
