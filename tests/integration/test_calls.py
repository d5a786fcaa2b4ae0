"""Shows what each call of a Checkpointer does and refuses, in one process that is never killed."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import traceback
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trainers import HeldAgent, agents, eventually
from training import Training, digest

import handfast
from handfast import Epoch, Keep, Lattice
from handfast.agent.domain import OUTCOMES
from handfast.agent.snapshot import Proposal
from handfast.checkpoint import images as images_module
from handfast.checkpoint import staging
from handfast.checkpoint.connection import Connection
from handfast.checkpoint.session import Session
from handfast.core.lattice import GENESIS
from handfast.errors import Blocked, HandfastError, Poisoned, Refused, SaveFailed, Unstorable
from handfast.torch import Checkpointer, load

PATIENT: dict[str, Any] = {"patience_s": 30.0}


def begun(run: str, training: Training | None = None, **options: Any) -> Checkpointer:
    """A Checkpointer that has restored."""
    state = (training or Training()).state()
    ckpt = Checkpointer(run, state, **PATIENT, **options)
    ckpt.restore()
    return ckpt


def trained(run: str, *steps: int, **options: Any) -> Training:
    """A run that was trained, saved at some steps, and closed."""
    training = Training(**options)
    with begun(run, training, keep=Keep(newest=9)) as ckpt:
        for step in range(1, max(steps) + 1):
            training.step()
            if step in steps:
                ckpt.save(step)
    return training


# --- memory -----------------------------------------------------------------------------------


def memories() -> dict[int, int]:
    """Bytes of each image that this process or its agents hold, by its inode."""
    found = {}
    for pid in (os.getpid(), *agents()):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            if os.path.exists(path) and os.readlink(path).startswith("/memfd:handfast"):
                at = os.stat(path)
                found[at.st_ino] = at.st_blocks * 512
    return found


@pytest.mark.parametrize("images", [1, 2])
def test_a_training_costs_its_state_once_an_image_and_a_restore_nothing(
    images: int, run: str
) -> None:
    """Shared by trainer and agent: saves take no more than was asked for, and a restore none."""
    size = 4 << 20
    state = {"model": torch.zeros(size // 4)}
    most = images * size * 1.02  # names and random streams are in an image, too
    others = memories()  # of a test before, that was not ended yet

    def taken() -> int:
        return sum(many for image, many in memories().items() if image not in others)

    with begun_with(run, state, images=images) as ckpt:
        held = []
        for step in range(1, 6):
            state["model"] += 1.0
            ckpt.save(step)
            held.append(taken())
        assert images * size <= max(held) <= most
        ckpt.wait_until_finished(30.0)
    with begun_with(run, state, images=images):
        assert taken() == 0


def begun_with(run: str, state: dict[str, Any], **options: Any) -> Checkpointer:
    """A Checkpointer of any state that has restored."""
    ckpt = Checkpointer(run, state, **PATIENT, **options)
    ckpt.restore()
    return ckpt


# --- steps ------------------------------------------------------------------------------------


def test_a_step_that_does_not_rise_is_refused(run: str) -> None:
    """maxdiffusion#484: the name of an epoch is the number of its updates, and names one state."""
    with begun(run) as ckpt:
        assert ckpt.save(2)
        for step in (2, 1, -1):
            with pytest.raises(ValueError, match="is not above 2: within one generation"):
                ckpt.save(step)
    with begun(run) as ckpt:
        again = ckpt.save(2)
        assert not again
        assert again.reason == "step 2 is the one that was restored"
        assert again.converged(0.0) is None
        with pytest.raises(ValueError, match="is not above 2, which was restored"):
            ckpt.save(1)
        assert ckpt.save(3)


def test_the_schedule_says_which_steps_are_saved(run: str) -> None:
    training = Training()
    with begun(run, training, every=3) as ckpt:
        assert [step for step in range(1, 8) if ckpt.save(step)] == [3, 6]
        assert [ckpt.should_save(step) for step in (8, 9)] == [False, True]
        assert ckpt.save(8, force=True)
        ckpt.wait_until_finished(30.0)
        assert ckpt.all_steps() == [3, 6, 8]
        assert ckpt.latest_step() == 8


def test_a_save_before_restore_is_refused(run: str) -> None:
    """Or a restarted script would save its fresh weights over the run that it forgot to restore."""
    ckpt = Checkpointer(run, Training().state(), **PATIENT)
    with pytest.raises(RuntimeError, match=r"call restore\(\) before the first save"):
        ckpt.save(1)
    assert ckpt.restored is None
    assert ckpt.latest_step() is None
    assert ckpt.all_steps() == []
    assert ckpt.lattice == Lattice({})
    ckpt.close()


