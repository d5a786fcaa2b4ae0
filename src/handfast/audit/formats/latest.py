"""A small file beside the steps of a run that names the newest one, as many trainings write it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.names import blank, joined, numbered
from handfast.audit.found import Step
from handfast.audit.place import Place
from handfast.errors import HandfastError

__all__ = ["trackers", "wrong"]

_NAMES: Final = ("latest", "latest.txt", "latest_checkpoint.txt", "last_checkpoint")
MOST: Final = 4096
"""Bytes of such a file at most."""


def trackers(place: Place, root: str) -> list[str]:
    """The files beside steps that may name one."""
    paths = (joined(root, name) for name in _NAMES)
    return [path for path in paths if path in place.files and place.files[path].nbytes <= MOST]


def wrong(place: Place, root: str, steps: Sequence[Step]) -> Iterator[Finding]:
    """Hints where such a file names a step that is not there, or one that is not the newest.

    It may be the path of one, or a number; what is neither is nobody's to know.
    """
    own = len(joined(root, ""))
    known = ((step.path[own:].partition("/")[0], step.number) for step in steps)
    names = {name: number for name, number in known if number is not None}
    newest = max(names.values(), default=0)
    for path in trackers(place, root) if names else ():
        try:
            text = place.bytes(path).decode()
        except (HandfastError, UnicodeDecodeError):
            continue
        said = text.strip().rstrip("/").rpartition("/")[2]
        number = names.get(said, int(said) if said.isdecimal() else numbered(said))
        if number is None or not (said.isdecimal() or blank(said) in map(blank, names)):
            continue
        if number not in names.values():
            says = f"{path} names {said}, and there is no such step"
        elif number < newest:
            says = f"{path} names {said}, and there is a step {newest}"
        else:
            continue
        yield Finding(Code.TRACKER, Strength.HINT, root, says, (path,))
