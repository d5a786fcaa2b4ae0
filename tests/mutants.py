"""Wrong protocols: each a fault planted into the real core, and the laws that must catch it.

A fault is planted by replacing one function of the core. Storms (`tests/property/test_mutants.py`)
and the search over all states (`tests/model/test_mutants.py`) hunt the same ones.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from handfast.core import converge, events, fold, gossip, member, recover, retain
from handfast.core import view as lattice_of_a_member
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import RoundRecord, bits
from handfast.core.messages import (
    Accepted,
    Bad,
    Certificate,
    Configured,
    Converged,
    Copy,
    Frozen,
    Released,
    Restored,
    Rolled,
    Skipped,
    Staged,
    Valid,
    merkle_root,
)
from handfast.core.retain import Keep
from handfast.model import scenarios

Patch = pytest.MonkeyPatch
replace = msgspec.structs.replace


@dataclass(frozen=True)
class Mutant:
    """A fault, how to plant it, the laws that may catch it, and where to look."""

    name: str
    plant: Callable[[Patch], None]
    laws: set[str]
    shape: str = "two"
    settings: tuple[tuple[str, Any], ...] = ()


MUTANTS: list[Mutant] = []


def mutant(*laws: str, shape: str = "two", **settings: Any) -> Callable[..., Any]:
    """Register a fault under its function's name."""

    def register(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        name = plant.__name__
        MUTANTS.append(Mutant(name, plant, set(laws), shape, tuple(settings.items())))
        return plant

    return register


def handler(patch: Patch, kind: type, change: Callable[..., None]) -> None:
    """Replace how a member takes one kind of event; ``change(original, turn, event)``."""
    original = member._HANDLERS[kind]
    patch.setitem(member._HANDLERS, kind, lambda turn, event: change(original, turn, event))


def concludes_all_in_every_turn(patch: Patch) -> None:
    """Let a wrong rule of release be asked whenever it could do harm, not only when a right one
    could have come to another answer."""
    original = member._conclude

    def conclude(turn, roster):
        turn.anew = True
        original(turn, roster)

    patch.setattr(member, "_conclude", conclude)


# --- persistence


@mutant("s1")
def votes_before_the_image_is_durable(patch: Patch) -> None:
    def captured(original, turn, event):
        original(turn, event)
        if event.epoch in turn.state.persisting:
            turn.say(Staged(turn.state.me, event.epoch, "early"))

    handler(patch, events.Captured, captured)


@mutant("s1")
def votes_before_the_sync(patch: Patch) -> None:
    def persisted(original, turn, event):
        if event.epoch in turn.state.persisting:
            vote = Staged(turn.state.me, event.epoch, event.digest)
            turn.state = fold.fold(turn.state, vote)
            turn.news += (vote,)

    handler(patch, events.Persisted, persisted)


@mutant("s10")
def votes_after_a_freeze(patch: Patch) -> None:
    def folded(state, record):
        after = fold.fold(state, record)
        return replace(after, persisting=state.persisting) if isinstance(record, Frozen) else after

    patch.setattr(member, "fold", folded)


def skips_what_is_past(patch: Patch, kind: type) -> None:
    """Vote SKIP on an epoch of a generation that was frozen, whenever such an event comes."""

    def late(original, turn, event):
        if 0 < event.epoch.generation < turn.state.generation:
            turn.say(Skipped(turn.state.me, event.epoch, event.reason))
        else:
            original(turn, event)

    handler(patch, kind, late)


@mutant("s10")
def skips_after_a_freeze(patch: Patch) -> None:
    skips_what_is_past(patch, events.Failed)


@mutant("s10")
def forgoes_for_a_past_generation(patch: Patch) -> None:
    skips_what_is_past(patch, events.Forgone)


@mutant("s10")
def judges_for_a_past_generation(patch: Patch) -> None:
    def checked(original, turn, event):
        if event.generation < turn.state.generation:
            turn.say(Valid(turn.state.me, event.generation, event.epoch))
        else:
            original(turn, event)

    handler(patch, events.Checked, checked)


@mutant("s10")
def accepts_for_a_past_generation(patch: Patch) -> None:
    def accept(original, turn, event):
        state = turn.state
        if 0 < event.generation < state.generation and state.roster is not None:
            shard = state.roster.configuration.domains[state.me].shard
            turn.say(Accepted(shard, event.generation, event.epoch, event.copy))
        else:
            original(turn, event)

    handler(patch, events.Accept, accept)


@mutant("s5")
def forgets_its_acceptance(patch: Patch) -> None:
    def accepted(original, turn, event):
        state, shard = turn.state, 0
        if state.recovery is not None and state.roster.homes[shard] == state.me:
            turn.say(Accepted(shard, event.generation, event.epoch, event.copy))

    handler(patch, events.Accept, accepted)
    handler(patch, events.Begin, lambda original, turn, event: original(turn, event))


@mutant("s14", shape="two")
def calls_a_damaged_copy_valid(patch: Patch) -> None:
    handler(
        patch,
        events.Checked,
        lambda original, turn, event: original(turn, replace(event, reason="")),
    )


# --- knowledge


@mutant("s2", "s9", shape="three")
def knows_from_its_own_edges(patch: Patch) -> None:
    patch.setattr(converge, "complete", lambda roster, tier, ballot: ballot.staged.bit_count() >= 2)


@mutant("s2", shape="both")
def counts_one_copy_where_two_are_promised(patch: Patch) -> None:
    def complete(roster, tier, ballot):
        return all(ballot.staged & mask for mask in roster.holders[tier])

    patch.setattr(converge, "complete", complete)


@mutant("s2", shape="tiers")
def lets_a_restore_certify_every_tier(patch: Patch) -> None:
    def rebased(roster, tier, tally, c):
        line = Certificate(c.run, c.configuration, roster.tiers[tier], c.base, c.root)
        return converge.Tally(line, tally.ballots)

    patch.setattr(fold, "_rebased", rebased)


@mutant("s7")
def publishes_before_it_writes(patch: Patch) -> None:
    def concluded(turn, roster):
        for tier, tally in enumerate(turn.state.tallies):
            settled = converge.settle(roster, tier, tally)
            if settled.line is not None and settled is not tally:
                turn.do(events.Publish(settled.line))

    patch.setattr(member, "_converge", concluded)


@mutant("s7")
def resumes_before_it_writes(patch: Patch) -> None:
    patch.setattr(member, "_resume", lambda turn, certificate: turn.do(events.Resume(certificate)))


# --- generations and rounds


@mutant("s5", "s6")
def gives_one_generation_to_two_rounds(patch: Patch) -> None:
    def begun(original, turn, event):
        if event.generation == turn.state.generation and event.round != turn.state.round:
            turn.set(generation=event.generation - 1)
        original(turn, event)

    def allocate(record, name, reported):
        return RoundRecord(name, max(1, reported))

    for module in (scenarios, sys.modules.get("world")):  # whoever starts rounds
        if module is not None:
            patch.setattr(module, "allocate", allocate)
    handler(patch, events.Begin, begun)


@mutant("s10")
def takes_words_of_a_past_incarnation(patch: Patch) -> None:
    original = member._admitted

    def admitted(turn, roster, message, peer):
        return original(turn, roster, message, replace(peer, incarnation=0))

    patch.setattr(member, "_admitted", admitted)


@mutant("s10")
def takes_words_of_a_past_generation(patch: Patch) -> None:
    original = member._admitted

    def admitted(turn, roster, message, peer):
        now = replace(message, generation=max(message.generation, turn.state.generation))
        return original(turn, roster, replace(now, round=turn.state.round), peer)

    patch.setattr(member, "_admitted", admitted)


@mutant("s10", "s6", "s9", stores=2)
def takes_words_of_another_round(patch: Patch) -> None:
    original = member._admitted

    def admitted(turn, roster, message, peer):
        return original(turn, roster, replace(message, round=turn.state.round), peer)

    patch.setattr(member, "_admitted", admitted)


# --- recovery


@mutant("s12")
def offers_orphans(patch: Patch) -> None:
    patch.setattr(recover, "eligible", lambda epoch, timeline: True)


@mutant("s12", "s4")
def ignores_the_base(patch: Patch) -> None:
    def eligible(epoch, timeline):
        return epoch == GENESIS or epoch.generation in [b.generation for b in timeline]

    patch.setattr(recover, "eligible", eligible)


@mutant("s12", "s4")
def forgets_the_certificates_of_others(patch: Patch) -> None:
    def timeline_of(reports):
        restored = reports[0].restored
        return restored.timeline if restored is not None else ()

    patch.setattr(recover, "timeline_of", timeline_of)


@mutant("s12", "s4", "l3", shape="either")
def lets_one_bad_copy_refute(patch: Patch) -> None:
    original = recover.standing

    def standing(roster, recovery):
        checks = []
        for check in recovery.checks:
            bad = check.bad
            for mask in recover.holders_of(roster):
                bad |= mask if check.bad & mask else 0
            checks.append(replace(check, bad=bad, valid=check.valid & ~bad))
        return original(roster, replace(recovery, checks=tuple(checks)))

    patch.setattr(recover, "standing", standing)


@mutant("s11", "s6", "s9")
def restores_without_every_acceptance(patch: Patch) -> None:
    original = recover.certificate

    def certificate(roster, recovery, at, name):
        if at.phase is not recover.Phase.READY:
            return original(roster, recovery, at, name)
        accepted = tuple(
            Accepted(shard, recovery.generation, at.epoch, bits(at.copies[shard])[0])
            for shard in range(len(recovery.accepted))
        )
        restored = replace(at, phase=recover.Phase.RESTORED)
        return original(roster, replace(recovery, accepted=accepted), restored, name)

    patch.setattr(recover, "certificate", certificate)


@mutant("s11", "s12", "s6")
def restores_without_validating(patch: Patch) -> None:
    original = recover._judge

    def judge(recovery, epoch, valid, unproved, roster):
        copies = recover.reported(recovery, epoch)
        good = tuple(copies & mask for mask in recover.holders_of(roster))
        return original(recovery, epoch, good, 0, roster)

    patch.setattr(recover, "_judge", judge)


@mutant("s11", "s12")
def acts_from_its_own_newest(patch: Patch) -> None:
    """Each for itself, as `torch.save` with a file a rank does; and it writes that down, too."""

    def resume(turn, certificate):
        newest = max(copy.epoch for copy in turn.state.retained)
        if newest.generation < certificate.generation:
            certificate = replace(certificate, base=newest)
        turn.say(Restored(certificate))
        turn.do(events.Resume(certificate))

    patch.setattr(member, "_resume", resume)


@mutant("s12")
def overlooks_what_was_asked_for(patch: Patch) -> None:
    original = recover.candidates
    patch.setattr(
        recover, "candidates", lambda roster, reports, want: original(roster, reports, None)
    )


@mutant("s13")
def puts_copies_of_a_run_together(patch: Patch) -> None:
    patch.setattr(recover, "apart", lambda roster, reports: ())


# --- release


@mutant("s8", "s3")
def keeps_the_last_k_without_a_certificate(patch: Patch) -> None:
    def releasable(retained, **_):
        return tuple(sorted(copy.epoch for copy in retained)[:-2])

    patch.setattr(member, "releasable", releasable)
    concludes_all_in_every_turn(patch)


@mutant("s8")
def releases_during_a_recovery(patch: Patch) -> None:
    original = member._conclude

    def conclude(turn, roster):
        original(turn, roster)
        line = turn.state.tallies[0].line
        if turn.state.recovery is not None and line is not None:
            gone = tuple(c.epoch for c in turn.state.retained if c.epoch < line.epoch)
            if gone:
                turn.write(Released(gone))

    patch.setattr(member, "_conclude", conclude)


@mutant("s8")
def overlooks_pins(patch: Patch) -> None:
    original = member.releasable
    patch.setattr(
        member, "releasable", lambda held, **rule: original(held, **{**rule, "pinned": ()})
    )


@mutant("s8")
def releases_as_soon_as_it_boots(patch: Patch) -> None:
    original = member._release

    def release(turn, roster):
        keep, pinned = turn.state.keep, turn.state.pinned
        turn.set(keep=keep or Keep(1), pinned=pinned or ())
        original(turn, roster)
        turn.set(keep=keep, pinned=pinned)

    patch.setattr(member, "_release", release)


@mutant("l6")
def releases_nothing(patch: Patch) -> None:
    patch.setattr(member, "releasable", lambda held, **rule: ())


# --- the window, time, traffic


@mutant("l4")
def lets_skipped_epochs_fill_the_window(patch: Patch) -> None:
    original = member._unfit

    def unfit(state, epoch):
        deaf = tuple(
            replace(t, ballots=tuple(replace(b, skips=()) for b in t.ballots))
            for t in state.tallies
        )
        return original(replace(state, tallies=deaf), epoch)

    patch.setattr(member, "_unfit", unfit)


@mutant("l4", window=1)
def lets_tries_that_nobody_will_join_fill_the_window(patch: Patch) -> None:
    patch.setattr(
        converge,
        "awaited",
        lambda roster, tier, tally, b: 0 if b.skips else converge.waiting(roster, tier, b),
    )


@mutant("l6")
def admits_what_is_beyond_the_window(patch: Patch) -> None:
    original = member._unfit
    patch.setattr(member, "_unfit", lambda m, epoch: original(replace(m, persisting=()), epoch))


@mutant("l6")
def admits_whatever_was_passed_by(patch: Patch) -> None:
    patch.setattr(converge, "STRANDED", 1_000_000)


@mutant("s5")
def saves_a_step_again(patch: Patch) -> None:
    original = member._unfit

    def unfit(state, epoch):
        return original(state, Epoch(epoch.generation, epoch.step + 1))

    patch.setattr(member, "_unfit", unfit)


@mutant("l4")
def refuses_a_skip_for_a_full_window(patch: Patch) -> None:
    def forgone(original, turn, event):
        why, by = member._unfit(turn.state, event.epoch)
        if why:
            turn.do(events.Refuse(event.epoch, why, by))
        else:
            original(turn, event)

    handler(patch, events.Forgone, forgone)


@mutant("l4")
def tells_a_trainer_that_begins_again_nothing(patch: Patch) -> None:
    def begin(original, turn, event):
        before = turn.state
        original(turn, event)
        if (before.generation, before.round) == (event.generation, event.round):
            turn.set(told=before.told)

    handler(patch, events.Begin, begin)


def tells_nobody_of_later_rounds(patch: Patch, kind: type) -> None:
    """Leave out what is said of a later round where one kind of event shows it."""

    def silently(original, turn, event):
        original(turn, event)
        turn.actions = tuple(a for a in turn.actions if not isinstance(a, events.Overtaken))

    handler(patch, kind, silently)


@mutant("l4")
def lets_a_round_begin_that_is_past_in_silence(patch: Patch) -> None:
    tells_nobody_of_later_rounds(patch, events.Begin)


@mutant("l4")
def keeps_to_itself_that_others_are_beyond(patch: Patch) -> None:
    tells_nobody_of_later_rounds(patch, events.Received)


@mutant("l6")
def writes_what_it_knows_once_more(patch: Patch) -> None:
    original = member._learn_converged

    def learn(turn, roster, fact):
        tier = roster.tiers.index(fact.certificate.tier)
        line = turn.state.tallies[tier].line
        if turn.state.open and line == fact.certificate:
            turn.write(fact)
        else:
            original(turn, roster, fact)

    patch.setitem(member._LEARN, Converged, learn)


@mutant("s8")
def never_trusts_again_what_was_bad_once(patch: Patch) -> None:
    original = fold._said

    def said(state, record):
        after = original(state, record)
        return replace(after, doubted=tuple({*state.doubted, *after.doubted}))

    patch.setitem(fold._FOLDS, Valid, said)
    patch.setitem(fold._FOLDS, Bad, said)


@mutant("l2", shape="tree")
def speaks_to_one_neighbour_beside_the_tree(patch: Patch) -> None:
    original = gossip.turn
    patch.setattr(gossip, "turn", lambda m: original(replace(m, turned=-1)))


@mutant("l2")
def waits_ever_longer_to_say_it_again(patch: Patch) -> None:
    """A relay that backs off: at ticks 1, 2, 4, 8 ... of its life it says what a peer lacks, at all
    others what it holds. All learn in the end, as late again as the storm was long."""
    turn, sends = gossip.turn, member._sends

    def counted(state):
        return turn(state)[0], state.turned + 1

    def backed_off(step):
        sent = sends(step)
        ticks = step.state.turned + 1
        if step.before.turned + 1 == ticks or ticks.bit_count() == 1:
            return sent
        return tuple(
            replace(one, message=replace(one.message, facts=(), rolled=())) for one in sent
        )

    patch.setattr(gossip, "turn", counted)
    patch.setattr(member, "_sends", backed_off)


@mutant("s15")
def skips_after_a_timeout(patch: Patch) -> None:
    def tick(original, turn, event):
        for epoch in turn.state.persisting:
            turn.say(member.Skipped(turn.state.me, epoch, "too slow"))
        original(turn, event)

    handler(patch, events.Tick, tick)


@mutant("l4")
def blames_nobody(patch: Patch) -> None:
    original = lattice_of_a_member._blocked
    patch.setattr(lattice_of_a_member, "_blocked", lambda m: (original(m)[0], ()))


@mutant("l1", "l3")
def never_sends_again(patch: Patch) -> None:
    patch.setattr(gossip, "lacking", lambda member, peer: ())


@mutant("l5")
def never_falls_silent(patch: Patch) -> None:
    patch.setattr(
        gossip, "restless", lambda member: member.roster.everyone & ~(1 << member.me)
        if member.roster else 0,
    )  # fmt: skip


@mutant("l1", "l3", "s12")
def names_nobody_and_waits_for_all(patch: Patch) -> None:
    patch.setattr(recover, "eligible", lambda epoch, timeline: epoch == Epoch(0, -1))


# --- crashes


def forgets(patch: Patch, *kinds: type) -> None:
    """Let every life but the first begin without some kinds of its records."""
    original = member.boot

    def boot(name, incarnation, records, lost=()):
        kept = [r for r in records if not isinstance(r, kinds)] if incarnation > 1 else records
        return original(name, incarnation, kept, lost)

    patch.setattr(member, "boot", boot)


@mutant("s5", "s10")
def keeps_its_identity_with_an_empty_disk(patch: Patch) -> None:
    original = member.boot

    def boot(name, incarnation, records, lost=()):
        return original(name, incarnation, [] if incarnation > 1 else records)

    patch.setattr(member, "boot", boot)


@mutant("s5")
def judges_a_copy_again_in_a_new_life(patch: Patch) -> None:
    forgets(patch, Valid, Bad)


@mutant("s5")
def accepts_again_in_a_new_life(patch: Patch) -> None:
    forgets(patch, Accepted)


@mutant("s5", "s10")
def forgets_its_freezes_in_a_crash(patch: Patch) -> None:
    forgets(patch, Frozen, Valid, Bad, Accepted, Restored, Staged)


# --- more of recovery and release


@mutant("s10")
def takes_saves_of_a_past_generation(patch: Patch) -> None:
    original = member._unfit

    def unfit(state, epoch):
        past = epoch.generation < state.generation
        return ("", ()) if past and state.open else original(state, epoch)

    patch.setattr(member, "_unfit", unfit)


@mutant("s6", "s12")
def restores_without_every_report(patch: Patch) -> None:
    original = recover.standing

    def standing(roster, recovery):
        held = [report for report in recovery.reports if report is not None]
        reports = tuple(
            report or replace(held[0], domain=i) for i, report in enumerate(recovery.reports)
        )
        return original(roster, replace(recovery, reports=reports))

    patch.setattr(recover, "standing", standing)


@mutant("s8")
def releases_on_the_certificate_of_an_orphan(patch: Patch) -> None:
    patch.setattr(fold, "_rebased", lambda roster, tier, tally, certificate: tally)


@mutant("l3", "s12", "s4", "s8")
def keeps_no_chain_of_bases(patch: Patch) -> None:
    patch.setattr(recover, "extend", lambda timeline, branch, floor: (branch,))


@mutant("s6", "s9", shape="either")
def keeps_the_chain_of_bases_in_its_own_journal_alone(patch: Patch) -> None:
    original = recover.certificate

    def certify(turn, roster, recovery):
        own = turn.state.restored

        def certificate(roster, recovery, at, round_):
            made = original(roster, recovery, at, round_)
            if made is None:
                return None
            chain = recover.extend(own.timeline if own else (), made.timeline[0], GENESIS)
            return replace(made, timeline=chain)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(recover, "certificate", certificate)
            conclude(turn, roster, recovery)

    conclude = member._recover
    patch.setattr(member, "_recover", certify)


@mutant("s8", "s3", "s4")
def releases_what_converged_last(patch: Patch) -> None:
    def releasable(retained, *, line, **_):
        return tuple(sorted(c.epoch for c in retained if line is not None and c.epoch <= line))

    patch.setattr(member, "releasable", releasable)


@mutant("s8", "s3")
def releases_below_its_own_vote(patch: Patch) -> None:
    original = member.releasable

    def releasable(retained, **rule):
        newest = max(copy.epoch for copy in retained)
        return original(retained, **{**rule, "line": newest})

    patch.setattr(member, "releasable", releasable)
    concludes_all_in_every_turn(patch)


@mutant("s8", "s3", shape="three")
def releases_below_what_a_neighbour_has(patch: Patch) -> None:
    """What two ends of one edge have is not what all have."""

    def concluded(turn, roster):
        original(turn, roster)
        state = turn.state
        mine = 1 << state.me
        for ballot in state.tallies[roster.tier_of[state.me]].ballots:
            if ballot.staged & mine and ballot.staged & ~mine and roster.size > 2:
                gone = tuple(c.epoch for c in state.retained if c.epoch < ballot.epoch)
                if gone:
                    turn.write(Released(gone))
                    turn.do(events.Release(gone))
                return

    original = member._converge
    patch.setattr(member, "_converge", concluded)


# --- the tree


@mutant("s1", "s2", shape="tree")
def rolls_up_without_its_own_vote(patch: Patch) -> None:
    """Who leads two tells of both as soon as the other one has voted."""
    lacking, rolls = gossip.lacking, gossip.rolls

    def both(state):
        me, tree = state.me, state.roster.tree
        _, end = tree.block(me)
        for ballot in state.tallies[0].ballots if end == me + 2 else ():
            rest = converge.voted(ballot, me + 1, end)
            if rest is not None and converge.voted(ballot, me, end) is None:
                root = merkle_root([f"{state.id}=", f"{state.roster.ids[me + 1]}={rest.digest}"])
                yield Rolled(me, 2, ballot.epoch, bytes.fromhex(root))

    def roll(before, after):
        early = after.open and [*both(after)] != [*both(before)]
        return rolls(before, after) | (1 << after.roster.tree.above(after.me) if early else 0)

    patch.setattr(gossip, "lacking", lambda state, peer: (*lacking(state, peer), *both(state)))
    patch.setattr(gossip, "rolls", roll)


@mutant("s1", "s2", shape="tree")
def rolls_up_a_skip_as_if_it_were_a_vote(patch: Patch) -> None:
    def skip(roster, ballot, vote):
        return converge._add(roster, ballot, Staged(vote.domain, vote.epoch, vote.reason))

    patch.setattr(converge, "_skip", skip)


@mutant("s1", "s2", shape="tree")
def rolls_up_what_a_block_lacks(patch: Patch) -> None:
    """A block counts as whole as soon as its first half does."""

    def voted(ballot, first, end):
        return original(ballot, first, first + max(1, (end - first) // 2))

    original = converge.voted
    patch.setattr(converge, "complete", lambda roster, tier, b: bool(voted(b, 0, roster.size)))


@mutant("s1", "s2", shape="tree")
def counts_a_block_twice(patch: Patch) -> None:
    """Votes are counted as they come, rolled up or not, and nobody asks whose they were."""

    def add(roster, ballot, vote):
        if vote in ballot.votes:
            return ballot
        votes = sorted((*ballot.votes, vote), key=converge.reach)
        for left, right in itertools.combinations(votes, 2):
            (first, middle), (_, end) = converge.reach(left), converge.reach(right)
            if first % 2 == 0 and middle == end - 1 == first + 1:
                root = converge.node(*(converge._hash(roster, half) for half in (left, right)))
                votes.append(Rolled(first, 2, vote.epoch, root))
                break
        return converge.Ballot(ballot.epoch, tuple(votes), ballot.skips)

    def complete(roster, tier, ballot):
        return sum(end - first for first, end in map(converge.reach, ballot.votes)) >= roster.size

    patch.setattr(converge, "_add", add)
    patch.setattr(converge, "complete", complete)


@mutant("s1", "s2", shape="tree")
def rolls_up_the_second_half_first(patch: Patch) -> None:
    original = converge.node
    patch.setattr(converge, "node", lambda left, right: original(right, left))


@mutant("s1", "s2", "s9", shape="tree")
def rolls_up_the_epoch_before_with_this_one(patch: Patch) -> None:
    """The blocks of a save are joined to whatever epoch is open."""
    original = converge.join

    def join(roster, tally, vote, hearer=None):
        if isinstance(vote, Rolled) and tally.ballots:
            vote = replace(vote, epoch=tally.ballots[-1].epoch)
        return original(roster, tally, vote, hearer)

    patch.setattr(converge, "join", join)


@mutant("s10", shape="tree")
def takes_a_block_of_another_generation(patch: Patch) -> None:
    original = member._admitted

    def admitted(turn, roster, message, peer):
        if message.rolled and message.configuration == roster.digest:
            return True
        return original(turn, roster, message, peer)

    patch.setattr(member, "_admitted", admitted)


@mutant("l1", "l3", shape="tree")
def trusts_that_the_tree_holds(patch: Patch) -> None:
    """What was sent up or down once is not sent again."""
    original = gossip.restless
    patch.setattr(gossip, "restless", lambda m: 0 if m.open else original(m))


# --- what the design's own models had found


@mutant("s12", "s4")
def orders_epochs_by_step_alone(patch: Patch) -> None:
    """So an orphan that had gone further than the branch after it is the newest of all."""
    original = recover.candidates

    def candidates(roster, reports, want):
        found = original(roster, reports, want)
        return tuple(sorted(found, key=lambda epoch: epoch.step, reverse=True))

    patch.setattr(recover, "eligible", lambda epoch, timeline: True)
    patch.setattr(recover, "candidates", candidates)


@mutant("s5")
def skips_for_a_cadence(patch: Patch) -> None:
    """Whoever hears of an epoch that its own rank has not saved yet says that it never will."""

    def received(original, turn, event):
        original(turn, event)
        state = turn.state
        if not state.open:
            return
        for ballot in state.tallies[state.roster.tier_of[state.me]].ballots:
            voted = (ballot.staged | ballot.skipped) >> state.me & 1
            if not voted and ballot.epoch not in state.persisting:
                turn.say(member.Skipped(state.me, ballot.epoch, "not scheduled"))

    handler(patch, events.Received, received)


@mutant("s4", "s1", "s12")
def reports_what_is_only_in_memory(patch: Patch) -> None:
    def begun(original, turn, event):
        volatile = tuple(Copy(epoch, "memory") for epoch in turn.state.persisting)
        retained = turn.state.retained
        if volatile:
            turn.set(retained=(*retained, *volatile))
        original(turn, event)
        if volatile:
            turn.set(retained=retained)

    handler(patch, events.Begin, begun)


@mutant("s1", "s6", "s9", "s10", "s12", shape="either")
def takes_a_change_in_the_middle_of_a_restore(patch: Patch) -> None:
    """What had been reported before the change, by the fenced one too, goes on to count."""

    def begun(original, turn, event):
        before = turn.state
        original(turn, event)
        held, now = before.recovery, turn.state.recovery
        if held is None or now is None or before.roster == turn.state.roster:
            return
        turn.set(
            recovery=replace(
                now,
                checks=held.checks,
                reports=tuple(
                    new or (old and replace(old, generation=now.generation))
                    for new, old in zip(now.reports, held.reports, strict=True)
                ),
            )
        )

    handler(patch, events.Begin, begun)


@mutant("s1", "s5", "s10")
def votes_before_its_first_freeze_is_written(patch: Patch) -> None:
    original = member._Turn.say

    def say(turn, fact):
        if isinstance(fact, Frozen) and turn.state.generation == 0:
            turn.state = fold.fold(turn.state, fact)
            turn.news += (fact,)
        else:
            original(turn, fact)

    patch.setattr(member._Turn, "say", say)


@mutant("s7")
def publishes_what_it_refuses(patch: Patch) -> None:
    """Whoever has no room for a save says that it converged: a deed that leaves no other trace."""

    def captured(original, turn, event):
        original(turn, event)
        for action in turn.actions:
            if isinstance(action, events.Refuse) and action.by:
                run, roster = turn.state.roster.configuration.run, turn.state.roster
                forged = Certificate(run, roster.digest, roster.tiers[0], action.epoch, "forged")
                turn.do(events.Publish(forged))

    handler(patch, events.Captured, captured)


@mutant("s14")
def counts_on_what_is_lost(patch: Patch) -> None:
    """A copy that is gone goes on to be retained; where it is the line, all below it may go."""
    original = member.boot

    def boot(name, incarnation, records, lost=()):
        return replace(original(name, incarnation, records), lost=tuple(lost))

    patch.setattr(member, "boot", boot)


@mutant("s5")
def saves_what_it_was_restored_from(patch: Patch) -> None:
    original = member._unfit

    def unfit(state, epoch):
        why, by = original(state, epoch)
        held = state.restored
        again = held is not None and state.last is None and epoch.step == held.base.step
        return ("", ()) if again and state.generation == epoch.generation else (why, by)

    patch.setattr(member, "_unfit", unfit)


@mutant("s8")
def keeps_torn_saves_as_history(patch: Patch) -> None:
    """What never converged is kept in the place of what did."""
    original = member.releasable

    def releasable(retained, **given):
        return original(retained, **given | {"converged": [copy.epoch for copy in retained]})

    patch.setattr(member, "releasable", releasable)


@mutant("s8", "l6")
def keeps_orphans_as_history(patch: Patch) -> None:
    patch.setattr(retain, "eligible", lambda epoch, timeline: True)


@mutant("l6")
def forgets_what_had_converged(patch: Patch) -> None:
    """So nobody ever knows of as many converged epochs as are to be kept, and all stay."""
    patch.setattr(fold, "_known", lambda state, tallies, held: state.converged)


@mutant("l3", shape="either")
def takes_an_heir_for_a_past_life(patch: Patch) -> None:
    """What was known of a fenced member goes on to be held against whoever takes its place."""
    original = fold._configured

    def configured(state, record):
        return replace(original(state, record), peers=state.peers)

    patch.setitem(fold._FOLDS, Configured, configured)


@mutant("s1", "s2", "s9", shape="tree")
def keeps_a_block_under_another_root(patch: Patch) -> None:
    """What came up rolled up is held otherwise than it was told."""
    original = member._learn_vote

    def learn(turn, roster, vote):
        original(turn, roster, replace(vote, root=bytes(16)))

    patch.setitem(member._LEARN, Rolled, learn)
