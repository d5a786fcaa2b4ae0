"""``handfast``: finds the commands. Each is a function of its name in a module of its name.

Exit codes, for all of them: 0 sound; 1 damaged, torn or missing; 2 the command was given wrongly;
3 it could not look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

__all__ = ["COMMANDS", "app"]

COMMANDS: Final = ("demo", "status", "verify", "inspect", "export", "release")


def function(name: str) -> Callable[..., None]:
    """The function of a command; its module is imported now, so that other commands don't pay."""
    match name:
        case "demo":
            from handfast.cli.demo import demo

            return demo
        case "status":
            from handfast.cli.status import status

            return status
        case "verify":
            from handfast.cli.verify import verify

            return verify
        case "inspect":
            from handfast.cli.inspect import inspect

            return inspect
        case "export":
            from handfast.cli.export import export

            return export
        case _:
            from handfast.cli.release import release

            return release


class Commands(TyperGroup):
    """Builds a command when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        """Name the commands, the first to try first."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - typer's signature
        """Build a command, or None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        single = typer.Typer(add_completion=False)
        single.command(cmd_name)(function(cmd_name))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 sound; 1 damaged, torn or missing; 2 wrong usage; 3 could not look.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"handfast {version('handfast')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it, and end.")
    ] = False,
) -> None:
    """Checkpoints that can be neither torn nor mixed: look at a run, check it, take it out."""
