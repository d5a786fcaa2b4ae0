"""Steps of somebody's own making whose state lies in several files: which are of one step.

``step_100/model.pt`` beside ``step_100/optimizer.pt``, or ``model_100.pt`` beside
``optimizer_100.pt``: the members of a step. Each may be of several ranks, a file each. Names are
anybody's to choose, so files are put together only where a directory says that it is a step's, or
where names are one but for a word of which one never stands alone: an optimizer's, a scheduler's.
So ``final/model.pt`` with ``final/optimizer.pt`` is a step, too.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from handfast.audit.counted import goes_with
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.names import blank, joined, numbered, parent, ranked, stepped
from handfast.audit.found import Clock, Step
from handfast.audit.found import Counter as Count

__all__ = ["Files", "apart", "fewer", "lacking", "own_counts", "series"]

_AIDE: Final = r"optim(?:izer)?s?|opt|(?:lr_?)?sched(?:uler)?s?|(?:grad_?)?scaler|rng(?:_states?)?"
_ROLE: Final = re.compile(
    rf"(?<![a-z])(?:(?P<aide>{_AIDE})|model|net(?:work)?|weights?|params?|state(?:_dict)?|ema)"
    r"(?![a-z])",
    re.IGNORECASE,
)
_EXTRA: Final = re.compile(r"best|last|final|ema", re.IGNORECASE)
"""Words for what a step need not have."""

_NUMBER: Final = re.compile(r"\d+")

_MADE: Final = (Clock.OPTIMIZER, Clock.SCHEDULER)

Files = Mapping[str, Sequence[str]]
"""The members of a step by their names without numbers, each with its files, one a rank."""

_Key = tuple[str, str, str]


def series(units: Mapping[tuple[str, str], Sequence[str]]) -> dict[_Key, list[Files]]:
    """Put files together to steps, and steps to runs; the first word of a run's key is its place.

    ``units`` are files of one directory and of one name but for ranks. Steps differ by numbers
    only, in their files' names or else in their directories', whose number the files may repeat.
    What has no number is a step by itself, and so are the roles of one state without one.
    """
    flat: dict[tuple[str, str], dict[str, dict[str, Sequence[str]]]] = defaultdict(dict)
    found: dict[_Key, list[Files]] = defaultdict(list)
    folders: dict[str, dict[str, Sequence[str]]] = defaultdict(dict)
    alone: dict[tuple[str, str], dict[str, Sequence[str]]] = defaultdict(dict)
    said: dict[str, set[int]] = defaultdict(set)
    for folder, name in units:
        if (number := numbered(name)) is not None:
            said[folder].add(number)
    for (folder, own), paths in units.items():
        name = _repeating(own, said[folder], numbered(folder))
        if numbered(name) is not None:
            core = _ROLE.sub("*", blank(name))
            flat[folder, core].setdefault(blank(name), {})["/".join(_NUMBER.findall(name))] = paths
        elif folder and stepped(folder):
            folders[folder][name] = paths
        elif folder and numbered(folder) is not None:
            found[parent(folder), blank(folder), name].append({name: paths})
        else:
            alone[folder, _ROLE.sub("*", name)][name] = paths
    for (folder, core), members in alone.items():
        rows = [members] if _together(members) else [{name: members[name]} for name in members]
        for row in rows:
            found[folder, folder, core if len(row) > 1 else next(iter(row))].append(row)
    for folder, members in folders.items():
        found[parent(folder), blank(folder), ""].append(members)
    for (folder, core), names in flat.items():
        for key, steps in _flat(core, names):
            found[folder, "", key] += steps
    return found


def _flat(
    core: str, names: Mapping[str, Mapping[str, Sequence[str]]]
) -> Iterator[tuple[str, list[Files]]]:
    """The steps of files that lie beside each other: of each name by itself, or of roles."""
    if _together(names):
        numbers = dict.fromkeys(number for there in names.values() for number in there)
        yield (
            core,
            [
                {name: there[number] for name, there in names.items() if number in there}
                for number in numbers
            ],
        )
        return
    for name, there in names.items():
        yield name, [{name: paths} for paths in there.values()]


def _together(names: Collection[str]) -> bool:
    """Whether names that are one but for a word are of one state: some word never stands alone."""
    roles = [_ROLE.search(name) for name in names]
    return len(names) > 1 and any(role is not None and role["aide"] for role in roles)


def _repeating(name: str, there: set[int], number: int | None) -> str:
    """A name without its directory's number, where no file there says another one."""
    if there != {number}:
        return name
    return _NUMBER.sub(lambda found: "#" if int(found[0]) == number else found[0], name)


