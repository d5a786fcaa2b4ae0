"""Shows that a correction does what it says, ends by itself, and no scheduler or save sees it."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from statekit import Snapshot, same_bytes
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from handfast.model.optimizer import step_reset
from handfast.torch.corrections import Applied, Correction, Damp, Rescale, Reset
from handfast.torch.tree import Kind, kind_of

Make = Callable[[Any], Optimizer]

COUNTING: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, weight_decay=0.1, foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, momentum_decay=0.01),
    "radam": torch.optim.RAdam,
    "adafactor": torch.optim.Adafactor,
}
OPTIMIZERS: dict[str, Make] = COUNTING | {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "muon": torch.optim.Muon,
}
CORRECTIONS: list[Correction] = [Reset(warmup=5), Damp(skew=5)]


class Job:
    """A small training: matrices, so that Muon takes them; all else follows from the step."""

    def __init__(self, make: Make) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
        self.model = nn.Sequential(*layers)
        self.optimizer = make(self.model.parameters())
        self.at = 0

    def loss(self) -> torch.Tensor:
        """The loss of this step's batch, with its gradients in the model."""
        batch = torch.linspace(-1, 1, 20).reshape(5, 4).roll(self.at) + 0.1 * self.at
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.model(batch).square().mean() - self.model(batch).mean()
        loss.backward()
        return loss

    def go(self, steps: int, factor: Callable[[int], float] | None = None) -> Job:
        """Take steps; with a factor, at that much of the rate, which is put in by hand."""
        for number in range(1, steps + 1):
            self.loss()
            scaled = self.optimizer.param_groups if factor is not None else []
            rates = [group["lr"] for group in scaled]
            for group in scaled:
                group["lr"] = group["lr"] * factor(number)
            self.optimizer.step()
            for group, rate in zip(scaled, rates, strict=True):
                group["lr"] = rate
            self.at += 1
        return self

    def bits(self) -> list[torch.Tensor]:
        """All tensors of the parameters and of the optimizer's state."""
        states = self.optimizer.state.values()
        held = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
        return [*self.model.parameters(), *held]


def alike(one: Job, other: Job) -> bool:
    """Whether two trainings stand at the same bits."""
    return all(same_bytes(a, b) for a, b in zip(one.bits(), other.bits(), strict=True))


