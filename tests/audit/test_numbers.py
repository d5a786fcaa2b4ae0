"""Shows that no number that a file or a name has makes an audit fail, hang, or say what it can't
say: counters of a thousand digits, negative, no numbers at all.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.audit.matrix import GOLDEN, VARIANTS

from audit.goldens import codes
from handfast.audit.finding import Strength
from handfast.audit.formats.accelerate import find as accelerate
from handfast.audit.formats.dcp import find as dcp
from handfast.audit.formats.trainer import find as trainer
from handfast.audit.run import Audit, audit
from handfast.cli.main import app

HUGE = 10**4200
"""Python writes 4,300 digits at most, and Hypothesis what it has tried."""

ODD: tuple[Any, ...] = (
    10**400, -(10**400), HUGE, 2**63, 2**63 - 1, 2**64, -(2**63), -1, 0, 1 << 31, True, False,
    None, float("nan"), float("inf"), -float("inf"), 1e308, 0.5, 3.0, -0.0, "", "7", "x" * 5000,
    b"\xff", [], {}, (), (1, 2), [[]],
)  # fmt: skip
VALUES = (
    st.sampled_from(ODD)
    | st.integers(-(10**400), 10**400)
    | st.integers(-(1 << 65), 1 << 65)
    | st.floats()
    | st.text(max_size=5)
)
DIGITS = ("0", "00", "7", "4294967296", "99999999999", "9" * 30, "9" * 80)
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "INT", "LONG", "FLOAT"}
NUMBERS |= {"NEWTRUE", "NEWFALSE"}

Spoil = Callable[[bytes, int, Any], bytes | None]


def opcodes(value: Any) -> bytes:
    """A value as opcodes that may stand anywhere in a pickle."""
    value = 10**5000 if type(value) is int and value == HUGE else value
    out = io.BytesIO()
    pickler = pickle.Pickler(out, 2)
    pickler.fast = True  # no memo, whose numbers would be another's
    pickler.dump(value)
    return out.getvalue()[2:-1]


@cache
def numbers(data: bytes) -> list[tuple[int, int]]:
    """Where the numbers of a pickle begin and end."""
    found = [(op.name, at) for op, _, at in pickletools.genops(data)] + [("", len(data))]
    return [(at, end) for (name, at), (_, end) in pairwise(found) if name in NUMBERS]


@cache
def unframed(data: bytes) -> bytes:
    """A pickle without its frames, which say how long they are."""
    found = [(op.name, at) for op, _, at in pickletools.genops(data)] + [("", len(data))]
    return b"".join(data[at:end] for (name, at), (_, end) in pairwise(found) if name != "FRAME")


def in_pickle(data: bytes, nth: int, value: Any) -> bytes | None:
    """A pickle whose nth number is another value."""
    data = unframed(data)
    places = numbers(data)
    if not places:
        return None
    at, end = places[nth % len(places)]
    return data[:at] + opcodes(value) + data[end:]


def in_archive(data: bytes, nth: int, value: Any) -> bytes | None:
    """A file of torch.save with another number in its pickle, or in a tensor of one number."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole:
        records = [(info.filename, whole.read(info)) for info in whole.infolist()]
    steps = [name for name, held in records if len(held) == 4 and "/data/" in name]
    chosen = steps[nth % len(steps)] if steps and type(value) is float else ""
    with zipfile.ZipFile(out, "w") as spoilt:
        for name, held in records:
            new: bytes | None = held
            if name == chosen:
                new = struct.pack("<f", max(min(value, 3e38), -3e38) if value == value else value)
            elif not chosen and name.endswith("data.pkl"):
                new = in_pickle(held, nth, value)
            spoilt.writestr(name, held if new is None else new)
    return out.getvalue()


def in_text(data: bytes, nth: int, value: Any) -> bytes | None:
    """JSON, or the text of a tracker, with another number."""
    text = data.decode()
    places = list(re.finditer(r"-?\d[\d.eE+-]*", text))
    if not places:
        return None
    place = places[nth % len(places)]
    shown = "1" + "0" * 5000 if value == HUGE else json.dumps(value, default=repr)
    return (text[: place.start()] + shown + text[place.end() :]).encode()


def spoiler(path: Path) -> Spoil | None:
    """How a number in a file is changed, by what the file is."""
    data = path.read_bytes()
    if data[:4] == b"PK\3\4" and path.suffix != ".distcp":
        return in_archive
    if data[:1] == b"\x80" and path.name in (".metadata", "common.pt"):
        return in_pickle
    readable = data.isascii() and b"\0" not in data
    return in_text if readable and any(byte in b"0123456789" for byte in data) else None


