"""What an agent tells a trainer of its domain: one value, whole, the newest wins.

The trainer never asks "what happened?", it looks at what is so. A lost, repeated or overtaken
snapshot does no harm, and a trainer that finds its agent again needs no history.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from handfast.agent.hearsay import Apart, Divergence
from handfast.core.lattice import Epoch
from handfast.core.messages import Certificate, RestoreCertificate
from handfast.core.state import Member
from handfast.core.view import Lattice

__all__ = [
    "FORGONE",
    "INVALID",
    "UNLIKE",
    "Outcome",
    "Proposal",
    "Skip",
    "Snapshot",
    "Stuck",
    "decode",
    "encode",
    "skips",
]

FORGONE: Final = "left out"
"""How the reason of a SKIP begins whose rank could have saved, and did not."""

UNLIKE: Final = "taken to be alike on all ranks, and not"
"""How the reason of a SKIP begins that heals by itself: from then on each rank stores its own."""

INVALID: Final = "a validator refused it"
"""How the reason of a SKIP begins whose bytes were fine, and whose values were not."""


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What became of a save here: ``problem`` is empty where it was persisted and attested."""

    epoch: Epoch
    problem: str = ""
    bytes_written: int = 0
    bytes_total: int = 0
    seconds: float = 0.0


class Skip(msgspec.Struct, frozen=True, array_like=True):
    """A domain's vote SKIP, so that this epoch will not converge."""

    epoch: Epoch
    domain: str
    reason: str


def skips(member: Member) -> Iterator[Skip]:
    """The votes SKIP that a member knows of, in its own tier."""
    if member.roster is not None:
        for ballot in member.tallies[member.roster.tier_of[member.me]].ballots:
            for vote in ballot.skips:
                yield Skip(ballot.epoch, member.roster.ids[vote.domain], vote.reason)


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """Every shard of this epoch has a valid copy; ``copies[s]`` is the domain that has shard s.

    Where several have, it is the first in the configuration's order, which is the rank's own.
    ``left_behind`` says what had converged above it and can't be resumed.
    """

    epoch: Epoch
    copies: tuple[int, ...]
    left_behind: tuple[str, ...] = ()


class Stuck(msgspec.Struct, frozen=True, array_like=True):
    """This generation will restore nothing, and why."""

    phase: str
    epoch: Epoch | None
    reasons: tuple[str, ...]


class Snapshot(msgspec.Struct, frozen=True):
    """The state of one domain as its agent knows it.

    ``failure`` is not empty once the domain can't go on under this agent (its journal failed, or
    a successor claimed it). ``checking`` is the epoch whose copy the trainer is to judge, where it
    has said that it does. ``overtaken`` is the highest generation heard of, if higher than ours.
    ``unlike`` are paths that this rank left to its node's first, which holds something else there.
    ``divergent`` are epochs whose ranks differ in what they hold alike by design, ``apart`` is the
    last one whose ranks do not have one history.
    """

    domain: str
    incarnation: int
    generation: int = 0
    round: str = ""
    lattice: Lattice = Lattice({})
    checking: Epoch | None = None
    proposal: Proposal | None = None
    stuck: Stuck | None = None
    resumed: RestoreCertificate | None = None
    line: Certificate | None = None
    retained: tuple[Epoch, ...] = ()
    persisting: tuple[Epoch, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    skipped: tuple[Skip, ...] = ()
    unlike: tuple[str, ...] = ()
    overtaken: int = 0
    failure: str = ""
    divergent: tuple[Divergence, ...] = ()
    apart: Apart | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Snapshot)


def encode(snapshot: Snapshot) -> bytes:
    """Encode a snapshot for the local socket."""
    return _encoder.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Decode a snapshot; raises ``msgspec.MsgspecError`` for anything that is none."""
    return _decoder.decode(data)
