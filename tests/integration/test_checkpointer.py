"""Shows what a training script of one process sees: saves, handles, restores, failures, ends."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import deeds
import pytest
from trainers import Gone, HeldAgent, Job, agents, at_rest, eventually, raised_by

from handfast.errors import Blocked, Refused

Launch = Callable[..., Job]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(launch: Launch, tmp_path: Path) -> None:
    """Model, moments, schedule, streams, loader, scaler and user's object, to the last bit."""
    path = str(tmp_path / "run")
    model = {"full": True, "norm": True}
    (one,) = launch()
    one.do(deeds.build, **model)
    straight = one.do(deeds.train, 8, save=False)
    (two,) = launch()
    assert two.do(deeds.resume, path, model=model) == 0
    assert two.do(deeds.train, 4) == straight[:4]
    two.do(deeds.converged)
    two.kill()
    (three,) = launch()
    assert three.do(deeds.resume, path, model=model) == 4
    assert three.do(deeds.digest) == straight[3]
    assert three.do(deeds.train, 8) == straight[4:]
    three.do(deeds.close)


def test_the_ten_lines_of_the_documentation_run_as_they_stand(
    launch: Launch, tmp_path: Path
) -> None:
    """A first start begins at 0; the second goes on, and ends where an uninterrupted one does."""
    (home, other) = (tmp_path / "interrupted", tmp_path / "straight")
    for each in (home, other):
        each.mkdir()
    first, second, straight = launch() + launch() + launch()
    assert first.do(deeds.ten_lines, str(home), 3)[0] == 0
    assert second.do(deeds.ten_lines, str(home), 6) == (
        3,
        straight.do(deeds.ten_lines, str(other), 6)[1],
    )


def test_what_the_training_does_after_save_returned_is_not_in_the_epoch(
    launch: Launch, tmp_path: Path
) -> None:
    """pytorch#144657, nvidia-resiliency-ext#376: weights of one step, optimizer of the next."""
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path)
    (saved,) = one.do(deeds.train, 1, save=False)
    held.hold("pwrite", "chunks/")
    assert one.do(deeds.save, 1) == (True, "")
    held.reached()
    assert one.do(deeds.phase) == "staged"  # it has returned, and nothing is on the disk
    one.do(deeds.overwrite)
    held.free()
    one.do(deeds.converged)
    one.kill()
    (two,) = launch()
    assert two.do(deeds.resume, path) == 1
    assert two.do(deeds.digest) == saved


def test_a_wait_for_a_slow_disk_names_who_is_awaited(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path)
    held.hold("fsync", "chunks/")
    one.do(deeds.train, 1)
    for wait in (deeds.persisted, deeds.converged):
        with pytest.raises(Blocked, match="rank-00000") as caught:
            one.do(wait, 0.1)
        assert caught.value.by[0].startswith("rank-00000-")
    held.free()
    assert one.do(deeds.persisted) in ("persisted", "converged")
    assert one.do(deeds.converged).step == 1
    assert one.do(deeds.phase) == "converged"


@pytest.mark.parametrize("busy", ["skip", "raise", "wait"])
def test_a_save_that_finds_the_image_busy_does_as_it_was_told(
    busy: str, launch: Launch, tmp_path: Path
) -> None:
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path, busy=busy)
    held.hold("fsync", "chunks/")
    one.do(deeds.train, 1)
    held.reached()
    if busy == "skip":
        taken, why = one.do(deeds.save, 2)
        assert not taken
        assert "still being persisted" in why
        assert one.do(deeds.phase) == "skipped"
    elif busy == "raise":
        with pytest.raises(Blocked, match="still being persisted"):
            one.do(deeds.save, 2)
    else:
        one.tell(deeds.save, 2)
        assert one.busy(0.3)
    held.free()
    if busy == "wait":
        assert one.hear() == (True, "")
    else:
        one.do(deeds.call, "wait_until_finished", 30.0)
        assert one.do(deeds.save, 3) == (True, "")
    one.do(deeds.converged)


