"""``handfast``: finds the commands. Each is a function of its name in a module of its name.

Exit codes, for all of them: 0 sound; 1 damaged, torn or missing; 2 the command was given wrongly;
3 it could not look.
"""

from __future__ import annotations

from importlib import import_module
from typing import Final

import click

__all__ = ["COMMANDS", "app"]

COMMANDS: Final = (
    "demo", "status", "verify", "inspect", "export", "release", "audit", "adopt",
    "plan", "prove", "simulate", "crashtest", "fleet",
)  # fmt: skip


class Commands(click.Group):
    """Loads the module of a command when it is asked for, so that other commands don't pay."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Name the commands, the first to try first."""
        return list(COMMANDS)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command, or None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(import_module(f"handfast.cli.{cmd_name}"), cmd_name)
        # the whole sentence, where click would show its beginning
        found.short_help = (found.help or "").split("\n\n")[0]
        return found


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 sound; 1 damaged, torn or missing; 2 wrong usage; 3 could not look.",
)
@click.version_option(package_name="handfast", prog_name="handfast", message="%(prog)s %(version)s")
def app() -> None:
    """Checkpoints that can be neither torn nor mixed: look at a run, check it, take it out."""
