"""Show that the soup of facts hides nothing that a network can bring about.

What the module's docstring argues is gone through here, state by state, over the small jobs that
can be searched both ways.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations, product
from typing import Any

import pytest
from msgspec.structs import replace

from handfast.core import events as ev
from handfast.core import gossip, member
from handfast.core import messages as ms
from handfast.core.membership import Roster
from handfast.core.retain import Keep
from handfast.model import place as local
from handfast.model.explore import explore
from handfast.model.place import FAULTS, Bounds, Place, Rules
from handfast.model.protocol import Protocol, State
from handfast.model.scenarios import SCENARIOS, Scenario, build, search
from handfast.model.soup import At, Soup, erased
from mutants import MUTANTS

OF_THE_NETWORK = ("losses", "overtakes", "echoes", "early", "agains")
"""What is not compared: faults that the soup has for nothing, and ``agains``, of which it pays for
trainers that begin once more, and not for links that come up anew."""

FEW = {
    "pins": replace(SCENARIOS["pins"], bounds=Bounds(epochs=0, pins=1, crashes=1)),
    "skip": replace(SCENARIOS["saving"], bounds=Bounds(skips=1)),
    "failure": replace(SCENARIOS["saving"], bounds=Bounds(failures=1)),
    "ghost": replace(SCENARIOS["recovering"], bounds=Bounds(epochs=0, crashes=1, ghosts=1)),
    "rot": replace(SCENARIOS["rot"], bounds=Bounds(rots=1), keep=Keep(1)),
}
"""Small jobs with what the searched ones have only in larger company."""


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
        spent = model.spent.values[state[0]]
        for each in product(*may_be(model, state)):
            for number in each:
                if number not in places:
                    places[number] = erased(model.places.values[number])
            seen.add((*(spent[i] for i in kept), *map(places.__getitem__, each)))
        return model.sound(state)

    found = explore(model, always={"every law": look})
    assert found.exhaustive
    assert found.sound
    return seen


def may_be(model: Protocol, state: State) -> list[Collection[int]]:
    """Give what each place of a state may be: over a soup, whatever it has heard in silence."""
    if isinstance(model, Soup):
        return [model.silent(state, who) for who in range(model.size)]
    return [(place,) for place in state[1 : 1 + model.size]]


@pytest.mark.parametrize(
    "name",
    ["crash", "any order", "overlap", "stale", "path", "again", "saving", "few pins", "few skip",
     "few failure", "few ghost", "few rot", "retry",
     *(pytest.param(name, marks=pytest.mark.heavy)
       for name in ("network", "tie", "rot", "pins", "forgone", "epochs", "ghost",
                    "restart", "any order crash", "passed by"))],
)  # fmt: skip
def test_whatever_a_network_leads_to_the_soup_leads_to(name: str) -> None:
    """Of all states that are reached over the exact network, with its losses and its order, none
    is missed, whatever else was heard in silence; and there are far fewer."""
    scenario = FEW[name[4:]] if name.startswith("few ") else SCENARIOS[name]
    exact, over = build(scenario), soup(scenario)
    assert not states(exact) - states(over)
    assert len(over.places.values) < len(exact.places.values)


@pytest.mark.parametrize(
    "name",
    ["crash", "overlap", *(pytest.param(name, marks=pytest.mark.heavy)
                           for name in ("path", "rot", "retry", "forgone", "soup of three"))],
)  # fmt: skip
def test_facts_that_come_together_lead_where_they_lead_one_by_one(name: str) -> None:
    """In one message, whole or cut by a crash: there is an order in which they come to the same."""
    model = soup(SCENARIOS[name])
    met: dict[tuple[int, At, frozenset[ms.Fact]], None] = {}

    def look(state: State) -> bool:
        for who in range(model.size):
            if heard := model.heard(state, who):
                met.update(dict.fromkeys((place, *heard) for place in model.silent(state, who)))
        return model.sound(state)

    assert explore(model, always={"every law": look}).sound
    batches = 0
    for number, at, facts in met:
        place = model.places.values[number]
        assert place.member is not None
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
    assert place.member is not None
    sender = 1 if place.member.me == 0 else 0
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


def test_what_is_sent_is_held_against_the_soup() -> None:
    """A certificate of a later step that is told beside the true one stands in no journal."""
    converge = member._converge

    def boasts(turn: Any, roster: Roster) -> None:
        before = len(turn.persist)
        converge(turn, roster)
        for record in turn.persist[before:]:
            if isinstance(record, ms.Converged):
                epoch = replace(record.certificate.epoch, step=record.certificate.epoch.step + 1)
                turn.news.append(ms.Converged(replace(record.certificate, epoch=epoch)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "_converge", boasts)
        found = search(SCENARIOS["soup"])
    assert "s1_told_is_written" in found.breach


def test_a_tick_that_does_something_is_found_over_a_soup() -> None:
    """Though no tick is needed there, each is held against S15."""
    late = next(m for m in MUTANTS if m.name == "skips_after_a_timeout")
    with pytest.MonkeyPatch.context() as patch:
        late.plant(patch)
        found = search(over_a_soup(SCENARIOS["saving"]))
    assert "s15_time_changes_nothing" in found.breach


@pytest.mark.parametrize(
    ("name", "why"),
    [("tree", "never written"), ("decline", "never written"), ("either", "spare copies"),
     ("tiers", "several tiers"), ("failures", "more than one save may fail")],
)  # fmt: skip
def test_what_is_not_for_the_soup_is_refused(name: str, why: str) -> None:
    """With the reason, and not searched without."""
    with pytest.raises(ValueError, match=f"not for the soup: .*{why}"):
        soup(SCENARIOS[name])


def test_a_story_tells_what_was_heard_in_silence() -> None:
    """One line for each thing heard, then what came of it; and every line in its turn."""
    fault = next(m for m in MUTANTS if m.name == "forgets_its_acceptance")
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        found = search(SCENARIOS["soup"])
    heard = [line for line in found.story if "hears" in line]
    assert any("->" not in line for line in heard)
    assert "Accepted" in found.story[-1]


def test_nothing_that_is_known_of_peers_is_left_in_a_place() -> None:
    """Neither of a member nor of its ghost."""
    model = soup(replace(SCENARIOS["ghost"], bounds=Bounds(crashes=1, ghosts=1)))
    explore(model, always={"every law": model.sound}, limit=300)
    assert any(place.ghost is not None for place in model.places.values)
    assert all(place == erased(place) for place in model.places.values)
