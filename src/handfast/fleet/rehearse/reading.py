"""A rehearsal from a file, read strictly: what is slipped in it is told before anything starts."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from itertools import chain
from typing import Annotated, Final, TypeAlias

import msgspec

from handfast.errors import FormatError
from handfast.fleet.compat.reading import MOST, Wrong, composed
from handfast.fleet.compat.rules import Fact, Text

__all__ = ["PORTS", "Each", "Probe", "Record", "Rehearsal", "fill", "load", "parse"]

PORTS: Final = 4  # of each node
TOGETHER: Final = 1000  # fleets of a job: one for each way to give the nodes versions
OF_NODE: Final = frozenset(
    {"node", "index", "version", "dir", "port", *(f"port.{at}" for at in range(PORTS))}
)
RESERVED: Final = OF_NODE | {"here", "python", "work", "client", "server", "env"}
HOLE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

Path: TypeAlias = tuple[str, ...]
"""The keys that lead to a part of the file."""

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_-]{0,29}\Z")]
_Version = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,39}\Z")]
_Argument = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*\Z", max_length=4000)]
_Argv = Annotated[tuple[_Argument, ...], msgspec.Meta(min_length=1, max_length=500)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Each(StrEnum):
    """What is probed at each state, by how many nodes a probe is told of as its own."""

    FLEET = "fleet"  # none: it is told of all
    NODE = "node"
    PAIR = "pair"  # in both orders


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The program that says whether what was put together works."""

    each: Each
    run: _Argv


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is recorded of a pair, for rules of must-probe: its facts, in the rule's order."""

    probe: Text
    facts: Annotated[dict[Fact, Text], msgspec.Meta(min_length=1)]


class Rehearsal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """What to rehearse. Arguments are templates, which :func:`fill` fills.

    ``versions`` maps each, the lowest first, to its variables. Without ``run`` nodes have no
    process: it is a job, which only ``probe`` runs.
    """

    name: Text = msgspec.field(name="rehearsal")
    versions: Annotated[
        dict[_Version, dict[_Name, Text]], msgspec.Meta(min_length=2, max_length=20)
    ]
    probe: Probe
    nodes: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1, max_length=5)] = ("a", "b", "c")
    setup: tuple[_Argument, ...] = ()
    teardown: tuple[_Argument, ...] = ()
    run: tuple[_Argument, ...] = ()
    ready: tuple[_Argument, ...] = ()
    record: Record | None = None
    setup_s: _Seconds = 60.0
    stop_s: _Seconds = 10.0
    ready_s: _Seconds = 20.0
    probe_s: _Seconds = 20.0

    def facts(self, version: str) -> tuple[str, ...]:
        """The values that are recorded of a node of this version."""
        values = {"version": version, **self.versions[version]}
        return (
            tuple(fill(each, values) for each in self.record.facts.values()) if self.record else ()
        )


def fill(text: str, values: Mapping[str, str]) -> str:
    """Fill the holes of a template; ``{{`` and ``}}`` are braces. Raises KeyError."""
    return HOLE.sub(lambda found: values[found[1]] if found[1] is not None else found[0][0], text)


def load(path: str, environ: Mapping[str, str] | None = None) -> Rehearsal:
    """Read the rehearsal of a file; see :func:`parse`. Raises OSError, too."""
    with open(path, "rb") as file:
        data = file.read(MOST + 1)
    here = os.path.dirname(os.path.abspath(path))
    return parse(data, path, here, os.environ if environ is None else environ)


def parse(data: bytes, name: str, here: str, environ: Mapping[str, str]) -> Rehearsal:
    """Read a rehearsal; ``name`` is the file's, for errors, and ``here`` its directory.

    What is known beforehand ({here}, {python}, {env.NAME} and, in a version, {version}) is filled.
    Raises FormatError, with file and line, for what can't be read, or can't be meant; and where
    PyYAML is not installed.
    """
    known = {"here": here, "python": sys.executable}
    known |= {f"env.{key}": value for key, value in environ.items()}
    lines: dict[Path, int] = {}
    try:
        found = _convert(composed(data, name, "rehearsals", lines), lines)
        for path, what in chain(_senseless(found), _unfilled(found, known)):
            raise Wrong(what, _line(path, lines))
    except Wrong as wrong:
        raise FormatError(f"{name}: line {wrong.line}: {wrong}") from None
    return _filled(found, known)


