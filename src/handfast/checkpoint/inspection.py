"""What an epoch consists of, from its manifests alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec

from handfast.checkpoint.outline import Line, outline
from handfast.checkpoint.status import rows
from handfast.checkpoint.survey import Found, Survey
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.store.manifest import Manifest, Stamp

__all__ = ["Inspection", "ShardView", "SourceView", "TensorView", "Unlike", "inspect"]


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


class Unlike(msgspec.Struct, frozen=True):
    """A tensor that several ranks have whole, under one name, and otherwise: groups of shards that
    hold the same of it, the largest first.
    """

    path: str
    groups: tuple[tuple[int, ...], ...]


class Inspection(msgspec.Struct, frozen=True):
    """One epoch: its verdict by manifests, and its shards in order.

    ``unlike`` is told where digests of tensors were taken: of what ranks of a node hold alike, and
    of all that ``replicas=`` compares. What is each rank's own by design may be among it.
    """

    run: str
    epoch: Epoch
    verdict: Verdict | None
    certified: bool
    orphan: bool
    shards: tuple[ShardView, ...]
    unlike: tuple[Unlike, ...] = ()


def inspect(survey: Survey, epoch: Epoch) -> Inspection:
    """Show what each domain holds of an epoch that some domain holds."""
    row = next(row for row in rows(survey) if row.epoch == epoch)
    shards = [
        _shard(found, domain.id, domain.shard, row.cells[domain.id].problem, epoch)
        for domain, found in zip(survey.domains, survey.places, strict=True)
    ]
    entries = (found.entries.get(epoch) for found in survey.places if found is not None)
    manifests = [entry.manifest for entry in entries if entry is not None and entry.manifest]
    return Inspection(
        survey.run, epoch, row.verdict, row.certified, row.orphan, tuple(shards), _unlike(manifests)
    )


def _unlike(manifests: Iterable[Manifest]) -> tuple[Unlike, ...]:
    """Hold the digests of whole tensors against each other, across shards."""
    said: dict[str, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for manifest in manifests:
        whole = {s.spec.path for s in manifest.slots if s.spec.shape == s.spec.global_shape}
        held = {path: digest for path, digest in manifest.held().items() if path in whole}
        left = manifest.left.digests if manifest.left is not None else {}
        for path, digest in {**held, **left}.items():
            said[path][digest].append(manifest.stamp.shard)
    return tuple(
        Unlike(path, tuple(sorted(map(tuple, groups.values()), key=lambda g: (-len(g), g))))
        for path, groups in sorted(said.items())
        if len(groups) > 1
    )


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
