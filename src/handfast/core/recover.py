"""Recovery: frozen reports, the descending meet, validate before mutate, one certificate.

Every member freezes; from the frozen reports and the chain of bases alone each finds the same
candidates, greatest first. Holders read every byte of the candidate and say VALID or BAD. An
epoch is refuted only when every reported copy of some shard is BAD; it is accepted when every
rank has taken a VALID copy of its shard. The certificate of that is what lets a rank mutate
live state (the design, section 2, Recovery).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, TypeVar

import msgspec

from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster, bits
from handfast.core.messages import (
    Accepted,
    Bad,
    Branch,
    Certificate,
    Declined,
    Frozen,
    Report,
    RestoreCertificate,
    Valid,
    merkle_root,
)

T = TypeVar("T")

__all__ = [
    "APART",
    "Check",
    "Phase",
    "Recovery",
    "Rift",
    "Standing",
    "apart",
    "candidates",
    "certificate",
    "eligible",
    "extend",
    "join",
    "standing",
]

APART: Final = "copies of one run that went on apart"


class Phase(StrEnum):
    """Where a recovery stands."""

    FREEZING = "freezing"  # reports are missing
    CHECKING = "checking"  # copies of the candidate are being read
    READY = "ready"  # every shard has a valid copy; ranks may accept
    DECLINED = "declined"  # a rank can't take the candidate
    EXHAUSTED = "exhausted"  # no eligible epoch is left that every shard has
    RESTORED = "restored"  # every rank accepted


class Check(msgspec.Struct, frozen=True, array_like=True):
    """What was said of the copies of one epoch."""

    epoch: Epoch
    valid: int = 0
    bad: int = 0
    reasons: tuple[tuple[int, str], ...] = ()


class Recovery(msgspec.Struct, frozen=True, array_like=True):
    """What is held of one generation's recovery."""

    generation: int
    reports: tuple[Frozen | None, ...]
    checks: tuple[Check, ...] = ()
    accepted: tuple[Accepted | None, ...] = ()
    declined: tuple[Declined, ...] = ()

    @property
    def frozen(self) -> int:
        """Mask the members whose report is held."""
        return sum(1 << i for i, report in enumerate(self.reports) if report is not None)


class Standing(msgspec.Struct, frozen=True):
    """The phase, the candidate (None before there is one) and who is awaited.

    ``copies[s]`` masks the VALID copies of shard s.
    """

    phase: Phase
    epoch: Epoch | None = None
    waiting: int = 0
    copies: tuple[int, ...] = ()


def eligible(epoch: Epoch, timeline: Sequence[Branch]) -> bool:
    """Say whether an epoch lies on a timeline; all others are orphans of abandoned ones.

    Of the newest generation every epoch does; of an older one those up to the base that its
    successor resumed from. Without any restore certificate only genesis does.
    """
    cap: Epoch | None = None
    for branch in timeline:
        if epoch.generation == branch.generation:
            return cap is None or epoch <= cap
        cap = branch.base
    return epoch == GENESIS and (cap is None or cap == GENESIS)


def extend(timeline: Sequence[Branch], branch: Branch, floor: Epoch) -> tuple[Branch, ...]:
    """Begin a branch at its base, and drop what lies below ``floor``, which nobody retains."""
    older = [past for past in timeline if past.generation <= branch.base.generation]
    return (branch, *(past for past in older if past.generation >= floor.generation))


def timeline_of(reports: Sequence[Report]) -> tuple[Branch, ...]:
    """Take the chain of the highest restore certificate that any member reports."""
    held = [report.restored for report in reports if report.restored is not None]
    return max(held, key=lambda c: c.generation).timeline if held else ()


class Rift(msgspec.Struct, frozen=True):
    """A member that did not come the way that others came: since which generation, and how so."""

    member: int
    generation: int
    reason: str


def apart(roster: Roster, reports: Sequence[Report]) -> tuple[Rift, ...]:
    """Find what shows that the reports, one a member, are not of one history; nothing, if they are.

    In one history a generation begins once. So of the newest timeline whatever is no newer than a
    member's own certificate is on the member's timeline, too; and an epoch's certificate is of the
    very copies that are reported. Neither holds where a run was copied, both copies went on, and
    directories of both are put together.
    """
    held = {i: report.restored for i, report in enumerate(reports) if report.restored is not None}
    newest = max(held, key=lambda i: held[i].generation, default=0)
    rifts = []
    for i, own in held.items():
        begun = {branch.generation: branch for branch in own.timeline}
        past = [b for b in held[newest].timeline if b.generation <= own.generation]
        if other := [b.generation for b in past if not _same(begun.get(b.generation), b)]:
            how = f"did not begin generation {other[-1]} in the round of {roster.ids[newest]}"
            rifts.append(Rift(i, other[-1], f"{how}: {APART}"))
    return tuple(rifts) or _belied(roster, reports)


