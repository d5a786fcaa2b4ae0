"""Values as numbers: the one place of the audit that needs NumPy, imported when it is used."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOATS", "Floats", "bits", "census", "neighbours", "numbers", "rounded", "wide"]

Floats = NDArray[Any]

FLOATS: Final = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "complex128": "<f8",
    "complex64": "<f4",
    "complex32": "<f2",
    "float8_e4m3fn": "u1",
    "float8_e4m3fnuz": "u1",
    "float8_e5m2": "u1",
    "float8_e5m2fnuz": "u1",
}
"""The dtypes that hold numbers which may be wrong, with how NumPy reads their bytes."""


def numbers(block: memoryview, dtype: str) -> Floats:
    """The numbers in a block of a tensor's bytes: floats in their own precision, or float32.

    A complex number is two. ``dtype`` is one of ``FLOATS``.
    """
    found = np.frombuffer(block, FLOATS[dtype])
    if dtype == "bfloat16":
        found = (found.astype("<u4") << 16).view("<f4")
    elif found.dtype.itemsize == 1:
        found = _table(dtype)[found]
    return found if sys.byteorder == "little" else found.astype(found.dtype.newbyteorder("="))


def wide(block: memoryview, dtype: str) -> Floats:
    """The numbers in a block as float64; a NaN of any kind is one there, without a warning."""
    with np.errstate(invalid="ignore"):
        return numbers(block, dtype).astype("f8")


def census(block: memoryview, dtype: str) -> tuple[int, int, int, float]:
    """How many numbers of a block are NaN, infinite, below zero; and the least of the finite."""
    found = numbers(block, dtype)
    finite = np.isfinite(found)
    if finite.all():
        least = float(found.min())
        return 0, 0, int((found < 0).sum()) if least < 0 else 0, least
    nans = int(np.isnan(found).sum())
    some = found[finite]
    least = float(some.min()) if len(some) else float("inf")
    return nans, int((~finite).sum()) - nans, int((some < 0).sum()), least


@cache
def _table(dtype: str) -> Floats:
    """What the bytes of an 8-bit float mean: OCP's OFP8, and "uz", with no negative zero."""
    bits = np.arange(256)
    mantissa = 3 if "e4m3" in dtype else 2
    unsigned_zero = dtype.endswith("uz")
    bias = (8 if unsigned_zero else 7) if mantissa == 3 else (16 if unsigned_zero else 15)
    exponent, fraction = (bits & 0x7F) >> mantissa, bits & ((1 << mantissa) - 1)
    normal = exponent > 0
    value = (fraction / (1 << mantissa) + normal) * 2.0 ** (np.where(normal, exponent, 1) - bias)
    value = np.where(bits & 0x80, -value, value)
    if unsigned_zero:
        value[0x80] = np.nan
    elif mantissa == 3:
        value[[0x7F, 0xFF]] = np.nan
    else:
        value[[0x7C, 0xFC]] = np.inf, -np.inf
        value[[*range(0x7D, 0x80), *range(0xFD, 0x100)]] = np.nan
    return value.astype("f4")


def bits(block: memoryview) -> Floats:
    """The bits of a block of 16-bit floats."""
    return np.frombuffer(block, "<u2")


def rounded(master: Floats, dtype: str) -> Floats:
    """float32 values as the bits of their rounding to bfloat16 or float16, ties to even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return master.astype("<f2").view("<u2")
    exact = master.view("<u4")
    up = ((exact >> 16) & 1) + 0x7FFF
    found: Floats = ((exact + up) >> 16).astype("<u2")
    return found


def neighbours(master: Floats, low: Floats, dtype: str) -> NDArray[np.bool_]:
    """Where ``low`` is one of the two values of its dtype that a float32 value lies between.

    ``low`` are bits, as :func:`rounded` gives them; stochastic rounding takes either.
    """
    with np.errstate(invalid="ignore"):
        exact = master.astype("f8")
    found = wide(memoryview(low.tobytes()), dtype)
    step = low.astype("i4")
    further = np.where((exact - found > 0) == (found >= 0), step + 1, step - 1)
    beyond = wide(memoryview(further.astype("<u2").tobytes()), dtype)
    least, most = np.minimum(found, beyond), np.maximum(found, beyond)
    tiny = np.abs(found) < np.finfo("f4").tiny  # beside zero both signs are
    inside: NDArray[np.bool_] = ((least <= exact) & (exact <= most)) | tiny
    return inside
