"""What always holds of one step of one member: its event, and what it did about it.

These laws read nothing of the others, so that they are held after every step, whoever took it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from handfast.core import events, messages
from handfast.core.converge import STRANDED, Ballot, Tally
from handfast.core.fold import roster_of
from handfast.core.lattice import Epoch
from handfast.core.recover import Phase, standing
from handfast.core.state import Member
from handfast.laws.truth import Law, Truth, Turn

__all__ = ["OF_A_STEP"]


def s5_skips_are_ones_own(truth: Truth) -> Iterator[str]:
    """A SKIP follows from one's own save; not being scheduled is no vote (design, section 2)."""
    turn = truth.turn
    for skip in turn.effects.persist if turn else ():
        if isinstance(skip, messages.Skipped) and turn:
            cause = turn.event
            own = isinstance(cause, events.Failed | events.Forgone) and cause.epoch == skip.epoch
            if not own:
                yield f"{turn.before.id} skipped {skip.epoch} on {type(cause).__name__}"


def s5_nothing_is_saved_twice(truth: Truth) -> Iterator[str]:
    """What is to be persisted lies above all that was voted on, or is being persisted, here; and
    its step above what was restored."""
    for turn, epoch in _taken(truth):
        m = turn.before
        voted = [b.epoch for b in _own(m).ballots if (b.staged | b.skipped) >> m.me & 1]
        said = (*m.persisting, *voted, *(copy.epoch for copy in m.retained))
        if late := [e for e in said if e.generation == epoch.generation and e >= epoch]:
            yield f"{m.id} persists {epoch}, and {max(late)} was saved before"
        if m.restored is not None and epoch.step <= m.restored.base.step:
            yield f"{m.id} persists {epoch}, and {m.restored.base} was restored"


def l6_no_more_is_saved_than_the_window(truth: Truth) -> Iterator[str]:
    """At most W epochs are being persisted here, or voted on and may yet converge."""
    for turn, epoch in _taken(truth):
        m, tally = turn.after, _own(turn.after)
        held = _held(m, tally)
        open_ = [b for b in held if not _passed(tally, b, range(roster_of(m).size))]
        if len(open_) + len(m.persisting) > m.window:
            yield f"{m.id} persists {epoch}, and {len(open_)} are open in a window of {m.window}"
        if len(held) >= STRANDED * m.window:
            yield f"{m.id} persists {epoch}, and {len(held)} lie there that others have passed by"


def l6_a_certificate_is_learnt_once(truth: Truth) -> Iterator[str]:
    """Each certificate that is written raises its tier's line: a journal grows by what is new.

    What a restore brought the line down to is no line that was known before.
    """
    turn = truth.turn
    said = turn.effects.persist if turn else ()
    restored = any(isinstance(record, messages.Restored) for record in said)
    for record in () if restored else said:
        if isinstance(record, messages.Converged) and turn and turn.before.roster:
            tier = turn.before.roster.tiers.index(record.certificate.tier)
            line = turn.before.tallies[tier].line
            if line is not None and line.epoch >= record.certificate.epoch:
                yield f"{turn.before.id} wrote {record.certificate.epoch}, and knew {line.epoch}"


def s10_stale_is_refused(truth: Truth) -> Iterator[str]:
    """What is of another generation, round, configuration or a past incarnation changes nothing."""
    turn = truth.turn
    if turn is not None and isinstance(turn.event, events.Received) and turn.before.roster:
        m, old, new = turn.event.message, turn.before, turn.after
        here = (old.generation, old.round, turn.before.roster.digest)
        past = m.sender != old.me and m.incarnation < old.peers[m.sender].incarnation
        if (past or (m.generation, m.round, m.configuration) != here) and not turn.first:
            then, now = (
                [(i, p.incarnation, p.knows) for i, p in k.peers.heard] for k in (old, new)
            )
            if then != now or turn.effects.persist:
                yield f"{old.id} took {m.generation}/{m.incarnation} from member {m.sender}"


def s15_time_changes_nothing(truth: Truth) -> Iterator[str]:
    """A tick, early or late, only sends."""
    turn = truth.turn
    if turn is None or turn.first or not isinstance(turn.event, events.Tick):
        return
    if turn.effects.persist or turn.effects.apply:
        yield f"a tick made {turn.before.id} do {turn.effects}"


