"""The manifest: what one shard of one epoch is, and where its bytes lie.

It is written after the data, under its own digest, so a manifest that reads well speaks of data
that is there. ``docs/format.md`` has the bytes and says which rules are musts.
"""

from functools import cache
from typing import Annotated

import msgspec
import xxhash

from handfast.core.lattice import Epoch
from handfast.errors import Damaged, FormatError
from handfast.store.image import BLOCK, Natural, Slot, TensorSpec, check_spec, tensor_bytes

__all__ = [
    "CHUNK",
    "HASH_BYTES",
    "HEAD",
    "MAGIC",
    "VERSION",
    "Fork",
    "Left",
    "Manifest",
    "Piece",
    "Source",
    "Stamp",
    "check",
    "chunk_hash",
    "decode",
    "digest",
    "encode",
    "hash_chunks",
    "promised",
    "tensor_digest",
]

MAGIC = b"HFMANIF1"
VERSION = 1
CHUNK = 1 << 20
"""Bytes that one hash covers, and the unit in which unchanged data is referenced."""
HASH_BYTES = 16

HEAD = len(MAGIC) + 4 + 8
"""Bytes before the body: magic, version, body length."""

Name = Annotated[str, msgspec.Meta(min_length=1)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Fork(msgspec.Struct, frozen=True, array_like=True):
    """Where a lineage began: at which epoch of which run and lineage, and ``why``, in words."""

    lineage: Name
    run: Name
    of: str
    generation: Natural
    step: Natural
    why: str = ""


class Source(msgspec.Struct, frozen=True, array_like=True):
    """Where what is trained was loaded from: component ``path`` of an epoch of a run."""

    path: str
    run: Name
    lineage: str
    generation: Natural
    step: Natural


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """Whose bytes these are: provenance, because a mixture can't be seen in the values.

    The run and its lineage, the epoch, the domain that holds shard ``shard`` of ``shards``, the
    incarnation that wrote it, the configuration's digest, and the epoch saved before this one.
    ``forks`` are where its lineage began, and the lineages before it, oldest first; none for what
    began from nothing. ``came`` is what was loaded last of what is trained, by a restore or by
    hand, and where from.
    """

    run: Name
    lineage: str
    generation: Natural
    step: Natural
    domain: Name
    shard: Natural
    shards: Positive
    incarnation: Natural
    configuration: str
    parent: Epoch | None
    forks: tuple[Fork, ...] = ()
    came: tuple[Source, ...] = ()

    @property
    def epoch(self) -> Epoch:
        """The epoch that these bytes belong to."""
        return Epoch(self.generation, self.step)


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Chunks ``first`` to ``first + count - 1`` lie in ``sources[source]`` from byte ``at`` on."""

    first: Natural
    count: Positive
    source: Natural
    at: Natural


class Left(msgspec.Struct, frozen=True, array_like=True):
    """What a rank did not store, since another rank of its node holds the same.

    ``shard`` is that one's, ``digests`` those of the rank's own tensors, by path.
    """

    shard: Natural
    digests: dict[str, bytes]


class Manifest(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One shard of one epoch.

    ``aliases`` maps the path of a tied tensor to the path that is stored; ``objects`` is what
    ``handfast.store.objects`` encoded; ``environment`` is shown, never enforced; ``hashes`` holds
    16 bytes a chunk; ``sources`` are data files relative to the domain's directory; ``replicated``
    are the paths that this shard's rank took to be alike on all ranks; ``structure`` is the digest
    of paths, dtypes, global shapes and placements. ``left`` is what another rank stores for this
    one, if any; ``digests`` holds 16 bytes a slot where other ranks may hold the same as this one,
    else None.
    """

    stamp: Stamp
    slots: tuple[Slot, ...]
    aliases: dict[str, str]
    objects: bytes
    environment: dict[str, str]
    image_bytes: Positive
    chunk_bytes: Positive
    hashes: bytes
    sources: tuple[Name, ...]
    pieces: tuple[Piece, ...]
    replicated: tuple[str, ...]
    structure: str
    left: Left | None = None
    digests: bytes | None = None

    def held(self) -> dict[str, bytes]:
        """Give the digest of each stored tensor by path; nothing where no digests were taken."""
        size, digests = HASH_BYTES, self.digests
        if digests is None:
            return {}
        return {s.spec.path: digests[n * size : (n + 1) * size] for n, s in enumerate(self.slots)}

    def apart(self, first: "Manifest") -> tuple[str, ...]:
        """List what this rank left to ``first``, which holds other bytes, or none, of it."""
        if self.left is None or self.left.shard != first.stamp.shard:
            return ()
        held = first.held()
        return tuple(
            path
            for path, digest in self.left.digests.items()
            if held.get(first.aliases.get(path, path)) != digest
        )


class _Body(msgspec.Struct, frozen=True, array_like=True):
    writer: str  # stays first in every version, so that a refusal can name who wrote the file
    manifest: Manifest


class _Writer(msgspec.Struct, frozen=True, array_like=True):
    writer: str


@cache
def _writer() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, seldom needed

    try:
        return f"handfast {version('handfast')}"
    except PackageNotFoundError:  # run from a source tree
        return "handfast"


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Body)
_NAMER = msgspec.msgpack.Decoder(_Writer)


