"""Shows that parts of different epochs are not put together in silence, whoever loads them.

What is refused is refused before anything has changed; what is meant is said, and stays said in
every epoch that comes of it.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deeds
import guarding
import pytest
import torch
from click.testing import CliRunner
from guarding import stamps
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from trainers import Job, end_agents, eventually, raised_by
from training import Training, digest

import handfast
from handfast import Keep
from handfast.cli.main import app
from handfast.core.lattice import GENESIS
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, HandfastError, Poisoned, Refused, SaveFailed
from handfast.model.optimizer import Index
from handfast.store.manifest import Fork
from handfast.torch import Checkpointer, guard
from handfast.torch.corrections import Applied, Correction, Damp, Rescale, Reset

ROOT = Path(__file__).resolve().parents[2]
Launch = Callable[..., Job]


def build(kind: type[Optimizer] = AdamW) -> tuple[nn.Sequential, Optimizer]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return model, kind(model.parameters(), lr=1e-2)


def backward(model: nn.Module) -> None:
    """Gradients, of a batch that is the same each time."""
    model.zero_grad()
    model(torch.linspace(-1, 1, 24).reshape(6, 4)).square().mean().backward()


def train(model: nn.Module, *optimizers: Optimizer) -> None:
    """One update."""
    backward(model)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


class Saved:
    """A run of three steps, and what its parts were after each."""

    def __init__(self, path: str, kind: type[Optimizer] = AdamW, more: Any = None) -> None:
        self.path = path
        self.digests: list[str] = [""]
        self.model, self.optimizer = build(kind)
        state = {"model": self.model, "optimizer": self.optimizer, **(more or {})}
        with Checkpointer(path, state, keep=Keep(newest=9)) as checkpointer:
            checkpointer.restore()
            for step in (1, 2, 3):
                train(self.model, self.optimizer)
                self.digests.append(whole(self.model, self.optimizer))
                checkpointer.save(step).converged(60)
        train(self.model, self.optimizer)
        self.digests.append(whole(self.model, self.optimizer))


def whole(*parts: Any) -> str:
    """A digest of all that parts hold."""
    return digest([part.state_dict() for part in parts])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    yield Saved(str(tmp_path_factory.mktemp("saved") / "run"))
    end_agents()


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was warned of since the last look, in short; but for hyperparameters."""
    caplog.set_level(logging.WARNING, "handfast")

    def look() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [line for line in found if "hyperparameters" not in line]

    return look


def refused(deed: Callable[[], object], *parts: Any) -> Refused:
    """The refusal of a deed, which must have changed nothing."""
    before = whole(*parts)
    with pytest.raises(Refused) as caught:
        deed()
    assert whole(*parts) == before
    return caught.value


def refused_step(model: nn.Module, optimizer: Optimizer) -> str:
    """Why an optimizer may not step a model."""
    backward(model)
    error = refused(optimizer.step, model, optimizer)
    assert error.verdict is Verdict.MIXED
    return str(error)


# --- loading by hand ----------------------------------------------------------------------------


def test_parts_of_one_epoch_go_on_as_it_did(saved: Saved, warned: Callable[[], list[str]]) -> None:
    """At once or one after the other, the newest or another: to the last bit."""
    model, optimizer = build()
    loaded = guard.load(saved.path, model=model, optimizer=optimizer)
    assert (loaded.epoch.step, loaded.index.step, loaded.index.lineage) == (3, 3, "main")
    assert loaded.applied == []
    assert whole(model, optimizer) == saved.digests[3]
    train(model, optimizer)
    assert whole(model, optimizer) == saved.digests[4]
    for order in (("model", "optimizer"), ("optimizer", "model")):
        model, optimizer = build()
        guard.load(saved.path, model=model, optimizer=optimizer, step=1)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if order[0] == "optimizer":
            guard.load(saved.path, **parts, step=2)
        else:
            model, optimizer = build()
            parts = {"model": model, "optimizer": optimizer}
            for name in order:
                guard.load([saved.path], **{name: parts[name]}, step=2)
        assert whole(model, optimizer) == saved.digests[2]
        train(model, optimizer)
        assert whole(model, optimizer) == saved.digests[3]
    assert warned() == []
    assert not list(Path(saved.path).glob("domains/*/pins/*")), "it holds nothing any more"


def test_what_would_be_a_mixture_is_refused_and_nothing_has_changed(saved: Saved) -> None:
    """Moments of another step, or of the same one for weights that were trained since."""
    model, optimizer = build()
    guard.load(saved.path, model=model, step=2)
    error = refused(lambda: guard.load(saved.path, optimizer=optimizer, step=3), model, optimizer)
    assert error.verdict is Verdict.MIXED
    assert "optimizer of main 1/3" in error.shards[0]
    assert "model of main 1/2" in error.shards[1]
    guard.load(saved.path, optimizer=optimizer, step=2)
    train(model, optimizer)
    error = refused(lambda: guard.load(saved.path, optimizer=optimizer, step=2), model, optimizer)
    assert "trained on since" in str(error)
    refused(lambda: guard.load(saved.path, model=model, step=2), model, optimizer)
    train(model, optimizer)
    guard.load(saved.path, model=model, optimizer=optimizer, step=2)
    assert whole(model, optimizer) == saved.digests[2]


def test_weights_alone_are_refused_at_the_first_step(saved: Saved) -> None:
    """Unless a lineage says that this is fine-tuning."""
    model, optimizer = build()
    guard.load(saved.path, model=model)
    said = refused_step(model, optimizer)
    assert "without the optimizer state that was saved with them" in said
    guard.load(saved.path, model=model, lineage="sft")
    train(model, optimizer)


def test_an_epoch_that_had_no_optimizer_has_none_to_miss(tmp_path: Path, run: str) -> None:
    """Weights for inference were saved by themselves: nothing is left out."""
    model, _ = build()
    with Checkpointer(run, {"model": model}) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1).converged(60)
    model, optimizer = build()
    guard.load(run, model=model)
    train(model, optimizer)


def test_parts_of_two_lineages_are_a_mixture(saved: Saved) -> None:
    """Of one epoch, but going on as two histories."""
    model, optimizer = build()
    guard.load(saved.path, model=model, lineage="a")
    for lineage in ("b", ""):
        error = refused(
            lambda name=lineage: guard.load(saved.path, optimizer=optimizer, lineage=name),
            model,
            optimizer,
        )
        assert "going on as a" in str(error)
    guard.load(saved.path, optimizer=optimizer, lineage="a")
    train(model, optimizer)
    assert whole(model, optimizer) == saved.digests[4]


