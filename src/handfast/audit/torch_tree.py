"""From inert nodes to a tree that any reader understands (:mod:`handfast.audit.tree`).

Tensors and arrays become :class:`~handfast.audit.extent.Extent`, which nothing reads yet. Python's
own collections become plain dicts and lists; dtypes, devices and layouts become strings as torch
prints them. A class or a function stays a :class:`~handfast.audit.inert.Global`. All else is an
:class:`~handfast.audit.tree.Object` with its attributes by name, whatever its class would have made
of them.

What torch calls to rebuild its tensors: torch 2.13, torch/_utils.py, torch/_tensor.py and
torch/nn/parameter.py.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from handfast.audit import numpy_nodes
from handfast.audit.extent import SIZES, Extent, Source
from handfast.audit.inert import NOTHING, Buffer, Call, Global, Key, Persistent
from handfast.audit.tree import Object
from handfast.errors import FormatError

__all__ = ["Storages", "Tree", "tree"]

NESTED: Final = 200
"""Tuples in tuples, or calls as arguments of calls, that are followed."""

DAMAGE: Final = 1000

STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "UntypedStorage": "uint8",
}
"""Class of a storage -> dtype of its elements (torch 2.13, torch/storage.py). Not those of which
several share a byte."""

_ATOMS: Final = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})

_KEYS: Final = frozenset(
    {type(None), bool, int, float, str, bytes, Global, Persistent, Buffer, Object}
)
"""Types of what a key may become: no pickle can make these clash."""


class Storages(Protocol):
    """The storages of one file, by the keys that its pickle has for them."""

    def find(self, key: str, dtype: str, numel: int) -> tuple[Source, bool]:
        """A storage of so many elements, and whether its numbers are in big-endian order.

        One that is not there, or is of another length, comes as a source that can't be read.
        """
        ...


class Tree(NamedTuple):
    """A tree, and what is wrong with the first ``DAMAGE`` tensors in it that something is wrong
    with: each says so again when it is read.
    """

    root: Any
    damage: tuple[FormatError, ...]


class _Storage(NamedTuple):
    """A storage as a pickle mentions it: ``first`` is the element where a view of it begins."""

    source: Source
    swapped: bool
    dtype: str
    numel: int
    first: int


def tree(value: Any, storages: Storages | None = None, *, name: str = "a pickle") -> Tree:
    """Make a tree of a value that a pickle gave; the value is used up.

    Without ``storages`` none are asked for, and what would be one stays as it is. Raises
    FormatError, with ``name``, for what nests too deep or a tensor of the wrong arguments.
    """
    maker = _Maker(storages, name)
    root = maker.make(value)
    maker.fill()
    return Tree(root, tuple(maker.damage))


class _Maker:
    """Makes each node once, however often it is met; what can grow is filled in later."""

    def __init__(self, storages: Storages | None, name: str) -> None:
        self.storages = storages
        self.name = name
        self.damage: list[FormatError] = []
        self._made: dict[int, Any] = {}  # by the ids of nodes, which stay, so that no other has one
        self._kept: list[Any] = []
        self._boxes: list[Any] = []
        self._depth = 0

    def make(self, value: Any) -> Any:
        """What a node becomes. What it contains may not have been made yet."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        if kind in (list, dict):
            self._made[id(value)] = value
            self._boxes.append(value)
            return value
        self._depth += 1
        if self._depth > NESTED:
            raise self.wrong(f"more than {NESTED} values within each other")
        self._kept.append(value)
        made = self._made[id(value)] = self._node(kind, value)
        self._depth -= 1
        return made

    def _node(self, kind: type, value: Any) -> Any:
        if kind is tuple:
            return tuple(map(self.make, value))
        if kind in (set, frozenset):
            return kind(map(self._key, value))
        if kind is Global:
            return str(value) if value.module == "torch" and value.name in SIZES else value
        if kind is Persistent:
            return self._persistent(value)
        if kind is Call:
            return self._call(value)
        return Key(self.make(value.value)) if kind is Key else value

    def fill(self) -> None:
        """Make what is inside of all that was made, until nothing is ahead."""
        for box in self._boxes:  # grows while it is gone through
            if type(box) is list:
                box[:] = map(self.make, box)
            elif all(type(key) in _ATOMS for key in box):
                for key, part in box.items():
                    box[key] = self.make(part)
            else:
                pairs = [(self._key(key), self.make(part)) for key, part in box.items()]
                box.clear()
                box.update(pairs)

    def wrong(self, what: str) -> FormatError:
        """The error of a pickle that torch would not have written."""
        return FormatError(
            f"{self.name}: {what}. What to do: if torch wrote it, it was damaged; take it from a "
            "copy"
        )

    def _key(self, key: Any) -> Any:
        """A key; what it becomes has to be as cheap to hash as it was itself."""
        made = self.make(key)
        if type(made) in _KEYS or type(made) is Key:
            return made
        if type(key) is complex or (
            type(key) in (tuple, frozenset) and all(type(part) in _ATOMS for part in key)
        ):
            return key
        return Key(made)

    def _call(self, call: Call) -> Any:
        """What becomes of a call: by its function, or an object."""
        function = call.function
        if type(function) is Global:
            special = _SPECIAL.get(function)
            made = numpy_nodes.made(call) if special is None else special(self, call)
            if made is not None:
                return made
        return self._object(call)

    def _object(self, call: Call) -> Object:
        """An object of any class."""
        function, args = call.function, call.args
        if function == _RECONSTRUCTOR and len(args) == 3:  # copyreg's way up to protocol 1
            function, args = args[0], args[2:] if args[2] is not None else ()
        named = self.make(function)
        made = Object(str(named) if type(named) is Global else "the result of a call")
        self._made[id(call)] = made  # before its state, which may lead back here
        made.args = tuple(map(self.make, args))
        if call.kwargs:
            made.fields = self.make(dict(call.kwargs))
        self._set_state(made, call.state)
        if call.items:
            made.items = self.make(call.items)
        if call.pairs:
            made.pairs = self.make(call.pairs)
        return made

    def _set_state(self, made: Object, state: Any) -> None:
        """Give an object its attributes: a dict of them, or one and another for its slots."""
        state = self.make(state)
        pair = state if type(state) is tuple and len(state) == 2 else (state, None)
        if all(part is None or type(part) is dict for part in pair):
            named = [part for part in (*reversed(pair), made.fields) if part]
            made.fields = ChainMap(*named) if len(named) > 1 else named[0] if named else NOTHING
        else:
            made.state = state

    def wrapped(self, kind: Any, inner: Any, state: Any) -> Object:
        """An object of a class that holds one tensor."""
        made = Object(str(kind) if type(kind) is Global else "a tensor of a class", (inner,))
        if type(inner) is Object and inner.type == made.type:  # one without values of its own
            made.args, made.fields = (), inner.fields
        self._set_state(made, state)
        return made

    # Storages and tensors

    def _persistent(self, node: Persistent) -> Any:
        """A storage, as values of one dimension; or a class, which old files name so."""
        pid = node.pid
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return self.make(pid[1])
        storage = self._storage(node)
        if storage is None:
            return node
        return self._extent(storage, 0, (storage.numel,), (1,), storage.dtype)

    def _storage(self, node: Any) -> _Storage | None:
        """The storage that a persistent id speaks of; None where it speaks of none."""
        pid = node.pid if type(node) is Persistent else None
        if self.storages is None or type(pid) is not tuple or len(pid) not in (5, 6):
            return None
        word, kind, key, _, numel, *view = pid
        dtype = STORAGES.get(kind.name) if type(kind) is Global else None
        if word != "storage" or dtype is None or type(key) is not str or type(numel) is not int:
            return None
        if not 0 <= numel < 1 << 63:
            raise self.wrong("a storage of a size that none has")
        first = 0
        if view and type(view[0]) is tuple and len(view[0]) == 3:
            _, first, part = view[0]
            given = type(first) is int and type(part) is int
            if not given or min(first, part) < 0 or first + part > numel:
                raise self.wrong("a view that is not inside of its storage")
        source, swapped = self.storages.find(key, dtype, numel)
        return _Storage(source, swapped, dtype, numel, first)

    def _extent(
        self, storage: _Storage, offset: Any, shape: Any, stride: Any, dtype: str
    ) -> Extent:
        """The values of a tensor, held against its storage."""
        sizes = self.numbers(shape), self.numbers(stride)
        (offset,) = self.numbers((offset,))
        # Torch turns the bytes of a storage round by the storage's own dtype, whatever is in it.
        swapped = storage.swapped and storage.dtype == dtype
        made = Extent(storage.source, dtype, *sizes, storage.first + offset, swapped)
        try:
            made.check()
        except FormatError as error:
            if len(self.damage) < DAMAGE:
                self.damage.append(error.with_traceback(None))
        return made

    def numbers(self, value: Any) -> tuple[int, ...]:
        """A shape or the like: a tuple of integers, or a torch.Size."""
        if type(value) is Call and value.function == _SIZE and len(value.args) == 1:
            value = value.args[0]
        fits = type(value) in (tuple, list) and all(type(n) is int for n in value)
        if not fits or any(n.bit_length() > 63 for n in value):
            raise self.wrong("a shape, a stride or an offset that is no row of integers")
        return tuple(value)

    def tensor(self, call: Call, *, typed: bool) -> Any:
        """The values of ``_rebuild_tensor`` and its successors; None if the arguments aren't."""
        args = call.args
        storage = self._storage(args[0]) if len(args) >= 4 else None
        if storage is None:
            return None
        dtype = self.make(args[6]) if typed and len(args) > 6 else f"torch.{storage.dtype}"
        if type(dtype) is not str:
            raise self.wrong("a tensor of a dtype that is not known")
        dtype = dtype.removeprefix("torch.")
        made = self._extent(storage, args[1], args[2], args[3], dtype)
        more = args[7:] if typed else args[6:]
        if more and more[0]:  # its values are to be conjugated, or negated, when they are used
            return Object("torch.Tensor", (), {"stored": made, "metadata": self.make(more[0])})
        return made


