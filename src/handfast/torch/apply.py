"""Restore: saved values put into the live state, in place and in one order.

Tensors first, then optimizers, schedulers, scalers, loaders, the user's own objects and boxes; the
generators and the random streams last, after each loader's ``state_dict()`` was read back and
compared, because reading torchdata's draws a seed.
"""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, repeat
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.errors import HandfastError, Poisoned, Unstorable
from handfast.store import objects
from handfast.store.objects import TensorRef, child
from handfast.torch import loaders, optimizers
from handfast.torch.alike import ddp_modules
from handfast.torch.capture import Names, Walk, state_of, trained, walk
from handfast.torch.garbage import uncollected
from handfast.torch.gradients import drop_gradients, restore_gradients
from handfast.torch.hooks import is_own
from handfast.torch.memory import UNNAMED, Memory, Remade, bytes_of
from handfast.torch.names import is_torchs, matches
from handfast.torch.rng import write_generator, write_streams
from handfast.torch.saved import EXTRA, RNG, UNSYNCED, Saved, Source, Values
from handfast.torch.tensors import HOST, dims_of, is_dtensor, local, place_of
from handfast.torch.tree import Kind, Node, above, entries, in_place, kind_of, refers

__all__ = ["apply", "live_tensors", "look", "placed"]

_LOG = logging.getLogger("handfast")

_BY_STATE_DICT = (Kind.SCHEDULER, Kind.SCALER, Kind.LOADER, Kind.OBJECT)
"""The kinds that are restored by their own ``load_state_dict``, in the order of the restore."""

OTHERWISE: Final = "reads back as another value"
LATE: Final = (
    "If it takes its state up only when it is iterated, all is well: let its state_dict() give "
    "what load_state_dict() was given until then. Else data will be repeated or skipped"
)


@torch.inference_mode(False)  # what is made here must serve steps outside of that mode, too
@torch.no_grad()
def apply(
    state: Mapping[str, object],
    saved: Saved,
    values: Values,
    *,
    only: Sequence[str] = ("**",),
    keep_live: Sequence[str] = (),
    given: Mapping[Optimizer, optimizers.Given] = MappingProxyType({}),
    names: Names | None = None,
) -> object:
    """Put a saved state in place; gives what was saved as ``extra``.

    ``values`` has the values of each stored path; nothing that stays in the live state aliases
    them. Hold the two sides against each other with ``differences`` before: what
    only one side has is left alone here. ``only`` are patterns of paths. ``keep_live`` names
    hyperparameters by key (``lr``), or entries of optimizers, schedulers and other objects by path
    (``scheduler/base_lrs``), that keep their live values. ``given`` are the keys that optimizers'
    groups had before the training began: those that came since and were not saved are dropped.
    ``names`` of an earlier walk save time while they still fit.

    Raises Poisoned if anything went wrong on the way: the live state is then of no epoch, as it is
    after a KeyboardInterrupt, which goes through.
    """
    where = "the live state"
    try:
        with uncollected():  # not where things load themselves: a loader may read data for minutes
            restore = _begin(state, saved, values, only, keep_live, names)
            live, trees, source = restore.live, restore.trees, restore.source
            where = "the tensors"
            restore.tensors()
            opts = [node.path for node in live.nodes if node.kind is Kind.OPTIMIZER]
            named = dict(zip(opts, live.names.optimizers, strict=True))
            for node in restore.of(Kind.OPTIMIZER):
                where = node.path
                restore.optimizer(node, named[node.path].parameters, given.get(node.value))
        drop_gradients(live, restore.of(Kind.OPTIMIZER, Kind.OBJECT, Kind.SCALER), source, only)
        restore_gradients(live, source, only)
        for node in restore.of(*_BY_STATE_DICT):
            where = node.path
            restore.thing(node)
        where = "the plain values"
        restore.boxes(state)
        for node in restore.of(Kind.LOADER, Kind.OBJECT):
            where = node.path
            restore.read_back(node)
        for node in restore.of(Kind.GENERATOR):
            where = node.path
            write_generator(node.value, trees[node.path])
        where = RNG
        if RNG in saved.objects and matches(RNG, only):
            for left in write_streams(saved.objects[RNG]):
                _LOG.warning("%s", left)
        where = EXTRA
        return source.parts(saved.objects.get(EXTRA))
    except Exception as error:
        raise Poisoned(
            f"the restore stopped at {where}: {error!r}. The live state is of no epoch now. What "
            "to do: mend the cause and do it again, or start the process anew"
        ) from error


