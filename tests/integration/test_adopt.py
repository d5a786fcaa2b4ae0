"""Shows that another library's checkpoint becomes an epoch with the very values that it had."""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tests.audit.altered import change, copied_file, optimizer_of_before
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint._extension import ZStandard

import handfast
from handfast.audit.formats import FORMATS, dcp
from handfast.audit.found import Found
from handfast.audit.place import Place
from handfast.checkpoint.location import Location
from handfast.cli.main import app
from handfast.errors import Refused
from handfast.store.files import Posix
from handfast.store.objects import decode
from handfast.torch import guard, load
from handfast.torch.adopt import adopt
from handfast.torch.capture import EXTRA

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


def sparse() -> torch.Tensor:
    """A tensor whose values do not just lie there."""
    return torch.eye(30).to_sparse()


def in_trainer(home: Path) -> str:
    """A moment of Hugging Face Trainer's optimizer."""
    shutil.copytree(GOLDEN / "trainer" / "alone" / "out", home / "out")
    path = home / "out" / "checkpoint-4" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"][0]["exp_avg"] = sparse()
    torch.save(saved, path)
    return "state[0]/exp_avg"


def in_lightning(home: Path) -> str:
    """A weight of Lightning's."""
    shutil.copytree(GOLDEN / "lightning" / "one", home / "one")
    for path in (home / "one").rglob("*.ckpt"):
        change(path, lambda saved: saved["state_dict"].update(odd=sparse()))
    return "state_dict/odd"


def in_deepspeed(home: Path) -> str:
    """A weight of DeepSpeed's."""
    shutil.copytree(GOLDEN / "deepspeed" / "zero0-fp32-dp2", home / "run")
    path = next((home / "run").rglob("mp_rank_00_model_states.pt"))
    change(path, lambda saved: saved["module"].update(odd=sparse()))
    return "module/odd"


def in_megatron(home: Path) -> str:
    """A weight of Megatron-LM's."""
    shutil.copytree(GOLDEN / "megatron" / "legacy-tp2-dp2", home / "run")
    for path in (home / "run").rglob("model_optim_rng.pt"):
        if path.parent.name == "mp_rank_00":
            change(path, lambda saved: saved["model"].update(odd=sparse()))
    return "model/odd"


