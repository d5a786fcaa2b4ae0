"""Guards for the optimizer: parts of different epochs are not put together in silence.

A :class:`~handfast.torch.Checkpointer` restores one epoch whole, so nothing can be mixed there. By
hand it can: weights from here, moments from there. :func:`load` loads parts of one epoch, verified,
and refuses what would make a mixture with what is there already, before it changes anything; the
first step of an optimizer asks once more (:mod:`handfast.torch.indices`). Which epochs belong
together the stamps say: the values rarely show it (docs/optimizer.md).

A lineage can be declared as a type, so that mypy keeps apart what came from two of them::

    class Pretrained(guard.Lineage):
        name = "main"

    def tune(model: guard.Of[Pretrained, GPT]) -> None: ...

    tune(guard.of(Pretrained, model))
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from handfast.checkpoint.arguments import line
from handfast.checkpoint.reader import open_run
from handfast.checkpoint.weights import holding
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.model.optimizer import Index
from handfast.torch.corrections import Applied, Correction, check
from handfast.torch.indices import Origin, beside, mark, origin, refuse_apart
from handfast.torch.lineage import History, index_of
from handfast.torch.state import TorchState
from handfast.torch.tree import nodes

__all__ = ["Lineage", "Loaded", "Of", "load", "of", "origin"]

T = TypeVar("T")


class Lineage:
    """A lineage as a type: subclass it once for each that a program speaks of."""

    name: ClassVar[str] = "main"


L = TypeVar("L", bound=Lineage)


class Of(Generic[L, T]):
    """A live part of a lineage; ``index`` is where it came from. Made by :func:`of`."""

    def __init__(self, live: T, index: Index) -> None:
        self.live = live
        self.index = index


def of(lineage: type[L], live: T) -> Of[L, T]:
    """Say which lineage a module or optimizer is of. Raises Refused, FOREIGN, unless it is."""
    came = origin(live)
    if came is None or came.history.lineage != lineage.name:
        known = f"is of lineage {came.history.lineage}" if came else "has no origin that is known"
        raise Refused(
            f"this {type(live).__name__} {known}, and lineage {lineage.name} was asked for",
            verdict=Verdict.FOREIGN,
            remedy="load it by Checkpointer.restore or guard.load; what is loaded otherwise is of "
            "no known lineage",
        )
    return Of(live, came.index)


@dataclass(frozen=True)
class Loaded:
    """What was loaded: of which epoch and index; what of a correction is still to come."""

    epoch: Epoch
    index: Index
    applied: Sequence[Applied]


def load(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    step: int | Epoch | None = None,
    lineage: str = "",
    correction: Correction | None = None,
    onto: Sequence[Optimizer] = (),
    pickle: Sequence[str] = (),
    **parts: Any,
) -> Loaded:
    """Load components of one epoch into live parts, in place: ``load("runs/a", model=model)``.

    ``path`` is what :func:`handfast.open` takes; without ``step`` it is the recovery line, which
    several ranks could each find elsewhere, so these have to name it. Each of
    ``parts`` is a component of that run by its name, and is loaded whole, this rank's shard of it;
    every byte is verified before anything is changed. No agent and no process group is needed.

    What would make a mixture is refused: parts that share parameters with live ones of another
    epoch, or with some that were trained on since. ``lineage`` names the training history that
    begins here. With it, weights may go on without the optimizer they had, which is fine-tuning;
    with a ``correction``, too, parts of two epochs may be put together, which is a heuristic. The
    correction is applied to the optimizers that are loaded, and to those in ``onto``.

    Raises Refused: MIXED for a mixture, MISSING or FOREIGN where the epoch or this rank's shard is
    not there, with differences of structure named; Damaged where a byte is wrong; ValueError for
    arguments that make no sense, TypeError for an optimizer that the correction does not know;
    Poisoned where it failed half-way.
    """
    lineage = lineage and line(lineage)
    _check_wish(parts, lineage, correction, onto)
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    rank, ranks = _place()
    if ranks > 1 and step is None:
        raise ValueError("on several ranks give step=: each would choose the newest by itself")
    only = tuple(f"{name}/**" for name in parts)
    held = {n.path: n.value for n in nodes(parts) if isinstance(n.value, nn.Module | Optimizer)}
    optimizers = [part for part in (*held.values(), *onto) if isinstance(part, Optimizer)]
    if correction is not None:
        for optimizer in optimizers:
            check(correction, optimizer)
    others = beside(held.values())
    # an optimizer's state goes by the names that its module gives to parameters
    named = {came.path: part for part, came in others.items() if came.path not in parts}
    state = TorchState(named | parts, rng=False, replicated=(), pickle=pickle, verify="fsync")
    with holding(open_run(*paths).location, step, shard=rank, purpose="guard.load") as copies:
        stamp = copies[0].manifest.stamp
        came = Origin(stamp.run, index_of(stamp), "", History.of(stamp))
        if lineage:
            why = correction.describe() if correction else f"guard.load of {', '.join(parts)}"
            came = replace(came, history=came.history.fork(lineage, came.run, came.index, why))
        if correction is None:
            refuse_apart([*(replace(came, path=path) for path in held), *others.values()], WHAT)
        state.compare(copies, only, strict=True)
        for copy in copies:
            copy.verify()
        state.apply(copies, only, ())
    applied = [correction.apply(one) for one in optimizers] if correction is not None else []
    mixed = others if correction is not None else {}
    _remember(came, held, mixed, {} if lineage else state.alone(copies, only))
    return Loaded(stamp.epoch, came.index, applied)


WHAT = "what this load would leave"


def _check_wish(
    parts: Mapping[str, Any], lineage: str, correction: object, onto: Sequence[Optimizer]
) -> None:
    if not parts:
        raise ValueError("load(): name what is to be loaded, such as model=model")
    if correction is not None and not lineage:
        raise ValueError("correction=: what it begins is another lineage: name it, lineage='...'")
    if onto and correction is None:
        raise ValueError("onto=: name what is to be done with these optimizers, correction=...")


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _remember(
    came: Origin,
    parts: Mapping[str, Any],
    others: Mapping[Any, Origin],
    alone: Mapping[str, frozenset[int] | None],
) -> None:
    """Let the parts know where they came from; mixed on purpose, they are of one index since."""
    if others:
        weights = [c for part, c in others.items() if isinstance(part, nn.Module)]
        index = weights[0].index if weights else came.index
        came = replace(
            came,
            index=Index(came.history.lineage, index.generation, index.step, index.configuration),
        )
        mark((part, replace(came, path=was.path)) for part, was in others.items())
    mark((part, came.loaded(path, alone.get(path))) for path, part in parts.items())
