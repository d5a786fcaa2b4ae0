"""Shows what each call of the store leaves when it fails, wherever it stands: crash model X.

SQLite's loop over whole stories: the k-th call fails with EIO, ENOSPC or EINTR, or moves half of
its bytes, for every k, until nothing has failed. Then the real code opens what is there. **Every
call site** of the store must have failed at least once: sites are found in the source, and those
that failed by the line that called. No file is synced again after a sync of it failed.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import lab
import pytest
from deletion import SOURCE
from test_store_faults import synced_again

from handfast.errors import HandfastError
from handfast.store.files import Files, Posix
from handfast.store.shelf import named_epoch
from handfast.testing.faults import Fault, FaultyFiles
from handfast.testing.powerloss import Told

ROOMS = ("store/", "agent/keeper.py", "checkpoint/rounds.py", "checkpoint/export.py")
CALLS = {
    name for name, _ in inspect.getmembers(Files, inspect.isfunction) if not name.startswith("_")
} - {"forget", "cached", "direct"}  # which never fail


def sites() -> set[tuple[str, int]]:
    """Every call of a `Files` in the store: its file, and its line."""
    found = set()
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith(ROOMS):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    of_files = ast.unparse(node.func.value).endswith("files")
                    if of_files and node.func.attr in CALLS:
                        found.add((name, node.lineno))
    return found


class Watched(FaultyFiles):
    """Files that fail, and note the line that called when they did."""

    failed: ClassVar[set[tuple[str, int]]] = set()

    def _do(self, kind: str, path: str, action: Callable[[], Any]) -> Any:
        before = self.fired
        try:
            return super()._do(kind, path, action)
        finally:
            if self.fired and not before:
                frame = sys._getframe(2)
                while "/testing/" in frame.f_code.co_filename:  # another such file around this one
                    frame = frame.f_back
                name = frame.f_code.co_filename.removeprefix(f"{SOURCE}/")
                self.failed.add((name, frame.f_lineno))


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with lab.small_world():
        yield


def one(name: str, k: int, fault: Fault, second: int = 0) -> bool:
    """Tell a story in which the k-th call fails, and maybe one more; says whether the k-th did."""
    disk = lab.disk_for(name)
    inner = Watched(disk, k, fault)
    files = Watched(inner, second, fault) if second else inner
    with contextlib.suppress(HandfastError, OSError):
        lab.STORIES[name](disk, files)
    assert synced_again(inner.calls) == []
    if name == lab.LOOKS and inner.fired:
        return True  # nothing was written, but what was taken away for it
    told = tuple(step.fact for step in disk.steps if isinstance(step, Told))
    bad = [named_epoch(os.path.basename(call.path)) for call in inner.calls if call.failed]
    lab.judge(disk, told, goes_on=k % 10 == 0, unreadable=[epoch for epoch in bad if epoch])
    return inner.fired


def loop(names: Collection[str], faults: tuple[Fault, ...]) -> None:
    """Fail each call of the stories, by each fault; in a claim, one of the next calls besides."""
    Watched.failed.clear()
    runs = 0
    for name, fault in itertools.product(names, faults):
        for k in itertools.count(1):
            runs += 1
            if not one(name, k, fault):
                break
    for k in itertools.count(1):
        fired = [one("claim", k, errno.EIO, second) for second in range(k + 1, k + 11)]
        runs += len(fired)
        if not any(fired):
            break
    every = sites()
    missed = sorted(every - Watched.failed)
    print(f"{runs:,} runs, {len(every)} call sites, {len(missed)} never failed: {missed}")
    assert missed == []


def test_every_call_site_of_the_store_may_fail() -> None:
    """Shows it for each call, by EIO; and for a second fault behind one in a claim."""
    loop([name for name in lab.STORIES if name != "handover"], (errno.EIO,))


@pytest.mark.heavy
def test_every_call_site_may_fail_in_every_way() -> None:
    """Shows it for EIO, ENOSPC, EINTR and short counts."""
    loop(lab.STORIES, (errno.EIO, errno.ENOSPC, errno.EINTR, "short"))


def test_the_calls_that_are_counted_are_those_of_the_door() -> None:
    """Shows that no call of the door is left out of the count."""
    assert all(callable(getattr(Posix, name)) for name in CALLS)
    assert {"fsync", "fdatasync", "fsync_dir", "rename", "link", "create", "pwrite"} < CALLS
