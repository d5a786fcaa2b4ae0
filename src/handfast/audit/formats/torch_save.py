"""Files of ``torch.save`` that no other format knows, one or one a rank; and full state dicts.

What is in them is for whoever wrote them to say: names give ranks and steps, and which files are of
one step (:mod:`handfast.audit.formats.series`), keys the rest. So no
count of theirs is one of updates for certain, no resume is known, and what names and keys are
taken to mean makes hints: "rank16" may be LoRA's. A file whose optimizer's
state goes by parameters' names is a *full state dict*, as FSDP gathers it for one rank to write
(torch 2.13, distributed/fsdp/fully_sharded_data_parallel.py, ``optim_state_dict``;
distributed/checkpoint/state_dict.py, ``StateDictOptions(full_state_dict=True)``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import gcd
from typing import Final

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import latest, states
from handfast.audit.formats.names import given, numbered, parent, ranked, unranked
from handfast.audit.formats.parts import Read, torch_part
from handfast.audit.formats.series import Files, apart, fewer, lacking, own_counts, series
from handfast.audit.found import Found, Step
from handfast.audit.place import Place
from handfast.audit.torch_file import Kind, recognise
from handfast.errors import HandfastError

__all__ = ["find"]

_OURS: Final = re.compile(r".*\.(pt|pth|pth\.tar|pt\.tar|ckpt|t7)", re.IGNORECASE)
"""Endings that torch's files have; whatever else is in one of these is a file that was damaged."""

_LEFT: Final = re.compile(
    r".*\.(pt|pth|ckpt|bin)[._-]?(tmp|temp|part|partial|incomplete)\w*", re.IGNORECASE
)

_MARKER: Final = re.compile(
    r"[._-]*(done|success|completed?|finished|ready|ok|saved|committed|latest)[._-]*(\.\w+)+",
    re.IGNORECASE,
)
"""Names of files that say something by being there."""

_INSIDE: Final = frozenset({Kind.ZIP, Kind.LEGACY})
_FOREIGN: Final = frozenset({Kind.PICKLE, Kind.UNKNOWN})
"""What another program may have written: not torch's, and not nothing."""

_OTHERS: Final = frozenset({Kind.SCRIPT, Kind.EXPORTED, Kind.PACKAGE, Kind.TAR, Kind.OTHER_ZIP,
                            Kind.SAFETENSORS})  # fmt: skip

MOST_RANKS: Final = 1 << 16
"""Ranks that a name may speak of, so that the missing ones can be listed."""


def find(place: Place) -> Iterator[Found]:
    """Yield the files of each run as one: of one name but for numbers, in one directory or in
    directories of one name but for numbers.
    """
    left = [path for path in place.files if _LEFT.fullmatch(path)]
    units: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in place.files:
        if _is_marker(place, path):
            yield Found("torch.save", parent(path), files=frozenset({path}), findings=[_mark(path)])
        elif path not in left and _is_ours(place, path):
            units[parent(path), unranked(path)].append(path)
    for root, steps in series(units).items():
        files = [path for step in steps for paths in step.values() for path in paths]
        if all(_kind(place, path) in _FOREIGN for path in files):
            told = [_foreign(path) for path in files]
            yield Found("torch.save", root[0], files=frozenset(files), findings=told)
        else:
            yield _found(place, root[0], steps, left)


def _is_ours(place: Place, path: str) -> bool:
    """Whether torch.save wrote a file, or its name says that it should have."""
    kind = _kind(place, path)
    named = _OURS.fullmatch(path) is not None
    return kind in _INSIDE or (named and kind not in _OTHERS)


def _is_marker(place: Place, path: str) -> bool:
    """Whether a file is empty that would be torch's by its ending, and by its name is to be so."""
    named = _MARKER.fullmatch(path.rpartition("/")[2]) and _OURS.fullmatch(path)
    return bool(named) and _kind(place, path) is Kind.EMPTY


def _mark(path: str) -> Finding:
    says = "it is empty, as files are that only mark something; if it was a checkpoint it is lost"
    return Finding(Code.UNREADABLE, Strength.HINT, path, says, (path,))


def _kind(place: Place, path: str) -> Kind | None:
    """What a file is; None where that can't be read."""
    try:
        return recognise(place.reader, place.absolute(path))
    except HandfastError:
        return None


def _foreign(path: str) -> Finding:
    says = "it is named as files of torch.save are, and is none: overwritten, or another program's"
    return Finding(Code.UNREADABLE, Strength.HINT, path, says, (path,))


