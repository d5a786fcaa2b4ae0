"""``handfast.open``: a run read beside its training, or long after it, without any agent.

Every call reads the journals anew, as all of them were at one moment, so an open run never goes
stale; what was released between that moment and the read that follows is looked for again. Nothing
here changes a run, but for the pin that holds an epoch while its tensors are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

from handfast.checkpoint.export import Exported, export
from handfast.checkpoint.inspection import Inspection, inspect
from handfast.checkpoint.location import Location, choose, held
from handfast.checkpoint.status import EpochRow, Status, rows, status
from handfast.checkpoint.survey import Survey
from handfast.checkpoint.verify import Verification, verify_epochs, verify_line
from handfast.checkpoint.weights import Weights, reading_weights
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.verdict import Verdict
from handfast.errors import NoRun
from handfast.store.files import Files, Posix
from handfast.store.port import Progress

__all__ = ["Run", "open_run"]


def open_run(*paths: str | os.PathLike[str], files: Files | None = None) -> Run:
    """Open a run to be read. Several paths are joined, as are globs and templates.

    A run whose ranks have disks of their own has a directory a node: give them all
    (``/mnt/*/run``), or the path that the training was given (``/mnt/{rank}/run``).

    Raises NoRun where no domain is found, FormatError for a run of another format, Refused where
    the paths hold several runs, HandfastError where the system won't let us look.
    """
    if not paths:
        raise NoRun("no path was given. What to do: give the run's directory")
    location = Location([os.fspath(path) for path in paths], files or Posix())
    location.survey()
    return Run(location)


class Run:
    """A run, read-only. See :func:`open_run`."""

    def __init__(self, location: Location) -> None:
        self.location = location

    def latest(self) -> Epoch | None:
        """Give the epoch that a restore would take; None if there is none with bytes.

        That is the recovery line over what journals and manifests show; :meth:`verify` reads the
        bytes and descends where they are damaged. :meth:`status` says whether it is certified.
        """
        line = self.location.survey().line
        return line if line != GENESIS else None

    def epochs(self, verdict: Verdict | None = None) -> tuple[EpochRow, ...]:
        """List what is held of each epoch, newest first; only those of one verdict if given."""
        return tuple(
            r for r in rows(self.location.survey()) if verdict is None or r.verdict is verdict
        )

    def status(self) -> Status:
        """Look at everything but the images, and ask the agents of this node."""
        survey = self.location.survey()
        return status(survey, self.location.agents(survey))

    def verify(
        self,
        step: int | Epoch | None = None,
        *,
        everything: bool = False,
        progress: Progress | None = None,
    ) -> Verification:
        """Read every byte of an epoch and hold it against what was attested.

        Without a step it is the recovery line's epoch, and where that is damaged the next, down to
        the one that a restore would take. ``everything`` reads all epochs that are held, but for
        those that are released meanwhile; one that is still to be finished is no finding then.
        Raises Refused for a step that is not held, HandfastError where epochs are released faster
        than they can be read.
        """
        files = self.location.files

        def work(survey: Survey) -> Verification:
            if everything:
                there = [row.epoch for row in rows(survey) if held(survey, row.epoch)]
                return verify_epochs(files, survey, there, progress, everything=True)
            if step is None:
                return verify_line(files, survey, progress)
            return verify_epochs(files, survey, [choose(survey, step)], progress)

        return self.location.steadily(work)

    def inspect(self, step: int | Epoch | None = None) -> Inspection:
        """Show stamps, tensors, objects and sources of an epoch, without reading its image.

        No object is made: registered types and pickles are named and left alone. Raises Refused
        for a step that is not held.
        """
        return self.location.steadily(lambda survey: inspect(survey, choose(survey, step)))

    def export(
        self,
        dest: str | os.PathLike[str],
        step: int | Epoch | None = None,
        *,
        format: str = "safetensors",  # noqa: A002 - the word that users look for
        component: str = "",
        only: Sequence[str] = ("**",),
        progress: Progress | None = None,
    ) -> Exported:
        """Write an epoch's whole tensors to a new file, verified while they are read.

        ``format`` is "safetensors", or "torch" once ``handfast.torch`` is imported. ``component``
        chooses a subtree ("model"), whose names then lose that prefix; ``only`` are ``fnmatch``
        patterns of names. Shards are put together; what is stored once a node is taken once; what
        several ranks store as their own comes under ``rank-00003/``.

        Raises HandfastError where ``dest`` exists, Refused where the epoch is not whole,
        FormatError where shards have two values for one place of a tensor, Damaged where a byte is
        wrong, ValueError for what the format or the epoch does not have, SaveFailed where the file
        can't be written. Nothing is left under ``dest`` then.
        """
        return export(
            self.location, dest, step,
            format=format, component=component, only=only, progress=progress,
        )  # fmt: skip

    def weights(
        self,
        step: int | Epoch | None = None,
        *,
        component: str = "",
        only: Sequence[str] = ("**",),
        purpose: str = "read",
        progress: Progress | None = None,
    ) -> AbstractContextManager[Weights]:
        """Hold one whole epoch while its tensors are read; for rooms that know a framework."""
        return reading_weights(
            self.location, step,
            component=component, only=only, purpose=purpose, progress=progress,
        )  # fmt: skip
