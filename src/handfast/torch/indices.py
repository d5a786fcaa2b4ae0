"""Of which index live parts are: known since they were loaded, by the parts themselves.

A module or an optimizer that was restored remembers the run and the index (lineage, generation,
step, configuration) that it came from, for as long as it lives. What loads it otherwise
(``load_state_dict``) ends that; the first step of an optimizer holds its own against its weights'.
All later steps ask nothing: what was together once stays together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakSet, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.model.optimizer import Index
from handfast.torch.contents import contents
from handfast.torch.lineage import History
from handfast.torch.marks import version_of
from handfast.torch.names import unwrapped

__all__ = [
    "HERE",
    "Origin",
    "beside",
    "changes",
    "clear",
    "common",
    "forgotten",
    "is_own",
    "mark",
    "origin",
    "refuse_apart",
    "refuse_trained_apart",
]

logger = logging.getLogger("handfast")


@dataclass(frozen=True)
class Origin:
    """Where a live part came from: a component ``path`` of the epoch of a run.

    ``history`` is what it goes on as; ``lone`` says that what was saved with it did not come (of
    weights an optimizer with a state, of an optimizer the weights), and that nobody said so by a
    lineage of its own; ``moved`` that it has taken steps since. ``known`` are the ids of
    the parameters that have come, of what is ``lone``.
    """

    run: str
    index: Index
    path: str
    history: History = field(default_factory=History)
    lone: bool = False
    moved: bool = False
    known: frozenset[int] = frozenset()

    def loaded(self, path: str, known: frozenset[int] | None) -> Origin:
        """The origin of one part of what was loaded; ``known`` where it has come alone."""
        return replace(self, path=path, lone=known is not None, known=known or frozenset())

    @property
    def fresh(self) -> bool:
        """Whether it began here, and has not moved: it may still be anything."""
        return self.run == HERE and not self.moved

    @property
    def plain(self) -> bool:
        """Whether it goes on as what it was in a run: it did not begin here, nor did a lineage."""
        return self.run != HERE and self.history.lineage == self.index.lineage

    def __str__(self) -> str:
        onward = self.history.lineage
        gone = f", going on as {onward}" if onward != self.index.lineage else ""
        since = ", trained on since" if self.moved else ""
        return f"{self.path} of {self.index} of run {self.run}{gone}{since}"


_origins: Any = WeakIdKeyDictionary()
_forgotten: Any = WeakIdKeyDictionary()
_roots: Any = WeakIdKeyDictionary()  # a module's own modules, to what was marked, weakly
_watched: Any = WeakIdKeyDictionary()
_versions: Any = WeakIdKeyDictionary()  # of the parameters of modules, when they were marked
_asked: Any = WeakIdKeyDictionary()  # optimizers, to the change that they were asked after


class _Now:
    """How many times an origin has changed, so that a step asks once after each, and then no more.

    ``hook`` is on all of torch's optimizers, since weights don't say which of them will be stepped.
    ``loading`` refers to the module whose ``load_state_dict`` was called last.
    """

    change = 0
    hook: Any = None
    loading: ref[nn.Module] | None = None


class _Lost(NamedTuple):
    """An origin that a load has ended, and a digest of what the part held before; None where that
    is not known, or comes to nothing any more.
    """

    came: Origin
    held: bytes | None
    left: int = 4  # so many loads may take it back: one that is loaded all the time is never


def origin(part: object) -> Origin | None:
    """Give the origin of a live module or optimizer; None where it has none that is known."""
    found: Origin | None = _origins.get(_core(part)) if _can(part) else None
    return found


def _core(part: object) -> object:
    """A part without wrappers, which come and go, and share all that they have with it."""
    return unwrapped(part) if isinstance(part, nn.Module) else part


def mark(parts: Iterable[tuple[object, Origin]]) -> None:
    """Remember where modules and optimizers have just come from; what else there is is passed over.

    From here on it is seen when one of them is loaded otherwise, and when an optimizer is stepped.
    """
    for whole, came in parts:
        part = _core(whole)
        if isinstance(part, nn.Module):
            _origins[part], _versions[part] = came, _versions_of(part)
            for module in part.modules():
                _roots.setdefault(module, WeakSet()).add(part)
                _watch(module, module.register_load_state_dict_post_hook, _LOADED)
                _watch(module, module.register_load_state_dict_pre_hook, _LOADS)
        elif isinstance(part, Optimizer):
            _origins[part] = came
            _watch(part, part.register_load_state_dict_post_hook, _LOADED)
        else:
            continue
        _forgotten.pop(part, None)
        _changed()


HERE = "begun here"


def begin(parts: Sequence[tuple[object, str]], history: History) -> None:
    """Remember that parts begin here together, where none of them has come from anywhere."""
    if any(origin(part) is not None for part, _ in parts):
        return
    index = Index(history.lineage, 0, 0, "")
    mark((part, Origin(HERE, index, path, history)) for part, path in parts)


def clear(parts: Iterable[object]) -> None:
    """Forget where parts came from, because they are about to be loaded; :func:`mark` follows."""
    for part in parts:
        _loaded_around(_core(part))


def _loaded_around(part: object, held: bytes | None = None) -> None:
    came = _origins.pop(part, None)
    if came is not None and not came.fresh:  # else it begins elsewhere
        _forgotten[part] = _Lost(came, held)
        _changed()


def _taken_back(part: nn.Module) -> None:
    """Give a module its origin back where it holds again what it held before it was loaded: its
    weights were swapped for an evaluation, say.
    """
    lost: _Lost | None = _forgotten.get(part)
    if lost is None or lost.held is None or not lost.left:
        return
    if contents(part) == lost.held:
        del _forgotten[part]
        _origins[part] = lost.came
        _changed()
    else:
        _forgotten[part] = lost._replace(left=lost.left - 1)


def _changed() -> None:
    _Now.change += 1
    if _Now.hook is None:
        _Now.hook = register_optimizer_step_pre_hook(_before_step)


def changes() -> int:
    """How many times any origin has changed so far."""
    return _Now.change


def forgotten(parts: Iterable[object]) -> Iterator[Origin]:
    """Give, once each, the origins that parts have lost since they were asked for last."""
    for part in parts:
        if _can(part) and (lost := _forgotten.pop(_core(part), None)) is not None:
            yield lost.came


def _can(part: object) -> bool:
    return isinstance(part, nn.Module | Optimizer)


class _Hook:
    """Sees that a part is loaded. Pickled with its module, it is nothing, and needs no handfast."""

    def __deepcopy__(self, _: object) -> _Hook:
        return self  # what it watches it knows by identity

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything, and returns None


class _Loads(_Hook):
    """Is called before a module and each one in it are loaded, the outer ones first."""

    def __call__(self, part: nn.Module, _state: object, prefix: str, *_: object) -> None:
        if not prefix:
            _Now.loading = ref(part)
        for root in list(_roots.get(part, ())):
            came = _origins.get(root)
            if came is not None:
                _loaded_around(root, None if came.fresh else contents(root))


class _Loaded(_Hook):
    """Is called afterwards, the inner ones first. (Before optimizers are loaded nothing is.)"""

    def __call__(self, part: Any, *_: object) -> None:
        for root in list(_roots.get(part, (part,))):
            _loaded_around(root)
            if root is part or (_Now.loading and _Now.loading() is part):  # all of it has come
                _taken_back(root)


_LOADS, _LOADED = _Loads(), _Loaded()


def is_own(hook: object) -> bool:
    """Whether a hook on loads is one that is set here, or what was pickled for it: it makes
    nothing of what is loaded.
    """
    hook = getattr(hook, "hook", hook)  # torch wraps those that come before
    return isinstance(hook, _Hook) or getattr(hook, "__func__", None) is nullcontext.__exit__


def _watch(part: object, register: Any, hook: _Hook) -> None:
    seen = _watched.setdefault(part, set())
    if hook not in seen:
        seen.add(hook)
        with suppress(AttributeError):  # a wrapper that is an Optimizer by name alone
            register(hook)


def refuse_apart(parts: Sequence[Origin], what: str) -> None:
    """Raise Refused, MIXED, unless all are of one index of one run, go on as one lineage, and have
    moved together.
    """
    if len({(part.run, part.index, part.history.lineage, part.moved) for part in parts}) > 1:
        raise Refused(
            f"{what} would be a mixture",
            verdict=Verdict.MIXED,
            shards=[str(part) for part in parts],
            remedy="load all of it from one epoch (Checkpointer.restore, or one guard.load); to "
            "mix on purpose, give guard.load a correction= and a lineage= of its own",
        )


def refuse_trained_apart(parts: Iterable[object], what: str) -> None:
    """Raise Refused, MIXED, where modules of two epochs of one run were trained since, by whatever.

    Optimizers are asked when they step; a loop of one's own is not, so this goes by the versions of
    parameters, which in-place operations raise. What stands still beside what is trained is a
    teacher, say; what has begun a lineage is of another epoch on purpose.
    """
    found: dict[str, list[tuple[nn.Module, Origin]]] = {}
    for core in map(_core, parts):
        if isinstance(core, nn.Module) and (came := _origins.get(core)) and came.plain:
            found.setdefault(came.run, []).append((core, came))
    for pairs in found.values():
        if len({came.index for _, came in pairs}) > 1:
            moved = [o for m, o in pairs if o.moved or _versions.get(m) != _versions_of(m)]
            refuse_apart([replace(came, moved=True) for came in moved], what)


def _versions_of(module: Any) -> list[tuple[int, int]]:
    """What every change in place of its parameters raises."""
    return [version_of(p) for p in module.parameters() if not p.is_inference()]


def _hold(optimizer: Optimizer, weights: Iterable[nn.Module], what: str) -> list[Origin]:
    """Hold an optimizer's origin against those of the weights that it steps, and give these.

    Raises Refused, MIXED. Weights may have moved without it: another optimizer has stepped them.
    """
    origins = [came for module in weights if (came := _origins.get(module)) is not None]
    own = _origins.get(optimizer)
    if own is not None and not (own.fresh and any(came.run != HERE for came in origins)):
        refuse_apart([own, *(replace(o, moved=o.moved and own.moved) for o in origins)], what)
    else:
        refuse_apart([replace(o, moved=False) for o in origins if o.plain], what)
    return origins


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Hold an optimizer's origin against that of the weights that it is about to change."""
    if _asked.get(optimizer) == _Now.change:
        return
    weights, marked = list(_weights_of(optimizer)), _outermost(optimizer)
    origins, own = _hold(marked, weights, "this step"), _origins.get(marked)
    if own is not None and not own.fresh:
        _check_weights(own, weights)
    elif origins:
        _check_tuned(optimizer, weights)
    _asked[optimizer] = _Now.change
    if own is not None and own.fresh and origins:  # from here on it is theirs
        _origins[marked] = replace(origins[0], path=own.path)
    for part in (marked, *weights):
        if part in _origins:
            _origins[part] = replace(_origins[part], moved=True)
        if part in _forgotten:  # trained on as it is, it is not taken back any more
            _forgotten[part] = _forgotten[part]._replace(held=None)