def _found(place: Place, root: str, steps: Sequence[Files], left: Sequence[str]) -> Found:
    made = [(*_step(place, files), files) for files in steps]
    made.sort(key=lambda one: (one[0].number or 0, one[0].path))
    full = all(named and len(step.parts) == 1 for step, named, _ in made)
    mine = [step for step, _, _ in made]
    both = [(step, own) for step, _, own in made]
    for step, finding in (*lacking(both), *fewer(both), *apart(mine)):
        step.findings = [*step.findings, finding]
    files = frozenset(path for step in steps for paths in step.values() for path in paths)
    after = [path for path in left if any(path.startswith(file) for file in files)]
    findings = [*map(_left_over, after), *latest.wrong(place, root, mine)]
    files |= {*after, *latest.trackers(place, root)}
    name = "FSDP full state dict" if full else "torch.save"
    return Found(name, root, mine, (), files, findings)


def _left_over(path: str) -> Finding:
    says = "a save wrote under another name first, and did not come to its renaming"
    return Finding(Code.LEFTOVER, Strength.HINT, path, says, (path,))


def _step(place: Place, files: Files) -> tuple[Step, bool]:
    """The files of one step, a rank each; and whether its optimizer goes by names."""
    paths = [path for own in files.values() for path in own]
    folder, number = parent(paths[0]), numbered(paths[0])
    flat = number is not None and number != numbered(folder)  # beside the files of other steps
    path = paths[0] if len(paths) == 1 or flat else folder or paths[0]
    if number is None:
        number = numbered(folder) if folder else given(place.called)
    step = Step(path, number, guessed=True, free=True)
    parts, full = [], False
    findings: list[Finding] = []
    for name, own in files.items():
        member = name if len(files) > 1 else ""
        reads = [_read(place, one, member, several=len(own) > 1) for one in own]
        worlds = {size for size in map(_world, own, reads) if size}
        parts += [read.part for read in reads]
        step.scaled = step.scaled or any(read.said.scaled for read in reads)
        full = full or any(read.said.named and read.said.counters for read in reads)
        findings += _missing(path, own, worlds)
    step.parts, step.findings = parts, findings
    return step, full


def _read(place: Place, path: str, member: str, *, several: bool) -> Read:
    """One file; what it counts is its member's own, and its rank's."""
    rank = ranked(path)
    within = " ".join(filter(None, (member, f"rank {rank[0]}" if rank and several else "")))
    read = torch_part(place, path, within=within)
    _facts(read, rank)
    if member:
        read.part.counters = own_counts(member, read.part.counters)
    return read._replace(root=None)  # of all files of a run it would be too much


def _world(path: str, read: Read) -> int:
    """How many ranks there are, by a file's name or what is in it."""
    rank = ranked(path)
    return rank[1] if rank and rank[1] else int(read.part.facts.get("the world's size", 0))


def _facts(read: Read, rank: tuple[int, int] | None) -> None:
    """What a part says of the job: the world's size, and the run."""
    root = read.root if type(read.root) is dict else {}
    world = read.said.world or states.number(root.get("world_size"))
    if rank is not None:
        read.part.rank = {"rank": rank[0]}
        if type(world) is int:
            read.part.facts = {"the world's size": world}
    run = root.get("run_id")
    read.part.run = run if type(run) is str else ""


def _missing(step: str, paths: Sequence[str], worlds: set[int]) -> Iterator[Finding]:
    """The files of ranks that others leave a gap for: each, or every eighth if that is usual.

    Where names or files tell how many ranks there are, the last ones too. Strong where ranks begin
    at 0 and most are there; else the numbers may be of anything: LoRA's ranks, folds, the one rank
    that saves.
    """
    ranks = {found[0]: path for path in paths if (found := ranked(path)) is not None}
    if not ranks:
        return
    world = worlds.pop() if len(worlds) == 1 else 0
    top, low = max(ranks), min(1, *ranks)
    every = gcd(*ranks) or 1
    end = max(top + 1, world + low if every == 1 else 0)
    if end > MOST_RANKS or (len(ranks) == 1 and not world):
        return
    gone = [rank for rank in range(low, end, every) if rank not in ranks]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        why = f"of {world} ranks" if world else f"rank {top} has one"
        says = f"rank {gone[0]}'s file beside {ranks[top]}{more} is missing: {why}"
        most = 0 in ranks and len(ranks) > len(gone)
        strength = Strength.STRONG if most else Strength.HINT
        yield Finding(Code.MISSING, strength, step, says)
