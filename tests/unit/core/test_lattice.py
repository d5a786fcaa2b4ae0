"""Show epochs, vectors and recovery lines at the examples that people meet, and every refusal."""

import msgspec
import pytest

from handfast.core.lattice import (
    GENESIS,
    Conflict,
    Constraint,
    Epoch,
    Skew,
    Solution,
    ceiling,
    consistent,
    floor,
    greatest_below,
    greatest_retained,
    join,
    leq,
    meet,
    mixed,
    recoverable,
    recovery_line,
    skew,
    violated,
    without,
)


def steps(*of_generation_1: int) -> list[Epoch]:
    return [Epoch(1, step) for step in of_generation_1]


def test_an_epoch_is_ordered_by_generation_first():
    """Shows that a rolled-back job is ahead of the timeline that it abandoned, at a lower step."""
    assert GENESIS < Epoch(1, 900) < Epoch(2, 100) < Epoch(2, 101)
    assert str(Epoch(3, 1200)) == "3/1200"


def test_an_epoch_is_two_numbers_on_the_wire():
    encoded = msgspec.msgpack.encode(Epoch(3, 1200))
    assert msgspec.msgpack.decode(encoded) == [3, 1200]
    assert msgspec.msgpack.decode(encoded, type=Epoch) == Epoch(3, 1200)


def test_mixed_vectors_are_not_closed_under_meet_or_join():
    """Shows why "the older of each" is no repair rule: it may or may not end on the diagonal."""
    a, b, c = steps(1, 2), steps(2, 1), steps(1, 3)
    assert mixed(a)
    assert mixed(b)
    assert meet(a, b) == tuple(steps(1, 1))
    assert consistent(meet(a, b))
    assert consistent(join(a, b))
    assert mixed(meet(a, c))


def test_vectors_of_the_same_length_only_can_be_compared():
    for operation in (meet, join, leq):
        with pytest.raises(ValueError, match="vectors of 2 and 3 domains") as caught:
            operation(steps(1, 2), steps(1, 2, 3))
        assert "one component for each domain" in str(caught.value)


def test_of_no_domains_nothing_is_vouched_for():
    """Shows that an empty vector is refused, not vacuously consistent."""
    for question in (floor, ceiling, consistent, mixed, skew):
        with pytest.raises(ValueError, match="a vector of no domains"):
            question(())
    with pytest.raises(ValueError, match="no domain was asked"):
        recoverable([])
    with pytest.raises(ValueError, match="no domain was asked"):
        recovery_line([])


def test_skew_within_one_generation_is_in_steps():
    assert skew(steps(7, 7, 7)) == Skew(distinct=1, generations=1, steps=0)
    assert skew(steps(5, 7, 5)) == Skew(distinct=2, generations=1, steps=2)


def test_skew_across_generations_has_no_number_of_steps():
    """Shows that equal steps of two generations are no agreement: an abandoned timeline's 100."""
    assert skew([Epoch(1, 100), Epoch(2, 100)]) == Skew(distinct=2, generations=2, steps=None)
    along = skew([Epoch(1, 100), Epoch(2, 120)], one_timeline=True)
    assert along == Skew(distinct=2, generations=2, steps=20)


def test_keeping_the_newest_two_each_can_leave_nothing_to_recover():
    """Shows the domino effect of independent retention: every domain is full, the job has none."""
    retained = [steps(1, 2), steps(3, 4)]
    assert recoverable(retained) == ()
    assert recovery_line(retained) is None


def test_the_recovery_line_is_not_the_minimum_of_the_newest():
    """Shows the usual `min` over ranks picking an epoch that a rank no longer has."""
    retained = [steps(100, 200, 300), steps(100, 300), steps(100, 200)]
    assert floor([max(held) for held in retained]) == Epoch(1, 200)
    assert without(retained, Epoch(1, 200)) == (1,)
    assert without(retained, Epoch(1, 300)) == (2,)
    assert recovery_line(retained) == Epoch(1, 100)
    assert without(retained, Epoch(1, 100)) == ()


