"""One member: ``step(state, event) -> (state, effects)``, the only door of the core.

A member is one domain's voice. The sub-machines are elsewhere and can be checked alone:
:mod:`~handfast.core.converge` (one tier), :mod:`~handfast.core.recover` (one generation),
:mod:`~handfast.core.retain` (release), :mod:`~handfast.core.membership` (who takes part),
:mod:`~handfast.core.gossip` (who lacks what). Here they are put together.

Effects come as one batch in a fixed order: **persist** (append and sync), then **send**, then
**apply**. What is sent are the very records that were persisted, so that speaking before writing
can't be expressed (compare raft's ``Ready``, which leaves that order to its caller).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from handfast.core import converge, events, gossip, recover
from handfast.core.fold import boot, fold, placed
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster, bits, succession
from handfast.core.messages import (
    Accepted,
    Bad,
    Configured,
    Converged,
    Declined,
    Fact,
    Frozen,
    Message,
    Record,
    Released,
    Report,
    RestoreCertificate,
    Restored,
    Rolled,
    Skipped,
    Staged,
    Valid,
)
from handfast.core.recover import Phase
from handfast.core.retain import releasable
from handfast.core.state import Member, Peer, Peers

__all__ = ["boot", "step"]

_replace = msgspec.structs.replace


class _Turn(msgspec.Struct, eq=False, gc=False):
    """What one step has come to so far.

    ``news`` are facts of this member's own, for all neighbours; ``answers`` are the peers that
    get whatever they seem to lack; ``hello`` those that are asked for what this member lacks.
    ``anew``: more is changed than a vote STAGED can change.
    """

    before: Member
    state: Member
    persist: tuple[Record, ...] = ()
    news: tuple[Fact, ...] = ()
    actions: tuple[events.Action, ...] = ()
    answers: int = 0
    hello: int = 0
    anew: bool = False

    def set(self, **changes: Any) -> None:
        """Change what is volatile."""
        self.state = _replace(self.state, **changes)

    def write(self, record: Record) -> None:
        """Change what is durable: by a record, and in no other way."""
        self.persist += (record,)
        self.state = fold(self.state, record)

    def say(self, fact: Frozen | Staged | Skipped | Valid | Bad | Accepted | Restored) -> None:
        """Write an own fact, and tell it; what goes up a tree is told as it is rolled up."""
        self.write(fact)
        self.anew = self.anew or type(fact) is not Staged
        if type(fact) is not Staged or self.state.roster is None or not self.state.roster.tree:
            self.news += (fact,)

    def do(self, action: events.Action) -> None:
        self.actions += (action,)


def step(state: Member, event: events.Event) -> tuple[Member, events.Effects]:
    """Take one event. Pure: the same state and event always give the same result.

    Raises ``KeyError`` for a value that is no event.
    """
    turn = _Turn(state, state)
    _HANDLERS[type(event)](turn, event)
    if turn.state.roster is not None:
        _conclude(turn, turn.state.roster)
    sends = _sends(turn)
    return turn.state, events.Effects(turn.persist, sends, turn.actions)


# --- what the trainer and its round ask ---------------------------------------------------------


def _begin(turn: _Turn, event: events.Begin) -> None:
    state = turn.state
    again = (event.generation, event.round) == (state.generation, state.round)
    if event.generation <= state.generation and not again:
        turn.do(events.Overtaken(state.generation))
        return
    if not again and not _freeze(turn, event):
        return
    turn.set(keep=event.keep, window=event.window, told=None, checking=None)
    turn.anew = True
    if turn.state.open and turn.state.restored is not None:
        turn.do(events.Resume(turn.state.restored))
    turn.answers = turn.hello = sum(1 << i for i in event.roster.neighbours[turn.state.me])


def _freeze(turn: _Turn, event: events.Begin) -> bool:
    state, roster = turn.state, event.roster
    known = state.roster.configuration if state.roster is not None else None
    why = succession(known, roster.configuration, event.changes)
    me = roster.index(state.id)
    if me is None:
        why = f"{state.id} is no member of configuration {roster.digest[:8]}: it was fenced"
    if why is not None or me is None:
        turn.do(events.Stuck(Phase.DECLINED, None, (why or "",)))
        return False
    lines = tuple(tally.line for tally in state.tallies if tally.line is not None)
    if state.roster != roster:
        founding, brought = (state.founding, ()) if known else (event.founding, event.brought)
        turn.write(Configured(roster.configuration, founding, brought))
    state = turn.state
    report = Report(state.retained, state.lost, state.restored, lines)
    turn.say(
        Frozen(me, state.incarnation, event.generation, event.round, roster.digest, report,
               event.want)
    )  # fmt: skip
    return True


def _accept(turn: _Turn, event: events.Accept) -> None:
    state = turn.state
    at = _standing(state, event.generation)
    if state.roster is None or at is None or at.phase is not Phase.READY or at.epoch != event.epoch:
        turn.do(events.Reject(f"{event.epoch} is not the candidate of this recovery"))
        return
    shard = state.roster.configuration.domains[state.me].shard
    if state.roster.homes[shard] != state.me or not at.copies[shard] >> event.copy & 1:
        turn.do(events.Reject(f"{state.id} can't accept copy {event.copy} of shard {shard}"))
        return
    if state.recovery is not None and state.recovery.accepted[shard] is None:
        turn.say(Accepted(shard, event.generation, event.epoch, event.copy))


def _decline(turn: _Turn, event: events.Decline) -> None:
    """Tell the others that this rank can't: no promise is made, so nothing is written."""
    state = turn.state
    if _standing(state, event.generation) is None or state.roster is None:
        return
    shard = state.roster.configuration.domains[state.me].shard
    fact = Declined(shard, event.generation, event.epoch, event.reason)
    turn.set(recovery=state.recovery and recover.join(state.recovery, fact))
    turn.news += (fact,)


