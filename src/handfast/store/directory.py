"""The directory tier: a domain whose epochs are files, claimed by one incarnation at a time."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.errors import Damaged, HandfastError, SaveFailed, Superseded
from handfast.store import delta
from handfast.store import manifest as codec
from handfast.store.bulk import Count, Held, Source, Span, pour, share_out
from handfast.store.claims import Claim, incarnations, take
from handfast.store.files import (
    TEMPORARY,
    Files,
    closing,
    discard,
    read_file,
    reading,
    write_file,
    writing,
)
from handfast.store.image import Layout
from handfast.store.litter import KINDS, RELEASED, litter, references
from handfast.store.manifest import CHUNK, HASH_BYTES, Left, Manifest, Piece, Stamp
from handfast.store.pins import pinned
from handfast.store.port import Buffer, Progress, Verify, Written
from handfast.store.shelf import ENDING, Shelf, named_epoch, parts

__all__ = ["Directory", "claim"]

LOOK: Final = 16  # one chunk in so many, or more, is held against the parent's
SAMPLE: Final = 6  # chunks that are read back besides the first and the last


def claim(files: Files, root: str, name: str) -> "Directory":
    """Take the next incarnation of an identified domain (see :mod:`handfast.store.claims`).

    Raises SaveFailed if a call fails (another claim starts afresh), Damaged or FormatError if
    what the predecessors left can't be read.
    """
    return Directory(files, root, name, take(files, root, name))


class Attempt(msgspec.Struct, frozen=True):
    """One try at an epoch: the names that it may make, and the parent that it may refer to."""

    home: str  # of the domain
    incarnation: int
    stem: str
    parent: Manifest | None

    @property
    def manifest(self) -> str:
        """The manifest's final path."""
        return f"{self.home}/{self.incarnation}/manifests/{self.stem}{ENDING}"

    def source(self, *, full: bool) -> str:
        """The data file's final name, relative to the domain."""
        return f"{self.incarnation}/chunks/{self.stem}.{'safetensors' if full else 'delta'}"

    def names(self) -> tuple[str, ...]:
        """All paths that may come to be, in the order in which they are discarded."""
        final = [self.manifest, *(f"{self.home}/{self.source(full=f)}" for f in (True, False))]
        return tuple(path + end for path in final for end in ("", TEMPORARY))


