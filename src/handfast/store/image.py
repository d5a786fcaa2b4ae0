"""The image: how the tensors of one shard lie in one run of bytes.

A full image's file is a valid safetensors file: an 8-byte length, a JSON header that is padded
with spaces so that the data begins on a block boundary, then the tensors back to back without
gaps. Those that fill whole lines of the processor's cache come first, and begin with one; of the
rest descending element size keeps each aligned to its own elements. ``docs/format.md`` has the
bytes.
"""

import math
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated

import msgspec

from handfast.errors import SaveFailed, Unstorable

__all__ = [
    "BLOCK",
    "DTYPES",
    "HEADER_LIMIT",
    "LINE",
    "Layout",
    "Slot",
    "TensorSpec",
    "check_spec",
    "plan",
    "tensor_bytes",
]

BLOCK = 4096
"""Bytes; the header's size and an image's padded size are multiples of it, as O_DIRECT wants."""

LINE = 64
"""Bytes of a processor's cache line: a copy between places that begin with one is the fastest."""

HEADER_LIMIT = 100_000_000
"""Bytes of JSON that the safetensors library reads at most."""

DIMENSIONS_LIMIT = 64

# A code is given where safetensors 0.7 knows it; the rest is stored as U8, because one code that
# a library does not know makes it refuse the whole file.
DTYPES: Mapping[str, tuple[int, str | None]] = MappingProxyType(
    {
        "bool": (1, "BOOL"),
        "uint8": (1, "U8"),
        "int8": (1, "I8"),
        "uint16": (2, "U16"),
        "int16": (2, "I16"),
        "uint32": (4, "U32"),
        "int32": (4, "I32"),
        "uint64": (8, "U64"),
        "int64": (8, "I64"),
        "float8_e4m3fn": (1, "F8_E4M3"),
        "float8_e5m2": (1, "F8_E5M2"),
        "float8_e8m0fnu": (1, "F8_E8M0"),
        "float8_e4m3fnuz": (1, None),
        "float8_e5m2fnuz": (1, None),
        "float4_e2m1fn_x2": (1, None),
        "float16": (2, "F16"),
        "bfloat16": (2, "BF16"),
        "float32": (4, "F32"),
        "float64": (8, "F64"),
        "complex32": (4, None),
        "complex64": (8, "C64"),
        "complex128": (16, None),
    }
)
"""Name -> (bytes an element, safetensors code; None: stored as U8 of shape (bytes,))."""

_METADATA = "__metadata__"  # a key that safetensors keeps for itself

