"""The reading side of a directory domain: what manifests there are, and every byte of an epoch.

Files of an incarnation: `manifests/<generation>-<step>.manifest` and, named by it,
`chunks/<generation>-<step>.safetensors` (a full image) or `.delta` (only the changed chunks).
Names that a second attempt took have `.r1`, `.r2` ... before the ending. Readers *must* ignore
names that they don't know: temporary ones, and manifests that were renamed away to be released.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, FormatError, Refused
from handfast.store import manifest as codec
from handfast.store.bulk import Count, Scratch, Tap, draw, share_out, tap
from handfast.store.claims import Identity, domain_path, incarnations, read_identity, recall
from handfast.store.files import Files, closing, look, read_start, reading
from handfast.store.manifest import HASH_BYTES, Manifest, Piece
from handfast.store.port import Buffer, Entry, Progress

__all__ = [
    "ENDING",
    "PART",
    "PAUSE",
    "RUN",
    "Room",
    "Shelf",
    "find",
    "named_epoch",
    "nowhere",
    "parts",
    "read_chunk",
    "read_manifest",
]

ENDING: Final = ".manifest"
NAME = re.compile(r"(0|[1-9]\d*)-(0|[1-9]\d*)(?:\.r([1-9]\d*))?\.manifest")
PAUSE: Final = 0.2  # seconds before damage is looked at again: a read that failed may succeed
PART: Final = 4  # chunks that one thread moves at a time
RUN: Final = 16  # the same, where each is read to its place: so the kernel sees what comes next


Room = Callable[[int, int], memoryview | None]
"""Gives the memory that bytes of an image are to be read to, if there is any."""


def nowhere(start: int, end: int) -> None:
    """No part of an image has room of its own."""


def _within(view: memoryview, start: int, end: int) -> memoryview:
    return view[start:end]


class Shelf:
    """A domain that is only read, beside its owner or without one. Nothing here writes."""

    def __init__(self, files: Files, root: str, name: str) -> None:
        """Open an identified domain; FormatError (or Damaged) if it is none that can be read."""
        self.files = files
        self.root = root
        self.path = domain_path(root, name)
        self.identity: Identity = read_identity(files, root, name)

    def records(self, then: Mapping[int, int] | None = None) -> tuple[bytes, ...]:
        """All records of all incarnations that count so far, oldest first; for lookers-on.

        With `then`, the lengths that the journals had at some moment, those that counted then.
        """
        with reading(self.path):
            return recall(self.files, self.path, self.identity, then=then)[1]

    def manifests(self) -> dict[Epoch, Entry]:
        """Every epoch that has a manifest in any incarnation, sound or not, oldest first.

        Where several have one (a first attempt that failed late, an owner that woke up after its
        successor), the latest incarnation's latest attempt is shown: votes are write-once, so
        only that one can have been voted for.
        """
        with reading(self.path):
            latest = find(self.files, self.path)
        found = {epoch: self._entry(path, epoch) for epoch, path in sorted(latest.items())}
        return {epoch: entry for epoch, entry in found.items() if entry is not None}

    def entry(self, epoch: Epoch) -> Entry | None:
        """One epoch's manifest as `manifests` shows it; None if there is none."""
        with reading(self.path):
            path = find(self.files, self.path, epoch).get(epoch)
        return self._entry(path, epoch) if path else None

    def read(
        self,
        epoch: Epoch,
        into: Buffer | None = None,
        *,
        digest: str = "",
        only: Iterable[range] | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Read an epoch's image and verify every byte that is left in the buffer.

        What the system has in its page cache is read from there.

        `into` is a writable buffer of at least the image's bytes; without one the bytes are
        verified and dropped. `digest` is the one that was voted for, where the caller knows it.
        `only` are spans of bytes of the image: parts without a byte of one stay unread.
        Nothing of the buffer may be used unless this returns. Raises Damaged (naming chunk, file
        and offset) for bytes that are not those written, Refused for a manifest of another
        epoch (MIXED), domain, shard or run (FOREIGN) or none at all (MISSING).
        """
        entry = self.entry(epoch)
        if entry is None:
            raise Refused(
                f"no manifest of epoch {epoch} in {self.path}",
                verdict=Verdict.MISSING,
                shards=(self.identity.id,),
                remedy="restore an epoch that this domain retains, or this shard's other copy",
            )
        manifest = entry.sound(digest)
        view = None
        if into is not None:
            view = memoryview(into).cast("B")
            if len(view) < manifest.image_bytes:
                raise ValueError(
                    f"a buffer of {len(view)} bytes for an image of {manifest.image_bytes}"
                )
        room = nowhere if view is None else partial(_within, view)
        most = RUN if only is None else PART
        self._read_parts(manifest, _chosen(manifest, only, most), room, progress=progress)
        return manifest

    def visit(
        self,
        manifest: Manifest,
        take: Callable[[int, memoryview], None],
        only: Iterable[range] | None = None,
        room: Room = nowhere,
    ) -> None:
        """Read an image again whose manifest is known, and hand on what is verified of it.

        `take(start, data)` gets the bytes from `start` of the image on, in memory that is used
        again for others when it returns; several threads call it. Where there is `room` for a part,
        that is read to there, and nobody is told. `only` is that of :meth:`read`. Raises Damaged
        as :meth:`read` does: what was handed on by then was right, what has room of its own need
        not be.
        """
        self._read_parts(manifest, _chosen(manifest, only, PART), room, take, past=True)

    def verify(self, manifest: Manifest, progress: Progress | None = None) -> None:
        """Read every byte of an image whose manifest is known, and drop it. Raises Damaged.

        What the page cache lacks is left in it, for whoever loads this next.
        """
        self._read_parts(manifest, _chosen(manifest, None, RUN), progress=progress)

    def lacks(self, manifest: Manifest) -> str:
        """Say which data file of an epoch is missing or too short, without reading any; or ''."""
        needed = lengths(manifest)
        for source in manifest.sources:
            path = f"{self.path}/{source}"
            try:
                with reading(path), closing(self.files, self.files.open(path)) as fd:
                    if self.files.size(fd) < needed.get(source, 0):
                        return f"{path}: is cut"
            except Damaged as error:
                return str(error)
        return ""

    def _read_parts(
        self,
        manifest: Manifest,
        chosen: Iterable[Piece],
        room: Room = nowhere,
        take: Callable[[int, memoryview], None] | None = None,
        *,
        past: bool = False,
        moved: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Read and verify parts of an image, by several threads.

        With `past`, what the page cache does not have is read past it. `moved` says which sources
        still have other paths: what was just written is read from the medium.
        """
        unit = manifest.chunk_bytes
        ahead = list(chosen)
        # a chunk that is only verified is read over the one before: so it stays in the processor
        scratch = Scratch(unit if take is None else PART * unit)
        count = Count(sum(len(_span(part, manifest)) for part in ahead), progress)
        with reading(self.path), contextlib.ExitStack() as stack:
            taps: dict[int, Tap] = {}
            for number in dict.fromkeys(part.source for part in ahead):
                name = manifest.sources[number]
                path = (moved or {}).get(name, f"{self.path}/{name}")
                medium = moved is not None
                taps[number] = tap(self.files, stack, path, past=past, medium=medium)

            def read(part: Piece) -> None:
                span, source = _span(part, manifest), taps[part.source]
                with contextlib.ExitStack() as held:
                    # past the cache to memory that begins on a block's boundary, and only there
                    target = room(span.start, span.stop) if source.past is None else None
                    own = held.enter_context(scratch.lend()) if target is None else target
                    kept = target is not None or take is not None
                    for done in range(part.count):
                        at = done * unit if kept else 0
                        chunk = own[at : at + min(unit, len(span) - done * unit)]
                        read_chunk(self.files, source, manifest, part, done, chunk)
                    if target is None and take is not None:
                        take(span.start, own[: len(span)])
                count.add(len(span))

            share_out(read, ahead, self.files.lanes)

    def _entry(self, path: str, epoch: Epoch) -> Entry | None:
        """What one manifest's file holds; None if it was released since it was listed."""
        try:
            data = read_manifest(self.files, path)
            manifest = codec.decode(data, path)
        except FormatError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            verdict = Verdict.CORRUPT if isinstance(error, Damaged) else Verdict.FOREIGN
            return Entry(path, epoch, verdict=verdict, problem=str(error))
        stamp, identity = manifest.stamp, self.identity
        for what, there, here, verdict in (
            ("run", stamp.run, identity.run, Verdict.FOREIGN),
            ("domain", stamp.domain, identity.id, Verdict.FOREIGN),
            ("shard", stamp.shard, identity.shard, Verdict.FOREIGN),
            ("incarnation", stamp.incarnation, _incarnation(path), Verdict.MIXED),
            ("epoch", stamp.epoch, epoch, Verdict.MIXED),
        ):
            if there != here:
                problem = (
                    f"{path}: stamped for {what} {there}, found as {what} {here}. What to do: "
                    "move it back to where it belongs, and restore this shard from another copy"
                )
                return Entry(path, epoch, verdict=verdict, problem=problem)
        return Entry(path, epoch, manifest, codec.digest(data))


def read_manifest(files: Files, path: str) -> bytes:
    """A manifest's bytes, to be decoded; of a file that is longer than its head says, one more.

    So a length that went wild takes no memory. Raises Damaged where the file is gone, a plain
    HandfastError where it can't be looked at.
    """
    return look(
        files,
        path,
        lambda fd: read_start(files, fd, codec.promised(read_start(files, fd, codec.HEAD)) + 1),
    )


def _incarnation(path: str) -> int:
    return int(os.path.basename(os.path.dirname(os.path.dirname(path))))


def named_epoch(name: str) -> Epoch | None:
    """The epoch that a manifest's file name speaks of; None for any other file."""
    match = NAME.fullmatch(name)
    return Epoch(int(match[1]), int(match[2])) if match else None


def find(files: Files, path: str, epoch: Epoch | None = None) -> dict[Epoch, str]:
    """The latest manifest's path of each epoch (or of one) in a domain's directory."""
    found: dict[Epoch, tuple[tuple[int, int], str]] = {}
    for number in incarnations(files, path):
        where = f"{path}/{number}/manifests"
        for name in files.listdir(where) if files.exists(where) else ():
            match = NAME.fullmatch(name)
            if match is None:
                continue
            key = Epoch(int(match[1]), int(match[2]))
            age = (number, int(match[3] or 0))
            if epoch in (None, key) and (key not in found or found[key][0] < age):
                found[key] = (age, f"{where}/{name}")
    return {key: where for key, (_, where) in found.items()}


def parts(piece: Piece, unit: int, most: int = PART) -> Iterator[Piece]:
    """A piece as pieces of at most so many chunks of `unit` bytes."""
    for done in range(0, piece.count, most):
        count = min(most, piece.count - done)
        yield Piece(piece.first + done, count, piece.source, piece.at + done * unit)


def _span(part: Piece, manifest: Manifest) -> range:
    """The bytes of the image that a part holds."""
    unit = manifest.chunk_bytes
    return range(part.first * unit, min((part.first + part.count) * unit, manifest.image_bytes))


def lengths(manifest: Manifest) -> dict[str, int]:
    """How many bytes each data file has that was written with this epoch.

    Files of older epochs, of which it refers to chunks, may have more than these.
    """
    stamp, unit, size = manifest.stamp, manifest.chunk_bytes, manifest.image_bytes
    own = f"{stamp.incarnation}/chunks/{stamp.generation}-{stamp.step}."
    found: dict[str, int] = {}
    for piece in manifest.pieces:
        source = manifest.sources[piece.source]
        if source.startswith(own):
            count = min((piece.first + piece.count) * unit, size) - piece.first * unit
            found[source] = max(found.get(source, 0), piece.at + count)
    return found


def _chosen(manifest: Manifest, only: Iterable[range] | None, most: int) -> Iterator[Piece]:
    """The parts of an image that have a byte of one of these spans; all, if none are given."""
    every = (p for piece in manifest.pieces for p in parts(piece, manifest.chunk_bytes, most))
    if only is None:
        yield from every
        return
    ahead = sorted((span for span in only if span), key=lambda span: (span.start, span.stop))
    at, reach = 0, 0  # of the spans that begin before a part ends, how far they reach
    for part in every:
        here = _span(part, manifest)
        while at < len(ahead) and ahead[at].start < here.stop:
            reach = max(reach, ahead[at].stop)
            at += 1
        if reach > here.start:
            yield part


def read_chunk(
    files: Files, source: Tap, manifest: Manifest, part: Piece, number: int, target: memoryview
) -> None:
    """Read one chunk of a part into `target`, which it fills, and verify it there.

    Raises Damaged, naming the chunk, the file and the offset.
    """
    index, at = part.first + number, part.at + number * manifest.chunk_bytes
    with reading(source.path):
        got = draw(files, source, target, at)
    if got < len(target):
        what = f"is cut: the file ends at byte {at + got}"
    elif codec.chunk_hash(target) != manifest.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]:
        what = "differs from its hash"
    else:
        return
    raise Damaged(
        f"{source.path}: chunk {index} of epoch {manifest.stamp.epoch}, at byte {at} of the file, "
        f"{what}. What to do: restore this shard from another copy or another epoch"
    )
