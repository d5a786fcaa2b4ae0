"""Shows that users are told whether their training resumes exactly, and what was forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import exact_jobs
import pytest

from handfast.testing import (
    Difference,
    JobFailed,
    Nondeterministic,
    assert_exact_resume,
    exact_resume,
)
from handfast.testing.exact import start

pytestmark = pytest.mark.xdist_group("jobs")

tried = partial(exact_resume, warm=True)
asserted = partial(assert_exact_resume, warm=True)


def test_an_exact_job_passes_though_it_is_killed_twice(tmp_path: Path) -> None:
    """Where saves are rarer than steps it trains some again; the second kill finds it elsewhere."""
    job = partial(exact_jobs.train, every=2)
    result = asserted(job, steps=8, kill_at=[3, 6], keep_in=tmp_path)
    assert (result.killed, result.resumed) == ((3, 6), (2, 6))
    assert result.exact
    assert result.first_difference is None
    assert str(result).startswith(
        "exact: 8 steps, killed after step 3 and 6, resumed at step 2 and 6; "
    )
    (kept,) = tmp_path.iterdir()
    assert str(result).endswith(f"kept in {kept}")
    assert {path.name for path in kept.iterdir()} == {"straight", "again", "killed"}


FORGOTTEN = {
    # what is broken: path and kind of the first difference, whether the restore itself shows it
    "rng": ("rng/python", "random stream", True),
    "optimizer": ("optimizer/state/0/0/step", "step counter", False),
    "scheduler": ("scheduler/_step_count", "scheduler", True),
    "loader": ("loader/order", "loader position", True),
    "buffer": ("model/0.mean", "buffer", True),
    "tensor": ("shift", "tensor", True),
    "extra": ("extra/seen", "extra", False),
}


@pytest.mark.parametrize("fault", FORGOTTEN)
def test_what_was_forgotten_is_named(fault: str) -> None:
    """Not in the state, or not brought back: the first to differ is what the user has to mend."""
    path, kind, restored = FORGOTTEN[fault]
    when = "when step 2 was restored:" if restored else "at the save of step 3:"
    with pytest.raises(AssertionError, match="not exact: 4 steps, killed after step 2") as caught:
        asserted(partial(exact_jobs.train, fault=fault), steps=4, kill_at=2)
    said = str(caught.value).splitlines()
    assert said[1] == f"first to differ, {when}"
    assert said[2].strip().startswith(f"{path} ({kind}")


UNSAVED = {
    "model": ("model/bias", "'model': model"),
    "nothing of it": ("model/bias", "'model': model"),
    "by hand": ("model/bias", "'model': model"),
    "hidden": ("SGD/params[0]", "put the module whose parameters SGD steps into the state"),
    "a copy": ("model (2)/bias", "several things are called 'model': put the one that is trained"),
}


@pytest.mark.parametrize("fault", UNSAVED)
def test_what_is_trained_and_not_saved_at_all_is_named(fault: str) -> None:
    """Plain SGD keeps nothing, so nothing that is saved would ever differ: the weights do."""
    path, remedy = UNSAVED[fault]
    job = partial(exact_jobs.of_plain_sgd, fault=fault)
    with pytest.raises(AssertionError, match="first to differ") as found:
        asserted(job, steps=4, kill_at=2)
    assert f"\n  {path} (parameter, not in the state" in str(found.value)
    assert remedy in str(found.value)
    asserted(job, steps=4, kill_at=2, ignore=["model", "model (2)", "SGD", "weight"])


BESIDE = {
    # what is forgotten: its first leaf and kind, and what is said besides
    "average": ("average/shadow/bias", "object"),
    "swa": ("swa/n_averaged", "buffer"),
    "scaler": ("scaler/_growth_tracker", "scaler"),
    "rate": ("rate/last_epoch", "scheduler"),
    "tracked": ("tracked/num_batches_tracked", "buffer"),
    "ema": ("ema['bias']", "tensor"),
}


@pytest.mark.parametrize("forget", BESIDE)
def test_what_could_have_been_saved_and_differs_is_a_failure(forget: str) -> None:
    """An average, a scaler, a rate that has not changed yet: nothing that is trained tells."""
    path, kind = BESIDE[forget]
    job = partial(exact_jobs.with_things_beside, forget=forget)
    with pytest.raises(AssertionError, match="from step 3 on what is beside its state") as found:
        asserted(job, steps=4, kill_at=2)
    said = str(found.value).splitlines()
    assert said[1] == "first to differ, when step 2 was restored:"
    assert said[2].startswith(f"  {path} ({kind}, not in the state")
    assert f"What to do: put it into the state: Checkpointer(path, {{..., '{forget}'" in said[-2]
    assert said[-1] == f"If it may differ, leave it out: ignore=('{forget}',)"


def test_what_may_differ_is_left_out() -> None:
    """All of these at once, each named as it was told."""
    job = partial(exact_jobs.with_things_beside, forget=" ".join(BESIDE))
    assert asserted(job, steps=4, kill_at=2, ignore=list(BESIDE)).exact


def test_what_else_differs_beside_the_state_is_noted() -> None:
    """A best loss in a plain dict, and data that count: no failure, and not silent.

    Nothing is said of what differs by itself (a clock), nor of a compiled module.
    """
    job = partial(exact_jobs.with_things_beside, compiled=True)
    result = asserted(partial(job, forget="best"), steps=4, kill_at=2)
    assert [d.path for d in result.beside] == ["data/asked", "best['loss']"]
    said = str(result).splitlines()
    assert said[0].startswith("exact: ")
    assert said[1].startswith("not in the state, and other after the resume; what of it matters")
    assert "  best['loss'] (value, not in the state): 7.0 uninterrupted, 9.0 after" in said[-1]
    whole = asserted(job, steps=4, kill_at=2)
    assert [d.path for d in whole.beside] == ["data/asked"]


def test_what_a_scheduler_counts_for_itself_alone_is_noted() -> None:
    """Torch warns by it, and trains not by it: one that is made anew at the step is exact."""
    result = asserted(exact_jobs.with_a_rate_made_anew, steps=4, kill_at=2)
    assert [d.path for d in result.beside] == ["rate/_step_count", "seen"]


def test_what_to_do_goes_by_what_belongs_into_the_state() -> None:
    """Both are lost at once; a sum may be anybody's, the optimizer is not."""
    job = partial(exact_jobs.with_a_rate_made_anew, forget="optimizer")
    result = tried(job, steps=4, kill_at=2)
    assert result.first_difference is not None
    assert result.first_difference.path == "seen"
    assert "What to do: put it into the state: Checkpointer(path, {..., 'optimizer'" in str(result)
    assert "  seen (value, not in the state)" in str(result)


