"""Where a run lies: paths, globs and templates joined, and looked at anew each time."""

from __future__ import annotations

import glob
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from handfast.checkpoint.agents import AgentView, ask
from handfast.checkpoint.evidence import certificates, lost
from handfast.checkpoint.rounds import unfit
from handfast.checkpoint.status import apart, rows
from handfast.checkpoint.survey import TOGETHER, Survey, read_domain
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, HandfastError, NoRun, Refused
from handfast.store.claims import domains_below, lengths_now
from handfast.store.files import Files, describe, reading

__all__ = ["Location", "Released", "away", "check_held", "choose", "held", "mixed"]

logger = logging.getLogger("handfast")

TRIES: Final = 10
LOOKS: Final = 200
PAUSE_S: Final = 0.01
FIELD: Final = re.compile(r"(\{\{|\}\}|\{(?:rank|local_rank|host)(?:[:!][^{}]*)?\})")
"""A field of a template, or a brace that stands twice for itself."""

T = TypeVar("T")
Look = dict[tuple[str, str], dict[int, int] | None]


class Released(HandfastError):
    """The epoch was released while it was read: look again, there is a newer one."""


class Location:
    """The paths of one run."""

    def __init__(self, paths: Sequence[str], files: Files) -> None:
        self.paths = tuple(os.path.realpath(path) for path in paths)
        self.files = files

    def survey(self) -> Survey:
        """Read all journals as they are at one moment, and the manifests.

        Raises NoRun where no domain is found, FormatError for a run of another format, Refused
        where the paths hold several runs or only certificates are left of one, HandfastError where
        the system won't let us look, or the run is written too fast to be looked at.
        """
        certified = self._certified()  # before the domains: a job may just be beginning
        lengths = self._moment()
        found = [read_domain(self.files, *where, then) for where, then in lengths.items()]
        survey = Survey(found, list(filter(None, (unfit(self.files, r) for r in self._roots()))))
        if certified and survey.roster is None and all(item.member is not None for item in found):
            what = "no domain is left" if not found else "no journal of a domain is left"
            raise lost((name for _, name in certified), what, sorted({at for at, _ in certified}))
        return survey

    def _certified(self) -> list[tuple[str, str]]:
        """Find whose certificates lie here: (root, domain)."""
        found = []
        for root in self._roots():
            with reading(root):
                found += [(root, name) for name in certificates(self.files, root)]
        return found

    def _moment(self) -> Look:
        """Find the lengths that all journals had at one moment; see `lengths_now`.

        What they hold up to there can be read afterwards, however long that takes.
        """
        seen = self._look()
        for _ in range(1, LOOKS):
            before, seen = seen, self._look()
            if before == seen:
                return seen
            time.sleep(PAUSE_S)
        raise HandfastError(
            f"{self.paths[0]}: the run is being written: it was looked at {LOOKS} times, and each "
            "time something had been written since. What to do: look again"
        )

    def _look(self) -> Look:
        """Look how long the journals are, domain by domain; None where one can't be read."""
        found: Look = {}
        for root in self._roots():
            for name in _domains(self.files, root):
                home = f"{root}/domains/{name}"
                try:
                    with reading(home):
                        found[root, name] = lengths_now(self.files, home)
                except Damaged:  # reading it will say how
                    found[root, name] = None
        return found

    def agents(self, survey: Survey) -> tuple[AgentView, ...]:
        """Ask the live agents of this node that serve this run."""
        placed = zip(survey.domains, survey.places, strict=True)
        homes = {d.id: f"{f.root}/domains/{f.name}" if f is not None else "" for d, f in placed}
        return ask([*self.paths, *self._roots()], homes)

    def steadily(self, work: Callable[[Survey], T], tries: int = TRIES) -> T:
        """Do work on a fresh survey, again if what it read was released meanwhile.

        Raises HandfastError where epochs come and go faster than they can be read: that is no
        verdict on any of them.
        """
        try:
            return work(self.survey())
        except Released as released:
            if tries == 1:
                raise HandfastError(
                    f"{released}, and so it went {TRIES} times: this run is written faster than it "
                    "can be read. What to do: keep more epochs (keep=Keep(newest=...)), or read it "
                    "when it is saved less often"
                ) from released
        return self.steadily(work, tries - 1)

    def _roots(self) -> list[str]:
        """The directories that the paths stand for, each once, in order."""
        roots: dict[str, str] = {}
        for path in self.paths:
            found = [] if os.path.lexists(path) else _found(path)
            for root in found or [path]:
                if any(os.path.isdir(f"{root}/{part}") for part in ("domains", "certificates")):
                    roots.setdefault(os.path.realpath(root), root)
                elif not found:
                    _refuse(path)
        if not roots:
            _refuse(self.paths[0])
        return list(roots.values())


def _found(path: str) -> list[str]:
    """Find what a path that is not there itself may stand for: a template, a glob, or both."""
    parts = FIELD.split(path)
    for literal in (glob.escape, str):
        pattern = "".join(
            {"{{": "{", "}}": "}"}.get(part, "*") if at % 2 else literal(part)
            for at, part in enumerate(parts)
        )
        if found := sorted(glob.glob(pattern)):
            return found
    return []


