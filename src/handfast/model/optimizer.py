"""The optimizer's algebra: steps as morphisms between epochs, AdamW, and what its state can't be.

A state of an optimizer belongs to an epoch of one lineage under one configuration: an *index*.
States are typed by it, and so are steps: a step leads from the states of one index to those of the
next, and two steps compose only where the first ends at the index at which the second begins (a
category: S. Mac Lane, *Categories for the Working Mathematician*, 1971, chapter I). An index is a
class here, so that a type checker refuses what does not compose, and a run refuses it, too.

The numbers know nothing of this. AdamW (I. Loshchilov and F. Hutter, *Decoupled weight decay
regularization*, ICLR 2019; D. P. Kingma and J. Ba, *Adam*, ICLR 2015) is total: from any
parameters, moments with v >= 0 and counter it makes a step. So a spliced state is no type error of
the arithmetic; docs/optimizer.md says exactly what it is, and derives the bounds below. Everything
is elementwise, on tuples of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, TypeAlias, TypeVar

import msgspec

__all__ = ["AdamW", "At", "Correction", "Index", "Moments", "Parameters", "State", "Step", "Values",
    "moment_bound", "moments_zeroed", "outside", "step_reset", "update_bound"]  # fmt: skip

Values: TypeAlias = tuple[float, ...]
Gradient: TypeAlias = Callable[[Values], Values]


class Index(msgspec.Struct, frozen=True):
    """Which epoch of which history a state belongs to: what a stamp carries."""

    lineage: str
    generation: int
    step: int
    configuration: str

    def __str__(self) -> str:
        return f"{self.lineage} {self.generation}/{self.step} ({self.configuration})"


class At:
    """An index as a type: subclass it once for each index that a program speaks of by name."""

    index: ClassVar[Index]


A = TypeVar("A", bound=At)
B = TypeVar("B", bound=At)
C = TypeVar("C", bound=At)


class AdamW(msgspec.Struct, frozen=True):
    """Hyperparameters, and the arithmetic of one step, as torch has it (without amsgrad)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.01

    def moments(self, m: Values, v: Values, g: Values) -> tuple[Values, Values]:
        """Give the next moments: moving averages of the gradient and of its square."""
        pairs = zip(m, v, g, strict=True)
        found = [(self._mean(x, y), self._square(z, y)) for x, z, y in pairs]
        return tuple(x for x, _ in found), tuple(y for _, y in found)

    def _mean(self, m: float, g: float) -> float:
        return self.beta1 * m + (1 - self.beta1) * g

    def _square(self, v: float, g: float) -> float:
        return self.beta2 * v + (1 - self.beta2) * g * g

    def moved(self, theta: Values, m: Values, v: Values, count: int) -> Values:
        """Give the parameters after step number ``count`` (from 1), whose moments are m and v."""
        keep = 1 - self.lr * self.decay
        return tuple(
            keep * x - self.lr * u
            for x, u in zip(theta, self.direction(m, v, count), strict=True)
        )  # fmt: skip

    def direction(self, m: Values, v: Values, count: int) -> Values:
        """Give m-hat / (sqrt(v-hat) + eps), both corrected for their bias after ``count`` steps."""
        first, second = 1 - self.beta1**count, 1 - self.beta2**count
        pairs = zip(m, v, strict=True)
        return tuple(x / first / (math.sqrt(y / second) + self.eps) for x, y in pairs)

    def before(self, theta: Values, m: Values, v: Values, count: int) -> Values:
        """Give the parameters from which step number ``count``, with these moments, leads here.

        There always are some (lr decay < 1): the step is affine in the parameters. So what the
        parameters are refutes no moments; see docs/optimizer.md.
        """
        keep = 1 - self.lr * self.decay
        return tuple(
            (x + self.lr * u) / keep
            for x, u in zip(theta, self.direction(m, v, count), strict=True)
        )  # fmt: skip


# The typed category


class Parameters(msgspec.Struct, Generic[A], frozen=True):
    """Parameters of an index."""

    at: type[A]
    theta: Values


class Moments(msgspec.Struct, Generic[A], frozen=True):
    """Moments of an index, and how many steps they have seen."""

    at: type[A]
    m: Values
    v: Values
    count: int


class State(msgspec.Struct, Generic[A], frozen=True):
    """What one epoch is made of. Raises ValueError for parts of different indices."""

    parameters: Parameters[A]
    moments: Moments[A]

    def __post_init__(self) -> None:
        _same(self.parameters.at.index, self.moments.at.index, "a state")

    @property
    def at(self) -> type[A]:
        """Give the index, as a type."""
        return self.parameters.at


