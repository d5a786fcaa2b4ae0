"""``handfast plan``: how often a save is torn, what waiting costs, and under which conditions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from handfast import open as open_run
from handfast.checkpoint.history import History, history
from handfast.cli.console import (
    DAMAGED,
    Number,
    Whole,
    answer,
    answering,
    as_json,
    is_default,
    out,
    tabulate,
    write_into,
)
from handfast.model.explained import Finding, Setting, explain
from handfast.model.montecarlo import Estimate, proportion
from handfast.model.plots import PLOTS, plot

__all__ = ["plan"]

UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


MOST_OFTEN: Final = 0.99
"""How often a domain may fail to stage, for a plan to make sense."""


class Time(click.ParamType[float]):
    """A length of time: 90s, 30m, 12h, 2d, or never; 90 is of seconds."""

    name = "TIME"
    written = "90s, 30m, 12h, 2d or never"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Give it in seconds; anything else is wrong usage (exit code 2)."""
        if isinstance(value, float):
            return value
        if value == "never":
            return math.inf
        parts = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([smhd]?)", value)
        if parts is None or not float(parts[1]):
            self.fail(f"{value!r} is no time above zero: {self.written}", param, ctx)
        return float(parts[1]) * UNITS[parts[2]]


class FiniteTime(Time):
    """A length of time that comes to an end."""

    written = "90s, 30m, 12h or 2d"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Give it in seconds; anything else is wrong usage (exit code 2)."""
        seconds = super().convert(value, param, ctx)
        if math.isinf(seconds):
            self.fail(f"this can't be 'never': {self.written}", param, ctx)
        return seconds


def _time(seconds: float) -> str:
    if math.isinf(seconds):
        return "never"
    whole = [unit for unit, size in UNITS.items() if unit and seconds % size == 0]
    if whole:  # 50000h, as it may have been given, and not 2083d
        return f"{seconds / UNITS[whole[-1]]:,.0f}{whole[-1]}"
    unit = max((u for u in UNITS if u and seconds >= UNITS[u]), key=UNITS.__getitem__, default="s")
    return f"{seconds / UNITS[unit]:.4g}{unit}"


OPTIONS: Final[tuple[tuple[str, click.ParamType[Any], Any, str], ...]] = (
    ("--domains", Whole(2, 10**7), 16384, "Domains that commit on their own."),
    ("--commits", click.Choice(["uniform", "exponential"]), "uniform", "How commit times spread."),
    ("--window", FiniteTime(), "60s", "Width if uniform, mean if exponential."),
    ("--interval", FiniteTime(), "30m", "From the beginning of a save to that of the next."),
    ("--mtbf", FiniteTime(), "50000h", "Between failures of one domain by itself."),
    ("--host-mtbf", Time(), "never", "Between failures that take a host's domains at once."),
    ("--job-mtbf", Time(), "never", "Between failures that take everything at once."),
    ("--per-host", Whole(1), 8, "Domains that share a host."),
    ("--failure", Number(0, MOST_OFTEN), 0.01, "How often a domain fails to stage at a try."),
    ("--remaining", Number(1e-15, 0.99), 1e-6, "Chance that may remain that one has not."),
    ("--copies", Whole(1, 12), 2, "Copies of a shard."),
    ("--repair", FiniteTime(), "10m", "Until a lost copy is made anew."),
    ("--cost", FiniteTime(), "10s", "How long a save holds the training up."),
    ("--restart", FiniteTime(), "5m", "From a failure until the training goes on."),
    ("--levels", Whole(2, 1000), 3, "Epochs that a domain may be at."),
)


def _settings(command: Any) -> Any:
    for name, kind, default, words in reversed(OPTIONS):
        option = click.option(name, type=kind, default=default, show_default=True, help=words)
        command = option(command)
    return command


@click.command(
    epilog="TIME: 90s, 30m, 12h, 2d, never; without a unit, seconds. RUN: as for the other "
    "commands; with --fit. Exit codes: 0; 1 a simulation contradicts its formula; 2 wrong usage; "
    "3 could not look."
)
@click.argument("run", nargs=-1, metavar="[RUN]...")
@click.option("--explain", "explained", is_flag=True, help="Conditions, and a simulation of each.")
@click.option("--fit", is_flag=True, help="Take from RUN's journals what they tell.")
@click.option("--hints", is_flag=True, help="With --fit: its files' times too, for what they are.")
@click.option(
    "--svg",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Plots of P(torn).",
)
@click.option("--trials", type=Whole(100), default=20_000, show_default=True,
              help="Simulated trials of each.")  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, help="Of the simulations.")
@_settings
@as_json
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    run: tuple[str, ...],
    explained: bool,
    fit: bool,
    hints: bool,
    svg: Path | None,
    trials: int,
    seed: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Say how often a crash tears a save, and what else the domains' number costs.

    No figure is unconditional: --explain says what must be so for each, and plays it out.
    """
    if bool(run) != fit or (hints and not fit):
        raise click.UsageError("--fit and RUN go together, and --hints goes with them")
    with answering(as_json):
        told = history(open_run(*run).location.survey()) if fit else None
        found = _untold(ctx, told, given, hints) if told is not None else {}
        setting = Setting(**given | found)
        try:
            findings = list(explain(setting, seed, trials if explained else 0))
        except ValueError as error:
            if guessed := [f"--{name}" for name in ("interval", "window") if name in found]:
                times = " and ".join(guessed)
                raise ValueError(f"{error}. (It is the files' times that told {times})") from error
            raise
        drawn = {} if svg is None else _draw(setting, seed, trials)
        wrote = [] if svg is None else write_into(svg, drawn)
        if as_json:
            plots = [] if svg is None else [str(svg / name) for name in drawn]
            answer(_plain({"setting": setting, "fit": _told(told) if told else None,
                           "findings": findings, "plots": plots}))  # fmt: skip
        else:
            _show(out(), findings, told, setting)
            for line in wrote:
                out().print(line, markup=False)
        if not all(finding.agrees for finding in findings):
            raise click.exceptions.Exit(DAMAGED)


