"""What people bring for a choice: what each node could have, and what was probed; read strictly."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Annotated, Final, Literal

import msgspec

from handfast.errors import UNREADABLE, FormatError
from handfast.fleet.compat.meaning import covers, reads
from handfast.fleet.compat.reading import MOST, Wrong, composed
from handfast.fleet.compat.rules import Fact, Level, MustProbe, Probed, Rules, Text

__all__ = ["Asked", "load", "load_probed", "parse", "parse_probed"]

NODES: Final = 100_000
MANY: Final = f"more than {NODES:,} nodes. What to do: choose for fewer of them at once"
NAME = re.compile(r"([A-Za-z0-9._-]*)(?:\[([0-9]{1,9})-([0-9]{1,9})\]([A-Za-z0-9._-]*))?")

_Options = Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=200)]


class Asked(msgspec.Struct, frozen=True):
    """What is asked: the options of each node, fact by fact, and what it runs today.

    What a node runs today and has no options for stays: it is the one option.
    """

    options: dict[str, dict[str, tuple[str, ...]]]
    now: dict[str, dict[str, str]]


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal[1]
    nodes: Annotated[dict[Text, object], msgspec.Meta(min_length=1)]


class _Spelled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes as they are spelled: what they could have, and what they have now."""

    could: dict[Fact, _Options] = {}
    now: dict[Fact, Text] = {}


class _Line(Probed, frozen=True, forbid_unknown_fields=True):
    """A result as it is spelled."""


def load(path: str, rules: Rules) -> Asked:
    """Read the options of a file; see :func:`parse`. Raises OSError, too."""
    return parse(_begin(path), path, rules)


def parse(data: bytes, name: str, rules: Rules) -> Asked:
    """Read options; ``name`` is the file's, for errors.

    A node's name may have one range of numbers in it, `gpu-[001-128]`: all of these could have the
    same. Raises FormatError, with file, line and node, for what can't be read, for a fact of which
    no rule that refuses speaks, for a node that stands twice and for more than 100,000 of them; and
    where PyYAML is not installed.
    """
    kept = (rule for rule in rules.rules if rule.mode is Level.REFUSE)
    facts = {fact for rule in kept for fact in chain(*reads(rule))}
    lines: dict[tuple[str, ...], int] = {}
    options: dict[str, dict[str, tuple[str, ...]]] = {}
    now: dict[str, dict[str, str]] = {}
    try:
        document = composed(data, name, "options", lines)
        for spelled, body in _head(document).nodes.items():
            found = _nodes(spelled, body, facts, lines)
            could = {fact: (value,) for fact, value in found.now.items()} | found.could
            line = lines[("nodes", spelled)]
            for node in _names(spelled, line):
                if len(options) == NODES:
                    raise Wrong(f"{spelled}: {MANY}", line)
                if node in options:
                    raise Wrong(f"{node} stands twice. What to do: name each node once", line)
                options[node], now[node] = could, found.now
    except Wrong as wrong:
        raise FormatError(f"{name}: line {wrong.line}: {wrong}") from None
    return Asked(options, now)


def load_probed(path: str, rules: Rules) -> tuple[Probed, ...]:
    """Read the results of a file; see :func:`parse_probed`. Raises OSError, too."""
    return parse_probed(_begin(path), path, rules)


def parse_probed(data: bytes, name: str, rules: Rules) -> tuple[Probed, ...]:
    """Read what was probed: a JSON object a line, as `fleet rehearse --record` writes it.

    Raises FormatError, with file and line, for what is none, and for one whose values are not as
    many as the facts of a rule that asks for this probe. What no rule asks for is no error.
    """
    if len(data) > MOST:
        raise FormatError(
            f"{name}: more than {MOST:,} bytes, which are read at most. What to do: give the file "
            "of results, or leave out what is old"
        )
    wanted: dict[str, set[int]] = {}
    for body in (rule.body for rule in rules.rules):
        if isinstance(body, MustProbe):
            wanted.setdefault(body.probe, set()).add(len(body.facts))
    found = []
    for line, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            result = msgspec.json.decode(text, type=_Line)
        except UNREADABLE as error:
            raise FormatError(
                f"{name}: line {line}: no result of a probe: {error}. What to do: write one as "
                '{"probe": "ucx-tag-send", "client": ["1.18.0"], "server": ["1.17.0"], '
                '"passed": true}'
            ) from None
        counts = wanted.get(result.probe, {len(result.client)})
        if len(result.client) not in counts or len(result.client) != len(result.server):
            raise FormatError(
                f"{name}: line {line}: probe {result.probe} has {len(result.client)} values of a "
                f"client and {len(result.server)} of a server, where rules have "
                f"{' or '.join(map(str, sorted(counts)))}. What to do: give one for each fact of "
                "the rule, in its order"
            )
        found.append(result)
    return tuple(found)


def _begin(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(MOST + 1)


def _head(document: object) -> _Head:
    try:
        return msgspec.convert(document, _Head, strict=False)
    except msgspec.ValidationError as error:
        raise Wrong(
            f"{error}. What to do: begin with `format: 1`, then `nodes:`, as a mapping", 1
        ) from None


def _nodes(
    spelled: str,
    body: object,
    facts: Collection[str],
    lines: Mapping[tuple[str, ...], int],
) -> _Spelled:
    """Read what is said of nodes; a fact of no rule was most likely meant to be another."""
    line = lines[("nodes", spelled)]
    try:
        found = msgspec.convert(body, _Spelled)
    except msgspec.ValidationError as error:
        raise Wrong(f"node {spelled}: {error}. What to do: correct it", line) from None
    for part, names in (("could", found.could), ("now", found.now)):
        for fact in names:
            if not any(covers(named, fact) for named in facts):
                raise Wrong(
                    f"node {spelled}: no rule that refuses speaks of {fact}, so there is nothing "
                    "to choose. What to do: correct its spelling, or leave it out",
                    lines[("nodes", spelled, part, fact)],
                )
    return found


def _names(spelled: str, line: int) -> list[str]:
    """Name all nodes of a range; zeros before its first number stand before all."""
    parts = NAME.fullmatch(spelled)
    if parts is None or len(spelled) > 200:
        raise Wrong(
            f"{spelled!r} can't name nodes. What to do: write node-17, or node-[001-128] for many",
            line,
        )
    head, low, high, tail = parts.groups()
    if low is None:
        return [spelled]
    numbers = range(int(low), int(high) + 1)
    if not numbers:
        raise Wrong(f"{spelled}: {low} is above {high}. What to do: turn them round", line)
    if len(numbers) > NODES:
        raise Wrong(f"{spelled}: {MANY}", line)
    return [f"{head}{n:0{len(low)}}{tail}" for n in numbers]
