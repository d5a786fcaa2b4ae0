"""The lattice as one member sees it: plain values for a training loop, a logger or a page.

A view is what is known here, now. Other domains may be further than it says, never less far.
"""

from __future__ import annotations

import msgspec

from handfast.core import converge, recover
from handfast.core.lattice import Epoch
from handfast.core.membership import bits
from handfast.core.state import Member

__all__ = ["DomainView", "Lattice", "view"]


class DomainView(msgspec.Struct, frozen=True):
    """One domain: the newest epoch that it captured, persisted (voted) and knows certified.

    None: nothing of that kind is known of it in this generation or before.
    """

    shard: int
    tier: str
    staged: Epoch | None = None
    persisted: Epoch | None = None
    certified: Epoch | None = None


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
    for i, domain in enumerate(roster.configuration.domains):
        tier = roster.tier_of[i]
        tally = member.tallies[tier]
        line = tally.line.epoch if tally.line else None
        voted = [ballot.epoch for ballot in tally.ballots if ballot.staged >> i & 1]
        persisted = voted[-1] if voted else line
        if i == member.me:
            staged = max((e for e in (*member.persisting, persisted) if e), default=None)
            certified = line
        else:
            staged = persisted
            told = member.peers[i].knows.lines
            certified = told[tier] if told else None
        shown[domain.id] = DomainView(domain.shard, domain.tier, staged, persisted, certified)
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
    for ballot in member.tallies[tier].ballots:
        if not ballot.skipped:
            late |= converge.waiting(roster, tier, ballot)
    return ("converging" if late else "converged"), roster.names(late)


def missing(member: Member, epoch: Epoch) -> tuple[str, ...]:
    """Name the domains whose vote on one epoch is awaited here."""
    roster = member.roster
    if roster is None:
        return ()
    tier = roster.tier_of[member.me]
    tally = member.tallies[tier]
    if tally.line is not None and tally.line.epoch >= epoch:
        return ()
    ballot = converge.ballot_of(tally, epoch)
    if ballot is None:
        return tuple(roster.ids[i] for i in bits(sum(roster.holders[tier])))
    return roster.names(converge.waiting(roster, tier, ballot))