def test_a_trainer_killed_while_it_copies_leaves_no_half_epoch(
    launch: Launch, tmp_path: Path
) -> None:
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path)
    saved = one.do(deeds.train, 1)[-1]
    one.do(deeds.converged)
    one.do(deeds.train, 2, save=False)
    with pytest.raises(Gone, match="-9"):
        one.do(deeds.save_half, 2)
    (two,) = launch()
    assert two.do(deeds.resume, path) == 1
    assert two.do(deeds.digest) == saved
    assert two.do(deeds.call, "all_steps") == [1]


def test_a_trainer_killed_the_moment_save_returned_loses_nothing(
    launch: Launch, tmp_path: Path
) -> None:
    """The image is the agent's by then; the next start finds the same agent, and the epoch."""
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path)
    saved = one.do(deeds.train, 1, save=False)[-1]
    held.hold("pwrite", "chunks/")
    with pytest.raises(Gone, match="-9"):
        one.do(deeds.save_and_die, 1)
    held.free()
    eventually(lambda: list(Path(path).glob("certificates/*.json")))
    (two,) = launch()
    assert two.do(deeds.resume, path) == 1
    assert two.do(deeds.digest) == saved
    assert agents() == [held.pid]


@pytest.mark.parametrize("call", ["pwrite chunks/", "fsync chunks/", "rename manifests/"])
def test_an_agent_killed_while_it_saves_costs_nothing(
    call: str, launch: Launch, tmp_path: Path
) -> None:
    """The trainer has the image still: the next agent gets it, and training never stops."""
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path)
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    held.hold(*call.split())
    saved = one.do(deeds.train, 2)[-1]
    held.reached()
    held.kill()
    assert one.do(deeds.converged).step == 2
    one.do(deeds.train, 4)
    assert one.do(deeds.converged).step == 4
    one.kill()
    (two,) = launch()
    two.do(deeds.begin, path)
    assert two.do(deeds.restore, step=2) == 2
    assert two.do(deeds.digest) == saved


def test_an_agent_killed_between_saves_is_replaced_unnoticed(
    launch: Launch, tmp_path: Path
) -> None:
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path)
    for step in (1, 2):
        one.do(deeds.train, step)
        one.do(deeds.converged)
        (pid,) = agents()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda gone=pid: gone not in agents())
    one.do(deeds.train, 3)
    assert one.do(deeds.converged).step == 3
    assert one.do(deeds.call, "all_steps") == [1, 2, 3]
    one.do(deeds.close)


@pytest.mark.parametrize("when", ["between saves", "while it saves"])
def test_a_second_restore_finds_the_agent_dead(when: str, launch: Launch, tmp_path: Path) -> None:
    """An elastic loop restores again in the same process: the next agent knows of no image yet, and
    of none that the dead one had begun with."""
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path)
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    if when == "while it saves":
        held.hold("fsync", "chunks/")
        one.do(deeds.train, 2)
        held.reached()
    held.kill()
    assert one.do(deeds.restore) == 1
    one.do(deeds.train, 4)
    assert one.do(deeds.converged).step == 4
    one.do(deeds.close)


def test_a_stopped_agent_is_named_and_waited_for_no_longer_than_wished(
    launch: Launch, tmp_path: Path
) -> None:
    """By a restore and by a save: neither may hang without a word."""
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path, patience_s=3.0)
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    (pid,) = agents()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(Blocked, match=f"agent process {pid}"):
        one.do(deeds.train, 2)
    with pytest.raises(Blocked, match=f"no reply to 'open' within 3 s from agent process {pid}"):
        one.do(deeds.restore)
    os.kill(pid, signal.SIGCONT)
    assert one.do(deeds.restore) == 2  # it was handed over whole, and so it counts
    one.do(deeds.train, 3)
    assert one.do(deeds.converged).step == 3
    one.do(deeds.close)


