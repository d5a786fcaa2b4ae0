"""Checkpoints that DeepSpeed wrote (golden/write_deepspeed.py), sound and damaged.

Each fault is made in a copy. Threads that a test rebuilds are named in its docstring.
"""

import io
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.altered import change
from audit.goldens import (
    GOLDEN,
    Bomb,
    codes,
    copied,
    cut,
    flip,
    only,
    part,
    step,
    unclaimed,
    wrong,
)
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.deepspeed import find
from handfast.audit.formats.deepspeed_parts import Model, read_model
from handfast.audit.found import Clock, Part, Resume, Role, Step, Tensor

HERE = "deepspeed"
VARIANTS = sorted(path.name for path in (GOLDEN / HERE).iterdir())
MODEL = "mp_rank_00_model_states.pt"


def optim(dp: int, mp: int = 0, prefix: str = "bf16_") -> str:
    """The name of a rank's partition."""
    return f"{prefix}zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"


def last(path: Path) -> Step:
    """The last step of a run that is no universal one."""
    return [one for one in only(find, path).steps if not one.path.endswith("universal")][-1]


def named_tensors(one: Part, role: Role) -> dict[tuple[str, tuple[int, ...] | None], Tensor]:
    """The tensors of a role by what they belong to, and where they begin."""
    return {(t.of, t.offset): t for t in one.tensors if t.role is role}


def resumes(path: Path) -> list[tuple[str, str]]:
    """What each rank would take."""
    return [(each.ranks, each.step) for each in only(find, path).resume]


# Sound ones


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """All stages, precisions and sizes of jobs, with skipped steps and frozen parameters."""
    path = GOLDEN / HERE / variant
    assert wrong(find, path) == []
    assert unclaimed(find, path) == set()
    for one in only(find, path).steps:
        assert not one.missing
        assert not one.extra
        assert not any(each.problem for each in one.parts)


@pytest.mark.parametrize(
    ("variant", "stage"), [("zero1-bf16-dp2", 1), ("zero2-fp16-dp3", 2), ("zero3-bf16-dp2", 3)]
)
def test_partitions_are_cut_as_the_library_puts_them_together(variant: str, stage: int) -> None:
    """The masters of all ranks, each piece at its place, tile every parameter; and where weights
    are saved, they are their rounding.
    """
    one = last(GOLDEN / HERE / variant)
    pieces: dict[str, list[tuple[int, int]]] = {}
    for each in one.parts:
        for tensor in each.tensors:
            if tensor.role is Role.MASTER:
                assert tensor.offset is not None
                assert tensor.whole is not None
                (count,), (start,) = tensor.values.shape, tensor.offset
                pieces.setdefault(tensor.of, []).append((start, start + count))
                assert start + count <= tensor.whole[0]
    assert pieces.keys() == {
        f"{module}.{kind}" for module in ("norm", "inner", "outer") for kind in ("weight", "bias")
    } | {"embedding.weight"}
    for name, found in pieces.items():
        ends = sorted(found)
        assert ends[0][0] == 0, name
        assert all(a[1] == b[0] for a, b in pairwise(ends)), name
    assert len(pieces["inner.weight"]) > 1, f"stage {stage} cuts it"


def test_moments_stand_beside_their_masters() -> None:
    """Under the parameter's name, at the same place, with the group's betas."""
    one = part(last(GOLDEN / HERE / "zero1-bf16-dp2"), optim(1))
    masters, first, second = (
        named_tensors(one, role) for role in (Role.MASTER, Role.FIRST, Role.SECOND)
    )
    assert masters.keys() == first.keys() == second.keys()
    assert {t.group for t in second.values()} == {"group 0", "group 1"} == set(one.betas)
    assert one.betas["group 0"] == (0.9, 0.95)
    assert one.rank == {"dp": 1, "mp": 0}


def test_values_are_those_that_the_engine_had() -> None:
    """The pieces of the masters give what ds_to_universal put together of the same step."""
    path = GOLDEN / HERE / "zero2-fp32-dp2"
    weights = torch.load(path / "global_step4" / MODEL, weights_only=False)["module"]
    whole = torch.zeros(13 * 7)
    for each in last(path).parts:
        for (name, offset), tensor in named_tensors(each, Role.MASTER).items():
            if name == "inner.weight" and offset is not None:
                row = bytearray(b"".join(map(bytes, tensor.values.blocks(3))))
                found = torch.frombuffer(row, dtype=torch.float32)
                whole[offset[0] : offset[0] + len(found)] = found
    assert torch.equal(whole.view(13, 7), weights["inner.weight"])


