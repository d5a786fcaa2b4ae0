"""Capture: every tensor and every object of a training state, by name, at one moment.

It walks the state itself: ``Module.state_dict()``, ``Optimizer.state`` and ``param_groups``, the
local parts of DTensors, ``state_dict()`` of all else, the random streams last. Nothing is stepped,
created or copied: :func:`~handfast.torch.stage.stage` copies.

What is not captured: buffers that are not persistent, hooks, ``requires_grad``; and gradients,
unless they are asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.errors import Unstorable
from handfast.store.image import TensorSpec
from handfast.store.objects import child
from handfast.torch import loaders, optimizers
from handfast.torch.alike import Replica, ddp_ids, find_replicas, steps_alike
from handfast.torch.kinds import kind_name
from handfast.torch.looks import Look, aliases_of, forms, look
from handfast.torch.names import clean, cleaned, loaded, matches
from handfast.torch.rng import read_generator, read_streams
from handfast.torch.saved import EXTRA, GRADS, KINDS, RNG, UNSYNCED
from handfast.torch.tensors import (
    all_tensors,
    any_dtensor,
    is_dtensor,
    is_still,
    local,
    spec_of,
    whole_everywhere,
)
from handfast.torch.tree import Kind, Node, Tray, assemble, expanded, split, survey

__all__ = ["Captured", "capture", "parameters_of", "state_of", "trained", "walk"]


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A state at one moment. The tensors are live: stage them before the training goes on.

    ``specs`` and ``tensors`` (this rank's local parts) are in one order; ``aliases`` maps the path
    of a tied tensor to the path that is stored. ``objects`` has a plain tree a component, with
    references for tensors. ``replicated`` are the paths that every rank of the job probably holds
    alike, by what it is (DDP, DTensor) or was declared to be. While the structure stays, ``specs``
    is the very same tuple as in the capture before, so that a layout and its views serve again;
    and so are ``looks``, while no tensor has moved or changed its form. ``fixed`` are those parts
    of ``objects`` that are made of names alone, and that nobody changes; ``whole``, one of them, is
    all of the state if that is nothing but tensors. ``trained`` are the paths of tensors in boxes
    that are no mere values, ``still`` those of parameters that nothing trains.
    """

    specs: tuple[TensorSpec, ...]
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    objects: dict[str, Any]
    replicated: tuple[str, ...]
    about: object
    looks: Sequence[Look]
    forms: object
    stored: tuple[bool, ...]
    names: "Names"
    fixed: tuple[object, ...]
    whole: dict[str, object] | None = None
    trained: frozenset[str] = frozenset()
    still: frozenset[str] = frozenset()


class Names(NamedTuple):
    """The names of a walk, kept while the signature stays: they cost more than all else."""

    signature: object
    modules: list[list[str]]
    optimizers: list[optimizers.Names]
    replicas: list[list[Replica]]  # of each module
    owners: optimizers.Owners
    trays: list[Tray]  # without their tensors, which are nobody's to keep


