"""Validators: what is asked of staged values before their domain may vote.

A validator is a function of one :class:`Staged`; it returns what is wrong, or nothing. It runs in a
process of its own (:mod:`handfast.torch.examine`), off the training's path, and an epoch that it
refuses never converges. Those here have short names; a user's own is named ``module:function``.

What a sound state may hold is no error here: ``-inf`` in the mask of a module's buffers, ``inf`` in
a scheduler's ``best``, zeros anywhere. A value that is wrong and finite is not found by any of
these: that is what stamps are for (:mod:`handfast.torch.guard`).
"""

from __future__ import annotations

import importlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.agent.examiner import Known
from handfast.audit import invariants
from handfast.store.objects import child
from handfast.torch import optimizers
from handfast.torch.capture import Captured
from handfast.torch.names import cleaned
from handfast.torch.saved import EXTRA
from handfast.torch.staged import BLOCK, Staged, blocks, ends_of, leaves, parts
from handfast.torch.tensors import local
from handfast.torch.tree import Kind, Node, holder

__all__ = [
    "Staged",
    "Validator",
    "find",
    "finite",
    "free",
    "loss",
    "masters",
    "moments",
    "nonnegative",
]

logger = logging.getLogger("handfast")

Validator = Callable[["Staged"], str | None]


def finite(staged: Staged) -> str | None:
    """Refuse parameters, moments and gradients that are NaN or infinite.

    And what boxes of the state have, NumPy's arrays, too; of hyperparameters only NaN.
    """
    for path in staged.values():
        if not _all_finite(staged.ends(path)):
            return f"{path}: {_count(staged.tensors[path])}"
    for path, values in staged.arrays():
        if not _all_finite(ends_of(values)):
            return f"{path}: {_count(values)}"
    for group in staged.groups():
        for path, value in leaves(group.path, group.values):
            if isinstance(value, Real) and math.isnan(value):
                return f"{path}: it is nan"
    return None


def _all_finite(ends: tuple[float, float]) -> bool:
    return all(map(math.isfinite, ends))


def nonnegative(staged: Staged) -> str | None:
    """Refuse second moments below zero: a mean or a sum of squares never is.

    By the keys under which torch's optimizers (2.13, ``torch/optim``) and their kin keep them, by
    name or by order. A key that says no more than ``sum`` counts where its group is Adagrad's.
    """
    own = {
        f"{place}/{key}"
        for group in staged.groups()
        for key, told_by in SUMS.items()
        if told_by <= group.values.keys()
        for place in group.places
    }
    for path in staged.values():
        named = path.rpartition("/")[2] in SQUARES and ("/state/" in path or "/state[" in path)
        if named or path in own:
            low, _ = staged.ends(path)
            if low < 0:
                return f"{path}: its least value is {low:g}, and it is made of squares"
    return None


SQUARES: Final = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg"})
"""Keys that say themselves that they are of squares: Adam and its kin, RMSprop and Adadelta."""

ADAFACTOR: Final = frozenset({"beta2_decay", "d"})
SUMS: Final = {
    "sum": frozenset({"lr_decay", "initial_accumulator_value"}),  # Adagrad
    **dict.fromkeys(("row_var", "col_var", "variance"), ADAFACTOR),
}
"""Keys that may mean anything, with the hyperparameters of the optimizer whose squares they are."""


