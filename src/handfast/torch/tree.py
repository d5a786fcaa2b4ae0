"""The user's state as a tree: what lives in it, and what is merely a value.

Live things (modules, optimizers, generators, tensors, objects with ``state_dict``) are restored in
place. Dicts and lists are boxes: they may hold live things and plain values, and are updated in
place too. A plain value can't be changed in place, so it may stand only inside of a dict or list.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.errors import Unstorable
from handfast.store.objects import DEPTH_LIMIT, TensorRef, child
from handfast.torch.hooks import is_own
from handfast.torch.rng import is_generator
from handfast.torch.tensors import PLAIN, dims_of

__all__ = [
    "Kind",
    "Node",
    "Tray",
    "above",
    "alike",
    "assemble",
    "join",
    "kind_of",
    "nodes",
    "split",
    "survey",
]


class Kind(StrEnum):
    """What a live thing is; it decides how it is captured, and when it is restored."""

    MODULE = "module"
    OPTIMIZER = "optimizer"
    SCHEDULER = "scheduler"
    SCALER = "scaler"
    LOADER = "loader"
    OBJECT = "object"
    GENERATOR = "generator"
    TENSOR = "tensor"

    @property
    def restored_by(self) -> str:
        """The way in which it is restored: kinds that share one can stand for each other."""
        asked = (Kind.SCHEDULER, Kind.SCALER, Kind.LOADER, Kind.OBJECT)
        return "load_state_dict" if self in asked else self.value


class Node(NamedTuple):
    """A live thing and where it stands."""

    path: str
    kind: Kind
    value: Any


class Tray(NamedTuple):
    """A box that holds nothing but plain tensors, with all that follows from its keys alone.

    There may be ten thousand of them: they are looked at together, and named once. ``tree`` is the
    box with a reference for each tensor.
    """

    path: str
    kind: type
    keys: list[Any]
    paths: list[str]
    tree: object
    tensors: list[Tensor]

    def nodes(self) -> Iterator[Node]:
        """Each of them as a live thing of its own."""
        return map(Node, self.paths, repeat(Kind.TENSOR), self.tensors)


_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_BARE = (dict, OrderedDict, list, tuple)
_SEQUENCES = (list, tuple, deque)


def kind_of(value: object) -> Kind | None:
    """The kind of a live thing; None for boxes and plain values.

    An optimizer whose class has a ``state_dict`` or ``load_state_dict`` of its own, or that has
    hooks on them, keeps more than torch's do, makes more of it, or shares it out in its own way:
    that one is an object like any other.
    """
    if isinstance(value, nn.Module):
        return Kind.MODULE
    if isinstance(value, Tensor):
        return Kind.TENSOR
    if is_generator(value):
        return Kind.GENERATOR
    if isinstance(value, type) or not (
        callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    ):
        return None
    if isinstance(value, Optimizer) and _is_plain(value):
        return Kind.OPTIMIZER
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return Kind.SCHEDULER
    if isinstance(value, torch.amp.GradScaler):
        return Kind.SCALER
    return Kind.LOADER if hasattr(type(value), "__iter__") else Kind.OBJECT


_OPTIMIZER_HOOKS = tuple(
    f"_optimizer_{call}_{when}_hooks"
    for call in ("state_dict", "load_state_dict")
    for when in ("pre", "post")
)


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether its state is all that torch's own optimizers have."""
    own = (type(optimizer).state_dict, type(optimizer).load_state_dict)
    return own == (Optimizer.state_dict, Optimizer.load_state_dict) and not any(
        not is_own(hook)
        for hooks in _OPTIMIZER_HOOKS
        for hook in getattr(optimizer, hooks, {}).values()
    )


def entries(box: Any) -> Iterable[tuple[object, Any]]:
    """The keys or indices of a box, with what they hold; nothing for any other value."""
    if type(box) in _MAPPINGS:
        items: Iterable[tuple[object, Any]] = box.items()
        return items
    return enumerate(box) if type(box) in _SEQUENCES else ()


def nodes(state: Mapping[str, object]) -> list[Node]:
    """Every live thing of a state, in its order.

    Raises TypeError for a plain value that no dict or list holds, or a component without a name,
    and ValueError if a live thing has the path of another one, or of a plain value: each would be
    given the other's state.
    """
    return list(expanded(survey(state)))


def expanded(found: Iterable[Node | Tray]) -> Iterator[Node]:
    """The live things of a survey, each by itself."""
    return chain.from_iterable(
        item.nodes() if isinstance(item, Tray) else (item,) for item in found
    )


def survey(state: Mapping[str, object], known: Iterable[Tray] = ()) -> list[Node | Tray]:
    """Every live thing of a state as :func:`nodes` gives them, boxes of tensors as one.

    ``known`` are trays of an earlier survey, whose names serve again while the keys are the same.
    """
    names: Iterable[Any] = state
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"a component's name must be a string that is not empty, not {name!r}")
    look = _Survey({tray.path: tray for tray in known})
    if look.is_tray("", dict(state)):
        return look.found
    for name, value in state.items():
        look.visit(child("", name), value, False, 1)
    if len(look.seen) < look.seen.total():
        twice = [node.path for node in expanded(look.found) if look.seen[node.path] > 1]
        if twice:
            raise ValueError(f"state: two things have the path {twice[0]}: rename one of them")
    return look.found