class Step(Generic[A, B]):
    """A morphism: steps that lead from the states of one index to those of a later one.

    Raises ValueError unless both are of one lineage, generation and configuration, and as many
    steps apart as there are gradients.
    """

    def __init__(
        self, rule: AdamW, source: type[A], target: type[B], gradients: Sequence[Gradient]
    ) -> None:
        self.rule, self.source, self.target = rule, source, target
        self.gradients = tuple(gradients)
        end = msgspec.structs.replace(
            source.index, step=source.index.step + len(self.gradients)
        )  # fmt: skip
        _same(end, target.index, f"{len(self.gradients)} steps from {source.index}")

    @classmethod
    def none(cls, rule: AdamW, at: type[A]) -> Step[A, A]:
        """Give the identity of an index: no step."""
        return Step(rule, at, at, ())

    def then(self, other: Step[B, C]) -> Step[A, C]:
        """Compose. Raises ValueError where this one does not end where the other begins."""
        _same(self.target.index, other.source.index, "a composition")
        if self.rule != other.rule:
            raise ValueError("the configuration is one, so its hyperparameters are")
        return Step(self.rule, self.source, other.target, self.gradients + other.gradients)

    def __call__(self, state: State[A]) -> State[B]:
        """Take the steps. Raises ValueError for a state of another index."""
        _same(state.at.index, self.source.index, "a step")
        theta, moments = state.parameters.theta, state.moments
        m, v, count = moments.m, moments.v, moments.count
        for gradient in self.gradients:
            m, v = self.rule.moments(m, v, gradient(theta))
            count += 1
            theta = self.rule.moved(theta, m, v, count)
        return State(Parameters(self.target, theta), Moments(self.target, m, v, count))


class Correction(Generic[A, B]):
    """Moments begun anew: no step, so it leads into another lineage, which has its own name.

    A heuristic: nothing says that it trains as well. Raises ValueError where the lineage stays.
    """

    def __init__(self, source: type[A], target: type[B]) -> None:
        self.source, self.target = source, target
        if source.index.lineage == target.index.lineage:
            raise ValueError(f"a correction of {source.index} begins a lineage with a new name")

    def __call__(self, parameters: Parameters[A]) -> State[B]:
        """Keep the parameters alone. Raises ValueError for those of another index."""
        _same(parameters.at.index, self.source.index, "a correction")
        zero = (0.0,) * len(parameters.theta)
        return State(Parameters(self.target, parameters.theta), Moments(self.target, zero, zero, 0))


def _same(one: Index, other: Index, what: str) -> None:
    if one != other:
        raise ValueError(f"{what} is of one index, not of {one} and {other}")


# What the values can't be, on a trajectory that began with moments of zero


def moment_bound(beta1: float, beta2: float, count: float = math.inf) -> float:
    """Give the least K with |m| <= K sqrt(v) after ``count`` steps from zero, whatever came.

    By Cauchy and Schwarz, K^2 = (1-b1)^2/(1-b2) * sum over k < count of (b1^2/b2)^k; reached by
    gradients that were (b1/b2)^k, k steps back. Infinite for count -> inf unless b1^2 < b2.
    docs/optimizer.md derives it.
    """
    q = beta1**2 / beta2
    if math.isinf(count):
        total = 1 / (1 - q) if q < 1 else math.inf
    else:
        total = count if q == 1 else (1 - math.pow(q, count)) / (1 - q)
    return (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt(total)


def update_bound(rule: AdamW, count: int) -> float:
    """Give the most that an element moves in step ``count``, apart from its decay.

    |theta' - (1 - lr decay) theta| <= lr K_t sqrt(1 - b2^t) / (1 - b1^t); lr itself at t = 1.
    """
    corrected = math.sqrt(1 - rule.beta2**count) / (1 - rule.beta1**count)
    return rule.lr * moment_bound(rule.beta1, rule.beta2, count) * corrected


def outside(m: Values, v: Values, bound: float) -> int:
    """Count elements that no trajectory has: v below 0, not finite, or |m| > ``bound`` sqrt(v).

    Allows for the rounding of a few units in the last place of float32.
    """
    return sum(
        not (math.isfinite(x) and y >= 0 and abs(x) <= bound * math.sqrt(y) * (1 + 1e-5))
        for x, y in zip(m, v, strict=True)
    )


def step_reset(beta1: float, beta2: float, count: float = math.inf, to: int = 1) -> float:
    """Give the factor on a step whose counter should be ``count`` and is ``to``, moments kept.

    (1-b1^t)/(1-b1^t') * sqrt((1-b2^t')/(1-b2^t)); for t -> inf, t' = 1: sqrt(1-b2) / (1-b1).
    Exact where eps is 0.
    """
    first = (1 - math.pow(beta1, count)) / (1 - beta1**to)
    return first * math.sqrt((1 - beta2**to) / (1 - math.pow(beta2, count)))


def moments_zeroed(beta1: float, beta2: float, count: float = math.inf) -> float:
    """Give the size, in lr, of the first step after moments were set to 0 and the counter kept.

    A start from zero with its counter moves by lr exactly; here the correction of a bias that is
    there again is missing: (1-b1)/sqrt(1-b2) * sqrt(1-b2^t)/(1-b1^t), in which t includes this
    step. Exact where eps is 0.
    """
    return 1 / step_reset(beta1, beta2, count)