def _refuse(path: str) -> None:
    what = "holds no run (it has no domains/)"
    try:
        os.listdir(path)
    except FileNotFoundError:
        what = "is not there"
    except PermissionError as error:
        raise HandfastError(
            f"{path}: can't be read: {describe(error)}. What to do: make it readable for this "
            "user, and each directory above it one that this user may enter (chmod u+rx)"
        ) from error
    except OSError:
        pass  # it is no directory, say
    raise NoRun(
        f"{path} {what}. What to do: give the directory that the training was given as its path; "
        "for a run on several disks give them all, as a glob"
    )


def _domains(files: Files, root: str) -> Iterator[str]:
    """Name the domains below a root that were identified, or must have been."""
    with reading(root):
        for name in domains_below(files, root):
            home = f"{root}/domains/{name}"
            begun = files.exists(f"{home}/domain.json") or files.exists(f"{home}/1")
            if os.path.isdir(home) and begun:
                yield name


def held(survey: Survey, epoch: Epoch) -> bool:
    """Say whether any domain retains an epoch, as its journal and manifests show."""
    return any(epoch in found.retained for found in survey.places if found is not None)


def choose(survey: Survey, step: int | Epoch | None) -> Epoch:
    """Find the epoch that is meant: the recovery line, a step of the living timeline, or a whole
    epoch, orphan or not.

    Raises Refused where nobody holds such an epoch, saying what there is, and Released where it
    was let go since the survey was made.
    """
    epoch = _chosen(survey, step)
    check_held(survey, epoch)
    return epoch


def check_held(survey: Survey, epoch: Epoch) -> None:
    """Raise Released where a domain has let an epoch go since the survey was made."""
    for found in survey.places:
        if found is not None and epoch in found.going:
            raise Released(f"epoch {epoch} was released by {found.id} while it was looked for")


def _chosen(survey: Survey, step: int | Epoch | None) -> Epoch:
    if step is None:
        if survey.line is None or survey.line == GENESIS:
            raise _nothing(survey)
        if survey.fallen is not None:
            logger.warning(
                "epoch %s is the newest that every shard has, BELOW the converged %s: see "
                "`handfast verify`",
                survey.line,
                survey.fallen,
            )
        return survey.line
    if isinstance(step, bool) or not isinstance(step, int | Epoch):
        raise ValueError(f"step={step!r}: give a step, 1200, or an epoch, handfast.Epoch(3, 1200)")
    there = [row.epoch for row in rows(survey) if held(survey, row.epoch)]
    if isinstance(step, Epoch):
        meant = [epoch for epoch in there if epoch == step]
        orphans: list[Epoch] = []
    else:
        same = [epoch for epoch in there if epoch.step == step]
        meant = [epoch for epoch in same if survey.eligible(epoch)]
        orphans = [epoch for epoch in same if not survey.eligible(epoch)]
    if meant:
        return meant[0]
    remedy = f"choose one of {', '.join(map(str, sorted(there))) or 'none'}"
    if orphans:
        remedy = f"to read the abandoned one, name it whole: {orphans[0]}"
    raise Refused(
        f"no domain holds step {step}" + (" on the living timeline" if orphans else ""),
        verdict=Verdict.MISSING,
        remedy=remedy,
    )


def mixed(survey: Survey, epoch: Epoch | None = None) -> Refused:
    """Say that domains are of several copies of the run, and which stand out; or that the ranks of
    an epoch had loaded the same from several.
    """
    if epoch is not None and (parts := apart(survey, epoch)):
        what = f"the ranks of epoch {epoch} had loaded parts of it from different epochs"
        remedy = "choose an epoch before it"
        return Refused(what, verdict=Verdict.MIXED, shards=parts, remedy=remedy)
    return Refused(
        "its domains are of copies of one run that went on apart",
        verdict=Verdict.MIXED,
        shards=[survey.domains[rift.member].id for rift in survey.rifts],
        remedy=TOGETHER,
    )


def _nothing(survey: Survey) -> Refused:
    if survey.rifts:
        return mixed(survey)
    if survey.line == GENESIS:
        what, remedy = "nothing was saved in this run yet", "wait for its first epoch to converge"
    elif survey.absent:
        return away(survey)
    else:
        what, remedy = "no epoch is left that every shard has", "see `handfast verify --all`"
    return Refused(what, verdict=Verdict.MISSING, remedy=remedy)


def away(survey: Survey) -> Refused:
    """Say which domains take no part: those that can't be read, and why, or those not given."""
    unread = [f for f in survey.places if f is not None and f.member is None]
    if not unread:
        return Refused(
            "not all of its domains are here",
            verdict=Verdict.MISSING,
            shards=survey.missing,
            remedy="give the paths of all of them",
        )
    return Refused(
        "not all of its domains can be read",
        verdict=unread[0].verdict or Verdict.CORRUPT,
        shards=[f"{found.id}: {found.problem}" for found in unread],
    )
