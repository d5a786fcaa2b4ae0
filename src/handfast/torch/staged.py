"""What a validator is given: the values of one epoch that one rank has staged, and what they are.

Tensors lie in the image, by path; all else is read from its objects, with a string in the place of
what only the trainer could make. What a path is (a box, an optimizer, a user's object) is in there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final, NamedTuple

import msgspec
import torch
from torch import Tensor

from handfast.agent.examiner import Known
from handfast.core.lattice import Epoch
from handfast.store import objects
from handfast.store.objects import TensorRef, child
from handfast.torch.kinds import is_optimizer
from handfast.torch.names import loaded
from handfast.torch.saved import EXTRA, GRADS, KINDS, RNG
from handfast.torch.tree import Kind, entries, join

__all__ = ["Group", "Moments", "Staged", "blocks", "ends_of", "leaves", "parts"]

BLOCK: Final = 1 << 22
"""Elements that are looked at together, so that what is computed of them stays small."""


class Moments(NamedTuple):
    """The state of Adam for one parameter, with its group's decay rates and its step."""

    path: str
    first: Tensor
    second: Tensor
    betas: tuple[float, float]
    step: float


class Group(NamedTuple):
    """One group of an optimizer: their paths, its values, and where its parameters' state stands.

    ``named`` is false of an optimizer that is asked itself, and goes by the order of parameters.
    """

    optimizer: str
    path: str
    values: Mapping[str, Any]
    places: list[str]
    named: bool


class Staged:
    """What one rank has staged of an epoch, before anybody may rely on it.

    ``tensors`` are this rank's own, by path, in their dtypes and shapes: views of the image, which
    can't be written; what they show after the validator has returned is undefined, so what is to
    be kept is copied. ``apart`` are the paths of those that may hold anything; that and what else
    is ``known`` says :func:`handfast.torch.validators.free`. What this rank leaves to the first of
    its node is examined there. ``rates`` is what is remembered of decay rates from epoch to epoch.
    """

    def __init__(
        self,
        epoch: Epoch,
        tensors: Mapping[str, Tensor],
        encoded: bytes,
        known: Known,
        rates: dict[str, tuple[float, float]] | None = None,
    ) -> None:
        self.generation, self.step = epoch.generation, epoch.step
        self.tensors = tensors
        self.known = known
        self.apart = frozenset(known.apart)
        self._encoded = encoded
        self._rates = {} if rates is None else rates
        self._ends: dict[str, tuple[float, float]] = {}

    @cached_property
    def objects(self) -> dict[str, Any]:
        """All that is no tensor, by component; a string where only the trainer could read it.

        That is what was pickled, or is of a type that the trainer has registered.
        """
        plain = msgspec.msgpack.encode(_inert(msgspec.msgpack.decode(self._encoded)))
        found: Any = objects.decode(plain, where="staged objects")
        return dict(found)

    @property
    def extra(self) -> Any:
        """What the training gave to ``save(extra=...)``, with its tensors."""
        return join(self.objects.get(EXTRA), self._tensor)

    def _tensor(self, ref: TensorRef) -> Any:
        return self.tensors.get(ref.path, ref)  # what is tied to another is not here twice

    def ends(self, path: str) -> tuple[float, float]:
        """The least and the greatest value of a tensor of real numbers; NaN if it holds one.

        (0, 0) of an empty one. Read once, whoever asks.
        """
        if path not in self._ends:
            self._ends[path] = ends_of(self.tensors[path])
        return self._ends[path]

    def values(self) -> Iterator[str]:
        """The paths of parameters, moments and all else that has to be a number."""
        for path, tensor in self.tensors.items():
            if path not in self.apart and _may_be_nan(tensor):
                yield path

    def arrays(self) -> Iterator[tuple[str, Tensor]]:
        """NumPy's arrays of numbers that are not whole, in boxes, by path: as tensors.

        Of an array of records each field is one.
        """
        array = loaded("numpy", "ndarray")
        for path, kind, value in self._things():
            if not kind and isinstance(value, array):
                yield from _fields(path, value)

    def groups(self) -> Iterator[Group]:
        """The groups of all optimizers that stand in the state by themselves, or in its boxes."""
        for path, kind, saved in self._things():
            if not is_optimizer(kind) or not isinstance(saved, Mapping):
                continue
            named = kind == Kind.OPTIMIZER.value
            for number, group in entries(saved.get("param_groups")):
                held = f"{path}/state"
                places = [f"{held}/{p}" if named else child(held, p) for p in group["params"]]
                where = child(f"{path}/param_groups", number)
                yield Group(path, where, group, places, named)

    def _things(self) -> Iterator[tuple[str, str, Any]]:
        """Path, kind and tree of all live things; and plain values in boxes, whose kind is ""."""
        kinds = self.objects.get(KINDS, {})
        for component, tree in self.objects.items():
            if component not in (KINDS, EXTRA, RNG, GRADS):
                for path, value in leaves(child("", component), tree, kinds):
                    yield path, kinds.get(path, ""), value

    def unjudged(self) -> Iterator[str]:
        """The optimizers that have what looks like Adam's moments, and is nobody knows what."""
        yield from dict.fromkeys(
            group.optimizer
            for group in self.groups()
            if group.optimizer not in self.known.adams and "betas" in group.values
            for place in group.places
            if {f"{place}/exp_avg", f"{place}/exp_avg_sq"} <= self.tensors.keys()
        )

    def moments(self) -> Iterator[Moments]:
        """The pairs of moments of optimizers that keep them as Adam does, and whose decay rates do
        not cycle.
        """
        for group in self.groups():
            betas: Any = group.values.get("betas")
            if group.optimizer not in self.known.adams or not all(map(_is_number, betas)):
                continue
            if "max_momentum" in group.values:
                continue  # OneCycleLR and CyclicLR change them at every step
            if self._rates.setdefault(group.path, tuple(betas)) != tuple(betas):
                continue  # no bound is known of what they were meanwhile
            for place in group.places:
                keys = ("exp_avg", "exp_avg_sq", "step")
                first, second, step = (self.tensors.get(f"{place}/{key}") for key in keys)
                if first is not None and second is not None and first.shape == second.shape:
                    count = float(step) if step is not None else math.inf
                    rates = (float(betas[0]), float(betas[1]))
                    yield Moments(f"{place}/", first, second, rates, count)


