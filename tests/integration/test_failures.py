"""Shows who learns of a save that failed, and what becomes of the training: real full disks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import deeds
import pytest
from trainers import Job, Trainer, agents, eventually, raised_by

from handfast import Keep
from handfast.errors import Refused, SaveFailed, Superseded

Launch = Callable[..., Job]
SIZE = 2 << 20
MODEL = {"width": 128}  # some 220 KiB an epoch: a few fit


class Disk:
    """A small file system of its own, that can be filled and emptied."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path = path
        self.filler = path / "filler"
        libc = ctypes.CDLL(None, use_errno=True)
        name = str(path).encode()
        if libc.mount(b"tmpfs", name, b"tmpfs", 0, f"size={SIZE}".encode()):
            pytest.skip("only root may mount a small disk")

    def fill(self) -> None:
        """Leave no byte."""
        with self.filler.open("ab") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))

    def empty(self) -> None:
        """Give the room back."""
        self.filler.unlink()

    def close(self) -> None:
        """Unmount, even while something is open."""
        ctypes.CDLL(None).umount2(str(self.path).encode(), 2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk that is mounted for the test."""
    found = Disk(tmp_path / "disk")
    yield found
    found.close()


def test_a_full_disk_is_raised_at_the_next_call_and_training_goes_on_later(
    disk: Disk, launch: Launch
) -> None:
    """Megatron-LM#6970, OLMo-core PR#831: failures were swallowed. Older epochs are untouched."""
    path = str(disk.path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, model=MODEL)
    saved = one.do(deeds.train, 1)[-1]
    one.do(deeds.converged)
    disk.fill()
    one.do(deeds.train, 2)
    with pytest.raises(SaveFailed, match=r"1/2.*ENOSPC.*What to do: free some space"):
        one.do(deeds.persisted)
    one.do(deeds.train, 3)
    eventually(lambda: one.do(deeds.phase) == "failed")
    with pytest.raises(SaveFailed, match=r"1/3.*ENOSPC"):
        one.do(deeds.train, 4)
    disk.empty()
    one.do(deeds.train, 6)
    one.do(deeds.converged)
    assert one.do(deeds.call, "all_steps") == [1, 5, 6]
    one.kill()
    (two,) = launch()
    two.do(deeds.begin, path, model=MODEL)
    assert two.do(deeds.restore, step=1) == 1
    assert two.do(deeds.digest) == saved


def test_a_disk_that_stays_full_for_long_is_recovered_from(disk: Disk, launch: Launch) -> None:
    """Not even the journal has room then; once there is room, saves go on by themselves."""
    path = str(disk.path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, model=MODEL, on_error="warn")
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    disk.fill()
    one.do(deeds.train, 30)
    assert "ENOSPC" in " ".join(one.do(deeds.warnings))
    disk.empty()
    one.do(deeds.train, 34)
    assert one.do(deeds.converged).step == 34
    one.kill()
    (two,) = launch()
    assert two.do(deeds.resume, path, model=MODEL) == 34


def test_a_start_on_a_full_disk_is_no_word_on_what_is_stored(disk: Disk, launch: Launch) -> None:
    """The round can't be recorded. It was called MISSING, which stands for a run that is lost."""
    path = str(disk.path / "run")
    job = launch(2)
    job.all(deeds.resume, path, model=MODEL)
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.kill()
    disk.fill()
    job = launch(2)
    for error in job.each_raises(deeds.resume, path, model=MODEL):
        assert isinstance(error, Refused)
        assert error.verdict is None
        assert str(error).startswith("a rank can't take part [rank 0: ")
        assert "ENOSPC" in str(error)
    disk.empty()
    assert job.all(deeds.restore) == [1, 1]


def test_a_last_save_that_failed_ends_no_training_that_wants_only_warnings(
    disk: Disk, launch: Launch
) -> None:
    """on_error="warn" holds to the end of the `with`, too."""
    (one,) = launch()
    one.do(deeds.resume, str(disk.path / "run"), model=MODEL, on_error="warn")
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    disk.fill()
    one.do(deeds.train, 2)
    one.do(deeds.call, "close")
    assert "the last save failed: epoch 1/2" in " ".join(one.do(deeds.warnings))


def test_a_failed_save_is_tried_again_at_the_next_step(disk: Disk, launch: Launch) -> None:
    """With on_error="retry", also off the schedule; three times, then it is raised."""
    path = str(disk.path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, model=MODEL, on_error="retry", every=10)
    disk.fill()
    one.do(deeds.train, 10)
    eventually(lambda: one.do(deeds.phase) == "failed")
    disk.empty()
    one.do(deeds.train, 11)  # the failure is learned of, and the next step is saved instead
    assert one.do(deeds.converged).step == 11
    assert "tried again at the next step" in " ".join(one.do(deeds.warnings))
    disk.fill()
    one.do(deeds.train, 20)
    for _ in range(3):
        eventually(lambda: one.do(deeds.phase) == "failed")
        one.do(deeds.train_one)
    eventually(lambda: one.do(deeds.phase) == "failed")
    with pytest.raises(SaveFailed, match="ENOSPC"):
        one.do(deeds.train_one)


def test_a_failure_that_a_handle_has_raised_is_tried_again_like_any_other(
    disk: Disk, launch: Launch, tmp_path: Path
) -> None:
    """The other rank tries again at the next step, and would wait for this one, once too often."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").symlink_to(disk.path)
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "{rank}"), model=MODEL, on_error="retry", every=10)
    disk.fill()
    job.all(deeds.train, 10)
    with pytest.raises(SaveFailed, match="ENOSPC"):
        job[1].do(deeds.persisted)
    disk.empty()
    eventually(lambda: job[0].do(deeds.phase) == "failed")
    job.all(deeds.train, 11)
    assert [epoch.step for epoch in job.all(deeds.converged)] == [11, 11]


def test_the_others_learn_whose_disk_is_full_and_theirs_do_not_fill(
    disk: Disk, launch: Launch, tmp_path: Path
) -> None:
    """An epoch that can never count is worth no space anywhere."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").symlink_to(disk.path)
    path = str(tmp_path / "{rank}")
    job = launch(2, 2)
    job.all(deeds.resume, path, model=MODEL, on_error="warn")
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    disk.fill()
    job.all(deeds.train, 12)
    for trainer in job:
        eventually(lambda trainer=trainer: trainer.do(deeds.phase) == "failed")
    eventually(lambda: len(list((tmp_path / "0").glob("**/*.manifest"))) == 1)
    for trainer in job:
        trainer.do(deeds.call, "check_for_errors")
        said = " ".join(trainer.do(deeds.warnings))
        assert "rank-00001" in said
        assert "ENOSPC" in said
    disk.empty()
    job.all(deeds.train, 14)
    assert [epoch.step for epoch in job.all(deeds.converged)] == [14, 14]
    job.kill()
    job = launch(2, 2)
    assert job.all(deeds.resume, path, model=MODEL) == [14, 14]


