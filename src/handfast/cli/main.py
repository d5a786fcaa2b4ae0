"""``handfast``: finds the commands. Each is a function of its name in a module of its name.

Exit codes, for all of them: 0 sound; 1 damaged, torn or missing; 2 the command was given wrongly;
3 it could not look.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

__all__ = ["COMMANDS", "app"]

COMMANDS: Final = ("demo", "status", "verify", "inspect", "export", "release")


class Commands(TyperGroup):
    """Imports a command's module when that command is asked for, so that others don't pay."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        """Name the commands of this installation, the first to try first."""
        return [name for name in COMMANDS if importlib.util.find_spec(f"{__package__}.{name}")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Build a command, or None where there is none of this name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        single = typer.Typer(add_completion=False)
        module = importlib.import_module(f"{__package__}.{cmd_name}")
        single.command(cmd_name)(getattr(module, cmd_name))
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