def moments(staged: Staged) -> str | None:
    """Refuse a first moment that no gradients give beside its second one: |m| <= K sqrt(v).

    By Cauchy-Schwarz, with decay rates that are constant (:mod:`handfast.audit.invariants`); those
    that change from epoch to epoch are left alone until the job starts again. betas may have been
    others before this process, so K is the larger of their own bound and of that for torch's
    defaults (0.9, 0.999): a training that went from these to smaller ones keeps to it, for each
    step takes the bound from where it was towards that of its betas. What was before at rates
    whose bound is larger still (beta2 = 0.9999, say) is refused after such a restart.

    Optimizers that are not known to keep Adam's moments (:data:`ADAMS`) are left alone, and that is
    logged once: under the same keys SOAP has a v of another basis than its m, and ADOPT an m of
    gradients that were divided already.

    A mixture of two epochs of one training rarely breaks it: this finds moments of another
    parameter, or half of them lost. Missed is what lies between the two bounds: at (0.9, 0.95) a
    first moment of up to 7.3 sqrt(v), where no constant betas give more than 1.2 sqrt(v), and
    most counters that are too small.
    """
    for path in staged.unjudged():
        _say(f"moments: {path} is left alone: what its exp_avg and exp_avg_sq mean is not known")
    for each in staged.moments():
        if each.first.dtype != torch.float32 or each.second.dtype != torch.float32:
            continue
        steps = max(each.step, 1)
        bounds = [invariants.moments(*betas, steps, FLOAT32) for betas in (each.betas, DEFAULT)]
        most, least = max(b.most for b in bounds), max(b.least for b in bounds)
        flat, square = each.first.reshape(-1), each.second.reshape(-1)
        for m, v in zip(parts(flat), parts(square), strict=True):
            over = m.abs() > (v.clamp(min=0) + least).sqrt() * (most * SLACK)
            if over.any():
                at = int(over.nonzero()[0])
                return (
                    f"{each.path}: {int(over.sum())} of {len(m)} first moments are too large for "
                    f"their second ones, such as {float(m[at]):g} beside {float(v[at]):g}, where "
                    f"|m| <= {most:.4g} sqrt(v)"
                )
    return None


@cache
def _say(text: str) -> None:
    """Log it, once a process: in the examiner's that is the agent's log."""
    logger.warning("%s", text)


ADAMS: Final = frozenset({
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.nadam.NAdam",
    "torch.optim.radam.RAdam",
    "torch.optim.sparse_adam.SparseAdam",
    "transformers.optimization.AdamW",
    "apex.optimizers.fused_adam.FusedAdam",
})  # fmt: skip
"""Classes whose moments are means of gradients and of their squares, at the rates ``betas``.

A class that is derived from one of them may do anything, and is none. (torch 2.13,
``torch/optim``; transformers 4, ``optimization.py``; apex, ``csrc/multi_tensor_adam.cu``.)
"""

DEFAULT: Final = (0.9, 0.999)
"""The betas of torch's Adam, AdamW, NAdam and RAdam."""

FLOAT32: Final = invariants.ROUNDING["float32"]
SLACK: Final = 1 + 1e-6
"""What this comparison itself may round, in float32."""


def masters(staged: Staged) -> str | None:
    """Refuse low-precision parameters that are not the rounding of their float32 master.

    A master is what an optimizer's state has of a parameter under ``master``, ``master_param`` or
    ``master_weights``; or a component of such a name, under the parameter's own name. Several
    modules may have that name: of these one has to be the rounding.
    """
    for path, lows in staged.known.masters:
        master, *found = (staged.tensors.get(p) for p in (path, *lows))
        weights = [weight for weight in found if weight is not None]
        if master is None or len(weights) < len(lows):
            continue  # another rank of the node has some
        if any(weight.shape != master.shape for weight in weights):
            continue
        wrong = [_unlike(weight, master) for weight in weights]
        if all(wrong):
            return (
                f"{lows[0]}: {wrong[0]} of {master.numel()} values are not their master's rounding"
            )
    return None


def _unlike(low: Tensor, master: Tensor) -> int:
    pairs = zip(parts(low.reshape(-1)), parts(master.reshape(-1)), strict=True)
    return sum(int((a != b.to(a.dtype)).sum()) for a, b in pairs)


