"""Shows that weights of many ranks come back whole, in a process that is none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deeds
import pytest
import torch
from trainers import Job
from whole import whole

import handfast
from handfast.torch import load


@pytest.mark.parametrize("split", [False, True], ids=["one disk", "a disk a rank"])
def test_weights_of_sharded_ranks_are_put_together(
    launch: Callable[..., Job], tmp_path: Path, split: bool
) -> None:
    """FSDP2's shares make the module's weights; what each rank has of its own stays apart."""
    path = str(tmp_path / ("disk{rank}/run" if split else "run"))
    job = launch(3)
    job.all(deeds.resume, path, "fsdp", model={"norm": True})
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    ranks = job.all(whole)
    loaded = load(path)
    own = {name for name in ranks[0] if name not in loaded}
    assert own == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name, value in ranks[0].items():
        assert name in own or torch.equal(loaded[name], value), name
    for number, rank in enumerate(ranks):
        for name in own:
            assert torch.equal(loaded[f"rank-{number:05d}/{name}"], rank[name])
    assert handfast.open(path).verify(everything=True).sound
    job.all(deeds.close)


def test_weights_that_all_nodes_hold_are_taken_once(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    """DDP's replicas, stored once a node: the module's own keys, without any wrapper's."""
    path = str(tmp_path / "run")
    job = launch(2, nodes=2)
    job.all(deeds.resume, path, "ddp", model={"norm": True})
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    ranks = job.all(whole)
    with torch.device("meta"):  # what torch makes by default is not what is loaded
        loaded = load(path)
    assert loaded.keys() == ranks[0].keys()
    assert all(torch.equal(loaded[name], value) for name, value in ranks[0].items())
    status = handfast.open(path).status()
    assert status.sound
    assert len({agent.label for agent in status.agents}) == 2
    job.all(deeds.close)
