"""Objects that are no tensors, as bytes: exact, tagged, versioned, and without pickle.

Every value becomes a node of msgpack. None, bool, float, bytes, ints of up to 64 bits and valid
strings are themselves; all else is an array of a tag and its parts, which are nodes again. So the
type of each value is in the bytes, and nothing is run to read them. Sharing is not kept: a list
that two keys refer to comes back as two equal lists. ``docs/format.md`` lists the tags.
"""

import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, time, timedelta, timezone
from fnmatch import fnmatchcase
from functools import reduce
from itertools import chain, count, repeat
from operator import attrgetter, methodcaller
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import msgspec

from handfast.errors import FormatError, Unstorable
from handfast.store import arrays
from handfast.store.kept import NOTHING, Kept, longer

__all__ = [
    "DEPTH_LIMIT",
    "MAX_BYTES",
    "VERSION",
    "TensorRef",
    "child",
    "decode",
    "encode",
    "register",
]

VERSION = 1
DEPTH_LIMIT = 256
MAX_BYTES = 512 << 20  # of one state; with the names of its tensors, less than an agent takes

T = TypeVar("T")
Node: TypeAlias = "bool | int | float | str | bytes | list[Node] | msgspec.Raw | None"


class TensorRef(msgspec.Struct, frozen=True):
    """Stands where a tensor stood: the tensor lies in the image under ``path``.

    ``dims`` has for each dimension of a device mesh that of the tensor that was cut over it, or
    None; it is empty for a tensor that lay on no mesh.
    """

    path: str
    dims: tuple[int | None, ...] = ()


def _here(_value: object) -> Iterable[object]:
    return repeat(...)


class _Kind(NamedTuple):
    """A type whose values are made of parts: how they are taken apart, joined and labelled.

    ``join`` raises ValueError or TypeError for parts that make no value. A label is the part's
    index or key, for paths; an ellipsis is the place of the value itself.
    """

    tag: int
    type: type
    split: Callable[[Any], Iterable[object]]
    join: Callable[[list[Any]], object]
    labels: Callable[[Any], Iterable[object]] = _here


_NONE = type(None)
_ATOMS = frozenset({_NONE, bool, float, bytes})
_KEYS = frozenset({_NONE, bool, int, float, str, bytes})
_FACTORIES: dict[str | None, Callable[[], object] | None] = {
    None: None,
    **{kind.__name__: kind for kind in (list, int, dict, float, set)},
}
_FACTORY_NAMES = {factory: name for name, factory in _FACTORIES.items()}

_BIG_INT, _WILD_STR, _REGISTERED, _PICKLE = 21, 22, 30, 31  # tags; 24 to 26 are those of arrays

_ENDS = ("start", "stop", "step")
_DAY = ("year", "month", "day")
_CLOCK = ("hour", "minute", "second", "microsecond", "fold", "tzinfo")


def _made_of(make: Callable[..., object], *types: type | tuple[type, ...]) -> Callable[..., object]:
    """Join for a type whose parts are its arguments, each of exactly the type given."""

    def join(parts: list[Any]) -> object:
        if len(parts) != len(types):
            raise ValueError(f"{len(parts)} parts where {len(types)} belong")
        for part, allowed in zip(parts, types, strict=True):
            kinds = allowed if isinstance(allowed, tuple) else (allowed,)
            if object not in kinds and type(part) not in kinds:
                raise ValueError(f"a part of type {type(part).__name__} does not belong there")
        return make(*parts)

    return join


def _distinct(make: Callable[[list[Any]], Any]) -> Callable[[list[Any]], object]:
    def join(parts: list[Any]) -> object:
        made = make(parts)
        if len(made) != len(parts):
            raise ValueError("an element stands twice in a set")
        return made

    return join


def _pairs(value: dict[Any, Any]) -> Iterable[object]:
    for key in value:
        if not _is_key(key):
            raise ValueError(
                f"it has a key of type {_name(type(key))}, and keys are scalars or tuples of them"
            )
    return chain.from_iterable(value.items())


def _keys_twice(value: dict[Any, Any]) -> Iterable[object]:
    return (key for key in value for _ in range(2))


def _mapping(make: Callable[[dict[Any, Any]], T]) -> Callable[[list[Any]], T]:
    def join(parts: list[Any]) -> T:
        if len(parts) % 2:
            raise ValueError("a key without a value")
        keys = parts[::2]
        if not all(map(_is_key, keys)):
            raise ValueError("a key that is neither a scalar nor a tuple of scalars")
        made = dict(zip(keys, parts[1::2], strict=True))
        if len(made) != len(keys):
            raise ValueError("a key stands twice in a dict")
        return make(made)

    return join


