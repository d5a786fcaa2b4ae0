"""Guards for the optimizer: parts of different epochs are not put together in silence.

A :class:`~handfast.torch.Checkpointer` restores one epoch whole, so nothing can be mixed there. By
hand it can: weights from here, moments from there. :func:`load` loads parts of one epoch, verified,
and refuses what would make a mixture with what is there already, before it changes anything; the
first step of an optimizer asks once more (:mod:`handfast.torch.indices`). Which epochs belong
together the stamps say: the values rarely show it (docs/optimizer.md). What may be done with parts
of several epochs is ``guard.Reset``, ``guard.Rescale`` and ``guard.Damp``, of
:mod:`handfast.torch.corrections`.

A lineage can be declared as a type, so that mypy keeps apart what came from two of them::

    class Pretrained(guard.Lineage):
        name = "main"

    def tune(model: guard.Of[Pretrained, GPT]) -> None: ...

    tune(guard.of(Pretrained, model))  # in tune(), model.live is the GPT
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Generic, TypeVar

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from handfast.checkpoint.arguments import line, patterns
from handfast.checkpoint.reader import open_run
from handfast.checkpoint.spelling import some
from handfast.checkpoint.validated import Validated
from handfast.checkpoint.weights import holding
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.model.optimizer import Index
from handfast.store.manifest import Fork, Stamp
from handfast.store.objects import child
from handfast.torch.compare import Ways, check_components
from handfast.torch.corrections import (
    Applied,
    Correction,
    Damp,
    Rescale,
    Reset,
    check,
    standing,
)
from handfast.torch.indices import beside
from handfast.torch.lineage import History, index_of
from handfast.torch.marked import again, mark, origin
from handfast.torch.origins import Origin, refuse_apart
from handfast.torch.saved import Saved
from handfast.torch.state import TorchState
from handfast.torch.tree import Kind, Node, nodes

__all__ = [
    "Applied",
    "Damp",
    "Lineage",
    "Loaded",
    "Of",
    "Rescale",
    "Reset",
    "load",
    "of",
    "origin",
]

logger = logging.getLogger("handfast")

T = TypeVar("T")


class Lineage:
    """A lineage as a type: subclass it once for each that a program speaks of."""

    name: ClassVar[str] = "main"


L = TypeVar("L", bound=Lineage)


class Of(Generic[L, T]):
    """A live part of a lineage, made by :func:`of`: the module or optimizer itself is ``live``,
    and ``index`` is where it came from.
    """

    def __init__(self, live: T, index: Index) -> None:
        self.live = live
        self.index = index

    def __repr__(self) -> str:
        return f"Of({type(self.live).__name__} of {self.index})"


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
    """What was loaded: of which epoch and index; what of a correction is still to come.

    Where nothing was, as the parts had gone on already, it is what they are of.
    """

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
    keep_live: Sequence[str] = (),
    **parts: Any,
) -> Loaded:
    """Load components of one epoch into live parts, in place: ``load("runs/a", model=model)``.

    ``path`` is what :func:`handfast.open` takes; without ``step`` it is the recovery line, which
    several ranks could each find elsewhere, so these have to name it. Each of
    ``parts`` is a component of that run by its name, and is loaded whole, this rank's shard of it;
    every byte is verified before anything is changed. No agent and no process group is needed.
    ``keep_live`` names hyperparameters that keep their live values.

    What would make a mixture is refused: parts that share parameters with live ones of another
    epoch, or with some that were trained on since. ``lineage`` names the training history that
    begins here, in one load or several, each with weights of its own. With it, weights may go on
    without the optimizer they had, which is fine-tuning; with a ``correction``, too, parts of two
    epochs may be put together, which is a heuristic. The correction is applied to the optimizers
    that are loaded, and to those in ``onto``.

    A script that is started again says all this again. So an epoch that is of ``lineage`` already
    goes on as that, and no correction is applied. Parts that were restored from such an epoch have
    what began it behind them: they are left as they are.

    Raises Refused: MIXED for a mixture, MISSING or FOREIGN where the epoch or this rank's shard is
    not there, with differences of structure named; Damaged where a byte is wrong; ValueError for
    arguments that make no sense, TypeError for an optimizer that the correction does not know, and
    for what nothing can be loaded into; Poisoned where it failed half-way.
    """
    lineage, keep_live = lineage and line(lineage), patterns("keep_live", keep_live)
    _check_options(parts, lineage, correction, onto)
    held = _held(parts)
    wish = _Wish(held, lineage, correction, tuple(onto), _why(parts, correction))
    wish.check()
    rank, ranks = _place()
    if ranks > 1 and step is None:
        raise ValueError("on several ranks give step=: each would choose the newest by itself")
    others = beside(held.values())
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    location = open_run(*paths).location
    if (known := wish.behind(others.values(), step, location.survey().run)) is not None:
        logger.info("%s goes on: what began it is not done again", known)
        epoch = Epoch(known.index.generation, known.index.step)
        return Loaded(epoch, known.index, wish.standing())
    with holding(location, step, shard=rank, purpose="guard.load") as copies:
        return _load(copies, parts, wish, others, tuple(pickle), keep_live)


WHAT: Final = "what this load would leave"
WAYS: Final = Ways(
    part="leave out of guard.load what is not (a new head, say, is added after it)",
    rest="leave those components out",
)


def _load(
    copies: Sequence[Validated],
    parts: Mapping[str, Any],
    wish: _Wish,
    others: Mapping[Any, Origin],
    pickle: Sequence[str],
    keep_live: Sequence[str],
) -> Loaded:
    """Load what is held; ``others`` share parameters with it, and stay."""
    # an optimizer's state goes by the names that its module gives to parameters
    whole = {part: came for part, came in others.items() if not came.follows}
    named = {came.path: part for part, came in whole.items() if came.path not in parts}
    state = TorchState(
        {**named, **parts}, rng=False, replicated=(), pickle=pickle, verify="fsync", ways=WAYS
    )
    only = tuple(f"{child('', name)}/**" for name in parts)
    came, begins = wish.begin(copies[0].manifest.stamp)
    mixes = begins and wish.correction is not None
    saved = state.read(copies)
    check_components(saved, parts)
    _check_named(saved, wish.held, named)
    if mixes:
        wish.check_moments(saved)
        came = wish.mixed(came, others)
    else:
        refuse_apart([*(replace(came, path=p) for p in wish.held), *others.values()], WHAT)
    state.compare(copies, only, strict=True)
    for copy in copies:
        copy.verify()
    state.apply(copies, only, keep_live)
    _remember(came, wish.held, others if mixes else {}, state.known(copies))
    applied = wish.apply() if mixes else wish.standing()
    return Loaded(copies[0].manifest.stamp.epoch, came.index, applied)


def _check_options(
    parts: Mapping[str, Any], lineage: str, correction: object, onto: Sequence[Optimizer]
) -> None:
    if not parts:
        raise ValueError("load(): name what is to be loaded, such as model=model")
    if correction is not None and not lineage:
        raise ValueError("correction=: what it begins is another lineage: name it, lineage='...'")
    if onto and correction is None:
        raise ValueError("onto=: name what is to be done with these optimizers, correction=...")


def _check_named(saved: Saved, held: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Raise ValueError for optimizers whose state goes by names, with no module that gives them."""
    if any(isinstance(part, nn.Module) for part in (*held.values(), *named.values())):
        return
    if lost := [path for path in held if saved.kinds.get(path) == Kind.OPTIMIZER]:
        raise ValueError(
            f"{some(lost, 3)}: its state was saved by the names that its module gives to "
            "parameters, and no module is loaded with it or was before. What to do: give the "
            "module, too, guard.load(..., model=model, optimizer=optimizer), or load that first"
        )