_RECONSTRUCTOR: Final = Global("copyreg", "_reconstructor")
_SIZE: Final = Global("torch", "Size")


# What becomes of calls of known functions; None where the arguments are not theirs

_Special: TypeAlias = Callable[[_Maker, Call], Any]
_SPECIAL: Final[dict[Global, _Special]] = {}


def _of(module: str, *names: str) -> Callable[[_Special], _Special]:
    """Make a function answer for calls of some names of a module."""

    def register(special: _Special) -> _Special:
        for name in names:
            _SPECIAL[Global(module, name)] = special
        return special

    return register


@_of("collections", "OrderedDict", "defaultdict")
def _mapping(maker: _Maker, call: Call) -> Any:
    if any(type(part) is not Global for part in call.args):  # pairs of Python 2; not a factory
        return None
    return maker.make({} if call.pairs is NOTHING else call.pairs)


@_of("collections", "Counter")
def _counter(maker: _Maker, call: Call) -> Any:
    fits = len(call.args) == 1 and type(call.args[0]) is dict and not call.pairs
    return maker.make(call.args[0]) if fits else _mapping(maker, call)


@_of("collections", "deque")
def _deque(maker: _Maker, call: Call) -> Any:
    given = call.args[0] if call.args and type(call.args[0]) is list else []
    return maker.make(call.items or given)


