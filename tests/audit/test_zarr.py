"""Arrays in chunks: metadata of zarr 2 and 3, and values against an array that lies whole."""

import json
import math
import struct
import zlib
from collections.abc import Mapping
from itertools import islice, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit.extent import Held
from handfast.audit.formats.crc32c import crc32c
from handfast.audit.formats.zarr import Chunked, Grid, places, read_grid
from handfast.errors import Damaged, FormatError

ZARR2 = {
    "zarr_format": 2,
    "shape": [4, 6],
    "chunks": [2, 3],
    "dtype": "<f4",
    "compressor": {"id": "zstd", "level": 1},
    "fill_value": None,
    "order": "C",
    "filters": None,
    "dimension_separator": ".",
}
ZARR3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4, 6],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 3]}},
    "chunk_key_encoding": {"name": "default"},
    "fill_value": 0.0,
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
}


def grid(settings: Mapping[str, Any], **other: Any) -> Grid:
    """Read metadata, with some of it replaced."""
    return read_grid(json.dumps({**settings, **other}).encode(), "x")


def test_zarr_2_is_read() -> None:
    """Shape, chunks, NumPy's dtypes by torch's names, the codec, and what chunks are called."""
    found = grid(ZARR2)
    assert found == Grid(
        "float32", (4, 6), (2, 3), (2, 3), False, "zstd", True, "", "."
    )  # fmt: skip
    assert found.counts == (2, 2)
    assert found.name((1, 0)) == "1.0"
    names = {"|b1": "bool", "<u2": "uint16", "<c8": "complex64", "bfloat16": "bfloat16"}
    assert {code: grid(ZARR2, dtype=code).dtype for code in names} == names


def test_zarr_3_is_read() -> None:
    """The same, and shards: chunks within what lies under one name."""
    found = grid(ZARR3)
    assert found == Grid("float32", (4, 6), (2, 3), (2, 3), False, "", True, "c", "/")
    assert found.name((1, 0)) == "c/1/0"
    sharded = grid(ZARR3, codecs=[sharding([1, 3])])
    assert (sharded.chunk, sharded.inner, sharded.sharded) == ((2, 3), (1, 3), True)
    named = {"name": "v2", "configuration": {"separator": "/"}}
    assert grid(ZARR3, chunk_key_encoding=named).name((1, 0)) == "1/0"


def sharding(inner: list[int], **other: Any) -> dict[str, Any]:
    """The codec that puts several chunks into one."""
    codecs = [{"name": "bytes"}, {"name": "zstd"}]
    index = [{"name": "bytes"}, {"name": "crc32c"}]
    settings = {"chunk_shape": inner, "codecs": codecs, "index_codecs": index, **other}
    return {"name": "sharding_indexed", "configuration": settings}


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": ">f4"},
        {"chunks": [2]},
    ],
)
def test_zarr_2_that_is_not_read_is_named(changed: dict[str, Any]) -> None:
    """FormatError, since it may be sound all the same."""
    with pytest.raises(FormatError, match="not read here"):
        grid(ZARR2, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"codecs": [{"name": "transpose"}, {"name": "bytes"}]},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
        {"codecs": [{"name": "bytes"}, {"name": "zstd"}, {"name": "crc32c"}]},
        {"codecs": [sharding([1, 3], index_location="start")]},
        {"codecs": [sharding([1, 3], index_codecs=[{"name": "bytes"}])]},
        {"codecs": [sharding([1, 2])]},
        {"shape": [4]},
    ],
)
def test_zarr_3_that_is_not_read_is_named(changed: dict[str, Any]) -> None:
    """The same of version 3: other codecs, other indices, grids that do not fit."""
    with pytest.raises(FormatError, match="not read here"):
        grid(ZARR3, **changed)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"{}", b"\xff", b'{"zarr_format":3}', json.dumps({**ZARR2, "shape": [-1]})],
)
def test_what_is_no_metadata_is_damaged(data: bytes | str) -> None:
    """Cut, of another type, or with a shape that no array has."""
    with pytest.raises(Damaged, match="not the metadata of an array"):
        read_grid(data if isinstance(data, bytes) else data.encode(), "x")


def test_a_codec_without_its_name_is_damaged() -> None:
    """Metadata of the right types that lacks what it needs."""
    with pytest.raises(Damaged):
        grid(ZARR2, compressor={})


