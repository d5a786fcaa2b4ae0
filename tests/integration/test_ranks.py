"""Shows what a job of several ranks sees: who is missing, what is stored, who learns of what."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import deeds
import pytest
from trainers import Gone, Job, agents, eventually, raised_by
from training import digest

from handfast.core.lattice import Epoch
from handfast.errors import Blocked, Poisoned, Refused, SaveFailed
from handfast.torch import load

Launch = Callable[..., Job]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "plain"])
def test_a_killed_job_goes_on_as_if_nothing_had_happened(
    kind: str, launch: Launch, tmp_path: Path
) -> None:
    """Two ranks, each on a node of its own with a disk of its own."""
    path = str(tmp_path / "{rank}")
    model = {"norm": kind == "ddp"}
    straight = launch(2, 2)
    straight.all(deeds.build, kind, **model)
    expected = straight.all(deeds.train, 6, save=False)
    straight.kill()
    job = launch(2, 2)
    assert job.all(deeds.resume, path, kind, model=model) == [0, 0]
    assert job.all(deeds.train, 3) == [digests[:3] for digests in expected]
    job.all(deeds.converged)
    job.kill()
    job = launch(2, 2)
    assert job.all(deeds.resume, path, kind, model=model) == [3, 3]
    assert job.all(deeds.digest) == [digests[2] for digests in expected]
    assert job.all(deeds.train, 6) == [digests[3:] for digests in expected]
    job.all(deeds.close)


def test_a_wait_for_convergence_names_the_rank_that_never_saved(
    launch: Launch, tmp_path: Path
) -> None:
    """verl#4638, KempnerForge#102: an epoch counts once every rank has it, and not before."""
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "run"))
    one, other = job
    one.do(deeds.train, 1)
    assert one.do(deeds.persisted) == "persisted"
    with pytest.raises(Blocked, match=r"rank-00001-\w+ \(on node1\)") as caught:
        one.do(deeds.converged, 0.2)
    assert len(caught.value.by) == 1
    assert one.do(deeds.phase) == "persisted"
    assert one.do(deeds.call, "latest_step") is None
    lattice = one.do(deeds.call, "lattice")
    assert [name[:10] for name in lattice.blocked_by] == ["rank-00001"]
    assert (lattice.phase, lattice.skew) == ("converging", 1)
    other.do(deeds.train, 1)
    assert [str(epoch) for epoch in job.all(deeds.converged)] == ["1/1", "1/1"]


def test_a_node_that_hangs_is_named_and_nothing_is_lost(launch: Launch, tmp_path: Path) -> None:
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "run"))
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    (pid,) = agents("node1")
    os.kill(pid, signal.SIGSTOP)
    one, other = job
    one.do(deeds.train, 2)
    other.tell(deeds.train, 2)
    assert one.do(deeds.persisted) == "persisted"
    with pytest.raises(Blocked, match=r"rank-00001-\w+ \(on node1\)"):
        one.do(deeds.converged, 0.2)
    assert other.busy(0.1)  # its agent takes no image: a save needs an agent that runs
    os.kill(pid, signal.SIGCONT)
    other.hear()
    assert [epoch.step for epoch in job.all(deeds.converged)] == [2, 2]


@pytest.mark.parametrize("busy", ["skip", "raise", "wait"])
def test_a_full_window_names_who_is_in_the_way(busy: str, launch: Launch, tmp_path: Path) -> None:
    """A rank that is behind must not let the others' unconverged epochs pile up without end."""
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "run"), busy=busy, images=2)
    one, other = job
    one.do(deeds.train, 2)
    one.do(deeds.persisted)
    if busy == "skip":
        taken, why = one.do(deeds.save, 3)
        assert not taken
        assert "2 epochs are saved and have not converged" in why
    elif busy == "raise":
        with pytest.raises(Blocked, match="rank-00001") as caught:
            one.do(deeds.save, 3)
        assert [name[:10] for name in caught.value.by] == ["rank-00001"]
    else:
        one.tell(deeds.save, 3)
        assert one.busy(0.3)
    other.do(deeds.train, 1)
    if busy == "wait":
        assert one.hear() == (True, "")
    one.do(deeds.call, "check_for_errors")  # to leave an epoch out is no failure
    other.do(deeds.train, 2)
    eventually(lambda: job.all(deeds.call, "latest_step") == [2, 2])
    job.all(deeds.save, 4)
    assert [epoch.step for epoch in job.all(deeds.converged)] == [4, 4]