def _line(path: Path, lines: Mapping[Path, int]) -> int:
    """The line of a part, or of the nearest one around it that has a key."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _convert(document: object, lines: Mapping[Path, int]) -> Rehearsal:
    try:
        return msgspec.convert(document, Rehearsal, strict=False)
    except msgspec.ValidationError as error:
        what = str(error)
        place = re.search(r"`\$([^`]*)`", what)
        path: Path = tuple(re.findall(r"[\w-]+", place[1])) if place else ()
        if unknown := re.search(r"unknown field `([^`]*)`", what):
            path = (*path, unknown[1])
        raise Wrong(f"{what}. What to do: correct it", _line(path, lines)) from None


def _senseless(found: Rehearsal) -> Iterator[tuple[Path, str]]:
    """What is of the right types and still means nothing, and where it stands."""
    first, own = next(iter(found.versions.items()))
    for version, variables in found.versions.items():
        if odd := set(variables) ^ set(own):
            what = f"versions {first} and {version} differ in the variable {min(odd)}"
            yield ("versions", version), f"{what}. What to do: give both it, or none"
    for name in sorted({*own, *found.nodes} & RESERVED):
        path = ("versions", first, name) if name in own else ("nodes",)
        yield path, f"{name} has a meaning of its own. What to do: rename it"
    if len(set(found.nodes)) < len(found.nodes):
        yield ("nodes",), "a node stands twice. What to do: rename one"
    if found.probe.each is Each.PAIR and len(found.nodes) == 1:
        yield ("nodes",), "one node is no pair. What to do: give two or more"
    if bool(found.run) != bool(found.ready):
        given, lacks = ("run", "ready") if found.run else ("ready", "run")
        yield (given,), f"it has {given} and no {lacks}. What to do: give both, or none for a job"
    if not found.run and len(found.versions) ** len(found.nodes) > TOGETHER:
        what = f"more than {TOGETHER:,} ways to give nodes versions. What to do: take fewer"
        yield ("versions",), what
    if found.record and found.probe.each is not Each.PAIR:
        what = (
            "only what is found of pairs is recorded. What to do: probe each pair, or take it out"
        )
        yield ("record",), what


def _unfilled(found: Rehearsal, known: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """Holes that nothing will fill, and where they stand."""
    for path, text, holes in _templates(found, frozenset(known)):
        for hole in HOLE.finditer(text):
            if hole[0] in "{}":
                yield path, f"a single {hole[0]} in {text!r}. What to do: write it twice"
            elif hole[1] is not None and hole[1] not in holes:
                env = hole[1].startswith("env.")
                to_do = "set it in the environment" if env else "correct it"
                yield path, f"nothing fills {hole[0]} here. What to do: {to_do}"


def _templates(
    found: Rehearsal, known: frozenset[str]
) -> Iterator[tuple[Path, str, frozenset[str]]]:
    """Every template, with where it stands and the names of the holes that it may have."""
    variables = frozenset(next(iter(found.versions.values())))
    own = OF_NODE | variables
    around = known | {"work"} | {f"{node}.{of}" for node in found.nodes for of in own}
    probed = {
        Each.FLEET: around,
        Each.NODE: around | own,
        Each.PAIR: around | {f"{end}.{of}" for end in ("client", "server") for of in own},
    }
    for version, texts in found.versions.items():
        for name, text in texts.items():
            yield ("versions", version, name), text, known | {"version"}
    for fact, text in (found.record.facts if found.record else {}).items():
        yield ("record", "facts", fact), text, variables | {"version"}
    for path, argv, holes in (
        (("setup",), found.setup, around),
        (("teardown",), found.teardown, around),
        (("run",), found.run, around | own),
        (("ready",), found.ready, around | own),
        (("probe", "run"), found.probe.run, probed[found.probe.each]),
    ):
        yield from ((path, text, holes) for text in argv or ())


def _filled(found: Rehearsal, known: Mapping[str, str]) -> Rehearsal:
    """Fill what is known beforehand: all of the variables, and some holes of the arguments."""

    def plain(hole: re.Match[str]) -> str:
        text = known.get(hole[1])
        return hole[0] if text is None else text.replace("{", "{{").replace("}", "}}")

    def argv(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(HOLE.sub(plain, each) for each in given)

    versions = {
        version: {name: fill(text, {**known, "version": version}) for name, text in texts.items()}
        for version, texts in found.versions.items()
    }
    return msgspec.structs.replace(
        found,
        versions=versions,
        setup=argv(found.setup),
        teardown=argv(found.teardown),
        run=argv(found.run),
        ready=argv(found.ready),
        probe=Probe(found.probe.each, argv(found.probe.run)),
    )
