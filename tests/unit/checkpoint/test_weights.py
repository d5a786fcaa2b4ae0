"""Shows that whole tensors come out of shards as they went in, or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from small_jobs import FILES, ROWS, Job, flip, meanwhile, trained, values

import handfast
from handfast.checkpoint.export import FORMATS
from handfast.checkpoint.location import Location
from handfast.checkpoint.reader import Run, open_run
from handfast.checkpoint.survey import Survey
from handfast.checkpoint.whole import gather, runs
from handfast.core.lattice import Epoch
from handfast.core.retain import Keep
from handfast.errors import Damaged, FormatError, HandfastError, Refused, SaveFailed
from handfast.store.image import BLOCK, TensorSpec, plan
from handfast.store.manifest import CHUNK, Manifest, Piece, Stamp, hash_chunks
from handfast.store.pins import pinned
from handfast.testing.faults import FaultyFiles, Hasty


def manifest(shard: int, shards: int, *specs: TensorSpec, **fields: Any) -> Manifest:
    """A manifest of these tensors, as far as gathering looks at it."""
    layout = plan(specs)
    return Manifest(
        stamp=Stamp("run", "main", 1, 1, f"d{shard}", shard, shards, 1, "c", None),
        slots=layout.slots,
        aliases=fields.get("aliases", {}),
        objects=b"",
        environment={},
        image_bytes=layout.nbytes,
        chunk_bytes=1 << 20,
        hashes=hash_chunks(bytes(layout.nbytes)),
        sources=("1/chunks/1-1.safetensors",),
        pieces=(Piece(0, -(-layout.nbytes // (1 << 20)), 0, 0),),
        replicated=fields.get("replicated", ()),
        structure="",
        digests=fields.get("digests"),
    )


def part(path: str, shape: tuple[int, ...], whole: tuple[int, ...], at: tuple[int, ...],
         dtype: str = "int64") -> TensorSpec:  # fmt: skip
    """A block of a tensor."""
    return TensorSpec(path, dtype, shape, whole, at, (0,) * len(shape))


# --- how blocks are put together ----------------------------------------------------------------


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[tuple[int, int], ...]]]:
    """A global shape, and the boxes of a grid over it (some of them may be empty)."""
    cut = st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any)
    cuts = draw(st.lists(cut, max_size=4))
    shape = tuple(sum(cut) for cut in cuts)
    boxes: list[tuple[tuple[int, int], ...]] = [()]
    for cut in cuts:
        spans = [(sum(cut[:n]), size) for n, size in enumerate(cut)]
        boxes = [(*box, span) for box in boxes for span in spans]
    return shape, boxes


@given(tilings())
def test_blocks_of_any_grid_make_the_whole(
    tiling: tuple[tuple[int, ...], list[tuple[tuple[int, int], ...]]],
) -> None:
    """Each element comes to its place, whatever dimensions were cut, in runs that never overlap."""
    shape, boxes = tiling
    whole = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    images, manifests = [], []
    for shard, box in enumerate(boxes):
        here = whole[tuple(slice(at, at + size) for at, size in box)]
        spec = part("w", here.shape, shape, tuple(at for at, _ in box))
        manifests.append(manifest(shard, len(boxes), spec))
        images.append(here.tobytes())
    (found,), tied = gather(manifests)
    assert (found.name, found.shape, tied) == ("w", shape, {})
    out, written = bytearray(whole.nbytes), 0
    for block in found.blocks:
        for at, begin, count in runs(block.slot):
            out[at : at + count] = images[block.shard][begin : begin + count]
            written += count
    assert out == whole.tobytes()
    assert written == whole.nbytes


def test_an_empty_tensor_that_is_cut_is_whole_without_bytes() -> None:
    """A layer without rows has shards too."""
    halves = [part("w", (0, 2), (0, 4), (0, n * 2)) for n in range(2)]
    (whole,), _ = gather([manifest(n, 2, halves[n]) for n in range(2)])
    assert (whole.name, whole.shape, whole.blocks) == ("w", (0, 4), ())


def test_contiguous_blocks_are_one_run() -> None:
    """A tensor cut along its first dimension, as FSDP does, is written in one piece a shard."""
    (slot,) = plan([part("w", (3, 50, 4), (9, 50, 4), (3, 0, 0))]).slots
    assert list(runs(slot)) == [(3 * 50 * 4 * 8, 0, 3 * 50 * 4 * 8)]


@pytest.mark.parametrize(
    "blocks",
    [
        [((2, 3), (0, 0)), ((1, 3), (2, 0))],
        [((2, 3), (0, 0)), ((3, 3), (1, 0))],
        [((2, 3), (0, 0)), ((2, 3), (1, 0))],
        [((2, 3), (0, 0)), ((2, 2), (2, 0))],
        [((2, 2), (0, 0)), ((2, 1), (2, 2)), ((2, 1), (0, 2))],
        [((0, 3), (4, 0))],
    ],
    ids=["hole", "overlap", "shifted", "narrow", "corner", "nothing"],
)
def test_blocks_that_do_not_cover_the_tensor_are_refused(
    blocks: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    """Shards of two shapes must not be patched together with whatever was in memory."""
    manifests = [
        manifest(n, len(blocks), part("w", shape, (4, 3), at))
        for n, (shape, at) in enumerate(blocks)
    ]
    with pytest.raises(FormatError, match=r"w: the .* blocks of it .* don't cover"):
        gather(manifests)


def test_shards_that_disagree_on_a_tensor_are_refused() -> None:
    """Two dtypes of one sharded tensor are two states."""
    one = part("w", (2, 3), (4, 3), (0, 0))
    two = part("w", (2, 3), (4, 3), (2, 0), "float64")
    with pytest.raises(FormatError, match="not of one tensor"):
        gather([manifest(0, 2, one), manifest(1, 2, two)])


def test_copies_of_one_block_are_taken_once() -> None:
    """Hybrid sharding stores each block once a group of replicas."""
    halves = [part("w", (2,), (4,), (0,)), part("w", (2,), (4,), (2,))]
    (whole,), _ = gather([manifest(n, 4, halves[n % 2]) for n in range(4)])
    assert [block.shard for block in whole.blocks] == [0, 1]
    assert [(one.shard, two.shard) for one, two in whole.twins] == [(0, 2), (1, 3)]


def test_what_ranks_store_as_their_own_is_not_assumed_to_be_alike() -> None:
    """A counter of each rank gets a name of each rank; a stage's own weights keep theirs."""
    own, stage = part("rng/x", (2,), (2,), (0,)), part("model/s", (2,), (2,), (0,))
    shared = part("model/b", (2,), (2,), (0,))
    wholes, tied = gather(
        [
            manifest(0, 2, own, shared, replicated=("model/b",), aliases={"model/t": "model/b"}),
            manifest(1, 2, own, stage, aliases={"rng/y": "rng/x"}),
        ]
    )
    names = [whole.name for whole in wholes]
    assert names == ["model/b", "model/s", "rank-00000/rng/x", "rank-00001/rng/x"]
    assert tied == {"model/t": "model/b", "rank-00001/rng/y": "rank-00001/rng/x"}


