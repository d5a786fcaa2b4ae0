"""Show how a generation finds what it resumes from: a function of frozen reports and the chain."""

import random

import pytest

from handfast.core import recover
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import (
    Accepted,
    Bad,
    Branch,
    Certificate,
    Copy,
    Declined,
    Frozen,
    Lost,
    Report,
    RestoreCertificate,
    Valid,
    merkle_root,
)
from handfast.core.recover import Phase, eligible, extend

E1, E2, E3 = Epoch(1, 10), Epoch(1, 20), Epoch(1, 30)
FIRST = RestoreCertificate("run", "c", 1, "r1", GENESIS, (Branch(1, GENESIS),), (0, 1), "x")
SINGLE = Roster(
    Configuration("run", 2, (Domain("a", "dir", 0), Domain("b", "dir", 1)), (("dir", 1),))
)
DOUBLE = Roster(
    Configuration(
        "run", 2, tuple(Domain(f"{s}{c}", "dir", s) for s in range(2) for c in "ab"), (("dir", 1),)
    )
)


def frozen(domain, *held, restored=FIRST, want=None, lost=()):
    report = Report(tuple(Copy(e, f"{domain}:{e}") for e in held), lost, restored, ())
    return Frozen(domain, 1, 2, "r2", "c", report, want)


def held(roster, *facts):
    recovery = recover.begin(roster, 2)
    for fact in facts:
        recovery = recover.join(recovery, fact)
    return recovery


def at(roster, *facts):
    return recover.standing(roster, held(roster, *facts))


BOTH = frozen(0, E1, E2, E3), frozen(1, E1, E2)


# --- the chain of bases


def test_without_a_certificate_only_genesis_can_be_resumed():
    assert eligible(GENESIS, ())
    assert not eligible(E1, ())


def test_what_lies_behind_a_base_is_an_orphan():
    """Shows that after a rollback the abandoned timeline is never a candidate again."""
    chain = (Branch(3, Epoch(2, 50)), Branch(2, E1), Branch(1, GENESIS))
    assert [eligible(e, chain) for e in (E1, E2, Epoch(2, 50), Epoch(2, 60), Epoch(3, 900))] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert not eligible(Epoch(4, 1), chain)
    assert eligible(GENESIS, chain)
    assert not eligible(GENESIS, chain[:2])


def test_a_branch_drops_the_timelines_that_it_left_and_what_nobody_retains():
    chain = (Branch(3, Epoch(2, 50)), Branch(2, E1), Branch(1, GENESIS))
    back, on = Branch(4, Epoch(2, 30), "r4"), Branch(4, Epoch(3, 9), "r4")
    assert extend(chain, back, GENESIS) == (back, *chain[1:])
    assert extend(chain, on, Epoch(2, 1)) == (on, *chain[:2])


# --- candidates


def test_the_newest_epoch_that_every_shard_has_is_the_candidate():
    standing = at(SINGLE, *BOTH)
    assert (standing.phase, standing.epoch) == (Phase.CHECKING, E2)
    assert SINGLE.names(standing.waiting) == ("a", "b")


def test_nothing_is_offered_before_all_have_frozen():
    standing = at(SINGLE, BOTH[0])
    assert (standing.phase, standing.epoch, standing.waiting) == (Phase.FREEZING, None, 0b10)


def test_the_highest_certificate_that_anybody_holds_decides():
    """Shows that one rank which missed a rollback does not bring the old timeline back."""
    rolled = RestoreCertificate(
        "run", "c", 5, "r", E1, (Branch(5, E1), Branch(1, GENESIS)), (0, 1), "x"
    )
    assert at(SINGLE, BOTH[0], frozen(1, E1, E2, restored=rolled)).epoch == E1


def test_one_step_may_be_asked_for():
    facts = frozen(0, E1, E2, want=10), frozen(1, E1, E2, want=10)
    assert at(SINGLE, *facts).epoch == E1
    facts = frozen(0, E1, want=99), frozen(1, E1, want=99)
    assert at(SINGLE, *facts).phase is Phase.EXHAUSTED


