"""Shows what holds of torch's own optimizers on every trajectory, how tightly, and what it finds.

Real steps of real optimizers, over gradients of all sizes, sparse, flipping and adverse. A bound
that one of them broke would be an audit's false alarm; one that none of them reaches would be
worth less than it says; and a splice that breaks none is shown too, so that nobody claims it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Optimizer

from handfast.audit.invariants import (
    EXACT,
    ROUNDING,
    Bound,
    Gap,
    Rounding,
    changing,
    factors,
    gain,
    limit,
    moments,
    newton_schulz,
    update,
)
from handfast.model.optimizer import moment_bound

PAGE = Path(__file__).parents[2] / "docs" / "optimizer.md"
SIZE = 24
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5), (0.95, 0.9025)]
PRECISE = {"float64": torch.float64, "float32": torch.float32}
DTYPES = PRECISE | {"bfloat16": torch.bfloat16}

Make = Callable[..., Optimizer]
ADAMS: dict[str, Make] = {
    "adam": lambda p, **more: torch.optim.Adam(p, weight_decay=0.1, foreach=False, **more),
    "adamw": lambda p, **more: torch.optim.AdamW(p, weight_decay=0.1, foreach=True, **more),
    "fused": lambda p, **more: torch.optim.AdamW(p, fused=True, **more),
    "amsgrad": lambda p, **more: torch.optim.Adam(p, amsgrad=True, **more),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}


class Lion(Optimizer):
    """Algorithm 2 of X. Chen et al., *Symbolic Discovery of Optimization Algorithms*, 2023.

    torch has none, so this is the paper's, line by line.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                sign = m.mul(beta1).add(p.grad, alpha=1 - beta1).sign()
                p.mul_(1 - lr * group["decay"]).add_(sign, alpha=-lr)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


# Gradients

KINDS = ("dense", "sparse", "flip", "constant", "zero", "adverse")


def scenes(most: int = 20) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Some steps: what the gradient of each is like, and its power of ten."""
    return st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(-most, most)), min_size=1, max_size=40
    )


def gradients(
    scene: Sequence[tuple[str, int]], seed: int, shape: Sequence[int] = (SIZE,)
) -> Iterator[Tensor]:
    """The gradients of a scene, in float64."""
    drawn = torch.Generator().manual_seed(seed)
    for index, (kind, power) in enumerate(scene):
        noise = torch.randn(*shape, generator=drawn, dtype=torch.float64)
        size = 10.0**power
        if kind == "zero":
            yield torch.zeros_like(noise)
        elif kind == "dense":
            yield noise * size
        elif kind == "sparse":
            yield noise * (noise > 1) * size
        elif kind == "flip":
            yield torch.full_like(noise, size * (-1) ** index)
        elif kind == "constant":
            yield torch.full_like(noise, size)
        else:
            yield torch.full_like(noise, size * (0.9 / 0.999) ** (len(scene) - index))


def adverse(beta1: float, beta2: float, steps: int) -> Iterator[Tensor]:
    """The gradients that reach the bound: (b1/b2)^k, k steps before the last."""
    for k in reversed(range(steps)):
        yield torch.full((SIZE,), (beta1 / beta2) ** k, dtype=torch.float64)


def trajectory(
    make: Callable[[list[Tensor]], Optimizer],
    given: Iterator[Tensor],
    dtype: torch.dtype,
    before: Callable[[Optimizer, int], None] = lambda *_: None,
) -> list[dict[str, Tensor]]:
    """The optimizer's state after each step, with the parameter as ``theta``."""
    states: list[dict[str, Tensor]] = []
    parameter, optimizer = torch.empty(0), None
    for number, gradient in enumerate(given):
        if optimizer is None:
            start = torch.linspace(-1, 1, gradient.numel()).view_as(gradient)
            parameter = torch.nn.Parameter(start.to(dtype))
            optimizer = make([parameter])
            states.append({"theta": parameter.detach().clone()})
        before(optimizer, number)
        parameter.grad = gradient.to(dtype)
        optimizer.step()
        entry = {key: value.clone() for key, value in optimizer.state[parameter].items()}
        states.append(entry | {"theta": parameter.detach().clone()})
    return states


