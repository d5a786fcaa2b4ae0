"""Shows the optimizer's algebra: what composes, what a type checker refuses, and the bounds.

A mixed state is refused by its index, before any number is looked at; and the numbers alone would
seldom have told.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.model.optimizer import (
    AdamW,
    At,
    Correction,
    Index,
    Moments,
    Parameters,
    State,
    Step,
    Values,
    moment_bound,
    moments_zeroed,
    outside,
    step_reset,
    update_bound,
)

ROOT = Path(__file__).resolve().parents[2]
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.95, 0.9025), (0.0, 0.5)]


class E100(At):
    """An epoch."""

    index: ClassVar = Index("main", 3, 100, "dp4")


class E101(At):
    """The next one."""

    index: ClassVar = Index("main", 3, 101, "dp4")


class E103(At):
    """One that is two further."""

    index: ClassVar = Index("main", 3, 103, "dp4")


class Other(At):
    """The same step of another generation."""

    index: ClassVar = Index("main", 4, 101, "dp4")


class Corrected(At):
    """What a correction leads to."""

    index: ClassVar = Index("main, moments begun anew at 3/101", 3, 101, "dp4")


RULE = AdamW(lr=0.1)


def pull(to: float) -> object:
    """The gradient of a bowl around a point."""
    return lambda theta: tuple(x - to for x in theta)


def start() -> State[E100]:
    """Some state at step 100."""
    return State(Parameters(E100, (1.0, -2.0)), Moments(E100, (0.1, 0.2), (0.3, 0.4), 100))


def test_steps_compose_as_a_category_does() -> None:
    """Identity, associativity, and that composing is doing one after the other."""
    one = Step(RULE, E100, E101, [pull(1.0)])
    two = Step(RULE, E101, E103, [pull(2.0), pull(3.0)])
    state = start()
    both = one.then(two)
    assert both(state) == two(one(state))
    assert (both.source, both.target) == (E100, E103)
    assert Step.none(RULE, E100).then(one)(state) == one(state)
    assert one.then(Step.none(RULE, E101))(state) == one(state)
    rest = Step.none(RULE, E103)
    assert one.then(two).then(rest)(state) == one.then(two.then(rest))(state)
    assert one(state).moments.count == 101


def test_what_does_not_fit_is_refused_when_it_runs_too() -> None:
    """Indices are checked where types are not: another generation, step, lineage."""
    state = start()
    one = Step(RULE, E100, E101, [pull(1.0)])
    after = one(state)
    with pytest.raises(ValueError, match=r"a state is of one index, not of main 3/100 .* 3/101"):
        State(state.parameters, after.moments)
    with pytest.raises(ValueError, match="a step"):
        one(after)
    with pytest.raises(ValueError, match="composition"):
        one.then(one)
    with pytest.raises(ValueError, match="1 steps from main 3/100"):
        Step(RULE, E100, E103, [pull(1.0)])
    with pytest.raises(ValueError, match=r"main 4/101"):
        Step(RULE, E100, Other, [pull(1.0)])
    with pytest.raises(ValueError, match="configuration"):
        one.then(Step(AdamW(lr=0.2), E101, E103, [pull(1.0), pull(1.0)]))


def test_a_correction_begins_a_lineage() -> None:
    """It is no step: what it leads to composes with nothing of the old one."""
    after = Step(RULE, E100, E101, [pull(1.0)])(start())
    begun = Correction(E101, Corrected)(after.parameters)
    assert begun.parameters.theta == after.parameters.theta
    assert begun.moments == Moments(Corrected, (0.0, 0.0), (0.0, 0.0), 0)
    with pytest.raises(ValueError, match="a step"):
        Step(RULE, E101, E103, [pull(1.0), pull(1.0)])(begun)
    with pytest.raises(ValueError, match="new name"):
        Correction(E100, E101)
    with pytest.raises(ValueError, match="a correction"):
        Correction(E100, Corrected)(after.parameters)


FORBIDDEN = """
from typing import ClassVar
from handfast.model.optimizer import AdamW, At, Correction, Index, Moments, Parameters, State, Step
class E100(At):
    index: ClassVar[Index] = Index("main", 3, 100, "dp4")
class E101(At):
    index: ClassVar[Index] = Index("main", 3, 101, "dp4")
class E102(At):
    index: ClassVar[Index] = Index("main", 3, 102, "dp4")
def play(one: Step[E100, E101], two: Step[E101, E102], at: State[E100]) -> None:
    fine: State[E102] = one.then(two)(at)
    also: State[E100] = Step.none(AdamW(), E100)(at)
    one.then(one)  # refused
    two.then(one)  # refused
    two(at)  # refused
    wrong: State[E100] = one(at)  # refused
    State(at.parameters, one(at).moments)  # refused
    mixed: State[E101] = State(at.parameters, at.moments)  # refused
    Correction(E101, E102)(at.parameters)  # refused
    at.parameters.theta = ()  # refused
