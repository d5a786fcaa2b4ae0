"""Which sequence numbers of a direction were taken, given up, or are still to come."""

from __future__ import annotations

from typing import Final

from handfast.link.frame import LinkError, Reason

__all__ = ["SPAN", "Window"]

SPAN: Final = 1024
"""How far behind the newest a number may come before it is given up."""


class Window:
    """Takes each number once. Of what is behind the span a gap counts as given up; where a stream
    keeps ``order`` none is taken out of its turn.

    ``floor``: every number below was taken or given up. ``lost`` counts those that were given up.
    """

    def __init__(self, *, order: bool = False) -> None:
        self.floor = 0
        self.lost = 0
        self._order = order
        self._seen = 0  # bit i: floor + i was taken

    def check(self, sequence: int) -> None:
        """Raise LinkError for a number that was taken or given up. Changes nothing."""
        if sequence < self.floor:
            raise LinkError(Reason.LATE, f"frame {sequence}: all below {self.floor} is settled")
        if self._order and sequence > self.floor:
            raise LinkError(Reason.GAP, f"frame {sequence} came where {self.floor} was due")
        if self._seen >> min(sequence - self.floor, SPAN) & 1:
            raise LinkError(Reason.REPLAYED, f"frame {sequence} was taken before")

    def take(self, sequence: int) -> None:
        """Take a number that :meth:`check` lets pass."""
        if self._order:
            self.floor += 1
            return
        if sequence >= self.floor + SPAN:
            self.give_up(sequence - SPAN)
        self._seen |= 1 << sequence - self.floor
        self._settle()

    def give_up(self, last: int) -> None:
        """Wait no more for what has not come up to ``last``."""
        ahead = last + 1 - self.floor
        if ahead > 0:
            self.lost += ahead - (self._seen & (1 << min(ahead, SPAN)) - 1).bit_count()
            self._seen = self._seen >> ahead if ahead < SPAN else 0
            self.floor = last + 1
            self._settle()

    def _settle(self) -> None:
        """Raise the floor over all that was taken next to it: by the run of ones at the end."""
        run = (~self._seen & self._seen + 1).bit_length() - 1
        self._seen >>= run
        self.floor += run
