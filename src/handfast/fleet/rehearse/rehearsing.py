"""A rehearsal, gone through: uniform fleets first, then every walk, each with a fresh fleet."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from itertools import pairwise, product
from tempfile import mkdtemp

import msgspec

from handfast.fleet.rehearse.child import undisturbed
from handfast.fleet.rehearse.fleet import Fleet, Found, Outcome, worst
from handfast.fleet.rehearse.reading import Rehearsal
from handfast.fleet.rehearse.walks import State, Walk, edges, orders, pick

__all__ = ["Asked", "Cut", "Did", "Kind", "Rehearsed", "Trail", "rehearse"]


class Kind(StrEnum):
    """What was done to a fleet: started as a whole, or something to one of its nodes."""

    START = "start"
    UPGRADE = "upgrade"
    DOWNGRADE = "downgrade"
    RESTART = "restart"


class Asked(msgspec.Struct, frozen=True):
    """A pair that was probed, by the versions of its two ends, and what came of it."""

    client: str
    server: str
    found: Found


class Did(msgspec.Struct, frozen=True):
    """A move, what the nodes ran after it, and what came of it.

    ``node`` is empty for a start. ``kept`` is the directory of the fleet, where it was to be kept
    and this move did not work; else empty.
    """

    kind: Kind
    node: str
    versions: tuple[str, ...]
    found: Found
    pairs: tuple[Asked, ...] = ()
    kept: str = ""

    @property
    def works(self) -> bool:
        """Whether the fleet worked afterwards."""
        return self.found.outcome is Outcome.WORKS


Trail = tuple[Did, ...]
"""What was done to one fleet, from its start; only the last may not have worked."""


class Rehearsed(msgspec.Struct, frozen=True):
    """What came of a rehearsal.

    ``judged`` is True once the fleets of one version have all worked; else no mixture was tried.
    ``cut``: it was interrupted, so what is missing was not tried.
    ``unmade`` counts moves that no walk could come to; ``untidy`` says what came of teardowns that
    did not work.
    """

    trails: tuple[Trail, ...]
    judged: bool
    unmade: int
    untidy: tuple[str, ...]
    seconds: float
    cut: bool = False


class Cut(KeyboardInterrupt):
    """A rehearsal was cut off: what ``came`` of it until then, and the ``interrupt``."""

    def __init__(self, came: Rehearsed, interrupt: KeyboardInterrupt) -> None:
        self.came = came
        self.interrupt = interrupt
        super().__init__("the rehearsal was cut off")


def rehearse(
    rehearsal: Rehearsal,
    *,
    quick: bool = False,
    keep: str | None = None,
    tell: Callable[[Kind, str], None] = lambda *_: None,
) -> Rehearsed:
    """Go through a rehearsal. ``tell`` is told before each move what it is, in one line.

    ``quick``: each move from each state once, and not in every order. ``keep``: a directory in
    which that of each fleet that did not work stays. Whatever ends the call, no process that it
    started is left. Raises OSError where there is no room for a fleet, and Cut for an interrupt.
    """
    return _Stage(rehearsal, quick, keep, tell).play()


class _Stage:
    """What has come of it so far."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        quick: bool,
        keep: str | None,
        tell: Callable[[Kind, str], None],
    ) -> None:
        self._is = rehearsal
        self._size = len(rehearsal.nodes)
        self._quick = quick
        self._keep = None if keep is None else os.path.abspath(keep)
        self._tell = tell
        self._begun = time.monotonic()
        self._judged = False
        self._trails: list[Trail] = []
        self._unmade = 0
        self._untidy: list[str] = []

    def play(self) -> Rehearsed:
        """All of it."""
        try:
            self._all()
        except KeyboardInterrupt as interrupt:
            raise Cut(self._came(cut=True), interrupt) from interrupt
        return self._came(cut=False)

    def _came(self, *, cut: bool) -> Rehearsed:
        took = round(time.monotonic() - self._begun, 1)
        untidy = tuple(self._untidy)
        return Rehearsed(tuple(self._trails), self._judged, self._unmade, untidy, took, cut)

    def _all(self) -> None:
        versions = tuple(self._is.versions)
        uniform = [(version,) * self._size for version in versions]
        for each in uniform:
            self._together(each)
        self._judged = all(trail[0].works for trail in self._trails)
        if self._judged and not self._is.run:
            for mixed in product(versions, repeat=self._size):
                if mixed not in uniform:
                    self._together(mixed)
        elif self._judged:
            for old, new in pairwise(versions):
                self._neighbours(old, new)

    def _together(self, versions: tuple[str, ...]) -> None:
        """A fleet that is started as it is, once."""
        with self._fleet(versions) as (fleet, trail):
            self._do(fleet, trail, Kind.START)

    def _neighbours(self, old: str, new: str) -> None:
        """Every walk between two versions."""
        walks = orders(self._size)
        gone: set[Walk] = set()
        broken: set[Walk] = set()
        restarted: set[tuple[State, int]] = set()
        while (walk := pick(walks, gone, broken, quick=self._quick)) is not None:
            came, works = self._walk(old, new, walk, restarted)
            if came is not None:
                (gone if works else broken).add(came)
        made = {edge for walk in gone | broken for edge in edges(walk)}
        self._unmade += len({edge for walk in walks for edge in edges(walk)} - made)

    def _walk(
        self, old: str, new: str, walk: Walk, restarted: set[tuple[State, int]]
    ) -> tuple[Walk | None, bool]:
        """Go a walk as far as it works; gives what was gone of it, and whether that worked.

        It gives None where a restart did not work. A node is restarted once at each state, so the
        same walk, gone again, comes further.
        """
        with self._fleet((old,) * self._size) as (fleet, trail):
            if not self._do(fleet, trail, Kind.START):
                return (), False
            for at, node in enumerate((*walk, None)):
                state = tuple(sorted(walk[:at]))
                for each in range(self._size):
                    if (state, each) not in restarted:
                        restarted.add((state, each))
                        if not self._do(fleet, trail, Kind.RESTART, each, fleet.versions[each]):
                            return None, False
                if node is not None:
                    up = node not in walk[:at]
                    kind, version = (Kind.UPGRADE, new) if up else (Kind.DOWNGRADE, old)
                    if not self._do(fleet, trail, kind, node, version):
                        return walk[: at + 1], False
        return walk, True

    @contextmanager
    def _fleet(self, versions: tuple[str, ...]) -> Iterator[tuple[Fleet, list[Did]]]:
        """Make a fleet, and in the end away with it; what was done to it is remembered."""
        trail: list[Did] = []
        with self._directory(trail) as root:
            fleet = Fleet(self._is, root, versions)
            try:
                yield fleet, trail
            finally:
                with undisturbed():
                    end = fleet.close()
                    if trail:  # else it was interrupted before there was anything to tell
                        self._trails.append(tuple(trail))
                    if end.outcome is not Outcome.WORKS and end.sentence not in self._untidy:
                        self._untidy.append(end.sentence)

    @contextmanager
    def _directory(self, trail: Sequence[Did]) -> Iterator[str]:
        """Make the directory of a fleet, and away with it unless it is to be kept."""
        root = mkdtemp(prefix=f"handfast-fleet-{len(self._trails) + 1}-", dir=self._keep)
        try:
            yield root
        finally:
            with undisturbed():
                if mounted := _mounted(root):  # what is mounted there is not ours to remove
                    what = f"{mounted} is still mounted, so {root} is left as it is"
                    self._untidy.append(f"{what}. What to do: unmount it in `teardown`")
                elif not (trail and trail[-1].kept) and not _away(root):
                    what = f"{root} could not be removed whole: see what holds it or writes there"
                    self._untidy.append(f"{what}. What to do: end that in `teardown`")

    def _do(
        self, fleet: Fleet, trail: list[Did], kind: Kind, at: int = 0, version: str = ""
    ) -> bool:
        """Do one thing to a fleet, and see what came of it."""
        node = "" if kind is Kind.START else self._is.nodes[at]
        what = f"{kind} {node} to {version}" if node else f"{kind} all"
        self._tell(kind, f"fleet {len(self._trails) + 1}: {', '.join(fleet.versions)}: {what}")
        found = fleet.lost()  # since the last look: to stop it now would hide that
        if found.outcome is Outcome.WORKS:
            found = fleet.move(node, version) if node else fleet.start()
        probed = fleet.probe() if found.outcome is Outcome.WORKS else {}
        # a node that ended says more than a probe that failed for it
        found = worst([fleet.lost(), found, *probed.values()])
        runs = dict(zip(self._is.nodes, fleet.versions, strict=True))
        pairs = tuple(
            Asked(runs[ends[0]], runs[ends[1]], each)
            for ends, each in probed.items()
            if len(ends) == 2
        )
        broke = self._keep is not None and found.outcome is not Outcome.WORKS
        kept = fleet.root if broke else ""
        trail.append(Did(kind, node, fleet.versions, found, pairs, kept))
        return trail[-1].works


def _mounted(root: str) -> str:
    """Name a place at or below a directory where something is mounted; "" where nothing is.

    /proc/self/mountinfo: the fifth field, in which blanks are spelled \\040 (proc(5)).
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        places = [line.split(" ")[4].replace("\\040", " ") for line in file]
    real = os.path.realpath(root)
    return next((at for at in places if f"{at}/".startswith(f"{real}/")), "")


def _away(root: str) -> bool:
    """Remove a directory and all below it, also what a program took its own rights to.

    Says whether it is gone: a file may be immutable, and a daemon may go on writing there.
    """
    for at, directories, _ in os.walk(root):
        for path in (f"{at}/{name}" for name in directories):
            if not os.path.islink(path):
                with suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(root, ignore_errors=True)
    return not os.path.lexists(root)
