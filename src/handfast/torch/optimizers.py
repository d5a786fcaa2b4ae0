"""Optimizers by the names of their parameters.

Neither ``Optimizer.state_dict`` (parameters by position) nor DCP's ``get_optimizer_state_dict``
(it steps an optimizer that has no state yet) is used to read, nor ``Optimizer.load_state_dict`` to
write: it aliases what it is given, and casts fp32 moments of bf16 parameters to bf16.

The tree of an optimizer has these keys: ``param_groups``, with names for parameters; ``tensors``,
which lists with each set of state keys the parameters that have a tensor under each of them, at
``state/NAME/KEY``; ``placed``, the sharding of state tensors that are not sharded as their
parameter is; ``state``, what is no tensor; ``other``, state that belongs to no parameter; and
``zeros``, a byte for each parameter, in the order of the groups: whether its gradient is one that
``zero_grad(set_to_none=False)`` keeps; older images lack it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from handfast.errors import Unstorable
from handfast.store.image import TensorSpec
from handfast.store.objects import TensorRef, child
from handfast.torch.alike import STATE_KEYS
from handfast.torch.marks import MARK
from handfast.torch.memory import Remade
from handfast.torch.names import is_torchs, matches
from handfast.torch.saved import Source
from handfast.torch.tensors import (
    HOST,
    Place,
    all_tensors,
    any_dtensor,
    dims_of,
    is_dtensor,
    local,
    placements,
)
from handfast.torch.tree import split

__all__ = [
    "Given",
    "Names",
    "Owners",
    "drop_late",
    "given_to",
    "name_optimizer",
    "parameters",
    "read",
    "signature",
    "write",
]

Owners = Mapping[int, tuple[str, str]]
"""id of a parameter -> its module's path in the state, and its name there; of a tensor that stands
in the state by itself its path, and no name."""


Given = Sequence[frozenset[str]] | None
"""The keys of each group of an optimizer at first; None where that is not known."""

_LABELS = frozenset({"params", "param_names"})
"""What says which parameters a group has; saved are the names that they have in the state."""
_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
)


class Names(NamedTuple):
    """The names that an optimizer's tensors go by; they change only with its signature."""

    parameters: dict[int, str]  # id -> name
    groups: list[list[str]]
    paths: list[str]  # of the tensors that lie directly in a parameter's state, in its order
    owners: list[int | None]  # ids of the parameters that they are alike with; None: not known
    tensors: list[tuple[tuple[object, ...], tuple[object, ...], list[str]]]
    placed: dict[str, dict[object, list[int | None] | None]]


def parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every parameter of every group, in order."""
    for group in optimizer.param_groups:
        yield from group["params"]


def signature(optimizer: Optimizer) -> object:
    """What the names depend on: quick to make, and to compare."""
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    entries, values = _flat(optimizer)
    plain = () if all_tensors(values) else [isinstance(value, Tensor) for value in values]
    placed = list(map(dims_of, values)) if any_dtensor(values) else ()
    return groups, list(map(id, optimizer.state)), list(map(tuple, entries)), plain, placed


def _flat(optimizer: Optimizer) -> tuple[list[dict[object, Any]], list[Any]]:
    """The state of each parameter, and all values in it, without a look at any of them."""
    state: Mapping[Any, dict[object, Any]] = optimizer.state
    plain = all_tensors(state)
    entries = list(state.values()) if plain else [entry for _, entry in _by_parameter(optimizer)]
    return entries, list(chain.from_iterable(map(dict.values, entries)))


def name_parameters(optimizer: Optimizer, owners: Owners) -> dict[int, str]:
    """id -> name: the module's own name, ``/path`` of a tensor that stands by itself, or
    ``group/index`` of what is nowhere in the state.

    Where the optimizer's parameters belong to several modules of the state, the module's path
    stands before the name. Names depend only on modules that this optimizer trains, so that one
    more in the state (an EMA copy, say) changes none.
    """
    known = [owners[id(p)] for p in parameters(optimizer) if id(p) in owners]
    several = len({owner for owner, name in known if name}) > 1
    names = {}
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            owner, name = owners.get(id(parameter), ("", f"{number}/{index}"))
            if not name:
                name = f"/{owner}"
            elif several and owner:
                name = f"{owner}.{name}"
            names[id(parameter)] = name
    return names


def name_optimizer(path: str, optimizer: Optimizer, owners: Owners) -> Names:
    """All names of an optimizer that stands at ``path``.

    Raises Unstorable for state of a parameter that is in none of the optimizer's groups, and
    ValueError where two parameters have one name: each would be given the other's state.
    """
    names = name_parameters(optimizer, owners)
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"state: two parameters of {path} have the name {twice[0]}: rename a component"
        )
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    paths: list[str] = []
    ids: list[int | None] = []
    alike: dict[tuple[tuple[object, ...], tuple[object, ...]], list[str]] = {}
    placed: dict[str, dict[object, list[int | None] | None]] = {}
    for parameter, entry in _by_parameter(optimizer):
        name = names.get(id(parameter))
        if name is None:
            raise Unstorable(
                f"{path}/state",
                type(parameter).__qualname__,
                f"it has state for a parameter of shape {tuple(parameter.shape)} that is in none "
                "of its param_groups",
                "drop that state",
            )
        tensors = {key: value for key, value in entry.items() if isinstance(value, Tensor)}
        host = tuple(key for key, value in tensors.items() if _stays_on_host(value, parameter))
        alike.setdefault((tuple(tensors), host), []).append(name)
        paths += [child(f"{path}/state/{name}", key) for key in tensors]
        ids += [id(parameter) if key in STATE_KEYS else None for key in tensors]
        if is_dtensor(parameter):
            odd = {key: _dims(v) for key, v in tensors.items() if _placed_apart(v, parameter)}
            placed |= {name: odd} if odd else {}
    tensors_by_keys = [(keys, host, here) for (keys, host), here in alike.items()]
    return Names(names, groups, paths, ids, tensors_by_keys, placed)


def _by_parameter(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[object, Any]]]:
    state: Mapping[Any, dict[object, Any]] = optimizer.state
    return ((p, entry) for p, entry in state.items() if isinstance(p, Tensor))


def _stays_on_host(value: Tensor, parameter: Tensor) -> bool:
    """Counters such as Adam's ``step`` are kept off the device, whatever the device."""
    return value.device.type == "cpu" and (value.ndim == 0 or parameter.device.type != "cpu")


def _placed_apart(value: Any, parameter: Any) -> bool:
    if is_dtensor(value):
        return bool(value.placements != parameter.placements)
    return bool(value.shape == parameter.shape)


def _dims(value: Any) -> list[int | None] | None:
    return list(dims_of(value)) or None


def read(
    path: str, optimizer: Optimizer, names: Names
) -> tuple[dict[str, object], list[str], list[Tensor]]:
    """The optimizer's tree, and its tensors with their paths. It changes nothing."""
    _, tensors = _flat(optimizer)
    nested: list[tuple[str, Tensor]] = []
    rest: dict[str, dict[object, object]] = {}
    if not all_tensors(tensors):
        tensors = [value for value in tensors if isinstance(value, Tensor)]
        for parameter, entry in _by_parameter(optimizer):
            name = names.parameters[id(parameter)]
            for key, value in entry.items():
                if not isinstance(value, Tensor):
                    where = child(f"{path}/state/{name}", key)
                    rest.setdefault(name, {})[key] = split(value, where, nested)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        where = child(f"{path}/param_groups", number)
        hyper = {
            key: split(value, child(where, key), nested)
            for key, value in group.items()
            if key != "params"
        }
        groups.append(hyper | {"params": names.groups[number]})
    state: Mapping[Any, object] = optimizer.state
    other = {
        key: split(value, child(f"{path}/state", key), nested)
        for key, value in state.items()
        if not isinstance(key, Tensor)
    }
    tree: dict[str, object] = {
        "type": type(optimizer).__name__,
        "by_order": isinstance(optimizer, torch.optim.LBFGS),  # one history for all parameters
        "param_groups": groups,
        "tensors": names.tensors,
        "placed": names.placed,
        "state": rest,
        "other": other,
        "zeros": _lasting(optimizer),
    }
    return tree, names.paths + [p for p, _ in nested], tensors + [t for _, t in nested]


