"""Legacy checkpoints of Megatron-LM (golden/write_megatron.py), sound and damaged.

The states are of Megatron-Core's own model and optimizers; megatron.training, which is in no
package, gives the rule by which they lie in files. Each fault is made in a copy; threads that a
test rebuilds are named in its docstring.
"""

import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from audit import goldens
from audit.altered import change
from audit.goldens import (
    GOLDEN,
    Bomb,
    codes,
    copied,
    counters,
    cut,
    only,
    part,
    seen,
    step,
    unclaimed,
    wrong,
)
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.megatron import TRACKER, find
from handfast.audit.found import Clock, Role, Step, Tensor

HERE = "megatron"
VARIANTS = ("legacy-tp2-dp2", "legacy-pp2-dp2-sharded", "legacy-tp2-fp16")
TENSOR, STAGES, HALF = (f"{HERE}/{name}" for name in VARIANTS)
MODEL = "model_optim_rng.pt"
NORM = "decoder.layers.0.input_layernorm.weight"
last, certain = partial(goldens.last, find), partial(goldens.certain, find)


def of_role(one: Step, role: Role) -> dict[str, Tensor]:
    """The tensors of a role by what they belong to."""
    return {t.of: t for each in one.parts for t in each.tensors if t.role is role}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """Tensor-parallel norms, embeddings tied over stages, skipped iterations."""
    path = GOLDEN / HERE / variant
    assert wrong(find, path) == []
    assert unclaimed(find, path) == set()
    one = last(path)
    assert only(find, path).format == "Megatron-LM"
    assert (one.missing, one.extra) == ([], [])
    resume = [(each.ranks, each.step) for each in only(find, path).resume]
    assert resume == [("all ranks", one.path)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_masters_and_moments_are_found_by_their_parameters(variant: str) -> None:
    """The optimizer has no names: its order, or the buffer that the weights are views of, has."""
    one = last(GOLDEN / HERE / variant)
    weights, masters = of_role(one, Role.PARAMETER), of_role(one, Role.MASTER)
    assert weights.keys() == masters.keys()
    assert masters.keys() == of_role(one, Role.FIRST).keys() == of_role(one, Role.SECOND).keys()
    for name, master in masters.items():
        assert master.values.shape == weights[name].values.shape
        assert master.values.dtype == "float32"
    assert all(each.betas for each in one.parts if any(t.role is Role.FIRST for t in each.tensors))


def test_a_row_gives_what_the_weights_were_rounded_from() -> None:
    """The distributed optimizer's row, cut by parameters, against torch's own rounding."""
    path = GOLDEN / STAGES / "iter_0000003/mp_rank_00_001"
    saved = torch.load(path / MODEL, weights_only=False)["model"]
    masters = {
        name.partition(" of ")[0]: t
        for name, t in of_role(last(GOLDEN / STAGES), Role.MASTER).items()
        if "pp 1" in name
    }
    assert masters
    for name, master in masters.items():
        row = torch.frombuffer(bytearray(b"".join(map(bytes, master.values.blocks(7)))),
                               dtype=torch.float32)  # fmt: skip
        assert torch.equal(row.view(saved[name].shape).bfloat16(), saved[name])


def test_counters_are_read_by_their_clocks() -> None:
    """Iterations count skipped ones, the optimizer and its scheduler do not."""
    one = last(GOLDEN / HALF)
    said = counters(one)
    assert one.scaled
    assert (said["iteration"].value, said["iteration"].updates) == (6, True)
    assert (said["iter_N"].value, said["iter_N"].clock) == (6, Clock.DIRECTORY)
    assert (said["the greatest step"].value, said["the greatest step"].skips) == (3, True)
    assert said["args/consumed_train_samples"].value == 24
    assert said["opt_param_scheduler/num_steps"].value == 12
    sharded = counters(last(GOLDEN / STAGES))
    assert (sharded["the greatest step"].value, sharded["the greatest step"].skips) == (3, False)


def test_ranks_are_read_from_names() -> None:
    """The first number is tensor-parallel, the second a stage."""
    one = last(GOLDEN / STAGES)
    assert part(one, f"mp_rank_00_001/{MODEL}").rank == {"tp": 0, "pp": 1, "ep": 0}
    assert part(last(GOLDEN / TENSOR), f"mp_rank_01/{MODEL}").rank == {"tp": 1, "pp": 0, "ep": 0}
    assert part(one, f"mp_rank_00_001/{MODEL}").facts["pipeline_model_parallel_size"] == 2


def test_a_step_for_itself_is_known(tmp_path: Path) -> None:
    """A directory iter_N that was given by itself."""
    path = Path(shutil.copytree(GOLDEN / TENSOR / "iter_0000004", tmp_path / "iter_0000004"))
    assert [(one.path, one.number) for one in only(find, path).steps] == [("", 4)]
    assert wrong(find, path) == []


def test_experts_virtual_stages_and_float32(tmp_path: Path) -> None:
    """Made by hand: one number of a name is an expert-parallel rank, a rank has two chunks of the
    model, and the optimizer is torch's own; each layer-wise optimizer's file is known.
    """
    args = Namespace(tensor_model_parallel_size=1, expert_model_parallel_size=2, finetune=False)
    for rank in (0, 1):
        weight = torch.full((4, 4), 1.0 + rank)
        moments = {"exp_avg": weight / 8, "exp_avg_sq": weight, "step": torch.tensor(4.0)}
        groups = [{"params": [0, 1], "betas": (0.9, 0.99), "wd_mult": 1.0}]
        folder = tmp_path / f"iter_0000004/mp_rank_00_00{rank}"
        folder.mkdir(parents=True)
        state = {
            "args": args,
            "iteration": 4,
            "model0": {"encoder": {"weight": weight}},
            "model1": {"encoder": {"weight": weight + 8}},
            "optimizer": {"state": {0: moments, 1: moments}, "param_groups": groups},
        }
        torch.save(state, folder / MODEL)
        torch.save({}, folder / "layer_wise_optimizer_0.pt")
    (tmp_path / TRACKER).write_text("4\n")
    (one,) = only(find, tmp_path).steps
    assert [each.rank["ep"] for each in one.parts] == [0, 1]
    names = {name.partition(" of ")[0] for name in of_role(one, Role.FIRST)}
    assert names == {"model0.encoder.weight", "model1.encoder.weight"}
    assert counters(one)["the greatest step"].value == 4
    assert wrong(find, tmp_path) == []
    assert unclaimed(find, tmp_path) == set()
    (tmp_path / f"iter_0000004/mp_rank_00_001/{MODEL}").unlink()
    (missing,) = last(tmp_path).missing
    assert missing[0] == f"iter_0000004/mp_rank_00_001/{MODEL}"


# Copies


def test_norms_of_tensor_parallel_ranks_that_differ(tmp_path: Path) -> None:
    """Both weight and master were changed, so that neither shows the other."""
    path = copied(TENSOR, tmp_path)

    def drift(state: Any) -> None:
        state["model"][NORM] += 1
        state["optimizer"]["fp32_from_fp16_params"][1][0].data += 1

    change(path / f"iter_0000004/mp_rank_01/{MODEL}", drift)
    found = [each for each in wrong(find, path) if each.code is Code.REPLICAS]
    assert {each.strength for each in found} == {Strength.CERTAIN}
    assert NORM in str(found)
    assert certain(path) == {Code.REPLICAS}


def test_embeddings_that_are_tied_over_stages_and_differ(tmp_path: Path) -> None:
    """The last stage's output layer is the first one's embedding."""
    path = copied(STAGES, tmp_path)

    def drift(state: Any) -> None:
        state["model"]["output_layer.weight"][3] += 1

    change(path / f"iter_0000003/mp_rank_00_001/{MODEL}", drift)
    (finding,) = [each for each in wrong(find, path) if each.code is Code.REPLICAS]
    assert "output layer" in finding.says


def test_untied_embeddings_are_no_copies(tmp_path: Path) -> None:
    """Where the arguments say that they are not tied, they differ in every sound checkpoint."""
    path = copied(STAGES, tmp_path)

    def untie(state: Any) -> None:
        state["args"].untie_embeddings_and_output_weights = True

    for stage in (0, 1):
        change(path / f"iter_0000003/mp_rank_00_00{stage}/{MODEL}", untie)
    assert not any(t.replica for t in of_role(last(path), Role.PARAMETER).values())


def test_generators_that_tensor_parallel_ranks_share_and_differ(tmp_path: Path) -> None:
    """Outside of what they share, they have to draw the same."""
    path = copied(TENSOR, tmp_path)

    def draw(state: Any) -> None:
        state["rng_state"][0]["rng_tracker_states"]["data-parallel-rng"][3] = 99
        state["rng_state"][0]["rng_tracker_states"]["model-parallel-rng"][3] = 99

    change(path / f"iter_0000004/mp_rank_01/{MODEL}", draw)
    (finding,) = wrong(find, path)
    assert finding.code is Code.REPLICAS
    assert "data-parallel-rng" in finding.says
    assert "model-parallel-rng" not in finding.says


# Values


@pytest.mark.parametrize("variant", [TENSOR, STAGES])
def test_weights_that_are_not_their_masters_rounding(variant: str, tmp_path: Path) -> None:
    """A rank's weights of another step than its optimizer.

    As NVIDIA/nvidia-resiliency-ext#376: the optimizer at step 2, the weights at step 1.
    """
    path = copied(variant, tmp_path)
    file = next((path / last(path).path).glob(f"*/{MODEL}"))

    def older(state: Any) -> None:
        for name, weight in state["model"].items():
            if name.endswith("linear_qkv.weight"):
                weight.mul_(0.75)

    change(file, older)
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.MASTER, Strength.STRONG)
    assert "linear_qkv" in str(finding.evidence)


