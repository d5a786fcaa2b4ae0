"""Files of torch.save that torch wrote (golden/write_torch.py), sound and damaged."""

import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from audit.goldens import (
    GOLDEN,
    Bomb,
    codes,
    copied,
    counters,
    cut,
    only,
    part,
    roles,
    seen,
    step,
    tensors,
    unclaimed,
    wrong,
)
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.torch_save import find
from handfast.audit.found import Clock, Role
from handfast.audit.run import audit

SOUND = ("torch/bare", "torch/everything", "torch/traps", "torch/module", "torch/ranks",
         "fsdp/one", "fsdp/two", "dcp/fsdp1/saved")  # fmt: skip


@pytest.mark.parametrize("variant", SOUND)
def test_sound_files_have_no_findings(variant: str) -> None:
    """A new and an old format, skipped steps, late parameters, changed betas, masks, zeros, a
    whole module in bfloat16, a file a rank: none is a fault, not even for a hint.
    """
    assert wrong(find, GOLDEN / variant) == []
    assert unclaimed(find, GOLDEN / variant) == set()


def test_a_whole_training_is_told_apart() -> None:
    """Weights, buffers and moments by the keys of the state, and whose they are by names."""
    found = only(find, GOLDEN / "torch/everything")
    assert (found.format, [one.number for one in found.steps]) == ("torch.save", [2, 4])
    said = roles(step(found, 4))
    assert said["model/first.weight"] == (Role.PARAMETER, "first.weight")
    assert said["model/mask"] == (Role.BUFFER, "mask")
    assert said["model/norm.running_var"] == (Role.BUFFER, "norm.running_var")
    assert said["optimizer/state[0]/exp_avg"] == (Role.FIRST, "first.weight")
    assert said["optimizer/state[0]/exp_avg_sq"] == (Role.SECOND, "first.weight")
    (only_part,) = step(found, 4).parts
    assert only_part.betas == {"optimizer/param_groups[0]": (0.9, 0.999)}
    assert tensors(step(found, 4))["optimizer/state[0]/exp_avg"].group in only_part.betas


def test_a_step_that_a_scaler_skipped_is_known() -> None:
    """The trainer counted four, the optimizer three: the scaler's state is there, and says why."""
    last = step(only(find, GOLDEN / "torch/everything"), 4)
    said = counters(last)
    assert last.scaled
    assert said["step"].value == 4
    assert said["optimizer: the greatest step"].value == 3
    assert not any(counter.updates for counter in said.values())


def test_betas_that_a_schedule_moves_bound_nothing() -> None:
    """OneCycleLR moves them, so that no bound on moments holds; and Adafactor has none."""
    (one,) = only(find, GOLDEN / "torch/traps").steps
    assert part(one, "last.pt").betas == {}
    said = counters(one)
    assert {said[f"optimizers[0][{at}]"].value for at in range(4)} == {6}
    assert {said[f"optimizers[0][{at}]"].value for at in (4, 5)} == {3}
    assert said["scheduler/last_epoch"].clock is Clock.SCHEDULER


def test_a_whole_module_is_read_by_its_own_parameters() -> None:
    """What was pickled with its code is read without it, and its optimizer as well."""
    (one,) = only(find, GOLDEN / "torch/module").steps
    said = roles(one)
    assert said["module/0.weight"] == (Role.PARAMETER, "0.weight")
    assert said["optimizer/state[0]/exp_avg"] == (Role.FIRST, "optimizer[0]")
    assert tensors(one)["module/2.bias"].values.dtype == "bfloat16"


def test_files_of_ranks_are_one_step() -> None:
    """Whatever the directories are called; each says of how many it is."""
    found = only(find, GOLDEN / "torch/ranks")
    assert [(one.path, len(one.parts)) for one in found.steps] == [("step_2", 4), ("step_4", 4)]
    assert [each.rank for each in found.steps[0].parts] == [{"rank": rank} for rank in range(4)]
    assert found.steps[0].parts[0].facts == {"the world's size": 4}


