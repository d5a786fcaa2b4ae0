"""Shows that an epoch whose values are refused never becomes the one that a job resumes from.

Real trainers, agents and examiners; whatever dies in the middle.
"""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deeds
import guarding
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from trainers import Job, Trainer, agents, at_rest, eventually, raised_by

import handfast
from handfast import Keep
from handfast.cli.main import app
from handfast.core.lattice import Epoch
from handfast.errors import Blocked, SaveFailed
from handfast.torch import Checkpointer

Launch = Callable[..., Job]
FINITE = ("finite", "nonnegative", "moments", "masters")
HERE = str(Path(__file__).parent)


def refused(trainer: Trainer, step: int) -> str:
    """Save what is to be refused, and wait until it is; gives the reason."""
    trainer.do(deeds.save, step)
    trainer.tell(deeds.converged)
    error = raised_by(trainer)
    assert isinstance(error, SaveFailed)
    assert f"/{step} will not converge: " in str(error)
    return str(error)


def files(path: str | Path) -> list[str]:
    """Manifests and data of a run."""
    found = Path(path).glob("domains/*/*/*/*")
    return sorted(file.name for file in found if file.parent.name in ("manifests", "chunks"))


def examiners() -> list[int]:
    """The examiners that this test's agents have started."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        mark = f"HANDFAST_TEST_ID={os.environ['HANDFAST_TEST_ID']}".encode()
        if b"handfast.torch.examine" in command and mark in variables:
            found.append(pid)
    return found


# --- one rank -----------------------------------------------------------------------------------


def test_a_nan_never_converges_and_a_restart_resumes_below_it(
    launch: Launch, tmp_path: Path
) -> None:
    """Three in a row are raised; what was good stays, and what was refused leaves nothing."""
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, validators=FINITE, keep=Keep(newest=9))
    good = one.do(deeds.train, 2)[-1]
    assert one.do(deeds.converged) == Epoch(1, 2)
    before = files(path)
    one.do(guarding.spoil)
    for step in (3, 4, 5):
        said = refused(one, step)
        assert "a validator refused it: finite: model/0.weight: 1 NaN and 0 infinite" in said
        assert one.do(deeds.call, "latest_step") == 2
    one.tell(deeds.save, 6)
    error = raised_by(one)
    assert isinstance(error, SaveFailed)
    assert "3 epochs in a row were refused" in str(error)
    assert "a restart resumes from step 2" in str(error)
    assert [line.split(":")[0] for line in one.do(deeds.warnings)] == [
        "epoch 1/3", "epoch 1/4", "epoch 1/5",
    ]  # fmt: skip
    assert one.do(deeds.call, "all_steps") == [1, 2]
    at_rest(tmp_path)
    assert files(path) == before, "the disk would fill with what nobody can ever load"
    run = handfast.open(path)
    assert run.latest() == Epoch(1, 2)
    assert run.verify(everything=True).sound
    one.kill()
    (two,) = launch()
    assert two.do(deeds.resume, path, validators=FINITE) == 2
    assert two.do(deeds.digest) == good
    two.do(deeds.train, 3)
    assert two.do(deeds.converged) == Epoch(2, 3)
    two.do(deeds.close)


def test_warnings_are_enough_where_that_was_asked_for(launch: Launch, tmp_path: Path) -> None:
    """And what converges after a refusal is whole, also where unchanged bytes are referred to."""
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, validators=("finite",), on_error="warn", model={"width": 512})
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    weight = one.do(guarding.weight)
    one.do(guarding.spoil)
    for step in range(2, 7):
        refused(one, step)
    one.do(deeds.save, 7)
    said = [line for line in one.do(deeds.warnings) if "a validator refused it" in line]
    assert len(said) >= 5
    one.do(guarding.spoil, weight)
    one.do(deeds.save, 8)
    assert one.do(deeds.converged) == Epoch(1, 8)
    assert handfast.open(path).verify(everything=True).sound
    at_rest(tmp_path)
    assert [name for name in files(path) if name.startswith("1-8")] == ["1-8.manifest"], (
        "what is as it was before the refused epochs is not written again"
    )
    one.do(deeds.close)


def test_a_convergence_in_between_ends_the_row(launch: Launch, tmp_path: Path) -> None:
    """A training that gets over a bad step is not stopped; and what scripts read of a run is what
    a restart would take."""
    path = tmp_path / "run"
    (one,) = launch()
    one.do(deeds.resume, str(path), validators=("finite",))
    weight = one.do(guarding.weight)
    for step in range(1, 10):
        if step % 3 == 1:
            one.do(guarding.spoil, weight)
            one.do(deeds.save, step)
            one.do(deeds.converged)
            at_rest(path)
        else:
            one.do(guarding.spoil, float("inf"))
            refused(one, step)
        (told,) = path.glob("certificates/*.json")
        assert json.loads(told.read_text())["step"] == (step - 1) // 3 * 3 + 1
    assert one.do(deeds.call, "latest_step") == 7
    one.kill()


def test_going_back_within_the_process_begins_anew(launch: Launch, tmp_path: Path) -> None:
    """Whoever catches the error, restores and leaves out a batch has as many tries again."""
    (one,) = launch()
    one.do(deeds.resume, str(tmp_path / "run"), validators=("finite",))
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    one.do(guarding.spoil)
    for step in (2, 3, 4):
        refused(one, step)
    one.tell(deeds.save, 5)
    assert isinstance(raised_by(one), SaveFailed)
    assert one.do(deeds.restore) == 1
    one.do(guarding.spoil)
    for step in (2, 3):
        refused(one, step)
    assert one.do(deeds.save, 4) == (True, "")
    one.kill()


@pytest.mark.parametrize("when", ["its trainer lives", "both are killed"])
def test_an_agent_that_is_killed_while_it_examines(
    when: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was voted, so nothing counts: the next agent asks again, or a restart resumes below;
    and no examiner is left."""
    flag = tmp_path / "held"
    monkeypatch.setenv("HELD_VALIDATOR", str(flag))
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, validators=("guarding:held", "finite"))
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    flag.touch()
    one.do(guarding.spoil)
    one.do(deeds.save, 2)
    eventually(flag.with_suffix(".reached").exists)
    assert one.do(deeds.phase) == "staged"
    if when == "both are killed":
        one.kill()
    (pid,) = agents()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not examiners())
    flag.unlink()
    if when == "its trainer lives":
        one.tell(deeds.converged)
        assert "finite: model/0.weight" in str(raised_by(one))
        assert one.do(deeds.call, "latest_step") == 1
        one.kill()
    (two,) = launch()
    assert two.do(deeds.resume, path, validators=("finite",)) == 1
    two.do(deeds.train, 2)
    two.do(deeds.converged)
    two.do(deeds.close)