@_of("torch", "Size")
def _size(maker: _Maker, call: Call) -> Any:
    return maker.numbers(call)


@_of("torch", "device")
def _device(_maker: _Maker, call: Call) -> Any:
    match call.args:
        case (str(kind),):
            return kind
        case (str(kind), int(index)):
            return f"{kind}:{index}"
    return None


@_of("torch.serialization", "_get_layout")
def _layout(_maker: _Maker, call: Call) -> Any:
    return call.args[0] if len(call.args) == 1 and type(call.args[0]) is str else None


@_of("builtins", "getattr")
def _attribute(_maker: _Maker, call: Call) -> Any:
    match call.args:
        case (Global(module, name), str(attribute)):
            return Global(module, f"{name}.{attribute}")
    return None


@_of("torch._utils", "_rebuild_tensor", "_rebuild_tensor_v2")
def _tensor(maker: _Maker, call: Call) -> Any:
    return maker.tensor(call, typed=False)


@_of("torch._utils", "_rebuild_tensor_v3")
def _typed_tensor(maker: _Maker, call: Call) -> Any:
    return maker.tensor(call, typed=True)


@_of("torch._utils", "_rebuild_parameter", "_rebuild_device_tensor_from_numpy",
     "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_xla_tensor")  # fmt: skip
