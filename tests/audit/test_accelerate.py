"""Accelerate's checkpoints (golden/write_transformers.py), sound and damaged."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from audit.goldens import (
    GOLDEN,
    Bomb,
    codes,
    copied,
    counters,
    cut,
    only,
    part,
    seen,
    step,
    unclaimed,
    wrong,
)
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.accelerate import find


@pytest.mark.parametrize("variant", ["alone", "two", "models"])
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """One rank, two, and two models whose gradients are accumulated."""
    path = GOLDEN / "accelerate" / variant
    assert wrong(find, path) == []
    assert unclaimed(find, path) == set()


def test_a_scheduler_may_step_once_a_process() -> None:
    """Four updates by two ranks are eight steps of it, and no fault."""
    (one,) = only(find, GOLDEN / "accelerate/two").steps
    said = counters(one)
    assert said["optimizer: the greatest step"].value == 4
    assert said["scheduler: last_epoch"].value == 8
    assert not any(counter.updates for counter in said.values())
    assert [each.rank for each in one.parts if each.rank] == [{"rank": 0}, {"rank": 1}]


def test_each_model_counts_for_itself() -> None:
    """Two optimizers are two counters, which nobody holds against each other."""
    (one,) = only(find, GOLDEN / "accelerate/models").steps
    said = counters(one)
    assert said["optimizer: the greatest step"].value == 2
    assert said["optimizer_1: the greatest step"].value == 2


def test_the_last_of_all_entries_would_be_taken(tmp_path: Path) -> None:
    """By number, not by time nor by letters; whatever it lacks."""
    path = copied("accelerate/alone", tmp_path) / "checkpoints"
    os.rename(path / "checkpoint_1", path / "checkpoint_10")
    shutil.copytree(path / "checkpoint_0", path / "checkpoint_9")
    cut(path / "checkpoint_10/optimizer.bin", 10)
    found = only(find, path.parent)
    assert [each.step for each in found.resume] == ["checkpoints/checkpoint_10"]
    assert [one.number for one in found.steps] == [0, 9, 10]
    os.rename(path, path.parent / "mine")
    assert only(find, path.parent).resume == []


def test_what_leaves_a_gap_is_missing(tmp_path: Path) -> None:
    """A rank's random states; one of several optimizers, schedulers; the model."""
    path = copied("accelerate/two", tmp_path) / "checkpoints/checkpoint_0"
    os.remove(path / "random_states_0.pkl")
    (finding,) = wrong(find, path)
    assert finding.parts == ("random_states_0.pkl",)
    path = copied("accelerate/models", tmp_path) / "checkpoints/checkpoint_0"
    for name in ("optimizer.bin", "scheduler.bin", "model.safetensors", "model_1.safetensors"):
        os.remove(path / name)
    missing = {finding.parts for finding in wrong(find, path) if finding.code is Code.MISSING}
    assert missing == {("optimizer.bin",), ("scheduler.bin",), ("model.safetensors",)}


def test_a_save_that_was_killed_is_found(tmp_path: Path) -> None:
    """Random states are what each rank writes last."""
    path = copied("accelerate/two", tmp_path)
    for rank in (0, 1):
        os.remove(path / f"checkpoints/checkpoint_0/random_states_{rank}.pkl")
    assert codes(find, path) == {Code.UNCOMMITTED}


def test_random_states_that_cannot_be_read_are_found(tmp_path: Path) -> None:
    """load_state goes on without them (huggingface/accelerate#4283)."""
    path = copied("accelerate/two", tmp_path) / "checkpoints/checkpoint_0/random_states_1.pkl"
    cut(path, 7000)
    (finding,) = wrong(find, path.parent)
    assert (finding.code, finding.strength) == (Code.UNREADABLE, Strength.CERTAIN)


def test_random_states_of_another_step_are_found(tmp_path: Path) -> None:
    """Both ranks count the same batches."""
    path = copied("accelerate/two", tmp_path) / "checkpoints/checkpoint_0/random_states_1.pkl"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "step": state["step"] + 7}, path)
    (finding,) = wrong(find, path.parent)
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.STRONG)


def test_a_step_saved_twice_is_found(tmp_path: Path) -> None:
    """checkpoint_1 is checkpoint_0 again, or no update was between them: a hint."""
    path = copied("accelerate/alone", tmp_path) / "checkpoints"
    shutil.copy(path / "checkpoint_0/optimizer.bin", path / "checkpoint_1")
    assert codes(find, path) == set()
    assert Code.STALE in codes(find, path, Strength.HINT)


def test_files_that_were_cut_or_are_hostile_are_found(tmp_path: Path) -> None:
    """And nothing is executed."""
    path = copied("accelerate/alone", tmp_path) / "checkpoints"
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), path / "checkpoint_1/scheduler.bin")
    torch.save(Bomb(mark), path / "checkpoint_1/custom_checkpoint_0.pkl")
    assert {finding.code for finding in wrong(find, path)} == {Code.HARMFUL}
    assert not mark.exists()
    cut(path / "checkpoint_1/model.safetensors", 0)
    assert codes(find, path) == {Code.HARMFUL, Code.TRUNCATED}


def test_a_scaler_is_known(tmp_path: Path) -> None:
    """It may skip updates."""
    path = copied("accelerate/alone", tmp_path)
    torch.save(
        torch.amp.GradScaler("cpu").state_dict(), path / "checkpoints/checkpoint_1/scaler.pt"
    )
    assert [one.scaled for one in only(find, path).steps] == [False, True]
    assert wrong(find, path) == []


def test_shards_of_fsdp_are_parts_of_the_checkpoint(tmp_path: Path) -> None:
    """As Accelerate lays them out: distributed checkpoints in directories of their own."""
    path = copied("accelerate/alone", tmp_path)
    last = path / "checkpoints/checkpoint_1"
    os.remove(last / "model.safetensors")
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.copytree(GOLDEN / "dcp/fsdp2/checkpoint_4", last / name)
    assert [finding for finding in wrong(find, path) if finding.strength is not Strength.HINT] == []
    assert unclaimed(find, path) == set()
    assert part(step(only(find, path), 1), "optimizer_0/__2_0.distcp").tensors
    os.remove(last / "pytorch_model_fsdp_0/.metadata")
    assert codes(find, path) == {Code.MISSING}


def test_weights_alone_are_of_others(tmp_path: Path) -> None:
    """model.safetensors is everybody's name."""
    shutil.copy(GOLDEN / "safetensors/single/model.safetensors", tmp_path)
    assert seen(find, tmp_path) == []
