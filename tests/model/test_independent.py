"""Shows that an independent checker agrees: the protocol written anew in Promela, held by spin.

``handfast.pml`` is written from docs/protocol.md, in another language and with other data, so a
rule that is wrong in our explorer's favour would have to be wrong twice. Spin finds nothing where
the protocol is whole, reaches every goal, and finds each planted fault by the assertion that
forbids it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Configuration
from handfast.core.messages import Restored
from handfast.core.retain import Keep
from handfast.model.explore import explore
from handfast.model.place import Bounds, Place
from handfast.model.scenarios import Launch, Scenario, build, shape
from handfast.model.symmetry import Symmetry
from mutants import MUTANTS as PLANTED

MODEL = Path(__file__).parent / "handfast.pml"


class Verdict(NamedTuple):
    """What spin says: distinct states, and the assertion that was violated, if any."""

    states: int
    violated: str


def spin(where: Path, *defines: str) -> Verdict:
    """Build a verifier with spin and a C compiler, and run it to the end or the first error."""
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt-get install {tool})")
    shutil.copy(MODEL, where)
    options = [f"-D{define}" for define in defines]
    build = (
        ["spin", "-a", *options, MODEL.name],
        ["gcc", "-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=8000", "-o", "pan", "pan.c"],
    )
    for command in build:
        subprocess.run(command, cwd=where, check=True, capture_output=True)
    done = subprocess.run(
        ["./pan", "-m100000", "-n"], cwd=where, capture_output=True, text=True, check=False
    )
    assert "Search not completed" not in done.stdout or "errors: 1" in done.stdout, done.stdout
    assert "max search depth too small" not in done.stdout, done.stdout
    states = re.search(r"(\d+) states, stored", done.stdout)
    errors = re.search(r"errors: (\d+)", done.stdout)
    assert states is not None, done.stdout + done.stderr
    assert errors is not None, done.stdout
    violated = re.search(r"assertion violated (.*) \(at depth", done.stdout)
    assert bool(violated) == bool(int(errors[1])), done.stdout
    return Verdict(int(states[1]), violated[1].strip() if violated else "")


ONE, TWO, THREE = (shape(domains, dir=(1, 1)) for domains in (1, 2, 3))
STARTS = (Launch(), Launch())
ROLLBACK = (Launch(), Launch(want=0))
ROLLED_BACK = (*ROLLBACK, Launch())
"""Starts of the job; a rollback to step 0 takes one saved epoch less to show."""


class Ours(NamedTuple):
    """What our explorer found: distinct states, and the law that was broken, or the goal met."""

    states: int
    found: str


def ours(
    bounds: Bounds,
    starts: tuple[Launch, ...] = STARTS,
    *,
    job: Configuration = TWO,
    goal: Callable[[Sequence[Place]], bool] | None = None,
    alike: bool = True,
) -> Ours:
    """Search the shipped member over whatever was ever said, to the end or the first thing found.

    As spin does: a goal is met where it breaks the claim that it never is.
    """
    keep = Keep(2)
    model = build(Scenario("", "", job, bounds, starts, keep=keep, alike=alike, soup=True))

    def missed(state: tuple[int, ...]) -> bool:
        held = [model.places.values[place] for place in state[1 : 1 + model.size]]
        return state[0] < 0 or goal is None or not goal(held)

    report = explore(
        model,
        always={"every law": model.sound, "goal": missed},
        canonical=Symmetry(model).canonical if alike else None,
    )
    (breach,) = report.breaches or [None]
    if breach is None:
        return Ours(report.states, "")
    return Ours(report.states, model.breach(breach.trace.states[-1]) or breach.law)


class Whole(NamedTuple):
    """A model of spin's, and a search of ours, in which nothing must be found."""

    defines: tuple[str, ...]
    bounds: Bounds
    starts: tuple[Launch, ...] = STARTS


WHOLE = {
    "a crash each (ours: one in all)": Whole(("S=1",), Bounds(crashes=1)),
    "bit rot (ours: without a crash)": Whole(("S=1", "ROTS=1"), Bounds(rots=1)),
}
LARGE = {
    "a crash each": Whole(("S=1",), Bounds(crashes=2)),
    "two epochs, a crash each (ours: none)": Whole(("S=2",), Bounds(epochs=2)),
    "three starts, with rollbacks": Whole(("S=2", "G=3", "CRASHES=0"), Bounds(), ROLLED_BACK),
}


def nothing_is_found(name: str, whole: Whole, where: Path) -> None:
    """Both verdicts on a protocol that is whole."""
    found, held = spin(where, *whole.defines), ours(whole.bounds, whole.starts)
    print(f"\n{name}: spin {found.states:,} states, ours {held.states:,}")
    assert (found.violated, held.found) == ("", "")


@pytest.mark.parametrize("name", WHOLE)
def test_spin_finds_nothing_in_the_whole_protocol(name: str, tmp_path: Path) -> None:
    """Exhaustively: two members, two starts of the job, every order of what they hear."""
    nothing_is_found(name, WHOLE[name], tmp_path)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LARGE)
def test_spin_finds_nothing_in_larger_ones(name: str, tmp_path: Path) -> None:
    """A crash each; two epochs a start; three starts of which some ask for an older step."""
    nothing_is_found(name, LARGE[name], tmp_path)


def saved(held: Sequence[Place], epoch: Epoch) -> bool:
    """Whether an epoch has converged: every domain's vote is in its journal."""
    return all(place.attested(epoch) for place in held)


def based(held: Sequence[Place], base: Epoch) -> bool:
    """Whether the second start has resumed from an epoch."""
    wrote = [r.certificate for p in held for r in p.records if isinstance(r, Restored)]
    return any((c.generation, c.base) == (2, base) for c in wrote)


