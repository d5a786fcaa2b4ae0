"""Shows that what can't be restored rightly is refused in clear words, and nothing is changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deeds
import pytest
import torch
import xxhash
from torch import nn
from trainers import Job, Launcher, agents, eventually
from training import Training

from handfast import Keep
from handfast.errors import Refused, Unstorable
from handfast.store.files import Posix
from handfast.store.shelf import Shelf
from handfast.torch import Checkpointer

Launch = Callable[..., Job]
PATIENT: dict[str, Any] = {"patience_s": 30.0}


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with the steps 1 and 2, and the digest of step 2 in a file beside it."""
    home = tmp_path_factory.mktemp("alone")
    training = Training()
    with Checkpointer(home / "run", training.state(), keep=Keep(newest=9), **PATIENT) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            training.step()
            ckpt.save(step)
            ckpt.wait_until_finished(30.0)
    return home / "run"


def _saved(home: Path, ranks: int, path: str) -> None:
    launcher = Launcher(home)
    try:
        job = launcher.start(ranks, 1, {})
        job.all(deeds.resume, str(home / path), keep=Keep(newest=9))
        for step in (1, 2):
            job.all(deeds.train, step)
            job.all(deeds.converged)
        job.all(deeds.close)
    finally:
        launcher.end()


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, each with a directory of its own, with the steps 1 and 2."""
    home = tmp_path_factory.mktemp("two")
    _saved(home, 2, "{rank}")
    return home


@pytest.fixture
def alone(saved_alone: Path, tmp_path: Path, run: str) -> str:
    """A copy of the run of one rank."""
    shutil.copytree(saved_alone, run)
    return run


@pytest.fixture
def two(saved_by_two: Path, tmp_path: Path) -> str:
    """A copy of the run of two ranks; gives its path with a place for the rank."""
    for rank in "01":
        shutil.copytree(saved_by_two / rank, tmp_path / rank)
    return str(tmp_path / "{rank}")


def refused(path: str, training: Training, **options: Any) -> Refused:
    """The refusal of a restore, which must have changed nothing, on the disk neither."""
    before, files = training.digest(), listing(path)
    ckpt = Checkpointer(path, training.state(), **PATIENT)
    try:
        with pytest.raises(Refused) as caught:
            ckpt.restore(**options)
    finally:
        ckpt.close()
    assert training.digest() == before
    assert caught.value.remedy
    assert caught.value.remedy in str(caught.value)
    assert {name: size for name, size in listing(path).items() if name in files} == files
    return caught.value


def listing(path: str) -> dict[str, int]:
    """Every file that holds an epoch, with its size."""
    kept = (".manifest", ".safetensors", ".delta", "domain.json")
    return {str(p): p.stat().st_size for p in Path(path).rglob("*") if p.name.endswith(kept)}


def all_refused(job: Job, path: str, model: dict[str, Any] | None = None) -> Refused:
    """The refusal of a job's restore: the same on every rank, and nothing has changed."""
    before = job.all(deeds.begin, path, model=model)
    errors = job.each_raises(deeds.restore)
    assert [type(error) for error in errors] == [Refused] * len(job)
    assert len({str(error) for error in errors}) == 1
    assert job.all(deeds.digest) == before
    (first, *_) = errors
    assert isinstance(first, Refused)
    return first


