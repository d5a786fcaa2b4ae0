"""What an optimizer may step, and a save may have: only what came from one index together.

A module or an optimizer that was restored is marked with the run and the index (lineage,
generation, step, configuration) that it came from (:mod:`handfast.torch.marked`). The first step
of an optimizer holds its own against its weights'. All later steps ask nothing, until it steps
more: what was together once stays together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any, Final, NamedTuple

from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from handfast.core.verdict import Verdict
from handfast.errors import Refused, Unstorable
from handfast.model.optimizer import Index
from handfast.store import provenance
from handfast.store.manifest import Source
from handfast.store.provenance import NOTHING, Brought
from handfast.torch.contents import forget
from handfast.torch.lineage import History
from handfast.torch.marked import (
    Now,
    again,
    attend,
    core_of,
    is_part,
    lost_parts,
    mark,
    own_of,
    stirred,
    table,
)
from handfast.torch.origins import HERE, Origin, alone, numbers, place, refuse_apart
from handfast.torch.stepping import begun, inner, is_no_update, parameters, shares, trained

__all__ = ["anew", "begin", "beside", "brought", "common", "refuse_trained_apart", "sources"]

logger = logging.getLogger("handfast")

_asked: Any = WeakIdKeyDictionary()  # optimizers, to what they were asked after


_THAWED: Final = attrgetter("requires_grad")


class _Asked(NamedTuple):
    """After which change an optimizer was asked, how many groups it had, and what was frozen."""

    change: int
    groups: int
    frozen: Sequence[Any]

    def still(self, optimizer: Optimizer) -> bool:
        """Whether it steps only what it was asked of."""
        return (
            self.change == Now.change
            and self.groups == len(optimizer.param_groups)
            and not (self.frozen and any(map(_THAWED, self.frozen)))
        )


def begin(parts: Sequence[tuple[object, str]], history: History, run: str = "") -> None:
    """Remember that parts begin a ``run`` here together, where none has come from anywhere.

    Else what is trained goes on as the ``history`` that begins with it.
    """
    came = _led([part for part, _ in parts])
    if not came:
        index = Index(history.lineage, 0, 0, "")
        mark((part, Origin(HERE, index, path, history, into=run)) for part, path in parts)
    for part, known in came.items():
        if known.history.lineage == next(iter(came.values())).history.lineage:
            table[part] = replace(known, history=history)


def anew(optimizer: Optimizer, why: str) -> None:
    """Hear that an optimizer goes on with other moments than those that came, as was asked for.

    With weights that are as they came, what came with them begins a lineage: ``reset-1/40``. Raises
    Refused, MIXED, for weights of several epochs.
    """
    stepped = numbers(parameters(optimizer))
    weights = (table[part] for part in _weights_of(optimizer) if part in table)
    came = [replace(o, moved=frozenset()) for o in weights if o.waiting & stepped]
    refuse_apart(came, "what would go on together")
    for run, index, was in {(o.run, o.index, o.history) for o in came}:
        if was.began() and was.began()[-1].why == why:
            logger.warning(
                "moments are begun anew over epoch %d/%d, whose lineage %s began with that already "
                "(%s): a script that does so at each start never gets beyond it. What to do: apply "
                "it once, where restore() gave 0, or keep it out of the restart",
                index.generation,
                index.step,
                was.lineage,
                why,
            )
        now = was.onward(f"reset-{index.generation}/{index.step}", run, index, why)
        same = [(p, o) for p, o in table.items() if (o.run, o.history) == (run, was)]
        again((part, replace(o, history=now)) for part, o in same)
    if optimizer in table:
        table[optimizer] = replace(table[optimizer], known=frozenset())


def refuse_trained_apart(parts: Iterable[object], what: str) -> None:
    """Raise Refused, MIXED, where modules of two epochs of one run were trained since, by whatever.

    Optimizers are asked when they step; a loop of one's own is not, so this goes by the versions of
    parameters, which in-place operations raise. What stands still beside what is trained is a
    teacher, say; what has begun a lineage is of another epoch on purpose.
    """
    found: dict[str, list[tuple[nn.Module, Origin]]] = {}
    for core in map(core_of, parts):
        if isinstance(core, nn.Module) and (came := table.get(core)) and came.plain:
            found.setdefault(came.run, []).append((core, came))
    for pairs in found.values():
        if len({came.index for _, came in pairs}) > 1:
            moved = [(m, o) for m, o in pairs if o.moved or stirred(m)]
            refuse_apart([replace(o, moved=numbers(m.parameters())) for m, o in moved], what)


def _hold(optimizer: Optimizer, weights: Iterable[nn.Module], what: str) -> dict[nn.Module, Origin]:
    """Hold an optimizer's origin against those of the weights that it steps, and give these.

    Raises Refused, MIXED. Weights may have moved without it: another optimizer has stepped them.
    Those that it has moved, and that have not, went back without it. One that began here is of no
    epoch: its weights are held against each other.
    """
    origins = {module: came for module in weights if (came := table.get(module)) is not None}
    own, none = table.get(optimizer), frozenset[int]()
    moved = own.moved if own is not None else none
    back = {m for m, came in origins.items() if moved & numbers(own_of(m)) - came.moved}
    if own is None or own.run == HERE:
        refuse_apart([replace(o, moved=none) for o in origins.values() if o.plain], what)
        held = [origins[module] for module in back]
    else:
        held = [replace(o, moved=none if m in back else moved) for m, o in origins.items()]
    refuse_apart([*filter(None, [own]), *held], what)
    return origins


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Hold an optimizer's origin against that of the weights that it is about to change."""
    asked: _Asked | None = _asked.get(optimizer)
    if (asked is not None and asked.still(optimizer)) or is_no_update(optimizer):
        return
    weights, marked = list(_weights_of(optimizer)), _outermost(optimizer)
    origins, own = _hold(marked, weights, "this step"), table.get(marked)
    stepped = trained(optimizer)
    if own is None or own.run == HERE:
        _check_tuned(optimizer, origins, numbers(stepped), new=asked is None and own is None)
    else:
        _check_moments(marked, own, weights, numbers(stepped))
    if lost := [lost_parts[part].came for part in (marked, *weights) if part in lost_parts]:
        logger.warning(
            "%s: loaded around the guard since, and stepped now: nobody knows of which epoch it "
            "is. What to do: load by restore() or guard.load()",
            "; ".join(map(str, lost)),
        )
    if own is not None and own.fresh and origins:  # from here on it goes on as they do
        table[marked] = replace(own, history=_joined(list(origins.values())))
    _move(marked, weights, stepped)
    for part in _built_on(optimizer):
        forget(part)
        attend(part, part)  # what was put into it since
    frozen = [p for p in parameters(optimizer) if not getattr(p, "requires_grad", True)]
    _asked[optimizer] = _Asked(Now.change, len(optimizer.param_groups), frozen)