def test_recoverable_epochs_come_newest_first():
    """Shows the order in which a recovery descends when the newest is refuted."""
    retained = [{Epoch(2, 3), Epoch(1, 9), GENESIS}, [GENESIS, Epoch(1, 9), Epoch(2, 3)]]
    assert recoverable(retained) == (Epoch(2, 3), Epoch(1, 9), GENESIS)


def test_bounded_staleness_lowers_only_those_that_are_too_far_ahead():
    """Shows two steps of allowed staleness: the straggler stays, the fast ones come back to it."""
    pairs = [Constraint(i, j, 2) for i in range(3) for j in range(3) if i != j]
    assert greatest_below((9, 4, 5), pairs) == Solution((6, 4, 5))
    assert violated((9, 4, 5), pairs) == (Constraint(0, 1, 2), Constraint(0, 2, 2))
    assert violated((6, 4, 5), pairs) == ()


def test_adjacent_versions_skip_those_that_were_not_kept():
    """Shows a node that kept no neighbouring version dragging the others down to a common one."""
    adjacent = [Constraint(0, 1, 1), Constraint(1, 0, 1)]
    assert greatest_retained([[1, 2, 5, 6], [2, 4]], adjacent) == Solution((5, 4))
    assert greatest_retained([[1, 2, 6], [2, 4]], adjacent) == Solution((2, 2))


def test_a_conflict_names_only_the_constraints_that_cause_it():
    """Shows the minimal reason: of five constraints the two that chase each other."""
    guilty = [Constraint(0, 1, -1), Constraint(1, 0, 0)]
    innocent = [Constraint(2, 0, -1), Constraint(2, 1, 5), Constraint(0, 2, 1000)]
    outcome = greatest_below((1000, 1000, 1000), [*innocent, *guilty])
    assert isinstance(outcome, Conflict)
    assert sorted(outcome.edges) == guilty
    assert outcome.domain in (0, 1)


def test_a_negative_cycle_below_a_high_top_is_found_at_once():
    """Shows that the descent does not count down from ten to the eighteenth."""
    outcome = greatest_below((10**18, 10**18), [Constraint(0, 1, -1), Constraint(1, 0, 0)])
    assert isinstance(outcome, Conflict)
    assert len(outcome.edges) == 2


def test_a_conflict_says_who_is_left_without_a_step_and_why():
    outcome = greatest_below((5, 10, 0), [Constraint(1, 0, -3), Constraint(2, 1, -11)])
    assert outcome == Conflict(2, (Constraint(2, 1, -11),))
    assert str(outcome) == "domain 2 is left without a step under v2 - v1 <= -11"


def test_a_domain_that_retains_nothing_is_named_before_any_constraint():
    outcome = greatest_retained([[1], []], [Constraint(0, 1, 0)])
    assert outcome == Conflict(1, ())
    assert str(outcome) == "domain 1 is left without a step: it retains nothing"
    assert greatest_below((3, -1), []) == Conflict(1, ())


def test_no_constraints_leave_everyone_where_they_are():
    assert greatest_below((3, 0, 7), []) == Solution((3, 0, 7))
    assert greatest_retained([[4, 1, 4], [0]], []) == Solution((4, 0))
    assert greatest_below((), []) == Solution(())


@pytest.mark.parametrize(
    "stray", [Constraint(0, 2, 1), Constraint(2, 0, 1), Constraint(-1, 0, 1), Constraint(0, -1, 1)]
)
def test_a_constraint_on_a_domain_that_is_not_there_is_refused(stray):
    """Shows that -1 does not quietly mean the last domain."""
    for ask in (
        lambda: greatest_below((1, 1), [stray]),
        lambda: greatest_retained([[1], [1]], [stray]),
        lambda: violated((1, 1), [stray]),
    ):
        with pytest.raises(ValueError, match="names a domain that is not there"):
            ask()