def leaves(
    path: str, tree: Any, whole: Mapping[str, object] | None = None
) -> Iterator[tuple[str, Any]]:
    """What stands in a tree, by path; what stands at one of the paths ``whole`` is not entered."""
    if whole and path in whole:
        yield path, tree
        return
    inside = entries(tree)
    if not inside:
        yield path, tree
    for key, item in inside:
        yield from leaves(child(path, key), item, whole)


def _may_be_nan(tensor: Tensor) -> bool:
    """Whether it is of numbers that are not whole, in a dtype that has NaN; 4-bit floats do not."""
    packed = getattr(torch, "float4_e2m1fn_x2", None)  # not before torch 2.8
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != packed


def _fields(path: str, array: Any) -> Iterator[tuple[str, Tensor]]:
    for name in array.dtype.names or ():
        yield from _fields(child(path, name), array[name])
    if array.dtype.kind in "fc":
        native = array.dtype.newbyteorder("=")  # torch knows no other
        yield path, torch.from_numpy(array.astype(native, order="C"))


REGISTERED, PICKLE = 30, 31  # tags of docs/format.md, Objects


def _inert(node: Any) -> Any:
    """Encoded objects with a string in the place of each that only the trainer can make."""
    if type(node) is not list:
        return node
    if node[:1] in ([REGISTERED], [PICKLE]):
        return f"<{node[1]} {id(node)}>"  # no two alike: they may be elements of a set
    return list(map(_inert, node))


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def parts(flat: Tensor) -> tuple[Tensor, ...]:
    """A flat tensor, some millions of elements at a time."""
    return torch.split(flat, BLOCK)


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Its real numbers, some millions at a time, in a dtype that torch can compute with."""
    for part in parts(_real(tensor)):
        yield part.float() if part.element_size() == 1 else part


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)


def ends_of(tensor: Tensor) -> tuple[float, float]:
    """The least and the greatest of a tensor's real numbers; NaN if it holds one, 0 if none."""
    flat = _real(tensor)
    if not flat.numel():
        return 0.0, 0.0
    if flat.element_size() == 1:  # torch has no minimum of the 8-bit floats
        flat = torch.tensor([end for part in blocks(flat) for end in ends_of(part)])
    low, high = torch.aminmax(flat)
    return float(low), float(high)
