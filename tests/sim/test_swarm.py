"""The heavy target: 10^8 events and more, in slices whose figures add up.

`make heavy ARGS="tests/sim/test_swarm.py"` goes on until they are counted, which takes two or
three hours of one core. SWARM_TALLY=DIR keeps the tally there: a run that stopped goes on with the
seed at which the last batch ended. SWARM_EVENTS=N asks for N events only.
"""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from handfast.cli.main import app
from handfast.sim.storm import GOALS

EVENTS = int(os.environ.get("SWARM_EVENTS", "100000000"))
SLICE = 200  # seeds: a minute or so, and enough of them to reach every goal


@pytest.mark.heavy
@pytest.mark.timeout(6 * 3600)
def test_a_swarm_breaks_no_law_and_reaches_every_goal(tmp_path: Path) -> None:
    """Shows it over so many events, and prints what they came to."""
    file = Path(os.environ.get("SWARM_TALLY", tmp_path)) / "swarm.json"
    tally = json.loads(file.read_text()) if file.exists() else {"events": 0}
    while tally["events"] < EVENTS:
        told = CliRunner().invoke(app, ["simulate", "--seeds", str(SLICE), "--tally", str(file)])
        assert told.exit_code == 0, told.output
        tally = json.loads(file.read_text())
    print(f"\n{file}: {tally['seeds']:,} seeds, {tally['events']:,} events")
    for name, figure in tally.items():
        print(f"{name:12}{figure}")
    assert tally["breaches"] == {}
    assert {goal for goal in GOALS if tally["goals"].get(goal)} == set(GOALS)
    assert tally["events"] >= EVENTS