def test_arguments_without_sense_are_refused_before_anything_is_made(run: str) -> None:
    state = Training().state()
    for wrong in (
        {"every": 0}, {"images": -1}, {"window": 0}, {"busy": "no"}, {"on_error": "no"},
        {"verify": "no"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Checkpointer(run, state, **wrong)
    with pytest.raises(ValueError, match=r"\{bad\} is not known in a path; \{rank\}"):
        Checkpointer(run + "/{bad}", state)
    assert not os.path.exists(run)
    assert agents() == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/{rank", "braces can't be filled: .*twice"),
        ("/rank}", "braces can't be filled: .*twice"),
        ("/{rank.x}", "braces can't be filled: .*no attribute 'x'"),
        ("/{rank[0]}", "braces can't be filled"),
        ("/{rank:x y}", r"braces can't be filled: .*\{rank:05d\}"),
        ("/\udcff", "in UTF-8"),
        ("/a\0b", "in UTF-8"),
        (b"/bytes", "give a str"),
        ("", "path='': give the run's directory"),
    ],
)
def test_a_path_that_can_t_be_one_is_refused_by_what_is_wrong(
    run: str, name: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An empty variable in a script must not make the current directory the run."""
    monkeypatch.chdir(tmp_path)
    before = os.listdir(tmp_path)
    path = run + name if name and isinstance(name, str) else name
    with pytest.raises(ValueError, match=why):
        Checkpointer(path, Training().state())
    assert os.listdir(tmp_path) == before
    assert agents() == []


def test_a_directory_whose_name_is_no_text_is_refused_also_where_it_is_not_named(
    run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A path is told to agents, and to other ranks: as text."""
    home = tmp_path / os.fsdecode(b"home\xff")
    home.mkdir()
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match=r"path='run' is '/.*udcff/run': rename that directory"):
        Checkpointer("run", Training().state())
    assert agents() == []


def test_a_node_whose_name_is_no_text_trains_as_any_other(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are spelled out, wherever the node is named."""
    monkeypatch.setenv("HANDFAST_NODE", os.fsdecode(b"node\xff"))
    with Checkpointer(run, Training().state()) as ckpt:
        ckpt.restore()
        (agent,) = handfast.open(run).status().agents
    assert agent.label == "node\\udcff"


def test_braces_in_the_current_directory_are_no_template(
    run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is filled is the path that was given, and nothing that leads there."""
    home = tmp_path / "{abc} {rank}"
    home.mkdir()
    monkeypatch.chdir(home)
    with Checkpointer("runs/{{x}} {rank:02d}", Training().state()) as ckpt:
        ckpt.restore()
    assert os.path.isdir(home / "runs" / "{x} 00" / "domains")


def test_a_save_in_the_middle_of_an_accumulation_may_hold_it(run: str) -> None:
    """grads=True: a job that dies between two micro-batches goes on between them, bit for bit."""
    training = Training()

    def rest(training: Training) -> str:
        training.loss().backward()
        training.optimizer.step()
        return training.digest()

    with begun(run, training) as ckpt:
        training.step()
        assert ckpt.save(1)
        training.optimizer.zero_grad()
        training.loss().backward()
        assert ckpt.save(2, grads=True)
        with pytest.raises(ValueError, match=r"2 is not above 2: .*count micro-steps"):
            ckpt.save(2, grads=True)
        expected = rest(training)
    other = Training()
    with begun(run, other) as ckpt:
        assert ckpt.restored == Epoch(1, 2)
        assert rest(other) == expected
        reached = other.digest()
        assert ckpt.save(3)
    third = Training()
    with begun(run, third):  # an epoch without gradients follows one with them
        assert third.digest() == reached


def test_a_save_in_the_middle_of_an_accumulation_is_refused(run: str) -> None:
    """Its gradients would be lost without a word. Zeroed ones and skipped steps are clean."""
    training = Training(full=True)
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    with begun(run, training) as ckpt:
        training.loss().backward()
        with pytest.raises(ValueError, match=r"model/0\.weight.*save after the step, or .*grads="):
            ckpt.save(1)
        optimizer.step()
        assert ckpt.save(2)
        training.loss().backward()
        optimizer.zero_grad(set_to_none=False)
        assert ckpt.save(3)
        training.loss().backward()
        optimizer.zero_grad(set_to_none=True)
        assert ckpt.save(4)
        (scaler.scale(training.loss()) * float("inf")).backward()
        scaler.step(optimizer)  # which it leaves out
        scaler.update()
        assert ckpt.save(5)
        training.loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        with pytest.raises(ValueError, match="gradients have changed"):
            ckpt.save(6)
        optimizer.step()
        assert ckpt.save(6)


# --- handles and lattice ----------------------------------------------------------------------


def test_an_optimizer_and_a_scaler_that_come_later_are_saved_after_their_step(run: str) -> None:
    """A stage of the training begins with new ones, and the first save is after its first step."""
    training = Training(full=True)
    state = training.state()
    with begun_with(run, state) as ckpt:
        training.step()
        ckpt.save(1)
        training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-4)
        training.scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 3, 0.9)
        training.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        state |= training.state()
        training.step()
        ckpt.save(2)
        training.optimizer.zero_grad()
        (training.scaler.scale(training.loss()) * float("inf")).backward()
        training.scaler.step(training.optimizer)  # which it leaves out
        training.scaler.update()
        assert ckpt.save(3).converged(30.0)