@torch.no_grad()
def free(things: Sequence[Node], now: Captured) -> Known:
    """What validators are told: which tensors are free to hold anything, and what others are.

    Free is of a module what certainly is a buffer (a mask's ``-inf``), by its name or by where it
    lies, and extra state; all else that a ``state_dict()`` gives may be made of parameters,
    whatever it is called. Then ``extra``, and what things say by a ``state_dict()`` of their own
    (a ``best`` that begins at ``inf``). What is tied only where it is so under each of its paths:
    a buffer may be somebody else's moment. And never what lies where a parameter does.
    """
    paths = {spec.path: [spec.path] for spec in now.specs}
    for path, kept in now.aliases.items():
        paths[kept].append(path)
    adams = (n.path for n in things if n.kind is Kind.OPTIMIZER and _class(n.value) in ADAMS)
    masters = (*_of_optimizers(things, now), *_in_boxes(now, paths))
    return Known(tuple(_free(things, now, paths)), masters, tuple(adams))


def _free(
    things: Sequence[Node], now: Captured, paths: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    weights = {_start(parameter) for parameter in _parameters(things, now)} - {0}
    own = {EXTRA: ANYTHING}
    for path, kind, value in things:
        own[path] = NOTHING
        if kind is Kind.MODULE:
            own[path] = _of_module(path, value, weights)
        elif kind in FREE and not isinstance(value, Optimizer):
            own[path] = ANYTHING
    for spec, tensor in zip(now.specs, now.tensors, strict=True):
        if _start(tensor) not in weights and all(
            _freedom(path, own).covers(path, _seat(tensor)) for path in paths[spec.path]
        ):
            yield spec.path


class _Freedom(NamedTuple):
    """What of a thing may hold anything: all, or some names, what is under them, some places."""

    whole: bool
    names: frozenset[str] = frozenset()
    heads: tuple[str, ...] = ()
    seats: frozenset[object] = frozenset()

    def covers(self, path: str, seat: object) -> bool:
        named = path in self.names or path.startswith(self.heads)
        return self.whole or named or seat in self.seats


ANYTHING, NOTHING = _Freedom(True), _Freedom(False)


def _of_module(path: str, module: nn.Module, weights: Collection[int]) -> _Freedom:
    buffers = [(n, b) for n, b in _buffers(module) if _start(b) not in weights]
    extras = [child(path, name) for name in cleaned(module, _extra_states(module))]
    names = [child(path, name) for name in cleaned(module, [name for name, _ in buffers])]
    return _Freedom(
        False,
        frozenset(names + extras),
        tuple(f"{extra}{mark}" for extra in extras for mark in "/["),
        frozenset(_seat(buffer) for _, buffer in buffers),
    )


def _freedom(path: str, own: Mapping[str, _Freedom]) -> _Freedom:
    """That of the thing which a path belongs to: of the innermost one that holds it."""
    at: str | None = path
    while at is not None and at not in own:
        at = holder(at)
    return NOTHING if at is None else own[at]


def _parameters(things: Sequence[Node], now: Captured) -> Iterator[Tensor]:
    """All that is trained: of modules, of optimizers, and in boxes."""
    for path, kind, value in things:
        if kind is Kind.MODULE:
            yield from value.parameters()
        elif isinstance(value, Optimizer):
            yield from optimizers.parameters(value)
        elif path in now.trained:
            yield value


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return module.named_buffers(remove_duplicate=False)


def _extra_states(module: nn.Module) -> list[str]:
    """The keys of what ``get_extra_state`` gives (torch 2.13, ``torch/nn/modules/module.py``)."""
    return [
        f"{name}._extra_state".removeprefix(".")
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part).get_extra_state is not nn.Module.get_extra_state
    ]


def _seat(tensor: Tensor) -> tuple[object, ...]:
    """Which memory, and how it is seen."""
    return _start(tensor), tensor.shape, tensor.dtype


def _start(tensor: Tensor) -> int:
    """Where its local part begins in memory; 0 where it has none."""
    try:
        return local(tensor).data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or of a type that only wraps others
        return 0