def _begin(
    state: Mapping[str, object],
    saved: Saved,
    values: Values,
    only: Sequence[str],
    keep_live: Sequence[str],
    names: Names | None,
) -> "_Restore":
    live, source = look(state, saved, values, names)
    trees: dict[str, object] = {}
    _pair(state, saved.objects, "", saved.kinds, trees)
    standing: dict[str, Tensor] = {}
    owned = _owned(live)
    made = Remade(source, standing, _memory(live, trees, owned, only))
    return _Restore(live, trees, owned, source, only, keep_live, made, standing)


def look(
    state: Mapping[str, object], saved: Saved, values: Values, names: Names | None = None
) -> tuple[Walk, Source]:
    """The live state, and the saved one as it is to be made there.

    A loader's state is about to be replaced, and reading it may start its workers.
    """
    live = walk(state, names, without=frozenset({Kind.LOADER}))
    return live, placed(live, saved, values)


def placed(live: Walk, saved: Saved, values: Values) -> Source:
    """A saved state as it is to be made in a live one, which was walked without its loaders."""
    places = {
        path: place_of(tensor)
        for path, tensor in zip(live.paths, live.tensors, strict=True)
        if is_dtensor(tensor) or not tensor.is_cpu  # all others are where HOST is
    }
    opts = [node.value for node in live.nodes if isinstance(node.value, Optimizer)]
    known = chain(live.tensors, chain.from_iterable(map(optimizers.parameters, opts)))
    meshed = [(tuple(tensor.shape), place_of(tensor)) for tensor in known if is_dtensor(tensor)]
    return Source(saved, values, places, meshed)


def _pair(
    live: object, saved: object, path: str, kinds: Mapping[str, str], trees: dict[str, object]
) -> None:
    """Find the saved tree of each live thing, if a thing was saved there."""
    if path and kind_of(live) is not None:
        if path in kinds:
            trees[path] = saved
        return
    before = dict(entries(saved))
    for key, item in live.items() if isinstance(live, Mapping) else entries(live):
        if key in before:
            _pair(item, before[key], child(path, key), kinds, trees)


def live_tensors(live: Walk) -> dict[str, Tensor]:
    """The live tensors that are filled in place, by path: of modules, and those by themselves."""
    found = {node.path: node.value for node in live.nodes if node.kind is Kind.TENSOR}
    own = set(chain.from_iterable(_owned(live).values()))
    held = dict(zip(live.paths, live.tensors, strict=True))
    paths = chain.from_iterable(live.names.modules)
    return found | {p: held[p] for p in paths if p in held and id(held[p]) in own}


