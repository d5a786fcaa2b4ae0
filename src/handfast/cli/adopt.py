"""``handfast adopt``: another library's checkpoint, taken into a run as a stamped epoch."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.markup import escape

from handfast.cli.audit import GIB, MEMORY
from handfast.cli.console import Whole, answer, answering, as_json, out
from handfast.errors import HandfastError

__all__ = ["adopt"]

NOTE = """Weights become the component `model`, loaded by handfast.torch.load(RUN) or guard.load;
masters, moments and the like become boxes of tensors beside it, by the weights' names where these
are known; `step` counts an optimizer's updates. Hyperparameters are not taken over.
Which step is taken is said; of what can't be told apart none is, until PATH or --step names it."""

SHOWN = 8


@click.command(epilog=NOTE)
@click.argument("path", type=click.Path())
@click.argument("run", type=click.Path())
@click.option(
    "--step",
    type=Whole(min=0),
    help="Its step, as its files or its name say.",
    show_default="the newest",
)
@click.option(
    "--without", multiple=True, metavar="NAME", help="Leave this out, or what fits the pattern."
)
@click.option("--trust", is_flag=True, help="Take it though what it counts contradicts itself.")
@MEMORY
@as_json
def adopt(
    path: str,
    run: str,
    step: int | None,
    without: tuple[str, ...],
    trust: bool,
    memory: int,
    as_json: bool,
) -> None:
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
        adopted = take(path, run, step=step, without=without, trust=trust, memory=memory * GIB)
        if as_json:
            answer(asdict(adopted))
            return
        told = ", ".join(f"{count} of {name}" for name, count in adopted.tensors.items())
        what = f"{adopted.step or path} ({adopted.format}), {adopted.why}"
        out().print(f"adopted {escape(what)}, as epoch {adopted.epoch}: {told}")
        for says, names in (("not taken over", adopted.left), ("left out", adopted.without)):
            if names:
                some = ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
                out().print(f"{says}: {len(names)} tensors or other values ({escape(some)})")
