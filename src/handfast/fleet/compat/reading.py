"""Rules from a file: strictly, since a rule that is read otherwise than it was meant lets a mixture
in, or a fleet stand still.

YAML of plain texts, lists and mappings only. Every scalar is taken as it is written (YAML takes an
unquoted 1.10 for the number 1.1, and NO for false), a key that stands twice is refused (PyYAML
takes the last), and so are aliases and tags, which no rule needs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module, resources
from itertools import chain
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

from handfast.errors import UNREADABLE, FormatError
from handfast.fleet.compat import consistency
from handfast.fleet.compat.meaning import covers, reads
from handfast.fleet.compat.rules import (
    Adjacent,
    Exact,
    Fact,
    Level,
    Matrix,
    Minimum,
    MustProbe,
    Named,
    Rule,
    Rules,
    Scope,
    Text,
)

__all__ = ["MOST", "Wrong", "composed", "load", "parse", "start"]

MOST: Final = 1 << 20  # bytes; the file that is shipped has some 10,000
KINDS: Final = ("exact", "adjacent", "minimum", "matrix", "must_probe")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
SETTINGS: Final = ("env.", "file.")  # families where what is not set is a setting, too
HINTS: Final = MappingProxyType(  # by where in a rule it is wrong
    {
        "scope": f"give one of {', '.join(Scope)}",
        "mode": "give refuse, or warn",
        "exact": "name facts as the inventory does; env.NCCL_* is every fact that begins so",
        "adjacent.field": (
            "give the number of the part of the version that is compared, counted from 1: of "
            "1.31.4 it is 31 in field 2"
        ),
        "adjacent.width": "give how many releases the two may be apart, at most",
        "minimum.versions": "write {12: 525, 13: 580}: from 12 on at least 525, from 13 on 580",
        "matrix": "write pairs of releases, the client's first: allow: [[1.17, 1.18]]",
    }
)
TAGS: Final = MappingProxyType(  # what nodes have that were given none
    {
        kind: f"tag:yaml.org,2002:{tag}"
        for kind, tag in (("scalar", "str"), ("sequence", "seq"), ("mapping", "map"))
    }
)


class Wrong(Exception):
    """What is wrong with a part of the file, and the line where it stands."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """The file without its rules: they are read one by one, so that an error names its rule."""

    format: Literal[1]
    facts: dict[Named, Text] = {}
    brought: dict[Fact, Text] = {}


class _Spelled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A rule as it is spelled: one of five kinds, and what all of them have."""

    source: Text
    scope: Scope
    mode: Literal["refuse", "warn"] = "refuse"
    require_known: bool = False
    absent_differs: bool | None = None
    exact: Annotated[tuple[Named, ...], msgspec.Meta(min_length=1)] | None = None
    adjacent: Adjacent | None = None
    minimum: Minimum | None = None
    matrix: Matrix | None = None
    must_probe: MustProbe | None = None


def load(path: str, known: Collection[str] = ()) -> Rules:
    """Read the rules of a file; see :func:`parse`. Raises OSError, too."""
    with open(path, "rb") as file:
        return parse(file.read(MOST + 1), path, known)


def start(known: Collection[str] = ()) -> Rules:
    """The rules to start from, which are shipped; each names its source."""
    file = resources.files("handfast.fleet.compat") / "start.yaml"
    return parse(file.read_bytes(), "start.yaml", known)


def parse(data: bytes, name: str, known: Collection[str] = ()) -> Rules:
    """Read rules; ``name`` is the file's, for errors and verdicts.

    ``known`` are the facts that an inventory has; one that ends in ``.*`` stands for all names
    below it. A rule may name these, and what the file says under ``brought`` that the site brings;
    without an inventory, what it names under ``facts``, where people's words for facts are. A rule
    over several nodes whose facts all are settings (``env.``, ``file.``) has ``absent-differs``
    unless it says otherwise: a variable that is not set has its library's default, and that is one
    more value. Raises FormatError, with file, line and rule, for what can't be read, or can't be
    meant; and where PyYAML is not installed.
    """
    lines: dict[tuple[str, ...], int] = {}
    try:
        document = composed(data, name, "rules", lines)
        head, rules = _split(document)
        read = [_rule(each, body, lines[("rules", each)]) for each, body in rules.items()]
        for rule in read:
            if what := consistency.alone(rule):
                raise Wrong(f"rule {rule.name}: {what}", lines[("rules", rule.name)])
        _check_facts(head, read, known, lines)
        for at_fault, what in consistency.together(read):
            raise Wrong(f"rule {at_fault}: {what}", lines[("rules", at_fault)])
    except Wrong as wrong:
        raise FormatError(f"{name}: line {wrong.line}: {wrong}") from None
    return Rules(name, tuple(read), head.facts | head.brought)


def composed(data: bytes, name: str, what: str, lines: dict[tuple[str, ...], int]) -> object:
    """Read plain YAML, and fill in the line of each key, by the keys and numbers that lead to it.

    Raises Wrong; FormatError where there is too much of it, or PyYAML is not installed, with what
    the file holds (``what``).
    """
    if len(data) > MOST:
        raise FormatError(
            f"{name}: more than {MOST:,} bytes, which are read at most. What to do: give the "
            f"file of {what}, or split it"
        )
    try:
        yaml: Any = import_module("yaml")  # it has no types of its own
    except ImportError:
        raise FormatError(
            f"{name}: {what} are YAML, which the package PyYAML reads, and it is not installed. "
            "What to do: pip install 'handfast[fleet]'"
        ) from None
    try:
        node = yaml.compose(data.decode(), Loader=yaml.BaseLoader)
        return _plain(node, (), lines, set())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise Wrong(f"no YAML: {problem}. What to do: correct that line", line) from None
    except UNREADABLE as error:
        raise Wrong(f"no YAML: {error}. What to do: save it as UTF-8 text", 1) from None