@pytest.mark.parametrize("fault", ["stepped", "slots"])
def test_weights_that_do_not_look_like_weights_are_seen(fault: str) -> None:
    """What a torch optimizer steps is trained, whether it requires gradients or not; and an object
    without a dict is looked into."""
    asserted(exact_jobs.by_gradients_of_its_own, steps=4, kill_at=2)
    job = partial(exact_jobs.by_gradients_of_its_own, fault=fault)
    with pytest.raises(AssertionError, match="not exact") as found:
        asserted(job, steps=4, kill_at=2)
    assert "\n  held.weight (" in str(found.value)


@pytest.mark.parametrize("ignore", [["*"], ["weight", "rng"], {"weight", "rng/*"}])
def test_who_ignores_all_of_the_state_is_told(ignore: Any) -> None:
    """Nothing would be compared that is saved; what is beside it is no more than a hint."""
    job = partial(exact_jobs.of_some_steps, of=[2, 4])
    with pytest.raises(ValueError, match="leaves nothing of the state to compare"):
        asserted(job, steps=4, kill_at=2, ignore=ignore)


def test_plain_sgd_with_its_model_passes() -> None:
    """Under every way to look at it, nothing is found."""
    asserted(exact_jobs.of_plain_sgd, steps=4, kill_at=2)


