"""Shows that objects come back as they were, to the type and the bit, or are refused by path."""

import collections
import datetime as dt
import enum
import inspect
import pickle
import random
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from handfast.errors import FormatError, Unstorable
from handfast.store import objects
from handfast.store.objects import DEPTH_LIMIT, TensorRef, child, decode, encode, register

UTC = dt.timezone.utc  # noqa: UP017 - the one that is tested
EAST = dt.timezone(dt.timedelta(hours=5, minutes=45), "NPT")


def bits(number: float) -> bytes:
    """A float's eight bytes."""
    return struct.pack("<d", number)


def same(left: Any, right: Any) -> bool:
    """Equal by type, order and bits, where == would let 1, 1.0 and True pass for each other."""
    if type(left) is not type(right):
        return False
    match left:
        case float():
            return bits(left) == bits(right)
        case complex():
            return same([left.real, left.imag], [right.real, right.imag])
        case dict():
            extra = [
                getattr(left, "default_factory", None),
                getattr(right, "default_factory", None),
            ]
            return extra[0] is extra[1] and same(list(left.items()), list(right.items()))
        case list() | tuple():
            return len(left) == len(right) and all(map(same, left, right))
        case deque():
            return left.maxlen == right.maxlen and same(list(left), list(right))
        case set() | frozenset():
            return same(sorted(map(repr, left)), sorted(map(repr, right)))
        case np.ndarray():
            orders = [
                (array.flags.c_contiguous, array.flags.f_contiguous) for array in (left, right)
            ]
            return (left.dtype.str, left.shape, left.tobytes(), orders[0]) == (
                right.dtype.str,
                right.shape,
                right.tobytes(),
                orders[1],
            )
        case np.generic():
            return (left.dtype, left.tobytes()) == (right.dtype, right.tobytes())
    return bool(left == right) and repr(left) == repr(right)


def float_of(pattern: str) -> float:
    """A float of given bits."""
    (number,) = struct.unpack(">d", bytes.fromhex(pattern))
    return float(number)