def _plain(
    node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int], seen: set[int]
) -> object:
    """Turn a node of PyYAML into texts, lists and dictionaries, keeping the line of each key."""
    if node is None:
        raise Wrong("the file is empty. What to do: write it as its page of docs/fleet shows", 1)
    line = node.start_mark.line + 1
    if id(node) in seen:
        raise Wrong("an alias (*name) is not read. What to do: write it out", line)
    seen.add(id(node))
    if node.tag != TAGS[node.id]:
        raise Wrong(f"the tag {node.tag} is not read. What to do: take it away", line)
    if node.id == "scalar":
        return node.value
    if node.id == "sequence":
        return [_plain(each, (*path, str(n)), lines, seen) for n, each in enumerate(node.value)]
    found: dict[str, object] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        word = _plain(key, path, lines, seen)
        if not isinstance(word, str):
            raise Wrong("a key that is no text. What to do: give it a plain name", line)
        if word in found:
            raise Wrong(
                f"{word} stands twice; the first is in line {lines[(*path, word)]}. What to do: "
                "keep one of them, or rename one",
                line,
            )
        lines[(*path, word)] = line
        found[word] = _plain(value, (*path, word), lines, seen)
    return found


def _split(document: object) -> tuple[_Head, dict[str, object]]:
    """Take the rules out of the file."""
    if not isinstance(document, dict):
        raise Wrong("no mapping. What to do: begin with `format: 1`, then `rules:`", 1)
    rest = dict(document)
    rules = rest.pop("rules", None)
    if not isinstance(rules, dict):
        raise Wrong("it has no rules. What to do: name them under `rules:`, as a mapping", 1)
    try:
        return msgspec.convert(rest, _Head, strict=False), rules
    except msgspec.ValidationError as error:
        raise Wrong(f"{error}. What to do: correct it; this handfast reads format 1", 1) from None


def _rule(name: str, spelled: object, line: int) -> Rule:
    if not NAME.fullmatch(name):
        raise Wrong(
            f"{name!r} can't name a rule. What to do: use small letters, digits and dashes", line
        )
    try:
        found = msgspec.convert(spelled, _Spelled, strict=False)
    except msgspec.ValidationError as error:
        raise Wrong(f"rule {name}: {error}. What to do: {_hint(str(error))}", line) from None
    kinds = [kind for kind in KINDS if getattr(found, kind) is not None]
    if len(kinds) != 1:
        raise Wrong(
            f"rule {name}: it has {' and '.join(kinds) or 'no kind'}. What to do: give it exactly "
            "one of exact, adjacent, minimum, matrix and must-probe",
            line,
        )
    if found.absent_differs and kinds != ["exact"]:
        raise Wrong(
            f"rule {name}: absent-differs is for exact rules over several nodes. What to do: take "
            "it out",
            line,
        )
    body = getattr(found, kinds[0])
    if kinds == ["exact"]:
        differs = found.absent_differs
        if differs is None:
            settings = all(fact.startswith(SETTINGS) for fact in body)
            differs = settings and found.scope is not Scope.NODE
        body = Exact(body, differs)
    return Rule(
        name=name,
        source=found.source,
        scope=found.scope,
        body=body,
        mode=Level(found.mode),
        require_known=found.require_known,
    )


def _hint(error: str) -> str:
    """What to do about an error of msgspec's, which ends in where it is: - at `$.scope`."""
    where = error.rpartition("`$.")[2].rstrip("`")
    return next((told for part, told in HINTS.items() if where.startswith(part)), "correct it")


def _check_facts(
    head: _Head, rules: Sequence[Rule], known: Collection[str], lines: Mapping[tuple[str, ...], int]
) -> None:
    """Hold the names of facts against the inventory's, and the file's own against its rules."""
    there = {*(known or head.facts), *head.brought}
    used = set()
    for rule in rules:
        for fact in chain(*reads(rule)):
            used.add(fact)
            if not _listed(fact, there):
                raise Wrong(
                    f"rule {rule.name}: {_lost(fact, there, known)}", lines[("rules", rule.name)]
                )
    for fact in head.facts:
        if known and not _listed(fact, there):
            raise Wrong(
                f"facts has words for {fact}, which no inventory has{_like(fact, there)}. What to "
                "do: correct its spelling, or move it to `brought:`",
                lines[("facts", fact)],
            )
    for fact in head.brought:
        if fact in head.facts or not any(covers(name, fact) for name in used):
            raise Wrong(
                f"brought has {fact}, which no rule names, or `facts:` has too. What to do: take "
                "it out, or correct its spelling",
                lines[("brought", fact)],
            )


def _listed(name: str, there: Collection[str]) -> bool:
    """Whether a fact, or some fact of a pattern, is among names and families."""
    return name in there or any(covers(each, name) or covers(name, each) for each in there)


def _lost(fact: str, there: Collection[str], known: Collection[str]) -> str:
    if known:
        return (
            f"no inventory has the fact {fact}{_like(fact, there)}. What to do: correct its "
            f"spelling, or, if the site brings it, write `{fact}: WORDS` under `brought:`"
        )
    return (
        f"neither `facts:` nor `brought:` has an entry for {fact}{_like(fact, there)}. What to do: "
        f"write `{fact}: WORDS` under `facts:`, WORDS being what people call it, or under "
        "`brought:`, if the site brings it"
    )


def _like(fact: str, there: Collection[str]) -> str:
    near = get_close_matches(fact, sorted(there), 1, 0.8)
    return f" (is it {near[0]}?)" if near else ""
