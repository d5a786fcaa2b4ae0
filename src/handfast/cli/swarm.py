"""``handfast simulate --seeds`` and ``--minutes``: many storms, and figures that add up."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import DAMAGED, answer, out
from handfast.errors import UNREADABLE
from handfast.sim.storm import GOALS, Outcome, storm

__all__ = ["swarm", "tell_breach"]

BATCH: Final = 8
ENOUGH: Final = 100
"""So many seeds are a swarm: fewer may leave goals unreached."""


class Tally(msgspec.Struct):
    """The figures of a swarm, or of several slices of one.

    ``seeds`` is their number, ``next`` the seed to go on with; ``events`` are of the queue,
    ``turns`` calls of ``step``; ``virtual_s`` is simulated time, ``busy_s`` processor time, both
    summed over all seeds. ``digest`` is over the seeds' digests, in their order.
    """

    seeds: int = 0
    next: int = 0
    events: int = 0
    turns: int = 0
    virtual_s: float = 0.0
    busy_s: float = 0.0
    digest: str = ""
    goals: dict[str, int] = {}
    breaches: dict[int, tuple[str, ...]] = {}

    def add(self, outcome: Outcome, busy_s: float) -> None:
        """Add a seed."""
        self.seeds += 1
        self.next = outcome.seed + 1
        self.events += outcome.events
        self.turns += outcome.turns
        self.virtual_s += outcome.seconds
        self.busy_s += busy_s
        self.digest = blake2b((self.digest + outcome.digest).encode(), digest_size=16).hexdigest()
        self.goals = dict(Counter(self.goals) + Counter(outcome.goals))
        if outcome.laws:
            self.breaches[outcome.seed] = outcome.laws

    @property
    def unreached(self) -> tuple[str, ...]:
        """Name the goals that no seed has met."""
        return tuple(goal for goal in GOALS if not self.goals.get(goal))


def tell_breach(outcome: Outcome) -> None:
    """Say which laws a seed has broken, and how to see it again; or that it has broken none."""
    show = out()
    for found in outcome.found:
        show.print(f"[bold red]broken:[/] {escape(found)}")
    if outcome.laws:
        show.print(f"again, with all of it: handfast simulate --seed {outcome.seed} --transcript")
    else:
        show.print("no law was broken")


def swarm(
    asked: range | int | None, thorough: bool, jobs: int, minutes: float | None,
    path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run the seeds that are asked for: a range, so many further ones, or None, as time allows.

    After ``minutes`` it takes no more seeds, and says how many of those that were asked for it ran.
    ``path`` is of a tally that is gone on with, and written after every batch. Exits with 1 where
    a law was broken or a goal left out. Raises ValueError for a file that is no tally, and for a
    range of which it has counted a part.
    """
    tally = _read(path)
    seeds = _further(asked, tally, path)
    before, began = msgspec.structs.replace(tally), time.monotonic()
    try:
        for batch in _run(seeds, thorough, jobs, minutes and began + 60 * minutes):
            for outcome, busy_s in batch:
                tally.add(outcome, busy_s)
                if outcome.laws and not as_json:
                    for line in outcome.tail:
                        out().print(escape(line))
                    tell_breach(outcome)
            _write(tally, path)
    except KeyboardInterrupt:
        _interrupted(tally, path, tally.seeds - before.seeds)
        raise
    wall_s = time.monotonic() - began
    lacking = tally.unreached if tally.seeds >= ENOUGH else ()
    sound = not tally.breaches and not lacking
    if as_json:
        answer(tally, unreached=lacking, wall_s=round(wall_s, 2), sound=sound)
    else:
        _show(tally, lacking, wall_s, tally.events - before.events)
        ran = tally.seeds - before.seeds
        wanted = asked if isinstance(asked, int) else len(asked or ())
        if ran < wanted:
            out().print(f"time was over after {ran:,} of {wanted:,} seeds")
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _read(path: Path | None) -> Tally:
    if path is None or not path.exists():
        return Tally()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Tally)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is no tally of this command: {error}. What to do: name another file, or "
            "remove this one to begin anew"
        ) from error