def test_a_tie_of_one_rank_gives_no_other_ranks_tensor_another_value() -> None:
    """Rank 1 kept the weights without a clone: rank 0's own copy of older ones came out as new."""
    w, best = part("model/w", (2,), (2,), (0,)), part("best", (2,), (2,), (0,))
    ties = {"best": "model/w"}
    shared = {"replicated": ("model/w",)}
    for manifests, own, tied_to in (
        ([manifest(0, 2, w, best, **shared), manifest(1, 2, aliases=ties)], 0, 1),
        ([manifest(0, 2, w, aliases=ties, **shared), manifest(1, 2, best)], 1, 0),
    ):
        wholes, tied = gather(manifests)
        assert [whole.name for whole in wholes] == ["model/w", f"rank-{own:05d}/best"]
        assert tied == {f"rank-{tied_to:05d}/best": "model/w"}


def test_a_tie_of_fewer_rows_than_ranks_is_one_tensor() -> None:
    """The rank without rows ties nothing, for it has no memory: all of the export was refused."""
    (w, v), (none, left) = ([part(n, (k, 2), (1, 2), (1 - k, 0)) for n in "wv"] for k in (1, 0))
    (whole,), tied = gather([manifest(0, 2, w, aliases={"v": "w"}), manifest(1, 2, none, left)])
    assert (whole.name, [block.shard for block in whole.blocks]) == ("w", [0])
    assert tied == {"v": "w"}
    wholes, tied = gather([manifest(0, 2, w, v), manifest(1, 2, none, left)])
    assert ([whole.name for whole in wholes], tied) == (["v", "w"], {})


