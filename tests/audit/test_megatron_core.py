"""Distributed checkpoints that Megatron-Core wrote (golden/write_megatron.py), sound and damaged.

Each fault is made in a copy. Threads that a test rebuilds are named in its docstring.
"""

import io
import json
import pickle
import shutil
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
    flip,
    only,
    part,
    step,
    tensors,
    unclaimed,
    wrong,
)
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.distcp import read_index
from handfast.audit.formats.megatron import TRACKER, find
from handfast.audit.found import Clock, Role
from handfast.audit.place import look

HERE = "megatron"
VARIANTS = ("dist-dp2", "dist-pp2", "dist-tp2-release")
BUCKETS, MODEL, RELEASE = (f"{HERE}/{name}" for name in VARIANTS)
last, certain = partial(goldens.last, find), partial(goldens.certain, find)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """Optimizer state by buckets, by parameters, and none."""
    path = GOLDEN / HERE / variant
    assert wrong(find, path) == []
    assert unclaimed(find, path) == set()
    found = only(find, path)
    assert found.format == "Megatron-Core"
    assert found.steps[-1].committed
    assert "metadata.json" in found.steps[-1].commit
    assert [(each.ranks, each.step) for each in found.resume] == [
        ("all ranks", found.steps[-1].path)
    ]


def test_state_by_parameters_stands_beside_the_weights() -> None:
    """fully_reshardable: each master and moment has its parameter's name, and its place."""
    one = last(GOLDEN / MODEL)
    by_role: dict[Role, set[tuple[str, Any]]] = {}
    for each in one.parts:
        for tensor in each.tensors:
            by_role.setdefault(tensor.role, set()).add((tensor.of, tensor.offset))
    weights = by_role[Role.PARAMETER]
    assert ("decoder.layers.mlp.linear_fc1.weight", (1, 0, 0)) in weights
    assert by_role[Role.MASTER] == by_role[Role.FIRST] == by_role[Role.SECOND] == weights
    assert {c.clock for c in part(one, "common.pt").counters} >= {Clock.TRAINER, Clock.LOADER}


def test_padding_of_buckets_is_memory_as_it_was_found() -> None:
    """dp_reshardable saves what lies between parameters: whatever was there, moments or not."""
    one = last(GOLDEN / BUCKETS)
    rows = [t for each in one.parts for t in each.tensors if ".bucket_idx_0.exp_avg_sq" in t.path]
    padding = [t for t in rows if t.role is Role.OTHER]
    assert padding
    assert all(t.offset is not None and t.offset[0] % 64 for t in padding)
    assert {t.role for t in rows} == {Role.OTHER, Role.SECOND}


def test_counters_are_read_from_common_and_sharded_objects() -> None:
    """The optimizer's groups are an item of the first data-parallel rank's file."""
    one = last(GOLDEN / BUCKETS)
    said = counters(one)
    assert (said["iteration"].value, said["iter_N"].value) == (4, 4)
    assert said["the greatest step"].value == 4
    assert said["the greatest step"].updates
    assert not any(c.path == "the greatest step" for c in part(one, "common.pt").counters)
    assert part(one, "common.pt").facts["num_layers"] == 1
    assert {betas for each in one.parts for betas in each.betas.values()} == {(0.9, 0.95)}


def test_a_release_has_no_iteration() -> None:
    """Neither in its directory's name nor in the tracker."""
    found = only(find, GOLDEN / RELEASE)
    assert [(one.path, one.number) for one in found.steps] == [("release", None)]
    assert [each.step for each in found.resume] == ["release"]
    assert tensors(found.steps[0])["output_layer.weight"].values.dtype == "float32"


# Commit


