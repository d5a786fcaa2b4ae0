"""Watching a directory that a training writes to: an alarm when a tear appears, not before."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

from handfast.audit.checks import Look, check
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.names import joined, numbered, parent
from handfast.audit.found import Found
from handfast.audit.place import File, Place, look
from handfast.audit.room import MEMORY
from handfast.audit.run import founds
from handfast.audit.torch_file import Kind, recognise
from handfast.errors import HandfastError

__all__ = ["watch"]

PAUSE_S: Final = 5.0
STILL: Final = 3
"""Looks in which a file has not changed that is at rest: a save writes more often than that."""

_Key = tuple[Code, str, str]


def watch(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    memory: int = MEMORY,
    pause_s: float = PAUSE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Finding]:
    """Yield each new finding that is certain or strong, for ever.

    A look is taken every ``pause_s`` seconds, and an audit made when some file has come to rest: it
    was written or removed, and then still for ``STILL`` looks. What is said of a step of which a
    file still moves waits for that one, since a save that is under way looks torn; other files may
    move for ever. Raises HandfastError where the path can't be looked at any more.
    """
    known: set[_Key] = set()
    files = _Files()
    while True:
        with Reader(room=memory) as reader:
            due = files.rested(look(path, reader).files)
        if due:
            told = _audit(path, deep, memory, files)
            new = [finding for key, (finding, waits) in told.items() if not (waits or key in known)]
            known = {key for key, (_, waits) in told.items() if not waits or key in known}
            yield from new
        sleep(pause_s)


class _Files:
    """In how many looks each file has not changed; of one that is gone, until it is at rest so."""

    def __init__(self) -> None:
        self._still: dict[str, tuple[File | None, int]] = {}

    @property
    def moving(self) -> set[str]:
        """Those that changed within the last looks."""
        return {path for path, (_, still) in self._still.items() if still < STILL}

    def rested(self, now: Mapping[str, File]) -> bool:
        """Take a look; whether a file came to rest in it."""
        before, self._still, rested = self._still, {}, False
        for path in before.keys() | now.keys():
            file, (was, still) = now.get(path), before.get(path, (None, 0))
            still = still + 1 if path in before and file == was else 0
            rested = rested or still == STILL
            if file is not None or still < STILL:
                self._still[path] = file, still
        return rested


def _audit(
    path: str | os.PathLike[str], deep: bool, memory: int, files: _Files
) -> dict[_Key, tuple[Finding, bool]]:
    """All that is certain or strong, and whether it has to wait."""
    with Reader(room=memory) as reader:
        place, looking = look(path, reader), Look(deep=deep)
        every = [
            (finding, found)
            for found in founds(place)
            for finding in check(found, looking)
            if finding.strength is not Strength.HINT
        ]
        since = place.files.items() ^ look(path, reader).files.items()
        moving = files.moving.union(path for path, _ in since)
        return {
            (told.code, told.step, told.says): (told, _waits(told, found, place, moving))
            for told, found in every
        }


def _waits(finding: Finding, found: Found, place: Place, moving: Collection[str]) -> bool:
    """Whether a file moves that may be of a finding's step; of a run, if it is of no step.

    It is one of the parts, lies in the step's directory, or beside a part with a part's name before
    what a save adds to it, or with the step's number. Under any name at all it may be a part that
    is missed, if torch writes it.
    """
    steps = [step for step in found.steps if step.path == finding.step]
    own = {*finding.parts, *(part.path for step in steps for part in step.parts)}
    if not steps:
        own |= found.files
    home = finding.step if finding.step in place.folders else parent(finding.step)
    if home != found.root or (len(steps) == 1 and home == finding.step):  # else others lie there
        own |= {home} - {""}
    beside = {parent(path) for path in own}
    numbers = {step.number for step in steps} - {None}
    for path in moving:
        if not own.isdisjoint(_above(path)):
            return True
        near = parent(path) in beside
        if near and (numbered(path) in numbers or not own.isdisjoint(_first(path))):
            return True
        if near and finding.code is Code.MISSING and _is_torchs(place, path):
            return True
    return False


def _is_torchs(place: Place, path: str) -> bool:
    """Whether a file, which may be half written, looks like one of torch.save, and like no log."""
    try:
        return recognise(place.reader, place.absolute(path)) is not Kind.UNKNOWN
    except HandfastError:
        return True


def _above(path: str) -> Iterator[str]:
    """A path, and the directories that it lies in."""
    while path:
        yield path
        path = parent(path)


def _first(path: str) -> Iterator[str]:
    """What a file may be called that is written under another name at first."""
    folder, name = parent(path), path.rpartition("/")[2].lstrip("._")
    yield from (joined(folder, name[: end.start()]) for end in re.finditer(r"[._-]|$", name))
