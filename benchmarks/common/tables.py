"""Figures and goals as tables: for a terminal, and as Markdown for a page, where they are put."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.common.figures import Figure, short
from benchmarks.common.goals import Judged

__all__ = ["Sheet", "fill", "goals", "left_out", "markdown", "of", "show", "wide"]


class Sheet(NamedTuple):
    """A table: its title, its heads and its rows."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def of(question: str, about: str, figures: Sequence[Figure]) -> Sheet:
    """Lay out the figures of one question."""
    heads = ("who", "what", "at", "median", "range", "ratio", "to", "left undone")
    return Sheet(f"{question}: {about}", heads, [_row(figure) for figure in figures])


def wide(question: str, about: str, figures: Sequence[Figure]) -> Sheet:
    """Lay out the medians of a question with many contestants: a row for each, at each place."""
    whats = tuple(dict.fromkeys(figure.what for figure in figures))
    told: dict[tuple[str, str], dict[str, str]] = {}
    for figure in figures:
        row = told.setdefault((figure.who, figure.where), {})
        row[figure.what] = f"{short(figure.median)} {figure.unit}"
    rows = [(*place, *(row.get(what, "") for what in whats)) for place, row in told.items()]
    return Sheet(f"{question}: {about}", ("who", "at", *whats), rows)


def _row(figure: Figure) -> tuple[str, ...]:
    low, high = (short(edge) for edge in (min(figure.values), max(figure.values)))
    ratio = figure.ratio
    return (
        figure.who,
        figure.what,
        figure.where,
        f"{short(figure.median)} {figure.unit}",
        f"{low} - {high}",
        "" if ratio is None else f"{short(ratio)} x",
        figure.beside,
        figure.undone,
    )


def goals(judged: Sequence[Judged]) -> Sheet:
    """Lay out what has become of the goals."""
    heads = ("goal", "at", "measured", "")
    rows: list[tuple[str, ...]] = [
        (each.goal, each.at, each.measured, each.verdict) for each in judged
    ]
    return Sheet("Goal by goal", heads, rows)


def left_out(missing: Mapping[str, str]) -> Iterator[str]:
    """Name the peers that are not installed, and how they would be."""
    for peer, how in missing.items():
        yield f"left out: {peer}, which is not installed here: {how}"


_COLOURS = {"met": "green", "missed": "red"}


def show(console: Console, sheet: Sheet, below: str = "") -> None:
    """Print a table, and a line below it."""
    table = Table(title=sheet.title, title_justify="left", box=None, pad_edge=False)
    for head in sheet.heads:
        right = head in ("median", "ratio")
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*row, style=_COLOURS.get(row[-1], ""))
    console.print(table, below, "", sep="\n", markup=False)


def markdown(facts: Mapping[str, str], missing: Mapping[str, str], sheets: Sequence[Sheet]) -> str:
    """Give a whole run as Markdown, without a heading of its own."""
    parts = ["; ".join(f"{name} {value}" for name, value in facts.items()) + "."]
    parts += left_out(missing)
    for sheet in sheets:
        lines = [sheet.heads, tuple("---" for _ in sheet.heads), *sheet.rows]
        parts.append(f"**{sheet.title}**")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def fill(page: str, place: str, made: str) -> str:
    """Put what was made between a page's marks ``<!-- place: ... -->`` and ``<!-- /place -->``.

    Raises ValueError for a page that has no such place.
    """
    marks = re.compile(
        rf"(<!-- {re.escape(place)}:[^\n]*-->\n).*?(<!-- /{re.escape(place)} -->)", re.DOTALL
    )
    if not marks.search(page):
        raise ValueError(f"the page has no <!-- {place}: ... --> and <!-- /{place} -->")
    return marks.sub(lambda found: found[1] + made + found[2], page)
