"""What state dicts say: which tensors are weights and which moments, and what was counted.

A state is known by its keys, wherever it stands in a tree: an optimizer's by ``state`` and
``param_groups`` (torch 2.13, torch/optim/optimizer.py), a scheduler's by ``last_epoch``
(lr_scheduler.py), a loss scaler's by its growth and backoff (torch/amp/grad_scaler.py), a module's
as names with nothing but tensors, or by its own parameters and buffers where it was pickled whole.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit.extent import DIMENSIONS, Extent
from handfast.audit.found import Clock, Counter, Role, Tensor, Values
from handfast.audit.room import BEYOND, MEMORY
from handfast.audit.tree import DEEP, Object, inside, values
from handfast.errors import FormatError, HandfastError
from handfast.store.objects import child

__all__ = [
    "COUNTS",
    "LONGEST",
    "Piece",
    "Said",
    "Split",
    "beyond",
    "buffer_or_parameter",
    "is_extra",
    "number",
    "pieces",
    "read_state",
    "sizes",
]

COUNTS: Final = (
    "step", "global_step", "steps", "iteration", "iter", "it", "num_updates", "update",
    "current_step", "global_iter", "iter_num", "n_iter", "train_step", "epoch",
)  # fmt: skip
"""Keys by which trainings call what they count."""

MODELS: Final = ("model", "state_dict", "model_state_dict", "module", "net", "weights", "app")
"""Keys of *the* model, where there are several modules: its parameters need no prefix."""

_MOMENTS: Final[Mapping[str, Role]] = {
    "exp_avg": Role.FIRST,
    "exp_avg_sq": Role.SECOND,
    "square_avg": Role.SECOND,
    "momentum_buffer": Role.MOMENTUM,
    "master_param": Role.MASTER,
    "master_params": Role.MASTER,
    "master_weight": Role.MASTER,
}
"""torch/optim: adam.py, rmsprop.py, sgd.py and others; masters as Apex and its heirs name them."""

_BUFFERS: Final = re.compile(
    r"(.*_)?(running_(mean|var)|num_batches_tracked|mask|bias_mask|masked_bias|inv_freq|freqs_cis"
    r"|cos_cached|sin_cached|position_ids|amax_history|scale_inv|zero_point|n_averaged)"
)
"""Last parts of names that are buffers': batch norms (torch/nn/modules/batchnorm.py), masks and
tables of positions. In a state dict nothing else tells them from parameters."""

_EXTRA: Final = "_extra_state"
"""What ``get_extra_state()`` of a module gave, of any type (torch/nn/modules/module.py)."""

_ASIDE: Final = frozenset({"callbacks", "metrics", "rng", "rng_state", "dataloader", "loader"})
"""Keys below which tensors are no module's: best scores, generators, positions."""

_VALUELESS: Final = frozenset({"torch.Tensor", "torch.nested"})
"""What a tensor is read as whose values are not just stored (:mod:`handfast.audit.torch_tree`)."""

LONGEST: Final = 4096
"""Characters of a path at most."""

EACH: Final = 1024
"""Bytes of memory that a tensor or a count takes, beside its names, and what is seen of it."""

_SCALER: Final = {"scale", "growth_factor", "backoff_factor", "growth_interval"}
_CYCLED: Final = {"base_momentum", "max_momentum"}  # by OneCycleLR and CyclicLR, which move betas
_FLAT: Final = re.compile(r"(state|param_groups)\.(.+)\.([^.]+)")
_UNPACK: Final = {"float32": "<f", "float64": "<d", "float16": "<e", "int64": "<q", "int32": "<i"}


class Piece(NamedTuple):
    """Values, and where they sit in the whole, if that is known."""

    values: Values
    whole: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None


class Split(NamedTuple):
    """A node of a tree that stands for a tensor, in pieces."""

    pieces: tuple[Piece, ...]


class Said(msgspec.Struct):
    """What a tree says; ``counters`` each with the path where it stands in the tree.

    ``world`` is the size of the job, where a sharded tensor says it (else 0). ``scaled``: a loss
    scaler's state is there; ``named``: an optimizer's state goes by the names of its parameters.
    ``valueless`` are the paths of tensors without plain values, and of those in lists and the like
    of an optimizer's state, which nothing says the meaning of.
    """

    tensors: list[Tensor] = []
    counters: list[tuple[str, Counter]] = []
    betas: dict[str, tuple[float, float]] = {}
    scaled: bool = False
    named: bool = False
    world: int = 0
    valueless: list[str] = []


