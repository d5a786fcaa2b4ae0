"""The handshake of a link, without I/O: frames in, effects out.

::

    OFFER   node, incarnation, epochs (base, successor: numbers and digests), nonce, X25519 key;
            signed by the node's Ed25519 key
    PROOF   the offer again, and a signature over the role and both offers, byte for byte

Each end sends OFFER, answers an offer by PROOF, and is open once it holds the peer's proof and has
proved itself. A proof covers this end's nonce, so it is fresh; what was narrowed, changed or
replayed on the way breaks a signature. Both ends choose the highest epoch in common, by the same
function of the same offers.

The session's id and its two frame keys come from the signed transcript (HKDF, RFC 5869, over
X25519, RFC 7748). **Durable first**: an end's incarnation and epochs before its offer, both
incarnations and the choice before its proof. A :class:`Persist` is done before anything that
follows from it is sent: go on by :meth:`Session.persisted`. No timer changes anything;
:meth:`Session.again` only repeats what was sent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from handfast.errors import UNREADABLE, HandfastError
from handfast.fleet.identity import EXTRA, Key
from handfast.fleet.inventory.facts import Node
from handfast.fleet.link.frame import NO_KEY, Kind, LinkError, Reason, seal
from handfast.fleet.link.switch import Spoken, choose

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

__all__ = [
    "Bound", "Effect", "Offer", "Offered", "Persist", "Record", "Send", "Session", "Taking",
    "recall",
]  # fmt: skip

_OFFER: Final = b"handfast.link.offer/1\n"
_PROOF: Final = b"handfast.link.proof/1\n"
_SESSION: Final = b"handfast.link.session/1\n"
_KEYS: Final = b"handfast.link.keys/1\n"


class Offered(msgspec.Struct, frozen=True, tag=True):
    """Durable before an offer: which life of this node says that it speaks these epochs."""

    node: Node
    spoken: tuple[Spoken, ...]


class Bound(msgspec.Struct, frozen=True, tag=True):
    """Durable before a proof: the session, both lives, and the epoch that was chosen."""

    session: bytes
    mine: Node
    theirs: Node
    spoken: Spoken


class Taking(msgspec.Struct, frozen=True, tag=True):
    """Durable before it is said: what this end takes in a session, and nothing else any more.

    Two epochs are ACCEPT_BOTH. One is the promise to take nothing older.
    """

    session: bytes
    spoken: tuple[Spoken, ...]


Record: TypeAlias = Offered | Bound | Taking


def recall(records: Iterable[Record]) -> tuple[tuple[Spoken, ...], Node | None]:
    """Read a link's records, in order: what a new session is to offer, and whom it knows.

    A new life offers what the disk says, not what an earlier one offered: the peer may have been
    promised more by then, or less. Epochs are () and the node None where nothing is recorded.
    """
    spoken: tuple[Spoken, ...] = ()
    known = None
    for record in records:
        if isinstance(record, Bound):
            known = record.theirs
        else:
            spoken = record.spoken
    return spoken, known


class Persist(msgspec.Struct, frozen=True):
    """Make the record durable, then say so. Until then nothing that follows from it is sent."""

    record: Record


class Send(msgspec.Struct, frozen=True):
    """Send one frame. It may be lost, doubled or overtaken."""

    frame: bytes


Effect: TypeAlias = Persist | Send


class Offer(msgspec.Struct, frozen=True):
    """What an end says of itself: ``nonce`` and ``ephemeral`` (X25519) have 32 bytes each."""

    node: Node
    base: Spoken
    successor: Spoken | None
    nonce: bytes
    ephemeral: bytes

    @property
    def spoken(self) -> tuple[Spoken, ...]:
        """The epochs that this end speaks, the base first."""
        return (self.base,) if self.successor is None else (self.base, self.successor)


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The body of an OFFER or a PROOF: an offer's bytes, and a signature of 64 bytes."""

    offer: bytes
    signature: bytes


class _Peer(msgspec.Struct, frozen=True):
    """An offer that was heard, and what follows from it and from this end's own."""

    offer: bytes
    transcript: bytes
    bound: Bound
    keys: tuple[bytes, bytes]


