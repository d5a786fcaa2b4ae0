"""Steps of somebody's own making, whose state lies in several files: whole, and with faults."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from audit.goldens import codes, only, seen, wrong
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.torch_save import find
from handfast.audit.run import audit


class Layout:
    """How somebody lays out the files of a step."""

    def __init__(self, home: Path, form: str) -> None:
        self.home, self.form = home, form

    def file(self, member: str, number: int) -> Path:
        """The path of a member's file."""
        path = self.home / self.form.format(member=member, number=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


FORMS = ("step_{number}/{member}.pt", "checkpoint-{number}/{member}.pt", "{member}_{number}.pt",
         "run1_{member}_step{number}.pth", "epoch{number}/my_{member}.ckpt")  # fmt: skip


@pytest.fixture(params=FORMS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Layout:
    """A home-made layout."""
    return Layout(tmp_path, request.param)


def trained(layout: Layout, numbers: tuple[int, ...], **more: Any) -> None:
    """A training that saves model, optimizer and scheduler each by itself."""
    model = nn.Linear(20, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for step in range(1, max(numbers) + 1):
        optimizer.zero_grad()
        model(torch.rand(4, 20)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        if step in numbers:
            torch.save({"model": model.state_dict(), **more}, layout.file("model", step))
            torch.save(optimizer.state_dict(), layout.file("optimizer", step))
            torch.save(scheduler.state_dict(), layout.file("scheduler", step))


def test_the_files_of_a_step_are_one_step(layout: Layout) -> None:
    """Whatever the directories or files are called; nothing is said against sound ones."""
    trained(layout, (2, 4, 6))
    found = only(find, layout.home)
    assert [(step.number, len(step.parts)) for step in found.steps] == [(2, 3), (4, 3), (6, 3)]
    assert wrong(find, layout.home) == []


@pytest.mark.parametrize("member", ["model", "optimizer", "scheduler"])
def test_a_member_that_is_missing_is_named(member: str, layout: Layout) -> None:
    """Strong where all others have it, two at least; with one other step a hint."""
    trained(layout, (2, 4, 6))
    gone = layout.file(member, 6)
    gone.unlink()
    (finding,) = wrong(find, layout.home)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.STRONG)
    assert finding.parts == (str(gone.relative_to(layout.home)),)
    for each in ("model", "optimizer", "scheduler"):
        layout.file(each, 2).unlink()
    (finding,) = wrong(find, layout.home)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.HINT)


def test_older_steps_that_were_thinned_out_are_no_fault(layout: Layout) -> None:
    """The optimizer is kept for the last step alone; or for all but some: hints."""
    trained(layout, (2, 4, 6, 8))
    for number in (2, 4):
        layout.file("optimizer", number).unlink()
    assert codes(find, layout.home) == set()
    layout.file("optimizer", 6).unlink()
    assert wrong(find, layout.home) == []


@pytest.mark.parametrize("extra", ["best_model", "ema", "metrics"])
def test_what_a_step_need_not_have_is_missed_for_a_hint(extra: str, tmp_path: Path) -> None:
    """The best one is written when it is the best."""
    layout = Layout(tmp_path, "epoch_{number}/{member}.pt")
    trained(layout, (2, 4, 6))
    for number in (2, 4):
        torch.save({"w": torch.rand(300)}, layout.file(extra, number))
    (finding,) = wrong(find, tmp_path)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.HINT)


def test_an_optimizer_of_another_step_is_found(layout: Layout) -> None:
    """It counted what the other step's did, where its own would have gone on."""
    trained(layout, (20, 40, 60))
    shutil.copyfile(layout.file("optimizer", 40), layout.file("optimizer", 60))
    bad = [finding for finding in wrong(find, layout.home) if finding.code is Code.COUNTERS]
    assert [finding.strength for finding in bad] == [Strength.STRONG]
    assert "has made 40 updates" in bad[0].says


def test_counters_of_members_that_disagree_are_a_hint(layout: Layout) -> None:
    """Each says its step by a name that is anybody's."""
    trained(layout, (2, 4, 6), step=4)
    for number in (2, 4, 6):
        path = layout.file("optimizer", number)
        torch.save({"step": number, "optimizer": torch.load(path)}, path)
    apart = [finding for finding in wrong(find, layout.home) if finding.code is Code.COUNTERS]
    assert len(apart) >= 2
    assert {finding.strength for finding in apart} == {Strength.HINT}
    assert any("the values 4, 6" in finding.says for finding in apart)


def test_counts_that_start_anew_are_no_fault(layout: Layout) -> None:
    """A fresh optimizer after a resume, updates that a scaler skipped, accumulated gradients."""
    for counts in ((20, 40, 5), (20, 39, 58), (10, 20, 30), (20, 40, 40)):
        shutil.rmtree(layout.home)
        for number, count in zip((20, 40, 80), counts, strict=True):
            state = {0: {"step": torch.tensor(float(count)), "exp_avg": torch.rand(30)}}
            group = {"params": [0], "betas": (0.9, 0.99)}
            optimizer = {"state": state, "param_groups": [group]}
            torch.save({"w": torch.rand(300)}, layout.file("model", number))
            torch.save(optimizer, layout.file("optimizer", number))
        strong = codes(find, layout.home)
        assert strong == ({Code.COUNTERS} if counts[1:] == (40, 40) else set()), counts


def test_two_optimizers_count_for_themselves(tmp_path: Path) -> None:
    """A generator's and a discriminator's, in one directory a step."""
    for number in (10, 20):
        layout = Layout(tmp_path, "step_{number}/{member}.pt")
        for name, every in (("g", 1), ("d", 5)):
            state = {0: {"step": number * every, "exp_avg": torch.rand(300)}}
            torch.save({"w": torch.rand(300)}, layout.file(f"net_{name}", number))
            torch.save(
                {"state": state, "param_groups": [{"params": [0]}]},
                layout.file(f"optimizer_{name}", number),
            )
    assert wrong(find, tmp_path) == []


@pytest.mark.parametrize("names", [("alpha", "beta"), ("netG", "netD"), ("model", "ema")])
def test_files_of_two_runs_in_one_directory_stay_two(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """Two names without an optimizer's among them may be two trainings."""
    for name in names:
        for number in (1, 2):
            torch.save({"w": torch.rand(300)}, tmp_path / f"{name}_step_{number}.pt")
    assert len(seen(find, tmp_path)) == 2
    assert wrong(find, tmp_path) == []


def test_directories_that_are_no_steps_keep_their_files_apart(tmp_path: Path) -> None:
    """seed_1/best.pt and seed_1/last.pt are two files of a seed's run."""
    for seed in (1, 2):
        for name in ("best", "last"):
            path = Layout(tmp_path, "seed_{number}/{member}.pt").file(name, seed)
            torch.save({"w": torch.rand(300), "step": 10 + (name == "last")}, path)
    assert len(seen(find, tmp_path)) == 2
    assert wrong(find, tmp_path) == []


def test_files_that_repeat_their_directorys_number_are_of_it(tmp_path: Path) -> None:
    """``step_9/model_9.pt``: one run, whose members are known by their names without it."""
    layout = Layout(tmp_path, "step_{number}/{member}_{number}.pt")
    trained(layout, (8, 9, 10))
    found = only(find, tmp_path)
    assert [(step.path, step.number, len(step.parts)) for step in found.steps] == [
        (f"step_{number}", number, 3) for number in (8, 9, 10)
    ]
    assert wrong(find, tmp_path) == []
    layout.file("optimizer", 9).unlink()
    (finding,) = wrong(find, tmp_path)
    assert (finding.strength, finding.parts) == (Strength.STRONG, ("step_9/optimizer_9.pt",))


def test_files_of_several_numbers_in_one_numbered_directory_are_its_run(tmp_path: Path) -> None:
    """``fold_1/epoch_1.pt`` is beside ``fold_1/epoch_2.pt``, and not ``fold_2/epoch_2.pt``."""
    for fold in (1, 2):
        for epoch in (1, 2):
            path = Layout(tmp_path, f"fold_{fold}/epoch_{{number}}.pt").file("", epoch)
            torch.save({"w": torch.rand(300)}, path)
    runs = [[step.path for step in found.steps] for found in seen(find, tmp_path)]
    assert runs == [[f"fold_{fold}/epoch_{epoch}.pt" for epoch in (1, 2)] for fold in (1, 2)]


def test_steps_that_lie_beside_each_other_in_a_directory_have_paths_of_their_own(
    tmp_path: Path,
) -> None:
    """So that a fault is one step's."""
    layout = Layout(tmp_path, "saved/{member}_{number}.pt")
    trained(layout, (1, 2, 3))
    path = layout.file("model", 2)
    path.write_bytes(path.read_bytes()[:-100])
    (listed,) = audit(tmp_path).found
    assert [row.whole for row in listed.steps] == [True, False, True]


def ranks(home: Path, sizes: Sequence[int], form: str = "step_{}/state_rank{}.pt") -> None:
    """Steps 1, 2 and so on, each with files of so many ranks."""
    for step, size in enumerate(sizes, 1):
        for rank in range(size):
            path = home / form.format(step, rank)
            path.parent.mkdir(exist_ok=True)
            torch.save({"w": torch.rand(300)}, path)


@pytest.mark.parametrize("form", ["step_{}/state_rank{}.pt", "state_step{}_rank{}.pt"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_last_ranks_file_is_missed_where_other_steps_have_it(
    step: int, form: str, tmp_path: Path
) -> None:
    """Ranks 0 to 6 in one step, and 0 to 7 in the others; with one other step it is a hint."""
    ranks(tmp_path, [8, 8, 8], form)
    (tmp_path / form.format(step, 7)).unlink()
    (finding,) = wrong(find, tmp_path)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.STRONG)
    assert f"step{step}" in finding.step.replace("_", "")
    assert "rank 7's file" in finding.says
    for rank in range(8):
        (tmp_path / form.format(step % 3 + 1, rank)).unlink()
    (finding,) = wrong(find, tmp_path)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.HINT)


@pytest.mark.parametrize(
    ("sizes", "hints"),
    [
        ([8, 8, 6, 6], 0),
        ([8, 7, 7, 7], 0),
        ([6, 6, 8, 8], 0),
        ([8, 8, 8, 4], 1),
        ([4, 8, 8], 1),
        ([8, 4, 4, 8], 2),
        ([1, 8, 1, 8], 1),
    ],
)
def test_a_job_of_another_size_is_no_fault(sizes: list[int], hints: int, tmp_path: Path) -> None:
    """It goes on with fewer ranks, or more; a hint at most, also where it comes back."""
    ranks(tmp_path, sizes)
    assert [finding.strength for finding in wrong(find, tmp_path)] == [Strength.HINT] * hints


def test_a_step_that_says_how_many_ranks_it_has_lacks_none(tmp_path: Path) -> None:
    """The job's size in the files, or in their names."""
    for home, name in (("inside", "state_rank{0}.pt"), ("named", "state-{0}-of-{1}.pt")):
        for step, size in enumerate((8, 7, 8), 1):
            for rank in range(size):
                path = tmp_path / home / f"step_{step}" / name.format(rank, size)
                path.parent.mkdir(exist_ok=True, parents=True)
                torch.save({"w": torch.rand(300), "world_size": size}, path)
    assert wrong(find, tmp_path) == []
