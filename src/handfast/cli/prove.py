"""``handfast prove``: what can be shown by looking at every state, shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import (
    DAMAGED,
    Whole,
    answer,
    answering,
    apart,
    as_json,
    fitting,
    out,
    place_for,
    tabulate,
)
from handfast.cli.pipelines import prove_pipelines
from handfast.cli.protocol import prove_protocol
from handfast.cli.rollouts import prove_fleet
from handfast.model.calibration import SOURCES, PaxosCommit, TwoPhase, orbit
from handfast.model.exhibits import Exhibit, exhibits
from handfast.model.explore import Report, explore

__all__ = ["prove"]


class Count(msgspec.Struct, frozen=True):
    """A state space whose size is known, from where (one of SOURCES), and what ours counts."""

    model: str
    source: str
    expected: int
    counted: int
    seconds: float
    per_second: float
    bytes_per_state: float


CALIBRATE, EXHIBITS, CATALOGUE = "--calibrate", "--exhibits", "--catalogue"
PROTOCOL, PIPELINE, FLEET = "--protocol SCENARIO", "--pipeline FILE", "--fleet SETTING"


@click.command(
    epilog="Exit codes: 0 all holds; 1 something is broken; 2 wrong usage; 3 cut off by a limit, "
    "or could not look."
)
@click.option(
    CALIBRATE, is_flag=True, help="Count state spaces that Lamport's TLC and Stateright counted."
)
@click.option("--paxos", is_flag=True, help="With --calibrate: Paxos Commit too; minutes.")
@click.option(EXHIBITS, "shown", is_flag=True, help="Knowledge, and the optimizer's algebra.")
@click.option("--protocol", help="Search the shipped protocol: a scenario, `short`, or `list`.")
@click.option("--limit", type=Whole(1), help="With --protocol: at most so many states.")
@click.option("--fleet", metavar="SETTING", help="Search rollouts and links: one, `short`, `list`.")
@click.option(CATALOGUE, is_flag=True, help="Attack the usual ways to save checkpoints.")
@click.option("--pipeline", metavar="FILE", help="Attack a way of your own, described in Python.")
@click.option("--svg", metavar="OUT", help="With --pipeline: draw a shortest schedule.")
@click.option("--claim", metavar="TEXT", help="With --svg: against the claim that says this.")
@click.option("--promela", metavar="OUT", help="With --pipeline: write it for spin.")
@as_json
def prove(
    calibrate: bool,
    paxos: bool,
    shown: bool,
    protocol: str | None,
    limit: int | None,
    fleet: str | None,
    catalogue: bool,
    pipeline: str | None,
    svg: str | None,
    claim: str | None,
    promela: str | None,
    as_json: bool,
) -> None:
    """Show by searching every state what holds, and how soon a claim is broken."""
    modes = {
        CALIBRATE: calibrate, EXHIBITS: shown, PROTOCOL: protocol is not None,
        FLEET: fleet is not None, CATALOGUE: catalogue, PIPELINE: pipeline is not None,
    }  # fmt: skip
    fitting(
        modes,
        {
            "--paxos": (paxos, [CALIBRATE]),
            "--limit": (limit is not None, [PROTOCOL]),
            "--svg": (svg is not None, [PIPELINE]),
            "--promela": (promela is not None, [PIPELINE]),
            "--claim": (
                claim is not None,
                [f"{PIPELINE} --svg OUT"] if svg is None else [PIPELINE],
            ),
        },
    )
    place_for("--svg", svg)
    place_for("--promela", promela)
    apart({"--pipeline": pipeline, "--svg": svg, "--promela": promela})
    if protocol is not None:
        prove_protocol(protocol, limit, as_json)
        return
    if fleet is not None:
        prove_fleet(fleet, as_json)
        return
    if catalogue or pipeline is not None:
        prove_pipelines(pipeline, svg, claim or "", promela, as_json)
        return
    with answering(as_json):
        if shown:
            _exhibit(as_json)
            return
        counts = _calibrate(paxos)
        sound = all(count.counted == count.expected for count in counts)
        if as_json:
            answer({"models": counts}, sound=sound)
        else:
            _show(counts)
        if not sound:
            raise click.exceptions.Exit(DAMAGED)


def _exhibit(as_json: bool) -> None:
    found, left_out = list(exhibits()), []
    try:
        found.append(import_module("handfast.torch.splice").exhibit())
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "numpy"):
            raise
        left_out.append("a spliced AdamW state: not shown, since torch is not installed")
    sound = all(exhibit.holds for exhibit in found)
    if as_json:
        answer({"exhibits": found, "left_out": left_out, "sound": sound})
    else:
        _hang(found, left_out)
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _hang(found: list[Exhibit], left_out: list[str]) -> None:
    console = out()
    for exhibit in found:
        sign = "[green]holds[/]" if exhibit.holds else "[bold red]DOES NOT HOLD[/]"
        console.print(f"{sign}: [bold]{escape(exhibit.claim)}[/]")
        tabulate((), _figures(exhibit.figures, "    "))
        console.print(f"    [dim]holds if:[/] {escape(exhibit.conditions)}\n")
    for words in left_out:
        console.print(words)


def _figures(figures: Mapping[Any, Any], indent: str) -> Iterator[tuple[str, str]]:
    """Give rows of names and figures; figures of one kind stand below their name, further in."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield f"{indent}{escape(str(name))}", ""
            yield from _figures(value, f"{indent}    ")
        else:
            several = value if isinstance(value, list) else [value]
            shown = (f"{v:.4g}" if isinstance(v, float) else f"{v:,}" for v in several)
            yield f"{indent}{escape(str(name))}", ", ".join(shown)


def _calibrate(paxos: bool) -> list[Count]:
    found = [
        _count(f"two-phase commit, {n} managers", source, theirs, explore(TwoPhase(n)))
        for n, source, theirs in ((3, "TLC", 288), (5, "Stateright", 8_832), (6, "TLC", 50_816))
    ]
    orbits = explore(TwoPhase(5), canonical=orbit)
    found.append(_count("two-phase commit, 5 managers, orbits", "ourselves", 314, orbits))
    if paxos:
        name = "Paxos Commit, 2 managers, 3 acceptors, 2 ballots"
        found.append(_count(name, "TLC", 1_321_761, explore(PaxosCommit())))
    return found


def _count(model: str, source: str, theirs: int, ours: Report[Any, Any]) -> Count:
    return Count(
        model, source, theirs, ours.states, ours.seconds, ours.per_second, ours.bytes_per_state
    )


def _show(counts: list[Count]) -> None:
    lines = []
    for count in counts:
        ink = "green" if count.counted == count.expected else "bold red"
        lines.append(
            (
                count.model,
                count.source,
                f"{count.expected:,}",
                f"[{ink}]{count.counted:,}[/]",
                f"{count.per_second:,.0f}",
                f"{count.bytes_per_state:,.0f}",
            )
        )
    heads = ("model", "counted by", "their count", "ours", "states/s", "bytes/state")
    tabulate(heads, lines, words=(0, 1))
    for name, words in SOURCES.items():
        out().print(f"{name}: {words}", markup=False)
