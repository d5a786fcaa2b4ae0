"""Distributed checkpoints that torch wrote (golden/write_torch.py), sound and damaged."""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._extension import ZStandard

from audit.goldens import (
    GOLDEN,
    Bomb,
    codes,
    copied,
    counters,
    cut,
    flip,
    late,
    only,
    part,
    roles,
    seen,
    step,
    tensors,
    unclaimed,
    wrong,
)
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.dcp import find
from handfast.audit.formats.distcp import read_index
from handfast.audit.found import Clock, Role
from handfast.audit.place import look
from handfast.errors import Damaged

SOUND = ("alone", "fsdp1", "fsdp2", "replicated", "separate")


def alter(path: Path, change: Callable[[Any], None]) -> None:
    """Change an index as torch reads it."""
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def saved(path: Path, state: dict[str, Any], threads: int = 2) -> None:
    """Save with several files, as one process may."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group is what is wanted
        writer = dcp.FileSystemWriter(path, thread_count=threads)
        dcp.save(state, storage_writer=writer, no_dist=True)


# Sound ones


@pytest.mark.parametrize("variant", SOUND)
def test_sound_checkpoints_have_no_findings(variant: str) -> None:
    """Replicas, FSDP1, FSDP2, a rank for itself, several files of one process: nothing is said."""
    path = GOLDEN / "dcp" / variant
    assert wrong(find, path) == []
    assert {name for name in unclaimed(find, path) if "saved/" not in name} == set()


def test_shards_say_where_they_sit() -> None:
    """Of weights and moments of FSDP2, by rank, with the names that the optimizer has for them."""
    found = only(find, GOLDEN / "dcp/fsdp2")
    assert [(one.path, one.number) for one in found.steps] == [
        ("checkpoint_2", 2),
        ("checkpoint_4", 4),
    ]
    last = step(found, 4)
    assert [each.rank for each in last.parts] == [{"rank": rank} for rank in range(3)]
    rows = [tensor for each in last.parts for tensor in each.tensors
            if tensor.path == "optimizer/state/0.weight/exp_avg"]  # fmt: skip
    assert [(row.role, row.of, row.values.shape, row.whole) for row in rows] == [
        (Role.FIRST, "0.weight", (1, 3), (3, 3))
    ] * 3
    assert [row.offset for row in rows] == [(0, 0), (1, 0), (2, 0)]
    assert rows[0].group in part(last, "__0_0.distcp").betas
    assert part(last, "__0_0.distcp").betas == {"optimizer/param_groups[0]": (0.8, 0.99)}


def test_values_are_those_that_torch_loads() -> None:
    """Each piece, put to its place, gives the tensor that dcp.load gives."""
    path = GOLDEN / "dcp/fsdp2/checkpoint_4"
    state = {"model": {"0.weight": torch.zeros(3, 3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group is what is wanted
        dcp.load(state, checkpoint_id=path, no_dist=True)
    whole = torch.zeros(3, 3)
    for each in step(only(find, path.parent), 4).parts:
        for tensor in each.tensors:
            if tensor.path == "model/0.weight" and tensor.offset is not None:
                row = b"".join(map(bytes, tensor.values.blocks(2)))
                whole[tensor.offset[0]] = torch.frombuffer(bytearray(row), dtype=torch.float32)
    assert torch.equal(whole, state["model"]["0.weight"])
    assert whole.abs().sum() > 0


def test_counts_lie_in_the_files_that_have_them() -> None:
    """Of the trainer, of each parameter, of the scheduler: the last files have them here."""
    (one,) = only(find, GOLDEN / "dcp/replicated").steps
    said = counters(one)
    assert said["step"].value == 4
    assert said["first.weight"].clock is Clock.PARAMETER
    assert said["scheduler/last_epoch"].value == 4
    assert sorted(len(each.counters) > 3 for each in one.parts) == [False, False, True]


def test_each_rank_may_have_an_index_of_its_own() -> None:
    """Saved without collectives: one name, two ranks, two tensors."""
    (one,) = only(find, GOLDEN / "dcp/separate").steps
    assert [each.rank for each in one.parts] == [{"rank": 0}, {"rank": 1}]
    assert [len(each.tensors) for each in one.parts] == [3, 3]
    assert one.committed


def test_what_a_load_takes_is_told() -> None:
    """The directory that it is given, if there is one."""
    assert [each.step for each in only(find, GOLDEN / "dcp/replicated").resume] == ["step-4"]
    assert only(find, GOLDEN / "dcp/fsdp2").resume == ()


def test_bfloat16_and_files_of_one_process() -> None:
    """Two files of rank 0, written in the background."""
    (one,) = only(find, GOLDEN / "dcp/alone").steps
    assert [each.rank for each in one.parts] == [{"rank": 0}, {"rank": 0}]
    assert tensors(one)["model/first.weight"].values.dtype == "bfloat16"
    assert roles(one)["model/mask"] == (Role.BUFFER, "mask")
    assert counters(one)["step"].value == 5


def test_a_parameter_that_got_gradients_later_is_no_fault(tmp_path: Path) -> None:
    """Its count is smaller, and lies beside others'; and if all biases are late and come to lie in
    one file, that is a hint.
    """
    for name, late_ones in (("layers", ("3.weight", "3.bias")), ("biases", ("bias",))):
        names = [f"{layer}.{kind}" for layer in range(4) for kind in ("weight", "bias")]
        state = {
            name: {"step": torch.tensor(3.0 if name.endswith(late_ones) else 9.0)} for name in names
        }
        groups = [{"params": names, "lr": 0.1}]
        path = tmp_path / name / "step-9"
        saved(path, {"optimizer": {"state": state, "param_groups": groups}})
        (one,) = only(find, path.parent).steps
        assert len(one.parts) == 2
        assert {c.value for c in counters(one).values() if c.clock is Clock.PARAMETER} == {3, 9}
    assert wrong(find, tmp_path / "layers") == []
    (finding,) = wrong(find, tmp_path / "biases")
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.HINT)


def test_an_empty_file_of_a_rank_is_no_fault(tmp_path: Path) -> None:
    """A rank that has nothing to write, since others wrote it, leaves an empty file."""
    path = copied("dcp/fsdp2", tmp_path)
    (path / "checkpoint_4/__3_0.distcp").touch()
    assert wrong(find, path) == []


# Two saves in one directory


def test_a_file_of_another_step_is_found_by_its_counts(tmp_path: Path) -> None:
    """dcp.load takes it without a word: the same names, the same offsets, the same lengths."""
    path = copied("dcp/fsdp2", tmp_path)
    shutil.copy(path / "checkpoint_2/__2_0.distcp", path / "checkpoint_4/__2_0.distcp")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.COUNTERS, Strength.STRONG)
    assert finding.step == "checkpoint_4"
    assert sorted(line.partition(":")[0] for line in finding.evidence) == [
        "checkpoint_4/__1_0.distcp",
        "checkpoint_4/__2_0.distcp",
    ]
    assert "2, 4 updates" in finding.says


def test_a_step_saved_over_another_one_when_ranks_were_killed(tmp_path: Path) -> None:
    """Step 200 over step 100, all ranks but the first killed before they wrote.

    dcp.load takes it: rank 0's rows of step 200, all others and all counts of step 100. Rank 0's
    file has no counts, so that nothing but its time is left to tell: a hint, as long as nobody
    copied the directory.
    """
    path = copied("dcp/overwritten", tmp_path)
    assert wrong(find, path) == []
    for name, when in (("__0_0", 200), ("__1_0", 98), ("__2_0", 99), ("__3_0", 99)):
        os.utime(path / f"last/{name}.distcp", (when, when))
    os.utime(path / "last/.metadata", (100, 100))
    (finding,) = late(find, path)
    assert finding.strength is Strength.HINT
    assert finding.parts == ("last/__0_0.distcp",)


def test_files_that_were_copied_at_once_are_no_hint(tmp_path: Path) -> None:
    """A few seconds between an index and its files is how copies look."""
    path = copied("dcp/overwritten", tmp_path)
    for name in os.listdir(path / "last"):
        os.utime(path / "last" / name, (105, 105))
    os.utime(path / "last/.metadata", (100, 100))
    assert late(find, path) == []


def test_a_directory_that_was_renamed_is_a_hint(tmp_path: Path) -> None:
    """The index knows the name that the save was given."""
    path = copied("dcp/fsdp2", tmp_path)
    shutil.rmtree(path / "checkpoint_4")
    os.rename(path / "checkpoint_2", path / "checkpoint_4")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.INDEX, Strength.HINT)
    assert "checkpoint_2" in finding.says


def test_a_file_that_another_layout_has_is_found(tmp_path: Path) -> None:
    """Of a save with other shapes, or by other ranks: the items are not where the index says."""
    path = copied("dcp/fsdp2", tmp_path)
    shutil.copy(path / "checkpoint_4/__2_0.distcp", path / "checkpoint_4/__1_0.distcp")
    assert Code.TRUNCATED in codes(find, path)  # it is shorter, here
    shutil.copy(path / "checkpoint_2/__1_0.distcp", path / "checkpoint_4/__2_0.distcp")
    assert Code.INDEX in codes(find, path)


# Commit


def test_without_an_index_nothing_was_committed(tmp_path: Path) -> None:
    """The save did not end; dcp.load refuses it, but whoever lists directories may not."""
    path = copied("dcp/fsdp2", tmp_path)
    os.remove(path / "checkpoint_4/.metadata")
    assert codes(find, path) == {Code.UNCOMMITTED}
    last = step(only(find, path), 4)
    assert not last.committed
    assert len(last.parts) == 3


def test_an_index_that_was_not_put_into_place_is_read(tmp_path: Path) -> None:
    """Killed between the removal of the old index and the renaming of the new one."""
    path = copied("dcp/fsdp2", tmp_path)
    os.rename(path / "checkpoint_4/.metadata", path / "checkpoint_4/.metadata.tmp")
    bad = wrong(find, path)
    assert {finding.code for finding in bad} == {Code.UNCOMMITTED, Code.LEFTOVER}
    assert any("renamed to .metadata" in finding.says for finding in bad)
    assert counters(step(only(find, path), 4))["step"].value == 4


def test_a_later_index_beside_an_older_one_is_found(tmp_path: Path) -> None:
    """A save over the directory ended before its last step: the files may be that save's."""
    path = copied("dcp/fsdp2", tmp_path)
    shutil.copy(path / "checkpoint_4/.metadata", path / "checkpoint_4/.metadata.tmp")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.LEFTOVER, Strength.STRONG)


