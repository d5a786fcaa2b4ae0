"""Shows capture and restore on real gloo ranks: DDP, FSDP2 and DTensors of other kinds.

What the ranks do stands in `rankbodies.py`; a rank that fails there fails the test here.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import rankbodies as bodies
from hypothesis import given
from hypothesis import strategies as st
from statekit import ranks
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from handfast.torch.tensors import block


@pytest.mark.parametrize(
    "body",
    [
        bodies.ddp_is_known_to_be_replicated,
        bodies.ddp_over_a_part_of_the_job_is_not_known,
        bodies.ddp_buffers_of_an_accumulation_are_each_ranks_own,
        bodies.ddp_that_is_wrapped_anew_is_seen,
        bodies.ddp_that_lets_its_ranks_differ_is_not_known,
        bodies.state_that_ranks_share_out_is_not_known,
        bodies.optimizer_state_is_left_out_where_nothing_speaks_against_it,
        bodies.a_rank_that_does_not_come_is_named,
        bodies.a_gathering_gives_all_the_data_of_all_and_leaves_none_of_it,
        bodies.zeros_that_outlive_steps_are_put_back,
        bodies.a_run_saved_under_ddp_loads_without,
        bodies.ddp_accumulation_is_seen,
        bodies.fsdp_blocks_are_recorded,
        bodies.fsdp_goes_on_bit_for_bit,
        bodies.fsdp_accumulation_is_seen,
        bodies.fsdp_gradients_that_are_held_back_go_at_a_restore,
        bodies.fsdp_over_several_meshes_is_looked_at,
        bodies.fsdp1_is_refused_with_its_successor,
        bodies.other_placements_are_refused_dry,
        bodies.a_tensor_that_each_rank_holds_whole_is_known,
        bodies.shards_that_are_cut_otherwise_between_saves_are_seen,
        bodies.a_tensor_that_is_cut_twice_along_one_dimension_is_refused,
        bodies.state_that_is_sharded_otherwise_comes_back_as_it_was,
        bodies.a_users_average_of_shards_comes_back,
        bodies.shards_that_are_not_there_yet_are_made_as_shards,
        bodies.shards_that_have_no_mesh_are_refused_dry,
        bodies.shards_are_no_extra,
    ],
    ids=lambda body: body.__name__,
)
def test_on_two_ranks(body: Callable[[int], None], tmp_path: Path) -> None:
    """Two processes with gloo, as torchrun starts them."""
    ranks(2, body, tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        bodies.fsdp_blocks_are_recorded,
        bodies.fsdp_goes_on_bit_for_bit,
        bodies.shards_that_are_not_there_yet_are_made_as_shards,
    ],
    ids=lambda body: body.__name__,
)
def test_on_one_rank(body: Callable[[int], None], tmp_path: Path) -> None:
    """A mesh of one: nothing differs in shape, and moments must be DTensors all the same."""
    ranks(1, body, tmp_path)


@st.composite
def placed(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int | None]]:
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    at = [draw(st.integers(0, size - 1)) for size in mesh]
    dims = st.none() | st.integers(0, len(shape) - 1)
    return shape, mesh, at, [draw(dims) for _ in mesh]


@given(placed())
def test_blocks_are_those_of_torch(case: tuple[list[int], list[int], list[int], list[int | None]]):
    """A law over shapes, meshes and placements: uneven, empty, one dimension sharded twice."""
    shape, mesh, at, dims = case
    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    expected = _compute_local_shape_and_global_offset(tuple(shape), tuple(mesh), at, placements)
    assert block(shape, mesh, at, dims) == expected