def test_counters_are_read_by_their_clocks() -> None:
    """What the engine took, less what the scaler skipped, is what the optimizer made."""
    one = last(GOLDEN / HERE / "zero2-fp16-dp3")
    assert one.scaled
    said = {counter.path: counter for each in one.parts for counter in each.counters}
    assert said["global_stepN"].clock is Clock.DIRECTORY
    assert (said["global_steps"].value, said["skipped_steps"].value) == (10, 1)
    assert (said["the step of group 0"].value, said["the step of group 0"].skips) == (9, True)
    assert said["global_steps"].updates
    assert not said["loss_scaler/cur_iter"].updates
    assert said["lr_scheduler/last_batch_iteration"].value == 8


def test_an_optimizer_that_is_wrapped_without_zero_counts_one_step_more() -> None:
    """It steps once as it begins, with gradients of zero: no fault, and so no count of updates."""
    one = last(GOLDEN / HERE / "zero0-bf16-dp2")
    (counter,) = [c for c in one.parts[0].counters if c.clock is Clock.OPTIMIZER]
    assert (counter.value, counter.updates) == (4, False)
    (plain_one,) = [
        c for c in last(GOLDEN / HERE / "zero0-fp32-dp2").parts[0].counters
        if c.clock is Clock.OPTIMIZER
    ]  # fmt: skip
    assert (plain_one.value, plain_one.updates) == (4, True)


def test_frozen_parameters_have_no_masters() -> None:
    """Stage 2 has them in the model's file, stage 3 a share in each rank's."""
    two = part(last(GOLDEN / HERE / "zero2-fp32-dp2"), MODEL)
    assert ("embedding.weight", None) in named_tensors(two, Role.PARAMETER)
    three = last(GOLDEN / HERE / "zero3-fp32-dp3")
    found = [
        tensor.values.shape
        for each in three.parts
        for (name, _), tensor in named_tensors(each, Role.PARAMETER).items()
        if name == "embedding.weight"
    ]
    assert found == [(26,), (26,), (25,)], "the last one without its padding"


def test_what_a_load_takes_is_told() -> None:
    """`latest`; and for stage 3 what DeepSpeed#8499 does.

    deepspeedai/DeepSpeed#8499: stage 3 with load_optimizer_states=False ignores the tag.
    """
    assert resumes(GOLDEN / HERE / "zero2-fp16-dp3") == [("all ranks", "global_step10")]
    assert resumes(GOLDEN / HERE / "zero3-bf16-dp2") == [
        ("all ranks", "global_step3"),
        ("all ranks, with load_optimizer_states=False", "global_step3"),
        ("all ranks", "global_step3_universal"),
    ]
    found = only(find, GOLDEN / HERE / "zero3-bf16-dp2")
    assert "whichever was asked for" in found.resume[1].rule


def test_a_step_for_itself_is_known(tmp_path: Path) -> None:
    """The directory of a tag, without `latest`; by any name."""
    shutil.copytree(GOLDEN / HERE / "zero1-bf16-dp2/global_step4", tmp_path / "best")
    found = only(find, tmp_path / "best")
    assert [(one.path, one.number) for one in found.steps] == [("", None)]
    assert wrong(find, tmp_path / "best") == []
    assert found.resume == [Resume("all ranks", "", found.resume[0].rule)]


# Parts


def test_shards_of_another_node_are_missing(tmp_path: Path) -> None:
    """Which ranks lack theirs is told, and that they go on without moments or not at all.

    EleutherAI/gpt-neox#750: the other node's ZeRO shards are not there, and a warning is all.
    """
    path = copied(f"{HERE}/zero2-fp16-dp3", tmp_path)
    for rank in (1, 2):
        (path / "global_step10" / optim(rank, prefix="")).unlink()
    one = last(path)
    assert [missing for missing, _ in one.missing] == [
        f"global_step10/{optim(rank, prefix='')}" for rank in (1, 2)
    ]
    assert "3 data- by 1 model-parallel" in one.missing[0][1]
    assert codes(find, path) == {Code.MISSING}
    assert resumes(path) == [
        ("all other ranks", "global_step10"),
        ("dp ranks 1, 2 of mp rank 0", ""),
    ]


