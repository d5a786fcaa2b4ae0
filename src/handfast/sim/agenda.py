"""Virtual time: what is to happen, in order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

__all__ = ["MS", "SECOND", "Agenda"]

MS: Final = 1_000
"""A millisecond, in the microseconds that all times of this room are counted in."""
SECOND: Final = 1_000_000


class Agenda:
    """A queue of calls, each at its microsecond; what is due at once keeps its order.

    ``now`` is the virtual time in microseconds, ``done`` the number of events so far.
    """

    __slots__ = ("_heap", "_order", "done", "now")

    def __init__(self) -> None:
        self.now = 0
        self.done = 0
        self._order = 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []

    def after(self, delay_us: int, do: Callable[..., None], *args: Any) -> None:
        """Let something happen so many microseconds from now."""
        self._order += 1
        heappush(self._heap, (self.now + delay_us, self._order, do, args))

    def run(self, until_us: int | None = None) -> None:
        """Let everything happen up to an instant, or until nothing is left."""
        heap = self._heap
        while heap and (until_us is None or heap[0][0] <= until_us):
            self.now, _, do, args = heappop(heap)
            self.done += 1
            do(*args)
        if until_us is not None:
            self.now = max(self.now, until_us)
