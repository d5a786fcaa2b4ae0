"""``handfast crashtest``: what this storage can be trusted with, tried out on it."""

from __future__ import annotations

import os
from typing import Final

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import DAMAGED, answer, answering, as_json, is_default, out
from handfast.errors import HandfastError
from handfast.testing import storage, writer
from handfast.testing.medium import medium

__all__ = ["crashtest"]

UNTRIED: Final = (
    (
        "power loss: no program can see whether what was synced outlives one. Try it: `handfast "
        "crashtest DIR --plug`, with its output on another machine; cut the power (not a reboot: "
        "that flushes caches); then `handfast crashtest DIR --after N` with the last number"
    ),
    "several hosts: run --plug on one, end it, and --after N on another, at once",
    "conditional puts: they are the object stores', and this is a directory",
)
KILLS: Final = 8


class Answer(msgspec.Struct, frozen=True):
    """What was found: the medium, each trial, what it may be trusted with and what not."""

    path: str
    kind: str
    device: str
    lies_on: str
    trustworthy: bool
    trials: list[dict[str, object]]
    warnings: tuple[str, ...]
    may: tuple[str, ...]
    may_not: tuple[str, ...]
    untried: tuple[str, ...]


@click.command()
@click.argument("path", metavar="DIR")
@click.option(
    "--kills",
    default=KILLS,
    type=click.IntRange(min=1),
    show_default=True,
    help="How many writers are killed; more, while none has attested anything.",
)
@click.option("--seed", default=1, show_default=True, help="When they are killed.")
@click.option("--plug", is_flag=True, help="Write until the plug is pulled; tell how far it came.")
@click.option(
    "--after",
    type=click.IntRange(min=0),
    metavar="N",
    help="Look what is left of its first N epochs; where all is well it is removed.",
)
@as_json
@click.pass_context
def crashtest(
    ctx: click.Context,
    /,
    path: str,
    kills: int,
    seed: int,
    plug: bool,
    after: int | None,
    as_json: bool,
) -> None:
    """Say what a directory's storage can be trusted with, by killing processes that write to it.

    Tries what handfast relies on: syncs, exclusive creation, renames that replace, links, locks,
    that a name leads to the file that is open, and that one process sees at once what another
    did; then kills writers, and looks whether anything that they had attested is torn or gone.
    Leaves nothing behind, but for --plug.

    Exit code 0: trustworthy, as far as can be seen without pulling a plug; 1: not; 3: it could not
    look, or nothing of --plug is there.
    """
    if plug and after is not None:
        raise click.UsageError("choose one of --plug and --after N")
    given = {name for name in ("kills", "seed") if not is_default(ctx, name)}
    if given and (plug or after is not None):
        raise click.UsageError(f"--{min(given)} goes with neither --plug nor --after N")
    if plug and as_json:
        raise click.UsageError("--plug tells each epoch as it goes, and no JSON")
    with answering(as_json):
        _check(path)
        if plug:
            writer.plug(path, click.echo)
        elif after is not None:
            _end(path, [writer.after(path, after)], as_json, show=True)
        else:
            with storage.scratch(path) as home:
                trials = []
                for trial in storage.try_out(home, kills=kills, seed=seed):
                    trials.append(trial)
                    if not as_json:
                        _show(trial)
            _end(path, trials, as_json, show=False)


def _check(path: str) -> None:
    if not os.path.isdir(path):
        raise HandfastError(
            f"{path} is no directory. What to do: name the one that a run is to lie in"
        )


def _show(trial: writer.Trial) -> None:
    mark = "[green]holds[/]" if trial.holds else "[bold red]FAILS[/]"
    out().print(f"{mark}  {trial.name:22} {escape(trial.seen)}")


def _end(path: str, trials: list[writer.Trial], as_json: bool, *, show: bool) -> None:
    found = _judge(path, trials)
    if as_json:
        answer(found)
    else:
        if show:
            _show(trials[0])
        _tell(found)
    if not found.trustworthy:
        raise click.exceptions.Exit(DAMAGED)


def _judge(path: str, trials: list[writer.Trial]) -> Answer:
    lies_on = medium(path)
    failed = [trial for trial in trials if not trial.holds]
    may, may_not = [], [f"{trial.rests} ({trial.name})" for trial in failed]
    plugged = trials[0].name == "after the plug"
    if not failed:
        may.append(trials[0].rests if plugged else "processes that are killed, of one host")
    if lies_on.volatile:
        may_not.append(f"anything that is to outlive a restart: it is memory: {lies_on}")
    warnings = list(lies_on.warnings())
    if lies_on.shared:
        warnings.append(
            f"{lies_on.kind}: other hosts may write here, too; give each node a path of its own"
        )
    return Answer(
        path=path,
        kind=lies_on.kind,
        device=lies_on.device,
        lies_on=str(lies_on),
        trustworthy=not may_not,
        trials=[trial._asdict() for trial in trials],
        warnings=tuple(warnings),
        may=tuple(may),
        may_not=tuple(may_not),
        untried=() if plugged else UNTRIED,
    )


def _tell(found: Answer) -> None:
    console = out()
    console.print(f"\n{escape(found.path)} lies on {escape(found.lies_on)}")
    for title, lines in (
        ("can be trusted with", found.may),
        ("[bold red]can't be trusted with[/]", found.may_not),
        ("[yellow]take care[/]", found.warnings),
        ("was not tried", found.untried),
    ):
        for line in lines:
            console.print(f"{title}: {escape(line)}")