@pytest.mark.parametrize("variant", ["zero1-bf16-dp2", "zero3-bf16-dp2"])
def test_no_partition_at_all(variant: str, tmp_path: Path) -> None:
    """Nothing but the model's files came over: their names are known by the configuration."""
    path = copied(f"{HERE}/{variant}", tmp_path)
    tag = Path(last(path).path)
    for found in (path / tag).glob("*optim_states.pt"):
        found.unlink()
    assert [missing for missing, _ in last(path).missing] == [
        f"{tag}/{optim(0)}",
        f"{tag}/{optim(1)}",
    ]


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("zero1-bf16-dp2", MODEL),
        ("zero1-bf16-dp2-mp2", "mp_rank_01_model_states.pt"),
        ("zero3-bf16-dp2", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("zero0-fp32-dp2", MODEL),
    ],
)
def test_a_models_file_is_missing(variant: str, name: str, tmp_path: Path) -> None:
    """Also the only one: then nothing says the job's size, but that there has to be one."""
    path = copied(f"{HERE}/{variant}", tmp_path)
    tag = Path(last(path).path)
    (path / tag / name).unlink()
    if variant.startswith("zero0"):
        assert codes(find, path) == {Code.TRACKER}, "no file is left: the step is gone"
        return
    assert [missing for missing, _ in last(path).missing] == [f"{tag}/{name}"]
    assert Code.MISSING in codes(find, path)


def test_files_of_a_larger_job_are_extra(tmp_path: Path) -> None:
    """A tag that was saved again by fewer ranks keeps the files of those that are gone."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    folder = path / "global_step4"
    shutil.copy(folder / optim(1), folder / optim(2))
    one = last(path)
    assert [extra for extra, _ in one.extra] == [f"global_step4/{optim(2)}"]
    assert codes(find, path) == {Code.EXTRA}
    assert not any(each.path.endswith(optim(2)) for each in one.parts)


def test_files_of_another_stage_or_precision_are_extra(tmp_path: Path) -> None:
    """They have other names, and are left beside those of the save that came later."""
    path = copied(f"{HERE}/zero3-bf16-dp2", tmp_path)
    folder = path / "global_step3"
    shutil.copy(GOLDEN / HERE / "zero1-bf16-dp2/global_step4" / MODEL, folder / MODEL)
    shutil.copy(folder / optim(0), folder / optim(0, prefix=""))
    assert {Path(extra).name for extra, _ in last(path).extra} == {MODEL, optim(0, prefix="")}
    assert codes(find, path) == {Code.EXTRA}


def test_a_partition_of_a_job_of_another_size_does_not_fit(tmp_path: Path) -> None:
    """Its row is of another length, its pieces are others, and it says of how many ranks it is."""
    path = copied(f"{HERE}/zero2-fp32-dp2", tmp_path)
    target = path / "global_step4" / optim(1, prefix="")

    def widen(state: Any) -> None:
        inner = state["optimizer_state_dict"]
        inner["partition_count"] = [3]
        inner["single_partition_of_fp32_groups"] = [torch.zeros(54)]

    change(target, widen)
    found = codes(find, path)
    assert {Code.INDEX, Code.WORLD} <= found


def test_a_partition_of_another_rank_does_not_fit(tmp_path: Path) -> None:
    """A rank's file under another's name has what that one has, by the mappings in it."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    folder = path / "global_step4"
    shutil.copy(folder / optim(0), folder / optim(1))
    assert {Code.INDEX, Code.IDENTICAL} <= codes(find, path) | {Code.IDENTICAL}
    (finding,) = [each for each in wrong(find, path) if each.code is Code.INDEX]
    assert finding.strength is Strength.CERTAIN
    assert finding.parts == (f"global_step4/{optim(1)}",)