@_of("torch.nn.parameter", "Parameter")
def _as_its_data(maker: _Maker, call: Call) -> Any:
    return maker.make(call.args[0]) if call.args and call.state is None else None


@_of("torch._utils", "_rebuild_parameter_with_state")
def _parameter_with_state(maker: _Maker, call: Call) -> Any:
    if len(call.args) != 4:
        return None
    data, _, _, state = call.args
    return maker.wrapped(Global("torch.nn.parameter", "Parameter"), maker.make(data), state)


_SHARDED: Final = Global("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
_SHARDED_STATE: Final = (
    "_local_shards", "_metadata", "_process_group_state", "_sharding_spec", "_init_rrefs"
)  # fmt: skip
"""What its ``__getstate__`` gives (torch 2.13, torch/distributed/_shard/sharded_tensor/api.py)."""


@_of("torch._tensor", "_rebuild_from_type", "_rebuild_from_type_v2")
@_of("torch.tensor", "_rebuild_from_type")
def _of_a_class(maker: _Maker, call: Call) -> Any:
    if len(call.args) != 4 or type(call.args[2]) is not tuple:
        return None
    function, kind, args, state = call.args
    if kind == _SHARDED and type(state) is tuple and len(state) == len(_SHARDED_STATE):
        state = dict(zip(_SHARDED_STATE, state, strict=True))
    return maker.wrapped(kind, maker.make(Call(function, args)), state)


@_of("torch._utils", "_rebuild_wrapper_subclass")
def _wrapper(maker: _Maker, call: Call) -> Any:
    if len(call.args) != 8 or type(call.args[0]) is not Global:
        return None
    kind, dtype, shape, _, _, _, device, _ = call.args
    return _valueless(maker, str(kind), dtype, shape, device)


@_of("torch._utils", "_rebuild_meta_tensor_no_storage")
def _meta(maker: _Maker, call: Call) -> Any:
    if len(call.args) != 4:
        return None
    dtype, shape, _, _ = call.args
    return _valueless(maker, "torch.Tensor", dtype, shape, "meta")


def _valueless(maker: _Maker, kind: str, dtype: Any, shape: Any, device: Any) -> Object:
    """A tensor that has no values of its own."""
    sizes = maker.numbers(shape)
    fields = {"dtype": maker.make(dtype), "shape": sizes, "device": maker.make(device)}
    return Object(kind, (), fields)


@_of("torch._utils", "_rebuild_sparse_tensor")
def _sparse(maker: _Maker, call: Call) -> Any:
    if len(call.args) != 2 or type(call.args[1]) is not tuple:
        return None
    layout, parts = maker.make(call.args[0]), call.args[1]
    if type(layout) is not str:
        return None
    coo = layout == "torch.sparse_coo"
    names = ("indices", "values", "shape") if coo else ("compressed", "plain", "values", "shape")
    return Object(layout, (), dict(zip(names, map(maker.make, parts), strict=False)))


@_of("torch._utils", "_rebuild_qtensor")
def _quantized(maker: _Maker, call: Call) -> Any:
    made = maker.tensor(Call(call.function, call.args[:4]), typed=False)
    if made is None or len(call.args) < 5:
        return None
    return Object("torch.quantized", (made,), {"quantizer": maker.make(call.args[4])})


@_of("torch._utils", "_rebuild_nested_tensor")
def _nested(maker: _Maker, call: Call) -> Any:
    if len(call.args) != 4:
        return None
    names = ("values", "sizes", "strides", "offsets")
    return Object("torch.nested", (), dict(zip(names, map(maker.make, call.args), strict=True)))
