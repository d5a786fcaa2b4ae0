"""What users give, checked at the door: no slip may reach a journal, or be read another way."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final, SupportsFloat, SupportsIndex, cast

from handfast.core.retain import Keep

__all__ = ["kept", "line", "names", "one_of", "patterns", "seconds", "whole"]

NAME: Final = 100
"""The most characters of a lineage's name."""


def whole(name: str, value: object, *, least: int | None = None) -> int:
    """Take a whole number, NumPy's and 0-d integer tensors too. Raises ValueError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise ValueError(
            f"{name}={value!r}: give a whole number, not a {type(value).__name__}"
        ) from None
    if least is not None and found < least:
        raise ValueError(f"{name}={value}: it counts from {least}")
    if abs(found) >= 1 << 63:
        raise ValueError(f"{name}={value}: it does not fit 64 bits")
    return found


def seconds(name: str, value: object) -> float:
    """Take a duration in seconds. Raises ValueError."""
    given = -1.0 if isinstance(value, bool | str) else value
    found = float(given) if isinstance(given, SupportsFloat) else -1.0
    if not found >= 0:  # NaN, too
        raise ValueError(f"{name}={value!r}: give seconds, 0 or more")
    return found


def patterns(name: str, value: Sequence[str], *, least: int = 0) -> tuple[str, ...]:
    """Take patterns of paths. Raises ValueError for a bare string: its letters would be patterns,
    and a ``*`` among them would match everything."""
    return _texts(name, value, "patterns, such as ('model/**',)", least)


def names(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """Take names. Raises ValueError, also for a bare string: its letters would be names."""
    return _texts(name, value, "names, such as ('finite',)", 0)


def _texts(name: str, value: Sequence[str], what: str, least: int) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}={value!r}: give a tuple of {what}")
    if len(value) < least:
        raise ValueError(f"{name}={value!r}: it names nothing; give at least {least} pattern")
    return tuple(value)


def one_of(name: str, value: object, options: Sequence[str]) -> None:
    """Refuse what is none of some words. Raises ValueError."""
    if value not in options:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, options))}")


def line(value: object) -> str:
    """Take the name of a lineage. Raises ValueError."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= NAME:
        raise ValueError(
            f"lineage={value!r}: give a name of 1 to {NAME} printable characters, such as 'sft'"
        )
    return value


def kept(keep: object) -> Keep:
    """Take what is to be retained; None is the default. Raises ValueError."""
    if keep is None:
        return Keep()
    if not isinstance(keep, Keep):
        raise ValueError(f"keep={keep!r}: give a handfast.Keep, such as Keep(newest=3, every=1000)")
    every = None if keep.every is None else whole("keep.every", keep.every, least=1)
    return Keep(whole("keep.newest", keep.newest, least=1), every)