def chunk_hash(buffer: memoryview | bytes | bytearray) -> bytes:
    """The xxh3-128 of a chunk: 16 bytes, big-endian. It finds damage; it stops no forger."""
    return xxhash.xxh3_128_digest(buffer)


def tensor_digest(spec: TensorSpec, data: memoryview | bytes | bytearray) -> bytes:
    """Digest a tensor: what it is, but for its path, and its dense bytes."""
    what = (spec.dtype, spec.shape, spec.global_shape, spec.offset, spec.stride)
    values = xxhash.xxh3_128()
    view = memoryview(data)
    for at in range(0, len(view), CHUNK):  # a piece at a time, since no other thread runs meanwhile
        values.update(view[at : at + CHUNK])
    return chunk_hash(_ENCODER.encode(what) + values.digest())


def hash_chunks(buffer: memoryview | bytes | bytearray, chunk: int = CHUNK) -> bytes:
    """The hashes of all chunks of ``chunk`` bytes, back to back; the last chunk may be shorter."""
    view = memoryview(buffer)
    return b"".join(chunk_hash(view[at : at + chunk]) for at in range(0, len(view), chunk))


def digest(encoded: bytes) -> str:
    """32 hex characters over an encoded manifest: what a vote STAGED speaks of."""
    return xxhash.xxh3_128_hexdigest(encoded)


def encode(manifest: Manifest) -> bytes:
    """The bytes of a manifest.

    Raises ValueError if it contradicts itself (see :func:`check`), or would not be read back
    equal: better now, while the state is still in memory.
    """
    check(manifest)
    body = _ENCODER.encode(_Body(_writer(), manifest))
    if _DECODER.decode(body).manifest != manifest:
        raise ValueError("a manifest that would not be read back equal: a list for a tuple?")
    head = MAGIC + VERSION.to_bytes(4, "little") + len(body).to_bytes(8, "little")
    framed = head + body
    return framed + chunk_hash(framed)


def decode(data: bytes, where: str = "") -> Manifest:
    """Read a manifest and check everything that can be checked without its data files.

    ``where`` names the file in errors. Raises Damaged if the bytes are not those that were
    written, FormatError if they were never a manifest that this version reads.
    """
    where = where or "a manifest"
    major, body = _unframe(memoryview(data), where)
    if major != VERSION:
        raise _other_version(major, body, where)
    try:
        manifest = _DECODER.decode(body).manifest
        check(manifest)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{where}: a manifest that breaks its own rules: {error}. Its digest is right, so it "
            "was written this way: by another program, or by a bug that is worth a report"
        ) from error
    return manifest


def promised(head: bytes) -> int:
    """How many bytes a manifest with these first :data:`HEAD` bytes has; not one is more of it.

    Where these are no manifest's, what is read so far is enough to refuse it.
    """
    if len(head) < HEAD or not head.startswith(MAGIC):
        return len(head)
    return HEAD + int.from_bytes(head[12:20], "little") + HASH_BYTES


def _unframe(data: memoryview, where: str) -> tuple[int, memoryview]:
    """Take the frame off: (format version, body). The frame is the same in every version."""
    remedy = "Restore from another copy of this shard"
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        found = bytes(data[: len(MAGIC)])
        raise FormatError(
            f"{where}: begins with {found!r}, not with {MAGIC!r}: no handfast manifest, or one "
            f"that was overwritten. {remedy}, or look at the path"
        )
    if len(data) < HEAD:
        raise Damaged(f"{where}: cut at byte {len(data)}, inside the head. {remedy}")
    major = int.from_bytes(data[8:12], "little")
    length = int.from_bytes(data[12:20], "little")
    end = HEAD + length
    if len(data) != end + HASH_BYTES:
        longer = len(data) > end + HASH_BYTES  # who read it may have read no further
        raise Damaged(
            f"{where}: {'more than ' if longer else ''}{min(len(data), end + HASH_BYTES)} bytes "
            f"long where its head (byte 12) says {end + HASH_BYTES}: cut, or damaged. {remedy}"
        )
    if chunk_hash(data[:end]) != data[end:]:
        raise Damaged(
            f"{where}: bytes 0 to {end} do not have the digest that stands at byte {end}: "
            f"damaged. {remedy}"
        )
    return major, data[HEAD:end]


def _other_version(major: int, body: memoryview, where: str) -> FormatError:
    try:
        writer = _NAMER.decode(body).writer
    except (ValueError, RecursionError):
        writer = "an unknown program"
    return FormatError(
        f"{where}: a manifest of format {major}, written by {writer[:80]}; this {_writer()} reads "
        f"format {VERSION}. What to do: read it with the handfast that wrote it, or a later one"
    )


