"""Checkpoints of Hugging Face's Trainer (golden/write_transformers.py), sound and damaged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    tensors,
    unclaimed,
    wrong,
)
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.trainer import find
from handfast.audit.found import Role
from handfast.audit.run import audit

SOUND = ("alone", "two", "adafactor", "weights")


def state(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the trainer says."""
    found = json.loads((path / "trainer_state.json").read_text())
    change(found)
    (path / "trainer_state.json").write_text(json.dumps(found))


def pickled(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what is in a file of torch.save."""
    found = torch.load(path, weights_only=True)
    change(found)
    torch.save(found, path)


@pytest.mark.parametrize("variant", SOUND)
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """One rank and two with accumulation, Adafactor in bfloat16, weights alone."""
    path = GOLDEN / "trainer" / variant
    assert wrong(find, path) == []
    assert {name for name in unclaimed(find, path) if "config" not in name} == set()


@pytest.mark.parametrize(("variant", "optimizers"), [("alone", 4), ("two", 4), ("adafactor", 4)])
def test_all_clocks_count_updates(variant: str, optimizers: int) -> None:
    """The name, the trainer, the optimizer, the scheduler; with accumulated gradients, too."""
    last = step(only(find, GOLDEN / "trainer" / variant), 4)
    counts = {path: c.value for path, c in counters(last).items() if c.updates}
    assert counts == {
        "checkpoint-N": 4,
        "global_step": 4,
        "the greatest step": optimizers,
        "last_epoch": 4,
    }


def test_what_the_files_are_is_told() -> None:
    """Weights by names; moments by the optimizer's numbers; random states by ranks."""
    last = step(only(find, GOLDEN / "trainer/two"), 4)
    said = roles(last)
    assert said["model.norm.weight"] == (Role.PARAMETER, "model.norm.weight")
    assert said["state[0]/exp_avg"] == (Role.FIRST, "[0]")
    optimizer = part(last, "optimizer.pt")
    assert tensors(last)["state[0]/exp_avg"].group in optimizer.betas
    assert part(last, "rng_state_1.pth").rank == {"rank": 1}


def test_the_greatest_number_would_be_taken(tmp_path: Path) -> None:
    """Whatever it lacks: an empty directory, too (transformers#35782, #27925)."""
    path = copied("trainer/alone", tmp_path)
    (path / "out/checkpoint-6").mkdir()
    found = only(find, path)
    assert [each.step for each in found.resume] == ["out/checkpoint-6"]
    assert not step(found, 6).committed
    assert {Code.UNCOMMITTED, Code.MISSING} == codes(find, path)


def test_a_save_that_was_killed_is_found(tmp_path: Path) -> None:
    """Each file in the order of writing (huggingface/transformers#35782: incomplete, and taken)."""
    path = copied("trainer/two", tmp_path)
    last = path / "out/checkpoint-4"
    for name in ("trainer_state.json", "rng_state_1.pth", "rng_state_0.pth", "scheduler.pt"):
        os.remove(last / name)
        assert Code.UNCOMMITTED in codes(find, path), name
    assert {Code.UNCOMMITTED, Code.MISSING} == codes(find, path)
    os.remove(last / "model.safetensors")
    assert any("model.safetensors is missing" in finding.says for finding in wrong(find, path))


def test_a_resume_without_its_optimizer_is_found(tmp_path: Path) -> None:
    """transformers goes on with a fresh one, and says nothing."""
    for name in ("optimizer.pt", "scheduler.pt"):
        path = copied("trainer/alone", tmp_path / name)
        os.remove(path / "out/checkpoint-4" / name)
        (finding,) = wrong(find, path)
        assert (finding.code, finding.step) == (Code.MISSING, "out/checkpoint-4")
        assert "fresh optimizer" in finding.says


def test_random_states_that_are_missing_or_of_another_job_are_found(tmp_path: Path) -> None:
    """Of a rank; of all; and one of a single process beside those of two."""
    path = copied("trainer/two", tmp_path)
    last = path / "out/checkpoint-4"
    shutil.copy(last / "rng_state_0.pth", last / "rng_state.pth")
    assert codes(find, path) == {Code.EXTRA}
    os.remove(last / "rng_state.pth")
    os.remove(last / "rng_state_0.pth")
    (finding,) = wrong(find, path)
    assert finding.parts == ("out/checkpoint-4/rng_state_0.pth",)
    os.remove(last / "rng_state_1.pth")
    (finding,) = wrong(find, path)
    assert finding.parts == ("out/checkpoint-4/rng_state.pth",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_file_of_another_step_is_found(name: str, tmp_path: Path) -> None:
    """By its counts: a half-deleted or half-copied checkpoint."""
    path = copied("trainer/alone", tmp_path)
    shutil.copy(path / "out/checkpoint-2" / name, path / "out/checkpoint-4" / name)
    (finding,) = [f for f in wrong(find, path) if f.code is Code.COUNTERS]
    assert (finding.step, finding.strength) == ("out/checkpoint-4", Strength.STRONG)


def test_a_state_of_another_step_is_found(tmp_path: Path) -> None:
    """And a directory that was renamed."""
    path = copied("trainer/alone", tmp_path)
    state(path / "out/checkpoint-4", lambda found: found.update(global_step=2))
    assert codes(find, path) == {Code.COUNTERS}
    path = copied("trainer/weights", tmp_path)
    os.rename(path / "out/checkpoint-4", path / "out/checkpoint-6")
    assert codes(find, path) == {Code.COUNTERS}


def test_updates_that_a_scaler_skipped_are_no_fault(tmp_path: Path) -> None:
    """The trainer counts them, the optimizer and the scheduler don't; being ahead is a fault."""
    path = copied("trainer/alone", tmp_path)
    here = path / "out/checkpoint-6"
    os.rename(path / "out/checkpoint-4", here)
    state(here, lambda found: found.update(global_step=6))
    (finding,) = wrong(find, path)
    assert finding.code is Code.COUNTERS
    torch.save(torch.amp.GradScaler("cpu").state_dict(), here / "scaler.pt")
    assert wrong(find, path) == []
    assert step(only(find, path), 6).scaled
    pickled(here / "scheduler.pt", lambda found: found.update(last_epoch=7))
    assert codes(find, path) == {Code.COUNTERS}


def test_a_directory_that_was_to_be_renamed_is_found(tmp_path: Path) -> None:
    """tmp-checkpoint-N of transformers 4.36 and 4.37 (#27925, #28119, PR#28364)."""
    path = copied("trainer/alone", tmp_path)
    os.rename(path / "out/checkpoint-4", path / "out/tmp-checkpoint-4")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.LEFTOVER, Strength.STRONG)
    assert [each.step for each in only(find, path).resume] == ["out/checkpoint-2"]
    assert {name for name in unclaimed(find, path) if "config" not in name} == set()


def test_nodes_that_would_resume_at_two_steps_are_listed(tmp_path: Path) -> None:
    """Each node saves for itself, and has another last one (hiyouga/LlamaFactory#655,
    transformers#28270): the rule's outcome stands beside each directory.
    """
    for node, gone in (("node0", ""), ("node1", "checkpoint-4")):
        path = copied("trainer/alone", tmp_path / node)
        if gone:
            shutil.rmtree(path / "out" / gone)
    taken = [found.resume[0].step for found in seen(find, tmp_path)]
    assert taken == ["node0/alone/out/checkpoint-4", "node1/alone/out/checkpoint-2"]


def test_a_best_checkpoint_that_is_gone_is_a_hint(tmp_path: Path) -> None:
    """What load_best_model_at_end would look for in the end."""
    path = copied("trainer/alone", tmp_path)
    last = path / "out/checkpoint-4"
    state(last, lambda found: found.update(best_model_checkpoint="elsewhere/checkpoint-2"))
    assert wrong(find, path) == []
    state(last, lambda found: found.update(best_model_checkpoint="elsewhere/checkpoint-3"))
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.TRACKER, Strength.HINT)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_state_that_is_none_is_unreadable(text: str, tmp_path: Path) -> None:
    """json that was cut, and the rest is reported."""
    path = copied("trainer/alone", tmp_path)
    (path / "out/checkpoint-4/trainer_state.json").write_text(text)
    assert codes(find, path) == {Code.UNREADABLE}


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "rng_state.pth"])
def test_a_file_that_was_cut_is_found(name: str, tmp_path: Path) -> None:
    """Each is of one step, and the other one is as whole as it was."""
    path = copied("trainer/alone", tmp_path)
    cut(path / "out/checkpoint-4" / name, 2000)
    bad = wrong(find, path)
    assert {(f.step, f.strength) for f in bad} == {("out/checkpoint-4", Strength.CERTAIN)}


