"""Orbax checkpoints that the real library wrote (golden/write_orbax.py), sound and damaged.

Each fault is made in a copy. Threads that a test rebuilds are named in its docstring.
"""

import json
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from audit import goldens
from handfast.audit.checks import Look, check
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.orbax import find
from handfast.audit.found import Clock, Counter, Found, Part, Role, Step
from handfast.audit.place import look
from handfast.audit.run import audit

GOLDEN = goldens.GOLDEN / "orbax"
VARIANTS = ("directories", "managed", "plain", "sharded", "weights", "zarr3")
DONE = "commit_success.txt"
EVERYBODY = "all processes that see this directory"
only, findings = partial(goldens.only, find), partial(goldens.findings, find)
copied = partial(goldens.copied, golden=GOLDEN)


def codes(path: Path, reader: Reader) -> set[Code]:
    """The kinds of what is wrong."""
    return {finding.code for finding in findings(path, reader)}


def step(found: Found, number: int) -> Step:
    """A step by its number."""
    return next(step for step in found.steps if step.number == number)


def counters(step: Step) -> dict[str, Counter]:
    """The counters of a step by their paths."""
    return {counter.path: counter for part in step.parts for counter in part.counters}


def roles(part: Part) -> dict[str, tuple[Role, str]]:
    """What each tensor is, and whose."""
    return {tensor.path: (tensor.role, tensor.of) for tensor in part.tensors}


# Sound ones


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sound_checkpoint_has_no_findings(variant: str, reader: Reader) -> None:
    """Whatever the options were: no format's own rule and no check has anything to say."""
    assert findings(GOLDEN / variant, reader) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_file_is_known(variant: str, reader: Reader) -> None:
    """Nothing of a checkpoint is left for other formats."""
    place = look(GOLDEN / variant, reader)
    (found,) = find(place)
    assert set(place.files) == found.files


def test_the_latest_step_would_be_taken(reader: Reader) -> None:
    """For each way to name steps: by number, with a prefix and zeros, with a prefix."""
    taken = {}
    for variant in VARIANTS:
        (resume,) = only(GOLDEN / variant, reader).resume
        assert resume.ranks == EVERYBODY
        taken[variant] = resume.step
    assert taken == {
        "directories": "0002",
        "managed": "3",
        "plain": "ckpt_000004",
        "sharded": "2",
        "weights": "200",
        "zarr3": "epoch_2",
    }


def test_all_runs_below_a_directory_are_found(reader: Reader) -> None:
    """Each root by itself, with its steps oldest first."""
    found = {f.root: [s.number for s in f.steps] for f in find(look(GOLDEN, reader))}
    assert found == {
        "directories": [1, 2],
        "managed": [2, 3],
        "plain": [2, 4],
        "sharded": [1, 2],
        "weights": [100, 200],
        "zarr3": [1, 2],
    }


def test_a_step_by_itself_is_audited(reader: Reader) -> None:
    """So is an item by itself; its number is its directory's."""
    (found,) = find(look(GOLDEN / "managed" / "3", reader))
    assert [(s.path, s.number) for s in found.steps] == [("", 3)]
    (item,) = find(look(GOLDEN / "managed" / "3" / "default", reader))
    assert [len(part.tensors) for part in item.steps[0].parts] == [18]


def test_moments_belong_to_their_parameters(reader: Reader) -> None:
    """By the tree's paths: Adam's two, and which parameter each is of."""
    (part,) = step(only(GOLDEN / "managed", reader), 3).parts
    found = roles(part)
    for name in ("first.kernel", "first.bias", "norm.scale", "last.kernel", "last.bias"):
        of = f"default.{name}"
        assert found[f"default/params.{name}"] == (Role.PARAMETER, of)
        assert found[f"default/opt_state.0.mu.{name}"] == (Role.FIRST, of)
        assert found[f"default/opt_state.0.nu.{name}"] == (Role.SECOND, of)
    assert part.rank == {"process": 0}