VALUES: dict[str, Any] = {
    "none": None,
    "bools are no ints": [True, 1, 1.0, False, 0, 0.0],
    "ints at every border": [
        sign * (1 << size) + by
        for size in (0, 5, 7, 8, 15, 16, 31, 32, 62, 63, 64, 65, 127, 128, 129, 1000)
        for sign in (1, -1)
        for by in (-1, 0, 1)
    ],
    "PCG64 has 128 bits": np.random.PCG64(7).state,
    "signed zeros, infinities, subnormals": [
        0.0,
        -0.0,
        1e400,
        -1e400,
        5e-324,
        1.7976931348623157e308,
    ],
    "NaN payloads": [
        float_of(pattern)
        for pattern in (
            "7ff8000000000000",
            "fff8000000000001",
            "7ff0000000000001",
            "7ff8deadbeef0000",
        )
    ],
    "strings": ["", "ß", "\0", "\U0001f600", "a" * 70_000],
    "file names that are no UTF-8": [b"\xff\xfe".decode("utf-8", "surrogateescape"), "\ud800"],
    "bytes": [b"", b"\0\xff", b"x" * 70_000],
    "complex": [complex(-0.0, float("nan")), complex(float("inf"), -0.0)],
    "tuples are no lists": [(), [], ((),), ([],), [()], (1, [2, (3,)])],
    "random.setstate needs tuples": random.Random(1).getstate(),
    "order of a dict": {"b": 1, "a": 2, "": 3},
    "keys of every kind": {
        None: 0,
        1: "int",
        "1": "str",
        b"1": "bytes",
        2.5: "float",
        (1, ("x", None)): "tuple",
        1 << 70: "large",
        float("nan"): "nan",
        "a/b": 1,
        (): 2,
        "\ud800": 3,
    },
    "True as a key": {True: 1, False: 2},
    "-0.0 as a key": {-0.0: 1},
    "OrderedDict": OrderedDict([("z", 1), ("a", OrderedDict())]),
    "MultiStepLR.milestones": Counter({30: 1, 80: 2}),
    "defaultdicts": [
        defaultdict(factory, {"a": 1}) for factory in (None, list, int, dict, float, set)
    ],
    "sets": [set(), {1, "a", None, (1, 2)}, {frozenset({1}), frozenset()}],
    "frozenset": frozenset({"a", b"a"}),
    "deques": [deque(), deque([1, 2], 2), deque([[]], 5), deque(maxlen=0)],
    "slices and ranges": [
        slice(None),
        slice(1, [2], -3),
        range(5),
        range(10, -5, -3),
        range(1 << 80),
    ],
    "paths": [Path("/a/b"), Path("."), PurePosixPath("a/../b"), PureWindowsPath("C:\\x")],
    "a path of no valid UTF-8": Path("/tmp/\udcff"),
    "dates": [dt.date.min, dt.date.max, dt.date(2024, 2, 29)],
    "times": [dt.time.min, dt.time.max, dt.time(1, 2, 3, 4, UTC, fold=1)],
    "datetimes": [
        dt.datetime.min,  # noqa: DTZ901 - naive on purpose
        dt.datetime.max.replace(tzinfo=EAST),
        dt.datetime(2024, 1, 2, 3, fold=1),  # noqa: DTZ001 - naive on purpose
        dt.datetime(2024, 1, 2, tzinfo=UTC),
    ],
    "timedeltas": [dt.timedelta.min, dt.timedelta.max, dt.timedelta(microseconds=-1)],
    "time zones": [
        UTC,
        EAST,
        dt.timezone(dt.timedelta(0), "UTC"),
        dt.timezone(dt.timedelta(-1, 60)),
    ],
    "a tensor's place": {"w": TensorRef("model/w"), "cut": TensorRef("model/v", (1, None, 0))},
    "NumPy's scalars": [
        kind(1)
        for kind in (
            np.bool_,
            np.int8,
            np.uint64,
            np.float16,
            np.float32,
            np.float64,
            np.complex64,
            np.complex128,
        )
    ],
    "NumPy's text scalars": [np.str_(""), np.str_("a\0"), np.bytes_(b""), np.bytes_(b"a\0")],
    "NumPy's other scalars": [
        np.datetime64("2024-01-02"),
        np.datetime64("NaT", "us"),
        np.timedelta64(3, "25s"),
        np.void(b"abc"),
        np.float32(np.nan),
        np.float64(-0.0),
        np.zeros(1, [("a", "f4"), ("b", "i8", (2,))])[0],
    ],
    "arrays": [
        np.arange(6).reshape(2, 3),
        np.zeros((0, 3), ">f2"),
        np.array(5),
        np.array(["ab", ""]),
        np.array([b"x"]),
        np.array([True, False]),
        np.arange(3, dtype=">u4"),
        np.zeros((1,) * 64),
        np.array(["2024", "NaT"], "M8[s]"),
        np.array([np.nan, -0.0]),
        np.ndarray((2,), "V3"),
        np.ndarray((0, 1 << 40), "f4"),
    ],
    "arrays in Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "structured arrays": np.zeros(
        3, np.dtype([("a", "i1"), ("b", ">f8"), ("c", "U2", (2, 2))], align=True)
    ),
    "legacy NumPy generator": np.random.RandomState(3).get_state(),
    "dtypes": [np.dtype(code) for code in ("f4", ">i2", "S0", "U3", "V0", "M8[ns]", "?", "c16")],
    "structured dtypes": [
        np.dtype([]),
        np.dtype([("a", "f4")], align=True),
        np.dtype(("f4", (2, 3))),
        np.dtype({"names": ["b", "a"], "formats": ["i1", "i4"], "offsets": [9, 0], "itemsize": 16}),
    ],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_it_comes_back_exact(value: Any) -> None:
    """By type and bits, and nothing but bytes in between."""
    data = encode(value)
    assert type(data) is bytes
    again = decode(data)
    assert same(value, again), f"{value!r} came back as {again!r}"
    assert encode(again) == data