def _held(parts: Mapping[str, Any]) -> dict[str, nn.Module | Optimizer]:
    """The modules and optimizers among some parts, by path.

    Raises TypeError for what nothing can be loaded into.
    """
    found: list[Node] = []
    for name, part in parts.items():
        try:
            found += nodes({name: part})
        except TypeError as error:
            raise TypeError(
                f"{name}= is no option of guard.load, and a {type(part).__name__} is no part that "
                "can be loaded into. What to do: leave it out, or give a live module, optimizer, "
                "tensor or object with load_state_dict(), or a box of these, and no state_dict()"
            ) from error
    return {n.path: n.value for n in found if isinstance(n.value, nn.Module | Optimizer)}


def _why(parts: Mapping[str, Any], correction: Correction | None) -> str:
    """How a stamp says why the lineage began."""
    return correction.describe() if correction else f"guard.load of {', '.join(parts)}"


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class _Wish:
    """What is asked for: parts by path, and the lineage that begins, if any does, and why.

    A ``correction`` is for the optimizers among the parts, and for those in ``onto``.
    """

    held: Mapping[str, nn.Module | Optimizer]
    lineage: str
    correction: Correction | None
    onto: tuple[Optimizer, ...]
    why: str

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [part for part in (*self.held.values(), *self.onto) if isinstance(part, Optimizer)]

    def check(self) -> None:
        """Raise TypeError for an optimizer that the correction does not know."""
        if self.correction is not None:
            for optimizer in self._optimizers:
                check(self.correction, optimizer)

    def check_moments(self, saved: Saved) -> None:
        """Raise ValueError where the correction is of moments, and there will be none."""
        if not isinstance(self.correction, Rescale):
            return
        opts = [f"{path}/state/" for path, part in self.held.items() if isinstance(part, Optimizer)]
        loaded = [any(path.startswith(where) for path in saved.paths()) for where in opts]
        if not all([*loaded, *(optimizer.state for optimizer in self.onto)]):
            raise ValueError(
                "correction=: an optimizer of these would have no moments to rescale: load some "
                "into it, or begin them anew with Reset"
            )

    def behind(self, others: Iterable[Origin], step: int | Epoch | None, run: str) -> Origin | None:
        """Where the parts are from, if that is an epoch of the lineage: it began before.

        Raises ValueError where it began otherwise, or only some are from such an epoch.
        """
        parts = [origin(part) for part in (*self.held.values(), *self.onto)]
        known = [came for came in (*parts, *others) if came is not None and self._is_of(came)]
        if not known:
            return None
        began = known[0].history.began()
        if not any(self._began_so(fork, step, run) for fork in began):
            where = "; at ".join(
                f"{fork.of} {Epoch(fork.generation, fork.step)} of run {fork.run} ({fork.why})"
                for fork in began
            )
            raise ValueError(
                f"lineage={self.lineage!r}: {known[0]} is of it, and it began at {where}: give "
                "what begins here a new name"
            )
        if not all(came is not None and self._is_of(came) for came in parts):
            raise ValueError(
                f"lineage={self.lineage!r}: {known[0]} is of it, and what is to be loaded would "
                "begin it once more: load these parts from that epoch, too, or give a new name"
            )
        return known[0]

    def _is_of(self, came: Origin) -> bool:
        lineages = {came.index.lineage, came.history.lineage}
        return lineages == {self.lineage} and bool(came.history.began())

    def _began_so(self, fork: Fork, step: int | Epoch | None, run: str) -> bool:
        at = Epoch(fork.generation, fork.step)
        return (fork.run, fork.why) == (run, self.why) and step in (None, at, at.step)

    def begin(self, stamp: Stamp) -> tuple[Origin, bool]:
        """Where what is loaded comes from, and whether the lineage begins with it."""
        was, index = History.of(stamp), index_of(stamp)
        history = was.onward(self.lineage, stamp.run, index, self.why)
        return Origin(stamp.run, index, "", history), history != was

    def mixed(self, came: Origin, others: Mapping[Any, Origin]) -> Origin:
        """Where parts come from that are put together with others, on purpose: they are of one
        index since, that of the weights, and of a lineage that began at each of theirs.

        Raises ValueError for the name of a lineage that one of them came from.
        """
        if not others:
            return came
        weights = (o.index for part, o in others.items() if isinstance(part, nn.Module))
        ways = (o.history.onward(self.lineage, o.run, o.index, self.why) for o in others.values())
        index, history = next(weights, came.index), came.history.joined(ways)
        return replace(came, index=index, history=history, loaded=came.index)

    def apply(self) -> list[Applied]:
        """Apply the correction."""
        return [self.correction.apply(one) for one in self._optimizers] if self.correction else []

    def standing(self) -> list[Applied]:
        """What is left of a correction that was applied before."""
        return [standing(one) for one in self._optimizers] if self.correction else []


def _remember(
    came: Origin,
    parts: Mapping[str, Any],
    others: Mapping[Any, Origin],
    known: Mapping[str, frozenset[int]],
) -> None:
    """Let the parts know where they came from, and others with which they were mixed on purpose."""
    again(
        (part, replace(came, path=was.path, loaded=was.loaded or was.index))
        for part, was in others.items()
    )
    mark((part, replace(came, path=path, known=known[path])) for path, part in parts.items())
