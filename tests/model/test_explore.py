"""Shows that the search finds every state, the shortest way to a breach, and what is never reached.

Calibrated against figures that others have published for the same protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner

from handfast.cli.prove import prove
from handfast.model.calibration import PaxosCommit, TwoPhase, orbit
from handfast.model.explore import Report, digest_of, explore


class Ring:
    """A counter that goes up by one or two, round and round; the second way up is a fault."""

    def __init__(self, size: int, stops: tuple[int, ...] = ()) -> None:
        self.size, self.stops = size, stops

    def initial(self) -> Iterator[int]:
        yield 0

    def moves(self, at: int) -> Iterator[tuple[str, int]]:
        if at not in self.stops:
            yield "one", (at + 1) % self.size
            yield "two", (at + 2) % self.size


@pytest.mark.parametrize(
    ("managers", "states"), [(3, 288), (5, 8_832), pytest.param(6, 50_816, id="six")]
)
def test_two_phase_commit_has_as_many_states_as_others_have_counted(
    managers: int, states: int
) -> None:
    """TLC's and Stateright's figures; and nobody commits what another one aborts."""
    report = explore(
        TwoPhase(managers),
        always={"consistent": TwoPhase.consistent},
        sometimes={
            "committed": lambda state: all(m.state == "committed" for m in state.managers),
            "aborted": lambda state: all(m.state == "aborted" for m in state.managers),
        },
    )
    assert (report.states, report.exhaustive, report.sound) == (states, True, True)


def test_symmetry_leaves_one_state_an_orbit() -> None:
    """314 orbits of 8,832 states under all exchanges of five resource managers."""
    report = explore(TwoPhase(5), canonical=orbit)
    assert report.states == 314
    every = explore(TwoPhase(5))
    assert (report.depth, every.states) == (every.depth, 8_832)


def test_the_command_says_whose_figures_it_is_held_against() -> None:
    """`prove --calibrate` names the tool behind each figure, and which one is nobody else's."""
    told = CliRunner().invoke(prove, ["--calibrate"])
    assert told.exit_code == 0
    rows = {line.split("  ")[0]: line.split() for line in told.output.splitlines()}
    for managers, source, count in ((3, "TLC", "288"), (5, "Stateright", "8,832")):
        row = rows[f"two-phase commit, {managers} managers"]
        assert [source, count, count] == row[4:7]
    assert "ourselves" in rows["two-phase commit, 5 managers, orbits"]
    assert "Gray and L. Lamport" in told.output


@pytest.mark.heavy
def test_paxos_commit_has_as_many_states_as_tlc_has_counted() -> None:
    """1,321,761 distinct states, and 16,959,159 that were generated (the initial one included)."""
    report = explore(PaxosCommit(), always={"consistent": PaxosCommit.consistent})
    print(f"\n{report.states:,} states, {report.per_second:,.0f} a second, "
          f"{report.bytes_per_state:.0f} bytes a state")  # fmt: skip
    assert report.states == 1_321_761
    assert report.transitions + 1 == 16_959_159
    assert report.sound


@pytest.mark.parametrize("digest", [None, digest_of])
def test_a_breach_comes_with_a_shortest_trace(digest: Callable[[int], bytes] | None) -> None:
    """Also where the states were not kept, and are found again by following the moves."""
    report = explore(Ring(9), always={"below seven": lambda at: at < 7}, digest=digest)
    (breach,) = report.breaches
    assert breach.law == "below seven"
    assert breach.trace.states == (0, 1, 3, 5, 7)
    assert breach.trace.labels == ("one", "two", "two", "two")
    assert len(breach.trace) == 4


def test_each_law_is_broken_once() -> None:
    """With patience the search goes on, to the shortest breach of each."""
    laws = {"below two": lambda at: at < 2, "below four": lambda at: at < 4}
    report = explore(Ring(9), always=laws, patience=2)
    assert [(b.law, b.trace.states[-1], len(b.trace)) for b in report.breaches] == [
        ("below two", 2, 1),
        ("below four", 4, 2),
    ]


def test_what_never_happens_is_told() -> None:
    """A search in which nothing happens would show little."""
    goals = {"three": lambda at: at == 3, "ten": lambda at: at == 10}
    report = explore(Ring(9), sometimes=goals)
    assert (report.unmet, report.sound) == (("ten",), False)


@pytest.mark.parametrize("digest", [None, digest_of])
def test_what_can_no_longer_be_reached_is_found(digest: Callable[[int], bytes] | None) -> None:
    """By calm moves alone: a fault that would help does not count."""
    goal = {"zero": lambda at: at == 0}
    assert explore(Ring(9), eventually=goal, digest=digest).sound
    stuck = explore(Ring(9, stops=(4,)), eventually=goal, digest=digest)
    assert [(b.law, b.trace.states) for b in stuck.breaches] == [("zero", (0, 2, 4))]
    calm = explore(
        Ring(9, stops=(4,)), eventually=goal, calm=lambda move: move == "one", digest=digest
    )
    assert [b.trace.states[-1] for b in calm.breaches] == [1]


def bounded(**bounds: int) -> Report[int, str]:
    """A search that is not allowed to see all."""
    return explore(Ring(1000), **bounds)


def test_what_is_not_searched_is_counted() -> None:
    """A bound on states or on depth leaves a frontier, about which nothing is claimed."""
    assert bounded(limit=10).states >= 10
    assert not bounded(limit=10).exhaustive
    deep = bounded(depth=3)
    assert (deep.states, deep.depth, deep.frontier) == (7, 3, 2)
    assert bounded(depth=1000).exhaustive
    with pytest.raises(ValueError, match="leave out limit and depth"):
        explore(Ring(9), eventually={"zero": lambda at: at == 0}, limit=5)


def test_a_model_that_changes_its_mind_is_told_so() -> None:
    """A trace can only be followed where moves come in one order."""

    class Fickle(Ring):
        asked = 0

        def moves(self, at: int) -> Iterator[tuple[str, int]]:
            self.asked += 1
            yield from [*super().moves(at)][: 2 if self.asked < 9 else 0]

    with pytest.raises(RuntimeError, match="in one order"):
        explore(Fickle(9), always={"small": lambda at: at < 8})


def test_progress_is_told() -> None:
    """For searches that take minutes."""
    told: list[tuple[int, int, int]] = []
    explore(Ring(9), progress=lambda *counts: told.append(counts))
    assert told == [(1, 0, 0)]
