"""``handfast prove --protocol``: the shipped protocol, searched."""

from __future__ import annotations

from typing import Final

import click
from rich.markup import escape

from handfast.cli.console import DAMAGED, NO_LOOK, answer, answering, out, telling_how_far
from handfast.model.scenarios import SCENARIOS, Found, Scenario, search

__all__ = ["prove_protocol"]

ROW: Final = "{:20} {:>10}  {:>5}  {:>12}  {:>8}  {:>11}  {}"
HEAD: Final = ("scenario", "states", "depth", "not followed", "states/s", "bytes/state", "laws")


def prove_protocol(name: str, limit: int | None, as_json: bool) -> None:
    """Search a scenario, or all ``short`` ones, or ``list`` them, and show what was found.

    Each is told as soon as it is searched. Exits with 1 where a law is broken, or where all was
    searched and a goal was not reached; with 3 where the search was cut off, by ``limit`` or the
    scenario's own. Raises UsageError for a scenario that there is none of, and a limit of a list.
    """
    if name == "list" and limit is not None:
        raise click.UsageError("--limit goes with a scenario, or with `short`")
    with answering(as_json):
        if name == "list":
            _list(as_json)
            return
        chosen = [
            s for s in SCENARIOS.values() if name == s.name or (name == "short" and not s.heavy)
        ]
        if not chosen:
            raise click.UsageError(f"no scenario is called {name!r}; --protocol list shows them")
        found = []
        if not as_json:
            out().print(ROW.format(*HEAD), markup=False, style="bold")
        for scenario in chosen:
            found.append(_search(scenario, limit))
            if not as_json:
                _tell(found[-1])
        broken = any(one.breach or (one.unmet and not one.frontier) for one in found)
        cut = any(one.frontier for one in found)
        if as_json:
            answer({"scenarios": found}, sound=not broken and not cut)
        elif cut:
            out().print(
                "Cut off: nothing is said of what follows the states that were not followed."
            )
        if broken or cut:
            raise click.exceptions.Exit(DAMAGED if broken else NO_LOOK)


def _list(as_json: bool) -> None:
    scenarios = SCENARIOS.values()
    if as_json:
        named = ({"name": s.name, "what": s.what, "short": not s.heavy} for s in scenarios)
        answer({"scenarios": list(named)})
        return
    for scenario in scenarios:
        out().print(f"{scenario.name:21}{scenario.what}{' (long)' * scenario.heavy}")


def _search(scenario: Scenario, limit: int | None) -> Found:
    with telling_how_far() as tell:
        tell(f"{scenario.name}: {scenario.what}")
        return search(
            scenario,
            limit=limit,
            progress=lambda states, waiting, depth: tell(
                f"{scenario.name}: {states:,} states, {depth} deep, {waiting:,} to be followed"
            ),
        )


def _tell(one: Found) -> None:
    """Print a row, and where not all is well, why."""
    figures = (f"{one.states:,}", f"{one.depth}", f"{one.frontier:,}", f"{one.per_second:,.0f}")
    out().print(ROW.format(one.scenario, *figures, f"{one.bytes_per_state:,.0f}", _verdict(one)))
    if not one.sound:
        reached = "not reached" if one.frontier else "never reached"
        why = one.breach or f"{reached}: {', '.join(one.unmet)}"
        out().print(f"{one.scenario}: {escape(why)}")
        for line in one.story:
            out().print(f"  {line}", markup=False)


def _verdict(one: Found) -> str:
    if one.breach:
        return "[bold red]broken[/]"
    if one.frontier:
        return "[yellow]none broken so far[/]"
    return "[bold red]a goal was missed[/]" if one.unmet else "[green]all hold[/]"