def l4_refusals_are_true(truth: Truth) -> Iterator[str]:
    """A save is refused for the window only while as many epochs may yet converge, by name; and
    one that was forgone is never refused for it: the others would wait.
    """
    turn = truth.turn
    for action in turn.effects.apply if turn else ():
        if isinstance(action, events.Refuse) and action.by and turn and turn.after.roster:
            m, tally = turn.after, _own(turn.after)
            blamed = [i for i, name in enumerate(turn.after.roster.ids) if name in action.by]
            held = _held(m, tally)
            open_ = [b for b in held if not _passed(tally, b, blamed)]
            full = len(open_) + len(m.persisting) >= m.window
            if not full and len(held) < STRANDED * m.window:
                yield f"{m.id} refused {action.epoch}, and {len(open_)} epochs are open"
            if isinstance(turn.event, events.Forgone):
                yield f"{m.id} refused a SKIP on {action.epoch}: the window is full"


def l4_whoever_begins_is_told(truth: Truth) -> Iterator[str]:
    """A trainer that begins, or begins again, hears at once what there is to do or to say."""
    turn = truth.turn
    if turn is None or turn.cut or not isinstance(turn.event, events.Begin):
        return
    m, begun = turn.after, turn.event
    if (m.generation, m.round) != (begun.generation, begun.round) or m.roster is None:
        return
    held = m.recovery
    due = events.Resume if held is None else _DUE.get(standing(m.roster, held).phase)
    if due is not None and not any(isinstance(action, due) for action in turn.effects.apply):
        yield f"{m.id} began {begun.round}, and was told {turn.effects.apply}"


def l4_whoever_is_overtaken_is_told(truth: Truth) -> Iterator[str]:
    """Whoever begins a round that is past, or is in one that others are beyond, is told."""
    turn = truth.turn
    if turn is None or turn.cut:
        return
    m, event, due = turn.before, turn.event, 0
    if isinstance(event, events.Begin) and event.generation <= m.generation:
        taken = (turn.after.generation, turn.after.round) == (event.generation, event.round)
        due = 0 if taken else m.generation
    elif isinstance(event, events.Received) and m.roster is not None:
        due = event.message.generation if event.message.generation > m.generation else 0
    if due and events.Overtaken(due) not in turn.effects.apply:
        yield f"{m.id} is overtaken by generation {due}, and nobody is told"


def _taken(truth: Truth) -> Iterator[tuple[Turn, Epoch]]:
    """Find what a step has asked the disk to persist."""
    turn = truth.turn
    for action in turn.effects.apply if turn else ():
        if isinstance(action, events.Persist) and turn:
            yield turn, action.epoch


def _own(member: Member) -> Tally:
    return member.tallies[roster_of(member).tier_of[member.me]]


def _held(member: Member, tally: Tally) -> list[Ballot]:
    """List what was voted on here, has not converged, and that nobody is known to have skipped."""
    return [b for b in tally.ballots if b.staged >> member.me & 1 and not b.skipped]


def _passed(tally: Tally, ballot: Ballot, domains: Iterable[int]) -> bool:
    """Say whether one of these domains has staged a later epoch, and not this one."""
    return any(
        later.staged >> i & 1 and not ballot.staged >> i & 1
        for later in tally.ballots
        if later.epoch > ballot.epoch
        for i in domains
    )


_DUE: Final[Mapping[Phase, type[events.Action]]] = {
    Phase.READY: events.Propose, Phase.DECLINED: events.Stuck, Phase.EXHAUSTED: events.Stuck,
}  # fmt: skip

OF_A_STEP: Final[tuple[Law, ...]] = (
    s10_stale_is_refused, s15_time_changes_nothing, s5_skips_are_ones_own,
    s5_nothing_is_saved_twice, l4_refusals_are_true, l4_whoever_begins_is_told,
    l4_whoever_is_overtaken_is_told,
    l6_no_more_is_saved_than_the_window, l6_a_certificate_is_learnt_once,
)  # fmt: skip
