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
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.audit import invariants
from handfast.core.lattice import Epoch
from handfast.store import objects
from handfast.store.objects import TensorRef, child
from handfast.torch import optimizers
from handfast.torch.capture import Captured
from handfast.torch.kinds import is_optimizer
from handfast.torch.names import cleaned
from handfast.torch.saved import EXTRA, KINDS
from handfast.torch.tensors import local
from handfast.torch.tree import Kind, Node, join

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

BLOCK: Final = 1 << 22
"""Elements that are looked at together, so that what is computed of them stays small."""

Validator = Callable[["Staged"], str | None]


class Moments(NamedTuple):
    """The state of Adam for one parameter, with its group's decay rates and its step."""

    path: str
    first: Tensor
    second: Tensor
    betas: tuple[float, float]
    step: float


class Staged:
    """What one rank has staged of an epoch, before anybody may rely on it.

    ``tensors`` are this rank's own, by path, in their dtypes and shapes: views of the image, which
    can't be written; what they show after the validator has returned is undefined, so what is to
    be kept is copied. ``apart`` are the paths of those that may hold anything: see :func:`free`.
    What this rank leaves to the first of its node is examined there. ``rates`` is what is
    remembered of decay rates from epoch to epoch.
    """

    def __init__(
        self,
        epoch: Epoch,
        tensors: Mapping[str, Tensor],
        encoded: bytes,
        apart: frozenset[str],
        rates: dict[str, tuple[float, float]] | None = None,
    ) -> None:
        self.generation, self.step = epoch.generation, epoch.step
        self.tensors = tensors
        self.apart = apart
        self._encoded = encoded
        self._rates = {} if rates is None else rates
        self._ends: dict[str, tuple[float, float]] = {}

    @cached_property
    def objects(self) -> dict[str, Any]:
        """All that is no tensor, by component; a string where only the trainer could read it.

        That is what was pickled, or is of a type that the trainer has registered.
        """
        plain = msgspec.msgpack.encode(_inert(msgspec.msgpack.decode(self._encoded)))
        found: Any = objects.decode(plain, where="staged objects")
        return dict(found)

    @property
    def extra(self) -> Any:
        """What the training gave to ``save(extra=...)``, with its tensors."""
        return join(self.objects.get(EXTRA), self._tensor)

    def _tensor(self, ref: TensorRef) -> Any:
        return self.tensors.get(ref.path, ref)  # what is tied to another is not here twice

    def ends(self, path: str) -> tuple[float, float]:
        """The least and the greatest value of a tensor of real numbers; NaN if it holds one.

        (0, 0) of an empty one. Read once, whoever asks.
        """
        if path not in self._ends:
            self._ends[path] = _ends(self.tensors[path])
        return self._ends[path]

    def values(self) -> Iterator[str]:
        """The paths of parameters, moments and all else that has to be a number."""
        for path, tensor in self.tensors.items():
            if path not in self.apart and (tensor.is_floating_point() or tensor.is_complex()):
                yield path

    def moments(self) -> Iterator[Moments]:
        """The pairs of moments that Adam and its kin keep, where the decay rates do not cycle."""
        for component, kind in self.objects.get(KINDS, {}).items():
            if kind.partition(":")[0] == Kind.OPTIMIZER.value and component in self.objects:
                yield from self._moments(component, self.objects[component])

    def optimizers(self) -> list[str]:
        """The paths of optimizers, whether they keep their state by name or by order."""
        return [path for path, kind in self.objects.get(KINDS, {}).items() if is_optimizer(kind)]

    def _moments(self, component: str, saved: Any) -> Iterator[Moments]:
        groups = saved["param_groups"] if isinstance(saved, Mapping) else ()
        for number, group in enumerate(groups):
            betas = group.get("betas")
            if betas is None or "max_momentum" in group or not all(map(_is_number, betas)):
                continue  # OneCycleLR and CyclicLR change them at every step
            if self._rates.setdefault(f"{component}/{number}", tuple(betas)) != tuple(betas):
                continue  # no bound is known of what they were meanwhile
            for name in group["params"]:
                at = f"{component}/state/{name}/"
                first, second = (self.tensors.get(at + each) for each in ("exp_avg", "exp_avg_sq"))
                step = self.tensors.get(at + "step")
                if first is not None and second is not None and first.shape == second.shape:
                    count = float(step) if step is not None else math.inf
                    yield Moments(at, first, second, (float(betas[0]), float(betas[1])), count)


