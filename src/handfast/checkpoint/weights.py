"""Whole tensors out of the shards of an epoch, by what their manifests say; knows no framework.

A sharded tensor is put together from its blocks by global shape and offset. Blocks that several
shards have for one place are copies of one only if their bytes are equal: the stages of a pipeline
may have one name for two tensors. What is stored once a node is the job's as the lowest of these
ranks has it, and only with it the others' of the same digest. What several ranks
store as their own is never assumed to be alike: each rank's gets a name under ``rank-00003/``, and
where the job has a tensor of that name, it comes only if a pattern begins with ``rank-``. No
process holds more than one shard's image at a time.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import NamedTuple

import msgspec

from handfast.checkpoint.location import Location, Released, away, choose, mixed
from handfast.checkpoint.spelling import some
from handfast.checkpoint.status import rows
from handfast.checkpoint.survey import Found, Survey, read_domain
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, FormatError, Refused, SaveFailed
from handfast.store.image import DTYPES, Slot, TensorSpec
from handfast.store.manifest import HASH_BYTES, Manifest, chunk_hash
from handfast.store.pins import pin
from handfast.store.port import Progress
from handfast.store.shelf import Shelf

__all__ = ["Block", "Weights", "Whole", "gather", "reading_weights", "runs"]

logger = logging.getLogger("handfast")

_APART = (
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
                f"{_APART}"
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


class Weights:
    """The tensors of one epoch that were asked for, while it is held; see `reading_weights`."""

    def __init__(
        self,
        epoch: Epoch,
        tensors: Sequence[Whole],
        tied: dict[str, str],
        shelves: Sequence[tuple[Found, Shelf]],
        unpinned: Collection[str],
        progress: Progress | None,
    ) -> None:
        self.epoch = epoch
        self.tensors = tuple(tensors)
        self.tied = tied
        self._shelves = shelves
        self._unpinned = unpinned
        self._progress = progress

    def blocks(self) -> Iterator[tuple[Whole, Block, memoryview]]:
        """Read the shards one after the other, and give each block's bytes, verified.

        The bytes are good until the next shard is read. Raises Damaged before any byte of a
        damaged shard is given.
        """
        wanted: dict[int, list[tuple[Whole, Block]]] = defaultdict(list)
        for whole in self.tensors:
            for block in whole.blocks:
                wanted[block.shard].append((whole, block))
        sizes = {shard: self._manifest(shard).image_bytes for shard in wanted}
        done, total, progress = 0, sum(sizes.values()), self._progress
        for shard, parts in sorted(wanted.items()):
            view = self._read(shard, progress=progress and partial(_further, progress, done, total))
            for whole, block in parts:
                yield whole, block, block.within(view)
            done += sizes[shard]

    def check_twins(self) -> None:
        """Raise FormatError, naming the tensors, where twins don't hold the same bytes.

        Only what the hashes of their chunks leave open is read.
        """
        pairs = [pair for whole in self.tensors for pair in whole.twins]
        unsure = [pair for pair in pairs if not self._in_equal_chunks(*pair)]
        wanted: dict[int, list[Block]] = defaultdict(list)
        for block in dict.fromkeys(chain.from_iterable(unsure)):
            wanted[block.shard].append(block)
        hashes: dict[Block, bytes] = {}
        for shard, blocks in sorted(wanted.items()):
            view = self._read(shard, only=[block.span for block in blocks])
            hashes |= {block: chunk_hash(block.within(view)) for block in blocks}
        unlike = {
            one.slot.spec.path: (one, two) for one, two in unsure if hashes[one] != hashes[two]
        }
        if unlike:
            raise FormatError(_of_several(unlike))

    def _in_equal_chunks(self, one: Block, two: Block) -> bool:
        """Whether two blocks lie alike in their images, in chunks that have the same hashes."""
        here, there = self._manifest(one.shard), self._manifest(two.shard)
        unit = here.chunk_bytes
        if (one.span, unit) != (two.span, there.chunk_bytes):
            return False
        first, last = one.span.start // unit, -(-one.span.stop // unit)
        chunks = slice(first * HASH_BYTES, last * HASH_BYTES)
        return here.hashes[chunks] == there.hashes[chunks]

    def _manifest(self, shard: int) -> Manifest:
        found, _ = self._shelves[shard]
        return found.entries[self.epoch].sound()

    def _read(
        self, shard: int, only: Sequence[range] | None = None, progress: Progress | None = None
    ) -> memoryview:
        """Read a shard's image, or what lies in ``only`` these spans of it."""
        found, shelf = self._shelves[shard]
        view = memoryview(bytearray(self._manifest(shard).image_bytes))
        try:
            shelf.read(
                self.epoch, view, digest=found.retained[self.epoch], only=only, progress=progress
            )
        except (Damaged, Refused):
            now = read_domain(shelf.files, found.root, found.name)
            if now.member is None or self.epoch in now.retained:
                raise
            raise self._released(found.id) from None
        return view

    def _released(self, domain: str) -> Refused:
        why, way = "its pin was taken away meanwhile", "or see who freed the pin"
        if domain in self._unpinned:
            why, way = "it could not be pinned", "or a run that is writable"
        return Refused(
            f"epoch {self.epoch} was released while it was read, for {why}",
            verdict=Verdict.MISSING,
            shards=(domain,),
            remedy=f"do it again, with an epoch that is kept longer, {way}",
        )


def _further(progress: Progress, done: int, total: int, at: int, _: int) -> None:
    progress(done + at, total)


