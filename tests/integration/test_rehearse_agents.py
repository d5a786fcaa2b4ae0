"""Shows agents that speak one epoch, or two, in one job: a recovery and a save after each move."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from handfast.fleet.rehearse.reading import load
from handfast.fleet.rehearse.rehearsing import rehearse
from handfast.fleet.rehearse.report import report

REHEARSAL = Path(__file__).parents[1] / "rehearsals" / "agents.yaml"


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_agents_of_two_builds_serve_one_job_in_every_mixture() -> None:
    """What was saved under one mixture is restored, byte for byte, under the next."""
    rehearsal = load(str(REHEARSAL))
    found = report(rehearsal, rehearse(rehearsal, quick=True))
    print(f"\n{found.moves} moves of {found.fleets} fleets in {found.seconds:g} s")
    assert found.judged
    assert (len(found.rows), found.breaks, found.unmade) == (8, (), 0)