def test_skips_that_keep_everything_from_converging_are_warned_of(
    launch: Launch, tmp_path: Path
) -> None:
    """Two ranks that skip in turns train on for days, and nothing is ever saved."""
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "run"), busy="skip", images=2)
    one, other = job
    one.do(deeds.train, 2)
    one.do(deeds.persisted)
    assert [one.do(deeds.save, step)[0] for step in range(3, 11)] == [False] * 8
    (said,) = [line for line in one.do(deeds.warnings) if "saves were skipped" in line]
    assert "8 saves were skipped and nothing has converged since step None" in said
    other.do(deeds.train, 2)
    eventually(lambda: job.all(deeds.call, "latest_step") == [2, 2])


def test_a_save_that_waits_for_others_waits_no_longer_than_wished(
    launch: Launch, tmp_path: Path
) -> None:
    """An `if rank == 0:` around the save: the window fills, and who is missing is said."""
    job = launch(2, 2)
    job.all(deeds.resume, str(tmp_path / "run"), patience_s=1.5, images=2)
    one, other = job
    one.do(deeds.train, 2)
    with pytest.raises(Blocked, match="2 epochs are saved and have not converged") as caught:
        one.do(deeds.save, 3)
    assert [name[:10] for name in caught.value.by] == ["rank-00001"]
    other.do(deeds.train, 2)
    assert [epoch.step for epoch in job.all(deeds.converged)] == [2, 2]
    job.all(deeds.save, 4)
    assert [epoch.step for epoch in job.all(deeds.converged)] == [4, 4]


def test_both_trainers_killed_after_save_returned_and_the_epoch_converges(
    launch: Launch, tmp_path: Path
) -> None:
    """Agents finish between themselves what their trainers began."""
    path = str(tmp_path / "{rank}")
    job = launch(2, 2)
    job.all(deeds.resume, path)
    saved = [digests[-1] for digests in job.all(deeds.train, 1, save=False)]
    for trainer in job:
        trainer.tell(deeds.save_and_die, 1)
    for trainer in job:
        with pytest.raises(Gone):
            trainer.hear()
    eventually(lambda: len(list(tmp_path.glob("?/certificates/*.json"))) == 2)
    job = launch(2, 2)
    assert job.all(deeds.resume, path) == [1, 1]
    assert job.all(deeds.digest) == saved


def test_one_rank_killed_before_it_saved_and_all_resume_from_the_epoch_before(
    launch: Launch, tmp_path: Path
) -> None:
    """composer#2146, LlamaFactory#655: one rank came back with another step than the rest."""
    path = str(tmp_path / "{rank}")
    job = launch(2, 2)
    job.all(deeds.resume, path)
    saved = [digests[-1] for digests in job.all(deeds.train, 2)]
    job.all(deeds.converged)
    job[0].do(deeds.train, 3)
    job[0].do(deeds.persisted)
    job.kill()
    job = launch(2, 2)
    assert job.all(deeds.resume, path) == [2, 2]
    assert job.all(deeds.digest) == saved


# --- one rank's failure is all ranks' -----------------------------------------------------------


def test_a_rank_with_another_model_makes_all_ranks_refuse(launch: Launch, tmp_path: Path) -> None:
    """miles PR#2516: state was mutated before all ranks had agreed."""
    path = str(tmp_path / "{rank}")
    job = launch(2, 2)
    job.all(deeds.resume, path)
    job.all(deeds.train, 1)
    job.all(deeds.close)
    job = launch(2, 2)
    one, other = job
    one.tell(deeds.begin, path)
    other.tell(deeds.begin, path, model={"depth": 2})
    before = [trainer.hear() for trainer in job]
    errors = job.each_raises(deeds.restore)
    assert [type(error) for error in errors] == [Refused, Refused]
    assert "rank 1: foreign: the live state has another structure" in str(errors[0])
    assert "model/7.weight" in str(errors[0])
    assert job.all(deeds.digest) == before