# What each does


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_reset_leaves_an_optimizer_as_a_new_one(name: str) -> None:
    """To the bit, at every step of the warm-up and after it, if the rate is scaled by hand."""
    job = Job(OPTIMIZERS[name]).go(4)
    fresh = Job(OPTIMIZERS[name])
    fresh.model.load_state_dict(job.model.state_dict())
    fresh.at = job.at
    applied = Reset(warmup=3).apply(job.optimizer)
    job.go(3)
    assert applied.left == 0
    assert alike(job.go(2), fresh.go(3, lambda step: step / 3).go(2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_damping_divides_the_rate_by_what_is_left_of_the_skew(name: str) -> None:
    """By 4, 3, 2 and then not at all; moments and counters are kept."""
    job, plain = Job(OPTIMIZERS[name]).go(4), Job(OPTIMIZERS[name]).go(4)
    applied = Damp(skew=4).apply(job.optimizer)
    job.go(3)
    assert applied.left == 0
    assert alike(job.go(3), plain.go(3, lambda step: 1 / (5 - step)).go(3))
    assert [Damp(skew=4).factor(step) for step in (1, 2, 3, 4)] == [1 / 4, 1 / 3, 1 / 2, 1]


@pytest.mark.parametrize("name", COUNTING)
def test_a_wrong_counter_is_rescaled_away(name: str) -> None:
    """A counter of another epoch, corrected: the training goes on as if it had never been."""
    job, plain = Job(COUNTING[name]).go(7), Job(COUNTING[name]).go(7)
    for state in job.optimizer.state.values():
        state["step"].zero_()
        if "mu_product" in state:
            state["mu_product"].fill_(1.0)
    spoilt = copy.deepcopy(job)
    applied = Rescale(count=7).apply(job.optimizer)
    assert applied.left == 0
    assert alike(job.go(5), plain.go(5))
    assert not alike(spoilt.go(5), plain)


def test_what_a_counter_costs_is_the_closed_form() -> None:
    """The first update after a reset counter, by the factor that is derived; and back again."""

    def update(count: int, correction: Rescale | None) -> torch.Tensor:
        start = torch.zeros(3, dtype=torch.float64)
        parameter = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1.0, eps=0.0, weight_decay=0.0)
        for index in range(41):
            if index == 40:
                optimizer.state[parameter]["step"].fill_(count)
                parameter.detach().zero_()
                if correction is not None:
                    correction.apply(optimizer)
            parameter.grad = torch.tensor([1.0, -2.0, 0.5]).double() * (1 + index % 3)
            optimizer.step()
        return parameter.detach()

    right = update(40, None)
    wrong = update(0, None)
    assert torch.allclose(wrong / right, torch.tensor(step_reset(0.9, 0.999, 41)).double())
    assert same_bytes(update(0, Rescale(count=40)), right)
    assert same_bytes(update(3, Rescale(count=40)), right)


def test_a_counter_beyond_nadams_product_is_that_of_a_long_run() -> None:
    """Its product of momenta has come to 0 long before, and is not multiplied on."""
    job = Job(torch.optim.NAdam).go(1)
    Rescale(count=10**9).apply(job.optimizer)
    (state, *_) = job.optimizer.state.values()
    assert float(state["mu_product"]) == 0.0
    assert float(state["step"]) == 10**9


def test_parameters_without_moments_are_left_alone() -> None:
    """One that has had no gradient begins, as it would have, at its first."""
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for make in (torch.optim.NAdam, torch.optim.AdamW):
        optimizer = make([{"params": [used]}, {"params": [unused]}])
        used.grad = torch.ones(2)
        optimizer.step()
        Rescale(count=5).apply(optimizer)
        assert float(optimizer.state[used]["step"]) == 5
        assert unused not in optimizer.state


# Who must not notice

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [4]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


def rates(job: Job, scheduler: Any, steps: int) -> list[list[float]]:
    """The rates that a scheduler finds and sets, and what each step moved a lone parameter by."""
    found = []
    for _ in range(steps):
        job.go(1)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        found.append([group["lr"] for group in job.optimizer.param_groups])
    return found


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda each: each.name)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_as_if_nothing_were_damped(name: str, correction: Correction) -> None:
    """Whether it computes a rate from the last one or anew; two groups with rates of their own."""

    def make(parameters: Any) -> Optimizer:
        first, *rest = parameters
        return torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.01}])

    plain, job = Job(make), Job(make)
    wanted = rates(plain, SCHEDULERS[name](plain.optimizer), 10)
    scheduler = SCHEDULERS[name](job.optimizer)
    applied = correction.apply(job.optimizer)
    assert rates(job, scheduler, 10) == wanted
    assert applied.left == 0
    assert not alike(job, plain)


