"""``handfast simulate``: storms over the real protocol in virtual time, one seed each."""

from __future__ import annotations

import difflib
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
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

from handfast.cli.console import DAMAGED, answer, answering, as_json, out
from handfast.cli.scale import measure
from handfast.cli.synchrony import hold
from handfast.sim.script import play
from handfast.sim.storm import GOALS, Outcome, storm

__all__ = ["simulate"]

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


def seeds_of(_: click.Context, __: click.Parameter, text: str | None) -> range | None:
    """Read how many seeds, or A..B: from A up to B, without B."""
    if text is None:
        return None
    parts = re.fullmatch(r"(?:([0-9]{1,18})\.\.)?([0-9]{1,18})", text)
    if parts is None or int(parts[1] or 0) >= int(parts[2]):
        raise click.BadParameter(f"{text!r} is neither a number of seeds (200) nor A..B (200..400)")
    return range(int(parts[1] or 0), int(parts[2]))


def sizes_of(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Read numbers of domains."""
    if text is None:
        return ()
    if not re.fullmatch(r"[0-9]{1,7}(,[0-9]{1,7})*", text) or min(map(int, text.split(","))) < 2:
        raise click.BadParameter(f"{text!r} is no list of numbers from 2 up: 16,256,1024")
    return tuple(int(size) for size in text.split(","))


@click.command()
@click.option("--seeds", callback=seeds_of, metavar="N|A..B", help="Run a swarm of seeds.")
@click.option("--seed", type=int, help="Run one seed.")
@click.option("--transcript", is_flag=True, help="With --seed: tell everything that happened.")
@click.option("--thorough", is_flag=True, help="Hold every law after every step; slow.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one a core]")
@click.option(
    "--minutes", type=click.FloatRange(0, 1e6), help="Go on with further seeds for so long."
)
@click.option(
    "--tally", type=click.Path(dir_okay=False, path_type=Path),
    help="Add this slice's figures to those in a file, and go on where that left off.",
)  # fmt: skip
@click.option(
    "--script", "scripts", multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Play a scenario, and say where it does not come out as it is written.",
)  # fmt: skip
@click.option(
    "--scale", callback=sizes_of, metavar="N,N...",
    help="Measure what an epoch costs jobs of so many domains, and a rack that is lost.",
)  # fmt: skip
@click.option(
    "--synchrony", callback=sizes_of, metavar="N,N...",
    help="Hold the bounds that partial synchrony would give against jobs of so many domains.",
)  # fmt: skip
@click.option(
    "--svg", type=click.Path(file_okay=False, path_type=Path),
    help="With --scale: draw the curves into this directory.",
)  # fmt: skip
@click.option("--rewrite", is_flag=True, help="With --script: write down what comes out.")
@as_json
def simulate(
    seeds: range | None,
    seed: int | None,
    transcript: bool,
    thorough: bool,
    jobs: int | None,
    minutes: float | None,
    tally: Path | None,
    scripts: tuple[Path, ...],
    rewrite: bool,
    scale: tuple[int, ...],
    synchrony: tuple[int, ...],
    svg: Path | None,
    as_json: bool,
) -> None:
    """Put the protocol through storms in virtual time, and judge every step and every calm.

    One seed decides everything: the job, what breaks and when. The same seed gives the same digest.
    """
    swarm = seeds is not None or minutes is not None
    if (seed is not None) + swarm + bool(scripts) + bool(scale) + bool(synchrony) != 1:
        asked = "--seed N, --seeds N or A..B, --minutes M, --script FILE, --scale N,N, --synchrony"
        raise click.UsageError(f"say what to run, one of: {asked}")
    if transcript and seed is None:
        raise click.UsageError("--transcript tells one seed: give --seed N")
    if minutes is not None and math.isnan(minutes):  # which a range lets pass
        raise click.UsageError(f"--minutes {minutes} is no length of time")
    if tally is not None and not tally.absolute().parent.is_dir():
        raise click.UsageError(f"--tally {tally}: there is no directory for it")
    with answering(as_json):
        if scale:
            measure(scale, svg, as_json)
        elif synchrony:
            if not hold(synchrony, as_json):
                raise click.exceptions.Exit(DAMAGED)
        elif scripts:
            _play(scripts, rewrite, as_json)
        elif seed is not None:
            _one(seed, transcript, thorough, as_json)
        else:
            _swarm(seeds, thorough, jobs or os.cpu_count() or 1, minutes, tally, as_json)


def _one(seed: int, transcript: bool, thorough: bool, as_json: bool) -> None:
    outcome = storm(seed, thorough=thorough, transcript=transcript)
    if as_json:
        answer(outcome, sound=not outcome.laws)
    else:
        show = out()
        for line in outcome.tail:
            show.print(escape(line))
        plan = outcome.plan
        tiers = ", ".join(f"{name} {copies}/{need}" for name, copies, need in plan.tiers)
        tree = f", a tree of {plan.fanout}" if plan.fanout else ""
        show.print(f"seed {seed}: {plan.shards} shards, {tiers}{tree}; {', '.join(plan.kinds)}")
        show.print(
            f"{outcome.events:,} events, {outcome.turns:,} steps, {outcome.seconds:.0f} virtual "
            f"seconds, digest {outcome.digest}"
        )
        _tell_breach(outcome)
    if outcome.laws:
        raise click.exceptions.Exit(DAMAGED)


def _play(scripts: tuple[Path, ...], rewrite: bool, as_json: bool) -> None:
    changed = []
    for path in scripts:
        text = path.read_text()
        if (played := play(text)) != text:
            changed.append(str(path))
            if rewrite:
                path.write_text(played)
            elif not as_json:
                diff = difflib.unified_diff(
                    text.splitlines(), played.splitlines(), str(path), "played", lineterm=""
                )
                for line in diff:
                    out().print(escape(line))
    if as_json:
        answer({"scripts": len(scripts), "changed": changed}, sound=rewrite or not changed)
    elif rewrite:
        out().print(f"{len(changed)} of {len(scripts)} rewritten; read what has changed, and why")
    if changed and not rewrite:
        raise click.exceptions.Exit(DAMAGED)


def _tell_breach(outcome: Outcome) -> None:
    show = out()
    for found in outcome.found:
        show.print(f"[bold red]broken:[/] {escape(found)}")
    if outcome.laws:
        show.print(f"again, with all of it: handfast simulate --seed {outcome.seed} --transcript")


def _swarm(
    seeds: range | None, thorough: bool, jobs: int, minutes: float | None, path: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    tally = Tally()
    if path is not None and path.exists():
        tally = msgspec.json.decode(path.read_bytes(), type=Tally)
    before, began = tally.events, time.monotonic()
    source: Iterable[int] = seeds if seeds is not None else itertools.count(tally.next)
    for outcome, busy_s in _run(source, thorough, jobs, minutes and began + 60 * minutes):
        tally.add(outcome, busy_s)
        if outcome.laws and not as_json:
            for line in outcome.tail:
                out().print(escape(line))
            _tell_breach(outcome)
    wall_s = time.monotonic() - began
    if path is not None:
        path.write_text(json.dumps(msgspec.to_builtins(tally), indent=2) + "\n")
    lacking = tally.unreached if tally.seeds >= ENOUGH else ()
    sound = not tally.breaches and not lacking
    if as_json:
        answer(tally, unreached=lacking, wall_s=round(wall_s, 2), sound=sound)
    else:
        _show(tally, lacking, wall_s, tally.events - before)
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _show(tally: Tally, lacking: tuple[str, ...], wall_s: float, events: int) -> None:
    show = out()
    rate = tally.events / max(tally.busy_s, 1e-9)
    show.print(
        f"{tally.seeds:,} seeds: {tally.events:,} events, {tally.turns:,} steps of a member, "
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
) -> Iterator[tuple[Outcome, float]]:
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
            yield from ahead.pop(0).result()


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a worker is as fresh as a process of its own
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=gc.disable) as pool:
        yield pool


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