def _move(marked: Optimizer, weights: Sequence[nn.Module], stepped: Sequence[object]) -> None:
    """Remember that parameters are stepped; what was loaded before is not taken back any more."""
    places, before = set(map(place, stepped)), Now.change
    for part in (marked, *weights):
        if part in lost_parts:
            lost_parts[part] = lost_parts[part]._replace(apart=None)
        if isinstance(part, nn.Module):
            forget(part)
        if (came := table.get(part)) is not None:
            moved = numbers(p for p in parameters(part) if place(p) in places)
            table[part] = replace(came, moved=came.moved | moved)
            if marked not in table and not moved <= came.moved:
                Now.change = before + 1  # a save asks whose moments are behind now


def _outermost(optimizer: Optimizer) -> Optimizer:
    """The wrapper of an optimizer that was marked in its place, as Accelerate's: it has the very
    same state, or the very same groups.
    """
    if optimizer in table:
        return optimizer
    known = (part for part in [*table, *lost_parts] if isinstance(part, Optimizer))
    return next((part for part in known if shares(part, optimizer)), optimizer)


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


def brought(parts: Callable[[], Sequence[object]]) -> Brought:
    """Where what is trained among some parts came from, for other ranks to hear; nothing where they
    can't be listed, which is said when they are read.
    """
    with suppress(TypeError, ValueError, Unstorable):
        given = parts()
        came = [one for one in _led(given).values() if one.run != HERE]
        if came:
            history = _joined(came)
            return provenance.brought(history.lineage, history.forks, sources(given))
    return NOTHING


def sources(parts: Sequence[object]) -> tuple[Source, ...]:
    """Where what is trained among some parts was loaded from, for the stamp."""
    came = [(one, one.loaded or one.index) for one in _led(parts).values() if one.run != HERE]
    return tuple(
        Source(one.path, one.run, index.lineage, index.generation, index.step)
        for one, index in came
    )