def test_ranks_that_ask_for_different_steps_get_none():
    """Shows that a rank's mistyped step does not make two ranks load two epochs."""
    facts = frozen(0, E1, E2, want=10), frozen(1, E1, E2)
    assert at(SINGLE, *facts).phase is Phase.EXHAUSTED
    assert recover.blame(SINGLE, held(SINGLE, facts[0])) == ()
    assert recover.blame(SINGLE, held(SINGLE, *facts)) == (
        "a asks for step 10",
        "b asks for the newest step",
    )


# --- copies of one run that went on apart


def began(*chain):
    """The restore certificate of the first branch of a chain."""
    generation, base, name = chain[0].generation, chain[0].base, chain[0].round
    return RestoreCertificate("run", "c", generation, name, base, chain, (0, 1), "x")


E4 = Epoch(2, 40)
ROOT, A, B = Branch(1, GENESIS, "r1"), Branch(2, E2, "ra"), Branch(2, E2, "rb")
ON, BACK, LATER = Branch(3, E4, "r3"), Branch(3, E1, "r3"), Branch(4, E4, "r4")


@pytest.mark.parametrize(
    ("one", "other", "stray", "since"),
    [
        ([A, ROOT], [B, ROOT], "b", 2),
        ([A, ROOT], [Branch(2, E1), ROOT], "b", 2),
        ([ON, A, ROOT], [B, ROOT], "b", 2),
        ([B, ROOT], [ON, A, ROOT], "a", 2),
        ([LATER, ON, A, ROOT], [ON, B, ROOT], "b", 2),
        ([ON, A, ROOT], [Branch(3, E4, "other"), A, ROOT], "b", 3),
        ([ON, A, ROOT], [Branch(3, E4, "other"), B, ROOT], "b", 2),
        ([LATER, A, ROOT], [BACK, ROOT], "b", 2),
    ],
)
def test_copies_of_a_run_that_went_on_apart_are_never_put_together(one, other, stray, since):
    """Shows that rank 1's directory of another copy gives no mixture, and that it is named."""
    facts = [frozen(i, E1, E4, restored=began(*chain)) for i, chain in enumerate((one, other))]
    assert at(SINGLE, *facts) == recover.Standing(Phase.EXHAUSTED)
    where = f"generation {since} in the round of {'b' if stray == 'a' else 'a'}"
    assert recover.blame(SINGLE, held(SINGLE, *facts)) == (
        f"{stray} did not begin {where}: copies of one run that went on apart",
    )
    assert recover.blame(SINGLE, held(SINGLE, facts[0])) == ()


@pytest.mark.parametrize(
    ("newest", "other"),
    [
        ([A, ROOT], [A, ROOT]),
        ([A, ROOT], [ROOT]),  # it missed the restore
        ([BACK, ROOT], [A, ROOT]),  # it missed a rollback
        ([LATER, A], [A, ROOT]),  # what lies below the floor is dropped
        ([ON, A, ROOT], [Branch(2, E2), Branch(1, GENESIS)]),  # rounds were not kept then
        ([ON, Branch(2, E2), ROOT], [A, ROOT]),
    ],
)
def test_members_of_one_history_are_not_taken_for_copies(newest, other):
    reports = [frozen(i, restored=began(*chain)).report for i, chain in enumerate((newest, other))]
    assert recover.apart(SINGLE, reports) == recover.apart(SINGLE, reports[::-1]) == ()
    assert recover.apart(SINGLE, [reports[0], frozen(1, restored=None).report]) == ()


def certified(roster, digests, epoch=E4):
    leaves = [f"{name}={said}" for name, said in zip(roster.ids, digests, strict=True)]
    return Certificate("run", roster.digest, "dir", epoch, merkle_root(leaves))


def reporting(domain, digest, line):
    copies = (Copy(E4, digest),) if digest else ()
    return Frozen(domain, 1, 3, "r3", "c", Report(copies, (), began(A, ROOT), (line,)))


def test_a_certificate_of_other_copies_than_those_reported_stops_the_restore():
    """Shows that a mixture is found by its root even where no round is known."""
    mine, theirs = certified(SINGLE, "AA"), certified(SINGLE, "BB")
    facts = reporting(0, "A", mine), reporting(1, "B", theirs)
    assert at(SINGLE, *facts).phase is Phase.EXHAUSTED
    what = "holds a certificate of 2/40 that is not of the copies reported"
    assert recover.blame(SINGLE, held(SINGLE, *facts)) == tuple(
        f"{name} {what}: copies of one run that went on apart" for name in "ab"
    )
    assert at(SINGLE, reporting(0, "A", mine), reporting(1, "A", mine)).epoch == E4