def _standing(state: Member, generation: int) -> recover.Standing | None:
    if state.recovery is None or state.roster is None or generation != state.generation:
        return None
    return recover.standing(state.roster, state.recovery)


def _captured(turn: _Turn, event: events.Captured) -> None:
    why, by = _unfit(turn.state, event.epoch)
    if why:
        turn.do(events.Refuse(event.epoch, why, by))
        return
    persisting = (*turn.state.persisting, event.epoch)
    turn.state = _replace(turn.state, persisting=persisting, last=event.epoch)
    turn.do(events.Persist(event.epoch))


def _unfit(state: Member, epoch: Epoch) -> tuple[str, tuple[str, ...]]:
    """Say why an image can't be taken, and who is in the way."""
    if not state.open or state.restored is None or state.roster is None:
        return "this generation holds no restore certificate: restore first", ()
    if epoch.generation != state.generation:
        return f"generation {state.generation} is the present one", ()
    floor = max(state.restored.base.step, state.last.step if state.last is not None else 0)
    if epoch.step <= floor:
        return f"step {floor} was saved or restored before it", ()
    tier = state.roster.tier_of[state.me]
    mine = 1 << state.me
    tally = state.tallies[tier]
    staged = [b for b in tally.ballots if b.staged & mine and not b.skips]
    pending = [b for b in staged if converge.awaited(state.roster, tier, tally, b)]
    if len(pending) + len(state.persisting) < state.window:
        if len(staged) < converge.STRANDED * state.window:
            return "", ()
        late = converge.waiting(state.roster, tier, staged[0])
        why = f"{len(staged)} epochs are saved that others have passed by: do all ranks save alike?"
        return why, state.roster.names(late)
    late = converge.waiting(state.roster, tier, pending[0]) if pending else mine
    return f"{state.window} epochs are saved and have not converged", state.roster.names(late)


# --- what the store says ------------------------------------------------------------------------