def _same(own: Branch | None, other: Branch) -> bool:
    """Compare two branches of a generation; a round that is not known may be any."""
    if own is None or own.base != other.base:
        return False
    return own.round == other.round or not (own.round and other.round)


def _belied(roster: Roster, reports: Sequence[Report]) -> tuple[Rift, ...]:
    """Find the certificates that the reported copies belie."""
    known = [(i, line) for i, report in enumerate(reports) for line in report.converged]
    lines = dict.fromkeys(line for _, line in known)
    roots = {line: _root(roster, reports, line) for line in lines}
    other = [(i, line.epoch) for i, line in known if roots[line] not in (None, line.root)]
    how = "holds a certificate of {} that is not of the copies reported: {}"
    return tuple(Rift(i, e.generation, how.format(e, APART)) for i, e in other)


def _root(roster: Roster, reports: Sequence[Report], line: Certificate) -> str | None:
    """Work out the root over the copies reported; None where it is not over exactly these."""
    if line.configuration != roster.digest:
        return None
    shards = roster.holders[roster.tiers.index(line.tier)]
    members = bits(sum(shards))
    digests = [_digest(reports[i], line.epoch) for i in members]
    if shards != tuple(1 << i for i in members) or None in digests:
        return None
    return merkle_root([f"{roster.ids[i]}={d}" for i, d in zip(members, digests, strict=True)])


def candidates(roster: Roster, reports: Sequence[Report], want: int | None) -> tuple[Epoch, ...]:
    """List the eligible epochs of which every shard has a reported copy, greatest first.

    None is one where the reports are not of one history.
    """
    if apart(roster, reports):
        return ()
    timeline = timeline_of(reports)
    held: dict[Epoch, int] = {}
    for i, report in enumerate(reports):
        for copy in report.retained:
            held[copy.epoch] = held.get(copy.epoch, 0) | 1 << i
    found = [
        epoch
        for epoch, mask in held.items()
        if (want is None or epoch.step == want)
        and all(mask & holders for holders in holders_of(roster))
        and eligible(epoch, timeline)
    ]
    return tuple(sorted(found, reverse=True))


def holders_of(roster: Roster) -> tuple[int, ...]:
    """Mask, for each shard, the domains that may hold it, in any tier."""
    shards = range(roster.configuration.shards)
    return tuple(sum(tier[shard] for tier in roster.holders) for shard in shards)


def begin(roster: Roster, generation: int) -> Recovery:
    """Open the recovery of a generation, with nothing held."""
    return Recovery(generation, (None,) * roster.size, (), (None,) * roster.configuration.shards)


def join(recovery: Recovery, fact: Frozen | Valid | Bad | Accepted | Declined) -> Recovery:
    """Join one fact of this generation; the same value, by identity, where it is not new."""
    if isinstance(fact, Frozen):
        if recovery.reports[fact.domain] is not None:
            return recovery
        return msgspec.structs.replace(recovery, reports=_put(recovery.reports, fact.domain, fact))
    if isinstance(fact, Accepted):
        if recovery.accepted[fact.shard] is not None:
            return recovery
        return msgspec.structs.replace(recovery, accepted=_put(recovery.accepted, fact.shard, fact))
    if isinstance(fact, Declined):
        if any(d.shard == fact.shard for d in recovery.declined):
            return recovery
        declined = tuple(sorted((*recovery.declined, fact), key=lambda d: d.shard))
        return msgspec.structs.replace(recovery, declined=declined)
    return _join_check(recovery, fact)


def _put(row: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*row[:at], value, *row[at + 1 :])


def _join_check(recovery: Recovery, fact: Valid | Bad) -> Recovery:
    check = check_of(recovery, fact.epoch)
    bit = 1 << fact.domain
    if (check.valid | check.bad) & bit:
        return recovery
    if isinstance(fact, Valid):
        check = Check(check.epoch, check.valid | bit, check.bad, check.reasons)
    else:
        reasons = tuple(sorted((*check.reasons, (fact.domain, fact.reason))))
        check = Check(check.epoch, check.valid, check.bad | bit, reasons)
    others = [held for held in recovery.checks if held.epoch != fact.epoch]
    checks = tuple(sorted((*others, check), key=lambda held: held.epoch))
    return msgspec.structs.replace(recovery, checks=checks)


