"""How counts are spelled for people, in tables and in warnings."""

from __future__ import annotations

__all__ = ["size"]


def size(nbytes: float) -> str:
    """Spell a count of bytes: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
