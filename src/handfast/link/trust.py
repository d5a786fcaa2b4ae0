"""How an end shows who it is, and the keys that two ends share: from one secret, or one each.

The agents of a run share its secret, so any of them could speak as another; nodes of a fleet have
keys of their own (:mod:`handfast.fleet.link.keyed`).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Container
from typing import Final, Protocol

__all__ = ["Agreement", "Chance", "Secret", "Trust"]

Chance = Callable[[int], bytes]
"""Gives so many bytes that nobody can guess."""

LEAST: Final = 16
"""The fewest bytes of a secret."""


class Agreement(Protocol):
    """This end's part in agreeing on keys, for one session."""

    @property
    def share(self) -> bytes:
        """What the peer is told of it."""

    def agree(self, theirs: bytes, transcript: bytes, /) -> tuple[bytes, bytes]:
        """Give the frame keys, 32 bytes each: from the dialer, and from the listener.

        Raises ValueError for a share of the peer's that agrees on nothing.
        """


class Trust(Protocol):
    """Who an end is, how it signs, and whose signatures it believes."""

    @property
    def id(self) -> str:
        """Its name."""

    def sign(self, data: bytes) -> bytes:
        """Sign, as this end."""

    def believes(self, who: str, signature: bytes, data: bytes) -> bool:
        """Say whether this is the signature of that end."""

    def expect(self, peers: Container[str], /) -> None:
        """Raise ValueError for peers that can't be ends of this trust."""

    def begin(self, chance: Chance, /) -> Agreement:
        """Take part in a session. Raises HandfastError where a package is missing."""


class Secret:
    """The trust of those who share a secret of 16 bytes or more; ``id`` is this end's name."""

    def __init__(self, secret: bytes, me: str) -> None:
        if len(secret) < LEAST:
            raise ValueError(f"a secret has at least {LEAST} bytes, this one {len(secret)}")
        self._secret = secret
        self.id = me
        self.share = b""

    def sign(self, data: bytes) -> bytes:
        """Give the HMAC-SHA-256 (RFC 2104) of a name and data."""
        return self._made("sign", self.id, data)

    def believes(self, who: str, signature: bytes, data: bytes) -> bool:
        """Say whether somebody with the secret has signed this by that name."""
        return hmac.compare_digest(signature, self._made("sign", who, data))

    def expect(self, peers: Container[str]) -> None:
        """Expect any name; a text is none of many."""
        if isinstance(peers, str) or not isinstance(peers, Container):
            raise ValueError(f"peers is {peers!r:.80}. What to do: give a set of the peers' names")

    def begin(self, _: Chance) -> Secret:
        """Take part: the offers' nonces make the keys new."""
        return self

    def agree(self, _: bytes, transcript: bytes) -> tuple[bytes, bytes]:
        """Derive the frame keys from the secret and the transcript."""
        return self._made("key", "D", transcript), self._made("key", "L", transcript)

    def _made(self, what: str, who: str, data: bytes) -> bytes:
        label = f"handfast.link/1 {what} {who}\0".encode(errors="surrogateescape")
        return hmac.digest(self._secret, label + data, "sha256")