def test_what_a_rank_keeps_beside_what_the_node_stores_has_its_name() -> None:
    """One rank knew a tensor to be alike everywhere, the other did not: both values are there, the
    first one's as the job's, also under the name that all ranks tie to it."""
    w = part("w", (2,), (2,), (0,))
    ties = {"v": "w"}
    wholes, tied = gather(
        [manifest(0, 2, w, replicated=("w",), aliases=ties), manifest(1, 2, w, aliases=ties)]
    )
    assert [whole.name for whole in wholes] == ["rank-00001/w", "w"]
    assert tied == {"v": "w", "rank-00001/v": "rank-00001/w"}


def test_a_tie_to_what_one_rank_keeps_for_itself_is_that_ranks() -> None:
    """The job has the tensor, and only the rank that holds it otherwise ties another name to it."""
    w = part("w", (2,), (2,), (0,))
    kept = manifest(1, 2, w, aliases={"v": "w"})
    _, tied = gather([manifest(0, 2, w, replicated=("w",)), kept])
    assert tied == {"rank-00001/v": "rank-00001/w"}


def test_what_the_lowest_rank_ties_is_the_jobs_under_both_names() -> None:
    """The others hold it under a path of its own, and otherwise: theirs came out as the job's."""
    x, y = (part(name, (2,), (2,), (0,)) for name in "xy")
    tie = {"aliases": {"y": "x"}, "replicated": ("x",)}
    both, same, other = {"replicated": ("x", "y")}, b"\0" * 16, b"1" * 16
    first = manifest(0, 3, x, **tie, digests=same)
    apart = manifest(1, 3, x, y, **both, digests=same + other)
    like_first = manifest(2, 3, x, y, **both, digests=same + same)
    wholes, tied = gather([first, apart, like_first])
    assert [(whole.name, whole.beside) for whole in wholes] == [
        ("rank-00001/y", True),
        ("x", False),
    ]
    assert tied == {"y": "x"}
    first = manifest(0, 2, x, **both, digests=same)
    wholes, tied = gather([first, manifest(1, 2, x, **tie, digests=other)])
    assert [whole.name for whole in wholes] == ["rank-00001/x", "x"]
    assert tied == {"rank-00001/y": "rank-00001/x"}
    wholes, tied = gather([manifest(0, 2, x, y, **both), manifest(1, 2, x, **tie)])
    assert [whole.name for whole in wholes] == ["rank-00001/x", "x", "y"]
    assert tied == {"rank-00001/y": "rank-00001/x"}


def test_what_first_ranks_of_nodes_hold_otherwise_is_each_ones_own() -> None:
    """Each node stores it once; only by their digests is it known to be one tensor."""
    w = part("w", (2,), (2,), (0,))
    digests = {"same": bytes(16), "other": b"1" * 16, "unknown": None}
    known = {"replicated": ("w",), "aliases": {"v": "w"}}

    def names(*kinds: str) -> list[str]:
        manifests = [
            manifest(n, len(kinds), w, **known, digests=digests[kind])
            for n, kind in enumerate(kinds)
        ]
        wholes, tied = gather(manifests)
        assert tied == {w.name.replace("w", "v"): w.name for w in wholes}
        assert [whole.beside for whole in wholes] == [whole.name != "w" for whole in wholes]
        return sorted(whole.name for whole in wholes)

    assert names("same", "same") == ["w"]
    assert names("same", "same", "other") == ["rank-00002/w", "w"]
    assert names("unknown", "unknown") == ["rank-00001/w", "w"]


