"""Which whole tensors the shards of an epoch make, by what their manifests say; reads nothing.

A sharded tensor is put together from its blocks by global shape and offset. Blocks that several
shards have for one place are copies of one only if their bytes are equal: the stages of a pipeline
may have one name for two tensors. What is stored once a node is the job's as the lowest of these
ranks has it, and only with it the others' of the same digest. What several ranks store as their own
is never assumed to be alike: each rank's gets a name under ``rank-00003/``, and where the job has a
tensor of that name, it comes only if a pattern begins with ``rank-``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from handfast.errors import FormatError
from handfast.store.image import DTYPES, Slot, TensorSpec
from handfast.store.manifest import Manifest

__all__ = ["APART", "Block", "Whole", "gather", "runs"]

APART = (
    "What to do: if they are of stages of a pipeline whose keys all begin at 0, give each stage's "
    "modules names of their own from now on; read this epoch in a job of its shape: restore it "
    "there, and gather (full_tensor())"
)


class Block(NamedTuple):
    """A part of a tensor: the slot of one shard's image that holds it."""

    shard: int
    slot: Slot

    @property
    def span(self) -> range:
        """The bytes of the image."""
        return range(self.slot.start, self.slot.start + self.slot.nbytes)

    def within(self, image: memoryview) -> memoryview:
        """The block's bytes, out of the image."""
        return image[self.slot.start : self.slot.start + self.slot.nbytes]


Shared = Mapping[str, bytes | None]
"""What a rank took to be alike on all ranks, by path: the digests, where they were taken."""


class Held(NamedTuple):
    """A tensor of one shard, by the path that it is stored under."""

    shard: int
    path: str


