"""The outer header of every frame, which never changes, and the checks before a body is parsed.

Big-endian, 64 bytes, then the body::

    0   4   magic       89 48 46 4c ("\\x89HFL")
    4   2   version     of this header: 1
    6   2   kind        1 offer, 2 proof, 3 word, 4 data
    8   4   length      of the body, in bytes
    12  4   generation  } of the epoch that a data frame was sent under,
    16  8   step        } 0/0 in all other frames
    24  16  session     0 in offers and proofs
    40  8   sequence    0 in offers and proofs, else counted from 0 in each direction
    48  16  MAC         keyed BLAKE2b (RFC 7693) over bytes 0 to 47 and the body

Whatever an epoch means to those who speak it, all of them can read this much, and say of a frame
whose it is. Offers and proofs come before there is a key: their MAC is under a key that everybody
knows, so it shows accidents alone, and what they say is signed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from enum import IntEnum, StrEnum
from typing import Final

import msgspec

from handfast.core.lattice import GENESIS, Epoch
from handfast.errors import HandfastError

__all__ = [
    "HEADER", "KIND_AT", "MAX_BODY", "MAX_TALK", "NO_KEY", "NO_SESSION", "Header", "Kind",
    "LinkError", "Reason", "cut", "read_header", "seal", "unseal", "whole",
]  # fmt: skip

MAGIC: Final = b"\x89HFL"
VERSION: Final = 1
HEADER: Final = 64
"""The length of the outer header, in bytes."""

KIND_AT: Final = 7
"""Where the kind's last byte lies in the header."""

MAX_BODY: Final = 16 << 20
"""The most bytes in the body of a data frame."""

MAX_TALK: Final = 4096
"""The most bytes in the body of an offer, a proof or a word: of a peer that proved nothing yet."""

NO_SESSION: Final = bytes(16)
NO_KEY: Final = b"handfast.link/1 has no key yet.."
"""The key of offers and proofs, known to all."""

_HEAD: Final = struct.Struct(">4sHHIIQ16sQ")
_MAC: Final = 16


class Kind(IntEnum):
    """What a frame's body is: the link's own words, or the application's data."""

    OFFER = 1
    PROOF = 2
    WORD = 3
    DATA = 4


class Reason(StrEnum):
    """Why a frame was refused: a closed set, so that each can be counted."""

    SHORT = "short"  # fewer bytes than a header, or than the header says
    MAGIC = "magic"  # no frame of a link
    VERSION = "version"  # of another header
    KIND = "kind"  # of no kind that is known
    LENGTH = "length"  # a body above the bound, or more bytes than the header says
    MALFORMED = "malformed"  # a field or a body that can't be
    MAC = "mac"  # changed on the way, or of another key
    SESSION = "session"  # of another session, or before there is one
    REPLAYED = "replayed"  # its sequence number was taken before
    GAP = "gap"  # not the next one, where a stream keeps order
    LATE = "late"  # all up to its sequence number was taken or given up
    EPOCH = "epoch"  # of an epoch that is not taken now; or no epoch in common
    DIGEST = "digest"  # one number for two bundles
    CODEC = "codec"  # its own epoch's codec can't read the body
    SIGNATURE = "signature"  # not signed by who it names, or not over this transcript
    REALM = "realm"  # an end of another run, or of another fleet
    PEER = "peer"  # another node than those that are expected
    INCARNATION = "incarnation"  # an older life of the peer, or two machines with one key
    ANEW = "anew"  # the peer is in a new life: this session is over
    FULL = "full"  # nobody takes what came before: it was let go


