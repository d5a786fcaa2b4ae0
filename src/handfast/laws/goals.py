"""What must happen sometimes: goals that a search or a storm must reach, or it has shown little."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from handfast.core import converge, events, messages
from handfast.core.lattice import Epoch
from handfast.core.recover import Phase, eligible
from handfast.core.state import Member
from handfast.laws.truth import Turn

__all__ = ["SOMETIMES", "reached"]

SOMETIMES: Final = (
    "an epoch converges", "a certificate is learnt", "a recovery descends below a bad copy",
    "a bad copy is outlived by a valid one", "a timeline is abandoned", "an orphan is released",
    "a void epoch is released", "a window blocks and names", "a skip is voted",
    "a member boots in the middle of a recovery", "a stale message is refused",
    "a round is overtaken", "a rank declines", "nothing is left to restore",
    "a changed configuration resumes",
)  # fmt: skip


def reached(turn: Turn) -> Iterator[str]:
    """Name the goals that a step reached."""
    heard = isinstance(turn.event, events.Received)
    for record in turn.effects.persist:
        match record:
            case messages.Converged():
                yield "a certificate is learnt" if heard else "an epoch converges"
            case messages.Skipped():
                yield "a skip is voted"
            case messages.Restored(certificate=c):
                yield from _resumed(turn, c)
            case messages.Released(epochs=epochs):
                chain = turn.after.restored.timeline if turn.after.restored is not None else ()
                if any(not eligible(epoch, chain) for epoch in epochs):
                    yield "an orphan is released"
                if {*_void(turn.before), *_void(turn.after)} & set(epochs):
                    yield "a void epoch is released"
    yield from filter(None, map(_told, turn.effects.apply))
    if heard and any(isinstance(action, events.Reject) for action in turn.effects.apply):
        yield "a stale message is refused"
    if turn.first and turn.before.recovery is not None and turn.before.incarnation > 1:
        yield "a member boots in the middle of a recovery"


def _void(member: Member) -> tuple[Epoch, ...]:
    return converge.void(member.roster, member.tallies) if member.roster is not None else ()


def _resumed(turn: Turn, c: messages.RestoreCertificate) -> Iterator[str]:
    before = turn.before
    judged = before.recovery.checks if before.recovery is not None else ()
    bad = [check.epoch for check in judged if check.bad]
    if any(epoch > c.base for epoch in bad):
        yield "a recovery descends below a bad copy"
    if c.base in bad:
        yield "a bad copy is outlived by a valid one"
    if any(tally.line.epoch > c.base for tally in before.tallies if tally.line is not None):
        yield "a timeline is abandoned"
    if before.restored is not None and before.restored.configuration != c.configuration:
        yield "a changed configuration resumes"


def _told(action: events.Action) -> str:
    match action:
        case events.Refuse(by=by) if by:
            return "a window blocks and names"
        case events.Overtaken():
            return "a round is overtaken"
        case events.Stuck(phase=Phase.DECLINED):
            return "a rank declines"
        case events.Stuck():
            return "nothing is left to restore"
        case _:
            return ""
