"""``handfast export``: whole tensors in one file that needs no handfast."""

from __future__ import annotations

import importlib
import os
from enum import StrEnum
from typing import Final

import click
from rich.markup import escape

from handfast import open as open_run
from handfast.checkpoint.spelling import size
from handfast.cli.console import RUNS, answer, answering, as_json, out, showing, step
from handfast.core.lattice import Epoch
from handfast.errors import HandfastError

__all__ = ["export"]


class Format(StrEnum):
    """What can be written."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"


FORMATS: Final = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}


@click.command(epilog=RUNS)
@click.argument("paths", nargs=-1, required=True, metavar="RUN... DEST")
@click.option(
    "--to",
    type=click.Choice([kind.value for kind in Format]),
    help="The format of the file; by default what its name ends in: .safetensors, .pt, .pth.",
)
@step
@click.option(
    "--component", default="", help="Only this part of the state, without its prefix: model, say."
)
@click.option("--only", multiple=True, metavar="GLOB", help="Only these tensors; may be repeated.")
@as_json
def export(
    paths: tuple[str, ...],
    to: str | None,
    step: int | Epoch | None,
    component: str,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write an epoch's whole tensors to one file, verified while they are read.

    Shards are put together by shape and offset; what each rank stores for itself comes under
    rank-00003/. The epoch is pinned meanwhile, so a training beside it may go on.
    """
    if len(paths) < 2:
        raise click.UsageError("give the run's directory, and then the file to write")
    *run, dest = paths
    to = to or FORMATS.get(os.path.splitext(dest)[1])
    if to is None:
        raise click.UsageError(
            f"{dest}: its name says no format ({', '.join(FORMATS)} do): add --to safetensors or "
            "--to torch"
        )
    with answering(as_json):
        if to == Format.TORCH:
            _import_torch()
        opened = open_run(*run)
        with showing("export") as progress:
            done = opened.export(
                dest, step, format=Format(to), component=component, only=only or ("**",),
                progress=progress,
            )  # fmt: skip
        if as_json:
            answer(done)
        else:
            tied = f" ({done.tied} tied names more)" if done.tied else ""
            out().print(
                f"epoch {done.epoch}: {done.tensors} tensors{tied}, {size(done.nbytes)}, in "
                f"{escape(done.path)}"
            )


def _import_torch() -> None:
    try:
        importlib.import_module("handfast.torch")
    except ModuleNotFoundError as error:
        raise HandfastError(
            f"--to torch needs torch ({error}). What to do: pip install 'handfast[torch]', or "
            "export --to safetensors"
        ) from error