def read_state(root: Any, *, within: str = "", memory: int = MEMORY) -> Said:
    """Read a tree. ``within`` names what the counts of unnamed parameters are of, such as a rank.

    Nothing that it counts is marked as a count of updates: whether it is one, a format knows. Of
    the ``memory`` that a tree may take half goes for what is said of it.
    Raises FormatError for a tree that is too deep, or says more than is read.
    """
    reading = _Reading(within, memory // 2)
    ahead: list[Iterator[tuple[str, Any]]] = [iter([("", root)])]
    seen: set[int] = set()
    while ahead:
        found = next(ahead[-1], None)
        if found is None:
            ahead.pop()
        elif id(found[1]) not in seen:
            if len(ahead) > DEEP or len(found[0]) > LONGEST:
                raise beyond(found[0], f"{DEEP:,} levels, or names of {LONGEST:,} characters")
            seen.add(id(found[1]))
            ahead.append(reading.enter(*found))
    return reading.done()


def beyond(path: str, what: str) -> FormatError:
    """The error of a tree that has more than is read."""
    return FormatError(
        f"{path:.200}: {BEYOND}: more than {what}. What to do: if you trust its writer, save less "
        "structure; --memory allows more tensors and counts"
    )


def pieces(node: Any) -> tuple[Piece, ...]:
    """A tensor's values, in one piece or several; none where a node is no tensor with values.

    Of a ShardedTensor there are those of one rank (torch 2.13, _shard/sharded_tensor/api.py); of a
    DTensor the local ones, at a place that only its mesh knows.
    """
    if type(node) is Split:
        return node.pieces
    if type(node) is Object:
        if node.type.endswith("sharded_tensor.api.ShardedTensor"):
            return tuple(_shards(node))
        local = values(node)
        whole = sizes(node.fields.get("shape")) if "_local_tensor" in node.fields else None
        return () if local is None else (Piece(local, whole),)
    found = values(node)
    return () if found is None else (Piece(found),)


def number(node: Any) -> int | None:
    """A whole number of 64 bits: itself, or a tensor without dimensions that holds one.

    None for anything else, and for what can't be read: a check that reads it says so. Longer ones
    count nothing, and Python won't even write those of a hostile file out.
    """
    if type(node) is int:
        return node if node.bit_length() < 64 else None
    found = pieces(node)
    if len(found) != 1 or found[0].values.shape != ():
        return None
    form = _UNPACK.get(found[0].values.dtype)
    try:
        block = next(found[0].values.blocks(1), None) if form else None
    except HandfastError:
        return None
    value = struct.unpack(form, block)[0] if form and block is not None else None
    return number(int(value)) if value is not None and value == value // 1 else None


def sizes(node: Any) -> tuple[int, ...] | None:
    """A shape or an offset: a tuple or a list of whole numbers of 63 bits; None for all else."""
    fits = type(node) in (tuple, list) and len(node) <= DIMENSIONS
    fits = fits and all(type(size) is int and 0 <= size < 1 << 63 for size in node)
    return tuple(node) if fits else None


def _shards(sharded: Object) -> Iterator[Piece]:
    """The pieces of a ShardedTensor that its rank has, each at its place."""
    whole, shards = sizes(sharded.fields.get("shape")), sharded.fields.get("_local_shards")
    for shard in shards if type(shards) is list else ():
        fields = shard.fields if type(shard) is Object else {}
        local, about = values(fields.get("tensor")), fields.get("metadata")
        at = about.fields.get("shard_offsets") if type(about) is Object else None
        if local is not None:
            yield Piece(local, whole, sizes(at))


class _Reading:
    """A tree that is being read: modules' states wait for its end, when it is known how many."""

    def __init__(self, within: str, room: int) -> None:
        self.said = Said()
        self._within = within
        self._room = self._most = room
        self._unknowns: set[int] = set()
        self._modules: list[tuple[str, list[tuple[str, Role, Any]]]] = []

    def enter(self, path: str, node: Any) -> Iterator[tuple[str, Any]]:
        """Read what a node is, and give the nodes in it that are still to be read."""
        if pieces(node):  # it stands in no dict, so that nothing says whose it is
            self._add(path, Role.OTHER, node)
        elif type(node) is Object:
            yield from self._object(path, node)
        elif type(node) in (list, tuple):
            parts = ((at, part) for at, part in enumerate(node) if type(part) in _TOLD and part)
            yield from ((child(path, at), part) for at, part in parts)
        elif type(node) is dict:
            yield from self._dict(path, node)

    def done(self) -> Said:
        """All that was said."""
        main = [at for at, _ in self._modules if at.rpartition("/")[2] in (*MODELS, "")]
        bare = main[0] if len(main) == 1 else None
        alone = len(self._modules) == 1
        for at, found in self._modules:
            for name, role, node in found:
                of = name if alone or at == bare else f"{at}/{name}"
                self._add(child(at, name), role, node, of)
        return self.said

    def _dict(self, path: str, node: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
        optimizer = _optimizer(node)
        if optimizer is not None:
            self._read_optimizer(path, *optimizer)
            return
        if node.keys() >= _SCALER:
            self.said.scaled = True
            return
        if "last_epoch" in node and not any(map(_by_names, node.values())):
            self._scheduler(path, node)
            return
        if extras := [*filter(is_extra, node)]:
            for key in extras:
                self._unknown(child(path, key), node[key])
            node = {key: part for key, part in node.items() if not is_extra(key)}
        inner = {key: part for key, part in node.items() if type(part) in _BOXES and part}
        tensors = {key: part for key, part in node.items() if key not in inner and pieces(part)}
        if inner:  # what lies beside a module's state is a loss or a seed, but for dotted names
            aside = [key for key in tensors if type(key) is not str or "." not in key]
            for key in aside:
                self._add(child(path, key), Role.OTHER, tensors.pop(key))
        weights = self._module(path, tensors)
        for key, part in node.items():
            buffer = weights and (path or key in tensors)  # of a module, whatever it is called
            if key in COUNTS and not buffer and (value := number(part)) is not None:
                at = child(path, key)
                self._count(at, Counter(Clock.TRAINER, value, at, updates=False))
        objects = {k: part for k, part in node.items() if type(part) is Object and not pieces(part)}
        yield from ((child(path, key), part) for key, part in (inner | objects).items())

    def _module(self, path: str, tensors: Mapping[Any, Any]) -> bool:
        """The state of a module (True), or a dict of some tensors that no one can tell from one."""
        found, counts = [], []
        for key, node in tensors.items():
            if type(key) is not str:
                self._add(child(path, key), Role.OTHER, node)
            elif key in COUNTS and number(node) is not None:
                counts.append((key, Role.BUFFER, node))
            else:
                found.append((key, buffer_or_parameter(key, pieces(node)[0].values.dtype), node))
        weights = any(
            role is Role.PARAMETER and pieces(node)[0].values.shape for _, role, node in found
        )
        if weights and not _ASIDE & {*path.split("/")}:
            self._modules.append((path, found + counts))
            return True
        for key, _, node in found:
            self._add(child(path, key), Role.OTHER, node)
        return False

    def _object(self, path: str, node: Object) -> Iterator[tuple[str, Any]]:
        fields = node.fields
        if "_parameters" in fields and "_modules" in fields:
            self._modules.append((path, list(self._whole_module(path, node))))
        elif node.type.endswith("sharded_tensor.api.ShardedTensor"):
            self._world(node)
        elif _is_valueless(node):
            self._add(path, Role.OTHER, node)
        else:
            parts = dict(fields) if not node.pairs else {**fields, **node.pairs}
            if _optimizer(parts) is not None or "last_epoch" in parts:
                yield from self._dict(path, parts)
            else:
                self._unknown(path, node)

    def _unknown(self, path: str, node: Any, *, owned: bool = False) -> None:
        """The tensors in an object whose class has a meaning for them that is not known.

        Those that an optimizer owns no copy of its state may lack: they are among the valueless.
        """
        ahead = [iter([(path, node)])]
        while ahead:
            at, part = next(ahead[-1], (path, None))
            if part is None:
                ahead.pop()
            elif owned and pieces(part):
                self._take(at)
                self.said.valueless.append(at)
            elif type(part) in (Extent, Split) or _is_valueless(part):
                self._add(at, Role.OTHER, part)
            elif id(part) not in self._unknowns and (parts := inside(at, part)) is not None:
                self._unknowns.add(id(part))
                ahead.append(((where, one) for where, one in parts if type(one) in _TOLD))
            if len(ahead) > DEEP:
                raise beyond(at, f"{DEEP:,} levels")

    def _world(self, sharded: Object) -> None:
        """The job's size, as a ShardedTensor has it (api.py, ``ProcessGroupState``)."""
        group = sharded.fields.get("_process_group_state")
        world = number(group.fields.get("global_world_size")) if type(group) is Object else None
        if world is not None:
            self.said.world = world

    def _scheduler(self, path: str, node: Mapping[Any, Any]) -> None:
        """What a scheduler counted; not one that waits for a metric, which counts evaluations."""
        last = number(node["last_epoch"])
        if last is not None and "best" not in node:
            at = child(path, "last_epoch")
            self._count(at, Counter(Clock.SCHEDULER, last, at, updates=False))

    def _read_optimizer(
        self, path: str, state: Mapping[Any, Any], groups: Sequence[Any], flat: bool
    ) -> None:
        """An optimizer's state: of each parameter, and the greatest count of all."""
        members: dict[Any, tuple[str, str]] = {}
        for at, group in enumerate(groups):
            label = child(child(path, "param_groups"), at)
            members |= {key: (label, name) for key, name in _members(group)}
            if (betas := _betas(group)) is not None:
                self.said.betas[label] = betas
        only = child(child(path, "param_groups"), 0) if len(groups) == 1 else ""
        steps: list[tuple[int, str]] = []
        for nth, (key, part) in enumerate(state.items()):
            shown = key if isinstance(key, int | str) else nth
            if type(part) is not dict:
                self._unknown(child(child(path, "state"), shown), part, owned=True)
                continue
            label, name = members.get(shown, (only, ""))
            of = name or (key if type(key) is str else child(child(self._within, path), shown))
            self.said.named = self.said.named or type(key) is str
            stem = child(path, f"state.{shown}") if flat else child(child(path, "state"), shown)
            for field, node in part.items():
                where = f"{stem}.{field}" if flat else child(stem, field)
                if field != "step":
                    self._add(where, _moment(field, part), node, of, label)
                    if not pieces(node) and not _is_valueless(node):
                        self._unknown(where, node, owned=True)
                elif (step := number(node)) is not None:
                    steps.append((step, where))
                    self._count(where, Counter(Clock.PARAMETER, step, of, updates=False))
        if steps:
            step, where = max(steps)
            what = f"{path}: the greatest step" if path else "the greatest step"
            self._count(where, Counter(Clock.OPTIMIZER, step, what, updates=False))

    def _whole_module(self, path: str, module: Object) -> Iterator[tuple[str, Role, Any]]:
        """The parameters and buffers of a pickled module, by their names; a tied one once."""
        ahead: list[tuple[str, Any]] = [("", module)]
        seen: set[int] = set()
        while ahead:
            name, node = ahead.pop()
            if id(node) in seen or type(node) is not Object:
                continue
            seen.add(id(node))
            self._take(path, name)
            for box, role in (("_parameters", Role.PARAMETER), ("_buffers", Role.BUFFER)):
                for key, part in _plain(node.fields.get(box)):
                    if pieces(part) or _is_valueless(part):
                        yield f"{name}{key}", role, part
            inner = [(f"{name}{key}.", part) for key, part in _plain(node.fields.get("_modules"))]
            ahead.extend(reversed(inner))

    def _add(self, path: str, role: Role, node: Any, of: str = "", group: str = "") -> None:
        if type(node) is Object and node.type.endswith("sharded_tensor.api.ShardedTensor"):
            self._world(node)
        if _is_valueless(node):
            self._take(path)
            self.said.valueless.append(path)
        for piece in pieces(node):
            self._take(path, of)
            self.said.tensors.append(
                Tensor(path, role, piece.values, of, group, piece.whole, piece.offset)
            )

    def _count(self, path: str, counter: Counter) -> None:
        self._take(path, counter.path)
        self.said.counters.append((path, counter))

    def _take(self, *texts: str) -> None:
        """Take the room of one thing more that is said, with the texts in it."""
        self._room -= EACH + sum(map(len, texts))
        if self._room < 0 or max(map(len, texts)) > LONGEST:
            most = f"{self._most // EACH:,} tensors and counts"
            raise beyond(texts[0], f"{most}, or names of {LONGEST:,} characters")


_BOXES: Final = frozenset({dict, list, tuple})
_ENTERED: Final = _BOXES | {Object}
_TOLD: Final = _ENTERED | {Extent, Split}


def _optimizer(node: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], Sequence[Any], bool] | None:
    """The state and the groups of an optimizer, and whether it is flat; None for anything else.

    Flat: "state.NAME.exp_avg" and "param_groups.NAME.lr" beside each other (torch 2.13,
    distributed/checkpoint/state_dict.py, ``flatten_optimizer_state_dict``).
    """
    state, groups = node.get("state"), node.get("param_groups")
    if type(state) is dict and type(groups) is list:
        return state, [group for group in groups if type(group) is dict], False
    parts: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, part in node.items():
        found = _FLAT.fullmatch(key) if type(key) is str else None
        if found is None:
            return None
        parts[found[1]].setdefault(found[2], {})[found[3]] = part
    if not parts["state"]:
        return None
    groups = [{**group, "params": [name]} for name, group in parts["param_groups"].items()]
    return parts["state"], groups, True


def _members(group: Mapping[Any, Any]) -> Iterator[tuple[int | str, str]]:
    """The keys of a group's parameters, with their names where it has them."""
    members, names = group.get("params"), group.get("param_names")
    for at, key in enumerate(members if isinstance(members, list | tuple) else ()):
        name = names[at] if type(names) is list and at < len(names) else ""
        if isinstance(key, int | str):
            yield key, name if type(name) is str else ""


def _moment(field: Any, state: Mapping[Any, Any]) -> Role:
    """A role by its name. Without second moments beside it a first one is a momentum (Lion)."""
    role = _MOMENTS.get(field, Role.OTHER) if type(field) is str else Role.OTHER
    return Role.MOMENTUM if role is Role.FIRST and "exp_avg_sq" not in state else role


def _betas(group: Mapping[Any, Any]) -> tuple[float, float] | None:
    """The betas of a group of Adam's family in torch/optim, where no schedule moves them.

    Others have the same names for other things (ADOPT averages gradients that are normalised), and
    lack torch's ``amsgrad``, or NAdam's ``momentum_decay``.
    """
    betas = group.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2 or _CYCLED & group.keys():
        return None
    if not {"amsgrad", "momentum_decay"} & group.keys():
        return None
    first, second = betas
    return (first, second) if type(first) is type(second) is float else None


def buffer_or_parameter(name: str, dtype: str) -> Role:
    """The role of a tensor of a module, by its name and dtype: integers are no parameters."""
    whole = not dtype.startswith(("float", "bfloat", "complex"))
    last = name.rpartition(".")[2]
    if is_extra(name):
        return Role.OTHER
    return Role.BUFFER if whole or _BUFFERS.fullmatch(last) else Role.PARAMETER


def _is_valueless(node: Any) -> bool:
    """Whether a node is a tensor whose values are not just stored."""
    known = type(node) is Object and (
        node.type in _VALUELESS or node.type.startswith("torch.sparse_")
    )
    return known and not pieces(node)


def is_extra(key: Any) -> bool:
    """Whether a key of a module's state is of what ``get_extra_state()`` gave."""
    return type(key) is str and key.rpartition(".")[2] == _EXTRA


def _by_names(node: Any) -> bool:
    """Whether a node is a dict by names: a scheduler's own state has none, a training's has."""
    return type(node) is dict and any(type(key) is str for key in node)


def _plain(box: Any) -> list[tuple[str, Any]]:
    """The items of a dict by names."""
    return [(k, v) for k, v in box.items() if type(k) is str] if type(box) is dict else []
