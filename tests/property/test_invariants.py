"""Show that each law finds each breach that it speaks of, in a truth that was tampered with."""

import random

import pytest
from msgspec.structs import replace
from world import SHAPES, World

from handfast.core import events as ev
from handfast.core import messages as ms
from handfast.core.converge import Ballot, Tally
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import boot
from handfast.core.retain import Keep
from handfast.core.state import Peers
from handfast.laws.invariants import (
    ALWAYS,
    EVENTUALLY,
    STANDSTILL,
    Truth,
    Turn,
    Written,
    breaches,
    l6_storage_is_bounded,
)

E1, E2, E3 = Epoch(1, 10), Epoch(1, 20), Epoch(2, 30)
E4, E5, E6 = Epoch(2, 40), Epoch(2, 50), Epoch(2, 60)


def grown(name: str = "two") -> World:
    """Give a world that converged on two epochs, was started anew, and converged on a third."""
    world, rng = World(SHAPES[name], keep=Keep(9)), random.Random(0)
    for saves in (2, 1):
        round_ = world.launch()
        for node in world.here():
            world.look(node)
            world.begin(round_, node)
        world.settle(rng)
        for _ in range(saves):
            for shard in sorted(round_.step):
                world.save(round_, shard)
            world.settle(rng)
    return world


WORLD, BOTH, TIERS, TREE = grown(), grown("both"), grown("tiers"), grown("tree")
TRUTH = WORLD.truth()
MEMBER = WORLD.nodes["dir0a"].member
OTHER = WORLD.nodes["dir1a"].member
CERTIFICATE = TRUTH.bases[2]
DIGEST = WORLD.rosters[0].digest
ALL = (*ALWAYS, *EVENTUALLY, *STANDSTILL)


def also(*records: ms.Record, of: Truth = TRUTH, domain: str = "dir0a") -> Truth:
    return replace(of, journal=(*of.journal, *(Written(domain, 1, r) for r in records)))


def but(change, of: Truth = TRUTH) -> Truth:
    """Change or drop (None) each record of the journal."""
    changed = [(w, change(w)) for w in of.journal]
    return replace(of, journal=tuple(replace(w, record=r) for w, r in changed if r is not None))


def turn(event=None, after=MEMBER, before=MEMBER, persist=(), send=(), apply=()) -> Truth:
    effects = ev.Effects(tuple(persist), tuple(send), tuple(apply))
    return replace(TRUTH, turn=Turn(before, event or ev.Greet(1), after, effects))


def broken(truth: Truth) -> set[str]:
    return {words.split("_")[0] for words in breaches(truth, ALL)}


@pytest.mark.parametrize("world", [WORLD, BOTH, TIERS, TREE])
def test_an_honest_truth_breaks_no_law(world):
    assert breaches(world.truth(), ALL) == ()


def line(epoch, root="x", tier="dir", digest=DIGEST) -> ms.Converged:
    return ms.Converged(ms.Certificate("run", digest, tier, epoch, root))


def message(**other) -> ms.Message:
    base = ms.Message(1, OTHER.incarnation, 2, OTHER.round, DIGEST, (), ms.Knows())
    return replace(base, **other)


def hearing(persist=(), **other) -> Truth:
    peers = tuple((at, replace(p, knows=ms.Knows(restored=True))) for at, p in MEMBER.peers.heard)
    after = MEMBER if persist else replace(MEMBER, peers=Peers(peers))
    return turn(ev.Received(message(**other)), after, persist=persist)


def voting(member, digest: str):
    """Let a member hold a vote of the first domain."""
    ballot = Ballot(Epoch(2, 40), (ms.Staged(0, Epoch(2, 40), digest),))
    return replace(member, tallies=(Tally(ballots=(ballot,)),))


def lined(member):
    """Let a member know a certificate that nobody else does."""
    return replace(member, tallies=(Tally(replace(member.tallies[0].line, root=member.id)),))


