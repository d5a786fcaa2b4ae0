"""Distributed checkpoints of torch.

A directory with ``.metadata``, which is renamed into place last (torch 2.13,
torch/distributed/checkpoint/filesystem.py, ``_FileSystemWriter.finish``), and ``__RANK_N.distcp``
files; or, saved without collectives, with an index a rank. Nothing in a file says which save it is
of: over an older checkpoint of the same layout, files of two saves make one that loads. What can be
seen of that are counts that go apart by files, and times: rank 0's file mostly has no counts, since
what all ranks have is written by the one that has least to write so far (default_planner.py,
``dedup_save_plans``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import combinations, pairwise
from typing import Any, Final

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import latest
from handfast.audit.formats.distcp import (
    Index,
    Item,
    Stored,
    misplaced,
    read_index,
    read_value,
)
from handfast.audit.formats.names import gaps, given, joined, numbered, parent, runs
from handfast.audit.formats.parts import aside
from handfast.audit.formats.series import apart
from handfast.audit.formats.states import Piece, Said, Split, read_state
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Step, Tensor
from handfast.audit.place import Place
from handfast.errors import HandfastError
from handfast.store.objects import child

__all__ = ["INDEX", "find", "folders", "own_files", "read_step"]

INDEX: Final = ".metadata"
TEMPORARY: Final = ".metadata.tmp"
_RANKED: Final = re.compile(r"__(\d+)(_\d+)?\.(distcp|metadata)")
_SHARD: Final = re.compile(r"__(\d+)_\d+\.distcp")

LATE: Final = 10.0
"""Seconds that a file may be newer than its index: copies are made in any order."""

_COMMIT: Final = ".metadata, which is renamed into place when all ranks have written"
_EXTRA: Final = "no item of the index lies in it: of a save by more ranks, or another one"
_LOADS: Final = (
    "torch.distributed.checkpoint.load reads the index of the directory that it is given (torch "
    "2.13, filesystem.py, FileSystemReader.read_metadata)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield what there is: the steps of a run as one, by the names of their directories."""
    for root, group in runs(folders(place)):
        steps = [read_step(place, folder) for folder in group]
        for step in steps:
            step.free = True
        for step, finding in apart(steps):
            step.findings = [*step.findings, finding]
        resume = [Resume("all ranks", step.path or ".", _LOADS) for step in steps if step.committed]
        own = (path for folder in group for path in own_files(place, folder))
        files = frozenset((*own, *latest.trackers(place, root)))
        told = [*latest.wrong(place, root, steps)]
        yield Found("torch DCP", root, steps, resume if len(steps) == 1 else (), files, told)


def own_files(place: Place, folder: str) -> list[str]:
    """The files of a checkpoint in its directory: indices and shards."""
    return [path for path in place.within(folder) if path in place.files and _ours(path)]


def folders(place: Place) -> list[str]:
    """The directories that have an index, or shards that wait for one."""
    return sorted({parent(path) for path in place.files if _ours(path)})