@pytest.mark.parametrize("variant", ["one", "two"])
def test_a_full_state_dict_is_known_by_names(variant: str) -> None:
    """FSDP1's and FSDP2's: moments and parameters go by one name."""
    found = only(find, GOLDEN / "fsdp" / variant)
    assert found.format == "FSDP full state dict"
    assert [one.number for one in found.steps] == [3, 6]
    said = roles(step(found, 6))
    assert said["optimizer/state/last.bias/exp_avg"] == (Role.FIRST, "last.bias")
    assert said["model/last.bias"] == (Role.PARAMETER, "last.bias")
    assert counters(step(found, 6))["optimizer: the greatest step"].value == 6


def test_sharded_tensors_say_where_they_sit() -> None:
    """What FSDP1 leaves to a rank that saves by itself: pieces, and how large the job was."""
    found = seen(find, GOLDEN / "dcp/fsdp1/saved")[0]
    parts = [each for one in found.steps for each in one.parts]
    weights = [tensor for each in parts for tensor in each.tensors
               if tensor.path == "model/first.weight"]  # fmt: skip
    assert [(one.whole, one.offset) for one in weights] == [((8, 4), (0, 0)), ((8, 4), (4, 0))]
    assert [each.facts for each in parts] == [{"the world's size": 2}] * 2


# Faults


@pytest.mark.parametrize("left", [0, 100, 3000])
def test_a_file_that_was_cut_is_found(left: int, tmp_path: Path) -> None:
    """Zero-length shards came up in facebookresearch/metaseq#53."""
    path = copied("torch/ranks", tmp_path)
    cut(path / "step_4/model_rank2.pth", left)
    bad = [finding for finding in wrong(find, path) if finding.strength is Strength.CERTAIN]
    assert {finding.parts for finding in bad} == {("step_4/model_rank2.pth",)}
    assert {finding.step for finding in bad} == {"step_4"}


def test_a_rank_without_a_file_is_named(tmp_path: Path) -> None:
    """Also the last one, since the others say how many there are."""
    for rank in (1, 3):
        path = copied("torch/ranks", tmp_path / str(rank))
        os.remove(path / f"step_2/model_rank{rank}.pth")
        (finding,) = wrong(find, path)
        assert (finding.code, finding.strength) == (Code.MISSING, Strength.STRONG)
        assert f"rank {rank}'s file" in finding.says


def test_a_rank_that_writes_elsewhere_is_missing(tmp_path: Path) -> None:
    """One rank made another output directory: every save lacks its file, without an error
    (TensorAuto/OpenTau#396).
    """
    path = copied("torch/ranks", tmp_path)
    for number in (2, 4):
        (path / f"elsewhere/step_{number}").mkdir(parents=True)
        name = f"step_{number}/model_rank3.pth"
        os.rename(path / name, path / "elsewhere" / name)
    bad = wrong(find, path)
    assert {finding.code for finding in bad} == {Code.MISSING}
    assert len({finding.step for finding in bad}) == 4


def test_one_file_a_node_is_no_gap(tmp_path: Path) -> None:
    """Ranks 0, 8 and 16 are those that save on their nodes."""
    for rank in (0, 8, 16):
        torch.save({"w": torch.rand(300)}, tmp_path / f"state_rank{rank}.pt")
    assert wrong(find, tmp_path) == []
    os.remove(tmp_path / "state_rank8.pt")
    torch.save({"w": torch.rand(300)}, tmp_path / "state_rank24.pt")
    (finding,) = wrong(find, tmp_path)
    assert "rank 8's file" in finding.says


def test_names_tell_how_many_there_are(tmp_path: Path) -> None:
    """ "-00002-of-00003" is missing because the others say three; counted from one or from zero."""
    for number in (1, 3):
        torch.save({"w": torch.rand(300)}, tmp_path / f"model-{number:05}-of-00003.pt")
    (finding,) = wrong(find, tmp_path)
    assert "rank 2's file" in finding.says