@pytest.mark.parametrize("settings", [ZARR2, ZARR3])
def test_names_and_places_are_each_other_s_inverse(settings: dict[str, Any]) -> None:
    """And nothing else is a name: not of a place beyond the grid, nor of other dimensions."""
    found = grid(settings)
    for place in product(range(2), range(2)):
        assert found.place(found.name(place)) == place
    for name in ("2.0", "c/2/0", "0", "c", "c/0", "x.0", "-1.0", "0.0.0", "", "\u0660.0"):
        assert found.place(name) is None


def test_a_number_by_itself_has_one_chunk() -> None:
    """Called "0" in zarr 2, and "c" in zarr 3."""
    two, three = grid(ZARR2, shape=[], chunks=[]), grid(
        ZARR3, shape=[], chunk_grid={"name": "regular", "configuration": {"chunk_shape": []}}
    )  # fmt: skip
    assert (two.name(()), three.name(())) == ("0", "c")
    assert two.place("0") == three.place("c") == ()
    assert two.place("1") is None


# Values


def element(place: tuple[int, ...], shape: tuple[int, ...]) -> bytes:
    """Two bytes that differ from element to element, and zero beyond the array's end."""
    if any(n >= size for n, size in zip(place, shape, strict=True)):
        return b"\0\0"
    number = 1
    for n, size in zip(place, shape, strict=True):
        number = number * size + n
    return struct.pack("<H", number % 65535)


def box(start: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...]) -> bytes:
    """The elements of a box, row-major."""
    ranges = (range(s, s + n) for s, n in zip(start, size, strict=True))
    return b"".join(element(place, shape) for place in product(*ranges))


def stored(found: Grid, *, drop: tuple[str, ...] = ()) -> dict[str, Held]:
    """All chunks of an array, as its grid says."""
    chunks = {}
    for place in product(*map(range, found.counts)):
        start, _ = found.box(place)
        name = found.name(place)
        data = shard(found, start) if found.sharded else box(start, found.chunk, found.shape)
        if name not in drop:
            chunks[name] = Held(zlib.compress(data) if found.codec == "zlib" else data, name)
    return chunks


