"""Whose the moments are that an optimizer has by number: torch's count parameters in their order.

A module's state has them in the same order (torch 2.13, nn/modules/module.py, ``state_dict`` and
``named_parameters``), so that the n-th state is the n-th weight's where there is one of each, of
one shape, and one group: groups are numbered one after the other, whatever is in them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from handfast.audit.checks.seen import same
from handfast.audit.found import Part, Role, Step, Tensor

__all__ = ["owners"]

STATE: Final = frozenset({Role.FIRST, Role.SECOND, Role.MOMENTUM, Role.MASTER, Role.OTHER})

_NUMBERED: Final = re.compile(r"(?P<whose>.*)\[(?P<at>\d{1,9})\]|(?P<alone>\d{1,9})")
_SORTED: Final = ".safetensors"
"""Files that have tensors in another order than a module's: by their names, or their sizes."""


def owners(step: Step) -> Mapping[tuple[str, str], str]:
    """The weight of each state of an optimizer that goes by numbers, where that is known.

    By the part, and by what the state calls its parameter (:attr:`Tensor.of`).
    """
    weights = _weights(step.parts)
    found: dict[tuple[str, str], str] = {}
    if not weights:
        return found
    for part in step.parts:
        for states in _states(part).values():
            groups = {tensor.group for own in states.values() for tensor in own}
            if len(groups) > 1 or sorted(states) != [*range(len(weights))]:
                continue
            if all(any(_shape(t) == _shape(weights[at]) for t in states[at]) for at in states):
                for at, own in states.items():
                    found |= {(part.path, tensor.of): weights[at].of for tensor in own}
    return found


def _weights(parts: Sequence[Part]) -> list[Tensor]:
    """The weights of the one model there, in order, tied ones once; none where nothing has all."""
    every = {part.path: _main(part) for part in parts}
    names = {tensor.of for own in every.values() for tensor in own}
    for path, own in every.items():
        pieces = {tensor.of: tensor for tensor in reversed(own)}
        if names and pieces.keys() == names and not path.endswith(_SORTED):
            order = dict.fromkeys(tensor.of for tensor in own)
            first = {same(pieces[name].values): pieces[name] for name in reversed(order)}
            kept = {tensor.of for tensor in first.values()}
            return [pieces[name] for name in order if name in kept]
    return []


def _main(part: Part) -> list[Tensor]:
    """The weights of a part; of several modules in it those of the main one, which need no prefix.

    Those of others have their whole path as a name.
    """
    own = [tensor for tensor in part.tensors if tensor.role is Role.PARAMETER]
    return [tensor for tensor in own if tensor.path != tensor.of] or own


def _states(part: Part) -> dict[str, dict[int, list[Tensor]]]:
    """The states of each optimizer that goes by numbers."""
    found: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for tensor in part.tensors:
        said = _NUMBERED.fullmatch(tensor.of) if tensor.role in STATE else None
        if said is not None:
            found[said["whose"] or ""][int(said["at"] or said["alone"])].append(tensor)
    return found


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tensor.whole if tensor.whole is not None else tensor.values.shape