@pytest.mark.parametrize("left", [0, 1, 1000])
def test_an_index_that_was_cut_is_found(left: int, tmp_path: Path) -> None:
    """Its files are there, and nobody knows what is in them."""
    path = copied("dcp/fsdp2", tmp_path)
    cut(path / "checkpoint_4/.metadata", left)
    bad = wrong(find, path)
    assert {finding.code for finding in bad} == {Code.UNREADABLE}
    assert {finding.parts for finding in bad} == {("checkpoint_4/.metadata",)}


def test_an_index_of_more_than_is_read_may_be_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no damage: told, and not as certain."""
    path = copied("dcp/fsdp2", tmp_path)
    monkeypatch.setattr("handfast.audit.formats.distcp.INDEX_MOST", 100)
    found = [each for each in wrong(find, path) if each.code is Code.UNREADABLE]
    assert {each.strength for each in found} == {Strength.STRONG}
    assert all("too many objects" in each.says for each in found)


def test_an_index_is_never_executed(tmp_path: Path) -> None:
    """torch.load's care is not taken with it: dcp.load unpickles it."""
    path = copied("dcp/fsdp2", tmp_path)
    mark = tmp_path / "executed"
    (path / "checkpoint_4/.metadata").write_bytes(pickle.dumps(Bomb(mark)))
    assert codes(find, path) == {Code.UNREADABLE}
    alter(path / "checkpoint_2/.metadata", lambda index: index.__dict__.update(bomb=Bomb(mark)))
    assert codes(find, path) == {Code.UNREADABLE}  # the other is as whole as it was
    assert not mark.exists()
    pickle.loads((path / "checkpoint_2/.metadata").read_bytes())
    assert mark.exists()  # so it was a bomb


