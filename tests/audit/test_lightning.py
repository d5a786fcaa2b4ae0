"""Lightning's checkpoints (golden/write_lightning.py), sound and damaged."""

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
    roles,
    seen,
    step,
    unclaimed,
    wrong,
)
from handfast.audit.finding import Code, Strength
from handfast.audit.formats import dcp, torch_save
from handfast.audit.formats.lightning import find
from handfast.audit.found import Found, Role

SOUND = ("one", "two", "accumulated", "scaled", "sharded")


def updates(found: Found, number: int) -> dict[str, int]:
    """What counts updates in a step, by the path where it stands."""
    return {path: c.value for path, c in counters(step(found, number)).items() if c.updates}


@pytest.mark.parametrize("variant", SOUND)
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """Several optimizers, accumulation, a best that is infinite, a loss scaler, FSDP2's shards."""
    path = GOLDEN / "lightning" / variant
    assert wrong(find, path) == []
    assert unclaimed(find, path) == set()


def test_a_global_step_is_the_optimizers_if_it_is_one() -> None:
    """And the number in the name; a scheduler may step by epochs, so it isn't held to them."""
    assert updates(only(find, GOLDEN / "lightning/one"), 4) == {
        "step=N": 4,
        "global_step": 4,
        "optimizer_states[0]: the greatest step": 4,
    }


def test_a_global_step_counts_all_optimizers() -> None:
    """Lightning's own rule: four updates of one and two of the other are six; no fault."""
    found = only(find, GOLDEN / "lightning/two")
    assert updates(found, 6) == {"step=N": 6, "global_step": 6}
    assert counters(step(found, 6))["optimizer_states[0]: the greatest step"].value == 4


def test_updates_that_a_scaler_skipped_are_no_fault() -> None:
    """Lightning counts them, the optimizer does not."""
    last = step(only(find, GOLDEN / "lightning/scaled"), 4)
    said = counters(last)
    assert last.scaled
    assert said["global_step"].value == 4
    assert said["optimizer_states[0]: the greatest step"].value < 4
    assert said["optimizer_states[0]: the greatest step"].skips


def test_what_is_in_a_file_is_told() -> None:
    """Weights, buffers and moments; best scores of callbacks are no weights."""
    said = roles(step(only(find, GOLDEN / "lightning/one"), 4))
    assert said["state_dict/body.1.running_var"][0] is Role.BUFFER
    assert said["state_dict/body.0.weight"] == (Role.PARAMETER, "body.0.weight")
    assert said["optimizer_states[0]/state[0]/exp_avg_sq"][0] is Role.SECOND
    scores = [role for path, (role, _) in said.items() if path.startswith("callbacks")]
    assert set(scores) <= {Role.OTHER}


def test_shards_and_the_rest_are_one_step() -> None:
    """meta.pt has the counts of the loop, the shards those of the optimizer."""
    found = only(find, GOLDEN / "lightning/sharded")
    assert updates(found, 4) == {
        "step=N": 4,
        "global_step": 4,
        "optimizer_0: the greatest step": 4,
    }
    assert [each.rank for each in step(found, 4).parts] == [{}, {"rank": 0}, {"rank": 1}]


def test_what_a_resume_takes_is_told(tmp_path: Path) -> None:
    """Of last*.ckpt the one modified last; under SLURM the greatest hpc_ckpt_N."""
    path = copied("lightning/one", tmp_path) / "checkpoints"
    shutil.copy(path / "epoch=0-step=2.ckpt", path / "last-v1.ckpt")
    os.utime(path / "last.ckpt", (100, 100))
    os.utime(path / "last-v1.ckpt", (200, 200))
    assert [each.step for each in only(find, path).resume] == ["last-v1.ckpt"]
    path = copied("lightning/accumulated", tmp_path)
    shutil.copy(path / "hpc_ckpt_1.ckpt", path / "hpc_ckpt_10.ckpt")
    taken = [each.step for found in seen(find, path) for each in found.resume]
    assert taken == ["checkpoints/last.ckpt", "hpc_ckpt_10.ckpt"]


# Faults