def _of_several(unlike: Mapping[str, tuple[Block, Block]]) -> str:
    named = [f"{path} (shards {a.shard} and {b.shard})" for path, (a, b) in unlike.items()]
    return (
        f"{len(unlike)} tensors have two values for one place: {some(named, 5)}. They are not each "
        f"of one tensor, and what belongs together is not written down. {_APART}, or choose the "
        "other tensors with only="
    )


@contextmanager
def reading_weights(
    location: Location,
    step: int | Epoch | None = None,
    *,
    component: str = "",
    only: Sequence[str] = ("**",),
    purpose: str = "read",
    progress: Progress | None = None,
) -> Iterator[Weights]:
    """Hold one whole epoch by pins while its tensors are read.

    ``component`` chooses a subtree, whose names then lose that prefix; ``only`` are ``fnmatch``
    patterns of the names that are left. A run that can't be written to is read without pins: every
    byte is verified all the same, and an epoch that vanishes meanwhile is an error.

    Raises Refused where the epoch is not whole, FormatError where its shards don't fit together or
    have two values for one place of a tensor, ValueError for a component that is not in it.
    """
    with ExitStack() as held:
        epoch, places, unpinned = location.steadily(
            lambda survey: _hold(location, survey, step, purpose, held)
        )
        shelves = [(found, Shelf(location.files, found.root, found.name)) for found in places]
        wholes, tied = gather([found.entries[epoch].sound() for found in places])
        names = [whole.name for whole in wholes]
        keys = {n: key for n in (*names, *tied) if (key := _key(n, component)) is not None}
        if component and not keys:
            there = ", ".join(sorted({name.partition("/")[0] for name in names}))
            raise ValueError(
                f"epoch {epoch} has no tensors of a component {component!r}; those of {there} are "
                "there (`handfast inspect` shows what is no tensor)"
            )
        beside = {whole.name for whole in wholes if whole.beside}
        called: dict[str, list[str]] = defaultdict(list)
        for name, key in keys.items():
            if _matches(key, _of_ranks(only) if tied.get(name, name) in beside else only):
                called[tied.get(name, name)].append(key)
        _warn_of([keys[name] for name in beside & keys.keys() - called.keys()])
        tensors = [
            msgspec.structs.replace(whole, name=called[whole.name][0])
            for whole in wholes
            if whole.name in called
        ]
        if keys and not called:
            there = some(sorted(keys.values()), 5)
            raise ValueError(f"only={tuple(only)}: no tensor has such a name; there are {there}")
        ties = {other: first for first, *rest in called.values() for other in rest}
        weights = Weights(epoch, tensors, ties, shelves, unpinned, progress)
        weights.check_twins()
        yield weights


def _hold(
    location: Location, survey: Survey, step: int | Epoch | None, purpose: str, held: ExitStack
) -> tuple[Epoch, list[Found], set[str]]:
    """Choose the epoch, and one copy of each shard, and pin those; also gives what could not be.

    Where one of them has gone, none stays pinned: raises Released.
    """
    epoch = choose(survey, step)
    verdict = next(row.verdict for row in rows(survey) if row.epoch == epoch)
    if verdict is Verdict.MIXED:
        raise mixed(survey)
    places = _copies(survey, epoch, verdict)
    unpinned = set()
    with ExitStack() as stack:
        for found in places:
            try:
                stack.enter_context(pin(location.files, found.root, found.name, epoch, purpose))
            except Refused as gone:
                raise Released(str(gone)) from gone
            except SaveFailed as error:
                unpinned.add(found.id)
                logger.warning("epoch %s is read without a pin: %s", epoch, error)
        held.push(stack.pop_all())
    return epoch, places, unpinned


def _copies(survey: Survey, epoch: Epoch, verdict: Verdict | None) -> list[Found]:
    """One domain a shard that retains the epoch, in order of the shards."""
    copies: dict[int, Found] = {}
    for domain, found in zip(survey.domains, survey.places, strict=True):
        if found is not None and epoch in found.retained:
            copies.setdefault(domain.shard, found)
    shards = survey.roster.configuration.shards if survey.roster is not None else 0
    lacking = [d.id for d in survey.domains if d.shard not in copies]
    if not set(lacking).isdisjoint(survey.absent):
        raise away(survey)
    if lacking:
        going = "is being released" if verdict is None else "is not whole"
        yet = " as yet" if verdict is Verdict.AHEAD else ""
        raise Refused(
            f"epoch {epoch} {going}: {shards - len(copies)} of {shards} shards lack it{yet}",
            verdict=verdict or Verdict.MISSING,
            shards=lacking,
            remedy="choose an epoch that `handfast status` shows as complete",
        )
    return [copies[shard] for shard in range(shards)]


def _key(name: str, component: str) -> str | None:
    """The name within a component; None outside of it. The rank's prefix stays in front."""
    if not component:
        return name
    rank, slash, rest = name.partition("/")
    if not (rank.startswith("rank-") and rank[5:].isdigit()):
        rank, slash, rest = "", "", name
    if rest == component:
        return name
    if not rest.startswith((f"{component}/", f"{component}[")):
        return None
    return rank + slash + rest.removeprefix(component).removeprefix("/")


def _of_ranks(only: Sequence[str]) -> list[str]:
    return [pattern for pattern in only if pattern.startswith("rank-")]


def _warn_of(keys: Sequence[str]) -> None:
    """Say what is left out, for ranks hold it otherwise than the job's that is read."""
    if keys:
        logger.warning("ranks hold their own of what is read, left out: %s", some(sorted(keys), 3))


def _matches(key: str, only: Sequence[str]) -> bool:
    return any(key == p or key.startswith(f"{p}/") or fnmatchcase(key, p) for p in only)
