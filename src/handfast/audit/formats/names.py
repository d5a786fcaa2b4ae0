"""What the names of files and directories say: steps, ranks, and which of them are of one run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Final

__all__ = ["blank", "gaps", "joined", "numbered", "parent", "ranked", "runs", "stepped", "unranked"]

GAPS: Final = 1 << 16

_NUMBER: Final = re.compile(r"\d+")

_RANK: Final = re.compile(
    r"(?:^|[._-])(?:(?:global|local|dp|mp|tp|pp)_?)?rank"
    r"[._=-]?(\d+)(?=[._-]|$)",
    re.IGNORECASE,
)
_OF: Final = re.compile(r"(?:^|[._-])(\d+)-of-(\d+)(?=[._-]|$)")
_STEP: Final = re.compile(
    r"(?:global_?step|step|iter(?:ation)?|checkpoint|ckpt|update|epoch|ep|ba)[._=-]?(\d+)",
    re.IGNORECASE,
)
_ALONE: Final = re.compile(r"(?:^|[._-])(\d+)(?=[._-]|$)")


def parent(path: str) -> str:
    """The directory of a path; "" for the root."""
    return path.rpartition("/")[0]


def joined(folder: str, name: str) -> str:
    """The path of what lies in a directory; "" is the root."""
    return f"{folder}/{name}" if folder else name


def numbered(path: str) -> int | None:
    """The step that a name says: behind a word for one, or as a number that stands by itself."""
    name = unranked(path)
    found = _STEP.findall(name) or _ALONE.findall(name)
    return int(found[-1]) if found and len(found[-1]) < 19 else None


def stepped(path: str) -> bool:
    """Whether a name says a step by a word for one."""
    return _STEP.search(unranked(path)) is not None


def gaps(there: Collection[int]) -> list[int]:
    """The numbers below the greatest that are not there: the first ``GAPS`` of them."""
    known = {*there}
    lost = (number for number in range(max(known, default=0)) if number not in known)
    return list(islice(lost, GAPS))


def unranked(path: str) -> str:
    """A name without what it says of a rank."""
    return _OF.sub("-R-of-N", _RANK.sub("-R", path.rpartition("/")[2]))


def ranked(path: str) -> tuple[int, int] | None:
    """The rank that a file's name says, and how many there are ("3-of-8"; 0: not told)."""
    name = path.rpartition("/")[2]
    of = _OF.search(name)
    if of is not None:
        return int(of[1]), int(of[2])
    rank = _RANK.search(name)
    return None if rank is None else (int(rank[1]), 0)


def blank(path: str) -> str:
    """A name without its numbers: what the steps of a run have in common."""
    return _NUMBER.sub("#", path.rpartition("/")[2])


def runs(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Put paths together that differ in numbers only: the place of each run, and its steps.

    In the order of what their names say, oldest first. One without a number is a run by itself, and
    its own place.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        groups[parent(path), blank(path)].append(path)
    for (folder, name), found in groups.items():
        if "#" in name:
            yield folder, sorted(found, key=lambda path: (numbered(path) or 0, path))
        else:
            yield from ((path, [path]) for path in found)
