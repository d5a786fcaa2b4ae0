"""Shows that the agents of a fleet can be replaced one by one, by others of another epoch of their
protocol, while a training saves; and what happens where two have no epoch in common."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise, permutations
from pathlib import Path

import deeds
import pytest
from trainers import Job, agents, eventually

from handfast.errors import Blocked

Launch = Callable[..., Job]

OLD, NEW = "1", "1-2"
"""What an agent of an old build and one of a new build offer."""


def start(launch: Launch, path: str, *offered: str) -> Job:
    """A rank on each of three nodes; each node's agent offers these epochs."""
    job = launch(3, 3)
    for trainer, epochs in zip(job, offered, strict=True):
        trainer.do(deeds.speak, epochs)
    return job


def replace(job: Job, node: int, offered: str) -> None:
    """Kill a node's agent; the next that its trainer starts is of another build."""
    job[node].do(deeds.speak, offered)
    (pid,) = agents(f"node{node}")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in agents(f"node{node}"))


def save(job: Job, step: int) -> None:
    """A step on all ranks, whose epoch converges."""
    job.all(deeds.train, step)
    assert [epoch.step for epoch in job.all(deeds.converged)] == [step] * 3


def spoken(offered: list[str]) -> list[dict[str, str]]:
    """What each agent speaks with each other: the highest that both offer."""
    return [
        {
            f"node{peer}": "1/2" if offered[me] == offered[peer] == NEW else "1/1"
            for peer in range(3)
            if peer != me
        }
        for me in range(3)
    ]


def walks(orders: Iterator[tuple[int, ...]]) -> list[tuple[int, str]]:
    """Upgrades in each order, and a downgrade in another; and a restart as it is in between."""
    found = []
    for up, down in pairwise([*orders, (0, 1, 2)]):
        found += [(node, NEW) for node in up] + [(up[0], NEW)]
        found += [(node, OLD) for node in down] + [(down[0], OLD)]
    return found


def roll(launch: Launch, tmp_path: Path, moves: list[tuple[int, str]]) -> None:
    """Make the moves, one by one, and save after each of them."""
    offered = [OLD, OLD, OLD]
    job = start(launch, str(tmp_path / "run"), *offered)
    job.all(deeds.resume, str(tmp_path / "run"), kind="ddp")
    save(job, 1)
    assert job.all(deeds.spoken) == spoken(offered)
    for step, (node, build) in enumerate(moves, 2):
        replace(job, node, build)
        offered[node] = build
        save(job, step)
        eventually(lambda: job.all(deeds.spoken) == spoken(offered))


def test_agents_are_replaced_one_by_one_while_a_training_saves(
    launch: Launch, tmp_path: Path
) -> None:
    """An upgrade of three, a restart, a downgrade in another order, and every epoch converges."""
    roll(launch, tmp_path, walks(iter([(1, 0, 2)])))


@pytest.mark.heavy
def test_agents_are_replaced_in_every_order(launch: Launch, tmp_path: Path) -> None:
    """Six orders of upgrade, six of downgrade, with restarts as they are."""
    roll(launch, tmp_path, walks(permutations(range(3))))


def test_an_old_agent_says_no_words_and_a_new_one_waits_for_none(
    launch: Launch, tmp_path: Path
) -> None:
    """Ranks that differ are named once all agents have words; nothing is held up until then."""
    path = str(tmp_path / "run")
    job = start(launch, path, NEW, OLD, NEW)
    job.all(deeds.resume, path, kind="ddp", replicas="warn")
    job[1].do(deeds.wander)
    save(job, 1)
    assert not any(job.all(deeds.divergent))
    replace(job, 1, NEW)
    save(job, 2)
    eventually(lambda: job.all(deeds.spoken) == spoken([NEW] * 3))
    save(job, 3)
    eventually(lambda: job[0].do(deeds.divergent))


def test_agents_without_an_epoch_in_common_are_named_and_say_why(
    launch: Launch, tmp_path: Path
) -> None:
    """It blocks rather than guesses, and both say what the other speaks."""
    path = tmp_path / "run"
    job = start(launch, str(path), "2", "1", "2")
    errors = job.each_raises(deeds.resume, str(path), kind="ddp", patience_s=3.0)
    assert all(isinstance(error, Blocked) for error in errors)
    assert re.search(
        r"blocked by: rank-00001.*on node1, whose agent is refused: epoch: the peer "
        r"speaks 1/1, this end 1/2: none in common",
        str(errors[0]),
    )
    assert re.search(r"on node0, .*the peer speaks 1/2, this end 1/1", str(errors[1]))
    job.kill()
    again = start(launch, str(path), NEW, NEW, "2")
    for node in range(3):
        for pid in agents(f"node{node}"):
            os.kill(pid, signal.SIGKILL)
    again.all(deeds.resume, str(path), kind="ddp")
    save(again, 1)
