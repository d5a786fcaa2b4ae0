"""When to kill what: a schedule that follows from a seed, and eyes for the moment to strike.

A strike waits until the run has gone some steps beyond its last resume, then either strikes at a
random moment, or lies in wait for a phase of a save and strikes inside it.
"""

import os
import random
from pathlib import Path
from typing import Literal

import msgspec

from handfast.demo.events import Event
from handfast.demo.result import Target

__all__ = ["PHASES", "Aim", "Eyes", "Strike", "plan", "with_rollback"]

Aim = Literal["moment", "saving", "staging", "persisting", "attesting", "releasing"]
"""``moment``: whatever is under way; ``saving``: each moment of a save as likely; else a phase."""

PHASES = ("staging", "persisting", "attesting", "releasing")

_HANDFAST: tuple[Aim, ...] = ("staging", "persisting", "moment", "attesting", "releasing", "moment")
_PEERS: tuple[Aim, ...] = ("persisting", "saving", "persisting", "moment")


class Strike(msgspec.Struct, frozen=True):
    """One kill to come. ``gap`` is how many steps the run must first make; ``chance``, from 0 to
    1, places the strike within its window; ``torchrun`` asks that torchrun runs the job then,
    ``rollback`` that an operator goes back by a save with the next start."""

    target: Target
    rank: int | None
    aim: Aim
    gap: int
    chance: float
    torchrun: bool = False
    rollback: bool = False


def plan(seed: int, kills: int, *, steps: int, every: int, agents: bool = True) -> list[Strike]:
    """A schedule of ``kills`` strikes over a run of ``steps``, the same for the same arguments.

    Two of three aim at a phase of a save, all phases in turn. Two in the middle fall on the job
    under torchrun: first a rank, so that torchrun restarts the others, then all of it. ``agents``
    is False for savers that have none: then jobs and ranks are struck, in the phases that a plain
    writer has, and torchrun is left out.
    """
    dice = random.Random(f"chaos/{seed}")  # noqa: S311 - a schedule, no secret
    kinds = _HANDFAST if agents else _PEERS
    aims = [kinds[i % len(kinds)] for i in range(kills)]
    dice.shuffle(aims)
    pool: list[Target] = ["job", "rank", "agent", "node", "rank"] if agents else ["job", "rank"]
    targets = [pool[i % len(pool)] for i in range(kills)]
    dice.shuffle(targets)
    gaps = _gaps(dice, kills, steps=steps, every=every)
    strikes: list[Strike] = []
    episode = _episode(targets) if agents else -1
    for number in range(kills):
        target: Target = targets[number]
        if number == episode:
            target = "rank"
        elif number == episode + 1 and episode >= 0:
            target = "job"
        rank = dice.randrange(4) if target == "rank" else None
        under = episode >= 0 and number in (episode, episode + 1)
        strikes.append(Strike(target, rank, aims[number], gaps[number], dice.random(), under))
    return strikes


def with_rollback(strikes: list[Strike]) -> list[Strike]:
    """The same storm, but that an operator rolls the run back in the middle of it.

    The strike after that falls before the new timeline has saved anything: what a saver then takes
    for its newest checkpoint is of the timeline that was given up.
    """
    middle = len(strikes) // 2
    back = Strike("job", None, "moment", strikes[middle].gap, 0.5, rollback=True)
    soon = Strike("job", None, "moment", 3, 0.0)
    return [*strikes[:middle], back, soon, *strikes[middle + 2 :]]


def _gaps(dice: random.Random, kills: int, *, steps: int, every: int) -> list[int]:
    """How many steps to go before each strike: a save at least, and in all less than the run.

    They are counted from a resume. A strike that lies in wait for a save comes some steps later,
    and then undoes some: that cancels out, and a seventh is left for where it does not.
    """
    shortest = every + 1
    spare = max(0, steps * 6 // 7 - kills * shortest)
    cuts = sorted(dice.randint(0, spare) for _ in range(kills))
    return [shortest + cut - before for cut, before in zip(cuts, [0, *cuts], strict=False)]


def _episode(targets: list[Target]) -> int:
    """Where torchrun's two strikes begin: about the middle, after one that ends the job."""
    middle = len(targets) // 2
    for number in range(max(1, middle), len(targets) - 1):
        if targets[number - 1] != "agent":
            return number
    return -1


class Eyes:
    """Sees which phase of a save is under way, by the run's events and its files.

    Most phases are shorter than the time between two looks, so a look tells what has happened
    since the last one.
    """

    def __init__(self, run: str) -> None:
        self._run = Path(run)
        self._saving: set[int] = set()
        self._files: dict[str, tuple[int, int]] = {}
        self._began = 0.0
        self._lasted = 0.05

    def take(self, event: Event) -> None:
        """Note a save's beginning and end."""
        if event.kind in ("start", "resumed", "error"):
            self._saving.discard(event.rank)
        elif event.kind == "saving":
            if not self._saving:
                self._began = event.at
            self._saving.add(event.rank)
        elif event.kind == "saved":
            self._saving.discard(event.rank)
            if not self._saving:
                self._lasted = event.at - self._began

    def forget(self) -> None:
        """The ranks are gone: nobody is saving."""
        self._saving.clear()

    def window(self) -> tuple[float, float] | None:
        """The save under way: when it began, and how many seconds the last one took."""
        return (self._began, self._lasted) if self._saving else None

    def look(self) -> set[str]:
        """The phases seen since the last look."""
        before, self._files = self._files, self._walk()
        fresh = {path for path, stamp in self._files.items() if before.get(path) != stamp}
        gone = before.keys() - self._files.keys()
        seen = {"staging"} if self._saving else set()
        if any("/manifests/" not in path for path in fresh):
            seen.add("persisting")
        if any("/manifests/" in path and not _draft(path) for path in fresh):
            seen.add("attesting")
        if any(not _draft(path) for path in gone):
            seen.add("releasing")
        return seen

    def _walk(self) -> dict[str, tuple[int, int]]:
        """Every checkpoint file with its inode and length: a rename is a change too."""
        found: dict[str, tuple[int, int]] = {}
        folders = [self._run / "checkpoints"]
        while folders:
            try:
                entries = list(os.scandir(folders.pop()))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.name != "journal":
                    try:
                        found[entry.path] = (entry.inode(), entry.stat().st_size)
                    except FileNotFoundError:
                        continue
        return found


def _draft(path: str) -> bool:
    return "tmp" in path.rpartition("/")[2]