def known(place: Place, epoch: Epoch) -> bool:
    """Whether a domain knows of an epoch as the newest that has converged."""
    tallies = place.member.tallies if place.member is not None else ()
    return [tally.line and tally.line.epoch for tally in tallies] == [epoch]


def descends(held: Sequence[Place]) -> bool:
    """Whether an epoch that had converged was damaged, and the second start went below it."""
    bad = any(Epoch(1, 1) in place.spoilt for place in held)
    return bad and saved(held, Epoch(1, 1)) and based(held, GENESIS)


class Goal(NamedTuple):
    """What must be reached somewhere: spin's defines, and our search for the same."""

    defines: tuple[str, ...]
    bounds: Bounds
    starts: tuple[Launch, ...]
    met: Callable[[Sequence[Place]], bool]


FIRST = Epoch(1, 1)
GOALS = {
    "A_SECOND_START_CONVERGES": Goal(
        (), Bounds(), STARTS, lambda held: saved(held, Epoch(2, 1))
    ),
    "BOTH_EPOCHS_ARE_KNOWN_BY_BOTH": Goal(
        (), Bounds(epochs=2), STARTS, lambda held: all(known(place, Epoch(1, 2)) for place in held)
    ),
    "A_START_GOES_ON": Goal((), Bounds(), STARTS, lambda held: based(held, FIRST)),
    "A_START_DESCENDS_BELOW_A_BAD_COPY": Goal(("ROTS=1",), Bounds(rots=1), STARTS, descends),
    "A_TIMELINE_IS_ABANDONED": Goal(
        (), Bounds(), ROLLBACK, lambda held: saved(held, FIRST) and based(held, GENESIS)
    ),
}  # fmt: skip


@pytest.mark.parametrize("goal", GOALS)
def test_the_search_gets_somewhere(goal: str, tmp_path: Path) -> None:
    """Nothing is shown by a model in which nothing happens: each goal is reached, by both."""
    aim = GOALS[goal]
    found = spin(tmp_path, "S=2", f"GOAL_{goal}", *aim.defines)
    held = ours(aim.bounds, aim.starts, goal=aim.met)
    assert found.violated.startswith("!("), found
    assert held.found == "goal", held


class Fault(NamedTuple):
    """A fault: what spin's assertion names and its defines; ours by name, and where it shows."""

    names: str
    defines: tuple[str, ...]
    planted: str
    bounds: Bounds
    starts: tuple[Launch, ...] = STARTS
    job: Configuration = TWO
    alike: bool = True


THREE_STARTS = ("S=2", "G=3", "CRASHES=0")
MUTANTS = {
    "VOTES_AFTER_A_FREEZE": Fault("==frozen[i]", ("S=2",), "votes_after_a_freeze", Bounds()),
    "VOTES_BEFORE_DURABLE": Fault(
        "images", ("S=1",), "votes_before_the_image_is_durable", Bounds()
    ),
    "KNOWS_FROM_ITSELF": Fault(
        "voted", ("S=1",), "knows_from_its_own_edges", Bounds(), job=THREE
    ),
    "ACCEPTS_UNVALIDATED": Fault("valid", ("S=1",), "restores_without_validating", Bounds()),
    "RESTORES_ALONE": Fault("accepted", ("S=1",), "restores_without_every_acceptance", Bounds()),
    "CALLS_ANYTHING_VALID": Fault(
        "rotten", ("S=1", "ROTS=1"), "calls_a_damaged_copy_valid", Bounds(rots=1)
    ),
    "RELEASES_DURING_A_RECOVERY": Fault(
        "lives_", ("S=2",), "releases_during_a_recovery", Bounds(epochs=2)
    ),
    "KEEPS_THE_LAST_ONE": Fault(
        "lives_", ("S=1",), "keeps_the_last_k_without_a_certificate", Bounds()
    ),
    "OFFERS_ORPHANS": Fault(
        "is_", THREE_STARTS, "offers_orphans", Bounds(epochs=2),
        (Launch(), Launch(want=1), Launch()), ONE,
    ),
    "IGNORES_OTHERS_CERTIFICATES": Fault(
        "is_", THREE_STARTS, "forgets_the_certificates_of_others", Bounds(), ROLLED_BACK,
        alike=False,
    ),
}  # fmt: skip
"""``alike``: the fault treats all domains alike, so that they can be exchanged in our search."""


LONGEST = "IGNORES_OTHERS_CERTIFICATES"  # our own search of it: tests/model/test_mutants.py


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(name, marks=[pytest.mark.heavy] * (name == LONGEST)) for name in MUTANTS],
)
def test_spin_finds_what_our_explorer_finds(mutant: str, tmp_path: Path) -> None:
    """Each planted fault breaks the assertion that forbids it, and such a law of ours."""
    fault = MUTANTS[mutant]
    found = spin(tmp_path, *fault.defines, f"MUTANT_{mutant}")
    planted = next(one for one in PLANTED if one.name == fault.planted)
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch)
        held = ours(fault.bounds, fault.starts, job=fault.job, alike=fault.alike)
    assert fault.names in found.violated, found
    assert held.found.split("_")[0] in planted.laws, held


def test_every_fault_of_the_model_is_planted_here() -> None:
    """No switch of the model is forgotten."""
    text = MODEL.read_text()
    assert set(re.findall(r"ifn?def MUTANT_([A-Z_]+)", text)) == set(MUTANTS)
    assert set(re.findall(r"ifdef GOAL_([A-Z_]+)", text)) == set(GOALS)
