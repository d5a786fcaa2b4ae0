"""Who lacks what: grow-only facts, masks of what a peer holds, and nothing that a timer decides.

A member sends its own new facts to all its neighbours at once. What is lost is found by
comparing masks: every message shows what its sender holds, so a peer that lacks something gets it
at the next tick, and once both masks agree nothing more is sent (L5).
"""

from __future__ import annotations

from collections.abc import Sequence

from handfast.core.converge import Ballot
from handfast.core.lattice import Epoch
from handfast.core.membership import bits
from handfast.core.messages import (
    Bad,
    Converged,
    Fact,
    Knows,
    Restored,
    Skipped,
    Staged,
    Valid,
    pack,
    unpack,
)
from handfast.core.recover import Check, Recovery
from handfast.core.state import Member

__all__ = ["knows", "lacking", "merge", "restless"]


def knows(member: Member) -> Knows:
    """Sum up what a member holds of its generation."""
    tallies = member.tallies
    votes = tuple(
        (tier, ballot.epoch, pack(ballot.staged | ballot.skipped))
        for tier, tally in enumerate(tallies)
        for ballot in tally.ballots
    )
    lines = tuple(tally.line.epoch if tally.line else None for tally in tallies)
    if member.open or member.recovery is None:
        return Knows(restored=member.open, lines=lines, votes=votes)
    recovery = member.recovery
    return Knows(
        frozen=pack(recovery.frozen),
        checks=tuple((check.epoch, pack(check.valid | check.bad)) for check in recovery.checks),
        accepted=_mask(recovery.accepted),
        declined=pack(sum(1 << declined.shard for declined in recovery.declined)),
        votes=votes,
    )


def _mask(row: Sequence[object | None]) -> bytes:
    return pack(sum(1 << i for i, value in enumerate(row) if value is not None))


def _union(old: bytes, new: bytes) -> bytes:
    return pack(unpack(old) | unpack(new))


def merge(old: Knows, new: Knows) -> Knows:
    """Join two views of one peer: messages may arrive in any order."""
    if old == new:
        return old
    votes = {(tier, epoch): mask for tier, epoch, mask in old.votes}
    for tier, epoch, mask in new.votes:
        votes[tier, epoch] = _union(votes.get((tier, epoch), b""), mask)
    checks = dict(old.checks)
    for epoch, mask in new.checks:
        checks[epoch] = _union(checks.get(epoch, b""), mask)
    return Knows(
        frozen=_union(old.frozen, new.frozen),
        checks=tuple(sorted(checks.items())),
        accepted=_union(old.accepted, new.accepted),
        declined=_union(old.declined, new.declined),
        restored=old.restored or new.restored,
        lines=_highest(old.lines, new.lines),
        votes=_above(votes, _highest(old.lines, new.lines)),
    )


def _highest(
    old: tuple[Epoch | None, ...], new: tuple[Epoch | None, ...]
) -> tuple[Epoch | None, ...]:
    if not old or not new:
        return old or new
    return tuple(
        max((epoch for epoch in pair if epoch is not None), default=None)
        for pair in zip(old, new, strict=True)
    )


def _above(
    votes: dict[tuple[int, Epoch], bytes], lines: tuple[Epoch | None, ...]
) -> tuple[tuple[int, Epoch, bytes], ...]:
    """Forget the votes that a peer's own line supersedes."""
    return tuple(
        (tier, epoch, mask)
        for (tier, epoch), mask in sorted(votes.items())
        if not lines or (line := lines[tier]) is None or epoch > line
    )


def lacking(member: Member, peer: Knows) -> tuple[Fact, ...]:
    """List the facts that a member holds and a peer does not, certificates first.

    In a recovery these are its own facts only: of what converged before, the restore certificate
    will say whether it still counts, and no peer would take it before.
    """
    if not member.open or member.restored is None:
        if member.recovery is None or peer.restored:
            return ()
        return tuple(_lacking_recovery(member.recovery, peer))
    facts: list[Fact] = [] if peer.restored else [Restored(member.restored)]
    held = {(tier, epoch): unpack(mask) for tier, epoch, mask in peer.votes}
    for tier, tally in enumerate(member.tallies):
        line = peer.lines[tier] if peer.lines else None
        if tally.line is not None and (line is None or line < tally.line.epoch):
            facts.append(Converged(tally.line))
        for ballot in tally.ballots:
            if line is None or ballot.epoch > line:
                facts += _votes(ballot, held.get((tier, ballot.epoch), 0))
    return tuple(facts)


def _lacking_recovery(recovery: Recovery, peer: Knows) -> list[Fact]:
    reported, accepted, declined = map(unpack, (peer.frozen, peer.accepted, peer.declined))
    facts: list[Fact] = [
        frozen
        for i, frozen in enumerate(recovery.reports)
        if frozen is not None and not reported >> i & 1
    ]
    judged = dict(peer.checks)
    for check in recovery.checks:
        facts += _judgements(recovery, check, unpack(judged.get(check.epoch, b"")))
    facts += [
        said
        for shard, said in enumerate(recovery.accepted)
        if said is not None and not accepted >> shard & 1
    ]
    facts += [said for said in recovery.declined if not declined >> said.shard & 1]
    return facts


def _judgements(recovery: Recovery, check: Check, held: int) -> list[Fact]:
    generation = recovery.generation
    valid: list[Fact] = [Valid(i, generation, check.epoch) for i in bits(check.valid & ~held)]
    said = dict(check.reasons)
    return valid + [Bad(i, generation, check.epoch, said[i]) for i in bits(check.bad & ~held)]


def _votes(ballot: Ballot, held: int) -> list[Fact]:
    staged: list[Fact] = [
        Staged(i, ballot.epoch, ballot.said[i]) for i in bits(ballot.staged & ~held)
    ]
    return staged + [Skipped(i, ballot.epoch, ballot.said[i]) for i in bits(ballot.skipped & ~held)]


def restless(member: Member) -> int:
    """Mask the neighbours that a tick would send to: 0 once all are known to agree."""
    if member.roster is None or member.generation == 0:
        return 0
    peers = member.peers
    return sum(
        1 << i
        for i in member.roster.neighbours[member.me]
        if peers[i].owed or lacking(member, peers[i].knows)
    )