def test_a_validator_that_hangs_does_not_outlive_its_job(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was stopped to mend it: the next one saves and converges while it would still hang,
    at the same agent."""
    flag = tmp_path / "held"
    monkeypatch.setenv("HELD_VALIDATOR", str(flag))
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, validators=("guarding:held",))
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    flag.touch()
    one.do(deeds.train, 2)
    eventually(flag.with_suffix(".reached").exists)
    (old,), (agent,) = examiners(), agents()
    one.kill()
    (two,) = launch()
    assert two.do(deeds.resume, path, validators=("finite",), drain_s=0.2) == 1
    two.do(deeds.train, 2)
    assert two.do(deeds.converged) == Epoch(2, 2)
    assert flag.exists()
    assert agents() == [agent]
    (new,) = examiners()
    assert new != old
    two.do(deeds.close)


def test_validators_that_die_cost_their_epoch_and_no_more(launch: Launch, tmp_path: Path) -> None:
    """The reason is theirs, and the agent is the same one."""
    (one,) = launch()
    options = {"validators": ("guarding:dies",), "on_error": "warn"}
    one.do(deeds.resume, str(tmp_path / "run"), **options)
    before = agents()
    said = refused(one, 1)
    assert "the validators ended half-way: their process was ended by SIGKILL" in said
    assert agents() == before
    one.kill()


def test_nobody_waits_for_validators_but_the_vote(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save returns; who waits for it is told who blocks; the examiner is one for all epochs."""
    flag = tmp_path / "held"
    monkeypatch.setenv("HELD_VALIDATOR", str(flag))
    (one,) = launch()
    one.do(deeds.resume, str(tmp_path / "run"), validators=("guarding:held",), images=2)
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    (examiner,) = examiners()
    flag.touch()
    one.do(deeds.train, 2)
    one.tell(deeds.converged, 0.3)
    assert isinstance(raised_by(one), Blocked)
    flag.unlink()
    assert one.do(deeds.converged) == Epoch(1, 2)
    assert examiners() == [examiner]
    one.do(deeds.close)
    for pid in agents():
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not examiners())


