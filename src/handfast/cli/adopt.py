"""``handfast adopt``: another library's checkpoint, taken into a run as a stamped epoch."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.markup import escape

from handfast.cli.console import Whole, answer, answering, as_json, out
from handfast.errors import HandfastError

__all__ = ["adopt"]

NOTE = """Weights become the component `model`, loaded by handfast.torch.load(RUN) or guard.load;
masters and moments become boxes of tensors beside it. Hyperparameters are not taken over."""


@click.command(epilog=NOTE)
@click.argument("path", type=click.Path())
@click.argument("run", type=click.Path())
@click.option("--step", type=Whole(min=0), help="Its step.", show_default="the newest")
@as_json
def adopt(path: str, run: str, step: int | None, as_json: bool) -> None:
    """Take a sound checkpoint of any known format into a new run.

    All of PATH's values are read and audited first, without executing a pickle; RUN is a path with
    no run on it.
    """
    with answering(as_json):
        try:
            from handfast.torch.adopt import adopt as take
        except ModuleNotFoundError as error:
            what = f"adopt needs torch: {error}. What to do: pip install 'handfast[torch]'"
            raise HandfastError(what) from error
        adopted = take(path, run, step=step)
        if as_json:
            answer(asdict(adopted))
            return
        told = ", ".join(f"{count} of {name}" for name, count in adopted.tensors.items())
        what = escape(adopted.step or path)
        out().print(f"adopted {what} ({escape(adopted.format)}) as epoch {adopted.epoch}: {told}")
