"""Laws of the orders in which a few nodes are moved; pure, so that no process is needed."""

from itertools import permutations
from math import comb, factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.fleet.rehearse.walks import edges, orders, pick

THREE = orders(3)
EDGES = sorted({edge for walk in THREE for edge in edges(walk)})


def go(stops, quick):
    """Go walks as a rehearsal does, where these moves do not work; gives gone and broken ones."""
    gone, broken = [], []
    while (walk := pick(THREE, gone, broken, quick=quick)) is not None:
        assert len(gone) + len(broken) < 100, "it does not end"
        at = next((at for at, edge in enumerate(edges(walk), 1) if edge in stops), None)
        (gone if at is None else broken).append(walk[:at])
    return gone, broken


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_every_order_is_there_once(nodes):
    """For each number of nodes that are upgraded: every order of these up, times every order
    down."""
    walks = orders(nodes)
    assert len(set(walks)) == len(walks)
    sizes = range(1, nodes + 1)
    assert len(walks) == sum(comb(nodes, size) * factorial(size) ** 2 for size in sizes)
    every = {
        (up, down)
        for size in sizes
        for up in permutations(range(nodes), size)
        for down in permutations(range(nodes), size)
        if set(up) == set(down)
    }
    assert {(walk[: len(walk) // 2], walk[len(walk) // 2 :]) for walk in walks} == every


def test_a_walk_comes_back_to_all_old():
    """Each node that was upgraded is downgraded, after all upgrades; others are left alone."""
    for walk in THREE:
        half = len(walk) // 2
        assert len(set(walk[:half])) == half
        assert sorted(walk[half:]) == sorted(walk[:half])


def test_a_state_tells_a_node_that_came_back():
    """It runs what it ran before, and has what the newer version wrote."""
    assert edges((0, 1, 1, 0)) == (((), 0), ((0,), 1), ((0, 1), 1), ((0, 1, 1), 0))
    assert len({(*state, node) for state, node in EDGES}) == len(EDGES) == 39


@given(st.sets(st.sampled_from(EDGES)))
def test_every_order_is_gone_or_begins_as_one_that_broke(stops):
    """Whatever does not work: no order is left out, and none is gone for nothing."""
    gone, broken = go(stops, quick=False)
    begun = {walk[:at] for walk in THREE for at in range(len(walk) + 1)}
    assert set(broken) <= begun
    for walk in THREE:
        cut = [end for end in broken if walk[: len(end)] == end]
        assert (walk in gone) + len(cut) == 1
    assert all(edges(walk)[-1] in stops for walk in broken)
    assert not {edge for walk in gone for edge in edges(walk)} & stops


@given(st.sets(st.sampled_from(EDGES)))
def test_quickly_every_move_that_can_be_come_to_is_made(stops):
    """Whatever does not work; and no walk is gone that makes no new move."""
    gone, broken = go(stops, quick=True)
    can_be = set()
    for walk in THREE:
        for edge in edges(walk):
            can_be.add(edge)
            if edge in stops:
                break
    assert {edge for walk in gone + broken for edge in edges(walk)} == can_be
    assert len(gone) + len(broken) <= len(can_be)


def test_quick_is_quicker():
    """Where all works: 15 of 51 walks, and 66 moves for 39 that differ."""
    gone, _ = go(set(), quick=True)
    assert (len(gone), sum(map(len, gone))) == (15, 66)
    assert len(go(set(), quick=False)[0]) == len(THREE) == 51


def test_a_fleet_that_can_not_be_started_ends_it():
    """All walks begin with it."""
    for quick in (False, True):
        assert pick(THREE, [], [()], quick=quick) is None
