"""What holds of an optimizer's state on every trajectory of one training, in real and in machine
numbers.

Formulas only: plain floats, no framework, so that an audit has them without one, and a guard puts
their coefficients into its own arithmetic. docs/optimizer.md derives each, and says what it does
*not* show: most mixtures of epochs break none of these.

One idea carries the bounds over to machine numbers. Each operation rounds to (1 + d) times the true
result, |d| <= u, or is off by less than the smallest normal number where that is larger (gradual
underflow, or flushed to zero). Over a step that is four roundings at most of what was kept and of
what came in (torch 2.13, ``torch/optim/adam.py``: ``lerp_``, ``mul_`` and ``addcmul_``, with their
factors converted to the tensor's precision; fused kernels round less). So a trajectory of machine
numbers obeys the bound of real ones whose betas are off by (1 + u)^4 at most. For stochastic
rounding take twice the unit. Moments that are quantised by blocks (8 bits) obey none of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import msgspec

__all__ = [
    "EXACT",
    "ROUNDING",
    "Bound",
    "Gap",
    "Rounding",
    "changing",
    "factors",
    "gain",
    "limit",
    "moments",
    "newton_schulz",
    "update",
]

ROUNDINGS: Final = 4
"""How often at most one step rounds what it keeps, and what it takes in."""


class Rounding(msgspec.Struct, frozen=True):
    """How a dtype rounds: relatively by ``unit`` u at most; by ``least`` where that is more."""

    unit: float
    least: float

    @property
    def up(self) -> float:
        """The most that a step's roundings make of 1: (1 + u)^4."""
        return (1 + self.unit) ** ROUNDINGS

    @property
    def down(self) -> float:
        """The least that they leave of 1: (1 - u)^4."""
        return (1 - self.unit) ** ROUNDINGS


EXACT: Final = Rounding(0.0, 0.0)
"""Real numbers."""

ROUNDING: Final[Mapping[str, Rounding]] = MappingProxyType({
    "float64": Rounding(2.0**-52, 2.0**-1022),
    "float32": Rounding(2.0**-24, 2.0**-126),
    "bfloat16": Rounding(2.0**-8, 2.0**-126),
    "float16": Rounding(2.0**-11, 2.0**-14),
})  # fmt: skip
"""By the name of a dtype (IEEE 754-2019, table 3.5; bfloat16 has float32's exponent).

float64's unit is doubled: whoever holds a state against these formulas rounds so, too.
"""


# Adam, AdamW, NAdam, RAdam: the moments


class Bound(msgspec.Struct, frozen=True):
    """What ties the moments (m, v) of an epoch to (m0, v0) of one that is k steps older.

    Elementwise, |m - keep m0| <= give |m0| + most sqrt(v - floor v0 + least), where the root's
    argument is not negative. ``give`` and ``least`` are what rounding takes; both are 0 for
    :data:`EXACT`. One epoch alone is held against the training's start: m0 = v0 = 0.
    """

    keep: float
    give: float
    most: float
    floor: float
    least: float

    def holds(self, m: float, v: float, m0: float = 0.0, v0: float = 0.0) -> bool:
        """Whether an element obeys: none that is not a number does, nor any with v < 0.

        A gradient whose square overflows makes v infinite, and it stays so; then m is finite.
        """
        if math.isinf(v):
            return v > 0 and math.isfinite(m)
        room = v - self.floor * v0 + self.least
        if not (v >= 0 and room >= 0):
            return False
        if math.isinf(self.most):
            return math.isfinite(m)
        return abs(m - self.keep * m0) <= self.give * abs(m0) + self.most * math.sqrt(room)


def moments(
    beta1: float, beta2: float, steps: float = math.inf, rounding: Rounding = EXACT
) -> Bound:
    """Give the bound over ``steps`` from 1 up, with constant betas (0 <= beta < 1).

    By Cauchy and Schwarz: most^2 = (1-b1)^2/(1-b2) * sum over k < steps of (b1^2/b2)^k. It grows
    with the steps, so that infinitely many are the bound of one epoch whose counter is not known;
    it is then infinite unless b1^2 < b2. It is reached by gradients that were (b1/b2)^k, k steps
    back. As ``handfast.model.optimizer.moment_bound`` for :data:`EXACT`.
    """
    first, second = beta1 * rounding.up, beta2 * rounding.down
    ratio = first * first / second if second else (math.inf if first else 0.0)
    keep = math.pow(beta1, steps)
    return _bound(
        keep,
        _power(first, steps) - keep,
        _fresh(beta1, beta2) * _geometric(ratio, steps),
        _power(second, steps),
        beta2,
        rounding,
    )


