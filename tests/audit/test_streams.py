"""What lies packed, unpacked while it is read: each codec, cut and damaged; and its checksums."""

import gzip
import sys
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit.extent import Held
from handfast.audit.formats.crc32c import LANES, LONG, crc32c, unmasked
from handfast.audit.formats.streams import opened, unpacked
from handfast.audit.formats.wire import Cursor
from handfast.errors import Damaged, FormatError

CODECS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.binary(max_size=300), count=st.integers(1, 400))
def test_what_was_packed_comes_out(codec: str, data: bytes, count: int) -> None:
    """In pieces of any length, each as long as was asked for but for the last."""
    stream = opened(Held(CODECS[codec](data), "x"), codec)
    pieces = []
    while piece := stream.read(count):
        pieces.append(piece)
    assert b"".join(pieces) == data
    assert all(len(piece) == count for piece in pieces[:-1])


@pytest.mark.parametrize("codec", ["gzip", "zlib", "zstd"])
def test_damage_is_said_by_name(codec: str) -> None:
    """A first byte that is no codec's."""
    data = bytearray(CODECS[codec](b"some text"))
    data[0] ^= 0xFF
    with pytest.raises(Damaged, match=f"x: can't be unpacked with {codec}"):
        unpacked(bytes(data), codec, 100, "x")


def test_what_is_cut_is_shorter() -> None:
    """Whoever reads knows how long it should be."""
    data = CODECS["zlib"](bytes(range(256)) * 40)
    assert len(unpacked(data[: len(data) // 2], "zlib", 1 << 20, "x")) < 256 * 40


def test_a_bomb_is_refused() -> None:
    """A few bytes that unpack to more than is read: no more of it is made than that."""
    with pytest.raises(FormatError, match="more than 1,000 bytes"):
        unpacked(CODECS["zstd"](bytes(10_000_000)), "zstd", 1000, "x")


def test_other_codecs_are_named() -> None:
    """FormatError: it may be sound."""
    with pytest.raises(FormatError, match="x: packed with blosc"):
        opened(Held(b"", "x"), "blosc")


def test_zstd_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is named where it lacks; nothing else needs it."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(FormatError, match="pip install zstandard"):
        opened(Held(b"", "x"), "zstd")
    assert opened(Held(b"a", "x")).read(1) == b"a"


# Checksums


def test_crc32c_of_known_texts() -> None:
    """RFC 3720, section B.4: zeros, ones, and counting up; and the usual check value."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=64), st.integers(0, 3), st.integers(0, 64))
def test_crc32c_goes_on_from_where_it_was(text: bytes, times: int, cut: int) -> None:
    """Cut anywhere, in long runs that go in lanes, and in short ones."""
    data = text + bytes(range(256)) * (times * LANES * LONG // 256) + text
    head = data[: cut * 997]
    assert crc32c(data[len(head) :], crc32c(head)) == crc32c(data)


def test_lanes_give_what_single_bytes_give() -> None:
    """A whole number of runs, held against the same bytes one at a time."""
    data = bytes((n * n + 7 * n) & 0xFF for n in range(LANES * LONG))
    alone = 0
    for at in range(0, len(data), 1000):
        alone = crc32c(data[at : at + 1000], alone)
    assert crc32c(data) == alone


def test_a_masked_checksum_is_the_other_s_image() -> None:
    """LevelDB's own test: masked twice it is another; and back."""
    plain = crc32c(b"foo")
    masked = ((plain >> 15 | plain << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert masked != plain
    assert unmasked(masked) == plain


# Numbers


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_varints_are_read_back(numbers: list[int]) -> None:
    """Of any size up to 64 bits."""
    data = b""
    for number in numbers:
        left = number
        while left > 0x7F:
            data += bytes([left & 0x7F | 0x80])
            left >>= 7
        data += bytes([left])
    cursor = Cursor(data, "x")
    assert cursor.varints(len(numbers)) == numbers
    assert cursor.left == 0


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9, b"\xff" * 10, b"\xff" * 9 + b"\x7f"])
def test_what_is_no_varint_is_damaged(data: bytes) -> None:
    """Cut, without an end, or of more than 64 bits."""
    with pytest.raises(Damaged, match=r"x: byte \d+: no number of 64 bits"):
        Cursor(data, "x").varint()


def test_more_than_there_is_can_not_be_taken() -> None:
    """Neither bytes nor numbers; and never backwards."""
    with pytest.raises(Damaged, match="3 bytes should follow, and there are 2"):
        Cursor(b"ab", "x").take(3)
    with pytest.raises(Damaged, match="should follow"):
        Cursor(b"ab", "x").take(-1)
    with pytest.raises(Damaged, match="1,000,000 numbers should follow"):
        Cursor(b"ab", "x").varints(1_000_000)
    assert Cursor(b"\x01\x02", "x").fixed(2) == 0x0201
