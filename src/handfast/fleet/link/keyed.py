"""The trust of nodes that have a key each: Ed25519 signatures, keys agreed on by X25519."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Final

from handfast.errors import HandfastError
from handfast.fleet.identity import EXTRA, Key
from handfast.link.trust import Chance

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

__all__ = ["Keyed"]

_KEYS: Final = b"handfast.link.keys/1\n"
_ID: Final = re.compile(r"[0-9a-f]{64}\Z")


class Keyed:
    """A node's enrolled key as its :class:`~handfast.link.trust.Trust`."""

    def __init__(self, key: Key) -> None:
        self._key = key
        self.id = key.id

    def sign(self, data: bytes) -> bytes:
        """Sign by Ed25519 (RFC 8032): 64 bytes."""
        return self._key.sign(data)

    def believes(self, who: str, signature: bytes, data: bytes) -> bool:
        """Verify the signature of the node that has this public key, in hex."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(who)).verify(signature, data)
        except (InvalidSignature, ValueError):
            return False
        return True

    def expect(self, peers: Container[str]) -> None:
        """Raise ValueError for peers that no node can be: each is a public key, 64 hex digits."""
        if isinstance(peers, str | bytes) or not isinstance(peers, Iterable):
            raise ValueError(
                f"peers is {peers!r:.80}. What to do: give a set of the peers' key ids"
            )
        for each in peers:
            if not isinstance(each, str) or not _ID.match(each):
                raise ValueError(
                    f"{each!r:.80} is no key of a peer: that has 64 hex digits, 0-9 and a-f. "
                    "What to do: give its Key.id, which `handfast fleet enroll` prints on its node"
                )

    def begin(self, chance: Chance) -> Exchange:
        """Make a key for one session."""
        try:
            from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        except ImportError as error:
            raise HandfastError(EXTRA) from error
        return Exchange(X25519PrivateKey.from_private_bytes(chance(32)))


class Exchange:
    """X25519 (RFC 7748) with a key that ends with its session; HKDF-SHA-256 (RFC 5869) over it."""

    def __init__(self, secret: X25519PrivateKey) -> None:
        self._secret = secret
        self.share = secret.public_key().public_bytes_raw()

    def agree(self, theirs: bytes, transcript: bytes) -> tuple[bytes, bytes]:
        """Derive the frame keys from the shared secret, with the transcript as salt."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        shared = self._secret.exchange(X25519PublicKey.from_public_bytes(theirs))
        both = HKDF(SHA256(), 64, transcript, _KEYS).derive(shared)
        return both[:32], both[32:]