def test_nothing_is_executed(tmp_path: Path) -> None:
    """Not the arguments, which are a pickle of a class; nor anything else."""
    path = copied("trainer/alone", tmp_path)
    mark = tmp_path / "executed"
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Bomb(mark), path / "out/checkpoint-4" / name)
    assert {finding.code for finding in wrong(find, path)} == {Code.HARMFUL}
    assert not mark.exists()


def test_shards_of_fsdp_are_parts_of_the_checkpoint(tmp_path: Path) -> None:
    """pytorch_model_fsdp_0 and optimizer_0 are distributed checkpoints, and damaged as such."""
    path = copied("trainer/alone", tmp_path)
    last = path / "out/checkpoint-4"
    for name in ("model.safetensors", "optimizer.pt"):
        os.remove(last / name)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.copytree(GOLDEN / "dcp/fsdp2/checkpoint_4", last / name)
    bad = [finding for finding in wrong(find, path) if finding.strength is not Strength.HINT]
    assert bad == []
    assert {name for name in unclaimed(find, path) if "config" not in name} == set()
    os.remove(last / "optimizer_0/__1_0.distcp")
    os.remove(last / "pytorch_model_fsdp_0/.metadata")
    missing = {finding.parts for finding in wrong(find, path) if finding.code is Code.MISSING}
    assert missing == {
        ("out/checkpoint-4/optimizer_0/__1_0.distcp",),
        ("out/checkpoint-4/pytorch_model_fsdp_0/.metadata",),
    }