def test_every_rank_raises_for_a_failure_of_one(disk: Disk, launch: Launch, tmp_path: Path) -> None:
    """Each at its first call after it has learned of it: no rank trains on alone."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").symlink_to(disk.path)
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "{rank}"), model=MODEL)
    disk.fill()
    job.all(deeds.train, 1)
    for trainer in job:
        eventually(lambda trainer=trainer: trainer.do(deeds.phase) == "failed")
        trainer.tell(deeds.call, "check_for_errors")
        error = raised_by(trainer)
        assert isinstance(error, SaveFailed)
        assert "ENOSPC" in str(error)
        trainer.do(deeds.call, "check_for_errors")  # once is enough


# --- two jobs, stale jobs, branches -------------------------------------------------------------


@pytest.mark.parametrize("patience_s", [None, 3.0])
def test_a_second_job_on_a_run_is_refused_and_the_first_is_not_disturbed(
    patience_s: float | None, launch: Launch, tmp_path: Path
) -> None:
    """Two trainings that write into one run are how its epochs come to be mixed. Who has less
    patience than an agent has with a trainer that ends hears the same."""
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path)
    one.do(deeds.train, 1)
    (two,) = launch()
    two.do(deeds.begin, path, patience_s=patience_s)
    two.tell(deeds.restore)
    error = raised_by(two)
    assert isinstance(error, Refused)
    assert f"process {one.pid} trains this run already, on rank-00000" in str(error)
    assert "stop that job first, or give this one a path of its own" in str(error)
    assert "this very process" not in str(error)
    one.do(deeds.train, 3)
    assert one.do(deeds.converged).step == 3


def test_a_job_that_was_taken_for_dead_stops_when_it_comes_back(
    launch: Launch, tmp_path: Path
) -> None:
    """A node that hung while its job was started elsewhere, on a file system that both see."""
    path = str(tmp_path / "run")
    (stale,) = launch(1, 1)
    stale.do(deeds.resume, path)
    stale.do(deeds.train, 2)
    stale.do(deeds.converged)
    (pid,) = agents("node0")
    os.kill(pid, 19)
    (live,) = launch(1, 1, HANDFAST_NODE="elsewhere")
    assert live.do(deeds.resume, path) == 2
    live.do(deeds.train, 3)
    live.do(deeds.converged)
    os.kill(pid, 18)
    with contextlib.suppress(Superseded):  # its first save may be under way when it learns of it
        stale.do(deeds.train_one)
    for _ in range(2):
        stale.tell(deeds.train_one)
        assert isinstance(error := raised_by(stale), Superseded), error
    live.do(deeds.train, 5)
    assert live.do(deeds.converged).step == 5
    assert not live.do(deeds.warnings)  # it was not even disturbed
    live.kill()
    (after,) = launch(1, 1, HANDFAST_NODE="elsewhere")
    assert after.do(deeds.resume, path) == 5


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_an_abandoned_timeline_never_comes_back(seed: int, launch: Launch, tmp_path: Path) -> None:
    """After a rollback, "the newest directory" was of the abandoned branch (7 and 34 of 50).

    Eight times: roll back, train on differently, be killed at some moment, start again. Each step
    of each branch has a state of its own, so what is resumed says which branch it is of.
    """
    path, log = str(tmp_path / "run"), tmp_path / "log"
    moment = random.Random(seed)

    def start() -> Trainer:
        (one,) = launch()
        one.do(deeds.begin, path, keep=Keep(newest=99))
        return one

    def written() -> dict[int, str]:
        lines = (line.split() for line in log.read_text().splitlines())
        return {int(step): said for step, said in lines}

    one = start()
    one.do(deeds.restore)
    one.do(deeds.witness, 9, str(log))
    one.do(deeds.converged)
    for number in range(8):
        one.kill()
        truth = written()
        one = start()
        back = moment.choice([step for step in one.do(deeds.steps_of, path) if step < max(truth)])
        assert one.do(deeds.restore, step=back) == back
        assert one.do(deeds.digest) == truth[back]
        log.write_text("".join(f"{s} {d}\n" for s, d in truth.items() if s <= back))
        one.do(deeds.branch, number)
        one.tell(deeds.witness, back + 6, str(log))
        one.busy(moment.uniform(0.0, 0.15))
        one.kill()
        one = start()
        step = one.do(deeds.restore)
        assert step >= back
        assert one.do(deeds.digest) == (truth[back] if step == back else written()[step])
        one.do(deeds.witness, step + 2, str(log))
        one.do(deeds.converged)


def test_a_disk_without_room_for_what_may_lie_on_it_is_warned_of(
    disk: Disk, launch: Launch
) -> None:
    """Before the first save, not at the first that fails: W + 3 epochs may be there at once."""
    (one,) = launch()
    one.do(deeds.resume, str(disk.path / "run"), model={"width": 300})
    one.do(deeds.train, 1)
    (said,) = [line for line in one.do(deeds.warnings) if " free, and up to" in line]
    assert re.search(r"has [1-9][\d.]* [KM]iB free, and up to 5 epochs of [1-9][\d.]* [KM]iB", said)
    assert "a full disk makes saves fail" in said
    (two,) = launch()
    two.do(deeds.resume, str(disk.path / "other"), model={"width": 16})
    two.do(deeds.train, 1)
    assert not [line for line in two.do(deeds.warnings) if " free, and up to" in line]