def test_items_of_a_step_are_one_state(reader: Reader) -> None:
    """Weights and an optimizer that were saved as two items: moments still find parameters."""
    parts = step(only(GOLDEN / "weights", reader), 200).parts
    found = {path: what for part in parts for path, what in roles(part).items()}
    assert found["params/last.kernel"] == (Role.PARAMETER, "last.kernel")
    assert found["opt_state/0.nu.last.kernel"] == (Role.SECOND, "last.kernel")
    assert {t.values.dtype for p in parts for t in p.tensors if t.role is Role.PARAMETER} == {
        "bfloat16"
    }


def test_counters_agree_where_the_libraries_say_so(reader: Reader) -> None:
    """The training's steps, Adam's count and the schedule's; the directory's name is the user's."""
    found = counters(step(only(GOLDEN / "managed", reader), 3))
    assert found == {
        "default/step": Counter(Clock.TRAINER, 3, "default/step"),
        "default/opt_state.0.count": Counter(Clock.OPTIMIZER, 3, "default/opt_state.0.count"),
        "default/opt_state.2.count": Counter(Clock.SCHEDULER, 3, "default/opt_state.2.count"),
        "3": Counter(Clock.DIRECTORY, 3, "3", updates=False),
    }


def test_accumulated_gradients_are_no_fault(reader: Reader) -> None:
    """MultiSteps makes one update of two steps: the training's count is held against none."""
    found = counters(step(only(GOLDEN / "plain", reader), 4))
    assert found["state/opt_state.gradient_step"].value == 2
    assert found["state/opt_state.gradient_step"].updates
    assert found["state/step"].value == 4
    assert not found["state/step"].updates


def test_skipped_updates_are_no_fault(reader: Reader) -> None:
    """What ``apply_if_finite`` wraps may lag behind, and the step says that updates are skipped."""
    found = step(only(GOLDEN / "zarr3", reader), 2)
    assert found.scaled
    assert counters(found)["opt_state.inner_state.0.count"].skips


def test_a_sharded_array_is_in_pieces(reader: Reader) -> None:
    """Each process's part has the pieces that it wrote, with their places in the whole."""
    parts = step(only(GOLDEN / "sharded", reader), 2).parts
    assert [part.rank for part in parts] == [{"process": 0}, {"process": 1}]
    kernel = "default/params.last.kernel"
    places = [[t.offset for t in part.tensors if t.path == kernel] for part in parts]
    assert places == [[(0, 0), (0, 4)], [(0, 8), (0, 12)]]
    pieces = [t for part in parts for t in part.tensors if t.path == kernel]
    assert {(t.whole, t.values.shape) for t in pieces} == {((96, 16), (96, 4))}
    rows = [b"".join(bytes(block) for block in t.values.blocks(7)) for t in pieces]
    assert len(set(rows)) == 4


# Faults


def spoil(path: Path, at: int = -10) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def data_file(item: Path) -> Path:
    """The largest file of values of the first process."""
    return max((item / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)


def test_a_half_deleted_step_is_taken_by_latest_step(tmp_path: Path, reader: Reader) -> None:
    """An empty directory counts as the latest step, and a restore from it fails."""
    root = copied("managed", tmp_path)
    (root / "7").mkdir()
    found = only(root, reader)
    assert found.resume[0].step == "7"
    assert step(found, 7).missing
    assert codes(root, reader) == {Code.MISSING}


def test_a_step_whose_item_is_gone_is_told(tmp_path: Path, reader: Reader) -> None:
    """The metadata names the item; that of another step is not touched."""
    root = copied("weights", tmp_path)
    shutil.rmtree(root / "200" / "opt_state")
    (finding,) = findings(root, reader)
    assert finding.code is Code.MISSING
    assert finding.parts == ("200/opt_state",)


def test_a_step_without_its_metadata_is_told(tmp_path: Path, reader: Reader) -> None:
    """As those before have it; the items are read all the same."""
    root = copied("managed", tmp_path)
    (root / "3" / "_CHECKPOINT_METADATA").unlink()
    assert codes(root, reader) == {Code.MISSING}
    assert len(step(only(root, reader), 3).parts[0].tensors) == 18


def test_a_copied_step_lacks_its_commit(tmp_path: Path, reader: Reader) -> None:
    """google/orbax#394: a copy without ``commit_success.txt`` is a step here, and none on GCS."""
    root = copied("managed", tmp_path)
    (root / "3" / DONE).unlink()
    (finding,) = findings(root, reader)
    assert finding.code is Code.UNCOMMITTED
    assert only(root, reader).resume[0].step == "3"


@pytest.mark.parametrize("name", ["_sharding", "array_metadatas/process_0", DONE])
def test_what_lies_beside_the_values_is_missed(name: str, tmp_path: Path, reader: Reader) -> None:
    """No restore may need it; that it is gone says that the step is not as it was."""
    root = copied("managed", tmp_path)
    (root / "3" / "default" / name).unlink()
    (finding,) = findings(root, reader)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.STRONG)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", DONE, f"params/{DONE}"])
