"""``handfast release``: let epochs go, by the protocol's rule, where no agent does it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click
from rich.console import Console
from rich.markup import escape

from handfast import open as open_run
from handfast.checkpoint.reader import Run
from handfast.checkpoint.release import DomainPlan, carry_out, free_pins, plan_release
from handfast.checkpoint.spelling import size
from handfast.cli.console import (
    RUNS,
    answer,
    answering,
    as_json,
    epoch_of,
    out,
    paths,
    showing,
    tabulate,
)
from handfast.core.lattice import Epoch
from handfast.core.retain import Keep
from handfast.store.pins import Pin

__all__ = ["release"]

DEAD = "dead"
FATES = {True: ", which has ended", False: "", None: ", maybe ended"}
UNTOLD = (
    "whether a reader that maybe ended has can't be told from here: it was on another host, in "
    "another container or before a reboot, or its pin can't be read or is of an older handfast. "
    "Its pin stays. What to do: once you know that nobody reads, free it by its name: --unpin PIN"
)
OFFLINE = (
    "--yes needs --offline: to release, each domain is claimed, and that supersedes an agent that "
    "is alive on another node, which can't be seen from here. If no job trains this run anywhere, "
    "say so with --offline; else let its agents release (keep=Keep(newest=...))"
)


@click.command(epilog=RUNS)
@paths
@click.option(
    "--keep-newest",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of the living timeline, keep so many converged epochs.",
)
@click.option(
    "--keep-every",
    type=click.IntRange(min=1),
    metavar="N",
    help="Besides, keep every step divisible by this.",
)
@click.option(
    "--step", callback=epoch_of, metavar="N", help="Only this step, or epoch GENERATION/STEP."
)
@click.option("--pins", is_flag=True, help="List the pins of readers.")
@click.option(
    "--unpin", metavar="PIN", help="Free this pin, or 'dead': all whose reader has provably ended."
)
@click.option("--yes", is_flag=True, help="Do it; otherwise it is only shown.")
@click.option("--offline", is_flag=True, help="No job trains this run, on any node.")
@click.option("--unseen", is_flag=True, help="Trust what domains that are not here attested.")
@as_json
def release(
    run: tuple[str, ...],
    keep_newest: int | None,
    keep_every: int | None,
    step: int | Epoch | None,
    pins: bool,
    unpin: str | None,
    yes: bool,
    offline: bool,
    unseen: bool,
    as_json: bool,
) -> None:
    """Let epochs go: orphans and left-overs, and by --keep-newest or --step what is superseded.

    Nothing at or above the converged line ever goes, nor what a reader has pinned. Without --yes
    it is shown what would go, and why the rest stays.
    """
    if keep_every is not None and keep_newest is None:
        raise click.UsageError("--keep-every adds to --keep-newest: give both")
    with answering(as_json):
        opened = open_run(*run)
        if pins or unpin is not None:
            _pins(opened, unpin, yes, as_json)
            return
        if yes and not offline:
            raise ValueError(OFFLINE)
        keep = _keep(keep_newest, keep_every, step)
        plans = plan_release(opened.location, keep, step, unseen=unseen)
        if yes:
            with showing("read what is kept") as progress:
                plans = carry_out(opened.location, plans, keep, step, progress, unseen=unseen)
        if as_json:
            answer({"done": yes, "domains": plans})
        else:
            _show(out(), plans, done=yes)


def _keep(newest: int | None, every: int | None, step: int | Epoch | None) -> Keep | None:
    if newest is not None:
        return Keep(newest, every)
    return Keep(newest=1) if step is not None else None


def _show(console: Console, plans: Sequence[DomainPlan], *, done: bool) -> None:
    goes = "released" if done else "would go"
    for plan in plans:
        console.print(f"[bold]{escape(plan.domain)}[/], converged line {plan.line or 'unknown'}")
        if plan.blocked:
            console.print(f"  [yellow]nothing may go: {escape(plan.blocked)}[/]")
        lines = [(str(epoch), f"[bold]{goes}[/]") for epoch in plan.gone]
        lines += [
            (str(epoch), f"[bold]{goes}[/]: it was never attested") for epoch in plan.leftovers
        ]
        if plan.litter:
            what = "1 file" if len(plan.litter) == 1 else f"{len(plan.litter)} files"
            lines.append((what, f"[bold]{goes}[/]: no epoch needs this"))
        lines += [(str(stay.epoch), f"[dim]stays: {stay.why}[/]") for stay in plan.stays]
        tabulate((), [(f"  {what}", why) for what, why in lines], words=(0, 1))
    count = sum(len(plan.gone) + len(plan.leftovers) for plan in plans)
    images = size(sum(plan.nbytes for plan in plans))
    console.print(f"{count} copies {goes}, images of {images} (deltas may share some of that)")
    if any(plan.anything for plan in plans) and not done:
        console.print("nothing was changed: add --yes --offline to do it")


def _pins(opened: Run, unpin: str | None, yes: bool, as_json: bool) -> None:
    """List pins, and free those that are meant."""
    places = opened.location.survey().places
    held = [pin for found in places if found is not None for pin in found.pins]
    meant = [pin for pin in held if _is_meant(pin, unpin)]
    if unpin not in (None, DEAD) and not meant:
        raise ValueError(f"no pin {unpin!r}: --pins lists them")
    freed = free_pins(meant) if yes else 0
    if as_json:
        answer({"pins": [_fields(pin) for pin in held], "freed": freed})
        return
    console = out()
    lines = []
    for pin in held:
        what = ("freed" if yes else "would be freed") if pin in meant else ""
        fields = _fields(pin)
        reader = f"process {fields['pid']} on {fields['host']}" if pin.holder else "unknown"
        lines.append((
            str(pin.epoch), escape(reader + FATES[pin.ended()]), escape(str(fields["purpose"])),
            os.path.basename(pin.path), what,
        ))  # fmt: skip
    if held:
        heads = ("epoch", "reader", "purpose", "pin", "")
        tabulate(heads, lines, words=range(len(heads)))
    else:
        console.print("no reader holds a pin")
    if unpin in (None, DEAD) and any(pin.ended() is None for pin in held):
        console.print(UNTOLD)
    if meant and not yes:
        console.print("nothing was changed: add --yes to do it")


def _is_meant(pin: Pin, unpin: str | None) -> bool:
    if unpin == DEAD:
        return pin.ended() is True
    return unpin is not None and os.path.basename(pin.path) == os.path.basename(unpin)


def _fields(pin: Pin) -> dict[str, object]:
    holder = pin.holder
    return {
        "epoch": pin.epoch,
        "path": pin.path,
        "pid": holder.pid if holder else 0,
        "host": holder.host if holder else "",
        "purpose": holder.purpose if holder else "",
        "ended": pin.ended(),
    }