class _Survey:
    """A survey under way."""

    def __init__(self, known: Mapping[str, Tray]) -> None:
        self.found: list[Node | Tray] = []
        self.seen: Counter[str] = Counter()
        self._known = known

    def visit(self, path: str, value: object, replaceable: bool, depth: int) -> None:
        kind = kind_of(value)
        self.seen[path] += 1
        if kind is not None:
            self.found.append(Node(path, kind, value))
        elif type(value) in _MAPPINGS or type(value) in _SEQUENCES:
            _check_depth(path, value, depth)
            _check_living(path, value)
            if not self.is_tray(path, value):
                inside = type(value) is not tuple or replaceable
                for key, item in entries(value):
                    self.visit(child(path, key), item, inside, depth + 1)
        elif not replaceable:
            raise TypeError(_no_place(path, value))

    def is_tray(self, path: str, box: Any) -> bool:
        """Whether a box holds nothing but plain tensors, and is nothing besides: then it is found.

        Its names are those of an earlier survey, if they fit.
        """
        if type(box) not in _BARE or not box:
            return False
        keyed = type(box) in _MAPPINGS
        tensors = list(box.values() if keyed else box)
        if not set(map(type, tensors)) <= PLAIN:
            return False
        keys = list(box) if keyed else list(range(len(tensors)))
        known = self._known.get(path)
        if known is not None and known.kind is type(box) and _same_keys(known.keys, keys):
            tray = known._replace(tensors=tensors)
        else:
            named: list[tuple[str, Tensor]] = []
            tree = split(box, path, named)
            tray = Tray(path, type(box), keys, [at for at, _ in named], tree, tensors)
        self.found.append(tray)
        self.seen.update(tray.paths)
        return True


def _same_keys(before: list[Any], keys: list[Any]) -> bool:
    # True and 1 are equal, and so are tuples of them, and are different keys in an image.
    kinds = list(map(type, keys))
    return before == keys and kinds == list(map(type, before)) and set(kinds) <= {str, int}


def above(paths: Iterable[str]) -> frozenset[str]:
    """The paths of all boxes that hold something at one of these paths."""
    found: set[str] = set()
    for path in paths:
        at = holder(path)
        while at is not None and at not in found:  # else those above it are in, too
            found.add(at)
            at = holder(at)
    return frozenset(found)


def holder(path: str) -> str | None:
    """The path of the box that holds what is at a path; None of a whole component."""
    cut = max(path.rfind("/"), path.rfind("["))
    return path[:cut] if cut >= 0 else None


def refers(tree: object) -> bool:
    """Whether a saved tree has tensors in it."""
    return isinstance(tree, TensorRef) or any(refers(item) for _, item in entries(tree))


def alike(one: object, other: object) -> bool:
    """Whether a box can be filled in place with what is in another one."""
    kinds = {type(one), type(other)}
    return kinds <= {*_MAPPINGS} or kinds <= {list, deque}


def in_place(live: object, saved: object, *, placed: bool, alive: bool) -> bool:
    """Whether a live box stays, and is filled with what was saved, or a saved one takes its place.

    ``placed``: what holds it could take another one; ``alive``: live things are in it.
    """
    if type(live) is type(saved):
        return type(live) in _MAPPINGS or type(live) in _SEQUENCES
    return alike(live, saved) and (alive or not placed)


def _check_living(path: str, box: Any) -> None:
    """Refuse the habit of torch.save: an optimizer's state_dict() is nothing that is stepped.

    A fresh one is empty, and a restore into it would leave the optimizer as it is, without a word.
    """
    if isinstance(box, dict) and box.keys() == {"state", "param_groups"}:
        raise TypeError(
            f"state: {path} is an optimizer's state_dict(), a copy that nothing trains. What to "
            "do: give the optimizer itself, and the model instead of its state_dict()"
        )


def _no_place(path: str, value: object) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return (
        f"state: {path} is a {kind}, which a restore can't change in place. What to do: give the "
        "object state_dict() and load_state_dict(), keep the value in a dict or list that the "
        "training reads it from, or pass it to save() as extra= (a plain DataLoader has no "
        "position to save: torchdata's StatefulDataLoader has)"
    )


def _check_depth(path: str, value: object, depth: int) -> None:
    if depth > DEPTH_LIMIT:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise Unstorable(path, kind, f"it is nested in more than {DEPTH_LIMIT} levels")


def assemble(value: object, path: str, trees: Mapping[str, object]) -> object:
    """A box as plain values: each live thing inside is replaced by its entry in ``trees``."""
    if path in trees:
        return trees[path]
    if type(value) not in _MAPPINGS and type(value) not in _SEQUENCES:
        return value
    return _rebuilt(value, lambda key, item: assemble(item, child(path, key), trees))


def split(value: object, path: str, found: list[tuple[str, Tensor]], depth: int = 1) -> object:
    """A tree with each tensor replaced by a reference; the tensors are added to ``found``."""
    if isinstance(value, Tensor):
        found.append((path, value))
        return TensorRef(path, dims_of(value))
    if type(value) not in _MAPPINGS and type(value) not in _SEQUENCES:
        return value
    _check_depth(path, value, depth)
    return _rebuilt(value, lambda key, item: split(item, child(path, key), found, depth + 1))


def join(tree: object, fetch: Callable[[TensorRef], Tensor]) -> object:
    """The inverse of :func:`split`: each reference becomes the tensor that ``fetch`` makes."""
    if isinstance(tree, TensorRef):
        return fetch(tree)
    if type(tree) not in _MAPPINGS and type(tree) not in _SEQUENCES:
        return tree
    return _rebuilt(tree, lambda _, item: join(item, fetch))


def _rebuilt(box: Any, change: Callable[[object, object], object]) -> object:
    """A box of the same type whose items went through ``change(key, item)``."""
    changed = {key: change(key, item) for key, item in entries(box)}
    if type(box) is defaultdict:
        return defaultdict(box.default_factory, changed)
    if type(box) is deque:
        return deque(changed.values(), box.maxlen)
    if type(box) in _MAPPINGS:
        return type(box)(changed)
    return type(box)(changed.values())
