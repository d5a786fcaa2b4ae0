"""Facts, certificates and messages: what is made durable is what is sent is what is joined.

There is one kind of thing: a **fact**, true once and for ever. A member writes a fact of its own
into its journal, then sends that same record, and whoever receives it joins it to what it holds.
So a message cannot speak of anything but records, and no second copy of the truth exists that
could differ. Joins make loss, duplication, reordering and delay harmless (the design, section 2).

The design's names for messages map onto the facts that they carry: OFFER is Staged, SKIP is
Skipped, FREEZE is Frozen, RESTORE is Valid, Bad, Accepted, Declined and Restored, CONV is
Converged; SUMMARY is :class:`Knows`, and HELLO is a message whose ``hello`` is set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar, final

import msgspec

from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration

__all__ = [
    "Accepted", "Bad", "Branch", "Certificate", "Configured", "Converged", "Copy", "Declined",
    "Fact", "Frozen", "Knows", "Lost", "Message", "Record", "Released", "Report",
    "RestoreCertificate", "Restored", "Rolled", "Skipped", "Staged", "Valid", "decode_message",
    "decode_record", "encode", "leaf", "merkle_root", "node", "pack", "unpack",
]  # fmt: skip

T = TypeVar("T")


class _Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A frozen value, encoded as an array: fields may be added at the end, with defaults.

    Frozen values hold no cycles, so the collector of cycles need not look at them.
    """


class Copy(_Value, frozen=True):
    """A shard's image of one epoch, retained; ``digest`` is that of its manifest."""

    epoch: Epoch
    digest: str


class Lost(_Value, frozen=True):
    """A copy that was attested and can't be found or read any more."""

    epoch: Epoch
    reason: str


class Certificate(_Value, frozen=True):
    """Proof of Conv_T(e), of constant size.

    ``root`` is the Merkle root over the attestations in configuration order.
    """

    run: str
    configuration: str
    tier: str
    epoch: Epoch
    root: str


class Branch(_Value, frozen=True):
    """One generation of a timeline, the epoch that it resumed from, and the round that began it.

    ``round`` is empty in journals that were written before it was kept.
    """

    generation: int
    base: Epoch
    round: str = ""


class RestoreCertificate(_Value, frozen=True):
    """Proof that a generation began, once, from ``base``, every shard valid and accepted.

    ``timeline`` is the chain of bases, the newest generation first, down to the release floor;
    ``copies[s]`` is the domain whose VALID copy of shard s was accepted.
    """

    run: str
    configuration: str
    generation: int
    round: str
    base: Epoch
    timeline: tuple[Branch, ...]
    copies: tuple[int, ...]
    root: str


class Report(_Value, frozen=True):
    """What a member says of itself when it freezes."""

    retained: tuple[Copy, ...]
    lost: tuple[Lost, ...]
    restored: RestoreCertificate | None
    converged: tuple[Certificate, ...]


class Frozen(_Value, frozen=True, tag="frozen"):
    """FREEZE(g): after it nothing of an older generation is appended."""

    domain: int
    incarnation: int
    generation: int
    round: str
    configuration: str
    report: Report
    want: int | None = None


@final
class Staged(_Value, frozen=True, tag="staged"):
    """The vote STAGED(e, digest): durable, validated, retained until superseded."""

    domain: int
    epoch: Epoch
    digest: str


@final
class Skipped(_Value, frozen=True, tag="skipped"):
    """The vote SKIP(e, reason): failed or refused, and never staged."""

    domain: int
    epoch: Epoch
    reason: str


@final
class Rolled(_Value, frozen=True, tag="rolled"):
    """Many votes STAGED as one: ``size`` domains from ``first`` on, all of one tier, staged e.

    ``root`` is the inner node of the tier's Merkle tree over just their attestations. It is drawn
    from votes that are durable and never journaled: after a crash it is asked for again.
    """

    first: int
    size: int
    epoch: Epoch
    root: bytes


class Valid(_Value, frozen=True, tag="valid"):
    """Every byte of this domain's copy was read and is what was attested."""

    domain: int
    generation: int
    epoch: Epoch


class Bad(_Value, frozen=True, tag="bad"):
    """This domain's copy can't be restored from."""

    domain: int
    generation: int
    epoch: Epoch
    reason: str


class Accepted(_Value, frozen=True, tag="accepted"):
    """A rank has compared the epoch with its live state, dry, and will load ``copy``."""

    shard: int
    generation: int
    epoch: Epoch
    copy: int


class Declined(_Value, frozen=True, tag="declined"):
    """A rank can't take the epoch (another structure, say): the round ends without a restore."""

    shard: int
    generation: int
    epoch: Epoch
    reason: str