def _untold(
    ctx: click.Context, told: History, given: dict[str, Any], hints: bool
) -> dict[str, Any]:
    """Give the settings that a run tells, and that nobody has given.

    Raises ValueError where it has too few domains to plan for, and nobody has said how many.
    """
    ours = {name for name in given if is_default(ctx, name)}
    if "domains" in ours and len(told.domains) < 2:
        raise ValueError(
            f"run {told.run} has one domain, and nothing can be torn between domains. What to do: "
            "give --domains, how many the job has that you plan for"
        )
    return {name: v for name, v in fitted(told, given, hints).items() if name in ours}


def fitted(told: History, given: dict[str, Any], hints: bool) -> dict[str, Any]:
    """Give the settings that a run's journals tell, and with ``hints`` its files' times.

    Of q the upper end is taken: who saw nobody fail in 60 votes has not seen that nobody fails.
    """
    n = len(told.domains)
    found: dict[str, Any] = {}
    if n >= 2:
        found["domains"] = n
        found["per_host"] = max(told.hosts.count(host) for host in told.hosts)
    if (q := _failing(told)) is not None:
        found["failure"] = min(MOST_OFTEN, q.high)
    if hints and told.hints.interval:
        found["interval"] = told.hints.interval
    if hints and told.hints.spread and n >= 2:
        unit = Setting(**{**given, **found, "window": 1.0})
        found["window"] = told.hints.spread / unit.commit.spread(n)
    return found


def _ends(told: History) -> Estimate | None:
    ends = told.ends
    torn = [float(life.torn) for life in ends]
    return proportion(torn, len(ends), mistake=0.05) if ends else None


def _failing(told: History) -> Estimate | None:
    """Estimate q from the votes, if there are any."""
    staged, skipped = told.votes
    votes = chain(repeat(1.0, skipped), repeat(0.0, staged))
    return proportion(votes, staged + skipped, mistake=0.05) if staged + skipped else None


def _told(told: History) -> dict[str, Any]:
    fields = {name: getattr(told, name) for name in told.__struct_fields__}
    more = {"struck": told.struck, "together": told.together}
    return fields | more | {"torn": _ends(told), "q": _failing(told)}


def _draw(setting: Setting, seed: int, trials: int) -> dict[str, str]:
    """Give each plot under the name of its file."""
    return {f"torn-{name}.svg": plot(axis, setting, seed, trials) for name, axis in PLOTS.items()}