@pytest.mark.parametrize("left", [0, 100, 9000])
def test_a_file_that_was_cut_is_found(left: int, tmp_path: Path) -> None:
    """Written in place, as before Lightning#688 and again in #19970."""
    path = copied("lightning/one", tmp_path) / "checkpoints"
    cut(path / "epoch=0-step=4.ckpt", left)
    bad = wrong(find, path)
    assert {finding.parts for finding in bad} == {("epoch=0-step=4.ckpt",)}
    assert {finding.strength for finding in bad} == {Strength.CERTAIN}
    assert unclaimed(find, path) == set()


def test_a_file_under_another_name_is_found(tmp_path: Path) -> None:
    """The name and the global step are one, with several optimizers too."""
    path = copied("lightning/two", tmp_path) / "checkpoints"
    os.rename(path / "epoch=0-step=4.ckpt", path / "epoch=0-step=5.ckpt")
    assert codes(find, path) == {Code.COUNTERS}


def test_a_mixed_step_is_found(tmp_path: Path) -> None:
    """Saved from live references (Lightning#21079): the optimizer went on while it was written."""
    path = copied("lightning/one", tmp_path) / "checkpoints/epoch=0-step=4.ckpt"
    state = torch.load(path, weights_only=False)
    for each in state["optimizer_states"][0]["state"].values():
        each["step"] += 1
    torch.save(state, path)
    (finding,) = wrong(find, path.parent)
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.STRONG)


def test_a_last_that_is_not_the_last_is_a_hint(tmp_path: Path) -> None:
    """A resume by "last" would go back."""
    path = copied("lightning/one", tmp_path) / "checkpoints"
    shutil.copy(path / "epoch=0-step=2.ckpt", path / "last.ckpt")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.TRACKER, Strength.HINT)
    assert "epoch=0-step=4.ckpt is later" in finding.says


def test_a_directory_written_over_by_half_is_found(tmp_path: Path) -> None:
    """last.ckpt is one directory for all steps: its shards are new, the rest is of the step before;
    or the other way round.
    """
    for name in ("meta.pt", "__0_0.distcp", "__1_0.distcp"):
        path = copied("lightning/sharded", tmp_path / name) / "checkpoints"
        os.rename(path / "epoch=0-step=2.ckpt", path / "last.ckpt")
        shutil.copy(path / "epoch=0-step=4.ckpt" / name, path / "last.ckpt" / name)
        bad = [f for f in wrong(find, path) if f.code is Code.COUNTERS]
        has_counts = name != "__0_0.distcp"  # rank 0's has none
        assert [f.step for f in bad] == ["last.ckpt"] * has_counts, name


def test_shards_without_the_rest_were_never_committed(tmp_path: Path) -> None:
    """meta.pt is written last; a missing shard is one of the index's."""
    path = copied("lightning/sharded", tmp_path) / "checkpoints"
    os.remove(path / "epoch=0-step=4.ckpt/meta.pt")
    assert codes(find, path) == {Code.UNCOMMITTED}
    os.remove(path / "epoch=0-step=4.ckpt/__1_0.distcp")
    assert codes(find, path) == {Code.UNCOMMITTED, Code.MISSING}


def test_nothing_is_executed(tmp_path: Path) -> None:
    """Hyperparameters are pickles of whatever people give."""
    path = copied("lightning/one", tmp_path) / "checkpoints/epoch=0-step=4.ckpt"
    mark = tmp_path / "executed"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "hyper_parameters": Bomb(mark)}, path)
    assert {finding.code for finding in wrong(find, path.parent)} == {Code.HARMFUL}
    assert not mark.exists()


def test_other_files_of_that_name_are_left_alone(tmp_path: Path) -> None:
    """A .ckpt that torch.save wrote for somebody else; a directory of DCP's."""
    torch.save({"w": torch.rand(300)}, tmp_path / "mine.ckpt")
    shutil.copytree(GOLDEN / "dcp/replicated/step-4", tmp_path / "step-4")
    assert seen(find, tmp_path) == []
    assert len(seen(torch_save.find, tmp_path)) == 1
    assert len(seen(dcp.find, tmp_path)) == 1


def test_a_part_is_found_by_its_own_file() -> None:
    """Each has its betas with its moments."""
    one = step(only(find, GOLDEN / "lightning/one"), 2)
    assert part(one, ".ckpt").betas == {"optimizer_states[0]/param_groups[0]": (0.9, 0.999)}