@pytest.mark.parametrize(
    ("roster", "line", "digests"),
    [
        (SINGLE, certified(SINGLE, "AA"), ("A", "")),  # a copy is lost
        (SINGLE, certified(DOUBLE, "AAAA"), "AB"),  # of another configuration
        (DOUBLE, certified(DOUBLE, "AAAA"), "ABAB"),  # one copy of two was enough for it
    ],
)
def test_a_certificate_that_is_not_over_these_copies_alone_says_nothing(roster, line, digests):
    reports = [reporting(i, digest, line).report for i, digest in enumerate(digests)]
    assert recover.apart(roster, reports) == ()


# --- judgements


def test_the_candidate_descends_below_a_copy_that_is_bad():
    facts = (*BOTH, Bad(1, 2, E2, "damaged"))
    standing = at(SINGLE, *facts)
    assert (standing.phase, standing.epoch) == (Phase.CHECKING, E1)
    facts += (Bad(0, 2, E1, "gone"),)
    assert at(SINGLE, *facts).phase is Phase.EXHAUSTED
    lost = frozen(0, E1, lost=(Lost(E3, "missing"),))
    assert recover.blame(SINGLE, held(SINGLE, lost, *facts[1:])) == (
        "a: 1/30 missing",
        "a: 1/10 gone",
        "b: 1/20 damaged",
    )


def test_one_valid_copy_of_each_shard_is_enough():
    """Shows that a bad copy refutes nothing while another holder's is sound."""
    reports = [frozen(i, E1) for i in range(4)]
    facts = (*reports, Bad(0, 2, E1, "damaged"), Valid(1, 2, E1))
    assert at(DOUBLE, *facts).waiting == 0b1100
    ready = at(DOUBLE, *facts, Valid(2, 2, E1))
    assert (ready.phase, ready.copies, ready.waiting) == (Phase.READY, (0b0010, 0b0100), 0b0101)


ACCEPTED = (
    *BOTH, Valid(0, 2, E2), Valid(1, 2, E2), Accepted(0, 2, E2, 0), Accepted(1, 2, E2, 1),
)  # fmt: skip


def test_every_rank_must_accept():
    assert at(SINGLE, *ACCEPTED[:5]).phase is Phase.READY
    silent = held(SINGLE, *ACCEPTED[:5])
    assert recover.certificate(SINGLE, silent, recover.standing(SINGLE, silent), "r2") is None
    c = recover.certificate(SINGLE, held(SINGLE, *ACCEPTED), at(SINGLE, *ACCEPTED), "r2")
    assert c is not None
    assert (c.generation, c.round, c.base, c.copies) == (2, "r2", E2, (0, 1))
    assert c.timeline == (Branch(2, E2, "r2"), Branch(1, GENESIS))


def test_a_rank_that_declines_ends_the_round():
    said = Declined(1, 2, E2, "other structure"), Declined(0, 2, E2, "too")
    standing = at(SINGLE, *ACCEPTED[:4], *said)
    assert (standing.phase, standing.waiting) == (Phase.DECLINED, 0b11)
    assert held(SINGLE, *said) == held(SINGLE, *said[::-1])


# --- joins


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_facts_does_not_matter(seed):
    facts = [*ACCEPTED, Bad(1, 2, E3, "x"), Declined(0, 2, E2, "no")]
    order = random.Random(seed).sample(facts, len(facts))
    assert held(SINGLE, *order, *facts) == held(SINGLE, *facts)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BOTH[0], frozen(0)),
        (Valid(0, 2, E1), Bad(0, 2, E1, "x")),
        (Bad(0, 2, E1, "x"), Valid(0, 2, E1)),
        (Accepted(0, 2, E1, 0), Accepted(0, 2, E1, 1)),
        (Declined(0, 2, E1, "x"), Declined(0, 2, E1, "y")),
    ],
)
def test_a_word_once_given_stands(first, second):
    once = held(SINGLE, first)
    assert recover.join(once, first) is once
    assert recover.join(once, second) is once


def test_blame_is_empty_before_anybody_spoke():
    assert recover.blame(SINGLE, recover.begin(SINGLE, 2)) == ()
