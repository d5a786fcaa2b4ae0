"""The tensors of one epoch, out of the shards' images; knows no framework.

No process holds more than one shard's image at a time.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain

import msgspec

from handfast.checkpoint.location import Location, Released, away, choose, mixed
from handfast.checkpoint.spelling import some
from handfast.checkpoint.status import rows
from handfast.checkpoint.survey import Found, Survey, read_domain
from handfast.checkpoint.validated import Validated
from handfast.checkpoint.whole import APART, Block, Whole, gather
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, FormatError, Refused, SaveFailed
from handfast.store.manifest import HASH_BYTES, Manifest, chunk_hash
from handfast.store.pins import pin
from handfast.store.port import Progress
from handfast.store.shelf import Shelf

__all__ = ["Weights", "holding", "reading_weights"]

logger = logging.getLogger("handfast")


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
        f"of one tensor, and what belongs together is not written down. {APART}, or choose the "
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


@contextmanager
def holding(
    location: Location, step: int | Epoch | None, *, shard: int, purpose: str
) -> Iterator[list[Validated]]:
    """Hold one whole epoch by pins, and give the copies that one shard's rank loads from.

    They are its own, and what holds what it left to another. Where the epoch has one shard only,
    that is each rank's. Raises Refused where the epoch is not whole, or has no such shard.
    """
    with ExitStack() as held:
        epoch, places, _ = location.steadily(
            lambda survey: _hold(location, survey, step, purpose, held)
        )
        shard = shard if len(places) > 1 else 0
        if shard >= len(places):
            raise Refused(
                f"epoch {epoch} has {len(places)} shards, and this is rank {shard}",
                verdict=Verdict.FOREIGN,
                remedy=f"load it in a job of {len(places)} ranks, or whole tensors by "
                "handfast.torch.load",
            )

        def copy(number: int) -> Validated:
            found = places[number]
            manifest = found.entries[epoch].sound(found.retained[epoch])
            return Validated(Shelf(location.files, found.root, found.name), manifest)

        own = copy(shard)
        left = own.manifest.left
        yield [own] if left is None else [own, copy(left.shard)]


def _hold(
    location: Location, survey: Survey, step: int | Epoch | None, purpose: str, held: ExitStack
) -> tuple[Epoch, list[Found], set[str]]:
    """Choose the epoch, and one copy of each shard, and pin those; also gives what could not be.

    Where one of them has gone, none stays pinned: raises Released.
    """
    epoch = choose(survey, step)
    verdict = next(row.verdict for row in rows(survey) if row.epoch == epoch)
    if verdict is Verdict.MIXED:
        raise mixed(survey, epoch)
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
        logger.warning(
            "some ranks have these otherwise: the first rank's are taken, and left out are %s",
            some(sorted(keys), 3),
        )


def _matches(key: str, only: Sequence[str]) -> bool:
    return any(key == p or key.startswith(f"{p}/") or fnmatchcase(key, p) for p in only)