def _lasting(optimizer: Optimizer) -> bytes:
    """Which parameters have a gradient that the next ``zero_grad()`` turns into zeros.

    A step counts those too: with weight decay or momentum they change a parameter that was not
    used in a batch, where one without a gradient is left out. Where gradients are dropped, as
    torch does by itself, none lasts, though at a save after a step they are all still there.
    """
    gradients = [parameter.grad for parameter in parameters(optimizer)]
    marks = [getattr(gradient, MARK, None) for gradient in gradients if gradient is not None]
    if not any(mark is None or mark.lasting for mark in marks):
        return bytes(len(gradients))
    # Optimizers for sparse gradients refuse dense ones.
    return bytes(g is not None and g.layout == torch.strided for g in gradients)


def write(
    path: str,
    optimizer: Optimizer,
    names: Mapping[int, str],
    tree: dict[str, Any],
    source: Source,
    made: Remade,
    keep_live: Sequence[str],
) -> list[str]:
    """Put a saved optimizer in place: its state, then its hyperparameters.

    State is copied into live tensors of the saved dtype and shape; all else is created with the
    saved dtype and strides, and state that a saved parameter did not have is dropped. The gradients
    are, too, or made zeros where they were to become zeros: they are of another moment. Gives a
    sentence for each hyperparameter whose saved value replaced another; ``keep_live`` lists those
    (by key, or by path) that keep theirs.
    """
    by_name = {names[id(p)]: p for p in parameters(optimizer)}
    saved_order = [name for group in tree["param_groups"] for name in group["params"]]
    known = set(saved_order)  # what was not saved at all, as strict=False allows, is left alone
    kept = {p: e for p, e in _by_parameter(optimizer) if names.get(id(p)) not in known}
    made.leave(chain.from_iterable(entry.values() for entry in kept.values()))
    for number, group in enumerate(optimizer.param_groups):
        where = child(f"{path}/param_groups", number)
        made.leave(group[key] for key in group if _keeps(where, key, keep_live))
    fresh = _state(path, optimizer, by_name, tree, source, made)
    other = {key: made.tree(value) for key, value in tree["other"].items()}
    zeros = set(compress(saved_order, tree.get("zeros", b"")))
    changed: list[str] = []
    pairs = zip(optimizer.param_groups, tree["param_groups"], strict=True)
    for number, (live, saved) in enumerate(pairs):
        where = child(f"{path}/param_groups", number)
        changed += _hyperparameters(where, live, saved, source, made, keep_live)
    optimizer.state.clear()
    optimizer.state.update(kept)
    for name, parameter in by_name.items():
        parameter.grad = torch.zeros_like(parameter) if name in zeros else None
        if name in fresh:
            optimizer.state[parameter] = fresh[name]
    for key, value in other.items():
        optimizer.state[key] = value
    made.fill()
    if not is_torchs(type(optimizer).__setstate__):  # as torch's own loading does
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
    return changed


def _keeps(where: str, key: str, keep_live: Sequence[str]) -> bool:
    return key in keep_live or matches(child(where, key), keep_live)


def _state(
    path: str,
    optimizer: Optimizer,
    by_name: Mapping[str, Tensor],
    tree: dict[str, Any],
    source: Source,
    made: Remade,
) -> dict[str, dict[object, Any]]:
    """Every parameter's saved state by name, in live tensors where they fit, else in new ones."""
    fresh: dict[str, dict[object, Any]] = {}
    for keys, host, names in tree["tensors"]:
        for name in filter(by_name.__contains__, names):
            parameter = by_name[name]
            old = optimizer.state.get(parameter, {})
            placed = tree["placed"].get(name, {})
            entry = fresh[name] = {}
            own = f"{path}/state/{name}"
            for key in keys:
                where = child(own, key)
                device = HOST.device if key in host else parameter.device
                place = _place(parameter, device, source.spec(where), placed.get(key, ()))
                entry[key] = made.take(where, place, old.get(key))
    for name in filter(by_name.__contains__, tree["state"]):
        entry = fresh.setdefault(name, {})
        for key, value in tree["state"][name].items():
            entry[key] = made.tree(value, by_name[name].device)
    return fresh