def test_the_lattice_shows_each_phase_without_asking_anybody(
    tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be logged at every step: no I/O, no waiting, even with an agent that is stopped."""
    monkeypatch.setenv("HANDFAST_NODE", "node0")
    held = HeldAgent(tmp_path, run)
    with begun(run) as ckpt:
        (name,) = ckpt.lattice.domains
        assert name.startswith("rank-00000-")
        assert (ckpt.lattice.converged, ckpt.lattice.generation) == (GENESIS, 1)
        assert ckpt.restored == GENESIS
        one = Epoch(1, 1)
        held.hold("fsync", "chunks/")
        save = ckpt.save(1)
        assert save.epoch == one
        assert save.staged() is save
        assert save.phase == "staged"
        eventually(lambda: ckpt.lattice.domains[name].staged == one)
        assert ckpt.lattice.domains[name].persisted == GENESIS
        held.kill(19)
        before = ckpt.lattice
        assert [ckpt.lattice for _ in range(1000)] == [before] * 1000
        assert (save.phase, ckpt.latest_step(), ckpt.all_steps()) == ("staged", None, [])
        ckpt.check_for_errors()
        held.kill(18)
        held.free()
        assert save.persisted(30.0) is save
        certificate = save.converged(30.0)
        assert certificate is not None
        assert certificate.epoch == one
        assert save.phase == "converged"
        shown = ckpt.lattice.domains[name]
        assert (shown.staged, shown.persisted, shown.certified) == (one, one, one)
        assert (ckpt.lattice.converged, ckpt.lattice.skew) == (one, 0)
        assert (ckpt.lattice.blocked_by, ckpt.lattice.phase) == ((), "converged")


def test_events_tell_what_happens_and_a_broken_observer_stops_nothing(run: str) -> None:
    told: list[str] = []

    def observe(name: str, fields: dict[str, Any]) -> None:
        told.append(name)
        raise RuntimeError("the observer is broken")

    with begun(run, on_event=observe) as ckpt:
        assert ckpt.save(1)
    assert told == ["restored", "staged"]


# --- the end ----------------------------------------------------------------------------------


def test_the_end_of_with_never_masks_what_ended_the_training(
    tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And waits at most drain_s for a save that is under way."""
    monkeypatch.setenv("HANDFAST_NODE", "node0")
    held = HeldAgent(tmp_path, run)
    # The whole `with` is what is tested: its end must let the body's own error through.
    with pytest.raises(ZeroDivisionError), begun(run, drain_s=0.1) as ckpt:  # noqa: PT012 - above
        held.hold("fsync", "chunks/")
        ckpt.save(1)
        print(1 / 0)
    assert "the last save was not finished" in caplog.text
    held.free()
    with begun(run) as ckpt:  # it was finished by the agent all the same
        assert ckpt.restored == Epoch(1, 1)


def test_with_waits_for_the_last_save_to_converge(run: str) -> None:
    """The exit of a script is not the end of its last epoch (KempnerForge#102)."""
    with begun(run) as ckpt:
        save = ckpt.save(1)
    assert save.phase == "converged"


def test_a_closed_checkpointer_says_so(run: str) -> None:
    """Twice is no error; a save or a restore afterwards is one, and does not hang."""
    ckpt = begun(run)
    ckpt.save(1)
    ckpt.close(30.0)
    ckpt.close(30.0)
    for call in (lambda: ckpt.save(2), ckpt.restore):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    eventually(lambda: not agents())


def test_a_refused_save_stays_refused(run: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also when later ones have converged, and more than an agent remembers of; whoever closes
    without having asked is warned."""
    model, told = nn.Linear(2, 2), []
    options: dict[str, Any] = {"validators": ("finite",), "every": 1}
    options |= {"on_event": lambda name, fields: told.append((name, fields.get("problem", "")))}
    with begun_with(run, {"model": model}, **options) as ckpt:
        nn.init.constant_(model.weight, torch.nan)
        bad = ckpt.save(1)
        nn.init.ones_(model.weight)
        for step in range(2, OUTCOMES + 4):
            ckpt.save(step).converged(60)
        assert bad.phase == "failed"
        for wait in (bad.persisted, bad.converged):
            with pytest.raises(SaveFailed, match=r"epoch 1/1.*finite: model/weight: 4 NaN"):
                wait(60)
    (problem,) = [problem for name, problem in told if name == "refused"]
    assert problem.startswith("epoch 1/1: a validator refused it: finite: model/weight: 4 NaN")
    told.clear()
    with begun_with(run, {"model": model}, **options) as ckpt:
        nn.init.constant_(model.weight, torch.nan)
        ckpt.save(100)
        nn.init.ones_(model.weight)
        ckpt.save(101)
    assert [name for name, _ in told].count("refused") == 1, "of the last but one, too"
    assert "epoch 2/100: a validator refused it" in caplog.text


def test_a_failed_save_that_nobody_asked_for_is_warned_of_at_the_end(
    tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails behind the call of the last save, which converges."""
    monkeypatch.setenv("HANDFAST_NODE", "node0")
    held = HeldAgent(tmp_path, run)
    with begun(run, images=2) as ckpt:
        held.hold("fsync", "chunks/")
        lost, last = ckpt.save(1), ckpt.save(2)
        held.reached()
        (home,) = Path(run).glob("domains/*/1/manifests")
        (home / "1-1.manifest").mkdir()
        held.free()
    assert (lost.phase, last.phase) == ("failed", "converged")
    assert "a save failed, and a later one has converged: epoch 1/1: " in caplog.text


def test_a_close_that_runs_out_of_time_can_be_repeated(
    tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANDFAST_NODE", "node0")
    held = HeldAgent(tmp_path, run)
    ckpt = begun(run)
    held.hold("fsync", "chunks/")
    ckpt.save(1)
    with pytest.raises(Blocked):
        ckpt.close(0.1)
    ckpt.close(None)
    held.free()


def test_importing_handfast_imports_no_framework() -> None:
    code = "import handfast, sys; print([m for m in ('torch', 'numpy', 'jax') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout == b"[]\n"


# --- restore ----------------------------------------------------------------------------------


def test_restore_can_be_called_again_in_one_process(run: str) -> None:
    """What a loss that went to NaN is answered with: back to the last epoch, no new process."""
    training = Training(full=True)
    with begun(run, training) as ckpt:
        training.step()
        ckpt.save(1)
        saved = training.digest()
        training.step()
        ckpt.wait_until_finished(30.0)
        assert ckpt.restore() == 1
        assert training.digest() == saved
        assert ckpt.restored == Epoch(1, 1)
        training.step()
        assert ckpt.save(2)
        ckpt.wait_until_finished(30.0)
        assert ckpt.restore() == 2
        assert ckpt.restored == Epoch(2, 2)


def test_restore_goes_back_to_a_step_and_says_so_where_it_is_not_there(run: str) -> None:
    trained(run, 1, 2, 3)
    training = Training()
    before = digest(training.model.state_dict())
    ckpt = Checkpointer(run, training.state(), **PATIENT)
    with pytest.raises(Refused, match="no epoch of step 7 is left") as caught:
        ckpt.restore(step=7)
    assert caught.value.verdict == "missing"
    assert digest(training.model.state_dict()) == before
    assert ckpt.restore(step=2) == 2
    assert ckpt.save(3)
    ckpt.close(30.0)


def test_a_first_start_is_refused_where_a_run_is_required(run: str) -> None:
    """NVIDIA-NeMo/Speech#10228: a lost run began from scratch in silence."""
    ckpt = Checkpointer(run, Training().state(), **PATIENT)
    with pytest.raises(Refused, match=r"restore\(require=True\)") as caught:
        ckpt.restore(require=True)
    assert caught.value.verdict == "missing"
    assert run in caught.value.shards[0]
    assert not os.path.exists(run)  # a path that was mistyped does not become a run
    assert ckpt.restore() == 0
    ckpt.close()
    again = Checkpointer(run, Training().state(), **PATIENT)
    with pytest.raises(Refused, match=r"restore\(require=True\)"):
        again.restore(require=True)  # it has begun by now, and still nothing was saved
    again.close()


def test_a_rollback_drops_what_came_since_and_keeps_what_was_given(run: str) -> None:
    """A counter that the training made, and a key that the code has by now; in one process."""
    trained(run, 1)
    training = Training()
    (group,) = training.optimizer.param_groups
    with Checkpointer(run, training.state(), **PATIENT) as ckpt:
        group["lr_scale"] = 0.5
        assert ckpt.restore() == 1
        group["counted"] = 3
        assert ckpt.restore() == 1
    assert "counted" not in group
    assert group["lr_scale"] == 0.5


def test_a_dry_run_changes_nothing(run: str) -> None:
    trained(run, 1, 2)
    training = Training(seed=3)
    before = training.digest()
    ckpt = Checkpointer(run, training.state(), **PATIENT)
    assert ckpt.restore(dry_run=True) == 2
    assert training.digest() == before
    assert ckpt.restored is None
    with pytest.raises(RuntimeError, match="call restore"):
        ckpt.save(3)
    assert ckpt.restore() == 2
    assert training.digest() != before
    ckpt.close()


def test_a_part_can_be_restored(run: str) -> None:
    """The backbone of a saved model into another one, whose head is new."""
    saved = trained(run, 1)
    training = Training(seed=5)
    head = digest(training.model[-1].state_dict())
    ckpt = Checkpointer(run, training.state(), **PATIENT)
    assert ckpt.restore(only=("model/0.*",)) == 1
    assert digest(training.model[0].state_dict()) == digest(saved.model[0].state_dict())
    assert digest(training.model[-1].state_dict()) == head
    ckpt.close()


def test_what_only_one_side_has_is_refused_unless_asked_for(run: str) -> None:
    saved = trained(run, 1)
    training = Training(seed=5, depth=2)
    before = training.digest()
    ckpt = Checkpointer(run, training.state(), **PATIENT)
    with pytest.raises(Refused, match=r"model/7\.weight: tensor: saved nothing") as caught:
        ckpt.restore(only=("model",))
    assert caught.value.verdict == "foreign"
    assert training.digest() == before
    assert ckpt.restore(only=("model",), strict=False) == 1
    assert digest(training.model[0].state_dict()) == digest(saved.model[0].state_dict())
    ckpt.close()


def test_saved_hyperparameters_win_and_live_ones_by_wish(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed hyperparameter that a resume undoes without a word costs people days."""
    trained(run, 1)
    for keep_live, decay in (((), 0.01), (("weight_decay",), 0.5)):
        caplog.clear()
        training = Training()
        training.optimizer.param_groups[0]["weight_decay"] = 0.5
        ckpt = Checkpointer(run, training.state(), **PATIENT)
        ckpt.restore(keep_live=keep_live)
        ckpt.close()
        assert training.optimizer.param_groups[0]["weight_decay"] == decay
        replaced = "param_groups[0]/weight_decay: saved 0.01, live was 0.5" in caplog.text
        assert replaced == (not keep_live)


def test_extra_comes_back(run: str) -> None:
    extra = {"tokens": 10**30, "best": float("nan"), "at": (1, [b"x"]), "mean": torch.ones(2)}
    with begun(run) as ckpt:
        assert ckpt.extra is None
        ckpt.save(1, extra=extra)
    with begun(run) as ckpt:
        assert digest(ckpt.extra) == digest(extra)


class Stubborn:
    """Its ``load_state_dict`` raises while told to."""

    broken = True

    def state_dict(self) -> dict[str, Any]:
        """A little."""
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Not now."""
        if self.broken:
            raise KeyError("x")


def test_a_load_that_fails_half_way_poisons_every_later_save(run: str) -> None:
    """accelerate#4283: the failure was swallowed, and a state of no epoch was saved."""
    stubborn = Stubborn()
    training = Training()
    state = {**training.state(), "stubborn": stubborn}
    with Checkpointer(run, state, **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1)
    ckpt = Checkpointer(run, state, **PATIENT)
    with pytest.raises(Poisoned, match="stopped at stubborn: KeyError") as caught:
        ckpt.restore()
    # tools that print a traceback with its values look at everything that the restore holds
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "values = <handfast.torch.values.Stored" in "".join(shown.format())
    with pytest.raises(Poisoned, match="nothing can be saved until a restore succeeds"):
        ckpt.save(2)
    stubborn.broken = False
    assert ckpt.restore() == 1
    assert ckpt.save(2)
    ckpt.close(30.0)


def test_a_file_that_changes_between_its_validation_and_its_load_poisons(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that bytes which were found valid, and are not any more when they are loaded, end the
    restore: nothing is saved of a state of no epoch, and the next one judges the copy anew."""
    training = Training()
    with begun(run, training) as ckpt:
        for step in (1, 2):
            training.step()
            ckpt.save(step).converged(30.0)
    before = ckpt.all_steps()
    accept = Session.accept

    def damaged(self: Session, proposal: Proposal) -> None:
        accept(self, proposal)
        (image,) = Path(run).glob("domains/*/1/chunks/1-2.safetensors")
        data = bytearray(image.read_bytes())
        data[-1] ^= 1
        image.write_bytes(data)

    again = Checkpointer(run, Training().state(), **PATIENT)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "accept", damaged)
        with pytest.raises(Poisoned, match=r"chunk 0 of epoch 1/2.* differs from its hash"):
            again.restore()
    with pytest.raises(Poisoned, match="nothing can be saved until a restore succeeds"):
        again.save(3)
    assert again.restore() == 1
    assert before == [1, 2]
    again.close(30.0)


def test_another_number_of_threads_is_warned_of_by_name(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained(run, 1)
    assert not caplog.messages
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        begun(run).close()
    finally:
        torch.set_num_threads(threads)
    assert "the resume may differ in the last bits: threads: was" in caplog.text


def test_the_newest_epochs_stay_and_the_chosen_ones(run: str) -> None:
    with begun(run, keep=Keep(newest=2, every=3)) as ckpt:
        for step in range(1, 9):
            ckpt.save(step).converged(30.0)
        eventually(lambda: ckpt.all_steps() == [3, 6, 7, 8])
        names = Path(run).glob("domains/*/*/manifests/*.manifest")
        eventually(lambda: len(list(names)) <= 4)


class Money:
    """A value of a type that only its user knows."""

    def __init__(self, cents: int) -> None:
        self.cents = cents


def test_values_of_a_users_type_are_stored_by_registration_or_by_trust(run: str) -> None:
    """Pickle only where it is asked for, by path; on both sides."""
    handfast.register(Money, lambda money: money.cents, Money)
    box: dict[str, Any] = {"money": Money(7), "when": Fraction(1, 3)}
    state = {**Training().state(), "box": box}
    with pytest.raises(Unstorable, match=r"box/when: fractions\.Fraction"):
        Checkpointer(run, state)
    with Checkpointer(run, state, pickle=("box/when",), **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1)
    box |= {"money": None, "when": None}
    with Checkpointer(run, state, pickle=("box/when",), **PATIENT) as ckpt:
        ckpt.restore()
    assert (box["money"].cents, box["when"]) == (7, Fraction(1, 3))
    box["when"] = 1
    distrustful = Checkpointer(run, state, **PATIENT)
    with pytest.raises(HandfastError, match=r"box/when.*pickle"):
        distrustful.restore()
    distrustful.close()
    assert box["when"] == 1


def test_priming_leaves_no_trace(run: str) -> None:
    """One throwaway forward and backward: weights, buffers, streams, gradients are as before."""
    training = Training(norm=True)
    with Checkpointer(run, training.state(), **PATIENT) as ckpt:
        before = training.digest()
        ckpt.prime(lambda: training.loss().backward())
        assert training.digest() == before
        assert all(p.grad is None for p in training.model.parameters())
        assert ckpt.restore() == 0


def test_without_rng_a_restore_moves_no_stream(run: str) -> None:
    """Not even where the run has streams, because it was saved with them."""
    with Checkpointer(run, {"t": torch.ones(2)}, **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1)
    torch.manual_seed(2)
    random.seed(2)
    before = torch.get_rng_state().tolist(), random.getstate()
    with Checkpointer(run, {"t": torch.zeros(2)}, rng=False, **PATIENT) as ckpt:
        assert ckpt.restore() == 1
    assert (torch.get_rng_state().tolist(), random.getstate()) == before


def test_a_restore_says_in_one_line_where_it_begins(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first thing that is asked of a log: did it resume, and from where?"""
    caplog.set_level(logging.INFO, "handfast")
    trained(run, 2)
    assert [r.getMessage() for r in caplog.records] == ["first start, generation 1"]
    caplog.clear()
    begun(run).close()
    assert [r.getMessage() for r in caplog.records] == ["resumed 1/2, generation 2"]


# --- tensors ----------------------------------------------------------------------------------


def every_tensor() -> dict[str, torch.Tensor]:
    """Tensors of all the kinds that have been lost somewhere."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    bits = torch.randint(0, 256, (32,), dtype=torch.uint8)
    found = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf"), float("-inf")]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": torch.ones(3, 1).expand(3, 4).clone(),
        "channels": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "int": torch.arange(5),
        "complex64": torch.randn(3, dtype=torch.complex64),
        "complex128": torch.randn(3, dtype=torch.complex128),
        "shared": base,
        "tied": base.view(4, 6),
    }
    for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "int8", "uint16"):
        found[name] = bits.view(getattr(torch, name)).clone()
    return found


def test_every_kind_of_tensor_comes_back_bit_for_bit(run: str) -> None:
    """NaN payloads, signed zeros, empty, 0-d, 8-bit floats, views, channels_last, ties."""
    saved = every_tensor()
    before = {name: digest(value) for name, value in saved.items()}
    with Checkpointer(run, {"t": saved}, verify="full", **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1)
    live = every_tensor()
    for name in live.keys() - {"tied", "strided", "transposed"}:
        live[name].zero_()
    with Checkpointer(run, {"t": live}, **PATIENT) as ckpt:
        ckpt.restore()
    after = {name: digest(value) for name, value in live.items()}
    assert after == before
    assert live["shared"].data_ptr() == live["tied"].data_ptr()
    assert live["channels"].is_contiguous(memory_format=torch.channels_last)


def test_tied_weights_are_stored_once(run: str) -> None:
    """safetensors#220."""
    model = nn.Sequential(nn.Embedding(512, 64), nn.Linear(64, 512, bias=False))
    model[1].weight = model[0].weight
    with Checkpointer(run, {"model": model}, **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1)
    (image,) = Path(run).glob("domains/*/*/chunks/*.safetensors")
    assert image.stat().st_size < 2 * model[0].weight.nbytes


@pytest.mark.parametrize("when", ["before it was heard", "after it was heard"])
@pytest.mark.parametrize("change", ["shrink", "grow", "reshape", "retype"])
def test_a_change_of_structure_that_was_interrupted_is_made_anew(
    run: str, when: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the new layout is handed over: the next save must not write into the old one,
    where a tensor of an earlier step still stands."""
    box = {"a": torch.ones(2000), "b": torch.ones(2000)}
    real = Connection.call

    def call(self: Connection, name: str, *args: Any, **more: Any) -> dict[str, Any]:
        if name != "plan":
            return real(self, name, *args, **more)
        if when == "after it was heard":
            real(self, name, *args, **more)
        raise KeyboardInterrupt

    with Checkpointer(run, {"box": box}, patience_s=30.0) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
        match change:
            case "shrink":
                del box["b"]
            case "grow":
                box["c"] = torch.ones(3000)
            case "reshape":
                box["b"] = torch.ones(3)
            case _:
                box["b"] = torch.ones(2000, dtype=torch.float64)
        with monkeypatch.context() as broken:
            broken.setattr(Connection, "call", call)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(2)
        for tensor in box.values():
            tensor.fill_(3.3)
        ckpt.save(3).converged(30.0)
    found = load(run, "box", step=3)
    assert found.keys() == box.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in box.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in box.items())


def test_a_save_from_a_signal_handler_is_refused_while_one_runs(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for itself. Refused is the handler's, the save that it interrupted goes on."""
    heard: list[str] = []
    with begun(run) as ckpt:

        def save_now(*_: object) -> None:
            for call in (lambda: ckpt.save(2), lambda: ckpt.close(1.0), ckpt.wait_until_finished):
                with pytest.raises(RuntimeError, match="not for signal handlers"):
                    call()
                heard.append("refused")

        before = signal.signal(signal.SIGUSR1, save_now)
        take = Connection.call

        def interrupted(line: Connection, name: str, *args: Any, **fields: Any) -> dict[str, Any]:
            if name == "stage":
                os.kill(os.getpid(), signal.SIGUSR1)
            return take(line, name, *args, **fields)

        monkeypatch.setattr(Connection, "call", interrupted)
        try:
            assert ckpt.save(1).converged(30.0)
            assert heard == ["refused"] * 3
            assert ckpt.save(2).converged(30.0)
        finally:
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_in_the_middle_of_a_save_keeps_no_image(
    when: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook, just before or just after the agent has taken the image: later saves
    go on, and what was taken is an epoch like any other."""
    training = Training()
    with begun(run, training, keep=Keep(newest=9)) as ckpt:
        take = Connection.call

        def interrupted(line: Connection, name: str, *args: Any, **fields: Any) -> dict[str, Any]:
            if name != "stage":
                return take(line, name, *args, **fields)
            monkeypatch.undo()
            if when == "after":
                take(line, name, *args, **fields)
            raise KeyboardInterrupt

        monkeypatch.setattr(Connection, "call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1)
        for step in (2, 3):
            training.step()
            assert ckpt.save(step).converged(30.0)
        assert ckpt.all_steps() == [1, 2, 3]


WHERE: dict[str, tuple[object, str]] = {
    "in the kernel": (images_module, "_populate"),
    "as it is made": (staging, "StagingImage"),
    "before it is heard": (Connection, "call"),
}


@pytest.mark.parametrize("when", WHERE)
@pytest.mark.parametrize("images", [1, 2])
def test_an_interrupt_while_images_are_made_anew_leaves_them_whole(
    images: int, when: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a restore, while an earlier epoch is still being written: an image whose memory was
    closed by then stood for another one's, and later epochs converged with zeros in them."""
    monkeypatch.setenv("HANDFAST_WRITE_MBPS", "20")
    state = {"w": torch.full((4 << 20,), 1.0)}
    options: dict[str, Any] = {"images": images, "keep": Keep(newest=9), "drain_s": 0.0, **PATIENT}
    with Checkpointer(run, state, rng=False, **options) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
        state["w"].fill_(2.0)
        ckpt.save(2)

        where, name = WHERE[when]
        real = getattr(where, name)

        def interrupted(*args: Any, **more: Any) -> Any:
            if name == "call" and args[1] != "plan":
                return real(*args, **more)
            if name != "call":
                real(*args, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                ckpt.restore()
        with open(f"{run}/mine", "w", encoding="ascii") as file:  # takes a number that is free
            assert ckpt.restore() in (1, 2)
            for step in (10, 11):
                state["w"].fill_(float(step))
                assert ckpt.save(step).converged(30.0)
                assert load(run, "", step=step)["w"].unique().tolist() == [step]
            file.write("still mine")
    assert Path(f"{run}/mine").read_text() == "still mine"


def test_an_interrupt_while_memory_is_agreed_upon_is_made_up_for(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the agent heard of the images of a structure that is taken back again: it is
    told of those that there are."""
    box = {"a": torch.ones(2000)}
    real = Connection.call

    def call(self: Connection, name: str, *args: Any, **more: Any) -> dict[str, Any]:
        answer = real(self, name, *args, **more)
        if name == "plan":
            raise KeyboardInterrupt
        return answer

    with Checkpointer(run, {"box": box}, patience_s=30.0) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
        with monkeypatch.context() as broken:
            broken.setattr(Connection, "call", call)
            box["b"] = torch.ones(3000)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(2)
        del box["b"]
        box["a"].fill_(3.0)
        assert ckpt.save(3).converged(30.0)
    assert torch.equal(load(run, "box", step=3)["a"], box["a"])


@pytest.mark.parametrize("deep", [False, True])
def test_modules_that_change_places_keep_their_own_names(run: str, deep: bool) -> None:
    """A student that becomes the teacher: names were kept while the modules' order stayed, and
    each was stored, and restored, as the other."""

    def named(one: nn.Module, other: nn.Module) -> dict[str, Any]:
        both = {"student": one, "teacher": other}
        return {"nets": both} if deep else both

    def swap(state: dict[str, Any]) -> None:
        box = state["nets"] if deep else state
        student, teacher = box.pop("student"), box.pop("teacher")
        box["teacher"] = student
        box["student"] = teacher

    at = "nets" if deep else ""
    name = "{}/weight" if deep else "weight"
    with torch.no_grad():
        nets = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        for value, net in enumerate(nets):
            net.weight.fill_(value)
    state = named(*nets)
    with Checkpointer(run, state, rng=False, keep=Keep(newest=9), **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
        swap(state)
        ckpt.save(2).converged(30.0)
        for step, values in ((1, (0.0, 1.0)), (2, (1.0, 0.0))):
            for role, value in zip(("student", "teacher"), values, strict=True):
                found = load(run, at or role, step=step)[name.format(role)]
                assert found.item() == value
        ckpt.restore(step=2)
        assert [net.weight.item() for net in nets] == [0.0, 1.0]
        ckpt.save(3).converged(30.0)
        swap(state)
        ckpt.restore(step=3)
        assert [net.weight.item() for net in nets] == [1.0, 0.0]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_live_tensor_whose_elements_overlap_takes_only_what_fits(
    in_place: bool, run: str
) -> None:
    """Windows over one row: 16 values can't stand in 7 places, unless they agree; it was told as
    restored all the same."""
    windows = torch.arange(7.0).unfold(0, 4, 1)
    state = {"free": torch.arange(16.0).reshape(4, 4), "folded": windows}
    with Checkpointer(run, state, rng=False, **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1)
    for name, fits in (("free", False), ("folded", True)):
        live = {"free": torch.zeros(4, 4), "folded": torch.zeros(4, 4)}
        live[name] = torch.zeros(7).unfold(0, 4, 1)
        ckpt = Checkpointer(run, live, rng=False, **PATIENT)
        if fits:
            assert ckpt.restore(in_place=in_place) == 1
            assert all(torch.equal(live[key], state[key]) for key in state)
        else:
            with pytest.raises(Refused, match=r"free: memory: .*bytes that another element has"):
                ckpt.restore(in_place=in_place)
            assert not live["free"].any()
        ckpt.close(30.0)


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("count", [16, 1 << 20])
def test_a_tensor_whose_storage_was_cut_is_refused_by_name(left: int, count: int, run: str) -> None:
    """What frees a parameter's memory and forgets to give it back: a save, or a restore into it,
    ended the process, or stored what lay there."""
    state = {"cut": torch.ones(count), "whole": torch.ones(3)}
    with begun_with(run, state) as ckpt:
        ckpt.save(1).converged(30.0)
        state["cut"].untyped_storage().resize_(left)
        with pytest.raises(Unstorable, match=r"cut: .*its storage was resized"):
            ckpt.save(2)
        with pytest.raises(Unstorable, match=r"cut: .*its storage was resized"):
            ckpt.restore()
        state["cut"].untyped_storage().resize_(4 * count)
        assert ckpt.restore() == 1
        assert state["cut"].eq(1.0).all()


def test_a_close_waits_no_longer_than_any_other_call(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that was stopped while it writes, and a `close()` in somebody's `finally`: it waited
    for ever."""
    monkeypatch.setenv("HANDFAST_WRITE_MBPS", "1")
    state = {"w": torch.rand(1 << 21)}
    ckpt = Checkpointer(run, state, rng=False, patience_s=2.0)
    ckpt.restore()
    ckpt.save(1)
    (agent,) = agents()
    os.kill(agent, signal.SIGSTOP)
    try:
        with pytest.raises(Blocked):
            ckpt.close()
    finally:
        os.kill(agent, signal.SIGCONT)


def test_a_change_of_structure_takes_no_memory_twice(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more scalar: the former image went when the new one was there, and the state had to fit
    three times into the node's memory."""
    box = {"a": torch.ones(1 << 20)}
    seen: list[int] = []

    def made(*args: Any) -> images_module.StagingImage:
        seen.append(len(memories()))
        return images_module.StagingImage(*args)

    with begun_with(run, {"box": box}, rng=False) as ckpt:
        before = len(memories())
        ckpt.save(1).converged(30.0)
        monkeypatch.setattr(staging, "StagingImage", made)
        box["b"] = torch.ones(())
        ckpt.save(2).converged(30.0)
    assert seen == [before]


def test_an_agent_has_the_manners_that_it_was_told(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows it of the process that runs: its niceness, and where it runs. (That it writes no faster
    than it may is what keeps `close()` waiting above.)"""
    monkeypatch.setenv("HANDFAST_NICE", "7")
    monkeypatch.setenv("HANDFAST_CPUS", str(min(os.sched_getaffinity(0))))
    with begun(run):
        (agent,) = agents()
        assert os.getpriority(os.PRIO_PROCESS, agent) == 7
        assert os.sched_getaffinity(agent) == {min(os.sched_getaffinity(0))}


# --- slips ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [11.0, True, "11", None, 1.5, torch.tensor(2.0)])
def test_a_step_that_is_no_whole_number_reaches_no_journal(run: str, step: Any) -> None:
    """One `save(11.0)` would make a record that nothing could read again, and lose the run."""
    training = Training()
    with begun(run, training) as ckpt:
        assert ckpt.save(1)
        with pytest.raises(ValueError, match=r"step=.*give a whole number"):
            ckpt.save(step)
        assert ckpt.save(2)
    with begun(run) as ckpt:
        assert ckpt.restored == Epoch(1, 2)


def test_whole_numbers_of_other_libraries_are_steps(run: str) -> None:
    """A step that comes out of an array or a counter tensor is the number that it shows."""
    with begun(run) as ckpt:
        assert ckpt.save(np.int64(1))
        assert ckpt.save(torch.tensor(2))
        ckpt.wait_until_finished(30.0)
        assert ckpt.restore(step=np.int32(1)) == 1


def test_a_string_where_patterns_are_wanted_is_refused(run: str) -> None:
    """replicated=("ema/**") without the comma: its letters hold a `*`, which matches everything."""
    for name in ("replicated", "pickle"):
        with pytest.raises(ValueError, match=rf"{name}='ema/\*\*': give a tuple of patterns"):
            Checkpointer(run, Training().state(), **{name: "ema/**"})
    trained(run, 1)
    ckpt = Checkpointer(run, Training().state(), **PATIENT)
    with pytest.raises(ValueError, match="names nothing; give at least 1"):
        ckpt.restore(only=())
    for name in ("only", "keep_live"):
        with pytest.raises(ValueError, match=rf"{name}='model': give a tuple of patterns"):
            ckpt.restore(**{name: "model"})
    ckpt.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": 3},
        {"keep": Keep(newest=2.0)},
        {"keep": Keep(every=10.0)},
        {"every": "10"},
        {"window": 2.0},
        {"patience_s": "5"},
        {"drain_s": float("nan")},
        {"state": []},
        {"state": {}},
    ],
    ids=str,
)
def test_arguments_of_another_type_are_refused_by_name(run: str, wrong: dict[str, Any]) -> None:
    """Before an agent is asked, which could only say what it can't decode."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        Checkpointer(run, **{"state": Training().state(), **wrong})
    assert agents() == []


def test_a_first_state_is_not_found_again_by_a_second_restore(run: str) -> None:
    """A rollback before anything was saved would give 0 and leave trained weights in place."""
    training = Training()
    with begun(run, training) as ckpt:
        training.step()
        with pytest.raises(Refused, match="the live state is no first one any more"):
            ckpt.restore()


def test_a_resume_below_what_had_converged_is_said_aloud(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad byte in the newest epoch: the older one is resumed, and nobody learns that later."""
    trained(run, 1, 2)
    eventually(lambda: not agents())
    (data,) = Path(run).glob("domains/*/*/chunks/1-2.*")
    spoilt = bytearray(data.read_bytes())
    spoilt[-1] ^= 1
    data.write_bytes(spoilt)
    told: list[dict[str, Any]] = []
    with begun(run, on_event=lambda name, fields: told.append({"name": name, **fields})) as ckpt:
        assert ckpt.restored == Epoch(1, 1)
        (said,) = [r.getMessage() for r in caplog.records if "BELOW" in r.getMessage()]
        assert "resumed 1/1, BELOW what had converged: 1/2 had converged (rank-00000-" in said
        assert "hash" in said or "differs" in said
        ((left,),) = [event["left_behind"] for event in told if event["name"] == "restored"]
        assert left in said
    caplog.clear()
    ckpt = Checkpointer(run, Training().state(), **PATIENT)
    ckpt.restore()
    assert "BELOW" not in caplog.text  # once it was resumed, 1/2 is of an abandoned timeline
    ckpt.close()