def _plain(value: Any) -> Any:
    """Spell values of ours out for JSON, which has no infinity: what never comes is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Finding):
        return _plain(
            msgspec.structs.asdict(value)
            | {
                "shown": value.shown,
                "agrees": value.agrees,
                "tested": value.tested,
            }
        )
    if isinstance(value, msgspec.Struct):
        return _plain({name: getattr(value, name) for name in value.__struct_fields__})
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _show(console: Console, findings: list[Finding], told: History | None, at: Setting) -> None:
    if told is not None:
        _show_history(console, told)
    fails = [_time(each) for each in (at.mtbf, at.host_mtbf, at.job_mtbf)]
    console.print(
        f"{at.domains:,} domains; commit times {at.commits}, {_time(at.window)}; a save every "
        f"{_time(at.interval)}; mean time between failures of a domain {fails[0]}, "
        f"of a host {fails[1]}, of the job {fails[2]}; a domain fails to stage at a try with "
        f"q = {at.failure:.3g}\n"
    )
    if any(finding.seen for finding in findings):
        for finding in findings:
            _show_finding(console, finding)
    else:
        tabulate(
            (),
            [(escape(f.name), f.shown, f"[dim]{escape(f.note)}[/]") for f in findings],
            words=(0, 2),
        )
        console.print("\nEach figure has its conditions, and a simulation: --explain")


def _show_finding(console: Console, finding: Finding) -> None:
    console.print(f"[bold]{escape(finding.name)}[/]")
    lines = [f"{escape(finding.formula)}: [bold]{finding.shown}[/]"]
    if (seen := finding.seen) is not None:
        verdict = "agrees" if finding.agrees else "[bold red]DISAGREES[/]"
        if finding.agrees and not finding.tested:
            verdict = "too rare for so many trials to tell"
        ground = f"{seen.trials:,} trials, by {seen.by}"
        if math.isinf(seen.high):
            ground = f"{seen.trials:,} trials, {seen.by}"
            lines.append(f"simulated {seen.mean:.6g} ({ground}): {verdict}")
        else:
            within = _between(seen.low, seen.high)
            lines.append(f"simulated {seen.mean:.6g}, true value in {within} ({ground}): {verdict}")
    else:
        lines.append("not simulated: it would not end")
    lines.append(f"[dim]holds if:[/] {escape(finding.conditions)}")
    if finding.note:
        lines.append(f"[dim]note:[/] {escape(finding.note)}")
    console.print(Padding("\n".join(lines), (0, 0, 1, 4)), soft_wrap=False)


def _between(low: float, high: float) -> str:
    """Spell an interval with as many digits as it takes to see its width."""
    digits = next((d for d in range(4, 16) if f"{low:.{d}g}" != f"{high:.{d}g}"), 4)
    return f"[{low:.{digits}g}, {high:.{digits}g}]"


def _show_history(console: Console, told: History) -> None:
    console.print(f"run {told.run}: {len(told.domains)} domains on {len(set(told.hosts))} hosts")
    if told.unread:
        console.print(f"[bold red]not read[/]: {escape(', '.join(told.unread))}")
    console.print("[bold]counted in its journals[/]")
    for line in _counted(told):
        console.print(f"  {escape(line)}")
    hints = told.hints
    console.print(
        "[bold]hinted by its files' times[/], each host's own clock; a copy may lose them"
    )
    console.print(
        f"  {hints.epochs} retained epochs; first to last manifest {_known(hints.spread)}"
    )
    console.print(f"  from one epoch to the next {_known(hints.interval)}")
    console.print("[bold]not known[/]")
    console.print("  when a generation ended, and whether by a crash or in good order (which tears")
    console.print("  nothing); how often hosts and disks fail: a journal has no clock\n")


def _counted(told: History) -> Iterator[str]:
    staged, skipped = told.votes
    yield f"{len(told.lives)} generations; votes: {staged:,} staged, {skipped:,} skipped"
    if (q := _failing(told)) is not None:
        yield f"a share of {q.mean:.3g} skipped, so q is in [{q.low:.3g}, {q.high:.3g}], at 95 %, "
        yield "if failures are independent; the upper end is planned by, unless --failure is given"
    yield f"steps from one epoch to the next: {told.steps or 'not known'}"
    if (torn := _ends(told)) is not None:
        count = sum(life.torn for life in told.ends)
        yield f"{len(told.ends)} ended after some vote, {count} with their newest epoch torn:"
        yield f"so P(torn | end) is in [{torn.low:.3g}, {torn.high:.3g}], at 95 %"
        again = [str(life.again) for life in told.ends if life.again is not None]
        yield f"updates staged, given up and done again, each: {', '.join(again) or 'not known'}"
    if told.struck:
        struck = (f"{hosts}: {times}" for hosts, times in told.struck.items())
        yield f"hosts whose agents were found replaced together: {'; '.join(struck)}"
    if told.together is not None:
        seen, alone = told.together
        yield f"all at once at {seen:.3g} of the ends; if hosts were independent, {alone:.3g}"
    yield f"copies attested, not released, and not there: {told.lost}"


def _known(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.3g} s"