def test_names_of_absurd_ranks_are_not_counted_through(tmp_path: Path) -> None:
    """A name is no reason to list a million missing files."""
    for rank in (1, 99_999_999):
        torch.save({"w": torch.rand(300)}, tmp_path / f"state_rank{rank}.pt")
    assert wrong(find, tmp_path) == []


def test_a_shard_of_another_step_is_found(tmp_path: Path) -> None:
    """A rank resumes an older state (mosaicml/composer#2146, dlrover#907): the counts say so."""
    path = copied("torch/ranks", tmp_path)
    shutil.copy(path / "step_2/model_rank1.pth", path / "step_4/model_rank1.pth")
    bad = [finding for finding in wrong(find, path) if finding.code is Code.COUNTERS]
    assert {(finding.step, finding.strength) for finding in bad} == {("step_4", Strength.HINT)}
    assert any("of different steps" in finding.says for finding in bad)


def test_links_of_ranks_that_point_to_different_steps(tmp_path: Path) -> None:
    """mosaicml/composer#2146: each rank has a link to its latest, and one save had failed."""
    path = copied("torch/ranks", tmp_path)
    for rank in range(4):
        target = f"step_{2 if rank == 3 else 4}/model_rank{rank}.pth"
        os.symlink(target, path / f"latest-rank{rank}.pth")
    found = [one for one in seen(find, path) if len(one.steps) == 1]
    assert [one.steps[0].parts[3].path for one in found] == ["latest-rank3.pth"]
    assert Code.COUNTERS in codes(find, path, Strength.HINT)


def test_a_shard_of_another_job_is_found(tmp_path: Path) -> None:
    """Of another world's size, or of another run (LMResiliency/lm-resiliency#77): by keys that are
    anybody's, so that it is a hint.
    """
    for rank in range(3):
        state = {"w": torch.rand(300), "world_size": 4 if rank else 3, "run_id": f"r{rank // 2}"}
        torch.save(state, tmp_path / f"rank_{rank}.pt")
    assert codes(find, tmp_path) == set()
    assert {Code.WORLD, Code.EXTRA} <= codes(find, tmp_path, Strength.HINT)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """torch.load returns it (pytorch/pytorch#126952); the archive's CRC-32 tells."""
    path = copied("torch/bare", tmp_path)
    data = (path / "weights.pt").read_bytes()
    weight = torch.load(path / "weights.pt")["first.weight"].numpy().tobytes()
    damaged = data.replace(weight, weight[:8] + bytes([weight[8] ^ 1]) + weight[9:])
    (path / "weights.pt").write_bytes(damaged)
    assert not torch.equal(
        torch.load(path / "weights.pt")["first.weight"],
        torch.load(GOLDEN / "torch/bare/weights.pt")["first.weight"],
    )
    (finding,) = wrong(find, path)
    assert finding.strength is Strength.CERTAIN
    assert "CRC-32" in finding.evidence[0]


def test_a_name_that_says_another_step_is_a_hint(tmp_path: Path) -> None:
    """Further apart than counting from 0 or 1 explains; AI-Hypercomputer/maxdiffusion#484 is not:
    "100" holds 101 updates in every checkpoint of it.
    """
    path = copied("torch/everything", tmp_path)
    os.rename(path / "ckpt_step_2.pt", path / "ckpt_step_3.pt")
    assert wrong(find, path) == []
    os.rename(path / "ckpt_step_3.pt", path / "ckpt_step_300.pt")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.HINT)


def test_what_a_save_left_is_a_hint(tmp_path: Path) -> None:
    """A file under its first name, beside the whole ones."""
    path = copied("torch/everything", tmp_path)
    (path / "ckpt_step_4.pt.tmp").write_bytes(b"PK")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.LEFTOVER, Strength.HINT)
    assert unclaimed(find, path) == set()