def test_any_error_of_one_rank_before_the_load_is_heard_of_by_all(
    launch: Launch, tmp_path: Path
) -> None:
    """DeepSpeed#7741: the other ranks hung. An error in a user's object is no Refused of ours."""
    path = str(tmp_path / "{rank}")
    job = launch(2, 2)
    job.all(deeds.resume, path)
    job.all(deeds.train, 1)
    job.all(deeds.close)
    job = launch(2, 2)
    job.all(deeds.begin, path)
    before = job.all(deeds.digest)
    job[1].do(deeds.break_reading)
    first, second = job.each_raises(deeds.restore)
    assert isinstance(first, Refused)
    assert "rank 1: OSError: the disk of the user's object is gone" in str(first)
    assert isinstance(second, OSError)
    job[1].do(deeds.break_reading, broken=False)
    assert job.all(deeds.digest) == before
    assert job.all(deeds.restore) == [1, 1]


def test_a_load_that_fails_on_one_rank_poisons_all(launch: Launch, tmp_path: Path) -> None:
    """No rank trains on with a state that another rank has not."""
    path = str(tmp_path / "{rank}")
    job = launch(2, 2)
    job.all(deeds.resume, path, model={"full": True})
    job.all(deeds.train, 1)
    job.all(deeds.close)
    job = launch(2, 2)
    job.all(deeds.begin, path, model={"full": True})
    job[1].do(deeds.break_loading)
    errors = job.each_raises(deeds.restore)
    assert [type(error) for error in errors] == [Poisoned, Poisoned]
    assert "another rank could not load: rank 1: the restore stopped at loader" in str(errors[0])
    errors = job.each_raises(deeds.save, 2)
    assert [type(error) for error in errors] == [Poisoned, Poisoned]
    job[1].do(deeds.break_loading, broken=False)
    assert job.all(deeds.restore) == [1, 1]


def test_a_rank_that_does_not_come_to_restore_is_named(launch: Launch, tmp_path: Path) -> None:
    """It lives, and is busy elsewhere: an `if rank == 0:` around the restore, say."""
    job = launch(2, 1)
    job.all(deeds.begin, str(tmp_path / "run"), patience_s=1.5)
    one, _ = job
    with pytest.raises(Blocked, match=r"not all ranks have come to restore\(\)") as caught:
        one.do(deeds.restore)
    assert caught.value.by == ("rank 1",)
    assert job.all(deeds.restore) == [0, 0]  # once it has come, they go on


def test_whoever_waits_for_rank_0_names_it_and_may_try_again(
    launch: Launch, tmp_path: Path
) -> None:
    """No collective was begun, so none is broken."""
    job = launch(2, 1)
    job.all(deeds.begin, str(tmp_path / "run"), patience_s=1.5)
    with pytest.raises(Blocked) as caught:
        job[1].do(deeds.restore)
    assert caught.value.by == ("rank 0",)
    assert job.all(deeds.restore) == [0, 0]
    job.all(deeds.save, 1)
    job.all(deeds.converged)


def test_a_rank_whose_waiting_was_interrupted_counts_as_absent(
    launch: Launch, tmp_path: Path
) -> None:
    """Ctrl-C in a notebook: the other rank does not go on alone, and both may try again."""
    job = launch(2, 1)
    job.all(deeds.begin, str(tmp_path / "run"), patience_s=1.5)
    assert job[1].do(deeds.interrupted_restore, 0.5) == "interrupted"
    with pytest.raises(Blocked) as caught:
        job[0].do(deeds.restore)
    assert caught.value.by == ("rank 1",)
    assert job.all(deeds.restore) == [0, 0]