"""


def test_a_type_checker_refuses_what_does_not_compose(tmp_path: Path) -> None:
    """Mypy finds an error in each line that is marked, and in no other."""
    file = tmp_path / "forbidden.py"
    file.write_text(FORBIDDEN)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(tmp_path / "cache"), "--no-error-summary", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = {int(n) for n in re.findall(r"forbidden\.py:(\d+): error", done.stdout)}
    marked = {n for n, line in enumerate(FORBIDDEN.splitlines(), 1) if "# refused" in line}
    assert len(marked) == 8
    assert found == marked, done.stdout + done.stderr


# Bounds


def moments(rule: AdamW, gradients: list[float]) -> tuple[Values, Values]:
    """The moments after gradients, from zero."""
    m: Values = (0.0,)
    v: Values = (0.0,)
    for gradient in gradients:
        m, v = rule.moments(m, v, (gradient,))
    return m, v


def test_the_published_constants() -> None:
    """K, and the factors of a reset counter and of zeroed moments, with their betas."""
    assert moment_bound(0.9, 0.999) == pytest.approx(7.27, abs=5e-4)
    assert moment_bound(0.9, 0.95) == pytest.approx(1.165, abs=5e-4)
    assert step_reset(0.9, 0.999) == pytest.approx(0.316, abs=5e-4)
    assert step_reset(0.9, 0.95) == pytest.approx(2.236, abs=5e-4)
    assert moments_zeroed(0.9, 0.999) == pytest.approx(3.16, abs=5e-3)
    assert moments_zeroed(0.9, 0.95) == pytest.approx(0.447, abs=5e-4)


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_the_bound_is_reached(beta1: float, beta2: float, count: int) -> None:
    """By gradients that were (b1/b2)^k, k steps back; so no smaller K would do."""
    rule = AdamW(beta1=beta1, beta2=beta2)
    (m,), (v,) = moments(rule, [(beta1 / beta2) ** k for k in reversed(range(count))])
    assert m / math.sqrt(v) == pytest.approx(moment_bound(beta1, beta2, count), rel=1e-9)
    assert outside((m,), (v,), 0.99 * moment_bound(beta1, beta2, count)) == 1


def test_without_its_condition_there_is_no_bound() -> None:
    """For b1^2 >= b2 the sum grows for ever: by one each step at equality."""
    assert moment_bound(0.95, 0.9025) == math.inf
    assert moment_bound(0.95, 0.9) == math.inf
    assert moment_bound(0.5, 0.25, 100) == pytest.approx(10 * moment_bound(0.5, 0.25, 1))


GRADIENTS = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=40)


@given(GRADIENTS, st.sampled_from(BETAS))
def test_no_gradients_break_the_bounds(gradients: list[float], betas: tuple[float, float]) -> None:
    """The moments', that v can't fall faster than b2, and how far a step can move."""
    rule = AdamW(1e-3, *betas, eps=0.0)
    count = len(gradients)
    m, v = moments(rule, gradients)
    if v[0] > 1e-250:  # below, squares have lost their digits
        assert outside(m, v, moment_bound(*betas, count)) == 0
        moved = rule.moved((2.0,), m, v, count)[0] - (1 - rule.lr * rule.decay) * 2.0
        assert abs(moved) <= update_bound(rule, count) * (1 + 1e-6)
    for upto in range(1, count):
        before = moments(rule, gradients[:upto])[1][0]
        assert v[0] >= before * betas[1] ** (count - upto) * (1 - 1e-9)


def test_the_first_step_moves_by_the_learning_rate() -> None:
    """Whatever the gradient."""
    assert update_bound(RULE, 1) == pytest.approx(RULE.lr)


def test_some_values_do_tell() -> None:
    """Half of v zeroed, v negative, or not a number: what a second line of checks can find."""
    m, v = moments(RULE, [1.0, -0.5, 2.0])
    bound = moment_bound(0.9, 0.999)
    assert outside(m, v, bound) == 0
    assert outside(m * 4, (0.0, -1.0, math.nan, v[0]), bound) == 3
    assert outside((0.0,), (0.0,), bound) == 0


@pytest.mark.parametrize(("beta1", "beta2"), BETAS[:2])
def test_a_wrong_counter_scales_the_step(beta1: float, beta2: float) -> None:
    """Played out: a long run's moments with the counter begun anew, and the other way round."""
    rule = AdamW(lr=1.0, beta1=beta1, beta2=beta2, eps=0.0, decay=0.0)
    gradients = [math.cos(i) + 1.5 for i in range(3000)]
    m, v = moments(rule, gradients)
    for count, to in ((3000, 1), (3000, 5)):
        ratio = rule.direction(m, v, to)[0] / rule.direction(m, v, count)[0]
        assert ratio == pytest.approx(step_reset(beta1, beta2, count, to))
    zeroed = rule.moments((0.0,), (0.0,), (0.37,))
    assert rule.direction(*zeroed, 3000)[0] == pytest.approx(moments_zeroed(beta1, beta2, 3000))
    assert rule.direction(*zeroed, 1)[0] == pytest.approx(1.0)


@given(GRADIENTS, st.floats(-10, 10))
def test_any_parameters_fit_any_moments(gradients: list[float], theta: float) -> None:
    """So that no look at one state could refute it: there is always one that leads to it."""
    rule = AdamW(lr=0.01)
    m, v = moments(rule, gradients)
    before = rule.before((theta,), m, v, len(gradients))
    assert rule.moved(before, m, v, len(gradients))[0] == pytest.approx(theta, abs=1e-12)
