"""``handfast inspect``: what an epoch consists of, without reading its image."""

from __future__ import annotations

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from handfast import open as open_run
from handfast.checkpoint.inspection import Inspection, ShardView
from handfast.checkpoint.spelling import size
from handfast.cli.console import RUNS, answer, answering, as_json, out, paths, step
from handfast.core.lattice import Epoch

__all__ = ["inspect"]


@click.command(epilog=RUNS)
@paths
@step
@as_json
def inspect(run: tuple[str, ...], step: int | Epoch | None, as_json: bool) -> None:
    """Show stamps, tensors, objects, environment and files of an epoch.

    Nothing is unpickled and no image is read: `handfast verify` reads every byte.
    """
    with answering(as_json):
        found = open_run(*run).inspect(step)
        if as_json:
            answer(found)
            return
        console = out()
        _summary(console, found)
        for shard in found.shards:
            _shard(console, shard)


def _summary(console: Console, found: Inspection) -> None:
    words = [found.verdict or "being released"]
    words += ["certified"] if found.certified else []
    words += ["orphan of an abandoned timeline"] if found.orphan else []
    total = sum(shard.image_bytes for shard in found.shards)
    console.print(
        f"[bold]epoch {found.epoch}[/] of run {found.run}: {', '.join(words)}; "
        f"{len(found.shards)} shards, {size(total)}"
    )


def _shard(console: Console, shard: ShardView) -> None:
    console.print(f"\n[bold]shard {shard.shard}[/] in {escape(shard.domain)}")
    if shard.problem:
        console.print(f"  [yellow]{escape(shard.problem)}[/]")
    stamp = shard.stamp
    if stamp is None:
        return
    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim")
    about.add_column(overflow="fold")
    about.add_row("manifest", escape(f"{shard.path} ({shard.digest})"))
    about.add_row(
        "stamp",
        f"lineage {stamp.lineage}, incarnation {stamp.incarnation}, configuration "
        f"{stamp.configuration[:8]}, parent {stamp.parent or 'none'}",
    )
    files = ", ".join(f"{source.file} ({source.chunks} chunks)" for source in shard.sources)
    about.add_row("image", escape(f"{size(shard.image_bytes)} in {files}"))
    environment = ", ".join(f"{name} {value}" for name, value in shard.environment.items())
    about.add_row("environment", escape(environment))
    console.print(about)
    tensors = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("tensor", "dtype", "shape", "of", "at", "bytes", ""):
        tensors.add_column(name, overflow="fold", justify="right" if name == "bytes" else "left")
    for tensor in shard.tensors:
        part = tensor.shape != tensor.global_shape
        notes = ["stored for the node"] if tensor.replicated else []
        notes += [f"also {name}" for name in tensor.tied]
        tensors.add_row(
            escape(tensor.path), tensor.dtype, _dims(tensor.shape),
            _dims(tensor.global_shape) if part else "", _dims(tensor.offset) if part else "",
            str(tensor.nbytes), escape(", ".join(notes)),
        )  # fmt: skip
    console.print(tensors)
    objects = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("object", "type", "value"):
        objects.add_column(name, overflow="fold")
    for line in shard.objects:
        objects.add_row(escape(line.path or "(the whole)"), escape(line.type), escape(line.text))
    console.print(objects)


def _dims(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims)) or "scalar"