def test_commit_files_need_each_other(name: str, tmp_path: Path, reader: Reader) -> None:
    """Of the first step, too: a release that writes one writes all, and the metadata."""
    root = copied("weights", tmp_path)
    (root / "100" / name).unlink()
    (finding,) = findings(root, reader)
    assert finding.parts == (f"100/{name}",)


def test_an_item_with_nothing_in_it_is_told(tmp_path: Path, reader: Reader) -> None:
    """But for its commit file: what a loader said is gone."""
    root = copied("weights", tmp_path)
    (root / "200" / "loader" / "metadata").unlink()
    (finding,) = findings(root, reader)
    assert (finding.code, finding.parts) == (Code.UNREADABLE, ("200/loader",))


def test_older_releases_wrote_less(tmp_path: Path, reader: Reader) -> None:
    """A run that went on with a newer Orbax: what only later steps have is not missed."""
    root = copied("managed", tmp_path)
    for name in (DONE, f"default/{DONE}", "_CHECKPOINT_METADATA"):
        (root / "2" / name).unlink()
    assert findings(root, reader) == []


@pytest.mark.parametrize("folder", ["3", "3/default"])
def test_a_commit_that_says_nothing_is_told(folder: str, tmp_path: Path, reader: Reader) -> None:
    """Emptied by a full disk, say: Orbax looks only whether it is there."""
    root = copied("managed", tmp_path)
    (root / folder / DONE).write_text("")
    (finding,) = findings(root, reader)
    assert (finding.code, finding.strength) == (Code.CORRUPT, Strength.STRONG)


def test_metadata_of_another_step_is_told(tmp_path: Path, reader: Reader) -> None:
    """Its times are not those at which the stores were committed."""
    root = copied("managed", tmp_path)
    shutil.copy(root / "2" / "_CHECKPOINT_METADATA", root / "3" / "_CHECKPOINT_METADATA")
    (finding,) = findings(root, reader)
    assert (finding.code, finding.strength) == (Code.EXTRA, Strength.STRONG)


def test_a_process_without_its_metadata_is_told(tmp_path: Path, reader: Reader) -> None:
    """Each one that wrote a store wrote that, too."""
    root = copied("sharded", tmp_path)
    (root / "2" / "default" / "array_metadatas" / "process_1").unlink()
    missing = step(only(root, reader), 2).missing
    assert [path for path, _ in missing] == ["2/default/array_metadatas/process_1"]


def test_a_file_of_an_older_version_is_missed(tmp_path: Path, reader: Reader) -> None:
    """A process's store has a version a commit: its manifest names the roots of all of them."""
    root = copied("managed", tmp_path)
    data = root / "3" / "default" / "ocdbt.process_0" / "d"
    for path in data.iterdir():
        path.rename(tmp_path / "aside")
        with Reader() as again:
            assert Code.MISSING in codes(root, again)
        (tmp_path / "aside").rename(path)


def test_a_save_that_died_before_its_commit_is_told(tmp_path: Path, reader: Reader) -> None:
    """Metadata with a beginning and no end, under a final name: somebody renamed it by hand."""
    root = copied("managed", tmp_path)
    path = root / "3" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit_timestamp_nsecs": None}))
    (root / "3" / DONE).unlink()
    assert not step(only(root, reader), 3).committed
    assert codes(root, reader) == {Code.UNCOMMITTED}


