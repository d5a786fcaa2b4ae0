"""Counts that no format promises, in one file a step: what speaks against it, and what does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.audit.altered import change, copied_file, optimizer_of_before
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from audit.goldens import codes, seen, wrong
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.torch_save import find

NUMBERS = (10, 20, 30, 40)


def trained(
    home: Path,
    form: str = "ckpt_{}.pt",
    *,
    every: int = 1,
    groups: bool = False,
    said: Callable[[int], dict[str, Any]] = lambda step: {"step": step},
) -> None:
    """A training that saves a file every ten batches, and makes an update of so many batches."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    each: Any = [{"params": part.parameters()} for part in model] if groups else model.parameters()
    optimizer = AdamW(each, lr=1e-2)
    scheduler = StepLR(optimizer, 10)
    for step in range(1, max(NUMBERS) + 1):
        model(torch.rand(4, 20)).square().mean().backward()
        if step % every == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step in NUMBERS:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            path = home / form.format(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**state, "scheduler": scheduler.state_dict(), **said(step)}, path)


@pytest.mark.parametrize(
    ("form", "every", "said"),
    [
        ("ckpt_{}.pt", 1, lambda step: {"step": step}),
        ("ckpt_{}.pt", 1, lambda step: {"step": step - 1}),
        ("ckpt_{}.pt", 4, lambda step: {"step": step}),
        ("step_{}.pt", 4, lambda _: {}),
        ("epoch_{}.pt", 1, lambda step: {"step": step * 25, "epoch": step}),
        ("ckpt_{}.pt", 1, lambda step: {"step": step * 25, "epoch": step}),
        ("ckpt_{}.pt", 1, lambda step: {"step": step + 1000}),
        ("step_{}k.pt", 1, lambda step: {"step": step * 1000}),
    ],
)
def test_what_sound_trainings_count_is_no_fault(
    form: str, every: int, said: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    """Counted from 0, gradients accumulated, epochs, a training that went on from weights."""
    trained(tmp_path, form, every=every, said=said)
    found = [f for f in wrong(find, tmp_path) if f.code is Code.COUNTERS]
    assert found == []
    assert codes(find, tmp_path) == set()


def scheduler_of_before(home: Path) -> None:
    """The scheduler of step 20, and a step later it has gone on."""
    before = torch.load(home / "ckpt_20.pt")["scheduler"]
    change(home / "ckpt_30.pt", lambda saved: saved.update(scheduler=before))


@pytest.mark.parametrize("spoil", [copied_file, optimizer_of_before, scheduler_of_before])
@pytest.mark.parametrize("every", [1, 2])
def test_another_steps_state_in_one_file_is_as_strong_as_in_a_directory(
    spoil: Callable[[Path], None], every: int, tmp_path: Path
) -> None:
    """It counted what the other step's did, and all others go with their names."""
    trained(tmp_path, every=every)
    spoil(tmp_path)
    bad = [finding for finding in wrong(find, tmp_path) if finding.code is Code.COUNTERS]
    strong = [finding for finding in bad if finding.strength is Strength.STRONG]
    assert strong
    assert {finding.step for finding in bad} == {strong[0].step}


def test_a_scheduler_that_did_not_go_on_is_a_hint(tmp_path: Path) -> None:
    """In the newest step: some end before the training does."""
    trained(tmp_path)
    before = torch.load(tmp_path / "ckpt_30.pt")["scheduler"]
    change(tmp_path / "ckpt_40.pt", lambda saved: saved.update(scheduler=before))
    (finding,) = wrong(find, tmp_path)
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.HINT)
    assert "scheduler/last_epoch in ckpt_40.pt is 30" in finding.says


@pytest.mark.parametrize(
    "said", [{"step": 30}, {"step": 40, "optimizer": 30}, {"optimizer": 30}, {"iteration": 30}]
)
def test_a_file_by_itself_that_counts_another_step_is_a_hint(
    said: dict[str, int], tmp_path: Path
) -> None:
    """Than its name, or than its own counter at the top."""
    trained(tmp_path, said=lambda step: {})
    for number in NUMBERS[:-1]:
        (tmp_path / f"ckpt_{number}.pt").unlink()

    def alter(saved: dict[str, Any]) -> None:
        saved.update({key: value for key, value in said.items() if key != "optimizer"})
        for each in saved["optimizer"]["state"].values():
            each["step"].fill_(said.get("optimizer", 40))

    change(tmp_path / "ckpt_40.pt", alter)
    found = [f for f in wrong(find, tmp_path) if f.code is Code.COUNTERS]
    assert {finding.strength for finding in found} == {Strength.HINT}


