"""Shows that spin agrees on every claim of the catalogue: what is torn, by what, and the count.

Spin is given the parts of a pipeline and puts them together itself; so our parallel composition,
our search and our verdicts are each done a second time, by other people's code.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from handfast.model.boundary import attack, instants
from handfast.model.catalogue import CATALOGUE
from handfast.model.pipeline import STOP, Actor, Claim, Pipeline, Place, Restart
from handfast.model.process import Choice
from handfast.model.promela import export, laws

PIPELINES = {make().name: make() for make in CATALOGUE}


def spin(model: str, where: Path) -> tuple[int, set[int]]:
    """Verify to the end: the states that were stored, and the assertions that fail somewhere."""
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt-get install {tool})")
    (where / "model.pml").write_text(model, encoding="utf-8")
    for command in (
        ["spin", "-a", "model.pml"],
        ["gcc", "-O0", "-w", "-DSAFETY", "-DNOREDUCE", "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=where, check=True, capture_output=True)
    options = ["-E", "-n", "-e", "-c0", "-m100000"]  # all errors; a schedule may end
    done = subprocess.run(
        ["./pan", *options], cwd=where, capture_output=True, text=True, check=False
    )
    assert "max search depth too small" not in done.stdout, done.stdout
    assert "Search not completed" not in done.stdout, done.stdout
    stored = re.search(r"(\d+) states, stored", done.stdout)
    assert stored is not None, done.stdout + done.stderr
    failed = re.findall(r"assertion violated \((\d+)==0\)", done.stdout)
    return int(stored[1]), {int(number) for number in failed}


@pytest.mark.parametrize("name", PIPELINES)
def test_spin_agrees(name: str, tmp_path: Path) -> None:
    """The same tears of the same claims, among as many states; one more before the choice."""
    pipeline = PIPELINES[name]
    states, failed = spin(export(pipeline), tmp_path)
    ours = [attack(pipeline, claim) for claim in instants(pipeline)]
    numbered = laws(pipeline)

    assert {numbered[number - 1] for number in failed} == {
        (found.claim, tear.fault, tear.kind) for found in ours for tear in found.tears
    }
    assert states == sum(found.states for found in ours) + 1


def test_a_process_that_decides_by_itself_is_exported_as_it_is(tmp_path: Path) -> None:
    """An event that may lead to one of two states leads spin to both."""
    me, back, place = Actor("rank 0"), Restart(1), Place("file", ranks=(0,))
    say = me.does("saves", 1)
    pipeline = Pipeline(
        name="whim",
        about="a rank that saves, or only says so",
        actors={"rank 0": Choice((say >> me.puts(place, 1) >> STOP, say >> STOP))},
        servers=(place,),
        restart=back.reads(place, lambda v: back.loads((v,))),
        claims=(Claim("when it says so", "saves"), Claim("when it is put", "puts")),
        epochs=1,
    )
    states, failed = spin(export(pipeline), tmp_path)
    assert "atomic { " in export(pipeline)
    assert states == sum(attack(pipeline, claim).states for claim in instants(pipeline)) + 1
    assert {laws(pipeline)[n - 1][0] for n in failed} == {"when it says so", "at 12:00"}