def check_of(recovery: Recovery, epoch: Epoch) -> Check:
    """Find what was said of an epoch's copies, or an empty check."""
    return next((c for c in recovery.checks if c.epoch == epoch), Check(epoch))


def reported(recovery: Recovery, epoch: Epoch) -> int:
    """Mask the members that reported a copy of an epoch."""
    return sum(
        1 << i
        for i, frozen in enumerate(recovery.reports)
        if frozen is not None and any(copy.epoch == epoch for copy in frozen.report.retained)
    )


def standing(roster: Roster, recovery: Recovery) -> Standing:
    """Work out where the recovery stands: a function of the facts held, whatever their order."""
    missing = roster.everyone & ~recovery.frozen
    if missing:
        return Standing(Phase.FREEZING, waiting=missing)
    held = [frozen for frozen in recovery.reports if frozen is not None]
    if len({frozen.want for frozen in held}) > 1:
        return Standing(Phase.EXHAUSTED)  # no epoch is what all ask for
    for epoch in candidates(roster, [frozen.report for frozen in held], held[0].want):
        copies = reported(recovery, epoch)
        check = check_of(recovery, epoch)
        shards = holders_of(roster)
        if any(not (copies & holders & ~check.bad) for holders in shards):
            continue  # refuted: every reported copy of some shard is BAD
        valid = tuple(check.valid & holders for holders in shards)
        unproved = sum(
            holders & copies & ~check.bad
            for holders, good in zip(shards, valid, strict=True)
            if not good
        )
        return _judge(recovery, epoch, valid, unproved, roster)
    return Standing(Phase.EXHAUSTED)


def _judge(
    recovery: Recovery, epoch: Epoch, valid: tuple[int, ...], unproved: int, roster: Roster
) -> Standing:
    if unproved:
        return Standing(Phase.CHECKING, epoch, unproved, valid)
    if recovery.declined:
        by = sum(1 << roster.homes[declined.shard] for declined in recovery.declined)
        return Standing(Phase.DECLINED, epoch, by, valid)
    silent = [s for s, accepted in enumerate(recovery.accepted) if accepted is None]
    if silent:
        return Standing(Phase.READY, epoch, sum(1 << roster.homes[s] for s in silent), valid)
    return Standing(Phase.RESTORED, epoch, 0, valid)


def certificate(
    roster: Roster, recovery: Recovery, at: Standing, round_: str
) -> RestoreCertificate | None:
    """Write the restore certificate where every rank has accepted; else None. ``at`` is where the
    recovery stands.

    Acceptances are write-once, so every member that can write it writes the same one.
    """
    accepted = [a for a in recovery.accepted if a is not None]
    if at.phase is not Phase.RESTORED or at.epoch is None:
        return None
    reports = [frozen.report for frozen in recovery.reports if frozen is not None]
    old = timeline_of(reports)
    alive = [c.epoch for r in reports for c in r.retained if eligible(c.epoch, old)]
    digests = [_digest(reports[a.copy], at.epoch) for a in accepted]
    leaves = [f"{roster.ids[a.copy]}={d}" for a, d in zip(accepted, digests, strict=True)]
    return RestoreCertificate(
        run=roster.configuration.run,
        configuration=roster.digest,
        generation=recovery.generation,
        round=round_,
        base=at.epoch,
        timeline=extend(old, Branch(recovery.generation, at.epoch, round_), min(alive)),
        copies=tuple(a.copy for a in accepted),
        root=merkle_root(leaves),
    )


def _digest(report: Report, epoch: Epoch) -> str | None:
    return next((copy.digest for copy in report.retained if copy.epoch == epoch), None)


def blame(roster: Roster, recovery: Recovery) -> tuple[str, ...]:
    """Say why nothing newer could be restored: apart, asked for otherwise, lost, damaged."""
    lines = []
    held = [(roster.ids[i], frozen) for i, frozen in enumerate(recovery.reports) if frozen]
    if len(held) == roster.size:
        rifts = apart(roster, [frozen.report for _, frozen in held])
        lines += [f"{roster.ids[rift.member]} {rift.reason}" for rift in rifts]
    if len({frozen.want for _, frozen in held}) > 1:
        for name, frozen in held:
            step = "the newest step" if frozen.want is None else f"step {frozen.want}"
            lines.append(f"{name} asks for {step}")
    for name, frozen in held:
        lines += [f"{name}: {lost.epoch} {lost.reason}" for lost in frozen.report.lost]
    for check in recovery.checks:
        said = dict(check.reasons)
        lines += [f"{roster.ids[i]}: {check.epoch} {said.get(i, '')}" for i in bits(check.bad)]
    return tuple(lines)