@pytest.mark.parametrize("variant", ["zero1-bf16-dp2", "zero2-fp16-dp3", "zero3-bf16-dp2"])
def test_a_partition_of_another_step_is_found_by_its_count(variant: str, tmp_path: Path) -> None:
    """One rank's file is older than the others': the optimizer says so, and so do its weights."""
    path = copied(f"{HERE}/{variant}", tmp_path)
    first, final, *_ = [one.path for one in only(find, path).steps]
    (name, *_) = sorted(each.name for each in (path / first).glob("*_optim_states.pt"))
    shutil.copy(path / first / name, path / final / name)
    found = [each for each in wrong(find, path) if each.code is Code.COUNTERS]
    assert any(each.strength is Strength.CERTAIN and name in str(each.parts) for each in found)
    masters = Code.MASTER in codes(find, path)
    assert masters == (variant != "zero3-bf16-dp2"), "stage 3 saves no weights to compare with"


def test_a_models_file_of_another_step_is_found(tmp_path: Path) -> None:
    """Weights of step 2 with the optimizer of step 4: masters, engine and directory tell."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    shutil.copy(path / "global_step2" / MODEL, path / "global_step4" / MODEL)
    assert {Code.COUNTERS, Code.MASTER} <= codes(find, path)


def test_a_partition_of_another_run_is_found_by_its_masters(tmp_path: Path) -> None:
    """The same step, shapes and names, but not the masters of these weights.

    As LMResiliency/lm-resiliency#77, where another run's shard was taken.
    """
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)

    def other(state: Any) -> None:
        inner = state["optimizer_state_dict"]
        for row in inner["single_partition_of_fp32_groups"]:
            row.data.mul_(1.5)

    change(path / "global_step4" / optim(0), other)
    assert Code.MASTER in codes(find, path)


def test_float32_weights_that_are_not_their_masters(tmp_path: Path) -> None:
    """Trained in float32, ZeRO's masters are the weights themselves, to the bit."""
    path = copied(f"{HERE}/zero2-fp32-dp2", tmp_path)

    def nudge(state: Any) -> None:
        state["module"]["outer.bias"][0] += 1e-6

    change(path / "global_step4" / MODEL, nudge)
    (finding,) = [each for each in wrong(find, path) if each.strength is Strength.CERTAIN]
    assert finding.code is Code.REPLICAS
    assert "outer.bias" in finding.says


def test_norms_of_tensor_parallel_ranks_that_differ(tmp_path: Path) -> None:
    """The patterns in the file say which are copies; ds_to_universal stops at such a difference."""
    path = copied(f"{HERE}/zero1-bf16-dp2-mp2", tmp_path)

    def nudge(state: Any) -> None:
        state["module"]["norm.weight"][0] += 0.5

    change(path / "global_step3/mp_rank_01_model_states.pt", nudge)
    found = [each for each in wrong(find, path) if each.step == "global_step3"]
    assert {each.code for each in found} == {Code.REPLICAS, Code.MASTER}


@pytest.mark.parametrize("variant", ["zero0-fp32-dp2", "zero1-bf16-dp2"])
def test_what_a_module_says_beside_its_weights_is_none(variant: str, tmp_path: Path) -> None:
    """TransformerEngine's bytes, as a tensor."""
    path = copied(f"{HERE}/{variant}", tmp_path)
    extra = torch.zeros(30, dtype=torch.uint8)
    for file in path.rglob("*model_states.pt"):
        change(file, lambda saved: saved["module"].update({"inner._extra_state": extra}))
    assert wrong(find, path) == []
    said = {t.path: t.role for each in last(path).parts for t in each.tensors}
    assert said["module/inner._extra_state"] is Role.OTHER


def test_no_more_is_said_of_an_optimizer_than_there_is_memory_for() -> None:
    """Without ZeRO its state is as large as a training's."""
    state = {at: {"step": at} for at in range(200)}
    root = {"optimizer": {"state": state, "param_groups": []}}
    for memory, problem in ((1 << 20, False), (1 << 17, True)):
        model = Model(Part("model"), root, -1, 0)
        read_model(model, None, False, memory)
        assert ("too many objects" in model.part.problem) is problem


# Counters


def test_an_optimizer_that_was_not_restored(tmp_path: Path) -> None:
    """It counts from the start again, and the engine goes on.

    DeepSpeed PR#564: moments that a load dropped.
    """
    path = copied(f"{HERE}/zero3-bf16-dp2", tmp_path)
    for rank in range(2):

        def restart(state: Any) -> None:
            inner = state["optimizer_state_dict"]["optimizer_state_dict"]
            for own in inner["state"].values():
                own["step"].fill_(1)

        change(path / "global_step3" / optim(rank), restart)
    (finding,) = [each for each in wrong(find, path) if each.code is Code.COUNTERS]
    assert finding.strength is Strength.STRONG


