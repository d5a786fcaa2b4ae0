"""The heavy target: 10^8 events and more, in slices whose figures add up.

One slice: `make heavy ARGS="tests/sim"`. All of it: `handfast simulate --minutes 60 --tally FILE`,
again and again; each goes on with the seed at which the last one stopped.
"""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from handfast.cli.main import app

MINUTES = float(os.environ.get("SWARM_MINUTES", "9"))


@pytest.mark.heavy
@pytest.mark.timeout(60 * MINUTES + 300)
def test_a_swarm_breaks_no_law_and_reaches_every_goal(tmp_path: Path) -> None:
    """Shows a slice of the swarm, and prints what it came to."""
    file = tmp_path / "tally.json"
    command = ["simulate", "--minutes", str(MINUTES), "--tally", str(file)]
    told = CliRunner().invoke(app, command)
    print(told.output)
    assert told.exit_code == 0
    assert json.loads(file.read_text())["events"] > 100_000 * MINUTES
