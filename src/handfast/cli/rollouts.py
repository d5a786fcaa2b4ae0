"""``handfast prove --fleet``: rollouts over a small fleet, and links between two ends, searched."""

from __future__ import annotations

from typing import Any, Final

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import DAMAGED, answer, answering, out, telling_how_far
from handfast.errors import Refused
from handfast.link import switch
from handfast.link.frame import LinkError
from handfast.model.explore import Report
from handfast.model.link import Link
from handfast.model.rollouts import HEAVY, LINKS, SETTINGS, search_fleet, search_link

__all__ = ["prove_fleet"]

ROW: Final = "{:50} {:>10}  {:>12}  {:>5}  {:>8}  {}"
HEAD: Final = ("setting", "states", "transitions", "depth", "states/s", "laws")
NAMES: Final = (*SETTINGS, *LINKS)


class Searched(msgspec.Struct, frozen=True):
    """What a search found; ``breach`` names the law that is broken, ``story`` a shortest way."""

    setting: str
    states: int
    transitions: int
    depth: int
    breach: str
    story: tuple[str, ...]
    seconds: float


def prove_fleet(name: str, as_json: bool) -> None:
    """Search a setting, or all ``short`` ones, or ``list`` them. Exits with 1 where a law breaks.

    Raises UsageError for a setting that there is none of.
    """
    with answering(as_json):
        if name == "list":
            _list(as_json)
            return
        chosen = [each for each in NAMES if name == each or (name == "short" and each not in HEAVY)]
        if not chosen:
            raise click.UsageError(f"no setting is called {name!r}; --fleet list shows them")
        if not as_json:
            out().print(ROW.format(*HEAD), markup=False, style="bold")
        found = []
        for each in chosen:
            found.append(_search(each))
            if not as_json:
                _tell(found[-1])
        sound = not any(one.breach for one in found)
        if as_json:
            answer({"settings": found}, sound=sound)
        if not sound:
            raise click.exceptions.Exit(DAMAGED)


def _list(as_json: bool) -> None:
    if as_json:
        answer({"settings": [{"name": each, "short": each not in HEAVY} for each in NAMES]})
        return
    for each in NAMES:
        out().print(f"{each}{' (long)' * (each in HEAVY)}", markup=False)


def _search(name: str) -> Searched:
    with telling_how_far() as tell:
        tell(name)
        report: Report[Any, Any]
        if name in SETTINGS:
            report = search_fleet(SETTINGS[name])
        else:
            ends, refused = LINKS[name], (LinkError, Refused)
            report = search_link(
                Link(switch, ends.plan, lives=ends.lives, alone=ends.alone, refused=refused)
            )
    first = report.breaches[0] if report.breaches else None
    return Searched(
        name,
        report.states,
        report.transitions,
        report.depth,
        first.law if first is not None else "",
        tuple(map(_spell, first.trace.labels)) if first is not None else (),
        report.seconds,
    )


def _spell(label: Any) -> str:
    return label if isinstance(label, str) else f"{label.who} {label.what}"


def _tell(one: Searched) -> None:
    rate = one.states / one.seconds if one.seconds else 0.0
    verdict = "[bold red]broken[/]" if one.breach else "[green]all hold[/]"
    figures = (f"{one.states:,}", f"{one.transitions:,}", f"{one.depth}", f"{rate:,.0f}")
    out().print(ROW.format(one.setting, *figures, verdict))
    if one.breach:
        out().print(escape(one.breach))
        for line in one.story:
            out().print(f"  {line}", markup=False)
