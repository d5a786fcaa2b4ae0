"""Shows that another library's checkpoint becomes an epoch with the very values that it had."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import handfast
from handfast.errors import Refused
from handfast.torch import guard, load
from handfast.torch.adopt import adopt

GOLDEN = Path(__file__).parents[1] / "audit" / "golden"


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A path with no run on it."""
    return str(tmp_path / "run")


def weights_of(module: dict[str, torch.Tensor]) -> nn.Module:
    """A module with such names and shapes, and other values."""
    root = nn.Module()
    for name, tensor in module.items():
        *above, last = name.split(".")
        holder = root
        for step in above:
            if not hasattr(holder, step):
                holder.add_module(step, nn.Module())
            holder = getattr(holder, step)
        holder.register_parameter(last, nn.Parameter(torch.zeros_like(tensor)))
    return root


def test_weights_and_moments_come_bit_for_bit(run: str) -> None:
    """Hugging Face Trainer's: what safetensors and torch read of its files."""
    there = GOLDEN / "trainer" / "alone" / "out" / "checkpoint-4"
    adopted = adopt(there.parent, run)
    expected = load_file(there / "model.safetensors")
    found = load(run, "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    saved = torch.load(there / "optimizer.pt", weights_only=True)
    moments = {value["exp_avg"].sum().item() for value in saved["state"].values()}
    assert {value.sum().item() for value in load(run, "exp_avg").values()} == moments
    assert (adopted.format, adopted.epoch.step) == ("Hugging Face Trainer", 4)
    (shard,) = handfast.open(run).inspect().shards
    (fork,) = shard.stamp.forks
    assert (fork.lineage, fork.step) == (shard.stamp.lineage, 4) == ("adopted", 4)
    assert "checkpoint-4: an audit found nothing against it" in fork.why


def test_it_is_loaded_into_a_live_module_as_a_fine_tuning(run: str) -> None:
    """By ``guard.load``, with a lineage of its own; the optimizer begins anew."""
    there = GOLDEN / "trainer" / "alone" / "out" / "checkpoint-4"
    adopt(there.parent, run)
    expected = load_file(there / "model.safetensors")
    model = weights_of(expected)
    guard.load(run, model=model, lineage="sft")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    came = guard.origin(model)
    assert came is not None
    assert [fork.lineage for fork in came.history.forks] == ["adopted", "sft"]


@pytest.mark.parametrize(
    "variant", ["dcp/fsdp2", "deepspeed/zero3-bf16-dp2", "orbax/sharded", "torchtitan/two"]
)
def test_shards_of_ranks_become_whole_tensors(variant: str, run: str) -> None:
    """Several ranks' files, none of which has a tensor whole."""
    adopted = adopt(GOLDEN / variant, run)
    assert adopted.tensors["model"] > 0
    assert all(tensor.numel() for tensor in load(run, "model").values())
    assert handfast.open(run).verify().sound


def test_an_older_step_is_taken_where_that_is_asked_for(run: str) -> None:
    """And a step that is not there is refused by name, with what is."""
    there = GOLDEN / "trainer" / "alone"
    with pytest.raises(Refused, match=r"no checkpoint of step 3.*2, 4"):
        adopt(there, run, step=3)
    assert adopt(there, run, step=2).epoch.step == 2


def test_copies_of_ranks_that_differ_are_refused(run: str, tmp_path: Path) -> None:
    """Which of them would be right is not for an adoption to choose."""
    for rank in range(2):
        torch.save({"w": torch.full((300,), float(rank))}, tmp_path / f"state_rank{rank}.pt")
    with pytest.raises(Refused, match=r"w: .*state_rank0\.pt.*state_rank1\.pt"):
        adopt(tmp_path, run)
    assert not Path(run).exists()


def test_pieces_that_do_not_fit_are_refused(run: str, tmp_path: Path) -> None:
    """Two ranks' tensors of one name, the second larger."""
    for rank in range(2):
        torch.save({"w": torch.zeros(300 + rank)}, tmp_path / f"state_rank{rank}.pt")
    with pytest.raises(Refused, match=r"w: .*state_rank1\.pt"):
        adopt(tmp_path, run)


@pytest.mark.parametrize(
    "layout", [torch.Tensor.to_sparse, lambda t: t.to("meta"), lambda t: t.to(torch.cfloat).conj()]
)
def test_a_weight_without_plain_values_is_refused(
    layout: Callable[[torch.Tensor], torch.Tensor], run: str, tmp_path: Path
) -> None:
    """It would be lost in silence."""
    state = {"w": torch.rand(300), "odd": layout(torch.eye(30))}
    torch.save({"model": state}, tmp_path / "model_step_3.pt")
    with pytest.raises(Refused, match="model/odd"):
        adopt(tmp_path, run)


@pytest.mark.parametrize(
    "names", [("attn.to.weight",), ("forward",), ("a", "a.b"), ("a.b", "a"), ("a..b",), ("",)]
)
def test_names_that_no_module_can_have_come_in_a_box(
    names: tuple[str, ...], run: str, tmp_path: Path
) -> None:
    """A state dict is anybody's to name."""
    state = {name: torch.rand(300) for name in (*names, "plain.weight")}
    torch.save(state, tmp_path / "model_step_3.pt")
    adopt(tmp_path, run)
    found = load(run, "model")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_of_several_runs_none_is_chosen(run: str, tmp_path: Path) -> None:
    """They are listed; each by itself is adopted."""
    for name in ("first_step_3", "second_step_8"):
        torch.save({"w": torch.rand(300)}, tmp_path / f"{name}.pt")
    with pytest.raises(Refused, match=r"first_step_3\.pt.*second_step_8\.pt"):
        adopt(tmp_path, run)
    assert adopt(tmp_path / "first_step_3.pt", run).epoch.step == 3


def test_a_tensor_that_repeats_its_storage_without_end_is_refused(run: str, tmp_path: Path) -> None:
    """zeros(1).expand(2**33): 32 GiB that one number stands for; a short one is adopted."""
    short = torch.ones(1).expand(100)
    torch.save({"v": short, "w": torch.zeros(1).expand(1 << 33)}, tmp_path / "model_step_3.pt")
    with pytest.raises(Refused, match=r"w: .*repeats"):
        adopt(tmp_path, run)
    torch.save({"v": short}, tmp_path / "model_step_3.pt")
    adopt(tmp_path, run)
    assert torch.equal(load(run, "model")["v"], short)


def torn(run: Path) -> None:
    """A shard of the step before."""
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copyfile(run / "global_step2" / name, run / "global_step4" / name)


def shortened(run: Path) -> None:
    """A file that was cut."""
    name = run / "global_step4" / "mp_rank_00_model_states.pt"
    name.write_bytes(name.read_bytes()[:-1000])


@pytest.mark.parametrize("spoil", [torn, shortened])
def test_what_is_not_sound_is_not_adopted(
    spoil: Callable[[Path], None], run: str, tmp_path: Path
) -> None:
    """It says why; and an older step that is sound still may be."""
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "deepspeed" / "zero1-bf16-dp2", source)
    shutil.rmtree(source / "global_step4_universal")
    spoil(source)
    with pytest.raises(Refused, match="global_step4 is not sound"):
        adopt(source, run)
    assert not Path(run).exists()
    assert adopt(source, run, step=2).epoch.step == 2


def test_a_run_that_is_there_is_left_alone(run: str) -> None:
    """What is adopted begins a run."""
    there = GOLDEN / "trainer" / "alone"
    adopt(there, run)
    with pytest.raises(Refused, match="is a run already"):
        adopt(there, run, step=2)
    assert [str(row.epoch) for row in handfast.open(run).epochs()] == ["1/4"]