def check(manifest: Manifest) -> None:
    """Raise ValueError, saying which, if a manifest breaks one of the format's rules.

    Both sides call it: who writes, before anything becomes durable, and who reads, before
    anything is believed.
    """
    _check_stamp(manifest.stamp)
    _check_slots(manifest)
    _check_aliases(manifest)
    _check_sources(manifest.sources)
    _check_pieces(manifest)
    _check_left(manifest)


def _check_stamp(stamp: Stamp) -> None:
    if stamp.shard >= stamp.shards:
        raise ValueError(f"shard {stamp.shard} of {stamp.shards} shards")
    if stamp.parent is not None and not stamp.parent < stamp.epoch:
        raise ValueError(f"epoch {stamp.epoch} names {stamp.parent}, which is not older, as parent")
    if stamp.forks and stamp.forks[-1].lineage != stamp.lineage:
        raise ValueError(f"lineage {stamp.lineage}, and the last fork began another one")


def _check_slots(manifest: Manifest) -> None:
    """Slots tile the image from the end of the header to its own end, without gaps."""
    paths: set[str] = set()
    end = manifest.slots[0].start if manifest.slots else manifest.image_bytes
    if end < BLOCK or end % BLOCK:
        raise ValueError(f"the header ends at byte {end}, which ends no block of {BLOCK}")
    for slot in manifest.slots:
        check_spec(slot.spec)
        path = slot.spec.path
        if path in paths:
            raise ValueError(f"two slots have the path {path!r}")
        paths.add(path)
        if slot.start != end:
            raise ValueError(f"{path}: starts at byte {slot.start}, the slot before ends at {end}")
        if slot.nbytes != tensor_bytes(slot.spec):
            raise ValueError(f"{path}: {slot.nbytes} bytes for {slot.spec.shape} {slot.spec.dtype}")
        end += slot.nbytes
    if end != manifest.image_bytes:
        raise ValueError(f"slots end at byte {end} of an image of {manifest.image_bytes} bytes")


def _check_aliases(manifest: Manifest) -> None:
    stored = {slot.spec.path for slot in manifest.slots} if manifest.aliases else set()
    for alias, path in manifest.aliases.items():
        if alias in stored:
            raise ValueError(f"{alias!r} is an alias of {path!r}, and stored itself")
        if path in manifest.aliases:
            raise ValueError(f"{alias!r} is an alias of {path!r}, which is an alias too")


def _check_left(manifest: Manifest) -> None:
    stamp, left = manifest.stamp, manifest.left
    if left is not None:
        if left.shard == stamp.shard or left.shard >= stamp.shards:
            raise ValueError(f"shard {stamp.shard} of {stamp.shards} leaves to shard {left.shard}")
        stored = {slot.spec.path for slot in manifest.slots}
        for path, found in left.digests.items():
            if path in stored:
                raise ValueError(f"{path!r} is left to another rank, and stored itself")
            if len(found) != HASH_BYTES:
                raise ValueError(f"{path!r}: a digest of {len(found)} bytes")
    if manifest.digests is not None and len(manifest.digests) != len(manifest.slots) * HASH_BYTES:
        raise ValueError(
            f"{len(manifest.digests)} bytes of digests for {len(manifest.slots)} slots"
        )


def _check_sources(sources: tuple[str, ...]) -> None:
    if len(set(sources)) != len(sources):
        raise ValueError("a source is named twice")
    for source in sources:
        parts = source.split("/")
        if "\0" in source or not all(part and part not in {".", ".."} for part in parts):
            raise ValueError(f"the source {source!r} is no plain path inside the domain")


def _check_pieces(manifest: Manifest) -> None:
    """Pieces cover each chunk once, in order, and every source is of use."""
    chunk = manifest.chunk_bytes
    if chunk % BLOCK:
        raise ValueError(f"chunks of {chunk} bytes are no whole blocks of {BLOCK}")
    chunks = -(-manifest.image_bytes // chunk)
    if len(manifest.hashes) != chunks * HASH_BYTES:
        raise ValueError(f"{len(manifest.hashes)} bytes of hashes for {chunks} chunks")
    covered = 0
    used: set[int] = set()
    for piece in manifest.pieces:
        if piece.first != covered:
            raise ValueError(f"a piece begins at chunk {piece.first}, expected {covered}")
        if piece.source >= len(manifest.sources):
            raise ValueError(f"chunk {piece.first}: source {piece.source} is not listed")
        if piece.at % BLOCK:
            raise ValueError(f"chunk {piece.first}: byte {piece.at} begins no block of {BLOCK}")
        covered += piece.count
        used.add(piece.source)
    if covered != chunks:
        raise ValueError(f"pieces cover {covered} of {chunks} chunks")
    if len(used) != len(manifest.sources):
        raise ValueError("a source is listed that no piece lies in")
