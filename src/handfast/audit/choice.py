"""Which checkpoint of those at a path is meant, where somebody wants one: never a guess.

And whether it is one: sound, and not of two steps by what its own files count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from handfast.audit.checks import Look, check
from handfast.audit.checks.counters import TOGETHER
from handfast.audit.counted import counted
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.names import doubt, joined, numbered, parent, unranked
from handfast.audit.found import Clock, Found, Step
from handfast.audit.place import Place
from handfast.core.verdict import Verdict
from handfast.errors import Refused

__all__ = ["Chosen", "choose", "refuse_unsound"]


class Chosen(NamedTuple):
    """The checkpoint that is taken, of which format's, why that one; its step, None: not told."""

    step: Step
    found: Found
    why: str
    number: int | None


def choose(every: Sequence[Found], number: int | None, place: Place, path: str) -> Chosen:
    """The step that was asked for, or the newest. Where that is not clear nothing is guessed.

    A step is what the files count, and else what a name says; either may be asked for.
    """
    if number is None and place.folders:  # else one file was given
        _refuse_unread(every)
    there = [(one, found) for found in every for one in found.steps]
    fit = [(one, found) for one, found in there if number in (None, _number(one))]
    named = [(one, found) for one, found in fit or there if number == one.number]
    fit = named if number is not None and named else fit
    known = ", ".join(_called(one, found) for one, found in there) or "nothing"
    if not fit:
        raise Refused(
            f"{path} holds no checkpoint" + ("" if number is None else f" of step {number}"),
            verdict=Verdict.MISSING,
            remedy=f"`handfast audit` shows what is there: {known}",
        )
    if len({id(found) for _, found in fit}) > 1:
        raise _unclear(f"{path} holds checkpoints of several runs", fit)
    if number is None:
        _refuse_unseen(place.unseen, fit)
    if len(fit) == 1:
        return _chosen(*fit[0], "the only one" if len(there) == 1 else f"the one of step {number}")
    if any(one.number is None for one, _ in fit):
        raise _unclear("nothing says which of these is the newest", fit)
    most = max(one.number or 0 for one, _ in fit)
    newest = [(one, found) for one, found in fit if one.number == most]
    taken = [resume.step for resume in newest[0][1].resume][:1]
    if len(newest) > 1:
        newest = [pair for pair in newest if pair[0].path in taken] or newest
        if len(newest) > 1:
            raise _unclear(f"several are of step {most}", newest)
        return _chosen(*newest[0], f"of those of step {most} the one that a resume would take")
    _refuse_doubtful(newest[0][0], fit)
    told = [finding.says for finding in newest[0][1].findings if finding.code is Code.TRACKER]
    return _chosen(*newest[0], "; though ".join([f"the newest of {known}", *told[:1]]))


def _chosen(step: Step, found: Found, why: str) -> Chosen:
    number, said = _number(step), counted(step)
    if said is not None and number != step.number:
        why = f"{why}; {said.where}"
    return Chosen(step, found, why, number)


def _number(step: Step) -> int | None:
    """The step by the files, where they say more than that a name begins to count at 1, or at 0."""
    said = counted(step)
    if said is None or (step.number is not None and abs(said.value - step.number) <= 1):
        return step.number
    return said.value


def _refuse_unread(every: Sequence[Found]) -> None:
    """Refuse where a format could not be read at all, so that nobody knows what there is of it."""
    alone = [finding for found in every if not found.steps for finding in found.findings]
    failed = [f for f in alone if f.code is Code.UNREADABLE and f.strength is not Strength.HINT]
    if failed:
        raise Refused(
            "what can't be read there may be newer, or what is meant",
            verdict=Verdict.FOREIGN,
            shards=[finding.says for finding in failed],
            remedy="give the path of the file that is meant, or --step",
        )


def _refuse_unseen(unseen: Mapping[str, str], fit: Sequence[tuple[Step, Found]]) -> None:
    """Refuse where beside a candidate something was not looked at, which may be a newer one.

    Beside one that has no number, only what has one: a step by itself may have links in it.
    """
    beside = {place for one, found in fit if one.path for place in (parent(one.path), found.root)}
    steps = any(one.number is not None for one, _ in fit)
    hidden = [
        folder
        for folder in unseen
        if parent(folder) in beside and (steps or numbered(folder) is not None)
    ]
    if hidden:
        raise Refused(
            f"what lies beside these may be newer, and was {unseen[hidden[0]]}",
            verdict=Verdict.FOREIGN,
            shards=hidden,
            remedy="give the path of the one that is meant, or --step",
        )


def _refuse_doubtful(newest: Step, fit: Sequence[tuple[Step, Found]]) -> None:
    """Refuse a newest one whose name may mean another thing, or whose files have counted less."""
    counts = _counts(newest)
    known = newest.number in counts.values()
    for other, _ in fit:
        if other is newest:
            continue
        theirs = _counts(other)
        sure = known and other.number in theirs.values()
        why = doubt(_name(newest), _name(other), confirmed=sure)
        for what, value in theirs.items():
            if counts.get(what, value) < value:
                why = why or f"{what[1]} in the files is {counts[what]} and {value}"
        if why:
            raise _unclear(f"which of these is the newest is not clear: {why}", fit)


def _name(step: Step) -> str:
    """What a step's name is: of one that is several files of a directory, that of the first."""
    path = step.parts[0].path if step.guessed and step.parts else step.path
    return joined(parent(path), unranked(path))


def _counts(step: Step) -> dict[tuple[Clock, str], int]:
    """What a step's files say that they have counted: the greatest value of each."""
    counts: dict[tuple[Clock, str], int] = {}
    for counter in (counter for part in step.parts for counter in part.counters):
        if counter.clock in (Clock.TRAINER, Clock.OPTIMIZER):
            what = counter.clock, counter.path
            counts[what] = max(counter.value, counts.get(what, counter.value))
    return counts


def _called(step: Step, found: Found) -> str:
    number = _number(step)
    return str(number) if number is not None else step.path or found.root or "it"


def _unclear(what: str, fit: Sequence[tuple[Step, Found]]) -> Refused:
    """The error where one of several would have to be chosen."""
    return Refused(
        what,
        verdict=Verdict.FOREIGN,
        shards=[f"{found.format}: {one.path or found.root or '.'}" for one, found in fit],
        remedy="give the path of one of them, or --step where its name or its files say a step; "
        "`handfast audit` says what speaks against each",
    )


def refuse_unsound(chosen: Chosen, looking: Look, *, trust: bool = False) -> None:
    """Refuse a step against which anything certain or strong speaks.

    And one whose counts contradict each other or its name, though that is but a hint, unless
    somebody knows better (``trust``).
    """
    step, found = chosen.step, chosen.found
    told = list(check(found, looking, only=step))
    name = step.path or "it"
    bad = [finding for finding in told if finding.strength is not Strength.HINT]
    if bad:
        raise Refused(
            f"{name} is not sound",
            verdict=Verdict.CORRUPT,
            shards=[f"{finding.strength}: {finding.says}" for finding in bad],
            remedy="adopt another step; `handfast audit --deep` has the evidence",
        )
    mixed = [f for f in told if f.code is Code.COUNTERS and not f.says.endswith(TOGETHER)]
    if mixed and not trust:
        raise Refused(
            f"{name} is of two steps, by what it counts",
            verdict=Verdict.MIXED,
            shards=[finding.says for finding in mixed],
            remedy="adopt another one, or the sound file by its own path; --trust takes it as it "
            "is, if you know why (gradients were accumulated, updates skipped, it was renamed)",
        )