def test_events_and_loss_and_a_rule_of_ones_own(
    run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From ``extra=``: a loss that is a tensor, and what a user's function makes of it."""
    monkeypatch.syspath_prepend(HERE)
    told: list[tuple[str, dict[str, Any]]] = []
    state = {"model": nn.Linear(2, 2), "box": {"n": 1}}
    options: dict[str, Any] = {"on_event": lambda name, fields: told.append((name, fields))}
    with Checkpointer(run, state, validators=["loss"], **options) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1, extra={"loss": torch.tensor(0.5)}).converged(60)
        for step, extra in ((2, {"loss": torch.tensor(torch.inf)}), (3, None)):
            with pytest.raises(SaveFailed):
                checkpointer.save(step, extra=extra).converged(60)
        checkpointer.save(4, extra={"loss": 0.25}).converged(60)
    problems = [fields["problem"] for name, fields in told if name == "refused"]
    assert problems == [
        "epoch 1/2: a validator refused it: loss: the loss is inf",
        "epoch 1/3: a validator refused it: loss: extra={'loss': ...} gives no loss, but None",
    ]
    with Checkpointer(run, state, validators=["guarding:positive"]) as checkpointer:
        assert checkpointer.restore() == 4
        with pytest.raises(SaveFailed, match="guarding:positive: it is below zero"):
            checkpointer.save(5, extra=-1).converged(60)
        checkpointer.save(6, extra=1).converged(60)


def test_a_job_whose_last_epoch_was_refused_does_not_end_well(run: str) -> None:
    """What it was trained for is not saved: close() says so, and `handfast status` from then on;
    where warnings were asked for it is closed all the same."""
    model = nn.Linear(2, 2)
    for on_error in ("raise", "warn"):
        checkpointer = Checkpointer(run, {"model": model}, validators=["finite"], on_error=on_error)
        at = checkpointer.restore() or 0
        nn.init.ones_(model.weight)
        checkpointer.save(at + 1).converged(60)
        nn.init.constant_(model.weight, torch.nan)
        checkpointer.save(at + 2)
        if on_error == "raise":
            with pytest.raises(SaveFailed, match="finite: model/weight: 4 NaN"):
                checkpointer.close(60)
        checkpointer.close(60)
        generation = checkpointer.lattice.generation
        status = handfast.open(run).status()
        assert status.line == Epoch(generation, at + 1)
        newest = status.skips[0]
        assert newest.epoch == Epoch(generation, at + 2)
        assert newest.reason.startswith("a validator refused it: finite: model/weight")
        assert newest.domain == status.domains[0].id
    told = CliRunner().invoke(app, ["status", run])
    assert told.exit_code == 0, "a refused epoch is no damage"
    assert f"{newest.epoch} by {newest.domain}: a validator refused it" in told.stdout


def test_a_state_as_people_have_it_is_sound(run: str) -> None:
    """Masks of -inf, a scheduler whose best is inf, pickled and untrained parts: all validators."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "plateau": plateau}
    state["odd"] = {"code": print}
    options: dict[str, Any] = {"pickle": ("odd/code",), "validators": (*FINITE, "loss")}
    with Checkpointer(run, state, **options) as checkpointer:
        checkpointer.restore()
        for step in range(1, 6):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.save(step, extra={"loss": loss.detach()}).converged(60)


class Own(torch.optim.Optimizer):
    """Steps masters of bfloat16 weights, with moments under Adam's keys that are not Adam's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.9999)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["master"] = parameter.float()
                state["exp_avg_sq"] = torch.zeros_like(state["master"])
            state["exp_avg"] = torch.ones_like(state["master"])
            state["master"] -= 0.1 * parameter.grad.float()
            parameter.copy_(state["master"])


