"""``handfast.open``: a run read beside its training, or long after it, without any agent.

Every call reads the journals anew, so an open run never goes stale; what was released between a
look and the read that follows is looked for again. Nothing here changes a run, but for the pin that
an export holds while it reads.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from handfast.checkpoint.agents import AgentView, ask
from handfast.checkpoint.status import EpochRow, Status, rows, status
from handfast.checkpoint.survey import Survey, read_domain
from handfast.checkpoint.verify import Released, Verification, verify_epochs, verify_line
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.verdict import Verdict
from handfast.errors import HandfastError, Refused
from handfast.store.files import Files, Posix, reading
from handfast.store.port import Progress

__all__ = ["NoRun", "Run", "open_run"]

TRIES: Final = 10
FIELD: Final = re.compile(r"\{(?:rank|local_rank|host)\}")

T = TypeVar("T")


class NoRun(HandfastError):
    """There is no run at the paths that were given."""


def open_run(*paths: str | os.PathLike[str], files: Files | None = None) -> Run:
    """Open a run to be read. Several paths are joined, as are globs and templates.

    A run whose ranks have disks of their own has a directory a node: give them all
    (``/mnt/*/run``), or the path that the training was given (``/mnt/{rank}/run``).

    Raises NoRun where no domain is found, FormatError for a run of another format, Refused where
    the paths hold several runs, HandfastError where the system won't let us look.
    """
    if not paths:
        raise NoRun("no path was given. What to do: give the run's directory")
    run = Run([os.fspath(path) for path in paths], files or Posix())
    run.survey()
    return run


class Run:
    """A run, read-only. See :func:`open_run`."""

    def __init__(self, paths: Sequence[str], files: Files) -> None:
        self.paths = tuple(os.path.abspath(path) for path in paths)
        self.files = files

    def survey(self) -> Survey:
        """Read all journals and manifests now. Raises what :func:`open_run` raises."""
        return Survey(
            [
                read_domain(self.files, root, name)
                for root in self._roots()
                for name in _domains(self.files, root)
            ]
        )

    def latest(self) -> Epoch | None:
        """Give the epoch that a restore would take; None if there is none with bytes.

        That is the recovery line over what journals and manifests show; :meth:`verify` reads the
        bytes and descends where they are damaged. :meth:`status` says whether it is certified.
        """
        line = self.survey().line
        return line if line != GENESIS else None

    def epochs(self, verdict: Verdict | None = None) -> tuple[EpochRow, ...]:
        """List what is held of each epoch, newest first; only those of one verdict if given."""
        return tuple(r for r in rows(self.survey()) if verdict is None or r.verdict is verdict)

    def status(self) -> Status:
        """Look at everything but the images, and ask the agents of this node."""
        return status(self.survey(), self.agents())

    def agents(self) -> tuple[AgentView, ...]:
        """Ask the live agents of this node that serve this run."""
        return ask([*self.paths, *self._roots()])

    def verify(
        self,
        step: int | Epoch | None = None,
        *,
        everything: bool = False,
        progress: Progress | None = None,
    ) -> Verification:
        """Read every byte of an epoch and hold it against what was attested.

        Without a step it is the recovery line's epoch, and where that is damaged the next, down to
        the one that a restore would take. ``everything`` reads all epochs that are held.
        Raises Refused for a step that is not held.
        """

        def work(survey: Survey) -> Verification:
            if everything:
                held = [row.epoch for row in rows(survey) if _held(survey, row.epoch)]
                return verify_epochs(self.files, survey, held, progress)
            if step is None:
                return verify_line(self.files, survey, progress)
            return verify_epochs(self.files, survey, [choose(survey, step)], progress)

        return self.steadily(work)

    def steadily(self, work: Callable[[Survey], T], tries: int = TRIES) -> T:
        """Do work on a fresh survey, again if what it read was released meanwhile.

        Raises Refused where epochs come and go faster than they can be read.
        """
        try:
            return work(self.survey())
        except Released as released:
            if tries == 1:
                raise Refused(
                    str(released),
                    verdict=Verdict.MISSING,
                    remedy="keep more epochs, or export one: that holds it by a pin",
                ) from released
        return self.steadily(work, tries - 1)

    def _roots(self) -> list[str]:
        """The directories that the paths stand for, each once, in order."""
        roots: dict[str, str] = {}
        for path in self.paths:
            pattern = FIELD.sub("*", path)
            found = sorted(glob.glob(pattern)) if pattern != path or glob.has_magic(path) else []
            for root in found or [path]:
                if os.path.isdir(f"{root}/domains"):
                    roots.setdefault(os.path.realpath(root), root)
                elif not found:
                    _refuse(path)
        if not roots:
            _refuse(self.paths[0])
        return list(roots.values())


def _refuse(path: str) -> None:
    what = "is not there" if not os.path.exists(path) else "holds no run (it has no domains/)"
    raise NoRun(
        f"{path} {what}. What to do: give the directory that the training was given as its path; "
        "for a run on several disks give them all, as a glob"
    )


def _domains(files: Files, root: str) -> Iterator[str]:
    """Name the domains below a root that were identified, or must have been."""
    with reading(root):
        for name in files.listdir(f"{root}/domains"):
            home = f"{root}/domains/{name}"
            begun = files.exists(f"{home}/domain.json") or files.exists(f"{home}/1")
            if os.path.isdir(home) and begun:
                yield name


def _held(survey: Survey, epoch: Epoch) -> bool:
    return any(epoch in found.retained for found in survey.places if found is not None)


def choose(survey: Survey, step: int | Epoch | None) -> Epoch:
    """Find the epoch that is meant: the recovery line, a step of the living timeline, or a whole
    epoch, orphan or not.

    Raises Refused where nobody holds such an epoch, saying what there is.
    """
    if step is None:
        if survey.line is None or survey.line == GENESIS:
            raise _nothing(survey)
        return survey.line
    held = [row.epoch for row in rows(survey) if _held(survey, row.epoch)]
    if isinstance(step, Epoch):
        meant = [epoch for epoch in held if epoch == step]
        orphans: list[Epoch] = []
    else:
        same = [epoch for epoch in held if epoch.step == step]
        meant = [epoch for epoch in same if survey.eligible(epoch)]
        orphans = [epoch for epoch in same if not survey.eligible(epoch)]
    if meant:
        return meant[0]
    there = ", ".join(str(epoch) for epoch in sorted(held)) or "none"
    remedy = f"choose one of {there}"
    if orphans:
        remedy = f"to read the abandoned one, name it whole: {orphans[0]}"
    raise Refused(
        f"no domain holds step {step}" + (" on the living timeline" if orphans else ""),
        verdict=Verdict.MISSING,
        remedy=remedy,
    )


def _nothing(survey: Survey) -> Refused:
    if survey.line == GENESIS:
        what, remedy = "nothing was saved in this run yet", "wait for its first epoch to converge"
    elif survey.absent:
        what, remedy = "not all of its domains are here", "give the paths of all of them"
    else:
        what, remedy = "no epoch is left that every shard has", "see `handfast verify --all`"
    return Refused(what, verdict=Verdict.MISSING, shards=survey.absent, remedy=remedy)
