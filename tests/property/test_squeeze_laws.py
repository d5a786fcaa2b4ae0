"""Laws of squeezed chunks: all come back, and no bytes do harm, whoever wrote them.

What damage does is shown for each bit: either `expand` raises, or what it gives has another hash
than the manifest says.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import struct
import sys
import tracemalloc

import pytest
import zstandard
from benchmarks.common.squeeze import WIDTHS, expand, squeeze
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import Damaged, FormatError
from handfast.store.manifest import CHUNK, chunk_hash

MIB = 1 << 20
widths = st.sampled_from(WIDTHS)
levels = st.sampled_from((1, 3, 9))


@st.composite
def chunks(draw: st.DrawFn) -> bytes:
    """Bytes of any length, often alike over long stretches."""
    pattern = draw(st.binary(max_size=40))
    return (pattern * draw(st.integers(1, 60)) + draw(st.binary(max_size=9)))[:CHUNK]


def floats(seed: int, count: int = 500) -> bytes:
    """Values as a layer of weights has them."""
    chance = random.Random(seed)
    return struct.pack(f"<{count}f", *(chance.gauss(0, 0.02) for _ in range(count)))


def near(chunk: bytes) -> bytes:
    """The same values a small step later."""
    values = struct.unpack(f"<{len(chunk) // 4}f", chunk)
    return struct.pack(f"<{len(values)}f", *(value * 1.00001 for value in values))


def outcome(squeezed: bytes, before: bytes | None, chunk: bytes) -> str:
    """What becomes of a chunk as its reader sees it, who holds the hash."""
    try:
        found = expand(squeezed, before, len(chunk))
    except FormatError:
        return "raised"
    assert len(found) == len(chunk)
    return "whole" if chunk_hash(found) == chunk_hash(chunk) else "found by the hash"


SAMPLES = {
    "as it was": (squeeze(random.Random(0).randbytes(200), None, 4, 1), None,
                  random.Random(0).randbytes(200)),
    "planes": (squeeze(floats(1), None, 4, 1), None, floats(1)),
    "XOR": (squeeze(near(floats(1)), floats(1), 4, 1), floats(1), near(floats(1))),
}  # fmt: skip
"""A chunk squeezed in each way, its parent, and the chunk."""


@given(chunks(), st.none() | chunks(), widths, levels)
def test_every_chunk_comes_back(chunk: bytes, before: bytes | None, width: int, level: int) -> None:
    """Shows it for lengths that are no multiple of the width, and parents of other lengths; and
    that a chunk never gets longer than by the byte that says so."""
    squeezed = squeeze(chunk, before, width, level)

    assert expand(squeezed, before, len(chunk)) == chunk
    assert len(squeezed) <= len(chunk) + 1


@given(chunks(), st.binary(min_size=1, max_size=40), widths)
def test_a_chunk_comes_back_from_its_changed_parent(
    chunk: bytes, change: bytes, width: int
) -> None:
    """Shows it where a parent is as long as the chunk, so that it is of use."""
    before = bytes(a ^ b for a, b in zip(chunk, change * (len(chunk) + 1), strict=False))

    assert expand(squeeze(chunk, before, width, 1), before, len(chunk)) == chunk


def test_a_whole_chunk_comes_back() -> None:
    """Shows it for the length that nearly all chunks have, and that one byte more is refused."""
    chunk = floats(1, CHUNK // 4)

    assert expand(squeeze(chunk, chunk, 4, 1), chunk, CHUNK) == chunk
    with pytest.raises(ValueError, match="chunks of 1048576 bytes at most"):
        squeeze(chunk + b"x", None, 4, 1)
    with pytest.raises(ValueError, match="elements of 3"):
        squeeze(chunk, None, 3, 1)


def test_each_part_of_it_makes_floats_smaller() -> None:
    """Shows that planes help, and a parent more; where chance left nothing, the bytes stay."""
    before, chunk = floats(1), near(floats(1))
    alone, planes, xored = (
        len(squeeze(chunk, *how, 1)) for how in ((None, 1), (None, 4), (before, 4))
    )

    assert xored < planes < alone
    assert len(SAMPLES["as it was"][0]) == 201


@pytest.mark.parametrize("name", SAMPLES)
def test_a_flipped_bit_is_found(name: str) -> None:
    """Shows for each bit that it is refused, or found by the chunk's hash, or did no harm: of a
    chunk that stands as it was every bit of it is left to the hash."""
    squeezed, before, chunk = SAMPLES[name]
    found = []
    for bit in range(8 * len(squeezed)):
        damaged = bytearray(squeezed)
        damaged[bit // 8] ^= 1 << bit % 8
        found.append(outcome(bytes(damaged), before, chunk))

    assert set(found[4:8]) == {"raised"}  # another version
    if name == "as it was":
        assert set(found[:8]) == {"raised"}
        assert set(found[8:]) == {"found by the hash"}
    else:
        assert {"raised", "found by the hash"} <= set(found)


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_cut_or_goes_on_is_refused(name: str) -> None:
    """Shows that no hash is needed for it."""
    squeezed, before, chunk = SAMPLES[name]

    for length in range(len(squeezed)):
        with pytest.raises(Damaged):
            expand(squeezed[:length], before, len(chunk))
    for more in (b"\0", squeezed, squeezed[1:]):
        with pytest.raises(Damaged):
            expand(squeezed + more, before, len(chunk))
    for other in (0, len(chunk) - 1, len(chunk) + 1):
        with pytest.raises(Damaged):
            expand(squeezed, before and bytes(other), other)


def test_the_wrong_parent_is_found() -> None:
    """Shows that none and one of another length are refused; one of other bytes is not, and the
    hash finds it."""
    squeezed, before, chunk = SAMPLES["XOR"]

    assert before is not None
    with pytest.raises(Damaged, match="its parent's chunk of 2000 bytes, and none was given"):
        expand(squeezed, None, len(chunk))
    with pytest.raises(Damaged, match="the one given has 1999 bytes"):
        expand(squeezed, before[1:], len(chunk))
    assert outcome(squeezed, floats(2), chunk) == "found by the hash"


@given(st.binary(max_size=60), st.none() | st.binary(max_size=60), st.integers(0, 60), st.data())
def test_bytes_that_nobody_wrote_raise_only_what_is_told(
    body: bytes, before: bytes | None, length: int, data: st.DataObject
) -> None:
    """Shows it for any first byte, before zstd's own mark or not: refused, or of that length."""
    head = bytes([data.draw(st.integers(0, 255) | st.integers(0x10, 0x1F))])
    mark = data.draw(st.sampled_from((b"", zstandard.FRAME_HEADER)))
    with contextlib.suppress(FormatError):
        assert len(expand(head + mark + body, before, length)) == length


@pytest.mark.parametrize("says", ["its size", "no size", "a chunk's size"])
def test_a_bomb_does_not_go_off(says: str) -> None:
    """Shows that a frame of much more than a chunk takes no more memory than a chunk, also where
    its head is silent or lies."""
    whole = 256 * MIB
    packer = zstandard.ZstdCompressor(write_content_size=says != "no size")
    frame = packer.compress(bytes(whole))
    if says == "a chunk's size":
        assert frame.count(struct.pack("<I", whole)) == 1
        frame = frame.replace(struct.pack("<I", whole), struct.pack("<I", CHUNK))
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            expand(b"\x14" + frame, None, CHUNK)
        assert tracemalloc.get_traced_memory()[1] < 3 * CHUNK
    finally:
        tracemalloc.stop()


def test_without_zstandard_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that who asks without the package is told its name."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.delitem(sys.modules, "benchmarks.common.squeeze")

    with pytest.raises(ImportError, match="pip install zstandard"):
        importlib.import_module("benchmarks.common.squeeze")