def _place(
    parameter: Any, device: torch.device, spec: TensorSpec, dims: Sequence[int | None] | None
) -> Place:
    """Where a state tensor belongs: sharded as its parameter is, unless ``dims`` say otherwise.

    ``dims`` are None for a plain tensor, empty where nothing was recorded.
    """
    if dims is None or not is_dtensor(parameter):
        return Place(device)
    if dims:
        return Place(device, parameter.device_mesh, placements(dims))
    if spec.global_shape != tuple(parameter.shape):
        return Place(device)
    return Place(device, parameter.device_mesh, parameter.placements)


def _hyperparameters(
    path: str,
    live: dict[str, Any],
    saved: dict[str, Any],
    source: Source,
    made: Remade,
    keep_live: Sequence[str],
) -> list[str]:
    changed = []
    driven = _driven_by_scheduler(live, saved)
    for key, value in saved.items():
        where = child(path, key)
        if key in _LABELS or _keeps(path, key, keep_live):
            continue
        old = live.get(key)
        was, now = _shown(value, source), _shown(old, source)
        if key in live and key not in driven and was != now:
            changed.append(f"{where}: saved {was!r}, live was {now!r}")
        # in place where it can be: a captured CUDA graph or a scheduler may hold it
        device = old.device if isinstance(old, Tensor) else HOST.device
        live[key] = made.tree(value, device, old)
    return changed


def given_to(optimizer: Optimizer) -> Given:
    """Which keys the groups have: what they were made with, if nothing has been trained yet."""
    return [frozenset(group) for group in optimizer.param_groups]


def drop_late(
    path: str,
    optimizer: Optimizer,
    tree: dict[str, Any],
    given: Given,
    keep_live: Sequence[str],
) -> list[str]:
    """Drop the keys of groups that the training made, if the saved moment had none yet.

    A counter, say, that the first step makes: it is of an abandoned timeline. What a group was
    ``given`` at first stays, and what a scheduler put there; where that is not known all stays.
    Gives a sentence for each that was dropped, or may have to be. Goes before :func:`write`, whose
    ``__setstate__`` may make some anew.
    """
    told = []
    defaults: Mapping[str, object] = getattr(optimizer, "defaults", {})
    for number, (live, saved) in enumerate(
        zip(optimizer.param_groups, tree["param_groups"], strict=True)
    ):
        where = child(f"{path}/param_groups", number)
        first = given[number] if given is not None and number < len(given) else None
        late = live.keys() - saved.keys() - defaults.keys() - (first or set()) - _SCHEDULERS
        for key in sorted(late - _LABELS, key=str):
            if str(key).startswith("initial_") or _keeps(where, key, keep_live):
                continue
            way = "dropped" if first is not None else "left as it is"
            told.append(f"{child(where, key)}: nothing was saved, live was {live[key]!r}: {way}")
            if first is not None:
                del live[key]
    return told


def _driven_by_scheduler(live: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
    """Hyperparameters that a scheduler moves, so that they differ in every run that goes on.

    What it moves them from is compared in their place: ``initial_lr``, ``max_momentum``.
    """
    driven = {"lr"} if "initial_lr" in live and "initial_lr" in saved else set()
    if "max_momentum" in live and "max_momentum" in saved:
        driven |= {"momentum", "betas"}
    return driven


def _shown(value: Any, source: Source) -> Any:
    """A hyperparameter as people read it: tensors as numbers."""
    if isinstance(value, TensorRef):
        return source.view(value.path).tolist()
    if isinstance(value, Tensor):
        return local(value).tolist()
    if type(value) in (list, tuple):
        return type(value)(_shown(item, source) for item in value)
    return value