def test_the_rate_that_the_scheduler_sets_is_the_one_that_is_scaled() -> None:
    """Step by step: each moves a parameter by its scheduled rate times the factor."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    Reset(warmup=4).apply(optimizer)
    moved = []
    for _ in range(6):
        before = parameter.item()
        parameter.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        moved.append(before - parameter.item())
    assert moved == pytest.approx([0.25, 0.25, 0.1875, 0.125, 0.0625, 0.03125])


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    """A scheduler fills it in place, so it must be the same one after each step."""
    rate = torch.tensor(0.1)
    job = Job(lambda p: torch.optim.AdamW(p, lr=rate, foreach=False))
    plain = Job(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False))
    Damp(skew=3).apply(job.optimizer)
    job.go(4)
    assert job.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)
    plain.go(2, lambda step: 1 / (4 - step)).go(2)
    assert all(torch.allclose(a, b) for a, b in zip(job.bits(), plain.bits(), strict=True))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_meets_the_whole_rate(by_name: bool) -> None:
    """It may log it, or raise; the optimizer computes with the damped one, and gives the loss."""
    job, plain = Job(torch.optim.AdamW), Job(torch.optim.AdamW)
    Damp(skew=3).apply(job.optimizer)
    seen = []

    def closure() -> torch.Tensor:
        seen.append(job.optimizer.param_groups[0]["lr"])
        return job.loss()

    for _ in range(3):
        told = {"closure": closure} if by_name else {}
        loss = job.optimizer.step(*(() if by_name else (closure,)), **told)
        assert isinstance(loss, torch.Tensor)
        job.at += 1
    assert seen == [1e-3] * 3
    assert alike(job, plain.go(2, lambda step: 1 / (4 - step)).go(1))


def test_a_step_that_fails_damps_nothing_for_good() -> None:
    """In the closure, in the optimizer itself, and with a rate that was loaded in between."""
    job = Job(torch.optim.AdamW)
    group = job.optimizer.param_groups[0]
    applied = Damp(skew=3).apply(job.optimizer)

    def fails() -> float:
        raise OSError("no batch")

    with pytest.raises(OSError, match="no batch"):
        job.optimizer.step(fails)
    assert (group["lr"], applied.left) == (1e-3, 2)
    weight = job.model[0].weight
    sparse = torch.ones_like(weight).detach().to_sparse()
    weight.grad = sparse
    with pytest.raises(RuntimeError, match="sparse"):
        job.optimizer.step()
    job.go(1)
    assert (group["lr"], applied.left) == (1e-3, 1)
    weight.grad = sparse
    with pytest.raises(RuntimeError, match="sparse"):
        job.optimizer.step()
    group["lr"] = 0.5
    job.go(1)
    assert (group["lr"], applied.left) == (0.5, 0)


def test_other_hooks_are_called_as_ever() -> None:
    """Those that came before and after, at every step, the last of the warm-up too."""
    job = Job(torch.optim.AdamW)
    calls: list[str] = []
    job.optimizer.register_step_post_hook(lambda *_: calls.append("before"))
    Reset(warmup=2).apply(job.optimizer)
    job.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    job.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    job.go(4)
    assert calls == ["pre", "before", "after"] * 4


def test_a_step_that_a_scaler_skips_is_not_counted() -> None:
    """GradScaler calls no step where a gradient is infinite."""
    job = Job(torch.optim.AdamW)
    applied = Reset(warmup=2).apply(job.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    counted = []
    for bad in (False, True, False):
        job.optimizer.zero_grad()
        loss = scaler.scale(job.model(torch.ones(1, 4)).sum() * (float("inf") if bad else 1.0))
        loss.backward()
        scaler.step(job.optimizer)
        scaler.update()
        counted.append(applied.left)
    assert counted == [1, 1, 0]


# State


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda each: each.name)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resume_in_the_middle_is_exact(name: str, correction: Correction) -> None:
    """Through an image, into a process that knows nothing of the correction: to the last bit."""
    job = Job(OPTIMIZERS[name]).go(3)
    applied = correction.apply(job.optimizer)
    job.go(2)
    saved = Snapshot({"model": job.model, "optimizer": job.optimizer, "correction": applied})
    late = Job(OPTIMIZERS[name]).go(1)
    late.at = job.at
    taken_up = Applied(late.optimizer)
    saved.restore({"model": late.model, "optimizer": late.optimizer, "correction": taken_up})
    assert (taken_up.name, taken_up.left) == (correction.name, correction.steps - 2)
    assert alike(late.go(5), job.go(5))
    assert taken_up.left == applied.left == 0


def test_a_resume_without_it_goes_on_at_the_whole_rate() -> None:
    """So that it has to be saved: a state that lacks it is another one."""
    job = Job(torch.optim.AdamW).go(1)
    Damp(skew=9).apply(job.optimizer)
    job.go(2)
    saved = Snapshot({"model": job.model, "optimizer": job.optimizer})
    late = Job(torch.optim.AdamW)
    late.at = job.at
    saved.restore({"model": late.model, "optimizer": late.optimizer})
    assert alike(late, job)
    assert not alike(late.go(1), job.go(1))


def test_going_back_takes_the_correction_with_it() -> None:
    """In one process: to a moment in the middle, and to one before there was any."""
    job = Job(torch.optim.AdamW)
    applied = Applied(job.optimizer)
    whole = applied.state_dict()
    applied = Damp(skew=4).apply(job.optimizer)
    job.go(1)
    middle = applied.state_dict()
    job.go(4)
    assert applied.left == 0
    applied.load_state_dict(middle)
    assert applied.left == 2
    job.go(1)
    applied.load_state_dict(whole)
    assert (applied.left, applied.name, applied.describe()) == (0, "", "no correction")
    plain = Job(torch.optim.AdamW)
    plain.go(1, lambda _: 1 / 4).go(4, lambda step: 1 / max(1, 4 - step))
    plain.go(1, lambda _: 1 / 3)
    assert alike(job.go(2), plain.go(2))


def test_its_state_is_plain() -> None:
    """Values that any encoding has; an object of the state, for a Checkpointer."""
    applied = Reset(warmup=7).apply(Job(torch.optim.AdamW).optimizer)
    assert applied.state_dict() == {"correction": {"type": "reset", "warmup": 7}, "done": 0}
    assert kind_of(applied) is Kind.OBJECT


@pytest.mark.parametrize(
    "state",
    [{}, {"correction": None}, {"correction": {"type": "cure"}, "done": 0}, [],
     {"correction": {"type": "damp", "skew": 0}, "done": 0},
     {"correction": {"type": "reset", "warmup": 3}, "done": -1}],
)  # fmt: skip
def test_a_state_that_is_none_is_refused(state: Any) -> None:
    """And nothing is changed then."""
    applied = Damp(skew=4).apply(Job(torch.optim.AdamW).optimizer)
    with pytest.raises(ValueError, match="not the state of a correction"):
        applied.load_state_dict(state)
    assert applied.left == 3


def test_a_later_correction_ends_the_earlier() -> None:
    """Two at once would each take the other's rate for the training's. What is applied goes on in
    what there is, since that may be in the state.
    """
    job, plain = Job(torch.optim.AdamW), Job(torch.optim.AdamW)
    first = Damp(skew=50).apply(job.optimizer)
    job.go(1)
    assert Damp(skew=7).apply(job.optimizer) is first
    assert first.left == 6
    second = Applied(job.optimizer, Damp(skew=3))
    assert (first.left, second.left) == (0, 2)
    plain.go(1, lambda _: 1 / 50).go(2, lambda step: 1 / (4 - step)).go(2)
    assert alike(job.go(4), plain)
    first.load_state_dict({"correction": {"type": "damp", "skew": 3}, "done": 0})
    second.load_state_dict({"correction": {"type": "damp", "skew": 9}, "done": 6})
    assert (first.left, second.left) == (0, 2)
    assert alike(job.go(2), plain.go(2, lambda step: 1 / (4 - step)))


def test_it_can_be_ended() -> None:
    """Between two steps, and by the closure of one, which is taken whole then."""
    job, plain = Job(torch.optim.AdamW), Job(torch.optim.AdamW)
    applied = Damp(skew=50).apply(job.optimizer)
    job.go(1)
    applied.end()
    assert applied.left == 0
    assert alike(job.go(2), plain.go(1, lambda _: 1 / 50).go(2))
    applied = Damp(skew=50).apply(job.optimizer)

    def closure() -> torch.Tensor:
        applied.end()
        return job.loss()

    job.optimizer.step(closure)
    job.at += 1
    assert alike(job.go(1), plain.go(2))


def test_neither_keeps_the_other_alive() -> None:
    """An optimizer that was corrected is freed when its training is."""
    job = Job(torch.optim.AdamW)
    Damp(skew=50).apply(job.optimizer)
    held = weakref.ref(job.optimizer)
    del job
    gc.collect()
    assert held() is None


# What is refused


class Own(torch.optim.AdamW):
    """An optimizer that may keep what nobody here knows of."""


REFUSED: Sequence[Make] = [
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax, torch.optim.LBFGS, Own,
]  # fmt: skip


@pytest.mark.parametrize("correction", [*CORRECTIONS, Rescale(count=3)], ids=lambda c: c.name)
@pytest.mark.parametrize("make", REFUSED)
def test_an_unknown_optimizer_is_refused(make: Make, correction: Correction) -> None:
    """By name, and before anything is changed."""
    job = Job(make)
    job.optimizer.step(job.loss)
    before = [each.clone() for each in job.bits()]
    with pytest.raises(TypeError, match=f"{type(job.optimizer).__name__} can't be corrected"):
        correction.apply(job.optimizer)
    assert all(same_bytes(a, b) for a, b in zip(before, job.bits(), strict=True))


def test_a_parameter_that_no_batch_has_used_has_no_counter_to_rescale() -> None:
    """Looking it up has made an empty state: it raised half-way, with the others changed."""
    optimizer = Job(torch.optim.AdamW).go(2).optimizer
    spare = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [spare]})
    assert optimizer.state[spare] == {}
    Rescale(count=3).apply(optimizer)
    counts = [state["step"].item() for state in optimizer.state.values() if state]
    assert set(counts) == {3.0}


def test_a_counter_is_rescaled_only_where_there_is_one() -> None:
    """SGD and Muon correct no bias; an optimizer that has not stepped has nothing to correct."""
    for name in ("momentum", "muon"):
        with pytest.raises(
            TypeError, match=r"none of torch's Adam, .* correct a bias by a counter"
        ):
            Rescale(count=3).apply(Job(OPTIMIZERS[name]).go(1).optimizer)
    with pytest.raises(ValueError, match="AdamW has no moments"):
        Rescale(count=3).apply(Job(torch.optim.AdamW).optimizer)


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True, float("nan")])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Reset, "warmup={}: give how many steps it takes, a whole number from 0 up"),
        (Rescale, "count={}: give how many steps the moments have seen, a whole number from 0 up"),
        (Damp, "skew={}: give how many steps the parts are apart, a whole number from 1 up"),
    ],
)
def test_numbers_without_a_meaning_are_refused(kind: Any, said: str, value: object) -> None:
    """With what to give; a skew of none, too."""
    with pytest.raises(ValueError, match=f"^{re.escape(said.format(repr(value)))}$"):
        kind(value)
    with pytest.raises(ValueError, match="skew=0"):
        Damp(skew=0)


def test_what_is_left_can_be_read_at_the_prompt() -> None:
    """Whose it is, what was done, and how much is to come."""
    applied = Reset(warmup=3).apply(Job(torch.optim.AdamW).optimizer)
    assert repr(applied) == (
        "Applied(AdamW: heuristic: moments begun anew, learning rate warmed up over 3 steps; "
        "3 steps left)"
    )
    assert repr(Applied(Job(OPTIMIZERS["sgd"]).optimizer)) == "Applied(SGD: no correction)"


def test_each_says_that_it_is_a_heuristic() -> None:
    """In the words that are recorded, and where it is explained."""
    for correction in (*CORRECTIONS, Rescale(count=3)):
        assert correction.describe().startswith("heuristic: ")
        assert (type(correction).__doc__ or "").startswith("A heuristic: ")
        job = Job(torch.optim.AdamW).go(1)
        applied = correction.apply(job.optimizer)
        assert applied.name == correction.name
        assert applied.describe() == f"{correction.describe()}; {correction.steps} steps left"


def test_a_reset_without_a_warm_up_is_over_at_once() -> None:
    """So is a skew of one step, by which nothing is divided."""
    job, plain = Job(torch.optim.AdamW), Job(torch.optim.AdamW)
    assert Reset(warmup=0).apply(job.optimizer).left == 0
    assert Damp(skew=1).apply(job.optimizer).left == 0
    assert alike(job.go(2), plain.go(2))
