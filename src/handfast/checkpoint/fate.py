"""What became of an epoch, as far as this rank's domain knows: functions of one snapshot."""

from __future__ import annotations

from handfast.agent.snapshot import FORGONE, INVALID, UNLIKE, Snapshot
from handfast.core.lattice import Epoch
from handfast.core.recover import eligible

__all__ = [
    "attested", "converged", "failures", "persisted", "phase", "problems", "refusals", "settled",
    "unwritten",
]  # fmt: skip


def converged(now: Snapshot, epoch: Epoch) -> bool:
    """Say whether an epoch, or a later one of the same timeline, is known converged.

    That a later epoch has converged says nothing of one that its timeline has left behind, nor of
    one that failed here or was skipped.
    """
    if now.line is None or now.line.epoch < epoch:
        return False
    if now.line.epoch == epoch:
        return True
    if any(epoch == lost for lost, _, _ in unwritten(now)):
        return False
    if now.line.epoch.generation == epoch.generation:
        return True
    return now.resumed is not None and eligible(epoch, now.resumed.timeline)


def attested(now: Snapshot, epoch: Epoch) -> bool:
    """Say whether this domain is known to have attested an epoch, of which it may be the only one.

    Of what was released long ago no snapshot says so any more.
    """
    kept = any(outcome.epoch == epoch and not outcome.problem for outcome in now.outcomes)
    return kept or epoch in now.retained


def persisted(now: Snapshot, epoch: Epoch) -> bool:
    """Say whether this domain has attested an epoch, released since or not."""
    return attested(now, epoch) or converged(now, epoch)


def problems(now: Snapshot, epoch: Epoch) -> list[str]:
    """List what keeps an epoch from converging: a failure here, votes SKIP, another timeline."""
    own = [o.problem for o in now.outcomes if o.epoch == epoch and o.problem]
    if own:
        return own
    if skipped := [f"{s.domain}: {s.reason}" for s in now.skipped if s.epoch == epoch]:
        return skipped
    return _abandoned(now, epoch)


def _abandoned(now: Snapshot, epoch: Epoch) -> list[str]:
    began = now.resumed
    if began is None or epoch.generation >= began.generation or eligible(epoch, began.timeline):
        return []
    return [f"abandoned: generation {began.generation} resumed from {began.base}"]


def settled(now: Snapshot, epoch: Epoch) -> bool:
    """Say whether this domain is done with an epoch: attested it, failed, or left it behind.

    What others have voted does not end what is still being persisted here. An own vote SKIP does,
    also where the agent that cast it died before it told an outcome.
    """
    said = any(outcome.epoch == epoch for outcome in now.outcomes)
    skipped = any(skip.epoch == epoch and skip.domain == now.domain for skip in now.skipped)
    return said or skipped or persisted(now, epoch) or bool(_abandoned(now, epoch))


def phase(now: Snapshot, epoch: Epoch) -> str:
    """Say how far an epoch has come: staged, persisted, converged, or failed."""
    if converged(now, epoch):
        return "converged"
    if problems(now, epoch):
        return "failed"
    return "persisted" if persisted(now, epoch) else "staged"


def failures(now: Snapshot) -> list[tuple[Epoch, str]]:
    """List what a snapshot knows of saves that failed, this rank's own first.

    That a rank has left an epoch out, as its policy ``busy`` says, is no failure, nor what heals by
    itself, nor what validators refused.
    """
    mild = (FORGONE, UNLIKE, INVALID)
    return [(epoch, why) for epoch, reason, why in unwritten(now) if not reason.startswith(mild)]


def refusals(now: Snapshot) -> list[tuple[Epoch, str]]:
    """List the epochs that a validator refused, here or at another rank."""
    return [(epoch, why) for epoch, reason, why in unwritten(now) if reason.startswith(INVALID)]


def unwritten(now: Snapshot) -> list[tuple[Epoch, str, str]]:
    """List saves that came to nothing: the reason, and the same with who says so."""
    own = [(o.epoch, o.problem, o.problem) for o in now.outcomes if o.problem]
    said = {epoch for epoch, _, _ in own}
    others = [
        (skip.epoch, skip.reason, f"{skip.domain}: {skip.reason}")
        for skip in now.skipped
        if not (skip.domain == now.domain and skip.epoch in said)
    ]
    return own + others