def other_base(w: Written):
    """Let generation 2 resume from genesis."""
    if isinstance(w.record, ms.Restored) and w.record.certificate.generation == 2:
        return ms.Restored(replace(w.record.certificate, base=GENESIS))
    return w.record


def orphaned() -> Truth:
    """Let generation 2 resume from the first epoch, and 3 from the second, which 2 left behind."""
    second = replace(CERTIFICATE, base=E1)
    more = [ms.Restored(second), ms.Restored(replace(CERTIFICATE, generation=3))]
    for _, frozen in TRUTH.records(ms.Frozen):
        report = replace(frozen.report, restored=second)
        more += [replace(frozen, generation=3, report=report)] * (frozen.generation == 2)
    return also(*more)


def losing(w: Written):
    """Let a member report as lost what it also reports as retained."""
    if isinstance(w.record, ms.Frozen) and w.record.report.retained:
        held = w.record.report.retained[0].epoch
        return replace(w.record, report=replace(w.record.report, lost=(ms.Lost(held, "x"),)))
    return w.record


def staged_by_one(w: Written):
    """Let only one of two have saved an epoch."""
    saved = isinstance(w.record, ms.Staged) and w.record.epoch == E1
    return None if saved and w.domain == "dir1a" else w.record


def frozen_without(w: Written):
    return None if isinstance(w.record, ms.Frozen) and w.domain == "dir1a" else w.record


def begun_elsewhere(w: Written):
    """Let a member's first generation be that of another copy of the run."""
    if isinstance(w.record, ms.Frozen) and w.domain == "dir1a" and w.record.generation == 1:
        return replace(w.record, round="other")
    return w.record


def asking(w: Written):
    if isinstance(w.record, ms.Frozen) and w.record.generation == 2:
        return replace(w.record, want=10)
    return w.record


def open_on(*epochs: Epoch):
    """Let the first member have voted on epochs that have not converged."""
    ballots = tuple(Ballot(epoch, (ms.Staged(0, epoch, "x"),)) for epoch in epochs)
    return replace(MEMBER, tallies=(replace(MEMBER.tallies[0], ballots=ballots),))


def passed_by(many: int):
    """Let it have voted on so many epochs that the other one went past."""
    held = open_on(*(Epoch(2, 40 + i) for i in range(many)))
    late = Ballot(Epoch(2, 90), (ms.Staged(1, Epoch(2, 90), "x"),))
    ballots = (*held.tallies[0].ballots, late)
    return replace(held, tallies=(replace(held.tallies[0], ballots=ballots),))


