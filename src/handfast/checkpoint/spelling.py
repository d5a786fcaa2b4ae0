"""How counts and lists are spelled for people, in tables, warnings and errors."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["size", "some"]


def size(nbytes: float) -> str:
    """Spell a count of bytes: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def some(items: Sequence[str], most: int) -> str:
    """Spell the first of a list, and how many there are besides: "a, b and 4 more"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
