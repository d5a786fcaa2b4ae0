"""TensorBundle, in which TensorFlow saves variables: an index, and files of values.

Layout by TensorFlow 2.21 (core/protobuf/tensor_bundle.proto, core/util/tensor_bundle): the table
``PREFIX.index`` has a header under the empty key and an entry a tensor; the bytes lie in
``PREFIX.data-00000-of-00002`` and so on, each tensor's with a masked CRC-32C in its entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from handfast.audit.checked import Checked
from handfast.audit.extent import Extent, Range, dense
from handfast.audit.formats.crc32c import crc32c, unmasked
from handfast.audit.formats.protobuf import Message
from handfast.audit.formats.table import read_table
from handfast.audit.formats.wire import Cursor
from handfast.audit.place import Place
from handfast.errors import Damaged, FormatError

__all__ = ["DATA", "INDEX", "TEXT", "Bundle", "Entry", "Piece", "data_file", "pieces",
    "read_bundle", "read_text"]  # fmt: skip

INDEX: Final = ".index"
DATA: Final = re.compile(r"(.+)\.data-([0-9]{5})-of-([0-9]{5})")
TEXT: Final = "string"

DTYPES: Final[Mapping[int, str]] = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 7: TEXT,
    8: "complex64", 9: "int64", 10: "bool", 11: "qint8", 12: "quint8", 13: "qint32",
    14: "bfloat16", 17: "uint16", 18: "complex128", 19: "float16", 22: "uint32", 23: "uint64",
    24: "float8_e5m2", 25: "float8_e4m3fn", 29: "int4", 30: "uint4",
}  # fmt: skip
"""core/framework/types.proto, by torch's names."""

SHARDS_MOST: Final = 99_999

TEXT_MOST: Final = 1 << 26
"""Bytes of a text that are read at most: an object graph has some hundreds a variable."""


Slice = tuple[tuple[int, int], ...]
"""Where some of a tensor begins, and how long it is, in each dimension; -1: all of that one."""


