"""Shows that ranks which differ in what they hold alike by design are named, and nobody else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deeds
import pytest
from trainers import Job, eventually

from handfast import open as open_run
from handfast.errors import SaveFailed

Launch = Callable[..., Job]


def warned(job: Job) -> list[list[str]]:
    """What each rank was warned of, about replicas."""
    found = job.all(deeds.warnings)
    return [[line for line in lines if "differ in what they hold alike" in line] for lines in found]


def heard(job: Job) -> list[bool]:
    """Whether each rank's agent knows of ranks that differ."""
    return list(job.all(deeds.divergent))


def settle(job: Job) -> None:
    """Wait for the last save, whether it converges or is one of those that were left to another."""
    for trainer in job:
        try:
            trainer.do(deeds.converged)
        except SaveFailed as failed:
            if "against" in str(failed):
                raise


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


@pytest.mark.parametrize("at", [1, 3])
def test_ranks_of_one_node_are_compared_too(at: int, launch: Launch, tmp_path: Path) -> None:
    """At the first save, and where one had left it to the other: it stores its own from then on.

    Both stored their own, and no word was said of it: a training went on with two models.
    """
    job = launch(2, 1)
    job.all(deeds.resume, str(tmp_path / "run"), kind="ddp", replicas="raise")
    job.all(deeds.train, at - 1)
    job[1].do(deeds.wander)

    def go_on() -> None:
        for step in range(at, at + 6):
            job.all(deeds.save, step)
            settle(job)

    with pytest.raises(SaveFailed, match="rank 0 against rank 1"):
        go_on()
    (found,) = open_run(str(tmp_path / "run")).inspect().unlike
    assert found.path.startswith("model/")
    assert found.groups == ((0,), (1,))


def test_buffers_between_two_forward_passes_are_no_difference(
    launch: Launch, tmp_path: Path
) -> None:
    """Each rank's batch has moved them; the next pass takes rank 0's. Of one node, and of two."""
    for nodes in (1, 2):
        job = launch(2, nodes)
        path = str(tmp_path / f"of-{nodes}")
        job.all(deeds.resume, path, kind="ddp", replicas="raise", model={"norm": True})
        for step in range(1, 6):
            job.all(deeds.train, step)
            settle(job)
        assert (heard(job), warned(job)) == ([False, False], [[], []])
        job.kill()


def test_nothing_is_left_to_compare_piece_by_piece(launch: Launch, tmp_path: Path) -> None:
    """With images=0 nobody has digests of what is alike: that is said at once."""
    (one,) = launch()
    with pytest.raises(ValueError, match="images=0 leaves nothing to compare"):
        one.do(deeds.resume, str(tmp_path / "run"), replicas="warn", images=0)


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
