"""``handfast fleet rehearse``: an upgrade gone through beforehand, in every order."""

from __future__ import annotations

from collections.abc import Iterable

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import (
    DAMAGED,
    NO_LOOK,
    answer,
    answering,
    as_json,
    out,
    place_for,
    tabulate,
    telling_how_far,
)
from handfast.fleet.compat.rules import Probed
from handfast.fleet.rehearse.fleet import Outcome
from handfast.fleet.rehearse.reading import load
from handfast.fleet.rehearse.rehearsing import Kind
from handfast.fleet.rehearse.rehearsing import rehearse as go_through
from handfast.fleet.rehearse.report import Break, Report, recorded, report

__all__ = ["rehearse"]

COLOURS = {Outcome.WORKS: "green", Outcome.REFUSES: "yellow"}


@click.command(
    epilog="Exit codes: 0 everything works, or refuses in words; 1 something fails, hangs or dies; "
    "2 wrong usage; 3 a fleet of one version does not work, or it could not look."
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--quick", is_flag=True, help="Each move once, and not in every order.")
@click.option("--record", metavar="OUT", help="Append what was found of pairs, for must-probe.")
@as_json
def rehearse(file: str, quick: bool, record: str | None, as_json: bool) -> None:
    """Upgrade, downgrade and restart a small fleet on this machine, in every order.

    FILE says how its programs are started and asked, and in which versions. It runs what FILE says:
    rehearse only files that you trust.
    """
    place_for("--record", record)
    with answering(as_json):
        rehearsal = load(file)
        if record is not None and rehearsal.record is None:
            raise ValueError(f"{file} has no `record:`. What to do: say there what to record")
        with telling_how_far() as tell:
            came = go_through(rehearsal, quick=quick, tell=tell)
        if record is not None and came.judged:
            _append(record, recorded(rehearsal, came))
        found = report(rehearsal, came)
        if as_json:
            answer(found, refused=found.refused, bad=found.bad)
        else:
            _show(found)
        if not found.judged:
            raise click.exceptions.Exit(NO_LOOK)
        if found.bad:
            raise click.exceptions.Exit(DAMAGED)


def _append(path: str, results: Iterable[Probed]) -> None:
    with open(path, "ab") as file:
        file.write(b"".join(msgspec.json.encode(each) + b"\n" for each in results))


def _show(found: Report) -> None:
    console = out()
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
    for each in found.breaks:
        if len(each.walk) > 1:  # else the table has said it all
            _show_break(each)
    for sentence in found.untidy:
        console.print(f"[bold red]not taken back[/]: {escape(sentence)}")
    if found.unmade:
        console.print(f"{found.unmade} moves could not be come to: every way there broke before")
    what = f"{found.moves} moves of {found.fleets} fleets in {found.seconds:g} s"
    if not found.judged:
        console.print(f"[bold red]not judged[/]: a fleet of one version does not work ({what})")
        return
    tally = (
        f"{found.refused} of {len(found.rows)} combinations refuse in words, {found.bad} are broken"
    )
    console.print(f"{escape(found.rehearsal)}: {tally} ({what})")


def _show_break(found: Break) -> None:
    console = out()
    often = f" ({found.times} of {found.of} times)" if found.of > 1 else ""
    console.print(f"\n{_coloured(found.outcome)} {escape('; '.join(found.walk))}{often}")
    for line in found.said:
        console.print(f"  [dim]{escape(line)}[/]")


def _coloured(outcome: Outcome) -> str:
    return f"[{COLOURS.get(outcome, 'bold red')}]{outcome}[/]"
