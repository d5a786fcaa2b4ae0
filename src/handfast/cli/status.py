"""``handfast status``: domains x epochs at a glance."""

from __future__ import annotations

from typing import Final

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from handfast import open as open_run
from handfast.checkpoint.spelling import size
from handfast.checkpoint.status import EpochRow, Mark, Status
from handfast.cli.console import DAMAGED, RUNS, answer, answering, as_json, lay, out, paths
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.verdict import Verdict

__all__ = ["status"]

# Sign on a terminal that knows Unicode, sign on others, style.
SIGNS: Final = {
    Mark.CERTIFIED: ("●", "#", "green"),
    Mark.ATTESTED: ("◐", "+", "yellow"),
    Mark.UNFINISHED: ("○", "o", "dim"),
    Mark.SKIPPED: ("⊘", "-", "yellow"),
    Mark.RELEASED: ("·", ".", "dim"),
    Mark.DAMAGED: ("✗", "X", "bold red"),
    Mark.ABSENT: (" ", " ", ""),
}
STYLES: Final = {
    Verdict.COMPLETE: "green",
    Verdict.AHEAD: "green",
    Verdict.BEHIND: "yellow",
    Verdict.TORN: "yellow",
}

SKIPS: Final = 3
"""So many votes SKIP are shown, the newest."""


@click.command(epilog=RUNS)
@paths
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="How many epochs to show.",
)
@as_json
def status(run: tuple[str, ...], epochs: int, as_json: bool) -> None:
    """Show domains and epochs at a glance, the recovery line, and who blocks.

    Manifests and journals are read, not the images: `handfast verify` reads every byte.
    """
    with answering(as_json):
        found = open_run(*run).status()
        if as_json:
            answer(found, sound=found.sound)
        else:
            console = out()
            _summary(found)
            _grid(console, found, epochs)
            for trouble in found.troubles:
                console.print(f"[bold red]{trouble.verdict}[/] {escape(trouble.problem)}")
        if not found.sound:
            raise click.exceptions.Exit(DAMAGED)


def _summary(found: Status) -> None:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="bold")
    lines.add_column(overflow="fold")
    lines.add_row("run", found.run or "unknown")
    lines.add_row("generation", str(found.generation))
    resumed = (f"{generation} from {base}" for generation, base in found.timeline)
    lines.add_row("timeline", ", ".join(resumed) or "none yet")
    lines.add_row("recovery line", _line(found))
    lines.add_row("converged", f"{found.converged or 'nothing yet'}{_skew(found)}")
    lines.add_row("phase", _phase(found))
    for skip in found.skips[:SKIPS]:
        lines.add_row("skipped", escape(f"{skip.epoch} by {skip.domain}: {skip.reason}"))
    for agent in found.agents:
        busy = ", ".join(map(str, agent.persisting))
        doing = f"persisting {busy}" if busy else "nothing to persist"
        said = agent.problem or f"process {agent.pid} on {agent.label}: {doing}"
        lines.add_row("agent", escape(said))
    if not found.agents:
        lines.add_row("agent", "none alive on this node for these paths")
    lines.add_row("disk", size(found.nbytes))
    lay(lines)


def _line(found: Status) -> str:
    if found.line is None:
        return "[bold red]none: a restore would refuse[/]" if found.configuration else "none yet"
    if found.line == GENESIS:
        return "0/0: nothing was saved yet, a restore starts from the first state"
    proof = "certified" if found.certified else "attested by every shard, not yet certified"
    return f"[bold green]{found.line}[/], {proof}"


def _skew(found: Status) -> str:
    if found.skew is None:
        return ""
    if found.skew.steps is None:
        return f", domains are in {found.skew.generations} generations, on more than one timeline"
    return f", skew {found.skew.steps} steps"


def _phase(found: Status) -> str:
    waits = f", waits for {', '.join(found.blocked_by)}" if found.blocked_by else ""
    if found.agents:
        return escape(f"{found.phase}{waits}")
    return escape(f"{found.phase}{waits} (as last written: no agent is alive on this node)")


def _grid(console: Console, found: Status, most: int) -> None:
    """Rows are domains, columns are epochs, the newest on the right."""
    shown = list(reversed(found.epochs[:most]))
    plain = not console.encoding.lower().startswith("utf")
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("domain", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in shown:
        table.add_column(_head(row, found.line), justify="center", no_wrap=True)
    for domain in found.domains:
        name = f"{domain.id} on {domain.host}" if domain.host else domain.id
        cells = [SIGNS[row.cells[domain.id].mark] for row in shown]
        table.add_row(
            escape(name),
            _standing(domain.verdict, found),
            *(Text(sign[plain], sign[2]) for sign in cells),
        )
    verdicts = [_verdict(row) for row in shown]
    table.add_row("", "", *verdicts)
    console.print()
    lay(table)
    legend = "  ".join(f"{signs[plain]} {mark}" for mark, signs in SIGNS.items() if signs[0] != " ")
    older = len(found.epochs) - len(shown)
    more = f"  ({older} older epochs: --epochs)" if older > 0 else ""
    console.print(f"[dim]{legend}{more}[/]")


def _head(row: EpochRow, line: Epoch | None) -> Text:
    if row.orphan:
        return Text(str(row.epoch), "dim strike")
    return Text(str(row.epoch), "bold green reverse" if row.epoch == line else "bold")


def _standing(verdict: Verdict, found: Status) -> Text:
    if verdict is Verdict.COMPLETE and not found.epochs:
        return Text("empty", "dim")  # nothing was saved, so nothing is behind
    return Text(verdict, STYLES.get(verdict, "bold red"))


def _verdict(row: EpochRow) -> Text:
    if row.orphan:
        return Text("orphan", "dim")
    if row.verdict is None:
        return Text("going", "dim")
    return Text(row.verdict, STYLES.get(row.verdict, "bold red"))
