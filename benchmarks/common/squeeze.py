"""A chunk of an image made smaller, for where bytes a second are scarce and the processor is not.

A float's exponent changes little from one epoch to the next, and its last bits look like chance.
So a chunk is XORed with the same chunk of the parent epoch, where there is one, and split into
byte planes (the first byte of every element, then every second one, and so on), of which zstd
finds the ones that are alike. A squeezed chunk is one byte that says what was done, and the rest::

    bits 4-7  the version, 1
    bits 2-3  0: as it was; 1: planes and zstd; 2: XOR, planes and zstd
    bits 0-1  the width of an element: 1 << bits bytes; 0 for a chunk that is as it was

No tier uses it: on a node's own disk it costs more time than it saves (``docs/speed.md``), and
a store that would gain by it is not there yet. Until then it lives where it is measured.

It carries no digest of its own. Whoever expands holds the result against the chunk's hash in the
manifest: that finds the flipped bits that zstd does not, and a parent that is not the right one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from handfast.errors import Damaged, FormatError
from handfast.store.manifest import CHUNK

try:
    import zstandard
except ImportError as error:
    raise ImportError(
        "chunks are squeezed by zstandard, which is not installed here: pip install zstandard"
    ) from error

__all__ = ["WIDTHS", "expand", "squeeze"]

WIDTHS: Final = (1, 2, 4, 8)
"""Bytes that an element may have."""
_VERSION: Final = 1
_RAW, _PLANES, _XOR = range(3)


def squeeze(chunk: bytes, before: bytes | None, width: int, level: int) -> bytes:
    """Make a chunk smaller: never more than a byte longer than it was.

    ``before`` is the same chunk of the parent epoch; it helps only where it is as long.
    ``width`` is an element's bytes, ``level`` zstd's. Raises ValueError for a chunk of more than
    :data:`CHUNK` bytes, or a width that is none.
    """
    if len(chunk) > CHUNK or width not in WIDTHS:
        raise ValueError(
            f"{len(chunk)} bytes in elements of {width}: squeezed are chunks of {CHUNK} bytes at "
            f"most, in elements of {', '.join(map(str, WIDTHS))}"
        )
    kind, changed = _PLANES, chunk
    if before is not None and len(before) == len(chunk):
        kind, changed = _XOR, _xor(chunk, before)
    planes = b"".join(changed[at::width] for at in range(width))
    packed = zstandard.ZstdCompressor(level=level).compress(planes)
    if len(packed) >= len(chunk):
        return _head(_RAW, 1) + chunk
    return _head(kind, width) + packed


def expand(squeezed: bytes, before: bytes | None, length: int) -> bytes:
    """Give the chunk of ``length`` bytes back, or raise; neither takes more than thrice the memory.

    ``before`` is what :func:`squeeze` was given. Raises Damaged for what no call of it has made,
    or not with this parent; FormatError for another version's. Nothing is raised where the bytes
    are wrong and yet expand: the chunk's hash has the last word.
    """
    if not squeezed:
        raise _damaged("it is empty")
    if squeezed[0] >> 4 != _VERSION:
        raise FormatError(
            f"a squeezed chunk of version {squeezed[0] >> 4}; this handfast reads version "
            f"{_VERSION}. What to do: read it with the handfast that wrote it, or a later one"
        )
    kind, width, body = squeezed[0] >> 2 & 3, WIDTHS[squeezed[0] & 3], squeezed[1:]
    if kind > _XOR or (kind == _RAW and width != 1):
        raise _damaged(f"its first byte is {squeezed[0]:#04x}, which is never written")
    if kind == _RAW:
        if len(body) != length:
            raise _damaged(f"it holds {len(body)} bytes of a chunk of {length}")
        return body
    if kind == _PLANES:
        before = None
    elif before is None or len(before) != length:
        found = "none was given" if before is None else f"the one given has {len(before)} bytes"
        raise _damaged(f"it needs its parent's chunk of {length} bytes, and {found}")
    planes = _inflate(body, length)
    whole, start = bytearray(length), 0
    for at in range(width):
        end = start + len(range(at, length, width))
        whole[at::width] = planes[start:end]
        start = end
    return bytes(whole) if before is None else _xor(whole, before)


def _head(kind: int, width: int) -> bytes:
    return bytes([_VERSION << 4 | kind << 2 | WIDTHS.index(width)])


def _xor(one: bytes | bytearray, other: bytes) -> bytes:
    """XOR bytes of one length. As integers of Python it would take fifty times as long."""
    return (np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).tobytes()


def _damaged(why: str) -> Damaged:
    return Damaged(f"a squeezed chunk: {why}. Restore from another copy of this shard")


def _inflate(body: bytes, length: int) -> bytes:
    """Undo zstd: one frame of so many bytes."""
    try:
        # Its head is asked first: zstandard believes it beyond any limit that it is given.
        if zstandard.frame_content_size(body) != length:
            raise _damaged(f"its frame does not say that it has {length} bytes")
        reader = zstandard.ZstdDecompressor()
        return reader.decompress(body, max_output_size=length, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damaged(f"zstd can't read it: {error}") from error