def test_directories_of_others_are_left_alone(tmp_path: Path) -> None:
    """checkpoint-N without any file of a Trainer's; and with an optimizer.pt, which is anybody's
    name for one.
    """
    here = tmp_path / "checkpoint-3"
    here.mkdir()
    torch.save({"w": torch.rand(300)}, here / "model.pt")
    assert seen(find, tmp_path) == []
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": 3}, here / name)
    assert seen(find, tmp_path) == []
    told = audit(tmp_path)
    assert [(one.format, one.findings) for one in told.found] == [("torch.save", ())]
    shutil.copy(GOLDEN / "trainer/alone/out/checkpoint-4/model.safetensors", here)
    assert [found.format for found in seen(find, tmp_path)] == ["Hugging Face Trainer"]


def test_a_save_that_was_killed_early_is_still_a_trainers(tmp_path: Path) -> None:
    """When its own files are not there yet: by its weights and what it calls its states."""
    path = copied("trainer/alone", tmp_path)
    shutil.rmtree(path / "out/checkpoint-2")
    for name in ("trainer_state.json", "training_args.bin", "rng_state.pth"):
        os.remove(path / "out/checkpoint-4" / name)
    assert Code.UNCOMMITTED in codes(find, path)


def test_a_checkpoint_by_itself_is_known_by_its_directory(tmp_path: Path) -> None:
    """Where its path is given, and not that of the output directory around it."""
    path = copied("trainer/alone", tmp_path) / "out/checkpoint-4"
    found = only(find, path)
    assert [(each.path, each.number) for each in found.steps] == [("", 4)]
    assert wrong(find, path) == []
    os.remove(path / "scheduler.pt")
    assert codes(find, path) == {Code.MISSING}


def resumed(home: Path, *numbers: int) -> None:
    """Checkpoints of a training that went on from weights alone: its optimizer has made four
    updates in the first of these, and its trainer counted on.
    """
    source = GOLDEN / "trainer" / "alone" / "out" / "checkpoint-4"
    for number in numbers:
        shutil.copytree(source, path := home / f"checkpoint-{number}")
        made = 4 + number - numbers[0]

        def optimizer(saved: Any, made: int = made) -> None:
            for each in saved["state"].values():
                each["step"].fill_(made)
                each["exp_avg"] *= 1 - made / 1000

        state(path, lambda said, number=number: said.update(global_step=number))
        pickled(path / "optimizer.pt", optimizer)
        pickled(path / "scheduler.pt", lambda saved, made=made: saved.update(last_epoch=made))


def test_a_training_that_went_on_from_weights_alone_is_no_fault(tmp_path: Path) -> None:
    """Its optimizer began anew, and lags as much in each of three checkpoints; of two it may be
    torn, and so may one of which the optimizer is another's.
    """
    resumed(tmp_path, 104, 106, 108)
    assert codes(find, tmp_path) == set()
    assert Code.COUNTERS in codes(find, tmp_path, Strength.HINT)
    shutil.copyfile(
        tmp_path / "checkpoint-106/optimizer.pt", tmp_path / "checkpoint-108/optimizer.pt"
    )
    assert codes(find, tmp_path) >= {Code.COUNTERS}
    shutil.rmtree(tmp_path / "checkpoint-108")
    assert codes(find, tmp_path) == {Code.COUNTERS}


def test_random_states_that_somebody_removed_are_a_hint(tmp_path: Path) -> None:
    """From all steps, as people do; from one of several it is strong, as all were saved with it."""
    path = copied("trainer/alone", tmp_path)
    (path / "out/checkpoint-4/rng_state.pth").unlink()
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.STRONG)
    (path / "out/checkpoint-2/rng_state.pth").unlink()
    assert [finding.strength for finding in wrong(find, path)] == [Strength.HINT] * 2
    assert audit(path).sound
