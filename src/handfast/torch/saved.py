"""What was saved of one shard, as read back: manifests joined, values still in the image."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from handfast.errors import FormatError
from handfast.store import objects
from handfast.store.image import TensorSpec
from handfast.store.manifest import Manifest
from handfast.store.objects import TensorRef
from handfast.torch.tensors import HOST, Place, local, make, place_like
from handfast.torch.tree import join

__all__ = [
    "EXTRA",
    "GRADS",
    "KINDS",
    "RNG",
    "UNSYNCED",
    "Saved",
    "Source",
    "Values",
    "read_manifests",
    "taken",
]

KINDS = ""
"""The entry of the objects that says which kind of live thing each path was.

A scheduler's has its class behind a colon, and the classes of those that it chains in brackets:
another one would take its attributes without a word. So has a generator's, and that of an optimizer
which is an object, with a digest of its parameters' names in their order: it goes by that.
"""

EXTRA = "extra"
"""The entry of what the caller of ``save`` gave along."""

GRADS = "grads"
"""The entry of the gradients of an epoch that was saved in the middle of an accumulation."""

RNG = "rng"
"""The entry of the random streams of the process."""

UNSYNCED = ""
"""The entry of a module's tree that names the DDP modules in it that were not to broadcast their
buffers at the next forward pass; it is there only if there are any."""


class Saved(NamedTuple):
    """The tensors by path, tied paths with the path that is stored, plain trees by component."""

    specs: dict[str, TensorSpec]
    aliases: dict[str, str]
    objects: dict[str, Any]

    @property
    def kinds(self) -> dict[str, str]:
        """Path -> kind of every live thing that was captured."""
        found: dict[str, str] = self.objects[KINDS]
        return found

    def spec(self, path: str) -> TensorSpec | None:
        """What was saved under a path, through ties; None if nothing was."""
        return self.specs.get(self.aliases.get(path, path))

    def paths(self) -> Iterable[str]:
        """Every path under which a tensor can be found, ties too."""
        yield from self.specs
        yield from self.aliases


def read_manifests(own: Manifest, *others: Manifest, pickle: Sequence[str] = ()) -> Saved:
    """Join the manifests of one epoch: this rank's own, and those that hold what it shares.

    What its rank left to the first of its node is taken from there; all else is this rank's own,
    whatever the others say of it. Raises FormatError for objects that can't be read.
    """
    specs = {slot.spec.path: slot.spec for slot in own.slots}
    for other in others:
        held = {slot.spec.path: slot.spec for slot in other.slots}
        specs |= {
            path: msgspec.structs.replace(held[kept], path=path)
            for path, kept in taken(own, other)
            if kept in held
        }
    aliases = own.aliases
    tree = objects.decode(own.objects, pickle=pickle, where=f"objects of shard {own.stamp.shard}")
    if not isinstance(tree, dict) or not isinstance(tree.get(KINDS), dict):
        raise FormatError(
            f"the objects of shard {own.stamp.shard} are of no captured torch state: read them "
            "with what wrote them"
        )
    return Saved(specs, aliases, tree)


def taken(own: Manifest, other: Manifest) -> Iterator[tuple[str, str]]:
    """What a rank left to another: its path, and the path that the other stores it under."""
    left = own.left.digests if own.left else {}
    return ((path, other.aliases.get(path, path)) for path in left)


class Values(Protocol):
    """The values of a saved state, by the paths that are stored."""

    def view(self, path: str) -> Tensor:
        """The values of one tensor, dense, in host memory; not to be written to.

        Raises KeyError if nothing is stored there.
        """

    def fill(self, pairs: Sequence[tuple[Tensor, str]]) -> None:
        """Copy what is stored under paths into local tensors, in place.

        Cheap for many at once. What raises leaves some of them filled.
        """

    def adopt(self, path: str) -> Tensor | None:
        """A new dense tensor in host memory that holds what is stored under a path, if there is one
        already: it is had once.
        """


class Source(NamedTuple):
    """A saved state with its values.

    ``places`` are those of the live tensors by path, but for plain ones in host memory; ``meshed``
    the shapes and places of all live DTensors: on their meshes are made those not there yet.
    """

    saved: Saved
    values: Values
    places: Mapping[str, Place] = MappingProxyType({})
    meshed: Sequence[tuple[tuple[int, ...], Place]] = ()

    def spec(self, path: str) -> TensorSpec:
        """What was saved under the path. Raises KeyError if nothing was."""
        saved = self.saved
        return saved.specs[saved.aliases.get(path, path)]

    def view(self, path: str) -> Tensor:
        """The saved values, dense. Raises KeyError if nothing was saved there."""
        return self.values.view(self.saved.aliases.get(path, path))

    def fill(self, pairs: Sequence[tuple[Tensor, str]]) -> None:
        """Copy what was saved under paths into local tensors, in place."""
        aliases = self.saved.aliases
        self.values.fill([(target, aliases.get(path, path)) for target, path in pairs])

    def adopt(self, path: str, place: Place) -> Tensor | None:
        """A new tensor that has been filled already, if there is one that may stand there."""
        spec = self.spec(path)
        dense = place == HOST and spec.stride == torch.empty(spec.shape, device="meta").stride()
        return self.values.adopt(self.saved.aliases.get(path, path)) if dense else None

    def tensor(self, path: str, place: Place = HOST) -> Tensor:
        """A new tensor with the saved values, dtype and strides. Gradients are disabled."""
        if (filled := self.adopt(path, place)) is not None:
            return filled
        made = make(self.spec(path), place)
        self.fill([(local(made), path)])
        return made

    def place(self, ref: TensorRef, device: torch.device = HOST.device) -> Place | None:
        """Where a tensor belongs that is to be made; None if no mesh of the live state will do."""
        spec = self.spec(ref.path)
        if ref.dims:
            return place_like(spec, ref.dims, self.places.get(ref.path, HOST), self.meshed)
        return Place(device) if spec.shape == spec.global_shape else None

    def home(self, ref: TensorRef, device: torch.device = HOST.device) -> Place:
        """:meth:`place` of a tensor that has to be made. Raises LookupError if there is none."""
        place = self.place(ref, device)
        if place is None:
            raise LookupError(f"no mesh of the live state is that of {ref.path}")
        return place

    def tree(self, tree: object, near: Callable[[str], Place] = lambda _: HOST) -> object:
        """A plain tree with new tensors for its references; nothing aliases the image.

        What was a DTensor is one again, and what was one tensor in several places of the tree.
        Raises LookupError where none can be made.
        """
        made: dict[object, Tensor] = {}

        def fetch(ref: TensorRef) -> Tensor:
            place = self.home(ref, near(ref.path).device)
            key = self.saved.aliases.get(ref.path, ref.path), ref.dims, place.device
            if key not in made:
                made[key] = self.tensor(ref.path, place)
            return made[key]

        return join(tree, fetch)

    def parts(self, tree: object) -> object:
        """A plain tree with this rank's parts, whole or not, as plain tensors."""
        return join(tree, lambda ref: self.tensor(ref.path))
