"""What of a live state has come from an epoch, and what stays beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from handfast.checkpoint.spelling import some
from handfast.store.manifest import Stamp
from handfast.store.objects import child
from handfast.torch import optimizers
from handfast.torch.indices import beside
from handfast.torch.kinds import is_optimizer
from handfast.torch.lineage import History, index_of
from handfast.torch.marked import clear, mark, origin, stirred
from handfast.torch.names import clean, matches
from handfast.torch.origins import Origin, numbers, refuse_apart
from handfast.torch.saved import Saved
from handfast.torch.tree import Kind, Node

__all__ = ["known", "refuse_torn", "remember", "rests", "unmark", "warn_undone"]

logger = logging.getLogger("handfast")


def unmark(parts: Sequence[Node], saved: Saved, only: Sequence[str]) -> None:
    """Let what is about to be loaded be of no known epoch until all has come."""
    touched = _touched(parts, saved, only)
    clear((node.value for node in touched), _arriving(touched, saved, only))


def remember(
    parts: Sequence[Node],
    saved: Saved,
    stamp: Stamp,
    only: Sequence[str],
    history: History,
    stays: Mapping[str, Origin],
) -> None:
    """Let each module and optimizer of which anything has come know where it came from, with what
    ``stays`` in it of the same index.
    """
    came, both = Origin(stamp.run, index_of(stamp), "", history), known(parts, saved, only)
    touched, marks = _touched(parts, saved, only), []
    for node in touched:
        rest = stays.get(node.path)
        more = rest.known if rest and rest.index == came.index else frozenset()
        marks.append((node.value, replace(came, path=node.path, known=both[node.path] | more)))
    mark(marks, _arriving(touched, saved, only))


def _arriving(parts: Sequence[Node], saved: Saved, only: Sequence[str]) -> frozenset[int]:
    """The parameters that an epoch has, and that are to come."""
    paths = set(saved.paths())
    come = (w for w in _weights(parts) if w.path in paths and matches(w.path, only))
    return numbers(weight.parameter for weight in come)


class _Weight(NamedTuple):
    """A parameter that an epoch has: its module's path, its name there, its own path."""

    module: str
    name: str
    path: str
    parameter: nn.Parameter


def known(parts: Sequence[Node], saved: Saved, only: Sequence[str]) -> dict[str, frozenset[int]]:
    """Which parameters come with each part, by its path, of those that the epoch has both weights
    and moments of: neither what was frozen nor adapters and a new head.
    """
    live = {node.path: node.value for node in parts}
    weights, paths = list(_weights(parts)), set(saved.paths())
    weights = [weight for weight in weights if weight.path in paths]
    found = dict.fromkeys(live, frozenset[int]())
    both = frozenset[int]()
    for where, kind in saved.kinds.items():
        if is_optimizer(kind):
            moments = _stepped(weights, saved, where, live.get(where))
            both |= moments
            if where in found and matches(where, only):
                found[where] = moments
    for one in weights:
        if matches(one.path, only):
            found[one.module] |= numbers([one.parameter]) & both
    return found


def _stepped(
    weights: Iterable[_Weight], saved: Saved, where: str, optimizer: Any
) -> frozenset[int]:
    """The parameters among some weights that a saved optimizer had tensors of."""
    had = [path.removeprefix(f"{where}/state/") for path in _within(saved, where)]
    if saved.kinds[where] == Kind.OPTIMIZER:  # else it says by order whose they are: all its own
        names = {path[:at] for path in had for at, letter in enumerate(path) if letter == "/"}
        weights = [w for w in weights if not names.isdisjoint((w.name, f"{w.module}.{w.name}"))]
    elif not had:
        return frozenset()
    if optimizer is not None:
        own = set(map(id, optimizers.parameters(optimizer)))
        weights = [weight for weight in weights if id(weight.parameter) in own]
    return numbers(weight.parameter for weight in weights)


def _weights(parts: Iterable[Node]) -> Iterator[_Weight]:
    for node in parts:
        if isinstance(node.value, nn.Module):
            for name, parameter in node.value.named_parameters(remove_duplicate=False):
                own = child("", clean(node.value, name))
                yield _Weight(node.path, own, f"{node.path}/{own}", parameter)


def rests(parts: Sequence[Node], saved: Saved, only: Sequence[str]) -> dict[str, Origin]:
    """Give where modules came from of which only a part is to come, by path, for what stays.

    What is frozen is of every epoch, if it has stood still, and what the epoch does not have is
    nobody's.
    """
    paths = {path for path in saved.paths() if not matches(path, only)}
    found: dict[str, Origin] = {}
    for node in _touched(parts, saved, only):
        came, module, since = origin(node.value), node.value, stirred(node.value)
        if came is None or not isinstance(module, nn.Module):
            continue
        came = replace(came, moved=came.moved | since)
        if came.fresh:
            continue
        weights = [w.parameter for w in _weights([node]) if w.path in paths]
        stays = numbers(parameter for parameter in weights if parameter.requires_grad)
        stays |= numbers(weights) & since
        buffers = [child(node.path, clean(module, name)) for name, _ in module.named_buffers()]
        if not paths.isdisjoint(buffers):  # they change with any of its weights
            found[node.path] = replace(came, known=came.known & stays)
        elif stays:
            found[node.path] = replace(came, known=came.known & stays, moved=came.moved & stays)
    return found


def refuse_torn(
    parts: Sequence[Node],
    saved: Saved,
    stamp: Stamp,
    only: Sequence[str],
    stays: Mapping[str, Origin],
) -> None:
    """Raise Refused, MIXED, where what ``stays`` of modules that come in part is not of the epoch
    that comes, or what shares parameters with what comes.
    """
    if stays:
        came = Origin(stamp.run, index_of(stamp), some(list(stays), 3), History.of(stamp))
        others = beside(node.value for node in _touched(parts, saved, only)).values()
        refuse_apart([came, *stays.values(), *others], "what this restore would leave")


def warn_undone(parts: Sequence[Node], stamp: Stamp) -> None:
    """Warn of what was loaded from another run to begin a lineage, and is about to be loaded over
    by an epoch that did not begin so: a script that was changed, say, and is started again.
    """
    loaded = [came for node in parts if (came := origin(node.value)) and came.run != stamp.run]
    undone = [came for came in loaded if not set(came.history.began()) <= set(stamp.forks)]
    if undone:
        began = [
            f"{f.lineage} at {f.of} {f.generation}/{f.step} of run {f.run}" for f in stamp.forks
        ]
        logger.warning(
            "%s: what was loaded so is undone by this restore of %s, which is of lineage %s and "
            "did not begin with it (%s). What to do: for another beginning give another path; to "
            "go on from here with other weights load them after restore(), by a new lineage=",
            some([str(came) for came in undone], 3),
            stamp.epoch,
            stamp.lineage,
            some(began, 3) or "from nothing",
        )


def _touched(parts: Sequence[Node], saved: Saved, only: Sequence[str]) -> list[Node]:
    """The parts that the epoch has, and that anything is to come of."""
    return [
        node
        for node in parts
        if node.path in saved.kinds
        and any(matches(path, only) for path in chain([node.path], _within(saved, node.path)))
    ]


def _within(saved: Saved, component: str) -> Iterator[str]:
    return (path for path in saved.paths() if path.startswith(f"{component}/"))
