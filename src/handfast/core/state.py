"""A member's state: one frozen value, equal where its meaning is equal."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

import msgspec

from handfast.core.converge import Tally
from handfast.core.lattice import Epoch
from handfast.core.membership import Roster
from handfast.core.messages import (
    Accepted,
    Bad,
    Copy,
    Declined,
    Frozen,
    Knows,
    Lost,
    RestoreCertificate,
    Valid,
)
from handfast.core.recover import Phase, Recovery
from handfast.core.retain import Keep

__all__ = ["Member", "Peer", "Peers"]


class Peer(msgspec.Struct, frozen=True, gc=False):
    """What is known of one peer: volatile, and rebuilt by greeting it.

    ``owed``: it has sent facts, and has not been shown yet that they are held.
    """

    incarnation: int = 0
    knows: Knows = Knows()
    owed: bool = False


NOBODY: Final = Peer()


class Peers(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of the peers, by their places; only of those that were heard of.

    A member of a large job hears of few, and a job of n members is not to need n^2 places.
    """

    heard: tuple[tuple[int, Peer], ...] = ()

    def __getitem__(self, at: int) -> Peer:
        """Give what is known of a peer: nothing yet, where it was not heard of."""
        heard = self.heard
        i = bisect_left(heard, (at,))  # which is less than (at, ...)
        return heard[i][1] if i < len(heard) and heard[i][0] == at else NOBODY

    def put(self, at: int, peer: Peer) -> Peers:
        """Put one peer in its place."""
        heard = self.heard
        i = bisect_left(heard, (at,))
        there = i < len(heard) and heard[i][0] == at
        return Peers((*heard[:i], (at, peer), *heard[i + there :]))


class Member(msgspec.Struct, frozen=True, gc=False):
    """One domain's voice in the protocol.

    ``retained`` are the copies held, by their epochs. ``converged`` are, in order, the epochs that
    were once the line of this domain's own tier, from the oldest retained one on; ``doubted`` are
    retained copies that were found BAD when they were last read.
    ``generation`` is the highest frozen one (0: none yet); ``recovery`` is open between its
    freeze and its restore certificate. ``restored`` is the highest restore certificate held.
    ``last`` is the highest epoch captured or voted. ``told`` is what the trainer was last told of
    the recovery, so that it is told once. ``keep`` and ``pinned`` are None until a round and the
    readers' pins were heard of in this incarnation: nothing is released before. ``turned`` is the
    neighbour beside the tree that was last told of open votes by a tick.
    """

    id: str
    incarnation: int
    roster: Roster | None = None
    me: int = -1
    founding: bool = False
    generation: int = 0
    round: str = ""
    retained: tuple[Copy, ...] = ()
    lost: tuple[Lost, ...] = ()
    converged: tuple[Epoch, ...] = ()
    doubted: tuple[Epoch, ...] = ()
    restored: RestoreCertificate | None = None
    tallies: tuple[Tally, ...] = ()
    recovery: Recovery | None = None
    checking: Epoch | None = None
    told: tuple[Phase, Epoch | None] | None = None
    persisting: tuple[Epoch, ...] = ()
    last: Epoch | None = None
    pinned: tuple[Epoch, ...] | None = None
    keep: Keep | None = None
    window: int = 2
    peers: Peers = Peers()
    turned: int = -1

    @property
    def open(self) -> bool:
        """Say whether this generation holds its restore certificate, and so may vote."""
        held = self.restored
        if held is None:
            return False
        return held.generation == self.generation and held.round == self.round

    def own(self, fact: Frozen | Valid | Bad | Accepted | Declined) -> bool:
        """Say whether a fact is this member's own word."""
        if isinstance(fact, Accepted | Declined):
            return self.roster is not None and self.roster.homes[fact.shard] == self.me
        return fact.domain == self.me