@cache
def spoilers(variant: str) -> list[tuple[str, Spoil]]:
    """The files of a run in which numbers can be changed."""
    run = GOLDEN / variant
    every = sorted(path for path in run.rglob("*") if path.is_file())
    found = [(str(path.relative_to(run)), spoiler(path)) for path in every]
    return [(name, how) for name, how in found if how is not None]


def holds(told: Audit) -> None:
    """An audit that said what it found, in both ways, and had no fault of its own."""
    assert [finding for finding in told.findings if "report this" in finding.says] == []
    msgspec.json.encode(told)


WITH_NUMBERS = [variant for variant in VARIANTS.values() if spoilers(variant)]


def change(variant: str, root: Path, file: int, nth: int, value: Any) -> Iterator[Path]:
    """A run with one number changed, for as long as this is gone through."""
    name, how = spoilers(variant)[file % len(spoilers(variant))]
    path = root / name
    whole = path.read_bytes()
    new = how(whole, nth, value)
    if new is not None:
        path.write_bytes(new)
        yield root
        path.write_bytes(whole)


def hold_with_any_number(variant: str, root: Path, times: int) -> None:
    """Audit a copy of a run with one number changed, again and again."""
    shutil.copytree(GOLDEN / variant, root)

    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=times)
    @given(st.integers(0, 999), st.integers(0, 9999), VALUES)
    def law(file: int, nth: int, value: Any) -> None:
        for spoilt in change(variant, root, file, nth, value):
            holds(audit(spoilt, deep=True))

    law()


@pytest.mark.parametrize("variant", WITH_NUMBERS)
def test_any_number_in_a_file_is_read_past(variant: str, tmp_path: Path) -> None:
    """In every format that has numbers in pickles or in text: the audit ends, and its answer can be
    written as JSON.
    """
    hold_with_any_number(variant, tmp_path / "run", 12)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", WITH_NUMBERS)
def test_any_number_in_a_file_many_more(variant: str, tmp_path: Path) -> None:
    """The same, with as many as there is time for."""
    hold_with_any_number(variant, tmp_path / "run", 1000)


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_any_number_in_a_name_is_read_past(variant: str, tmp_path: Path) -> None:
    """Of each kind of file and of directory, with a number as long as a name can be."""
    run = GOLDEN / variant
    named = {
        re.sub(r"\d+", "#", str(path.relative_to(run))): path.relative_to(run)
        for path in sorted(run.rglob("*"))
        if re.search(r"\d", path.name)
    }
    root = tmp_path / "run"
    for name in list(named.values())[:8]:
        for digits in DIGITS:
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(run, root)
            new = re.sub(r"\d+(?!.*\d)", digits, name.name)
            if new != name.name and not (root / name).with_name(new).exists():
                (root / name).rename((root / name).with_name(new))
                holds(audit(root))


@pytest.mark.parametrize(
    ("variant", "file", "find"),
    [
        ("trainer/two", "out/checkpoint-4/rng_state_{}.pth", trainer),
        ("accelerate/two", "checkpoints/checkpoint_0/random_states_{}.pkl", accelerate),
        ("accelerate/models", "checkpoints/checkpoint_0/optimizer_{}.bin", accelerate),
        ("dcp/separate", "epoch_1/__{}.metadata", dcp),
    ],
)
def test_a_rank_of_a_billion_leaves_no_billion_of_gaps(
    variant: str, file: str, find: Any, tmp_path: Path
) -> None:
    """A name is no reason to count through what is missing; that something is, is told."""
    root = tmp_path / "run"
    shutil.copytree(GOLDEN / variant, root)
    (root / file.format(1)).rename(root / file.format("9" * 12))
    holds(audit(root))
    assert codes(find, root)


@pytest.mark.parametrize(
    "value", [10**5000, -(10**400), float("nan"), True, "7", None],
    ids=["huge", "below", "nan", "true", "text", "none"],
)  # fmt: skip
def test_people_are_told_the_same(value: Any, tmp_path: Path) -> None:
    """The command answers, whatever a training has counted, with words and with JSON."""
    for rank in range(2):
        state = {"w": torch.rand(300), "global_step": value, "pytorch-lightning_version": "2.6"}
        torch.save(state, tmp_path / ("last.ckpt" if rank else "step=3.ckpt"))
    for more in ([], ["--json"]):
        told = CliRunner().invoke(app, ["audit", str(tmp_path), *more])
        assert told.exit_code in (0, 1), told.output


def test_strength_stays_what_it_is(tmp_path: Path) -> None:
    """A number that no count has is no count: nothing is said of it that is certain."""
    for rank in range(2):
        state = {"w": torch.rand(300), "step": 10 ** (400 + rank), "epoch": -rank}
        torch.save(state, tmp_path / f"step_3_rank{rank}.pt")
    told = audit(tmp_path, deep=True)
    assert {finding.strength for finding in told.findings} <= {Strength.HINT}