def test_a_step_without_its_config_was_not_committed(tmp_path: Path) -> None:
    """metadata.json is written last; the tracker may say what it likes."""
    path = copied(BUCKETS, tmp_path)
    (path / "iter_0000004/metadata.json").unlink()
    assert Code.UNCOMMITTED in certain(path)
    assert not last(path).committed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sharded_backend": 3}'])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    """Its step is committed, and no load takes it."""
    path = copied(BUCKETS, tmp_path)
    (path / "iter_0000004/metadata.json").write_text(text)
    assert certain(path) == {Code.UNREADABLE}


def test_a_half_deleted_step(tmp_path: Path) -> None:
    """The files went in some order; what is left still says that it was one."""
    path = copied(BUCKETS, tmp_path)
    folder = path / "iter_0000004"
    for name in (".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).unlink()
    assert {Code.UNCOMMITTED} <= certain(path)


def test_common_is_missing(tmp_path: Path) -> None:
    """Every load begins with it."""
    path = copied(BUCKETS, tmp_path)
    (path / "iter_0000004/common.pt").unlink()
    assert [missing for missing, _ in last(path).missing] == ["iter_0000004/common.pt"]
    assert certain(path) == {Code.MISSING}


def test_a_tracker_ahead_of_a_save_in_the_background(tmp_path: Path) -> None:
    """The tracker took the iteration at which training was when the save ended.

    NVIDIA-NeMo/Megatron-Bridge#3267.
    """
    path = copied(BUCKETS, tmp_path)
    (path / TRACKER).write_text("5")
    assert certain(path) == {Code.TRACKER}
    (path / TRACKER).write_text("4")
    shutil.rmtree(path / "iter_0000002")
    (path / "iter_0000004").rename(path / "iter_0000005")
    (path / TRACKER).write_text("5")
    assert codes(find, path) == {Code.COUNTERS}


# Parts of other steps


def test_common_of_another_step(tmp_path: Path) -> None:
    """What is common says 2, the optimizer in the shards 4.

    As NVIDIA-NeMo/Megatron-Bridge#4791 and #5070: one side follows the tracker, the other does not.
    """
    path = copied(BUCKETS, tmp_path)
    shutil.copy(path / "iter_0000002/common.pt", path / "iter_0000004/common.pt")
    (finding,) = wrong(find, path)
    assert finding.code is Code.COUNTERS
    assert "= 4 (optimizer)" in str(finding.evidence)


def test_weights_of_another_save(tmp_path: Path) -> None:
    """Masters and weights are items of their own: of two saves, they do not fit."""
    path = copied(MODEL, tmp_path)
    name = "embedding.word_embeddings.weight"
    (item,) = [
        each
        for each in read_index(look(path, Reader()), "iter_0000003/.metadata").items
        if each.name == name
    ]
    target = path / "iter_0000003" / item.file
    data = target.read_bytes()
    weights = torch.load(io.BytesIO(data[item.start : item.start + item.nbytes]))
    buffer = io.BytesIO()
    torch.save((weights * 1.5).clone(), buffer)
    assert len(buffer.getvalue()) == item.nbytes
    target.write_bytes(data[: item.start] + buffer.getvalue() + data[item.start + item.nbytes :])
    (finding,) = wrong(find, path)
    assert finding.code is Code.MASTER
    assert name in str(finding.evidence)


def test_a_shard_of_another_step(tmp_path: Path) -> None:
    """The file that has the optimizer's groups is older than what is common."""
    path = copied(BUCKETS, tmp_path)
    name = next(
        Path(each.path).name for each in last(path).parts
        if any(c.path == "the greatest step" for c in each.counters)
    )  # fmt: skip
    shutil.copy(path / "iter_0000002" / name, path / "iter_0000004" / name)
    assert Code.COUNTERS in codes(find, path)


def test_steps_that_are_bit_identical(tmp_path: Path) -> None:
    """Stale shards under new counters.

    NVIDIA-NeMo/RL#3312: steps 90, 110 and 120.
    """
    path = copied(BUCKETS, tmp_path)
    shutil.rmtree(path / "iter_0000004")
    shutil.copytree(path / "iter_0000002", path / "iter_0000004")
    assert Code.COUNTERS in codes(find, path)
    assert Code.STALE in codes(find, path, Strength.HINT)


# The index


