"""An audit: all formats asked about a path, all checks made of what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import msgspec

from handfast.audit.checks import Look, check
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import FORMATS
from handfast.audit.found import Found, Resume
from handfast.audit.place import Place, look
from handfast.audit.room import MEMORY

__all__ = ["Audit", "Listed", "StepRow", "audit", "founds"]

UNKNOWN_SHOWN = 20


class StepRow(msgspec.Struct, frozen=True):
    """One step of a listing: how many parts, tensors and bytes it has, and whether it is whole.

    Whole: it was committed, all its parts are there and can be read, and nothing certain or strong
    speaks against it.
    """

    path: str
    number: int | None
    whole: bool
    parts: int
    tensors: int
    nbytes: int


class Listed(msgspec.Struct, frozen=True):
    """What one format has at a path."""

    format: str
    root: str
    steps: tuple[StepRow, ...]
    resume: tuple[Resume, ...]
    findings: tuple[Finding, ...]


class Audit(msgspec.Struct, frozen=True):
    """What was found at a path.

    ``nbytes`` of values were read; ``cut`` tensors of them not to their end, without ``deep``.
    ``unknown`` are files of no format, the first few of them, of so many ``unknowns``; ``changed``
    are files that were written while they were read. ``arithmetic`` is False where NumPy was
    missing, so that values were compared and not looked into.
    """

    path: str
    found: tuple[Listed, ...]
    nbytes: int
    cut: int
    deep: bool
    arithmetic: bool
    unknowns: int
    unknown: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def findings(self) -> list[Finding]:
        """All findings, of all formats."""
        return [finding for listed in self.found for finding in listed.findings]

    @property
    def sound(self) -> bool:
        """Whether a checkpoint was found, and nothing but hints speaks against any."""
        steps = any(listed.steps for listed in self.found)
        return steps and all(f.strength is Strength.HINT for f in self.findings)


def audit(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    memory: int = MEMORY,
    progress: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Look at what lies at a path: nothing is changed, no pickle is executed.

    Of each tensor the beginning is read; with ``deep``, all of it. The objects of one pickle may
    take ``memory`` bytes. ``progress`` is told the bytes of values that were read, as they are.
    Raises HandfastError where the path can't be looked at;
    what is wrong with a checkpoint is never raised.
    """
    with Reader(room=memory) as reader:
        place = look(path, reader)
        looking = Look(deep=deep, progress=progress)
        every = list(founds(place))
        listed = [_listed(found, looking) for found in every]
        unknown = [path for path in place.files if not any(path in f.files for f in every)]
        changed = tuple(os.path.relpath(name, place.root) for name in reader.changed())
    return Audit(
        path=os.fspath(path),
        found=tuple(listed),
        nbytes=looking.nbytes,
        cut=looking.cut,
        deep=deep,
        arithmetic=looking.numbers is not None,
        unknowns=len(unknown),
        unknown=tuple(unknown[:UNKNOWN_SHOWN]),
        changed=changed,
    )


def founds(place: Place) -> Iterator[Found]:
    """What all formats find in a place, each in what the ones before it have left.

    A reader that fails is told as a finding, and claims no files. Last comes what was not looked at
    at all, if anything was not.
    """
    for find in FORMATS:
        try:
            every = list(find(place))
        except Exception as error:  # files are hostile: one reader's fault must not hide the others
            every = [_failed(find.__module__.rpartition(".")[2], error)]
        for found in every:
            yield found
            place = place.without(found.files)
    unseen = [
        Finding(Code.UNSEEN, Strength.HINT, path, why, (path,))
        for path, why in place.unseen.items()
    ]
    if unseen:
        yield Found("directories", "", findings=unseen)


def _failed(reader: str, error: Exception) -> Found:
    """What there is to say where a reader raised what it never should."""
    says = (
        f"the reader of {reader} failed, and what is there of its format was not looked at: "
        f"{type(error).__name__}: {error}. What to do: report this, with the files if you can"
    )
    return Found(reader, "", findings=[Finding(Code.UNREADABLE, Strength.STRONG, "", says)])


def _listed(found: Found, looking: Look) -> Listed:
    findings = tuple(check(found, looking))
    bad = {f.step for f in findings if f.strength is not Strength.HINT}
    steps = tuple(
        StepRow(
            step.path,
            step.number,
            step.path not in bad,
            len(step.parts),
            sum(len(part.tensors) for part in step.parts),
            sum(part.nbytes for part in step.parts),
        )
        for step in found.steps
    )
    return Listed(found.format, found.root, steps, tuple(found.resume), _ordered(findings))


def _ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The surest first; of the same strength as they were found."""
    order = list(Strength)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.strength)))