def test_an_optimizer_of_ones_own_and_an_average_are_sound(run: str) -> None:
    """The average has the names of the model, and none of its masters; whose moments are not looked
    at, the agent's log says once. And the model is held against its masters all the same."""
    model = nn.Linear(4, 4).bfloat16()
    average, optimizer = copy.deepcopy(model), Own(model.parameters())
    state = {"average": average, "model": model, "sgd": optimizer}
    with Checkpointer(run, state, validators=FINITE, on_error="warn") as checkpointer:
        checkpointer.restore()
        for step in range(1, 4):
            optimizer.zero_grad()
            model(torch.randn(8, 4).bfloat16()).square().mean().backward()
            optimizer.step()
            checkpointer.save(step).converged(60)
        (agent,) = agents()
        log = Path(f"/proc/{agent}/fd/2").read_text()
        assert log.count("moments: sgd is left alone") == 1
        with torch.no_grad():
            model.weight[0, 0] += 1
        with pytest.raises(SaveFailed, match="masters: model/weight: 1 of 16 values"):
            checkpointer.save(4).converged(60)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"validators": ("finite",), "images": 0}, "images=0 leaves validators nothing"),
        ({"validators": ("finit",)}, "validator 'finit': one of"),
        ({"validators": ("__main__:f",)}, "it runs in another process"),
        ({"validators": ("math:pi",)}, "is a float, and no function"),
        ({"validators": ("no.such.module:f",)}, "can't be imported: ModuleNotFoundError"),
        ({"validators": "finite"}, "give a tuple of names"),
        ({"validators": (len,)}, "give a tuple of names"),
        ({"validators": b"finite"}, "give a tuple of names"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    """Said at construction: no directory, no agent."""
    path = tmp_path / "run"
    with pytest.raises(ValueError, match=r"valid|names") as caught:
        Checkpointer(path, {"model": nn.Linear(1, 1)}, **options)
    assert why in str(caught.value)
    assert not path.exists()
    assert agents() == []


# --- several ranks ------------------------------------------------------------------------------


def test_one_rank_that_refuses_is_enough(launch: Launch, tmp_path: Path) -> None:
    """All learn the reason and who says it; all raise at the third; all resume below."""
    path = str(tmp_path / "{rank}")
    job = launch(2, 2)
    job.all(deeds.resume, path, "fsdp", validators=("finite",))
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    saved = job.all(deeds.digest)
    one, other = job
    other.do(guarding.spoil)
    for step in (3, 4, 5):
        job.all(deeds.save, step)
        for error in job.each_raises(deeds.converged):
            assert isinstance(error, SaveFailed)
            assert "a validator refused it: finite: model/0.weight" in str(error)
        assert job.all(deeds.call, "latest_step") == [2, 2]
    for error in job.each_raises(deeds.save, 6):
        assert isinstance(error, SaveFailed)
        assert "3 epochs in a row were refused, the last one: epoch 1/5: " in str(error)
    (first,) = [line for line in one.do(deeds.warnings) if line.startswith("epoch 1/3")]
    assert first.startswith("epoch 1/3: rank-00001-"), "rank 0 is told who says so"
    job.kill()
    for pid in agents():
        os.kill(pid, signal.SIGKILL)
    job = launch(2, 2)
    assert job.all(deeds.resume, path, "fsdp", validators=("finite",)) == [2, 2]
    assert job.all(deeds.digest) == saved
    job.all(deeds.train, 3)
    assert job.all(deeds.converged) == [Epoch(2, 3)] * 2
    job.all(deeds.close)


def test_what_is_left_to_another_rank_is_examined_there(launch: Launch, tmp_path: Path) -> None:
    """DDP's second rank stores no weights: the first one's validators see them for both."""
    path = str(tmp_path / "run")
    job = launch(2)
    job.all(deeds.resume, path, "ddp", validators=("finite",))
    job.all(deeds.train, 3)
    job.all(deeds.converged)
    job.all(guarding.spoil)
    job.all(deeds.save, 4)
    for error in job.each_raises(deeds.converged):
        assert "rank-00000" in str(error) or "validator refused it: finite: model" in str(error)
        assert "finite: model/0.weight" in str(error)
    assert job.all(deeds.call, "latest_step") == [3, 3]
    for trainer in job:
        trainer.kill()
