"""The time of day, which overrides and files of nodes end by; nothing else here looks at it.

It may be set back, and then an override holds longer than was meant; the audit shows it.
"""

from __future__ import annotations

from datetime import UTC, datetime

__all__ = ["now"]


def now() -> datetime:
    """Give the time of day, in UTC."""
    return datetime.now(UTC)
