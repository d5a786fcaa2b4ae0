"""Shows that a frame's bytes are read as the layout says, and nothing else is taken for one."""

from __future__ import annotations

import hashlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.core.lattice import Epoch
from handfast.link.frame import (
    HEADER,
    MAX_BODY,
    MAX_TALK,
    NO_KEY,
    Header,
    Kind,
    LinkError,
    Reason,
    cut,
    read_header,
    seal,
    unseal,
    whole,
)

KEY = bytes(range(32))
SESSION = bytes(range(16, 32))
GOLDEN = bytes.fromhex(
    "8948464c 0001 0004 00000005 00000002 00000000000004b0"
    "101112131415161718191a1b1c1d1e1f 0000000000000007"
    "8d549b429757a1ae1eb43e2181bef2db 68656c6c6f"
)
"""A data frame under epoch 2/1200, sequence 7, "hello". The docs read the same one by hand."""

OFFER = bytes.fromhex(
    "8948464c 0001 0001 00000000 00000000 0000000000000000"
    "00000000000000000000000000000000 0000000000000000"
    "00000000000000000000000000000000"
)


def sample() -> bytes:
    return seal(KEY, Kind.DATA, b"hello", session=SESSION, epoch=Epoch(2, 1200), sequence=7)


def refusal(data: bytes, most: int = MAX_BODY) -> Reason:
    """Why bytes are no frame under the key."""
    with pytest.raises(LinkError) as caught:
        unseal(KEY, whole(data, most), data)
    return caught.value.reason


def changed(at: int, new: bytes) -> bytes:
    return GOLDEN[:at] + new + GOLDEN[at + len(new) :]


def test_the_golden_frame_is_made_and_read() -> None:
    """Byte for byte, now and in every later release."""
    assert sample() == GOLDEN
    mac = hashlib.blake2b(GOLDEN[:48] + b"hello", key=KEY, digest_size=16)
    assert GOLDEN[48:64] == mac.digest()
    header = whole(GOLDEN)
    assert header == Header(Kind.DATA, 5, Epoch(2, 1200), SESSION, 7, GOLDEN[48:64])
    assert unseal(KEY, header, GOLDEN) == b"hello"
    frame = seal(NO_KEY, Kind.OFFER, b"")
    assert frame[:48] == OFFER[:48]
    assert unseal(NO_KEY, whole(frame), frame) == b""


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.SHORT),
        (GOLDEN[:63], Reason.SHORT),
        (GOLDEN[:-1], Reason.SHORT),
        (GOLDEN + b"!", Reason.LENGTH),
        (changed(0, b"\x88"), Reason.MAGIC),
        (changed(4, b"\0\2"), Reason.VERSION),
        (changed(6, b"\0\0"), Reason.KIND),
        (changed(6, b"\0\5"), Reason.KIND),
        (changed(8, b"\xff\xff\xff\xff"), Reason.LENGTH),
        (changed(6, b"\0\3"), Reason.MALFORMED),
        (OFFER[:24] + b"\1" + OFFER[25:], Reason.MALFORMED),
        (OFFER[:47] + b"\1" + OFFER[48:], Reason.MALFORMED),
        (changed(23, b"\xb1"), Reason.MAC),
        (changed(64, b"H"), Reason.MAC),
    ],
)
def test_each_malformed_frame_has_its_reason(data: bytes, reason: Reason) -> None:
    """Checked before the body is looked at, in the order of the layout."""
    assert refusal(data) is reason


def test_a_bound_holds_by_kind_and_by_caller() -> None:
    """Of a peer that has proved nothing little is read, and of data no more than was asked for."""
    assert refusal(GOLDEN, most=4) is Reason.LENGTH
    long = bytearray(OFFER)
    long[8:12] = (MAX_TALK + 1).to_bytes(4)
    assert refusal(bytes(long)) is Reason.LENGTH
    with pytest.raises(ValueError, match="at most 4096"):
        seal(KEY, Kind.WORD, bytes(MAX_TALK + 1))
    with pytest.raises(ValueError, match="no place for it"):
        seal(KEY, Kind.DATA, b"", epoch=Epoch(1 << 32, 0))


def test_any_flipped_bit_is_found() -> None:
    """Each bit of a frame: refused, never another frame."""
    for at in range(len(GOLDEN) * 8):
        hurt = bytearray(GOLDEN)
        hurt[at // 8] ^= 1 << at % 8
        assert refusal(bytes(hurt)) in Reason


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Neither noise, nor noise behind a sound beginning."""
    for noise in (data, GOLDEN[:4] + data, GOLDEN[:12] + data, GOLDEN[:48] + data):
        if noise != GOLDEN:
            assert refusal(noise) in Reason


@given(
    st.binary(max_size=300),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)
def test_what_is_sealed_is_read(
    body: bytes, session: bytes, generation: int, step: int, sequence: int
) -> None:
    """Whatever the numbers; and under no other key."""
    epoch = Epoch(generation, step)
    frame = seal(KEY, Kind.DATA, body, session=session, epoch=epoch, sequence=sequence)
    header = whole(frame)
    assert (header.epoch, header.session, header.sequence) == (epoch, session, sequence)
    assert unseal(KEY, header, frame) == body
    with pytest.raises(LinkError, match="mac"):
        unseal(bytes(32), header, frame)


def test_a_length_is_never_allocated() -> None:
    """A header that claims the most costs nothing: no memory is taken by a number."""
    claims = GOLDEN[:8] + MAX_BODY.to_bytes(4) + GOLDEN[12:64]
    tracemalloc.start()
    for _ in range(100):
        header = read_header(claims)
        assert refusal(claims) is Reason.SHORT
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.length == MAX_BODY
    assert peak < MAX_BODY // 4
    assert len(claims) == HEADER


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_however_a_stream_is_cut_the_same_frames_come_out(
    bodies: list[bytes], data: st.DataObject
) -> None:
    """Whole frames, in order, as soon as the last byte of each is there."""
    frames = [seal(KEY, Kind.DATA, body, session=SESSION) for body in bodies]
    stream, buffer, found = b"".join(frames), bytearray(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        buffer += stream[:size]
        stream = stream[size:]
        while (frame := cut(buffer)) is not None:
            found.append(frame)
    assert found == frames
    assert not buffer


def test_a_stream_of_no_frames_is_refused_from_its_header_alone() -> None:
    """Whatever length it claims."""
    with pytest.raises(LinkError, match="magic"):
        cut(bytearray(b"GET / HTTP/1.1\r\n" * 4))
    assert cut(bytearray(GOLDEN[:40])) is None
