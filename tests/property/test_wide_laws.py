"""Show that the lattice on bits is the plain one, law by law, and that it bears many domains."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.core import lattice
from handfast.core.lattice import (
    Constraint,
    Epoch,
    Solution,
    greatest_below,
    mask,
)
from handfast.model.wide import Wide, wide_line

# Few values, so that equal epochs are common.
epochs = st.builds(Epoch, st.integers(0, 2), st.integers(0, 3))


def vectors(count: int):
    """Draw ``count`` vectors of the same domains."""
    return st.integers(1, 9).flatmap(
        lambda n: st.tuples(*[st.lists(epochs, min_size=n, max_size=n).map(tuple)] * count)
    )


@given(vectors(1))
def test_a_vector_and_its_cuts_say_the_same(drawn):
    (v,) = drawn
    wide = Wide.of(v)
    assert wide.vector() == v
    assert [epoch for epoch, _ in wide.cuts] == sorted(set(v))
    assert wide.cuts[0][1] == (1 << len(v)) - 1


@given(vectors(2))
def test_meet_join_and_order_are_those_of_the_plain_definitions(drawn):
    a, b = drawn
    wide_a, wide_b = map(Wide.of, drawn)
    assert wide_a.meet(wide_b) == Wide.of(lattice.meet(a, b))
    assert wide_a.join(wide_b) == Wide.of(lattice.join(a, b))
    assert wide_a.leq(wide_b) == lattice.leq(a, b)


@given(vectors(1), st.booleans(), epochs)
def test_floor_ceiling_skew_and_cuts_are_those_of_the_plain_definitions(drawn, one, epoch):
    (v,) = drawn
    wide = Wide.of(v)
    assert wide.floor() == lattice.floor(v)
    assert wide.ceiling() == lattice.ceiling(v)
    assert wide.skew(one_timeline=one) == lattice.skew(v, one_timeline=one)
    assert wide.above(epoch) == mask([i for i, e in enumerate(v) if e >= epoch], len(v))


@given(vectors(3))
def test_meet_and_join_are_a_distributive_lattice(drawn):
    a, b, c = map(Wide.of, drawn)
    assert a.meet(b.join(c)) == a.meet(b).join(a.meet(c))
    assert a.join(b.meet(c)) == a.join(b).meet(a.join(c))
    assert a.meet(a.join(b)) == a == a.join(a.meet(b))


@given(st.lists(st.frozensets(epochs, max_size=6), min_size=1, max_size=5))
def test_the_recovery_line_is_that_of_the_retained_sets(retained):
    every = sorted(frozenset().union(*retained))
    holders = {e: mask([i for i, r in enumerate(retained) if e in r], len(retained)) for e in every}
    assert wide_line(holders, len(retained)) == lattice.recovery_line(retained)


def test_what_can_not_be_compared_is_refused():
    with pytest.raises(ValueError, match="no domains"):
        Wide.of(())
    one, two = Wide.of((Epoch(1, 1),)), Wide.of((Epoch(1, 1),) * 2)
    for compare in (one.meet, one.join, one.leq):
        with pytest.raises(ValueError, match="1 and 2 domains"):
            compare(two)
    assert mask([], 0) == 0


def test_a_hundred_thousand_domains_are_not_too_many():
    """Shows 131,072: plain and on bits agree, and what the solver lowers is as high as can be."""
    size, rng = 131_072, random.Random(0)
    levels = [Epoch(1, step) for step in range(0, 80, 10)]
    a, b = (tuple(rng.choices(levels, k=size)) for _ in range(2))
    wide_a, wide_b = Wide.of(a), Wide.of(b)
    assert wide_a.meet(wide_b) == Wide.of(lattice.meet(a, b))
    assert wide_a.join(wide_b).vector() == lattice.join(a, b)
    top = [rng.randrange(1000) for _ in range(size)]
    ring = [Constraint(i, (i + 1) % size, 3) for i in range(size)]
    found = greatest_below(top, ring)
    assert isinstance(found, Solution)
    assert not lattice.violated(found.vector, ring)
    after = (*found.vector[1:], found.vector[0])
    assert all(v == min(t, w + 3) for v, t, w in zip(found.vector, top, after, strict=True))