def test_an_agent_that_must_not_linger_waits_for_its_first_trainer(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HANDFAST_LINGER_S=0: it had ended before the trainer that started it could find it."""
    monkeypatch.setenv("HANDFAST_LINGER_S", "0")
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path)
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    one.kill()
    eventually(lambda: not agents())
    (one,) = launch()
    assert one.do(deeds.resume, path) == 1


@pytest.mark.parametrize("when", ["between jobs", "while it trains"])
def test_a_directory_that_was_replaced_under_its_agent_is_seen(
    when: str, launch: Launch, tmp_path: Path
) -> None:
    """A copy put in the run's place, from a backup say: what is said to converge afterwards is in
    the new directory, not in the one that nobody can reach any more."""
    run = tmp_path / "run"
    (one,) = launch()
    one.do(deeds.resume, str(run))
    one.do(deeds.train, 3)
    one.do(deeds.converged)
    if when == "between jobs":
        one.kill()
    at_rest(run)
    shutil.copytree(run, tmp_path / "copy")
    run.rename(tmp_path / "old")
    (tmp_path / "copy").rename(run)
    if when == "between jobs":
        (one,) = launch()
        assert one.do(deeds.resume, str(run)) == 3
    saved = one.do(deeds.train, 6)[-1]
    assert one.do(deeds.converged).step == 6
    one.kill()
    for pid in agents():
        os.kill(pid, signal.SIGKILL)
    (two,) = launch()
    assert two.do(deeds.resume, str(run)) == 6
    assert two.do(deeds.digest) == saved


def test_a_directory_that_was_removed_is_missed_aloud(launch: Launch, tmp_path: Path) -> None:
    """`rm -rf` of a run that is being trained: the next save says what is gone."""
    run = tmp_path / "run"
    (one,) = launch()
    one.do(deeds.resume, str(run))
    one.do(deeds.train, 1)
    one.do(deeds.converged)
    at_rest(run)
    shutil.rmtree(run)
    one.tell(deeds.train, 99)
    error = raised_by(one)
    assert isinstance(error, Refused)
    assert "is not the directory that it was: rank-00000-" in str(error)


def test_an_agent_killed_while_it_reads_for_a_restore_is_replaced(
    launch: Launch, tmp_path: Path
) -> None:
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path)
    saved = one.do(deeds.train, 2)[-1]
    one.do(deeds.close)
    eventually(lambda: not agents())
    held = HeldAgent(tmp_path, path)
    held.hold("pread", "chunks/")
    (two,) = launch()
    two.tell(deeds.resume, path)
    held.reached()
    held.kill()
    assert two.hear() == 2
    assert two.do(deeds.digest) == saved


def test_an_agent_ends_by_itself_once_its_trainers_are_done(launch: Launch, tmp_path: Path) -> None:
    """And not before: what was handed over is persisted first."""
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path)
    held.hold("fsync", "chunks/")
    one.do(deeds.train, 1)
    one.tell(deeds.close)
    assert one.busy(0.5)
    assert agents() == [held.pid]
    held.free()
    one.hear()
    eventually(lambda: not agents())


def test_sigterm_lets_an_agent_finish_what_it_has_begun(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    held = HeldAgent(tmp_path, path)
    (one,) = launch()
    one.do(deeds.resume, path)
    held.hold("fsync", "chunks/")
    saved = one.do(deeds.train, 1)[-1]
    held.reached()
    one.kill()
    held.kill(signal.SIGTERM)
    held.free()
    eventually(lambda: not agents())
    (two,) = launch()
    assert two.do(deeds.resume, path) == 1
    assert two.do(deeds.digest) == saved


def test_an_agent_survives_the_process_group_of_its_trainer(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path)
    one.do(deeds.train, 1)
    before = agents()
    os.killpg(one.pid, signal.SIGKILL)
    one.process.join(10)
    (two,) = launch()
    assert two.do(deeds.resume, path) == 1
    assert agents() == before


def test_forked_children_do_not_disturb_the_connection(launch: Launch, tmp_path: Path) -> None:
    """Workers of a loader inherit the socket and the images; a child that saves is refused."""
    path = str(tmp_path / "run")
    (one,) = launch()
    one.do(deeds.resume, path)
    one.do(deeds.train_with_workers, 2)
    first, second = one.do(deeds.misuse_in_a_child)
    assert first == second
    assert f"belongs to process {one.pid}: a forked child makes its own" in first
    saved = one.do(deeds.train, 3)[-1]
    assert one.do(deeds.converged).step == 3
    one.kill()
    (two,) = launch()
    assert two.do(deeds.resume, path) == 3
    assert two.do(deeds.digest) == saved