def test_a_step_saved_twice_is_found(tmp_path: Path) -> None:
    """Steps that are bit-identical: a stale buffer was written (NVIDIA-NeMo/RL#3312), or there was
    no update between them: a hint.
    """
    path = copied("torch/everything", tmp_path)
    shutil.copy(path / "ckpt_step_4.pt", path / "ckpt_step_6.pt")
    assert codes(find, path) == set()
    assert Code.STALE in codes(find, path, Strength.HINT)


def test_nothing_is_executed(tmp_path: Path) -> None:
    """Not in a file of torch.save, old or new, nor in a bare pickle; and each is reported."""
    mark = tmp_path / "executed"
    state = {"model": {"w": torch.rand(300)}, "step": 3, "bomb": Bomb(mark)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = seen(find, tmp_path)
    assert [[tensor.path for tensor in one.steps[0].parts[0].tensors] for one in found] == [
        ["model/w"],
        ["model/w"],
    ]
    assert {finding.code for finding in wrong(find, tmp_path)} == {Code.HARMFUL}
    assert not mark.exists()
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "new.pt")
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert mark.exists()  # so it was a bomb


def test_what_is_not_of_torch_save_is_left_alone(tmp_path: Path) -> None:
    """Data sets, scripted modules, archives; but not what has the name of a file of torch's."""
    (tmp_path / "tokens.bin").write_bytes(bytes(5000))
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "broken.pt").write_bytes(b"no file of torch's")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # files of it will be there for long
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "scripted.pt"))
    assert unclaimed(find, tmp_path) == {"tokens.bin", "notes.txt", "scripted.pt"}
    assert codes(find, tmp_path) == set()
    assert codes(find, tmp_path, Strength.HINT) == {Code.UNREADABLE}


def test_another_programs_file_is_told_from_one_that_was_damaged(tmp_path: Path) -> None:
    """A .ckpt of others beside checkpoints is a hint; one of a run that is torch's, or an empty
    one, is not.
    """
    for number in (1, 2):
        torch.save({"w": torch.rand(300)}, tmp_path / f"model_step_{number}.pt")
    (tmp_path / "theirs.ckpt").write_bytes(b"TDF$ of another program")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"loss": [1.0, 2.0]}))
    assert codes(find, tmp_path) == set()
    assert codes(find, tmp_path, Strength.HINT) == {Code.UNREADABLE}
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "model_step_2.pt").write_bytes(b"overwritten")
    bad = {f.step for f in wrong(find, tmp_path) if f.strength is Strength.CERTAIN}
    assert bad == {"empty.pt", "model_step_2.pt"}


def saved(folder: Path, **states: object) -> None:
    """One file of torch.save for each state."""
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")


@pytest.mark.parametrize(
    "names",
    [
        ("lora_rank4", "lora_rank8", "lora_rank16"),
        ("svd_rank10", "svd_rank100"),
        ("fold_1-of-5",),
        ("ckpt_rank0",),
    ],
)
def test_names_that_only_look_like_ranks_are_no_fault(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """LoRA's ranks, an SVD's, a fold of a cross-validation, the one rank that saves."""
    saved(tmp_path, **{name: {"w": torch.rand(300), "world_size": 8} for name in names})
    assert codes(find, tmp_path) == set()


def test_a_rank_that_is_missing_of_most_is_strong(tmp_path: Path) -> None:
    """0, 1, 3: nobody counts so on purpose."""
    saved(tmp_path, **{f"state_rank{rank}": {"w": torch.rand(300)} for rank in (0, 1, 3)})
    (finding,) = wrong(find, tmp_path)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.STRONG)
    assert "rank 2's file" in finding.says


