"""Show that the laws have teeth: each planted fault is caught, by the law that speaks of it.

A fault is planted by replacing one function of the core; then seeded storms are searched, few and
short, until a law breaks. A law that no fault can break would show nothing.
"""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pytest
import world
from world import SHAPES, Breach, World, storm

from handfast.core import converge, events, fold, gossip, member, recover
from handfast.core import view as lattice_of_a_member
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster, bits
from handfast.core.messages import (
    Accepted,
    Certificate,
    Frozen,
    Released,
    RestoreCertificate,
    Restored,
    Staged,
    decode_message,
)
from handfast.core.retain import Keep
from handfast.laws.invariants import l2_heals_in_diameter, s13_no_interaction_across_epochs
from handfast.laws.truth import Truth

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
            turn.news.append(vote)

    handler(patch, events.Persisted, persisted)


@mutant("s10")
def votes_after_a_freeze(patch: Patch) -> None:
    def folded(state, record):
        after = fold.fold(state, record)
        return replace(after, persisting=state.persisting) if isinstance(record, Frozen) else after

    patch.setattr(member, "fold", folded)


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

    patch.setattr(
        world, "allocate", lambda record, name, reported: world.RoundRecord(name, max(1, reported))
    )
    handler(patch, events.Begin, begun)


@mutant("s10")
def takes_words_of_a_past_incarnation(patch: Patch) -> None:
    original = member._admitted

    def admitted(turn, roster, message):
        peers = tuple(replace(peer, incarnation=0) for peer in turn.state.peers)
        known, turn.state = turn.state.peers, replace(turn.state, peers=peers)
        verdict = original(turn, roster, message)
        turn.state = replace(turn.state, peers=known)
        return verdict

    patch.setattr(member, "_admitted", admitted)


@mutant("s10")
def takes_words_of_a_past_generation(patch: Patch) -> None:
    original = member._admitted

    def admitted(turn, roster, message):
        now = replace(message, generation=max(message.generation, turn.state.generation))
        return original(turn, roster, replace(now, round=turn.state.round))

    patch.setattr(member, "_admitted", admitted)


@mutant("s10", "s6", "s9", stores=2)
def takes_words_of_another_round(patch: Patch) -> None:
    original = member._admitted

    def admitted(turn, roster, message):
        return original(turn, roster, replace(message, round=turn.state.round))

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


@mutant("s12", "s4", shape="either")
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
        turn.set(keep=keep or world.Keep(1), pinned=pinned or ())
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
            replace(t, ballots=tuple(replace(b, skipped=0) for b in t.ballots))
            for t in state.tallies
        )
        return original(replace(state, tallies=deaf), epoch)

    patch.setattr(member, "_unfit", unfit)


@mutant("l4", window=1)
def lets_tries_that_nobody_will_join_fill_the_window(patch: Patch) -> None:
    patch.setattr(
        converge,
        "awaited",
        lambda roster, tier, tally, b: 0 if b.skipped else converge.waiting(roster, tier, b),
    )


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


# --- where to look: rare meetings, staged; then storms


def replay(where: World, rng: random.Random) -> None:
    """An agent comes back as a new incarnation, and then all that its past one said arrives."""
    advance(where, rng, saves=1)
    node = where.here()[-1]
    where.crash(node)
    where.boot(node)
    where.settle(rng)
    where.begin(where.rounds[-1], node)
    where.settle(rng)
    for packet in range(len(where.sent)):
        where.deliver(packet)


def tie(where: World, rng: random.Random) -> None:
    """Two engines give the same generation to two rounds, and each reaches one member first."""
    first, second = (where.launch(store=store) for store in range(2))
    assert first.generation == second.generation
    for node, round_ in zip(where.here(), (first, second, second, second), strict=False):
        where.begin(round_, node)
    where.settle(rng)


def half_told(where: World, rng: random.Random) -> None:
    """A rollback whose certificate reached all but the first member, and then a new start."""
    advance(where, rng, saves=2)
    round_ = where.launch(want=10)
    for node in where.here():
        where.begin(round_, node)
    first, *others = where.here()
    while where.pending or any(node.todo for node in where.here()):
        for node in where.here():
            while node.todo:
                where.work(node)
        packet = where.pending.pop(0)
        to, message = where.sent[packet][0], decode_message(where.sent[packet][1])
        last_words = any(isinstance(fact, Accepted | Restored) for fact in message.facts)
        if to != first.id or not last_words:
            where.deliver(packet)
    assert [node.member.open for node in others] == [True] * len(others)
    assert not first.member.open
    advance(where, rng)