def _outermost(optimizer: Optimizer) -> Optimizer:
    """The wrapper of an optimizer that was marked in its place, as Accelerate's: it has the very
    same state.
    """
    if optimizer in _origins:
        return optimizer
    known = (part for part in _origins if isinstance(part, Optimizer))
    state = optimizer.state
    return next((part for part in known if getattr(part, "state", None) is state), optimizer)


def common(parts: Sequence[object], what: str) -> Origin | None:
    """Give the origin of what is trained among some parts, else of the first that has one.

    Raises Refused, MIXED, where an optimizer and the weights that it steps are not of one epoch.
    """
    stepped = [part for part in parts if isinstance(part, Optimizer)]
    trained = [list(_weights_of(optimizer)) for optimizer in stepped]
    for optimizer, weights in zip(stepped, trained, strict=True):
        _hold(optimizer, weights, what)
    return next(filter(None, map(origin, (*chain(*trained), *parts))), None)


def beside(parts: Iterable[object]) -> dict[Any, Origin]:
    """Find what else is marked and shares parameters with some parts: other parts, and origins."""
    given = list(map(_core, parts))
    own = {id(p) for part in given for p in _parameters(part)}
    return {
        part: came
        for part, came in _origins.items()
        if not came.fresh
        and not any(part is one for one in given)
        and any(id(parameter) in own for parameter in _parameters(part))
    }