def test_an_item_is_never_executed(tmp_path: Path) -> None:
    """Values that are no tensors are pickles, too."""
    mark = tmp_path / "executed"
    saved(tmp_path / "step-1", {"extra": Bomb(mark), "w": torch.rand(300)})
    assert wrong(find, tmp_path) == []
    assert not mark.exists()


# Files


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    """By its name, and how much lies in it."""
    path = copied("dcp/fsdp2", tmp_path)
    os.remove(path / "checkpoint_4/__1_0.distcp")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.CERTAIN)
    assert finding.parts == ("checkpoint_4/__1_0.distcp",)


@pytest.mark.parametrize("left", [0, 5000])
def test_a_file_that_was_cut_is_found(left: int, tmp_path: Path) -> None:
    """By the index, which says where it ends (zero-length shards: facebookresearch/metaseq#53)."""
    path = copied("dcp/fsdp2", tmp_path)
    cut(path / "checkpoint_4/__1_0.distcp", left)
    bad = wrong(find, path)
    assert {finding.code for finding in bad} == {Code.TRUNCATED}
    assert {finding.parts for finding in bad} == {("checkpoint_4/__1_0.distcp",)}


def test_a_file_of_more_ranks_is_found(tmp_path: Path) -> None:
    """Left by a save of a larger job into the same directory."""
    path = copied("dcp/fsdp2", tmp_path)
    shutil.copy(path / "checkpoint_4/__2_0.distcp", path / "checkpoint_4/__3_0.distcp")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.EXTRA, Strength.STRONG)
    assert finding.parts == ("checkpoint_4/__3_0.distcp",)


