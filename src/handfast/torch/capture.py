"""Capture: every tensor and every object of a training state, by name, at one moment.

It walks the state itself: ``Module.state_dict()``, ``Optimizer.state`` and ``param_groups``, the
local parts of DTensors, ``state_dict()`` of all else, the random streams last. Nothing is stepped,
created or copied: :func:`~handfast.torch.stage.stage` copies.

What is not captured: buffers that are not persistent, hooks, ``requires_grad``; and gradients,
unless they are asked for.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, compress
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.errors import Unstorable
from handfast.store.image import TensorSpec
from handfast.store.objects import child
from handfast.torch import loaders, optimizers
from handfast.torch.alike import Replica, ddp_ids, find_replicas, steps_alike
from handfast.torch.names import clean, cleaned, loaded, matches
from handfast.torch.rng import generator_class, read_generator, read_streams
from handfast.torch.saved import EXTRA, GRADS, KINDS, RNG, UNSYNCED
from handfast.torch.tensors import (
    all_tensors,
    any_dtensor,
    is_dtensor,
    local,
    spec_of,
    whole_everywhere,
)
from handfast.torch.tree import Kind, Node, assemble, nodes, split

__all__ = ["Captured", "capture", "parameters_of", "state_of", "trained", "walk"]


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A state at one moment. The tensors are live: stage them before the training goes on.

    ``specs`` and ``tensors`` (this rank's local parts) are in one order; ``aliases`` maps the path
    of a tied tensor to the path that is stored. ``objects`` has a plain tree a component, with
    references for tensors. ``replicated`` are the paths that every rank of the job probably holds
    alike, by what it is (DDP, DTensor) or was declared to be. While the structure stays, ``specs``
    is the very same tuple as in the capture before, so that a layout and its views serve again.
    ``trained`` are the paths of tensors in boxes that are no mere values.
    """

    specs: tuple[TensorSpec, ...]
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    objects: dict[str, object]
    replicated: tuple[str, ...]
    fingerprint: object
    stored: tuple[bool, ...]
    names: "Names"
    trained: frozenset[str] = frozenset()


class Names(NamedTuple):
    """The names of a walk, kept while the signature stays: they cost more than all else."""

    signature: object
    modules: list[list[str]]
    optimizers: list[optimizers.Names]
    replicas: list[list[Replica]]  # of each module
    owners: optimizers.Owners


class Walk(NamedTuple):
    """Everything in a state: the tensors by path, and a plain tree for each live thing."""

    nodes: list[Node]
    paths: list[str]
    tensors: list[Any]
    trees: dict[str, object]
    names: Names


class Alike(NamedTuple):
    """What was declared to be alike on all ranks, and what seems to be so now."""

    declared: tuple[str, ...]
    modules: list[tuple[bool, bool]]  # of each DDP module: its parameters, its buffers
    state: bool  # the optimizer state of those parameters


_Dicts = list[tuple[Node, dict[str, Any]]]


@torch.no_grad()
def walk(
    state: Mapping[str, object],
    names: Names | None = None,
    without: frozenset[Kind] = frozenset(),
) -> Walk:
    """Read every live thing of a state, without the random streams of the process.

    ``names`` of an earlier walk save time while they still fit. Kinds in ``without`` are found and
    not read. Generators are read last, because a loader's ``state_dict()`` may draw a seed.
    Raises Unstorable for state that can't be stored.
    """
    found = nodes(state)
    modules = [(n, n.value.state_dict(keep_vars=True)) for n in found if n.kind is Kind.MODULE]
    opts = [node for node in found if node.kind is Kind.OPTIMIZER]
    alone = _stepped(found)
    signature = (
        [(list(e), list(map(id, e.values())), ddp_ids(node.value)) for node, e in modules],
        [(node.path, optimizers.signature(node.value)) for node in opts],
        [(node.path, id(node.value)) for node in alone],
    )
    if names is None or names.signature != signature:
        names = _name(signature, modules, opts, alone)
    result = Walk(found, [], [], {}, names)
    for (node, entries), paths, ddps in zip(modules, names.modules, names.replicas, strict=True):
        unsynced = [replica.name for replica in ddps if replica.unsynced]
        result.trees[node.path] = {UNSYNCED: unsynced} if unsynced else {}
        _add_module(result, node, entries, paths)
    for node, own in zip(opts, names.optimizers, strict=True):
        tree, paths, tensors = optimizers.read(node.path, node.value, own)
        _add(result, node, tree, paths, tensors)
    for node in found:
        if node.kind is Kind.TENSOR:
            _add(result, node, *_split(node.value, node.path))
        elif node.kind not in (Kind.MODULE, Kind.OPTIMIZER, Kind.GENERATOR, *without):
            _add(result, node, *_split(state_of(node), node.path))
    for node in found:
        if node.kind is Kind.GENERATOR:
            result.trees[node.path] = read_generator(node.value)
    return result