def changing(betas: Iterable[tuple[float, float]], rounding: Rounding = EXACT) -> Bound:
    """Give the bound over steps whose betas were these, oldest first; at least one.

    The sum S obeys S' = (b1^2/b2) S + (1-b1)^2/(1-b2). So a training whose betas follow a schedule
    (``OneCycleLR`` moves beta1) has a bound as good as any other's, if the schedule is known.
    Raises ValueError where a beta is not below 1, or beta2 is 0.
    """
    keep = kept = floor = 1.0
    total = slowest = 0.0
    for beta1, beta2 in betas:
        if not (0 <= beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"betas ({beta1}, {beta2}): each lies in [0, 1), and beta2 above 0")
        first, second = beta1 * rounding.up, beta2 * rounding.down
        total = first * first / second * total + _fresh(beta1, beta2)
        keep, kept, floor = keep * beta1, kept * first, floor * second
        slowest = max(slowest, beta2)
    if not total:
        raise ValueError("no steps: moments are 0 before the first")
    return _bound(keep, kept - keep, total, floor, slowest, rounding)


def _fresh(beta1: float, beta2: float) -> float:
    return (1 - beta1) ** 2 / (1 - beta2)


def _bound(
    keep: float, give: float, total: float, floor: float, beta2: float, rounding: Rounding
) -> Bound:
    # One more unit stands for what m itself loses below the normal numbers: u sqrt(least) is much
    # more than that.
    slack = rounding.up * (1 + rounding.unit) / math.sqrt(rounding.down)
    least = ROUNDINGS * rounding.least / (1 - beta2)
    return Bound(keep, give, math.sqrt(total) * slack, floor, least)


def update(
    beta1: float, beta2: float, step: int, eps: float = 0.0, rounding: Rounding = EXACT
) -> float:
    """Give the most that an element moves in step number ``step``, in learning rates.

    Of Adam and AdamW, with amsgrad too: |theta' - (1 - lr decay) theta| <= lr * this, and in
    machine numbers 4 u |theta| more. most sqrt(1 - b2^t) / (1 - b1^t), and 1 at t = 1. A machine's
    v may have lost what m still has; then only eps stands below it, and without one there is no
    bound (infinite). RAdam's first steps do not divide by v: it has none.
    """
    bound = moments(beta1, beta2, step, rounding)
    lost = math.sqrt(bound.least)
    beyond = 0.0 if not lost else (lost / eps if eps else math.inf)
    corrected = (math.sqrt(1 - beta2**step) + beyond) / (1 - beta1**step)
    return bound.most * corrected * rounding.up**2


# SGD, Lion, Muon: one buffer


def gain(
    keep: float, fresh: float, first: float, steps: float = math.inf, rounding: Rounding = EXACT
) -> float:
    """Give the most that a buffer is, where no gradient was larger than 1, in any norm.

    For b_1 = first g_1 and then b = keep b + fresh g: keep^(t-1) first + fresh times the sum over
    k < t-1 of keep^k, reached by a constant gradient. SGD's momentum: (mu, 1 - dampening, 1);
    Muon's and Lion's (torch's Muon averages, ``torch/optim/_muon.py``): (b, 1 - b, 1 - b). Clipped
    gradients have such a norm; of others it says nothing, so one buffer alone refutes nothing.
    """
    kept = keep * rounding.up
    before = _power(kept, steps - 1) * first
    return (before + fresh * _geometric(kept, steps - 1)) * rounding.up


