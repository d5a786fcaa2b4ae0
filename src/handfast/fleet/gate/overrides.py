"""Who may pass although a rule is broken: by name, for a reason, until a time, and on record.

A file of YAML:

    overrides:
      - {name: nccl-canary, rule: nccl, who: ada, why: canary of 2.30, until: 2026-12-24T00:00:00Z}

An override turns what its rule refuses into a warning that names it. One that has expired does
nothing but say so. One whose use can't be written down is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from importlib import import_module
from typing import Annotated, Any

import msgspec

from handfast.errors import UNREADABLE, FormatError
from handfast.fleet.compat.judge import Ruling
from handfast.fleet.compat.rules import Level
from handfast.store.files import describe

__all__ = ["Override", "Used", "excuse", "load"]

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One override. ``until`` has a zone: 2026-12-24T00:00:00Z."""

    name: _Text
    rule: _Text
    who: _Text
    why: _Text
    until: Annotated[datetime, msgspec.Meta(tz=True)]


class Used(msgspec.Struct, frozen=True):
    """A line of the audit: an override that was used, when, by which job, for what."""

    at: datetime
    job: str
    override: Override
    sentence: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    overrides: tuple[Override, ...]


def load(path: str) -> tuple[Override, ...]:
    """Read overrides. Raises FormatError for what can't be read, and OSError."""
    try:
        yaml: Any = import_module("yaml")  # it has no types of its own
    except ImportError:
        raise FormatError(
            f"{path}: overrides are YAML, which the package PyYAML reads, and it is not "
            "installed. What to do: pip install 'handfast[fleet]'"
        ) from None
    with open(path, "rb") as file:
        data = file.read(1 << 20)
    try:
        found = msgspec.convert(yaml.load(data, Loader=yaml.BaseLoader), _File)
    except (yaml.YAMLError, *UNREADABLE) as error:
        what = " ".join(str(error).split())
        raise FormatError(
            f"{path}: no overrides: {what}. What to do: give each name, rule, who, why, and until "
            "with a zone (2026-12-24T00:00:00Z)"
        ) from error
    names = [each.name for each in found.overrides]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FormatError(f"{path}: {twice[0]} stands twice. What to do: rename one")
    return found.overrides


def excuse(
    rulings: Iterable[Ruling], given: Iterable[Override], at: datetime, job: str, audit: str
) -> tuple[Ruling, ...]:
    """Turn what overrides allow into warnings; each use is appended to the file ``audit``."""
    by_rule: dict[str, list[Override]] = {}
    for each in given:
        by_rule.setdefault(each.rule, []).append(each)
    return tuple(_excused(each, by_rule.get(each.rule, []), at, job, audit) for each in rulings)


def _excused(ruling: Ruling, given: list[Override], at: datetime, job: str, audit: str) -> Ruling:
    if ruling.level is not Level.REFUSE or not given:
        return ruling
    last = max(given, key=lambda each: each.until)
    told = f"override {last.name} of {last.who} ({last.why})"
    level, tail = Level.REFUSE, f"{told} expired at {last.until.isoformat()}"
    if last.until > at:
        level, tail = Level.WARN, f"{told} holds until {last.until.isoformat()}"
        try:
            _write(audit, Used(at, job, last, ruling.sentence))
        except OSError as error:
            level = Level.REFUSE
            tail = f"{told} is not used, since {audit} can't be written: {describe(error)}"
    return msgspec.structs.replace(ruling, level=level, sentence=f"{ruling.sentence}; {tail}")


def _write(audit: str, used: Used) -> None:
    """Append a line, and come back when it is on the disk."""
    fd = os.open(audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        os.write(fd, msgspec.json.encode(used) + b"\n")
        with suppress(OSError):  # a pipe or a log device has nothing to sync
            os.fsync(fd)
    finally:
        os.close(fd)