class Directory(Shelf):
    """A claimed domain; it fills the port :class:`handfast.store.port.Tier`.

    `write` may run in another thread than the rest; one epoch is written at a time. `may_clean`
    is for the caller to set, once it holds a certificate of its own generation: until then no
    file of a predecessor is touched.
    """

    def __init__(self, files: Files, root: str, name: str, claimed: Claim) -> None:
        super().__init__(files, root, name)
        self.incarnation = claimed.incarnation
        self.journal = claimed.journal
        self.history = claimed.history
        self.may_clean = False
        self._lock = threading.Lock()  # a release and the bounds of an attempt exclude each other
        self._writing = threading.Lock()
        self._attempts: dict[Epoch, int] = {}
        self._done: set[Epoch] = set()
        self._attempt: Attempt | None = None

    def current(self) -> bool:
        """Whether no later incarnation is claimed, and the journal is still the one of this path.

        The rule of :mod:`handfast.store.claims`: append, sync, `current()`, and only then act. An
        operator may put a copy in the directory's place, and then what is synced here is lost.
        """
        with reading(self.path):
            latest = max(incarnations(self.files, self.path), default=0)
            return latest == self.incarnation and self.journal.stands()

    def free_bytes(self) -> int:
        """Bytes that this user may still write to the domain's file system."""
        with reading(self.path):
            return self.files.free_bytes(self.path)

    def close(self) -> None:
        """Give the journal's descriptor back."""
        self.journal.close()

    # Writing

    def write(
        self,
        stamp: Stamp,
        layout: Layout,
        image: Buffer | Source,
        *,
        objects: bytes,
        aliases: Mapping[str, str],
        environment: Mapping[str, str],
        replicated: Iterable[str],
        structure: str,
        left: Left | None = None,
        digests: Callable[[], bytes] | None = None,
        parent: Manifest | None = None,
        verify: Verify = "sampled",
        progress: Progress | None = None,
    ) -> Written:
        """Make one epoch durable. Only when this returns may STAGED be journaled.

        `image` has at least `layout.nbytes` bytes, begins with `layout.header` and must not change
        meanwhile. Chunks that equal those of `parent`, an epoch retained here, are referenced.
        `digests` gives those of the slots, and is asked once the data are written.

        Order. *Must*: the data file is synced, and its final name made durable, before the
        manifest gets its final name (a visible manifest refers only to existing data); the
        manifest is synced before its rename, and the rename made durable before this returns.
        *Should*: data are read back before they are named, so that a bad disk is found while the
        image is still in memory. A failure at any step leaves temporary names, data without a
        manifest, or a sound manifest that nobody voted for; all are discarded as far as they go,
        and the next try uses new names. A delta that does not read back right becomes an image.

        Raises SaveFailed naming the step, the path and a remedy; ValueError if the stamp is not
        this incarnation's, the image not the layout's, or the epoch was written already.
        """
        source = self._checked(stamp, layout, image, verify)
        draft = Manifest(
            stamp=stamp,
            slots=layout.slots,
            aliases=dict(aliases),
            objects=objects,
            environment=dict(environment),
            image_bytes=layout.nbytes,
            chunk_bytes=CHUNK,
            hashes=b"",
            sources=(),
            pieces=(),
            replicated=tuple(replicated),
            structure=structure,
            left=left,
        )
        trouble: HandfastError | None = None
        with self._writing:
            for candidate in (None,) if parent is None else (parent, None):
                try:
                    return self._try(draft, source, candidate, digests, verify, progress)
                except SaveFailed:
                    raise
                except HandfastError as error:  # something could not be read, or not read back
                    trouble = error
        raise SaveFailed(f"epoch {stamp.epoch} does not read back right: {trouble}") from trouble

    def _checked(
        self, stamp: Stamp, layout: Layout, image: Buffer | Source, verify: Verify
    ) -> Source:
        mine = (self.identity.run, self.identity.id, self.identity.shard, self.incarnation)
        if (stamp.run, stamp.domain, stamp.shard, stamp.incarnation) != mine:
            raise ValueError(f"the stamp {stamp} is not this incarnation's, which is {mine}")
        if verify not in ("fsync", "sampled", "full"):
            raise ValueError(f"verify={verify!r}: choose fsync, sampled or full")
        if stamp.epoch in self._done:
            raise ValueError(f"epoch {stamp.epoch} was written already, and votes are write-once")
        wrong = "the image is shorter than its layout, or lacks the layout's header"
        if not isinstance(image, Source):
            view = memoryview(image).cast("B")[: layout.nbytes]
            if len(view) < layout.nbytes:
                raise ValueError(wrong)
            image = Held(view)
        with image.lend(Span(0, min(len(layout.header), CHUNK), 0)) as head:
            if not layout.header.startswith(bytes(head)):
                raise ValueError(wrong)
        return image

    def _try(
        self,
        draft: Manifest,
        image: Source,
        parent: Manifest | None,
        digests: Callable[[], bytes] | None,
        verify: Verify,
        progress: Progress | None,
    ) -> Written:
        attempt = self._begin(draft.stamp.epoch, parent)
        try:
            manifest, fresh = self._write_data(attempt, draft, image, verify, progress)
            if digests is not None:
                manifest = msgspec.structs.replace(manifest, digests=digests())
            encoded = self._write_manifest(attempt, manifest, verify)
        except BaseException:
            discard(self.files, *attempt.names())
            raise
        finally:
            with self._lock:
                self._attempt = None
        self._done.add(draft.stamp.epoch)
        return Written(codec.digest(encoded), manifest, fresh + len(encoded), manifest.image_bytes)

    def _begin(self, epoch: Epoch, parent: Manifest | None) -> Attempt:
        """Choose new names, and hold the parent's files if it is still here."""
        with self._lock:
            tried = self._attempts.get(epoch, 0)
            self._attempts[epoch] = tried + 1
            stem = f"{epoch.generation}-{epoch.step}" + (f".r{tried}" if tried else "")
            if parent is not None:
                found = self.entry(parent.stamp.epoch)
                parent = parent if found is not None and found.manifest == parent else None
            self._attempt = Attempt(self.path, self.incarnation, stem, parent)
            return self._attempt

    def _write_data(
        self,
        attempt: Attempt,
        draft: Manifest,
        image: Source,
        verify: Verify,
        progress: Progress | None,
    ) -> tuple[Manifest, int]:
        """The data file, durable under its final name; (the manifest, bytes written)."""
        hashes, plan, size = b"", None, draft.image_bytes
        every = delta.full(-(-size // CHUNK), attempt.source(full=True))
        if attempt.parent is not None and self._resembles(attempt.parent, image, size):
            hashes = self._hash(image, _spans(every.fresh, size))
            plan = delta.delta(attempt.parent, hashes, size, attempt.source(full=False))
        own = attempt.source(full=plan is None)
        path = f"{self.path}/{own}"
        plan = plan or every
        if plan.fresh:
            with writing("write the image", path):
                found = self._write_chunks(
                    path + TEMPORARY, image, _spans(plan.fresh, size), Count(size, progress), hashes
                )
            hashes = hashes or found
        manifest = msgspec.structs.replace(
            draft, hashes=hashes, sources=plan.sources, pieces=plan.pieces
        )
        if verify != "fsync":
            chosen = _all(manifest) if verify == "full" else _sample(manifest)
            self._read_parts(manifest, chosen, moved={own: path + TEMPORARY})
        if plan.fresh:
            self._publish("name the image", path)
        return manifest, sum(_bytes(piece, size) for piece in plan.fresh)

    def _resembles(self, parent: Manifest, image: Source, size: int) -> bool:
        """Whether a look at some chunks finds one that is the parent's.

        To hash an image before it is written takes a tenth of the time of writing it, and in
        training all of it changes. No run of a sixteenth of all chunks, nor one of `LOOK`, goes
        unseen.
        """
        if (parent.image_bytes, parent.chunk_bytes) != (size, CHUNK):
            return False
        chunks = -(-size // CHUNK)
        for index in range(0, chunks, max(1, min(LOOK, chunks // 16))):
            span = Span(index * CHUNK, min((index + 1) * CHUNK, size), 0)
            found = parent.hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
            if self._hash(image, [span]) == found:
                return True
        return False

    def _hash(self, image: Source, spans: Sequence[Span]) -> bytes:
        """The hashes of all chunks of spans that lie one behind the other."""
        found: dict[int, bytes] = {}

        def look(span: Span) -> None:
            with image.lend(span) as block:
                found[span.start] = codec.hash_chunks(block)

        share_out(look, spans, self.files.lanes)
        return b"".join(found[span.start] for span in spans)

    def _write_chunks(
        self, path: str, image: Source, spans: Sequence[Span], done: Count, hashes: bytes
    ) -> bytes:
        """Write spans into a new synced file; returns all hashes, made here if none are.

        Raises SaveFailed where some are, and the image has other bytes by now.
        """
        found: dict[int, bytes] = {}

        def each(span: Span, block: memoryview) -> None:
            known = found[span.start] = codec.hash_chunks(block)
            first = span.start // CHUNK * HASH_BYTES
            if hashes and hashes[first : first + len(known)] != known:
                raise SaveFailed(
                    f"{path}: bytes {span.start} to {span.end} of the image changed while it was "
                    "written. What to do: let no other thread write to the state until save() has "
                    "returned"
                )
            done.add(len(block))

        with closing(self.files, self.files.create(path)) as fd:
            pour(self.files, fd, image, spans, each)
            self.files.fsync(fd)
        return hashes or b"".join(found[span.start] for span in spans)

    def _write_manifest(self, attempt: Attempt, manifest: Manifest, verify: Verify) -> bytes:
        path = attempt.manifest
        encoded = codec.encode(manifest)
        with writing("write the manifest", path):
            write_file(self.files, path + TEMPORARY, encoded)
        if verify != "fsync" and read_file(self.files, path + TEMPORARY) != encoded:
            raise Damaged(f"{path}{TEMPORARY}: differs from what was written")
        self._publish("name the manifest", path)
        return encoded

    def _publish(self, step: str, path: str) -> None:
        with writing(step, path):
            self.files.rename(path + TEMPORARY, path)
            self.files.fsync_dir(os.path.dirname(path))

    # Releasing

    def release(self, epochs: Iterable[Epoch]) -> tuple[Epoch, ...]:
        """Let epochs go, and all data that no manifest refers to; safe to repeat at any time.

        The caller *must* have journaled and synced that these epochs are released, so that a
        successor does not build on them while this process is frozen in the middle.

        Order. *Must*: the manifests are renamed away, and the renames are durable, before any
        data go; data go only if no manifest that is left here, of whichever incarnation and
        attempt, refers to them, nor a write in progress, and if this was found out while no
        successor had claimed (it refers only to what the manifests that it finds refer to, so
        what was garbage before its claim is garbage for ever); pins are looked at after the
        renames (and before them, so that a pin that stands never sees its manifest vanish).
        *Should*: names that were renamed away go last. A failure or a crash at any step leaves
        work for the next call, which also sweeps what failed writes left. What can't be taken
        away by itself keeps nothing else from going. If a manifest that stays can't be read, its
        references are not known: no data go until it is released itself.

        Manifests of predecessors stay unless `may_clean` is set. Returns the epochs among
        `epochs` that stay because a reader has pinned them. Raises Superseded if a later
        incarnation is claimed, HandfastError naming the place if the pins can't be looked at, and
        SaveFailed if another call fails: the first that did, once all else is done.
        """
        wanted = set(epochs)
        troubles: list[SaveFailed] = []
        with self._lock:
            self._check_current()
            with writing("release epochs", self.path):
                kept = self._take_away(wanted, troubles)
                garbage = self._garbage(troubles)
            self._check_current()
            for path in garbage:
                whole = f"{self.path}/{path}"
                with _noting(troubles, whole), contextlib.suppress(FileNotFoundError):
                    self.files.unlink(whole)
        if troubles:
            raise troubles[0]
        return tuple(sorted(kept))

    def _check_current(self) -> None:
        if not self.current():
            raise Superseded(
                f"{self.path}: incarnation {self.incarnation} may release nothing: a later one "
                "has claimed the domain"
            )

    def _mine(self) -> list[int]:
        """The incarnations in whose directories this one may take files away."""
        return [
            number
            for number in incarnations(self.files, self.path)
            if number == self.incarnation or (number < self.incarnation and self.may_clean)
            if self.files.exists(f"{self.path}/{number}/manifests")
        ]

    def _take_away(self, wanted: set[Epoch], troubles: list[SaveFailed]) -> set[Epoch]:
        """Rename manifests away, durably, and back where a pin turned up."""
        standing = pinned(self.files, self.path)
        for number in self._mine():
            where = f"{self.path}/{number}/manifests"
            for name in self.files.listdir(where):
                if named_epoch(name) in wanted - standing:
                    with _noting(troubles, f"{where}/{name}"):  # one that stays keeps its data
                        self.files.rename(f"{where}/{name}", f"{where}/{name}{RELEASED}")
        standing = pinned(self.files, self.path)
        for number in self._mine():
            where = f"{self.path}/{number}/manifests"
            gone = [name for name in self.files.listdir(where) if name.endswith(RELEASED)]
            for name in gone:
                if named_epoch(name.removesuffix(RELEASED)) in standing:
                    self.files.rename(f"{where}/{name}", f"{where}/{name.removesuffix(RELEASED)}")
            if gone:
                self.files.fsync_dir(where)
        return wanted & standing

    def _garbage(self, troubles: list[SaveFailed]) -> list[str]:
        """Data that nothing refers to, temporary names, and released manifests, in this order."""
        used = references(self.files, self.path)
        if used is None:
            return []
        if self._attempt is not None:
            used.update(path.removeprefix(f"{self.path}/") for path in self._attempt.names())
            used.update(self._attempt.parent.sources if self._attempt.parent else ())
        found: list[str] = []
        for kind in KINDS:
            for number in self._mine():
                with _noting(troubles, f"{self.path}/{number}/{kind}"):
                    found += litter(self.files, self.path, number, kind, used)
        return found


@contextlib.contextmanager
def _noting(troubles: list[SaveFailed], path: str) -> Iterator[None]:
    """Note that something can't be taken away, and go on."""
    try:
        with writing("release epochs", path):
            yield
    except SaveFailed as error:
        troubles.append(error)


def _all(manifest: Manifest) -> Iterator[Piece]:
    for piece in manifest.pieces:
        yield from parts(piece, CHUNK)


def _sample(manifest: Manifest) -> Iterator[Piece]:
    """The first chunk, the last, and a few that are others for another step."""
    chunks = manifest.pieces[-1].first + manifest.pieces[-1].count
    wanted = {(manifest.stamp.step + k * chunks // SAMPLE) % chunks for k in range(SAMPLE)}
    wanted |= {0, chunks - 1}
    for piece in manifest.pieces:
        for index in range(piece.first, piece.first + piece.count):
            if index in wanted:
                yield Piece(index, 1, piece.source, piece.at + (index - piece.first) * CHUNK)


def _spans(pieces: Iterable[Piece], size: int) -> list[Span]:
    """What of an image of so many bytes is to be written, some chunks at a time."""
    return [
        Span(part.first * CHUNK, min((part.first + part.count) * CHUNK, size), part.at)
        for piece in pieces
        for part in parts(piece, CHUNK)
    ]


def _bytes(piece: Piece, image_bytes: int) -> int:
    return min((piece.first + piece.count) * CHUNK, image_bytes) - piece.first * CHUNK
