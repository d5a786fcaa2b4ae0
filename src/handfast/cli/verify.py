"""``handfast verify``: every byte, and what a restore would take."""

from __future__ import annotations

import click
from rich.markup import escape

from handfast import open as open_run
from handfast.checkpoint.spelling import size
from handfast.checkpoint.verify import Finding, Verification
from handfast.cli.console import (
    DAMAGED,
    RUNS,
    answer,
    answering,
    as_json,
    out,
    paths,
    showing,
    step,
    tabulate,
)
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.verdict import Verdict

__all__ = ["verify"]


@click.command(epilog=RUNS)
@paths
@step
@click.option("--all", "everything", is_flag=True, help="Every epoch that is held.")
@as_json
def verify(run: tuple[str, ...], step: int | Epoch | None, everything: bool, as_json: bool) -> None:
    """Read every byte of an epoch and hold it against what was attested.

    By default that is the recovery line's epoch, and where it is damaged the next one, down to the
    one that a restore would take.
    """
    if everything and step is not None:
        raise click.UsageError("give --all or --step, not both")
    with answering(as_json):
        opened = open_run(*run)
        with showing("verify") as progress:
            result = opened.verify(step, everything=everything, progress=progress)
        sound = result.sound and bool(result.checked)  # nothing was saved: nothing to rely on
        if as_json:
            answer(result, sound=sound)
        else:
            _show(result)
        if not sound:
            raise click.exceptions.Exit(DAMAGED)


def _show(result: Verification) -> None:
    console = out()
    if result.findings:
        heads = ("verdict", "epoch", "domain", "chunk", "byte", "what")
        tabulate(heads, map(_row, result.findings), words=range(len(heads)))
    if not result.checked and not result.findings:
        what = "no epoch was saved here, so there is none to verify"
        if result.line is None:
            what = "no epoch is left that every shard holds: see `handfast status` for each domain"
        console.print(f"[bold red]missing[/]: {what}")
        return
    epochs = ", ".join(map(str, result.checked)) or "no epoch"
    state = "[bold green]sound[/]" if result.sound else f"{len(result.findings)} findings"
    console.print(f"{epochs}: {state} ({size(result.nbytes)} read)")
    if result.line is None:
        console.print("a restore would find nothing")
    elif any(f.epoch == result.line and f.verdict is Verdict.MIXED for f in result.findings):
        console.print(f"a restore would come to {result.line}, and refuse it")
    elif result.line != GENESIS:
        console.print(f"a restore would take {result.line}")


def _row(found: Finding) -> tuple[str, ...]:
    within = found.chunk >= 0
    return (
        f"[bold red]{found.verdict}[/]",
        str(found.epoch or ""),
        escape(found.domain),
        str(found.chunk) if within else "",
        str(found.offset) if within else "",
        escape(found.problem),
    )