class Restored(_Value, frozen=True, tag="restored"):
    """The restore certificate of a generation."""

    certificate: RestoreCertificate


class Converged(_Value, frozen=True, tag="converged"):
    """The certificate of a converged epoch."""

    certificate: Certificate


class Configured(_Value, frozen=True, tag="configured"):
    """The configuration that this domain takes part in, and whether it was there from the first.

    Only a founding domain holds genesis: one that joins later has lost, or never had, the past.
    ``brought`` is what one that joins has by another way; a recovery checks it like any copy.
    """

    configuration: Configuration
    founding: bool
    brought: tuple[Copy, ...] = ()


class Released(_Value, frozen=True, tag="released"):
    """These epochs are retained no more; written before their files are removed."""

    epochs: tuple[Epoch, ...]


Fact = Frozen | Staged | Skipped | Valid | Bad | Accepted | Declined | Restored | Converged
Record = (
    Configured
    | Frozen
    | Staged
    | Skipped
    | Valid
    | Bad
    | Accepted
    | Restored
    | Converged
    | Released
)


class Knows(_Value, frozen=True):
    """What a member holds, as masks: enough for a peer to see what is lacking.

    ``votes`` is (tier, epoch, mask of domains whose vote is held); ``checks`` is (epoch, mask of
    copies judged); ``lines`` is the converged epoch of each tier, or None. On the wire a mask is
    bytes, as :func:`pack` makes them: msgpack's integers end at 64 bits, and jobs do not.
    ``spans`` is in the place of ``votes`` where there is a tree: not a bit a domain, but the first
    and the end of each stretch of domains, one after the other.
    """

    frozen: bytes = b""
    checks: tuple[tuple[Epoch, bytes], ...] = ()
    accepted: bytes = b""
    declined: bytes = b""
    restored: bool = False
    lines: tuple[Epoch | None, ...] = ()
    votes: tuple[tuple[int, Epoch, bytes], ...] = ()
    spans: tuple[tuple[int, Epoch, tuple[int, ...]], ...] = ()


class Message(_Value, frozen=True):
    """From one member to another: facts, and what the sender holds.

    ``rolled`` are facts, too. They stand by themselves so that an agent of a release that does not
    know them reads the rest of the message; it learns what they say from the certificate.
    """

    sender: int
    incarnation: int
    generation: int
    round: str
    configuration: str
    facts: tuple[Fact, ...]
    knows: Knows
    hello: bool = False
    rolled: tuple[Rolled, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(Message)
_records: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def encode(value: Message | Record) -> bytes:
    """Encode a message for the wire, or a record for the journal, as msgpack."""
    if isinstance(value, Configured):
        more = (value.brought,) if value.brought else ()
        said = ("configured", value.configuration.content(), value.founding, *more)
        return _encoder.encode(said)
    return _encoder.encode(value)


def pack(mask: int) -> bytes:
    """Write a mask as bytes, the lowest first and no more than needed; 0 is empty."""
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def unpack(mask: bytes) -> int:
    """Read a mask that :func:`pack` wrote."""
    return int.from_bytes(mask, "little")


def decode_message(data: bytes) -> Message:
    """Read a message; raises ``msgspec.MsgspecError`` for anything that is none."""
    return _decode(_messages, data)


def decode_record(data: bytes) -> Record:
    """Read a durable record; raises ``msgspec.MsgspecError`` for anything that is none."""
    return _decode(_records, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"no UTF-8, or nested too deep: {error}") from error


def leaf(text: str) -> bytes:
    """Hash one leaf of a Merkle tree, an attestation say, into 16 bytes."""
    return hashlib.blake2b(b"\0" + text.encode(), digest_size=16).digest()


def node(left: bytes, right: bytes) -> bytes:
    """Hash two nodes of a Merkle tree into the one above.

    Leaves and inner nodes are hashed under different prefixes, so no inner node can pass for a
    leaf (as in RFC 6962, section 2.1).
    """
    return hashlib.blake2b(b"\1" + left + right, digest_size=16).digest()


def merkle_root(leaves: Sequence[str]) -> str:
    """Hash leaves, in order, into one root of 32 hexadecimal characters.

    Nodes are paired from the left, level by level; one that is left over goes up as it is. So an
    aligned run of 2^j leaves, or the end of all that is left of one, has a node of its own.
    """
    level = [leaf(text) for text in leaves]
    while len(level) > 1:
        above = list(map(node, level[::2], level[1::2]))
        if len(level) % 2:
            above.append(level[-1])
        level = above
    return (level[0] if level else bytes(16)).hex()