def _is_key(key: object) -> bool:
    return type(key) in _KEYS or (type(key) is tuple and all(map(_is_key, key)))


def _split_defaultdict(value: defaultdict[Any, Any]) -> Iterable[object]:
    if value.default_factory not in _FACTORY_NAMES:
        known = ", ".join(name for name in _FACTORIES if name)
        raise ValueError(f"its factory is none of {known}")
    return (_FACTORY_NAMES[value.default_factory], *_pairs(value))


def _join_defaultdict(parts: list[Any]) -> object:
    plain: dict[Any, Any] = _mapping(dict)(parts[1:])
    return defaultdict(_FACTORIES[parts[0]], plain)


def _join_deque(parts: list[Any]) -> object:
    made = deque(parts[1:], parts[0])
    if len(made) != len(parts) - 1:
        raise ValueError("a deque holds more than its maxlen")
    return made


def _join_time(
    hour: int, minute: int, second: int, microsecond: int, fold: int, zone: timezone | None
) -> time:
    return time(hour, minute, second, microsecond, zone, fold=fold)


def _join_datetime(year: int, month: int, day: int, *clock: Any) -> datetime:
    return datetime.combine(date(year, month, day), _join_time(*clock))


def _join_int(parts: list[Any]) -> int:
    (data,) = parts
    return int.from_bytes(data, "big", signed=True)


def _join_str(parts: list[Any]) -> str:
    (data,) = parts
    return str(data, "utf-8", "surrogatepass")


def _join_tensor(parts: list[Any]) -> TensorRef:
    path, *dims = parts
    if type(path) is not str or (dims and not {*map(type, dims)} <= {_NONE, int}):
        raise ValueError("a tensor's path and dimensions are a string and whole numbers")
    return TensorRef(path, tuple(dims))


def _as_text(path: object) -> tuple[str]:
    return (str(path),)


_PATH = type(Path())
_ZONE = (_NONE, timezone)

_KINDS = (
    _Kind(0, list, iter, list, lambda _: count()),
    _Kind(1, tuple, iter, tuple, lambda _: count()),
    _Kind(2, dict, _pairs, _mapping(dict), _keys_twice),
    _Kind(3, OrderedDict, _pairs, _mapping(OrderedDict), _keys_twice),
    _Kind(4, Counter, _pairs, _mapping(Counter), _keys_twice),
    _Kind(5, defaultdict, _split_defaultdict, _join_defaultdict, lambda v: (..., *_keys_twice(v))),
    _Kind(6, set, iter, _distinct(set)),
    _Kind(7, frozenset, iter, _distinct(frozenset)),
    _Kind(8, deque, lambda v: (v.maxlen, *v), _join_deque, lambda _: count(-1)),
    _Kind(9, complex, attrgetter("real", "imag"), _made_of(complex, float, float)),
    _Kind(10, slice, attrgetter(*_ENDS), _made_of(slice, object, object, object)),
    _Kind(11, range, attrgetter(*_ENDS), _made_of(range, int, int, int)),
    _Kind(12, _PATH, _as_text, _made_of(Path, str)),
    _Kind(13, PurePosixPath, _as_text, _made_of(PurePosixPath, str)),
    _Kind(14, PureWindowsPath, _as_text, _made_of(PureWindowsPath, str)),
    _Kind(15, date, attrgetter(*_DAY), _made_of(date, int, int, int)),
    _Kind(16, time, attrgetter(*_CLOCK), _made_of(_join_time, *[int] * 5, _ZONE)),
    _Kind(17, datetime, attrgetter(*_DAY, *_CLOCK), _made_of(_join_datetime, *[int] * 8, _ZONE)),
    _Kind(
        18,
        timedelta,
        attrgetter("days", "seconds", "microseconds"),
        _made_of(timedelta, int, int, int),
    ),
    _Kind(19, timezone, methodcaller("__getinitargs__"), lambda parts: timezone(*parts)),
    _Kind(20, TensorRef, lambda ref: (ref.path, *ref.dims), _join_tensor),
)
_BY_TYPE = {kind.type: kind for kind in _KINDS}
_JOINS: dict[int, Callable[[list[Any]], object]] = {
    **{kind.tag: kind.join for kind in _KINDS},
    **arrays.JOINS,
    _BIG_INT: _join_int,
    _WILD_STR: _join_str,
}


class _Registered(NamedTuple):
    name: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]


_REGISTRY: dict[type, _Registered] = {}
_BY_NAME: dict[str, _Registered] = {}


