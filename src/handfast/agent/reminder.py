"""Waiting that is never silent: every ten seconds it is said for what, and for whom."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["REMIND_S", "Reminder"]

REMIND_S: Final = 10.0


class Reminder:
    """Measures one waiting, and says when to speak of it."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    @property
    def waited(self) -> float:
        """For how many seconds now."""
        return time.monotonic() - self._began

    def over(self, patience_s: float | None) -> bool:
        """Say whether that was so long; None is for ever."""
        return patience_s is not None and self.waited >= patience_s

    def due(self) -> bool:
        """Say whether it is time to remind, which is then done."""
        now = time.monotonic()
        if now - self._said < REMIND_S:
            return False
        self._said = now
        return True