class Session:
    """One handshake of one end; ``dialer`` tells the two ends apart.

    ``spoken`` are the epochs of this end, base and at most one successor; ``peer`` is the key of
    the node that is expected; ``known`` its newest incarnation that a :class:`Bound` of this node
    holds. Raises ValueError for epochs that can't be offered, HandfastError without the extra.
    """

    def __init__(
        self,
        key: Key,
        node: Node,
        spoken: tuple[Spoken, ...],
        *,
        peer: str,
        dialer: bool,
        known: Node | None = None,
        chance: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        numbers = [each.epoch for each in spoken]
        if not 1 <= len(spoken) <= 2 or sorted(set(numbers)) != numbers or node.key != key.id:
            raise ValueError("offer a base and at most one successor, above it, as this key's node")
        self._key = key
        self._peer = peer
        self._known = known
        self._dialer = dialer
        self._ephemeral = _x25519(chance(32))
        self.offer = Offer(
            node,
            spoken[0],
            spoken[1] if len(spoken) == 2 else None,
            chance(32),
            self._ephemeral.public_key().public_bytes_raw(),
        )
        self._mine = msgspec.msgpack.encode(self.offer)
        self._heard: _Peer | None = None
        self._waiting: Record | None = None
        self._offered = False
        self._bound = False  # our Bound is durable
        self._proved = False  # the peer's proof was heard

    @property
    def open(self) -> bool:
        """Whether both ends' proofs are there and both lives are durable here."""
        return self._bound and self._proved

    @property
    def bound(self) -> Bound:
        """The session, once there is one; RuntimeError before."""
        return self._have().bound

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """The keys, 32 bytes each: of what this end sends, and of what it hears."""
        return self._have().keys

    def begin(self) -> list[Effect]:
        """Ask for this end's own life to be made durable; the offer follows."""
        return self._persist(Offered(self.offer.node, self.offer.spoken))

    def persisted(self, record: Record) -> list[Effect]:
        """Go on once a record is durable. One that nobody waits for any more is passed over."""
        if record != self._waiting:
            return []
        self._waiting = None
        if isinstance(record, Offered):
            self._offered = True
            if self._heard is not None:
                return [self._say(Kind.OFFER), *self._persist(self._heard.bound)]
            return [self._say(Kind.OFFER)]
        self._bound = True
        return [self._say(Kind.PROOF)]

    def again(self) -> list[Effect]:
        """Repeat what was said, for it may be lost."""
        said = [Kind.OFFER] if self._offered and not self._proved else []
        said += [Kind.PROOF] if self._bound else []
        return [self._say(kind) for kind in said]

    def receive(self, kind: Kind, body: bytes) -> list[Effect]:
        """Take an OFFER or a PROOF. Raises LinkError; the handshake goes on as if it had not come.

        With Reason.ANEW the peer is in a later life, and an open session is over.
        """
        try:
            signed = msgspec.msgpack.decode(body, type=_Signed)
            offer = msgspec.msgpack.decode(signed.offer, type=Offer)
        except UNREADABLE as error:
            raise LinkError(Reason.MALFORMED, f"an offer that can't be read: {error}") from None
        self._admit(offer)
        if kind is Kind.OFFER:
            _verify(offer.node, signed.signature, _OFFER + signed.offer)
            return self._meet(offer, signed.offer)
        transcript = self._transcript(signed.offer)
        _verify(offer.node, signed.signature, self._to_sign(transcript, mine=False))
        return self._believe(offer, signed.offer)

    # -- what an offer must be -----------------------------------------------------------------

    def _admit(self, offer: Offer) -> None:
        node, known = offer.node, self._known
        if node.key != self._peer:
            raise LinkError(Reason.PEER, f"node {node.key[:16]}; {self._peer[:16]} is expected")
        lengths = len(offer.nonce), len(offer.ephemeral)
        successor = offer.successor
        if lengths != (32, 32) or (successor and successor.epoch <= offer.base.epoch):
            raise LinkError(Reason.MALFORMED, "an offer without a sound nonce, key or successor")
        if known is None:
            return
        if node.counter < known.counter:
            raise LinkError(
                Reason.INCARNATION, f"life {node.counter} of a peer whose life {known.counter} was"
                " heard",
            )  # fmt: skip
        if node.counter == known.counter and node.boot != known.boot:
            raise LinkError(
                Reason.INCARNATION,
                f"life {node.counter} of the peer under two boots: two machines have one key",
            )

    def _meet(self, offer: Offer, raw: bytes) -> list[Effect]:
        if self._proved:
            self._past(offer, raw)
        if self._heard is not None and self._heard.offer == raw:  # it lacks our proof
            return [self._say(Kind.PROOF)] if self._bound else []
        self._take(offer, raw)
        return self._persist(self._have().bound) if self._offered else []

    def _believe(self, offer: Offer, raw: bytes) -> list[Effect]:
        if self._proved:
            self._past(offer, raw)
            return []
        same = self._heard is not None and self._heard.offer == raw
        if not same:
            self._take(offer, raw)
        self._proved = True
        return [] if same else self._persist(self._have().bound)

    def _past(self, offer: Offer, raw: bytes) -> None:
        """Refuse another offer than that of the peer that is proved."""
        held = self._have()
        if raw == held.offer:
            return
        if offer.node.counter > held.bound.theirs.counter:
            raise LinkError(Reason.ANEW, f"the peer is in life {offer.node.counter} by now")
        raise LinkError(Reason.SESSION, "an offer of another session with this life of the peer")

    def _take(self, offer: Offer, raw: bytes) -> None:
        spoken = choose(self.offer.spoken, offer.spoken)
        transcript = self._transcript(raw)
        session = hashlib.sha256(_SESSION + transcript).digest()[:16]
        to_listener, to_dialer = _derive(self._ephemeral, offer.ephemeral, transcript)
        keys = (to_listener, to_dialer) if self._dialer else (to_dialer, to_listener)
        bound = Bound(session, self.offer.node, offer.node, spoken)
        self._heard, self._known = _Peer(raw, transcript, bound, keys), offer.node
        self._bound = False

    # -- what is said and signed ---------------------------------------------------------------

    def _persist(self, record: Record) -> list[Effect]:
        self._waiting = record
        return [Persist(record)]

    def _say(self, kind: Kind) -> Send:
        over = _OFFER + self._mine
        if kind is Kind.PROOF:
            over = self._to_sign(self._have().transcript, mine=True)
        body = msgspec.msgpack.encode(_Signed(self._mine, self._key.sign(over)))
        return Send(seal(NO_KEY, kind, body))

    def _transcript(self, theirs: bytes) -> bytes:
        """Digest both offers, the dialer's first, each behind its length."""
        first, second = (self._mine, theirs) if self._dialer else (theirs, self._mine)
        return hashlib.sha256(len(first).to_bytes(4) + first + second).digest()

    def _to_sign(self, transcript: bytes, *, mine: bool) -> bytes:
        return _PROOF + (b"D" if self._dialer == mine else b"L") + transcript

    def _have(self) -> _Peer:
        if self._heard is None:
            raise RuntimeError("no offer of the peer was heard yet")
        return self._heard


def _x25519(secret: bytes) -> X25519PrivateKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    except ImportError as error:
        raise HandfastError(EXTRA) from error
    return X25519PrivateKey.from_private_bytes(secret)


def _verify(node: Node, signature: bytes, data: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(node.key)).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise LinkError(Reason.SIGNATURE, f"not signed by node {node.key[:16]}") from None


def _derive(secret: X25519PrivateKey, theirs: bytes, transcript: bytes) -> tuple[bytes, bytes]:
    """Derive the frame keys, 32 bytes each: from the dialer to the listener, and back."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    try:
        shared = secret.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise LinkError(Reason.MALFORMED, "a key of the peer's that agrees on nothing") from None
    both = HKDF(SHA256(), 64, transcript, _KEYS).derive(shared)
    return both[:32], both[32:]