def test_a_kill_before_anything_was_saved_shows_nothing() -> None:
    """The start after it is a first one, whatever streams it begins with: it is the kill that is
    wrong, and no difference is told. With a save on SIGTERM there is one by then.
    """
    said = r"nothing was saved before the kill at step 2.* kill later \(kill_at=\).* save earlier"
    with pytest.raises(JobFailed, match=said):
        tried(partial(exact_jobs.train, every=3), steps=6, kill_at=[2, 4])
    assert tried(exact_jobs.until_told, steps=4, kill_at=2, how="terminate").resumed == (2,)


def test_a_generator_on_the_users_own_object_is_named() -> None:
    """Streams beside those of the process are found where the loop's objects hold them."""
    job = partial(exact_jobs.fit, kept=False)
    first = tried(job, steps=4, kill_at=2).first_difference
    assert first is not None
    assert (first.path, first.kind, first.stored) == ("self.noise", "random stream", False)
    assert (first.step, first.restored) == (2, True)


def test_a_loader_that_goes_on_behind_is_named() -> None:
    """An iterator from before the restore: the loader's position differs, and is named first."""
    job = partial(exact_jobs.over_a_loader, late=False)
    result = tried(job, steps=4, kill_at=2)
    first = result.first_difference
    assert first is not None
    assert (first.path, first.kind) == ("batches/_num_yielded", "loader position")
    assert "make batches of it by iter() after restore()" in str(result)
    assert "loader/_num_yielded" in {d.path for d in result.then}


def test_torchdatas_own_loader_passes() -> None:
    """Its state is read without harm, right after the restore, too."""
    asserted(exact_jobs.over_a_loader, steps=4, kill_at=2)


def test_a_job_that_is_not_deterministic_is_no_fault_of_the_resume() -> None:
    """Said as an error of its own, with what differs between two runs that nobody interrupted."""
    job = partial(exact_jobs.train, fault="noise")
    with pytest.raises(Nondeterministic, match=r"differ at the start:\n  rng/torch") as caught:
        asserted(job, steps=3, kill_at=1)
    assert "differs in nothing else" in str(caught.value)


def test_what_differs_before_any_kill_is_no_fault_of_the_resume() -> None:
    """The start that is to be killed is undisturbed until then, and held against the others."""
    with pytest.raises(Nondeterministic, match=r"differ at the start:\n  weight \(tensor"):
        asserted(partial(exact_jobs.wrong, how="odd"), steps=3, kill_at=2)


def test_what_may_differ_can_be_left_out() -> None:
    """A time in extra= differs in every run: with ignore= the rest is held to the bit."""
    job = partial(exact_jobs.train, fault="clock")
    result = tried(job, steps=3, kill_at=1)
    assert [d.path for d in result.noise if d.stored] == ["extra/at"]
    assert not result.differences
    asserted(job, steps=3, kill_at=1, ignore=["extra/at"])


def test_a_job_of_several_ranks_passes() -> None:
    """Two ranks under gloo, started as torchrun would, and both killed."""
    result = asserted(exact_jobs.of_ranks, steps=4, kill_at=2, ranks=2)
    assert result.resumed == (2,)


def test_the_rank_that_forgets_is_named() -> None:
    """One rank is killed, the other ends with it; its own stream is what differs first."""
    job = partial(exact_jobs.of_ranks, fault=1)
    result = tried(job, steps=4, kill_at=2, ranks=2, victim=0)
    assert result.first_difference is not None
    assert (result.first_difference.rank, result.first_difference.path) == (1, "data")
    assert "rank 1: data (random stream, not in the state)" in str(result)


