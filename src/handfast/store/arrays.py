"""NumPy's scalars, arrays and dtypes as parts of nodes. NumPy is never imported to write."""

import math
import re
import sys
from typing import Any

__all__ = ["JOINS", "split"]

_DTYPE, _SCALAR, _ARRAY = 24, 25, 26

# Fixed-size kinds whose bytes mean the same on every machine. Not longdouble, whose layout
# depends on the processor, nor dates without a unit, nor what NumPy's own name does not describe
# (bfloat16 of ml_dtypes).
_SIMPLE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|c(8|16)|[SUV]\d+|[mM]8\[\w+\])")


def split(value: Any) -> tuple[int, tuple[object, ...]] | None:
    """The tag and the parts of a NumPy value; None if the value is none.

    Raises ValueError for one whose bytes alone do not say what it is.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.dtype):
        return _DTYPE, _split_dtype(numpy, value)
    if isinstance(value, numpy.generic) and type(value) is value.dtype.type:
        _split_dtype(numpy, value.dtype)
        if isinstance(value, numpy.str_):  # NumPy's own view drops trailing NULs, or adds one
            return _SCALAR, (value.dtype, str.__str__(value))
        if isinstance(value, numpy.bytes_):
            return _SCALAR, (value.dtype, bytes.__bytes__(value))
        return _SCALAR, (value.dtype, value.tobytes())
    if type(value) is numpy.ndarray:
        _split_dtype(numpy, value.dtype)
        order = "F" if value.flags.fnc else "C"
        return _ARRAY, (value.dtype, value.shape, order, value.tobytes(order))
    return None


def _split_dtype(numpy: Any, dtype: Any) -> tuple[object, ...]:
    parts: tuple[object, ...]
    if dtype.subdtype is not None:
        parts = dtype.subdtype
        _split_dtype(numpy, dtype.base)
    elif dtype.names is not None:
        fields = [dtype.fields[name][:2] for name in dtype.names]
        kinds, offsets = zip(*fields, strict=True) if fields else ((), ())
        for kind in kinds:
            _split_dtype(numpy, kind)
        parts = (dtype.names, kinds, offsets, dtype.itemsize, dtype.isalignedstruct)
    else:
        parts = (dtype.str,)
    # Rebuilding is the test: whatever the parts can't say (titles, an extension's type, a Python
    # object's meaning) shows as a difference.
    try:
        exact = _dtype(numpy, parts) == dtype and not dtype.metadata
    except (TypeError, ValueError):
        exact = False
    if not exact:
        raise ValueError(
            f"the bytes of dtype {dtype!r} alone do not say what they mean; plain numbers, "
            "strings, bytes, dates and structures of them do"
        )
    return parts


def _dtype(numpy: Any, parts: Any) -> Any:
    match parts:
        case (str(code),):
            if not _SIMPLE.fullmatch(code):
                raise ValueError(f"the dtype {code!r} is none that is stored")
            return numpy.dtype(code)
        case (base, tuple(shape)):
            return numpy.dtype((_known(numpy, base), shape))
        case (tuple(names), tuple(kinds), tuple(offsets), int(itemsize), bool(aligned)):
            formats = [_known(numpy, kind) for kind in kinds]
            fields = {"names": names, "formats": formats, "offsets": offsets, "itemsize": itemsize}
            return numpy.dtype(fields, align=aligned)
    raise ValueError("the parts of a dtype are not those of one")


def _known(numpy: Any, dtype: object) -> Any:
    if not isinstance(dtype, numpy.dtype):
        raise ValueError(f"a {type(dtype).__name__} where a dtype belongs")
    return dtype


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError:
        raise ValueError("NumPy's values can't be made here: install numpy") from None
    return np


def _join_dtype(parts: list[Any]) -> object:
    return _dtype(_numpy(), tuple(parts))


def _join_scalar(parts: list[Any]) -> object:
    numpy = _numpy()
    kind, data = parts
    text = {"U": numpy.str_, "S": numpy.bytes_}.get(_known(numpy, kind).kind)
    if text is not None:
        if type(data) not in text.__mro__:
            raise ValueError(f"a {type(data).__name__} in a scalar of {kind}")
        return text(data)
    return _filled(numpy, kind, (), "C", data)[()]


def _join_array(parts: list[Any]) -> object:
    numpy = _numpy()
    kind, shape, order, data = parts
    return _filled(numpy, _known(numpy, kind), shape, order, data)


def _filled(numpy: Any, kind: Any, shape: tuple[int, ...], order: str, data: bytes) -> Any:
    if len(data) != kind.itemsize * math.prod(shape):
        raise ValueError(f"{len(data)} bytes for shape {shape} of {kind}")
    return numpy.ndarray(shape, kind, bytearray(data), order=order)


JOINS = {_DTYPE: _join_dtype, _SCALAR: _join_scalar, _ARRAY: _join_array}
"""Tag -> what makes a value of its parts; ValueError or TypeError if they make none."""
