"""What a round needs of the job's engine: to gather small values from all ranks, at its start.

Saves never use it: no training step ever waits in a collective of handfast's.
"""

from __future__ import annotations

import os
from typing import Protocol

import msgspec

from handfast.agent.host import node_label

__all__ = ["Collective", "Place", "Solo", "place_of"]


class Place(msgspec.Struct, frozen=True):
    """Where a rank runs. ``node`` names its node; ``local_rank`` counts the ranks on it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: str


class Collective(Protocol):
    """All ranks of one round."""

    @property
    def place(self) -> Place:
        """This rank's place."""

    def gather(self, data: bytes) -> list[bytes]:
        """Give every rank the data of all ranks, in order of rank. Blocks until all have come."""


class Solo:
    """A job of one process."""

    def __init__(self) -> None:
        self.place = Place(0, 1, 0, 1, node_label())

    def gather(self, data: bytes) -> list[bytes]:
        """Return the only rank's data."""
        return [data]

    def close(self) -> None:
        """There is nothing to give up."""


def place_of(rank: int, size: int) -> Place:
    """Work out a rank's place from what torchrun and its like set, else one node for all."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    return Place(rank, size, local, int(os.environ.get("LOCAL_WORLD_SIZE", size)), node_label())