@dataclass(frozen=True)
class Walk:
    """Everything in a state: the tensors by path, and a plain tree for each live thing or tray."""

    found: Sequence[Node | Tray]
    things: list[Node]  # those of them that lie on no tray
    paths: list[str]
    tensors: list[Any]
    trees: dict[str, object]
    names: Names

    @cached_property
    def nodes(self) -> list[Node]:
        """Every live thing, in the state's order."""
        return list(expanded(self.found))


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
    found = survey(state, names.trays if names else ())
    things = [item for item in found if isinstance(item, Node)]
    trays = [item for item in found if isinstance(item, Tray)]
    modules = [(n, n.value.state_dict(keep_vars=True)) for n in things if n.kind is Kind.MODULE]
    opts = [node for node in things if node.kind is Kind.OPTIMIZER]
    alone = _stepped(found)
    signature = (
        [(n.path, list(e), list(map(id, e.values())), ddp_ids(n.value)) for n, e in modules],
        [(node.path, optimizers.signature(node.value)) for node in opts],
        [(node.path, id(node.value)) for node in alone],
        [(tray.path, id(tray.tree)) for tray in trays],
    )
    if names is None or names.signature != signature:
        bare = [tray._replace(tensors=[]) for tray in trays]
        names = _name(signature, modules, opts, alone)._replace(trays=bare)
    result = Walk(found, things, [], [], {}, names)
    for (node, entries), paths, ddps in zip(modules, names.modules, names.replicas, strict=True):
        unsynced = [replica.name for replica in ddps if replica.unsynced]
        result.trees[node.path] = {UNSYNCED: unsynced} if unsynced else {}
        _add_module(result, node, entries, paths)
    for node, own in zip(opts, names.optimizers, strict=True):
        tree, paths, tensors = optimizers.read(node.path, node.value, own)
        _add(result, node, tree, paths, tensors)
    for item in found:
        if isinstance(item, Tray):
            _add(result, item, item.tree, item.paths, item.tensors)
        elif item.kind is Kind.TENSOR:
            _add(result, item, *_split(item.value, item.path))
        elif item.kind not in (Kind.MODULE, Kind.OPTIMIZER, Kind.GENERATOR, *without):
            _add(result, item, *_split(state_of(item), item.path))
    for node in things:
        if node.kind is Kind.GENERATOR:
            result.trees[node.path] = read_generator(node.value)
    return result


def _stepped(found: Sequence[Node | Tray]) -> list[Node]:
    """The tensors that stand by themselves and that an optimizer steps."""
    values = [item.value for item in found if isinstance(item, Node)]
    if len(values) == len(found) and not any(isinstance(value, Tensor) for value in values):
        return []
    opts = [value for value in values if isinstance(value, Optimizer)]
    made = [opt for opt in opts if hasattr(opt, "param_groups")]  # a wrapper's may come later
    ids = {id(p) for optimizer in made for p in optimizers.parameters(optimizer)}
    if not ids:
        return []
    alone = [
        item
        for item in found
        if isinstance(item, Node) or not ids.isdisjoint(map(id, item.tensors))
    ]
    return [n for n in expanded(alone) if n.kind is Kind.TENSOR and id(n.value) in ids]


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
    result: Walk, node: Node | Tray, tree: object, paths: Sequence[str], tensors: Sequence[Any]
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
    return Names(signature, paths, named, replicas, owners, [])


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
    if walked is None:
        walked = walk(state, previous.names if previous else None)
    tree, paths, tensors = _split(extra, EXTRA)
    _refuse_parts(paths, tensors)
    walked.paths.extend(paths)
    walked.tensors.extend(tensors)
    whole = _whole(walked.names)
    objects: dict[str, Any] = (
        dict(whole)
        if whole
        else {name: assemble(value, child("", name), walked.trees) for name, value in state.items()}
    )
    objects[EXTRA] = tree
    if grads:
        objects[GRADS] = _add_gradients(walked)
    objects[KINDS] = _kinds(walked, previous)
    if rng:
        objects[RNG] = read_streams()  # last: whatever drew from them above has drawn
    return _captured(walked, objects, _alike(walked, tuple(replicated), grads), previous)


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
    opts = [node.value for node in found.things if node.kind is Kind.OPTIMIZER]
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
    for node in (node for node in found.things if node.kind is Kind.MODULE):
        if all(id(parameter) in shown for parameter in node.value.parameters()):
            continue
        for name, parameter in node.value.named_parameters():
            if id(parameter) not in shown:
                yield child(node.path, clean(node.value, name)), parameter


def _kinds(found: Walk, previous: Captured | None) -> dict[str, str]:
    """The kind of each live thing: the very dict of the capture before, if they are the same."""
    owners, trays = found.names.owners, found.names.trays
    now = {node.path: kind_name(node, owners) for node in found.things}
    if previous is not None and previous.names is found.names:
        before: dict[str, str] = previous.objects[KINDS]
        count = len(now) + sum(len(tray.paths) for tray in trays)
        if count == len(before) and now.items() <= before.items():
            return before
    return {node.path: now.get(node.path, node.kind.value) for node in found.nodes}


