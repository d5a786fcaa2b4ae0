"""Who lacks what: grow-only facts, masks of what a peer holds, and nothing that a timer decides.

A member sends its own new facts to all its neighbours at once; but where there is a tree, votes go
up it and certificates down (:mod:`~handfast.core.overlay`). What is lost is found by comparing
masks: every message shows what its sender holds, so a peer that lacks something gets it at the next
tick, and once both masks agree nothing more is sent (L5).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

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
Shown: TypeAlias = tuple[tuple[int, Epoch, T], ...]

__all__ = ["held", "knows", "lacking", "merge", "restless", "turn"]


def knows(member: Member) -> Knows:
    """Sum up what a member holds of its generation."""
    votes, spans, lines = [], [], []
    tree = member.roster is not None and member.roster.tree is not None
    for tier, tally in enumerate(member.tallies):
        lines.append(tally.line.epoch if tally.line is not None else None)
        for b in tally.ballots:
            if tree:
                spans.append((tier, b.epoch, _span((*b.votes, *b.skips))))
            else:
                votes.append((tier, b.epoch, pack(b.staged | b.skipped if b.skips else b.staged)))
    recovery, open_ = member.recovery, member.open
    if open_ or recovery is None:
        return Knows(b"", (), b"", b"", open_, tuple(lines), tuple(votes), tuple(spans))
    return Knows(
        frozen=pack(recovery.frozen),
        checks=tuple((check.epoch, pack(check.valid | check.bad)) for check in recovery.checks),
        accepted=_mask(recovery.accepted),
        declined=pack(sum(1 << declined.shard for declined in recovery.declined)),
        votes=tuple(votes),
        spans=tuple(spans),
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
    return old if old == new else pack(unpack(old) | unpack(new))


def _spliced(old: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
    return _stretches([*_pairs(old), *_pairs(new)])


def merge(old: Knows, new: Knows) -> Knows:
    """Join two views of one peer: messages may arrive in any order."""
    if old == new:
        return old
    lines, checks = _highest(old.lines, new.lines), old.checks
    votes, spans = old.votes or new.votes, old.spans or new.spans
    if votes:
        votes = _joined(lines, old, old.votes, new, new.votes, _union)
    if spans:
        spans = _joined(lines, old, old.spans, new, new.spans, _spliced)
    if new.checks:
        judged = dict(checks)
        for epoch, mask in new.checks:
            judged[epoch] = _union(judged.get(epoch, b""), mask)
        checks = tuple(sorted(judged.items()))
    return Knows(
        frozen=_union(old.frozen, new.frozen) if new.frozen else old.frozen,
        checks=checks,
        accepted=_union(old.accepted, new.accepted) if new.accepted else old.accepted,
        declined=_union(old.declined, new.declined) if new.declined else old.declined,
        restored=old.restored or new.restored,
        lines=lines,
        votes=votes,
        spans=spans,
    )


def _highest(
    old: tuple[Epoch | None, ...], new: tuple[Epoch | None, ...]
) -> tuple[Epoch | None, ...]:
    if not old or not new or old == new:
        return old or new
    for at, line in enumerate(old):
        if line is not None and ((later := new[at]) is None or later < line):
            both = zip(old, new, strict=True)
            return tuple(b if a is None or (b is not None and a < b) else a for a, b in both)
    return new


def _joined(
    lines: tuple[Epoch | None, ...], old: Knows, ours: Shown[T], new: Knows, theirs: Shown[T],
    join: Callable[[T, T], T],
) -> Shown[T]:  # fmt: skip
    """Join the votes that a peer has shown, and forget those that its own lines supersede."""
    if ours and lines is not old.lines:
        ours = tuple([v for v in ours if (line := lines[v[0]]) is None or v[1] > line])
    if theirs and lines is not new.lines:
        theirs = tuple([v for v in theirs if (line := lines[v[0]]) is None or v[1] > line])
    if not ours or not theirs:
        return ours or theirs
    votes = {(tier, epoch): mask for tier, epoch, mask in ours}
    for tier, epoch, mask in theirs:
        held = votes.get((tier, epoch))
        votes[tier, epoch] = mask if held is None else join(held, mask)
    return tuple([(*key, votes[key]) for key in sorted(votes)])


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
    for tier, tally in enumerate(member.tallies):
        shown = held(peer) if tally.ballots else {}
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
    risen, to = [], 0
    for tier, new in enumerate(after.tallies):
        if new.line is not None and new.line != before.tallies[tier].line:
            risen.append((tier, new.line.epoch))
    for i in tree.next_to(me) if risen else ():
        if _behind(after.peers[i].knows.lines, risen):
            to |= 1 << i
    tier = roster.tier_of[me]
    if ballots := after.tallies[tier].ballots:
        above, block = tree.above(me), tree.block(me)
        told = [b.epoch for b in before.tallies[tier].ballots if voted(b, *block)]
        if above is not None and any(b.epoch not in told for b in ballots if voted(b, *block)):
            to |= 1 << above
    return to


def _behind(lines: tuple[Epoch | None, ...], risen: Sequence[tuple[int, Epoch]]) -> bool:
    """Say whether a peer has not shown that it knows one of these lines."""
    return any(not lines or (line := lines[t]) is None or line < epoch for t, epoch in risen)