class Entry(NamedTuple):
    """A tensor of an index: what it is, and which bytes of which file of values.

    One in ``slices`` has no bytes: each slice has an entry of its own.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    nbytes: int
    crc: int
    slices: tuple[Slice, ...]


class Bundle(NamedTuple):
    """What an index says: tensors by their names, slices of tensors by their keys, and how many
    files of values there have to be.
    """

    entries: Mapping[str, Entry]
    slices: Mapping[bytes, Entry]
    shards: int


class Piece(NamedTuple):
    """Values of a tensor, where they begin in the whole (None: they are), and in which file."""

    values: Checked
    offset: tuple[int, ...] | None
    shard: int


def read_bundle(place: Place, prefix: str) -> Bundle:
    """Read an index. Raises Damaged where it is cut or differs from its checksums, FormatError
    for what is not read here.
    """
    path = prefix + INDEX
    name = place.absolute(path)
    entries: dict[str, Entry] = {}
    slices: dict[bytes, Entry] = {}
    shards = 0
    for key, value in read_table(place.bytes(path), name):
        message = Message(value, f"{name}: {key[:100]!r}")
        if key[:1] == b"\0":
            slices[key] = _entry(message, name)
        elif key:
            entries[key.decode("utf-8", "backslashreplace")] = _entry(message, name)
        else:
            shards = message.number(1)
        if not key and message.number(2):
            raise FormatError(f"{name}: numbers in big-endian order, which are not read here")
    if not 0 < shards <= SHARDS_MOST:
        raise Damaged(
            f"{name}: no header, or one of {shards:,} files of values, which no name can number. "
            "What to do: take it from a copy"
        )
    return Bundle(entries, slices, shards)


def _entry(message: Message, name: str) -> Entry:
    shape = [Message(text, name) for text in message.texts(2)[-1:]]
    return Entry(
        DTYPES.get(message.number(1), f"DataType {message.number(1)}"),
        tuple(size.signed(1) for part in shape for size in part.messages(2)),
        message.number(3),
        message.number(4),
        message.number(5),
        unmasked(message.number(6)),
        tuple(
            tuple(
                (extent.signed(1), extent.signed(2) if extent.numbers(2) else -1)
                for extent in part.messages(1)
            )
            for part in message.messages(7)
        ),
    )


def pieces(place: Place, prefix: str, bundle: Bundle, name: str) -> Iterator[Piece]:
    """The values of a tensor, in one piece, or in as many as it has slices.

    Raises Damaged for a slice that has no entry.
    """
    entry = bundle.entries[name]
    if not entry.slices:
        yield Piece(_values(place, prefix, bundle, name, entry), None, entry.shard)
    for part in entry.slices:
        found = bundle.slices.get(_key(name, part))
        if found is None:
            raise Damaged(
                f"{place.absolute(prefix + INDEX)}: {name}: no entry of its slice {part}. What to "
                "do: take the checkpoint from a copy"
            )
        offset = tuple(start for start, _ in part)
        yield Piece(_values(place, prefix, bundle, name, found), offset, found.shard)


def _values(place: Place, prefix: str, bundle: Bundle, name: str, entry: Entry) -> Checked:
    path = place.absolute(data_file(prefix, entry.shard, bundle.shards))
    source = Range(place.reader, path, entry.start, entry.nbytes, f"{path}: {name}")
    extent = Extent(source, entry.dtype, entry.shape, dense(entry.shape))
    return Checked(extent, entry.crc, crc32c, lambda crc: _differs(source.name, crc, entry.crc))


def _key(name: str, part: Slice) -> bytes:
    """The key of a slice, in an order that bytes have (util/saved_tensor_slice_util.cc)."""
    text = name.encode().replace(b"\0", b"\0\xff")
    numbers = b"".join(_ordered(start) + _ordered(length) for start, length in part)
    count = len(part)
    return b"\0" + text + b"\0\x01" + (bytes([1, count]) if count else b"\0") + numbers


def _ordered(number: int) -> bytes:
    """A number whose first bits say how many bytes it has (core/lib/strings/ordered_code.cc)."""
    size = ((~number if number < 0 else number).bit_length() + 7) // 7
    head = (0xFFFF << 16 - size & 0xFFFF).to_bytes(2, "big")
    data = bytearray(number.to_bytes(size + 1, "big", signed=True)[1:])
    for at in range(min(2, size)):
        data[at] ^= head[at]
    return bytes(data)


def data_file(prefix: str, shard: int, shards: int) -> str:
    """The name of a file of values."""
    return f"{prefix}.data-{shard:05d}-of-{shards:05d}"


def read_text(place: Place, prefix: str, bundle: Bundle, name: str) -> bytes:
    """Read a text by itself: its length, a checksum of that, and its bytes.

    The entry's checksum is over the length as four bytes, that checksum, and the text
    (tensor_bundle.cc, ``WriteStringTensor``). Raises Damaged and FormatError.
    """
    entry = bundle.entries[name]
    path = place.absolute(data_file(prefix, entry.shard, bundle.shards))
    where = f"{path}: {name}"
    if entry.nbytes > TEXT_MOST or entry.dtype != TEXT or entry.shape:
        raise FormatError(f"{where}: no text by itself of at most {TEXT_MOST:,} bytes")
    cursor = Cursor(place.reader.bytes(path, entry.start, entry.nbytes), where)
    size = cursor.varint()
    said = cursor.take(4)
    text = cursor.take(size)
    crc = crc32c(text, crc32c(said, crc32c(size.to_bytes(4, "little"))))
    if crc != entry.crc:
        raise _differs(where, crc, entry.crc)
    return text


def _differs(name: str, found: int, said: int) -> Damaged:
    return Damaged(
        f"{name}: its bytes have the CRC-32C {found:08x}, and {said:08x} was written. What to do: "
        "they were damaged since; take the file from a copy"
    )