def finite(staged: Staged) -> str | None:
    """Refuse parameters, moments and gradients that are NaN or infinite."""
    for path in staged.values():
        low, high = staged.ends(path)
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"{path}: {_count(staged.tensors[path])}"
    return None


def nonnegative(staged: Staged) -> str | None:
    """Refuse second moments below zero: a mean or a sum of squares never is.

    By the keys under which torch's optimizers (2.13, ``torch/optim``) and their kin keep them, by
    name or by order; Adagrad's ``sum`` and Adafactor's ``variance`` in an optimizer's state alone.
    """
    own = tuple(f"{path}/state{mark}" for path in staged.optimizers() for mark in "/[")
    for path in staged.values():
        key = path.rpartition("/")[2]
        if (key in SQUARES and ("/state/" in path or "/state[" in path)) or (
            key in ("sum", "variance") and path.startswith(own)
        ):
            low, _ = staged.ends(path)
            if low < 0:
                return f"{path}: its least value is {low:g}, and it is made of squares"
    return None


SQUARES: Final = frozenset({
    "exp_avg_sq", "max_exp_avg_sq", "v_buffer", "square_avg", "row_var", "col_var",
})  # fmt: skip
"""Keys of means of squares: Adam and its kin, RMSprop and Adadelta, Adafactor's factors."""


def moments(staged: Staged) -> str | None:
    """Refuse a first moment that no gradients give beside its second one: |m| <= K sqrt(v).

    By Cauchy-Schwarz, with decay rates that are constant (:mod:`handfast.audit.invariants`); those
    that change from epoch to epoch are left alone until the job starts again. betas may have been
    others before this process, so K is the larger of their own bound and of that for torch's
    defaults (0.9, 0.999): a training that went from these to smaller ones keeps to it, for each
    step takes the bound from where it was towards that of its betas. What was before at rates
    whose bound is larger still (beta2 = 0.9999, say) is refused after such a restart.

    A mixture of two epochs of one training rarely breaks it: this finds moments of another
    parameter, or half of them lost. Missed is what lies between the two bounds: at (0.9, 0.95) a
    first moment of up to 7.3 sqrt(v), where no constant betas give more than 1.2 sqrt(v), and
    most counters that are too small.
    """
    for each in staged.moments():
        if each.first.dtype != torch.float32 or each.second.dtype != torch.float32:
            continue
        steps = max(each.step, 1)
        bounds = [invariants.moments(*betas, steps, FLOAT32) for betas in (each.betas, DEFAULT)]
        most, least = max(b.most for b in bounds), max(b.least for b in bounds)
        flat, square = each.first.reshape(-1), each.second.reshape(-1)
        for m, v in zip(_parts(flat), _parts(square), strict=True):
            over = m.abs() > (v.clamp(min=0) + least).sqrt() * (most * SLACK)
            if over.any():
                at = int(over.nonzero()[0])
                return (
                    f"{each.path}: {int(over.sum())} of {len(m)} first moments are too large for "
                    f"their second ones, such as {float(m[at]):g} beside {float(v[at]):g}, where "
                    f"|m| <= {most:.4g} sqrt(v)"
                )
    return None


DEFAULT: Final = (0.9, 0.999)
"""The betas of torch's Adam, AdamW, NAdam and RAdam."""

FLOAT32: Final = invariants.ROUNDING["float32"]
SLACK: Final = 1 + 1e-6
"""What this comparison itself may round, in float32."""