def _persisted(turn: _Turn, event: events.Persisted) -> None:
    """Vote. What is not being persisted any more belongs to a generation that was frozen."""
    if event.epoch in turn.state.persisting:
        turn.say(Staged(turn.state.me, event.epoch, event.digest))


def _failed(turn: _Turn, event: events.Failed) -> None:
    if event.epoch in turn.state.persisting:
        turn.say(Skipped(turn.state.me, event.epoch, event.reason))


def _forgone(turn: _Turn, event: events.Forgone) -> None:
    """Vote SKIP on an epoch that was never captured, so that nobody waits for it."""
    why, by = _unfit(turn.state, event.epoch)
    if why and not by:
        turn.do(events.Refuse(event.epoch, why))
    else:
        turn.say(Skipped(turn.state.me, event.epoch, event.reason))


def _checked(turn: _Turn, event: events.Checked) -> None:
    state = turn.state
    if event.generation != state.generation or event.epoch != state.checking:
        return
    if event.reason:
        turn.say(Bad(state.me, event.generation, event.epoch, event.reason))
    else:
        turn.say(Valid(state.me, event.generation, event.epoch))


def _pinned(turn: _Turn, event: events.Pinned) -> None:
    turn.set(pinned=event.epochs)
    turn.anew = True


# --- what peers say -----------------------------------------------------------------------------


def _received(turn: _Turn, event: events.Received) -> None:
    state, message, roster = turn.state, event.message, turn.state.roster
    if roster is None:
        return
    sender, known = message.sender, message.knows
    peer = state.peers[sender]
    if not _admitted(turn, roster, message, peer):
        return
    fresh = message.incarnation > peer.incarnation
    if fresh or message.hello:
        turn.answers |= 1 << sender
    else:
        known = gossip.merge(peer.knows, known)
    facts = message.facts + message.rolled
    heard = Peer(message.incarnation, known, bool(facts) or (peer.owed and not fresh))
    turn.state = _replace(state, peers=state.peers.put(sender, heard))
    for fact in facts:
        _LEARN[type(fact)](turn, roster, fact)


def _admitted(turn: _Turn, roster: Roster, message: Message, peer: Peer) -> bool:
    """Refuse what is of another configuration, generation, round or incarnation (S10, S13)."""
    state, why = turn.state, ""
    if message.generation > state.generation:
        turn.do(events.Overtaken(message.generation))
        return False
    if not 0 <= message.sender < roster.size or message.sender == state.me:
        why = f"no member sent it: {message.sender}"
    elif message.generation < state.generation:
        turn.answers |= 1 << message.sender
        why = f"generation {message.generation} is past: {state.generation}"
    elif message.configuration != roster.digest:
        why = f"of configuration {message.configuration[:8]}, not {roster.digest[:8]}"
    elif message.round != state.round:
        why = f"another round of generation {state.generation}"
    elif message.incarnation < peer.incarnation:
        why = f"incarnation {message.incarnation} of {roster.ids[message.sender]} is past"
    if why:
        turn.do(events.Reject(why))
    return not why


def _learn(turn: _Turn, roster: Roster, fact: Frozen | Valid | Bad | Accepted | Declined) -> None:
    """Join one fact of a recovery; what a member says of itself it knows from its own journal, but
    that its rank has declined: a crash forgets that."""
    recovery = turn.state.recovery
    if recovery is None or fact.generation != turn.state.generation:
        return
    if isinstance(fact, Accepted | Declined):
        at, places = fact.shard, roster.configuration.shards
    else:
        at, places = fact.domain, roster.size
    if not 0 <= at < places:
        turn.do(events.Reject("a fact of no member"))
    elif isinstance(fact, Declined) or not turn.state.own(fact):
        turn.set(recovery=recover.join(recovery, fact))