class Whole(msgspec.Struct, frozen=True):
    """A whole tensor: its name, dtype and global shape, and the blocks that tile it.

    ``twins`` are pairs of blocks for one place. Only the first of a pair is among ``blocks``: they
    hold the same bytes, or this is no tensor. ``beside`` one that is taken to be the whole job's a
    rank holds this one under the same path: DDP's buffers between two forward passes, say.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    twins: tuple[tuple[Block, Block], ...] = ()
    beside: bool = False


def gather(manifests: Sequence[Manifest]) -> tuple[list[Whole], dict[str, str]]:
    """Plan whole tensors from one manifest a shard; (the tensors by name, names of tied ones).

    Raises FormatError, naming it, for a tensor whose blocks don't tile it.
    """
    found: dict[str, list[Block]] = defaultdict(list)
    ties: dict[str, dict[int, str]] = defaultdict(dict)
    shared = {m.stamp.shard: _shared(m) for m in manifests}
    for manifest in manifests:
        for slot in manifest.slots:
            found[slot.spec.path].append(Block(manifest.stamp.shard, slot))
        for alias, path in manifest.aliases.items():
            ties[alias][manifest.stamp.shard] = path
    for alias in ties.keys() & found.keys():
        # A rank whose part of a tied tensor is empty has no memory of it that could be tied.
        if all(_is_empty_part(block.slot.spec) for block in found[alias]):
            del found[alias]
    wholes = []
    of_job: dict[str, Held | None] = {}
    for path, blocks in found.items():
        if any(b.slot.spec.shape != b.slot.spec.global_shape for b in blocks):
            wholes.append(_tiled(path, blocks))
            continue
        of_job[path] = _of_job(path, blocks, ties.get(path, {}), shared)
        wholes += _named(path, blocks, of_job[path], shared)
    names = {whole.name for whole in wholes}
    if len(names) < len(wholes):
        raise FormatError("two tensors would have one name: a component is named like a rank")
    tied: dict[str, str] = {}
    for alias, paths in ties.items():
        tied |= _tied(alias, paths, names, alias not in found, of_job.get(alias))
    return sorted(wholes, key=lambda whole: whole.name), tied


def _shared(manifest: Manifest) -> Shared:
    """What a rank took to be alike on all ranks, and not only on those of its node."""
    held = manifest.held()
    return {path: held.get(path) for path in manifest.replicated}


def _of_job(
    path: str,
    blocks: Sequence[Block],
    ties: Mapping[int, str],
    shared: Mapping[int, Shared],
) -> Held | None:
    """Who holds what is the job's under a path: of the ranks that take it to be alike the lowest.

    Also where that one has it tied to what it stores; but a tie alone says nothing of its path, so
    one of those that store it must take it to be alike. Else it is the only one that holds it.
    """
    if not any(path in shared[block.shard] for block in blocks):
        return Held(blocks[0].shard, path) if len(blocks) == 1 and not ties else None
    held = [*(Held(block.shard, path) for block in blocks), *(Held(*tie) for tie in ties.items())]
    return min(one for one in held if one.path in shared[one.shard])


def _named(
    path: str, blocks: Sequence[Block], of_job: Held | None, shared: Mapping[int, Shared]
) -> Iterator[Whole]:
    """The job's tensor, and under the names of ranks what they don't hold as the job does."""
    alike = shared[of_job.shard].get(of_job.path) if of_job is not None else None
    for block in blocks:
        if Held(block.shard, path) == of_job:
            yield _whole(path, [block])
        elif alike is None or shared[block.shard].get(path) != alike:
            yield _whole(_of_rank(block.shard, path), [block], of_job is not None)


def _is_empty_part(spec: TensorSpec) -> bool:
    return 0 in spec.shape and 0 not in spec.global_shape


def _tied(
    alias: str, paths: dict[int, str], names: set[str], alike: bool, of_job: Held | None
) -> dict[str, str]:
    """What a path that some shards tie is called; each rank's where it is not ``alike`` on all.

    It is the job's as the rank has it that holds what is ``of_job``, if that one ties it. Ranks
    that hold the job's tensor otherwise have ties of their own beside the job's.
    """
    kept = {}
    for shard, path in paths.items():
        own = _of_rank(shard, path)
        if own in names or path in names:
            kept[shard] = own if own in names else path
    everywhere = set(paths.values())
    found = {}
    if of_job is not None and of_job.shard in kept:
        found = {alias: kept[of_job.shard]}
    elif alike and len(everywhere) == 1 and not everywhere.isdisjoint(kept.values()):
        found = {alias: everywhere.pop()}
    return found | {
        _of_rank(shard, alias): name for shard, name in kept.items() if name not in found.values()
    }


def _of_rank(shard: int, path: str) -> str:
    return f"rank-{shard:05d}/{path}"


def _whole(name: str, blocks: Sequence[Block], beside: bool = False) -> Whole:
    spec = blocks[0].slot.spec
    return Whole(name, spec.dtype, spec.global_shape, tuple(blocks), beside=beside)


def _tiled(path: str, blocks: Sequence[Block]) -> Whole:
    """Check that blocks make a grid that covers the tensor once; pair those for one place.

    All shards are products of cuts along each dimension, so a grid is all that there can be.
    """
    whole = _whole(path, blocks)
    rank = len(whole.shape)
    placed: dict[tuple[tuple[int, int], ...], Block] = {}
    twins: list[tuple[Block, Block]] = []
    for block in blocks:
        spec = block.slot.spec
        if (spec.dtype, spec.global_shape) != (whole.dtype, whole.shape):
            raise FormatError(
                f"{path}: shard {blocks[0].shard} says {whole.dtype} {whole.shape}, shard "
                f"{block.shard} says {spec.dtype} {spec.global_shape}: they are not of one tensor. "
                f"{APART}"
            )
        if math.prod(spec.shape):
            first = placed.setdefault(tuple(zip(spec.offset, spec.shape, strict=True)), block)
            twins += [(first, block)] if first is not block else []
    cuts = [sorted({box[dim] for box in placed}) for dim in range(rank)]
    covers = all(
        [at for at, _ in cut] == _starts(cut) and sum(n for _, n in cut) == whole.shape[dim]
        for dim, cut in enumerate(cuts)
    )
    full = len(placed) == math.prod(map(len, cuts))
    if math.prod(whole.shape) and not (covers and full):
        raise FormatError(
            f"{path}: the {len(placed)} blocks of it that the shards hold don't cover its shape "
            f"{whole.shape} once. What to do: this run's shards are not of one state; read them "
            "each for itself (the .safetensors files of full images)"
        )
    return msgspec.structs.replace(whole, blocks=tuple(placed.values()), twins=tuple(twins))


def _starts(cut: Sequence[tuple[int, int]]) -> list[int]:
    starts = [0]
    for _, count in cut[:-1]:
        starts.append(starts[-1] + count)
    return starts


def runs(slot: Slot) -> Iterator[tuple[int, int, int]]:
    """The block's contiguous runs: (byte in the whole tensor, byte in the slot, bytes)."""
    spec = slot.spec
    item = DTYPES[spec.dtype][0]
    # Trailing dimensions that the block spans whole are one run with the dimension before them.
    last = len(spec.shape) - 1
    while last > 0 and spec.shape[last] == spec.global_shape[last]:
        last -= 1
    run = math.prod(spec.shape[max(last, 0) :]) * item
    strides = [math.prod(spec.global_shape[dim + 1 :]) * item for dim in range(len(spec.shape))]
    base = sum(at * step for at, step in zip(spec.offset, strides, strict=True))
    outer = spec.shape[: max(last, 0)]
    for number in range(math.prod(outer)):
        at, rest = base, number
        for dim in reversed(range(len(outer))):
            rest, index = divmod(rest, outer[dim])
            at += index * strides[dim]
        if run:
            yield at, number * run, run
