"""Show that an override passes only what it names, only in its time, and never unrecorded."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from handfast.errors import FormatError
from handfast.fleet.compat.judge import Ruling
from handfast.fleet.compat.rules import Level
from handfast.fleet.gate.overrides import excuse, load

AT = datetime(2026, 12, 1, tzinfo=UTC)
FILE = """
overrides:
  - {name: canary, rule: nccl, who: ada, why: canary of 2.30, until: 2026-12-24T00:00:00Z}
  - {name: old, rule: torch, who: bob, why: a release, until: 2026-11-30T23:59:00Z}
"""
NCCL = Ruling("nccl", Level.REFUSE, "two NCCLs", ("a", "b"))
TORCH = Ruling("torch", Level.REFUSE, "two torches", ("a",))
OTHER = Ruling("driver", Level.REFUSE, "two drivers", ("a",))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of two overrides, one of which has expired."""
    path = tmp_path / "overrides.yaml"
    path.write_text(FILE)
    return path


def test_only_the_rule_that_it_names_and_only_in_its_time(file: Path) -> None:
    """The sentence says whose override it is and until when, or that it has expired."""
    audit = file.with_suffix(".log")
    found = excuse([NCCL, TORCH, OTHER], load(str(file)), AT, "job 17", str(audit))
    assert [each.level for each in found] == ["warn", "refuse", "refuse"]
    assert found[0].sentence == (
        "two NCCLs; override canary of ada (canary of 2.30) holds until 2026-12-24T00:00:00+00:00"
    )
    assert found[1].sentence.endswith("; override old of bob (a release) expired at "
                                      "2026-11-30T23:59:00+00:00")  # fmt: skip
    assert found[2] is OTHER


def test_each_use_is_a_line_that_is_never_overwritten(file: Path) -> None:
    """Who, why, which job, for what; what expired was not used and is not there."""
    audit = file.with_suffix(".log")
    for job in ("job 17", "job 18"):
        excuse([NCCL, TORCH], load(str(file)), AT, job, str(audit))
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["job"] for line in lines] == ["job 17", "job 18"]
    assert (lines[0]["override"]["who"], lines[0]["sentence"]) == ("ada", "two NCCLs")


def test_a_use_is_on_the_disk_before_it_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is there whole when it is synced, and is synced when the ruling comes back."""
    audit, synced = file.with_suffix(".log"), []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(audit.read_bytes()))
    excuse([NCCL], load(str(file)), AT, "job 17", str(audit))
    assert [line.count(b"\n") for line in synced] == [1]


def test_what_can_not_be_recorded_is_not_used(file: Path) -> None:
    """A directory in the place of the audit's file, say; root can write all others."""
    (found,) = excuse([NCCL], load(str(file)), AT, "job 17", str(file.parent))
    assert found.level is Level.REFUSE
    assert "override canary of ada (canary of 2.30) is not used, since" in found.sentence


@pytest.mark.parametrize("how", ["short", "sync"])
def test_a_line_that_is_not_all_on_the_disk_is_not_used(
    how: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes half of it, or says at the sync that it has lost it."""
    audit = str(file.with_suffix(".log"))
    if how == "short":
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
    else:
        monkeypatch.setattr(os, "fsync", lambda fd: os.fstat(-1))
    (found,) = excuse([NCCL], load(str(file)), AT, "job 17", audit)
    assert found.level is Level.REFUSE
    assert "is not used, since" in found.sentence


def test_a_pipe_is_an_audit_where_somebody_reads_it(file: Path) -> None:
    """And no place to wait for ever where nobody does."""
    pipe = str(file.with_suffix(".pipe"))
    os.mkfifo(pipe)
    (found,) = excuse([NCCL], load(str(file)), AT, "job 17", pipe)
    assert found.level is Level.REFUSE
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    (found,) = excuse([NCCL], load(str(file)), AT, "job 17", pipe)
    assert found.level is Level.WARN
    assert json.loads(os.read(reader, 1 << 16))["job"] == "job 17"
    os.close(reader)


def test_a_warning_needs_no_override(file: Path) -> None:
    """And uses none up."""
    warned = Ruling("nccl", Level.WARN, "two NCCLs", ("a",))
    assert excuse([warned], load(str(file)), AT, "j", str(file.parent)) == (warned,)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("overrides: [{name: a, rule: b, who: c, why: d}]", "until"),
        ("overrides: [{name: a, rule: b, who: c, why: d, until: 2026-12-24T00:00:00}]", "zone"),
        ("overrides: [{name: a, rule: b, who: '', why: d, until: 2026-12-24T00:00:00Z}]", "who"),
        ("{", "no YAML"),
        ("", "the file is empty"),
        (FILE + "overrides: []\n", "overrides stands twice"),
        ("[]", "no overrides"),
        (FILE.replace("name: old", "name: canary"), "canary stands twice"),
    ],
)
def test_what_is_half_said_is_refused(tmp_path: Path, text: str, why: str) -> None:
    """An override without an end, a zone or a name would be one for ever, or nobody's."""
    path = tmp_path / "o.yaml"
    path.write_text(text)
    with pytest.raises(FormatError, match=why):
        load(str(path))


def test_without_pyyaml_it_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No override is read by halves."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(FormatError, match="pip install"):
        load(str(file))
