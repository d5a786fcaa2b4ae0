"""Shows that docs/format.md says what the code does, where it lists things."""

import re
from pathlib import Path

import msgspec
import pytest

from handfast.core import lattice, membership, messages
from handfast.core.lattice import Epoch
from handfast.store import arrays, objects
from handfast.store.image import DTYPES, Slot, TensorSpec
from handfast.store.manifest import Fork, Left, Manifest, Piece, Source, Stamp
from handfast.store.pins import Holder

WHOLE = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
TEXT = WHOLE.split("\n## The journal")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ")
]


def test_dtypes_are_listed_with_size_and_code() -> None:
    """All of them, and no other."""
    listed: dict[str, tuple[int, str | None]] = {}
    for names, size, codes in (row for row in ROWS if len(row) == 3 and row[1].isdigit()):
        kinds = re.findall("`(.+?)`", names)
        found = re.findall("`(.+?)`", codes) or [None] * len(kinds)
        listed |= {kind: (int(size), code) for kind, code in zip(kinds, found, strict=True)}
    assert listed == DTYPES


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("manifest", Manifest),
        ("stamp", Stamp),
        ("parent", Epoch),
        ("slot", Slot),
        ("tensor", TensorSpec),
        ("piece", Piece),
        ("left", Left),
        ("fork", Fork),
        ("source", Source),
    ],
)
def test_fields_are_listed_in_their_order(name: str, struct: type[msgspec.Struct]) -> None:
    """A field's place is its meaning in the bytes. `Slot.spec` is called what it is there."""
    (row,) = [row for row in ROWS if len(row) == 2 and row[0] == name]
    listed = tuple(row[1].removesuffix("; or nil").split(", "))
    named = {"spec": "tensor"} if struct is Slot else {}
    assert listed == tuple(named.get(field, field) for field in struct.__struct_fields__)


def test_tags_are_listed_with_their_types() -> None:
    """Every tag that is read, and the type that it is for."""
    listed = {
        int(tag): kind
        for row in ROWS
        if len(row) == 3 and re.fullmatch(r"[\d, ]+", row[0]) and row[0] != "1"
        for tag, kind in zip(row[0].split(", "), _kinds(row), strict=True)
    }
    special = {objects._REGISTERED, objects._PICKLE}
    assert set(listed) == {*objects._JOINS, *special}
    for kind in objects._KINDS:
        name = {objects._PATH: "Path", objects.TensorRef: "a tensor"}.get(kind.type)
        assert listed[kind.tag] == (name or kind.type.__name__)
    assert all(listed[tag].startswith("NumPy") for tag in arrays.JOINS)


SECTION = WHOLE.split("\n## Records")[1].split("\n## ")[0]


def listed() -> dict[str, tuple[str, ...]]:
    """The tables of records and of their parts."""
    rows = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("| ")]
    plain = [[cell.strip().replace("`", "") for cell in row] for row in rows]
    return {name: tuple(fields.split(", ")) for name, fields in plain if fields != "fields"}


def test_records_and_their_parts_are_listed_field_by_field() -> None:
    """All kinds, and no other; order is meaning here, too."""
    kinds = {kind.__struct_config__.tag: kind for kind in messages.Record.__args__}
    parts = {
        "epoch": lattice.Epoch,
        "configuration": membership.Configuration,
        "domain": membership.Domain,
        "report": messages.Report,
        "copy": messages.Copy,
        "lost": messages.Lost,
        "certificate of converged": messages.Certificate,
        "certificate of restored": messages.RestoreCertificate,
        "branch": messages.Branch,
    }
    code = {name: kind.__struct_fields__ for name, kind in (kinds | parts).items()}
    assert listed() == code


def _kinds(row: list[str]) -> list[str]:
    return row[1].split(", ") if "," in row[0] else [row[1]]


def test_the_fields_of_a_pin_are_listed() -> None:
    """Also those that older pins lack."""
    (listed,) = re.findall(r"\*\*Pins\.\*\*.*?`\{(.*?)\}`", WHOLE, re.DOTALL)
    assert tuple(re.findall(r'"(\w+)"', listed)) == Holder.__struct_fields__
