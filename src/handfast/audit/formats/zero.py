"""ZeRO's flat partitions: which stretch of which parameter lies where in what a rank holds.

ZeRO lays the parameters of a group end to end, in float32, and gives each rank one piece. Stages 1
and 2 cut the whole row into pieces of one length; stage 3 cuts each parameter, and a rank's row is
of its shares. Nothing in a row says what is in it: the model's file names the parameters of each
group in their order, with their shapes. Facts: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py
(``state_dict``), runtime/zero/stage3.py (``_rigid_state_dict``), utils/zero_to_fp32.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit.extent import Extent, dense
from handfast.audit.formats.states import sizes
from handfast.audit.found import Role
from handfast.audit.tree import Object

__all__ = [
    "RANKS",
    "ROLES",
    "Shapes",
    "Stretch",
    "betas_of",
    "cut_everywhere",
    "cut_groups",
    "cut_parameters",
    "dotted",
    "flat",
    "mapped",
    "named_shapes",
    "settled",
    "share_of",
]

ROLES: Final[Mapping[str, Role]] = {
    "exp_avg": Role.FIRST,
    "exp_avg_sq": Role.SECOND,
    "momentum_buffer": Role.MOMENTUM,
}
"""What the states of an optimizer that ZeRO wraps are."""

RANKS: Final = 1 << 17
"""Ranks that share a row at most: a length that asks for more is none."""

SETTLED: Final = (0, 15)
_VERSION: Final = re.compile(r"(\d{1,4})\.(\d{1,4})")

Shapes = Sequence[Mapping[str, tuple[int, ...]]]
"""Of each group its parameters in their order, with their shapes."""


class Stretch(NamedTuple):
    """``length`` elements of the parameter ``name``, flattened, from ``start`` on.

    They lie in a rank's row of the group from ``at`` on.
    """

    group: int
    name: str
    at: int
    start: int
    length: int


def named_shapes(node: Any) -> Shapes | None:
    """What ``param_shapes`` says; None where it says nothing (or nothing that is known).

    One dict is one group, as before DeepSpeed 0.4.
    """
    groups = [node] if type(node) is dict else node
    if type(groups) is not list or not all(type(group) is dict for group in groups):
        return None
    for group in groups:
        for name, shape in group.items():
            if type(name) is not str or sizes(shape) is None:
                return None
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def cut_groups(
    shapes: Shapes, paddings: Sequence[Sequence[int]], sizes: Sequence[int], rank: int
) -> Iterator[Stretch]:
    """What a rank's rows hold in stages 1 and 2: row ``rank`` of ``sizes`` elements each.

    ``paddings`` follow each parameter (``param_alignment_paddings``; none where they are missing).
    """
    for group, (named, size) in enumerate(zip(shapes, sizes, strict=False)):
        first, at = rank * size, 0
        after = paddings[group] if group < len(paddings) else ()
        for place, (name, shape) in enumerate(named.items()):
            numel = math.prod(shape)
            begin, end = max(at, first), min(at + numel, first + size)
            if begin < end:
                yield Stretch(group, name, begin - first, begin - at, end - begin)
            at += numel + (after[place] if place < len(after) else 0)


def cut_everywhere(
    shapes: Shapes, paddings: Sequence[Sequence[int]], sizes: Sequence[int]
) -> Iterator[Stretch]:
    """What the rows of all ranks hold in stages 1 and 2, parameter by parameter."""
    for group, (named, size) in enumerate(zip(shapes, sizes, strict=False)):
        at = 0
        after = paddings[group] if group < len(paddings) else ()
        for place, (name, shape) in enumerate(named.items()):
            end = at + math.prod(shape)
            begin = at
            while size > 0 and begin < end and begin < size * RANKS:
                upto = min(end, (begin // size + 1) * size)
                yield Stretch(group, name, begin % size, begin - at, upto - begin)
                begin = upto
            at = end + (after[place] if place < len(after) else 0)


def cut_parameters(shapes: Shapes, world: int, rank: int) -> Iterator[Stretch]:
    """What a rank's rows hold in stage 3: of each parameter the share of one of ``world`` ranks."""
    for group, named in enumerate(shapes):
        at = 0
        for name, shape in named.items():
            length, start, count = share_of(shape, world, rank)
            if count:
                yield Stretch(group, name, at, start, count)
            at += length


def share_of(shape: Sequence[int], world: int, rank: int) -> tuple[int, int, int]:
    """A rank's share of a parameter in stage 3: its length, with what pads it; where it begins in
    the parameter, flattened; and how many elements of that are in it.
    """
    numel = math.prod(shape)
    length = -(-numel // world)
    start = rank * length
    return length, start, min(max(numel - start, 0), length)


def flat(values: Extent, at: int, count: int) -> Extent | None:
    """Some elements of a row-major tensor, flattened; None where it is none, or they leave it."""
    if values.stride != dense(values.shape) or at + count > math.prod(values.shape):
        return None
    return msgspec.structs.replace(values, shape=(count,), stride=(1,), offset=values.offset + at)


def dotted(node: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of dicts in dicts by their keys, joined with dots; in order, each dict once."""
    ahead = [iter([("", node)])]
    seen: set[int] = set()
    while ahead:
        found = next(ahead[-1], None)
        if found is None:
            ahead.pop()
            continue
        name, part = found
        if type(part) is not dict:
            yield name, part
        elif id(part) not in seen:
            seen.add(id(part))
            ahead.append(_inner(name, part))


def _inner(name: str, node: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    top = f"{name}." if name else ""
    return ((f"{top}{key}", part) for key, part in node.items() if type(key) is str)


def mapped(node: Any) -> list[dict[str, tuple[int, int]]] | None:
    """What ``param_slice_mappings`` says: of each group, where in the row what begins, how long.

    None where it says nothing (it came with DeepSpeed 0.8).
    """
    if type(node) is not list or not all(type(group) is dict for group in node):
        return None
    found = []
    for group in node:
        fields = {name: at.fields for name, at in group.items() if type(at) is Object}
        found.append(
            {
                name: (each.get("start", -1), each.get("numel", -1))
                for name, each in fields.items()
                if type(name) is str
            }
        )
    return found


def betas_of(group: Mapping[Any, Any]) -> tuple[float, float] | None:
    """The betas of a group of Adam's, where no schedule moves them."""
    betas = group.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2 or "max_momentum" in group:
        return None
    first, second = betas
    return (first, second) if type(first) is type(second) is float else None


def settled(version: Any) -> bool:
    """Whether a DeepSpeed's ZeRO counts no step that was not taken.

    Until 0.14 it stepped once as it began, with gradients of zero; so did, and still does, what
    wraps an optimizer without ZeRO (deepspeedai/DeepSpeed#5104).
    """
    found = _VERSION.match(version) if type(version) is str else None
    return found is not None and (int(found[1]), int(found[2])) >= SETTLED