# --- another state ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 2}, r"model/7\.weight: tensor: saved nothing, live float32\[8, 8\]"),
        ({"dtype": torch.bfloat16}, r"model/0\.weight: dtype: saved float32, live bfloat16"),
        ({"width": 16}, r"model/0\.weight: shape: saved \(8, 8\), live \(16, 8\)"),
        ({"norm": True}, r"model/1\.running_mean"),
        ({"optimizer": "Adam"}, r"optimizer: type: saved AdamW, live Adam"),
        ({"optimizer": "SGD"}, r"optimizer: type: saved AdamW, live SGD"),
        ({"optimizer": "groups"}, r"optimizer: groups: saved 1 groups, live 2 groups"),
        ({"full": True}, r"loader: kind: saved nothing, live loader"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_another_model_or_optimizer_is_refused_by_name(
    alone: str, options: dict[str, Any], said: str
) -> None:
    """Megatron-LM#6920: it resumed from a different model, and the loss looked normal."""
    error = refused(alone, Training(**options))
    assert error.verdict == "foreign"
    assert error.shards == ("shard 0",)
    assert re.search(said, str(error)), error
    with Checkpointer(alone, Training().state(), **PATIENT) as ckpt:
        assert ckpt.restore() == 2  # and the run is as good as before


def test_an_epoch_that_was_never_saved_is_refused(alone: str) -> None:
    error = refused(alone, Training(), step=5)
    assert error.verdict == "missing"
    assert "no epoch of step 5 is left" in str(error)


# --- another job --------------------------------------------------------------------------------


def test_one_rank_can_t_take_over_from_two(two: str) -> None:
    """Other world sizes come later; until then they are refused, not mixed."""
    error = refused(two.format(rank=0), Training())
    assert error.verdict == "foreign"
    assert "the run was saved by 2 ranks, and this job has 1" in str(error)
    assert "start 2 ranks" in error.remedy


def test_two_ranks_can_t_take_over_from_one(alone: str, launch: Launch) -> None:
    error = all_refused(launch(2), alone)
    assert error.verdict == "foreign"
    assert "the run was saved by 1 ranks, and this job has 2" in str(error)


@pytest.mark.heavy
def test_two_ranks_can_t_take_over_from_four(launch: Launch, tmp_path: Path) -> None:
    _saved(tmp_path, 4, "run")
    error = all_refused(launch(2), str(tmp_path / "run"))
    assert "the run was saved by 4 ranks, and this job has 2" in str(error)


def test_a_rank_whose_disk_is_empty_is_named(two: str, tmp_path: Path, launch: Launch) -> None:
    """NVIDIA-NeMo/Speech#10228, gpt-neox#750: a part was gone, and training began from scratch."""
    shutil.rmtree(tmp_path / "1")
    error = all_refused(launch(2), two)
    assert error.verdict == "missing"
    assert [shard.split(":")[0] for shard in error.shards] == ["rank 1"]
    assert "bring the missing directory back" in error.remedy
    assert not (tmp_path / "1").exists()


def test_a_run_whose_domains_were_removed_is_no_first_start(saved_alone: Path, alone: str) -> None:
    """`rm -r RUN/domains/*`: it would train from scratch, and nobody would be told."""
    published = Path(alone) / "certificates"
    eventually(lambda: list(saved_alone.glob("certificates/*.json")))
    shutil.copytree(saved_alone / "certificates", published, dirs_exist_ok=True)
    shutil.rmtree(Path(alone) / "domains" / "rank-00000")
    error = refused(alone, Training())
    assert error.verdict == "missing"
    assert "certificates of rank-00000), and no domain is left" in str(error)
    shutil.rmtree(published)  # as the remedy says
    with Checkpointer(alone, Training().state(), **PATIENT) as ckpt:
        assert ckpt.restore() == 0


def test_disks_that_changed_places_are_refused(two: str, tmp_path: Path, launch: Launch) -> None:
    """Two nodes that came up in another order: neither a mixture, nor a start from scratch."""
    (tmp_path / "0").rename(tmp_path / "x")
    (tmp_path / "1").rename(tmp_path / "0")
    (tmp_path / "x").rename(tmp_path / "1")
    error = all_refused(launch(2), two)
    assert error.verdict == "mixed"
    assert [f"rank {rank}: {tmp_path}/{rank}" in str(error) for rank in (0, 1)] == [True, True]
    assert "holds rank-00001-" in error.shards[0]
    assert "start each rank on the directory of its own shard" in error.remedy


def test_domains_that_changed_places_are_refused(two: str, tmp_path: Path, launch: Launch) -> None:
    """The same, with the directories renamed so that they look right."""
    first, second = (tmp_path / rank / "domains" for rank in "01")
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    (first / "rank-00001").rename(first / "rank-00000")
    (second / "rank-00000").rename(second / "rank-00001")
    error = all_refused(launch(2), two)
    assert "is the identity of the domain rank-00001" in str(error)
    assert error.remedy


def test_another_runs_directory_on_one_rank_is_refused(
    two: str, tmp_path: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """LMResiliency/lm-resiliency#77: another run's shard was accepted."""
    other = tmp_path_factory.mktemp("other")
    _saved(other, 2, "{rank}")
    shutil.rmtree(tmp_path / "1")
    shutil.copytree(other / "1", tmp_path / "1")
    error = all_refused(launch(2), two)
    assert error.verdict == "foreign"
    assert "belong to 2 runs" in str(error)
    assert len(error.shards) == 2


def test_a_directory_of_another_copy_of_the_run_is_refused(launch: Launch, tmp_path: Path) -> None:
    """A run is copied while idle, both copies train on, and one rank's disk is taken from the
    other: 1/1 is in both, and 2/2 is certified in both, of other bytes."""
    job = launch(2)
    job.all(deeds.resume, str(tmp_path / "a" / "{rank}"))
    job.all(deeds.train, 1)
    job.all(deeds.close)
    eventually(lambda: not agents())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name, saves in (("a", 2), ("b", 3)):
        job = launch(2)
        job.all(deeds.resume, str(tmp_path / name / "{rank}"))
        job.all(deeds.train, saves)
        job.all(deeds.close)
        eventually(lambda: not agents())
    shutil.rmtree(tmp_path / "a" / "1")
    (tmp_path / "b" / "1").rename(tmp_path / "a" / "1")
    job = launch(2)
    for error in job.each_raises(deeds.resume, str(tmp_path / "a" / "{rank}")):
        assert isinstance(error, Refused)
        assert error.verdict == "mixed"
        assert "copies of one run that went on apart" in str(error)


def test_a_shard_that_was_copied_over_another_step_is_never_loaded(
    two: str, tmp_path: Path, launch: Launch
) -> None:
    """Swapped shards were loaded in silence in 4 of 4 cases elsewhere: here the line goes down."""
    (manifests,) = (tmp_path / "1").glob("domains/rank-00001/*/manifests")
    shutil.copy(manifests / "1-1.manifest", manifests / "1-2.manifest")
    chunks = manifests.parent / "chunks"
    (old,) = chunks.glob("1-1.*")
    (new,) = chunks.glob("1-2.*")
    shutil.copy(old, new)
    job = launch(2)
    job.all(deeds.begin, two)
    assert job.all(deeds.restore) == [1, 1]


def test_a_step_whose_only_copy_is_damaged_is_refused_where_it_is_asked_for(alone: str) -> None:
    """With the file and the place; and without asking, the one before it is taken."""
    (image,) = Path(alone).glob("domains/*/*/chunks/1-2.*")
    data = bytearray(image.read_bytes())
    data[5000] ^= 1
    image.write_bytes(data)
    error = refused(alone, Training(), step=2)
    assert error.verdict == "corrupt"
    assert image.name in str(error)
    with Checkpointer(alone, Training().state(), **PATIENT) as ckpt:
        assert ckpt.restore() == 1


# --- what is no run -------------------------------------------------------------------------------


def test_a_path_that_is_a_file_is_refused(run: str) -> None:
    """It is as it was, and no agent was started."""
    Path(run).write_text("not a directory")
    with pytest.raises(ValueError, match=r"run' is a file: give the directory"):
        Checkpointer(run, Training().state(), **PATIENT)
    assert Path(run).read_text() == "not a directory"
    assert agents() == []


def test_a_directory_that_can_t_be_written_is_refused(tmp_path: Path, launch: Launch) -> None:
    """As a user who may not: root may write anywhere."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    place = tmp_path / "readonly"
    place.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o001 == 0 and parent.is_relative_to("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o011)
    (one,) = launch()
    one.do(deeds.become_nobody, str(tmp_path))
    one.do(deeds.begin, str(place / "run"))
    before = one.do(deeds.digest)
    with pytest.raises(Refused, match="readonly") as caught:
        one.do(deeds.restore)
    assert "ermission denied" in str(caught.value)
    assert one.do(deeds.digest) == before
    one.do(deeds.call, "close")


def test_a_domain_of_a_later_format_is_refused(alone: str) -> None:
    (path,) = Path(alone).glob("domains/*/domain.json")
    outer = json.loads(path.read_text())
    identity = outer["identity"] | {"format": 2}
    raw = json.dumps(identity, separators=(",", ":")).encode()
    check = xxhash.xxh3_128_hexdigest(raw)
    path.write_bytes(b'{"check":"%b","identity":%b}' % (check.encode(), raw))
    error = refused(alone, Training())
    assert "a domain of format 2; this handfast reads format 1" in str(error)
    assert "the release of handfast that wrote it" in str(error)


def test_a_manifest_of_a_later_format_is_refused(alone: str) -> None:
    """By its own words where the step is asked for; the one before is restored otherwise."""
    (path,) = Path(alone).glob("domains/*/*/manifests/1-2.manifest")
    data = bytearray(path.read_bytes())
    data[8:12] = (99).to_bytes(4, "little")
    path.write_bytes(data[:-16] + xxhash.xxh3_128_digest(bytes(data[:-16])))
    (found,) = Path(alone).glob("domains/*")
    entry = Shelf(Posix(), alone, found.name).manifests()
    assert any("99" in each.problem for each in entry.values()), entry
    error = refused(alone, Training(), step=2)
    assert "99" in str(error)
    with Checkpointer(alone, Training().state(), **PATIENT) as ckpt:
        assert ckpt.restore() == 1


# --- states that can't be stored ------------------------------------------------------------------


class Holder:
    """A user's object that gives what it was made with."""

    def __init__(self, value: object) -> None:
        self.value = value

    def state_dict(self) -> dict[str, object]:
        """One value, two levels down."""
        return {"inner": [self.value]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take it."""
        self.value = state["inner"]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """A file that is open."""
    with (tmp_path / "log").open("w") as file:
        yield file


@pytest.mark.parametrize("what", ["lambda", "file", "lock", "generator", "class"])
def test_objects_that_can_t_be_stored_are_named_with_the_ways_out(
    what: str, run: str, opened: Any
) -> None:
    """When the Checkpointer is made, not at the first save an hour later."""
    value = {
        "lambda": lambda x: x,
        "file": opened,
        "lock": threading.Lock(),
        "generator": (i for i in range(3)),
        "class": Holder,
    }[what]
    state = {**Training().state(), "mine": Holder(value)}
    with pytest.raises(Unstorable, match=r"mine/inner\[0\].*Ways out: .*pickle=") as caught:
        Checkpointer(run, state)
    assert caught.value.path == "mine/inner[0]"
    assert not os.path.exists(run)


def test_a_plain_object_without_a_state_is_named(run: str) -> None:
    """A plain DataLoader has no position that could be saved."""
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(TypeError, match=r"loader .*torchdata's StatefulDataLoader has"):
        Checkpointer(run, {**Training().state(), "loader": loader})


def test_a_model_on_meta_is_named(run: str) -> None:
    """It has no values yet."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(Unstorable, match=r"model/weight.*meta"):
        Checkpointer(run, {"model": model})


def test_a_slash_in_a_key_is_no_path(run: str) -> None:
    """Two things whose names look alike are two things."""
    shared = {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}
    with Checkpointer(run, {"box": shared}, **PATIENT) as ckpt:
        assert ckpt.restore() == 0
        ckpt.save(1)


def test_an_extra_that_can_t_be_stored_fails_that_save_only(run: str) -> None:
    training = Training()
    with Checkpointer(run, training.state(), **PATIENT) as ckpt:
        ckpt.restore()
        with pytest.raises(Unstorable, match=r"extra/fn"):
            ckpt.save(1, extra={"fn": len})
        assert ckpt.save(1, extra={"fn": "len"})
