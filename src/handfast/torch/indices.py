"""Of which index live parts are: known since they were loaded, by the parts themselves.

A module or an optimizer that was restored remembers the run and the index (lineage, generation,
step, configuration) that it came from, for as long as it lives. What loads it otherwise
(``load_state_dict``) ends that; the first step of an optimizer holds its own against its weights'.
All later steps ask nothing: what was together once stays together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import chain
from typing import Any, Final, NamedTuple
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.model.optimizer import Index
from handfast.torch.contents import forget, holds_again, note
from handfast.torch.lineage import History
from handfast.torch.marks import version_of
from handfast.torch.names import unwrapped
from handfast.torch.origins import HERE, Origin, numbers, place, refuse_apart
from handfast.torch.tensors import local

__all__ = [
    "Origin",
    "anew",
    "begin",
    "beside",
    "changes",
    "clear",
    "common",
    "forgotten",
    "is_own",
    "mark",
    "origin",
    "refuse_trained_apart",
]

logger = logging.getLogger("handfast")


_origins: Any = WeakIdKeyDictionary()
_forgotten: Any = WeakIdKeyDictionary()
_roots: Any = WeakIdKeyDictionary()  # a module's own modules, to what was marked, weakly
_watched: Any = WeakIdKeyDictionary()
_versions: Any = WeakIdKeyDictionary()  # of the parameters of modules, when they were marked
_asked: Any = WeakIdKeyDictionary()  # optimizers, to the change that they were asked after


class _Now:
    """How many times an origin has changed, so that a step asks once after each, and then no more.

    ``hook`` is on all of torch's optimizers, since weights don't say which of them will be stepped.
    """

    change = 0
    hook: Any = None


class _Lost(NamedTuple):
    """An origin that loads have ended, and the ids of the modules in it that hold something else
    since; None where it can't be taken back any more.
    """

    came: Origin
    apart: set[int] | None


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
            forget(part)
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


def begin(parts: Sequence[tuple[object, str]], history: History) -> None:
    """Remember that parts begin here together, where none of them has come from anywhere.

    Else what is trained goes on as the ``history`` that begins with it.
    """
    came = _led([part for part, _ in parts])
    if not came:
        index = Index(history.lineage, 0, 0, "")
        mark((part, Origin(HERE, index, path, history)) for part, path in parts)
    for part, known in came.items():
        if known.history.lineage == next(iter(came.values())).history.lineage:
            _origins[part] = replace(known, history=history)


def anew(optimizer: Optimizer) -> None:
    """Hear that an optimizer goes on with other moments than those that came, as was asked for."""
    if optimizer in _origins:
        _origins[optimizer] = replace(_origins[optimizer], known=frozenset())


def clear(parts: Iterable[object]) -> None:
    """Forget where parts came from, because they are about to be loaded; :func:`mark` follows."""
    for part in parts:
        _loaded_around(_core(part))


def _loaded_around(part: object, inside: nn.Module | None = None) -> None:
    """End what is known of a part; what is loaded ``inside`` a module may be taken back."""
    came, lost = _origins.pop(part, None), _forgotten.get(part)
    if came is not None and not came.fresh:  # else it begins elsewhere
        _forgotten[part] = _Lost(came, None if inside is None else {id(inside)})
        _changed()
    elif lost is not None and lost.apart is not None and inside is not None:
        lost.apart.add(id(inside))


def _taken_back(part: nn.Module, inside: nn.Module) -> None:
    """Give a module its origin back where all in it holds again what it held before it was loaded:
    its weights were swapped for an evaluation, say.
    """
    lost: _Lost | None = _forgotten.get(part)
    if lost is None or lost.apart is None:
        return
    lost.apart.discard(id(inside))
    if not lost.apart:
        del _forgotten[part]
        _origins[part] = lost.came
        _changed()


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

    def __call__(self, part: nn.Module, *_: object) -> None:
        roots = list(_roots.get(part, ()))
        if any(map(_may_come_back, roots)):
            note(part)
        for root in roots:
            _loaded_around(root, part)


class _Loaded(_Hook):
    """Is called afterwards, the inner ones first. (Before optimizers are loaded nothing is.)"""

    def __call__(self, part: Any, *_: object) -> None:
        inside = part if isinstance(part, nn.Module) else None
        roots = list(_roots.get(part, (part,)))
        for root in roots:
            _loaded_around(root, inside)
        if inside is not None and any(map(_may_come_back, roots)) and holds_again(inside):
            for root in roots:
                _taken_back(root, inside)


def _may_come_back(part: nn.Module) -> bool:
    came, lost = _origins.get(part), _forgotten.get(part)
    return not came.fresh if came else lost is not None and lost.apart is not None


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
            moved = [(m, o) for m, o in pairs if o.moved or _versions.get(m) != _versions_of(m)]
            refuse_apart([replace(o, moved=numbers(m.parameters())) for m, o in moved], what)


def _versions_of(module: Any) -> list[tuple[int, int]]:
    """What every change in place of its parameters raises."""
    return [version_of(p) for p in module.parameters() if not p.is_inference()]


def _hold(optimizer: Optimizer, weights: Iterable[nn.Module], what: str) -> dict[nn.Module, Origin]:
    """Hold an optimizer's origin against those of the weights that it steps, and give these.

    Raises Refused, MIXED. Weights may have moved without it: another optimizer has stepped them.
    Those that it has moved, and that have not, went back without it. One that began here is of no
    epoch: its weights are held against each other.
    """
    origins = {module: came for module in weights if (came := _origins.get(module)) is not None}
    own, none = _origins.get(optimizer), frozenset[int]()
    moved = own.moved if own is not None else none
    back = {m for m, came in origins.items() if moved & numbers(m.parameters()) - came.moved}
    if own is None or own.run == HERE:
        refuse_apart([replace(o, moved=none) for o in origins.values() if o.plain], what)
        held = [origins[module] for module in back]
    else:
        held = [replace(o, moved=none if m in back else moved) for m, o in origins.items()]
    refuse_apart([*filter(None, [own]), *held], what)
    return origins


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Hold an optimizer's origin against that of the weights that it is about to change."""
    if _asked.get(optimizer) == _Now.change or _is_no_update(optimizer):
        return
    weights, marked = list(_weights_of(optimizer)), _outermost(optimizer)
    origins, own = _hold(marked, weights, "this step"), _origins.get(marked)
    stepped = _trained(optimizer)
    if own is None or own.run == HERE:
        _check_tuned(optimizer, origins, numbers(stepped))
    else:
        _check_moments(marked, own, weights, numbers(stepped))
    if lost := [_forgotten[part].came for part in (marked, *weights) if part in _forgotten]:
        logger.warning(
            "%s: loaded around the guard since, and stepped now: nobody knows of which epoch it "
            "is. What to do: load by restore() or guard.load()",
            "; ".join(map(str, lost)),
        )
    if own is not None and own.fresh and origins:  # from here on it goes on as they do
        _origins[marked] = replace(own, history=_joined(list(origins.values())))
    _move(marked, weights, stepped)
    _asked[optimizer] = _Now.change