def _parameters(part: object) -> Iterator[object]:
    if isinstance(part, nn.Module):
        yield from part.parameters()
    elif isinstance(part, Optimizer):
        for group in getattr(part, "param_groups", ()):  # a wrapper's may come later
            yield from group["params"]


def _weights_of(optimizer: Optimizer) -> Iterator[nn.Module]:
    """The marked modules that hold a parameter of an optimizer, or did until they were loaded."""
    own = set(map(id, _parameters(optimizer)))
    for part in [*_origins.keys(), *_forgotten.keys()]:
        if isinstance(part, nn.Module) and any(id(p) in own for p in part.parameters()):
            yield part


def _check_weights(own: Origin, weights: Sequence[nn.Module]) -> None:
    """Refuse moments without the weights that they had; warn of weights that were loaded since."""
    if own.lone and not weights:
        raise _alone("this step would use moments without the weights that they had", [own])
    for module in weights:
        if module in _forgotten:
            logger.warning(
                "an optimizer with the moments of %s is stepped on weights that were loaded "
                "around the guard since: of which epoch they are is not known",
                own,
            )


def _check_tuned(optimizer: Optimizer, weights: Sequence[nn.Module]) -> None:
    """Refuse weights without the optimizer that they had, unless that is what was asked for.

    What is frozen, and what was not saved with them (adapters, a new head), is no such weight.
    """
    origins = [(module, came) for module in weights if (came := _origins.get(module)) is not None]
    stepped = {id(p) for p in _parameters(optimizer) if getattr(p, "requires_grad", False)}
    lone = [
        came
        for module, came in origins
        if came.lone and stepped & (came.known or set(map(id, module.parameters())))
    ]
    if lone and not optimizer.state:
        what = "this step would train weights without the optimizer state that was saved with them"
        raise _alone(what, lone)
    if optimizer.state and origins[0][1].run != HERE:
        logger.warning(
            "an optimizer with moments of no known epoch is stepped on %s: load it by restore() or "
            "guard.load(), or begin it anew",
            origins[0][1],
        )


def _alone(what: str, parts: Sequence[Origin]) -> Refused:
    return Refused(
        what,
        verdict=Verdict.MIXED,
        shards=[str(came) for came in parts],
        remedy="load both; or, where this is fine-tuning, say so by a lineage of its own: "
        "restore(only=..., lineage='sft'), guard.load(..., lineage='sft')",
    )
