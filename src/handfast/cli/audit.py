"""``handfast audit``: what other people's checkpoints say of their epochs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
from rich.markup import escape

from handfast.audit.finding import Finding, Strength
from handfast.audit.room import MEMORY as DEFAULT
from handfast.audit.run import Audit, Listed
from handfast.audit.run import audit as look
from handfast.audit.sarif import sarif as as_sarif
from handfast.audit.watch import watch as watching
from handfast.checkpoint.spelling import size
from handfast.cli.console import (
    DAMAGED,
    NO_LOOK,
    Whole,
    answer,
    answering,
    as_json,
    out,
    place_for,
    plain,
    tabulate,
    telling_how_far,
)

__all__ = ["GIB", "MEMORY", "audit"]

GIB: Final = 1 << 30

MEMORY: Final = click.option(
    "--memory",
    type=Whole(min=1, max=1 << 20),
    default=DEFAULT // GIB,
    show_default=True,
    metavar="GIB",
    help="GiB of memory that the objects of one pickle may take.",
)

COLOURS: Final = {Strength.CERTAIN: "red", Strength.STRONG: "yellow", Strength.HINT: "dim"}

NOTE = """Nothing is changed, no pickle is executed. Exit codes: 0 sound, hints aside; 1 a finding
is certain or strong; 2 wrong usage; 3 it could not look, or there is no checkpoint."""


@click.command(epilog=NOTE)
@click.argument("path", type=click.Path())
@click.option("--deep", is_flag=True, help="Read all values, not the beginning of each tensor.")
@click.option("--sarif", metavar="FILE", help="Write the findings to a file as SARIF, too.")
@click.option("--watch", is_flag=True, help="Look again whenever something was written, for ever.")
@MEMORY
@as_json
def audit(
    path: str, deep: bool, sarif: str | None, watch: bool, memory: int, as_json: bool
) -> None:
    """Say what is torn, mixed, stale or missing in checkpoints of any library.

    PATH is a file, a checkpoint, or a directory of them. Each finding has its evidence, and says
    whether it is certain, strong or a hint.
    """
    if watch and sarif:
        raise click.UsageError("--sarif is written once: not with --watch")
    place_for("--sarif", sarif)
    with answering(as_json):
        if watch:
            _watch(path, deep, memory * GIB, as_json)
        with telling_how_far() as tell:
            found = look(path, deep=deep, memory=memory * GIB, progress=_Meter(tell))
        if sarif is not None:
            Path(sarif).write_text(json.dumps(as_sarif(found), indent=2) + "\n", encoding="utf-8")
        if as_json:
            answer(found, sound=found.sound)
        else:
            _show(found)
        if not any(listed.steps for listed in found.found):
            raise click.exceptions.Exit(NO_LOOK)
        if not found.sound:
            raise click.exceptions.Exit(DAMAGED)


class _Meter:
    """Shows how many bytes were read, now and then."""

    def __init__(self, tell: object) -> None:
        self._tell, self._nbytes, self._next = tell, 0, 0.0

    def __call__(self, nbytes: int) -> None:
        self._nbytes += nbytes
        if callable(self._tell) and time.monotonic() > self._next:
            self._next = time.monotonic() + 0.2
            self._tell(f"audit: {size(self._nbytes)} read")


def _watch(path: str, deep: bool, memory: int, as_json: bool) -> None:
    """Tell what is new, a line each, until somebody ends it; at first that it looks."""
    click.echo(f"audit: watching {path}, until it is interrupted", err=True)
    for finding in watching(path, deep=deep, memory=memory):
        if as_json:
            out().print(json.dumps(plain(finding)), markup=False, emoji=False)
        else:
            stamp = time.strftime("%H:%M:%S")
            out().print(f"{stamp} {_line(finding)}")


def _show(found: Audit) -> None:
    console = out()
    for listed in found.found:
        _show_one(listed)
    if not any(listed.steps for listed in found.found):
        console.print(f"[bold red]nothing[/]: no checkpoint that is known in {escape(found.path)}")
    if found.unknowns:
        some = ", ".join(found.unknown[:3]) + (" ..." if found.unknowns > 3 else "")
        console.print(f"{found.unknowns} files are of no format that is known: {escape(some)}")
    if found.changed:
        names = escape(", ".join(found.changed[:3]))
        console.print(f"[yellow]written while it was read[/]: {names}; look again")
    if not found.arithmetic:
        console.print("values were compared, not looked into: pip install 'handfast[audit]'")
    read = f"{size(found.nbytes)} read"
    if found.cut:
        read += f"; {found.cut} tensors not to their end" + ("" if found.deep else " (--deep does)")
    state = "[bold green]sound[/]" if found.sound else _count(found.findings)
    if found.sound and found.findings:
        state += f", {len(found.findings)} hint{'s' * (len(found.findings) > 1)}"
    console.print(f"{state} ({read})")


def _count(findings: Sequence[Finding]) -> str:
    counts = [(s, sum(f.strength is s for f in findings)) for s in Strength]
    told = [f"{count} {strength}" for strength, count in counts if count]
    return f"[bold red]{', '.join(told) or 'nothing to rely on'}[/]"


def _show_one(listed: Listed) -> None:
    console = out()
    console.print(f"[bold]{escape(listed.format)}[/] in {escape(listed.root or '.')}")
    heads = ("step", "number", "", "parts", "tensors", "bytes")
    rows = [
        (
            escape(step.path or "."),
            "" if step.number is None else str(step.number),
            "[green]whole[/]" if step.whole else "[red]not whole[/]",
            str(step.parts),
            str(step.tensors),
            size(step.nbytes),
        )
        for step in listed.steps
    ]
    if rows:
        tabulate(heads, rows, words=(0, 2))
    for resume in listed.resume:
        what = escape(resume.step) or "nothing"
        console.print(f"  {escape(resume.ranks)} would resume {what}: {escape(resume.rule)}")
    for finding in listed.findings:
        console.print(f"  {_line(finding)}")
        for line in finding.evidence:
            console.print(f"      [dim]{escape(line)}[/]")


def _line(finding: Finding) -> str:
    colour = COLOURS[finding.strength]
    says = f"{finding.step}: {finding.says}" if finding.step else finding.says
    return f"[{colour}]{finding.strength}[/] {escape(says)} [dim]({finding.code})[/]"