def own_counts(name: str, counters: Sequence[Count]) -> list[Count]:
    """A member's counters: each optimizer and each scheduler counts for itself.

    A parameter's goes by whose it is, as its moments do.
    """
    return [
        counter
        if counter.clock in (Clock.TRAINER, Clock.PARAMETER)
        else msgspec.structs.replace(counter, path=f"{name}: {counter.path}")
        for counter in counters
    ]


def lacking(steps: Sequence[tuple[Step, Files]]) -> Iterator[tuple[Step, Finding]]:
    """Find members that most steps have, and one has not.

    Strong where all others have it, two at least, and its name says that it is no extra: a best one
    is written only when there is one. Else older ones may have been thinned out.
    """
    have = Counter(name for _, files in steps for name in files)
    for name, count in have.items():
        without = [(step, files) for step, files in steps if name not in files]
        if count * 2 < len(steps):
            continue
        for step, files in without:
            usual = _ROLE.search(name) is not None and _EXTRA.search(name) is None
            strong = usual and len(without) == 1 and count > 1
            strength = Strength.STRONG if strong else Strength.HINT
            path = _path(name, next(iter(next(iter(files.values())))))
            says = f"{path} is missing: {count} other steps of this run have one"
            yield step, Finding(Code.MISSING, strength, step.path, says, (path,))


def _path(name: str, beside: str) -> str:
    """The path that a member would have beside another one's file."""
    said = (_NUMBER.findall(one.rpartition("/")[2]) for one in (beside, parent(beside)))
    numbers = iter(next(filter(None, said), []))
    return joined(parent(beside), re.sub("#", lambda _: next(numbers, "#"), name))


def fewer(steps: Sequence[tuple[Step, Files]]) -> Iterator[tuple[Step, Finding]]:
    """Find steps without the files of the last ranks, which other steps have.

    Strong where one step alone, of three at least, lacks them and has most, from rank 0 on; of the
    newest and of the oldest only if a single one lacks. A job that goes on with fewer ranks, or
    began with fewer, has fewer in several steps: nothing is said of these, nor of a step that says
    how many it has.
    """
    for name in dict.fromkeys(name for _, files in steps for name in files):
        rows = [(step, _ranks(files[name])) for step, files in steps if name in files]
        every = set().union(*(ranks for _, ranks in rows))
        for at, (step, there) in enumerate(rows):
            gone = sorted(rank for rank in every if rank > max(there, default=rank))
            having = [nth for nth, (_, ranks) in enumerate(rows) if ranks.issuperset(gone)]
            alone = len(having) == len(rows) - 1
            between = bool(having) and having[0] < at < having[-1]
            if not gone or _counted(step) or not (between or alone):
                continue
            most = 0 in there and len(there) > len(gone) and (between or len(gone) == 1)
            strong = alone and most and len(having) > 1
            strength = Strength.STRONG if strong else Strength.HINT
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            says = f"rank {gone[0]}'s file{more} is missing: {len(having)} other steps have one"
            yield step, Finding(Code.MISSING, strength, step.path, says)


def _ranks(paths: Sequence[str]) -> set[int]:
    return {found[0] for path in paths if (found := ranked(path)) is not None}


def _counted(step: Step) -> bool:
    """Whether a step's files, or their names, say how many ranks there are."""
    said = (part.facts or (ranked(part.path) or (0, 0))[1] for part in step.parts if part.rank)
    return any(said)


def apart(steps: Sequence[Step]) -> Iterator[tuple[Step, Finding]]:
    """Find steps whose optimizer or scheduler has counted what another step's has.

    That state, or all of the file, is then another step's. In all others, two at least, the count
    goes with the number in the name: at one distance, or in one proportion. Of schedulers only
    where a later one went on, as some end before the training does.
    """
    counts: dict[tuple[Clock, str], list[tuple[Step, str, int]]] = defaultdict(list)
    for step in steps:
        for part in step.parts if step.number else ():
            for counter in part.counters:
                if counter.clock in _MADE:
                    counts[counter.clock, counter.path].append((step, part.path, counter.value))
    for (clock, path), read in counts.items():
        by_value: dict[int, list[Step]] = defaultdict(list)
        for step, _, value in read:
            by_value[value].append(step)
        newest = max(read, key=lambda one: one[0].number or 0)
        for step, file, value in read:
            twin = next((one for one in by_value[value] if one is not step), None)
            if twin is None or (clock is Clock.SCHEDULER and value >= newest[2]):
                continue
            others = [(one.number or 0, other) for one, _, other in read if one is not step]
            if len(others) < 2 or not goes_with(others):
                continue
            if not goes_with([*others, (step.number or 0, value)]):
                says = (
                    f"{file} has made {value} updates ({path}), as that of {twin.path} has, and in "
                    f"the {len(others)} other steps the count goes with the number"
                )
                yield step, Finding(Code.COUNTERS, Strength.STRONG, step.path, says, (file,))
