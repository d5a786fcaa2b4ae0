"""Live parts that are marked with where they came from, until they are loaded otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import compress
from typing import Any, NamedTuple
from weakref import WeakSet, ref

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from handfast.torch.contents import brings_itself, forget, holds_again, note
from handfast.torch.hooks import Hook, watch
from handfast.torch.marks import version_of
from handfast.torch.names import unwrapped
from handfast.torch.origins import HERE, Origin, number, numbers
from handfast.torch.stepping import weights

__all__ = [
    "Lost",
    "Now",
    "again",
    "attend",
    "changed",
    "changes",
    "clear",
    "core_of",
    "forgotten",
    "is_part",
    "lost_parts",
    "mark",
    "origin",
    "own_of",
    "stirred",
    "table",
]


table: Any = WeakIdKeyDictionary()
"""Modules and optimizers, to their origins."""

lost_parts: Any = WeakIdKeyDictionary()
"""Those whose origin has ended, to what is :class:`Lost`."""

_roots: Any = WeakIdKeyDictionary()  # a module's own modules, to what was marked, weakly
_came: Any = WeakIdKeyDictionary()  # modules, to what came with them: see _slots
_gone: Any = WeakIdKeyDictionary()  # modules, to what of that has come otherwise since
_attended: Any = WeakIdKeyDictionary()  # roots, to what was attended in them the last time
_versions: Any = WeakIdKeyDictionary()  # modules, to those of their parameters when marked


class Now:
    """How many times an origin has changed, so that a step asks once after each, and then no more.

    ``ask`` is what asks; its ``hook`` is on all of torch's optimizers, since weights don't say
    which of them will be stepped.
    """

    change = 0
    ask: Any = None
    hook: Any = None


class Lost(NamedTuple):
    """An origin that loads have ended, and the numbers of the modules in it that hold something
    else since; None where it can't be taken back any more.
    """

    came: Origin
    apart: set[int] | None


def origin(part: object) -> Origin | None:
    """Give the origin of a live module or optimizer; None where it has none that is known.

    A module that was not marked by itself has that of one which all its parameters came with.
    """
    core = core_of(part)
    found: Origin | None = table.get(core) if is_part(part) else None
    if found is not None or not isinstance(core, nn.Module) or core in lost_parts:
        return found
    own = numbers(core.parameters())
    for whole in [part for part in table if own and isinstance(part, nn.Module)]:
        came: Origin = table[whole]
        if came.run != HERE and own <= numbers(own_of(whole)):
            return came.within(own)
    return None


def core_of(part: object) -> object:
    """A part without wrappers, which come and go, and share all that they have with it."""
    return unwrapped(part) if isinstance(part, nn.Module) else part


def mark(parts: Iterable[tuple[object, Origin]], arrived: frozenset[int] | None = None) -> None:
    """Remember where modules and optimizers have just come from; what else there is is passed over.

    Of the modules' parameters those ``arrived``, by number, or all. A marked module of which all
    has arrived as a part of others, or in several, follows them; of one of which some has, that is
    no longer. From here on it is seen when a part is loaded otherwise, and when one is stepped.
    """
    given = {part: came for part, came in ((core_of(p), o) for p, o in parts) if is_part(part)}
    if arrived is None:
        arrived = numbers(p for part in given for p in _weights_in(part))
    for part, came in given.items():
        _set(part, came, arrived)
        if isinstance(part, nn.Module):
            attend(part, part)
        elif isinstance(part, Optimizer):
            watch(part, part.register_load_state_dict_post_hook, _LOADED)
    fresh = [came for came in given.values() if came.run != HERE]
    if fresh:
        _follow(given, arrived)
        _settle({came.run for came in fresh}, given)
    if given:
        changed()


def again(parts: Iterable[tuple[object, Origin]]) -> None:
    """Remember that marked parts are of another epoch from now on, with what they hold."""
    for part, came in parts:
        table[part] = came
        if isinstance(part, nn.Module):
            _versions[part] = _versions_of(part)
            forget(part)
        changed()


def _set(part: Any, came: Origin, arrived: frozenset[int] | None) -> None:
    table[part] = came
    lost_parts.pop(part, None)
    if isinstance(part, nn.Module):
        _came.pop(part, None)
        _gone.pop(part, None)
        if came.run != HERE:  # else it came with whatever it has, and will have
            _came[part] = frozenset(_slots(part, arrived))
        _versions[part] = _versions_of(part)
        forget(part)


def _follow(given: Mapping[Any, Origin], arrived: frozenset[int]) -> None:
    """Let marked modules that others share parameters with follow what has come with these."""
    for part in [*table, *lost_parts]:
        if part in given or not isinstance(part, nn.Module):
            continue
        own = numbers(_of_those(part, _came.get(part), frozenset()))
        if own and own <= arrived:
            came = [o for p, o in given.items() if own & numbers(_weights_in(p))]
            known = frozenset[int]().union(*(o.known for o in came))
            _set(part, replace(came[0], known=known).within(own), arrived)
        elif part in _came:
            _gone[part] = _gone.get(part, frozenset()) | frozenset(_slots(part, arrived))


def _settle(runs: Collection[str], given: Mapping[Any, Origin]) -> None:
    """Let what began a run here be of it, where some of it goes back: it has gone on."""
    began = {p: o for p, o in table.items() if o.run == HERE and o.into in runs}
    if any(o.moved or stirred(p) for p, o in began.items()):
        for part, came in began.items():
            if part not in given:
                _set(part, replace(came, run=came.into, moved=frozenset()), None)


def _slots(part: nn.Module, arrived: frozenset[int] | None) -> Iterator[object]:
    """Parameters of a module by number, and by place: another may be put there for one that came,
    as by ``fully_shard``, and one that came may be put elsewhere, as by parametrizations.
    """
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (arrived is None or number(parameter) in arrived):
                yield number(parameter)
                yield number(module), name


def own_of(part: nn.Module) -> Iterator[Any]:
    """The parameters that came with a module, and are in it, but for what has come otherwise since;
    not what was put into it since.
    """
    came, gone = _came.get(part), _gone.get(part)
    there = list(weights(part))
    ids = list(map(id, there))
    kept: _Owned | None = _owned.get(part)
    if kept is None or kept.came is not came or kept.gone is not gone or kept.ids != ids:
        own = set(map(id, _of_those(part, came, gone or frozenset())))
        kept = _owned[part] = _Owned(ids, came, gone, [one in own for one in ids])
    return compress(there, kept.own)


class _Owned(NamedTuple):
    """Which parameters of a module are its own, while it has these: each optimizer asks that."""

    ids: list[int]
    came: frozenset[object] | None
    gone: frozenset[object] | None
    own: list[bool]


_owned: Any = WeakIdKeyDictionary()


def _of_those(
    part: nn.Module, came: frozenset[object] | None, gone: frozenset[object]
) -> Iterator[Any]:
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                is_it = {number(parameter), (number(module), name)}
                if gone.isdisjoint(is_it) and not (came is not None and came.isdisjoint(is_it)):
                    yield parameter


def _weights_in(part: object) -> Iterator[Any]:
    yield from weights(part) if isinstance(part, nn.Module) else ()


def clear(parts: Iterable[object], arriving: frozenset[int] = frozenset()) -> None:
    """Forget where parts came from, because they are about to be loaded; :func:`mark` follows.

    So are marked modules of which all is ``arriving``, by the numbers of parameters.
    """
    modules = [part for part in table if isinstance(part, nn.Module)]
    inside = [part for part in modules if (own := numbers(own_of(part))) and own <= arriving]
    for part in (*parts, *inside):
        _loaded_around(core_of(part))


def _loaded_around(part: object, inside: nn.Module | None = None) -> None:
    """End what is known of a part; what is loaded ``inside`` a module may be taken back."""
    came, lost = table.pop(part, None), lost_parts.get(part)
    if came is not None and not came.fresh:  # else it begins elsewhere
        lost_parts[part] = Lost(came, None if inside is None else {number(inside)})
        changed()
    elif lost is not None and inside is None:
        lost_parts[part] = lost._replace(apart=None)
    elif lost is not None and lost.apart is not None:
        lost.apart.add(number(inside))


def _taken_back(part: nn.Module, inside: nn.Module) -> None:
    """Give a module its origin back where all in it holds again what it held before it was loaded:
    its weights were swapped for an evaluation, say.
    """
    lost: Lost | None = lost_parts.get(part)
    if lost is None or lost.apart is None:
        return
    lost.apart.discard(number(inside))
    if not lost.apart:
        del lost_parts[part]
        table[part] = lost.came
        changed()


def changed() -> None:
    """Hear that an origin has changed: steps are asked from now on, and once more."""
    Now.change += 1
    if Now.hook is None and Now.ask is not None:
        Now.hook = register_optimizer_step_pre_hook(Now.ask)


def changes() -> int:
    """How many times any origin has changed so far."""
    return Now.change


def forgotten(parts: Iterable[object]) -> Iterator[Origin]:
    """Give, once each, the origins that parts have lost since they were asked for last."""
    for part in parts:
        if is_part(part) and (lost := lost_parts.pop(core_of(part), None)) is not None:
            yield lost.came


def is_part(part: object) -> bool:
    """Whether it can be marked."""
    return isinstance(part, nn.Module | Optimizer)


def _loads(part: nn.Module, state: Mapping[str, object], prefix: str, *_: object) -> None:
    """Hear that a module is about to be loaded; the outer ones first, then each one in it."""
    roots = list(_roots.get(part, ()))
    for root in roots:
        attend(part, root)  # what was put into it since
    own = any(root is part for root in roots) and brings_itself(part, state, prefix)
    if own:  # what it held was overwritten before, perhaps
        forget(part)
    elif any(map(_may_come_back, roots)):
        for module in part.modules():  # now: tied weights are loaded with the first that has them
            note(module)
    for root in roots:
        _loaded_around(root, None if own else part)


def _loaded(part: Any, *_: object) -> None:
    """Hear that one was loaded, the inner ones first. (Before optimizers are loaded nothing is.)"""
    inside = part if isinstance(part, nn.Module) else None
    roots = list(_roots.get(part, (part,)))
    for root in roots:
        _loaded_around(root, inside)
    if inside is not None and any(map(_may_come_back, roots)) and holds_again(inside):
        for root in roots:
            _taken_back(root, inside)


def _may_come_back(part: nn.Module) -> bool:
    came, lost = table.get(part), lost_parts.get(part)
    return not came.fresh if came else lost is not None and lost.apart is not None


_LOADS, _LOADED = Hook(_loads), Hook(_loaded)


def attend(part: nn.Module, root: nn.Module) -> None:
    """See from here on when a part of ``root``, or a module in it, is loaded."""
    there, seen = list(part.modules()), _attended.setdefault(root, {}).get(id(part), ())
    if len(seen) == len(there) and all(was() is one for was, one in zip(seen, there, strict=True)):
        return
    for module in there:
        _roots.setdefault(module, WeakSet()).add(root)
        watch(module, module.register_load_state_dict_post_hook, _LOADED)
        watch(module, module.register_load_state_dict_pre_hook, _LOADS)
    _attended[root][id(part)] = [ref(module) for module in there]


def stirred(part: object) -> frozenset[int]:
    """The parameters that came with a module, by number, and were changed in place since."""
    core = core_of(part)
    if not isinstance(core, nn.Module) or core not in _versions:
        return frozenset()
    before, own = _versions[core], numbers(own_of(core))
    now = _versions_of(core).items()
    return frozenset(one for one, version in now if one in own and before.get(one) != version)


def _versions_of(module: Any) -> dict[int, tuple[int, int]]:
    """What every change in place of its parameters raises, by their numbers."""
    seen = (p for p in module.parameters() if not (is_lazy(p) or p.is_inference()))
    return {number(p): version_of(p) for p in seen}
