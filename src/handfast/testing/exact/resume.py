"""A job run twice undisturbed, and once with kills; then all three are compared."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from types import FrameType

import msgspec

from handfast.errors import HandfastError
from handfast.testing.exact.judge import Ranks, left_of, noise_of, split_of
from handfast.testing.exact.moments import Moment
from handfast.testing.exact.result import ExactResume
from handfast.testing.exact.start import How, JobFailed, Kill, Launch, Start, own_agents
from handfast.testing.exact.task import UNGUARDED, Job, pack

__all__ = ["Nondeterministic", "assert_exact_resume", "exact_resume"]


class Nondeterministic(HandfastError):
    """Two uninterrupted runs of the job differ, so that no resume of it can be told exact."""


def assert_exact_resume(
    job: Job,
    *,
    steps: int,
    kill_at: int | Sequence[int],
    ranks: int = 1,
    how: How = "kill",
    victim: int | None = None,
    ignore: Sequence[str] = (),
    timeout_s: float = 600.0,
    warm: bool = False,
    keep_in: str | os.PathLike[str] | None = None,
) -> ExactResume:
    """Assert that a training which is killed goes on bit for bit as if it had not been.

    See :func:`exact_resume` for the arguments, and what else is raised. Raises AssertionError,
    saying what differed first, and when; Nondeterministic where two runs that nobody interrupted
    differ already.
    """
    result = exact_resume(
        job, steps=steps, kill_at=kill_at, ranks=ranks, how=how, victim=victim, ignore=ignore,
        timeout_s=timeout_s, warm=warm, keep_in=keep_in,
    )  # fmt: skip
    if result.noise:
        raise Nondeterministic(str(result))
    if not result.exact:
        raise AssertionError(str(result))
    return result


def exact_resume(
    job: Job,
    *,
    steps: int,
    kill_at: int | Sequence[int],
    ranks: int = 1,
    how: How = "kill",
    victim: int | None = None,
    ignore: Sequence[str] = (),
    timeout_s: float = 600.0,
    warm: bool = False,
    keep_in: str | os.PathLike[str] | None = None,
) -> ExactResume:
    """Run a job undisturbed, twice, and with kills, and compare its whole state after each step.

    ``job(path, steps)`` is the training as it is: a function of a module's top level that makes a
    :class:`handfast.torch.Checkpointer` of a run at ``path``, restores, and trains until step
    ``steps`` with a call of ``save`` after each step, whatever its schedule makes of it. It runs in
    fresh interpreters, with the random streams of the process seeded, after a kill otherwise:
    ``ranks`` of them, with the environment that torchrun gives, where there are several. Right
    after ``save(k)``, once every rank is there, for each k in ``kill_at``, all ranks, or only the
    ``victim``, get SIGKILL, or with ``how="terminate"`` SIGTERM; ranks that have lost another one
    are killed a second later. Then the job is started again.

    Compared is all that is in the state, and ``extra=``, at each ``save``, by digest; and what is
    trained, wherever it lives; and what has both ``state_dict`` and ``load_state_dict``, where it
    moves and stays another one. All else beside the state only says what was forgotten. ``ignore``
    are ``fnmatch`` patterns of paths that may differ; something of the state has to be left.
    ``timeout_s`` is how long one start may take. With ``warm`` all are forked from one process that
    has torch loaded, seconds sooner each; strings hash alike in all of them, so what hangs on the
    order of a set passes. With ``keep_in`` a new folder in that directory keeps what was run.

    Raises ValueError and TypeError for arguments that make no sense, JobFailed with what the job
    said where it raises, hangs, does not save, or does not resume.
    """
    _check_caller(sys._getframe(1))
    ignore = _checked_patterns(ignore)
    _check_limits(timeout_s, warm)
    kills = _checked(steps, kill_at, ranks, how, victim)
    launch = Launch(pack(job), steps, ranks, timeout_s, warm)
    with _home(keep_in) as home, own_agents() as runtime:
        starts = _starts(launch._replace(runtime=runtime), home, kills, ignore)
    truth, twin, begun, *rest = (_without(start, ignore) for start in starts)
    # up to its kill the interrupted one was undisturbed, too
    noisy = split_of(truth, [twin, begun], loadable=False)
    noise = noise_of(truth, twin) | noise_of(truth, begun)
    split = split_of(truth, rest, noise)
    return ExactResume(
        steps=steps,
        ranks=ranks,
        killed=tuple(kill.step for kill in kills),
        resumed=tuple(start[0][0].step for start in rest),
        leaves=sum(len(moment.prints) for moment in chain(*begun, *chain(*rest))),
        noise=noisy.first + noisy.then if noisy else (),
        differences=split.first if split else (),
        then=split.then if split else (),
        step=split.step if split else None,
        beside=() if split else left_of(truth, rest, noise),
        folder=home if keep_in is not None else "",
    )


def _checked(
    steps: int, kill_at: int | Sequence[int], ranks: int, how: How, victim: int | None
) -> list[Kill]:
    """Take what users give. Raises ValueError."""
    asked = list(kill_at) if isinstance(kill_at, Sequence) else [kill_at]
    if not _whole(steps) or steps < 2:
        raise ValueError(f"steps={steps!r}: give the last step, a whole number from 2 on")
    if not _whole(ranks) or ranks < 1:
        raise ValueError(f"ranks={ranks!r}: give a whole number from 1 on")
    if not asked or not all(map(_whole, asked)) or asked != sorted(set(asked)):
        raise ValueError(f"kill_at={kill_at!r}: give a step, or several in rising order")
    if asked[0] < 1 or asked[-1] >= steps:
        raise ValueError(
            f"kill_at={kill_at!r}: a kill has to leave something to train, so it comes after step "
            f"1 at the earliest, and after step {steps - 1} at the latest (steps={steps})"
        )
    if how not in ("kill", "terminate"):
        raise ValueError(f"how={how!r}: one of 'kill', 'terminate'")
    if victim is not None and not (_whole(victim) and 0 <= victim < ranks):
        raise ValueError(f"victim={victim!r}: give a rank below {ranks}, or None for all")
    return [Kill(step, how, victim) for step in asked]


def _starts(launch: Launch, home: str, kills: Sequence[Kill], ignore: Sequence[str]) -> list[Ranks]:
    """Run it twice undisturbed, and once with kills: what each start told, in this order.

    Raises JobFailed, and ValueError where nothing would be compared.
    """
    (first,) = _run(launch, f"{home}/straight", "the first uninterrupted run")
    _check_job(first, launch.steps, kills)
    _check_left(_without(first, ignore), ignore)
    (second,) = _run(launch, f"{home}/again", "the second uninterrupted run")
    _check_job(second, launch.steps, kills)
    starts = _run(launch, f"{home}/killed", "the interrupted run", kills)
    _check_starts(starts, launch.steps, kills)
    return [first, second, *starts]


def _checked_patterns(ignore: object) -> tuple[str, ...]:
    """Take patterns in any box. Raises ValueError."""
    if isinstance(ignore, Iterable) and not isinstance(ignore, str):
        found = tuple(ignore)
        if all(isinstance(pattern, str) for pattern in found):
            return found
    raise ValueError(f"ignore={ignore!r}: give a tuple of patterns, such as ('extra/*',)")


def _check_limits(timeout_s: object, warm: object) -> None:
    number = timeout_s if isinstance(timeout_s, int | float) else 0
    if isinstance(number, bool) or not 0 < number <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_s={timeout_s!r}: give seconds, more than 0")
    if not isinstance(warm, bool):
        raise ValueError(f"warm={warm!r}: True or False")


def _check_caller(frame: FrameType | None) -> None:
    """Refuse to be called where a process that was started here imports its script again."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__mp_main__":
            raise JobFailed(UNGUARDED)
        frame = frame.f_back


