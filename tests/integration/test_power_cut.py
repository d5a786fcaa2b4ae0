"""Shows that a real job whose node loses its power resumes what had converged, bit for bit.

Real trainers and a real agent save on a file system of our own that loses what was not synced,
bytes and names (`tests/crash/lossyfs.py`). Everything that runs is killed at some moment, the power
is cut, and the job is started again: crash model L, below the real calls of the real processes.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import deeds
import pytest
from trainers import Job, end_agents

from handfast.errors import HandfastError

sys.path.insert(0, str(Path(__file__).parents[1] / "crash"))
import lossyfs

pytestmark = pytest.mark.xdist_group("jobs")
Launch = Callable[..., Job]


@pytest.fixture
def lossy(tmp_path: Path) -> Iterator[Path]:
    """The file system."""
    if why := lossyfs.unavailable():
        pytest.skip(why)
    with lossyfs.mounted(tmp_path) as point:
        yield point


def cuts(launch: Launch, lossy: Path, lives: int, ranks: int) -> list[int]:
    """Train, be cut off, resume, again and again; returns the steps that were resumed."""
    path = str(lossy / "run")
    chance = random.Random(lives)
    digests: dict[int, list[str]] = {}
    sure = 0
    resumed = []
    for life in range(lives):
        job = launch(ranks)
        steps = set(job.all(deeds.resume, path))
        assert len(steps) == 1, f"ranks resumed {steps}"
        (step,) = steps
        assert step >= sure, f"{sure} had converged, {step} was resumed"
        if step:
            found = job.all(deeds.digest)
            assert digests.setdefault(step, found) == found
        resumed.append(step)
        for to in (step + 1, step + 2):
            trained = job.all(deeds.train, to)
            digests[to] = [rank[-1] for rank in trained]
            if to == step + 1:
                sure = max(epoch.step for epoch in job.all(deeds.converged))
        for trainer in job:  # and on, nobody knows how far
            trainer.tell(deeds.train, step + 40)
        time.sleep(chance.uniform(0.0, 0.3))
        job.kill()
        end_agents()
        lossyfs.cut(lossy, life)
        reference = {s: d for s, d in digests.items() if s <= step + 2}
        digests.clear()
        digests.update(reference)
    return resumed


def test_a_job_whose_power_is_cut_resumes_what_had_converged(launch: Launch, lossy: Path) -> None:
    """Shows it for two cuts of a job of two ranks."""
    resumed = cuts(launch, lossy, 3, 2)
    print(f"resumed {resumed}")
    assert resumed[-1] >= 2


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_job_whose_power_is_cut_thirty_times(launch: Launch, lossy: Path) -> None:
    """Shows it for thirty cuts."""
    print(f"resumed {cuts(launch, lossy, 31, 2)}")


def test_the_same_job_on_a_disk_that_lies_about_syncs_is_found_out(
    launch: Launch, tmp_path: Path
) -> None:
    """Shows that the laboratory has teeth: where syncs are not made, what converged is gone."""
    if why := lossyfs.unavailable():
        pytest.skip(why)
    with lossyfs.mounted(tmp_path, lies=True) as point:
        with pytest.raises((AssertionError, HandfastError)) as found:
            cuts(launch, point, 4, 2)
        print(f"{found.type.__name__}: {found.value}")
    assert isinstance(found.value, HandfastError) or "had converged" in str(found.value)