def advance(where: World, rng: random.Random, saves: int = 0) -> None:
    round_ = where.launch()
    for node in where.here():
        where.look(node)
        where.begin(round_, node)
    where.settle(rng)
    for _ in range(saves):
        for shard in sorted(round_.step):
            where.save(round_, shard)
        where.settle(rng)


def one_bad(where: World, rng: random.Random) -> None:
    """The newest epoch is damaged in one domain, then its other copy is, if there is one."""
    advance(where, rng, saves=2)
    for node in where.here()[:2]:
        if node.images:
            where.spoil(node, max(node.images), vanish=False)
        advance(where, rng)


def gone_apart(where: World, rng: random.Random) -> None:
    """A run is copied while no job runs, both go on, and one domain is put back from the copy."""
    advance(where, rng, saves=1)
    for node in where.here():
        where.crash(node)
    copy = deepcopy(where)
    copy.launch(store=1, asked=[])  # so that its rounds have names of their own from here on
    for one in (where, copy):
        for node in one.nodes.values():
            one.boot(node)
        advance(one, rng, saves=1)
    stranger = copy.nodes[where.here()[-1].id]
    where.put_back(stranger, copy)
    where.stuck.clear()
    advance(where, rng)
    assert not any(node.member.open for node in where.here())
    strayed = f"{stranger.id} did not begin generation 2 in the round of dir0a: {recover.APART}"
    assert {name: stuck.reasons for name, stuck in where.stuck.items()} == dict.fromkeys(
        where.nodes, (strayed,)
    )


SCENES = (replay, tie, half_told, one_bad, gone_apart)


def searches(fault: Mutant) -> Iterator[Callable[[], object]]:
    """List where a fault is looked for, the cheapest first."""
    for scene in SCENES:
        where = World(SHAPES[fault.shape], keep=Keep(3), stores=2)
        yield partial(scene, where, random.Random(0))
    for seed in range(40):
        yield partial(storm, seed, fault.shape, moves=40, **dict(fault.settings))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
@pytest.mark.parametrize("shape", ["two", "three", "tiers", "either"])
def test_a_staged_meeting_harms_nobody(scene: Callable[..., None], shape: str) -> None:
    """Shows that without a fault none of these meetings breaks a law."""
    scene(World(SHAPES[shape], keep=Keep(3), stores=2), random.Random(0))


@pytest.mark.parametrize("fault", MUTANTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Mutant, monkeypatch: Patch) -> None:
    """Shows that the law that forbids a fault finds it, within few storms."""
    fault.plant(monkeypatch)
    found = next((breach for breach in map(outcome, searches(fault)) if breach), None)
    assert found is not None
    assert found.laws & fault.laws, found


def test_ranks_that_act_from_two_epochs_break_a_law() -> None:
    """S13 follows from S6 and S11, so no fault of a member breaks it first: here is its breach."""
    roster = Roster(SHAPES["two"])
    one = RestoreCertificate("run", roster.digest, 2, "r", Epoch(1, 10), (), (0, 1), "root")
    other = replace(one, base=Epoch(1, 20))
    later = replace(other, generation=3)
    seen = partial(Truth, (roster,), ())
    assert not list(s13_no_interaction_across_epochs(seen(resumed=(("a", one), ("b", later)))))
    (said,) = s13_no_interaction_across_epochs(seen(resumed=(("a", one), ("b", other))))
    assert said == "b acts from 1/20, others from 1/10"


def test_gossip_that_takes_too_many_rounds_breaks_a_law() -> None:
    """L2's bound is far above what a few members ever need, so here is its breach."""
    roster = Roster(SHAPES["two"])
    assert not list(l2_heals_in_diameter(Truth((roster,), (), exchanges=16)))
    assert list(l2_heals_in_diameter(Truth((roster,), (), exchanges=17)))


def outcome(search: Callable[[], object]) -> Breach | None:
    """Give the breach that a search finds; a fault may also keep a scene from being staged."""
    try:
        search()
    except Breach as breach:
        return breach
    except AssertionError:
        pass
    return None
