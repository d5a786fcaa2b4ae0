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
from torch import Tensor
from torch.optim import Optimizer

from handfast.audit import invariants
from handfast.core.lattice import Epoch
from handfast.store import objects
from handfast.store.objects import TensorRef
from handfast.torch.capture import Captured
from handfast.torch.saved import EXTRA, KINDS
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
    can't be written and are gone once the validator has returned. ``apart`` are the paths of those
    that may hold anything: see :func:`free`. What this rank leaves to the first of its node is
    examined there. ``rates`` is what is remembered of decay rates from epoch to epoch.
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
    """Refuse second moments below zero: a mean of squares never is."""
    for path in staged.values():
        if "/state/" in path and path.endswith(("/exp_avg_sq", "/max_exp_avg_sq", "/v_buffer")):
            low, _ = staged.ends(path)
            if low < 0:
                return f"{path}: its least value is {low:g}, and it is a mean of squares"
    return None


def moments(staged: Staged) -> str | None:
    """Refuse a first moment that no gradients give beside its second one: |m| <= K sqrt(v).

    By Cauchy-Schwarz, with decay rates that are constant (:mod:`handfast.audit.invariants`); those
    that change from epoch to epoch are left alone until the job starts again. A mixture of two
    epochs of one training rarely breaks it: this finds moments of another parameter, or half of
    them lost.
    """
    for each in staged.moments():
        if each.first.dtype != torch.float32 or each.second.dtype != torch.float32:
            continue
        bound = invariants.moments(*each.betas, max(each.step, 1), FLOAT32)
        flat, square = each.first.reshape(-1), each.second.reshape(-1)
        for m, v in zip(_parts(flat), _parts(square), strict=True):
            over = m.abs() > (v.clamp(min=0) + bound.least).sqrt() * (bound.most * SLACK)
            if over.any():
                at = int(over.nonzero()[0])
                return (
                    f"{each.path}: {int(over.sum())} of {len(m)} first moments are too large for "
                    f"their second ones, such as {float(m[at]):g} beside {float(v[at]):g}, where "
                    f"|m| <= {bound.most:.4g} sqrt(v)"
                )
    return None


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


def free(things: Sequence[Node], now: Captured) -> tuple[str, ...]:
    """The paths of captured tensors that may hold anything.

    That are buffers (a mask's ``-inf``), ``extra``, and what things say by a ``state_dict()`` of
    their own (a ``best`` that begins at ``inf``): neither a parameter, nor of an optimizer, nor a
    gradient, nor in a bare box.
    """
    owners = now.names.owners
    modules = [node.value for node in things if node.kind is Kind.MODULE]
    known = [owners.get(id(p)) for module in modules for p in module.parameters()]
    weights = {"/".join(place) for place in known if place is not None}
    of = [n.path for n in things if n.kind in FREE and not isinstance(n.value, Optimizer)]
    heads = tuple(f"{path}{mark}" for path in (*of, EXTRA) for mark in "/[")
    paths = [spec.path for spec in now.specs if spec.path not in weights]
    return tuple(path for path in paths if path == EXTRA or path.startswith(heads))


FREE: Final = (Kind.MODULE, Kind.SCHEDULER, Kind.SCALER, Kind.LOADER, Kind.OBJECT)


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
    """How many values are NaN and infinite, and where the first one is."""
    nans = infinite = 0
    first = -1
    for number, part in enumerate(_blocks(tensor)):
        bad = ~torch.isfinite(part)
        if first < 0 and bad.any():
            first = number * BLOCK + int(bad.nonzero()[0])
        nans += int(torch.isnan(part).sum())
        infinite += int(torch.isinf(part).sum())
    return f"{nans} NaN and {infinite} infinite of {tensor.numel()} values, the first at {first}"
