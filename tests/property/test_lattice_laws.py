"""Show that the epoch lattice keeps its laws, and that both solvers agree with brute force.

The laws are those of any distributive lattice; what is ours is the diagonal (consistent vectors),
the recovery line, and the greatest vector under difference constraints.
"""

from itertools import product

from hypothesis import example, given
from hypothesis import strategies as st

from handfast.core.lattice import (
    Conflict,
    Constraint,
    Epoch,
    Solution,
    ceiling,
    consistent,
    diagonal,
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

# Few values, so that equal epochs, equal steps and equal generations are common.
epochs = st.builds(Epoch, st.integers(0, 2), st.integers(0, 3))
lengths = st.integers(1, 5)


def vectors_of(count: int):
    """Draw ``count`` vectors of the same domains."""
    return lengths.flatmap(
        lambda n: st.tuples(*[st.lists(epochs, min_size=n, max_size=n).map(tuple)] * count)
    )


def constraints_over(domains: int, lowest: int = -3, most: int = 6):
    ends = st.integers(0, domains - 1)
    return st.lists(st.builds(Constraint, ends, ends, st.integers(lowest, 3)), max_size=most)


@st.composite
def below(draw: st.DrawFn, lowest: int = -3):
    """A top of at most 4 domains and steps up to 4, and constraints over it."""
    top = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    return tuple(top), tuple(draw(constraints_over(len(top), lowest)))


@st.composite
def held(draw: st.DrawFn):
    """Retained sets of at most 4 domains, some of them perhaps empty, and constraints."""
    sets = draw(st.lists(st.sets(st.integers(-2, 7), max_size=4), min_size=1, max_size=4))
    return tuple(map(frozenset, sets)), tuple(draw(constraints_over(len(sets))))


retained_epochs = st.lists(st.frozensets(epochs, max_size=6), min_size=1, max_size=4)


# The lattice of vectors


@given(vectors_of(1))
def test_meet_and_join_are_idempotent(drawn):
    (a,) = drawn
    assert meet(a, a) == a == join(a, a)


@given(vectors_of(2))
def test_meet_and_join_commute(drawn):
    a, b = drawn
    assert meet(a, b) == meet(b, a)
    assert join(a, b) == join(b, a)


@given(vectors_of(3))
def test_meet_and_join_associate(drawn):
    a, b, c = drawn
    assert meet(meet(a, b), c) == meet(a, meet(b, c))
    assert join(join(a, b), c) == join(a, join(b, c))


@given(vectors_of(2))
def test_meet_and_join_absorb(drawn):
    a, b = drawn
    assert meet(a, join(a, b)) == a == join(a, meet(a, b))


@given(vectors_of(3))
def test_meet_and_join_distribute(drawn):
    a, b, c = drawn
    assert meet(a, join(b, c)) == join(meet(a, b), meet(a, c))
    assert join(a, meet(b, c)) == meet(join(a, b), join(a, c))


@given(vectors_of(2))
def test_the_order_is_that_of_meet_and_join(drawn):
    a, b = drawn
    assert leq(a, b) == (meet(a, b) == a) == (join(a, b) == b)


@given(vectors_of(3))
def test_meet_is_the_greatest_lower_bound_and_join_the_least_upper(drawn):
    a, b, c = drawn
    assert leq(c, meet(a, b)) == (leq(c, a) and leq(c, b))
    assert leq(join(a, b), c) == (leq(a, c) and leq(b, c))


@given(vectors_of(2))
def test_the_order_is_antisymmetric(drawn):
    a, b = drawn
    assert (leq(a, b) and leq(b, a)) == (a == b)


# The diagonal


@given(vectors_of(1), epochs)
def test_floor_and_ceiling_are_adjoint_to_the_diagonal(drawn, epoch):
    """Shows both adjunctions: nothing consistent lies between a vector and its floor or ceiling."""
    (v,) = drawn
    assert leq(diagonal(epoch, len(v)), v) == (epoch <= floor(v))
    assert leq(v, diagonal(epoch, len(v))) == (ceiling(v) <= epoch)


@given(lengths, epochs, epochs)
def test_the_diagonal_is_a_sublattice(domains, e, f):
    a, b = diagonal(e, domains), diagonal(f, domains)
    assert consistent(a)
    assert meet(a, b) == diagonal(min(e, f), domains)
    assert join(a, b) == diagonal(max(e, f), domains)
    assert floor(a) == e == ceiling(a)


@given(vectors_of(1))
@example(((Epoch(1, 100), Epoch(2, 100)),))
def test_a_vector_is_consistent_exactly_when_it_is_diagonal(drawn):
    (v,) = drawn
    assert consistent(v) == (v == diagonal(v[0], len(v)))
    assert mixed(v) is not consistent(v)


@given(vectors_of(1))
def test_skew_counts_what_is_there_and_subtracts_within_one_generation_only(drawn):
    (v,) = drawn
    measured = skew(v)
    assert 1 <= measured.generations <= measured.distinct <= len(v)
    assert (measured.distinct == 1) == consistent(v)
    if measured.generations == 1:
        assert measured.steps == max(e.step for e in v) - min(e.step for e in v)
        assert (measured.steps == 0) == consistent(v)
    else:
        assert measured.steps is None


# Retained sets


@given(retained_epochs)
def test_the_recovery_line_is_the_greatest_epoch_that_everyone_retains(retained):
    everywhere = [e for e in sorted(retained[0]) if all(e in held for held in retained)]
    assert recoverable(retained) == tuple(reversed(everywhere))
    assert recovery_line(retained) == (everywhere[-1] if everywhere else None)


@given(retained_epochs, epochs)
def test_every_epoch_above_the_line_is_lacking_somewhere(retained, epoch):
    line = recovery_line(retained)
    missing = without(retained, epoch)
    assert (missing == ()) == (epoch in recoverable(retained))
    if line is None or epoch > line:
        assert missing
    assert all(epoch not in retained[i] for i in missing)


@given(retained_epochs)
def test_the_line_does_not_rise_when_something_is_released(retained):
    """Shows that retention only ever costs: releasing can lower the line, never raise it."""
    line = recovery_line(retained)
    for i, held in enumerate(retained):
        for epoch in sorted(held):
            fewer = [*retained[:i], held - {epoch}, *retained[i + 1 :]]
            after = recovery_line(fewer)
            assert after == line if epoch != line else after is None or after < line


@given(retained_epochs.filter(all))
def test_the_floor_of_the_newest_is_only_an_upper_bound_of_the_line(retained):
    line = recovery_line(retained)
    newest = tuple(max(held) for held in retained)
    assert line is None or line <= floor(newest)
    if not without(retained, floor(newest)):
        assert line == floor(newest)


# Difference constraints


def solutions(levels, constraints) -> list[tuple[int, ...]]:
    return [
        vector
        for vector in product(*map(sorted, levels))
        if all(vector[c.i] - vector[c.j] <= c.bound for c in constraints)
    ]


def check_outcome(outcome, levels, constraints, again) -> None:
    """Hold an outcome against every vector there is, and a conflict against each subset."""
    found = solutions(levels, constraints)
    if isinstance(outcome, Solution):
        assert outcome.vector in found
        assert all(leq(other, outcome.vector) for other in found)
        return
    assert isinstance(outcome, Conflict)
    assert not found
    assert all(edge in constraints for edge in outcome.edges)
    assert len(dict.fromkeys(outcome.edges)) == len(outcome.edges)
    assert not solutions(levels, outcome.edges)
    assert again(outcome.edges) == outcome
    for spared in outcome.edges:
        rest = tuple(edge for edge in outcome.edges if edge != spared)
        assert solutions(levels, rest)
        assert isinstance(again(rest), Solution)


@given(below(), st.data())
def test_solutions_are_closed_under_meet_and_join(drawn, data):
    top, constraints = drawn
    found = solutions([range(step + 1) for step in top], constraints)
    if found:
        a, b = data.draw(st.sampled_from(found)), data.draw(st.sampled_from(found))
        assert violated(meet(a, b), constraints) == ()
        assert violated(join(a, b), constraints) == ()


@given(below())
@example(((5, 10, 0), (Constraint(1, 0, -3), Constraint(2, 1, -11))))  # the first edge is spare
@example(((4, 4), (Constraint(0, 1, -1), Constraint(1, 0, 0))))  # a negative cycle
@example(((3,), (Constraint(0, 0, -1),)))  # ahead of itself
@example(((2, -1), (Constraint(0, 1, 3),)))  # a domain that has nothing at all
def test_greatest_below_is_what_brute_force_finds(drawn):
    top, constraints = drawn
    levels = [range(step + 1) for step in top]
    check_outcome(
        greatest_below(top, constraints),
        levels,
        constraints,
        lambda edges: greatest_below(top, edges),
    )


@given(below(lowest=0))
def test_greatest_below_always_exists_where_nobody_must_stay_behind(drawn):
    """Shows that bounded staleness and adjacent versions never conflict: all-zero keeps them."""
    top, constraints = drawn
    assert isinstance(greatest_below(top, constraints), Solution)


@given(below(), st.data())
def test_greatest_below_is_monotone(drawn, data):
    """Shows that domains that went further never make the answer older."""
    top, constraints = drawn
    higher = tuple(step + data.draw(st.integers(0, 3)) for step in top)
    before, after = greatest_below(top, constraints), greatest_below(higher, constraints)
    if isinstance(before, Solution):
        assert isinstance(after, Solution)
        assert leq(before.vector, after.vector)


@given(held())
@example((({1, 3}, {2, 4}), (Constraint(0, 1, 0), Constraint(1, 0, 0))))
@example((({1}, set()), (Constraint(0, 1, 0),)))
def test_greatest_retained_is_what_brute_force_finds(drawn):
    retained, constraints = drawn
    check_outcome(
        greatest_retained(retained, constraints),
        retained,
        constraints,
        lambda edges: greatest_retained(retained, edges),
    )


@given(below())
def test_both_solvers_agree_where_everything_is_retained(drawn):
    top, constraints = drawn
    below_top = greatest_below(top, constraints)
    of_all = greatest_retained([range(step + 1) for step in top], constraints)
    assert isinstance(below_top, Solution) == isinstance(of_all, Solution)
    if isinstance(below_top, Solution):
        assert below_top == of_all


def ring(domains: int) -> list[Constraint]:
    """The diagonal as constraints: nobody ahead of the next, all the way round."""
    return [Constraint(i, (i + 1) % domains, 0) for i in range(domains)]


@given(st.lists(st.sets(st.integers(0, 6), max_size=5), min_size=1, max_size=4))
def test_under_the_constraints_of_the_diagonal_the_solvers_find_floor_and_line(steps):
    """Shows that the solver generalises: with c = 0 both ways it is the floor and the line."""
    sets = [[Epoch(1, s) for s in sorted(held)] for held in steps]
    line, outcome = recovery_line(sets), greatest_retained(steps, ring(len(steps)))
    if line is None:
        assert isinstance(outcome, Conflict)
    else:
        assert outcome == Solution((line.step,) * len(steps))
    if all(steps):
        top = tuple(max(held) for held in steps)
        bottom = floor([Epoch(1, s) for s in top]).step
        assert greatest_below(top, ring(len(top))) == Solution((bottom,) * len(top))


@given(held(), st.randoms(use_true_random=False))
def test_the_outcome_does_not_depend_on_the_order_of_the_constraints(drawn, random):
    """Shows that two processes that learned the constraints in another order say the same."""
    retained, constraints = drawn
    shuffled = list(constraints) * 2
    random.shuffle(shuffled)
    assert greatest_retained(retained, shuffled) == greatest_retained(retained, constraints)
    top = tuple(max(held, default=-1) for held in retained)
    assert greatest_below(top, shuffled) == greatest_below(top, constraints)