FREE: Final = (Kind.SCHEDULER, Kind.SCALER, Kind.LOADER, Kind.OBJECT)


_Masters = Iterator[tuple[str, tuple[str, ...]]]
"""Paths of masters, each with those of the weights that it may be the master of."""

ENDS: Final = ("master", "master_param", "master_weights")
"""What masters are called."""

LOW: Final = ("bfloat16", "float16")


def _of_optimizers(things: Sequence[Node], now: Captured) -> _Masters:
    """Of each parameter, wherever the state has it."""
    dtypes = {spec.path: spec.dtype for spec in now.specs}
    places = [path for path, kind, _ in things if kind is Kind.OPTIMIZER]
    for place, names in zip(places, now.names.optimizers, strict=True):
        for parameter, name in names.parameters.items():
            owner, own = now.names.owners.get(parameter, ("", ""))
            weight = f"{owner}/{own}" if own else owner
            weight = now.aliases.get(weight, weight)
            for end in ENDS:
                master = f"{place}/state/{name}/{end}"
                master = now.aliases.get(master, master)
                if dtypes.get(weight) in LOW and dtypes.get(master) == "float32":
                    yield master, (weight,)


def _in_boxes(now: Captured, paths: Mapping[str, Sequence[str]]) -> _Masters:
    """By name: a box does not say whose they are."""
    named, masters = defaultdict(list), []
    for spec in now.specs:
        for component, _, name in (path.partition("/") for path in paths[spec.path]):
            if component in ENDS and spec.dtype == "float32":
                masters.append((spec.path, (name, spec.global_shape)))
            elif spec.dtype in LOW:
                named[name, spec.global_shape].append(spec.path)
    return ((path, tuple(named[key])) for path, key in masters if key in named)


def _class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def loss(staged: Staged) -> str | None:
    """Refuse an epoch whose ``save(extra={"loss": ...})`` gives none, or no finite number."""
    extra = staged.extra
    given: Any = extra.get("loss") if isinstance(extra, Mapping) else None
    try:
        found = float(given)
    except (TypeError, ValueError, RuntimeError):  # the last: of a tensor with several values
        return f"extra={{'loss': ...}} gives no loss, but {given!r:.60}"
    return None if math.isfinite(found) else f"the loss is {found}"


SHORT: Final[Mapping[str, Validator]] = {
    "finite": finite,
    "nonnegative": nonnegative,
    "moments": moments,
    "masters": masters,
    "loss": loss,
}


def find(name: str) -> Validator:
    """Find a validator by its short name, or as ``module:function``.

    Raises ValueError, saying why, for one that isn't there or can't be imported.
    """
    if name in SHORT:
        return SHORT[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(map(repr, SHORT))
        raise ValueError(f"validator {name!r}: one of {known}, or 'module:function' of your own")
    if module == "__main__":
        raise ValueError(
            f"validator {name!r}: it runs in another process, where __main__ is another module: "
            "put it into a module of its own"
        )
    try:
        found: object = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ValueError(f"validator {name!r} can't be imported: {error!r}") from error
    if not callable(found):
        raise ValueError(f"validator {name!r} is a {type(found).__name__}, and no function")
    return found


def _count(tensor: Tensor) -> str:
    """How many values are NaN and infinite, and where the first one is.

    A complex one is NaN or infinite where one of its parts is, and may be both.
    """
    nans = infinite = 0
    first = -1
    parts = 2 if tensor.is_complex() else 1  # a block has whole values: its size is even
    for number, part in enumerate(blocks(tensor)):
        nan, endless = (f(part).view(-1, parts).any(1) for f in (torch.isnan, torch.isinf))
        bad = nan | endless
        if first < 0 and bad.any():
            first = number * BLOCK // parts + int(bad.nonzero()[0])
        nans += int(nan.sum())
        infinite += int(endless.sum())
    return f"{nans} NaN and {infinite} infinite of {tensor.numel()} values, the first at {first}"