def limit(most: float, lr: float, decay: float, rounding: Rounding = EXACT) -> float:
    """Give the size that no parameter grows beyond, unless it began beyond it.

    For theta' = (1 - lr decay) theta + step with |step| <= lr ``most`` and 0 < lr decay <= 1:
    most / decay (Lion, with most = 1: L. Chen et al., *Lion secretly solves constrained
    optimization*, ICLR 2024). In machine numbers it takes the smallest lr of the training, and is
    infinite where lr decay is below the rounding of a step: then decay can't win.
    """
    grown = (1 - lr * decay) * rounding.up
    return lr * most * rounding.up / (1 - grown) if grown < 1 else math.inf


# Adafactor: two factors


class Gap(msgspec.Struct, frozen=True):
    """How far two means may be apart that are one in real numbers."""

    times: float
    least: float

    def holds(self, one: float, other: float) -> bool:
        """Whether they may be: by ``times`` the smaller one and ``least``. Of NaN nothing holds."""
        if math.isnan(one) or math.isnan(other):
            return False
        low, high = sorted((one, other))
        return low == high or high - low <= self.times * low + self.least


def factors(step: int, power: float, rows: int, columns: int, rounding: Rounding = EXACT) -> Gap:
    """Give how far Adafactor's row and column factors may disagree on the mean square.

    The mean over rows of R is the mean over columns of C, at every step and whatever the gradients
    were: both average the same squares with the same weights 1 - t^power (N. Shazeer and M. Stern,
    *Adafactor*, ICML 2018, section 3; ``power`` is torch's ``beta2_decay``, -0.8). So factors of
    two epochs, or of two trainings, are told apart. A weighted age bounds what is lost to rounding:
    for weights that only fall, sum w_k (1+x)^k <= w / (1 - (1-w)(1+x)). ``rows`` and ``columns``
    are the sizes of the last two dimensions.
    """
    weight = math.pow(step, power)
    grown, shrunk = (1 - weight) * rounding.up, (1 - weight) * rounding.down
    if grown >= 1:
        return Gap(math.inf, math.inf)
    aged = (1 - shrunk) / (1 - grown)
    summed = (1 + rounding.unit) / (1 - rounding.unit)
    times = aged * math.pow(summed, max(rows, columns) + 2 * ROUNDINGS) - 1
    return Gap(times, 2 * ROUNDINGS * rounding.least / weight)


# Muon: the update's singular values


def newton_schulz(coefficients: tuple[float, float, float], steps: int) -> float:
    """Give the most that a singular value is after Muon's iteration, in real numbers.

    Each of them goes through x -> a x + b x^3 + c x^5, ``steps`` times, from [0, 1]: the greatest
    value on an interval from 0 is at its end, or where the slope a + 3b x^2 + 5c x^4 is 0. So
    Muon moves a matrix by lr * this (times its factor for the shape) at most, in the spectral norm
    (K. Jordan et al., *Muon*, 2024). torch iterates in bfloat16, for which nothing is derived here.
    Raises ValueError where c is 0.
    """
    a, b, c = coefficients
    if not c:
        raise ValueError(f"coefficients {coefficients}: the last one is of the fifth power, not 0")

    def through(x: float) -> float:
        return abs(x * (a + b * x * x + c * x**4))

    root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
    squares = ((-3 * b + sign * root) / (10 * c) for sign in (-1, 1))
    turns = [math.sqrt(square) for square in squares if square > 0]
    most = 1.0
    for _ in range(steps):
        most = max(through(x) for x in (most, *(turn for turn in turns if turn < most)))
    return most


# Sums


def _geometric(ratio: float, terms: float) -> float:
    """1 + q + q^2 + ..., so many terms; infinite where it is beyond all floats."""
    if terms <= 0:
        return 0.0
    if ratio == 0:
        return 1.0
    if ratio == 1:
        return terms
    if math.isinf(ratio):
        return 1.0 if terms == 1 else math.inf
    exponent = terms * math.log(ratio)
    return math.inf if exponent > 700 else math.expm1(exponent) / (ratio - 1)


def _power(base: float, exponent: float) -> float:
    """base^exponent; infinite where it is beyond all floats."""
    if base <= 1:
        return math.pow(base, exponent)
    return math.inf if exponent * math.log(base) > 700 else math.pow(base, exponent)