def test_the_comparison_itself_can_tell() -> None:
    """A blind `same` would make the test above worthless."""
    unequal = [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ([1], (1,)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({}, OrderedDict()),
        (defaultdict(int), defaultdict(list)),
        (deque(maxlen=1), deque()),
        (float("nan"), -float("nan")),
        (np.float32(1), np.float64(1)),
        ({1}, {True}),
        (np.zeros((2, 2)), np.zeros((2, 2), order="F")),
        (Path("a"), PurePosixPath("a")),
        (UTC, dt.timezone(dt.timedelta(0), "UTC")),
        (np.zeros(2, "f4"), np.zeros(2, "f8")),
    ]
    assert not any(same(left, right) for left, right in unequal)


def test_arrays_come_back_writeable() -> None:
    """A loader goes on filling the array that it stored."""
    array: Any = decode(encode(np.arange(3)))
    array[0] = 7
    assert array.tolist() == [7, 1, 2]


def test_the_bytes_do_not_depend_on_the_hash_seed() -> None:
    """Else equal states of two ranks would have unequal digests."""
    code = (
        "import sys; from handfast.store.objects import encode;"
        "sys.stdout.write(encode({'a', 'b', 'c', ('d',), b'e', 1, None}).hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "012"
    }
    assert len(outputs) == 1


def test_numpy_is_not_imported_for_states_without_it() -> None:
    """The agent and the commands read manifests where no NumPy is installed."""
    code = (
        "import sys; from handfast.store.objects import encode, decode;"
        "decode(encode({'a': [1, (2,)]})); sys.exit('numpy' in sys.modules)"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_where_numpy_is_missing_its_values_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command without NumPy says what to install."""
    data = encode({"a": np.float32(1)})
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(FormatError, match="install numpy"):
        decode(data)


class Colour(enum.Enum):
    """An enum of the user's."""

    RED = 1


class Pair(NamedTuple):
    """A tuple that would come back as a plain one."""

    a: int
    b: int


class Custom:
    """A class of the user's that can be pickled."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __eq__(self, other: object) -> bool:
        return type(other) is Custom and other.inner == self.inner

    __hash__ = None


UNSTORABLE: dict[str, tuple[Any, str]] = {
    "lambda": (lambda: 0, "code has no bytes"),
    "builtin": (print, "code has no bytes"),
    "method": ([].append, "code has no bytes"),
    "class": (Custom, "code has no bytes"),
    "enum": (Colour.RED, "no encoding"),
    "namedtuple": (Pair(1, 2), "subclass of tuple"),
    "dict's child": (type("Config", (dict,), {})(), "subclass of dict"),
    "int's child": (type("Id", (int,), {})(1), "subclass of int"),
    "str's child": (type("Tag", (str,), {})("a"), "subclass of str"),
    "path's child": (type("P", (PurePosixPath,), {})("a"), "subclass of PurePosixPath"),
    "user's class": (Custom(1), "no encoding"),
    "generator": ((x for x in "a"), "no encoding"),
    "file": (sys.stdout, "no encoding"),
    "tensor": (torch.ones(2), "no encoding"),
    "bytearray": (bytearray(b"a"), "no encoding"),
    "object array": (np.array([object()]), "alone do not say"),
    "object dtype": (np.dtype("O"), "alone do not say"),
    "longdouble": (np.longdouble(1), "alone do not say"),
    "StringDType": (np.array(["a"], np.dtypes.StringDType()), "alone do not say"),
    "nested object dtype": (np.zeros(1, [("a", "O")]), "alone do not say"),
    "titles": (np.dtype([(("title", "a"), "f4")]), "alone do not say"),
    "dtype's metadata": (np.dtype("f4", metadata={"a": 1}), "alone do not say"),
    "masked array": (np.ma.zeros(2), "no encoding"),
    "matrix of a child": (np.zeros(2).view(type("A", (np.ndarray,), {})), "no encoding"),
    "key": ({torch.float32: 1}, "key of type torch.dtype"),
    "key in a tuple": ({(1, (Path("a"),)): 1}, "key of type builtins.tuple"),
    "factory": (defaultdict(lambda: 0), "factory is none of"),
}


@pytest.mark.parametrize(("value", "why"), UNSTORABLE.values(), ids=UNSTORABLE)
def test_what_cannot_be_stored_names_its_path_and_the_ways_out(value: Any, why: str) -> None:
    """LambdaLR, closures and open files end here, before anything is written."""
    with pytest.raises(Unstorable, match=why) as caught:
        encode({"a/b": [0, {"x": (value,), 3: 1}]}, path="scheduler")
    assert caught.value.path == "scheduler/a~1b[1]/x[0]"
    assert caught.value.type_name == f"{type(value).__module__}.{type(value).__qualname__}"
    for way in ("state_dict()", "handfast.register(", "pickle=('scheduler/a~1b[1]/x[0]',)"):
        assert way in str(caught.value)


@pytest.mark.parametrize(
    ("state", "path"),
    [
        (print, ""),
        ({"a": print}, "a"),
        ([print], "[0]"),
        ({3: {None: print}}, "[3][None]"),
        ({("a", 1): print}, "[('a', 1)]"),
        (deque([0, print], 5), "[1]"),
        (defaultdict(list, a=print), "a"),
        (OrderedDict(a=Counter(b=print)), "a/b"),
        ({"a": slice(print)}, "a"),
        ({"a": {print}}, "a"),
        ({"a~/": print}, "a~0~1"),
    ],
)
def test_paths_lead_to_the_object(state: Any, path: str) -> None:
    """Keys, indexes and the odd containers."""
    with pytest.raises(Unstorable) as caught:
        encode(state)
    assert caught.value.path == path


def test_children_of_paths() -> None:
    """The one rule for names that capture uses, too."""
    assert child("", "model") == "model"
    assert child("a", "b/c~d") == "a/b~1c~0d"
    assert child("a", 3) == "a[3]"
    assert len(child("a", ("x" * 1000,))) < 100


def test_objects_that_are_too_many_are_refused_by_the_heaviest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or an epoch would converge whose manifest no agent could hand to a trainer."""
    monkeypatch.setattr(objects, "MAX_BYTES", 1000)
    state = {"a": 1, "replay": {"buffer": [1, np.zeros(1000, "u1")]}, "log": ["x" * 300] * 2}
    with pytest.raises(Unstorable, match="may take 1000 bytes, and these take 1") as caught:
        objects.encode(state)
    assert (caught.value.path, caught.value.type_name) == ("replay/buffer[1]", "numpy.ndarray")
    with pytest.raises(Unstorable) as caught:
        objects.encode({"many": [["x" * 100] for _ in range(20)]})
    assert caught.value.path == "many"
    assert objects.encode({"a": "x" * 900})


def test_cycles_and_depth_are_refused() -> None:
    """Neither hangs nor overflows; equal siblings are no cycle."""
    loop: dict[str, Any] = {"a": []}
    loop["a"].append(loop)
    with pytest.raises(Unstorable, match="it contains itself"):
        encode(loop)
    shared = [1]
    assert decode(encode([shared, shared, ()])) == [[1], [1], ()]

    def nested(levels: int) -> Any:
        value: Any = 1 << 70
        for _ in range(levels):
            value = [value]
        return value

    deepest = nested(DEPTH_LIMIT)
    assert decode(encode(deepest)) == deepest
    for levels in (DEPTH_LIMIT + 1, 100_000):
        with pytest.raises(Unstorable, match="more than 256 levels"):
            encode(nested(levels))


def test_a_deep_stack_of_the_caller_is_no_crash() -> None:
    """RecursionError is turned into the two errors that callers know."""
    value: Any = None
    for _ in range(DEPTH_LIMIT):
        value = [value]
    data = encode(value)

    def down(levels: int, act: Any) -> Any:
        return act() if levels == 0 else down(levels - 1, act)

    frames = sys.getrecursionlimit() - len(inspect.stack()) - 150
    with pytest.raises(Unstorable, match="nested too deeply"):
        down(frames, lambda: encode(value))
    with pytest.raises(FormatError):
        down(frames, lambda: decode(data))


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(objects, "_REGISTRY", dict(objects._REGISTRY))
    monkeypatch.setattr(objects, "_BY_NAME", dict(objects._BY_NAME))
    return


@pytest.mark.usefixtures("clean_registry")
class TestRegistered:
    """A type of the user's, in plain values."""

    def test_it_comes_back(self) -> None:
        """Exactly this type, also inside of itself."""
        register(
            Custom, "tests.Custom", lambda custom: {"inner": custom.inner}, lambda d: Custom(**d)
        )
        value = {"a": [Custom(Custom((1, 1 << 70)))]}
        assert decode(encode(value)) == value
        with pytest.raises(Unstorable, match="no encoding"):
            encode(type("Child", (Custom,), {})(1))

    def test_an_unstorable_part_has_a_path(self) -> None:
        """Inside of what the encoder gave."""
        register(Custom, "tests.Custom", lambda custom: {"inner": custom.inner}, Custom)
        with pytest.raises(Unstorable) as caught:
            encode({"a": Custom([print])})
        assert caught.value.path == "a/inner[0]"

    def test_a_reader_without_the_registration_is_told(self) -> None:
        """Nothing is imported by name out of a file."""
        register(Custom, "tests.Custom", lambda custom: custom.inner, Custom)
        data = encode(Custom(1))
        objects._BY_NAME.clear()
        with pytest.raises(FormatError, match=r"'tests.Custom' is stored here.*register\(\)"):
            decode(data, where="x.manifest")

    def test_the_last_registration_wins(self) -> None:
        """A notebook's cell that defines the class is run twice."""
        register(Custom, "tests.Custom", lambda custom: custom.inner, lambda _: 1)
        again = type("Custom", (), {})
        register(again, "tests.Custom", lambda _: None, lambda _: 2)
        assert decode(encode(again())) == 2

    def test_errors_of_the_users_functions_are_named(self) -> None:
        """On both sides, and an encoder that gives its own argument does not hang."""
        register(Custom, "tests.Custom", lambda custom: custom.nothing, lambda _: 1 // 0)
        with pytest.raises(Unstorable, match="its registered encoder raised AttributeError"):
            encode(Custom(1))
        register(Custom, "tests.Custom", lambda _: 0, lambda _: 1 // 0)
        with pytest.raises(FormatError, match=r"decoder of tests.Custom raised ZeroDivisionError"):
            decode(encode(Custom(1)))
        register(Custom, "tests.Custom", lambda custom: custom, lambda _: 0)
        with pytest.raises(Unstorable, match="contains itself"):
            encode(Custom(1))

    @pytest.mark.parametrize("kind", [int, dict, type(None), collections.deque, TensorRef])
    def test_built_in_types_stay_as_they_are(self, kind: type) -> None:
        """Else old files would change their meaning."""
        with pytest.raises(ValueError, match="is stored as it is"):
            register(kind, "x", str, str)


class TestPickle:
    """Refused, unless asked for by path."""

    def test_it_is_used_only_where_listed_and_needed(self) -> None:
        """By path or glob; plain values beside it stay plain."""
        value = {"a": [Custom(1), 2], "b": Custom(3)}
        for listed in (("a[0]", "b"), ("*",), ("[ab]*",)):
            assert decode(encode(value, pickle=listed), pickle=listed) == value
        with pytest.raises(Unstorable) as caught:
            encode(value, pickle=("a*",))
        assert caught.value.path == "b"
        assert encode({"a": 1}, pickle=("*",)) == encode({"a": 1})

    def test_it_is_not_read_unless_listed(self) -> None:
        """Whoever can write the run could run code in the trainer."""
        data = encode({"a": Custom(1)}, path="extra", pickle=("extra/a",))
        for listed in ((), ("extra/b",), ("a",)):
            with pytest.raises(
                FormatError, match=r"a pickle stands at extra/a.*pickle=\('extra/a',\)"
            ):
                decode(data, pickle=listed)

    def test_what_pickle_cannot_do_either_is_said(self) -> None:
        """On both sides."""
        with pytest.raises(Unstorable, match="pickle could not write it either"):
            encode({"a": lambda: 0}, pickle=("a",))
        for blob in (b"", b"garbage", pickle.dumps(Custom(1))[:-2]):
            data = msgspec.msgpack.encode([1, [31, "a", blob]])
            with pytest.raises(FormatError, match="a: the pickle there could not be read"):
                decode(data, pickle=("a",))


HOSTILE: dict[str, Any] = {
    "empty array": [],
    "no tag": [["a"]],
    "bool for a tag": [True, 1],
    "map": {"a": 1},
    "ext": msgspec.msgpack.Ext(5, b"a"),
    "timestamp": dt.datetime(2024, 1, 1, tzinfo=UTC),
    "unknown tag": [99, 1],
    "negative tag": [-1],
    "key without value": [2, 1],
    "list as a key": [2, [0], 1],
    "key twice": [2, 1, 1, True, 2],
    "factory": [5, "eval"],
    "factory of a list": [5, [0]],
    "no factory": [5],
    "list in a set": [6, [0]],
    "element twice": [6, 1, True],
    "deque too long": [8, 1, 1, 2],
    "deque of a str": [8, "1", 1],
    "no maxlen": [8],
    "negative maxlen": [8, -1],
    "huge maxlen": [8, [21, b"\x01" + bytes(20)]],
    "complex of str": [9, "1+2j"],
    "complex of ints": [9, 1, 2],
    "short slice": [10, 1],
    "range of floats": [11, 1.0, 2.0, 1.0],
    "range step 0": [11, 0, 1, 0],
    "path of bytes": [12, b"a"],
    "date": [15, 2023, 2, 29],
    "date of bool": [15, 2023, True, 1],
    "huge year": [15, 1 << 63, 1, 1],
    "time": [16, 25, 0, 0, 0, 0, None],
    "fold": [16, 2, 0, 0, 0, 2, None],
    "zone of a str": [16, 1, 0, 0, 0, 0, "UTC"],
    "datetime of pickled bytes": [17, b"\x07\xe8\x01\x02\x00\x00\x00\x00\x00\x00"],
    "timedelta": [18, 1 << 62, 0, 0],
    "zone": [19, [18, 5, 0, 0]],
    "zone without an offset": [19],
    "zone of ints": [19, 1, 2],
    "tensor without a path": [20, 5],
    "tensor without anything": [20],
    "tensor that is cut by a word": [20, "w", "rows"],
    "int of a str": [21, "1"],
    "int of two": [21, b"1", b"2"],
    "str of a str": [22, "1"],
    "str of bad bytes": [22, b"\xff"],
    "object dtype": [24, "|O8"],
    "longdouble": [24, "<f16"],
    "list of fields": [24, "i4,i4"],
    "no unit": [24, "<M8"],
    "bad unit": [24, "<M8[parsec]"],
    "huge string": [24, "<U99999999999999"],
    "dtype of an int": [24, 5],
    "empty dtype": [24],
    "sub-array of a str": [24, "f4", [1, 2]],
    "sub-array of a list": [24, [24, "<f4"], [0, 2]],
    "negative sub-array": [24, [24, "<f4"], [1, -2]],
    "structure": [24, [1, "a"], [1, "f4"], [1, 0], 4, False],
    "overlong structure": [24, [1, "a"], [1, [24, "<f4"]], [1, 2], 4, False],
    "names": [24, [1, 1], [1, [24, "<f4"]], [1, 0], 4, False],
    "name twice": [24, [1, "a", "a"], [1, [24, "<f4"], [24, "<f4"]], [1, 0, 0], 4, False],
    "scalar of too few bytes": [25, [24, "<f4"], b"abc"],
    "scalar without a dtype": [25, "<f4", b"abcd"],
    "np.bytes_ of an int": [25, [24, "|S4"], 1 << 40],
    "np.str_ of bytes": [25, [24, "<U4"], b"a"],
    "array of too few bytes": [26, [24, "<f4"], [1, 2, 2], "C", b"abc"],
    "array of negative shape": [26, [24, "|i1"], [1, -2, -2], "C", b"abcd"],
    "array of float shape": [26, [24, "|i1"], [1, 4.0], "C", b"abcd"],
    "array of str shape": [26, [24, "|i1"], [1, "4"], "C", b"abcd"],
    "array of 65 dimensions": [26, [24, "|i1"], [1, *[1] * 65], "C", b"a"],
    "array of an odd order": [26, [24, "|i1"], [1, 1], "Q", b"a"],
    "array of an int's bytes": [26, [24, "|i1"], [1, 1], "C", 1],
    "short array": [26, [24, "|i1"]],
    "registered of no name": [30, [0], 1],
    "registered of nothing": [30],
    "pickle of no path": [31, 1, b""],
    "pickle of a str": [31, "a", "b"],
    "short pickle": [31],
}


@pytest.mark.parametrize("node", HOSTILE.values(), ids=HOSTILE)
def test_nodes_that_no_value_is_written_as_are_refused(node: Any) -> None:
    """With the file's name, and no other error."""
    with pytest.raises(FormatError, match=r"^x\.manifest: "):
        decode(msgspec.msgpack.encode([1, node]), where="x.manifest", pickle=("*",))
    with pytest.raises(FormatError):
        decode(msgspec.msgpack.encode([1, [0, [2, "a", node]]]), pickle=("*",))


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ([9, 1.0], "1 parts where 2 belong"),
        ([9, 1, 2], "a part of type int does not belong there"),
        ([2, 1], "a key without a value"),
        ([2, [12, "a"], 1], "a key that is neither a scalar nor a tuple of scalars"),
        ([2, [1, [12, "a"]], 1], "a key that is neither a scalar nor a tuple of scalars"),
        ([2, 1, 1, True, 2], "a key stands twice"),
        ([99, 1], "the tag 99 is unknown: read this with a later handfast"),
        ([31, 1, b""], "a pickle without a path or data"),
        ({}, "a dict of msgpack that no value is written as"),
        ([24, [24, "<f4"]], "the parts of a dtype are not those of one"),
        ([24, "O"], "the dtype 'O' is none that is stored"),
        ([25, "<f4", b"abcd"], "a str where a dtype belongs"),
        ([25, [24, "<U4"], b"a"], "a bytes in a scalar of <U4"),
        ([26, [24, "<f4"], [1, 2, 2], "C", b"abc"], r"3 bytes for shape \(2, 2\) of float32"),
    ],
)
def test_errors_of_nodes_say_what_is_wrong(node: Any, says: str) -> None:
    """And not what Python happens to say of it."""
    with pytest.raises(FormatError, match=says):
        decode(msgspec.msgpack.encode([1, node]), pickle=("*",))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated"),
        (b"\xc0", "begin with a format version"),
        (b"\x90", "begin with a format version"),
        (b"\x91\x01", "0 values, where one belongs"),
        (b"\x93\x01\xc0\xc0", "2 values, where one belongs"),
        (b"\x92\xc3\xc0", "begin with a format version"),
        (b"\x92\x02\xc0", "objects of format 2, where this handfast reads 1"),
        (b"\x92\x01\xc0\xc0", "trailing"),
        (b"\x92\x01\xdd\xff\xff\xff\xff", "truncated"),
        (b"\x92\x01\xc6\xff\xff\xff\xff", "truncated"),
        (b"\x92\x01\xa1\xff", "decode|utf"),
        (b"\x92\x01" + b"\x92\x00" * 10_000 + b"\xc0", "recursion|levels deep"),
        (b"\x92\x01" + b"\x92\x00" * 300 + b"\xc0", "more than 256 levels deep"),
    ],
)
def test_bytes_that_are_no_objects_are_refused(data: bytes, says: str) -> None:
    """Other versions by number; lengths that lie cost no memory."""
    with pytest.raises(FormatError, match=says):
        decode(data)


def test_every_flip_and_cut_of_every_kind_is_harmless() -> None:
    """Another value or a FormatError, no other error (the manifest's digest finds damage)."""
    outcomes = Counter[str]()
    for value in VALUES.values():
        data = encode(value)[:400]
        cuts = [data[:length] for length in range(len(data))]
        flips = [
            data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            for at in range(len(data))
            for flip in (0x01, 0x10, 0x80, 0xFF)
        ]
        for hurt in cuts + flips:
            try:
                decode(hurt, pickle=())
            except FormatError:
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
    assert outcomes["refused"] > 10_000
    assert outcomes["read"] > 1_000
