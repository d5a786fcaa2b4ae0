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
from handfast.core.state import Member
from handfast.model import place as local
from handfast.model.explore import explore
from handfast.model.place import FAULTS, Bounds, Place, Rules
from handfast.model.protocol import Protocol, State
from handfast.model.scenarios import SCENARIOS, Found, Scenario, build, search
from handfast.model.soup import At, Soup, _in_a_message, erased
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


def hunt(fault: str, scenario: str) -> Found:
    """Search a scenario over a soup, with a wrong protocol planted."""
    (planted,) = (mutant for mutant in MUTANTS if mutant.name == fault)
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch)
        return search(over_a_soup(SCENARIOS[scenario]))


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


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name",
    ["crash", "any order", "overlap", "stale", "path", "again", "saving", "few pins", "few skip",
     "few failure", "few ghost", "few rot", "retry",
     *(pytest.param(name, marks=pytest.mark.heavy)
       for name in ("network", "tie", "rot", "pins", "forgone", "epochs", "ghost", "failures",
                    "restart", "any order crash", "passed by", "both", "change", "tiers"))],
)  # fmt: skip
def test_whatever_a_network_leads_to_the_soup_leads_to(name: str) -> None:
    """Of all states that are reached over the exact network, with its losses and its order, none
    is missed, whatever else was heard in silence; and there are far fewer."""
    scenario = FEW[name[4:]] if name.startswith("few ") else SCENARIOS[name]
    exact, over = build(scenario), soup(scenario)
    assert not states(exact) - states(over)
    assert len(over.places.values) < len(exact.places.values)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name",
    ["crash", "overlap", "epochs", *(pytest.param(name, marks=pytest.mark.heavy)
     for name in ("path", "rot", "pins", "passed by", "retry", "failures", "tie", "both", "tiers",
                  "change", "soup of three"))],
)  # fmt: skip
def test_facts_that_come_together_lead_where_the_soup_leads(name: str) -> None:
    """Whatever facts one message brings, whole or cut by a crash: the place that it makes is one
    that the soup's messages make, the few that it tells together and all that it tells singly."""
    model = soup(SCENARIOS[name])
    met: dict[tuple[int, int, At, frozenset[ms.Fact]], None] = {}

    def look(state: State) -> bool:
        for who in range(model.size):
            if heard := model.heard(state, who):
                met.update(dict.fromkeys((who, p, *heard) for p in model.silent(state, who)))
        return model.sound(state)

    assert explore(model, always={"every law": look}).sound
    batches = 0
    for who, number, at, facts in met:
        place = model.places.values[number]
        assert place.member is not None
        held = {*gossip.lacking(place.member, ms.Knows())}
        new = [fact for fact in facts - held if not idle(place.member, fact)]
        reached = closure(model, who, number, at, facts)
        for size in range(2, len(new) + 1):
            for batch in combinations(sorted(new, key=_in_a_message), size):
                batches += 1
                assert comes_to(model.rules, place, at, batch) <= reached
    assert batches > 100


def idle(here: Member, fact: ms.Fact) -> bool:
    """Say whether a fact is one's own word, or one of a recovery that has ended."""
    of_recovery = isinstance(fact, ms.Frozen | ms.Valid | ms.Bad | ms.Accepted)
    return of_recovery and (here.open or here.own(fact))


def comes_to(rules: Rules, place: Place, at: At, facts: tuple[ms.Fact, ...]) -> set[Place]:
    """Take facts in one message: what the place becomes, and what if a crash cuts it."""
    assert place.member is not None
    sender = 1 if place.member.me == 0 else 0
    event = ev.Received(ms.Message(sender, 0, at[1], at[2], at[0], facts, ms.Knows()))
    whole = local.take(rules, place, event)
    mortal = rules.bounds.crashes and place.incarnation < rules.bounds.lives
    cut = local.cuts(rules, place, event, whole) if mortal else ()
    return {erased(taken.place) for taken in (whole, *cut)}


def closure(model: Soup, who: int, number: int, at: At, facts: frozenset[ms.Fact]) -> set[Place]:
    """Find what a place may become by hearing what the soup tells; a crash ends it."""
    soup_here = (at, model._facts.number(facts))
    lives = model.places.values[number].incarnation
    reached, waiting = {number: None}, [number]
    for here in waiting:  # which grows meanwhile
        for way in model._hear_all(who, here, soup_here):
            if way.place not in reached:
                reached[way.place] = None
                if model.places.values[way.place].incarnation == lives:
                    waiting.append(way.place)
    found = {model.places.values[place] for place in reached}
    if model.rules.bounds.crashes:
        found |= {erased(local.crash(model.rules, p).place) for p in found if not p.down}
    return found


def test_a_word_that_nobody_wrote_is_found() -> None:
    """Held in every state: what can be told stands in a journal. One that is told before is not."""
    found = hunt("votes_before_its_first_freeze_is_written", "window")
    assert "s1_told_is_written" in found.breach
    assert found.story[-1].endswith("tells")


def test_who_hears_that_nothing_is_left_has_said_so() -> None:
    """Shows that what only a rank is told is something that comes of hearing: else a job of which
    the only copy is gone would seem never to settle."""
    found = search(over_a_soup(replace(SCENARIOS["rot"], keep=Keep(1))))
    assert found.sound, found.breach or found.unmet


def test_what_is_sent_is_held_against_the_soup() -> None:
    """A certificate of a later step that is told beside the true one stands in no journal."""
    converge = member._converge

    def boasts(turn: Any, roster: Roster) -> None:
        before = len(turn.persist)
        converge(turn, roster)
        for record in turn.persist[before:]:
            if isinstance(record, ms.Converged):
                epoch = replace(record.certificate.epoch, step=record.certificate.epoch.step + 1)
                turn.news += (ms.Converged(replace(record.certificate, epoch=epoch)),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "_converge", boasts)
        found = search(SCENARIOS["soup"])
    assert "s1_told_is_written" in found.breach


def test_a_tick_that_does_something_is_found_over_a_soup() -> None:
    """Though no tick is needed there, each is held against S15."""
    assert "s15_time_changes_nothing" in hunt("skips_after_a_timeout", "saving").breach


@pytest.mark.parametrize("name", ["tree", "decline"])
def test_what_is_never_written_is_not_for_the_soup(name: str) -> None:
    """Rolled-up votes and declines are refused, not searched without."""
    with pytest.raises(ValueError, match="never written: not for the soup"):
        soup(SCENARIOS[name])


def test_a_story_tells_what_was_heard_in_silence() -> None:
    """One line for each thing heard, then what came of it; and every line in its turn."""
    found = hunt("forgets_its_acceptance", "soup")
    heard = [line for line in found.story if "hears" in line]
    assert any("->" not in line for line in heard)
    assert "Accepted" in found.story[-1]


def test_nothing_that_is_known_of_peers_is_left_in_a_place() -> None:
    """Neither of a member nor of its ghost."""
    model = soup(replace(SCENARIOS["ghost"], bounds=Bounds(crashes=1, ghosts=1)))
    explore(model, always={"every law": model.sound}, limit=300)
    assert any(place.ghost is not None for place in model.places.values)
    assert all(place == erased(place) for place in model.places.values)
