"""Versions of a fleet: the member of a checkpoint's protocol, over bundles in place of shards.

A *bundle* is what a fleet moves between: driver, fabric manager, firmware and libraries as one
content, which a digest names. A node holds its bootable bundles as a domain holds its epochs, so
nothing is decided here that :mod:`~handfast.core.member` does not decide for a training run: who
may say what, when all have said it, where a new generation begins, what may be forgotten. A plan
is a generation. All nodes freeze and report; the *base* is the newest bundle that all of them hold
and, booted once more, find good. Each node is a domain, and the only one of its shard, in one
order. Two epochs may follow the base, the two stable facts of a node:

- CONFIRMED(e, digest, incarnation), the vote on base + 1: this incarnation has booted the bundle
  that the plan aims at, and its probes say that it works. A new boot is a new incarnation, which
  has confirmed nothing.
- FLOOR(e), the vote on base + 2: no incarnation of this node acts below e. What lies below is
  released before that is said, durably and outside the slots, so it holds whichever of them the
  node wakes in. The certificate over it is *final*.

"Node n runs e" is no stable fact, since a fallback makes it false, and nothing is built on it. A
rollback is another generation with the same base; what was confirmed meanwhile is an orphan, and
its number is never used again. That a number means the same bundle everywhere is in the name of the
round, which ends in the bundle's digest: nodes that were told another one don't hear each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from handfast.core import events, member, recover
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Accepted, Copy, Record, Restored
from handfast.core.recover import Phase
from handfast.core.retain import Keep
from handfast.core.state import Member

__all__ = [
    "Event", "Finalise", "Node", "Proved", "Unfit", "acts", "aim", "boot", "bundle", "final",
    "must_stay", "round_name", "step", "wants",
]  # fmt: skip

CONFIRMED: Final = 1
FLOOR: Final = 2

_replace = msgspec.structs.replace


class Node(msgspec.Struct, frozen=True, gc=False):
    """A member, and the bundle that this incarnation has booted and probed: that is volatile.

    ``promised`` is the base that was accepted last, until a plan that begins from it is certified:
    the member forgets it where yet another plan begins.
    """

    member: Member
    proven: str = ""
    promised: Epoch | None = None


class Proved(msgspec.Struct, frozen=True, gc=False):
    """This incarnation runs this bundle, and its probes say that it works."""

    digest: str


class Unfit(msgspec.Struct, frozen=True, gc=False):
    """This bundle can't be installed or booted here, or its probes fail: it is given up."""

    digest: str
    reason: str


class Finalise(msgspec.Struct, frozen=True, gc=False):
    """An operator has approved the bundle: no way leads back below it."""

    digest: str


Event = events.Event | Proved | Unfit | Finalise


# --- what can be said of a node -----------------------------------------------------------------


def round_name(nonce: str, digest: str) -> str:
    """Name the round of a plan by the bundle that it aims at; by none where it only goes back.

    Raises ValueError for a digest with a colon or an at sign, which part names.
    """
    if ":" in digest or "@" in digest:
        raise ValueError(f"{digest!r}: name a bundle by its digest alone, without ':' and '@'")
    return f"{nonce}:{digest}"


def bundle(copy: Copy) -> str:
    """Give the digest of the bundle that a copy is of, without the incarnation of its vote."""
    return copy.digest.partition("@")[0]


def aim(at: Member) -> str:
    """Give what the plan aims at, once its base is certified; "" where it only goes back."""
    return at.round.rpartition(":")[2] if at.open else ""


def wants(node: Node) -> str:
    """Give the bundle that the host must boot and probe before this node can say more; else "".

    If it is in no slot it is to be installed first, over none of those that :func:`must_stay`.
    """
    wanted = _wanted(node.member)
    return wanted if wanted != node.proven else ""


def acts(node: Node) -> Copy | None:
    """Give the copy that this incarnation may act under; None where it may under none.

    It is what this incarnation has proven, of the base or what followed it in the newest plan whose
    base is certified. Who has promised to begin from another base acts under that one alone: the
    plan may be certified elsewhere, and then that is all that others act under, and what follows.
    """
    at = node.member
    if at.restored is None or not node.proven:
        return None
    base = at.restored.base
    allowed = [base, *(Epoch(at.restored.generation, base.step + n) for n in (CONFIRMED, FLOOR))]
    if node.promised is not None:
        allowed = [node.promised]
    held = [copy for copy in at.retained if copy.epoch in allowed and bundle(copy) == node.proven]
    return held[-1] if held else None


def final(at: Member) -> bool:
    """Say whether all nodes have said that none acts below what the plan aims at."""
    return at.open and _line(at) == _epoch(at, FLOOR)


def must_stay(at: Member, digest: str) -> bool:
    """Say whether a bundle's slot may not be overwritten: what is held and is no orphan, and where
    the base was given up, all, until that is final.
    """
    timeline = at.restored.timeline if at.open and at.restored is not None else None
    held = [c for c in at.retained if timeline is None or recover.eligible(c.epoch, timeline)]
    given_up = at.open and _given_up(at) and not final(at)
    return digest != "" and (given_up or digest in map(bundle, held))


# --- the step -----------------------------------------------------------------------------------


def boot(node_id: str, incarnation: int, records: Sequence[Record]) -> Node:
    """Rebuild a node from its journal; what it runs has still to be proven."""
    return Node(member.boot(node_id, incarnation, records), promised=_promised(None, records))


