"""Shows what a power loss leaves on ext4: crash model L, on the blocks of a real file system.

The real store saves on an ext4 whose disk logs each write and each flush. What was written is then
laid out again as it stood at each flush, and between flushes with a random half of what had come
since the last: ext4 mounts it and replays its own journal, the real code opens what is there.
Whatever was told by then is there, and whole. A saver that syncs nothing is the control.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import blocklog
import lab
import pytest

from handfast.core.lattice import Epoch
from handfast.errors import HandfastError
from handfast.store.files import Files, Posix
from handfast.testing.faults import Hasty

SAVES = 3
WHY = blocklog.unavailable()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "it can be mounted")


class Recorded(NamedTuple):
    """What was written since the file system was made, and when what was told, in bytes of log."""

    log: list[blocklog.Write]
    told: list[tuple[int, object]]


@contextlib.contextmanager
def logging(home: Path, log: Path) -> Iterator[Path]:
    """Mount the file system of one file; gives the file."""
    point = home / "blocks"
    point.mkdir()
    argv = [sys.executable, blocklog.__file__, str(point), str(log), str(blocklog.SIZE)]
    with subprocess.Popen(argv) as server:
        deadline = time.monotonic() + 20
        while not (point / "image").exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield point / "image"
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(point)], check=False)


def record(home: Path, files: Files, saves: int, options: str) -> Recorded:
    """Let the real agent save on a logged ext4."""
    log = home / "log"
    told: list[tuple[int, object]] = []
    with logging(home, log) as image, blocklog.ext4(image, home, make=True, options=options) as fs:
        agent = lab.Agent(files, lambda fact: told.append((log.stat().st_size, fact)), f"{fs}/run")
        agent.open(1)
        for n in range(1, saves + 1):
            agent.save(Epoch(1, n))
        agent.keeper.directory.close()
    return Recorded(blocklog.read_log(log), told)


def replay(
    home: Path, recorded: Recorded, seeds: int, options: str, every: int
) -> tuple[int, list[str]]:
    """Judge one of `every` images: (how many these were, what was lost)."""
    ends, at = [0], 0
    for entry in recorded.log:
        at += blocklog.HEAD.size + len(entry.data)
        ends.append(at)
    count, seen, lost = 0, 0, []
    made = recorded.told[0][0]  # before that the file system itself was being made
    image = home / "replayed"
    for seed in range(seeds):
        for n, data in blocklog.images(recorded.log, bytes(blocklog.SIZE), random.Random(seed)):
            seen += 1
            if ends[n] < made or seen % every:
                continue
            count += 1
            told = tuple(fact for when, fact in recorded.told if when <= ends[n])
            image.write_bytes(data)
            with blocklog.ext4(image, home, options=options) as fs:
                try:
                    lab.judge(Hasty(), told, goes_on=count % 20 == 0, root=f"{fs}/run")
                except (lab.Lost, HandfastError, OSError, ValueError) as error:
                    lost.append(f"seed {seed}, entry {n}: {error}")
    return count, lost


def whole(tmp_path: Path, saves: int, seeds: int, every: int = 1) -> int:
    """Record and replay; nothing may be lost. Returns how many images there were."""
    options = f"{blocklog.OPTIONS},noauto_da_alloc"
    with lab.small_world():
        recorded = record(tmp_path, Posix(), saves, options)
        count, lost = replay(tmp_path, recorded, seeds, options, every)
    print(f"{len(recorded.log)} writes and flushes, {count} images, {len(lost)} torn or lost")
    assert lost == []
    return count


def test_a_power_loss_on_ext4_loses_nothing_that_was_told(tmp_path: Path) -> None:
    """Shows it for one save."""
    assert whole(tmp_path, 1, 1, every=8) > 8


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_two_thousand_images_of_ext4(tmp_path: Path) -> None:
    """Shows it for a first start and three saves, with as many choices of what was lost."""
    assert whole(tmp_path, SAVES, 14) >= 2000


def test_a_saver_that_syncs_nothing_is_torn_on_ext4(tmp_path: Path) -> None:
    """Shows that the same laboratory finds a wrong saver: it would see a loss if there were one."""
    options = f"{blocklog.OPTIONS},noauto_da_alloc,commit=1"
    with lab.small_world():
        recorded = record(tmp_path, Hasty(), 1, options)
        count, lost = replay(tmp_path, recorded, 1, options, 1)
    print(f"{len(recorded.log)} writes and flushes, {count} images, {len(lost)} torn or lost")
    assert lost
