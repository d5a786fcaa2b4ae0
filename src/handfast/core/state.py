"""A member's state: one frozen value, equal where its meaning is equal."""

from __future__ import annotations

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

__all__ = ["Member", "Peer"]


class Peer(msgspec.Struct, frozen=True):
    """What is known of one peer: volatile, and rebuilt by greeting it.

    ``owed``: it has sent facts, and has not been shown yet that they are held.
    """

    incarnation: int = 0
    knows: Knows = Knows()
    owed: bool = False


class Member(msgspec.Struct, frozen=True):
    """One domain's voice in the protocol.

    ``doubted`` are retained copies that were found BAD when they were last read.
    ``generation`` is the highest frozen one (0: none yet); ``recovery`` is open between its
    freeze and its restore certificate. ``restored`` is the highest restore certificate held.
    ``last`` is the highest epoch captured or voted. ``told`` is what the trainer was last told of
    the recovery, so that it is told once. ``keep`` and ``pinned`` are None until a round and the
    readers' pins were heard of in this incarnation: nothing is released before.
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
    doubted: tuple[Epoch, ...] = ()
    void: tuple[Epoch, ...] = ()
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
    peers: tuple[Peer, ...] = ()

    @property
    def open(self) -> bool:
        """Say whether this generation holds its restore certificate, and so may vote."""
        held = self.restored
        return held is not None and (held.generation, held.round) == (self.generation, self.round)

    def own(self, fact: Frozen | Valid | Bad | Accepted | Declined) -> bool:
        """Say whether a fact is this member's own word."""
        if isinstance(fact, Accepted | Declined):
            return self.roster is not None and self.roster.homes[fact.shard] == self.me
        return fact.domain == self.me