def obeys(bound: Bound, late: dict[str, Tensor], early: dict[str, Tensor] | None = None) -> int:
    """How many elements break the bound: by its own words, one by one."""
    names = ("exp_avg", "exp_avg_sq")
    zero = dict.fromkeys(names, torch.zeros(1).expand_as(late["theta"]))
    told = [(state or zero)[name].tolist() for state in (late, early) for name in names]
    return sum(not bound.holds(*each) for each in zip(*told, strict=True))


# Moments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAMS)
@given(scene=scenes(), seed=st.integers(0, 1 << 30), betas=st.sampled_from(BETAS))
def test_no_trajectory_breaks_the_moments_bounds(
    name: str, dtype: str, scene: list[tuple[str, int]], seed: int, betas: tuple[float, float]
) -> None:
    """For one epoch, whether or not its counter is known, and for any two of one trajectory."""
    rounding = ROUNDING[dtype]
    _, *states = trajectory(
        lambda p: ADAMS[name](p, betas=betas), gradients(scene, seed), DTYPES[dtype]
    )
    last = len(states)
    assert obeys(moments(*betas, last, rounding), states[-1]) == 0
    assert obeys(moments(*betas, rounding=rounding), states[-1]) == 0
    for number, early in enumerate(states[:-1], 1):
        assert obeys(moments(*betas, last - number, rounding), states[-1], early) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@given(scene=scenes(), seed=st.integers(0, 1 << 30), start=st.integers(0, 3))
def test_no_trajectory_breaks_the_bound_of_changing_betas(
    dtype: str, scene: list[tuple[str, int]], seed: int, start: int
) -> None:
    """Where the betas follow a schedule that is known; the constant bound does break there."""
    schedule = [BETAS[(start + i) % len(BETAS)] for i in range(len(scene))]

    def turn(optimizer: Optimizer, number: int) -> None:
        optimizer.param_groups[0]["betas"] = schedule[number]

    states = trajectory(torch.optim.AdamW, gradients(scene, seed), DTYPES[dtype], turn)
    assert obeys(changing(schedule, ROUNDING[dtype]), states[-1]) == 0
    for number in range(1, len(scene)):
        bound = changing(schedule[number:], ROUNDING[dtype])
        assert obeys(bound, states[-1], states[number]) == 0


def test_changed_betas_break_the_constant_bound() -> None:
    """So an audit that knows no schedule may call such an element a hint at most."""

    def turn(optimizer: Optimizer, number: int) -> None:
        optimizer.param_groups[0]["betas"] = (0.5, 0.999) if number == 9 else (0.9, 0.9)

    states = trajectory(
        torch.optim.AdamW, iter([torch.ones(SIZE)] * 10), torch.float64, turn
    )  # fmt: skip
    assert obeys(moments(0.9, 0.9, 10), states[-1]) == SIZE
    assert obeys(moments(0.9, 0.9, 9), states[-2]) == 0
    assert obeys(changing([(0.9, 0.9)] * 9 + [(0.5, 0.999)]), states[-1]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("steps", [1, 2, 10, 300])
def test_adverse_gradients_reach_the_bound(
    betas: tuple[float, float], steps: int, dtype: str
) -> None:
    """So no smaller one would do. In bfloat16 v can't fall by a thousandth, so it is not met."""
    states = trajectory(
        lambda p: torch.optim.AdamW(p, betas=betas), adverse(*betas, steps), DTYPES[dtype]
    )
    m, v = states[-1]["exp_avg"].double(), states[-1]["exp_avg_sq"].double()
    exact = moments(*betas, steps)
    if dtype in PRECISE:
        assert float((m / v.sqrt()).min()) >= 0.999 * exact.most
    assert obeys(moments(*betas, steps, ROUNDING[dtype]), states[-1]) == 0


def test_machine_numbers_break_the_real_bound() -> None:
    """By a rounding where it is reached, and wholly where squares are lost: so slack is needed."""
    for name, dtype in DTYPES.items():
        once = trajectory(torch.optim.AdamW, gradients([("dense", 0)], 0), dtype)
        assert obeys(moments(0.9, 0.999, 1), once[-1]) > 0
        assert obeys(moments(0.9, 0.999, 1, ROUNDING[name]), once[-1]) == 0
    for size in (1e-25, 1e-20):
        tiny = trajectory(torch.optim.AdamW, iter([torch.ones(SIZE) * size] * 3), torch.float32)
        assert obeys(moments(0.9, 0.999, 3), tiny[-1]) == (SIZE if size < 1e-23 else 0)
        assert obeys(moments(0.9, 0.999, 3, ROUNDING["float32"]), tiny[-1]) == 0


@pytest.mark.parametrize("betas", BETAS)
def test_the_bound_is_the_models_where_nothing_is_rounded(betas: tuple[float, float]) -> None:
    """And each schedule of constant betas is a changing one."""
    for steps in (1, 2, 50, math.inf):
        assert moments(*betas, steps).most == pytest.approx(moment_bound(*betas, steps))
    for rounding in (EXACT, *ROUNDING.values()):
        one, other = moments(*betas, 50, rounding), changing([betas] * 50, rounding)
        for field in Bound.__struct_fields__:
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-9)