def _owned(live: Walk) -> dict[str, dict[int, Tensor]]:
    """The parameters and buffers of each module, by its path and their ids."""
    modules = {node.path: node.value for node in live.nodes if node.kind is Kind.MODULE}
    return {
        path: {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
        for path, module in modules.items()
    }


def _memory(
    live: Walk,
    trees: Mapping[str, object],
    owned: Mapping[str, Mapping[int, Tensor]],
    only: Sequence[str],
) -> Memory:
    """What optimizers' state must not be copied over: all but what is restored of them.

    The tensors of modules, those that no name leads to as well, and those by themselves; of objects
    what their state shows; of optimizers that are not restored all.
    """
    restored = tuple(
        f"{node.path}/"
        for node in live.nodes
        if node.kind is Kind.OPTIMIZER and node.path in trees and matches(node.path, only)
    )
    if not restored:
        return Memory()  # nothing will be claimed of it
    held = [
        (path, tensor)
        for path, tensor in zip(live.paths, live.tensors, strict=True)
        if not path.startswith(restored)
    ]
    shown = {id(tensor) for _, tensor in held}
    every = chain.from_iterable(own.values() for own in owned.values())
    unnamed = [tensor for tensor in every if id(tensor) not in shown]
    memory = Memory([*live.tensors, *unnamed])
    for path, tensor in chain(held, zip(repeat(UNNAMED), unnamed)):
        memory.hold(path, tensor)
    return memory


class _Restore(NamedTuple):
    """One restore: the live state as it was walked, and what is to become of it."""

    live: Walk
    trees: Mapping[str, object]
    owned: Mapping[str, Mapping[int, Tensor]]  # what each module has, by id
    source: Source
    only: Sequence[str]
    keep_live: Sequence[str]
    made: Remade
    standing: dict[str, Tensor]  # what was filled for itself, by the path that is stored

    def of(self, *kinds: Kind) -> list[Node]:
        """The live things of these kinds that are to be restored, in the order of the kinds."""
        return [
            node
            for kind in kinds
            for node in self.live.nodes
            if node.kind is kind and node.path in self.trees and matches(node.path, self.only)
        ]

    def tensors(self) -> None:
        """Copy into modules and plain tensors; the rest of a module goes through its own door."""
        modules = [node for node in self.live.nodes if node.kind is Kind.MODULE]
        for node, paths in zip(modules, self.live.names.modules, strict=True):
            self._module(node, paths)
        self._copy([(n.path, n.value) for n in self.live.nodes if n.kind is Kind.TENSOR])
        torch.clear_autocast_cache()  # casts of what the weights were

    def _copy(self, pairs: Sequence[tuple[str, Any]]) -> None:
        specs, aliases = self.source.saved.specs, self.source.saved.aliases
        stored = [(aliases.get(p, p), tensor) for p, tensor in pairs if matches(p, self.only)]
        found = [(kept, tensor) for kept, tensor in stored if kept in specs]
        self.source.values.fill([(local(tensor), kept) for kept, tensor in found])
        self.standing.update(found)

    def _module(self, node: Node, paths: Sequence[str]) -> None:
        module = node.value
        held = module.state_dict(keep_vars=True)
        own = self.owned[node.path]
        keys = dict(zip(paths, held, strict=True))
        self._copy([(path, held[key]) for path, key in keys.items() if id(held[key]) in own])
        given: dict[str, object] = {}
        chosen = {path: key for path, key in keys.items() if matches(path, self.only)}
        for path, key in chosen.items():
            if id(held[key]) in own:
                continue
            if isinstance(held[key], Tensor):
                if self.source.saved.spec(path):
                    given[key] = self.source.tensor(path, place_of(held[key]))
            elif (name := path.removeprefix(f"{node.path}/")) in self._extra(node):
                given[key] = self.source.tree(self._extra(node)[name])
        if given or (chosen and _told_of_loads(module)):
            # Hooks or get_extra_state() made these, so only load_state_dict() knows where they
            # belong; live tensors are given as themselves. In place, for the keys' versions.
            held.update(given)
            mode = any(map(Tensor.is_inference, own.values()))
            with torch.inference_mode(mode), torch.no_grad():
                _load(module, held, given)
        for name, ddp in ddp_modules(module) if chosen else ():
            # Whether rank 0's buffers win at the next forward pass is part of the moment.
            ddp.require_forward_param_sync = name not in self._extra(node).get(UNSYNCED, ())

    def _extra(self, node: Node) -> Mapping[str, Any]:
        tree = self.trees.get(node.path)
        return tree if isinstance(tree, dict) else {}

    def boxes(self, state: Mapping[str, object]) -> None:
        """Put the saved boxes of plain values, and of things, into the live ones."""
        saved = self.source.saved
        kept = frozenset(id(node.value) for node in trained(self.live.nodes))
        merge = _Merge(self.made, self.only, _beyond(saved.kinds), kept)
        for name, value in state.items():
            if kind_of(value) is None and name in saved.objects:
                merge.box(value, saved.objects[name], child("", name), placed=False)
        self.made.fill()

    def optimizer(self, node: Node, names: Mapping[int, str], given: optimizers.Given) -> None:
        """Put an optimizer in place, and say once which hyperparameters were replaced."""
        tree: Any = self.trees[node.path]
        late = optimizers.drop_late(node.path, node.value, tree, given, self.keep_live)
        if late:
            _LOG.warning(
                "hyperparameters that came after the saved moment (keep_live= keeps them): %s",
                "; ".join(late),
            )
        changed = optimizers.write(
            node.path, node.value, names, tree, self.source, self.made, self.keep_live
        )
        if changed:
            _LOG.warning(
                "saved hyperparameters replaced live ones (keep_live= reverses it): %s",
                "; ".join(changed),
            )

    def thing(self, node: Node) -> None:
        """Restore by ``load_state_dict``, on a tree that is its own to keep."""
        if node.kind is Kind.SCALER and not self.trees[node.path]:
            return  # it was disabled, and an enabled one takes no state of such a one
        places = self.source.places
        tree = self.source.tree(self.trees[node.path], lambda path: places.get(path, HOST))
        if self.keep_live and isinstance(tree, dict):
            now = state_of(node)
            kept = [k for k in tree if k in now and matches(child(node.path, k), self.keep_live)]
            tree |= {key: now[key] for key in kept}
        if node.kind is not Kind.LOADER:
            node.value.load_state_dict(tree)
            return
        if loaders.iterated(node.value):
            _LOG.warning(
                "%s has an iterator that was made before: it goes on where it "
                "is, and repeats or skips data. What to do: call iter(loader) after restore() or "
                "guard.load()",
                node.path,
            )
        loaders.load(node.value, tree)

    def read_back(self, node: Node) -> None:
        """Ask for the state that was just loaded: a loader elsewhere repeats or skips data."""
        if any(matches(pattern, (node.path,)) for pattern in self.keep_live):
            return
        wanted = self.trees[node.path]
        if node.kind is Kind.LOADER and loaders.not_begun(wanted):
            return
        unlike = [
            path
            for path in _unlike(wanted, node.value.state_dict(), node.path, self.source)
            if not loaders.of_sampler(node.value, path)
        ]
        if node.kind is not Kind.LOADER:
            if unlike:
                _LOG.warning("%s %s than was loaded", unlike[0], OTHERWISE)
            return
        for path in unlike:
            if not loaders.of_dataset(path.removeprefix(node.path)):
                raise HandfastError(f"{path} {OTHERWISE} than the one it was given. {LATE}")
        if unlike:
            _LOG.warning("%s %s than was loaded. %s", unlike[0], OTHERWISE, LATE)
        loaders.may_begin(node.value, self.source.tree(wanted), node.path)


def _told_of_loads(module: nn.Module) -> bool:
    """Whether something is made of what is loaded, such as a buffer that is not saved.

    By hooks, or by methods that are not torch's own.
    """
    if not is_torchs(type(module).load_state_dict):
        return True
    return any(
        not all(map(is_own, getattr(part, "_load_state_dict_post_hooks", {}).values()))
        or not is_torchs(type(part)._load_from_state_dict)
        or not all(
            is_torchs(hook) or is_own(hook)
            for hook in getattr(part, "_load_state_dict_pre_hooks", {}).values()
        )
        for part in module.modules()
    )


def _load(module: nn.Module, held: dict[str, Any], given: Mapping[str, object]) -> None:
    """Let a module load, by a method that may be the user's own, and may know no ``strict``.

    What its own ``state_dict()`` leaves out is not missed; what was saved has to be taken.
    """
    knows = inspect.signature(module.load_state_dict).parameters
    lenient = "strict" in knows or any(p.kind is p.VAR_KEYWORD for p in knows.values())
    result: Any = module.load_state_dict(held, **({"strict": False} if lenient else {}))
    left = given.keys() & set(getattr(result, "unexpected_keys", None) or ())
    if left:
        raise HandfastError(f"the module did not take {', '.join(sorted(left))}")


def _unlike(wanted: Any, found: Any, path: str, source: Source) -> Iterator[str]:
    """The paths at which a saved tree and a live one differ; tensors by cuts and bytes."""
    if isinstance(wanted, TensorRef):
        there = isinstance(found, Tensor) and wanted.dims in ((), dims_of(found))
        if not (there and _same_bytes(source.view(wanted.path), found)):
            yield path
        return
    before, after = dict(entries(wanted)), dict(entries(found))
    if type(wanted) is not type(found) or before.keys() != after.keys():
        yield path
        return
    for key, item in before.items():
        yield from _unlike(item, after[key], child(path, key), source)
    # What was pickled by wish need not know equality.
    with contextlib.suppress(Unstorable):
        if not before and objects.encode(wanted) != objects.encode(found):
            yield path


def _same_bytes(wanted: Tensor, found: Tensor) -> bool:
    here = local(found).cpu()
    if (here.dtype, here.shape) != (wanted.dtype, wanted.shape):
        return False
    return torch.equal(*map(bytes_of, (wanted, here)))


class _Merge(NamedTuple):
    """Saved boxes put into live ones; ``differences`` has seen to it that they fit.

    ``beyond`` are paths at which nothing can be made anew, ``trained`` the ids of tensors that
    don't give way to other values.
    """

    made: Remade
    only: Sequence[str]
    beyond: frozenset[str]
    trained: frozenset[int]

    def box(self, live: Any, saved: Any, path: str, *, placed: bool = True) -> Any:
        """What belongs at a place: boxes updated in place, live things as they are, saved values.

        ``placed``: what holds the box could take another one.
        """
        if kind_of(live) is not None:
            return live if isinstance(saved, TensorRef) else self._value(live, saved, path, placed)
        mapping = isinstance(live, MutableMapping)
        alive = type(live) is not type(saved) and _holds_live(live)
        if not in_place(live, saved, placed=placed, alive=alive):
            # tensors on both sides stand in each other's way: that was refused
            both = alive and refers(saved)
            return live if both else self._value(live, saved, path, placed)
        now, before = dict(entries(live)), dict(entries(saved))
        merged: dict[object, Any] = {}
        for key in {**before, **now}:
            where = child(path, key)
            if key not in before:
                # the end of a list goes, but for what does not give way
                stays = _holds_live(now[key]) if mapping else self._bound(now[key])
                if stays or not matches(where, self.only):
                    merged[key] = now[key]
            elif key in now:
                inside = placed or not isinstance(live, tuple)
                merged[key] = self.box(now[key], before[key], where, placed=inside)
            elif matches(where, self.only):
                if (not mapping and key != len(merged)) or where in self.beyond:
                    _LOG.warning("%s has no place in the live state", where)
                    continue
                merged[key] = self.made.tree(before[key])
        limit = getattr(live, "maxlen", None)
        if limit is not None and limit < len(merged):
            _LOG.warning("%s takes the last %d only", path, limit)
        return _filled(live, merged, now)

    def _value(self, live: Any, saved: Any, path: str, placed: bool) -> Any:
        """The saved value, where it can be put, and what stands there gives way."""
        free = placed and path not in self.beyond and matches(path, self.only)
        return self.made.tree(saved) if free and not self._bound(live) else live

    def _bound(self, value: Any) -> bool:
        """Whether something in it is no mere value: a thing, or a tensor that is trained."""
        kind = kind_of(value)
        if kind is not None:
            return kind is not Kind.TENSOR or id(value) in self.trained
        return any(self._bound(item) for _, item in entries(value))


def _filled(live: Any, merged: dict[object, Any], now: Mapping[object, Any]) -> Any:
    """The box with what was merged for it: a tuple anew, if anything in it is another."""
    if isinstance(live, tuple):
        same = len(merged) == len(live) and all(merged[i] is item for i, item in now.items())
        return live if same else tuple(merged.values())
    live.clear()
    if isinstance(live, MutableMapping):
        live.update(merged)
    else:
        live.extend(merged.values())
    return live


def _beyond(kinds: Mapping[str, str]) -> frozenset[str]:
    """Where things were saved, or below, that can't be made anew: a module, say."""
    paths = [path for path, kind in kinds.items() if kind != Kind.TENSOR]
    return above(paths).union(paths)


def _holds_live(value: object) -> bool:
    return kind_of(value) is not None or any(_holds_live(item) for _, item in entries(value))