def _further(asked: range | int | None, tally: Tally, path: Path | None) -> Iterable[int]:
    """Give the seeds to run: each is counted once, and they are counted upwards."""
    match asked:
        case None:
            return itertools.count(tally.next)
        case int():
            return range(tally.next, tally.next + asked)
    if asked.start < tally.next:
        raise ValueError(
            f"--seeds {asked.start}..{asked.stop}: {path} has counted up to seed "
            f"{tally.next - 1}. What to do: give --seeds {asked.stop - asked.start} to go on from "
            f"there, or {tally.next}..B"
        )
    return asked


def _write(tally: Tally, path: Path | None) -> None:
    """Replace the file as a whole: whenever this is interrupted, one of the two is there."""
    if path is not None:
        draft = path.with_name(f"{path.name}.new")
        draft.write_text(json.dumps(msgspec.to_builtins(tally), indent=2) + "\n")
        draft.replace(path)


def _interrupted(tally: Tally, path: Path | None, ran: int) -> None:
    kept = (
        f"{path} has counted {tally.seeds:,} seeds, and the next is {tally.next}"
        if path is not None and tally.seeds
        else "nothing was kept; --tally FILE keeps every batch of seeds"
    )
    click.echo(f"interrupted after {ran:,} seeds: {kept}", err=True)


def _show(tally: Tally, lacking: tuple[str, ...], wall_s: float, events: int) -> None:
    show = out()
    rate = tally.events / max(tally.busy_s, 1e-9)
    show.print(
        f"{tally.seeds:,} seeds: {tally.events:,} events, {tally.turns:,} moves of members, "
        f"{tally.virtual_s / 3600:,.1f} virtual hours"
    )
    show.print(
        f"{events:,} events in {wall_s:,.1f} s here; {rate:,.0f} events a second of processor time"
    )
    show.print(f"digest {tally.digest}")
    for goal in GOALS:
        count = tally.goals.get(goal, 0)
        show.print(f"{count:>12,}  {goal}", style="bold red" if goal in lacking else None)
    if lacking:
        show.print(f"[bold red]never reached:[/] {', '.join(lacking)}")
    broken = ", ".join(f"seed {seed} ({' '.join(laws)})" for seed, laws in tally.breaches.items())
    show.print(f"[bold red]laws broken:[/] {broken}" if broken else "no law was broken")


def _run(
    seeds: Iterable[int], thorough: bool, jobs: int, until: float | None
) -> Iterator[list[tuple[Outcome, float]]]:
    """Run seeds, in their order, in so many processes; take no new ones after an instant.

    Some are run in any case, so that a slice always gets on.
    """
    source, taken = iter(seeds), 0
    with _pool(jobs) as pool:
        ahead: list[Future[list[tuple[Outcome, float]]]] = []
        while True:
            over = until is not None and taken > 0 and time.monotonic() > until
            while not over and len(ahead) < 2 * jobs and (batch := list(islice(source, BATCH))):
                ahead.append(pool.submit(run_batch, batch, thorough))
                taken += len(batch)
            if not ahead:
                return
            yield ahead.pop(0).result()


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a worker is as fresh as a process of its own
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Make a worker's process ready; a Ctrl-C, which all processes get, is the command's."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_batch(seeds: list[int], thorough: bool) -> list[tuple[Outcome, float]]:
    """Run some seeds; give each one's outcome and processor time in seconds.

    A storm makes few cycles and much that lives as long as it does: the cyclic collector, which is
    off in a worker, would take a quarter of the time, and runs between batches.
    """
    done = []
    for seed in seeds:
        began = time.process_time()
        outcome = storm(seed, thorough=thorough)
        done.append((outcome, time.process_time() - began))
    gc.collect()
    return done
