"""The lattice as one member sees it: plain values for a training loop, a logger or a page.

A view is what is known here, now. Other domains may be further than it says, never less far.
"""

from __future__ import annotations

import msgspec

from handfast.core import converge, recover
from handfast.core.gossip import held
from handfast.core.lattice import Epoch
from handfast.core.link import Edge, edge
from handfast.core.state import Member

__all__ = ["DomainView", "Lattice", "left_behind", "view"]


class DomainView(msgspec.Struct, frozen=True):
    """One domain: the newest epoch that it captured, persisted (voted) and knows certified.

    None: nothing of that kind is known of it in this generation or before. ``edge`` says how far
    it and we have come with our oldest vote that has not converged.
    """

    shard: int
    tier: str
    staged: Epoch | None = None
    persisted: Epoch | None = None
    certified: Epoch | None = None
    edge: Edge = Edge.NONE


class Lattice(msgspec.Struct, frozen=True):
    """Domains by id, the converged epoch, the skew in steps, and who is awaited.

    ``skew`` is the greatest less the least persisted step over the domains of the tier, 0 where
    nothing is known. ``blocked_by`` names the domains whose vote, report, judgement or acceptance
    is awaited now; empty where nobody is.
    """

    domains: dict[str, DomainView]
    converged: Epoch | None = None
    skew: int = 0
    blocked_by: tuple[str, ...] = ()
    phase: str = "idle"
    generation: int = 0


def view(member: Member) -> Lattice:
    """Show a member's knowledge of all domains. Pure, no I/O."""
    roster = member.roster
    if roster is None:
        return Lattice({})
    shown = {}
    voted = [[(b.epoch, b.staged) for b in tally.ballots] for tally in member.tallies]
    for i, domain in enumerate(roster.configuration.domains):
        tier = roster.tier_of[i]
        tally = member.tallies[tier]
        line = tally.line.epoch if tally.line else None
        persisted = max((epoch for epoch, staged in voted[tier] if staged >> i & 1), default=line)
        if i == member.me:
            staged = max((e for e in (*member.persisting, persisted) if e), default=None)
            certified = line
        else:
            staged = persisted
            told = member.peers[i].knows.lines
            certified = told[tier] if told else None
        shown[domain.id] = DomainView(
            domain.shard, domain.tier, staged, persisted, certified, _edge(member, i)
        )
    own = roster.tier_of[member.me]
    converged = member.tallies[own].line
    steps = [
        d.persisted.step for d in shown.values() if d.persisted and d.tier == roster.tiers[own]
    ]
    phase, by = _blocked(member)
    return Lattice(
        shown,
        converged.epoch if converged else None,
        max(steps) - min(steps) if steps else 0,
        by,
        phase,
        member.generation,
    )


def _blocked(member: Member) -> tuple[str, tuple[str, ...]]:
    """Name the phase, and whom it waits for."""
    roster = member.roster
    if roster is None or member.generation == 0:
        return "idle", ()
    if member.recovery is not None:
        at = recover.standing(roster, member.recovery)
        return at.phase.value, roster.names(at.waiting)
    tier = roster.tier_of[member.me]
    late = 0
    tally = member.tallies[tier]
    for ballot in tally.ballots:
        late |= converge.awaited(roster, tier, tally, ballot)
    return ("converging" if late else "converged"), roster.names(late)


def _edge(member: Member, peer: int) -> Edge:
    """Derive how far the edge to a peer of the own tier has come, for the oldest open vote."""
    tier = member.roster.tier_of[member.me] if member.roster is not None else 0
    mine, theirs = 1 << member.me, 1 << peer
    ballots = member.tallies[tier].ballots
    ballot = next((b for b in ballots if (b.staged | b.skipped) & mine), None)
    if ballot is None or peer == member.me:
        return Edge.NONE
    return edge(
        offered=bool(ballot.staged & mine),
        theirs=bool(ballot.staged & theirs),
        echoed=bool(held(member.peers[peer].knows).get((tier, ballot.epoch), 0) & mine),
        skipped=bool(ballot.skipped & (mine | theirs)),
    )


def left_behind(member: Member, base: Epoch) -> tuple[str, ...]:
    """Say what had converged above the base of a recovery, and why it can't be resumed.

    Losses beyond a tier's promise make a recovery step below a certified epoch (S4): nobody should
    learn that later. Empty where that is what was asked for, and once the recovery is over.
    """
    roster, recovery = member.roster, member.recovery
    if roster is None or recovery is None:
        return ()
    held = [(i, frozen) for i, frozen in enumerate(recovery.reports) if frozen is not None]
    timeline = recover.timeline_of([frozen.report for _, frozen in held])
    certified = {
        line.epoch
        for _, frozen in held
        for line in frozen.report.converged
        if frozen.want is None and line.epoch > base and recover.eligible(line.epoch, timeline)
    }
    said = []
    for epoch in sorted(certified):
        known = recover.reported(recovery, epoch)
        why = dict(recover.check_of(recovery, epoch).reasons)
        why |= {i: lost.reason for i, frozen in held for lost in frozen.report.lost
                if lost.epoch == epoch}  # fmt: skip
        why |= {i: "has no copy" for i, _ in held if not known >> i & 1 and i not in why}
        blame = "; ".join(f"{roster.ids[i]}: {reason}" for i, reason in sorted(why.items()))
        said.append(f"{epoch} had converged ({blame})")
    return tuple(said)
