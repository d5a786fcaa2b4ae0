"""n parties: the convergence of one tier, from votes to a certificate.

The outcome of an epoch is a function of write-once votes, a conjunction over a join-semilattice:
so there is no decision to take, no order that matters, and nothing to abort. With hindsight it is
two-phase commit with its log at every member and no right to abort (the design, section 2).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.core.membership import Roster, bits
from handfast.core.messages import Certificate, Rolled, Skipped, Staged, leaf, merkle_root, node
from handfast.core.overlay import Tree

__all__ = [
    "STRANDED",
    "Ballot",
    "Conflict",
    "Tally",
    "awaited",
    "certify",
    "join",
    "learn",
    "reach",
    "settle",
    "sound",
    "voted",
    "waiting",
]


STRANDED: Final = 4
"""So many windows of epochs may be saved that others have passed by, before saves are refused."""

_epoch: Final = attrgetter("epoch")
_domain: Final = attrgetter("domain")


class Conflict(Exception):
    """One domain voted twice, differently, on one epoch: a broken member, or a forged vote."""


class Ballot(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The votes held on one epoch: the facts themselves, in the order of the configuration.

    ``votes`` overlap nowhere. Where there is a tree, votes of whole blocks are held as one
    :class:`~handfast.core.messages.Rolled`, and always as few as can be: so what is held is a set
    of domains, and a join is their union, whatever came singly and whatever came rolled up.
    """

    epoch: Epoch
    votes: tuple[Staged | Rolled, ...] = ()
    skips: tuple[Skipped, ...] = ()

    @property
    def staged(self) -> int:
        """Mask the domains that are known to have staged the epoch."""
        mask = 0
        for vote in self.votes:
            if type(vote) is Rolled:
                mask |= ((1 << vote.size) - 1) << vote.first
            else:
                mask |= 1 << vote.domain
        return mask

    @property
    def skipped(self) -> int:
        """Mask the domains that are known to have skipped it."""
        return sum([1 << skip.domain for skip in self.skips])


def reach(vote: Staged | Rolled | Skipped) -> tuple[int, int]:
    """Give the first and the end of the domains that a vote speaks for."""
    if type(vote) is Rolled:
        return vote.first, vote.first + vote.size
    return vote.domain, vote.domain + 1


