"""The bytes between two agents, without any I/O: bytes in, frames out.

A connection opens with a handshake of two frames from each side::

    HELLO   the wire versions it speaks, a fresh nonce, its id, its run
    PROOF   HMAC of the run's secret over its role and both HELLOs, byte for byte

then come MESSAGE and BEAT frames under a key that only these two HELLOs and the secret give. So a
peer without the secret, of another run, a recorded handshake, a reflected one and a version range
that was narrowed on the way all fail at the PROOF or before, and a frame that was changed, dropped,
repeated or reordered fails at its MAC or its sequence number.

Each frame, big-endian::

    u32 length of the body   u16 wire version   u8 kind   u64 sequence   body

Version and sequence of a handshake frame are 0, and its form never changes. Later frames carry the
version agreed on and count from 0; their body ends with a keyed blake2b of 16 bytes over direction,
header and payload.

What is sent is authenticated, not encrypted.
"""

import hashlib
import hmac
import secrets
import struct
from collections.abc import Container
from enum import IntEnum, StrEnum

import msgspec

from handfast.errors import UNREADABLE, HandfastError

__all__ = ["HANDSHAKE_LIMIT", "MAX_PAYLOAD", "VERSIONS", "Reason", "Wire", "WireError", "agree"]

VERSIONS = (1, 1)
"""The oldest and the newest wire version that this handfast speaks."""

MAX_PAYLOAD = 16 << 20
"""The most bytes that one message may have."""

HANDSHAKE_LIMIT = 4096
"""The most bytes of one frame from a peer that has proved nothing yet."""

_HEADER = struct.Struct(">IHBQ")
_MAC = 16
_NONCE = 32
_SECRET = 16


class Reason(StrEnum):
    """Why bytes were refused: a closed set, so that each can be counted."""

    # no proof of this run's secret, or a HELLO that was changed on the way
    WRONG_SECRET = "wrong_secret"  # noqa: S105 - a name
    WRONG_RUN = "wrong_run"  # an agent of another run
    WRONG_PEER = "wrong_peer"  # an id that is not expected on this connection
    TOO_LARGE = "too_large"  # a length above the bound
    REPLAYED = "replayed"  # a frame out of its turn: repeated, reordered, or one before it lost
    BAD_MAC = "bad_mac"  # a frame changed on the way, or of another connection
    VERSION = "version"  # no wire version in common, or not the one agreed on
    MALFORMED = "malformed"  # no frame of this protocol, or one that has no place here