@pytest.mark.parametrize(("name", "strength"), [("1", Strength.STRONG), ("4", Strength.HINT)])
def test_a_temporary_directory_is_a_left_over(
    name: str, strength: Strength, tmp_path: Path, reader: Reader
) -> None:
    """Certainly dead where newer steps are there; else the save may be going on."""
    root = copied("managed", tmp_path)
    (root / "3").rename(root / f"{name}.orbax-checkpoint-tmp")
    (finding,) = only(root, reader).findings
    assert (finding.code, finding.strength) == (Code.LEFTOVER, strength)
    assert only(root, reader).resume[0].step == "2"


def test_a_first_save_that_died_is_told(tmp_path: Path, reader: Reader) -> None:
    """Nothing but a temporary directory: no step, nothing to resume from, and a left-over."""
    root = copied("managed", tmp_path)
    shutil.rmtree(root / "2")
    (root / "3").rename(root / "3.orbax-checkpoint-tmp")
    found = only(root, reader)
    assert (found.steps, found.resume) == ([], [])
    assert [finding.code for finding in found.findings] == [Code.LEFTOVER]


def test_a_missing_data_file_is_told(tmp_path: Path, reader: Reader) -> None:
    """The manifest refers to it; so do the values that lay in it."""
    root = copied("sharded", tmp_path)
    data_file(root / "2" / "default").unlink()
    assert Code.MISSING in codes(root, reader)


def test_a_process_that_is_gone_is_told(tmp_path: Path, reader: Reader) -> None:
    """EleutherAI/gpt-neox#750: one node's shards are absent. Small values lie in the merged tree,
    so that not even a dangling reference need be left.
    """
    root = copied("sharded", tmp_path)
    shutil.rmtree(root / "2" / "default" / "ocdbt.process_1")
    missing = dict(step(only(root, reader), 2).missing)
    assert "2/default/ocdbt.process_*" in missing


@pytest.mark.parametrize("size", [0, 1000])
def test_a_cut_data_file_is_told(size: int, tmp_path: Path, reader: Reader) -> None:
    """facebookresearch/metaseq#53: shards of no length, or of too little."""
    root = copied("sharded", tmp_path)
    path = data_file(root / "2" / "default")
    path.write_bytes(path.read_bytes()[:size])
    found = [f for f in findings(root, reader) if f.code is Code.TRUNCATED]
    assert any(path.name in finding.says for finding in found)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "ocdbt.process_0/manifest.ocdbt"])
def test_a_damaged_manifest_is_told(name: str, tmp_path: Path, reader: Reader) -> None:
    """By its CRC-32C; and every manifest is read, those of processes too."""
    root = copied("managed", tmp_path)
    spoil(root / "3" / "default" / name, 30)
    (finding,) = findings(root, reader)
    assert finding.code is Code.UNREADABLE
    assert "CRC-32C" in finding.says


def test_a_damaged_node_is_told(tmp_path: Path, reader: Reader) -> None:
    """By its CRC-32C, where Orbax finds it only when it reads that node."""
    root = copied("managed", tmp_path)
    (tree,) = [p for p in (root / "3" / "default" / "d").iterdir() if p.stat().st_size > 2000]
    spoil(tree, -3000)
    assert Code.UNREADABLE in codes(root, reader)


def test_a_damaged_chunk_is_found_where_it_can_not_be_unpacked(
    tmp_path: Path, reader: Reader
) -> None:
    """zstd frames have no checksum: a header that is gone is found, a bit of a number is not."""
    root = copied("plain", tmp_path)
    spoil(root / "ckpt_000004" / "state" / "params.last.kernel" / "0.0", 0)
    (finding,) = findings(root, reader)
    assert finding.code is Code.TRUNCATED
    assert "zstd" in finding.evidence[0]


def test_a_missing_chunk_is_told(tmp_path: Path, reader: Reader) -> None:
    """Its values would be 0 to older releases; the tree says that all chunks are stored."""
    root = copied("plain", tmp_path)
    (root / "ckpt_000004" / "state" / "params.last.kernel" / "0.0").unlink()
    (path, _), *_ = step(only(root, reader), 4).missing
    assert path == "ckpt_000004/state: params.last.kernel/0.0"
    assert Code.MISSING in codes(root, reader)