def _fixed(names: Names, kinds: object) -> tuple[object, ...]:
    """What is made of names alone, and is the very same object while the names stay."""
    trees: list[Any] = [tray.tree for tray in names.trays]
    own = names.optimizers
    tables = chain.from_iterable((*one.groups, one.tensors, one.placed) for one in own)
    return kinds, *trees, *tables


def _whole(names: Names) -> Any:
    """The tree of a state that is nothing but tensors, else None."""
    return next((tray.tree for tray in names.trays if not tray.path), None)


def _captured(
    found: Walk, objects: dict[str, Any], alike: Alike, previous: Captured | None
) -> Captured:
    parts, sharded = found.tensors, []
    if any_dtensor(found.tensors):
        dtensor = loaded("torch.distributed.tensor", "DTensor")
        parts = [local(t) if isinstance(t, dtensor) else t for t in found.tensors]
        sharded = [t._spec for t in found.tensors if isinstance(t, dtensor)]
    try:
        looks = look(parts, previous.looks if previous else ())
    except (RuntimeError, NotImplementedError, ValueError):
        list(map(spec_of, found.paths, found.tensors))  # names the one without memory or shape
        raise
    if previous is not None and previous.names is found.names and previous.looks is not looks:
        found = _renamed(found)
    # With what it looks like, this is all that specs, ties and refusals depend on: what is missing
    # here goes stale.
    about = (found.paths, list(map(type, found.tensors)), sharded, alike, found.names.replicas)
    kept = previous if previous is not None and previous.about == about else None
    if kept is None or kept.looks is not looks:
        seen = forms(looks, parts)
        if kept is None or kept.forms != seen:
            return _planned(found, objects, alike, parts, (about, looks, seen))
    fixed = kept.fixed
    if kept.names is not found.names or kept.objects[KINDS] is not objects[KINDS]:
        fixed = _fixed(found.names, objects[KINDS])
    tensors = tuple(compress(parts, kept.stored))
    return replace(
        kept,
        tensors=tensors,
        objects=objects,
        names=found.names,
        looks=looks,
        fixed=fixed,
        whole=_whole(found.names),
    )


def _renamed(found: Walk) -> Walk:
    """A walk whose tensors were moved or changed: what names say of optimizers hangs on that."""
    opts = [node for node in found.things if node.kind is Kind.OPTIMIZER]
    named = [optimizers.name_optimizer(n.path, n.value, found.names.owners) for n in opts]
    if named == found.names.optimizers:
        return found
    for node, own in zip(opts, named, strict=True):
        tree: Any = found.trees[node.path]
        tree |= {"tensors": own.tensors, "placed": own.placed}
    return replace(found, names=found.names._replace(optimizers=named))


def _planned(
    found: Walk,
    objects: dict[str, Any],
    alike: Alike,
    parts: Sequence[Tensor],
    known: tuple[object, Sequence[Look], object],
) -> Captured:
    """A capture of a structure that is not the one before."""
    about, looks, seen = known
    specs = list(map(spec_of, found.paths, found.tensors))
    shared = _replicated(found, specs, alike)
    aliases = aliases_of(specs, looks, parts, shared)
    stored = tuple(spec.path not in aliases for spec in specs)
    return Captured(
        specs=tuple(compress(specs, stored)),
        tensors=tuple(compress(parts, stored)),
        aliases=aliases,
        objects=objects,
        replicated=tuple(sorted(shared.difference(aliases))),
        about=about,
        looks=looks,
        forms=seen,
        stored=stored,
        names=found.names,
        fixed=_fixed(found.names, objects[KINDS]),
        whole=_whole(found.names),
        trained=frozenset(node.path for node in trained(found.nodes)),
        still=frozenset(s.path for s, t in zip(specs, found.tensors, strict=True) if is_still(t)),
    )


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
