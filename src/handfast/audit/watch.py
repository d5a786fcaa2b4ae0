"""Watching a directory that a training writes to: an alarm when a tear appears, not before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Final

from handfast.audit.extent import Reader
from handfast.audit.finding import Finding, Strength
from handfast.audit.place import look
from handfast.audit.room import MEMORY
from handfast.audit.run import audit

__all__ = ["watch"]

PAUSE_S: Final = 5.0
STILL: Final = 3
"""Looks in which nothing may have changed: who is amid a save writes more often than that."""


def watch(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    memory: int = MEMORY,
    pause_s: float = PAUSE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Finding]:
    """Yield each new finding that is certain or strong, for ever.

    A save that is under way looks torn, so nothing is said before no file has changed for
    ``STILL`` looks, ``pause_s`` seconds apart. Raises HandfastError where the path can't be looked
    at any more.
    """
    known: set[tuple[object, ...]] = set()
    before: object = None
    still, told = 0, False
    while True:
        with Reader() as reader:
            now = look(path, reader).files
        still, told = (still + 1, told) if now == before else (0, False)
        before = now
        if still >= STILL and not told:
            told = True
            for finding in audit(path, deep=deep, memory=memory).findings:
                key = (finding.code, finding.step, finding.says)
                if finding.strength is not Strength.HINT and key not in known:
                    known.add(key)
                    yield finding
        sleep(pause_s)