def in_dcp(home: Path) -> str:
    """What torch's distributed checkpoint pickles whole."""
    state = {"model": {"w": torch.rand(300)}, "aux": (1, sparse())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        save(state, checkpoint_id=home / "step_3", no_dist=True)
    return "aux[1]"


def in_safetensors(home: Path) -> str:
    """Numbers of four bits, of which torch has none by themselves."""
    header = {
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "odd": {"dtype": "F4", "shape": [4], "data_offsets": [16, 18]},
    }
    text = json.dumps(header).encode()
    (home / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(18))
    return "odd"


def in_orbax(home: Path) -> str:
    """An item of a handler that is somebody's own."""
    shutil.copytree(GOLDEN / "orbax" / "weights" / "200", home / "200")
    about = home / "200" / "_CHECKPOINT_METADATA"
    text = about.read_text()
    where = text.index("orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpoint")
    about.write_text(text[:where] + text[where:].replace("JsonCheckpointHandler", "OurOwn", 1))
    return "200/loader"


@pytest.mark.parametrize(
    "spoil",
    [in_trainer, in_lightning, in_deepspeed, in_megatron, in_dcp, in_safetensors, in_orbax],
)
def test_what_cant_be_carried_is_refused_by_name_in_every_format(
    spoil: Callable[[Path], str], run: str, tmp_path: Path
) -> None:
    """And left out where that is asked for; its name then stands in the epoch."""
    home = tmp_path / "source"
    home.mkdir()
    name = spoil(home)
    with pytest.raises(Refused, match=r"would be lost") as refused:
        adopt(home, run)
    assert refused.value.shards == (name,)
    assert "--without" in refused.value.remedy
    assert not Path(run).exists()
    adopted = adopt(home, run, without=[name])
    assert adopted.without == (name,)
    assert told(run)["without"] == [name]


def told(run: str) -> dict[str, Any]:
    """What an epoch says of how it was adopted."""
    (domain,) = Location([run], Posix()).survey().places
    assert domain is not None
    (entry,) = domain.entries.values()
    assert entry.manifest is not None
    tree: Any = decode(entry.manifest.objects)
    found: dict[str, Any] = tree[EXTRA]["adopted"]
    return found


def test_what_is_left_out_is_chosen_by_patterns(run: str, tmp_path: Path) -> None:
    """Readable tensors, too; a pattern that fits nothing is a mistake."""
    there = GOLDEN / "trainer" / "alone"
    with pytest.raises(Refused, match="nothing in it is called stat/"):
        adopt(there, run, without=["stat/*"])
    adopted = adopt(there, run, without=["state*"])
    assert adopted.tensors.keys() == {"model"}
    assert all("exp_avg" in name for name in adopted.without)
    assert told(run)["without"] == list(adopted.without)


def test_a_tensor_is_left_out_by_its_parameters_name(run: str, tmp_path: Path) -> None:
    """And all that an optimizer has of it; what is left out is told by its path."""
    state = {0: {"momentum_buffer": torch.rand(300)}}
    optimizer = {"state": state, "param_groups": [{"params": [0], "param_names": ["v"]}]}
    saved = {"model": {"v": torch.rand(300), "w": torch.rand(300)}, "optimizer": optimizer}
    torch.save(saved, tmp_path / "all_step_1.pt")
    adopted = adopt(tmp_path, run, without=["v"])
    assert {*adopted.without} == {"model/v", "optimizer/state[0]/momentum_buffer"}
    assert load(run, "model").keys() == {"w"}


def test_what_a_format_makes_nothing_of_is_left_out_by_name(run: str, tmp_path: Path) -> None:
    """A tensor of one's own in DeepSpeed's file: left out it is told so, and no longer as left."""
    shutil.copytree(GOLDEN / "deepspeed" / "zero0-fp32-dp2", home := tmp_path / "home")
    for path in home.rglob("mp_rank_00_model_states.pt"):
        change(path, lambda saved: saved.update(own={"table": torch.rand(300)}))
    assert "own/table" in adopt(home, run).left
    adopted = adopt(home, other := str(tmp_path / "other"), without=["own/*"])
    assert "own/table" not in adopted.left
    assert adopted.without == ("own/table",)
    assert told(other)["without"] == ["own/table"]


def test_what_is_neither_weight_nor_moment_stays_behind_and_is_told(run: str) -> None:
    """Random states, which are the other library's own."""
    adopted = adopt(GOLDEN / "trainer" / "alone", run)
    assert adopted.left
    assert told(run)["left"] == list(adopted.left)


def test_what_else_an_optimizer_has_comes_along(run: str, tmp_path: Path) -> None:
    """AMSGrad's maxima, which are no moments and no bound is known of."""
    model = nn.Linear(20, 20)
    optimizer = torch.optim.AdamW(model.named_parameters(), amsgrad=True)
    model(torch.rand(3, 20)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "all_step_1.pt")
    adopted = adopt(tmp_path, run)
    assert adopted.left == ("optimizer/param_groups",)
    found = load(run, "max_exp_avg_sq")
    saved = optimizer.state_dict()["state"]
    assert torch.equal(found["weight"], saved[0]["max_exp_avg_sq"])


def test_tensors_that_nothing_names_are_not_lost_in_silence(run: str, tmp_path: Path) -> None:
    """In a list, in an object of a class of one's own, beside a count of epochs."""
    state = {
        "model": {"w": torch.rand(300)},
        "averages": [torch.rand(300), torch.rand(300)],
        "config": argparse.Namespace(table=torch.rand(300)),
        "last_epoch": 7,
    }
    torch.save(state, tmp_path / "all_step_1.pt")
    adopted = adopt(tmp_path, run)
    assert set(adopted.left) == {"averages[0]", "averages[1]", "config/table", "last_epoch"}


def test_an_optimizers_lists_are_not_lost_in_silence(run: str, tmp_path: Path) -> None:
    """No box has lists: refused by name, or left out by name."""
    state = {0: {"GG": [torch.rand(3), torch.rand(3)], "momentum_buffer": torch.rand(300)}}
    optimizer = {"state": state, "param_groups": [{"params": [0], "param_names": ["w"]}]}
    bank = {0: torch.rand(3)}
    saved = {"model": {"w": torch.rand(300)}, "optimizer": optimizer, "memory_bank": bank}
    torch.save(saved, tmp_path / "all_step_1.pt")
    with pytest.raises(Refused, match="would be lost") as refused:
        adopt(tmp_path, run)
    assert refused.value.shards == ("optimizer/state[0]/GG[0]", "optimizer/state[0]/GG[1]")
    adopted = adopt(tmp_path, run, without=["*GG*"])
    assert (adopted.tensors, adopted.left) == (
        {"model": 1, "momentum_buffer": 1},
        ("optimizer/param_groups", "memory_bank[0]"),
    )


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


def test_files_without_a_step_are_not_guessed_at(run: str, tmp_path: Path) -> None:
    """best.pt beside last.pt: none is taken before one is named; then it is said that its step is
    not known.
    """
    for name in ("best", "last"):
        torch.save({"w": torch.rand(300)}, tmp_path / f"{name}.pt")
    with pytest.raises(Refused, match=r"best\.pt.*last\.pt.*the path of one of them"):
        adopt(tmp_path, run)
    adopted = adopt(tmp_path / "last.pt", run)
    assert adopted.why == "the only one; nothing says its step, so that it is 1 here"
    assert told(run)["why"] == adopted.why


def test_a_step_of_zero_is_one_here_and_that_is_said(run: str, tmp_path: Path) -> None:
    """Epochs begin at 1."""
    torch.save({"w": torch.rand(300)}, tmp_path / "model_step_0.pt")
    adopted = adopt(tmp_path, run)
    assert adopted.epoch.step == 1
    assert adopted.why == "the only one; its step is 0, and epochs begin at 1, so that it is 1 here"
    assert told(run)["why"] == adopted.why


def test_where_a_reader_failed_the_newest_is_not_guessed_at(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its format there may be a newer one: what failed is told, until one is named."""

    def failing(place: Place) -> Iterator[Found]:
        yield from ()
        raise KeyError(len(place.files))

    there = [failing if find is dcp.find else find for find in FORMATS]
    monkeypatch.setattr("handfast.audit.run.FORMATS", there)
    torch.save({"w": torch.rand(300)}, tmp_path / "model_step_3.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        save({"w": torch.rand(300)}, checkpoint_id=tmp_path / "step_8", no_dist=True)
    with pytest.raises(Refused, match=r"the reader of test_adopt failed.*KeyError") as refused:
        adopt(tmp_path, run)
    assert "--step" in refused.value.remedy
    assert adopt(tmp_path, run, step=3).epoch.step == 3
    assert adopt(tmp_path / "model_step_3.pt", tmp_path / "second").epoch.step == 3


def test_one_without_a_number_among_numbered_ones_is_not_guessed_at(
    run: str, tmp_path: Path
) -> None:
    """Lightning's file that says nothing of its step may be the newest, or not."""
    shutil.copytree(GOLDEN / "lightning" / "one", tmp_path / "one")
    files = sorted((tmp_path / "one").rglob("*.ckpt"))
    shutil.copyfile(files[0], files[0].with_name("best.ckpt"))
    change(files[0].with_name("best.ckpt"), lambda saved: saved.pop("global_step"))
    with pytest.raises(Refused, match=r"which of these is the newest.*best\.ckpt"):
        adopt(tmp_path, run)


def test_it_is_said_which_is_taken_and_why(run: str, tmp_path: Path) -> None:
    """The newest; the one that was asked for; of two of one step the one that a resume takes."""
    assert adopt(GOLDEN / "trainer" / "alone", run).why == "the newest of 2, 4"
    there = GOLDEN / "deepspeed" / "zero1-bf16-dp2"
    adopted = adopt(there, tmp_path / "second", step=2)
    assert (adopted.step, adopted.why) == ("global_step2", "the one of step 2")
    adopted = adopt(there, tmp_path / "third")
    assert adopted.step == "global_step4"
    assert adopted.why == "of those of step 4 the one that a resume would take"


def test_of_two_of_one_step_none_is_guessed(run: str, tmp_path: Path) -> None:
    """Where no resume would take either, they are listed."""
    for name in ("step_4", "step_04"):
        shutil.copytree(GOLDEN / "torch" / "ranks" / "step_4", tmp_path / name)
    with pytest.raises(Refused, match=r"several are of step 4.*step_04.*step_4"):
        adopt(tmp_path, run)


@pytest.mark.parametrize(
    "names",
    [
        ("2024-05-31/model", "2024-06-01/model"),
        ("model_20240531_235900", "model_20240601_000100"),
        ("weights.01-0.50", "weights.03-0.12"),
        ("model_3_0.12", "model_2_0.50"),
        ("model_0.9", "model_0.12"),
        ("epoch1_step500", "epoch2_step100"),
        ("run1_step_500", "run2_step_100"),
        ("run1_step_100", "run2_step_500"),
        ("exp_1/model", "exp_2/model"),
        ("seed_0/model", "seed_1/model"),
        ("layer_1", "layer_2"),
        ("model_125m_10", "model_350m_5"),
    ],
)
def test_names_that_may_mean_another_thing_are_not_guessed_at(
    names: tuple[str, str], run: str, tmp_path: Path
) -> None:
    """Dates, scores, runs, parts and sizes: both are listed, and each by itself is adopted."""
    paths = [tmp_path / f"{name}.pt" for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        torch.save({"w": torch.rand(300)}, path)
    with pytest.raises(Refused, match="which of these is the newest is not clear") as refused:
        adopt(tmp_path, run)
    assert len(refused.value.shards) == 2
    assert "path of one of them" in refused.value.remedy
    assert adopt(paths[0], run).tensors == {"model": 1}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("2024-05-30/model", "2024-05-31/model"),
        ("model_9", "model_10"),
        ("step_10k", "step_20k"),
        ("run1_step_100", "run1_step_500"),
        ("epoch_1_step_100", "epoch_2_step_200"),
        ("step_9/model_9", "step_10/model_10"),
        ("9/model_9", "10/model_10"),
        ("model 9", "model 10"),
    ],
)
def test_names_that_say_which_is_newer_are_gone_by(
    older: str, newer: str, run: str, tmp_path: Path
) -> None:
    """One number differs, or all of them count and rise."""
    for name in (newer, older):
        (tmp_path / f"{name}.pt").parent.mkdir(exist_ok=True)
        torch.save({"w": torch.rand(300)}, tmp_path / f"{name}.pt")
    assert adopt(tmp_path, run).step == f"{newer}.pt"


def test_a_loss_in_names_is_no_doubt_where_the_files_say_the_steps(
    run: str, tmp_path: Path
) -> None:
    """Each has the step of its name in it."""
    for step, loss in ((100, 50), (200, 12)):
        saved = {"model": {"w": torch.rand(300)}, "step": step}
        torch.save(saved, tmp_path / f"step_{step}_loss_0.{loss}.pt")
    assert adopt(tmp_path, run).epoch.step == 200


def test_files_that_counted_otherwise_than_their_names_are_not_guessed_at(
    run: str, tmp_path: Path
) -> None:
    """The greater number is on the file with the smaller count; one that is asked for by its name
    is of the step that it has counted.
    """
    for number, count in ((1, 900), (2, 100)):
        saved = {"model": {"w": torch.rand(300)}, "step": count}
        torch.save(saved, tmp_path / f"model_{number}.pt")
    with pytest.raises(Refused, match=r"step in the files is 100 and 900"):
        adopt(tmp_path, run)
    adopted = adopt(tmp_path, run, step=1)
    assert adopted.epoch.step == 900
    assert adopted.why == "the one of step 1; step in model_1.pt is 900"


def test_a_linked_directory_beside_the_candidates_may_be_the_newest(
    run: str, tmp_path: Path
) -> None:
    """A step elsewhere is not followed: none is taken but by name. One within is no other step."""
    home = tmp_path / "home"
    for folder in (home / "step_1", home / "step_2", tmp_path / "far"):
        folder.mkdir(parents=True)
        torch.save({"w": torch.rand(300)}, folder / "model.pt")
    (home / "latest").symlink_to("step_2")
    assert adopt(home, run).epoch.step == 2
    (home / "step_3").symlink_to(tmp_path / "far")
    with pytest.raises(Refused, match=r"not followed.*step_3") as refused:
        adopt(home, tmp_path / "second")
    assert "--step" in refused.value.remedy
    assert adopt(home, tmp_path / "second", step=2).epoch.step == 2
    assert adopt(home / "step_3", tmp_path / "third").tensors == {"model": 1}


def test_what_would_take_many_times_its_files_is_refused(run: str, tmp_path: Path) -> None:
    """32 GiB that one number stands for, a megabyte under a thousand names; a short one and a tied
    one are adopted.
    """
    short, tied = torch.ones(1).expand(100), torch.rand(1 << 18)
    for state in (
        {"v": short, "w": torch.zeros(1).expand(1 << 33)},
        {f"w{at}": tied for at in range(1000)},
        {f"w{at}": tied[at:] for at in range(1000)},
    ):
        torch.save(state, tmp_path / "model_step_3.pt")
        with pytest.raises(Refused, match=r"would take [\d,]+ bytes.*model/w"):
            adopt(tmp_path, run)
    torch.save({"v": short, "w": tied, "head": tied}, tmp_path / "model_step_3.pt")
    adopt(tmp_path, run)
    found = load(run, "model")
    assert torch.equal(found["v"], short)
    assert torch.equal(found["w"], found["head"])


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


def test_what_dcp_encoded_is_refused_by_name(run: str, tmp_path: Path) -> None:
    """Its values can't be read; nothing of it is lost in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        writer = FileSystemWriter(tmp_path / "step_8", _extensions=[ZStandard()])
        save({"model": {"w": torch.rand(300)}}, storage_writer=writer, no_dist=True)
    with pytest.raises(Refused, match="would be lost") as refused:
        adopt(tmp_path, run)
    assert refused.value.shards == ("model/w",)


def test_a_module_s_extra_state_is_no_weight(run: str, tmp_path: Path) -> None:
    """It stays behind and is told; a buffer that is called as counts are comes along."""
    extra = torch.zeros(30, dtype=torch.uint8)
    state = {"layer.weight": torch.rand(300), "layer._extra_state": extra, "epoch": torch.tensor(3)}
    torch.save({"model": state}, tmp_path / "model_step_3.pt")
    assert adopt(tmp_path, run).left == ("model/layer._extra_state",)
    assert load(run, "model").keys() == {"layer.weight", "epoch"}


def test_a_training_that_went_on_from_weights_alone_is_adopted(run: str, tmp_path: Path) -> None:
    """Three of its steps show that its counters go together."""
    for number in (104, 106, 108):
        made = number - 100
        source = GOLDEN / "trainer" / "alone" / "out" / "checkpoint-4"
        shutil.copytree(source, home := tmp_path / f"checkpoint-{number}")
        said = json.loads((home / "trainer_state.json").read_text()) | {"global_step": number}
        (home / "trainer_state.json").write_text(json.dumps(said))

        def counting(saved: Any, made: int = made) -> None:
            for each in saved["state"].values():
                each["step"].fill_(made)

        change(home / "optimizer.pt", counting)
        change(home / "scheduler.pt", lambda saved, made=made: saved.update(last_epoch=made))
    assert adopt(tmp_path, run, step=106).epoch.step == 106


def test_the_command_says_what_was_taken_and_what_was_not(run: str, tmp_path: Path) -> None:
    """Which step and why, what stays behind, what was left out; as JSON as well."""
    there = str(GOLDEN / "trainer" / "alone")
    told = CliRunner().invoke(app, ["adopt", there, run, "--without", "state*exp_avg_sq"])
    assert told.exit_code == 0, told.output
    words = " ".join(told.output.split())
    assert "checkpoint-4 (Hugging Face Trainer), the newest of 2, 4, as epoch 1/4" in words
    assert "not taken over: " in words
    assert "left out: " in words
    again = CliRunner().invoke(app, ["adopt", there, str(tmp_path / "other"), "--json"])
    answer = json.loads(again.output)
    assert (answer["why"], answer["without"]) == ("the newest of 2, 4", [])
    assert answer["left"]


def training(steps: int = 40, layers: int = 3) -> Iterator[tuple[int, dict[str, Any]]]:
    """A training with AdamW and a scheduler: what it would save, every ten steps."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(torch.rand(3, 20)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            yield step, {name: part.state_dict() for name, part in parts.items()}


def distributed(state: dict[str, Any], path: Path) -> None:
    """Save by torch's distributed checkpoint, in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        save(state, checkpoint_id=path, no_dist=True)


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("last", {"step": 40}, "step in last.pt is 40"),
        ("epoch_4", {"step": 40, "epoch": 4}, "step in epoch_4.pt is 40"),
        ("ckpt_4", {"step": 40, "epoch": 4}, "step in ckpt_4.pt is 40"),
        ("epoch_4", {}, "optimizer: the greatest step in epoch_4.pt is 40"),
        ("last", {"epoch": 4}, "optimizer: the greatest step in last.pt is 40"),
        ("ckpt_40", {"step": 40}, ""),
        ("ckpt_40", {"step": 39}, ""),
        ("ckpt_40", {"step": 7, "epoch": 3}, ""),
    ],
)
def test_the_step_is_what_the_files_count(
    name: str, more: dict[str, int], why: str, run: str, tmp_path: Path
) -> None:
    """A counter at the top, else the optimizer's; the number in the name only where they agree, or
    nothing is counted. It may be asked for, as that of the name may be.
    """
    *_, (_, state) = training()
    (home := tmp_path / "home").mkdir()
    torch.save({**state, **more}, home / f"{name}.pt")
    adopted = adopt(home, run)
    assert adopted.epoch.step == 40
    assert adopted.why == "; ".join(filter(None, ("the only one", why)))
    assert adopt(home, tmp_path / "second", step=40).epoch.step == 40
    if "4" in name:
        named = int(name.rpartition("_")[2])
        assert adopt(home, tmp_path / "third", step=named).epoch.step == 40


def test_of_two_without_a_number_the_one_that_counted_it_is_taken(run: str, tmp_path: Path) -> None:
    """best.pt and last.pt, by the step that each has counted."""
    for step, state in training():
        if step > 20:
            name = "best" if step == 30 else "last"
            torch.save({**state, "step": step}, tmp_path / f"{name}.pt")
    with pytest.raises(Refused, match="--step where its name or its files say a step"):
        adopt(tmp_path, run)
    adopted = adopt(tmp_path, run, step=30)
    assert (adopted.step, adopted.epoch.step) == ("best.pt", 30)


def in_one(home: Path, step: int, state: dict[str, Any]) -> None:
    """All in a file."""
    torch.save({**state, "step": step}, home / f"ckpt_{step}.pt")


def in_several(home: Path, step: int, state: dict[str, Any]) -> None:
    """A directory of a file each."""
    for name in state:
        (home / f"step_{step}").mkdir(exist_ok=True)
        torch.save(state[name], home / f"step_{step}" / f"{name}.pt")


def in_shards(home: Path, step: int, state: dict[str, Any]) -> None:
    """By torch's distributed checkpoint."""
    distributed({**state, "step": step}, home / f"step-{step}")


@pytest.mark.parametrize("layout", [in_one, in_several, in_shards])
@pytest.mark.parametrize("layers", [2, 12])
def test_boxes_go_by_the_weights_names_in_every_layout(
    layout: Callable[[Path, int, dict[str, Any]], None], layers: int, run: str, tmp_path: Path
) -> None:
    """Moments, and how many updates each parameter has had; also where there are ten and more."""
    home = tmp_path / "home"
    home.mkdir()
    for step, state in training(20, layers):
        layout(home, step, state)
    adopt(home, run)
    names = [f"{at}.{what}" for at in range(layers) for what in ("weight", "bias")]
    for key in ("exp_avg", "exp_avg_sq", "step"):
        box = load(run, key)
        assert box.keys() == {*names}
        for at, name in enumerate(names):
            assert torch.equal(box[name], state["optimizer"]["state"][at][key])
    assert load(run, "step")["0.bias"].dtype is torch.float32


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """With and without a decay, as many have it."""
    every = [*model.parameters()]
    return [{"params": every[::2]}, {"params": every[1::2], "weight_decay": 0.0}]


def a_part(model: nn.Module) -> list[nn.Parameter]:
    """All but the first layer."""
    return [*model.parameters()][2:]


def the_other_way(model: nn.Module) -> list[nn.Parameter]:
    """In another order, which shapes show."""
    return [*reversed([*model.parameters()])]


@pytest.mark.parametrize("given", [two_groups, a_part, the_other_way])
def test_boxes_keep_their_numbers_where_the_order_says_nothing(
    given: Callable[[nn.Module], Any], run: str, tmp_path: Path
) -> None:
    """Of two groups, of some weights alone, of shapes that don't fit: nothing is guessed."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    optimizer = torch.optim.AdamW(given(model))
    model(torch.rand(3, 20)).sum().backward()
    optimizer.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "all_step_1.pt")
    adopt(tmp_path, run)
    count = len(optimizer.state)
    for key in ("exp_avg", "step"):
        assert load(run, key).keys() == {f"optimizer[{at}]" for at in range(count)}


def test_tied_weights_and_averages_beside_them_are_no_hindrance(run: str, tmp_path: Path) -> None:
    """A tied weight has one state, under its first name; an average is another model."""
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(3, 20)).sum().backward()
    optimizer.step()
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": average}
    torch.save(saved, tmp_path / "all_step_1.pt")
    adopt(tmp_path, run)
    assert load(run, "exp_avg").keys() == {"0.weight"}


def copied_shards(home: Path) -> None:
    """Step 30's shard in step 40's directory."""
    name = "__0_0.distcp"
    shutil.copyfile(home / "step-30" / name, home / "step-40" / name)


def member_before(home: Path) -> None:
    """The optimizer of step 30 in the directory of step 40."""
    shutil.copyfile(home / "step_30" / "optimizer.pt", home / "step_40" / "optimizer.pt")


@pytest.mark.parametrize(
    ("layout", "spoil", "name"),
    [
        (in_one, copied_file, "ckpt_40.pt"),
        (in_one, optimizer_of_before, "ckpt_40.pt"),
        (in_several, member_before, "step_40"),
        (in_shards, copied_shards, "step-40"),
    ],
)
def test_what_is_of_two_steps_by_its_counts_is_refused(
    layout: Callable[[Path, int, dict[str, Any]], None],
    spoil: Callable[[Path], None],
    name: str,
    run: str,
    tmp_path: Path,
) -> None:
    """Among its run, and by itself, where an audit has only a hint; somebody may know better."""
    home = tmp_path / "home"
    home.mkdir()
    for step, state in training():
        layout(home, step, state)
    spoil(home)
    with pytest.raises(Refused, match=f"{name}.*30") as refused:
        adopt(home, run)
    assert any("30" in says for says in refused.value.shards)
    with pytest.raises(Refused, match=r"is of two steps, by what it counts") as refused:
        adopt(home / name, run)
    assert "--trust" in refused.value.remedy
    assert not Path(run).exists()
    assert adopt(home / name, run, trust=True).tensors["model"] == 6
    assert adopt(home, tmp_path / "other", step=30).epoch.step == 30


def test_what_sound_trainings_count_is_adopted(run: str, tmp_path: Path) -> None:
    """Gradients accumulated over four batches, by itself and in its run."""
    (home := tmp_path / "home").mkdir()
    for step, state in training(30):
        for each in state["optimizer"]["state"].values():
            each["step"].fill_(step // 4)
        torch.save({**state, "step": step}, home / f"ckpt_{step}.pt")
    assert adopt(home / "ckpt_30.pt", run).epoch.step == 30
    assert adopt(home, tmp_path / "other").epoch.step == 30


def test_all_that_stays_behind_is_named(run: str, tmp_path: Path) -> None:
    """Schedulers, scalers, rates, counts and arguments, by their paths; files that are these."""
    *_, (_, state) = training(10)
    more = {"step": 10, "epoch": 1, "args": {"lr": 1}, "scaler": {"scale": 1.0}, "averages": {}}
    torch.save({**state, **more}, tmp_path / "ckpt_10.pt")
    adopted = adopt(tmp_path, run)
    assert {*adopted.left} == {"optimizer/param_groups", "scheduler", *more}
    assert told(run)["left"] == list(adopted.left)
    in_several(tmp_path, 20, state)
    adopted = adopt(tmp_path / "step_20", tmp_path / "second", trust=True)
    assert {*adopted.left} == {"param_groups", "scheduler.pt"}
    in_shards(tmp_path, 10, state)
    adopted = adopt(tmp_path / "step-10", tmp_path / "third")
    assert {*adopted.left} == {"optimizer/param_groups", "scheduler", "step"}
    without = adopt(tmp_path / "step-10", tmp_path / "fourth", without=["scheduler"])
    assert without.without == ("scheduler",)


def test_a_trainers_files_that_stay_behind_are_named(run: str) -> None:
    """Hugging Face Trainer's state, its arguments and its scheduler."""
    left = adopt(GOLDEN / "trainer" / "alone", run).left
    for name in ("trainer_state.json", "training_args.bin", "scheduler.pt"):
        assert any(path.endswith(f"checkpoint-4/{name}") for path in left)


def test_the_command_trusts_where_it_is_told_to(run: str, tmp_path: Path) -> None:
    """A file that was renamed: its own step is what it counts."""
    *_, (_, state) = training(30)
    torch.save({**state, "step": 30}, tmp_path / "ckpt_40.pt")
    refused = CliRunner().invoke(app, ["adopt", str(tmp_path), run])
    assert refused.exit_code != 0
    assert "--trust" in " ".join(refused.output.split())
    told = CliRunner().invoke(app, ["adopt", str(tmp_path), run, "--trust"])
    assert told.exit_code == 0, told.output
    assert "step in ckpt_40.pt is 30, as epoch 1/30" in " ".join(told.output.split())


def test_a_file_is_left_out_by_its_path(run: str, tmp_path: Path) -> None:
    """An average beside the model, by the same names: which is meant is not guessed."""
    (home := tmp_path / "final").mkdir()
    *_, (_, state) = training(10)
    for name in ("model", "optimizer"):
        torch.save(state[name], home / f"{name}.pt")
    torch.save({key: tensor / 2 for key, tensor in state["model"].items()}, home / "ema.pt")
    with pytest.raises(Refused, match=r"have other values of it.*--without FILE"):
        adopt(home, run)
    adopted = adopt(home, run, without=["ema.pt"])
    assert adopted.without == ("ema.pt",)
    assert torch.equal(load(run, "model")["0.weight"], state["model"]["0.weight"])
    assert load(run, "exp_avg").keys() == state["model"].keys()


def test_a_tracker_that_names_what_is_gone_is_told_with_the_choice(
    run: str, tmp_path: Path
) -> None:
    """The newest that is there is taken, and that something newer was meant is not kept silent."""
    home = tmp_path / "checkpoints"
    home.mkdir()
    for step in (10, 20):
        state = {"model": nn.Linear(2, 2).state_dict(), "step": step}
        torch.save(state, home / f"step_{step}.pt")
    (home / "latest").write_text("step_30.pt")
    adopted = adopt(home, run)
    assert adopted.epoch.step == 20
    assert adopted.why.startswith("the newest of 10, 20; though ")
    assert "step_30" in adopted.why