def test_skipped_steps_that_do_not_add_up(tmp_path: Path) -> None:
    """With a loss scaler an optimizer may lag, but by what the engine says was skipped."""
    path = copied(f"{HERE}/zero2-fp16-dp3", tmp_path)

    def unsay(state: Any) -> None:
        state["skipped_steps"] = 0

    change(path / "global_step10" / MODEL, unsay)
    (finding,) = wrong(find, path)
    assert finding.code is Code.COUNTERS
    assert "less skipped_steps are 10" in finding.says


def test_a_step_under_another_name(tmp_path: Path) -> None:
    """A directory that says one step, and files that say another."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    (path / "global_step4").rename(path / "global_step8")
    (path / "latest").write_text("global_step8")
    found = [each for each in wrong(find, path) if each.step == "global_step8"]
    assert [each.code for each in found] == [Code.COUNTERS]


def test_a_step_that_repeats_another(tmp_path: Path) -> None:
    """A later step whose moments are those of an earlier one: what was saved was stale.

    NVIDIA-NeMo/RL#3312: steps 90, 110 and 120 were alike to the bit. Its counters are, too, so that
    it is they who tell: the directory has another number.
    """
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    for rank in range(2):
        shutil.copy(path / "global_step2" / optim(rank), path / "global_step4" / optim(rank))
    shutil.copy(path / "global_step2" / MODEL, path / "global_step4" / MODEL)
    assert Code.COUNTERS in codes(find, path)
    assert Code.STALE in codes(find, path, Strength.HINT)


# What names a tag


def test_latest_that_leads_nowhere(tmp_path: Path) -> None:
    """It names a step that is not there, or nothing."""
    path = copied(f"{HERE}/zero2-fp16-dp3", tmp_path)
    for word in (b"global_step12", b"", b"\xff\xfe"):
        (path / "latest").write_bytes(word)
        assert codes(find, path) == {Code.TRACKER}
        assert resumes(path) == [("all ranks", "")]


def test_a_file_called_latest_is_not_always_deepspeeds(tmp_path: Path) -> None:
    """Others have one, too; even one that names such a step, of another format."""
    for word in (b"step-4", b"\xff", b"x" * 5000, b"global_step4"):
        (tmp_path / "latest").write_bytes(word)
        lost = word == b"global_step4"
        assert (codes(find, tmp_path) == {Code.TRACKER}) == lost
    (tmp_path / "global_step4").mkdir()
    (tmp_path / "global_step4/weights.safetensors").write_bytes(b"")
    assert wrong(find, tmp_path) == []


def test_latest_that_was_not_moved_on(tmp_path: Path) -> None:
    """A later step is there: its save did not end, or was told not to be the latest. A hint."""
    path = copied(f"{HERE}/zero2-fp16-dp3", tmp_path)
    (path / "latest").write_text("global_step6")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.TRACKER, Strength.HINT)
    assert finding.step == "global_step10"
    assert resumes(path) == [("all ranks", "global_step6")]


def test_without_latest_a_training_starts_anew(tmp_path: Path) -> None:
    """That is what a load does, though two steps are there."""
    path = copied(f"{HERE}/zero2-fp16-dp3", tmp_path)
    (path / "latest").unlink()
    assert resumes(path) == [("all ranks", "")]
    assert "starts anew" in only(find, path).resume[0].rule


# Bytes


@pytest.mark.parametrize("name", [MODEL, optim(0)])
@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_files_that_were_cut_are_told(name: str, keep: int, tmp_path: Path) -> None:
    """At any length, the other files of the step are still read."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    cut(path / "global_step4" / name, keep)
    one = last(path)
    assert part(one, name).problem
    assert sum(bool(each.problem) for each in one.parts) == 1
    assert codes(find, path) & {Code.UNREADABLE, Code.TRUNCATED}