DECLARED = {
    "s1": [
        replace(TRUTH, sound=frozenset()),
        turn(send=[ev.Send(1, message(facts=(ms.Staged(0, Epoch(2, 99), "x"),)))]),
        turn(send=[ev.Send(1, message(rolled=(ms.Rolled(0, 2, E3, b"x"),)))]),
    ],
    "s2": [
        also(line(Epoch(2, 99))),
        also(line(E3, digest=TREE.rosters[0].digest), of=TREE.truth()),
        also(
            line(E2, BOTH.truth().bases[2].root, digest=BOTH.rosters[0].digest), of=BOTH.truth()
        ),
        also(
            line(E2, TIERS.truth().bases[2].root, "dir", TIERS.rosters[0].digest),
            of=TIERS.truth(),
        ),
    ],
    "s3": [also(ms.Released((GENESIS, E1, E2, E3)))],
    "s4": [
        replace(TRUTH, sound=frozenset(i for i in TRUTH.sound if i[:2] != ("dir0a", E3))),
        but(other_base),
    ],
    "s5": [
        also(ms.Skipped(0, E3, "late")),
        also(ms.Bad(0, 2, E2, "late")),
        also(ms.Accepted(0, 2, E1, 0)),
        also(next(f for d, f in TRUTH.records(ms.Frozen) if d == "dir0a")),
        turn(apply=[ev.Persist(E3)]),
        turn(before=replace(MEMBER, persisting=(E4,)), apply=[ev.Persist(E4)]),
        turn(before=open_on(E4), apply=[ev.Persist(E4)]),
        turn(apply=[ev.Persist(Epoch(3, 20))]),  # the step that was restored
        turn(ev.Tick(), persist=[ms.Skipped(0, E4, "slow")]),
    ],
    "s6": [
        also(ms.Restored(replace(CERTIFICATE, base=E1))),
        but(frozen_without),
        replace(TRUTH, published=(("dir0a", line(Epoch(7, 1)).certificate),)),
    ],
    "s7": [
        replace(TRUTH, published=(("dir0a", line(Epoch(2, 99)).certificate),)),
        replace(TRUTH, resumed=(("dir0a", replace(CERTIFICATE, base=E1)),)),
    ],
    "s9": [
        replace(TRUTH, members=(MEMBER, replace(OTHER, restored=replace(CERTIFICATE, base=E1)))),
        replace(TREE.truth(), members=tuple(voting(n.member, n.id) for n in TREE.here())),
        replace(TREE.truth(), members=tuple(lined(node.member) for node in TREE.here())),
    ],
    "s10": [
        hearing(generation=1),
        hearing(round="other"),
        hearing(configuration="other"),
        hearing(incarnation=0),
        hearing(persist=(ms.Skipped(0, E3, "x"),), generation=1),
        also(ms.Staged(0, Epoch(1, 30), "x")),
        also(ms.Valid(0, 1, E1)),
    ],
    "s11": [
        but(lambda w: None if isinstance(w.record, ms.Valid) else w.record),
        but(lambda w: None if isinstance(w.record, ms.Accepted) else w.record),
    ],
    "s12": [but(other_base), but(asking), orphaned()],
    "s13": [
        replace(
            TRUTH,
            resumed=(("dir0a", CERTIFICATE), ("dir1a", replace(CERTIFICATE, base=E1))),
        ),
        but(begun_elsewhere),
    ],
    "s14": [
        also(ms.Bad(0, 2, E2, "x")),
        but(losing),
        turn(persist=[ms.Valid(0, 2, Epoch(2, 99))]),
    ],
    "s15": [
        turn(ev.Tick(), persist=[ms.Skipped(0, E3, "slow")]),
        turn(ev.Tick(), apply=[ev.Persist(E3)]),
    ],
    "l1": [
        replace(TRUTH, members=(MEMBER, replace(OTHER, tallies=(type(OTHER.tallies[0])(),)))),
    ],
    "l2": [replace(TRUTH, exchanges=99)],
    "l3": [replace(TRUTH, members=(replace(MEMBER, generation=1), OTHER))],
    "l5": [replace(TRUTH, members=(replace(MEMBER, peers=Peers()), OTHER))],
    "l6": [
        replace(TRUTH, keep=Keep(1), members=(replace(MEMBER, retained=MEMBER.retained * 2),)),
        turn(after=replace(MEMBER, persisting=(E4, E5, E6)), apply=[ev.Persist(E6)]),
        turn(after=replace(open_on(E4, E5), persisting=(E6,)), apply=[ev.Persist(E6)]),
        turn(after=passed_by(8), apply=[ev.Persist(Epoch(2, 99))]),
        turn(persist=[ms.Converged(MEMBER.tallies[0].line)]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("law", "truth"), [(law, truth) for law, cases in DECLARED.items() for truth in cases]
)
def test_a_breach_is_named_by_its_law(law, truth):
    assert law in broken(truth)


# --- S8, reason by reason


def released(epoch: Epoch, after=MEMBER, **changes) -> str:
    truth = replace(turn(after=after, persist=[ms.Released((epoch,))]), **changes)
    return " ".join(words for words in breaches(truth) if words.startswith("s8"))


def test_every_wrong_release_is_told_why():
    pinned = frozenset({("dir0a", E1)})
    line_lost = replace(MEMBER, retained=MEMBER.retained[:1])
    unknown = replace(MEMBER, tallies=(type(MEMBER.tallies[0])(),))
    keep = Keep(1)
    assert "a reader holds it" in released(E1, pinned=pinned)
    assert "a recovery is under way" in released(E1, replace(MEMBER, restored=None))
    assert "nothing above it is known" in released(E1, unknown)
    assert "nothing above it is known" in released(E3)
    assert "2/30 is not retained" in released(E1, line_lost)
    assert "the user keeps it" in released(E1, keep=Keep(3))
    assert "the user keeps it" in released(E1, keep=Keep(1, every=10))
    assert released(E1, keep=Keep(3), journal=but(staged_by_one).journal) == ""  # no checkpoint
    assert released(E1, keep=keep) == released(GENESIS, keep=keep) == ""
    assert released(E1, boot("dir0a", 1, [])) == ""


def test_a_line_that_does_not_count_any_more_is_no_reason():
    foreign = replace(MEMBER.tallies[0], line=replace(MEMBER.tallies[0].line, configuration="x"))
    assert "another configuration's" in released(E1, replace(MEMBER, tallies=(foreign,)))
    either = grown("either")
    node = either.nodes["dir0a"]
    lost = [Written(d, 1, ms.Bad(0, 2, E3, "x")) for d in ("dir1a", "dir1b")]
    truth = replace(
        either.truth(Turn(node.member, ev.Greet(1), node.member,
                          ev.Effects((ms.Released((E1,)),)))),
        keep=Keep(1),
    )  # fmt: skip
    truth = replace(truth, journal=(*truth.journal, *lost))
    assert any("the tier has lost 2/30" in words for words in breaches(truth))


def test_what_is_still_retained_is_wanted_by_somebody():
    """Shows what a domain may hold after progress; without any there is no line to go by."""
    begins = replace(MEMBER, generation=9, restored=None)  # no chain leads from there
    lone = replace(TRUTH, members=(boot("dir0a", 1, []), replace(MEMBER, roster=None), begins))
    assert list(l6_storage_is_bounded(lone)) == []
    crowd = replace(
        MEMBER, retained=(*MEMBER.retained, *(ms.Copy(Epoch(9, n), "x") for n in range(4)))
    )
    (said,) = l6_storage_is_bounded(replace(TRUTH, members=(crowd,)))
    assert "above its line" in said
    older = replace(MEMBER, retained=(ms.Copy(Epoch(1, 5), "x"), *MEMBER.retained))
    strict = replace(TRUTH, keep=Keep(1), members=(older,))
    assert "dir0a still retains 1/5" in list(l6_storage_is_bounded(strict))
    every = replace(strict, keep=Keep(1, every=5))
    assert "dir0a still retains 1/5" not in list(l6_storage_is_bounded(every))


def test_what_every_holder_skipped_may_go_at_any_time():
    gone = Epoch(2, 40)
    truth = turn(persist=[ms.Released((gone,))])
    skipped = replace(
        truth, journal=(*TRUTH.journal, Written("dir1a", 1, ms.Skipped(1, gone, "x")))
    )
    assert "s8" in broken(truth)
    assert "s8" not in broken(skipped)


def test_a_copy_that_was_bad_and_is_valid_again_counts():
    again = also(ms.Bad(0, 2, E3, "x"), ms.Valid(0, 3, E3))
    assert ("dir0a", E3) in also(ms.Bad(0, 2, E3, "x")).bad
    assert ("dir0a", E3) not in again.bad


# --- L4, and recoveries


def test_a_refusal_must_be_true():
    refuse = ev.Refuse(E3, "full", ("dir1a",))
    assert "l4" in broken(turn(apply=[refuse]))
    assert "l4" not in broken(turn(apply=[replace(refuse, by=())]))
    assert "l4" not in broken(turn(after=replace(MEMBER, persisting=(E2, E3)), apply=[refuse]))


def test_a_window_holds_what_it_says():
    """What others have passed by does not count in it, nor what somebody skipped; a few may lie."""
    fine = turn(after=replace(open_on(E4), persisting=(E5,)), apply=[ev.Persist(E5)])
    assert broken(fine) == set()
    assert broken(turn(after=passed_by(7), apply=[ev.Persist(Epoch(2, 99))])) == set()
    forgone = ev.Forgone(E6, "skipped")
    full, refuse = open_on(E4, E5), ev.Refuse(E6, "full", ("dir1a",))
    assert broken(turn(ev.Captured(E6), after=full, apply=[refuse])) == set()
    assert broken(turn(forgone, after=full, apply=[refuse])) == {"l4"}


def test_whoever_begins_is_told():
    """At once, and as often as it begins; of an overtaken round it hears no more than that."""
    world, rng = World(SHAPES["two"]), random.Random(0)
    round_ = world.launch()
    for node in world.here():
        world.begin(round_, node)
    begin = round_.begin(Keep(1), 2)
    while not any(isinstance(action, ev.Propose) for action in world.nodes["dir0a"].todo):
        world.deliver(world.pending.pop(0))
    ready = world.nodes["dir0a"].member
    propose = world.nodes["dir0a"].todo[0]
    assert broken(turn(begin, ready, ready, apply=[propose])) == set()
    assert broken(turn(begin, ready, ready)) == {"l4"}
    world.settle(rng)
    done = world.nodes["dir0a"].member
    assert broken(turn(begin, done, done)) == {"l4"}
    assert broken(turn(begin, done, done, apply=[ev.Resume(done.restored)])) == set()
    other = replace(begin, round="other")
    assert broken(turn(other, done, done)) == {"l4"}
    assert broken(turn(other, done, done, apply=[ev.Overtaken(done.generation)])) == set()


def test_whoever_hears_of_a_later_round_says_so():
    """Of one that is past, or of its own, there is nothing to be told."""
    world = World(SHAPES["two"])
    world.begin(world.launch(), world.nodes["dir0a"])
    member = world.nodes["dir0a"].member
    message = ms.decode_message(world.sent[world.pending[0]][1])
    for generation, apply, laws in ((2, [], {"l4"}), (2, [ev.Overtaken(2)], set()), (1, [], set())):
        heard = ev.Received(replace(message, sender=1, generation=generation))
        assert broken(turn(heard, member, member, apply=apply)) == laws


def waiting() -> tuple[World, Truth]:
    world, rng = World(SHAPES["three"]), random.Random(0)
    round_ = world.launch()
    for node in world.here()[:2]:
        world.begin(round_, node)
    world.settle(rng)
    for node in world.here()[2:]:
        world.crash(node)
    return world, world.truth()


def test_whoever_blocks_is_named():
    _, truth = waiting()
    assert breaches(truth, STANDSTILL) == ()
    a, b = truth.members
    deaf = replace(a.recovery, reports=(a.recovery.reports[0], None, None))
    assert "l4" in broken(replace(truth, members=(replace(a, recovery=deaf), b)))
    assert "l1" in broken(truth)
    unbegun = boot("dir9", 1, [])
    assert "l4" not in broken(replace(truth, members=(unbegun,)))


def test_two_words_of_one_member_are_found():
    _, truth = waiting()
    a, b = truth.members
    other = replace(a.recovery.reports[0], incarnation=9)
    forged = replace(b.recovery, reports=(other, *b.recovery.reports[1:]))
    assert "s9" in broken(replace(truth, members=(a, replace(b, recovery=forged))))
    assert "s9" not in broken(replace(truth, members=(a, replace(b, generation=7))))


def test_what_can_be_restored_is_what_all_hold_intact():
    assert TRUTH.restorable == (E1, E2, E3)
    rotten = frozenset(i for i in TRUTH.sound if i[:2] != ("dir1a", E3))
    assert replace(TRUTH, sound=rotten).restorable == (E1, E2)
    start = World(SHAPES["two"])
    start.begin(start.launch(), start.nodes["dir0a"])
    assert start.truth().restorable == ()
