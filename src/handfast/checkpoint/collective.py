"""What a round needs of the job's engine: to gather small values from all ranks, at its start.

Saves never use it: no training step ever waits in a collective of handfast's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Collection, Iterator
from typing import Final, Protocol

import msgspec

from handfast.agent.joining import node_label
from handfast.agent.reminder import REMIND_S, Reminder
from handfast.errors import HandfastError

__all__ = ["Collective", "Place", "Solo", "address_among", "place_of", "reminding"]

logger = logging.getLogger("handfast")

LOOPBACK: Final = "127.0.0.1"


class Place(msgspec.Struct, frozen=True):
    """Where a rank runs. ``node`` names its node; ``local_rank`` counts the ranks on it."""

    rank: int
    size: int
    local_rank: int
    node: str


class Collective(Protocol):
    """All ranks of one round."""

    @property
    def place(self) -> Place:
        """This rank's place."""

    def gather(self, what: str, data: bytes) -> list[bytes]:
        """Give every rank the data of all ranks, in order of rank. Blocks until all have come.

        ``what`` names the gathering: ranks that are at different ones never meet.
        """


class Solo:
    """A job of one process."""

    def __init__(self) -> None:
        self.place = Place(0, 1, 0, node_label())

    def gather(self, what: str, data: bytes) -> list[bytes]:  # noqa: ARG002 - one has one word
        """Return the only rank's data."""
        return [data]


@contextlib.contextmanager
def reminding(what: str) -> Iterator[None]:
    """Say every ten seconds that the body still waits, where it can't say so itself."""
    done = threading.Event()
    reminder = Reminder()

    def remind() -> None:
        while not done.wait(REMIND_S):
            logger.warning("%s, for %.0f s now", what, reminder.waited)

    thread = threading.Thread(target=remind, name="handfast-remind", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def place_of(rank: int, size: int) -> Place:
    """Work out a rank's place; LOCAL_RANK is what torchrun and its like set."""
    return Place(rank, size, int(os.environ.get("LOCAL_RANK", rank)), node_label())


def address_among(nodes: Collection[str]) -> str:
    """Choose the address on which this node's agent listens for those of a job's other nodes.

    HANDFAST_BIND says it; else it is loopback for a job of one node, and for others the address
    from which this node reaches the job's first one (MASTER_ADDR), or that of its own name.
    Raises HandfastError where the others could not reach any of these.
    """
    given = os.environ.get("HANDFAST_BIND")
    if given:
        return given
    if len(set(nodes)) < 2:
        return LOOPBACK
    for find in (_towards_master, _of_own_name):
        found = find()
        if found and not ipaddress.ip_address(found).is_loopback:
            return found
    raise HandfastError(
        f"{node_label()} has no address at which the agents of the other nodes could reach its "
        "own. What to do: set HANDFAST_BIND on each node to its address in the job's network"
    )


def _towards_master() -> str:
    """Ask the kernel for the route; a datagram socket that is connected sends nothing."""
    master = os.environ.get("MASTER_ADDR", "")
    if not master:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def _of_own_name() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
