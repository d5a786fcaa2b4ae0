"""``handfast prove``: what can be shown by looking at every state, shown."""

from __future__ import annotations

import click
import msgspec
from rich.table import Table

from handfast.cli.console import DAMAGED, answer, answering, as_json, out
from handfast.cli.protocol import prove_protocol
from handfast.model.calibration import PaxosCommit, TwoPhase, orbit
from handfast.model.explore import explore

__all__ = ["prove"]


class Count(msgspec.Struct, frozen=True):
    """A state space that others have counted, and what our search counts."""

    model: str
    published: int
    counted: int
    seconds: float
    per_second: float
    bytes_per_state: float


@click.command()
@click.option("--calibrate", is_flag=True, help="Count state spaces that others have counted.")
@click.option("--paxos", is_flag=True, help="With --calibrate: Paxos Commit too; minutes.")
@click.option("--protocol", help="Search the shipped protocol: a scenario, `short`, or `list`.")
@click.option("--limit", type=click.IntRange(1), help="With --protocol: at most so many states.")
@as_json
def prove(
    calibrate: bool, paxos: bool, protocol: str | None, limit: int | None, as_json: bool
) -> None:
    """Show by searching every state what holds, and how soon a claim is torn."""
    if protocol is not None:
        prove_protocol(protocol, limit, as_json)
        return
    if not calibrate:
        raise click.UsageError("say what to prove: --calibrate or --protocol SCENARIO")
    with answering(as_json):
        counts = _calibrate(paxos)
        sound = all(count.counted == count.published for count in counts)
        if as_json:
            answer({"models": counts}, sound=sound)
        else:
            _show(counts)
        if not sound:
            raise click.exceptions.Exit(DAMAGED)


def _calibrate(paxos: bool) -> list[Count]:
    runs = [
        (f"two-phase commit, {n} managers", published, explore(TwoPhase(n)))
        for n, published in ((3, 288), (5, 8_832), (6, 50_816))
    ]
    orbits = explore(TwoPhase(5), canonical=orbit)
    runs.append(("two-phase commit, 5 managers, orbits", 314, orbits))
    found = [
        Count(name, published, r.states, r.seconds, r.per_second, r.bytes_per_state)
        for name, published, r in runs
    ]
    if paxos:
        r = explore(PaxosCommit())
        found.append(
            Count(
                "Paxos Commit, 2 managers, 3 acceptors, 2 ballots",
                1_321_761,
                r.states,
                r.seconds,
                r.per_second,
                r.bytes_per_state,
            )
        )
    return found


def _show(counts: list[Count]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("model", "published", "counted", "states/s", "bytes/state"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for count in counts:
        same = count.counted == count.published
        table.add_row(
            count.model,
            f"{count.published:,}",
            f"[{'green' if same else 'bold red'}]{count.counted:,}[/]",
            f"{count.per_second:,.0f}",
            f"{count.bytes_per_state:,.0f}",
        )
    out().print(table)
