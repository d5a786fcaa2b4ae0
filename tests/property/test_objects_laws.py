"""Laws of the objects' bytes: exact both ways, canonical, and harmless whatever the bytes are."""

import contextlib
import datetime as dt
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from handfast.errors import FormatError
from handfast.store.objects import TensorRef, decode, encode

any_text = st.text(st.characters())  # with lone surrogates
any_float = st.integers(0, 2**64 - 1).map(
    lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]
)
numbers = st.integers() | st.integers(-(2**200), 2**200) | any_float
scalars = st.none() | st.booleans() | numbers | any_text | st.binary(max_size=40)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
zones = st.none() | st.timedeltas(
    min_value=-dt.timedelta(hours=23), max_value=dt.timedelta(hours=23)
).map(dt.timezone)
moments = st.datetimes(timezones=zones)


def untitled(dtype: Any) -> bool:
    """Titles of fields are refused, as a unit test shows."""
    fields = (dtype.fields or {}).values()
    return all(len(field) == 2 and untitled(field[0].base) for field in fields)


dtypes = hnp.scalar_dtypes() | hnp.nested_dtypes(max_leaves=3).filter(
    lambda dtype: untitled(dtype.base)
)
arrays = dtypes.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
)
leaves = (
    scalars
    | st.complex_numbers()
    | moments
    | moments.map(lambda moment: moment.timetz())
    | st.dates()
    | st.timedeltas()
    | st.builds(slice, numbers, st.none(), any_text)
    | st.builds(range, st.integers(), st.integers(), st.integers(1))
    | st.text(st.characters(codec="utf-8")).map(PurePosixPath)
    | st.builds(TensorRef, any_text)
    | dtypes
    | arrays
    | arrays.map(np.asfortranarray)
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every container, around values of a strategy."""
    lists = st.lists(inner, max_size=4)
    dicts = st.dictionaries(keys, inner, max_size=4)
    return (
        lists
        | lists.map(tuple)
        | dicts
        | dicts.map(OrderedDict)
        | dicts.map(Counter)
        | st.builds(defaultdict, st.sampled_from([None, list, int, dict, float, set]), dicts)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
        | st.builds(deque, lists, st.none() | st.integers(0, 5))
    )


values = st.recursive(leaves, containers, max_leaves=12)


ZEROS: list[Any] = [None, False, 0, 0.0, -0.0, 0j, -0j, "", b"", PurePosixPath(), TensorRef("")]
ZEROS += [slice(0), slice(0.0), range(0), range(0, 0, 2), dt.timedelta(0), dt.UTC]
ZEROS += [np.bool_(False), np.int64(0), np.float64(0), np.str_(""), np.bytes_(), np.array(0)]
ZEROS += [np.array([0]), np.zeros((1, 0)), np.zeros((0, 1)), np.zeros((2, 2), order="F")]
ZEROS += [np.zeros((2, 2)), np.dtype("i4"), np.dtype(">i4"), np.dtype([("a", "i4")])]
ZEROS += [np.dtype([("a", "i4")], align=True)]
lookalikes = st.recursive(st.sampled_from(ZEROS), containers, max_leaves=3)


def image(value: Any) -> Any:
    """What a value is, in terms that == compares by type, order and bits."""
    kind = type(value)
    match value:
        case float():
            return kind, struct.pack("<d", value)
        case complex():
            return kind, image(value.real), image(value.imag)
        case defaultdict():
            return kind, value.default_factory, image(list(value.items()))
        case dict():
            return kind, image(list(value.items()))
        case set() | frozenset():
            return kind, sorted(repr(image(element)) for element in value)
        case deque():
            return kind, value.maxlen, image(list(value))
        case list() | tuple():
            return kind, list(map(image, value))
        case slice() | range():
            return kind, image([value.start, value.stop, value.step])
        case np.ndarray():
            return kind, value.dtype, value.shape, value.flags.fnc, value.tobytes()
        case np.dtype():
            return np.dtype, value, value.isalignedstruct
        case dt.datetime() | dt.time():
            return kind, value.isoformat(), value.fold, repr(value.tzinfo)
    return kind, value


@given(values)
def test_every_value_comes_back_exact(value: Any) -> None:
    """decode(encode(v)) is v by type, order and bits, and the second encoding is the same bytes."""
    data = encode(value)
    again = decode(data)
    assert image(again) == image(value)
    assert encode(again) == data


@settings(max_examples=400)
@given(lookalikes, lookalikes)
def test_different_values_have_different_bytes(left: Any, right: Any) -> None:
    """Equal bytes mean equal values, so digests of objects can be compared."""
    assert (encode(left) == encode(right)) == (image(left) == image(right))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_format_errors(data: bytes) -> None:
    """Bare, and behind a right version."""
    for attempt in (data, b"\x92\x01" + data):
        with contextlib.suppress(FormatError):
            decode(attempt)


nodes = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["<f4", "|b1", "<U2", "<M8[s]", "C", "F", "list", "|O", "a/b"])
    | st.binary(max_size=8),
    lambda inner: st.builds(
        lambda tag, parts: [tag, *parts], st.integers(0, 32), st.lists(inner, max_size=6)
    ),
    max_leaves=20,
)


@settings(max_examples=400)
@given(nodes)
def test_arbitrary_nodes_raise_nothing_but_format_errors(node: Any) -> None:
    """Well-formed msgpack of known tags, senseless parts; what is read can be written again."""
    try:
        value = decode(msgspec.msgpack.encode([1, node]))
    except FormatError:
        return
    assert image(decode(encode(value))) == image(value)


@given(values, st.data())
def test_damaged_bytes_raise_nothing_but_format_errors(value: Any, data: st.DataObject) -> None:
    """A byte changed, or the end cut off."""
    encoded = bytearray(encode(value))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    del encoded[data.draw(st.integers(at, len(encoded))) :]
    with contextlib.suppress(FormatError):
        decode(bytes(encoded))