def test_what_ranks_say_of_themselves_is_theirs_to_say(tmp_path: Path) -> None:
    """A run of wandb and a count of steps for each rank, an expert that got no gradients."""
    for rank in range(3):
        weight = torch.nn.Parameter(torch.rand(300))
        optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.zeros(300) if rank == 2 else torch.rand(300)
        optimizer.step()
        state = {
            "run_id": f"wandb-{rank}",
            "steps": 100 + rank,
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, tmp_path / f"expert_rank{rank}.pt")
    assert codes(find, tmp_path) == set()


def test_tensors_that_are_not_trained_hold_what_they_like(tmp_path: Path) -> None:
    """NaN in a buffer or an unused parameter; an average in bf16 beside the masters."""
    master = torch.rand(300)
    optimizer = {
        "state": {0: {"step": 1, "master_param": master}},
        "param_groups": [{"params": [0], "param_names": ["w"]}],
    }
    saved(tmp_path, unused={"w": torch.full((300,), torch.nan), "v": torch.rand(300)})
    ema = {"w": (master * 0.9).bfloat16()}
    saved(tmp_path, averaged={"model": ema, "optimizer": optimizer})
    assert codes(find, tmp_path) == set()


@pytest.mark.parametrize("key", ["step", "world_size"])
def test_an_absurd_number_is_read_past(key: str, tmp_path: Path) -> None:
    """Python writes out no integer of 5000 digits; an audit has no need to."""
    for rank in range(2):
        state = {"w": torch.rand(300), key: 10**5000 + rank}
        torch.save(state, tmp_path / f"step_3_rank{rank}.pt")
    assert audit(tmp_path, deep=True).sound


def test_a_generator_and_a_metric_are_no_weights(tmp_path: Path) -> None:
    """A best loss that is infinite is nobody's fault."""
    state = {
        "model": {"w": torch.rand(300)},
        "rng": {"cpu": torch.get_rng_state(), "cuda": [torch.get_rng_state()]},
        "callbacks": {"early": {"best": torch.tensor([float("inf")])}},
        "loss": torch.tensor(float("nan")),
    }
    torch.save(state, tmp_path / "all.pt")
    assert wrong(find, tmp_path) == []
    (one,) = only(find, tmp_path).steps
    assert [path for path, (role, _) in roles(one).items() if role is Role.PARAMETER] == ["model/w"]


def test_models_beside_each_other_keep_their_names(tmp_path: Path) -> None:
    """An average of weights is not the model, and each module has names of its own."""
    for index, names in enumerate((("model", "ema"), ("generator", "discriminator"))):
        state = {name: {"w": torch.rand(300)} for name in names}
        torch.save(state, tmp_path / f"{'ab'[index]}.pt")
    first, second = (roles(one.steps[0]) for one in seen(find, tmp_path))
    assert first == {"model/w": (Role.PARAMETER, "w"), "ema/w": (Role.PARAMETER, "ema/w")}
    assert {of for _, of in second.values()} == {"generator/w", "discriminator/w"}


@pytest.mark.parametrize(
    "name", ["DONE.pt", "_SUCCESS.pt", "complete.pth", "latest.pt", "step_3/done.pth.tar"]
)
def test_an_empty_file_that_is_called_a_marker_is_a_hint(name: str, tmp_path: Path) -> None:
    """It is no member of a step; with bytes in it, or a number in its name, it is what it is."""
    for number in (2, 3):
        (tmp_path / f"step_{number}").mkdir()
        torch.save({"w": torch.rand(300)}, tmp_path / f"step_{number}" / "model.pt")
    (tmp_path / name).touch()
    assert unclaimed(find, tmp_path) == set()
    assert audit(tmp_path).sound
    (finding,) = wrong(find, tmp_path)
    assert (finding.code, finding.strength) == (Code.UNREADABLE, Strength.HINT)
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    assert codes(find, tmp_path) == {Code.UNREADABLE}
    (tmp_path / name).unlink()
    (tmp_path / "done_3.pt").touch()
    assert codes(find, tmp_path) == {Code.UNREADABLE}
