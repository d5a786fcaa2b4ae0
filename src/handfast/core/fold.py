"""From records to state: the one place where a durable record changes a member.

A running member and one that boots from its journal go through the same function, so that what a
member is after a crash is what it had written, by construction.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final

import msgspec

from handfast.core import converge, recover
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster
from handfast.core.messages import (
    Accepted,
    Bad,
    Certificate,
    Configured,
    Converged,
    Copy,
    Frozen,
    Lost,
    Record,
    Released,
    RestoreCertificate,
    Restored,
    Skipped,
    Staged,
    Valid,
)
from handfast.core.recover import eligible
from handfast.core.state import Member, Peer, Peers

__all__ = ["boot", "fold"]

_replace = msgspec.structs.replace
_epoch = attrgetter("epoch")


def boot(
    domain_id: str, incarnation: int, records: Sequence[Record], lost: Sequence[Lost] = ()
) -> Member:
    """Rebuild a member from its journal: own votes, freezes, judgements and certificates.

    ``lost`` names retained copies that a look at the disk did not find whole. What peers had said
    is not in the journal: it is asked for again, and nothing depends on it having been there.
    """
    state = Member(domain_id, incarnation)
    for record in records:
        state = fold(state, record)
    gone = [item.epoch for item in lost]
    retained = tuple(copy for copy in state.retained if copy.epoch not in gone)
    known = () if state.roster is None else _known(state, state.tallies, retained)
    return _replace(state, retained=retained, lost=tuple(lost), converged=known)


def fold(state: Member, record: Record) -> Member:
    """Apply one own record to a member's state."""
    return _FOLDS[type(record)](state, record)


def roster_of(state: Member) -> Roster:
    """Give the roster that every record but the first relies on."""
    if state.roster is None:
        raise ValueError(f"{state.id}: a record comes before any configuration")
    return state.roster


def _configured(state: Member, record: Configured) -> Member:
    """Take part in nothing until the freeze that follows: what was known was of other members."""
    roster = Roster(record.configuration)
    me = roster.index(state.id)
    if me is None:
        raise ValueError(f"{state.id} is no member of configuration {roster.digest[:8]}")
    first = state.roster is None
    genesis = (Copy(GENESIS, ""),) if first and record.founding else ()
    brought = record.brought if first else ()
    return _replace(
        state,
        roster=roster,
        me=me,
        founding=record.founding,
        retained=(*genesis, *brought, *state.retained),
        round="",
        recovery=None,
        persisting=(),
        tallies=(converge.Tally(),) * len(roster.tiers),
        peers=Peers(),
    )


def _frozen(state: Member, record: Frozen) -> Member:
    """After FREEZE(g) nothing of an older generation is left that could be appended."""
    roster = roster_of(state)
    recovery = recover.begin(roster, record.generation)
    return _replace(
        state,
        generation=record.generation,
        round=record.round,
        recovery=recover.join(recovery, record),
        tallies=tuple(converge.Tally(tally.line) for tally in state.tallies),
        peers=Peers(tuple((at, Peer(peer.incarnation)) for at, peer in state.peers.heard)),
        turned=-1,
        checking=None,
        told=None,
        persisting=(),
        last=None,
    )


def _voted(state: Member, vote: Staged | Skipped) -> Member:
    roster, epoch = roster_of(state), vote.epoch
    tier, held, known = roster.tier_of[state.me], state.retained, state.converged
    tallies = placed(state.tallies, tier, converge.join(roster, state.tallies[tier], vote))
    if type(vote) is Staged:
        at = bisect_left(held, epoch, key=_epoch)
        held = (*held[:at], Copy(epoch, vote.digest), *held[at:])
        known = _known(state, tallies, held)
    return _replace(
        state,
        tallies=tallies,
        persisting=tuple([other for other in state.persisting if other != epoch]),
        last=epoch if state.last is None else max(epoch, state.last),
        retained=held,
        converged=known,
    )


def placed(
    tallies: tuple[converge.Tally, ...], tier: int, tally: converge.Tally
) -> tuple[converge.Tally, ...]:
    """Put one tier's tally in its place; the same tallies where it is the same tally."""
    if tally is tallies[tier]:
        return tallies
    return (*tallies[:tier], tally, *tallies[tier + 1 :])


def _said(state: Member, record: Valid | Bad | Accepted) -> Member:
    held = state.recovery
    state = _replace(state, recovery=held and recover.join(held, record), checking=None)
    if isinstance(record, Accepted):
        return state
    doubted = tuple(epoch for epoch in state.doubted if epoch != record.epoch)
    return _replace(
        state, doubted=doubted if isinstance(record, Valid) else (*doubted, record.epoch)
    )


def _restored(state: Member, record: Restored) -> Member:
    roster, certificate = roster_of(state), record.certificate
    tallies = tuple(
        _rebased(roster, tier, tally, certificate) for tier, tally in enumerate(state.tallies)
    )
    return _replace(
        state,
        restored=certificate,
        recovery=None,
        checking=None,
        told=None,
        tallies=tallies,
        converged=_known(state, tallies, state.retained),
    )


def _rebased(
    roster: Roster, tier: int, tally: converge.Tally, certificate: RestoreCertificate
) -> converge.Tally:
    """Find a tier's converged line on the timeline that is resumed.

    The certificate counts as Conv_T(base) only for a tier that holds every shard's accepted copy,
    and needs no more than that one; otherwise an older line stays if it lies on the timeline. What
    another tier had to restore is no line of this one any more: its own copy may have been BAD.
    """
    held, base = tally.line, certificate.base
    inside = all(roster.tier_of[copy] == tier for copy in certificate.copies)
    if inside and roster.needs[tier] == 1 and (held is None or held.epoch != base):
        held = Certificate(
            certificate.run, certificate.configuration, roster.tiers[tier], base, certificate.root
        )
    elif held is not None and not (inside and held.epoch == base):
        held = held if held.epoch < base and eligible(held.epoch, certificate.timeline) else None
    return converge.Tally(held, tally.ballots)


def _converged(state: Member, record: Converged) -> Member:
    tier = roster_of(state).tiers.index(record.certificate.tier)
    tally = converge.learn(state.tallies[tier], record.certificate)
    tallies = placed(state.tallies, tier, tally)
    return _replace(state, tallies=tallies, converged=_known(state, tallies, state.retained))


def _released(state: Member, record: Released) -> Member:
    kept = tuple([copy for copy in state.retained if copy.epoch not in record.epochs])
    return _replace(state, retained=kept, converged=_known(state, state.tallies, kept))


def _known(
    state: Member, tallies: Sequence[converge.Tally], held: Sequence[Copy]
) -> tuple[Epoch, ...]:
    """Remember the own tier's line for when a higher one has taken its place.

    Retained or not: with spare copies it may converge before this domain's own is durable. Of what
    is older than all that is retained no more is known than the line.
    """
    line, known = tallies[roster_of(state).tier_of[state.me]].line, state.converged
    known = known[bisect_left(known, held[0].epoch) :] if held else ()
    if line is None:
        return known
    at = bisect_left(known, line.epoch)
    there = at < len(known) and known[at] == line.epoch
    return known if there else (*known[:at], line.epoch, *known[at:])


_FOLDS: Final[dict[type, Callable[[Member, Any], Member]]] = {
    Configured: _configured, Frozen: _frozen, Staged: _voted, Skipped: _voted,
    Valid: _said, Bad: _said, Accepted: _said, Restored: _restored,
    Converged: _converged, Released: _released,
}  # fmt: skip