class Tally(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one tier: the highest converged epoch, and the ballots above it."""

    line: Certificate | None = None
    ballots: tuple[Ballot, ...] = ()


def sound(roster: Roster, vote: Staged | Rolled | Skipped) -> bool:
    """Say whether a vote is of a member, or of domains that are rolled up in this configuration."""
    if type(vote) is not Rolled:
        return 0 <= vote.domain < roster.size
    first, end = reach(vote)
    inside = vote.size > 1 and first >= 0 and end <= roster.size
    return inside and roster.tree is not None and roster.tree.aligned(first, end)


def join(
    roster: Roster, tally: Tally, vote: Staged | Rolled | Skipped, hearer: int | None = None
) -> Tally:
    """Join one vote, or many rolled up; the same tally, by identity, where it says nothing new.

    Of itself a ``hearer`` knows from its own journal, and so takes no vote from others.
    Raises :class:`Conflict` where a domain's vote on this epoch is held already and differs, or
    the hearer's is rolled up that never staged it. What is held rolled up is not told apart from
    another digest any more.
    """
    epoch, ballots = vote.epoch, tally.ballots
    if tally.line is not None and epoch <= tally.line.epoch:
        return tally
    at = bisect_left(ballots, epoch, key=_epoch)
    there = at < len(ballots) and ballots[at].epoch == epoch
    ballot = ballots[at] if there else Ballot(epoch)
    if hearer is not None:
        if type(vote) is not Rolled:
            if vote.domain == hearer:
                return tally
        elif _first(vote) <= hearer < reach(vote)[1] and not voted(ballot, hearer, hearer + 1):
            whose = f"{vote.first} to {reach(vote)[1] - 1}"
            raise Conflict(f"{roster.ids[hearer]} never staged {epoch}: {whose}")
    joined = _skip(roster, ballot, vote) if type(vote) is Skipped else _add(roster, ballot, vote)
    if joined is ballot:
        return tally
    return Tally(tally.line, (*ballots[:at], joined, *ballots[at + there :]))


def _first(vote: Staged | Rolled | Skipped) -> int:
    return vote.first if type(vote) is Rolled else vote.domain


def voted(ballot: Ballot, first: int, end: int) -> Staged | Rolled | None:
    """Find the vote that speaks for all of these domains, if one is held."""
    at = bisect_right(ballot.votes, first, key=_first) - 1
    if at >= 0 and end <= reach(ballot.votes[at])[1]:
        return ballot.votes[at]
    return None


def _skip(roster: Roster, ballot: Ballot, vote: Skipped) -> Ballot:
    at = bisect_left(ballot.skips, vote.domain, key=_first)
    held = ballot.skips[at] if at < len(ballot.skips) else None
    if held == vote:
        return ballot
    if voted(ballot, *reach(vote)) or (held is not None and held.domain == vote.domain):
        raise Conflict(f"{roster.ids[vote.domain]} voted twice on {vote.epoch}")
    return Ballot(ballot.epoch, ballot.votes, (*ballot.skips[:at], vote, *ballot.skips[at:]))


def _add(roster: Roster, ballot: Ballot, vote: Staged | Rolled) -> Ballot:
    votes, (first, end) = ballot.votes, reach(vote)
    place = _domain if roster.tree is None else _first
    at = bisect_right(votes, first, key=place)
    begun, past = reach(votes[at - 1]) if at else (-1, -1)
    for skip in ballot.skips:
        if first <= skip.domain < end:
            raise Conflict(f"{roster.ids[skip.domain]} voted twice on {vote.epoch}")
    if end <= past:
        if begun == first and end == past and votes[at - 1] != vote:
            raise Conflict(f"{roster.ids[first]} voted twice on {vote.epoch}")
        return ballot
    low = at - (begun == first)
    single = end == first + 1  # else what lies between is a part of the vote
    high = at if single else bisect_left(votes, end, at, key=place)
    joined = (*votes[:low], vote, *votes[high:])
    if roster.tree is not None:
        joined = _rolled(roster, roster.tree, [*joined], low)
    return Ballot(ballot.epoch, joined, ballot.skips)


def _rolled(
    roster: Roster, tree: Tree, votes: list[Staged | Rolled], at: int
) -> tuple[Staged | Rolled, ...]:
    """Roll up what the vote at this place makes whole."""
    while True:
        if at and tree.joins(reach(votes[at - 1]), reach(votes[at])):
            at -= 1
        elif at + 1 == len(votes) or not tree.joins(reach(votes[at]), reach(votes[at + 1])):
            break
        left, right = votes[at : at + 2]
        first, end = _first(left), reach(right)[1]
        root = node(_hash(roster, left), _hash(roster, right))
        votes[at : at + 2] = [Rolled(first, end - first, left.epoch, root)]
    return tuple(votes)


def _hash(roster: Roster, vote: Staged | Rolled) -> bytes:
    """Give the node of the Merkle tree over the attestations that a vote speaks for."""
    if type(vote) is Rolled:
        return vote.root
    return leaf(f"{roster.ids[vote.domain]}={vote.digest}")


def waiting(roster: Roster, tier: int, ballot: Ballot) -> int:
    """Mask the domains whose vote is still awaited; 0 where every shard has its k_T copies."""
    if roster.tree is None:
        return _missing(roster, tier, ballot.staged) & ~ballot.skipped
    first, end = roster.tree.span(roster.copies[tier][0][0])  # all of the tier is needed
    return (1 << end) - (1 << first) & ~ballot.staged & ~ballot.skipped


def _missing(roster: Roster, tier: int, staged: int) -> int:
    """Mask the domains that have not staged, of all shards that too few have staged."""
    need, missing = roster.needs[tier], 0
    for mask in roster.holders[tier]:
        if (staged & mask).bit_count() < need:
            missing |= mask & ~staged
    return missing


def awaited(roster: Roster, tier: int, tally: Tally, ballot: Ballot) -> int:
    """Mask the domains that may yet make a ballot complete; 0 where nobody will.

    Steps only rise within a generation, and images are persisted in their order: so whoever has
    staged a later epoch will not vote on this one any more. (Whoever has only skipped a later one
    may still be persisting this one.) Failed saves that are tried again at another step on each
    rank end like that.
    """
    if ballot.skips:
        return 0
    late = waiting(roster, tier, ballot)
    beyond = 0
    for later in tally.ballots:
        if later.epoch > ballot.epoch:
            beyond |= later.staged
    return 0 if late & beyond else late


def complete(roster: Roster, tier: int, ballot: Ballot) -> bool:
    """Say whether Conv_T holds: every shard is staged by at least k_T of its domains."""
    votes = ballot.votes
    if roster.tree is not None:  # all of the tier is needed, so it is one vote
        return bool(votes) and reach(votes[0]) == roster.tree.span(_first(votes[0]))
    if len(votes) < roster.needs[tier] * len(roster.homes):
        return False
    everybody = len(votes) == len(roster.members[tier])
    return everybody or not _missing(roster, tier, ballot.staged)


def void(roster: Roster, tallies: Sequence[Tally]) -> tuple[Epoch, ...]:
    """List the epochs that can never be available: all domains of some shard, in any tier, skipped.

    Votes are write-once, so this is as stable as convergence.
    """
    skipped: dict[Epoch, int] = {}
    for tally in tallies:
        for ballot in tally.ballots:
            if ballot.skips:
                skipped[ballot.epoch] = skipped.get(ballot.epoch, 0) | ballot.skipped
    return _void(roster, skipped) if skipped else ()


def _void(roster: Roster, skipped: Mapping[Epoch, int]) -> tuple[Epoch, ...]:
    homes = roster.configuration.domains
    return tuple(
        epoch
        for epoch, mask in skipped.items()
        if any(
            all(mask >> i & 1 for tier in roster.copies for i in tier[homes[at].shard])
            for at in bits(mask)
        )
    )


def certify(roster: Roster, tier: int, ballot: Ballot) -> Certificate:
    """Write the certificate of a complete ballot."""
    if roster.tree is not None:
        root = _hash(roster, ballot.votes[0]).hex()
    else:
        said = {skip.domain: skip.reason for skip in ballot.skips}
        said |= {vote.domain: vote.digest for vote in ballot.votes if type(vote) is Staged}
        ids = roster.ids
        root = merkle_root([f"{ids[i]}={said.get(i, '')}" for i in roster.members[tier]])
    return Certificate(
        roster.configuration.run, roster.digest, roster.tiers[tier], ballot.epoch, root
    )


def learn(tally: Tally, certificate: Certificate) -> Tally:
    """Raise the line to a certificate, and drop the ballots that it supersedes."""
    if tally.line is not None and certificate.epoch <= tally.line.epoch:
        return tally
    at = bisect_right(tally.ballots, certificate.epoch, key=_epoch)
    return Tally(certificate, tally.ballots[at:])


def settle(roster: Roster, tier: int, tally: Tally) -> Tally:
    """Certify the greatest complete ballot, if any: it subsumes every lower one."""
    for ballot in reversed(tally.ballots):
        if complete(roster, tier, ballot):
            return learn(tally, certify(roster, tier, ballot))
    return tally