def test_a_sharded_object_lacks_a_shard(tmp_path: Path) -> None:
    """Names of objects say how many shards there are."""
    path = copied(MODEL, tmp_path)

    def drop(metadata: Any) -> None:
        for key in list(metadata.storage_data):
            if key.fqn.startswith("rng_state/shard_1.0"):
                del metadata.storage_data[key]

    alter_index(path / "iter_0000003/.metadata", drop)
    found = [each for each in wrong(find, path) if "shards of" in each.says]
    assert [(each.code, each.strength) for each in found] == [(Code.INDEX, Strength.CERTAIN)]
    assert "rng_state: 1 of 2 shards" in found[0].evidence


def alter_index(path: Path, alter: Any) -> None:
    """Change an index as torch reads it."""
    metadata = pickle.loads(path.read_bytes())
    alter(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_an_index_that_is_damaged(tmp_path: Path) -> None:
    """Told once, and the step is still there with what is common."""
    path = copied(BUCKETS, tmp_path)
    cut(path / "iter_0000004/.metadata", 300)
    one = step(only(find, path), 4)
    assert part(one, ".metadata").problem
    assert part(one, "common.pt").counters
    assert certain(path)


# Bytes


@pytest.mark.parametrize("name", ["common.pt", "__0_0.distcp", "__1_1.distcp"])
@pytest.mark.parametrize("keep", [0, 700])
def test_files_that_were_cut_are_told(name: str, keep: int, tmp_path: Path) -> None:
    """Whichever it is."""
    path = copied(BUCKETS, tmp_path)
    cut(path / "iter_0000004" / name, keep)
    assert part(last(path), name).problem
    assert certain(path) & {Code.UNREADABLE, Code.TRUNCATED}


def test_a_file_is_missing(tmp_path: Path) -> None:
    """By the index."""
    path = copied(BUCKETS, tmp_path)
    (path / "iter_0000004/__1_0.distcp").unlink()
    assert [missing for missing, _ in last(path).missing] == ["iter_0000004/__1_0.distcp"]


def test_a_bit_that_flipped_in_an_object_is_told(tmp_path: Path) -> None:
    """In what the optimizer's groups are read from."""
    path = copied(BUCKETS, tmp_path)
    index = read_index(look(path, Reader()), "iter_0000004/.metadata")
    (item,) = [i for i in index.items if i.name.endswith(".optimizer/shard_0_1")]
    target = path / "iter_0000004" / item.file
    at = target.read_bytes().index(b"param_groups", item.start)
    flip(target, at)
    assert part(last(path), item.file).problem
    assert Code.UNREADABLE in certain(path)


def test_a_hostile_pickle_is_not_executed(tmp_path: Path) -> None:
    """As what is common, as the index, and in it."""
    path = copied(BUCKETS, tmp_path)
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), path / "iter_0000004/common.pt")
    (path / "iter_0000002/.metadata").write_bytes(pickle.dumps(Bomb(mark)))
    change(path / "iter_0000002/common.pt", lambda state: state.update(args=Bomb(mark)))
    assert wrong(find, path)
    assert part(last(path), "common.pt").problem
    assert not mark.exists()


# Other backends


def test_a_zarr_checkpoint_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    """Made by hand after Megatron-Core 0.10's rule: a directory a tensor, a file a sharded object.

    What is common is read; of tensors nothing is said.
    """
    folder = tmp_path / "run/iter_0000004"
    array = folder / "decoder.final_layernorm.weight"
    array.mkdir(parents=True)
    (array / ".zarray").write_text(
        json.dumps({"zarr_format": 2, "shape": [8], "chunks": [8], "dtype": "<f4"})
    )
    (array / "0").write_bytes(bytes(32))
    objects = folder / "rng_state"
    objects.mkdir()
    torch.save({}, objects / "shard_0.0_1.1.pt")
    shutil.copy(GOLDEN / BUCKETS / "iter_0000004/common.pt", folder / "common.pt")
    config = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))
    (tmp_path / "run" / TRACKER).write_text("4")
    run = tmp_path / "run"
    assert wrong(find, run) == []
    assert unclaimed(find, run) == set()
    assert counters(last(run))["iteration"].value == 4
    (folder / "metadata.json").unlink()
    assert Code.UNCOMMITTED in certain(run)
