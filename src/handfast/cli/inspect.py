"""``handfast inspect``: what an epoch consists of, without reading its image."""

from __future__ import annotations

import click
from rich.console import Console
from rich.markup import escape

from handfast import open as open_run
from handfast.checkpoint.inspection import Inspection, ShardView
from handfast.checkpoint.refusal import groups_apart
from handfast.checkpoint.spelling import size
from handfast.cli.console import RUNS, answer, answering, as_json, out, paths, step, tabulate
from handfast.core.lattice import Epoch
from handfast.store.manifest import Fork, Source, Stamp

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
    if found.unlike:
        console.print("\nnot alike on all ranks that have it whole, by the digests of its bytes:")
        rows = [(escape(each.path), groups_apart(each.groups)) for each in found.unlike]
        tabulate(("tensor", "ranks"), rows, words=(0, 1))


def _shard(console: Console, shard: ShardView) -> None:
    console.print(f"\n[bold]shard {shard.shard}[/] in {escape(shard.domain)}")
    if shard.problem:
        console.print(f"  [yellow]{escape(shard.problem)}[/]")
    stamp = shard.stamp
    if stamp is None:
        return
    files = ", ".join(f"{source.file} ({source.chunks} chunks)" for source in shard.sources)
    environment = ", ".join(f"{name} {value}" for name, value in shard.environment.items())
    about = [
        ("manifest", f"{shard.path} ({shard.digest})"),
        ("stamp", _stamp(stamp)),
        *((f"since {fork.lineage}", _fork(fork)) for fork in stamp.forks),
        ("loaded", "; ".join(map(_source, stamp.came)) or "nothing"),
        ("image", f"{size(shard.image_bytes)} in {files}"),
        ("environment", environment),
    ]
    tabulate((), [(f"[dim]{escape(name)}[/]", escape(what)) for name, what in about], words=(0, 1))
    tensors = []
    for tensor in shard.tensors:
        part = tensor.shape != tensor.global_shape
        notes = ["stored for the node"] if tensor.replicated else []
        notes += [f"also {name}" for name in tensor.tied]
        tensors.append((
            escape(tensor.path), tensor.dtype, _dims(tensor.shape),
            _dims(tensor.global_shape) if part else "", _dims(tensor.offset) if part else "",
            str(tensor.nbytes), escape(", ".join(notes)),
        ))  # fmt: skip
    heads = ("tensor", "dtype", "shape", "of", "at", "bytes", "")
    tabulate(heads, tensors, words=[at for at, name in enumerate(heads) if name != "bytes"])
    objects = [
        (escape(line.path or "(the whole)"), escape(line.type), escape(line.text))
        for line in shard.objects
    ]
    tabulate(("object", "type", "value"), objects, words=(0, 1, 2))


def _stamp(stamp: Stamp) -> str:
    of = f"lineage {stamp.lineage}, incarnation {stamp.incarnation}"
    return f"{of}, configuration {stamp.configuration[:8]}, parent {stamp.parent or 'none'}"


def _fork(fork: Fork) -> str:
    at = Epoch(fork.generation, fork.step)
    return f"{fork.of} of run {fork.run} at {at}: {fork.why}"


def _source(source: Source) -> str:
    at = Epoch(source.generation, source.step)
    return f"{source.path} from {source.lineage} of run {source.run} at {at}"


def _dims(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims)) or "scalar"