class LinkError(HandfastError):
    """A frame that was refused: ``reason`` says why, for counting; the text says it for people."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {message}")


class Header(msgspec.Struct, frozen=True):
    """What the outer header says. ``length`` is of the body in bytes, ``mac`` has 16."""

    kind: Kind
    length: int
    epoch: Epoch
    session: bytes
    sequence: int
    mac: bytes


def seal(
    key: bytes,
    kind: Kind,
    body: bytes,
    *,
    session: bytes = NO_SESSION,
    epoch: Epoch = GENESIS,
    sequence: int = 0,
) -> bytes:
    """Make a frame. Raises ValueError for a body above the bound or a number with no place."""
    if len(body) > _bound(kind):
        raise ValueError(f"a body of kind {kind.name} has at most {_bound(kind)} bytes")
    try:
        head = _HEAD.pack(
            MAGIC, VERSION, kind, len(body), epoch.generation, epoch.step, session, sequence
        )
    except struct.error as error:
        raise ValueError(f"epoch {epoch}, sequence {sequence}: no place for it: {error}") from error
    return head + _mac(key, head, body) + body


def read_header(data: bytes | memoryview, most: int = MAX_BODY) -> Header:
    """Read the first 64 bytes of a frame, and check all that can be checked without its body.

    ``most`` bounds the body of a data frame, in bytes. Raises LinkError.
    """
    if len(data) < HEADER:
        raise LinkError(Reason.SHORT, f"{len(data)} bytes, a header has {HEADER}")
    magic, version, number, length, generation, step, session, sequence = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise _no_frame(magic)
    if version != VERSION:
        raise LinkError(Reason.VERSION, f"header version {version}; this end reads {VERSION}")
    if not Kind.OFFER <= number <= Kind.DATA:
        raise LinkError(Reason.KIND, f"kind {number} is not known")
    kind = Kind(number)
    if length > min(most, _bound(kind)):
        raise LinkError(Reason.LENGTH, f"a body of {length} bytes, kind {kind.name}")
    epoch = Epoch(generation, step)
    if kind is not Kind.DATA and epoch != GENESIS:
        raise LinkError(Reason.MALFORMED, f"kind {kind.name} under epoch {epoch}")
    if kind < Kind.WORD and (session != NO_SESSION or sequence):
        raise LinkError(Reason.MALFORMED, f"kind {kind.name} inside a session")
    return Header(kind, length, epoch, session, sequence, bytes(data[HEADER - _MAC : HEADER]))


def cut(buffer: bytearray, most: int = MAX_BODY) -> bytes | None:
    """Cut the first frame off what a stream has brought; None while it is not all there.

    Nothing is held for a length that is only claimed. Raises LinkError as :func:`read_header` does.
    """
    if not MAGIC.startswith(buffer[: len(MAGIC)]):  # at once: no more of it may ever come
        raise _no_frame(buffer[: len(MAGIC)])
    if len(buffer) < HEADER:
        return None
    with memoryview(buffer) as view:
        end = HEADER + read_header(view[:HEADER], most).length
        if len(buffer) < end:
            return None
        frame = bytes(view[:end])
    del buffer[:end]
    return frame


def whole(data: bytes, most: int = MAX_BODY) -> Header:
    """Read the header of a frame that ``data`` is, neither more nor less. Raises LinkError."""
    header = read_header(data, most)
    have = len(data) - HEADER
    if have != header.length:
        reason = Reason.SHORT if have < header.length else Reason.LENGTH
        raise LinkError(reason, f"a body of {have} bytes where the header says {header.length}")
    return header


def unseal(key: bytes, header: Header, data: bytes) -> bytes:
    """Give the body of a whole frame once its MAC is right. Raises LinkError."""
    body = data[HEADER:]
    if not hmac.compare_digest(header.mac, _mac(key, data[: HEADER - _MAC], body)):
        raise LinkError(Reason.MAC, "a frame that was changed on the way, or of another key")
    return body


def _no_frame(magic: bytes | bytearray) -> LinkError:
    return LinkError(Reason.MAGIC, f"it begins with {bytes(magic)!r}: no frame of a link")


def _bound(kind: Kind) -> int:
    return MAX_BODY if kind is Kind.DATA else MAX_TALK


def _mac(key: bytes, head: bytes, body: bytes) -> bytes:
    mac = hashlib.blake2b(head, digest_size=_MAC, key=key)
    mac.update(body)
    return mac.digest()