def _ours(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in (INDEX, TEMPORARY) or _RANKED.fullmatch(name) is not None


def read_step(place: Place, folder: str) -> Step:
    """Read one directory: its index or indices, and each file by what they say of it."""
    here = {path.rpartition("/")[2]: path for path in place.within(folder) if path in place.files}
    names, missing = _indices(here)
    parts: list[Part] = []
    findings = list(_left(here))
    scaled = False
    placed: set[str] = set()
    for name in names:
        try:
            index = read_index(place, here[name])
        except HandfastError as error:
            file = place.files[here[name]]
            parts.append(Part(here[name], {}, file.nbytes, file.saved, problem=str(error)))
            continue
        of_it, wrong, says = _of_index(place, folder, index)
        placed |= {item.file for item in index.items}
        parts += of_it
        findings += [*wrong, *_incomplete(index), *_renamed(folder, here[name], index)]
        findings += _coded(index, here[name])
        missing += [(joined(folder, file), why) for file, why in _lost(index, here)]
        scaled = scaled or says.scaled
    stray = [path for file, path in here.items() if _SHARD.fullmatch(file) and file not in placed]
    parts += [_part(place, path, [], "")[0] for path in stray]
    findings += [*_apart(parts), *_late(place, folder, parts)]
    extra = [(path, _EXTRA) for path in stray if placed and place.files[path].nbytes]
    committed = any(name != TEMPORARY for name in names)
    told = [msgspec.structs.replace(finding, step=folder) for finding in findings]
    number = numbered(folder) if folder else given(place.called)
    return Step(folder, number, parts, missing, extra, _COMMIT, committed, scaled, told)


def _of_index(place: Place, folder: str, index: Index) -> tuple[list[Part], list[Finding], Said]:
    """The files of one index, with what lies in them."""
    problems: dict[str, str] = {}
    said, where, beside = _read(place, folder, index, problems)
    by_file: dict[str, list[Item]] = defaultdict(list)
    for item in index.items:
        by_file[joined(folder, item.file)].append(item)
    parts, findings = [], []
    for path in sorted(by_file):
        if path in place.files:
            items = sorted(by_file[path], key=lambda item: item.start)
            part, wrong = _part(place, path, items, problems.get(path, ""))
            parts.append(part)
            findings += wrong
    said.valueless += dict.fromkeys(_at(index, item.name) for item in index.items if item.coded)
    _deal(parts, said, where)
    if parts:
        parts[0].aside = beside
    return parts, findings, said


def _lost(index: Index, here: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The files that an index names and that are not there."""
    lost = [item.file for item in index.items if item.file not in here]
    for file in dict.fromkeys(lost):
        yield file, f"by the index, {lost.count(file)} items lie in it"


def _indices(here: Mapping[str, str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The names of the indices: of all ranks, or of each; or one that was not put into place.

    And those of ranks that have none, where others have.
    """
    if INDEX in here:
        return [INDEX], []
    each = sorted((int(m[1]), n) for n in here if (m := _RANKED.fullmatch(n)) and not m[2])
    if not each:
        return [name for name in (TEMPORARY,) if name in here], []
    lost = gaps({rank for rank, _ in each})
    folder = parent(here[each[0][1]])
    missing = [(joined(folder, f"__{n}.metadata"), "ranks behind it have an index") for n in lost]
    return [name for _, name in each], missing


def _left(here: Mapping[str, str]) -> Iterator[Finding]:
    """A temporary index: of a save that did not end."""
    if TEMPORARY not in here:
        return
    says = (
        "a later save into this directory wrote its index and did not put it into place: the files "
        "may be that save's, and the index is not"
        if INDEX in here
        else "a save wrote its index and did not put it into place; renamed to .metadata it is the "
        "one that is missing, if all files fit it"
    )
    yield Finding(Code.LEFTOVER, Strength.STRONG, "", says, (here[TEMPORARY],))


def _renamed(folder: str, path: str, index: Index) -> Iterator[Finding]:
    """A directory that had another number when it was written; people rename them."""
    now, then = numbered(folder), numbered(index.folder)
    if None not in (now, then) and now != then:
        says = f"its index was written into a directory that was called {index.folder}"
        yield Finding(Code.INDEX, Strength.HINT, "", says, (path,))


def _coded(index: Index, path: str) -> Iterator[Finding]:
    """Values that are not read, since an extension of DCP has changed their bytes."""
    coded = [item.name for item in index.items if item.coded]
    if coded:
        says = (
            f"{len(coded)} items were encoded by an extension of DCP, as compression is one, and "
            "their values were not read"
        )
        yield Finding(Code.UNREAD, Strength.HINT, "", says, (path,), tuple(coded[:6]))


# What the items say


def _read(
    place: Place, folder: str, index: Index, problems: dict[str, str]
) -> tuple[Said, dict[str, str], list[str]]:
    """Read the state, as it was before it was flattened; the file of each name in it; and what of
    it is aside.
    """
    leaves: dict[str, Any] = {}
    where: dict[str, str] = {}
    split: dict[str, list[Piece]] = defaultdict(list)
    places: dict[str, str] = {}
    known: dict[Any, Stored] = {}  # one item under many names is looked at once
    for item in index.items:
        path = joined(folder, item.file)
        there = path in place.files
        whole = index.tensors.get(item.name)
        where.setdefault(item.name, path)
        if item.coded:
            places[_at(index, item.name)] = path
        elif whole is not None and item.offset is not None:
            shape = whole.chunks.get(item.offset)
            if there and shape is not None:
                own = Stored(place, path, item, whole.dtype, shape)
                stored = known.setdefault((*item[2:], whole.dtype, shape), own)
                split[item.name].append(Piece(stored, whole.shape, item.offset))
                leaves.setdefault(item.name, None)  # in the order of the index
        elif there:
            try:
                leaves[item.name] = read_value(place, path, item)
            except HandfastError as error:
                problems.setdefault(path, str(error))
    leaves |= {name: Split(tuple(found)) for name, found in split.items()}
    root = _Branch()
    for name, leaf in leaves.items():
        _put(root, index.paths.get(name, (name,)), leaf)
        places[_at(index, name)] = where[name]
    state = _listed(root)
    try:
        said = read_state(state, memory=place.reader.room)
    except HandfastError as error:
        problems |= {path: problems.get(path, str(error)) for path in where.values()}
        return Said(), places, []
    return said, places, aside(state, said)


def _at(index: Index, name: str) -> str:
    """The path of a name in the state."""
    return reduce(child, index.paths.get(name, (name,)), "")


class _Branch(dict[Any, Any]):
    """A dict that was flattened; others are in values that were pickled whole."""


def _put(root: _Branch, at: Sequence[str | int], leaf: Any) -> None:
    """Put a leaf where its path leads; what is there already stays, as no save has two."""
    node = root
    for key in at[:-1]:
        inner = node.setdefault(key, _Branch())
        if type(inner) is not _Branch:
            root.setdefault(".".join(map(str, at)), leaf)
            return
        node = inner
    node.setdefault(at[-1], leaf)


def _listed(node: Any) -> Any:
    """Dicts whose keys are numbers were lists."""
    if type(node) is not _Branch:
        return node
    made = {key: _listed(part) for key, part in node.items()}
    if made and all(type(key) is int for key in made):
        return [made[key] for key in sorted(made)]
    return made


def _deal(parts: Sequence[Part], said: Said, where: Mapping[str, str]) -> None:
    """Give each part the tensors and the counters that lie in its file."""
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    counters: dict[str, list[Counter]] = defaultdict(list)
    valueless: dict[str, list[str]] = defaultdict(list)
    for tensor in said.tensors:
        own = tensor.values.path if type(tensor.values) is Stored else _home(tensor.path, where)
        tensors[own].append(tensor)
    for path, counter in said.counters:
        counters[_home(path, where)].append(counter)
    for path in said.valueless:
        valueless[_home(path, where)].append(path)
    for part in parts:
        part.tensors, part.counters = tensors[part.path], counters[part.path]
        part.betas, part.valueless = said.betas, valueless[part.path]


def _home(path: str, where: Mapping[str, str]) -> str:
    """The file that a path's value lies in, which may have been pickled whole."""
    at = path
    while at and at not in where:
        at = at[: max(at.rfind("/"), at.rfind("["), 0)]
    return where.get(at, "")


def _part(
    place: Place, path: str, items: Sequence[Item], problem: str
) -> tuple[Part, list[Finding]]:
    """One file, held against its items: they begin at 0 and follow one another to the end."""
    file = place.files[path]
    match = _SHARD.fullmatch(path.rpartition("/")[2])
    part = Part(path, {"rank": int(match[1])} if match else {}, file.nbytes, file.saved)
    end = max((item.start + item.nbytes for item in items), default=0)
    if file.nbytes < end:
        lost = sum(item.start + item.nbytes > file.nbytes for item in items)
        part.problem = (
            f"{place.absolute(path)}: byte {file.nbytes:,}: the file ends there, and {lost} of its "
            f"{len(items)} items end later, at byte {end:,} the last. What to do: take another step"
        )
        return part, []
    part.problem = problem
    findings = []
    try:
        wrong = [item for item in items if misplaced(place, path, item)]
    except HandfastError as error:
        part.problem = part.problem or str(error)
        return part, []
    tiled = all(one.start + one.nbytes == two.start for one, two in pairwise(items))
    if wrong:
        part.problem = ""
        says = (
            f"{len(wrong)} of the {len(items)} items in {path} do not lie where the index says: "
            "the two are of different saves, or one is damaged"
        )
        told = tuple(f"{item.name} at byte {item.start:,}" for item in wrong[:6])
        findings.append(Finding(Code.INDEX, Strength.CERTAIN, "", says, (path,), told))
    elif items and (not tiled or items[0].start or file.nbytes > end):
        says = (
            f"{path} has bytes that no item of the index takes, or takes twice; no save leaves any"
        )
        findings.append(Finding(Code.INDEX, Strength.STRONG, "", says, (path,)))
    return part, findings


def _incomplete(index: Index) -> Iterator[Finding]:
    """Find tensors that the index itself does not have all of."""
    there = {(item.name, item.offset) for item in index.items}
    lost = []
    for name, whole in index.tensors.items():
        if not whole.covered or any((name, at) not in there for at in whole.chunks):
            lost.append(name)
    if lost:
        says = f"the index lacks chunks of {len(lost)} tensors, which no save leaves out"
        yield Finding(Code.INDEX, Strength.CERTAIN, "", says, (), tuple(lost[:6]))


def _apart(parts: Sequence[Part]) -> Iterator[Finding]:
    """Find files whose parameters have one count each, and not the same.

    A parameter that got gradients later has a smaller count in sound checkpoints as well, mostly
    beside others in a file. If it comes to lie alone, what is behind is a layer, or all biases and
    nothing else: so it is strong only where counts part what is of one module, and of one kind.
    """
    counts: dict[int, list[tuple[str, list[str]]]] = defaultdict(list)
    for part in parts:
        own = [counter for counter in part.counters if counter.clock is Clock.PARAMETER]
        if len({counter.value for counter in own}) > 1:
            return
        if own:
            counts[own[0].value].append((part.path, [counter.path for counter in own]))
    if len(counts) < 2:
        return
    fewest = min(counts.values(), key=len)
    told = tuple(
        f"{path}: {len(names)} parameters after {value} updates"
        for value, found in counts.items()
        for path, names in found
    )
    names = [[name for _, own in found for name in own] for found in counts.values()]
    alike = all(_kin(one, other) for one, other in combinations(names, 2))
    yield Finding(
        Code.COUNTERS,
        Strength.STRONG if alike else Strength.HINT,
        "",
        "its files are of different steps: their parameters had "
        f"{', '.join(map(str, sorted(counts)))} updates, by files",
        tuple(path for path, _ in fewest),
        told[:6],
    )


def _kin(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two rows of parameters have some of one module, and some of one kind."""
    modules, kinds = (
        {name.rpartition(".")[at] for name in one} & {name.rpartition(".")[at] for name in other}
        for at in (0, 2)
    )
    return bool(modules and kinds)


def _late(place: Place, folder: str, parts: Sequence[Part]) -> Iterator[Finding]:
    """Find files that are newer than the index, which is written when all of them are."""
    path = joined(folder, INDEX)
    if path not in place.files:
        return
    late = [part.path for part in parts if part.saved > place.files[path].saved + LATE]
    if late:
        says = (
            f"{len(late)} of {len(parts)} files were written after the index, which is written "
            "last: they may be of a later save that did not end"
        )
        yield Finding(Code.TIMES, Strength.HINT, "", says, tuple(late[:6]))
