"""What passes between a trainer and the agent of its node, over a Unix socket.

A frame is a u32 length (big-endian) and a msgpack body. The trainer calls; the agent replies or
fails, each by the call's id, in any order; the agent also pushes states, each under a topic, of
which only the newest is worth having. Images travel as descriptors of memfds: they are sent with
the first byte of the frame that names their number, so that each frame finds its own.
"""

import fcntl
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from handfast import errors
from handfast.core.verdict import Verdict
from handfast.errors import UNREADABLE, FormatError, HandfastError

__all__ = [
    "MAX_FDS",
    "MAX_FRAME",
    "VERSIONS",
    "Call",
    "CallFailed",
    "Failure",
    "Incoming",
    "Message",
    "Push",
    "Reply",
    "Untrusted",
    "agree",
    "close_all",
    "encode",
    "failure",
    "image_size",
    "make_image",
    "passing",
    "peer",
    "revive",
]

VERSIONS = (1, 1)
"""The oldest and the newest version of this protocol that this handfast speaks."""

MAX_FRAME = 1 << 30
"""The most bytes of one frame; what is larger travels as a descriptor."""

MAX_FDS = 253
"""The most descriptors that the kernel passes at once (SCM_MAX_FD)."""

_BLOCK = 4096
_LENGTH = struct.Struct(">I")
_READ = 1 << 18
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array("i").itemsize)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def agree(mine: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """The highest version in both ranges (each: oldest, newest), or None if there is none."""
    newest = min(mine[1], theirs[1])
    return newest if newest >= max(mine[0], theirs[0]) else None


class CallFailed(HandfastError):
    """The agent could not do what was asked, for a reason that has no error type of its own."""


class Untrusted(HandfastError):
    """A socket, directory or file that another user made or could write to; nothing was used."""


class Call(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """What a trainer asks for; ``fds`` descriptors come with its first byte."""

    id: int
    name: str
    fds: int
    fields: dict[str, Any]


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """What the agent answers; ``fds`` descriptors come with its first byte."""

    id: int
    fds: int
    fields: dict[str, Any]


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Why the agent did not do it: an error's type in handfast.errors, text and attributes."""

    id: int
    kind: str
    message: str
    detail: dict[str, Any]


class Push(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A state that the agent tells unasked."""

    topic: str
    fields: dict[str, Any]


Message = Call | Reply | Failure | Push

# Made before any thread meets these types: msgspec 0.22 builds what it knows of one when it first
# does, and a second thread that meets it meanwhile ends the process by SIGSEGV.
_MESSAGE: Final = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ValueError if too large, TypeError for what has no msgpack."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME:
        raise ValueError(
            f"a frame of {len(body)} bytes; the bound is {MAX_FRAME}, and what is larger is passed "
            "as a descriptor"
        )
    return _LENGTH.pack(len(body)) + body


def passing(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that passes copies of ``fds``. Raises ValueError if they are too many."""
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} descriptors; one frame passes at most {MAX_FDS}")
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds).tobytes())] if fds else []


class Incoming:
    """The bytes and descriptors that arrive on one socket, made into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._batches: deque[list[int]] = deque()

    def receive(self, sock: socket.socket) -> Iterator[tuple[Message, list[int]]] | None:
        """Read once: the messages that are whole now, with their descriptors; None at the end.

        Fewer descriptors than a message names mean that we had no room for them (ulimit -n). The
        taker owns them. Raises OSError as recvmsg does, and FormatError, while iterated, for what
        is no message.
        """
        data, ancillary, flags, _ = sock.recvmsg(_READ, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        fds = array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if fds or flags & socket.MSG_CTRUNC:  # one sendmsg's descriptors, or what is left of them
            self._batches.append(list(fds))
        if not data:
            return None
        self._buffer += data
        return self._messages()

    def close(self) -> None:
        """Close the descriptors that nobody has taken."""
        while self._batches:
            close_all(self._batches.popleft())

    def _messages(self) -> Iterator[tuple[Message, list[int]]]:
        while (body := self._frame()) is not None:
            try:
                message = _MESSAGE.decode(body)
            except UNREADABLE as error:
                raise FormatError(f"a frame that can't be read: {error}") from None
            named = message.fds if isinstance(message, Call | Reply) else 0
            yield message, self._batches.popleft() if named and self._batches else []
        if len(self._batches) > bool(self._buffer):
            raise FormatError("descriptors that no frame names")

    def _frame(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME:
            raise FormatError(f"a frame of {length} bytes; the bound is {MAX_FRAME}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            body = bytes(view[_LENGTH.size : end])
        del self._buffer[:end]
        return body


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def failure(call: Call, error: Exception) -> Failure:
    """What an error says to the trainer: our own errors in full, others by name and text."""
    if not isinstance(error, HandfastError):
        return Failure(call.id, "", f"the agent failed at {call.name!r}: {error!r}", {})
    detail = {name: value for name, value in vars(error).items() if not name.startswith("_")}
    try:
        msgspec.msgpack.encode(detail)
    except (TypeError, OverflowError):  # the text must arrive, whatever hangs on the error
        detail = {}
    return Failure(call.id, type(error).__name__, str(error), detail)


def revive(answer: Failure) -> HandfastError:
    """The error as the agent raised it, with its attributes; else a CallFailed.

    An agent of another release may know errors, attributes and verdicts that this one does not.
    """
    kind = vars(errors).get(answer.kind)
    if not (isinstance(kind, type) and issubclass(kind, HandfastError)):
        return CallFailed(answer.message)
    error = kind.__new__(kind)
    Exception.__init__(error, answer.message)
    detail = {name: tuple(v) if isinstance(v, list) else v for name, v in answer.detail.items()}
    try:
        if (verdict := answer.detail.get("verdict")) is not None:
            detail["verdict"] = Verdict(verdict)
    except ValueError:
        return CallFailed(answer.message)
    vars(error).update(detail)
    return error


def peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel knows them: (pid, uid)."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def make_image(nbytes: int) -> int:
    """A new memfd for an image of ``nbytes``: whole 4 KiB blocks, their pages allocated now.

    It is sealed against resizing, so that the other end may map it without fear of SIGBUS. Returns
    its descriptor. Raises OSError where there is no memory for it.
    """
    fd = os.memfd_create("handfast", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, max(1, -(-nbytes // _BLOCK)) * _BLOCK)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def image_size(fd: int) -> int:
    """The size in bytes of an image received as ``fd``. Raises FormatError if it can be resized."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memfd at all
        seals = 0
    if seals & _SEALS != _SEALS:
        raise FormatError(
            f"descriptor {fd} is no memfd that is sealed against resizing: make it by make_image()"
        )
    return os.fstat(fd).st_size
