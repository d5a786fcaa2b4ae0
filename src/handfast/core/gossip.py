"""Who lacks what: grow-only facts, masks of what a peer holds, and nothing that a timer decides.

A member sends its own new facts to all its neighbours at once; but where there is a tree, votes go
up it and certificates down (:mod:`~handfast.core.overlay`). What is lost is found by comparing
masks: every message shows what its sender holds, so a peer that lacks something gets it at the next
tick, and once both masks agree nothing more is sent (L5).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import TypeVar

from handfast.core.converge import Ballot, reach, voted
from handfast.core.lattice import Epoch
from handfast.core.membership import bits
from handfast.core.messages import (
    Bad,
    Converged,
    Fact,
    Knows,
    Restored,
    Rolled,
    Skipped,
    Staged,
    Valid,
    pack,
    unpack,
)
from handfast.core.recover import Check, Recovery
from handfast.core.state import Member

T = TypeVar("T")

__all__ = ["held", "knows", "lacking", "merge", "restless", "turn"]


def knows(member: Member) -> Knows:
    """Sum up what a member holds of its generation."""
    tallies = member.tallies
    open_ = [(tier, ballot) for tier, tally in enumerate(tallies) for ballot in tally.ballots]
    votes: tuple[tuple[int, Epoch, bytes], ...] = ()
    spans: tuple[tuple[int, Epoch, tuple[int, ...]], ...] = ()
    if member.roster is not None and member.roster.tree is not None:
        spans = tuple((tier, b.epoch, _span((*b.votes, *b.skips))) for tier, b in open_)
    else:
        votes = tuple((tier, b.epoch, pack(b.staged | b.skipped)) for tier, b in open_)
    lines = tuple(tally.line.epoch if tally.line else None for tally in tallies)
    if member.open or member.recovery is None:
        return Knows(restored=member.open, lines=lines, votes=votes, spans=spans)
    recovery = member.recovery
    return Knows(
        frozen=pack(recovery.frozen),
        checks=tuple((check.epoch, pack(check.valid | check.bad)) for check in recovery.checks),
        accepted=_mask(recovery.accepted),
        declined=pack(sum(1 << declined.shard for declined in recovery.declined)),
        votes=votes,
        spans=spans,
    )


def _span(votes: Sequence[Staged | Rolled | Skipped]) -> tuple[int, ...]:
    return _stretches([reach(vote) for vote in votes])


def _stretches(pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Write places as the first and the end of each stretch of them, whatever the pieces were."""
    found: list[int] = []
    for first, end in sorted(pairs):
        if found and first <= found[-1]:
            found[-1] = max(found[-1], end)
        else:
            found += [first, end]
    return tuple(found)


def _pairs(span: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(span[::2], span[1::2], strict=False)


def held(knows: Knows) -> dict[tuple[int, Epoch], int]:
    """Mask, for each tier and epoch, the domains whose vote a peer has shown that it holds."""
    shown = {(tier, epoch): unpack(mask) for tier, epoch, mask in knows.votes}
    for tier, epoch, span in knows.spans:
        mask = sum((1 << end) - (1 << first) for first, end in _pairs(span))
        shown[tier, epoch] = shown.get((tier, epoch), 0) | mask
    return shown


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
    spans = {(tier, epoch): span for tier, epoch, span in old.spans}
    for tier, epoch, span in new.spans:
        both = (*_pairs(spans.get((tier, epoch), ())), *_pairs(span))
        spans[tier, epoch] = _stretches(both)
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
        spans=_above(spans, _highest(old.lines, new.lines)),
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
    votes: dict[tuple[int, Epoch], T], lines: tuple[Epoch | None, ...]
) -> tuple[tuple[int, Epoch, T], ...]:
    """Forget the votes that a peer's own line supersedes."""
    return tuple(
        (tier, epoch, mask)
        for (tier, epoch), mask in sorted(votes.items(), key=itemgetter(0))
        if not lines or (line := lines[tier]) is None or epoch > line
    )