def _stepped(found: Sequence[Node]) -> list[Node]:
    """The tensors that stand by themselves and that an optimizer steps."""
    alone = [node for node in found if node.kind is Kind.TENSOR]
    opts = [node.value for node in found if isinstance(node.value, Optimizer)] if alone else []
    made = [opt for opt in opts if hasattr(opt, "param_groups")]  # a wrapper's may come later
    ids = {id(p) for optimizer in made for p in optimizers.parameters(optimizer)}
    return [node for node in alone if id(node.value) in ids]


def trained(found: Sequence[Node]) -> list[Node]:
    """The tensors in boxes that are no mere values: leaves, and what an optimizer steps.

    But for what a module of the state has: that is restored with the module.
    """
    if not any(node.kind is Kind.TENSOR for node in found):
        return []
    stepped = {id(node.value) for node in _stepped(found)}
    modules = [node.value for node in found if node.kind is Kind.MODULE]
    owned = {id(p) for module in modules for p in module.parameters()}
    return [
        node
        for node in found
        if node.kind is Kind.TENSOR
        and id(node.value) not in owned
        and ((node.value.requires_grad and node.value.is_leaf) or id(node.value) in stepped)
    ]


def state_of(node: Node) -> Any:
    """The state of a thing that knows its own.

    Raises Unstorable for ``ZeroRedundancyOptimizer``; what else ``state_dict()`` raises goes
    through, with a note that says whose it is.
    """
    if isinstance(node.value, loaded("torch.distributed.optim", "ZeroRedundancyOptimizer")):
        raise Unstorable(
            node.path,
            "torch.distributed.optim.ZeroRedundancyOptimizer",
            "a rank can read only what it has, and its state_dict() wants all on one rank",
            "shard model and optimizer with fully_shard()",
        )
    try:
        return loaders.read(node.value) if node.kind is Kind.LOADER else node.value.state_dict()
    except Exception as error:
        error.add_note(f"handfast: this is what state_dict() of {node.path!r} in the state raised")
        raise


def _add(
    result: Walk, node: Node, tree: object, paths: Sequence[str], tensors: Sequence[Any]
) -> None:
    result.trees[node.path] = tree
    result.paths.extend(paths)
    result.tensors.extend(tensors)


def _split(value: object, path: str) -> tuple[object, list[str], list[Tensor]]:
    found: list[tuple[str, Tensor]] = []
    tree = split(value, path, found)
    return tree, [p for p, _ in found], [t for _, t in found]


def _add_module(result: Walk, node: Node, entries: Mapping[str, Any], paths: Sequence[str]) -> None:
    """A module's tensors; its tree has only what is none, as ``get_extra_state`` gives it."""
    if all_tensors(entries.values()):
        result.paths.extend(paths)
        result.tensors.extend(entries.values())
        return
    extra: Any = result.trees[node.path]
    for path, value in zip(paths, entries.values(), strict=True):
        if isinstance(value, Tensor):
            result.paths.append(path)
            result.tensors.append(value)
        else:
            tree, inner, tensors = _split(value, path)
            extra[path.removeprefix(f"{node.path}/")] = tree
            result.paths.extend(inner)
            result.tensors.extend(tensors)


def _name(signature: object, modules: _Dicts, opts: Sequence[Node], alone: Sequence[Node]) -> Names:
    owners: dict[int, tuple[str, str]] = {}
    paths = []
    for node, entries in modules:
        keys = cleaned(node.value, entries)
        for key, value in zip(keys, entries.values(), strict=True):
            owners.setdefault(id(value), (node.path, child("", key)))
        paths.append([child(node.path, key) for key in keys])
        _refuse_fsdp1(node)
    for node in alone:
        owners.setdefault(id(node.value), (node.path, ""))
    named = [optimizers.name_optimizer(node.path, node.value, owners) for node in opts]
    replicas = [find_replicas(node.value) for node, _ in modules]
    return Names(signature, paths, named, replicas, owners)