def test_ranks_at_different_gatherings_never_meet(launch: Launch, tmp_path: Path) -> None:
    """One still loads when the other has given up and begins anew: neither takes the other's word
    for something else, both hear who is missing, and the next attempt of both succeeds."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.resume, path, model={"full": True})
    job.all(deeds.train, 1)
    job.all(deeds.close)
    job = launch(2, 1)
    job.all(deeds.begin, path, model={"full": True}, patience_s=2.0)
    job[0].do(deeds.slow_loading, 4.0)
    for trainer in job:
        trainer.tell(deeds.restore)
    assert isinstance(raised_by(job[1]), Blocked)
    job[1].tell(deeds.restore)
    for trainer in job:
        assert isinstance(raised_by(trainer), Blocked)
    job[0].do(deeds.slow_loading, 0.0)
    assert job.all(deeds.restore) == [1, 1]


def test_a_rank_that_freezes_between_two_meetings_is_named(launch: Launch, tmp_path: Path) -> None:
    """All had met when it froze: it is waited for at the next meeting, no longer than wished."""
    job = launch(2, 1)
    job.all(deeds.begin, str(tmp_path / "run"), patience_s=2.0)
    one, other = job
    other.do(deeds.freeze_once_all_go_on)
    for trainer in job:
        trainer.tell(deeds.restore)
    error = raised_by(one)
    assert isinstance(error, Blocked)
    assert error.by == ("rank 1",)
    other.kill(signal.SIGCONT)
    assert isinstance(raised_by(other), Blocked)
    assert job.all(deeds.restore) == [0, 0]


def test_ranks_that_restore_different_runs_never_meet(launch: Launch, tmp_path: Path) -> None:
    """Two Checkpointers in one process group, restored in another order on one rank: a run was
    founded of one's rank 0 and the other's rank 1."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    job = launch(2, 2)
    job.all(deeds.two, one, other, patience_s=2.0)
    job[0].tell(deeds.restore_one_of_two, one)
    job[1].tell(deeds.restore_one_of_two, other)
    for trainer, missing in zip(job, ("rank 1", "rank 0"), strict=True):
        error = raised_by(trainer)
        assert isinstance(error, Blocked)
        assert error.by == (missing,)
    assert not list(tmp_path.glob("*/domains"))
    assert job.all(deeds.restore_one_of_two, one) == [0, 0]
    assert job.all(deeds.restore_one_of_two, other) == [0, 0]


def test_ranks_may_name_directories_of_their_own(launch: Launch, tmp_path: Path) -> None:
    """Filled in by the user, without a ``{rank}`` in the path."""
    job = launch(2, 2)
    for trainer in job:
        trainer.tell(deeds.resume, str(tmp_path / f"disk-{trainer.rank}"))
    assert [trainer.hear() for trainer in job] == [0, 0]
    job.all(deeds.train, 1)
    job.all(deeds.converged)


def test_a_rank_that_died_before_the_meeting_is_named(launch: Launch, tmp_path: Path) -> None:
    """Its launcher may take the job down before; one that does not must not hang for ever."""
    job = launch(2, 2)
    job.all(deeds.begin, str(tmp_path / "run"), patience_s=1.5)
    one, other = job
    other.kill()
    one.tell(deeds.restore)
    error = raised_by(one)
    assert isinstance(error, Blocked)
    assert error.by == ("rank 1",)


def test_a_stopped_agent_of_an_earlier_start_is_named_to_all_ranks(
    launch: Launch, tmp_path: Path
) -> None:
    """It lingers from a killed job, frozen: no rank waits longer than wished, and all may go on."""
    path = str(tmp_path / "run")
    job = launch(2, 2)
    job.all(deeds.resume, path)
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.kill()
    (pid,) = agents("node1")
    os.kill(pid, signal.SIGSTOP)
    job = launch(2, 2)
    job.all(deeds.begin, path, patience_s=4.0)
    for error in job.each_raises(deeds.restore):
        assert isinstance(error, Blocked)
        assert error.by == ("rank 1: the agent of this node",)
        assert f"agent process {pid} listens but does not answer" in str(error)
    os.kill(pid, signal.SIGCONT)
    assert job.all(deeds.restore) == [1, 1]


def test_ranks_that_ask_for_different_steps_are_refused(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.resume, path)
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    one, other = job
    one.tell(deeds.restore, step=1)
    other.tell(deeds.restore, step=2)
    for trainer in job:
        error = raised_by(trainer)
        assert isinstance(error, Refused)
        assert "rank 0: step 1" in str(error)
        assert "rank 1: step 2" in str(error)
        assert error.verdict == "mixed"


# --- what is stored -----------------------------------------------------------------------------


