"""``handfast export``: whole tensors in one file that needs no handfast."""

from __future__ import annotations

import importlib
from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape

from handfast import open as open_run
from handfast.cli.console import (
    AsJson,
    Step,
    answer,
    answering,
    epoch_of,
    out,
    showing,
    size,
)
from handfast.errors import HandfastError

__all__ = ["export"]


class Format(StrEnum):
    """What can be written."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"


def export(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... DEST",
            help="The run's directories, and the file to write; it must not exist.",
            show_default=False,
        ),
    ],
    to: Annotated[Format, typer.Option("--to", help="The format of the file.")],
    step: Step = None,
    component: Annotated[
        str, typer.Option(help="Only this part of the state, without its prefix: model, say.")
    ] = "",
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only these tensors; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an epoch's whole tensors to one file, verified while they are read.

    Shards are put together by shape and offset; what each rank stores for itself comes under
    rank-00003/. The epoch is pinned meanwhile, so a training beside it may go on.
    """
    chosen = epoch_of(step)
    if len(paths) < 2:
        raise typer.BadParameter("give the run's directory, and then the file to write")
    *run, dest = paths
    with answering(as_json):
        if to is Format.TORCH:
            _import_torch()
        opened = open_run(*run)
        with showing("export") as progress:
            done = opened.export(
                dest, chosen, format=to, component=component, only=only or ("**",),
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