def _check_left(first: Ranks, ignore: Sequence[str]) -> None:
    """Raise ValueError where none of the state would be compared but random streams."""
    leaves = chain.from_iterable(moment.prints.items() for moment in chain(*first))
    left = {path for path, leaf in leaves if leaf.stored} - {"extra"}  # which is None in most jobs
    if all(path.startswith("rng/") for path in left):
        raise ValueError(
            f"ignore={ignore!r} leaves nothing of the state to compare. What to do: name only what "
            "may differ, such as ('extra/seconds',), and put what is trained into the state"
        )


def _whole(value: object) -> bool:
    return type(value) is int


@contextlib.contextmanager
def _home(keep_in: object) -> Iterator[str]:
    if keep_in is not None:
        yield _made_in(keep_in)
        return
    with tempfile.TemporaryDirectory(prefix="handfast-exact-") as home:
        yield home


def _made_in(keep_in: object) -> str:
    """Make a folder in a directory. Raises ValueError."""
    path = os.fspath(keep_in) if isinstance(keep_in, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise ValueError(f"keep_in={keep_in!r}: give the path of a directory")
    try:
        os.makedirs(path, exist_ok=True)
        return tempfile.mkdtemp(prefix="exact-resume-", dir=os.path.abspath(path))
    except (OSError, ValueError) as error:  # the latter: a null byte
        raise ValueError(
            f"keep_in={keep_in!r}: {error}: give the path of a directory that can be written to"
        ) from error


def _run(launch: Launch, folder: str, name: str, kills: Sequence[Kill] = ()) -> list[Ranks]:
    """Start the job once more than it is killed."""
    launch = launch._replace(run=f"{folder}/run")
    starts: list[Ranks] = []
    for number, kill in enumerate([*kills, None]):
        after = (
            f", start {number + 1} (killed after step {kills[number - 1].step})" if number else ""
        )
        starts.append(
            Start(launch, f"{folder}/start-{number + 1}", name + after, number, kill).done()
        )
    return starts


def _check_job(ranks: Ranks, steps: int, kills: Sequence[Kill]) -> None:
    """Raise JobFailed for a job that can't be tried out: nothing to compare, nowhere to kill."""
    for moments in ranks:
        saves = [moment.step for moment in moments if moment.what == "saved"]
        if moments and moments[0].step != 0:
            raise JobFailed(
                f"an uninterrupted run began at step {moments[0].step}: it found what another one "
                "had saved. What to do: let the job save at the path that it is called with, and "
                "nowhere else"
            )
        if not moments or not saves:
            what = "save()" if moments else "restore() of a handfast.torch.Checkpointer"
            raise JobFailed(
                f"the job never called {what}, so there is nothing to compare. What to do: call "
                "ckpt.restore() before the first step, and ckpt.save(step) after each"
            )
        if not any(moment.taken for moment in moments):
            raise JobFailed(
                f"the job called save() at {_some(saves)}, and no save was taken. What to do: "
                f"every= must name a step up to {steps}"
            )
        if saves[-1] != steps:
            raise JobFailed(
                f"the job's last save() was of step {saves[-1]}, and steps={steps}. What to do: "
                "train as far as the job is told, and call save(step) after each step"
            )
        if missing := [kill.step for kill in kills if kill.step not in saves]:
            raise JobFailed(
                f"the job can't be killed after save({missing[0]}), which it never calls: it does "
                f"so at {_some(saves)}. What to do: choose kill_at from these, or call save(step) "
                "after each step: every= leaves out what is not to be saved"
            )


def _check_starts(starts: Sequence[Ranks], steps: int, kills: Sequence[Kill]) -> None:
    """Raise JobFailed where a start did not go on with what the ones before it had saved."""
    for kill, ranks in zip(kills, starts[:-1], strict=True):
        if any(moments[-1].step == steps for moments in ranks):
            raise JobFailed(
                f"the job was to end by SIGTERM after step {kill.step}, and went on to its end. "
                "What to do: let it stop when it is told to, or how='kill'"
            )
    taken: list[int] = []
    for kill, before, ranks in zip(kills, starts, starts[1:], strict=False):
        taken += [moment.step for moment in chain(*before) if moment.taken]
        if not taken:
            raise JobFailed(
                f"nothing was saved before the kill at step {kill.step}, so the start after it had "
                "nothing to resume. What to do: kill later (kill_at=), or let the job save earlier "
                "(every=)"
            )
        told = f"the start after the kill at step {kill.step}"
        for moments in ranks:
            if not moments:
                raise JobFailed(
                    f"{told} never called restore(). What to do: call it on every start"
                )
            if moments[0].step == 0:
                raise JobFailed(
                    f"{told} began at step 0, though step {taken[-1]} had been saved. What to do: "
                    "let the job save at the path that it is called with, the same at each start"
                )
    if ended := [moments[-1].step for moments in starts[-1] if moments[-1].step != steps]:
        raise JobFailed(
            f"the last start ended at step {ended[0]} of {steps}. What to do: let a resumed job "
            "train as far as one that was not interrupted"
        )


def _some(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
    return "steps " + ", ".join(map(str, steps[:8])) + more


def _without(ranks: Ranks, ignore: Sequence[str]) -> Ranks:
    """Leave out what may differ."""

    def kept(moment: Moment) -> Moment:
        prints = {p: leaf for p, leaf in moment.prints.items() if not _named(p, ignore)}
        return msgspec.structs.replace(moment, prints=prints)

    return [list(map(kept, moments)) for moments in ranks]


def _named(path: str, patterns: Sequence[str]) -> bool:
    return any(
        path == p or path.startswith((f"{p}/", f"{p}[")) or fnmatchcase(path, p) for p in patterns
    )