def shard(found: Grid, start: tuple[int, ...]) -> bytes:
    """A shard: its chunks one after the other, and the index behind them."""
    ratio = [c // i for c, i in zip(found.chunk, found.inner, strict=True)]
    data, index = b"", b""
    for place in product(*map(range, ratio)):
        at = tuple(s + p * i for s, p, i in zip(start, place, found.inner, strict=True))
        if all(n < size for n, size in zip(at, found.shape, strict=True)):
            chunk = box(at, found.inner, found.shape)
            index += struct.pack("<QQ", len(data), len(chunk))
            data += chunk
        else:
            index += b"\xff" * 16
    return data + index + struct.pack("<I", crc32c(index))


def values(found: Grid, *, drop: tuple[str, ...] = (), whole: bool = True) -> Chunked:
    """The values of an array that was stored so."""
    first = (0,) * len(found.shape)
    return Chunked("x", found, stored(found, drop=drop), whole, found.shape, first)


def joined(chunked: Chunked, most: int) -> bytes:
    """All blocks together; each has the length that it should."""
    blocks = [bytes(block) for block in chunked.blocks(most)]
    assert all(len(block) == 2 * most for block in blocks[:-1])
    return b"".join(blocks)


SIDES = st.integers(1, 5)


@given(st.lists(st.tuples(SIDES, SIDES, SIDES), max_size=3), st.integers(1, 40), st.booleans())
def test_chunks_put_together_are_the_array(
    sides: list[tuple[int, int, int]], most: int, sharded: bool
) -> None:
    """For any shape, chunks that divide it or not, shards of chunks or not, and blocks of any
    length.
    """
    shape = tuple(size for size, _, _ in sides)
    inner = tuple(size for _, size, _ in sides)
    chunk = tuple(i * (n if sharded else 1) for (_, i, n) in sides)
    codec = "" if sharded else "zlib"
    found = Grid("int16", shape, chunk, inner, sharded, codec, True, "c", "/")
    whole = box((0,) * len(shape), shape, shape)
    assert joined(values(found), most) == whole
    for place in product(*map(range, found.counts)):
        start, size = found.box(place)
        piece = Chunked("x", found, stored(found), True, size, place)
        assert joined(piece, most) == box(start, size, shape)


PLAIN = Grid("int16", (4, 6), (2, 3), (2, 3), False, "", True, "", ".")


def test_an_array_of_no_elements_has_no_blocks() -> None:
    """Whatever its chunks are."""
    found = Grid("int16", (0, 6), (2, 3), (2, 3), False, "", True, "", ".")
    assert list(values(found).blocks(1)) == []


def test_a_chunk_that_is_not_stored_is_zero_or_lost() -> None:
    """By what the writer stores: all of them, or none that is 0."""
    found = joined(values(PLAIN, drop=("0.0",), whole=False), 24)
    assert found[:6] == bytes(6)
    assert found[6:12] == box((0, 3), (1, 3), (4, 6))
    with pytest.raises(Damaged, match=r"its chunk 0\.0 is missing"):
        joined(values(PLAIN, drop=("0.0",)), 24)
    other = Grid("int16", (4, 6), (2, 3), (2, 3), False, "", False, "", ".")
    with pytest.raises(Damaged, match="missing"):
        joined(values(other, drop=("0.0",), whole=False), 24)


@pytest.mark.parametrize(("size", "match"), [(11, "here are 11"), (0, "here are 0"), (13, "more")])
def test_a_chunk_of_another_length_is_damaged(size: int, match: str) -> None:
    """Cut, empty, or too long: it is of another array."""
    chunks = stored(PLAIN)
    chunks["1.1"] = Held(bytes(size), "1.1")
    chunked = Chunked("x", PLAIN, chunks, True, PLAIN.shape, (0, 0))
    with pytest.raises(Damaged, match=match):
        joined(chunked, 5)


def test_a_shard_s_index_has_a_checksum() -> None:
    """A bit of it that changed is found; so is a shard that is shorter than its index."""
    found = Grid("int16", (4, 6), (4, 6), (2, 3), True, "", True, "c", "/")
    data = bytearray(shard(found, (0, 0)))
    data[-10] ^= 1
    for spoilt, match in ((bytes(data), "CRC-32C"), (bytes(data[-20:]), "are asked for")):
        chunks = {"c/0/0": Held(spoilt, "c/0/0")}
        with pytest.raises(Damaged, match=match):
            joined(Chunked("x", found, chunks, True, found.shape, (0, 0)), 5)


def test_a_shard_s_index_may_be_too_long() -> None:
    """Of more chunks than are read: FormatError, and no memory is taken for it."""
    found = Grid("int16", (1 << 30,), (1 << 30,), (1,), True, "", True, "c", "/")
    chunked = Chunked("x", found, {"c/0": Held(b"", "c/0")}, True, found.shape, (0,))
    with pytest.raises(FormatError, match="an index of"):
        next(chunked.blocks(1))


def test_blocks_are_of_one_element_at_least() -> None:
    """Nothing else would ever end."""
    with pytest.raises(ValueError, match="ask for one"):
        next(values(PLAIN).blocks(0))


def test_a_dtype_that_is_not_known_is_named() -> None:
    """FormatError: a later release may know it."""
    found = Grid("float128x", (1,), (1,), (1,), False, "", True, "", ".")
    with pytest.raises(FormatError, match="float128x"):
        next(Chunked("x", found, {}, True, (1,), (0,)).blocks(1))


def test_a_hostile_shape_takes_no_time() -> None:
    """An array of more than there is, none of which is stored: it is refused, and not gone through.

    Nor is a list made of the places of its chunks.
    """
    shape = (1 << 60, 1 << 60)
    found = Grid("int16", shape, (1, 1), (1, 1), False, "", True, "", ".")
    with pytest.raises(FormatError, match="0 bytes that are stored"):
        next(Chunked("x", found, {}, False, shape, (0, 0)).blocks(1))
    assert list(islice(places(found.counts), 2)) == [(0, 0), (0, 1)]
    assert list(places((2, 2))) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert list(places(())) == [()]


def test_a_packed_chunk_is_read_a_block_at_a_time() -> None:
    """Not unpacked whole: 64 MiB of zeros, of which one block is taken, cost what a block does."""
    size = 1 << 25
    found = Grid("int16", (size,), (size,), (size,), False, "zlib", True, "", ".")
    chunks = {"0": Held(zlib.compress(bytes(2 * size)), "0")}
    blocks = Chunked("x", found, chunks, True, found.shape, (0,)).blocks(10)
    assert bytes(next(blocks)) == bytes(20)
    assert math.prod(found.shape) == size
