"""``handfast prove --protocol``: the shipped protocol, searched."""

from __future__ import annotations

import click
from rich.table import Table

from handfast.cli.console import DAMAGED, answer, answering, out
from handfast.model.scenarios import SCENARIOS, Found, search

__all__ = ["prove_protocol"]


def prove_protocol(name: str, limit: int | None, as_json: bool) -> None:
    """Search a scenario, or all ``short`` ones, or ``list`` them, and show what was found.

    Exits with 1 where a law is broken or a goal was not reached. Raises UsageError for a scenario
    that there is none of.
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
        sound = all(one.sound for one in found)
        if as_json:
            answer({"scenarios": found}, sound=sound)
        else:
            _show(found)
        if not sound:
            raise click.exceptions.Exit(DAMAGED)


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
            "[green]all hold[/]" if one.sound else "[bold red]broken[/]",
        )
    out().print(table)
    for one in [one for one in found if not one.sound]:
        out().print(f"{one.scenario}: {one.breach or 'never reached: ' + ', '.join(one.unmet)}")
        for line in one.story:
            out().print(f"  {line}", markup=False)