def test_updates_that_a_scaler_skipped_are_no_fault(tmp_path: Path) -> None:
    """The optimizer is behind, by no other step's count; by another's it is one's state."""
    scaler = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    for number, count in ((10, 10), (20, 17), (30, 27)):
        state = {0: {"step": torch.tensor(float(count)), "exp_avg": torch.rand(300)}}
        optimizer = {"state": state, "param_groups": [{"params": [0]}]}
        saved = {"model": {"w": torch.rand(300)}, "optimizer": optimizer, "scaler": scaler}
        torch.save({**saved, "step": number}, tmp_path / f"ckpt_{number}.pt")
    assert wrong(find, tmp_path) == []
    stale = torch.load(tmp_path / "ckpt_20.pt")["optimizer"]
    change(tmp_path / "ckpt_30.pt", lambda saved: saved.update(optimizer=stale))
    assert Code.COUNTERS in {finding.code for finding in wrong(find, tmp_path)}


@pytest.mark.parametrize("form", ["ckpt_{}.pt", "step_{}/all.pt"])
@pytest.mark.parametrize("groups", [False, True])
def test_nan_in_a_weight_that_has_moments_is_strong(
    groups: bool, form: str, tmp_path: Path
) -> None:
    """Whose they are the order says; of two groups it says nothing, and it is a hint."""
    trained(tmp_path, form, groups=groups)
    change(tmp_path / form.format(40), lambda saved: saved["model"]["0.weight"].fill_(torch.nan))
    (finding,) = [f for f in wrong(find, tmp_path) if f.code is Code.NONFINITE]
    assert finding.strength is (Strength.HINT if groups else Strength.STRONG)


@pytest.mark.parametrize(
    ("name", "alone", "below"),
    [
        ("step_40", 40, 40),
        ("run-checkpoint-40", 40, 40),
        ("final", None, None),
        ("sweep40", None, 40),
    ],
)
def test_files_of_roles_in_one_directory_are_one_step(
    name: str, alone: int | None, below: int | None, tmp_path: Path
) -> None:
    """Given by its own path, or below; its number is in its name, if anything says it."""
    home = tmp_path / name
    home.mkdir()
    trained(tmp_path / "all")
    saved = torch.load(tmp_path / "all" / "ckpt_40.pt")
    shutil.rmtree(tmp_path / "all")
    for role in ("model", "optimizer", "scheduler"):
        torch.save(saved[role], home / f"{role}.pt")
    for place, number in ((home, alone), (tmp_path, below)):
        (found,) = seen(find, place)
        (step,) = found.steps
        assert len(step.parts) == 3
        assert step.number == number
        assert wrong(find, place) == []


def test_the_best_and_the_last_are_two(tmp_path: Path) -> None:
    """Of one directory, each with an optimizer's file of its own."""
    for name in ("best", "last"):
        torch.save({"w": torch.rand(300)}, tmp_path / f"{name}_model.pt")
        torch.save({"state": {}, "param_groups": [{}]}, tmp_path / f"{name}_optimizer.pt")
    assert [len(found.steps[0].parts) for found in seen(find, tmp_path)] == [2, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step_40", ""),
        ("runs/step_40/\n", ""),
        ("40", ""),
        ("step_50", "latest names step_50, and there is no such step"),
        ("50", "latest names 50, and there is no such step"),
        ("step_30", "latest names step_30, and there is a step 40"),
        ("loss 50", ""),
        ("\udcff", ""),
    ],
)
def test_a_file_that_names_the_latest_is_held_against_what_is_there(
    text: str, says: str, tmp_path: Path
) -> None:
    """A hint where it points to nothing, or to an older one."""
    trained(tmp_path, "step_{}/all.pt")
    (tmp_path / "latest").write_bytes(text.encode(errors="surrogateescape"))
    found = wrong(find, tmp_path)
    assert [(f.says, f.strength) for f in found] == ([(says, Strength.HINT)] if says else [])
