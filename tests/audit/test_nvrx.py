"""Local checkpoints that NVRx's manager wrote (golden/write_megatron.py), sound and damaged.

Each fault is made in a copy. Threads that a test rebuilds are named in its docstring.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.altered import Stand, change, save
from audit.goldens import (
    GOLDEN,
    Bomb,
    codes,
    copied,
    counters,
    cut,
    findings,
    last,
    only,
    part,
    step,
    unclaimed,
    wrong,
)
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.nvrx import find
from handfast.audit.found import Clock, Role, Step

HERE = "megatron"
VARIANTS = ("local-alone", "local-tp2", "local-pp2-copies")
ALONE, TENSOR, COPIES = (f"{HERE}/{name}" for name in VARIANTS)


def name(iteration: int, rank: int, dirty: str = "") -> str:
    """A rank's file of an iteration."""
    return f"iter_{iteration:07d}_{rank}_local{dirty}.pt"


def resumes(path: Path) -> list[tuple[str, str]]:
    """What each rank would take."""
    return [(each.ranks, each.step) for each in only(find, path).resume]


def sharded(state: Any, key: str) -> Any:
    """The sharded tensor of a key, in what a rank's file holds."""
    return next(each for each in found(state.sharded_state_dict) if each.key == key)


def found(node: Any) -> list[Any]:
    """The stand-ins in dicts and lists."""
    if isinstance(node, dict):
        return [each for inner in node.values() for each in found(inner)]
    if isinstance(node, list):
        return [each for inner in node for each in found(inner)]
    return [node] if isinstance(node, Stand) else []


def later(path: Path, iteration: int) -> None:
    """Turn the files of iteration 4 into those of another one, whole."""
    for file in sorted(path.rglob("*_local.pt")):

        def count(state: Any) -> None:
            state.common["iteration"] = iteration
            for each in found(state.sharded_state_dict):
                if each.key.endswith(".optimizer"):
                    for group in each.data["param_groups"]:
                        group["step"] = float(iteration)

        change(file, count)
        file.rename(file.with_name(file.name.replace("0000004", f"{iteration:07d}")))


def test_no_more_is_said_of_a_state_than_there_is_memory_for(tmp_path: Path) -> None:
    """What is not read for that is no damage; with more it is read."""
    file = tmp_path / "0" / name(4, 0)
    file.parent.mkdir()
    state = {"state_dict": [{"step": at} for at in range(2000)]}
    package = "nvidia_resiliency_ext.checkpointing.local.basic_state_dict"
    save(file, package, "BasicTensorAwareStateDict", state)
    assert len(last(find, tmp_path).parts[0].counters) == 2001
    with Reader(room=3 << 20) as reader:
        (finding,) = findings(find, tmp_path, reader)
    assert (finding.code, finding.strength) == (Code.UNREADABLE, Strength.STRONG)
    assert "--memory" in finding.says


NEWEST = "all ranks, if those of other nodes have it as well"


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """One rank, two that share a model, and two stages with copies of each other's."""
    path = GOLDEN / HERE / variant
    assert wrong(find, path) == []
    assert unclaimed(find, path) == set()
    (one,) = only(find, path).steps
    assert (one.path, one.number, one.committed) == ("iter_0000004", 4, True)
    assert resumes(path) == [(NEWEST, "iter_0000004")]


def test_tensors_say_where_they_sit_and_who_has_copies() -> None:
    """By key and offset: a norm is on both ranks, a weight's halves are not."""
    (one,) = only(find, GOLDEN / TENSOR).steps
    first, second = one.parts
    norm, weight = "decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc1.weight"
    replicas = [{t.of: t for t in each.tensors} for each in (first, second)]
    assert replicas[0][norm].replica == replicas[1][norm].replica != ""
    assert replicas[0][weight].offset == (0, 0, 0)
    assert replicas[1][weight].offset == (0, 6, 0)
    assert replicas[0][weight].replica != replicas[1][weight].replica
    assert {Role.PARAMETER, Role.MASTER, Role.FIRST, Role.SECOND} <= {t.role for t in first.tensors}


def test_counters_and_ranks() -> None:
    """Of the name, the trainer, the samples, the scheduler and the optimizer."""
    (one,) = only(find, GOLDEN / COPIES).steps
    said = counters(one)
    assert {c.clock for c in said.values()} == {
        Clock.DIRECTORY, Clock.TRAINER, Clock.LOADER, Clock.SCHEDULER, Clock.OPTIMIZER,
    }  # fmt: skip
    assert {said[path].value for path in ("iter_N", "iteration", "the greatest step")} == {4}
    assert part(one, f"0/{name(4, 0)}").rank == {"rank": 0}
    assert part(one, f"0/{name(4, 1)}").rank == {"rank": 1, "copy on": 0}


def test_one_ranks_directory_alone(tmp_path: Path) -> None:
    """What a node has, given by itself."""
    path = Path(shutil.copytree(GOLDEN / TENSOR / "1", tmp_path / "node"))
    assert wrong(find, path) == []
    assert [each.rank for each in only(find, path).steps[0].parts] == [{"rank": 1}]
    assert resumes(path) == [(NEWEST, "iter_0000004")]


# Coverage