def test_a_component_that_is_named_like_a_rank_is_refused() -> None:
    """Names never silently become one."""
    wicked = part("rank-00001/x", (2,), (2,), (0,))
    own = part("x", (2,), (2,), (0,))
    with pytest.raises(FormatError, match="one name"):
        gather([manifest(0, 2, own, wicked), manifest(1, 2, own)])


# --- export -------------------------------------------------------------------------------------


def expected(step: int, ranks: int) -> dict[str, bytes]:
    """The whole tensors of a small job."""
    return {
        "model/w": b"".join(values(step, r, ROWS * 4) for r in range(ranks)),
        "model/big": b"".join(values(step, r, 8) for r in range(ranks)),
        "model/b": values(step, 0, 5),
        **{f"rank-{r:05d}/optimizer/step": values(step, r, 1) for r in range(ranks)},
    }


def test_an_export_is_what_was_saved(tmp_path: Path) -> None:
    """Opened by the safetensors library: every tensor whole, by name, shape and value."""
    trained(tmp_path / "run")
    done = handfast.open(tmp_path / "run").export(tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {name: array.tobytes() for name, array in found.items()} == expected(4, 3)
    assert found["model/w"].shape == (3 * ROWS, 4)
    assert (done.epoch, done.tensors, done.tied) == (Epoch(1, 4), 6, 1)
    assert done.nbytes == (tmp_path / "out.safetensors").stat().st_size
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "run"]


def test_tied_names_are_where_safetensors_looks_for_them(tmp_path: Path) -> None:
    """Stored once, named in the metadata, with the format that loaders ask for."""
    trained(tmp_path / "run")
    path = tmp_path / "out.safetensors"
    handfast.open(tmp_path / "run").export(path, component="model")
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt", "epoch": "1/4", "tied": "w"}
    assert sorted(load_file(path)) == ["b", "big", "w"]


def test_parts_can_be_asked_for(tmp_path: Path) -> None:
    """A component loses its prefix; globs choose; a tied name alone still has its values."""
    trained(tmp_path / "run")
    run = handfast.open(tmp_path / "run")
    run.export(tmp_path / "a", component="model", only=("b*",))
    assert sorted(load_file(tmp_path / "a")) == ["b", "big"]
    run.export(tmp_path / "b", component="model", only=("tied",))
    assert load_file(tmp_path / "b")["tied"].tobytes() == expected(4, 3)["model/w"]
    run.export(tmp_path / "c", component="optimizer", step=3)
    assert sorted(load_file(tmp_path / "c")) == [f"rank-{n:05d}/step" for n in range(3)]
    with pytest.raises(ValueError, match="component 'modle'; those of model, rank-00000"):
        run.export(tmp_path / "d", component="modle")


def test_an_export_replaces_nothing(tmp_path: Path) -> None:
    """Neither what was there before nor what came there meanwhile."""
    trained(tmp_path / "run")
    path = tmp_path / "out"
    path.write_text("mine")
    run = handfast.open(tmp_path / "run")
    with pytest.raises(HandfastError, match="is there already"):
        run.export(path)
    path.unlink()
    busy = meanwhile(".tmp", lambda: path.write_text("theirs"))
    with pytest.raises(HandfastError, match="is there already"):
        open_run(tmp_path / "run", files=busy).export(path)
    assert path.read_text() == "theirs"
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("fault", ["link", "pwrite", "fsync", "create"])
def test_a_failed_export_leaves_nothing(tmp_path: Path, fault: str) -> None:
    """A full disk is an error with a remedy, and no half file under any name."""
    trained(tmp_path / "run")
    files = FaultyFiles(FILES, 1, errno.ENOSPC, kinds=(fault,), path=str(tmp_path / "out"))
    with pytest.raises(SaveFailed, match="No space left"):
        open_run(tmp_path / "run", files=files).export(tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]
    assert pinned(FILES, str(tmp_path / "run/domains/rank-00000")) == set()


