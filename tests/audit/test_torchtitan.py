"""TorchTitan's checkpoints, by its own manager (golden/write_torchtitan.py), sound and damaged."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch.distributed.checkpoint

from audit.goldens import (
    GOLDEN,
    codes,
    copied,
    counters,
    cut,
    only,
    roles,
    seen,
    step,
    unclaimed,
    wrong,
)
from handfast.audit.finding import Code, Strength
from handfast.audit.formats import dcp
from handfast.audit.formats.torchtitan import find
from handfast.audit.found import Role


@pytest.mark.parametrize("variant", ["two", "weights"])
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """With all there is, or with weights alone at the end."""
    path = GOLDEN / "torchtitan" / variant
    assert wrong(find, path) == []
    assert unclaimed(find, path) == set()


def test_all_clocks_count_updates() -> None:
    """The name, the trainer, the optimizers and the schedulers; flat names tell whose moments."""
    last = step(only(find, GOLDEN / "torchtitan/two"), 4)
    counts = {path: c.value for path, c in counters(last).items() if c.updates}
    assert counts == {
        "step-N": 4,
        "train_state/step": 4,
        "optimizer: the greatest step": 4,
        "lr_scheduler/last_epoch": 4,
    }
    said = roles(last)
    assert said["0.weight"] == (Role.PARAMETER, "0.weight")
    assert said["optimizer/state.0.weight.exp_avg_sq"] == (Role.SECOND, "0.weight")
    assert last.parts[0].betas == {"optimizer/param_groups[0]": (0.9, 0.95)}


def test_a_directory_that_was_renamed_is_found(tmp_path: Path) -> None:
    """Its own counts say another step than its name, and every clock counts updates here."""
    path = copied("torchtitan/two", tmp_path)
    os.rename(path / "checkpoint/step-4", path / "checkpoint/step-6")
    assert codes(find, path) == {Code.COUNTERS}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_of_another_step_is_found(rank: int, tmp_path: Path) -> None:
    """Whichever rank's, since trainer and scheduler count the same, in different files."""
    path = copied("torchtitan/two", tmp_path) / "checkpoint"
    shutil.copy(path / f"step-2/__{rank}_0.distcp", path / f"step-4/__{rank}_0.distcp")
    (finding,) = [f for f in wrong(find, path) if f.code is Code.COUNTERS]
    assert (finding.step, finding.strength) == ("step-4", Strength.STRONG)


def test_a_step_without_an_index_is_not_taken(tmp_path: Path) -> None:
    """The one before it is; a step whose shard was cut is (pytorch/torchtitan#315)."""
    path = copied("torchtitan/two", tmp_path)
    cut(path / "checkpoint/step-4/__1_0.distcp", 5)
    assert [each.step for each in only(find, path).resume] == ["checkpoint/step-4"]
    os.remove(path / "checkpoint/step-4/.metadata")
    assert [each.step for each in only(find, path).resume] == ["checkpoint/step-2"]
    assert codes(find, path) == {Code.UNCOMMITTED}


def test_a_model_and_a_loader_of_two_steps_are_found(tmp_path: Path) -> None:
    """Model of step 500, loader of step 501, with torchft (pytorch/torchtitan#4686)."""
    path = copied("torchtitan/two", tmp_path) / "checkpoint"
    for number in (4, 5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group is what is wanted
            state = {"dataloader": {"dp_rank_0": b"", "world_size": 1}}
            where = path / f"ft-replicat-0/step-{number}"
            torch.distributed.checkpoint.save(state, checkpoint_id=where, no_dist=True)
    (finding,) = [f for f in wrong(find, path) if f.code is Code.COUNTERS and not f.evidence]
    assert finding.strength is Strength.STRONG
    assert finding.parts == ("step-4", "ft-replicat-0/step-5")
    assert unclaimed(find, path) == set()
    taken = {each.ranks: each.step for each in only(find, path).resume}
    assert taken == {
        "all ranks": "step-4",
        "the loader of replica 0": "ft-replicat-0/step-5",
    }


def test_other_checkpoints_of_that_name_are_left_alone(tmp_path: Path) -> None:
    """step-N is nobody's own: the keys tell."""
    path = copied("dcp/replicated", tmp_path)
    assert seen(find, path) == []
    assert [found.format for found in seen(dcp.find, path)] == ["torch DCP"]
    (path / "step-4/.metadata").write_bytes(b"nothing")
    assert seen(find, path) == []