def test_a_bit_that_flipped_is_found(tmp_path: Path) -> None:
    """In a moment, which nothing else tells of: by the checksum that torch never reads."""
    path = copied(f"{HERE}/zero3-bf16-dp2", tmp_path)
    target = path / "global_step3" / optim(1)
    moments: list[bytes] = []

    def look_up(state: Any) -> None:
        inner = state["optimizer_state_dict"]["optimizer_state_dict"]
        moments.append(inner["state"][0]["exp_avg"].numpy().tobytes())

    change(target, look_up)
    flip(target, target.read_bytes().index(moments[0]) + 40)
    assert codes(find, path) & {Code.CORRUPT, Code.TRUNCATED, Code.UNREADABLE}


@pytest.mark.parametrize("name", [MODEL, optim(1)])
def test_a_hostile_pickle_is_not_executed(name: str, tmp_path: Path) -> None:
    """Bare, or in a file of torch.save; it is told that DeepSpeed did not write it."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), path / "global_step4" / name)
    torch.save({"module": Bomb(mark), "optimizer_state_dict": Bomb(mark)},
               path / "global_step2" / name)  # fmt: skip
    found = only(find, path)
    assert "DeepSpeed did not write it" in part(step(found, 4), name).problem
    assert wrong(find, path)
    assert not mark.exists()


# Universal


def universal(path: Path) -> Step:
    """The universal step of a run."""
    (one,) = [one for one in only(find, path).steps if one.path.endswith("_universal")]
    return one


@pytest.mark.parametrize("variant", ["zero1-bf16-dp2", "zero3-bf16-dp2", "zero1-bf16-dp2-mp2"])
def test_universal_checkpoints_are_read_parameter_by_parameter(variant: str) -> None:
    """Each with its master, moments and step; the weights beside them are compared."""
    one = universal(GOLDEN / HERE / variant)
    inner = part(one, "zero/inner.weight")
    assert {tensor.role for tensor in inner.tensors} == {Role.MASTER, Role.FIRST, Role.SECOND}
    assert {tensor.of for tensor in inner.tensors} == {"inner.weight"}
    assert inner.betas == {"": (0.9, 0.95)}
    counted = {counter.clock for counter in inner.counters}
    stage3 = variant.startswith("zero3")  # of which no steps are converted
    assert counted == (set() if stage3 else {Clock.OPTIMIZER, Clock.PARAMETER})
    buffers = [each for each in one.parts if each.path.endswith("zero/seen")]
    assert {tensor.role for each in buffers for tensor in each.tensors} <= {Role.BUFFER}


def test_a_universal_state_is_missing(tmp_path: Path) -> None:
    """A load takes what lies in the directory, so nobody would notice."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    folder = path / "global_step4_universal/zero"
    (folder / "inner.weight/exp_avg_sq.pt").unlink()
    shutil.rmtree(folder / "outer.bias")
    assert {Path(missing).parts[-2:] for missing, _ in universal(path).missing} == {
        ("inner.weight", "exp_avg_sq.pt"),
        *(("outer.bias", f"{state}.pt") for state in ("exp_avg", "exp_avg_sq", "fp32", "step")),
    }
    assert Code.MISSING in codes(find, path)


def test_a_universal_parameter_of_another_step(tmp_path: Path) -> None:
    """Its step is another, and its master is not what the weights were rounded from."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    folder = path / "global_step4_universal/zero/inner.weight"

    def older(state: Any) -> None:
        state["param"].data.mul_(0.5)

    torch.save(torch.tensor(3.0), folder / "step.pt")
    change(folder / "fp32.pt", older)
    assert {Code.COUNTERS, Code.MASTER} <= codes(find, path)


def test_a_conversion_that_did_not_end(tmp_path: Path) -> None:
    """The slices of ds_to_universal are left, and `latest_universal` may lead to nothing."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    slices = path / "global_step4_universal/tmp/inner.weight/0"
    slices.mkdir(parents=True)
    torch.save(torch.zeros(3), slices / "fp32.00")
    (path / "latest_universal").write_text("global_step8_universal")
    assert codes(find, path) == {Code.LEFTOVER, Code.TRACKER}
    assert unclaimed(find, path) == set()