def test_moments_that_no_gradients_make(tmp_path: Path) -> None:
    """The first of one epoch beside the second of another, in the distributed optimizer's rows."""
    path = copied(STAGES, tmp_path)

    def splice(state: Any) -> None:
        (row,) = state[0].values()
        row["exp_avg_sq"].mul_(1e-6)

    change(path / "iter_0000003/mp_rank_00_000/distrib_optim.pt", splice)
    assert codes(find, path) == {Code.MOMENTS}


# Steps


def test_a_rank_of_another_iteration(tmp_path: Path) -> None:
    """One rank's file is older; the iteration in it says so, and so do the copies."""
    path = copied(TENSOR, tmp_path)
    shutil.copy(
        path / f"iter_0000002/mp_rank_00/{MODEL}", path / f"iter_0000004/mp_rank_00/{MODEL}"
    )
    assert {Code.COUNTERS, Code.REPLICAS} <= certain(path)


def test_a_tracker_that_records_a_later_iteration(tmp_path: Path) -> None:
    """What lies under iter_0000006 was saved at 4: the name and the tracker took a later step.

    NVIDIA-NeMo/Megatron-Bridge#3267: a race between training and checkpointing.
    """
    path = copied(TENSOR, tmp_path)
    (path / "iter_0000004").rename(path / "iter_0000006")
    (path / TRACKER).write_text("6")
    (finding,) = wrong(find, path)
    assert finding.code is Code.COUNTERS
    assert "iter_N = 6" in str(finding.evidence)
    assert "iteration = 4" in str(finding.evidence)


