"""What the ranks of a node hold alike, asked before any of them leaves it to the node's first.

Only of tensors that seem alike and were not proven so in this process: at the first save, that is,
and when new ones have come. Whoever asks waits for the first rank, for a while at most: a rank that
hears nothing stores its own, and asks again with its next save.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from handfast.core.lattice import Epoch

__all__ = ["WAIT_S", "First", "Witness"]

WAIT_S: Final = 10.0  # ranks that train together save at almost the same time
EPOCHS: Final = 64

Digests = Mapping[str, bytes]


class First(NamedTuple):
    """The first rank of a node in a run, by its shard."""

    run: str
    shard: int


class Witness:
    """The first ranks' digests, by epoch, for as long as anybody may ask; and what was left to them
    and turned out to differ.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[First, Epoch], asyncio.Future[Digests | None]] = {}
        self._unheard: dict[First, set[str]] = {}
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

    def wanted(self, first: First, epoch: Epoch) -> bool:
        """Say whether a rank still waits to hear of this one, and not of this epoch yet."""
        return bool(self._unheard.get(first)) and not self._told(first, epoch).done()

    def settle(self, first: First, epoch: Epoch, digests: Digests | None = None) -> None:
        """Hear what a first rank holds in an epoch, once; None where it says nothing of it."""
        told = self._told(first, epoch)
        if not told.done():
            told.set_result(digests)

    def _told(self, first: First, epoch: Epoch) -> asyncio.Future[Digests | None]:
        key = (first, epoch)
        if key not in self._said:
            self._said[key] = asyncio.get_running_loop().create_future()
            for old in list(self._said)[:-EPOCHS]:
                self._said.pop(old).cancel()
        return self._said[key]

    async def same(
        self, domain: str, first: First, epoch: Epoch, digests: Digests, wait_s: float = WAIT_S
    ) -> list[str] | None:
        """Give the paths that the first rank holds as this domain's does; None if it is not heard.

        From then on until it is, the first rank is wanted to speak in each of its saves.
        """
        unheard = self._unheard.setdefault(first, set())
        unheard.add(domain)
        told = self._told(first, epoch)
        await asyncio.wait([told], timeout=min(wait_s, WAIT_S))
        held = told.result() if told.done() and not told.cancelled() else None
        if held is None:
            return None
        unheard.discard(domain)
        return [path for path, found in digests.items() if held.get(path) == found]