def _refuse_fsdp1(node: Node) -> None:
    for name, module in node.value.named_modules():
        if isinstance(module, loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
            raise Unstorable(
                child(node.path, name),
                "torch.distributed.fsdp.FullyShardedDataParallel",
                "reading it takes a blocking collective",
                "shard the model with fully_shard()",
            )


@torch.no_grad()
def capture(
    state: Mapping[str, object],
    *,
    rng: bool = True,
    replicated: Sequence[str] = (),
    extra: object = None,
    grads: bool = False,
    previous: Captured | None = None,
    walked: Walk | None = None,
) -> Captured:
    """Capture a state: a mapping of component names to live things, and boxes of them.

    ``rng`` adds the streams of the process; ``replicated`` are ``fnmatch`` patterns of paths that
    every rank holds alike; ``extra`` is a plain value that goes along; ``grads`` adds the gradients
    of the modules' parameters; ``previous``, a capture of the same state, saves most of the time
    while the structure stays; ``walked`` is the state as it was walked just now.

    Raises Unstorable for what can't be stored, TypeError for a plain value that no dict or list
    holds, and ValueError if two things of the state have one path.
    """
    for name in (RNG, EXTRA, GRADS):
        if name in state:
            raise ValueError(f"state: the name {name!r} is taken: give the component another one")
    found = walked or walk(state, previous.names if previous else None)
    tree, paths, tensors = _split(extra, EXTRA)
    _refuse_parts(paths, tensors)
    found.paths.extend(paths)
    found.tensors.extend(tensors)
    objects: dict[str, object] = {
        name: assemble(value, child("", name), found.trees) for name, value in state.items()
    }
    objects[EXTRA] = tree
    if grads:
        objects[GRADS] = _add_gradients(found)
    owners = found.names.owners
    objects[KINDS] = {node.path: _kind_name(node, owners) for node in found.nodes}
    if rng:
        objects[RNG] = read_streams()  # last: whatever drew from them above has drawn
    return _captured(found, objects, _alike(found, tuple(replicated), grads), previous)


def _refuse_parts(paths: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """``extra`` comes back without a live thing whose mesh could be its own."""
    for path, tensor in zip(paths, tensors, strict=True):
        if is_dtensor(tensor):
            raise Unstorable(
                path,
                "torch.distributed.tensor.DTensor",
                "this rank has only a part of it, and extra= comes back as plain values",
                "put it into a dict of the state, or pass its full_tensor()",
            )


def _alike(found: Walk, declared: tuple[str, ...], grads: bool) -> Alike:
    ddps = list(chain(*found.names.replicas))
    levels = [replica.alike(grads) for replica in ddps]
    opts = [node.value for node in found.nodes if node.kind is Kind.OPTIMIZER]
    return Alike(declared, levels, bool(ddps) and steps_alike(ddps, opts))


def _add_gradients(found: Walk) -> object:
    """Add the gradients of all parameters that modules have, under the parameters' paths."""
    held: dict[int, tuple[str, Tensor]] = {}
    for path, parameter in parameters_of(found):
        if parameter.grad is not None:
            held.setdefault(id(parameter), (path, parameter.grad))
    tree, paths, tensors = _split(dict(held.values()), GRADS)
    found.paths.extend(paths)
    found.tensors.extend(tensors)
    return tree


def parameters_of(found: Walk) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of all modules, by each path that their state has for them.

    By their own names those that no state shows.
    """
    shown = set()
    for path, tensor in zip(found.paths, found.tensors, strict=True):
        if isinstance(tensor, nn.Parameter):
            shown.add(id(tensor))
            yield path, tensor
    for node in (node for node in found.nodes if node.kind is Kind.MODULE):
        if all(id(parameter) in shown for parameter in node.value.parameters()):
            continue
        for name, parameter in node.value.named_parameters():
            if id(parameter) not in shown:
                yield child(node.path, clean(node.value, name)), parameter


def _kind_name(node: Node, owners: optimizers.Owners) -> str:
    """What a restore needs to know: another class would take the state without a word."""
    about = ""
    if node.kind is Kind.SCHEDULER:
        about = _class_name(node.value)
    elif node.kind is Kind.GENERATOR:
        about = generator_class(node.value)
    elif (
        isinstance(node.value, Optimizer)
        and node.kind is Kind.OBJECT
        and hasattr(node.value, "param_groups")
    ):
        # It goes by the order of its parameters.
        names = optimizers.name_parameters(node.value, owners)
        order = [[names[id(p)] for p in group["params"]] for group in node.value.param_groups]
        digest = blake2b(msgspec.msgpack.encode(order), digest_size=4).hexdigest()
        about = f"{type(node.value).__name__}(parameters {digest})"
    return f"{node.kind.value}:{about}" if about else node.kind.value


def _class_name(scheduler: object) -> str:
    """A scheduler's class, and the classes of those that it chains: ``SequentialLR(A, B)``."""
    name, inside = type(scheduler).__name__, getattr(scheduler, "_schedulers", None)
    if not isinstance(inside, list | tuple):
        return name
    return f"{name}({', '.join(map(_class_name, inside))})"


def _captured(
    found: Walk, objects: dict[str, object], alike: Alike, previous: Captured | None
) -> Captured:
    parts, sharded = found.tensors, []
    if any_dtensor(found.tensors):
        dtensor = loaded("torch.distributed.tensor", "DTensor")
        parts = [local(t) if isinstance(t, dtensor) else t for t in found.tensors]
        sharded = [t._spec for t in found.tensors if isinstance(t, dtensor)]
    try:
        pointers = list(map(Tensor.data_ptr, parts))
        shapes = [part.shape for part in parts]
        strides = list(map(Tensor.stride, parts))
    except (RuntimeError, NotImplementedError, ValueError):
        list(map(spec_of, found.paths, found.tensors))  # names the one without memory or shape
        raise
    fingerprint = (  # all that specs, ties and refusals depend on: what is not here goes stale
        found.paths,
        list(map(type, found.tensors)),
        shapes,
        strides,
        [part.dtype for part in parts],
        sharded,
        pointers.count(0),  # empty ones, and those on the meta device
        _shared(pointers, parts),
        alike,
        found.names.replicas,
    )
    if previous is not None and previous.fingerprint == fingerprint:
        kept = previous
        tensors = tuple(compress(parts, kept.stored))
        return replace(kept, tensors=tensors, objects=objects, names=found.names)
    specs = list(map(spec_of, found.paths, found.tensors))
    shared = _replicated(found, specs, alike)
    aliases = _aliases(specs, pointers, parts, shared)
    stored = tuple(spec.path not in aliases for spec in specs)
    return Captured(
        specs=tuple(compress(specs, stored)),
        tensors=tuple(compress(parts, stored)),
        aliases=aliases,
        objects=objects,
        replicated=tuple(sorted(shared.difference(aliases))),
        fingerprint=fingerprint,
        stored=stored,
        names=found.names,
        trained=frozenset(node.path for node in trained(found.nodes)),
    )


def _shared(pointers: Sequence[int], parts: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Which tensors begin where another one does: all that ties can depend on."""
    if len(set(pointers)) == len(pointers):
        return []
    first: dict[int, int] = {}
    return [
        (index, at, *(_look(part) for part in (parts[index], parts[at])))
        for index, pointer in enumerate(pointers)
        if (at := first.setdefault(pointer, index)) != index
    ]


def _look(part: Tensor) -> tuple[object, ...]:
    """What a view makes of the memory that it begins at, besides dtype and shape."""
    return part.stride(), part.is_conj(), part.is_neg()


def _aliases(
    specs: Sequence[TensorSpec],
    pointers: Sequence[int],
    parts: Sequence[Tensor],
    shared: Collection[str],
) -> dict[str, str]:
    """Tied tensors: the very same memory, seen in the same way. Other overlaps are kept apart.

    Of tied paths one that all ranks hold alike is stored, where there is one: other ranks need not
    have the tie. Raises ValueError if two tensors have one path.
    """
    begins = [pointer for pointer in pointers if pointer]  # empty ones are tied to nothing
    if len(set(begins)) == len(begins) and len({spec.path for spec in specs}) == len(specs):
        return {}
    tied: dict[object, list[str]] = {}
    seen: set[str] = set()
    for spec, pointer, part in zip(specs, pointers, parts, strict=True):
        if spec.path in seen:
            raise ValueError(f"state: two tensors have the path {spec.path}: rename one of them")
        seen.add(spec.path)
        memory = (pointer, part.device, spec.dtype, spec.shape, _look(part), spec.offset)
        if part.numel():
            tied.setdefault((memory, spec.global_shape), []).append(spec.path)
    aliases: dict[str, str] = {}
    for paths in tied.values():
        kept = next((path for path in paths if path in shared), paths[0])
        aliases |= {path: kept for path in paths if path != kept}
    return aliases


def _replicated(found: Walk, specs: Sequence[TensorSpec], alike: Alike) -> set[str]:
    """The paths that all ranks probably hold alike, by what they are or by what was declared."""
    known: set[int] = set()
    ddps = chain(*found.names.replicas)
    for replica, (parameters, buffers) in zip(ddps, alike.modules, strict=True):
        known |= replica.parameters if parameters else frozenset()
        known |= replica.buffers if buffers else frozenset()
    state = {
        path
        for own in found.names.optimizers
        for path, owner in zip(own.paths, own.owners, strict=True)
        if alike.state and owner in known
    }
    return {
        spec.path
        for spec, tensor in zip(specs, found.tensors, strict=True)
        if whole_everywhere(tensor)
        or (
            not is_dtensor(tensor)
            and (id(tensor) in known or spec.path in state or matches(spec.path, alike.declared))
        )
    }
