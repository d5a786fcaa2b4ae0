"""Which agent a domain lives at, and the way there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from handfast.agent.links import Links
from handfast.agent.speech import Said, words_at

__all__ = ["Route", "Routes"]


class Route(Protocol):
    """The way from a domain to the others."""

    def __call__(self, said: Said) -> None:
        """Say something to a domain; it may be lost, and the protocol sends by state."""

    def has_words(self, domain: str) -> bool:
        """Say whether a domain's agent can say words, as far as is known."""


class Routes:
    """The ways of one agent, ``label``; ``deliver`` hands over what is said to its own domains."""

    def __init__(self, label: str, deliver: Callable[[Said], None]) -> None:
        self.homes: dict[str, str] = {}
        """The agent of each domain, by its label."""
        self.links: Links | None = None
        self._label = label
        self._deliver = deliver

    def __call__(self, said: Said) -> None:
        """Say something to a domain, here or elsewhere."""
        home = self.homes.get(said.domain)
        if home == self._label:
            asyncio.get_running_loop().call_soon(self._deliver, said)
        elif self.links is not None and home is not None:
            self.links.send(home, said)

    def has_words(self, domain: str) -> bool:
        """Say whether a domain's agent can say words; one that can't be asked now may."""
        home = self.homes.get(domain)
        if home is None or home == self._label or self.links is None:
            return True
        epoch = self.links.epoch(home)
        return epoch is None or words_at(epoch)