def test_universal_files_that_are_none(tmp_path: Path) -> None:
    """Cut, or of something else: told for the parameter, and never executed."""
    path = copied(f"{HERE}/zero1-bf16-dp2", tmp_path)
    folder = path / "global_step4_universal/zero"
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), folder / "inner.weight/fp32.pt")
    cut(folder / "outer.bias/exp_avg.pt", 200)
    one = universal(path)
    assert "DeepSpeed did not write it" in part(one, "zero/inner.weight").problem
    assert part(one, "zero/outer.bias").problem
    assert codes(find, path) & {Code.UNREADABLE, Code.TRUNCATED}
    assert not mark.exists()


# Files of other ranks, with ZeRO 3


def anew(path: Path) -> None:
    """Save a file again as somebody does who writes to a stream: under no name."""
    change(path, lambda _: None)
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(buffer, "w") as made:
        for info in whole.infolist():
            made.writestr("archive/" + info.filename.partition("/")[2], whole.read(info))
    path.write_bytes(buffer.getvalue())


def swapped(one: Path, other: Path) -> None:
    """Let two files change places."""
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


THREE = [("zero3-bf16-dp2", "global_step3", "bf16_"), ("zero3-fp32-dp3", "global_step4", "")]


@pytest.mark.parametrize(("variant", "folder", "prefix"), THREE)
@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_file_of_another_rank_is_known_by_its_archives_name(
    variant: str, folder: str, prefix: str, kind: str, tmp_path: Path
) -> None:
    """Copied over another's, or two that changed places: rows of ZeRO 3 are all of one length, and
    a stage's model files are but for buffers empty.
    """
    for turn, spoil in enumerate((shutil.copyfile, swapped)):
        path = copied(f"{HERE}/{variant}", tmp_path / str(turn))
        names = [
            optim(rank, prefix=prefix)
            if kind == "optim"
            else f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            for rank in (0, 1)
        ]
        spoil(path / folder / names[1], path / folder / names[0])
        bad = [finding for finding in wrong(find, path) if finding.code is Code.EXTRA]
        assert {(finding.step, finding.strength) for finding in bad} == {(folder, Strength.STRONG)}
        assert any(f"was written as {names[1]}" in finding.says for finding in bad)


@pytest.mark.parametrize(("variant", "folder", "prefix"), THREE)
def test_a_partition_of_another_rank_is_known_by_what_it_holds(
    variant: str, folder: str, prefix: str, tmp_path: Path
) -> None:
    """Where the archives have no names: a copy by the checksums of its rows, and the last rank's
    place by moments where it has padding.
    """
    path = copied(f"{HERE}/{variant}", tmp_path)
    files = sorted((path / folder).glob("*optim_states.pt"))
    for file in files:
        anew(file)
    assert wrong(find, path) == []
    first, last = files[0], files[-1]
    shutil.copyfile(last, first)
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.IDENTICAL, Strength.STRONG)
    path = copied(f"{HERE}/{variant}", tmp_path / "again")
    files = sorted((path / folder).glob("*optim_states.pt"))
    for file in files:
        anew(file)
    swapped(files[0], files[-1])
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.EXTRA, Strength.STRONG)
    assert finding.parts == (str(files[-1].relative_to(path)),)
    assert "is padding" in finding.says


def test_rows_that_are_alike_before_the_first_update_say_nothing(tmp_path: Path) -> None:
    """Nor do those of nothing but zeros."""
    path = copied(f"{HERE}/zero3-bf16-dp2", tmp_path)
    folder = path / "global_step3"
    for rank in (0, 1):

        def still(saved: Any) -> None:
            for own in saved["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
                own["step"].zero_()
                own["exp_avg"].zero_()
                own["exp_avg_sq"].zero_()

        change(folder / optim(rank), still)
    shutil.copyfile(folder / optim(0), folder / optim(1))
    assert Code.IDENTICAL not in codes(find, path)


def test_padding_says_nothing_where_a_decay_comes_into_the_moments(tmp_path: Path) -> None:
    """Adam's, unlike AdamW's, is a gradient, and the masters there are memory as it was found."""

    def as_adam(saved: Any) -> None:
        for group in saved["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]:
            group.update(decoupled_weight_decay=False, weight_decay=0.1)

    path = copied(f"{HERE}/zero3-bf16-dp2", tmp_path)
    files = sorted((path / "global_step3").glob("*optim_states.pt"))
    for file in files:
        change(file, as_adam)
        anew(file)
    swapped(*files)
    assert wrong(find, path) == []