def test_a_job_may_be_terminated_and_save_once_more() -> None:
    """SIGTERM, as before a preemption: what its handler lets it save is what it resumes."""
    result = asserted(exact_jobs.until_told, steps=6, kill_at=4, how="terminate")
    assert result.resumed == (4,)


def test_a_job_that_is_deaf_to_the_signal_is_told() -> None:
    """It was not interrupted, so nothing was shown."""
    job = partial(exact_jobs.until_told, deaf=True)
    with pytest.raises(JobFailed, match="went on to its end"):
        tried(job, steps=3, kill_at=1, how="terminate")


SAID = {
    "raises": r"first uninterrupted run: the job ended with status 1 before restore\(\) had "
    r"returned:\n(?s:.*)RuntimeError: out of cheese",
    "dies": "was ended by signal 11",
    "silent": r"never called restore\(\) of a handfast.torch.Checkpointer",
    "idle": r"never called save\(\)",
    "rare": r"called save\(\) at steps 1, 2, 3, and no save was taken",
    "short": r"last save\(\) was of step 2, and steps=3",
    "two": "one run a process can be tried out",
    "fixed": "began at step 3: it found what another one had saved",
}


@pytest.mark.parametrize("how", SAID)
def test_a_job_that_does_not_do_its_part_is_told(how: str) -> None:
    """What it said itself is shown, and what it must do."""
    with pytest.raises(JobFailed, match=SAID[how]):
        tried(partial(exact_jobs.wrong, how=how), steps=3, kill_at=1)


def test_a_job_that_hangs_says_where() -> None:
    """The start that hangs is named, the step, and the line of the user's own code."""
    job = partial(exact_jobs.wrong, how="hangs")
    said = r"first uninterrupted run: the job did not end within 2 s .* after the save of step 2"
    with pytest.raises(JobFailed, match=said) as caught:
        tried(job, steps=3, kill_at=1, timeout_s=2)
    assert "exact_jobs.py" in str(caught.value)


def test_a_rank_that_can_not_even_say_where_it_hangs_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped process runs no more code of its own, so the limit is kept from outside, too."""
    monkeypatch.setattr(start, "SLACK_S", 1.0)
    with pytest.raises(JobFailed, match="it did not say where it is"):
        tried(partial(exact_jobs.wrong, how="stops"), steps=3, kill_at=1, timeout_s=3)


def test_of_several_ranks_the_one_that_raised_is_shown() -> None:
    """Those that wait for it are ended, and say nothing of use."""
    job = partial(exact_jobs.wrong, how="one raises")
    with pytest.raises(JobFailed, match="rank 1 ended with status 1") as caught:
        tried(job, steps=3, kill_at=1, ranks=2)
    assert "rank 0" not in str(caught.value)


NOT_RESUMED = {
    "elsewhere": "after the kill at step 1 began at step 0, though step 1 had been saved",
    "forgets": r"after the kill at step 1 never called restore\(\)",
    "lazy": "the last start ended at step 2 of 3",
    "shy": "ended without a save of step 1, which an uninterrupted one had",
}


@pytest.mark.parametrize("how", NOT_RESUMED)
def test_a_job_that_does_not_resume_does_not_pass(how: str) -> None:
    """One that begins anew would end where the uninterrupted one ends."""
    with pytest.raises(JobFailed, match=NOT_RESUMED[how]):
        tried(partial(exact_jobs.wrong, how=how), steps=3, kill_at=1)


def test_a_step_that_is_never_saved_is_no_place_for_a_kill() -> None:
    """Said once the steps are known, before anything else is run."""
    job = partial(exact_jobs.of_some_steps, of=[2, 4])
    with pytest.raises(JobFailed, match=r"after save\(3\), which it never calls: .* steps 2, 4"):
        tried(job, steps=4, kill_at=3)


def test_a_script_can_try_itself_out(tmp_path: Path) -> None:
    """Its job is one of ``__main__``, found by its file; each start is a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, exact_jobs.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("exact: 4 steps, killed after step 2, resumed at step 2; ")


