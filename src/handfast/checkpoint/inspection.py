"""What an epoch consists of, from its manifests alone."""

from __future__ import annotations

from collections import Counter

import msgspec

from handfast.checkpoint.outline import Line, outline
from handfast.checkpoint.status import rows
from handfast.checkpoint.survey import Found, Survey
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.store.manifest import Manifest, Stamp

__all__ = ["Inspection", "ShardView", "SourceView", "TensorView", "inspect"]


class TensorView(msgspec.Struct, frozen=True):
    """One tensor of a shard. ``shape`` is stored here, at ``offset`` in ``global_shape``.

    ``replicated``: it is stored here for the whole node. ``tied`` are its other names.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    nbytes: int
    replicated: bool
    tied: tuple[str, ...]


class SourceView(msgspec.Struct, frozen=True):
    """A data file that an epoch lies in, relative to its domain, and how many chunks of it."""

    file: str
    chunks: int


class ShardView(msgspec.Struct, frozen=True):
    """One shard, as its manifest says. ``problem`` says why there is none to show."""

    domain: str
    shard: int
    path: str = ""
    digest: str = ""
    problem: str = ""
    stamp: Stamp | None = None
    image_bytes: int = 0
    structure: str = ""
    sources: tuple[SourceView, ...] = ()
    environment: dict[str, str] = {}
    tensors: tuple[TensorView, ...] = ()
    objects: tuple[Line, ...] = ()


class Inspection(msgspec.Struct, frozen=True):
    """One epoch: its verdict by manifests, and its shards in order."""

    run: str
    epoch: Epoch
    verdict: Verdict | None
    certified: bool
    orphan: bool
    shards: tuple[ShardView, ...]


def inspect(survey: Survey, epoch: Epoch) -> Inspection:
    """Show what each domain holds of an epoch that some domain holds."""
    row = next(row for row in rows(survey) if row.epoch == epoch)
    shards = [
        _shard(found, domain.id, domain.shard, row.cells[domain.id].problem, epoch)
        for domain, found in zip(survey.domains, survey.places, strict=True)
    ]
    return Inspection(survey.run, epoch, row.verdict, row.certified, row.orphan, tuple(shards))


def _shard(found: Found | None, name: str, shard: int, problem: str, epoch: Epoch) -> ShardView:
    entry = found.entries.get(epoch) if found is not None else None
    manifest = entry.manifest if entry is not None else None
    if entry is None or manifest is None:
        why = problem or (entry.problem if entry is not None else "this domain holds nothing of it")
        return ShardView(name, shard, problem=why)
    chunks = Counter[int]()
    for piece in manifest.pieces:
        chunks[piece.source] += piece.count
    return ShardView(
        domain=name,
        shard=shard,
        path=entry.path,
        digest=entry.digest,
        problem=problem,
        stamp=manifest.stamp,
        image_bytes=manifest.image_bytes,
        structure=manifest.structure,
        sources=tuple(SourceView(s, chunks[i]) for i, s in enumerate(manifest.sources)),
        environment=manifest.environment,
        tensors=_tensors(manifest),
        objects=outline(manifest.objects, entry.path),
    )


def _tensors(manifest: Manifest) -> tuple[TensorView, ...]:
    shared = set(manifest.replicated)
    tied: dict[str, list[str]] = {}
    for alias, path in manifest.aliases.items():
        tied.setdefault(path, []).append(alias)
    return tuple(
        TensorView(
            slot.spec.path, slot.spec.dtype, slot.spec.shape, slot.spec.global_shape,
            slot.spec.offset, slot.nbytes, slot.spec.path in shared,
            tuple(tied.get(slot.spec.path, ())),
        )
        for slot in sorted(manifest.slots, key=lambda slot: slot.spec.path)
    )  # fmt: skip