def test_a_file_system_without_links_will_do(tmp_path: Path) -> None:
    """FAT and some network file systems have none: there a rename names the file."""
    trained(tmp_path / "run")
    files = FaultyFiles(FILES, 1, errno.EOPNOTSUPP, kinds=("link",), path=str(tmp_path / "out"))
    open_run(tmp_path / "run", files=files).export(tmp_path / "out")
    assert len(load_file(tmp_path / "out")) == 6
    late = tmp_path / "late"
    files = FaultyFiles(FILES, 1, errno.EOPNOTSUPP, kinds=("link",), path=str(late))
    files = meanwhile("late", lambda: late.write_text("theirs"), files, calls=("link",))
    with pytest.raises(HandfastError, match="is there already"):
        open_run(tmp_path / "run", files=files).export(late)
    assert late.read_text() == "theirs"


def test_a_damaged_byte_is_never_exported(tmp_path: Path) -> None:
    """The export refuses where a plain copy would have handed it on (20 of 20 did)."""
    job = trained(tmp_path / "run")
    flip(job.find(1, "*/chunks/1-4.*"), 4100)
    run = handfast.open(tmp_path / "run")
    with pytest.raises(Damaged, match=r"rank-00001/1/chunks/1-4.safetensors: chunk 0"):
        run.export(tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]
    assert run.export(tmp_path / "out", step=3).epoch == Epoch(1, 3)


def test_a_torn_epoch_is_never_exported(tmp_path: Path) -> None:
    """Nor one of which a shard is missing as yet; it is torn once nobody can finish it any more."""
    job = trained(tmp_path / "run")
    job.start()
    job.save(5, only=[0, 1])
    for verdict in ("ahead", "torn"):
        with pytest.raises(Refused, match="1 of 3 shards lack it") as torn:
            handfast.open(tmp_path / "run").export(tmp_path / "out", step=Epoch(2, 5))
        assert torn.value.verdict == verdict
        assert torn.value.shards == (job.configuration.domains[2].id,)
        job.start()
    job.stop()


