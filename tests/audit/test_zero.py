"""ZeRO's flat partitions: laws of how parameters are cut, of any shapes and for any job."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit.extent import Extent, Held
from handfast.audit.formats.zero import (
    Stretch,
    betas_of,
    cut_everywhere,
    cut_groups,
    cut_parameters,
    dotted,
    flat,
    mapped,
    named_shapes,
    settled,
)
from handfast.audit.tree import Object

SHAPE = st.lists(st.integers(0, 5), max_size=3).map(tuple)
GROUP = st.lists(SHAPE, min_size=1, max_size=5).map(
    lambda shapes: {f"p{at}": shape for at, shape in enumerate(shapes)}
)


@given(st.lists(GROUP, min_size=1, max_size=3), st.integers(1, 7), st.integers(0, 3))
def test_rows_of_all_ranks_tile_every_parameter(
    shapes: list[dict[str, tuple[int, ...]]], world: int, padding: int
) -> None:
    """Stages 1 and 2, with padding behind each parameter: each element is in one row, once."""
    paddings = [[padding] * len(named) for named in shapes]
    sizes = [
        -(-sum(math.prod(shape) + padding for shape in named.values()) // world) for named in shapes
    ]
    found = [
        (rank, place)
        for rank in range(world)
        for place in cut_groups(shapes, paddings, sizes, rank)
    ]
    tiles(shapes, [place for _, place in found])
    assert all(place.at + place.length <= sizes[place.group] for _, place in found)
    by_parameter = sorted(place for _, place in found)
    assert sorted(cut_everywhere(shapes, paddings, sizes)) == by_parameter


@given(st.lists(GROUP, min_size=1, max_size=3), st.integers(1, 7))
def test_shares_of_all_ranks_tile_every_parameter(
    shapes: list[dict[str, tuple[int, ...]]], world: int
) -> None:
    """Stage 3: and the shares of one rank follow one another."""
    ranks = [list(cut_parameters(shapes, world, rank)) for rank in range(world)]
    tiles(shapes, [place for found in ranks for place in found])
    for found in ranks:
        for one, other in pairwise(place for place in found):
            if one.group == other.group:
                assert one.at + one.length <= other.at


def tiles(shapes: list[dict[str, tuple[int, ...]]], found: list[Stretch]) -> None:
    """Hold stretches against the parameters: from 0 to the end, without gaps."""
    for group, named in enumerate(shapes):
        for name, shape in named.items():
            own = sorted(
                (place.start, place.start + place.length)
                for place in found
                if (place.group, place.name) == (group, name)
            )
            ends = [(0, 0), *own, (math.prod(shape), math.prod(shape))]
            assert all(one[1] == other[0] for one, other in pairwise(ends))


def test_a_piece_is_taken_of_dense_values_alone() -> None:
    """And not beyond their end."""
    held = Held(bytes(range(24)), "held")
    whole = Extent(held, "uint8", (4, 6), (6, 1))
    piece = flat(whole, 5, 3)
    assert piece is not None
    assert b"".join(map(bytes, piece.blocks(2))) == bytes((5, 6, 7))
    assert flat(whole, 20, 5) is None
    assert flat(Extent(held, "uint8", (6, 4), (1, 6)), 0, 4) is None


@pytest.mark.parametrize(
    ("node", "found"),
    [
        ([{"w": (2, 3)}, {"b": [4]}], [{"w": (2, 3)}, {"b": (4,)}]),
        ({"w": (2,)}, [{"w": (2,)}]),
        (None, None),
        ([3], None),
        ([{3: (2,)}], None),
        ([{"w": 2}], None),
        ([{"w": (-1,)}], None),
        ([{"w": ("2",)}], None),
    ],
)
def test_shapes_are_taken_only_as_shapes(node: object, found: object) -> None:
    """What is none says nothing."""
    assert named_shapes(node) == found


def test_mappings_are_read_by_their_fields() -> None:
    """Of objects; what has none of them fits nowhere."""
    address = Object("deepspeed.utils.tensor_fragment.fragment_address")
    address.fields = {"numel": 4, "start": 2}
    assert mapped([{"w": address, "x": Object("other"), "y": None}]) == [
        {"w": (2, 4), "x": (-1, -1)}
    ]
    assert mapped(None) is None
    assert mapped([None]) is None


def test_leaves_are_named_by_their_keys() -> None:
    """A dict that is met again is not entered again: else ten of them would never end."""
    shared: dict[str, object] = {"w": 1}
    for _ in range(100):
        shared = {"a": shared, "b": shared}
    assert list(dotted(shared)) == [(".".join(["a"] * 100 + ["w"]), 1)]
    assert list(dotted({"a": {"b": 1, 2: 3}, "c": [4]})) == [("a.b", 1), ("c", [4])]


def test_betas_and_versions() -> None:
    """Betas that a schedule moves are none; releases that counted one step more are known."""
    assert betas_of({"betas": (0.9, 0.99)}) == (0.9, 0.99)
    for group in ({}, {"betas": 3}, {"betas": (0.9,)}, {"betas": (1, 0.9)},
                  {"betas": (0.9, 0.99), "max_momentum": 0.95}):  # fmt: skip
        assert betas_of(group) is None
    assert settled("0.15.0")
    assert settled("1.0")
    assert not settled("0.14.4+cu121")
    assert not settled(None)
    assert not settled("main")