def test_bytes_that_no_item_takes_are_found(tmp_path: Path) -> None:
    """A longer file lay there before, or something was written behind it."""
    path = copied("dcp/fsdp2", tmp_path)
    with (path / "checkpoint_4/__1_0.distcp").open("ab") as file:
        file.write(bytes(100))
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.INDEX, Strength.STRONG)


def test_a_flipped_bit_in_a_head_is_found(tmp_path: Path) -> None:
    """No file of torch.save begins where the item should."""
    path = copied("dcp/fsdp2", tmp_path)
    place = look(path, Reader())
    index = read_index(place, "checkpoint_4/.metadata")
    item = next(each for each in index.items if each.name == "model.0.weight" and each.offset)
    file = path / "checkpoint_4" / item.file
    flip(file, item.start)
    assert Code.INDEX in codes(find, path)


def test_a_flipped_bit_in_a_value_is_found(tmp_path: Path) -> None:
    """dcp.load returns another number; the item has a CRC-32, which torch does not look at."""
    path = copied("dcp/replicated", tmp_path)
    tensor = tensors(only(find, path).steps[0])["model/last.weight"]
    data = b"".join(map(bytes, tensor.values.blocks(100)))
    (file,) = (f for f in path.rglob("*.distcp") if data in f.read_bytes())
    flip(file, file.read_bytes().index(data))
    (finding,) = wrong(find, path)
    assert finding.strength is Strength.CERTAIN
    assert "CRC-32" in finding.evidence[0]


# What an index may say


def test_an_index_without_a_chunk_is_found(tmp_path: Path) -> None:
    """Of a tensor, or of a place in it."""
    path = copied("dcp/fsdp2", tmp_path)

    def drop(index: Any) -> None:
        first = next(key for key in index.storage_data if key.fqn == "model.1.weight")
        del index.storage_data[first]

    alter(path / "checkpoint_4/.metadata", drop)
    assert codes(find, path) == {Code.INDEX}
    alter(
        path / "checkpoint_2/.metadata",
        lambda index: index.state_dict_metadata["model.1.weight"].chunks.pop(),
    )
    lost = [f for f in wrong(find, path) if "lacks chunks" in f.says]
    assert {finding.step for finding in lost} == {"checkpoint_2", "checkpoint_4"}


def test_an_item_of_another_tensor_is_found(tmp_path: Path) -> None:
    """An index of another save may fit the file's lengths, and not its shapes."""
    path = copied("dcp/fsdp2", tmp_path)

    def swap(index: Any) -> None:
        about = index.state_dict_metadata
        for name in ("model.1.weight", "model.2.bias"):
            about[name].properties.dtype = torch.int32

    alter(path / "checkpoint_4/.metadata", swap)
    bad = wrong(find, path)
    assert {finding.code for finding in bad} == {Code.TRUNCATED}
    assert "of two saves" in bad[0].evidence[0]