def test_dtypes_that_safetensors_lacks_are_refused_by_name(tmp_path: Path) -> None:
    """complex128 as U8 would load as garbage elsewhere: say so, and what to do."""
    job = Job(tmp_path / "run", 1, extra=(part("model/z", (2,), (2,), (0,), "complex128"),))
    job.start()
    job.save(1)
    job.stop()
    run = handfast.open(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model/z \(complex128\).*export to torch"):
        run.export(tmp_path / "out")
    run.export(tmp_path / "out", only=("model/w",))
    with pytest.raises(ValueError, match="no format 'gguf'; there are safetensors"):
        run.export(tmp_path / "more", format="gguf")
    assert "safetensors" in FORMATS


# --- several shards that have one place of a tensor -----------------------------------------------


def halved(tmp_path: Path, values_of: Sequence[int]) -> Job:
    """Four ranks, each with one half of a/s, in whole chunks; the values are those of that rank."""
    job = Job(tmp_path / "run", 4)
    count = (2 * CHUNK - BLOCK) // 4
    for rank, of in enumerate(values_of):
        half = part("a/s", (count,), (2 * count,), (rank % 2 * count,), "float32")
        job.own[rank] = {half: values(1, of, count)}
    job.start()
    job.save(1)
    job.stop()
    return job


@pytest.mark.parametrize("values_of", [(0, 1, 2, 3), (0, 1, 0, 3), (0, 1, 2, 1)])
def test_two_tensors_of_one_name_are_never_taken_for_copies(
    tmp_path: Path, values_of: Sequence[int]
) -> None:
    """Two stages, each cut over ranks of its own: half of the model was dropped in silence."""
    halved(tmp_path, values_of)
    run = handfast.open(tmp_path / "run")
    apart = next(n for n in (1, 0) if values_of[n] != values_of[n + 2])
    for only in (("**",), ("a/s",)):
        with pytest.raises(FormatError, match=rf"a/s \(shards {apart} and {apart + 2}\)\. .*only="):
            run.export(tmp_path / "out", only=only)
    assert os.listdir(tmp_path) == ["run"]
    run.export(tmp_path / "out", only=("model", "rank-*"))
    assert {n: a.tobytes() for n, a in load_file(tmp_path / "out").items()} == expected(1, 4)


@pytest.mark.parametrize("shard", [2, 3])
def test_copies_are_read_only_where_their_hashes_leave_it_open(tmp_path: Path, shard: int) -> None:
    """Shards 1 and 3 are alike in every chunk of it; shard 0 has a header of its own."""
    halved(tmp_path, (0, 1, 0, 1))
    seen = meanwhile(f"rank-{shard:05d}/1/chunks", lambda: None, calls=("pread",))
    open_run(tmp_path / "run", files=seen).export(tmp_path / "out", only=("a/s",))
    count = (2 * CHUNK - BLOCK) // 4
    found = load_file(tmp_path / "out")["a/s"].tobytes()
    assert found == values(1, 0, count) + values(1, 1, count)
    assert bool(seen.fired) == (shard == 2)


# --- beside a live training ---------------------------------------------------------------------


def test_an_export_holds_its_epoch_while_the_training_goes_on(tmp_path: Path) -> None:
    """Epochs are released all around it; its own stays until it is done, and goes with a start."""
    job = Job(tmp_path / "run", 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    busy = meanwhile("rank-00001/1/chunks/1-2", lambda: job.save(3, 4, 5), calls=("pread",))
    done = open_run(tmp_path / "run", files=busy).export(tmp_path / "out")
    assert busy.fired
    assert done.epoch == Epoch(1, 2)
    found = {name: array.tobytes() for name, array in load_file(tmp_path / "out").items()}
    assert found == expected(2, 2)
    assert pinned(FILES, str(job.path(0))) == set()
    job.start()
    assert [row.epoch for row in handfast.open(tmp_path / "run").epochs()] == [Epoch(1, 5)]
    job.stop()


def test_an_epoch_that_goes_before_it_is_pinned_is_left_for_the_new_line(tmp_path: Path) -> None:
    """The choice and the pin are two moments; whatever comes between them, all is of one epoch."""
    job = Job(tmp_path / "run", 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    run = handfast.open(tmp_path / "run")
    location = Between(run.location.paths, FILES)
    location.between = lambda: job.save(3, 4, 5)
    assert Run(location).export(tmp_path / "out").epoch == Epoch(1, 5)
    assert pinned(FILES, str(job.path(0))) == pinned(FILES, str(job.path(1))) == set()
    job.stop()


class Between(Location):
    """A location in which something happens after the first look."""

    between = staticmethod(lambda: None)

    def survey(self) -> Survey:
        found = super().survey()
        deed, self.between = self.between, staticmethod(lambda: None)
        deed()
        return found


class ReadOnly(Hasty):
    """A run on a file system that is mounted read-only."""

    def create(self, path: str) -> int:
        if "/pins/" in path:
            raise OSError(30, "Read-only file system", path)
        return super().create(path)


def test_a_read_only_run_is_exported_without_a_pin(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so; and an epoch that is released meanwhile is an error, not a mixture."""
    job = Job(tmp_path / "run", 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    open_run(tmp_path / "run", files=ReadOnly()).export(tmp_path / "out")
    assert "is read without a pin" in caplog.text
    busy = meanwhile("rank-00001/1/chunks/1-2", lambda: job.save(3, 4, 5), ReadOnly(), at=3)
    with pytest.raises(Refused, match="released while it was read, for it could not be pinned"):
        open_run(tmp_path / "run", files=busy).export(tmp_path / "more")
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]
    job.stop()


def test_an_epoch_whose_pin_was_taken_away_is_said_to_be(tmp_path: Path) -> None:
    """Not that it could not be pinned: whoever freed the pin is to be asked."""
    job = Job(tmp_path / "run", 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)

    def free() -> None:
        for file in (tmp_path / "run").glob("domains/*/pins/*"):
            file.unlink()
        job.save(3, 4, 5)

    busy = meanwhile("rank-00001/1/chunks/1-2", free, at=3)
    with pytest.raises(Refused, match="released while it was read, for its pin was taken away"):
        open_run(tmp_path / "run", files=busy).export(tmp_path / "out")
    job.stop()
