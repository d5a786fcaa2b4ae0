"""``handfast demo``: a real training, killed over and over, ends where an unkilled one ends."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from handfast.cli.console import DAMAGED, answer, answering, as_json, out
from handfast.demo.result import Curve, DemoResult, Kill, Resume, Tally
from handfast.demo.run import Options, run
from handfast.demo.show import Picture, PlainLines
from handfast.errors import HandfastError

__all__ = ["demo"]

DIGESTS: Final = {
    "final weights": "weights",
    "final state": "state",
    "loss curve": "digest",
}


@click.command()
@click.option("--full", is_flag=True, help="Two more of the usual ways, and twice their kills.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of the training and of the chaos.",
)
@click.option(
    "--kills",
    type=click.IntRange(1, 200),
    default=16,
    show_default=True,
    help="How many, in the storm.",
)
@click.option(
    "--out",
    "folder",
    type=click.Path(path_type=Path),
    default="handfast-demo",
    show_default=True,
    help="Where runs, result.json and report.html go.",
)
@as_json
def demo(full: bool, seed: int, kills: int, folder: Path, as_json: bool) -> None:
    """Train, kill with SIGKILL, resume, and compare with an uninterrupted run, bit for bit.

    A small transformer on four ranks, on this machine's processor; then the same storm over the
    usual ways to save. Exit code 0 if all is equal, 1 if anything is not.
    """
    with answering(as_json):
        if importlib.util.find_spec("torch") is None:
            raise HandfastError("the demo trains with torch: pip install 'handfast[torch]'")
        console = Console(stderr=as_json, highlight=False)
        options = Options(
            out=folder,
            seed=seed,
            kills=kills,
            full=full,
            peer_kills=16 if full else 8,
            steps=max(240, 15 * kills),
        )
        stage = Picture(console) if console.is_terminal else PlainLines(console)
        with stage:
            result = run(options, stage)
        if as_json:
            answer(summary(result, folder))
        else:
            _print(out(), result, folder)
        sys.stdout.flush()
        if not result.equal:
            raise click.exceptions.Exit(DAMAGED)


def summary(result: DemoResult, folder: Path) -> dict[str, object]:
    """What was found, without the points of the pictures."""
    return {
        "equal": result.equal,
        "kills": len(result.kills),
        "resumes": result.tally,
        "repeated_steps": result.repeated,
        "clashes": result.clashes,
        "reference": _digests(result.reference),
        "storm": _digests(result.storm),
        "peers": {p.name: {"kills": len(p.kills), "resumes": p.tally} for p in result.peers},
        "seconds": round(result.seconds, 1),
        "report": str(folder / "report.html"),
        "result": str(folder / "result.json"),
    }


def _digests(curve: Curve) -> dict[str, str]:
    return {name: str(getattr(curve, field)) for name, field in DIGESTS.items()}


def _print(console: Console, result: DemoResult, folder: Path) -> None:
    digests = Table(box=None, padding=(0, 2), header_style="dim")
    for head in ("", "uninterrupted", "", f"killed {len(result.kills)} times"):
        digests.add_column(head)
    one, other = _digests(result.reference), _digests(result.storm)
    for name in DIGESTS:
        same = one[name] == other[name]
        digests.add_row(name, one[name], "=" if same else "[red]≠[/]", other[name])
    console.print(digests)
    console.print(
        f"\n{result.repeated} steps were trained again after kills; {result.clashes} of them with "
        "another loss.\n"
    )
    console.print(_counts(result))
    console.print(
        "[dim]A kill that hits only an agent stops no rank, so nothing resumes after it. "
        + ("" if len(result.peers) > 2 else "--full adds the ways that keep a directory a step.")
        + "[/]"
    )
    word = "[bold green]EQUAL[/], bit for bit" if result.equal else "[bold red]DIFFERENT[/]"
    console.print(f"\n{word}, in {result.seconds:.0f} s. Look at {folder / 'report.html'}")
    console.print(f"[dim]The run itself: handfast status '{folder}/storm/checkpoints/*'[/]")


def _counts(result: DemoResult) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for head in ("saved by", "kills", *Tally.__struct_fields__):
        table.add_column(head, justify="left" if head == "saved by" else "right")
    rows: list[tuple[str, list[Kill], list[Resume], Tally]] = [
        ("handfast", result.kills, result.resumes, result.tally)
    ]
    rows += [(p.name, p.kills, p.resumes, p.tally) for p in result.peers]
    for name, kills, _, tally in rows:
        counts = [getattr(tally, field) for field in Tally.__struct_fields__]
        table.add_row(name, str(len(kills)), *(_shown(count) for count in counts))
    return table


def _shown(count: int) -> str:
    return str(count) if count else "[dim]0[/]"