def test_an_optimizer_that_was_not_loaded(tmp_path: Path) -> None:
    """It lags where nothing skips; with no_load_optim among the arguments that was meant."""
    for asked in (None, True):
        path = copied(TENSOR, tmp_path / str(asked))

        def restart(state: Any, asked: Any = asked) -> None:
            state["args"].no_load_optim = asked
            for own in state["optimizer"]["optimizer"]["state"].values():
                own["step"].fill_(1)

        for rank in (0, 1):
            change(path / f"iter_0000004/mp_rank_0{rank}/{MODEL}", restart)
        found = [each for each in wrong(find, path) if each.code is Code.COUNTERS]
        assert [each.strength for each in found] == ([] if asked else [Strength.STRONG])


def test_an_iteration_that_repeats_another(tmp_path: Path) -> None:
    """NVIDIA-NeMo/RL#3312: stale weights are saved again, under a new iteration and counters."""
    path = copied(TENSOR, tmp_path)

    def pretend(state: Any) -> None:
        state["iteration"] = state["args"].iteration = 4
        for own in state["optimizer"]["optimizer"]["state"].values():
            own["step"].fill_(4)

    for rank in (0, 1):
        name = f"mp_rank_0{rank}/{MODEL}"
        shutil.copy(path / "iter_0000002" / name, path / "iter_0000004" / name)
        change(path / "iter_0000004" / name, pretend)
    assert codes(find, path) == {Code.STALE}


