"""The handshake of a link, without I/O: frames in, effects out.

::

    OFFER   realm, node, incarnation, epochs (base, successor: numbers and digests), nonce, and a
            share of the keys; signed by the node
    PROOF   the offer again, and a signature over the role and both offers, byte for byte

Each end sends OFFER, answers an offer by PROOF, and is open once it holds the peer's proof and has
proved itself. A proof covers this end's nonce, so it is fresh; what was narrowed, changed or
replayed on the way breaks a signature. Both ends choose the highest epoch in common, by the same
function of the same offers.

The session's id and its two frame keys come from the signed transcript, the keys by what the ends
trust in (:mod:`~handfast.link.trust`). **Durable first**: an end's incarnation and epochs before
its offer, both incarnations and the choice before its proof. A :class:`Persist` is done before
anything that follows from it is sent: go on by :meth:`Session.persisted`. No timer changes
anything here; :meth:`Session.again` only repeats what was sent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Container
from typing import Final, Protocol, TypeAlias

import msgspec

from handfast.errors import UNREADABLE
from handfast.link.frame import NO_KEY, Kind, LinkError, Reason, seal
from handfast.link.life import Node, newer
from handfast.link.switch import Spoken, choose
from handfast.link.trust import Chance, Trust

__all__ = [
    "Bound", "Effect", "Known", "Offer", "Offered", "Persist", "Record", "Send", "Session",
    "Taking",
]  # fmt: skip

_OFFER: Final = b"handfast.link.offer/1\n"
_PROOF: Final = b"handfast.link.proof/1\n"
_SESSION: Final = b"handfast.link.session/1\n"
NONCE: Final = 32  # bytes


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


class Persist(msgspec.Struct, frozen=True):
    """Make the record durable, then say so. Until then nothing that follows from it is sent."""

    record: Record


class Send(msgspec.Struct, frozen=True):
    """Send one frame. It may be lost, doubled or overtaken."""

    frame: bytes


Effect: TypeAlias = Persist | Send


class Offer(msgspec.Struct, frozen=True):
    """What an end says of itself. ``realm`` names all who may link; ``nonce`` has 32 bytes."""

    realm: str
    node: Node
    base: Spoken
    successor: Spoken | None
    nonce: bytes
    share: bytes

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


class Known(Protocol):
    """The newest life of each peer, as far as this node is bound to one: a dict, or Records."""

    def get(self, peer: str, /) -> Node | None:
        """Give a peer's newest life, by its key."""


class Session:
    """One handshake of one end; ``dialer`` tells the two ends apart.

    ``spoken`` are the epochs of this end, base and at most one successor; ``peers`` are the keys of
    those that may be at the other end; ``known`` gives the newest incarnation of each that a
    :class:`Bound` of this node holds, and is asked each time. Raises ValueError for epochs that
    can't be offered, and for peers that the ``trust`` can't know.
    """

    def __init__(
        self,
        trust: Trust,
        node: Node,
        spoken: tuple[Spoken, ...],
        *,
        peers: Container[str],
        dialer: bool,
        realm: str = "",
        known: Known | None = None,
        chance: Chance = secrets.token_bytes,
    ) -> None:
        numbers = [each.epoch for each in spoken]
        if not 1 <= len(spoken) <= 2 or sorted(set(numbers)) != numbers or node.key != trust.id:
            raise ValueError("offer a base and at most one successor, above it, as this key's node")
        trust.expect(peers)
        self._trust = trust
        self._peers = peers
        self._known: Known = {} if known is None else known
        self._dialer = dialer
        self._agreement = trust.begin(chance)
        successor = spoken[1] if len(spoken) == 2 else None
        self.offer = Offer(realm, node, spoken[0], successor, chance(NONCE), self._agreement.share)
        self._mine = msgspec.msgpack.encode(self.offer)
        self._heard: _Peer | None = None
        self._waiting: Record | None = None
        self._offered = False
        self._bound = False  # our Bound is durable
        self._proved = False  # the peer's proof was heard
        self.met = ""
        """Who has signed an offer, or a proof, last: linked or not."""

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
        """Go on once a record is durable. One that nobody waits for any more is passed over.

        Raises LinkError where a later life of the peer was bound meanwhile, by another session.
        """
        if record != self._waiting:
            return []
        self._waiting = None
        if isinstance(record, Bound):
            self._not_older(record.theirs)  # its successor may have been bound meanwhile
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
        over = _OFFER + signed.offer
        if kind is Kind.PROOF:
            over = self._to_sign(self._transcript(signed.offer), mine=False)
        self._verify(offer.node, signed.signature, over)
        self._not_older(offer.node)
        if kind is Kind.OFFER:
            return self._meet(offer, signed.offer)
        return self._believe(offer, signed.offer)

    # -- what an offer must be -----------------------------------------------------------------

    def _admit(self, offer: Offer) -> None:
        node, mine, successor = offer.node, self.offer, offer.successor
        if offer.realm != mine.realm:
            raise LinkError(
                Reason.REALM, f"an end of {offer.realm[:80]!r}; this one is of {mine.realm!r}"
            )
        heard = self._heard.bound.theirs if self._heard is not None else None
        another = self._proved and heard is not None and heard.key != node.key
        if another or node.key not in self._peers:
            raise LinkError(Reason.PEER, f"{node.key[:80]!r} is not expected on this connection")
        if len(offer.nonce) != NONCE or (successor and successor.epoch <= offer.base.epoch):
            raise LinkError(Reason.MALFORMED, "an offer without a sound nonce or successor")

    def _not_older(self, node: Node) -> None:
        heard = self._heard.bound.theirs if self._heard is not None else None
        known = self._known.get(node.key)
        if heard is not None and heard.key == node.key and newer(heard, known):
            known = heard
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

    def _verify(self, node: Node, signature: bytes, data: bytes) -> None:
        if not self._trust.believes(node.key, signature, data):
            raise LinkError(Reason.SIGNATURE, f"not signed by {node.key[:80]!r}")
        self.met = node.key

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
        try:
            dialers, listeners = self._agreement.agree(offer.share, transcript)
        except ValueError:
            raise LinkError(Reason.MALFORMED, "a share of keys that agrees on nothing") from None
        keys = (dialers, listeners) if self._dialer else (listeners, dialers)
        bound = Bound(session, self.offer.node, offer.node, spoken)
        self._heard = _Peer(raw, transcript, bound, keys)
        self._bound = False

    # -- what is said and signed ---------------------------------------------------------------

    def _persist(self, record: Record) -> list[Effect]:
        self._waiting = record
        return [Persist(record)]

    def _say(self, kind: Kind) -> Send:
        over = _OFFER + self._mine
        if kind is Kind.PROOF:
            over = self._to_sign(self._have().transcript, mine=True)
        body = msgspec.msgpack.encode(_Signed(self._mine, self._trust.sign(over)))
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
