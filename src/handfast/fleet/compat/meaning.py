"""What each rule says of the values at its two ends: the naive reading, which defines the rest.

:mod:`judge` asks it of what is, :mod:`choose` is held against it. A value is a text, ABSENT where
the fact is not there, or None where nobody could tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final, NamedTuple, TypeAlias

import msgspec

from handfast.fleet.compat.rules import (
    ABSENT,
    Adjacent,
    Exact,
    Matrix,
    Minimum,
    MustProbe,
    Probed,
    Rule,
    Rules,
    Scope,
)
from handfast.fleet.compat.versions import compare, read, sort_key, within

__all__ = [
    "Answer", "Results", "answer", "covers", "expanded", "gap", "needs", "place_of", "reads",
    "results",
]  # fmt: skip

Results: TypeAlias = Mapping[tuple[str, tuple[str, ...], tuple[str, ...]], bool]

_FIELD: Final = 1 << 60  # no field is as long: `read` takes 18 digits


class Answer(NamedTuple):
    """Whether a rule holds; None where that can't be told, and why."""

    holds: bool | None
    why: str = ""


def reads(rule: Rule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The facts that a rule reads at a pair's first node, and those at its second.

    A rule about a single value or node reads nothing at the second.
    """
    body = rule.body
    if isinstance(body, Minimum):
        return (body.fact, body.by) if body.by else (body.fact,), ()
    if isinstance(body, Matrix):
        return (body.client,), (body.server,)
    if isinstance(body, Adjacent):
        return body.facts[:1], body.facts[-1:]
    return body.facts, () if rule.scope is Scope.NODE else body.facts


def covers(name: str, fact: str) -> bool:
    """Whether a rule that says ``name``, a fact or a pattern, speaks of a fact."""
    return fact == name or (name.endswith("*") and fact.startswith(name[:-1]))


def expanded(rules: Rules, names: Iterable[str]) -> Rules:
    """Put in place of each pattern the facts of these names that fit it, a rule for each.

    All keep their rule's name. The pattern stays as one more of them: it has no value of its own,
    and is unknown on a node where all that it could stand for is.
    """
    bodies = [rule.body for rule in rules.rules]
    if not any(isinstance(body, Exact) and any(map(_wild, body.facts)) for body in bodies):
        return rules
    there = sorted(set(names))
    every = chain.from_iterable(_expanded(rule, there) for rule in rules.rules)
    return msgspec.structs.replace(rules, rules=tuple(every))


def _expanded(rule: Rule, names: Sequence[str]) -> Iterator[Rule]:
    body = rule.body
    if not isinstance(body, Exact) or body.below or not any(map(_wild, body.facts)):
        yield rule
        return
    found: dict[str, str] = {}
    for named in body.facts:
        for fact in (named, *(fact for fact in names if covers(named, fact))):
            found.setdefault(fact, named)
    for fact, named in found.items():
        of = named if _wild(named) else ""
        yield msgspec.structs.replace(rule, body=Exact((fact,), body.absent_differs, of))


def _wild(name: str) -> bool:
    return name.endswith("*")


def results(probed: Iterable[Probed]) -> Results:
    """Index what was probed; what failed once has failed."""
    found: dict[tuple[str, tuple[str, ...], tuple[str, ...]], bool] = {}
    for each in probed:
        key = (each.probe, each.client, each.server)
        found[key] = found.get(key, True) and each.passed
    return found


def place_of(body: Adjacent, value: str) -> int | None:
    """Where a version stands on a rule's scale; None where it has no place there."""
    if body.field is None:
        places = [n for n, release in enumerate(body.releases) if within(value, release)]
        return places[0] if places else None
    version = read(value)
    if version is None or len(version.numbers) < body.field:
        return None
    at = 0
    for number in version.numbers[: body.field]:
        at = at * _FIELD + number
    return at


def gap(rule: Rule, fact: str, value: str | None) -> str:
    """Say why a value alone keeps a rule from being judged; empty where it does not."""
    body = rule.body
    if value is None:
        return "it is unknown"
    if isinstance(body, Adjacent) and value != ABSENT and place_of(body, value) is None:
        if body.field is None:
            return f"{value} is none of the releases that the rule lists"
        return f"{value} has no field {body.field} that is a number"
    if isinstance(body, Minimum) and value != ABSENT:
        lows = (body.version,) if body.version else body.versions.values()
        for bound in body.versions if fact == body.by else lows:
            if compare(value, bound) is None:
                return f"{value} and {bound} can't be compared"
    return ""


def answer(
    rule: Rule, first: Sequence[str | None], second: Sequence[str | None], probed: Results
) -> Answer:
    """Read a rule at two ends whose values stand in the order of `reads`.

    Of one node both ends are its own. What is absent on either side is not judged, unless the
    rule says that it differs.
    """
    body = rule.body
    left, right = reads(rule)
    counts = isinstance(body, Exact) and body.absent_differs
    if not counts and ABSENT in (*first, *second):
        return Answer(True)
    if isinstance(body, Exact):  # two that differ break it, whatever a third may be
        known = {value for value in (*first, *second) if value is not None}
        if len(known) > 1:
            return Answer(False)
    for fact, value in zip((*left, *right), (*first, *second), strict=True):
        if why := gap(rule, fact, value):
            return Answer(None, why)
    a, b = [v or "" for v in first], [v or "" for v in second]
    if isinstance(body, Adjacent):
        return Answer(_near(body, a[0], b[0]))
    if isinstance(body, Minimum):
        return Answer(_reached(body, a))
    if isinstance(body, Matrix):
        return _listed(body, a[0], b[0])
    if isinstance(body, MustProbe):
        return _tried(rule, body, tuple(a), tuple(b), probed)
    return Answer(True)


def _near(body: Adjacent, a: str, b: str) -> bool:
    ahead = (place_of(body, a) or 0) - (place_of(body, b) or 0)  # both are there: see `gap`
    return -body.width <= ahead <= (0 if body.never_ahead else body.width)


def _reached(body: Minimum, values: Sequence[str]) -> bool:
    """Whether the first value is high enough for the version, or for where the second stands."""
    asked = [body.version] if body.version else []
    asked += [low for key, low in body.versions.items() if (compare(values[-1], key) or 0) >= 0]
    return all((compare(values[0], low) or 0) >= 0 for low in asked)


def _listed(body: Matrix, client: str, server: str) -> Answer:
    def found(pairs: Iterable[tuple[str, str]]) -> bool:
        return any(
            (c == "*" or within(client, c)) and (s == "*" or within(server, s)) for c, s in pairs
        )

    if found(body.deny):
        return Answer(False)
    if found(body.allow) or not body.allow:
        return Answer(True)
    return Answer(None, "the matrix has no such pair") if body.deny else Answer(False)


def _tried(
    rule: Rule, body: MustProbe, a: tuple[str, ...], b: tuple[str, ...], probed: Results
) -> Answer:
    if rule.scope is Scope.NODE:
        b = a
    elif all(
        x == y
        for fact, x, y in zip(body.facts, a, b, strict=True)
        if fact in (body.about or body.facts)
    ):
        return Answer(True)
    return Answer(probed.get((body.probe, a, b), False))


def needs(rule: Rule, word: Mapping[str, str], at: Mapping[str, str | None]) -> str:
    """Say in words what a rule needs; ``word`` has what people call its facts.

    Of a table that is only the row for what is known to be there (``at``); else all of it.
    """
    body = rule.body
    if isinstance(body, Exact):
        if rule.scope is Scope.NODE:
            return "both equal" if len(body.facts) == 2 else "all of them equal"
        return f"one {word[body.facts[0]]} for all"
    if isinstance(body, Minimum):
        if body.by is None:
            return f"at least {body.version}"
        asked = _row(body, at.get(body.by) or "").items()
        rows = (f"{low} from {word[body.by]} {key} on" for key, low in asked)
        return f"{word[body.fact]} at least {', '.join(rows)}"
    if isinstance(body, Matrix):
        return "a pair that its matrix allows, in this direction"
    if isinstance(body, MustProbe):
        return f"probe {body.probe} to have passed for these values, in this direction"
    unit = f"in field {body.field}" if body.field else "in the list of releases"
    if body.never_ahead:
        return f"the first at most {body.width} behind, {unit}, and never ahead"
    return f"them at most {body.width} apart, {unit}"


def _row(body: Minimum, value: str) -> Mapping[str, str]:
    """The row that asks most of what a version has reached; all, where it can't be told which."""
    reached = {key: low for key, low in body.versions.items() if (compare(value, key) or 0) >= 0}
    if not reached or any(compare(value, key) is None for key in body.versions):
        return body.versions
    most = max(reached, key=lambda key: sort_key(reached[key]))
    return {most: reached[most]}