def test_the_newest_iteration_that_all_ranks_have_is_taken(tmp_path: Path) -> None:
    """Rank 0 came to save iteration 6, rank 1 did not: a resume takes 4, and 6 is incomplete."""
    path = copied(TENSOR, tmp_path)
    new = Path(shutil.copytree(path, tmp_path / "new"))
    later(new, 6)
    shutil.copy(new / "0" / name(6, 0), path / "0")
    four, six = only(find, path).steps
    assert four.missing == []
    assert [missing for missing, _ in six.missing] == [f"1/{name(6, 1)}"]
    assert not six.committed
    assert resumes(path) == [(NEWEST, "iter_0000004")]
    assert codes(find, path) == {Code.MISSING, Code.UNCOMMITTED}


def test_a_rank_takes_a_copy_where_its_own_is_gone(tmp_path: Path) -> None:
    """Its disk is new: another rank has its file. Then nothing is missing."""
    path = copied(COPIES, tmp_path)
    (path / "1" / name(4, 1)).unlink()
    assert wrong(find, path) == []
    assert resumes(path) == [(NEWEST, "iter_0000004"), ("rank 1", "iter_0000004")]


def test_no_iteration_covers_all_ranks(tmp_path: Path) -> None:
    """Nothing can be resumed."""
    path = copied(TENSOR, tmp_path)
    (path / "1" / name(4, 1)).unlink()
    assert resumes(path) == [("all ranks", "")]
    assert Code.MISSING in codes(find, path)


def test_a_file_that_was_not_renamed(tmp_path: Path) -> None:
    """Its save did not end, and no other of this iteration can begin."""
    path = copied(TENSOR, tmp_path)
    (path / "1" / name(4, 1)).rename(path / "1" / name(4, 1, ".dirty"))
    found = wrong(find, path)
    assert {each.code for each in found} == {Code.LEFTOVER, Code.MISSING, Code.UNCOMMITTED}
    shutil.copytree(path / "1", path / "2")
    (path / "0" / name(4, 0)).unlink()
    assert only(find, path).steps == []


# Other runs, other steps


def test_a_shard_of_another_run(tmp_path: Path) -> None:
    """Nothing in a name or a file says of which run it is; what ranks have in common does.

    LMResiliency/lm-resiliency#77: another run's shard was accepted.
    """
    path = copied(TENSOR, tmp_path)

    def other(state: Any) -> None:
        for each in found(state.sharded_state_dict):
            data = getattr(each, "data", None)
            if isinstance(data, torch.Tensor):
                data.data.mul_(1.25)

    change(path / "1" / name(4, 1), other)
    (finding,) = [each for each in wrong(find, path) if each.code is Code.REPLICAS]
    assert finding.strength is Strength.CERTAIN
    assert "one key and one place" in finding.says


def test_a_copy_that_is_none_any_more(tmp_path: Path) -> None:
    """A rank's file and its copy on another one: one was damaged, or is of another save."""
    path = copied(COPIES, tmp_path)

    def spoil(state: Any) -> None:
        sharded(state, "decoder.final_layernorm.weight").data.data += 1

    change(path / "0" / name(4, 1), spoil)
    (finding,) = wrong(find, path)
    assert finding.code is Code.REPLICAS


def test_a_file_of_another_iteration_under_this_ones_name(tmp_path: Path) -> None:
    """What lies in it says so: the optimizer at 2, the tensors' step at 4.

    NVIDIA/nvidia-resiliency-ext#376: tensors on the CPU were not cloned, and changed while they
    were written.
    """
    path = copied(TENSOR, tmp_path)

    def older(state: Any) -> None:
        for each in found(state.sharded_state_dict):
            if each.key.endswith(".optimizer"):
                for group in each.data["param_groups"]:
                    group["step"] = 2.0

    change(path / "1" / name(4, 1), older)
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.CERTAIN)
    change(path / "0" / name(4, 0), older)
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.STRONG)


def test_ranks_of_jobs_of_other_sizes(tmp_path: Path) -> None:
    """By the arguments in the files."""
    path = copied(TENSOR, tmp_path)

    def larger(state: Any) -> None:
        state.common["args"].world_size = 16

    change(path / "0" / name(4, 0), larger)
    assert codes(find, path) == {Code.WORLD}


# Bytes


@pytest.mark.parametrize("keep", [0, 64, 20000])
def test_files_that_were_cut_are_told(keep: int, tmp_path: Path) -> None:
    """At any length; the other rank's is still read."""
    path = copied(TENSOR, tmp_path)
    cut(path / "0" / name(4, 0), keep)
    one = step(only(find, path), 4)
    assert [bool(each.problem) for each in one.parts] == [True, False]
    assert codes(find, path) & {Code.UNREADABLE, Code.TRUNCATED}


def test_a_plain_state_is_read(tmp_path: Path) -> None:
    """What a user of the extension saves without Megatron."""
    (tmp_path / "0").mkdir()
    module = "nvidia_resiliency_ext.checkpointing.local.basic_state_dict"
    state = {"model": {"weight": torch.ones(3)}, "step": 7}
    fields = {"state_dict": state, "_is_hollow": False}
    save(tmp_path / "0" / name(7, 0), module, "BasicTensorAwareStateDict", fields)
    (one,) = only(find, tmp_path).steps
    assert [(t.path, t.role) for t in one.parts[0].tensors] == [("model/weight", Role.PARAMETER)]
    assert counters(one)["step"].value == 7
    assert wrong(find, tmp_path) == []


def test_a_hostile_pickle_is_not_executed(tmp_path: Path) -> None:
    """Nor taken for a state."""
    path = copied(TENSOR, tmp_path)
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), path / "1" / name(4, 1))
    one: Step = step(only(find, path), 4)
    assert "the extension did not write it" in part(one, name(4, 1)).problem
    assert Code.UNREADABLE in codes(find, path)
    assert not mark.exists()