def test_one_step_is_an_identity() -> None:
    """(dm/(1-b1))^2 = dv/(1-b2), elementwise: of two epochs a step apart, and of the first."""
    beta1, beta2 = 0.9, 0.999
    scene = [("dense", 0)] * 12
    start, *states = trajectory(torch.optim.AdamW, gradients(scene, 3), torch.float64)
    zero = torch.zeros_like(start["theta"])
    start |= {"exp_avg": zero, "exp_avg_sq": zero}
    for early, late in pairwise([start, *states]):
        m = (late["exp_avg"] - beta1 * early["exp_avg"]) / (1 - beta1)
        v = (late["exp_avg_sq"] - beta2 * early["exp_avg_sq"]) / (1 - beta2)
        assert torch.allclose(m.square(), v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@given(scene=scenes(), seed=st.integers(0, 1 << 30))
def test_amsgrads_maximum_is_one(dtype: str, scene: list[tuple[str, int]], seed: int) -> None:
    """At least v, and never falling, to the last bit: nothing is rounded in a maximum."""
    states = trajectory(ADAMS["amsgrad"], gradients(scene, seed), DTYPES[dtype])[1:]
    highest = torch.zeros(SIZE, dtype=DTYPES[dtype])
    for state in states:
        assert bool((state["exp_avg_sq"] >= 0).all())
        assert bool((state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all())
        assert bool((state["max_exp_avg_sq"] >= highest).all())
        highest = state["max_exp_avg_sq"]


# Steps


@pytest.mark.parametrize("dtype", PRECISE)
@pytest.mark.parametrize("amsgrad", [False, True])
@given(
    scene=scenes(), seed=st.integers(0, 1 << 30), betas=st.sampled_from(BETAS),
    lr=st.sampled_from([1e-5, 1e-2, 1.0]),
)  # fmt: skip
def test_no_step_of_adamw_is_longer_than_its_bound(
    dtype: str, amsgrad: bool, scene: list[tuple[str, int]], seed: int,
    betas: tuple[float, float], lr: float,
) -> None:  # fmt: skip
    """Whatever came, an element moves by no more than that many learning rates."""
    rounding, decay = ROUNDING[dtype], 0.1
    states = trajectory(
        lambda p: torch.optim.AdamW(p, lr, betas, weight_decay=decay, amsgrad=amsgrad),
        gradients(scene, seed), PRECISE[dtype],
    )  # fmt: skip
    for step in range(1, len(states)):
        early, late = (states[at]["theta"].double() for at in (step - 1, step))
        moved = (late - (1 - lr * decay) * early).abs()
        most = lr * update(*betas, step, 1e-8, rounding) + 4 * rounding.unit * early.abs()
        assert bool((moved <= most).all())


@pytest.mark.parametrize("betas", BETAS[:2])
@pytest.mark.parametrize("steps", [1, 10, 300])
def test_adverse_gradients_step_as_far_as_the_bound(betas: tuple[float, float], steps: int) -> None:
    """Seven learning rates at once, with the usual betas."""
    states = trajectory(
        lambda p: torch.optim.AdamW(p, 0.5, betas, eps=1e-30, weight_decay=0),
        adverse(*betas, steps), torch.float64,
    )  # fmt: skip
    moved = (states[-2]["theta"] - states[-1]["theta"]) / 0.5
    assert float(moved.min()) >= 0.999 * update(*betas, steps)
    assert update(*betas, steps, 0.0, ROUNDING["float32"]) == math.inf


# One buffer


@pytest.mark.parametrize("dtype", DTYPES)
@given(scene=scenes(), seed=st.integers(0, 1 << 30), dampening=st.sampled_from([0.0, 0.5]))
def test_no_buffer_is_larger_than_its_gain(
    dtype: str, scene: list[tuple[str, int]], seed: int, dampening: float
) -> None:
    """SGD's and Lion's, in units of the largest gradient so far; in the maximum norm, say."""
    given_ = list(gradients(scene, seed))
    largest = max(float(g.to(DTYPES[dtype]).abs().max()) for g in given_)
    rounding = ROUNDING[dtype]
    lost = 4 * len(scene) * rounding.least  # below the normal numbers
    sgd = trajectory(
        lambda p: torch.optim.SGD(p, 1e-3, 0.9, dampening), iter(given_), DTYPES[dtype]
    )
    most = gain(0.9, 1 - dampening, 1.0, len(scene), rounding) * largest + lost
    assert float(sgd[-1]["momentum_buffer"].abs().max()) <= most
    lion = trajectory(lambda p: Lion(p, 1e-3, (0.9, 0.99), 0.1), iter(given_), DTYPES[dtype])
    most = gain(0.99, 1 - 0.99, 1 - 0.99, len(scene), rounding) * largest + lost
    assert float(lion[-1]["exp_avg"].abs().max()) <= most


def test_a_constant_gradient_reaches_the_gain() -> None:
    """With and without dampening, of an average, and of torch's Muon, which averages."""
    for dampening in (0.0, 0.5):
        states = trajectory(
            lambda p, d=dampening: torch.optim.SGD(p, 1e-3, 0.9, d),
            iter([torch.ones(SIZE)] * 40), torch.float64,
        )  # fmt: skip
        most = gain(0.9, 1 - dampening, 1.0, 40)
        assert float(states[-1]["momentum_buffer"].min()) >= 0.999 * most
    muon = trajectory(torch.optim.Muon, iter([torch.ones(3, 5)] * 40), torch.float64)
    assert float(muon[-1]["momentum_buffer"].min()) == pytest.approx(gain(0.95, 0.05, 0.05, 40))
    assert gain(0.95, 0.05, 0.05) == pytest.approx(1.0)
    assert gain(0.9, 1.0, 1.0) == pytest.approx(10.0)
    assert gain(0.999, 1.0, 1.0, rounding=ROUNDING["bfloat16"]) == math.inf


@given(scene=scenes(6), seed=st.integers(0, 1 << 30))
def test_sgd_moves_by_its_buffer(scene: list[tuple[str, int]], seed: int) -> None:
    """Without decay and Nesterov: exactly. With Nesterov by the gradient, too, which it hides."""
    states = trajectory(
        lambda p: torch.optim.SGD(p, 1e-2, 0.9), gradients(scene, seed), torch.float64
    )
    for early, late in pairwise(states):
        moved, buffer = late["theta"] - early["theta"], late["momentum_buffer"]
        room = 1e-15 * (early["theta"].abs() + late["theta"].abs() + buffer.abs())
        assert bool(((moved + 1e-2 * buffer).abs() <= room).all())
    nesterov = trajectory(
        lambda p: torch.optim.SGD(p, 1e-2, 0.9, nesterov=True),
        gradients(scene, seed), torch.float64,
    )  # fmt: skip
    for early, late in pairwise(nesterov[1:]):
        gradient = late["momentum_buffer"] - 0.9 * early["momentum_buffer"]
        step = 1e-2 * (gradient + 0.9 * late["momentum_buffer"])
        room = 1e-13 * (early["momentum_buffer"].abs() + late["theta"].abs() + step.abs())
        assert bool(((late["theta"] - early["theta"] + step).abs() <= room).all())


@given(scene=scenes(), seed=st.integers(0, 1 << 30))
def test_lion_moves_by_its_rate_or_not_at_all(scene: list[tuple[str, int]], seed: int) -> None:
    """And which way follows from the two momenta: four tensors of two epochs hang together."""
    lr, (beta1, beta2), decay = 1e-2, (0.9, 0.99), 0.1
    states = trajectory(
        lambda p: Lion(p, lr, (beta1, beta2), decay), gradients(scene, seed), torch.float64
    )
    zero = torch.zeros(SIZE, dtype=torch.float64)
    for early, late in pairwise(states):
        moved = (late["theta"] - (1 - lr * decay) * early["theta"]) / -lr
        assert torch.allclose(moved, moved.round(), rtol=0, atol=1e-12)
        assert float(moved.abs().max()) <= 1 + 1e-12
        m0, m = early.get("exp_avg", zero), late["exp_avg"]
        pull = beta1 * m0 + (1 - beta1) / (1 - beta2) * (m - beta2 * m0)
        clear = pull.abs() > 1e-10 * (m0.abs() + m.abs())
        assert torch.equal(moved.round()[clear], pull.sign()[clear])


# What no parameter grows beyond


@pytest.mark.parametrize("dtype", PRECISE)
def test_no_parameter_grows_beyond_its_limit(dtype: str) -> None:
    """Lion, AdamW and Muon against their decay: a constant gradient comes close, none is beyond."""
    lr, decay = 0.02, 0.5
    rounding = ROUNDING[dtype]
    most = limit(1.0, lr, decay, rounding)
    lion = trajectory(
        lambda p: Lion(p, lr, (0.9, 0.99), decay), iter([torch.ones(SIZE)] * 800), PRECISE[dtype]
    )
    assert 0.999 * most <= float(lion[-1]["theta"].abs().max()) <= most
    longest = max(update(0.9, 0.999, step, 1e-8, rounding) for step in range(1, 800))
    drawn = gradients([("dense", i % 7 - 3) for i in range(800)], 0)
    adamw = trajectory(
        lambda p: torch.optim.AdamW(p, lr, weight_decay=decay), drawn, PRECISE[dtype]
    )
    assert float(adamw[-1]["theta"].abs().max()) <= max(1.0, limit(longest, lr, decay, rounding))


def test_where_rounding_beats_the_decay_there_is_no_limit() -> None:
    """A small rate and decay in float32: (1 - lr decay) rounds to 1."""
    assert limit(1.0, 1e-3, 0.1) == pytest.approx(10.0)
    assert limit(1.0, 1e-7, 0.01, ROUNDING["float32"]) == math.inf
    assert limit(1.0, 1e-3, 0.1, ROUNDING["bfloat16"]) == math.inf


# Adafactor


SHAPES = st.sampled_from([(4, 6), (1, 9), (7, 1), (3, 4, 5)])


def means(state: dict[str, Tensor]) -> list[tuple[float, float]]:
    """The mean of the row factor and of the column factor, of each matrix."""
    rows = state["row_var"].double().mean(dim=(-2, -1)).flatten().tolist()
    columns = state["col_var"].double().mean(dim=(-2, -1)).flatten().tolist()
    return list(zip(rows, columns, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(scene=scenes(15), seed=st.integers(0, 1 << 30), shape=SHAPES)
def test_adafactors_factors_agree_on_the_mean(
    dtype: str, scene: list[tuple[str, int]], seed: int, shape: tuple[int, ...]
) -> None:
    """Whatever the gradients were, at each step, and of tensors with more dimensions, too."""
    states = trajectory(
        torch.optim.Adafactor, gradients(scene, seed, shape), DTYPES[dtype]
    )[1:]  # fmt: skip
    for step, state in enumerate(states, 1):
        gap = factors(step, -0.8, *shape[-2:], ROUNDING[dtype])
        assert all(gap.holds(*each) for each in means(state))
        assert bool((state["row_var"] >= 0).all())
        assert bool((state["col_var"] >= 0).all())


def test_factors_of_two_epochs_are_told_apart() -> None:
    """Unless their means are alike: those of a training differ far beyond what is allowed."""
    scene = [("dense", 0)] * 60
    states = trajectory(torch.optim.Adafactor, gradients(scene, 1, (16, 32)), torch.float32)
    gap = factors(60, -0.8, 16, 32, ROUNDING["float32"])
    ((rows, _),), ((_, columns),) = means(states[59]), means(states[60])
    assert gap.times < 1e-4
    assert not gap.holds(rows, columns)
    assert gap.holds(*means(states[60])[0])
    assert factors(10**6, -0.8, 4096, 4096, ROUNDING["float32"]).times < 0.05
    assert factors(10**4, -0.8, 16, 32, ROUNDING["bfloat16"]) == Gap(math.inf, math.inf)
    assert factors(7, -0.8, 16, 32) == Gap(0.0, 0.0)


def test_what_is_not_a_number_agrees_with_nothing() -> None:
    """Nor does it obey a bound; an infinite v, which a large gradient makes, does."""
    assert not Gap(1.0, 0.0).holds(math.nan, 1.0)
    assert not Gap(math.inf, math.inf).holds(1.0, math.nan)
    assert Gap(0.0, 0.0).holds(math.inf, math.inf)
    for bound in (moments(0.9, 0.999), moments(0.95, 0.9)):
        assert not bound.holds(math.nan, 1.0)
        assert not bound.holds(0.0, math.nan)
        assert not bound.holds(0.0, -1e-30)
        assert not bound.holds(math.inf, math.inf)
        assert not bound.holds(0.0, -math.inf)
        assert bound.holds(1e30, math.inf, 1.0, math.inf)
    assert moments(0.95, 0.9).holds(1e30, 1e-30)
    assert not moments(0.95, 0.9, 1).holds(0.0, 0.5, 0.0, 1.0)


@given(scene=scenes(15), seed=st.integers(0, 1 << 30))
def test_adafactor_moves_by_its_relative_step(scene: list[tuple[str, int]], seed: int) -> None:
    """In root mean square: d min(lr, 1/sqrt t) times the parameter's own, or eps2 where larger."""
    lr, decay = 1e-2, 0.1
    states = trajectory(
        lambda p: torch.optim.Adafactor(p, lr, weight_decay=decay),
        gradients(scene, seed, (4, 6)), torch.float64,
    )  # fmt: skip
    for step in range(1, len(states)):
        early, late = states[step - 1]["theta"], states[step]["theta"]
        moved = (late - (1 - lr * decay) * early).square().mean().sqrt()
        own = max(1e-3, float(early.square().mean().sqrt()))
        assert float(moved) <= own * min(lr, step**-0.5) * (1 + 1e-9)


# Muon


@given(scene=scenes(15), seed=st.integers(0, 1 << 30), shape=st.sampled_from([(4, 6), (9, 3)]))
def test_muon_moves_by_its_singular_values(
    scene: list[tuple[str, int]], seed: int, shape: tuple[int, int]
) -> None:
    """1.2024 with its own coefficients; torch iterates in bfloat16, so a hundredth is allowed."""
    lr, decay = 1e-2, 0.1
    most = newton_schulz((3.4445, -4.7750, 2.0315), 5)
    assert most == pytest.approx(1.2024, abs=1e-4)
    states = trajectory(
        lambda p: torch.optim.Muon(p, lr, weight_decay=decay),
        gradients(scene, seed, shape), torch.float64,
    )  # fmt: skip
    adjusted = lr * math.sqrt(max(1.0, shape[0] / shape[1]))
    for early, late in pairwise(states):
        moved = late["theta"] - (1 - lr * decay) * early["theta"]
        assert float(torch.linalg.matrix_norm(moved, 2)) <= adjusted * most * 1.01


def test_the_iteration_is_bounded_at_its_turns() -> None:
    """The greatest value of the polynomial on a fine grid, iterated, and coefficients that grow."""
    for coefficients in ((3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5), (1.5, 0.1, 0.2)):
        a, b, c = coefficients
        x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        for _ in range(4):
            x = x * (a + b * x**2 + c * x**4)
        bound = newton_schulz(coefficients, 4)
        assert float(x.abs().max()) <= bound * (1 + 1e-12)
    assert newton_schulz((1.5, 0.1, 0.2), 1) == pytest.approx(1.8)
    with pytest.raises(ValueError, match="fifth power"):
        newton_schulz((1.5, -0.5, 0.0), 5)


# What a splice breaks, and what it does not


def course(growth: float, betas: tuple[float, float] = (0.9, 0.999)) -> list[dict[str, Tensor]]:
    """A training of 200 steps whose gradients are noise, ``growth`` times as large at its end."""
    drawn = torch.Generator().manual_seed(5)
    sizes = (growth ** (i / 200) for i in range(200))
    noise = (torch.randn(400, generator=drawn, dtype=torch.float64) * size for size in sizes)
    return trajectory(lambda p: torch.optim.AdamW(p, betas=betas), noise, torch.float32)


def spliced(m: dict[str, Tensor], v: dict[str, Tensor], counter: int) -> int:
    """How many of 400 elements break the bound of float32 with this counter."""
    state = {"theta": m["theta"], "exp_avg": m["exp_avg"], "exp_avg_sq": v["exp_avg_sq"]}
    return obeys(moments(0.9, 0.999, counter, ROUNDING["float32"]), state)


def test_most_splices_break_nothing() -> None:
    """Parameters of one epoch with moments of another; m and v of two; a counter begun anew."""
    states = course(1.0)
    early, late = states[100], states[200]
    assert spliced(late, late, 200) == 0  # with any parameters at all
    assert spliced(early, late, 200) == 0
    assert spliced(late, early, 200) == 0
    assert spliced(late, late, 10) == 0
    falling = course(1e-2)
    assert spliced(falling[100], falling[200], 200) == 0
    between = moments(0.9, 0.95, 100, ROUNDING["float32"])
    settled = course(1.0, (0.9, 0.95))
    assert obeys(between, settled[100], settled[200]) == 0  # the two in the wrong order


def test_some_splices_break_the_bound() -> None:
    """A late m over an early v of gradients that grew much; zeroed v; counters of 0 or 1."""
    growing = course(1e6)
    assert spliced(growing[200], growing[100], 200) > 300
    states = course(1.0)
    late, wiped = states[200], {"exp_avg_sq": torch.zeros(400)}
    assert spliced(late, wiped, 200) == 400
    ratio = late["exp_avg"].abs() / late["exp_avg_sq"].sqrt()  # |m| = K_1 sqrt(v) after one step
    assert int(torch.isclose(ratio, torch.tensor(moments(0.9, 0.999, 1).most), rtol=1e-5).sum()) < 4
    first = states[1]["exp_avg"].abs() / states[1]["exp_avg_sq"].sqrt()
    assert torch.allclose(first, torch.tensor(moments(0.9, 0.999, 1).most))


def test_two_epochs_break_what_one_does_not() -> None:
    """In the wrong order where v grew, as it does early; and a shard that was saved twice."""
    growing = course(1e6)
    wrong = moments(0.9, 0.999, 100, ROUNDING["float32"])
    assert obeys(wrong, growing[200], growing[100]) == 0
    assert obeys(wrong, growing[100], growing[200]) == 400
    states = course(1.0)
    assert obeys(wrong, states[100], states[200]) == 400
    once = moments(0.9, 0.999, 1, ROUNDING["float32"])
    assert obeys(once, states[101], states[100]) == 0
    m, v = states[100]["exp_avg"].double(), states[100]["exp_avg_sq"].double()
    assert 50 < obeys(once, states[100], states[100]) <= int((m.square() > v).sum())


def test_one_buffer_refutes_nothing() -> None:
    """SGD and Lion: any buffer is one step's from any other, so an epoch alone says nothing."""
    for wanted in (-1e3, 0.0, 7.5):
        states = trajectory(
            lambda p: torch.optim.SGD(p, 1e-2, 0.9),
            iter([torch.ones(SIZE), torch.ones(SIZE).double() * (wanted - 0.9)]), torch.float64,
        )  # fmt: skip
        assert torch.allclose(states[-1]["momentum_buffer"], torch.tensor(wanted).double())


def test_the_formulas_refuse_what_has_no_meaning() -> None:
    """No steps, and betas that no optimizer has."""
    with pytest.raises(ValueError, match="no steps"):
        changing([])
    with pytest.raises(ValueError, match=r"betas \(1.0, 0.9\)"):
        changing([(1.0, 0.9)])
    with pytest.raises(ValueError, match="beta2 above 0"):
        changing([(0.9, 0.0)])
    assert moments(0.9, 0.0).most == math.inf
    assert moments(0.9, 0.0, 1).most == pytest.approx(0.1)
    assert moments(0.0, 0.0).most == 1.0
    assert moments(0.99, 0.9, 10**6).most == math.inf
    assert moments(0.99, 0.999, 10**6, ROUNDING["bfloat16"]).most == math.inf


def test_the_pages_table_is_worked_out() -> None:
    """docs/optimizer.md gives for each dtype what these formulas give now."""
    lines = re.findall(r"^\| (float\d+|bfloat16) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert dict(lines) == {name: row(rounding) for name, rounding in ROUNDING.items()}


def row(rounding: Rounding) -> str:
    """A line of that table."""
    exact = [moments(*betas) for betas in BETAS[:2]]
    told = [moments(*betas, rounding=rounding) for betas in BETAS[:2]]
    beyond = [one.most / other.most - 1 for one, other in zip(told, exact, strict=True)]
    gap = factors(10_000, -0.8, 1024, 1024, rounding).times
    values = (*beyond, math.sqrt(told[0].least), gap)
    return " | ".join("below 1e-10" if each < 1e-10 else f"{each:.2g}" for each in values)
