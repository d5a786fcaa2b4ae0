"""What the names of files and directories say: steps, ranks, and which of them are of one run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Final

__all__ = [
    "blank",
    "doubt",
    "gaps",
    "given",
    "joined",
    "numbered",
    "parent",
    "ranked",
    "runs",
    "stepped",
    "unranked",
]

GAPS: Final = 1 << 16

_NUMBER: Final = re.compile(r"\d+")

_RANK: Final = re.compile(
    r"(?:^|[ ._-])(?:(?:global|local|dp|mp|tp|pp)_?)?rank"
    r"[ ._=-]?(\d+)(?=[ ._-]|$)",
    re.IGNORECASE,
)
_OF: Final = re.compile(r"(?:^|[._-])(\d+)-of-(\d+)(?=[._-]|$)")
_STEP: Final = re.compile(
    r"(?:global_?step|step|iter(?:ation)?|checkpoint|ckpt|update|epoch|ep|ba)[ ._=-]?(\d+)",
    re.IGNORECASE,
)
_BEGUN: Final = re.compile(rf"(?:^|[ ._-]){_STEP.pattern}", re.IGNORECASE)
_ALONE: Final = re.compile(r"(?:^|[ ._-])(\d+)(?=[ ._-]|$)")

_SAID: Final = re.compile(r"([A-Za-z]*)[ ._=-]*(?P<number>\d+)(?P<size>[kmbKMB](?![A-Za-z]))?")
"""A number, the word before it, and the letter for thousands or millions behind it."""

_COUNT: Final = re.compile(
    r"\w*(steps?|iters?|iterations?|checkpoint|ckpt|updates?|epochs?|ep|ba|batch)", re.IGNORECASE
)
_APART: Final = re.compile(
    r"run|exp|experiment|trial|attempt|job|task|seed|fold|version|layer|block|stage|part|shard"
    r"|expert|member|replica",
    re.IGNORECASE,
)
"""Words for what is no time: a number behind one tells another run, or a part of the same step."""


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


def given(name: str) -> int | None:
    """The step of a directory that is looked at by itself: its name may be of anything, so that it
    counts only behind a word for steps that begins there or stands by itself.
    """
    found = _BEGUN.search(name)
    return int(found[1]) if found is not None and len(found[1]) < 19 else None


def stepped(path: str) -> bool:
    """Whether a name says a step by a word for one."""
    return _STEP.search(unranked(path)) is not None


def doubt(newer: str, older: str, *, confirmed: bool) -> str:
    """Why names do not tell that one checkpoint is newer than another; empty where they do.

    ``confirmed``: what is in both says the steps as well, so that a loss in the names is no doubt.
    """
    mine, other = ([*_SAID.finditer(path)] for path in (newer, older))
    if _NUMBER.sub("#", newer) != _NUMBER.sub("#", older):
        said, known = ({one[1].lower(): int(one[2]) for one in each} for each in (mine, other))
        words = [word for word in said if said[word] != known.get(word, said[word])]
        apart = [word for word in words if _APART.fullmatch(word)]
        return f"they are of two {apart[0]}s" if apart else ""
    differ = [
        (match, _COUNT.fullmatch(match[1]) is not None, now, then)
        for match, one in zip(mine, other, strict=True)
        if (now := int(match[2])) != (then := int(one[2]))
    ]
    for match, counts, _, _ in differ:
        if _APART.fullmatch(match[1]) or (match["size"] and not counts):
            return f"{match[0]} may be of another run, or a part"
        if not confirmed and re.search(r"\d\.$", newer[: match.start("number")]):
            return "their numbers may be scores, or versions"
    falls = any(counts and now < then for _, counts, now, then in differ)
    several = len({(now, then) for _, _, now, then in differ}) > 1
    if falls or (several and not confirmed and not all(counts for _, counts, _, _ in differ)):
        return "more than one number differs, and which of them counts is not said"
    return ""


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
