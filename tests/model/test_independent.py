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
from pathlib import Path
from typing import NamedTuple

import pytest

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


WHOLE = {
    "a crash each": ("S=1",),
    "bit rot": ("S=1", "ROTS=1"),
}
LARGE = {
    "two epochs, a crash each": ("S=2",),
    "three starts, with rollbacks": ("S=2", "G=3", "CRASHES=0"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_spin_finds_nothing_in_the_whole_protocol(name: str, tmp_path: Path) -> None:
    """Exhaustively: two members, two starts of the job, every order of what they hear."""
    found = spin(tmp_path, *WHOLE[name])
    print(f"\n{name}: {found.states:,} states")
    assert (found.violated, found.states > 100_000) == ("", True)


@pytest.mark.heavy
@pytest.mark.parametrize("name", LARGE)
def test_spin_finds_nothing_in_larger_ones(name: str, tmp_path: Path) -> None:
    """Two epochs a start; and three starts of which some ask for an older step."""
    found = spin(tmp_path, *LARGE[name])
    print(f"\n{name}: {found.states:,} states")
    assert found.violated == ""


GOALS = {
    "A_SECOND_START_CONVERGES": (),
    "BOTH_EPOCHS_ARE_KNOWN_BY_BOTH": (),
    "A_START_GOES_ON": (),
    "A_START_DESCENDS_BELOW_A_BAD_COPY": ("ROTS=1",),
    "A_TIMELINE_IS_ABANDONED": (),
}


@pytest.mark.parametrize("goal", GOALS)
def test_the_search_gets_somewhere(goal: str, tmp_path: Path) -> None:
    """Nothing is shown by a model in which nothing happens: each goal is reached."""
    found = spin(tmp_path, "S=2", f"GOAL_{goal}", *GOALS[goal])
    assert found.violated.startswith("!("), found


MUTANTS = {
    "VOTES_AFTER_A_FREEZE": ("==frozen[i]", ("S=2",)),
    "VOTES_BEFORE_DURABLE": ("images", ("S=1",)),
    "KNOWS_FROM_ITSELF": ("voted", ("S=1",)),
    "ACCEPTS_UNVALIDATED": ("valid", ("S=1",)),
    "RESTORES_ALONE": ("accepted", ("S=1",)),
    "CALLS_ANYTHING_VALID": ("rotten", ("S=1", "ROTS=1")),
    "RELEASES_DURING_A_RECOVERY": ("lives_", ("S=2",)),
    "KEEPS_THE_LAST_ONE": ("lives_", ("S=1",)),
    "OFFERS_ORPHANS": ("is_", ("S=2", "G=3", "CRASHES=0")),
    "IGNORES_OTHERS_CERTIFICATES": ("is_", ("S=2", "G=3", "CRASHES=0")),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_spin_finds_what_our_explorer_finds(mutant: str, tmp_path: Path) -> None:
    """Each planted fault breaks the assertion that forbids it."""
    names, defines = MUTANTS[mutant]
    found = spin(tmp_path, *defines, f"MUTANT_{mutant}")
    assert names in found.violated, found


def test_every_fault_of_the_model_is_planted_here() -> None:
    """No switch of the model is forgotten."""
    text = MODEL.read_text()
    assert set(re.findall(r"ifn?def MUTANT_([A-Z_]+)", text)) == set(MUTANTS)
    assert set(re.findall(r"ifdef GOAL_([A-Z_]+)", text)) == set(GOALS)
