"""Rules from a file: strictly, since a rule that is read otherwise than it was meant lets a mixture
in, or a fleet stand still.

YAML of plain texts, lists and mappings only. Every scalar is taken as it is written (YAML takes an
unquoted 1.10 for the number 1.1, and NO for false), a key that stands twice is refused (PyYAML
takes the last), and so are aliases and tags, which no rule needs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module, resources
from itertools import chain
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

from handfast.errors import UNREADABLE, FormatError
from handfast.fleet.compat import consistency
from handfast.fleet.compat.meaning import reads
from handfast.fleet.compat.rules import (
    Adjacent,
    Exact,
    Fact,
    Level,
    Matrix,
    Minimum,
    MustProbe,
    Rule,
    Rules,
    Scope,
    Text,
)

__all__ = ["MOST", "Wrong", "composed", "load", "parse", "start"]

MOST: Final = 1 << 20  # bytes; the file that is shipped has some 10,000
KINDS: Final = ("exact", "adjacent", "minimum", "matrix", "must_probe")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
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
    facts: dict[Fact, Text] = {}
    brought: dict[Fact, Text] = {}


class _Spelled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A rule as it is spelled: one of five kinds, and what all of them have."""

    source: Text
    scope: Scope
    mode: Literal["refuse", "warn"] = "refuse"
    require_known: bool = False
    absent_differs: bool = False
    exact: Annotated[tuple[Fact, ...], msgspec.Meta(min_length=1)] | None = None
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
    without an inventory, what it names under ``facts``, where people's words for facts are. Raises
    FormatError, with file, line and rule, for what can't be read, or can't be meant; and where
    PyYAML is not installed.
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
        raise Wrong("the file is empty. What to do: begin it with `format: 1`", 1)
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
        raise Wrong(f"rule {name}: {error}. What to do: correct it", line) from None
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
    return Rule(
        name=name,
        source=found.source,
        scope=found.scope,
        body=Exact(body, found.absent_differs) if kinds == ["exact"] else body,
        mode=Level(found.mode),
        require_known=found.require_known,
    )


def _check_facts(
    head: _Head, rules: Sequence[Rule], known: Collection[str], lines: Mapping[tuple[str, ...], int]
) -> None:
    """Hold the names of facts against the inventory's, and the file's own against its rules."""
    families = tuple(name.removesuffix("*") for name in known if name.endswith(".*"))
    there = {*(known or head.facts), *head.brought}
    used = set()
    for rule in rules:
        for fact in chain(*reads(rule)):
            used.add(fact)
            if fact not in there and not fact.startswith(families):
                raise Wrong(
                    f"rule {rule.name}: no inventory has the fact {fact}. What to do: correct its "
                    "spelling, or, if the site brings it, say so under `brought:`",
                    lines[("rules", rule.name)],
                )
    for fact in head.facts:
        if known and fact not in there and not fact.startswith(families):
            raise Wrong(
                f"facts has words for {fact}, which no inventory has. What to do: correct its "
                "spelling, or move it to `brought:`",
                lines[("facts", fact)],
            )
    for fact in head.brought:
        if fact in head.facts or fact not in used:
            raise Wrong(
                f"brought has {fact}, which no rule names, or `facts:` has too. What to do: take "
                "it out, or correct its spelling",
                lines[("brought", fact)],
            )