class WireError(HandfastError):
    """Bytes that were refused. The connection they came on is of no more use.

    ``reason`` says why, for counting; the text says it for people.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {message}")


class _Kind(IntEnum):
    HELLO = 1
    PROOF = 2
    MESSAGE = 3
    BEAT = 4


class _Hello(msgspec.Struct, frozen=True):
    """What each side says of itself; a map on the wire, so that later versions may add to it."""

    versions: tuple[int, int]
    nonce: bytes
    agent: str
    run: str


def agree(mine: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """The highest version in both ranges (each: oldest, newest), or None if there is none."""
    newest = min(mine[1], theirs[1])
    return newest if newest >= max(mine[0], theirs[0]) else None


class Wire:
    """One end of a connection: feed it what arrives, send what it returns.

    ``expect`` holds the ids that may be at the other end. ``dialer`` tells the two ends apart, so
    that nothing one end said can be played back to it. After a :class:`WireError` the object only
    repeats that error.
    """

    def __init__(
        self,
        *,
        secret: bytes,
        run: str,
        me: str,
        expect: Container[str],
        dialer: bool,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        if len(secret) < _SECRET:
            raise ValueError(f"a run's secret has at least {_SECRET} bytes, this one {len(secret)}")
        self._secret = secret
        self._run = run
        self._expect = expect
        self._dialer = dialer
        self._versions = versions
        self._hello = msgspec.msgpack.encode(
            _Hello(versions=versions, nonce=secrets.token_bytes(_NONCE), agent=me, run=run)
        )
        self._buffer = bytearray()
        self._outgoing = bytearray(self._greeting(_Kind.HELLO, self._hello))
        self._transcript = b""
        self._key = b""
        self._sent = 0
        self._due = 0
        self._error: WireError | None = None
        self.peer = ""
        """The id at the other end: claimed after its HELLO, proved once :attr:`open`."""
        self.version = 0
        """The wire version agreed on; 0 before the other end's HELLO."""
        self.open = False
        """True once the other end has proved that it holds the secret."""

    def feed(self, data: bytes) -> None:
        """Take bytes as they arrive, cut anywhere; after an error they are thrown away."""
        if self._error is None:
            self._buffer += data

    def outgoing(self) -> bytes:
        """The handshake bytes that are to be sent now; each is returned once."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def shake(self) -> bool:
        """Go on with the handshake: True once it is done, False if more bytes are needed.

        Send :meth:`outgoing` after each call. Raises WireError.
        """
        self._check()
        while not self.open:
            frame = self._frame()
            if frame is None:
                return False
            kind, body = frame
            if kind == _Kind.HELLO and not self._transcript:
                self._meet(body)
            elif kind == _Kind.PROOF and self._transcript:
                self._believe(body)
            else:
                raise self._refuse(Reason.MALFORMED, "a handshake frame out of its turn")
        return True

    def take(self) -> bytes | None:
        """The next message's payload, or None if more bytes are needed. Raises WireError."""
        self._check()
        self._must_be_open()
        while (frame := self._frame()) is not None:
            kind, body = frame
            if kind == _Kind.MESSAGE:
                return body
        return None

    def message(self, payload: bytes) -> bytes:
        """The bytes of the next message frame; they must be sent in the order of the calls."""
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"a message has at most {MAX_PAYLOAD} bytes, this one {len(payload)}")
        return self._seal(_Kind.MESSAGE, payload)

    def beat(self) -> bytes:
        """The bytes of a frame that says nothing but "I am here"."""
        return self._seal(_Kind.BEAT, b"")

    # -- the handshake ---------------------------------------------------------------------

    def _greeting(self, kind: _Kind, body: bytes) -> bytes:
        if len(body) > HANDSHAKE_LIMIT:
            raise ValueError(f"the ids of run and agent are too long: {len(body)} bytes of HELLO")
        return _HEADER.pack(len(body), 0, kind, 0) + body

    def _meet(self, body: bytes) -> None:
        try:
            hello = msgspec.msgpack.decode(body, type=_Hello)
        except UNREADABLE as error:
            raise self._refuse(Reason.MALFORMED, f"a HELLO that can't be read: {error}") from None
        low, high = hello.versions
        if len(hello.nonce) != _NONCE or not 0 < low <= high <= 0xFFFF:
            raise self._refuse(Reason.MALFORMED, "a HELLO without a sound nonce or version range")
        if hello.run != self._run:
            raise self._refuse(
                Reason.WRONG_RUN, f"an agent of run {hello.run[:80]!r}; this one is of {self._run}"
            )
        if hello.agent not in self._expect:
            raise self._refuse(
                Reason.WRONG_PEER, f"agent {hello.agent[:80]!r} is not expected on this connection"
            )
        version = agree(self._versions, (low, high))
        if version is None:
            ours = "{}..{}".format(*self._versions)
            raise self._refuse(
                Reason.VERSION,
                f"agent {hello.agent} speaks wire versions {low}..{high}, this one {ours}; "
                "install the same handfast on both nodes",
            )
        first, second = (self._hello, body) if self._dialer else (body, self._hello)
        self._transcript = hashlib.sha256(len(first).to_bytes(4) + first + second).digest()
        self._key = self._derive(b"key")
        self.peer, self.version = hello.agent, version
        self._outgoing += self._greeting(_Kind.PROOF, self._derive(b"proof" + self._role(True)))

    def _believe(self, proof: bytes) -> None:
        if not hmac.compare_digest(proof, self._derive(b"proof" + self._role(False))):
            raise self._refuse(
                Reason.WRONG_SECRET,
                f"agent {self.peer} did not prove that it holds the secret of run {self._run}",
            )
        self.open = True

    def _derive(self, label: bytes) -> bytes:
        return hmac.digest(self._secret, b"handfast wire " + label + self._transcript, "sha256")

    def _role(self, mine: bool) -> bytes:
        """The direction of what I send (``mine``) or receive: D from the dialer, L to it."""
        return b"D" if self._dialer == mine else b"L"

    # -- frames ----------------------------------------------------------------------------

    def _frame(self) -> tuple[int, bytes] | None:
        """Cut the next whole frame off the buffer, checked: (kind, payload).

        The buffer only ever grows by bytes that have arrived, never by a length they claim.
        """
        if len(self._buffer) < _HEADER.size:
            return None
        length, version, kind, sequence = _HEADER.unpack_from(self._buffer)
        greeting = (version, sequence) == (0, 0) and kind in (_Kind.HELLO, _Kind.PROOF)
        if not self.open and not greeting:
            raise self._refuse(Reason.MALFORMED, "these bytes are no handshake of an agent")
        limit = MAX_PAYLOAD + _MAC if self.open else HANDSHAKE_LIMIT
        if length > limit:
            raise self._refuse(Reason.TOO_LARGE, f"a frame of {length} bytes; the bound is {limit}")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        header, body = bytes(self._buffer[: _HEADER.size]), bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        return kind, self._unseal(header, body, version, kind, sequence) if self.open else body

    def _seal(self, kind: _Kind, payload: bytes) -> bytes:
        self._must_be_open()
        header = _HEADER.pack(len(payload) + _MAC, self.version, kind, self._sent)
        self._sent += 1
        return header + payload + self._mac(self._role(True), header, payload)

    def _unseal(self, header: bytes, body: bytes, version: int, kind: int, sequence: int) -> bytes:
        payload, mac = body[:-_MAC], body[-_MAC:]
        if not hmac.compare_digest(mac, self._mac(self._role(False), header, payload)):
            raise self._refuse(Reason.BAD_MAC, f"a frame from {self.peer} that it did not send")
        if version != self.version:
            raise self._refuse(
                Reason.VERSION, f"a frame of version {version}; {self.version} was agreed on"
            )
        if sequence != self._due:
            raise self._refuse(
                Reason.REPLAYED, f"frame {sequence} from {self.peer} where {self._due} was due"
            )
        if kind not in (_Kind.MESSAGE, _Kind.BEAT):
            raise self._refuse(Reason.MALFORMED, f"a frame of kind {kind} from {self.peer}")
        self._due += 1
        return payload

    def _mac(self, direction: bytes, header: bytes, payload: bytes) -> bytes:
        mac = hashlib.blake2b(direction + header, digest_size=_MAC, key=self._key)
        mac.update(payload)
        return mac.digest()

    def _refuse(self, reason: Reason, message: str) -> WireError:
        self._error = WireError(reason, message)
        self._buffer.clear()
        return self._error

    def _check(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _must_be_open(self) -> None:
        if not self.open:
            raise RuntimeError("the handshake is not done: call shake() until it returns True")