def _learn_vote(turn: _Turn, roster: Roster, vote: Staged | Skipped | Rolled) -> None:
    state = turn.state
    if vote.epoch.generation != state.generation or not converge.sound(roster, vote):
        turn.do(events.Reject(f"a vote on {vote.epoch} in generation {state.generation}"))
        return
    tier = roster.tier_of[vote.first if type(vote) is Rolled else vote.domain]
    try:
        tally = converge.join(roster, state.tallies[tier], vote, state.me)
    except converge.Conflict as conflict:
        turn.do(events.Reject(str(conflict)))
    else:
        if tally is not state.tallies[tier]:
            turn.anew = turn.anew or type(vote) is Skipped
            turn.state = _replace(state, tallies=placed(state.tallies, tier, tally))


def _learn_restored(turn: _Turn, roster: Roster, fact: Restored) -> None:
    state, certificate = turn.state, fact.certificate
    named = (certificate.generation, certificate.round, certificate.configuration)
    if named != (state.generation, state.round, roster.digest):
        turn.do(events.Reject(f"a restore certificate of generation {certificate.generation}"))
    elif not state.open:
        _resume(turn, certificate)


def _learn_converged(turn: _Turn, roster: Roster, fact: Converged) -> None:
    state, certificate = turn.state, fact.certificate
    if certificate.configuration != roster.digest or certificate.tier not in roster.tiers:
        turn.do(events.Reject(f"a certificate of configuration {certificate.configuration[:8]}"))
    elif state.open and state.restored is not None:
        line = state.tallies[roster.tiers.index(certificate.tier)].line
        living = recover.eligible(certificate.epoch, state.restored.timeline)
        if living and (line is None or certificate.epoch > line.epoch):
            turn.write(fact)
            turn.do(events.Publish(certificate))


def _greet(turn: _Turn, event: events.Greet) -> None:
    turn.answers |= 1 << event.peer
    turn.hello |= 1 << event.peer


def _tick(turn: _Turn, _: events.Tick) -> None:
    to, turned = gossip.turn(turn.state)
    turn.answers |= to
    turn.set(turned=turned)


# --- what follows -------------------------------------------------------------------------------


def _conclude(turn: _Turn, roster: Roster) -> None:
    """Draw every conclusion that the facts held now allow.

    What a turn leaves as it was allows no more than the turn before it drew; but for the first one
    of a life, which no turn was before: then there is no word yet of what to keep. A copy of one's
    own is released if its epoch is not above the line (so no ballot is open on it), or void.
    """
    if turn.state.recovery is not None:
        _recover(turn, roster, turn.state.recovery)
    old, now = turn.before, turn.state
    anew, saved = turn.anew or old.keep is None, now.retained is not old.retained
    voted = now.tallies is not old.tallies
    if not (anew or voted or saved) or not now.open:
        return
    _converge(turn, roster)
    tallies, own = turn.state.tallies, roster.tier_of[now.me]
    if (
        anew or tallies[own].line is not old.tallies[own].line
        or (saved and (not voted or converge.void(roster, tallies)))
    ):  # fmt: skip
        _release(turn, roster)


def _recover(turn: _Turn, roster: Roster, recovery: recover.Recovery) -> None:
    state = turn.state
    at = recover.standing(roster, recovery)
    certificate = recover.certificate(roster, recovery, at, state.round)
    if certificate is not None:
        _resume(turn, certificate)
        return
    if at.phase is Phase.CHECKING and at.epoch is not None and _unjudged(state, recovery, at.epoch):
        if at.epoch == GENESIS:  # it has no bytes that could be wrong
            turn.say(Valid(state.me, state.generation, GENESIS))
            _conclude(turn, roster)
            return
        turn.set(checking=at.epoch)
        turn.do(events.Check(state.generation, at.epoch))
    if state.told == (at.phase, at.epoch):
        return
    turn.set(told=(at.phase, at.epoch))
    if at.phase is Phase.READY and at.epoch is not None:
        turn.do(events.Propose(state.generation, at.epoch, at.copies))
    elif at.phase is Phase.DECLINED:
        said = tuple(f"rank {d.shard}: {d.reason}" for d in recovery.declined)
        turn.do(events.Stuck(at.phase, at.epoch, said))
    elif at.phase is Phase.EXHAUSTED:
        turn.do(events.Stuck(at.phase, None, recover.blame(roster, recovery)))


