"""What the ranks of a node hold alike, asked before any of them leaves it to another.

Only of tensors that seem alike and were not proven so in this process: at the first save, that is,
and when new ones have come. Whoever asks waits for the node's first rank, for a while at most: a
rank that hears nothing stores its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final

from handfast.core.lattice import Epoch

__all__ = ["Witness"]

WAIT_S: Final = 10.0  # ranks that train together save at almost the same time
EPOCHS: Final = 64

Digests = Mapping[str, bytes]


class Witness:
    """The first ranks' digests, by run and epoch, for as long as anybody may ask; and what was left
    to them and turned out to differ.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[str, Epoch], asyncio.Future[Digests]] = {}
        self._unlike: dict[str, dict[str, None]] = {}

    def note(self, found: Mapping[str, Iterable[str]]) -> None:
        """Note which paths ranks have left to another that holds them otherwise, by their domains.

        It is kept for those that are not here now, since their agent has died, say.
        """
        for domain, paths in found.items():
            self._unlike.setdefault(domain, {}).update(dict.fromkeys(paths))

    def unlike(self, domain: str) -> tuple[str, ...]:
        """Give what was noted of a domain."""
        return tuple(self._unlike.get(domain, ()))

    def settle(self, run: str, epoch: Epoch, digests: Digests | None = None) -> None:
        """Hear the node's first rank; once it saves an epoch, it has nothing more to say of it."""
        told = self._told(run, epoch)
        if not told.done():
            told.set_result(digests or {})

    def _told(self, run: str, epoch: Epoch) -> asyncio.Future[Digests]:
        key = (run, epoch)
        if key not in self._said:
            self._said[key] = asyncio.get_running_loop().create_future()
            for old in list(self._said)[:-EPOCHS]:
                self._said.pop(old).cancel()
        return self._said[key]

    async def same(
        self, run: str, epoch: Epoch, digests: Digests, *, leads: bool, wait_s: float = WAIT_S
    ) -> list[str] | None:
        """Give the paths that the node's first rank holds alike; None where it has not come.

        The first rank itself gets all of its own.
        """
        told = self._told(run, epoch)
        if leads:
            self.settle(run, epoch, digests)
            return list(digests)
        await asyncio.wait([told], timeout=min(wait_s, WAIT_S))
        if not told.done() or told.cancelled():
            return None
        first = told.result()
        return [path for path, found in digests.items() if first.get(path) == found]
