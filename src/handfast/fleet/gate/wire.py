"""What passes over a node's socket: a line that asks, and a line that answers.

The asker sends, in ASCII, ``handfast.node/1``, where it wants a signed answer a space and its
challenge in lower-case hex digits, and a line feed. The answer is one JSON object with one member,
and a line feed; then the service closes. What either sends after its line feed is not read.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from handfast.errors import UNREADABLE, FormatError, HandfastError
from handfast.fleet.identity import Statement
from handfast.fleet.inventory.facts import Inventory, decode, encode

__all__ = [
    "CHALLENGE", "LINE", "MOST", "SOCKET", "read_reply", "read_request", "refusal", "reply",
    "request",
]  # fmt: skip

SOCKET: Final = "/run/handfast/node.sock"  # gone with the boot, as is what it tells
LINE: Final = 256  # bytes of a request, with its line feed
MOST: Final = 8 << 20  # bytes of a reply, with its line feed; an inventory has some twenty thousand
CHALLENGE: Final = 64  # bytes of a challenge

_FIRST: Final = "handfast.node/1"
_REQUEST: Final = re.compile(rb"handfast\.node/1(?: ((?:[0-9a-f]{2}){1,64}))?\n")
_SAME: Final = "What to do: run the same release of handfast on the node and in its ranks' image"


class _Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of these: an inventory as its file has it, a statement, or why there is neither."""

    inventory: msgspec.Raw = msgspec.Raw()
    statement: Statement | None = None
    error: Annotated[str, msgspec.Meta(max_length=4096)] = ""


def request(challenge: bytes = b"") -> bytes:
    """Ask for an inventory, or with a challenge for a signed one; ValueError for one too long."""
    if len(challenge) > CHALLENGE:
        raise ValueError(
            f"a challenge of {len(challenge)} bytes: give {CHALLENGE} at most, 32 of chance, say"
        )
    return " ".join(filter(None, (_FIRST, challenge.hex()))).encode() + b"\n"


def read_request(line: bytes) -> bytes:
    """Give the challenge of a request, empty where it has none. Raises FormatError."""
    found = _REQUEST.fullmatch(line)
    if found is None:
        raise FormatError(
            f"{line[:64]!r} is no request. What to do: send {_FIRST!r}, where the answer is to be "
            f"signed a blank and 2 to {2 * CHALLENGE} lower-case hex digits, and a line feed"
        )
    return bytes.fromhex((found[1] or b"").decode())


def reply(told: Inventory | Statement) -> bytes:
    """Answer. Raises FormatError where that would be longer than an asker reads."""
    if isinstance(told, Statement):
        line = _line("statement", told)
    else:
        line = _line("inventory", msgspec.Raw(encode(told)))
    if len(line) > MOST:
        raise FormatError(
            f"an answer of {len(line)} bytes; {MOST} are read. What to do: look with `handfast "
            "fleet inventory` which collector tells that much, and remove it"
        )
    return line


def refusal(why: str) -> bytes:
    """Answer with a reason; what is too long of it is cut."""
    return _line("error", why[:4096] or "no reason was given")


def _line(name: str, value: object) -> bytes:
    return msgspec.json.encode({name: value}) + b"\n"


def read_reply(line: bytes, where: str) -> Inventory | Statement:
    """Read an answer. Raises FormatError for none, HandfastError with the reason of a refusal."""
    try:
        found = msgspec.json.decode(line, type=_Reply)
    except UNREADABLE as error:
        raise FormatError(f"{where}: no answer of a node: {error}. {_SAME}") from error
    raw = bytes(found.inventory)
    if bool(raw) + (found.statement is not None) + bool(found.error) != 1:
        raise FormatError(f"{where}: no answer of a node: not one thing, but none or more. {_SAME}")
    if found.error:
        raise HandfastError(f"{where} answers: {found.error}")
    return found.statement or decode(raw, where)
