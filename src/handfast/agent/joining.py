"""What a trainer and its agent tell each other when a round begins: who is where, and of what."""

from __future__ import annotations

import contextlib
import os
import socket

import msgspec

from handfast.core.membership import Change, Configuration
from handfast.core.retain import Keep

__all__ = ["Opened", "Round", "node_label", "place_of_agents"]


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
    with contextlib.suppress(OSError, TypeError), open("/proc/sys/kernel/random/boot_id") as file:
        met = os.stat(os.path.dirname(listener.getsockname()))
        return f"{file.read().strip()} {met.st_dev} {met.st_ino}"
    return ""


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
