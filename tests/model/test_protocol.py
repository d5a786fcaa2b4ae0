"""Show that the shipped protocol keeps every law in every state that a small job can reach.

The member is the real one. Scenarios are searched to their end, but for those that say otherwise;
each must reach what it is there for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from handfast.cli.prove import prove
from handfast.laws.goals import SOMETIMES
from handfast.laws.invariants import ALWAYS
from handfast.model.explore import explore
from handfast.model.judge import OF_A_PAIR, OF_A_STEP, OF_ALL
from handfast.model.place import Bounds
from handfast.model.scenarios import SCENARIOS, Found, Scenario, build, digest, search
from handfast.model.symmetry import Symmetry
from mutants import MUTANTS

SHORT = (
    "epochs", "any order", "overlap", "rollback", "change", "path", "reader", "retry",
    "window", "decline", "stale", "star", "tree", "tree of four", "recovering", "saving",
    "resaved", "soup", "late", "loss",
)  # fmt: skip
LARGEST = "path crash"
LONG = tuple(name for name in SCENARIOS if name not in (*SHORT, LARGEST))


def show(found: Found) -> None:
    """Print what a search found, for who looks."""
    print(
        f"\n{found.scenario:20}{found.states:>11,} states{found.transitions:>12,} moves, depth "
        f"{found.depth}, frontier {found.frontier:,}, {found.seconds:.0f} s, "
        f"{found.per_second:,.0f} a second, {found.bytes_per_state:.0f} bytes a state"
    )


def holds(scenario: Scenario) -> None:
    found = search(scenario)
    show(found)
    assert not found.breach, "\n".join((found.breach, *found.story))
    assert not found.unmet
    assert bool(found.frontier) == (scenario.limit is not None)
    assert scenario.heavy or found.states < 300_000  # so `--protocol short` takes about a minute


@pytest.mark.parametrize("name", SHORT)
def test_every_law_holds_in_every_state(name: str) -> None:
    """All states, all laws, every goal; and from each state all settle once faults have stopped."""
    holds(SCENARIOS[name])


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LONG)
def test_every_law_holds_in_every_state_of_larger_jobs(name: str) -> None:
    """As above, over minutes; where there is a frontier, it is printed."""
    holds(SCENARIOS[name])


@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_every_law_holds_in_ten_million_states() -> None:
    """A path of three with a crash, to its end, for what always holds: that is over 10^7 states.

    The limit is above them all: it is there since a search without one judges what holds in the
    end as well, and remembers every move for that. Needs a few GB.
    """
    found = search(SCENARIOS[LARGEST], limit=30_000_000)
    show(found)
    assert not found.breach, "\n".join((found.breach, *found.story))
    assert not found.unmet
    assert found.frontier == 0
    assert found.states > 10**7


@pytest.mark.parametrize("name", ["path", pytest.param("crash", marks=pytest.mark.heavy)])
def test_orbits_add_up_to_all_states(name: str) -> None:
    """Searched with domains exchanged, the orbits of what is found have as many states as there
    are without: none is missed, and none that is not reachable is taken for one."""
    scenario = replace(SCENARIOS[name], alike=True)
    every = search(scenario, symmetric=False)
    model = build(scenario)
    symmetry = Symmetry(model)
    sizes = []

    def count(state: tuple[int, ...]) -> bool:
        sizes.append(symmetry.orbit(state))
        return model.sound(state)

    found = explore(model, always={"every law": count}, canonical=symmetry.canonical)
    assert not found.breaches
    assert sum(sizes) == every.states
    assert len(sizes) < every.states


@pytest.mark.parametrize(
    ("name", "epochs"), [("reader", 2), pytest.param("both", 1, marks=pytest.mark.heavy)]
)
def test_whoever_crashes_may_boot_at_once(name: str, epochs: int) -> None:
    """Journals and disks meet in the same ways where a crashed domain stays down as long as it
    likes: so nothing is hidden by booting it at once."""

    def met(apart: bool) -> set[tuple[object, ...]]:
        model = build(
            replace(SCENARIOS[name], bounds=Bounds(epochs=epochs, crashes=1), apart=apart)
        )
        seen = set()

        def look(state: tuple[int, ...]) -> bool:
            held = [model.places.values[place] for place in state[1 : 1 + model.size]]
            if not any(place.down for place in held):
                seen.add(tuple((place.records, place.images) for place in held))
            return model.sound(state)

        found = explore(model, always={"every law": look}, eventually={"settles": model.settled},
                        calm=lambda move: move.calm)  # fmt: skip
        assert not found.breaches
        return seen

    assert met(apart=True) == met(apart=False)


def test_only_what_is_alike_can_be_exchanged() -> None:
    """Digests that name their writer, two tiers, or an heir: there is no symmetry to use."""
    for name in ("crash", "tiers", "change"):
        with pytest.raises(ValueError, match="digests alike"):
            Symmetry(build(SCENARIOS[name]))


def test_what_is_searched_after_a_recovery_begins_where_it_has_ended() -> None:
    """All are open and silent, and their journals are such as a search of all comes to as well."""
    begun, whole = build(SCENARIOS["saving"]), build(SCENARIOS["crash"])
    (start,) = begun.initial()
    held = [begun.places.values[place] for place in start[1 : 1 + begun.size]]
    assert all(place.member is not None and place.member.open for place in held)
    assert [begun.air.queues.values[air] for air in start[1 + begun.size :]] == [(), ()]
    explore(whole, always={"every law": whole.sound})
    met = {place.records for place in whole.places.values}
    assert all(place.records in met for place in held)


def test_every_goal_is_some_scenarios() -> None:
    """What must happen sometimes is what some scenario must reach."""
    assert {goal for scenario in SCENARIOS.values() for goal in scenario.reach} == {*SOMETIMES}


def test_no_law_is_overlooked() -> None:
    """Each law is held over a step, over a pair, or over all domains."""
    assert {*OF_A_STEP, *OF_A_PAIR, *OF_ALL} == {*ALWAYS}


@pytest.mark.parametrize("name", ["epochs", "overlap"])
def test_a_remembered_judgement_is_the_one_that_would_be_given(name: str) -> None:
    """In each state all laws are held over the whole truth, once more and without any memory."""
    model = build(SCENARIOS[name])
    found = explore(model, always={"anew": model.anew}, limit=3_000)
    assert not found.breaches


def test_states_kept_as_digests_are_as_many() -> None:
    """Sixteen bytes a state find the same states as the states themselves."""
    model = build(SCENARIOS["window"])
    assert explore(model, digest=digest).states == search(SCENARIOS["window"]).states


def test_what_is_not_reached_is_told() -> None:
    """A scenario that never gets to what it is there for has shown nothing."""
    found = search(replace(SCENARIOS["window"], reach=("a rank declines",)))
    assert (found.unmet, found.sound) == (("a rank declines",), False)


def run(*words: str) -> Result:
    """Call the command."""
    return CliRunner().invoke(prove, [*words])


def test_the_command_searches_a_scenario() -> None:
    """As a table for people and as JSON; a bounded search says what it did not follow."""
    shown = run("--protocol", "window")
    assert shown.exit_code == 0
    assert "all hold" in shown.output
    (found,) = json.loads(run("--protocol", "window", "--json").stdout)["scenarios"]
    assert (found["frontier"], found["breach"]) == (0, "")
    bounded = json.loads(run("--protocol", "epochs", "--limit", "50", "--json").stdout)["scenarios"]
    assert bounded[0]["frontier"] > 0


def test_the_command_knows_its_scenarios() -> None:
    """A list of them, and a usage error for one that there is none of."""
    assert "two rounds at once" in run("--protocol", "list").output
    listed = json.loads(run("--protocol", "list", "--json").stdout)["scenarios"]
    assert {one["name"]: one["short"] for one in listed}["ghost"] is False
    wrong = run("--protocol", "nothing")
    assert (wrong.exit_code, "--protocol list" in wrong.output) == (2, True)
    limited = run("--protocol", "list", "--limit", "9")
    assert (limited.exit_code, "goes with a scenario" in limited.output) == (2, True)
    assert run().exit_code == 2


def test_what_was_searched_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C in the second search leaves the row of the first on the screen."""
    searched: list[Scenario] = []

    def impatient(scenario: Scenario, **how: Any) -> Found:
        searched.append(scenario)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(scenario, **how)

    monkeypatch.setattr("handfast.cli.protocol.search", impatient)
    told = run("--protocol", "short")
    assert told.exit_code == 128 + 2
    assert [line.split()[0] for line in told.output.splitlines()] == ["scenario", "crash"]


def test_a_reader_of_the_list_may_leave() -> None:
    """`--protocol list | head -0` ends as a closed pipe ends a command: 141, without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "handfast", "prove", "--protocol", "list"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_command_tells_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law, the shortest story, and exit code 1."""
    fault = next(f for f in MUTANTS if f.name == "publishes_before_it_writes")
    fault.plant(monkeypatch)
    told = run("--protocol", "rollback")
    assert told.exit_code == 1
    assert "s7_nothing_acts_without_a_certificate" in told.output
    assert "Publish 1/1" in told.output
