"""Files of safetensors, by their headers.

Eight bytes with the length of a header in JSON; for each name a dtype, a shape, and where its bytes
begin and end behind the header; and then the bytes, without gaps. What a header must keep:
safetensors 0.8.0, safetensors/src/tensor.rs, ``SafeTensors::read_metadata`` and
``Metadata::validate``. There are no checksums.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from handfast.audit.extent import SIZES, Extent, Range, dense
from handfast.audit.place import Place
from handfast.errors import UNREADABLE, Damaged, FormatError
from handfast.store.image import HEADER_LIMIT

__all__ = ["Safetensors", "read_safetensors"]

_DTYPES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_PACKED: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of those that share bytes: they are read as bytes."""

_LENGTH: Final = struct.Struct("<Q")
_COPY: Final = "What to do: take the file from a copy"

_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in a header."""

    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


class Safetensors(msgspec.Struct, frozen=True):
    """What a header says: tensors by their names, and what was added in ``__metadata__``.

    ``problem`` is what is wrong between header and bytes: each tensor that it concerns says so
    again when it is read. ``packed`` are those whose elements share bytes, which stand as bytes.
    """

    tensors: Mapping[str, Extent]
    metadata: Mapping[str, str]
    problem: str
    packed: tuple[str, ...] = ()


def read_safetensors(place: Place, path: str) -> Safetensors:
    """Read a header; no tensor. Raises Damaged where too little is left of it, FormatError else."""
    name, size = place.absolute(path), place.files[path].nbytes
    if size < _LENGTH.size:
        raise Damaged(f"{name}: byte {size:,}: the file ends there, before its header. {_COPY}")
    (length,) = _LENGTH.unpack(place.reader.bytes(name, 0, _LENGTH.size))
    if length > HEADER_LIMIT:
        raise FormatError(
            f"{name}: byte 0: a header of {length:,} bytes, and no safetensors has more than "
            f"{HEADER_LIMIT:,}. {_COPY}"
        )
    start = _LENGTH.size + length
    if start > size:
        raise Damaged(
            f"{name}: byte {size:,}: the file ends there, within a header of {length:,} bytes. "
            f"{_COPY}"
        )
    raw = place.reader.bytes(name, _LENGTH.size, length)
    try:
        found = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(found.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {key: msgspec.json.decode(text, type=_Entry) for key, text in found.items()}
    except UNREADABLE as error:
        raise FormatError(f"{name}: its header is no header: {error}. {_COPY}") from error
    tensors = {}
    end = 0
    wrong: list[str] = []
    for key, entry in sorted(entries.items(), key=lambda pair: pair[1].data_offsets):
        first, last = entry.data_offsets
        if first != end or last < first:
            wrong.append(f"{key:.100} does not begin where the one before it ends")
        end = max(last, end)
        source = Range(
            place.reader, name, start + first, max(last - first, 0), f"{name}: {key:.200}"
        )
        tensors[key] = _extent(source, entry, wrong, key)
    problem = f"{name}: {wrong[0]}, and {len(wrong) - 1} more. {_COPY}" if wrong else ""
    if start + end > size:
        problem = (
            f"{name}: byte {size:,}: the file ends there, and by its header it ends at byte "
            f"{start + end:,}. {_COPY}"
        )
    elif not wrong and start + end < size:
        problem = (
            f"{name}: byte {start + end:,}: {size - start - end:,} bytes follow that no tensor of "
            f"the header has, which safetensors refuses. {_COPY}"
        )
    packed = tuple(key for key, entry in entries.items() if entry.dtype in _PACKED)
    return Safetensors({key: tensors[key] for key in entries}, metadata, problem, packed)


def _extent(source: Range, entry: _Entry, wrong: list[str], key: str) -> Extent:
    """Where a tensor's values lie; bytes, if its dtype is not torch's or its length is wrong."""
    shape = tuple(entry.shape)
    dtype = _DTYPES.get(entry.dtype, "")
    bits = 8 * SIZES[dtype] if dtype in SIZES else _PACKED.get(entry.dtype, 0)
    if not bits:
        wrong.append(f"{key:.100} has the dtype {entry.dtype:.20}, which is not known here")
    elif math.prod(shape) * bits != 8 * source.nbytes:
        wrong.append(f"{key:.100} has {source.nbytes:,} bytes, which its shape does not take")
    elif dtype in SIZES:
        return Extent(source, dtype, shape, dense(shape))
    return Extent(source, "uint8", (source.nbytes,), (1,))
