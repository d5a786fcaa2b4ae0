"""Shows that a job which torchrun starts again by itself goes on as if it had never been killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("under_torchrun.py")
STEPS, KILL_AT = 12, 7


def torchrun(folder: Path, kill_at: int) -> list[list[str]]:
    """Run it to its end; gives each rank's log."""
    folder.mkdir()
    argv = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    argv += ["--master-addr=127.0.0.1", "--master-port=0", "--rdzv-backend=c10d"]
    argv += ["--rdzv-endpoint=127.0.0.1:0", "--monitor-interval=0.1"]
    job = [str(SCRIPT), str(folder / "run"), str(folder / "log"), str(STEPS), str(kill_at)]
    done = subprocess.run(
        [sys.executable, *argv, *job], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [(folder / f"log.{rank}").read_text().splitlines() for rank in (0, 1)]


@pytest.mark.xdist_group("jobs")
def test_torchrun_restarts_a_killed_rank_and_nothing_is_lost_or_mixed(tmp_path: Path) -> None:
    """SIGKILL to one rank of two: torchrun starts both anew, the agent outlives them, and each
    rank's state after every step is, bit for bit, that of a job that was never killed."""
    truth = torchrun(tmp_path / "truth", 0)
    killed = torchrun(tmp_path / "killed", KILL_AT)
    resumed = []
    for true, found in zip(truth, killed, strict=True):
        began = [int(line.split()[1]) for line in found if line.startswith("began")]
        assert len(began) == 2
        assert began[0] == 0
        resumed.append(began[1])
        assert set(found[1:]) - {f"began {began[1]}"} <= set(true[1:])
        assert found[-1] == true[-1]
    assert resumed[0] == resumed[1]
    assert KILL_AT - 2 <= resumed[0] <= KILL_AT