def lacking(member: Member, peer: Knows) -> tuple[Fact | Rolled, ...]:
    """List the facts that a member holds and a peer does not, certificates first.

    In a recovery these are its own facts only: of what converged before, the restore certificate
    will say whether it still counts, and no peer would take it before.
    """
    if not member.open or member.restored is None:
        if member.recovery is None or peer.restored:
            return ()
        return tuple(_lacking_recovery(member.recovery, peer))
    facts: list[Fact | Rolled] = [] if peer.restored else [Restored(member.restored)]
    shown = held(peer)
    for tier, tally in enumerate(member.tallies):
        line = peer.lines[tier] if peer.lines else None
        if tally.line is not None and (line is None or line < tally.line.epoch):
            facts.append(Converged(tally.line))
        for ballot in tally.ballots:
            if line is None or ballot.epoch > line:
                facts += _votes(ballot, shown.get((tier, ballot.epoch), 0))
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


def _votes(ballot: Ballot, held: int) -> list[Fact | Rolled]:
    said = ((vote, *reach(vote)) for vote in (*ballot.votes, *ballot.skips))
    return [vote for vote, first, end in said if ((1 << end) - (1 << first)) & ~held]


def restless(member: Member) -> int:
    """Mask the neighbours that ticks would send to: 0 once all are known to agree."""
    roster = member.roster
    if roster is None or member.generation == 0:
        return 0
    near = _near(member)
    return sum(1 << i for i in roster.neighbours[member.me] if _due(member, i, near))


def _due(member: Member, at: int, near: Collection[int]) -> bool:
    peer = member.peers[at]
    if peer.owed:
        return True
    if at not in near and not _asks(member, peer.knows):
        return False
    return bool(lacking(member, peer.knows))


def _asks(member: Member, peer: Knows) -> bool:
    """Say whether there is a reason to speak to a neighbour beside the tree.

    That is an epoch that is open here, or there though it has converged here, or a recovery there.
    What it was not heard of the tree will tell it.
    """
    lines = [tally.line for tally in member.tallies]
    return (
        any(tally.ballots for tally in member.tallies)
        or any((line := lines[tier]) and epoch <= line.epoch for tier, epoch, _ in peer.spans)
        or not (peer.restored or peer == Knows())
    )


def _near(member: Member) -> Collection[int]:
    """List who is next to a member in the tree that carries an open generation's votes.

    All neighbours are, where there is no tree.
    """
    roster = member.roster
    if roster is None or roster.tree is None or not member.open:
        return range(roster.size if roster is not None else 0)
    return roster.tree.next_to(member.me)


def turn(member: Member) -> tuple[int, int]:
    """Mask whom this tick sends to, and say which neighbour beside the tree is among them.

    Next to each other in the tree: all that are restless. Beside it one at a time, and another the
    next time, while the job saves: a rank that is slow costs each member one message a tick, and a
    tree that is broken heals in about as many ticks as there are neighbours.
    """
    loud, near = bits(restless(member)), _near(member)
    beside = [i for i in loud if i not in near]
    later = [i for i in beside if i > member.turned]
    chosen = (later or beside)[:1]
    to = sum(1 << i for i in loud if i not in beside or i in chosen)
    return to, chosen[0] if chosen else member.turned


def rolls(before: Member, after: Member) -> int:
    """Mask whom the tree is to tell of what a step has come to.

    A domain that holds the votes of all the blocks that it leads tells who is above it. Who comes
    to know that an epoch converged tells all that are next to it.
    """
    roster = after.roster
    if roster is None or roster.tree is None or not (before.open and after.open):
        return 0
    tree, me = roster.tree, after.me
    risen = [
        (tier, new.line.epoch)
        for tier, (old, new) in enumerate(zip(before.tallies, after.tallies, strict=True))
        if new.line is not None and new.line != old.line
    ]
    to = sum(1 << i for i in tree.next_to(me) if _behind(after.peers[i].knows.lines, risen))
    above, tier, block = tree.above(me), roster.tier_of[me], tree.block(me)
    told = [b.epoch for b in before.tallies[tier].ballots if voted(b, *block)]
    whole = [b.epoch for b in after.tallies[tier].ballots if voted(b, *block)]
    return to if above is None or set(whole) <= set(told) else to | 1 << above


def _behind(lines: tuple[Epoch | None, ...], risen: Sequence[tuple[int, Epoch]]) -> bool:
    """Say whether a peer has not shown that it knows one of these lines."""
    return any(not lines or (line := lines[t]) is None or line < epoch for t, epoch in risen)