def masters(staged: Staged) -> str | None:
    """Refuse low-precision parameters that are not the rounding of their float32 master.

    A master is what an optimizer's state, or a box of the state, has under ``master``,
    ``master_param`` or ``master_weights`` and the parameter's own name.
    """
    for path, low in staged.tensors.items():
        if low.dtype not in (torch.bfloat16, torch.float16):
            continue
        for master in _masters_of(path, staged.tensors):
            if master.shape != low.shape:
                continue
            pairs = zip(_parts(low.reshape(-1)), _parts(master.reshape(-1)), strict=True)
            apart = sum(int((a != b.to(a.dtype)).sum()) for a, b in pairs)
            if apart:
                return f"{path}: {apart} of {low.numel()} values are not their master's rounding"
    return None


@torch.no_grad()
def free(things: Sequence[Node], now: Captured) -> tuple[str, ...]:
    """The paths of captured tensors that may hold anything.

    Of a module that is what certainly is a buffer (a mask's ``-inf``), by its name or by where it
    lies, and extra state; all else that a ``state_dict()`` gives may be made of parameters,
    whatever it is called. Then ``extra``, and what things say by a ``state_dict()`` of their own
    (a ``best`` that begins at ``inf``). And never what lies where a parameter does.
    """
    weights = {_start(parameter) for parameter in _parameters(things, now)} - {0}
    names, buffers, heads = {EXTRA}, set(), [EXTRA]
    for path, kind, value in things:
        if kind is Kind.MODULE:
            own = [(n, b) for n, b in _buffers(value) if _start(b) not in weights]
            names |= {child(path, name) for name in cleaned(value, [name for name, _ in own])}
            buffers |= {_seat(buffer) for _, buffer in own}
            extras = {child(path, name) for name in cleaned(value, _extra_states(value))}
            names |= extras
            heads += extras
        elif kind in FREE and not isinstance(value, Optimizer):
            heads.append(path)
    under = tuple(f"{head}{mark}" for head in heads for mark in "/[")
    return tuple(
        spec.path
        for spec, tensor in zip(now.specs, now.tensors, strict=True)
        if (spec.path in names or _seat(tensor) in buffers or spec.path.startswith(under))
        and _start(tensor) not in weights
    )


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


REGISTERED, PICKLE = 30, 31  # tags of docs/format.md, Objects


def _inert(node: Any) -> Any:
    """Encoded objects with a string in the place of each that only the trainer can make."""
    if type(node) is not list:
        return node
    if node[:1] in ([REGISTERED], [PICKLE]):
        return f"<{node[1]} {id(node)}>"  # no two alike: they may be elements of a set
    return list(map(_inert, node))


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _masters_of(path: str, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    _, _, name = path.partition("/")
    for end in ("master", "master_param", "master_weights"):
        for place in (f"{end}/{name}", f"optimizer/state/{name}/{end}"):
            found = tensors.get(place)
            if found is not None and found.dtype == torch.float32:
                yield found


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


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Its real numbers, some millions at a time, in a dtype that torch can compute with."""
    for part in _parts(_real(tensor)):
        yield part.float() if part.element_size() == 1 else part


def _parts(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, BLOCK)


def _ends(tensor: Tensor) -> tuple[float, float]:
    flat = _real(tensor)
    if not flat.numel():
        return 0.0, 0.0
    if flat.element_size() == 1:  # torch has no minimum of the 8-bit floats
        flat = torch.tensor([end for part in _blocks(flat) for end in _ends(part)])
    low, high = torch.aminmax(flat)
    return float(low), float(high)


def _count(tensor: Tensor) -> str:
    """How many values are NaN and infinite, and where the first one is.

    A complex one is NaN or infinite where one of its parts is, and may be both.
    """
    nans = infinite = 0
    first = -1
    parts = 2 if tensor.is_complex() else 1  # a block has whole values: its size is even
    for number, part in enumerate(_blocks(tensor)):
        nan, endless = (f(part).view(-1, parts).any(1) for f in (torch.isnan, torch.isinf))
        bad = nan | endless
        if first < 0 and bad.any():
            first = number * BLOCK // parts + int(bad.nonzero()[0])
        nans += int(nan.sum())
        infinite += int(endless.sum())
    return f"{nans} NaN and {infinite} infinite of {tensor.numel()} values, the first at {first}"