def test_whatever_is_not_there_is_named(saved: Saved) -> None:
    """Steps, components, structures: refused, and nothing changed."""
    model, optimizer = build()
    held = (model, optimizer)
    assert "choose one of 1/1, 1/2, 1/3" in str(
        refused(lambda: guard.load(saved.path, model=model, step=9), *held)
    )
    other = nn.Linear(3, 3)
    assert refused(lambda: guard.load(saved.path, model=other), other).verdict is Verdict.FOREIGN
    with pytest.raises(ValueError, match="nothing=: nothing was saved by that name"):
        guard.load(saved.path, nothing=model)
    sgd = SGD(model.parameters(), lr=0.1)
    assert "saved AdamW, live SGD" in str(
        refused(lambda: guard.load(saved.path, model=model, optimizer=sgd), model, sgd)
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "name what is to be loaded"),
        ({"model": 1, "correction": Reset(1)}, "name it, lineage="),
        ({"model": 1, "onto": [1]}, "onto="),
        ({"model": 1, "lineage": "a\nb"}, "printable characters"),
        ({"model": 1, "lineage": "x" * 101}, "printable characters"),
        ({"model": 1, "lineage": 5}, "printable characters"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(options: dict[str, Any], why: str, saved: Saved) -> None:
    """Said before anything is looked for."""
    with pytest.raises(ValueError, match=re.escape(why)):
        guard.load(saved.path, **options)


def test_every_byte_is_verified_before_any_is_used(saved: Saved, tmp_path: Path) -> None:
    """Also those of components that come after, and of those that are not asked for."""
    path = tmp_path / "copy"
    shutil.copytree(saved.path, path)
    file = next(path.glob("domains/*/*/chunks/1-3.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model, optimizer = build()
    before = whole(model, optimizer)
    with pytest.raises(Damaged):
        guard.load(path, model=model, optimizer=optimizer, step=3)
    assert whole(model, optimizer) == before
    guard.load(path, model=model, optimizer=optimizer, step=2)
    assert whole(model, optimizer) == saved.digests[2]


class Stubborn:
    """A user's object that refuses what it is given, once."""

    def __init__(self) -> None:
        self.fails = False

    def state_dict(self) -> dict[str, int]:
        return {"n": 1}

    def load_state_dict(self, state: object) -> None:
        if self.fails:
            raise OSError("no such shard of the data set")


def test_a_load_that_stops_half_way_leaves_nothing_that_looks_sound(
    run: str, warned: Callable[[], list[str]]
) -> None:
    """Poisoned; the parts are of no known epoch until a load succeeds."""
    thing = Stubborn()
    Saved(run, more={"thing": thing})
    model, optimizer = build()
    guard.load(run, model=model, optimizer=optimizer, step=1)
    thing.fails = True
    with pytest.raises(Poisoned):
        guard.load(run, model=model, optimizer=optimizer, thing=thing, step=2)
    assert guard.origin(model) is guard.origin(optimizer) is None
    thing.fails = False
    guard.load(run, model=model, optimizer=optimizer, thing=thing, step=2)
    train(model, optimizer)
    thing.fails = True
    with pytest.raises(Poisoned):
        guard.load(run, model=model, thing=thing, step=2, lineage="x", correction=Damp(1))
    assert warned() == []
    train(model, optimizer)
    assert ["loaded around the guard" in line for line in warned()] == [True]


def test_boxes_of_parts_are_guarded_as_parts_are(run: str) -> None:
    """A dict of models and a list of optimizers: each is known by its path."""
    model, optimizer = build()
    with Checkpointer(run, {"nets": {"g": model}, "opts": [optimizer]}) as checkpointer:
        checkpointer.restore()
        train(model, optimizer)
        checkpointer.save(1).converged(60)
    model, optimizer = build()
    guard.load(run, nets={"g": model})
    refused_step(model, optimizer)
    guard.load(run, opts=[optimizer])
    train(model, optimizer)
    assert str(guard.origin(optimizer)).startswith("opts[0] of main 1/1")
    refused(lambda: guard.load(run, opts=[optimizer]), model, optimizer)


# --- models as people have them -----------------------------------------------------------------


def test_two_optimizers_over_one_model_are_loaded_and_stepped(run: str) -> None:
    """A GAN's pair, in any order; one of another step is refused."""

    def three() -> dict[str, Any]:
        model, _ = build()
        body, head = AdamW(model[0].parameters()), AdamW(model[2].parameters())
        return {"model": model, "body": body, "head": head}

    state = three()
    with Checkpointer(run, state, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        for step in (1, 2):
            train(state["model"], state["body"])
            train(state["model"], state["head"])
            checkpointer.save(step).converged(60)
    new = three()
    guard.load(run, **new)
    train(new["model"], new["head"])
    train(new["model"], new["head"])
    train(new["model"], new["body"])
    refused(lambda: guard.load(run, head=new["head"], step=2), *new.values())
    new = three()
    guard.load(run, model=new["model"], body=new["body"])
    refused(lambda: guard.load(run, head=new["head"], step=1), *new.values())
    train(new["model"], new["body"])
    refused_step(new["model"], new["head"])


def test_a_frozen_teacher_comes_from_where_it_likes(saved: Saved, run: str) -> None:
    """Another run, another lineage; what is trained leads, wherever it stands in the state."""
    model, optimizer = build()
    teacher, _ = build()
    guard.load(saved.path, model=model, lineage="distilled")
    guard.load(saved.path, model=teacher, step=1)
    teacher.requires_grad_(False)
    state = {"teacher": teacher, "model": model, "optimizer": optimizer}
    with Checkpointer(run, state) as checkpointer:
        assert checkpointer.restore() == 0
        train(model, optimizer)
        checkpointer.save(1).converged(60)
    (stamp,) = stamps(run)
    assert stamp.lineage == "distilled"


def test_tied_weights_are_loaded_with_those_they_are_tied_to(run: str) -> None:
    """An output layer that is the embedding: of one epoch, or refused."""

    def tied() -> tuple[nn.Sequential, nn.Linear, Optimizer]:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        head = nn.Linear(4, 4)
        head.weight = model[0].weight
        return model, head, AdamW([*model.parameters(), head.bias], lr=1e-2)

    model, head, optimizer = tied()
    state = {"model": model, "head": head, "optimizer": optimizer}
    with Checkpointer(run, state, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        for step in (1, 2):
            train(nn.Sequential(model, head), optimizer)
            checkpointer.save(step).converged(60)
    model, head, optimizer = tied()
    guard.load(run, model=model, step=1)
    refused(lambda: guard.load(run, head=head, step=2), model, head)
    guard.load(run, model=model, head=head, optimizer=optimizer, step=2)
    train(nn.Sequential(model, head), optimizer)


def test_wrappers_come_and_go(saved: Saved, run: str) -> None:
    """Loaded bare, compiled and saved; loaded compiled, and stepped bare. A copy is no part."""
    model, optimizer = build()
    guard.load(saved.path, model=model, lineage="tuned")
    compiled = torch.compile(model, backend="eager")
    with Checkpointer(run, {"model": compiled, "optimizer": optimizer}) as checkpointer:
        checkpointer.restore()
        train(compiled, optimizer)  # a module, though torch calls it not
        checkpointer.save(1).converged(60)
    (stamp,) = stamps(run)
    assert stamp.lineage == "tuned"
    model, optimizer = build()
    compiled = torch.compile(model, backend="eager")
    guard.load(run, model=compiled)
    assert guard.origin(model) == guard.origin(compiled)
    twin = copy.deepcopy(model)
    train(twin, AdamW(twin.parameters()))
    refused_step(model, optimizer)
    guard.load(run, optimizer=optimizer)
    train(model, optimizer)


# --- lineages -----------------------------------------------------------------------------------


def begin(path: str, **options: Any) -> tuple[Checkpointer, nn.Module, Optimizer]:
    """Build and restore."""
    model, optimizer = build()
    checkpointer = Checkpointer(path, {"model": model, "optimizer": optimizer})
    checkpointer.restore(**options)
    return checkpointer, model, optimizer


def test_forks_are_in_every_epoch_from_then_on(saved: Saved, run: str, tmp_path: Path) -> None:
    """A fine-tuning of a run, gone on twice, a fork of that in its own directory, and gone on."""
    model, optimizer = build()
    run_id = stamps(saved.path)[0].run
    guard.load(saved.path, model=model, lineage="sft")
    checkpointer = Checkpointer(run, {"model": model, "optimizer": optimizer})
    first = Fork("sft", run_id, "main", 1, 3, "guard.load of model")

    def go_on(step: int) -> tuple[str, tuple[Fork, ...]]:
        train(model, optimizer)
        checkpointer.save(step).converged(60)
        checkpointer.close()
        (stamp,) = stamps(run)
        return stamp.lineage, stamp.forks

    assert checkpointer.restore() == 0
    assert go_on(1) == ("sft", (first,))
    checkpointer, model, optimizer = begin(run)
    assert go_on(2) == ("sft", (first,))
    only = ("model/**",)
    checkpointer, model, optimizer = begin(run, only=only, lineage="dpo")
    second = Fork("dpo", stamps(run)[0].run, "sft", 2, 2, f"restore(only={only})")
    assert go_on(3) == ("dpo", (first, second))
    checkpointer, model, optimizer = begin(run)
    assert go_on(4) == ("dpo", (first, second))


def test_a_first_start_may_name_its_lineage(saved: Saved, run: str, tmp_path: Path) -> None:
    """From nothing it has no forks; from parts that were loaded it has one more."""
    checkpointer, model, optimizer = begin(run, lineage="scratch")
    train(model, optimizer)
    checkpointer.save(1).converged(60)
    checkpointer.close()
    assert [(stamp.lineage, stamp.forks) for stamp in stamps(run)] == [("scratch", ())]
    other = str(tmp_path / "other")
    model, optimizer = build()
    guard.load(saved.path, model=model, optimizer=optimizer)
    checkpointer = Checkpointer(other, {"model": model, "optimizer": optimizer})
    checkpointer.restore(lineage="branch")
    train(model, optimizer)
    checkpointer.save(1).converged(60)
    checkpointer.close()
    (stamp,) = stamps(other)
    assert (stamp.lineage, [fork.of for fork in stamp.forks]) == ("branch", ["main"])


def test_a_name_that_was_borne_before_is_refused_before_anything_is_changed(run: str) -> None:
    """By a restore as by a load: two histories of one name could not be told apart."""
    Saved(run)
    model, optimizer = build()
    held = (model, optimizer)
    checkpointer = Checkpointer(run, {"model": model, "optimizer": optimizer})
    assert checkpointer.restore(lineage="other") == 3
    train(*held)
    checkpointer.save(4).converged(60)
    before = whole(*held)
    with pytest.raises(ValueError, match="came from a lineage of that name"):
        checkpointer.restore(lineage="main")
    with pytest.raises(ValueError, match="came from a lineage of that name"):
        guard.load(run, model=model, optimizer=optimizer, lineage="main")
    assert whole(*held) == before
    assert checkpointer.restore() == 4
    checkpointer.close()


def test_a_first_epoch_that_would_be_a_mixture_is_refused(saved: Saved, run: str) -> None:
    """Weights by the guard, moments by another checkpointer's restore: dry, on all ranks alike."""
    model, _ = build()
    guard.load(saved.path, model=model, step=2)
    other, _ = build()
    other.requires_grad_(False)
    stand_in = AdamW(other.parameters())
    guard.load(saved.path, model=other, optimizer=stand_in, step=3)
    stand_in.param_groups[0]["params"] = list(model.parameters())
    stand_in.state.clear()
    checkpointer = Checkpointer(run, {"model": model, "optimizer": stand_in})
    error = refused(checkpointer.restore, model)
    assert "the first epoch of this run would be a mixture" in str(error)
    with pytest.raises(RuntimeError, match="call restore"):
        checkpointer.save(1)
    guard.load(saved.path, model=model, step=3)
    assert checkpointer.restore() == 0
    checkpointer.close()


# --- a Checkpointer's restores ------------------------------------------------------------------


def test_what_is_restored_in_part_is_held_against_the_rest(
    run: str, warned: Callable[[], list[str]]
) -> None:
    """Weights alone, weights that go back to the very epoch they came from, a layer alone."""
    Saved(run)
    checkpointer, model, optimizer = begin(run, only=("model/**",))
    refused_step(model, optimizer)
    for options in ({}, {"in_place": True}, {"step": 2}):
        assert checkpointer.restore(**options) == options.get("step", 3)
        train(model, optimizer)
    assert checkpointer.restore() == 2
    train(model, optimizer)
    assert checkpointer.restore(only=("model/**",)) == 2
    refused_step(model, optimizer)
    assert checkpointer.restore() == 2
    train(model, optimizer)
    assert warned() == []
    refused(lambda: checkpointer.restore(only=("model/0.*",)), model, optimizer)
    assert checkpointer.restore() == 2
    train(model, optimizer)
    assert warned() == []
    checkpointer.close()


def test_loading_around_the_guard_is_said_at_the_next_save(
    run: str, warned: Callable[[], list[str]]
) -> None:
    """Once for each load; the epochs still bear the lineage's name."""
    checkpointer, model, optimizer = begin(run)
    train(model, optimizer)
    checkpointer.save(1).converged(60)
    checkpointer.restore()
    model[2].load_state_dict(build()[0][2].state_dict())
    assert warned() == []
    train(model, optimizer)
    checkpointer.save(2).converged(60)
    first, second = warned()
    assert re.match(r"model of main 1/1 .*: loaded around the guard since, and stepped now", first)
    assert "model of main 1/1" in second
    assert "bears the name of lineage main" in second
    train(model, optimizer)
    checkpointer.save(3).converged(60)
    assert warned() == []
    checkpointer.close()


def test_an_average_takes_the_weights_place_for_an_evaluation(
    run: str, warned: Callable[[], list[str]]
) -> None:
    """At a first start and after a resume; a save in between is of the average, and says so."""
    for first in (1, 3):
        checkpointer, model, optimizer = begin(run)
        average = copy.deepcopy(model)
        for number in (first, first + 1):
            train(model, optimizer)
            for mine, its in zip(average.parameters(), model.parameters(), strict=True):
                mine.data.lerp_(its.data, 0.1)
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict(average.state_dict())
            model.load_state_dict(kept)
            checkpointer.save(number).converged(60)
        assert [line for line in warned() if "guard" in line] == []
        checkpointer.close()
    checkpointer, model, optimizer = begin(run)
    train(model, optimizer)
    model.load_state_dict(average.state_dict())
    checkpointer.save(5).converged(60)
    assert ["swapped for an evaluation load those back first" in line for line in warned()] == [
        True
    ]
    checkpointer.close()


def test_a_restore_that_was_poisoned_leaves_no_origin(run: str) -> None:
    """A save refuses; the guard knows of no epoch; a whole restore mends it."""
    thing = Stubborn()
    Saved(run, more={"thing": thing})
    model, optimizer = build()
    checkpointer = Checkpointer(run, {"model": model, "optimizer": optimizer, "thing": thing})
    thing.fails = True
    with pytest.raises(Poisoned):
        checkpointer.restore()
    assert guard.origin(model) is guard.origin(optimizer) is None
    with pytest.raises(Refused):
        guard.of(guard.Lineage, model)
    thing.fails = False
    assert checkpointer.restore() == 3
    assert guard.of(guard.Lineage, model).index.step == 3
    train(model, optimizer)
    checkpointer.close()


def test_a_restore_in_place_that_fails_leaves_no_origin(run: str) -> None:
    """The live state was read over, and is of no epoch: of which it was says nothing any more."""
    Saved(run)
    checkpointer, model, optimizer = begin(run)
    for file in Path(run).glob("domains/*/*/chunks/*"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(Refused):
        checkpointer.restore(in_place=True)
    assert guard.origin(model) is guard.origin(optimizer) is None
    with pytest.raises(Poisoned):
        checkpointer.save(4)
    checkpointer.close()


# --- corrections --------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", [Reset(warmup=2), Rescale(count=1), Damp(skew=2)], ids=str)
def test_a_mixture_on_purpose_is_a_lineage_of_its_own(
    correction: Correction, saved: Saved, run: str
) -> None:
    """Weights of step 3, moments of step 1: labelled a heuristic in each epoch, and gone on."""
    model, optimizer = build()
    guard.load(saved.path, model=model)
    loaded = guard.load(
        saved.path, optimizer=optimizer, step=1, correction=correction, lineage="mended"
    )
    (applied,) = loaded.applied
    assert applied.name == correction.name
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "applied": applied}
    with Checkpointer(run, state) as checkpointer:
        assert checkpointer.restore() == 0
        train(model, optimizer)
        checkpointer.save(1).converged(60)
    (stamp,) = stamps(run)
    assert stamp.lineage == "mended"
    assert [(fork.of, fork.step, fork.why) for fork in stamp.forks] == [
        ("main", step, correction.describe()) for step in (1, 3)
    ]
    assert "heuristic" in stamp.forks[0].why
    assert [(one.path, one.step) for one in stamp.came] == [("model", 3), ("optimizer", 1)]


def test_a_correction_may_go_onto_a_live_optimizer(saved: Saved) -> None:
    """Weights go back, the moments that are there stay, or begin anew."""
    model, optimizer = build()
    guard.load(saved.path, model=model, optimizer=optimizer)
    train(model, optimizer)
    loaded = guard.load(
        saved.path, model=model, step=1, correction=Reset(3), lineage="x", onto=[optimizer]
    )
    assert not optimizer.state
    assert loaded.applied[0].left == 3
    train(model, optimizer)
    origins = [guard.origin(part) for part in (model, optimizer)]
    assert [came.history.lineage for came in origins if came] == ["x", "x"]


def test_an_optimizer_that_no_correction_knows_is_refused(run: str) -> None:
    """As a TypeError that names it; the parts are of no lineage then."""
    Saved(run, RMSprop)
    model, optimizer = build(RMSprop)
    with pytest.raises(TypeError, match="RMSprop can't be corrected"):
        guard.load(run, model=model, optimizer=optimizer, correction=Damp(2), lineage="x")
    assert guard.origin(model) is None


# --- lineages as types --------------------------------------------------------------------------

BRANDS = """
from torch import nn

from handfast.torch import guard


class Pretrained(guard.Lineage):
    name = "main"


class Tuned(guard.Lineage):
    name = "sft"


def tune(model: guard.Of[Pretrained, nn.Linear]) -> guard.Of[Tuned, nn.Linear]:
    return guard.of(Tuned, model.live)


first = guard.of(Pretrained, nn.Linear(1, 1))
second = tune(first)
tune(second)  # refused
tune(nn.Linear(1, 1))  # refused
third: guard.Of[Pretrained, nn.Linear] = second  # refused
fourth: guard.Of[guard.Lineage, nn.Linear] = first  # refused
tune(guard.of(Pretrained, nn.Conv2d(1, 1, 1)))  # refused
guard.of(int, nn.Linear(1, 1))  # refused
bias: object = first.live.bias
index: str = first.index.lineage
step: str = first.index.step  # refused
"""


def test_a_type_checker_keeps_lineages_apart(tmp_path: Path) -> None:
    """Mypy finds an error in each line that is marked, and in no other."""
    file = tmp_path / "brands.py"
    file.write_text(BRANDS)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--no-error-summary", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = {int(n) for n in re.findall(r"brands\.py:(\d+): error", done.stdout)}
    marked = {n for n, line in enumerate(BRANDS.splitlines(), 1) if "# refused" in line}
    assert len(marked) == 7
    assert found == marked, done.stdout + done.stderr


def test_lineages_are_compared_when_it_runs(saved: Saved) -> None:
    """What is of another lineage, or of none that is known, is refused."""

    class Tuned(guard.Lineage):
        name = "sft"

    model, _ = build()
    assert refused(lambda: guard.of(Tuned, model), model).verdict is Verdict.FOREIGN
    guard.load(saved.path, model=model)
    of = guard.of(guard.Lineage, model)
    assert of.live is model
    assert repr(of) == f"Of(Sequential of {of.index})"
    assert "is of lineage main, and lineage sft was asked for" in str(
        refused(lambda: guard.of(Tuned, model), model)
    )
    guard.load(saved.path, model=model, lineage="sft")
    assert guard.of(Tuned, model).index.step == 3
    refused(lambda: guard.of(guard.Lineage, model), model)


# --- several ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_each_rank_loads_its_own(kind: str, launch: Launch, tmp_path: Path) -> None:
    """Shards by FSDP2, and what DDP's rank 1 has left to rank 0; then it goes on as it did."""
    path = str(tmp_path / "run")
    job = launch(2)
    job.all(deeds.resume, path, kind)
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    expected = job.all(deeds.model_digest)
    after = [one.pop() for one in job.all(deeds.train, 3, save=False)]
    assert len(after) == 2
    trained = job.all(deeds.model_digest)
    job.all(deeds.close)
    job.all(deeds.build, kind, seed=9)
    unnamed = job.each_raises(guarding.load, path, ("model",))
    assert all("on several ranks give step=" in str(error) for error in unnamed)
    assert job.all(guarding.load, path, ("model",), step=2) == ["1/2", "1/2"]
    assert job.all(deeds.model_digest) == expected
    errors = job.each_raises(guarding.step)
    assert [type(error) for error in errors] == [Refused, Refused]
    both = ("optimizer", "scheduler")
    assert job.all(guarding.load, path, both, step=2) == ["1/2", "1/2"]
    assert trained != expected
    job.all(guarding.step)
    for part in ("model", "optimizer"):
        assert all("trained on since" in said for said in job.all(guarding.origin, part))


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_each_rank_swaps_its_own(kind: str, launch: Launch, tmp_path: Path) -> None:
    """What is of one rank needs no other: one may swap alone, and know what it holds."""
    job = launch(2)
    job.all(deeds.resume, str(tmp_path / "run"), kind)
    job.all(deeds.train, 1)
    assert all("begun here" in said for said in job.all(guarding.swap))
    job.all(deeds.train, 2)
    assert job.all(guarding.swap, back=False) == ["None", "None"]
    job.all(deeds.close)


def test_a_shard_of_another_job_is_refused(launch: Launch, tmp_path: Path) -> None:
    """Two ranks' run, in a job of three, and in one process: refused, with the way to do it."""
    path = str(tmp_path / "run")
    job = launch(2)
    job.all(deeds.resume, path, "fsdp")
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.all(deeds.close)
    three = launch(3)
    three.all(deeds.build, "plain")
    three[2].tell(guarding.load, path, ("model",), step=1)
    error = raised_by(three[2])
    assert isinstance(error, Refused)
    assert "epoch 1/1 has 2 shards, and this is rank 2" in str(error)
    one = Training("plain")
    assert refused(lambda: guard.load(path, model=one.model), one.model).verdict is Verdict.FOREIGN


def test_ranks_that_name_different_lineages_are_refused(launch: Launch, tmp_path: Path) -> None:
    """Both hear what each has said, nothing is changed, and both may try again."""
    path = str(tmp_path / "run")
    job = launch(2)
    job.all(deeds.resume, path)
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    before = job.all(deeds.digest)
    for trainer, lineage in zip(job, ("sft", ""), strict=True):
        trainer.tell(deeds.restore, lineage=lineage)
    for trainer in job:
        error = raised_by(trainer)
        assert isinstance(error, Refused)
        assert "rank 0: sft, rank 1: none" in str(error)
    assert job.all(deeds.digest) == before
    assert job.all(deeds.restore, lineage="sft") == [1, 1]
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    assert [stamp.lineage for stamp in stamps(path)] == ["sft", "sft"]
    assert os.path.isdir(path)
    job.all(deeds.close)


# --- what an adversary tried --------------------------------------------------------------------


def begun(run: str) -> tuple[Checkpointer, nn.Module, Optimizer]:
    """A first start that has trained for three steps."""
    model, optimizer = build()
    checkpointer = Checkpointer(
        run, {"model": model, "optimizer": optimizer}, rng=False, keep=Keep(newest=5)
    )
    checkpointer.restore()
    for number in (1, 2, 3):
        train(model, optimizer)
        checkpointer.save(number).converged(60)
    return checkpointer, model, optimizer


@pytest.mark.parametrize("only", ["optimizer/**", "model/**", "model/0.*"])
def test_a_process_that_began_the_run_is_guarded_as_well(only: str, run: str) -> None:
    """Its parts came from nowhere, and are of one history all the same."""
    checkpointer, model, optimizer = begun(run)
    if only == "model/0.*":
        refused(lambda: checkpointer.restore(2, only=(only,)), model, optimizer)
    else:
        checkpointer.restore(2, only=(only,))
        refused_step(model, optimizer)
        model.zero_grad()
        for number in (4, 5):
            with pytest.raises(Refused, match="this epoch would be a mixture"):
                checkpointer.save(number)
    assert checkpointer.restore(2) == 2
    train(model, optimizer)
    checkpointer.save(4).converged(60)
    checkpointer.close()


def test_weights_that_are_loaded_before_anything_is_trained_are_no_trouble(
    run: str, warned: Callable[[], list[str]]
) -> None:
    """``if restore() == 0: model.load_state_dict(pretrained)``, as people write it."""
    model, optimizer = build()
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        assert checkpointer.restore() == 0
        model.load_state_dict(build()[0].state_dict())
        train(model, optimizer)
        checkpointer.save(1).converged(60)
    assert warned() == []


def test_moments_alone_are_refused_at_the_first_step(run: str) -> None:
    """On the weights of a fresh process, whatever these are."""
    begun(run)[0].close()
    model, optimizer = build()
    checkpointer = Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False)
    checkpointer.restore(only=("optimizer/**",))
    refused_step(model, optimizer)
    checkpointer.restore()
    train(model, optimizer)
    checkpointer.close()


def test_weights_by_patterns_within_a_module_are_weights(run: str) -> None:
    """All parameters of it, though not by the module's own name."""
    begun(run)[0].close()
    model, optimizer = build()
    checkpointer = Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False)
    checkpointer.restore(only=("model/*weight", "model/*bias"))
    refused_step(model, optimizer)
    checkpointer.close()


def test_an_optimizer_without_a_state_is_none_to_miss(run: str) -> None:
    """Plain SGD: what was saved of it is no moment."""
    model, _ = build()
    optimizer = SGD(model.parameters(), 0.1)
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        checkpointer.restore()
        train(model, optimizer)
        checkpointer.save(1).converged(60)
    fresh = build()[0]
    guard.load(run, model=fresh)
    train(fresh, SGD(fresh.parameters(), 0.1))


def test_a_new_head_on_frozen_weights_is_no_fine_tuning_of_these(saved: Saved) -> None:
    """A probe: the loaded weights are frozen, or in the optimizer and frozen; the head is new."""
    model = build()[0]
    guard.load(saved.path, model=model)
    model.requires_grad_(False)
    model.add_module("head", nn.Linear(1, 1))
    optimizer = AdamW(model.parameters())
    train(model, optimizer)


def test_weights_that_are_loaded_after_a_first_start_bring_their_lineage(
    saved: Saved, run: str, warned: Callable[[], list[str]]
) -> None:
    """``restore()``, which gives 0, then ``guard.load``: in either order it is a fine-tuning."""
    model, optimizer = build()
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        assert checkpointer.restore() == 0
        guard.load(saved.path, model=model, lineage="sft")
        train(model, optimizer)
        checkpointer.save(1).converged(60)
    (stamp,) = stamps(run)
    assert (stamp.lineage, [fork.lineage for fork in stamp.forks]) == ("sft", ["sft"])
    model, optimizer = build()
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        assert checkpointer.restore() == 1
        train(model, optimizer)
        checkpointer.save(2).converged(60)
    assert {stamp.lineage for stamp in stamps(run)} == {"sft"}
    assert warned() == []


# --- what an error of a load says can be done ---------------------------------------------------

OPTIONS = {"step", "lineage", "correction", "onto", "pickle", "keep_live"}


def two(path: Path, **state: Any) -> str:
    """A run of one epoch, of whatever is given."""
    with Checkpointer(str(path), state) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1).converged(60)
    return str(path)


def others(saved: Saved, path: Path) -> dict[str, Callable[[], object]]:
    """Loads that are refused, each for its own reason."""
    model, optimizer = build()
    wide = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    sgd = SGD(model.parameters(), lr=0.1)
    apart = two(path / "apart", w=torch.rand(2))
    tied = torch.rand(4)
    halves = two(path / "halves", one=torch.rand(2), two=torch.rand(2))
    bare = two(path / "bare", model=model, optimizer=AdamW(model.parameters()))
    plain, moments = build()
    guard.load(saved.path, model=plain, step=2)
    borne, fresh = build()[0], build()
    guard.load(saved.path, model=borne, lineage="sft")
    return {
        "component": lambda: guard.load(saved.path, nothing=model),
        "no part": lambda: guard.load(saved.path, model=model, strict=False),
        "a pattern": lambda: guard.load(saved.path, model=model, only=("model/**",)),
        "state dict": lambda: guard.load(saved.path, optimizer=optimizer.state_dict()),
        "weights": lambda: guard.load(saved.path, model=model.state_dict()),
        "shape": lambda: guard.load(saved.path, model=wide),
        "kind": lambda: guard.load(saved.path, model=model, optimizer=sgd),
        "dtype": lambda: guard.load(apart, w=torch.zeros(2, dtype=torch.float64)),
        "memory": lambda: guard.load(halves, one=tied[:2], two=tied[1:3]),
        "step": lambda: guard.load(saved.path, model=model, step=9),
        "mixture": lambda: [plain, guard.load(saved.path, optimizer=moments, step=3)],
        "nameless": lambda: guard.load(saved.path, optimizer=fresh[1]),
        "borne": lambda: guard.load(two(path / "x", model=borne), model=model, lineage="main"),
        "run": lambda: guard.load(str(path / "none"), model=model),
        "momentless": lambda: guard.load(
            saved.path, model=fresh[0], lineage="x", correction=Rescale(3), onto=[fresh[1]]
        ),
        "saved without moments": lambda: guard.load(
            bare, model=fresh[0], optimizer=fresh[1], lineage="x", correction=Rescale(3)
        ),
        "optimizer": lambda: guard.load(
            saved.path, model=model, lineage="x", correction=Damp(2), onto=[RMSprop([tied])]
        ),
    }


REFUSED = [
    "component", "no part", "a pattern", "state dict", "weights", "shape", "kind", "dtype",
    "memory", "step", "mixture", "nameless", "borne", "run", "momentless",
    "saved without moments", "optimizer",
]  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_a_load_names_only_what_a_load_can_do(why: str, saved: Saved, tmp_path: Path) -> None:
    """Its options are not those of a restore: no remedy sends anybody to one that is not there."""
    deeds = others(saved, tmp_path)
    assert list(deeds) == REFUSED
    with pytest.raises((HandfastError, ValueError, TypeError)) as caught:
        deeds[why]()
    said = str(caught.value)
    assert not isinstance(caught.value, Poisoned)
    assert set(re.findall(r"\b([a-z_]+)=", said)) <= OPTIONS | set(GIVEN.get(why, ())), said
    assert "restore(" not in said
    assert "extra=" not in said


GIVEN = {
    "component": ["nothing"],
    "no part": ["strict"],
    "a pattern": ["only"],
    "state dict": ["optimizer"],
    "nameless": ["model", "optimizer"],
}
"""Names that the caller gave: said back, and no option."""


def test_moments_that_are_missing_are_said_before_anything_is_changed(
    saved: Saved, tmp_path: Path
) -> None:
    """Of an optimizer that is there, and of one that was saved without."""
    model, optimizer = build()
    bare = two(tmp_path / "bare", model=model, optimizer=optimizer)
    options: dict[str, Any] = {"model": model, "lineage": "x", "correction": Rescale(3)}
    before = whole(model, optimizer)
    for deed in (
        lambda: guard.load(saved.path, onto=[optimizer], **options),
        lambda: guard.load(bare, optimizer=optimizer, **options),
    ):
        with pytest.raises(ValueError, match="no moments to rescale"):
            deed()
    assert whole(model, optimizer) == before
    assert guard.origin(model) is guard.origin(optimizer) is None or "begun here" in str(
        guard.origin(model)
    )


def test_hyperparameters_may_stay_as_they_are(
    saved: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning of those that do not names an option, which a load has, too, and no restore."""
    for kept, rate in (((), 1e-2), (("lr",), 0.5)):
        model, optimizer = build()
        optimizer.param_groups[0]["lr"] = 0.5
        guard.load(saved.path, model=model, optimizer=optimizer, keep_live=kept)
        assert optimizer.param_groups[0]["lr"] == rate
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("saved hyperparameters replaced live ones (keep_live= reverses it): ")


def test_a_component_is_loaded_by_any_name_that_it_has(tmp_path: Path) -> None:
    """A slash in a name is none of a path."""
    path = two(tmp_path / "run", **{"a/b": torch.ones(3)})
    there = torch.zeros(3)
    guard.load(path, **{"a/b": there})
    assert torch.equal(there, torch.ones(3))


# --- a script that is started again, as it is ---------------------------------------------------


def script(
    run: str, steps: int, *, before: Callable[..., Any] = lambda *_: None, **options: Any
) -> tuple[int, str]:
    """Train from wherever it is until a step, saving each; gives where it began, and a digest."""
    model, optimizer = build()
    applied = Applied(optimizer)
    state = {"model": model, "optimizer": optimizer, "applied": applied}
    with Checkpointer(run, state, keep=Keep(newest=9), rng=False) as checkpointer:
        first = checkpointer.restore(**options)
        before(state)
        for number in range(first + 1, steps + 1):
            train(model, optimizer)
            checkpointer.save(number).converged(60)
    return first, whole(model, optimizer) + str(state["applied"].state_dict())


RESTORES: list[dict[str, Any]] = [
    {"lineage": "tune"},
    {"lineage": "tune", "only": ("model/**",)},
    {"lineage": "tune", "only": ("model/**",), "in_place": True},
    {"lineage": "tune", "only": ("model/**",), "keep_live": ("lr",), "strict": False},
]


@pytest.mark.parametrize("options", RESTORES, ids=str)
def test_a_restore_that_names_its_lineage_again_goes_on(
    options: dict[str, Any], tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    """To the bit as if it had not ended; what the lineage began with is no part of a resume."""
    straight, broken = str(tmp_path / "straight"), str(tmp_path / "broken")
    for run in (straight, broken):
        script(run, 3)
    _, expected = script(straight, 7, **options)
    assert script(broken, 5, **options)[0] == 3
    assert [line for line in warned() if "lineage" in line] == []
    assert script(broken, 7, **options) == (5, expected)
    said = [line for line in warned() if "lineage" in line]
    assert len(said) == ("only" in options)
    assert all("is of lineage tune already, which goes on whole: only=('model/**',)" in line
               for line in said)  # fmt: skip
    (stamp,) = stamps(broken)
    assert [fork.lineage for fork in stamp.forks] == ["tune"]


def test_weights_from_another_run_are_not_loaded_again(
    saved: Saved, run: str, tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    """``restore()``, then ``guard.load`` of what is fine-tuned: at a second start that is behind
    it."""

    def load(state: dict[str, Any]) -> None:
        loaded.append(guard.load(saved.path, model=state["model"], lineage="sft").index)

    loaded: list[Index] = []
    _, expected = script(str(tmp_path / "straight"), 4, before=load)
    assert script(run, 2, before=load)[0] == 0
    assert script(run, 4, before=load) == (2, expected)
    assert [fork.lineage for fork in stamps(run)[0].forks] == ["sft"]
    assert [(index.lineage, index.step) for index in loaded] == [
        ("main", 3),
        ("main", 3),
        ("sft", 2),
    ]
    assert warned() == []


@pytest.mark.parametrize("correction", [Reset(warmup=4), Damp(skew=4), Rescale(count=1)], ids=str)
def test_a_correction_is_not_applied_a_second_time(correction: Correction, tmp_path: Path) -> None:
    """Moments of step 1 for weights of step 3, once: what is left of the warm-up goes on."""
    straight, broken = str(tmp_path / "straight"), str(tmp_path / "broken")

    def mend(run: str, state: dict[str, Any]) -> None:
        optimizer = state["optimizer"]
        loaded = guard.load(
            run, optimizer=optimizer, step=1, lineage="mended", correction=correction
        )
        (state["applied"],) = loaded.applied

    for run in (straight, broken):
        script(run, 3)
    _, expected = script(straight, 7, before=partial(mend, straight))
    assert script(broken, 5, before=partial(mend, broken))[0] == 3
    assert script(broken, 7, before=partial(mend, broken)) == (5, expected)
    assert {fork.why for fork in stamps(broken)[0].forks} == {correction.describe()}
    assert [fork.step for fork in stamps(broken)[0].forks] == [1, 3]


def test_what_is_loaded_before_a_restore_that_undoes_it_is_warned_of(
    saved: Saved, run: str, warned: Callable[[], list[str]]
) -> None:
    """A script that was changed says another step, or another name: the run goes on as it was, and
    that is said. One that says what it said before is silent.
    """

    def start(to: int, step: int, lineage: str) -> list[str]:
        model, optimizer = build()
        guard.load(saved.path, model=model, step=step, lineage=lineage)
        with Checkpointer(run, {"model": model, "optimizer": optimizer}) as checkpointer:
            checkpointer.restore()
            train(model, optimizer)
            checkpointer.save(to).converged(60)
        return [line for line in warned() if "is undone by this restore" in line]

    assert start(1, 3, "sft") == []
    assert start(2, 3, "sft") == []
    (said,) = start(3, 2, "sft")
    assert "model of main 1/2" in said
    assert "did not begin with it (sft at main 1/3 of run" in said
    assert len(start(4, 3, "other")) == 1
    assert [(fork.lineage, fork.step) for fork in stamps(run)[0].forks] == [("sft", 3)]


def test_moments_are_loaded_with_or_after_the_module_that_names_them(saved: Saved) -> None:
    """Alone nobody knows whose they are: said so, rather than by differences."""
    model, optimizer = build()
    with pytest.raises(
        ValueError, match="optimizer: its state was saved by the names that its mod"
    ):
        guard.load(saved.path, optimizer=optimizer, step=3)
    assert not optimizer.state
    guard.load(saved.path, model=model, step=3)
    guard.load(saved.path, optimizer=optimizer, step=3)
    assert [guard.origin(part) is not None for part in (model, optimizer)] == [True, True]


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_left_of_a_correction_is_kept_from_the_first_or_warned_of(
    kept: bool, saved: Saved, run: str, tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    """Loads of two epochs after ``restore()``, said again at each start as they are: both are
    behind it then, and the warm-up goes on where it was, if it is in the state.
    """

    def mend(state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        guard.load(saved.path, model=model, step=3, lineage="fixed")
        loaded = guard.load(
            saved.path, optimizer=optimizer, step=1, lineage="fixed", correction=Damp(skew=6)
        )
        left.append(loaded.applied[0].left)

    def job(path: str, to: int) -> str:
        model, optimizer = build()
        state = {"model": model, "optimizer": optimizer}
        more = {"applied": guard.Applied(optimizer)} if kept else {}
        with Checkpointer(path, {**state, **more}, rng=False) as checkpointer:
            step = checkpointer.restore()
            mend(state)
            while step < to:
                step += 1
                train(model, optimizer)
                checkpointer.save(step).converged(60)
        return whole(model, optimizer)

    left: list[int] = []
    expected = job(str(tmp_path / "straight"), 4)
    job(run, 2)
    assert (job(run, 4) == expected) is kept
    assert left == [5, 5, 3 if kept else 0]
    said = [line for line in warned() if "is not in the state that is saved" in line]
    assert len(said) == (0 if kept else 2)
    (stamp,) = stamps(run)
    assert [(fork.step, fork.why) for fork in stamp.forks] == [
        (1, Damp(skew=6).describe()),
        (3, "guard.load of model"),
    ]


def test_what_a_lineage_began_with_must_be_the_same(saved: Saved, run: str, tmp_path: Path) -> None:
    """Another base, another step, another correction, or a part that is not of it: a new name."""
    other = Saved(str(tmp_path / "other")).path
    state: dict[str, Any] = {}

    def load(held: dict[str, Any]) -> None:
        guard.load(saved.path, model=held["model"], lineage="sft", step=3)
        state.update(held)

    script(run, 1, before=load)
    script(run, 1, before=load)
    parts: dict[str, Any] = {"model": state["model"], "lineage": "sft"}
    for deed in (
        lambda: guard.load(other, **parts),
        lambda: guard.load(saved.path, **parts, step=2),
        lambda: guard.load(saved.path, **parts, correction=Damp(1)),
    ):
        with pytest.raises(ValueError, match=r"began at main 1/3 of run .*guard\.load of model"):
            deed()


def test_a_part_that_is_not_saved_can_not_go_on(saved: Saved, run: str) -> None:
    """Moments that are loaded at each start, beside weights that are saved and restored."""

    def start() -> None:
        model, optimizer = build()
        with Checkpointer(run, {"model": model}, rng=False) as checkpointer:
            step = checkpointer.restore()
            guard.load(saved.path, model=model, optimizer=optimizer, lineage="sft")
            train(model, optimizer)
            checkpointer.save(step + 1).converged(60)

    start()
    with pytest.raises(ValueError, match="would begin it once more: load these parts from that"):
        start()


# --- what is stepped by nobody's optimizer ------------------------------------------------------


def halves() -> dict[str, nn.Module]:
    """Two components of one model."""
    torch.manual_seed(7)
    return {"body": nn.Linear(4, 4), "head": nn.Linear(4, 1)}


def by_hand(parts: dict[str, nn.Module]) -> None:
    """One update, by a loop of one's own."""
    loss = parts["head"](parts["body"](torch.ones(2, 4))).square().mean()
    weights = [p for part in parts.values() for p in part.parameters()]
    with torch.no_grad():
        for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.sub_(slope, alpha=0.1)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run of two steps of a model in two components."""
    path = str(tmp_path_factory.mktemp("halved") / "run")
    parts = halves()
    with Checkpointer(path, parts, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        for number in (1, 2):
            by_hand(parts)
            checkpointer.save(number).converged(60)
    yield path
    end_agents()


def test_weights_of_two_epochs_that_a_loop_steps_are_refused_at_the_save(
    halved: str, run: str
) -> None:
    """No step tells of it; what is saved would be a mixture, and is not, however often it is tried.

    Before anything is trained they may still be anything.
    """
    parts = halves()
    guard.load(halved, body=parts["body"], step=1)
    guard.load(halved, head=parts["head"], step=2)
    with Checkpointer(run, parts) as checkpointer:
        assert checkpointer.restore() == 0
        checkpointer.save(1).converged(60)
        by_hand(parts)
        for _ in range(2):
            error = refused(lambda: checkpointer.save(2), *parts.values())
            assert "this epoch would be a mixture" in str(error)
            assert [shard.split(" (")[0] for shard in error.shards] == [
                "body of main 1/1",
                "head of main 1/2",
            ]
        guard.load(halved, head=parts["head"], step=1)
        by_hand(parts)
        checkpointer.save(2).converged(60)
    assert [shard.stamp.step for shard in handfast.open(run).inspect().shards] == [2]


def test_parts_that_only_stand_beside_are_of_any_epoch(saved: Saved, halved: str, run: str) -> None:
    """A teacher of an earlier epoch, part of another run, or one that a lineage has named."""
    parts = halves()
    guard.load(halved, body=parts["body"], step=1)
    guard.load(halved, head=parts["head"], step=1)
    teacher, named = halves()["body"], halves()["head"]
    other, _ = build()
    guard.load(halved, body=teacher, step=2)
    guard.load(halved, head=named, step=2, lineage="average")
    guard.load(saved.path, model=other, step=2)
    state = {**parts, "teacher": teacher, "named": named, "other": other}
    with Checkpointer(run, state) as checkpointer:
        checkpointer.restore()
        by_hand(parts)
        with torch.no_grad():
            for part in (named, other):
                for weight in part.parameters():
                    weight.mul_(0.9)
        checkpointer.save(1).converged(60)


def test_two_networks_of_two_epochs_are_refused_at_the_save(run: str) -> None:
    """A generator that goes back without what it was trained against, each with its optimizer."""

    def pairs() -> dict[str, Any]:
        g, d = build(), build()
        return {"g": g[0], "of_g": g[1], "d": d[0], "of_d": d[1]}

    def both(state: dict[str, Any]) -> None:
        train(state["g"], state["of_g"])
        train(state["d"], state["of_d"])

    with Checkpointer(run, state := pairs(), rng=False, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        for number in (1, 2):
            both(state)
            checkpointer.save(number).converged(60)
    with Checkpointer(run, state := pairs(), rng=False, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        guard.load(run, g=state["g"], of_g=state["of_g"], step=1)
        both(state)
        with pytest.raises(Refused, match="this epoch would be a mixture"):
            checkpointer.save(3)
        checkpointer.restore()
        guard.load(run, g=state["g"], of_g=state["of_g"], step=1, lineage="behind")
        both(state)
        checkpointer.save(3).converged(60)


# --- modules of which a part comes --------------------------------------------------------------

HALF = ("model/0.*", "optimizer/**")


@pytest.mark.parametrize("how", ["whole", "by hand", "its rest alone", "trained"])
def test_a_part_of_a_module_is_of_the_epoch_of_the_rest(how: str, saved: Saved, run: str) -> None:
    """However the rest has come, and whether it has moved: before anything is changed."""
    shutil.copytree(saved.path, run)
    model, optimizer = build()
    options: dict[str, Any] = {"step": 1, "only": HALF}
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        if how == "by hand":
            guard.load(saved.path, model=model, optimizer=optimizer)
        elif how == "its rest alone":
            checkpointer.restore(only=("model/1.*", "model/2.*"))
        else:
            checkpointer.restore()
        if how == "trained":
            train(model, optimizer)
            options["step"] = 3
        error = refused(lambda: checkpointer.restore(**options), model, optimizer)
        assert "what this restore would leave would be a mixture" in str(error)
        assert error.shards[1].startswith("model of main 1/3")
        checkpointer.restore(step=1)
        train(model, optimizer)
        assert whole(model, optimizer) == saved.digests[2]


def test_a_part_of_a_module_is_refused_in_place_as_well(saved: Saved, run: str) -> None:
    """The live state was read over then, as it is said that it may be; a whole restore mends it."""
    shutil.copytree(saved.path, run)
    checkpointer, model, optimizer = begin(run)
    with pytest.raises(Refused, match="what this restore would leave"):
        checkpointer.restore(step=1, only=HALF, in_place=True)
    with pytest.raises(Poisoned):
        checkpointer.save(4)
    checkpointer.restore(in_place=True)
    train(model, optimizer)
    assert whole(model, optimizer) == saved.digests[4]
    checkpointer.close()


def test_parts_of_a_module_come_one_after_the_other(
    saved: Saved, run: str, warned: Callable[[], list[str]]
) -> None:
    """Of one epoch they are what it was; what is frozen is of any; and a lineage may mix weights,
    with both where it began."""
    shutil.copytree(saved.path, run)
    model, optimizer = build()
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        checkpointer.restore(only=("model/0.*",))
        checkpointer.restore(only=("model/1.*", "model/2.*", "optimizer/**"))
        train(model, optimizer)
        assert whole(model, optimizer) == saved.digests[4]
    model, optimizer = build()
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        checkpointer.restore(only=("model/0.*", "model/1.*", "model/2.bias"))
        model[2].weight.requires_grad_(False)
        checkpointer.restore(step=1, only=("model/2.bias",), lineage="other")
        model[2].weight.requires_grad_(True)
        train(model, optimizer)
        checkpointer.save(4).converged(60)
    assert [(f.lineage, f.step) for f in stamps(run)[0].forks] == [("other", 1), ("other", 3)]
    assert warned() == []


@pytest.mark.parametrize("only", [HALF, ("model/*weight", "optimizer/**")], ids=str)
def test_moments_without_all_of_their_weights_are_refused(
    only: tuple[str, ...], saved: Saved, run: str
) -> None:
    """In a fresh process, whose weights are of no epoch at all."""
    shutil.copytree(saved.path, run)
    checkpointer, model, optimizer = begin(run, only=only)
    assert "moments without the weights" in refused_step(model, optimizer)
    checkpointer.restore()
    train(model, optimizer)
    checkpointer.close()


# --- an optimizer that is not the one that was saved --------------------------------------------


@pytest.mark.parametrize("how", ["new", "of the head", "cleared"])
def test_moments_that_are_lost_after_a_restore_are_missed(how: str, saved: Saved, run: str) -> None:
    """The optimizer is made anew, and the state holds the old one; or it is emptied."""
    shutil.copytree(saved.path, run)
    checkpointer, model, optimizer = begin(run)
    stepped = {
        "new": AdamW(model.parameters()),
        "of the head": AdamW(model[2].parameters()),
        "cleared": optimizer,
    }[how]
    if how == "cleared":
        optimizer.state.clear()
    assert "without the optimizer state that was saved" in refused_step(model, stepped)
    checkpointer.restore()
    train(model, optimizer)
    if how != "cleared":
        train(model, stepped)  # a second phase
    checkpointer.close()


def test_moments_may_be_begun_anew_where_that_is_said(saved: Saved, run: str) -> None:
    """By a correction, or by a lineage; and by whoever has none to lose."""
    shutil.copytree(saved.path, run)
    checkpointer, model, optimizer = begin(run)
    Reset(warmup=2).apply(optimizer)
    train(model, optimizer)
    checkpointer.restore()
    train(model, SGD(model.parameters(), 1e-3), optimizer)
    checkpointer.save(4).converged(60)
    checkpointer.restore(lineage="second")
    new = AdamW(model.parameters())
    train(model, new)
    for _ in range(2):
        error = refused(lambda: checkpointer.save(5), model, optimizer)
        assert "weights that were stepped, and moments that were not" in str(error)
        assert error.shards[0].startswith("optimizer of main")
    train(model, optimizer)
    checkpointer.save(5).converged(60)
    checkpointer.close()


@pytest.mark.parametrize("how", ["restored", "loaded", "its own"])
def test_a_reset_begins_a_lineage_with_weights_as_they_came(
    how: str, saved: Saved, run: str, warned: Callable[[], list[str]]
) -> None:
    """An optimizer that is made anew over them, or the one that came: the next save says so.

    What came with them goes on, too; and not to have said so stays refused.
    """
    model, optimizer = build()
    if how == "loaded":
        guard.load(saved.path, model=model)
    else:
        shutil.copytree(saved.path, run)
        with Checkpointer(run, {"model": model, "optimizer": optimizer}) as checkpointer:
            checkpointer.restore()
    new = optimizer if how == "its own" else AdamW(model.parameters())
    if how != "its own":
        said = refused_step(model, new)
        assert "begun anew, by guard.Reset(warmup=...).apply(optimizer)" in said
    left = guard.Reset(warmup=2).apply(new)
    train(model, new)
    state = {"model": model, "optimizer": new, "left": left}
    with Checkpointer(f"{run}-on", state, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        for step in (1, 2):
            checkpointer.save(step).converged(60)
            train(model, new)
    of = stamps(saved.path)[0].run
    why = "heuristic: moments begun anew, learning rate warmed up over 2 steps"
    for step in (1, 2):
        (stamp,) = stamps(f"{run}-on", step)
        assert stamp.lineage == "reset-1/3"
        assert stamp.forks == (Fork("reset-1/3", of, "main", 1, 3, why),)
    if how == "restored":
        came = guard.origin(optimizer)
        assert came is not None
        assert came.history.lineage == "reset-1/3"
    assert warned() == []


def test_a_reset_over_weights_of_two_epochs_is_refused(saved: Saved) -> None:
    """They would go on together, and none of them has said so; nothing has changed."""
    models = [build()[0], build()[0]]
    for step, model in enumerate(models, 2):
        guard.load(saved.path, model=model, step=step)
    new = AdamW([p for model in models for p in model.parameters()])
    error = refused(lambda: Reset(warmup=2).apply(new), *models, new)
    assert "what would go on together would be a mixture" in str(error)
    assert "main 1/2" in error.shards[0]


def test_a_reset_after_what_was_loaded_has_moved_begins_nothing(saved: Saved, run: str) -> None:
    """They are of no epoch any more, and it is the training that goes on so."""
    shutil.copytree(saved.path, run)
    checkpointer, model, optimizer = begin(run)
    train(model, optimizer)
    Reset(warmup=2).apply(optimizer)
    train(model, optimizer)
    checkpointer.save(4).converged(60)
    checkpointer.close()
    (stamp,) = stamps(run)
    assert (stamp.lineage, stamp.forks) == ("main", ())


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_phase_is_begun_in_one_process_or_in_two(
    killed: bool, run: str, tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    """Where it begins in a process that only restored the first, a lineage has to say so."""
    other = str(tmp_path / "second")
    checkpointer, model, optimizer = begun(run)
    checkpointer.close()
    if killed:
        checkpointer, model, _ = begin(run)
        checkpointer.close()
        optimizer = AdamW(model.parameters())
        state = {"model": model, "optimizer": optimizer}
        with Checkpointer(other, state, rng=False) as checkpointer:
            checkpointer.restore()
            refused_step(model, optimizer)
    optimizer = AdamW(model.parameters())
    with Checkpointer(other, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        assert checkpointer.restore(lineage="second") == 0
        train(model, optimizer)
        checkpointer.save(1).converged(60)
    (stamp,) = stamps(other)
    assert stamp.lineage == "second"
    assert warned() == []


def test_phases_of_one_state_are_resumed(run: str, warned: Callable[[], list[str]]) -> None:
    """Two optimizers of the same weights in one state, of which the first is done; a new one that
    had not begun at the save has nothing to miss."""

    def state() -> dict[str, Any]:
        model, optimizer = build()
        return {"model": model, "first": optimizer, "second": AdamW(model.parameters(), lr=1e-3)}

    for steps in ((1, 2), (3, 4), (5, 6)):
        held = state()
        with Checkpointer(run, held, rng=False) as checkpointer:
            checkpointer.restore()
            for number in steps:
                train(held["model"], held["first" if number < 3 else "second"])
                checkpointer.save(number).converged(60)
    assert warned() == []


# --- a lineage that begins with several epochs --------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["restored first", "loaded first"])
@pytest.mark.parametrize("epochs", ["two runs", "one run"])
def test_weights_of_several_epochs_begin_one_lineage(
    first: bool, epochs: str, saved: Saved, halved: str, run: str,
    tmp_path: Path, warned: Callable[[], list[str]],
) -> None:  # fmt: skip
    """Weights of two runs, or of two epochs of one, with one new optimizer: each has its fork."""
    loads: list[tuple[str, str, int]] = [(halved, "body", 1), (halved, "head", 2)]
    if epochs == "two runs":
        loads[1] = (Saved(str(tmp_path / "other")).path, "model", 3)

    def start(steps: range) -> str:
        parts: dict[str, Any] = {"body": halves()["body"]}
        parts |= {"model": build()[0]} if epochs == "two runs" else {"head": halves()["head"]}
        weights = [p for part in parts.values() for p in part.parameters()]
        optimizer = AdamW(weights, lr=1e-2)
        with Checkpointer(run, {**parts, "optimizer": optimizer}, rng=False) as checkpointer:
            if first:
                checkpointer.restore()
            for path, part, step in loads:
                guard.load(path, **{part: parts[part]}, step=step, lineage="both")
            if not first:
                checkpointer.restore()
            for number in steps:
                sum((p.square().sum() for p in weights), torch.zeros(())).backward()
                optimizer.step()
                optimizer.zero_grad()
                checkpointer.save(number).converged(60)
        return whole(*parts.values())

    start(range(1, 3))
    start(range(3, 5))
    (stamp,) = stamps(run)
    assert stamp.lineage == "both"
    assert [(f.lineage, f.run, f.step, f.why) for f in stamp.forks] == [
        ("both", stamps(path)[0].run, step, f"guard.load of {part}") for path, part, step in loads
    ]
    assert warned() == []


def test_memory_that_two_modules_share_is_of_one_epoch(saved: Saved, run: str) -> None:
    """What is loaded into the other is in this one: refused, though no parameter is the same."""
    shutil.copytree(saved.path, run)
    checkpointer, model, optimizer = begin(run)
    twin = build()[0]
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.data = mine.data
    error = refused(lambda: guard.load(saved.path, model=twin, step=1), model, optimizer)
    assert error.verdict is Verdict.MIXED
    checkpointer.close()


def test_layers_are_swapped_one_by_one(run: str, warned: Callable[[], list[str]]) -> None:
    """For an evaluation, by themselves or in another box of them: it goes on as if nothing was."""
    checkpointer, model, optimizer = begin(run)
    for number in (1, 2):
        train(model, optimizer)
        for parts in ([*model], [nn.ModuleList([model[0], model[2]])]):
            kept = [{k: t.clone() for k, t in part.state_dict().items()} for part in parts]
            for part in parts:
                part.load_state_dict({k: t + 1 for k, t in part.state_dict().items()})
            for part, held in zip(parts, kept, strict=True):
                part.load_state_dict(held)
        checkpointer.save(number).converged(60)
    assert warned() == []
    checkpointer.close()


def base_of_two(job: Job, path: str) -> None:
    """Let two ranks save two epochs that others may load from."""
    job.all(deeds.resume, path, "fsdp")
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    job.all(deeds.close)


def load_by_hand(job: Job, path: str, steps: Sequence[int], **options: Any) -> None:
    """Let ranks load, each of a step."""
    for rank, step in enumerate(steps):
        job[rank].tell(guarding.load, path, ("model", "optimizer"), step=step, **options)
    assert [job[rank].hear() for rank in range(len(steps))] == [f"1/{step}" for step in steps]


def assert_restore_is_mixed(job: Job, why: str, **options: Any) -> None:
    """Each rank is refused, and hears why."""
    for trainer in job:
        trainer.tell(deeds.restore, **options)
    for trainer in job:
        error = raised_by(trainer)
        assert isinstance(error, Refused)
        assert error.verdict is Verdict.MIXED
        assert why in str(error)


@pytest.mark.parametrize("lineage", ["", "sft"])
def test_what_ranks_have_loaded_from_different_epochs_never_converges(
    lineage: str, launch: Launch, tmp_path: Path
) -> None:
    """No rank asks another when it loads or saves: the first one's agent hears what all stamps say
    before it votes. Each rank is told, and nothing is left to resume from.
    """
    path, run = str(tmp_path / "base"), str(tmp_path / "run")
    job = launch(2)
    base_of_two(job, path)
    job.all(deeds.resume, run, "fsdp")
    load_by_hand(job, path, (2, 1), lineage=lineage)
    job.all(deeds.train, 1)
    for trainer in job:
        trainer.tell(deeds.converged)
    for trainer in job:
        error = raised_by(trainer)
        assert isinstance(error, SaveFailed)
        assert "the ranks have loaded parts of different epochs: " in str(error)
        assert "on rank 0 against 1/1" in str(error)
    assert handfast.open(run).status().line == GENESIS


def test_a_rank_that_loads_by_itself_is_stopped_once_that_is_saved(
    launch: Launch, tmp_path: Path
) -> None:
    """Nobody had to wait for its word. The epoch is a mixture to everybody who looks, no restore
    goes on with it, and what was saved before is there.
    """
    path, run = str(tmp_path / "base"), str(tmp_path / "run")
    job = launch(2)
    base_of_two(job, path)
    job.all(deeds.resume, run, "fsdp")
    load_by_hand(job, path, (2, 2))
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job[1].tell(guarding.load, path, ("model", "optimizer"), step=1)
    assert job[1].hear() == "1/1"
    job.all(deeds.save, 2)
    job.all(deeds.converged)
    eventually(lambda: bool(job[0].do(guarding.histories)))
    job[0].tell(deeds.call, "check_for_errors")
    error = raised_by(job[0])
    assert isinstance(error, SaveFailed)
    assert "on rank 0 against 1/1" in str(error)
    before = job.all(deeds.digest)
    assert_restore_is_mixed(job, "epoch 1/2, which all were to restore, is a mixture")
    assert job.all(deeds.digest) == before
    assert_restore_is_mixed(job, "is a mixture", in_place=True)  # it has been read by then
    job[0].tell(deeds.save, 3)
    assert isinstance(raised_by(job[0]), Poisoned)
    opened = handfast.open(run)
    assert opened.inspect(2).verdict is Verdict.MIXED
    assert not opened.status().sound
    assert [f.verdict for f in opened.verify(2).findings] == [Verdict.MIXED]
    with pytest.raises(Refused, match="mixed: the ranks of epoch 1/2 had loaded parts of it"):
        opened.export(tmp_path / "weights.safetensors", 2)
    shown = CliRunner().invoke(app, ["verify", run])
    assert shown.exit_code == 1
    assert "a restore would come to 1/2, and refuse it" in shown.output
    assert job.all(deeds.restore, step=1) == [1, 1]
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    job.all(deeds.close)
    assert handfast.open(run).inspect().verdict is Verdict.COMPLETE


def sft_on_rank_0(job: Job, path: str, run: str, start: int) -> list[list[str]]:
    """A start of the common idiom: rank 0 loads for all, DDP broadcasts; gives the warnings."""
    job.all(deeds.build, "ddp")
    job[0].tell(guarding.load, path, ("model",), step=2, lineage="sft")
    job[0].hear()
    job.all(deeds.attach, run)
    assert job.all(deeds.restore) == [start, start]
    job.all(deeds.train, start + 1)
    job.all(deeds.converged)
    job.all(deeds.train, start + 2)
    job.all(deeds.converged)
    job.all(deeds.close)
    return [[w for w in said if "one history" in w] for said in job.all(deeds.warnings)]


def test_what_one_rank_has_loaded_for_all_goes_on_for_ever(launch: Launch, tmp_path: Path) -> None:
    """Their lineages differ, which is warned of at each start, and their epochs do not: nothing is
    ever called a mixture.
    """
    path, run = str(tmp_path / "base"), str(tmp_path / "run")
    job = launch(2)
    job.all(deeds.resume, path, "ddp")
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    job.all(deeds.close)
    for start in (0, 2, 4):
        first, second = sft_on_rank_0(job, path, run, start)
        assert first
        assert second == []
    opened = handfast.open(run)
    assert opened.status().sound
    assert {stamp.lineage for stamp in stamps(run)} == {"sft", "main"}


def test_ranks_that_bring_different_epochs_to_a_first_start_are_refused(
    launch: Launch, tmp_path: Path
) -> None:
    """Each has loaded by hand before they met; both hear of both; it goes once both load one."""
    path = str(tmp_path / "base")
    job = launch(2)
    base_of_two(job, path)
    job.all(deeds.build, "fsdp")
    load_by_hand(job, path, (2, 1), lineage="sft")
    job.all(deeds.attach, str(tmp_path / "run"))
    assert_restore_is_mixed(
        job, "what the ranks bring is a mixture [guard.load of model, optimizer "
    )
    load_by_hand(job, path, (2, 2), lineage="sft")
    assert job.all(deeds.restore) == [0, 0]
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.all(deeds.close)
    assert handfast.open(tmp_path / "run").inspect(1).verdict is Verdict.COMPLETE


def test_what_one_rank_has_saved_each_of_several_can_load(launch: Launch, tmp_path: Path) -> None:
    """An adopted run, say, that is fine-tuned by DDP: of one lineage on all ranks."""
    path, run = str(tmp_path / "base"), str(tmp_path / "run")
    alone = launch(1)
    alone.all(deeds.resume, path)
    alone.all(deeds.train, 1)
    alone.all(deeds.converged)
    alone.all(deeds.close)
    job = launch(2)
    job.all(deeds.build, "ddp")
    for trainer in job:
        trainer.tell(guarding.load, path, ("model",), step=1, lineage="sft")
    assert [trainer.hear() for trainer in job] == ["1/1", "1/1"]
    job.all(deeds.attach, run)
    job.all(deeds.restore)
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.all(deeds.close)
    assert [line for lines in job.all(deeds.warnings) for line in lines] == []
    assert {(s.lineage, s.forks[0].step, s.came[0].path) for s in stamps(run)} == {
        ("sft", 1, "model")
    }


def test_a_rank_that_has_loaded_alone_is_told_of(launch: Launch, tmp_path: Path) -> None:
    """For all, perhaps, and DDP broadcasts it: that is no mixture, and the stamps do not say so."""
    path = str(tmp_path / "base")
    job = launch(2)
    base_of_two(job, path)
    job.all(deeds.build, "fsdp")
    load_by_hand(job, path, (2,), lineage="sft")
    job.all(deeds.attach, str(tmp_path / "run"))
    job.all(deeds.restore)
    (said,) = (line for line in job.all(deeds.warnings)[0] if "one history" in line)
    assert "in what they bring: rank 0: sft (guard.load of model, optimizer of" in said
    assert "; rank 1: nothing known. Where" in said
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    eventually(lambda: bool(job[0].do(guarding.histories)))
    job.all(deeds.train, 2)
    said = [line for line in job.all(deeds.warnings)[0] if "one history in what is saved" in line]
    assert len(said) == 1
    job.all(deeds.converged)
    job.all(deeds.close)
    assert handfast.open(tmp_path / "run").inspect(2).verdict is Verdict.COMPLETE


# --- parts inside of parts ----------------------------------------------------------------------


def encoder(width: int = 4) -> nn.Sequential:
    """What was pretrained in a run of :class:`Saved`."""
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(4), nn.Linear(4, 1))


def grow(saved: Saved, run: str, steps: int, when: str, towers: int = 1) -> str:
    """Fine-tune a model that a pretrained encoder was put into, or two; gives a digest."""
    torch.manual_seed(3)
    parts = [encoder() for _ in range(towers)]
    model = nn.Sequential(nn.Sequential(*parts[:1]), nn.Linear(1, 4), *parts[1:])
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def load() -> None:
        for number, part in enumerate(parts):
            guard.load(saved.path, model=part, lineage="clf", step=3 - number)

    if when == "before":
        load()
    with Checkpointer(run, {"model": model, "optimizer": optimizer}, rng=False) as checkpointer:
        first = checkpointer.restore()
        if when == "after":
            load()
        for number in range(first + 1, steps + 1):
            train(model, optimizer)
            checkpointer.save(number).converged(60)
    assert all(came and came.history.lineage == "clf" for came in map(guard.origin, parts))
    return whole(model, optimizer)


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pretrained_part_of_a_larger_model_is_restored_with_it(
    when: str, towers: int, saved: Saved, tmp_path: Path, warned: Callable[[], list[str]]
) -> None:
    """Weights are loaded into a part, before ``restore()`` or after it; the script is started
    again as it is, and goes on to the bit: what came last is the whole.
    """
    run = str(tmp_path / "run")
    expected = grow(saved, str(tmp_path / "straight"), 4, when, towers)
    grow(saved, run, 2, when, towers)
    assert grow(saved, run, 4, when, towers) == expected
    assert warned() == []


def test_a_part_goes_back_with_the_whole(saved: Saved, run: str) -> None:
    """In the process that began: after a spike all of it is of the earlier epoch."""
    part = encoder()
    guard.load(saved.path, model=part, lineage="clf")
    model = nn.Sequential(part, nn.Linear(1, 4))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(run, state, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        for number in (1, 2, 3):
            train(model, optimizer)
            checkpointer.save(number).converged(60)
        checkpointer.restore(step=2)
        came = guard.origin(part)
        assert came is not None
        assert (came.index.lineage, came.index.step) == ("clf", 2)
        train(model, optimizer)
        checkpointer.save(3).converged(60)
    with pytest.raises(Refused, match="is of lineage clf"):
        guard.of(guard.Lineage, part)


class Adapted(nn.Module):
    """A layer with an adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.low = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.low(x)
        return out


@pytest.mark.parametrize("lineage", ["", "tuned"])
@pytest.mark.parametrize("kind", ["adapters", "box", "head"])
def test_a_frozen_base_counts_for_nothing(
    kind: str, lineage: str, saved: Saved, run: str, warned: Callable[[], list[str]]
) -> None:
    """Only what is trained is saved; the base that holds it is loaded at each start, beside it."""

    def start(steps: int) -> int:
        base = encoder()
        guard.load(saved.path, model=base, lineage=lineage)
        base.requires_grad_(False)
        base[2] = nn.Linear(4, 3) if kind == "head" else Adapted(base[2])
        kept: Any = base[2] if kind == "head" else base[2].low
        if kind == "box":
            kept = dict(kept.named_parameters())
        optimizer = AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2)
        with Checkpointer(run, {"kept": kept, "optimizer": optimizer}) as checkpointer:
            first = checkpointer.restore()
            for number in range(first + 1, steps + 1):
                train(base, optimizer)
                checkpointer.save(number).converged(60)
        base.requires_grad_(True)
        optimizer.add_param_group({"params": list(base[0].parameters())})
        if lineage and first:
            assert "would be a mixture" in refused_step(base, optimizer)
        return first

    assert (start(2), start(4), start(5)) == (0, 2, 4)
    assert warned() == []


# --- what goes back in the process that began the run -------------------------------------------


@pytest.mark.parametrize("how", ["restore", "load"])
@pytest.mark.parametrize("kind", ["against", "average"])
def test_half_of_a_state_does_not_go_back_where_it_began(kind: str, how: str, run: str) -> None:
    """A generator goes back without what it is trained against, or without its average, which has
    gone on since: that is no epoch, as it is none in a process that has resumed.
    """
    (model, optimizer), (other, own) = build(), build()
    state: dict[str, Any] = {"g": model, "og": optimizer}
    average = torch.optim.swa_utils.AveragedModel(model)
    state |= {"d": other, "od": own} if kind == "against" else {"average": average}

    def update() -> None:
        train(model, optimizer)
        if kind == "against":
            train(other, own)
        else:
            average.update_parameters(model)

    with Checkpointer(run, state, keep=Keep(newest=9)) as checkpointer:
        checkpointer.restore()
        for number in (1, 2):
            update()
            checkpointer.save(number).converged(60)
        if how == "restore":
            checkpointer.restore(step=1, only=("g/**", "og/**"))
        else:
            guard.load(run, step=1, g=model, og=optimizer)
        train(model, optimizer)
        checkpointer.save(3).converged(60)  # the other stands still, as a teacher may
        update()
        with pytest.raises(Refused, match="this epoch would be a mixture"):
            checkpointer.save(4)


@pytest.mark.parametrize(
    ("resumed", "back"), [(False, 1), (True, 2), (True, 1)], ids=["began", "to there", "resumed"]
)
def test_a_half_that_a_loop_has_changed_is_not_of_the_epoch(
    resumed: bool, back: int, run: str
) -> None:
    """No optimizer tells that it moved; versions of its parameters do."""
    model = nn.Sequential(*halves().values())
    parts = {"body": model[0], "head": model[1]}
    for start in range(1 + resumed):
        with Checkpointer(run, {"model": model}, keep=Keep(newest=9)) as checkpointer:
            first = checkpointer.restore()
            for number in (first + 1, first + 2):
                by_hand(parts)
                checkpointer.save(number).converged(60)
            if start == resumed:
                error = refused(lambda: checkpointer.restore(step=back, only=("model/0.*",)), model)
                assert "what this restore would leave would be a mixture" in str(error)


# --- what thaws ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "group"])
@pytest.mark.parametrize("lineage", ["", "sft"])
def test_what_thaws_is_asked_after_when_it_is_stepped_first(
    how: str, lineage: str, saved: Saved, run: str, warned: Callable[[], list[str]]
) -> None:
    """A new head on a frozen base is no fine-tuning; it is from when the base is stepped."""
    model = encoder()
    guard.load(saved.path, model=model, lineage=lineage)
    model[2] = nn.Linear(4, 2)
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    optimizer = AdamW(model.parameters() if how == "flag" else model[2].parameters(), lr=1e-2)
    with Checkpointer(run, {"model": model, "optimizer": optimizer}) as checkpointer:
        checkpointer.restore()
        for number in (1, 2):
            train(model, optimizer)
            checkpointer.save(number).converged(60)
        model[0].requires_grad_(True)
        if how == "group":
            optimizer.add_param_group({"params": list(model[0].parameters())})
        if lineage:
            train(model, optimizer)
            checkpointer.save(3).converged(60)
        else:
            assert "without the optimizer state that was saved" in refused_step(model, optimizer)
    assert warned() == []


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_frozen_stays_of_its_own_epoch(trained: bool, saved: Saved, run: str) -> None:
    """The rest goes back: its moments of that epoch are not for it. Where it was trained since it
    was loaded, or is an average in the model that no optimizer steps, it does not stay.
    """
    shutil.copytree(saved.path, run)
    checkpointer, model, optimizer = begin(run)
    with checkpointer:
        if trained:
            train(model, optimizer)
        model[0].requires_grad_(False)
        only = ("model/1.*", "model/2.*", "optimizer/**")
        if trained:
            error = refused(lambda: checkpointer.restore(step=1, only=only), model, optimizer)
            assert "what this restore would leave would be a mixture" in str(error)
            return
        checkpointer.restore(step=1, only=only)
        train(model, optimizer)
        checkpointer.save(2).converged(60)
        model[0].requires_grad_(True)
        assert "without the weights that they had" in refused_step(model, optimizer)


@pytest.mark.parametrize("began", [True, False])
def test_old_moments_in_a_new_optimizer_are_warned_of_whenever_they_come(
    began: bool, saved: Saved, run: str, warned: Callable[[], list[str]]
) -> None:
    """Not only at the first step after a restore; one that is made anew, and empty, is not."""
    if not began:
        shutil.copytree(saved.path, run)
    model, optimizer = build()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with Checkpointer(run, state) as checkpointer:
        number = checkpointer.restore()
        train(model, optimizer)
        old = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer)
        state["optimizer"] = AdamW(model.parameters(), lr=1e-2)
        train(model, state["optimizer"])
        checkpointer.save(number + 3).converged(60)
        assert warned() == []
        state["optimizer"] = AdamW(model.parameters(), lr=1e-2)
        state["optimizer"].load_state_dict(old)
        train(model, state["optimizer"])
        assert ["moments of no known epoch" in line for line in warned()] == [True]
        train(model, state["optimizer"])
    assert warned() == []


class Several(Optimizer):
    """Steps others, and has no state of its own."""

    def __init__(self, *inner: Optimizer, boxed: bool) -> None:
        self.inner: Any = {str(n): one for n, one in enumerate(inner)} if boxed else list(inner)
        super().__init__(
            [p for one in inner for group in one.param_groups for p in group["params"]], {}
        )

    def step(self, closure: Any = None) -> None:
        """All of them."""
        for one in self.inner.values() if isinstance(self.inner, dict) else self.inner:
            one.step()


@pytest.mark.parametrize("boxed", [True, False])
def test_what_steps_the_optimizers_that_are_saved_may_be_an_optimizer(
    boxed: bool, run: str
) -> None:
    """A wrapper in the training, its inner ones in the state, as ``ZeroRedundancyOptimizer.optim``
    is: these are asked, when it steps them.
    """
    for start in (0, 2, 4):
        model, _ = build()
        own = list(model.parameters())
        inner = [SGD(own[:2], lr=0.1, momentum=0.9), AdamW(own[2:])]
        outer = Several(*inner, boxed=boxed)
        with Checkpointer(run, {"model": model, "inner": inner}) as checkpointer:
            assert checkpointer.restore() == start
            for step in (start + 1, start + 2):
                train(model, outer)
                checkpointer.save(step).converged(60)
    model, _ = build()
    guard.load(run, model=model, step=6)
    with pytest.raises(Refused, match="without the optimizer state"):
        train(model, Several(AdamW(model.parameters()), boxed=boxed))


def test_moments_that_are_begun_anew_at_each_start_are_warned_of(
    run: str, warned: Callable[[], list[str]]
) -> None:
    """The script says ``Reset`` at each start, and never gets beyond the warm-up; once is fine."""

    def start(*, reset: bool) -> list[str]:
        model, optimizer = build()
        applied = guard.Applied(optimizer)
        state = {"model": model, "optimizer": optimizer, "applied": applied}
        with Checkpointer(run, state) as checkpointer:
            step = checkpointer.restore()
            if reset:
                Reset(warmup=2).apply(optimizer)
            train(model, optimizer)
            checkpointer.save(step + 1).converged(60)
        return [line for line in warned() if "are begun anew" in line]

    assert [start(reset=reset) for reset in (False, True, False)] == [[], [], []]
    (said,) = start(reset=True)
    assert "over epoch 3/3, whose lineage reset-1/1 began with that already" in said
