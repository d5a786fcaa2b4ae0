"""Sentences about rules and nodes, for people: one a fault, however many nodes have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Final, TypeAlias

from handfast.fleet.compat.meaning import needs, reads
from handfast.fleet.compat.rules import ABSENT, Matrix, MustProbe, Place, Rule, Rules

__all__ = ["clash", "differ", "meets", "need", "runs", "sentence", "several"]

FEW: Final = 3

Side: TypeAlias = tuple[Sequence[str], Iterable[tuple[str, str | None]]]
Options: TypeAlias = Sequence[tuple[str, Sequence[str]]]


def several(names: Sequence[str], last: str = "and") -> str:
    """Name the first few, and count the rest."""
    if len(names) <= FEW + 1:
        return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"{', '.join(names[:FEW])} {last} {len(names) - FEW} others"


def runs(rules: Rules, names: Sequence[str], facts: Mapping[str, str | None]) -> str:
    """Say what nodes run: "node-17 runs driver 580.65 with Fabric Manager 590.12"."""
    verb = "runs" if len(names) == 1 else "run"
    return f"{several(names)} {verb} {_things(rules, facts.items())}"


def meets(rules: Rules, rule: Rule, first: Side, second: Side) -> str:
    """Say what two sides run, and that the first is the client where that counts."""
    talk = isinstance(rule.body, Matrix | MustProbe)
    one = runs(rules, first[0], dict(first[1]))
    verb = "runs" if len(second[0]) == 1 else "run"
    joint = f"and {'talks' if len(first[0]) == 1 else 'talk'} to" if talk else "beside"
    them = several(second[0])
    what = _things(rules, second[1])
    return f"{one} {joint} {them}, which {verb} {what}"


def differ(
    rules: Rules, place: Place, fact: str, sides: Mapping[tuple[str | None, ...], Sequence[str]]
) -> str:
    """Say which values there are, the most frequent first."""
    ranked = sorted(sides.items(), key=lambda side: (-len(side[1]), side[0][0] or ""))
    shown = [
        f"{_thing(rules, fact, values[0])} on {several(names)}" for values, names in ranked[:FEW]
    ]
    if len(ranked) > FEW:
        shown.append(f"{len(ranked) - FEW} others elsewhere")
    where = "the fleet" if place.name == "fleet" else f"{place.scope} {place.name}"
    return f"{where} runs {', '.join(shown)}"


def sentence(
    rules: Rules, rule: Rule, subject: str, why: str, whose: str, at: Mapping[str, str | None]
) -> str:
    """Close a sentence: who needs what, or why it can't be told; by which rule, and who says so.

    ``at`` are values that decide which row of a table is meant.
    """
    word = {fact: rules.word(fact) for fact in chain(*reads(rule))}
    wants = f"{whose} needs {needs(rule, word, at)}"
    tail = f", which can't be told: {why}" if why else ""
    return f"{subject}; {wants}{tail} [rule {rule.name}: {rule.source}]"


def need(
    rules: Rules, rule: Rule, nodes: Sequence[str], others: Sequence[str], could: Options
) -> str:
    """Say what a rule needs of nodes (and of others, where they are not the same).

    ``could`` is what they have to choose from, fact by fact; it may name a fact for each side.
    """
    at = {fact: options[0] for fact, options in could if len(options) == 1}
    word = {fact: rules.word(fact) for fact in chain(*reads(rule))}
    who = several(nodes) if nodes == others else f"{several(nodes)} with {several(others)}"
    have = " with ".join(_could(rules, fact, options) for fact, options in could)
    return f"{who}: {needs(rule, word, at)}, of {have} [rule {rule.name}: {rule.source}]"


def clash(said: Iterable[str]) -> str:
    """Say which needs can't be met together."""
    return f"no versions that are at hand keep all of this: {'; '.join(said)}"


def _could(rules: Rules, fact: str, options: Sequence[str]) -> str:
    if options == (ABSENT,):
        return f"no {rules.word(fact)}"
    return f"{rules.word(fact)} {several(options, 'or')}"


def _things(rules: Rules, facts: Iterable[tuple[str, str | None]]) -> str:
    return " with ".join(_thing(rules, fact, value) for fact, value in facts)


def _thing(rules: Rules, fact: str, value: str | None) -> str:
    word = rules.word(fact)
    if value is None:
        return f"an unknown {word}"
    return f"no {word}" if value == ABSENT else f"{word} {value}"