def test_arrays_and_tree_must_name_each_other(tmp_path: Path, reader: Reader) -> None:
    """An array that is gone is missing, one that the tree does not know is too much."""
    root = copied("plain", tmp_path)
    state = root / "ckpt_000004" / "state"
    (state / "params.last.kernel").rename(state / "params.renamed")
    found = step(only(root, reader), 4)
    assert [path for path, _ in found.missing] == ["ckpt_000004/state: params.last.kernel"]
    assert [path for path, _ in found.extra] == ["ckpt_000004/state: params.renamed"]
    assert {Code.MISSING, Code.EXTRA} <= codes(root, reader)


def test_a_chunk_of_a_larger_world_is_told(tmp_path: Path, reader: Reader) -> None:
    """More chunks than the array has: they are of a save by more processes."""
    root = copied("plain", tmp_path)
    state = root / "ckpt_000004" / "state" / "params.last.kernel"
    shutil.copy(state / "0.0", state / "1.0")
    assert codes(root, reader) == {Code.EXTRA}


@pytest.mark.parametrize("name", ["_METADATA", "_sharding", "array_metadatas/process_0"])
def test_damaged_metadata_is_told(name: str, tmp_path: Path, reader: Reader) -> None:
    """What can't be read is named, and the arrays are read all the same."""
    root = copied("managed", tmp_path)
    (root / "3" / "default" / name).write_text("{")
    (finding,) = findings(root, reader)
    assert (finding.code, finding.parts) == (Code.UNREADABLE, (f"3/default/{name}",))
    assert len(step(only(root, reader), 3).parts[0].tensors) == 18


def test_metadata_that_is_too_large_is_told(tmp_path: Path, reader: Reader) -> None:
    """A file of its name of more than is read: no memory is taken for it."""
    root = copied("managed", tmp_path)
    with (root / "3" / "default" / "_METADATA").open("r+b") as file:
        file.truncate(1 << 27)
    (finding,) = findings(root, reader)
    assert "134,217,728 bytes" in finding.says


def test_a_tree_without_metadata_is_told(tmp_path: Path, reader: Reader) -> None:
    """Its arrays have names all the same."""
    root = copied("managed", tmp_path)
    (root / "3" / "default" / "_METADATA").unlink()
    assert codes(root, reader) == {Code.MISSING}
    assert "default/params.last.kernel" in roles(step(only(root, reader), 3).parts[0])


def test_an_array_without_its_metadata_is_told(tmp_path: Path, reader: Reader) -> None:
    """``.zarray`` that is cut: the array can't be read, and others are."""
    root = copied("plain", tmp_path)
    (root / "ckpt_000004" / "state" / "params.last.kernel" / ".zarray").write_text("{")
    (finding,) = findings(root, reader)
    assert finding.code is Code.UNREADABLE
    assert finding.parts == ("ckpt_000004/state/params.last.kernel/.zarray",)


def test_json_that_is_none_is_told(tmp_path: Path, reader: Reader) -> None:
    """What a loader said is an item, too."""
    root = copied("weights", tmp_path)
    (root / "200" / "loader" / "metadata").write_text("{")
    (finding,) = findings(root, reader)
    assert (finding.code, finding.parts) == (Code.UNREADABLE, ("200/loader",))


def test_the_step_s_metadata_may_be_damaged(tmp_path: Path, reader: Reader) -> None:
    """It is named, and the items are found by what is in them."""
    root = copied("managed", tmp_path)
    (root / "3" / "_CHECKPOINT_METADATA").write_text("[]")
    (finding,) = findings(root, reader)
    assert (finding.code, finding.parts) == (Code.UNREADABLE, ("3/_CHECKPOINT_METADATA",))


# Mixtures


def test_an_optimizer_of_another_step_is_told(tmp_path: Path, reader: Reader) -> None:
    """NVIDIA/nvidia-resiliency-ext#376 rebuilt for Orbax: moments of one step, weights of another.

    The item itself says under which step it was committed.
    """
    root = copied("weights", tmp_path)
    shutil.rmtree(root / "200" / "opt_state")
    shutil.copytree(root / "100" / "opt_state", root / "200" / "opt_state")
    found = [f for f in findings(root, reader) if f.code is Code.EXTRA]
    assert [finding.parts for finding in found] == [("200/opt_state",)] * 2


