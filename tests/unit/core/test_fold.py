"""Show that a member is what its journal says: the same function for running and for booting."""

import pytest
from msgspec.structs import replace

from handfast.core.fold import boot, fold, placed
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import (
    Bad,
    Branch,
    Certificate,
    Configured,
    Converged,
    Copy,
    Frozen,
    Lost,
    Released,
    Report,
    RestoreCertificate,
    Restored,
    Skipped,
    Staged,
    Valid,
)

CONFIGURATION = Configuration(
    "run", 1, (Domain("a", "dir", 0), Domain("b", "dir", 0), Domain("m", "mem", 0)),
    (("dir", 1), ("mem", 1)),
)  # fmt: skip
DIGEST = CONFIGURATION.digest()
E1, E2 = Epoch(1, 10), Epoch(1, 20)
EMPTY = Report((), (), None, ())


def frozen(generation: int) -> Frozen:
    return Frozen(0, 1, generation, f"r{generation}", DIGEST, EMPTY)


def restored(generation: int, base: Epoch, copies=(0,), timeline=None) -> Restored:
    chain = timeline or (Branch(generation, base), Branch(1, GENESIS))
    return Restored(
        RestoreCertificate("run", DIGEST, generation, f"r{generation}", base, chain, copies, "x")
    )


def line(epoch: Epoch, tier: str = "dir") -> Converged:
    return Converged(Certificate("run", DIGEST, tier, epoch, "x"))


LIFE = [
    Configured(CONFIGURATION, True),
    frozen(1),
    Valid(0, 1, GENESIS),
    restored(1, GENESIS, timeline=(Branch(1, GENESIS),)),
    Staged(0, E1, "x"),
    line(E1),
    Released((GENESIS,)),
    Staged(0, E2, "y"),
    Skipped(0, Epoch(1, 30), "full"),
]


def test_a_life_is_read_back():
    member = boot("a", 2, LIFE)
    assert member.open
    assert member.retained == (Copy(E1, "x"), Copy(E2, "y"))
    assert member.tallies[0].line == line(E1).certificate
    assert [ballot.epoch for ballot in member.tallies[0].ballots] == [E2, Epoch(1, 30)]
    assert member.last == Epoch(1, 30)


def test_what_had_converged_is_remembered_as_long_as_it_could_be_kept():
    """Shows that a line counts once a higher one has come, also one whose own copy came later."""
    later = Epoch(1, 30)
    member = boot("a", 2, [*LIFE[:-1], line(later)])
    assert member.converged == (E1, later)
    assert fold(member, Staged(0, later, "z")).converged == (E1, later)
    assert fold(member, Released((E1,))).converged == (later,)
    assert fold(member, Released((E1, E2))).converged == (later,)
    assert fold(member, restored(2, E1, timeline=(Branch(2, E1),))).converged == (E1, later)


def test_booting_is_folding():
    state = boot("a", 2, [])
    for end, record in enumerate(LIFE, 1):
        state = fold(state, record)
        assert boot("a", 2, LIFE[:end]) == state


def test_a_copy_that_is_not_on_the_disk_is_reported_lost():
    lost = (Lost(E1, "missing"),)
    member = boot("a", 2, LIFE, lost)
    assert (member.retained, member.lost) == ((Copy(E2, "y"),), lost)


def test_only_a_founding_domain_holds_genesis():
    assert boot("a", 1, LIFE[:1]).retained == (Copy(GENESIS, ""),)
    assert boot("a", 1, [Configured(CONFIGURATION, False)]).retained == ()


def test_a_freeze_ends_what_was_under_way():
    running = replace(boot("a", 2, LIFE), persisting=(Epoch(1, 40),))
    after = fold(running, frozen(2))
    assert (after.persisting, after.last, after.open) == ((), None, False)
    assert after.tallies[0].ballots == ()
    assert after.tallies[0].line == line(E1).certificate
    assert after.recovery is not None
    assert after.recovery.frozen == 0b001


def test_a_new_configuration_counts_on_nothing_of_the_old():
    """Shows that a crash before the freeze leaves a member that can neither vote nor release."""
    other = replace(CONFIGURATION, domains=(*CONFIGURATION.domains, Domain("c", "dir", 0)))
    after = fold(boot("a", 2, LIFE), Configured(other, True))
    assert (after.open, after.round, after.recovery) == (False, "", None)
    assert [tally.line for tally in after.tallies] == [None, None]
    assert [copy.epoch for copy in after.retained] == [E1, E2]


@pytest.mark.parametrize(
    ("base", "copies", "lines"),
    [
        (E1, (0,), (E1, None)),  # dir held it and restored it
        (E2, (0,), (E2, None)),  # dir restored it, so it has it
        (E2, (2,), (E1, E2)),  # memory restored it: dir keeps the line that it had
        (E1, (2,), (None, E1)),  # dir's own copy of its line may be bad
        (GENESIS, (0,), (GENESIS, None)),  # rolled back below the line
        (GENESIS, (2,), (None, GENESIS)),
    ],
)
def test_a_restore_moves_each_tiers_line(base, copies, lines):
    before = fold(boot("a", 2, LIFE), frozen(2))
    after = fold(before, restored(2, base, copies))
    assert tuple(t.line and t.line.epoch for t in after.tallies) == lines


def test_two_copies_are_not_promised_by_a_restore_of_one():
    both = replace(CONFIGURATION, need=(("dir", 2), ("mem", 1)))
    member = boot("a", 1, [Configured(both, True), frozen(1), restored(1, GENESIS)])
    assert member.tallies[0].line is None


def test_a_copy_found_bad_is_doubted_until_it_is_found_valid():
    state = fold(boot("a", 2, LIFE), frozen(2))
    bad = fold(state, Bad(0, 2, E2, "damaged"))
    assert bad.doubted == (E2,)
    assert fold(fold(bad, frozen(3)), Valid(0, 3, E2)).doubted == ()


def test_a_record_before_any_configuration_is_damage():
    with pytest.raises(ValueError, match="before any configuration"):
        boot("a", 1, LIFE[1:2])


def test_a_journal_of_another_domain_is_refused():
    with pytest.raises(ValueError, match="x is no member of configuration"):
        boot("x", 1, LIFE[:1])


def test_a_tally_that_is_the_same_leaves_the_state_the_same():
    state = boot("a", 2, LIFE)
    assert placed(state.tallies, 0, state.tallies[0]) is state.tallies
    assert Roster(CONFIGURATION) == state.roster
