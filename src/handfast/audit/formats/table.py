"""Sorted tables of LevelDB's format, read whole: what TensorFlow's indices are.

Layout by LevelDB 1.23 (doc/table_format.md), which TensorFlow copied (core/lib/io/format.cc):
blocks of keys that share prefixes, each with a byte that says how it is packed, and a masked
CRC-32C; a block that names the others; a footer of 48 bytes that names that one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from handfast.audit.formats.crc32c import crc32c, unmasked
from handfast.audit.formats.wire import Cursor
from handfast.errors import FormatError

__all__ = ["MAGIC", "read_table"]

MAGIC: Final = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER: Final = 48
TRAILER: Final = 5  # how it is packed, and the checksum
PLAIN, SNAPPY = 0, 1

BLOCK_MOST: Final = 1 << 28
"""Bytes that a block may unpack to."""


def read_table(data: bytes, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table, in order.

    Raises Damaged, naming the byte, where it was cut, or a block differs from its checksum; and
    FormatError for a block that is packed in another way.
    """
    footer = Cursor(data, name, max(0, len(data) - FOOTER))
    if len(data) < FOOTER or data[-len(MAGIC) :] != MAGIC:
        raise footer.damaged("a table's last bytes should be there: it was cut")
    footer.varints(2)  # of the block of metadata
    index = _block(data, footer.varint(), footer.varint(), name)
    left = len(data)
    for _, handle in _entries(index, name):
        where = Cursor(handle, name)
        start, nbytes = where.varints(2)
        left -= nbytes + TRAILER
        if left < 0:
            raise footer.damaged("blocks of more bytes than there are: some are named twice")
        yield from _entries(_block(data, start, nbytes, name), name)


def _block(data: bytes, start: int, nbytes: int, name: str) -> bytes:
    cursor = Cursor(data, name, min(start, len(data)))
    body = cursor.take(nbytes)
    packed, said = cursor.fixed(1), unmasked(cursor.fixed(4))
    found = crc32c(bytes([packed]), crc32c(body))
    if found != said:
        cursor.at = start
        raise cursor.damaged(
            f"the block there has the CRC-32C {found:08x}, and {said:08x} was written"
        )
    if packed == SNAPPY:
        return _unsnapped(body, name)
    if packed != PLAIN:
        raise FormatError(f"{name}: byte {start:,}: packed in way {packed}, which is not known")
    return body


def _entries(block: bytes, name: str) -> Iterator[tuple[bytes, bytes]]:
    tail = Cursor(block, name, max(0, len(block) - 4))
    restarts = tail.fixed(4)
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise tail.damaged(f"{restarts:,} restarts in a block of {len(block):,} bytes")
    cursor = Cursor(block[:end], name)
    key = b""
    while cursor.left:
        shared, fresh, nbytes = cursor.varints(3)
        if shared > len(key):
            raise cursor.damaged(f"a key shares {shared} bytes with one of {len(key)}")
        key = key[:shared] + cursor.take(fresh)
        yield key, cursor.take(nbytes)


def _unsnapped(packed: bytes, name: str) -> bytes:
    """Unpack a snappy block (google/snappy, format_description.txt)."""
    cursor = Cursor(packed, name)
    size = cursor.varint()
    if size > BLOCK_MOST:
        raise FormatError(f"{name}: a block unpacks to {size:,} bytes, {BLOCK_MOST:,} at most")
    found = bytearray()
    while cursor.left and len(found) <= size:
        tag = cursor.fixed(1)
        kind, length = tag & 3, tag >> 2
        if kind == 0:
            more = max(0, length - 59)
            found += cursor.take((cursor.fixed(more) if more else length) + 1)
            continue
        if kind == 1:
            length, offset = (length & 7) + 4, tag >> 5 << 8 | cursor.fixed(1)
        else:
            length, offset = length + 1, cursor.fixed(2 if kind == 2 else 4)
        if not 0 < offset <= len(found):
            raise cursor.damaged(f"a copy from {offset} bytes back, of {len(found)}")
        for _ in range(length):  # it may copy what it has just written
            found.append(found[-offset])
    if len(found) != size:
        raise cursor.damaged(f"it unpacks to {len(found):,} bytes, and should to {size:,}")
    return bytes(found)