def _led(parts: Sequence[object]) -> dict[Any, Origin]:
    """What leads of some parts, with origins: the weights that are trained, or else all. What came
    from a run stands before what began here.
    """
    stepped = [part for part in parts if isinstance(part, Optimizer)]
    weights = list(chain.from_iterable(map(_built_on, stepped)))
    for led in ([*weights, *stepped] if weights else [], map(core_of, filter(is_part, parts))):
        found = {part: came for part in led if (came := table.get(part)) is not None}
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
    moved = [table[part].moved for o in optimizers for part in _weights_of(o) if part in table]
    mine = [table[o].moved if o in table else numbers(parameters(o)) for o in optimizers]
    gone = frozenset[int]().union(*moved).difference(*mine)
    left = [came for o in optimizers if (came := table.get(o)) and came.known & gone]
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
    given = list(map(core_of, parts))
    own = {place(p) for part in given for p in parameters(part)}
    return {
        part: came
        for part, came in table.items()
        if not came.fresh
        and not any(part is one for one in given)
        and any(place(p) in own for p in _its(part))
    }


def _its(part: nn.Module | Optimizer) -> Iterator[Any]:
    return own_of(part) if isinstance(part, nn.Module) else parameters(part)


def _weights_of(optimizer: Optimizer) -> Iterator[nn.Module]:
    """The marked modules that came with a parameter which an optimizer steps, or had it until they
    were loaded. One that only holds it has to do with it no more than a frozen base with adapters.
    """
    stepped = set(map(place, trained(optimizer)))
    for part in [*table, *lost_parts]:
        if isinstance(part, nn.Module):
            held = own_of(part) if part in table else part.parameters()
            if any(place(p) in stepped for p in held):
                yield part


def _built_on(optimizer: Optimizer) -> Iterator[nn.Module]:
    """The marked modules that hold any parameter of an optimizer, as a base holds adapters."""
    own = set(map(place, parameters(optimizer)))
    for part in list(table):
        if isinstance(part, nn.Module) and any(place(p) in own for p in part.parameters()):
            yield part


def _check_moments(
    optimizer: Optimizer, own: Origin, weights: Sequence[nn.Module], stepped: frozenset[int]
) -> None:
    """Refuse moments without the weights that they had, and weights whose moments were dropped."""
    waiting = own.waiting & stepped
    here = [
        table[m].known if m in table else numbers(m.parameters())  # that is warned of
        for m in weights
    ]
    if waiting.difference(*here):
        raise alone("this step would use moments without the weights that they had", [own])
    if waiting and not optimizer.state:
        raise alone(f"{_WITHOUT}: it was dropped since", [own])


_WITHOUT: Final = (
    "this step would train weights without the optimizer state that was saved with them"
)


def _check_tuned(
    optimizer: Optimizer,
    origins: Mapping[nn.Module, Origin],
    stepped: frozenset[int],
    *,
    new: bool,
) -> None:
    """Refuse weights without the optimizer that they had, unless that is what was asked for.

    What is frozen, and what was saved without moments or not at all (adapters, a new head), is no
    such weight. One that keeps no state may step between, where the moments are there for another.
    Moments that have come otherwise are warned of, so those of a ``new`` one: it made none.
    """
    waiting = frozenset[int]().union(*(came.waiting & stepped for came in origins.values()))
    if type(optimizer) is SGD and not any(group["momentum"] for group in optimizer.param_groups):
        there = [came.known for part, came in table.items() if isinstance(part, Optimizer)]
        waiting = waiting.difference(*there)
    waiting = waiting.difference(*(table[one].known for one in inner(optimizer) if one in table))
    has = numbers(begun(optimizer))
    if waiting and waiting.isdisjoint(has):
        raise alone(_WITHOUT, [came for came in origins.values() if came.waiting & waiting])
    for module, came in origins.items():
        still = numbers(own_of(module)) - came.moved if came.run != HERE else frozenset[int]()
        still |= came.moved if new else still
        if has & stepped & still and _outermost(optimizer) not in lost_parts:
            logger.warning(
                "an optimizer with moments of no known epoch is stepped on %s: load it by "
                "restore() or guard.load(), or begin it anew",
                came,
            )


Now.ask = _before_step
