"""Looking at a training's state, leaf by leaf, and changing nothing of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from itertools import chain, count
from types import FrameType
from typing import Any, Final

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from handfast.errors import HandfastError
from handfast.store import objects
from handfast.store.image import TensorSpec
from handfast.store.manifest import chunk_hash
from handfast.store.objects import TensorRef, child
from handfast.testing.exact.around import SCALARS, Around, Held
from handfast.testing.exact.moments import SAMPLE, Print
from handfast.torch.capture import Captured, capture, parameters_of, walk
from handfast.torch.rng import read_streams, unmoved_streams
from handfast.torch.saved import EXTRA, KINDS, RNG
from handfast.torch.tensors import digest as digest_of
from handfast.torch.tensors import spec_of
from handfast.torch.tree import Kind, entries, holder, kind_of

__all__ = ["Look"]

FEW: Final = 8
"""A box of more plain values than these is one leaf."""
WIDTH: Final = 60
"""Characters of a value that are shown."""
LARGE: Final = 64 << 20
"""Bytes of a tensor or an array beside the state, data most likely, that is not looked at."""
NAMES_ONLY: Final = ("tensors", "placed")
"""What an optimizer's tree says of its tensors, which have prints of their own."""
WORDS: Final[Mapping[str | None, str]] = {
    Kind.OPTIMIZER: "hyperparameter",
    Kind.SCHEDULER: "scheduler",
    Kind.SCALER: "scaler",
    Kind.LOADER: "loader position",
    Kind.GENERATOR: "random stream",
    Kind.MODULE: "module state",
    Kind.OBJECT: "object",
}
LOADABLE: Final = frozenset(WORDS) - {Kind.LOADER, Kind.GENERATOR}
"""Kinds of things that give and take a state, but for those that say where the data stand."""


class Look:
    """Prints of a state, and of what lives beside it within reach of the training loop.

    ``state`` and ``rng`` are the Checkpointer's; ``run`` is the path of the run, which differs from
    one run to the next, and is therefore not looked at. ``stepped`` are the optimizers that were
    stepped so far, in their order: what they train is looked at wherever it is.
    """

    def __init__(
        self,
        state: Mapping[str, object],
        *,
        rng: bool,
        run: str,
        stepped: Collection[Optimizer] = (),
    ) -> None:
        self._state = state
        self._rng = rng
        self._run = run
        self._stepped = stepped

    @torch.no_grad()
    def prints(self, extra: object, frame: FrameType | None) -> dict[str, Print]:
        """Print every leaf by path; ``frame`` is the innermost one of the training.

        Raises what a capture of the state raises.
        """
        streams = read_streams()
        with unmoved_streams():  # a loader's state_dict() may draw
            walked = walk(self._state)
            trained = {path for path, _ in parameters_of(walked)}
            found = capture(self._state, rng=False, extra=extra, walked=walked)
            made = dict(self._captured(found, trained, stored=True))
            held = Held(self._state, walked.nodes, found.tensors, self._stepped)
            for path, buffer in held.unkept():
                made[path] = _print_tensor(spec_of(path, buffer), buffer, "buffer", stored=False)
            for name, value in Around(held).reach(frame):
                _add(made, name, dict(self._beside(name, value, held)))
            for name, at, parameter in held.unreached():
                spec = spec_of(name + at, parameter)
                _add(made, name, {at: _print_tensor(spec, parameter, "parameter", stored=False)})
        made |= self._leaves(RNG, streams, {RNG: Kind.GENERATOR}, stored=self._rng)
        return made

    def _beside(self, name: str, value: object, held: Held) -> Iterator[tuple[str, Print]]:
        """Print something that is not in the state, by what follows its name in a path.

        What can't be read is left out.
        """
        if type(value) in SCALARS:
            for path, made in self._leaves(name, value, {}, stored=False):
                yield path.removeprefix(name), made
            return
        with suppress(Exception):
            if getattr(value, "nbytes", 0) > LARGE:
                return
            found = capture({name: [value]}, rng=False)
            held.reached(found.tensors)
            own = f"{child('', name)}[0]"
            pairs = zip(found.specs, found.tensors, strict=True)
            trained = {spec.path for spec, tensor in pairs if held.is_stepped(tensor)}
            if isinstance(value, nn.Module):
                trained |= {f"{own}/{key}" for key, _ in value.named_parameters()}
            elif isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                trained.add(own)
            loadable = _is_loadable(value) or held.looks_trained(name, value)
            for path, made in self._captured(found, trained, stored=False):
                yield path.removeprefix(own), replace(made, loadable=loadable)

    def _captured(
        self, found: Captured, trained: set[str], *, stored: bool
    ) -> Iterator[tuple[str, Print]]:
        kinds: Any = found.objects[KINDS]
        for spec, tensor in zip(found.specs, found.tensors, strict=True):
            word = _word_of_tensor(spec.path, spec.path in trained, kinds)
            yield spec.path, _print_tensor(spec, tensor, word, stored=stored)
        for name, tree in found.objects.items():
            if name != KINDS and (stored or name != EXTRA):
                yield from self._leaves(child("", name), tree, kinds, stored=stored)

    def _leaves(
        self, path: str, value: Any, kinds: Mapping[str, str], *, stored: bool
    ) -> Iterator[tuple[str, Print]]:
        """The plain values of a tree; its tensors have prints already."""
        inside = list(entries(value))
        kind = _kind(path, kinds)
        stream = kind == Kind.GENERATOR and path != RNG and not path.endswith("/cuda")
        if isinstance(value, TensorRef):
            return
        if not inside or stream or (len(inside) > FEW and _is_flat(value)):
            with suppress(HandfastError):  # beside the state there may be anything
                yield path, self._print(path, value, _word(path, kind), stored=stored)
            return
        for key, item in inside:
            if not (kinds.get(path) == Kind.OPTIMIZER and key in NAMES_ONLY):
                yield from self._leaves(child(path, key), item, kinds, stored=stored)

    def _print(self, path: str, value: object, word: str, *, stored: bool) -> Print:
        if type(value) is str:
            value = value.replace(self._run, "RUN")
        digest = chunk_hash(objects.encode(value, path=path, pickle=("*",)))
        text = repr(value)
        if word == WORDS[Kind.GENERATOR]:
            text = f"at {digest.hex()[:8]}"
        elif len(text) > WIDTH:
            text = f"{type(value).__name__} {digest.hex()[:8]}, {text[:WIDTH]}..."
        return Print(word, digest, text, stored)