Natural = Annotated[int, msgspec.Meta(ge=0)]
Dims = Annotated[tuple[Natural, ...], msgspec.Meta(max_length=DIMENSIONS_LIMIT)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor of a shard: what it is, and which part of the global tensor is stored here.

    ``shape`` is what lies in this image, ``offset`` where it sits in ``global_shape``; all four
    tuples have one entry a dimension and count elements. ``stride`` is that of the live tensor,
    kept so that it can be made anew; in the image a tensor is always dense and row-major.
    """

    path: str
    dtype: str
    shape: Dims
    global_shape: Dims
    offset: Dims
    stride: Dims


class Slot(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a tensor lies: ``nbytes`` bytes from byte ``start`` of the image's file on."""

    spec: TensorSpec
    start: Natural
    nbytes: Natural


class Layout(msgspec.Struct, frozen=True):
    """A planned image.

    ``slots`` are in order of their place. ``header`` is what the file begins with, ``nbytes`` the
    file's exact length, ``padded`` the same rounded up to whole blocks, for the memory image.
    """

    slots: tuple[Slot, ...]
    header: bytes
    nbytes: int
    padded: int


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes that the stored part of a tensor takes. The dtype must be one of ``DTYPES``."""
    return DTYPES[spec.dtype][0] * math.prod(spec.shape)


def check_spec(spec: TensorSpec) -> None:
    """Raise ValueError, naming the path, if a spec is none that an image can hold."""
    path, shape, whole, offset = spec.path, spec.shape, spec.global_shape, spec.offset
    if not path or path == _METADATA:
        raise ValueError(f"a tensor can't be stored under the path {path!r}: choose another name")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the path {path!r} is no valid Unicode: choose another name") from None
    if spec.dtype not in DTYPES:
        raise ValueError(f"{path}: the dtype {spec.dtype!r} is unknown to this handfast")
    if not len(shape) == len(whole) == len(offset) == len(spec.stride) <= DIMENSIONS_LIMIT:
        raise ValueError(
            f"{path}: shape {shape}, global shape {whole}, offset {offset} and stride "
            f"{spec.stride} need one length, of at most {DIMENSIONS_LIMIT}"
        )
    if min((*shape, *offset, *spec.stride), default=0) < 0:
        raise ValueError(f"{path}: a negative shape {shape}, offset {offset} or {spec.stride}")
    # Most tensors are stored whole, and there may be 100,000 of them.
    if shape == whole and not any(offset):
        return
    if any(at + here > full for at, here, full in zip(offset, shape, whole, strict=True)):
        raise ValueError(f"{path}: shape {shape} at offset {offset} lies outside of {whole}")


def plan(specs: Iterable[TensorSpec], still: Container[str] = ()) -> Layout:
    """Lay tensors out, by what they are and their paths, so that all who plan agree.

    First come those of whole cache lines: a counter of a few bytes before them would shift all
    others. Then the rest, by descending element size. Of either those that are probably ``still``
    from epoch to epoch come together: a chunk in which one byte changes is written anew.

    Raises Unstorable for a dtype that no image knows, ValueError for a path that is given twice
    or a spec that contradicts itself, and SaveFailed if the header would be larger than the
    safetensors library reads.
    """
    tensors = list(specs)
    for spec in tensors:
        if spec.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise Unstorable(spec.path, spec.dtype, f"images know the dtypes {known}")
        check_spec(spec)
    tensors.sort(key=lambda spec: _rank(spec, still))
    entries: dict[str, object] = {_METADATA: {"format": "handfast image 1"}}
    at = 0
    spans = []
    for spec in tensors:
        if spec.path in entries:
            raise ValueError(f"{spec.path}: two tensors have this path; rename one of them")
        nbytes = tensor_bytes(spec)
        code = DTYPES[spec.dtype][1]
        entries[spec.path] = {
            "dtype": code or "U8",
            "shape": spec.shape if code else (nbytes,),
            "data_offsets": (at, at + nbytes),
        }
        spans.append((at, nbytes))
        at += nbytes
    header = _header(entries)
    slots = tuple(
        Slot(spec, len(header) + start, nbytes)
        for spec, (start, nbytes) in zip(tensors, spans, strict=True)
    )
    nbytes = len(header) + at
    return Layout(slots, header, nbytes, _round_up(nbytes))


def _rank(spec: TensorSpec, still: Container[str]) -> tuple[int, bool, str]:
    nbytes = tensor_bytes(spec)
    whole = nbytes > 0 and nbytes % LINE == 0
    rests = spec.path in still
    # what rests comes first here and last there: so all that changes lies together
    return (-LINE, not rests, spec.path) if whole else (-DTYPES[spec.dtype][0], rests, spec.path)


def _header(entries: dict[str, object]) -> bytes:
    text = msgspec.json.encode(entries)
    size = _round_up(8 + len(text)) - 8
    if size > HEADER_LIMIT:
        raise SaveFailed(
            f"the header that names {len(entries) - 1:,} tensors takes {size:,} bytes, and "
            f"safetensors files have at most {HEADER_LIMIT:,}. What to do: keep fewer, larger "
            "tensors in this rank's state, give them shorter names, or use more ranks"
        )
    return size.to_bytes(8, "little") + text.ljust(size)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
