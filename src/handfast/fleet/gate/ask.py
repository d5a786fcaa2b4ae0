"""A rank asks its node: by the socket of the node's service, or else by the file of its admission.

Who listens is known from the kernel (SO_PEERCRED), and must be root or the asker's own user. The
file counts only where there is no socket at all: a service that is silent, dead or somebody else's
leaves the node's facts unknown, since what an older file says may have ceased to be true.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from handfast.agent.frames import Untrusted, peer
from handfast.errors import Blocked, FormatError, HandfastError
from handfast.fleet.gate.node import PATH, read_node, trusted
from handfast.fleet.gate.wire import MOST, SOCKET, read_reply, request
from handfast.fleet.identity import Statement, verify
from handfast.fleet.inventory.facts import Inventory
from handfast.store.files import describe

__all__ = ["ASK_S", "ask", "ask_signed", "node_facts", "nothing"]

ASK_S: Final = 20.0  # a collector is ended after 15
PAUSE_S: Final = 0.01


def node_facts(named: str, at: datetime, timeout_s: float = ASK_S) -> Inventory | None:
    """What this node says: at its socket, else in its file; None where it has neither.

    ``named`` is a socket or a file; empty for the usual places. ``at`` is the time of day, by which
    a file may be too old. Raises what :func:`ask` and :func:`read_node` raise.
    """
    path = named or SOCKET
    if _there(path):
        return ask(path, timeout_s)
    return read_node(named or PATH, at)


def nothing(named: str) -> str:
    """Say where nothing was found, where :func:`node_facts` gives None, and what to do."""
    if named:
        return (
            f"neither a node service nor a file is at {named}, which HANDFAST_GATE_NODE names. "
            "What to do: start `handfast fleet node` there, or correct it"
        )
    return (
        f"no node service at {SOCKET} and no {PATH}. What to do: start `handfast fleet node` on "
        "the host, or have its prolog run `handfast fleet admit`; into containers mount "
        "/run/handfast"
    )


def ask(path: str, timeout_s: float = ASK_S) -> Inventory:
    """Ask for a node's host and fabric facts.

    Raises Untrusted where another user than root or this one listens, Blocked where no answer is
    whole within so many seconds, FormatError for what is no answer, HandfastError for a refusal and
    for a service that is gone.
    """
    told = read_reply(_exchange(path, request(), timeout_s), path)
    if isinstance(told, Statement):
        raise FormatError(f"{path}: it answers with a statement, though nobody put a challenge")
    return told


def ask_signed(path: str, challenge: bytes, timeout_s: float = ASK_S) -> Statement:
    """Ask for the same, signed by the node over a challenge of 1 to 64 bytes.

    It is verified, but whose key that is the caller must know. Raises what :func:`ask` raises, and
    Refused where it was not signed so.
    """
    told = read_reply(_exchange(path, request(challenge), timeout_s), path)
    if isinstance(told, Inventory):
        raise FormatError(f"{path}: it answers without a statement, though a challenge was put")
    verify(told, path, challenge)
    return told


def _there(path: str) -> bool:
    """Whether a path leads to a socket; what can't be looked at is an error, and not nothing."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise HandfastError(f"{path}: {describe(error)}. What to do: {_LOOK}") from error


def _exchange(path: str, line: bytes, timeout_s: float) -> bytes:
    end = time.monotonic() + timeout_s
    with _told(path, timeout_s), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _connect(sock, path, end)
        _, uid = peer(sock)
        if not trusted(uid):
            raise Untrusted(
                f"{path}: user {uid} listens there, and neither root nor this user, so it is not "
                "asked. What to do: start `handfast fleet node` as root on the host; in a user "
                "namespace that does not map root it can't be known, and is never trusted"
            )
        sock.settimeout(_left(end))
        sock.sendall(line)
        answer = bytearray()
        while not answer.endswith(b"\n"):
            sock.settimeout(_left(end))
            data = sock.recv(1 << 16)
            if not data:
                raise HandfastError(
                    f"{path}: it ended after {len(answer)} bytes of its answer. What to do: {_LOOK}"
                )
            text, end_of_line, _ = data.partition(b"\n")
            answer += text + end_of_line
            if len(answer) > MOST:
                raise FormatError(f"{path}: it answers with more than {MOST} bytes")
        return bytes(answer)


_LOOK: Final = "look on the host how `handfast fleet node` fares, and restart it"


def _connect(sock: socket.socket, path: str, end: float) -> None:
    """Connect; where many are waiting to be accepted the kernel has no room for another yet."""
    while True:
        sock.settimeout(_left(end))
        try:
            return sock.connect(path)
        except BlockingIOError:
            time.sleep(PAUSE_S)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextmanager
def _told(path: str, timeout_s: float) -> Iterator[None]:
    """Say of what the system says which service it is about."""
    try:
        yield
    except TimeoutError as error:
        raise Blocked(f"the node did not answer within {timeout_s:g} s", by=[path]) from error
    except OSError as error:
        why = describe(error) if error.errno else str(error)  # a path may be too long
        what = f"{path}: nobody answers: {why}"
        raise HandfastError(f"{what}. What to do: {_LOOK}") from error
