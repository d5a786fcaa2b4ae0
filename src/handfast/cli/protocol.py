"""``handfast prove --protocol``: the shipped protocol, searched."""

from __future__ import annotations

import click
from rich.table import Table

from handfast.cli.console import DAMAGED, NO_LOOK, answer, answering, out
from handfast.model.scenarios import SCENARIOS, Found, search

__all__ = ["prove_protocol"]


def prove_protocol(name: str, limit: int | None, as_json: bool) -> None:
    """Search a scenario, or all ``short`` ones, or ``list`` them, and show what was found.

    Exits with 1 where a law is broken, or where all was searched and a goal was not reached; with 3
    where the search was cut off, by ``limit`` or the scenario's own. Raises UsageError for a
    scenario that there is none of.
    """
    if name == "list":
        for scenario in SCENARIOS.values():
            out().print(f"{scenario.name:18}{scenario.what}{' (minutes)' * scenario.heavy}")
        return
    chosen = [s for s in SCENARIOS.values() if name == s.name or (name == "short" and not s.heavy)]
    if not chosen:
        raise click.UsageError(f"no scenario is called {name!r}; --protocol list shows them")
    with answering(as_json):
        found = [search(scenario, limit=limit) for scenario in chosen]
        broken = any(one.breach or (one.unmet and not one.frontier) for one in found)
        cut = any(one.frontier for one in found)
        if as_json:
            answer({"scenarios": found}, sound=not broken and not cut)
        else:
            _show(found)
        if broken or cut:
            raise click.exceptions.Exit(DAMAGED if broken else NO_LOOK)


def _show(found: list[Found]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("scenario", "states", "depth", "not followed", "states/s", "bytes/state", "laws"):
        table.add_column(name, justify="left" if name in ("scenario", "laws") else "right")
    for one in found:
        table.add_row(
            one.scenario,
            f"{one.states:,}",
            f"{one.depth}",
            f"{one.frontier:,}",
            f"{one.per_second:,.0f}",
            f"{one.bytes_per_state:,.0f}",
            _verdict(one),
        )
    out().print(table)
    for one in [one for one in found if not one.sound]:
        reached = "not reached" if one.frontier else "never reached"
        out().print(f"{one.scenario}: {one.breach or f'{reached}: ' + ', '.join(one.unmet)}")
        for line in one.story:
            out().print(f"  {line}", markup=False)
    if any(one.frontier for one in found):
        out().print("Cut off: nothing is said of what follows the states that were not followed.")


def _verdict(one: Found) -> str:
    if one.breach:
        return "[bold red]broken[/]"
    if one.frontier:
        return "[yellow]none broken so far[/]"
    return "[bold red]a goal was missed[/]" if one.unmet else "[green]all hold[/]"