def _move(marked: Optimizer, weights: Sequence[nn.Module], stepped: Sequence[object]) -> None:
    """Remember that parameters are stepped; what was loaded before is not taken back any more."""
    places, before = set(map(place, stepped)), _Now.change
    for part in (marked, *weights):
        if part in _forgotten:
            _forgotten[part] = _forgotten[part]._replace(apart=None)
        if isinstance(part, nn.Module):
            forget(part)
        if (came := _origins.get(part)) is not None:
            moved = numbers(p for p in _parameters(part) if place(p) in places)
            _origins[part] = replace(came, moved=came.moved | moved)
            if marked not in _origins and not moved <= came.moved:
                _Now.change = before + 1  # a save asks whose moments are behind now


def _is_no_update(optimizer: Optimizer) -> bool:
    """Whether a step is at rate 0, with gradients of zero, by one that has no state. So torch makes
    it one (``_init_optim_state`` in ``torch/distributed/checkpoint/state_dict.py``, 2.13).
    """
    groups = optimizer.param_groups
    if optimizer.state or any(group.get("lr", 1) != 0 for group in groups):
        return False
    given = [local(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    return not any(part.layout != torch.strided or bool(part.any()) for part in given)


def _outermost(optimizer: Optimizer) -> Optimizer:
    """The wrapper of an optimizer that was marked in its place, as Accelerate's: it has the very
    same state, or the very same groups.
    """
    if optimizer in _origins:
        return optimizer
    known = (part for part in [*_origins.keys(), *_forgotten.keys()] if isinstance(part, Optimizer))
    return next((part for part in known if _shares(part, optimizer)), optimizer)


def _shares(one: Optimizer, other: Optimizer) -> bool:
    return any(
        getattr(one, name, None) is getattr(other, name) for name in ("state", "param_groups")
    )


def common(parts: Sequence[object], what: str) -> Origin | None:
    """Give the origin of what is trained among some parts, else of the first that has one; with all
    beginnings, where its lineage has several.

    Raises Refused, MIXED, where an optimizer and the weights that it steps are not of one epoch, or
    where its moments would stand beside weights that another one has stepped since.
    """
    stepped = [part for part in parts if isinstance(part, Optimizer)]
    for optimizer in stepped:
        _hold(optimizer, _weights_of(optimizer), what)
    _refuse_left(stepped, what)
    came = list(_led(parts).values())
    return replace(came[0], history=_joined(came)) if came else None


def _led(parts: Sequence[object]) -> dict[Any, Origin]:
    """What leads of some parts, with origins: the weights that are trained, or else all. What came
    from a run stands before what began here.
    """
    stepped = [part for part in parts if isinstance(part, Optimizer)]
    weights = list(chain.from_iterable(map(_weights_of, stepped)))
    for led in ([*weights, *stepped] if weights else [], map(_core, filter(_can, parts))):
        found = {part: came for part in led if (came := _origins.get(part)) is not None}
        if found:
            return dict(sorted(found.items(), key=lambda one: one[1].run == HERE))
    return {}


def _joined(origins: Sequence[Origin]) -> History:
    """What several go on as: what the first from a run does, with all beginnings of its lineage."""
    first = next((came for came in origins if came.run != HERE), origins[0])
    return first.history.joined(came.history for came in origins)


def _refuse_left(optimizers: Sequence[Optimizer], what: str) -> None:
    """Raise Refused, MIXED, for moments that stood still while their weights were stepped by an
    optimizer that is not here: nothing would tell that they are not of one epoch.
    """
    moved = [
        _origins[part].moved for o in optimizers for part in _weights_of(o) if part in _origins
    ]
    mine = [_origins[o].moved if o in _origins else numbers(_parameters(o)) for o in optimizers]
    gone = frozenset[int]().union(*moved).difference(*mine)
    left = [came for o in optimizers if (came := _origins.get(o)) and came.known & gone]
    if left:
        raise Refused(
            f"{what} would be a mixture: weights that were stepped, and moments that were not",
            verdict=Verdict.MIXED,
            shards=[str(came) for came in left],
            remedy="put the optimizer that steps them into the state, in the place of this one",
        )


def beside(parts: Iterable[object]) -> dict[Any, Origin]:
    """Find what else is marked and shares parameters with some parts, or their memory: other
    parts, and origins.
    """
    given = list(map(_core, parts))
    own = {place(p) for part in given for p in _parameters(part)}
    return {
        part: came
        for part, came in _origins.items()
        if not came.fresh
        and not any(part is one for one in given)
        and any(place(parameter) in own for parameter in _parameters(part))
    }


def _parameters(part: object) -> Iterator[Any]:
    if isinstance(part, nn.Module):
        yield from part.parameters()
    elif isinstance(part, Optimizer):
        for group in getattr(part, "param_groups", ()):  # a wrapper's may come later
            yield from group["params"]


def _trained(optimizer: Optimizer) -> list[object]:
    return [p for p in _parameters(optimizer) if getattr(p, "requires_grad", False)]


def _weights_of(optimizer: Optimizer) -> Iterator[nn.Module]:
    """The marked modules that hold a parameter of an optimizer, or did until they were loaded."""
    own = set(map(place, _parameters(optimizer)))
    for part in [*_origins.keys(), *_forgotten.keys()]:
        if isinstance(part, nn.Module) and any(place(p) in own for p in part.parameters()):
            yield part


def _check_moments(
    optimizer: Optimizer, own: Origin, weights: Sequence[nn.Module], stepped: frozenset[int]
) -> None:
    """Refuse moments without the weights that they had, and weights whose moments were dropped."""
    waiting = own.waiting & stepped
    here = [
        _origins[m].known if m in _origins else numbers(m.parameters())  # that is warned of
        for m in weights
    ]
    if waiting.difference(*here):
        raise _alone("this step would use moments without the weights that they had", [own])
    if waiting and not optimizer.state:
        raise _alone(f"{_WITHOUT}: it was dropped since", [own])


_WITHOUT: Final = (
    "this step would train weights without the optimizer state that was saved with them"
)


def _check_tuned(
    optimizer: Optimizer, origins: Mapping[nn.Module, Origin], stepped: frozenset[int]
) -> None:
    """Refuse weights without the optimizer that they had, unless that is what was asked for.

    What is frozen, and what was saved without moments or not at all (adapters, a new head), is no
    such weight. One that keeps no state may step between, where the moments are there for another.
    Moments that have come otherwise are warned of.
    """
    waiting = frozenset[int]().union(*(came.waiting & stepped for came in origins.values()))
    if type(optimizer) is SGD and not any(group["momentum"] for group in optimizer.param_groups):
        there = [came.known for part, came in _origins.items() if isinstance(part, Optimizer)]
        waiting = waiting.difference(*there)
    keys: Iterable[object] = optimizer.state
    has = numbers(key for key in keys if isinstance(key, torch.Tensor))
    if waiting and waiting.isdisjoint(has):
        raise _alone(_WITHOUT, [came for came in origins.values() if came.waiting & waiting])
    for module, came in origins.items():
        still = numbers(module.parameters()) - came.moved
        if came.run != HERE and has & stepped & still and _outermost(optimizer) not in _forgotten:
            logger.warning(
                "an optimizer with moments of no known epoch is stepped on %s: load it by "
                "restore() or guard.load(), or begin it anew",
                came,
            )


def _alone(what: str, parts: Sequence[Origin]) -> Refused:
    return Refused(
        what,
        verdict=Verdict.MIXED,
        shards=[str(came) for came in parts],
        remedy="load both; or, where this is fine-tuning, say so by a lineage of its own: "
        "restore(only=..., lineage='sft'), guard.load(..., lineage='sft')",
    )