def test_what_an_extension_encoded_is_no_damage(tmp_path: Path) -> None:
    """Compressed by torch's own: a hint that values were not read; a file that is cut is still
    found, and what can't be read is told to who would carry it elsewhere.
    """
    state = {"model": {"w": torch.rand(300), "v": torch.rand(30)}, "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group is what is wanted
        writer = dcp.FileSystemWriter(tmp_path / "step-3", _extensions=[ZStandard()])
        dcp.save(state, storage_writer=writer, no_dist=True)
    (finding,) = wrong(find, tmp_path)
    assert (finding.code, finding.strength) == (Code.UNREAD, Strength.HINT)
    assert finding.step == "step-3"
    (one,) = only(find, tmp_path).steps
    assert {path for each in one.parts for path in each.valueless} == {"model/w", "model/v", "step"}
    cut(next(tmp_path.rglob("*.distcp")), 100)
    assert codes(find, tmp_path) == {Code.TRUNCATED}


def test_one_item_under_many_names_is_one(tmp_path: Path) -> None:
    """An index may say so of one that takes long to read."""
    saved(tmp_path / "step-1", {"a": torch.rand(300), "b": torch.rand(300)}, 1)

    def repeat(index: Any) -> None:
        places = {key.fqn: info for key, info in index.storage_data.items()}
        for key in index.storage_data:
            index.storage_data[key] = places["a"]

    alter(tmp_path / "step-1/.metadata", repeat)
    said = tensors(only(find, tmp_path).steps[0])
    assert said["a"].values is said["b"].values


def test_a_name_in_the_way_of_another_is_kept(tmp_path: Path) -> None:
    """Paths that no state can have had, as a damaged index may say."""
    path = copied("dcp/fsdp2", tmp_path)

    def collide(index: Any) -> None:
        index.planner_data["model.0.weight"] = ("step", "below")
        index.planner_data["model.2.bias"] = ("model", "1.weight", "below")

    alter(path / "checkpoint_4/.metadata", collide)
    assert wrong(find, path) == []
    said = tensors(step(only(find, path), 4))
    assert {"step/below", "model.1.weight.below", "model/1.weight"} <= said.keys()


@pytest.mark.parametrize("nbytes", [3, 1 << 40])
def test_an_item_of_an_impossible_length_is_found(nbytes: int, tmp_path: Path) -> None:
    """Shorter than any file of torch.save, or longer than any value."""
    path = copied("dcp/fsdp2", tmp_path)

    def resize(index: Any) -> None:
        key = next(key for key in index.storage_data if key.fqn == "step")
        index.storage_data[key].length = nbytes

    alter(path / "checkpoint_4/.metadata", resize)
    bad = wrong(find, path)
    assert {finding.code for finding in bad} == {Code.INDEX if nbytes == 3 else Code.TRUNCATED}
    assert {finding.step for finding in bad} == {"checkpoint_4"}


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.__dict__.update(storage_data=None),
        lambda index: index.storage_data.update({"no key": 1}),
        lambda index: setattr(next(iter(index.storage_data.values())), "offset", -1),
        lambda index: setattr(next(iter(index.storage_data.values())), "relative_path", 7),
        lambda index: setattr(index.state_dict_metadata["model.0.weight"], "chunks", None),
        lambda index: setattr(index.state_dict_metadata["model.0.weight"], "size", ("a",)),
    ],
)
def test_an_index_that_no_save_writes_is_unreadable(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    """Whatever is wrong with it, it is told, and the other step is reported."""
    path = copied("dcp/fsdp2", tmp_path)
    alter(path / "checkpoint_4/.metadata", change)
    bad = wrong(find, path)
    assert [(f.code, f.parts) for f in bad] == [(Code.UNREADABLE, ("checkpoint_4/.metadata",))]


def test_a_rank_without_an_index_is_named(tmp_path: Path) -> None:
    """Where each has one."""
    path = copied("dcp/separate", tmp_path)
    os.remove(path / "epoch_1/__0.metadata")
    bad = {finding.code: finding for finding in wrong(find, path)}
    assert bad[Code.MISSING].parts == ("epoch_1/__0.metadata",)


def test_a_tensor_outside_of_its_item_is_damage(tmp_path: Path) -> None:
    """An item that is shorter than what is in it ends where the index says, not later."""
    path = copied("dcp/fsdp2", tmp_path)
    place = look(path, Reader())
    found = seen(find, path)
    values = tensors(found[0].steps[0])["model/0.weight"].values
    item = values.item._replace(nbytes=values.item.nbytes - 30)
    short = type(values)(place, values.path, item, values.dtype, values.shape)
    with pytest.raises(Damaged, match="no zip directory"):
        next(short.blocks(1))


def test_a_shard_that_is_cut_is_told_as_that(tmp_path: Path) -> None:
    """Of the file, and of each tensor in it: none is called an empty file."""
    path = copied("dcp/alone", tmp_path)
    shard = next(iter(sorted(path.rglob("*.distcp"))))
    cut(shard, shard.stat().st_size // 2)
    told = [finding for finding in wrong(find, path) if finding.code is Code.TRUNCATED]
    lines = [line for finding in told for line in finding.evidence]
    assert lines
    assert all("and the file ends there or in it, at byte" in line for line in lines)