def test_parts_that_are_missing_or_too_many(tmp_path: Path) -> None:
    """By the arguments in the files: a rank's directory, a file in it, and one of a larger job."""
    path = copied(STAGES, tmp_path)
    folder = path / "iter_0000003"
    shutil.copytree(folder / "mp_rank_00_001", folder / "mp_rank_01_001")
    (folder / "mp_rank_00_000/distrib_optim.pt").unlink()
    one = last(path)
    assert [missing for missing, _ in one.missing] == [
        "iter_0000003/mp_rank_00_000/distrib_optim.pt"
    ]
    assert [extra for extra, _ in one.extra] == ["iter_0000003/mp_rank_01_001"]
    assert codes(find, path) == {Code.MISSING, Code.EXTRA}
    shutil.rmtree(folder / "mp_rank_00_001")
    assert len(last(path).missing) == 3


def test_ranks_of_jobs_of_other_sizes(tmp_path: Path) -> None:
    """Saved again by a larger job, which did not come to its end."""
    path = copied(TENSOR, tmp_path)

    def larger(state: Any) -> None:
        state["args"].world_size = 8

    change(path / f"iter_0000004/mp_rank_01/{MODEL}", larger)
    assert certain(path) == {Code.WORLD}


# The tracker


@pytest.mark.parametrize("word", ["8", "", "last", "release"])
def test_a_tracker_that_leads_nowhere(word: str, tmp_path: Path) -> None:
    """It names an iteration that is not there, or none: Megatron exits."""
    path = copied(TENSOR, tmp_path)
    (path / TRACKER).write_text(word)
    assert certain(path) == {Code.TRACKER}
    assert only(find, path).resume == []


def test_a_tracker_that_was_not_moved_on(tmp_path: Path) -> None:
    """The later step may be whole, or not: a resume takes the older one. A hint."""
    path = copied(TENSOR, tmp_path)
    (path / TRACKER).write_text("2")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.TRACKER, Strength.HINT)
    assert [each.step for each in only(find, path).resume] == ["iter_0000002"]


def test_without_a_tracker_a_training_starts_anew(tmp_path: Path) -> None:
    """That is what a load does, though two steps are there."""
    path = copied(TENSOR, tmp_path)
    (path / TRACKER).unlink()
    assert [(each.ranks, each.step) for each in only(find, path).resume] == [("all ranks", "")]


def test_a_tracker_whose_steps_are_all_gone(tmp_path: Path) -> None:
    """Nothing is left but the tracker; where others keep theirs, another format says so."""
    path = copied(TENSOR, tmp_path)
    for folder in ("iter_0000002", "iter_0000004"):
        shutil.rmtree(path / folder)
    assert certain(path) == {Code.TRACKER}
    (path / "global_step_4").mkdir()
    assert seen(find, path) == []


def test_an_empty_step(tmp_path: Path) -> None:
    """A save that did not come to a file, or a deletion that was cut short."""
    path = copied(TENSOR, tmp_path)
    (path / "iter_0000006/mp_rank_00").mkdir(parents=True)
    (finding,) = wrong(find, path)
    assert (finding.code, finding.parts) == (Code.LEFTOVER, ("iter_0000006",))


# Bytes


@pytest.mark.parametrize("keep", [0, 100, 30000])
def test_files_that_were_cut_are_told(keep: int, tmp_path: Path) -> None:
    """At any length, the other files of the step are still read."""
    path = copied(TENSOR, tmp_path)
    cut(path / f"iter_0000004/mp_rank_00/{MODEL}", keep)
    one = step(only(find, path), 4)
    assert [bool(each.problem) for each in one.parts] == [True, False]
    assert not one.missing, "the other file has the arguments"
    assert codes(find, path)


@pytest.mark.parametrize("name", [MODEL, "distrib_optim.pt"])
def test_a_hostile_pickle_is_not_executed(name: str, tmp_path: Path) -> None:
    """Nor taken for a state."""
    path = copied(STAGES, tmp_path)
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), path / "iter_0000003/mp_rank_00_001" / name)
    found = part(last(path), f"mp_rank_00_001/{name}")
    assert "Megatron did not write it" in found.problem
    assert Code.UNREADABLE in certain(path)
    assert not mark.exists()
