"""Shows that weights of many ranks come back whole, in a process that is none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deeds
import pytest
import torch
from trainers import Job
from whole import of_four, whole

import handfast
from handfast.errors import FormatError
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


@pytest.mark.parametrize("how", ["hybrid", "stages"])
def test_copies_of_shards_are_taken_once(
    launch: Callable[..., Job], tmp_path: Path, how: str
) -> None:
    """Replicas of shards make one model, and so do the stages of a pipeline with their names."""
    job = launch(4)
    ranks = job.all(of_four, str(tmp_path / "run"), how)
    loaded = load(tmp_path / "run", "")
    wanted = {key: value for rank in ranks for key, value in rank.items()}
    assert wanted.keys() == {key for key in loaded if "rng/" not in key}
    assert all(torch.equal(loaded[key], value) for key, value in wanted.items())
    job.all(deeds.close)


def test_stages_of_one_name_are_refused(launch: Callable[..., Job], tmp_path: Path) -> None:
    """Two stages, each sharded over its ranks, whose keys begin at 0: half was dropped unseen."""
    job = launch(4)
    job.all(of_four, str(tmp_path / "run"), "pipeline")
    with pytest.raises(FormatError, match=r"model/0.bias .* give each stage's modules names"):
        load(tmp_path / "run")
    assert handfast.open(tmp_path / "run").verify().sound
    job.all(deeds.close)
