"""What a trainer and its agent tell each other when a round begins: who is where, and of what."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import time

import msgspec

from handfast.core.membership import Change, Configuration
from handfast.core.retain import Keep
from handfast.errors import HandfastError
from handfast.link.life import Node, boot_id
from handfast.link.records import Records

__all__ = ["Opened", "Round", "life_of", "node_label", "place_of_agents", "records_of"]

logger = logging.getLogger(__name__)


def node_label() -> str:
    """Name this node: ``HANDFAST_NODE``, else the host's name; bytes of no text as ``\\udcff``."""
    name = os.environ.get("HANDFAST_NODE") or socket.gethostname()
    return name.encode(errors="backslashreplace").decode()


class Opened(msgspec.Struct, frozen=True):
    """What a trainer learns when it opens its domain: who it is, and where its agent is found.

    ``place`` tells agents of one name apart; empty where nothing is known of it. ``shelf`` is the
    root and the name of its directory.
    """

    domain: str
    incarnation: int
    generation: int
    known: Configuration | None
    agent: str
    address: tuple[str, int]
    place: str = ""
    shelf: tuple[str, str] = ("", "")


def place_of_agents(listener: socket.socket) -> str:
    """Name the machine, and the directory on it, where trainers meet this agent and its successors.

    Agents that follow each other on one node have one such place; two nodes never do.
    """
    with contextlib.suppress(OSError, TypeError):
        met = os.stat(os.path.dirname(listener.getsockname()))
        if boot := _boot():
            return f"{boot} {met.st_dev} {met.st_ino}"
    return ""


def life_of(label: str) -> Node:
    """Begin a life of the agent of a node.

    Agents of a machine follow each other, since each holds the lock of its place for life; and the
    time since a boot only rises, so each life has a higher number than those before it.
    """
    return Node(label, _boot(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def _boot() -> str:
    """Give the boot's id; "" where it can't be read, which then tells nothing apart."""
    try:
        return boot_id()
    except HandfastError:
        return ""


def records_of(path: str, nonce: str) -> Records:
    """Open what the links of a round must not forget, for the agent that listens at ``path``.

    Those of earlier rounds are over, and go. They outlive the agent, and end with the machine, as
    do all its lives.
    """
    place, agent = os.path.split(path)
    name = f"{agent}.links-{hashlib.sha256(nonce.encode()).hexdigest()[:16]}"
    with contextlib.suppress(OSError):
        for old in os.listdir(place):
            if old.startswith(f"{agent}.links-") and not old.startswith(name):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(place, old))
    path = os.path.join(place, name)
    try:
        return Records(path)
    except HandfastError as error:  # it is of this round alone: to begin anew costs no safety
        logger.warning("%s", error)
        os.unlink(path)
        return Records(path)


class Round(msgspec.Struct, frozen=True):
    """All that an agent must know to begin a generation.

    ``homes`` maps each domain to its agent, ``agents`` each agent to its address, ``shelves`` each
    domain of this node to the root and the name of its directory. ``by_trainer``: copies are judged
    by who loads them.
    """

    generation: int
    nonce: str
    configuration: Configuration
    founding: bool
    homes: dict[str, str]
    agents: dict[str, tuple[str, int]]
    shelves: dict[str, tuple[str, str]] = {}
    changes: tuple[Change, ...] = ()
    want: int | None = None
    keep: Keep = Keep()
    window: int = 2
    drain_s: float = 30.0
    by_trainer: bool = False
