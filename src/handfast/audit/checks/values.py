"""Values that no sound training has, or that contradict each other: in one tensor, or in a pair."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from types import ModuleType
from typing import Any, Final, NamedTuple

from handfast.audit import invariants
from handfast.audit.checks.owners import owners
from handfast.audit.checks.seen import Look, same
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.found import Clock, Part, Role, Step, Tensor
from handfast.errors import HandfastError

__all__ = ["masters", "moments", "numbers"]

SHOWN: Final = 6
SLACK: Final = 1 + 1e-6
"""What the comparison itself may round, in float32."""

MOMENTS: Final = frozenset({Role.FIRST, Role.SECOND, Role.MOMENTUM})
STATE: Final = MOMENTS | {Role.MASTER}

_NUMBERED: Final = re.compile(r".*\[\d+\]|\d+")
"""How a parameter is called that an optimizer has by its number."""

USUAL: Final = (0.9, 0.999)
"""The betas that most trainings have (torch 2.13, torch/optim/adam.py)."""

FAR: Final = 10
"""How many times above their bound moments are beyond what changing the betas usually does."""


def numbers(step: Step, look: Look) -> Iterator[Finding]:
    """Find numbers that are NaN or infinite, and second moments below zero.

    Only of parameters, masters and moments: buffers hold what they like. A parameter with nothing
    but ``-inf`` beside its numbers may be a mask: a hint. So is one that was never used, as finite
    moments of all that was show; and, where roles are guessed, what no optimizer has a state of.
    Strong is one whose state is known by its number alone.
    """
    trained = {t.of for part in step.parts for t in part.tensors if t.role in STATE}
    unused = _unused(step, look)
    ordered = {*owners(step).values()}
    for part in step.parts:
        bad: dict[tuple[Code, Strength], list[str]] = defaultdict(list)
        for tensor in part.tensors:
            seen = look.at(tensor)
            if seen.nans or seen.infinite:
                mask = not seen.nans and tensor.role is Role.PARAMETER
                loose = tensor.role is Role.PARAMETER and tensor.of not in trained
                loose = loose and (step.guessed or unused)
                strength = Strength.HINT if mask or loose else Strength.CERTAIN
                if loose and not mask and tensor.of in ordered:
                    strength = Strength.STRONG
                says = f"{tensor.path}: {seen.nans} NaN, {seen.infinite} infinite"
                bad[Code.NONFINITE, strength].append(says)
            if tensor.role is Role.SECOND and seen.negative:
                says = f"{tensor.path}: {seen.negative} below zero, the least {seen.least:g}"
                bad[Code.NEGATIVE, Strength.CERTAIN].append(says)
        for (code, strength), told in bad.items():
            what = "hold values that are not finite"
            if code is Code.NEGATIVE:
                what = "are second moments with values below zero, and means of squares never are"
            says = f"{len(told)} tensors {what}"
            yield Finding(code, strength, step.path, says, (part.path,), tuple(told[:SHOWN]))


def _unused(step: Step, look: Look) -> bool:
    """Whether what is not finite among the weights without moments can be what was never used.

    A forward pass that meets it makes all gradients NaN, and then all moments. So these are finite;
    and where an optimizer goes by numbers, so that names don't tell, there are as many weights more
    than it has states of, as many of that shape more than moments, and as many elements.
    """
    every = [(part.path, tensor) for part in step.parts for tensor in part.tensors]
    moments = [(path, tensor) for path, tensor in every if tensor.role in MOMENTS]
    if any(look.at(t).lost or look.at(t).nans or look.at(t).infinite for _, t in moments):
        return False
    names = {tensor.of for _, tensor in every if tensor.role is Role.PARAMETER}
    weights = _each((path, tensor) for path, tensor in every if tensor.role is Role.PARAMETER)
    owners = {
        tensor.of if tensor.of in names else (path, tensor.of)
        for path, tensor in every
        if tensor.role in STATE or (tensor.role is Role.OTHER and tensor.path != tensor.of != "")
    }
    trained = _each(moments, names)
    if not all(t.of in names or _NUMBERED.fullmatch(t.of) for t in trained):
        return False  # by names that the weights have not, nobody knows whose they are
    bad = [t for t in weights if t.of not in owners and (look.at(t).nans or look.at(t).infinite)]
    shapes = [Counter(t.values.shape for t in each) for each in (bad, weights, trained)]
    return (
        bool(moments)
        and len(bad) <= len(weights) - len(owners)
        and shapes[0] <= shapes[1] - shapes[2]
        and _elements(bad) <= _elements(weights) - _elements(trained)
    )


def _each(found: Iterable[tuple[str, Tensor]], names: Collection[str] = ()) -> list[Tensor]:
    """Tensors without copies, and with tied ones once; of the moments of one weight one.

    Those that go by numbers are those of their file.
    """
    places: dict[object, Tensor] = {}
    for path, tensor in found:
        home = path if names and tensor.of not in names else ""
        places[tensor.replica or (home, tensor.of or tensor.path, tensor.offset)] = tensor
    return list({same(tensor.values): tensor for tensor in places.values()}.values())


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.values.shape) for tensor in tensors)


class _Pair(NamedTuple):
    part: Part
    one: Tensor
    other: Tensor


def _pairs(step: Step, one: Role, other: Role) -> Iterator[_Pair]:
    """Tensors of two roles that belong to one parameter, in one part, with one shape."""
    for part in step.parts:
        of = {(t.of, t.offset): t for t in part.tensors if t.role is one and t.of}
        for tensor in part.tensors:
            found = of.get((tensor.of, tensor.offset)) if tensor.role is other else None
            if found is not None and found.values.shape == tensor.values.shape:
                yield _Pair(part, found, tensor)


def moments(step: Step, look: Look) -> Iterator[Finding]:
    """Find first moments too large for their second ones: |m| <= K sqrt(v), elementwise.

    No gradients whatever lead there with constant betas (:mod:`handfast.audit.invariants`). But one
    file doesn't say whether they were constant: so never certain, and a hint above the bound of the
    betas that the part has. Strong for float32 above ten times that bound and that of (0.9, 0.999);
    in other precisions a hint, since how it was rounded is not known. With betas that a schedule
    moves nothing is said.
    """
    arithmetic = look.numbers
    if arithmetic is None:
        return
    told: dict[tuple[str, Strength], list[str]] = defaultdict(list)
    counts = _counts(step)
    for part, first, second in _pairs(step, Role.FIRST, Role.SECOND):
        betas = part.betas.get(second.group)
        dtypes = {first.values.dtype, second.values.dtype}
        rounding = invariants.ROUNDING.get(first.values.dtype)
        if betas is None or rounding is None or len(dtypes) > 1:
            continue
        if not all(0 <= beta < 1 for beta in betas):
            continue
        steps = counts.get((part.path, second.of), math.inf)
        bound = invariants.moments(*betas, steps, rounding)
        usual = invariants.moments(*USUAL, steps, rounding)
        far = FAR * max(bound.most, usual.most)
        over, beyond, total = _over(arithmetic, look, _Pair(part, first, second), bound, far)
        if over:
            strong = beyond and dtypes == {"float32"}
            strength = Strength.STRONG if strong else Strength.HINT
            says = f"{first.path}: {over} of {total} above {bound.most:.4g} sqrt(v)"
            told[part.path, strength].append(says)
    for (path, strength), lines in told.items():
        yield Finding(
            Code.MOMENTS,
            strength,
            step.path,
            f"the first moments of {len(lines)} parameters are larger than any gradients make them "
            "beside these second moments with these betas: the betas were changed, or they are not "
            "of one training's one step",
            (path,),
            tuple(lines[:SHOWN]),
        )


def _counts(step: Step) -> dict[tuple[str, str], float]:
    """How many updates the moments of each parameter of each part have seen, where that is said."""
    return {
        (part.path, counter.path): counter.value
        for part in step.parts
        for counter in reversed(part.counters)
        if counter.clock is Clock.PARAMETER and counter.value > 0
    }


def _over(
    arithmetic: ModuleType, look: Look, pair: _Pair, bound: invariants.Bound, far: float
) -> tuple[int, int, int]:
    """How many first moments are above the bound, how many above ``far`` sqrt(v), of how many."""
    over = beyond = total = 0
    dtype = pair.one.values.dtype
    try:
        for one, two in look.pairs(pair.one.values, pair.other.values):
            m, v = (arithmetic.wide(block, dtype) for block in (one, two))
            root = (v.clip(min=0) + bound.least) ** 0.5 * SLACK
            over += int((abs(m) > root * bound.most).sum())
            beyond += int((abs(m) > root * far).sum())
            total += len(m)
    except HandfastError:
        return 0, 0, 0  # that it can't be read is told by itself
    return over, beyond, total


def masters(step: Step, look: Look) -> Iterator[Finding]:
    """Find low-precision parameters that are not the rounding of their float32 master.

    Where each is a neighbour of its master that is how stochastic rounding looks, and only a hint.
    """
    arithmetic = look.numbers
    if arithmetic is None:
        return
    wrong: dict[tuple[str, Strength], list[str]] = defaultdict(list)
    for part, master, low in _masters(step):
        apart, far, total = _rounding(arithmetic, look, master, low)
        if apart:
            strength = step.strength(Strength.STRONG) if far else Strength.HINT
            says = f"{low.path}: {apart} of {total} are not rounded from {master.path}"
            wrong[part.path, strength].append(f"{says}, {far} are not even beside it")
    for (path, strength), lines in wrong.items():
        what = "are not the rounding of their float32 masters"
        if strength is Strength.HINT:
            what += ", but each is beside it: stochastic rounding does that"
        says = f"{len(lines)} parameters {what}"
        yield Finding(Code.MASTER, strength, step.path, says, (path,), tuple(lines[:SHOWN]))


def _masters(step: Step) -> Iterator[_Pair]:
    """Masters beside their parameters: in their own part, or in the one other that has them."""
    places: dict[tuple[str, Any], dict[str, Tensor]] = defaultdict(dict)
    for part in step.parts:
        for tensor in part.tensors:
            if tensor.role is Role.PARAMETER and tensor.values.dtype in ("bfloat16", "float16"):
                places[tensor.of, tensor.offset][part.path] = tensor
    for part in step.parts:
        for master in part.tensors:
            if master.role is Role.MASTER and master.values.dtype == "float32":
                found = places.get((master.of, master.offset), {})
                only = next(iter(found.values())) if len(found) == 1 else None
                low = found.get(part.path, only)
                if low is not None and low.values.shape == master.values.shape:
                    yield _Pair(part, master, low)


def _rounding(
    arithmetic: ModuleType, look: Look, master: Tensor, low: Tensor
) -> tuple[int, int, int]:
    """How many values are no rounding, how many not even a neighbour, of how many."""
    apart = far = total = 0
    dtype = low.values.dtype
    try:
        for high, bits in look.pairs(master.values, low.values):
            exact = arithmetic.numbers(high, "float32")
            found = arithmetic.bits(bits)
            wrong = arithmetic.rounded(exact, dtype) != found
            apart += int(wrong.sum())
            if wrong.any():
                far += int((~arithmetic.neighbours(exact[wrong], found[wrong], dtype)).sum())
            total += len(found)
    except HandfastError:
        return 0, 0, 0  # that it can't be read is told by itself
    return apart, far, total
