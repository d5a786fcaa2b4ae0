"""``handfast fleet rehearse``: an upgrade gone through beforehand, in every order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import (
    DAMAGED,
    NO_LOOK,
    answer,
    answering,
    as_json,
    make,
    out,
    place_for,
    tabulate,
    telling_how_far,
)
from handfast.fleet.compat.rules import Probed
from handfast.fleet.rehearse.fleet import Outcome
from handfast.fleet.rehearse.reading import load
from handfast.fleet.rehearse.rehearsing import Cut, Kind
from handfast.fleet.rehearse.rehearsing import rehearse as go_through
from handfast.fleet.rehearse.report import Break, Pair, Report, recorded, report

__all__ = ["rehearse"]

COLOURS = {Outcome.WORKS: "green", Outcome.REFUSES: "yellow"}


@click.command(
    epilog="Exit codes: 0 everything works, or refuses in words; 1 something fails, hangs or dies; "
    "2 wrong usage; 3 a fleet of one version does not work, something was left behind, or it could "
    "not look; 129, 130 or 143 it was interrupted, and says what came of it until then."
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--quick", is_flag=True, help="Each move once, and not in every order.")
@click.option("--record", metavar="OUT", help="Append what was found of pairs, for must-probe.")
@click.option("--keep", metavar="DIR", help="Keep in DIR the directory of each fleet that breaks.")
@as_json
def rehearse(file: str, quick: bool, record: str | None, keep: str | None, as_json: bool) -> None:
    """Upgrade, downgrade and restart a small fleet on this machine, in every order.

    FILE says how its programs are started and asked, and in which versions. It runs what FILE says:
    rehearse only files that you trust.
    """
    place_for("--record", record)
    with answering(as_json):
        rehearsal = load(file)
        if record is not None and rehearsal.record is None:
            raise ValueError(f"{file} has no `record:`. What to do: say there what to record")
        if keep is not None:
            make(Path(keep))
        try:
            with _telling_each() as tell:
                came = go_through(rehearsal, quick=quick, keep=keep, tell=tell)
        except Cut as cut:
            _say(report(rehearsal, cut.came), as_json)
            raise cut.interrupt from None
        # what an earlier fleet left behind may have helped a later one, or been in its way
        sound = came.judged and not came.untidy
        if record is not None and sound:
            _append(record, recorded(rehearsal, came))
        found = report(rehearsal, came)
        _say(found, as_json)
        if not sound:
            raise click.exceptions.Exit(NO_LOOK)
        if found.bad:
            raise click.exceptions.Exit(DAMAGED)


@contextmanager
def _telling_each() -> Iterator[Callable[[Kind, str], None]]:
    """Show each move on a terminal; elsewhere, in a line of its own, each fleet that begins."""
    with telling_how_far() as tell:
        if sys.stderr is not None and sys.stderr.isatty():
            yield lambda _, words: tell(words)
        else:
            yield lambda kind, words: click.echo(words, err=True) if kind is Kind.START else None


def _say(found: Report, as_json: bool) -> None:
    if as_json:
        answer(found, refused=found.refused, bad=found.bad)
    else:
        _show(found)


def _append(path: str, results: Iterable[Probed]) -> None:
    with open(path, "ab") as file:
        file.write(b"".join(msgspec.json.encode(each) + b"\n" for each in results))


def _show(found: Report) -> None:
    console = out()
    if found.rows:
        _show_rows(found)
    if found.pairs:
        console.print()
        _show_pairs(found.pairs)
    for each in found.breaks:
        if len(each.walk) > 1 or each.kept:  # else the tables have said it all
            _show_break(each)
    for sentence in found.untidy:
        console.print(f"[bold red]not taken back[/]: {escape(sentence)}")
    if found.unmade:
        console.print(f"{found.unmade} moves could not be come to: every way there broke before")
    tally = "; ".join(f"{kind} {_counted(of)}" for kind, of in found.tally.items())
    fleets = f"{found.fleets} fleet" if found.fleets == 1 else f"{found.fleets} fleets"
    tally = f"{tally or 'nothing was tried'} ({fleets}, {found.seconds:g} s)"
    console.print(f"{escape(found.rehearsal)}: {tally}")
    if found.cut:
        console.print("[bold red]cut off[/]: it was interrupted, and the rest was not tried")
    elif not found.judged:
        console.print("[bold red]not judged[/]: a fleet of one version does not work")
    if found.untidy:
        what = "[bold red]left behind[/]: it may have been in the way of later fleets, or of help"
        console.print(f"{what}. What to do: remove it, correct `teardown`, and rehearse again")


def _counted(outcomes: dict[Outcome, int]) -> str:
    """Say how many moves work, refuse and so on."""
    # each outcome is a verb in its third person: one works, two work
    return ", ".join(f"{n} {of if n == 1 else of.removesuffix('s')}" for of, n in outcomes.items())


def _show_rows(found: Report) -> None:
    kinds = [kind for kind in Kind if any(kind in row.by for row in found.rows)]
    rows = [
        (
            *map(escape, row.versions),
            str(row.met),
            *(_coloured(row.by[kind]) if kind in row.by else "" for kind in kinds),
            escape(row.sentence),
        )
        for row in found.rows
    ]
    size = len(found.nodes)
    heads = (*found.nodes, "met", *kinds, "")
    tabulate(heads, rows, words={*range(size), *range(size + 1, len(heads))})


def _show_pairs(pairs: Iterable[Pair]) -> None:
    rows = [
        (
            escape(each.client),
            escape(each.server),
            str(each.met),
            str(each.worked),
            _coloured(each.worst),
            escape(each.sentence),
        )
        for each in pairs
    ]
    tabulate(("client", "server", "asked", "worked", "", ""), rows, words={0, 1, 4, 5})


def _show_break(found: Break) -> None:
    console = out()
    often = f" ({found.times} of {found.of} times)" if found.of > 1 else ""
    console.print(f"\n{_coloured(found.outcome)} {escape('; '.join(found.walk))}{often}")
    for line in found.said:
        console.print(f"  [dim]{escape(line)}[/]")
    for directory in found.kept:
        console.print(f"  kept: {escape(directory)}")


def _coloured(outcome: Outcome) -> str:
    return f"[{COLOURS.get(outcome, 'bold red')}]{outcome}[/]"