def _promised(before: Epoch | None, records: Sequence[Record]) -> Epoch | None:
    for record in records:
        if isinstance(record, Accepted | Restored):
            before = record.epoch if isinstance(record, Accepted) else None
    return before


def step(node: Node, event: Event) -> tuple[Node, events.Effects]:
    """Take one event. Pure: the same node and event always give the same result.

    Of the actions, Persist, Check, Propose and Release ask nothing of a host: see :func:`wants`.
    """
    told: tuple[events.Event, ...] = ()
    done = events.Effects()
    match event:
        case Proved(digest=digest):
            node = _replace(node, proven=digest)
            told = _follows(node)
        case Unfit():
            told = _unfit(node.member, event)
        case Finalise():
            why = _unready(node, event.digest)
            told = () if why else (events.Pinned(()),)
            done = events.Effects(apply=(events.Reject(why),)) if why else done
        case events.Begin():
            told = (_replace(event, window=1, keep=Keep(1)),)
        case _:
            told = (event,)
    while told:
        for each in told:
            at, effects = member.step(node.member, each)
            # Without a word on pins nothing is released, whatever any node skips.
            promised = _promised(node.promised, effects.persist)
            node = _replace(node, member=_replace(at, pinned=None), promised=promised)
            done = events.Effects(
                done.persist + effects.persist, done.send + effects.send, done.apply + effects.apply
            )
        told = _follows(node)
    return node, done


def _epoch(at: Member, fact: int) -> Epoch:
    """Number an epoch of the plan."""
    if at.restored is None:
        raise ValueError(f"{at.id} has no base")
    return Epoch(at.generation, at.restored.base.step + fact)


def _wanted(at: Member) -> str:
    """Give the bundle that has to be proven next, whether it is or not; "" where nothing is."""
    if at.recovery is not None and at.roster is not None:
        standing = recover.standing(at.roster, at.recovery)
        own = _copy(at, standing.epoch)
        done = at.recovery.accepted[at.me] is not None
        return bundle(own) if own is not None and not done else ""
    skipped = _voted(at, CONFIRMED) and _copy(at, _epoch(at, CONFIRMED)) is None
    return "" if skipped else aim(at)


def _follows(node: Node) -> tuple[events.Event, ...]:
    """Give what the member is to hear next, of what this incarnation has proven."""
    at = node.member
    if at.recovery is not None and at.roster is not None:
        standing = recover.standing(at.roster, at.recovery)
        epoch, ready = standing.epoch, standing.phase is Phase.READY
        if epoch is None or (epoch != GENESIS and _wanted(at) != node.proven):
            return ()
        if at.checking == epoch:
            return (events.Checked(at.generation, epoch),)
        if ready and at.recovery.accepted[at.me] is None:
            return (events.Accept(at.generation, epoch, at.me),)
    elif at.open and node.proven and _wanted(at) == node.proven:
        if not _voted(at, CONFIRMED):
            return _vote(at, CONFIRMED, f"{node.proven}@{at.incarnation}")
        if _given_up(at) and not _voted(at, FLOOR):
            return _vote(at, FLOOR, node.proven)
    return ()


def _vote(at: Member, fact: int, digest: str) -> tuple[events.Event, ...]:
    epoch = _epoch(at, fact)
    return events.Captured(epoch), events.Persisted(epoch, digest)


def _unfit(at: Member, event: Unfit) -> tuple[events.Event, ...]:
    """Say of the bundle that is wanted now that this node can't have it; of another, nothing."""
    if _wanted(at) != event.digest:
        return ()
    if at.recovery is not None and at.checking is not None:
        return (events.Checked(at.generation, at.checking, event.reason),)
    if at.recovery is not None and at.roster is not None:
        standing = recover.standing(at.roster, at.recovery)
        return (events.Decline(at.generation, standing.epoch or GENESIS, event.reason),)
    epoch = _epoch(at, CONFIRMED)
    if _voted(at, CONFIRMED):
        return ()  # nothing is left to go back to: it has to be made fit
    return events.Captured(epoch), events.Failed(epoch, event.reason)


def _unready(node: Node, digest: str) -> str:
    """Say why the base may not be given up: only who runs what all have confirmed does."""
    at = node.member
    if not digest or aim(at) != digest or _line(at) != _epoch(at, CONFIRMED):
        return f"{digest} is not confirmed by all"
    return "" if node.proven == digest else f"this incarnation of {at.id} has not proved {digest}"


def _line(at: Member) -> Epoch | None:
    line = at.tallies[0].line
    return line.epoch if line is not None else None


def _voted(at: Member, fact: int) -> bool:
    """Say whether the own vote was cast, by this incarnation or one before it."""
    if not at.open:
        return False
    epoch, mine, line = _epoch(at, fact), 1 << at.me, _line(at)
    said = any((b.staged | b.skipped) & mine for b in at.tallies[0].ballots if b.epoch == epoch)
    return said or (line is not None and line >= epoch)


def _given_up(at: Member) -> bool:
    """Say whether the base was released; one that was only lost may be found again."""
    base = at.restored.base if at.restored is not None else None
    return _copy(at, base) is None and all(lost.epoch != base for lost in at.lost)


def _copy(at: Member, epoch: Epoch | None) -> Copy | None:
    return next((copy for copy in at.retained if copy.epoch == epoch), None)