def register(
    kind: type, name: str, encode: Callable[[Any], object], decode: Callable[[Any], object]
) -> None:
    """Say how values of exactly this type are stored.

    ``encode`` gives a plain value that can be stored, ``decode`` makes the value of it again.
    ``name`` is what the bytes carry: the type's module and qualified name, usually. A second
    registration of a type or a name replaces the first (a notebook's cell runs twice). Raises
    ValueError for a type that handfast stores by itself.
    """
    if kind in _KEYS or kind in _BY_TYPE:
        raise ValueError(f"{_name(kind)} is stored as it is: register a type of your own")
    _REGISTRY[kind] = _BY_NAME[name] = _Registered(name, encode, decode)


def child(path: str, key: object) -> str:
    """The path of a mapping's entry: "optimizer/lr"; "/" in a key is written "~1", "~" as "~0"."""
    if type(key) is not str:
        return f"{path}[{key!r:.80}]"
    name = key.replace("~", "~0").replace("/", "~1") if "~" in key or "/" in key else key
    return f"{path}/{name}" if path else name


def encode(
    value: object, *, path: str = "", pickle: Sequence[str] = (), kept: Kept = NOTHING
) -> bytes:
    """The bytes of a value.

    ``path`` is where it stands in the state. ``pickle`` lists paths, or globs over them, where what
    can't be stored otherwise is pickled. ``kept`` has parts of it whose bytes serve again. Raises
    Unstorable, with path and type, for all else, cycles, 257 levels, and beyond ``MAX_BYTES``.
    """
    try:
        encoder = _Encoder(path, pickle, kept)
        node: Any = encoder.node(value, ...)
        if kept.begins is not None:
            node = longer(encoder.node(kept.begins, ...), node[1:])
        data = _pack([VERSION, node])
    except RecursionError:
        raise Unstorable(path, _name(type(value)), "it is nested too deeply") from None
    if len(data) > MAX_BYTES:
        raise _too_large(value, path, pickle, len(data))
    return data


def _too_large(value: Any, path: str, pickle: Sequence[str], total: int) -> Unstorable:
    """Name what takes the most room, as deep down as one thing takes most of it."""
    while type(value) in (dict, list, tuple):
        items = value.items() if type(value) is dict else enumerate(value)
        sizes = {k: len(_pack(_Encoder(child(path, k), pickle).node(v, ...))) for k, v in items}
        key = max(sizes, key=lambda k: sizes[k], default=None)
        if key is None or sizes[key] < total // 2:
            break
        path, value = child(path, key), value[key]
    return Unstorable(
        path,
        _name(type(value)),
        f"the plain objects of a state may take {MAX_BYTES} bytes, and these take {total}: keep "
        "large arrays as tensors (torch.from_numpy), which go to the image",
    )


def decode(data: bytes, *, pickle: Sequence[str] = (), where: str = "") -> object:
    """The value that was encoded. ``where`` names the file in errors.

    Nothing but registered decoders is run; pickles are read only at paths that ``pickle`` lists.
    Raises FormatError for bytes that are no encoded value, or one that can't be made here.
    """
    where = where or "stored objects"
    try:
        root = msgspec.msgpack.decode(data)
        if type(root) is not list or not root or type(root[0]) is not int:
            raise ValueError("no encoded objects: they begin with a format version")
        if root[0] != VERSION:
            raise ValueError(
                f"objects of format {root[0]}, where this handfast reads {VERSION}: "
                "read them with the handfast that wrote them, or a later one"
            )
        if len(root) != 2:
            raise ValueError(f"{len(root) - 1} values, where one belongs")
        return _Decoder(pickle).node(root[1])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: {error}") from error


