"""How tensors lie in memory: looked at many at a time, and held against the look before.

A live tensor can change in every respect and stay the same object (``.data``, ``set_``, ``t_()``),
and another one can come to lie at an address that became free. So no object is kept, and none is
trusted: in every save each tensor is asked for all that its name, its ties and its place in an
image depend on. It is asked in runs, because what one question brings into the cache serves the
next.
"""

from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from handfast.store.image import TensorSpec
from handfast.torch.tensors import is_cut

__all__ = ["Look", "aliases_of", "forms", "look", "pointers"]

RUN: Final = 256
"""Tensors that are looked at together."""


class Look(NamedTuple):
    """A run of local tensors, one entry each: two that are equal lie in the same bytes, alike.

    ``strides`` only say whether a tensor is dense and row-major, unless the run is ``exact``: where
    one is not, where a dimension of fewer than two elements leaves strides open, and where some are
    complex. Only then ``conjugated`` is filled.
    """

    exact: bool
    pointers: list[int]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    devices: list[int]  # -1 is the CPU
    strides: list[Any]
    negated: list[bool]
    conjugated: list[bool]


def look(parts: Sequence[Tensor], before: Sequence[Look] = ()) -> Sequence[Look]:
    """Look at local tensors; gives the very looks of ``before`` where nothing differs from them.

    Raises RuntimeError, NotImplementedError or ValueError for a tensor without memory or shape, or
    with less memory than it has bytes.
    """
    runs = [parts[at : at + RUN] for at in range(0, len(parts), RUN)]
    if len(runs) == len(before) and all(
        _look(run, old.exact) == old for run, old in zip(runs, before, strict=True)
    ):
        return before
    if any(map(is_cut, parts)):
        raise ValueError("a tensor is larger than its storage")
    return tuple(_look(run, any(map(_is_odd, run))) for run in runs)


def _look(run: Sequence[Tensor], exact: bool) -> Look:
    return Look(
        exact,
        list(map(Tensor.data_ptr, run)),
        [part.shape for part in run],
        [part.dtype for part in run],
        list(map(Tensor.get_device, run)),
        list(map(Tensor.stride if exact else Tensor.is_contiguous, run)),
        list(map(Tensor.is_neg, run)),
        list(map(Tensor.is_conj, run)) if exact else [],
    )


def _is_odd(part: Tensor) -> bool:
    return not part.is_contiguous() or part.is_complex() or min(part.shape, default=2) < 2


def pointers(looks: Sequence[Look]) -> list[int]:
    """Where each tensor begins; 0 of one that has no memory."""
    return [pointer for seen in looks for pointer in seen.pointers]


def forms(looks: Sequence[Look], parts: Sequence[Tensor]) -> object:
    """What specs and ties depend on, wherever in memory the tensors are."""
    starts = pointers(looks)
    return (
        [part.shape for part in parts],
        list(map(Tensor.stride, parts)),
        [part.dtype for part in parts],
        starts.count(0),  # empty ones, and those on the meta device
        _shared(starts, parts),
    )


def _shared(starts: Sequence[int], parts: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Which tensors begin where another one does: all that ties can depend on."""
    if len(set(starts)) == len(starts):
        return []
    first: dict[int, int] = {}
    return [
        (index, at, *(_view(part) for part in (parts[index], parts[at])))
        for index, start in enumerate(starts)
        if (at := first.setdefault(start, index)) != index
    ]


def _view(part: Tensor) -> tuple[object, ...]:
    """What a view makes of the memory that it begins at, besides dtype and shape."""
    return part.stride(), part.is_conj(), part.is_neg()


def aliases_of(
    specs: Sequence[TensorSpec],
    looks: Sequence[Look],
    parts: Sequence[Tensor],
    shared: Collection[str],
) -> dict[str, str]:
    """Tied tensors: the very same memory, seen in the same way. Other overlaps are kept apart.

    Of tied paths one that all ranks hold alike is stored, where there is one: other ranks need not
    have the tie. Raises ValueError if two tensors have one path.
    """
    starts = pointers(looks)
    begins = [start for start in starts if start]  # empty ones are tied to nothing
    if len(set(begins)) == len(begins) and len({spec.path for spec in specs}) == len(specs):
        return {}
    tied: dict[object, list[str]] = {}
    seen: set[str] = set()
    for spec, start, part in zip(specs, starts, parts, strict=True):
        if spec.path in seen:
            raise ValueError(f"state: two tensors have the path {spec.path}: rename one of them")
        seen.add(spec.path)
        memory = (start, part.device, spec.dtype, spec.shape, _view(part), spec.offset)
        if part.numel():
            tied.setdefault((memory, spec.global_shape), []).append(spec.path)
    aliases: dict[str, str] = {}
    for paths in tied.values():
        kept = next((path for path in paths if path in shared), paths[0])
        aliases |= {path: kept for path in paths if path != kept}
    return aliases
