"""n parties: the convergence of one tier, from votes to a certificate.

The outcome of an epoch is a function of write-once votes, a conjunction over a join-semilattice:
so there is no decision to take, no order that matters, and nothing to abort. With hindsight it is
two-phase commit with its log at every member and no right to abort (the design, section 2).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.core.membership import Roster, bits
from handfast.core.messages import Certificate, Skipped, Staged, merkle_root

__all__ = [
    "STRANDED",
    "Ballot",
    "Conflict",
    "Tally",
    "awaited",
    "certify",
    "join",
    "learn",
    "settle",
    "waiting",
]


STRANDED: Final = 4
"""So many windows of epochs may be saved that others have passed by, before saves are refused."""


class Conflict(Exception):
    """One domain voted twice, differently, on one epoch: a broken member, or a forged vote."""


class Ballot(msgspec.Struct, frozen=True, array_like=True):
    """The votes held on one epoch, as masks of domains.

    ``said[i]`` is the digest that domain i staged, or its reason to skip, or empty.
    """

    epoch: Epoch
    staged: int
    skipped: int
    said: tuple[str, ...]


class Tally(msgspec.Struct, frozen=True, array_like=True):
    """What is known of one tier: the highest converged epoch, and the ballots above it."""

    line: Certificate | None = None
    ballots: tuple[Ballot, ...] = ()


def _place(tally: Tally, epoch: Epoch) -> tuple[int, Ballot | None]:
    at = bisect_left(tally.ballots, epoch, key=lambda ballot: ballot.epoch)
    if at < len(tally.ballots) and tally.ballots[at].epoch == epoch:
        return at, tally.ballots[at]
    return at, None


def ballot_of(tally: Tally, epoch: Epoch) -> Ballot | None:
    """Find the ballot on an epoch, if any vote on it is held."""
    return _place(tally, epoch)[1]


def join(roster: Roster, tally: Tally, vote: Staged | Skipped) -> Tally:
    """Join one vote; the same tally, by identity, where it says nothing new.

    Raises :class:`Conflict` where the domain's vote on this epoch is held already and differs.
    """
    if tally.line is not None and vote.epoch <= tally.line.epoch:
        return tally
    at, held = _place(tally, vote.epoch)
    ballot = held or Ballot(vote.epoch, 0, 0, ("",) * roster.size)
    bit = 1 << vote.domain
    staged = isinstance(vote, Staged)
    said = vote.digest if isinstance(vote, Staged) else vote.reason
    if (ballot.staged | ballot.skipped) & bit:
        if staged != bool(ballot.staged & bit) or said != ballot.said[vote.domain]:
            raise Conflict(f"{roster.ids[vote.domain]} voted twice on {vote.epoch}")
        return tally
    words = (*ballot.said[: vote.domain], said, *ballot.said[vote.domain + 1 :])
    if staged:
        ballot = Ballot(ballot.epoch, ballot.staged | bit, ballot.skipped, words)
    else:
        ballot = Ballot(ballot.epoch, ballot.staged, ballot.skipped | bit, words)
    rest = tally.ballots[at + (held is not None) :]
    return Tally(tally.line, (*tally.ballots[:at], ballot, *rest))


def waiting(roster: Roster, tier: int, ballot: Ballot) -> int:
    """Mask the domains whose vote is still awaited; 0 where every shard has its k_T copies."""
    need = roster.needs[tier]
    missing = 0
    for mask in roster.holders[tier]:
        if (ballot.staged & mask).bit_count() < need:
            missing |= mask & ~ballot.staged & ~ballot.skipped
    return missing


def awaited(roster: Roster, tier: int, tally: Tally, ballot: Ballot) -> int:
    """Mask the domains that may yet make a ballot complete; 0 where nobody will.

    Steps only rise within a generation, and images are persisted in their order: so whoever has
    staged a later epoch will not vote on this one any more. (Whoever has only skipped a later one
    may still be persisting this one.) Failed saves that are tried again at another step on each
    rank end like that.
    """
    if ballot.skipped:
        return 0
    late = waiting(roster, tier, ballot)
    beyond = 0
    for later in tally.ballots:
        if later.epoch > ballot.epoch:
            beyond |= later.staged
    return 0 if late & beyond else late


def complete(roster: Roster, tier: int, ballot: Ballot) -> bool:
    """Say whether Conv_T holds: every shard is staged by at least k_T of its domains."""
    need = roster.needs[tier]
    return all((ballot.staged & mask).bit_count() >= need for mask in roster.holders[tier])


def void(roster: Roster, ballot: Ballot) -> bool:
    """Say whether the epoch can never be available: all domains of some shard skipped it.

    Votes are write-once, so this is as stable as convergence.
    """
    return any(
        not any(holders[shard] & ~ballot.skipped for holders in roster.holders)
        for shard in range(roster.configuration.shards)
    )


def certify(roster: Roster, tier: int, ballot: Ballot) -> Certificate:
    """Write the certificate of a complete ballot."""
    members = bits(sum(roster.holders[tier]))
    leaves = [f"{roster.ids[i]}={ballot.said[i]}" for i in members]
    return Certificate(
        roster.configuration.run, roster.digest, roster.tiers[tier], ballot.epoch,
        merkle_root(leaves),
    )  # fmt: skip


def learn(tally: Tally, certificate: Certificate) -> Tally:
    """Raise the line to a certificate, and drop the ballots that it supersedes."""
    if tally.line is not None and certificate.epoch <= tally.line.epoch:
        return tally
    kept = tuple(ballot for ballot in tally.ballots if ballot.epoch > certificate.epoch)
    return Tally(certificate, kept)


def settle(roster: Roster, tier: int, tally: Tally) -> Tally:
    """Certify the greatest complete ballot, if any: it subsumes every lower one."""
    for ballot in reversed(tally.ballots):
        if complete(roster, tier, ballot):
            return learn(tally, certify(roster, tier, ballot))
    return tally
