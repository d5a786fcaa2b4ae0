"""Shows that ranks which differ in what they hold alike by design are named, and nobody else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deeds
import pytest
from trainers import Job, eventually

from handfast.errors import SaveFailed

Launch = Callable[..., Job]


def warned(job: Job) -> list[list[str]]:
    """What each rank was warned of, about replicas."""
    found = job.all(deeds.warnings)
    return [[line for line in lines if "differ in what they hold alike" in line] for lines in found]


def heard(job: Job) -> list[bool]:
    """Whether each rank's agent knows of ranks that differ."""
    return list(job.all(deeds.divergent))


def test_the_rank_that_went_apart_is_named_by_groups(launch: Launch, tmp_path: Path) -> None:
    """Silent data corruption on one of three nodes: rank 1 stands alone, and rank 0 is told."""
    job = launch(3, 3)
    options = {"kind": "ddp", "replicas": "warn"}
    job.all(deeds.resume, str(tmp_path / "{rank}"), **options)
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    assert (heard(job), warned(job)) == ([False] * 3, [[], [], []])
    job[1].do(deeds.wander)
    job.all(deeds.save, 2)
    job.all(deeds.converged)
    eventually(lambda: heard(job)[0])
    job.all(deeds.save, 3)
    told = warned(job)
    assert len(told[0]) == 1
    assert "epoch 1/2: " in told[0][0]
    assert "rank 0, 2 against rank 1. " in told[0][0]
    assert told[1:] == [[], []]


def test_it_is_raised_where_that_was_asked_for(launch: Launch, tmp_path: Path) -> None:
    """The epoch has converged all the same: which rank is right can't be told."""
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "run"), kind="ddp", replicas="raise")
    job[1].do(deeds.wander)
    job.all(deeds.save, 1)
    job.all(deeds.converged)
    eventually(lambda: heard(job)[0])
    with pytest.raises(SaveFailed, match="rank 0 against rank 1"):
        job[0].do(deeds.save, 2)
    assert job[0].do(deeds.call, "latest_step") == 1


def test_nothing_is_compared_unless_it_was_asked_for(launch: Launch, tmp_path: Path) -> None:
    """It is opt-in: some trainings differ by design, and say so nowhere."""
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "run"), kind="ddp")
    job[1].do(deeds.wander)
    job.all(deeds.save, 1)
    job.all(deeds.converged)
    job.all(deeds.save, 2)
    job.all(deeds.converged)
    assert (heard(job), warned(job)) == ([False, False], [[], []])