def _unjudged(state: Member, recovery: recover.Recovery, epoch: Epoch) -> bool:
    """Say whether the own copy of the candidate is still to be read."""
    mine = 1 << state.me
    check = recover.check_of(recovery, epoch)
    holds = recover.reported(recovery, epoch) & mine
    return bool(holds) and not (check.valid | check.bad) & mine and state.checking != epoch


def _resume(turn: _Turn, certificate: RestoreCertificate) -> None:
    turn.say(Restored(certificate))
    turn.do(events.Resume(certificate))


def _converge(turn: _Turn, roster: Roster) -> None:
    for tier, tally in enumerate(turn.state.tallies):
        settled = converge.settle(roster, tier, tally)
        if settled.line is not None and settled is not tally:
            turn.write(Converged(settled.line))
            turn.do(events.Publish(settled.line))


def _release(turn: _Turn, roster: Roster) -> None:
    state = turn.state
    tally = state.tallies[roster.tier_of[state.me]]
    if state.restored is None or state.keep is None or state.pinned is None:
        return
    gone = releasable(
        state.retained,
        line=tally.line.epoch if tally.line else None,
        timeline=state.restored.timeline,
        converged=state.converged,
        keep=state.keep,
        pinned=state.pinned,
        void=converge.void(roster, state.tallies),
        doubted=state.doubted,
    )
    if gone:
        turn.write(Released(gone))
        turn.do(events.Release(gone))


def _sends(turn: _Turn) -> tuple[events.Send, ...]:
    """Tell all neighbours the news, the tree what is whole, and those answered all they lack."""
    state, roster = turn.state, turn.state.roster
    if roster is None or state.generation == 0:
        return ()
    answers = turn.answers
    if roster.tree is not None and turn.before.tallies is not state.tallies:
        answers |= gossip.rolls(turn.before, state)
    if not answers and not turn.news:
        return ()
    to = roster.neighbours[state.me] if turn.news else ()
    told = Message(
        state.me, state.incarnation, state.generation, state.round, roster.digest,
        turn.news, gossip.knows(state),
    )  # fmt: skip
    messages, heard = dict.fromkeys(to, told), []
    for i in bits(answers) if answers else ():
        facts = gossip.lacking(state, state.peers[i].knows)
        messages[i] = _replace(
            told,
            facts=tuple([fact for fact in facts if type(fact) is not Rolled]),
            hello=bool(turn.hello >> i & 1),
            rolled=tuple([fact for fact in facts if type(fact) is Rolled]),
        )
    for i, peer in state.peers.heard:
        answered = peer.owed and i in messages
        heard.append((i, Peer(peer.incarnation, peer.knows) if answered else peer))
    turn.state = _replace(state, peers=Peers(tuple(heard)))
    if answers and to:
        messages = dict(sorted(messages.items()))
    return tuple(map(events.Send, messages, messages.values()))


_LEARN: Final[dict[type, Callable[[_Turn, Roster, Any], None]]] = {
    Staged: _learn_vote, Skipped: _learn_vote, Rolled: _learn_vote,
    Restored: _learn_restored, Converged: _learn_converged,
    Frozen: _learn, Valid: _learn, Bad: _learn, Accepted: _learn, Declined: _learn,
}  # fmt: skip

_HANDLERS: Final[dict[type, Callable[[_Turn, Any], None]]] = {
    events.Begin: _begin,
    events.Accept: _accept,
    events.Decline: _decline,
    events.Captured: _captured,
    events.Persisted: _persisted,
    events.Failed: _failed,
    events.Forgone: _forgone,
    events.Checked: _checked,
    events.Pinned: _pinned,
    events.Received: _received,
    events.Greet: _greet,
    events.Tick: _tick,
}
