"""NumPy's arrays, scalars and dtypes among the nodes of a pickle.

What NumPy writes: NumPy 2.4, numpy/_core/src/multiarray (``array_reduce`` and ``array_setstate`` of
methods.c, ``arraydescr_reduce`` of descriptor.c, ``gentype_reduce`` of scalartypes.c) and
numpy/_core/numeric.py (``_frombuffer``); before NumPy 2 the same under ``numpy.core``.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final, NamedTuple

from handfast.audit.extent import DIMENSIONS, SIZES, Extent, Held, dense
from handfast.audit.inert import Call, Global

__all__ = ["made"]

_KINDS: Final = {
    "b1": "bool", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64",
    "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128",
}  # fmt: skip
"""NumPy's codes -> the same dtypes of torch."""

_LETTERS: Final = {
    "bool": "?", "int8": "b", "int16": "h", "int32": "i", "int64": "q",
    "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q",
    "float16": "e", "float32": "f", "float64": "d", "complex64": "ff", "complex128": "dd",
}  # fmt: skip

_CORE: Final = ("numpy.core.", "numpy._core.")
_DTYPE: Final = Global("numpy", "dtype")
_ARRAY: Final = Global("numpy", "ndarray")


class _Kind(NamedTuple):
    """A dtype that torch has, too: its name there, and whether it is in big-endian order."""

    name: str
    swapped: bool


def made(call: Call) -> Any:
    """What a call of NumPy's makes: an Extent, a number, or a dtype's name; None for all else."""
    function = call.function
    if function == _DTYPE:
        kind = _kind(call)
        return None if kind is None else f"numpy.{kind.name}"
    if not function.module.startswith(_CORE):
        return None
    if function.name == "_reconstruct":
        return _array(call)
    if function.name == "_frombuffer":
        return _from_buffer(*call.args) if len(call.args) in (4, 5) else None
    if function.name == "scalar":
        return _scalar(*call.args) if len(call.args) == 2 else None
    return None


def _kind(node: Any) -> _Kind | None:
    """A dtype, if it is one that torch knows as well."""
    if type(node) is not Call or node.function != _DTYPE or not node.args:
        return None
    code, state = node.args[0], node.state
    if type(code) is Global and code.module == "ml_dtypes" and code.name in SIZES:
        return _Kind(code.name, False)
    name = _KINDS.get(code) if type(code) is str else None
    if name is None:
        return None
    order = state[1] if type(state) is tuple and len(state) > 1 else "|"
    return _Kind(name, order == ">")


def _shape(node: Any) -> tuple[int, ...] | None:
    """A shape of plain integers."""
    fits = type(node) is tuple and len(node) <= DIMENSIONS
    return node if fits and all(type(n) is int and 0 <= n < 1 << 63 for n in node) else None


def _array(call: Call) -> Extent | None:
    """An array of bytes that are in the pickle."""
    state = call.state
    if not call.args or call.args[0] != _ARRAY or type(state) is not tuple or len(state) != 5:
        return None
    _, shape, dtype, fortran, data = state
    return _extent(data, dtype, shape, "F" if fortran is True or fortran == 1 else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Extent | None:
    """An array of protocol 5, whose buffer is in the pickle."""
    if order != "K" or axes is None:
        return _extent(data, dtype, shape, "F" if order == "F" else "C")
    whole, axes = _extent(data, dtype, shape, "C"), _shape(axes)
    if whole is None or axes is None or sorted(axes) != list(range(len(whole.shape))):
        return None
    sizes = tuple(whole.shape[axis] for axis in axes)
    return Extent(
        whole.source, whole.dtype, sizes, tuple(whole.stride[axis] for axis in axes), 0,
        whole.swapped,
    )  # fmt: skip


def _extent(data: Any, dtype: Any, shape: Any, order: str) -> Extent | None:
    kind, sizes = _kind(dtype), _shape(shape)
    if kind is None or sizes is None or type(data) not in (bytes, bytearray):
        return None
    if math.prod(sizes) * SIZES[kind.name] != len(data):
        return None
    stride = dense(sizes) if order == "C" else tuple(reversed(dense(sizes[::-1])))
    return Extent(Held(data, "an array in a pickle"), kind.name, sizes, stride, 0, kind.swapped)


def _scalar(dtype: Any, data: Any) -> Any:
    """A number as Python's own."""
    kind = _kind(dtype)
    letters = None if kind is None else _LETTERS.get(kind.name)
    if kind is None or letters is None or type(data) is not bytes:
        return None
    if len(data) != SIZES[kind.name]:
        return None
    parts = struct.unpack((">" if kind.swapped else "<") + letters, data)
    return complex(*parts) if len(parts) == 2 else parts[0]
