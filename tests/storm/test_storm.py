"""A 4-rank job is killed again and again, and ends as if it never had been.

The counts are those of ``python -m tests.storm.run``, which says how they come about.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def storm(kills: int, limit_s: float, **options: object) -> dict[str, object]:
    """Run the storm in a process of its own, which may fork."""
    argv = [sys.executable, "-m", "tests.storm.run", "--kills", str(kills)]
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    with tempfile.TemporaryFile("w+") as err:
        try:
            done = subprocess.run(
                argv,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                timeout=limit_s,
                check=False,
            )
        finally:
            err.seek(0)
            sys.stderr.write(err.read()[-3000:])  # shown by pytest where the test fails
    assert done.returncode == 0
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def unharmed(found: dict[str, object]) -> None:
    """Hold the counts of a storm against what is promised."""
    assert found["stuck"] == [], "\n\n".join(found["stuck"])
    assert found["last_run"] == [0, 0, 0, 0]
    assert found["reference"] == [0, 0, 0, 0]
    assert found["mixtures"] == []
    assert found["certified_lost"] == []
    assert found["abandoned"] == []
    assert found["inexact"] == []
    resumes = found["resumes"]
    assert isinstance(resumes, list)
    assert max(resumes) > 0, "nothing was ever resumed, so nothing was shown"


@pytest.mark.xdist_group("jobs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "nodes", "seed"), [("fsdp", 2, 1), ("ddp", 1, 2)], ids=["fsdp-2-nodes", "ddp-1-node"]
)
def test_ten_kills_leave_no_mixture_and_no_difference(kind: str, nodes: int, seed: int) -> None:
    """Shows, in two halves, that SIGKILLs of job, rank and agents never cost a certified epoch,
    never mix two, and never bring back what an operator had left behind; and that every step of
    every life is that of a job that was never killed.
    """
    unharmed(storm(5, 500, kind=kind, nodes=nodes, seed=seed))


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("kind", "nodes", "kills"), [("fsdp", 1, 600), ("fsdp", 4, 700), ("ddp", 2, 700)]
)
def test_two_thousand_kills(kind: str, nodes: int, kills: int) -> None:
    """Shows the same for 2,000 kills, over one, two and four agents; prints the counts."""
    found = storm(kills, 7000, kind=kind, nodes=nodes, seed=kills)
    print(json.dumps({"kind": kind, "nodes": nodes, **found}))
    unharmed(found)