def _is_loadable(value: object) -> bool:
    """Whether a thing could be in the state by itself, and keeps more than where the data stand:
    whoever loses those trains on other data, which the weights show.
    """
    return kind_of(value) in LOADABLE and not isinstance(value, Dataset)


def _add(made: dict[str, Print], name: str, leaves: Mapping[str, Print]) -> None:
    """Add what is called ``name`` beside the state: of two things the one that is there already.

    But what is trained counts, whatever else is called so: it has that name with a number.
    """
    trained = {at for at, leaf in leaves.items() if leaf.kind == "parameter"}
    names = chain([name], (f"{name} ({number})" for number in count(2)))
    own = next(each for each in names if not any(each + at in made for at in trained))
    for at, leaf in leaves.items():
        made.setdefault(own + at, leaf)


def _is_flat(value: object) -> bool:
    return not any(isinstance(item, TensorRef) or any(entries(item)) for _, item in entries(value))


def _kind(path: str, kinds: Mapping[str, str]) -> str | None:
    """The kind of the live thing that a path belongs to; None if it is in a box of values."""
    at: str | None = path
    while at is not None and at not in kinds:
        at = holder(at)
    return None if at is None else kinds[at].partition(":")[0]


def _word(path: str, kind: str | None) -> str:
    if path == EXTRA or path.startswith((f"{EXTRA}/", f"{EXTRA}[")):
        return "extra"
    return WORDS.get(kind, "value")


def _word_of_tensor(path: str, trained: bool, kinds: Mapping[str, str]) -> str:
    if trained:
        return "parameter"
    kind = _kind(path, kinds)
    if kind == Kind.MODULE:
        return "buffer"
    if kind == Kind.OPTIMIZER:
        return "step counter" if path.endswith("/step") else "moment"
    return _word(path, kind) if kind not in (None, Kind.TENSOR) else "tensor"


def _print_tensor(spec: TensorSpec, tensor: Tensor, word: str, *, stored: bool) -> Print:
    shape = list(spec.shape)
    whole = "" if spec.shape == spec.global_shape else f" of {list(spec.global_shape)}"
    size = tensor.numel()
    text = f"{spec.dtype}{shape}{whole}"
    sample = _sample(tensor)
    if size == 1 and sample and not tensor.is_complex():
        text = f"{sample[0]:.9g}"
    values = replace(spec, stride=())  # how they lie in memory is no part of them
    return Print(word, digest_of(values, tensor), text, stored, sample, size)


def _sample(tensor: Tensor) -> tuple[float, ...]:
    """Some elements, the same of each tensor of this shape; none of what is no plain number."""
    with suppress(RuntimeError, NotImplementedError, TypeError):  # packed fours and their like
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, -(-flat.numel() // SAMPLE))].cpu()
        parts = torch.view_as_real(some.resolve_conj()) if some.is_complex() else some
        return tuple(parts.to(torch.float64).reshape(-1).tolist())
    return ()