UNGUARDED = """
import exact_jobs
from handfast.testing import assert_exact_resume

def job(path, steps):
    exact_jobs.of_some_steps(path, steps, [2, 4])

print(assert_exact_resume(job, steps=4, kill_at=2, warm={warm}, timeout_s=60))
"""


@pytest.mark.parametrize("warm", [pytest.param(True, marks=pytest.mark.heavy), False])
def test_a_script_whose_call_is_not_guarded_is_told(warm: bool, tmp_path: Path) -> None:
    """It would be called again by each process that it starts, and by theirs."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format(warm=warm))
    argv = [sys.executable, str(script)]
    here = str(Path(exact_jobs.__file__).parent)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 1
    last = done.stderr.rpartition("JobFailed: ")[2]
    assert 'if __name__ == "__main__":' in last
    assert "the first uninterrupted run" in done.stderr


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kill_at": 4}, "after step 3 at the latest"),
    ({"kill_at": 0}, "after step 1 at the earliest"),
    ({"kill_at": [2, 1]}, "in rising order"),
    ({"kill_at": []}, "in rising order"),
    ({"kill_at": 1.0}, "in rising order"),
    ({"steps": 1}, "a whole number from 2 on"),
    ({"ranks": 0}, "a whole number from 1 on"),
    ({"how": "ask"}, "one of 'kill', 'terminate'"),
    ({"victim": 1}, "a rank below 1"),
    ({"ignore": "extra"}, "a tuple of patterns"),
    ({"timeout_s": 0}, "more than 0"),
    ({"timeout_s": float("nan")}, "more than 0"),
    ({"timeout_s": "x"}, "timeout_s='x': give seconds, more than 0"),
    ({"timeout_s": None}, "timeout_s=None: give seconds, more than 0"),
    ({"timeout_s": True}, "timeout_s=True: give seconds, more than 0"),
    ({"ignore": None}, "ignore=None: give a tuple of patterns"),
    ({"ignore": (1,)}, r"ignore=\(1,\): give a tuple of patterns"),
    ({"ignore": b"*"}, r"ignore=b'\*': give a tuple of patterns"),
    ({"warm": "no"}, "warm='no': True or False"),
    ({"keep_in": 5}, "keep_in=5: give the path of a directory"),
    ({"keep_in": ""}, "keep_in='': give the path of a directory"),
    ({"keep_in": b"out"}, "keep_in=b'out': give the path of a directory"),
    ({"keep_in": "/proc/x"}, "keep_in='/proc/x': .*No such file.* directory that can be written"),
    ({"keep_in": __file__}, "File exists.* give the path of a directory that can be written"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_arguments_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    """Before any process is started."""
    asked: dict[str, Any] = {"steps": 4, "kill_at": 2} | given
    with pytest.raises(ValueError, match=said):
        tried(exact_jobs.train, **asked)


def test_a_function_that_no_other_process_can_find_is_refused() -> None:
    """A lambda has no name, a thing that is no function can't be called, and a class makes one."""
    for job in (lambda path, steps: None, 3, exact_jobs.Trainer, partial(exact_jobs.Trainer, "x")):
        with pytest.raises(TypeError, match="function of a module's top level"):
            tried(job, steps=4, kill_at=2)


def test_a_difference_says_what_it_is() -> None:
    """Both sides of a plain value, and how far tensors are apart."""
    plain = Difference("extra/seen", "extra", True, 0, 3, False, "96", "32")
    assert str(plain) == "extra/seen (extra): 96 uninterrupted, 32 after the resume"
    tensor = Difference(
        "w", "tensor", False, 0, 3, True, "float32[99]", "float32[99]", 0.25, 32, 99
    )
    assert str(tensor) == (
        "w (tensor, not in the state, float32[99]): differs by up to 0.25 among 32 of 99 elements "
        "looked at"
    )