_pack = msgspec.msgpack.Encoder().encode


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Encoder:
    """One walk over a value, which knows where it is."""

    def __init__(self, path: str, pickle: Sequence[str], kept: Kept = NOTHING) -> None:
        self._root, self._pickle, self._kept = path, pickle, kept.encoded
        self._trail: list[object] = []  # index or key, one a level; an ellipsis: the same place
        self._open: set[int] = set()  # ids of the containers that we are inside of

    def node(self, value: Any, label: object) -> Node:
        kind = type(value)
        if kind in _ATOMS:
            atom: Node = value
            return atom
        if kind is int:
            return _int_node(value)
        if kind is str:
            return _str_node(value)
        if (known := self._kept.get(id(value))) is not None:
            return known
        self._trail.append(label)
        if id(value) in self._open:
            self._refuse(value, "it contains itself")
        if len(self._trail) > DEPTH_LIMIT:
            self._refuse(value, f"it is nested more than {DEPTH_LIMIT} levels deep")
        self._open.add(id(value))
        node = self._compound(value)
        self._open.discard(id(value))
        self._trail.pop()
        if id(value) in self._kept:
            node = self._kept[id(value)] = msgspec.Raw(_pack(node))
        return node

    def _compound(self, value: Any) -> Node:
        try:
            tag, parts, labels = _take_apart(value)
        except ValueError as error:
            return self._pickled(value, str(error))
        nodes = list(map(self.node, parts, labels))
        if type(value) in {set, frozenset}:
            nodes.sort(key=_pack)  # else the bytes would depend on how strings hash today
        return [tag, *nodes]

    def _pickled(self, value: object, why: str) -> Node:
        path = self._path()
        if not _listed(path, self._pickle):
            self._refuse(value, why)
        import pickle

        try:
            return [_PICKLE, path, pickle.dumps(value, protocol=5)]
        except Exception as error:
            self._refuse(value, f"pickle could not write it either: {error}")

    def _path(self) -> str:
        return reduce(
            lambda path, key: path if key is ... else child(path, key), self._trail, self._root
        )

    def _refuse(self, value: object, why: str) -> NoReturn:
        raise Unstorable(self._path(), _name(type(value)), why)


def _take_apart(value: Any) -> tuple[int, Iterable[object], Iterable[object]]:
    """The tag, the parts and their labels; ValueError says why there are none."""
    kind = type(value)
    if kind in _BY_TYPE:
        known = _BY_TYPE[kind]
        return known.tag, known.split(value), known.labels(value)
    if kind in _REGISTRY:
        name, to_plain, _ = _REGISTRY[kind]
        try:
            return _REGISTERED, (name, to_plain(value)), repeat(...)
        except Exception as error:
            raise ValueError(f"its registered encoder raised {error!r}") from error
    found = arrays.split(value)
    if found is None:
        raise ValueError(_why_not(value))
    return *found, repeat(...)


def _why_not(value: object) -> str:
    if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType | type):
        return "code has no bytes that mean the same tomorrow"
    for base in type(value).__mro__[1:]:
        if base in _KEYS or base in _BY_TYPE:
            return f"as a subclass of {base.__name__} it would come back as a plain one"
    return "no encoding of it is known"


def _int_node(value: int) -> Node:
    if -(1 << 63) <= value < 1 << 64:
        return value
    return [_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)]


def _str_node(value: str) -> Node:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates: file names that were not UTF-8
        return [_WILD_STR, value.encode("utf-8", "surrogatepass")]
    return value


def _listed(path: str, patterns: Sequence[str]) -> bool:
    # Equality too, because in a glob the index of "a[3]" would be a class of characters.
    return any(path == pattern or fnmatchcase(path, pattern) for pattern in patterns)


class _Decoder:
    """One walk over nodes."""

    def __init__(self, pickle: Sequence[str]) -> None:
        self._pickle = pickle
        self._depth = 0

    def node(self, node: Any) -> object:
        kind = type(node)
        if kind in _KEYS:
            return node
        if kind is not list or not node or type(node[0]) is not int:
            raise ValueError(f"a {kind.__name__} of msgpack that no value is written as")
        self._depth += 1
        if self._depth > DEPTH_LIMIT + 1:  # one for what is no level of its own: a large int
            raise ValueError(f"nested more than {DEPTH_LIMIT} levels deep")
        parts = [part if type(part) in _KEYS else self.node(part) for part in node[1:]]
        self._depth -= 1
        tag = node[0]
        if tag == _REGISTERED:
            return _registered(parts)
        if tag == _PICKLE:
            return self._unpickled(parts)
        if tag not in _JOINS:
            raise ValueError(f"the tag {tag} is unknown: read this with a later handfast")
        return _JOINS[tag](parts)

    def _unpickled(self, parts: list[Any]) -> object:
        path, data = parts
        if type(path) is not str or type(data) is not bytes:
            raise ValueError("a pickle without a path or data")
        if not _listed(path, self._pickle):
            raise ValueError(
                f"a pickle stands at {path}, and reading it runs whatever it says. If you trust "
                f"all who can write this run, allow it: pickle=({path!r},)"
            )
        import pickle

        try:
            return pickle.loads(data)  # noqa: S301 - asked for by name
        except Exception as error:
            raise ValueError(f"{path}: the pickle there could not be read: {error!r}") from error


def _registered(parts: list[Any]) -> object:
    name, plain = parts
    if name not in _BY_NAME:
        raise ValueError(f"a {name!r} is stored here: handfast.register() it before reading")
    try:
        return _BY_NAME[name].decode(plain)
    except Exception as error:
        raise ValueError(f"the registered decoder of {name} raised {error!r}") from error