def stored(home: Path) -> dict[int, int]:
    """Bytes of the images on the disk, by rank."""
    return {
        int(image.parts[-4].removeprefix("rank-")): image.stat().st_size
        for image in home.glob("**/chunks/*.safetensors")
    }


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_all_ranks_hold_alike_is_stored_once_a_node(
    nodes: int, launch: Launch, tmp_path: Path
) -> None:
    """DDP's model and moments: four ranks of one node write them once, those of two nodes twice."""
    path = str(tmp_path / "run")
    model = {"width": 64}
    job = launch(4, nodes)
    job.all(deeds.resume, path, "ddp", model=model)
    saved = job.all(deeds.train, 1)
    job.all(deeds.converged)
    bytes_of = stored(tmp_path)
    parameters = 4 * (8 * 64 + 64 + 64 * 64 + 64 + 64 * 8 + 8)
    large = [rank for rank, size in bytes_of.items() if size > 3 * parameters]
    small = [rank for rank, size in bytes_of.items() if size < parameters]
    assert sorted(large) == list(range(0, 4, 4 // nodes))
    assert len(large) + len(small) == 4
    job.kill()
    job = launch(4, nodes)
    assert job.all(deeds.resume, path, "ddp", model=model) == [1] * 4
    assert job.all(deeds.digest) == [digests[-1] for digests in saved]


def test_a_first_rank_that_is_late_is_heard_with_the_next_save(
    launch: Launch, tmp_path: Path
) -> None:
    """Whoever did not hear it stores all of its own, says so, and no less comes back; it was taken
    for one that holds nothing alike, for good, when it was late once."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.resume, path, "ddp", model={"width": 64}, patience_s=1.0)
    sizes = []
    for step in (1, 2, 3):
        saved = job.all(deeds.train, step, save=False)
        job[1].do(deeds.save, step) if step == 1 else job[1].tell(deeds.save, step)
        job[0].do(deeds.save, step)
        _ = job[1].hear() if step > 1 else None
        job.all(deeds.converged)
        sizes.append(stored(tmp_path)[1])
    assert sizes[0] > 10 * sizes[1] == 10 * sizes[2]
    said = [text for text in job[1].do(deeds.warnings) if "was not heard in time" in text]
    assert len(said) == 1
    assert "rank 0, the first of this node" in said[0]
    job.kill()
    job = launch(2, 1)
    assert job.all(deeds.resume, path, "ddp", model={"width": 64, "seed": 9}) == [3, 3]
    assert job.all(deeds.digest) == [digests[-1] for digests in saved]


@pytest.mark.parametrize(("was", "now"), [(1, 2), (2, 1)])
def test_ranks_that_change_nodes_share_with_those_beside_them(
    was: int, now: int, launch: Launch, tmp_path: Path
) -> None:
    """Who was together when the run was founded and is so now; they need not be so for good."""
    path, model = str(tmp_path / "run"), {"width": 64}
    job = launch(4, was)
    job.all(deeds.resume, path, "ddp", model=model)
    job.kill()
    job = launch(4, now)
    job.all(deeds.resume, path, "ddp", model=model)
    saved = job.all(deeds.train, 1)
    job.all(deeds.converged)
    small, *_, large = sorted(stored(tmp_path).values())
    assert stored(tmp_path) == dict(zip(range(4), [large, small] * 2, strict=True))
    job.kill()
    for nodes in (was, now):
        job = launch(4, nodes)
        assert job.all(deeds.resume, path, "ddp", model={**model, "seed": 9}) == [1] * 4
        assert job.all(deeds.digest) == [digests[-1] for digests in saved]
        job.kill()


def test_ranks_that_shared_and_are_apart_are_refused_by_name(
    launch: Launch, tmp_path: Path
) -> None:
    """What a rank left to the first of its node is with that one's agent."""
    path = str(tmp_path / "run")
    job = launch(4, 1)
    job.all(deeds.resume, path, "ddp")
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.kill()
    job = launch(4, 2)
    for error in job.each_raises(deeds.resume, path, "ddp"):
        assert isinstance(error, Refused)
        assert re.search("rank [23] shared a node with rank 0, which holds what", str(error))
        assert "start the ranks that shared a node on one node again" in str(error)


def test_shards_are_stored_by_their_owners(launch: Launch, tmp_path: Path) -> None:
    """gpt-neox#750: the other node's shards were absent, and that was a warning only."""
    job = launch(2, 1)
    job.all(deeds.resume, str(tmp_path / "run"), "fsdp", model={"width": 64})
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    one, other = stored(tmp_path).values()
    whole = 3 * 4 * (8 * 64 + 64 + 64 * 64 + 64 + 64 * 8 + 8)
    assert whole / 2 < one < 0.75 * whole
    assert whole / 2 < other < 0.75 * whole


def test_models_that_nobody_synchronises_are_stored_by_each_rank_and_equal_ones_are_shown(
    launch: Launch, tmp_path: Path
) -> None:
    """Nothing is taken for replicated because it looks alike; one warning proposes to say so."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.begin, path, model={"width": 64})
    job.all(deeds.restore)
    job.all(deeds.save, 1)
    job.all(deeds.converged)
    sizes = list(stored(tmp_path).values())
    assert min(sizes) > 4 * 64 * 64
    job.kill()
    job = launch(2, 1)
    job.all(deeds.resume, path, model={"width": 64})
    first, second = job.all(deeds.warnings)
    assert [said for said in first if "all ranks stored the same values of model/3.weight" in said]
    assert "replicated=('model/3.weight',)" in " ".join(first)
    assert not second
    job.all(deeds.train, 2)
    job.all(deeds.close)


def test_ranks_that_were_refused_in_turns_come_into_step_again(
    launch: Launch, tmp_path: Path
) -> None:
    """A save that is refused leaves a vote SKIP, so that the other rank does not wait for it in its
    turn, and so on for ever."""
    path = str(tmp_path / "{rank}" / "run")
    job = launch(2, 2)
    job.all(deeds.begin, path, busy="raise", window=1)
    job.all(deeds.restore)
    job.all(deeds.save, 1)
    job.all(deeds.converged)
    job[0].do(deeds.save, 2)
    job[0].do(deeds.persisted)
    with pytest.raises(Blocked) as caught:
        job[0].do(deeds.save, 3)
    assert "rank-00001" in str(caught.value.by)
    job[1].do(deeds.save, 3)
    job[1].do(deeds.persisted)
    eventually(lambda: job[0].do(deeds.blocked_by) == ())
    for step in (4, 5):
        job.all(deeds.save, step)
        assert job.all(deeds.converged) == [Epoch(1, step)] * 2


def test_a_handle_of_an_epoch_that_a_restore_left_behind_says_so(
    launch: Launch, tmp_path: Path
) -> None:
    """Rank 1 never saved it, generation 2 goes back below it and converges on a lower step."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.resume, path)
    job.all(deeds.save, 1)
    job.all(deeds.converged)
    job[0].do(deeds.save, 5)
    job[0].do(deeds.persisted)
    job[0].do(deeds.keep)
    assert job.all(deeds.restore) == [1, 1]
    job.all(deeds.save, 2)
    job.all(deeds.converged)
    assert job[0].do(deeds.kept) == (
        "failed",
        "epoch 1/5 will not converge: abandoned: generation 2 resumed from 1/1",
    )


def test_declared_replicas_are_stored_once(launch: Launch, tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    model = {"width": 64}
    job = launch(2, 1)
    job.all(deeds.begin, path, model=model, replicated=("model/**",))
    job.all(deeds.restore)
    job.all(deeds.save, 1)
    job.all(deeds.converged)
    sizes = stored(tmp_path)
    assert sizes[0] > 4 * 64 * 64 > sizes[1]
    job.kill()
    job = launch(2, 1)
    job.all(deeds.begin, path, model={**model, "seed": 9}, replicated=("model/**",))
    assert job.all(deeds.restore) == [1, 1]
    assert len(set(job.all(deeds.model_digest))) == 1
    assert not any(job.all(deeds.warnings))


def test_moments_that_ranks_share_out_come_back_on_each(launch: Launch, tmp_path: Path) -> None:
    """ZeRO by hand, with torch's own AdamW under DDP: nobody stored those of rank 1."""
    path = str(tmp_path / "run")
    model = {"optimizer": "shared"}
    job = launch(2, 1)
    job.all(deeds.begin, path, "ddp", model=model)
    job.all(deeds.prime)
    job.all(deeds.restore)
    job.all(deeds.train, 2)
    job.all(deeds.converged)
    expected = job.all(deeds.train, 4, save=False)
    job.kill()
    job = launch(2, 1)
    job.all(deeds.begin, path, "ddp", model=model)
    job.all(deeds.prime)
    assert job.all(deeds.restore) == [2, 2]
    assert job.all(deeds.train, 4, save=False) == expected


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["pre", "post", "wrapped"])
def test_what_one_rank_hangs_on_its_step_loses_no_moments(
    how: str, rank: int, early: bool, launch: Launch, tmp_path: Path
) -> None:
    """A progress bar on rank 0: it took nothing for alike any more, and rank 1 left it its state.

    Every epoch converged, and none could be restored. Now each stores its own, whoever sees it, and
    whether it was there at restore() or came ``early``.
    """
    path, model = str(tmp_path / "run"), {"width": 64}
    job = launch(2, 1)
    job.all(deeds.begin, path, "ddp", model=model)
    if early:
        job[rank].do(deeds.meddle, how)
    assert job.all(deeds.restore) == [0, 0]
    if not early:
        job[rank].do(deeds.meddle, how)
    saved = job.all(deeds.train, 2)
    job.all(deeds.converged)
    moments = 2 * 4 * (8 * 64 + 64 + 64 * 64 + 64 + 64 * 8 + 8)
    assert stored(tmp_path)[1] > moments
    job.kill()
    job = launch(2, 1)
    assert job.all(deeds.resume, path, "ddp", model={**model, "seed": 9}) == [2, 2]
    assert job.all(deeds.digest) == [digests[-1] for digests in saved]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_tie_of_one_rank_is_none_of_another(rank: int, launch: Launch, tmp_path: Path) -> None:
    """Each rank's own best weights; on one of them they are the model's, for it was best now."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.resume, path, "ddp")
    for trainer in job:
        trainer.tell(deeds.save_best, 1, trainer.rank == rank)
    saved = [trainer.hear() for trainer in job]
    job.all(deeds.converged)
    job.kill()
    job = launch(2, 1)
    assert job.all(deeds.resume, path, "ddp", model={"seed": 9}) == [1, 1]
    assert job.all(deeds.best) == saved


def test_what_is_declared_alike_and_is_not_is_each_ranks_own(
    launch: Launch, tmp_path: Path
) -> None:
    """By one rank alone, or by all: what they hold is compared before any of them leaves it out."""
    path = str(tmp_path / "run")
    for declared in ((), ("**",)):
        job = launch(2, 1)
        for trainer, patterns in zip(job, (declared, ("**",)), strict=True):
            trainer.tell(deeds.begin, f"{path}{len(declared)}", replicated=patterns)
        _ = [trainer.hear() for trainer in job]
        job.all(deeds.restore)
        saved = job.all(deeds.train, 2)
        assert saved[0] != saved[1]
        job.all(deeds.close)
        job = launch(2, 1)
        assert job.all(deeds.resume, f"{path}{len(declared)}") == [2, 2]
        assert job.all(deeds.digest) == [digests[-1] for digests in saved]


def test_buffers_under_ddp_are_each_ranks_own(launch: Launch, tmp_path: Path) -> None:
    """They drift apart between two forward passes, in which rank 0's win: whoever evaluates the
    model before the next one must find what was there."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.resume, path, "ddp", model={"norm": True})
    job.all(deeds.train, 3)
    job.all(deeds.converged)
    norms = job.all(deeds.running_means)
    assert norms[0] != norms[1]
    job.kill()
    job = launch(2, 1)
    job.all(deeds.resume, path, "ddp", model={"norm": True})
    assert job.all(deeds.running_means) == norms
    job.all(deeds.close)
    found = load(path)
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert digest({f"module.1.{name}": found[f"1.{name}"] for name in names}) == norms[0]
    own = load(path, only=("rank-*",))
    assert sorted(own) == ["rank-00001/1.running_mean", "rank-00001/1.running_var"]


def test_buffers_on_two_nodes_are_each_ranks_until_rank_0_wins(
    launch: Launch, tmp_path: Path
) -> None:
    """Each node restores from its own disk; the next forward gives all those of rank 0, as it would
    have without an interruption."""
    path = str(tmp_path / "run")
    job = launch(4, 2)
    job.all(deeds.resume, path, "ddp", model={"norm": True})
    job.all(deeds.train, 3)
    job.all(deeds.converged)
    before = job.all(deeds.running_means)
    job.all(deeds.train, 4, save=False)
    after = job.all(deeds.running_means)
    job.kill()
    job = launch(4, 2)
    job.all(deeds.begin, path, "ddp", model={"norm": True})
    job.all(deeds.restore)
    assert job.all(deeds.running_means) == before
    job.all(deeds.train, 4, save=False)
    assert job.all(deeds.running_means) == after
    own = sorted(load(path, only=("rank-*",)))
    names = ("running_mean", "running_var")
    assert own == [f"rank-0000{rank}/1.{name}" for rank in (1, 2, 3) for name in names]


LATE = ["parameter", "buffer", "average", "hook"]


@pytest.mark.parametrize("kind", LATE)
def test_what_ddp_does_not_keep_alike_comes_back_on_each_rank(
    kind: str, launch: Launch, tmp_path: Path
) -> None:
    """DDP reduces and broadcasts what it found when it was wrapped around the model; an average of
    it is never run forward; a hook on every optimizer's step is on none of them."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.build, "ddp", norm=True)
    job.all(deeds.go_apart, kind)
    job.all(deeds.attach, path)
    job.all(deeds.restore)
    saved = job.all(deeds.train, 3)
    job.all(deeds.converged)
    apart = job.all(deeds.apart, kind)
    assert apart[0] != apart[1]
    job.kill()
    job = launch(2, 1)
    job.all(deeds.build, "ddp", norm=True, seed=9)
    job.all(deeds.go_apart, kind)
    job.all(deeds.attach, path)
    assert job.all(deeds.restore) == [3, 3]
    assert job.all(deeds.apart, kind) == apart
    assert job.all(deeds.digest) == [digests[-1] for digests in saved]


def test_what_goes_apart_later_is_found_before_it_counts(launch: Launch, tmp_path: Path) -> None:
    """It was alike at the first save and is not at the second: that one is given up by name, and
    from the third on each rank stores its own."""
    path = str(tmp_path / "run")
    job = launch(2, 1)
    job.all(deeds.begin, path, "ddp")
    job.all(deeds.restore)
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.all(deeds.wander)
    job.all(deeds.train, 2)
    for error in job.each_raises(deeds.converged):
        assert isinstance(error, SaveFailed)
        assert "taken to be alike on all ranks, and not: model/" in str(error)
    saved = job.all(deeds.train, 3)
    assert [str(epoch) for epoch in job.all(deeds.converged)] == ["1/3", "1/3"]
    job.kill()
    job = launch(2, 1)
    assert job.all(deeds.resume, path, "ddp", model={"seed": 9}) == [3, 3]
    assert job.all(deeds.digest) == [digests[-1] for digests in saved]


@pytest.mark.parametrize("primed", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_ddp_resumes_bit_for_bit_once_its_buckets_are_primed(
    static: bool, primed: bool, launch: Launch, tmp_path: Path
) -> None:
    """It reduces in another order in its first iteration; a resume runs that iteration again.

    With a static graph these are the first two. Without priming all is restored to the last bit
    too; what comes after differs.
    """
    path = str(tmp_path / "run")

    def begin(job: Job) -> Job:
        job.all(deeds.begin, path, "ddp", model={"width": 48, "depth": 3, "static": static})
        if primed:
            job.all(deeds.prime)
        return job

    job = begin(launch(4))
    expected = job.all(deeds.train, 4, save=False)
    job.kill()
    job = begin(launch(4))
    job.all(deeds.restore)
    assert job.all(deeds.train, 2) == [digests[:2] for digests in expected]
    job.all(deeds.converged)
    job.kill()
    job = begin(launch(4))
    assert job.all(deeds.restore) == [2] * 4
    assert job.all(deeds.digest) == [digests[1] for digests in expected]
    after = job.all(deeds.train, 4, save=False)
    assert (after == [digests[2:] for digests in expected]) == primed
