"""Who may pass although a rule is broken: by name, for a reason, until a time, and on record.

A file of YAML:

    overrides:
      - {name: nccl-canary, rule: nccl, who: ada, why: canary of 2.30, until: 2026-12-24T00:00:00Z}

An override turns what its rule refuses into a warning that names it. One that has expired does
nothing but say so. One whose use can't be written down is not used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Final

import msgspec

from handfast.errors import UNREADABLE, FormatError
from handfast.fleet.compat.judge import Ruling
from handfast.fleet.compat.reading import MOST, Wrong, composed
from handfast.fleet.compat.rules import Level
from handfast.store.files import describe

__all__ = ["Override", "Used", "excuse", "load"]

UNSYNCED: Final = (errno.EINVAL, errno.EROFS)  # a pipe or a device has nothing to sync

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
    """Read the overrides of a file; see :func:`parse`. Raises OSError, too."""
    with open(path, "rb") as file:
        return parse(file.read(MOST + 1), path)


def parse(data: bytes, name: str) -> tuple[Override, ...]:
    """Read overrides; ``name`` is the file's. Raises FormatError, with it and the line.

    As with rules nothing may stand twice, of which the last would count in silence.
    """
    try:
        found = msgspec.convert(composed(data, name, "overrides", {}), _File)
    except Wrong as wrong:
        raise FormatError(f"{name}: line {wrong.line}: {wrong}") from None
    except UNREADABLE as error:
        what = " ".join(str(error).split())
        raise FormatError(
            f"{name}: no overrides: {what}. What to do: give each name, rule, who, why, and until "
            "with a zone (2026-12-24T00:00:00Z)"
        ) from error
    named = [each.name for each in found.overrides]
    if twice := sorted({each for each in named if named.count(each) > 1}):
        raise FormatError(f"{name}: {twice[0]} stands twice. What to do: rename one")
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
    """Append a line, and come back when all of it is on the disk. Raises OSError.

    A pipe that nobody reads is an error at once, and not a wait.
    """
    line = msgspec.json.encode(used) + b"\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(audit, flags, 0o640)
    try:
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), audit)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in UNSYNCED:
                raise
    finally:
        os.close(fd)