def test_a_tree_put_together_of_two_steps_is_told(tmp_path: Path, reader: Reader) -> None:
    """NVIDIA/nvidia-resiliency-ext#376 in one tree: an optimizer of a step before its weights.

    Its count and the training's disagree. All else is in order: no file is missing or cut.
    """
    root = copied("directories", tmp_path)
    new, old = root / "0002", root / "0001"
    for path in new.glob("opt_state.*"):
        shutil.rmtree(path)
        shutil.copytree(old / path.name, path)
    found = counters(step(only(root, reader), 2))
    assert (found["opt_state.0.count"].value, found["step"].value) == (1, 2)
    assert Code.COUNTERS in codes(root, reader)


def test_a_process_of_another_step_is_told(tmp_path: Path, reader: Reader) -> None:
    """One process's store of the step before: mosaicml/composer#2146 rebuilt for Orbax."""
    root = copied("sharded", tmp_path)
    shutil.rmtree(root / "2" / "default" / "ocdbt.process_1")
    shutil.copytree(
        root / "1" / "default" / "ocdbt.process_1", root / "2" / "default" / "ocdbt.process_1"
    )
    found = [f for f in findings(root, reader) if f.code is Code.EXTRA]
    assert [finding.parts for finding in found] == [("2/default/ocdbt.process_1",)]


def test_a_process_of_another_world_is_told(tmp_path: Path, reader: Reader) -> None:
    """A store of a third process, of another save: its values were never merged."""
    root = copied("sharded", tmp_path)
    shutil.copytree(
        root / "1" / "default" / "ocdbt.process_1", root / "2" / "default" / "ocdbt.process_2"
    )
    found = [f for f in findings(root, reader) if f.code is Code.EXTRA]
    assert [finding.parts for finding in found] == [("2/default/ocdbt.process_2",)]


def test_what_processes_said_is_held_against_the_arrays(tmp_path: Path, reader: Reader) -> None:
    """``array_metadatas`` of a save by another number of devices."""
    root = copied("sharded", tmp_path)
    path = root / "2" / "default" / "array_metadatas" / "process_1"
    path.write_text(path.read_text().replace("[96, 4]", "[96, 2]"))
    (finding,) = findings(root, reader)
    assert (finding.code, finding.strength) == (Code.WORLD, Strength.CERTAIN)


def test_a_renamed_step_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """It was committed under another name: it may be a copy, and no more is said."""
    root = copied("managed", tmp_path)
    (root / "3").rename(root / "30")
    found = step(only(root, reader), 30).findings
    assert [(f.code, f.strength) for f in found] == [(Code.COUNTERS, Strength.HINT)]
    assert findings(root, reader) == []


def test_a_step_saved_again_is_a_hint(tmp_path: Path, reader: Reader) -> None:
    """NVIDIA-NeMo/RL#3312: a later step with the moments of an older one; or a copy."""
    root = copied("managed", tmp_path)
    shutil.copytree(root / "3", root / "4")
    assert findings(root, reader) == []
    told = {f.strength for f in audit(root).findings if f.code is Code.STALE}
    assert told == {Strength.HINT}


# Hostile files


def test_a_pickle_in_place_of_a_file_is_never_executed(tmp_path: Path, reader: Reader) -> None:
    """Of nothing here is anything loaded: the pickle that would leave a mark is only unreadable."""
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (mark,)

    root = copied("managed", tmp_path)
    places = [p for p in (root / "3").rglob("*") if p.is_file() and p.name != DONE]
    for path in places:
        saved = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        assert findings(root, reader) or path.parent.name == "d"
        path.write_bytes(saved)
    assert not mark.exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_file_that_is_cut_raises(variant: str, tmp_path: Path) -> None:
    """Whatever is cut in half, the whole place is reported."""
    root = copied(variant, tmp_path)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        saved = path.read_bytes()
        path.write_bytes(saved[: len(saved) // 2])
        with Reader() as reader:
            for found in find(look(root, reader)):
                list(check(found, Look()))
        path.write_bytes(saved)


def test_without_zstandard_it_is_said_what_lacks(
    monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    """The package is optional: without it the nodes can't be unpacked, and it is named."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    found = findings(GOLDEN / "managed", reader)
    assert found
    assert all("zstandard" in finding.says for finding in found if finding.code is Code.UNREADABLE)
