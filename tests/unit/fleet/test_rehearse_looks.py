"""Show that a node which ends is missed at the move at which it ended, and at no later one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from rehearsalkit import job

from handfast.fleet.rehearse.reading import load
from handfast.fleet.rehearse.rehearsing import Kind, rehearse
from handfast.fleet.rehearse.report import report

NODE = """\
run: [sh, -c, 'echo $$ > {dir}/pid; exec sleep 600']
ready: [test, -s, '{a.dir}/pid']
"""
KILL = "p=$(cat {a.dir}/pid); kill -9 $p; until grep -q ^State:.Z /proc/$p/status; do :; done"
GONE = "a (1) died of Killed (9), and said nothing"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fleets live below a directory of the test."""
    place = tmp_path / "fleets"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def test_a_node_that_ends_while_it_is_probed_is_missed_at_once(tmp_path: Path) -> None:
    """Though the probe works: here it is the probe that ended it, and each version alone fails."""
    path = job(tmp_path, f"{NODE}probe: {{each: fleet, run: [sh, -c, '{KILL}']}}\n", nodes="a")
    rehearsal = load(path)
    found = report(rehearsal, rehearse(rehearsal))
    assert not found.judged
    assert [(row.worst, row.by) for row in found.rows] == [("dies", {"start": "dies"})] * 2
    assert found.rows[0].sentence == GONE


def test_a_node_that_ended_between_two_moves_is_not_restarted_as_if_it_ran(
    tmp_path: Path, place: Path
) -> None:
    """It is killed after the last look of its start, and its own restart would hide that."""
    ended = []

    def tell(kind: Kind, _: str) -> None:
        if kind is Kind.RESTART and not ended:
            (file,) = place.glob("*/nodes/a/pid")
            ended.append(int(file.read_text()))
            os.kill(ended[0], signal.SIGKILL)  # its number is its own: nobody has reaped it
            status = Path(f"/proc/{ended[0]}/status")
            while "\nState:\tZ" not in status.read_text():
                time.sleep(0.01)

    rehearsal = load(job(tmp_path, f"{NODE}probe: {{each: fleet, run: ['true']}}\n", nodes="a"))
    found = report(rehearsal, rehearse(rehearsal, tell=tell))
    (broke,) = found.breaks
    assert (broke.walk, broke.sentence) == (("start a 1", "restart a"), GONE)
