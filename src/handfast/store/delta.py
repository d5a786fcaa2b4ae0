"""Where an image's chunks lie: all in one new file, or partly in those of the parent epoch."""

from collections.abc import Iterator
from typing import Final

import msgspec

from handfast.store.manifest import CHUNK, HASH_BYTES, Manifest, Piece

__all__ = ["SOURCES_MAX", "Plan", "delta", "full"]

SOURCES_MAX: Final = 16
"""Files that one epoch may lie in. More would make a restore open and a release keep too many."""

WORTHWHILE: Final = 8  # a delta must save at least one chunk in so many


class Plan(msgspec.Struct, frozen=True):
    """The sources and pieces of a manifest, and those pieces that are still to be written."""

    sources: tuple[str, ...]
    pieces: tuple[Piece, ...]
    fresh: tuple[Piece, ...]


def full(chunks: int, own: str) -> Plan:
    """All chunks in one file, which is then the image itself."""
    piece = Piece(0, chunks, 0, 0)
    return Plan((own,), (piece,), (piece,))


def delta(parent: Manifest, hashes: bytes, image_bytes: int, own: str) -> Plan | None:
    """Refer to the parent's chunks where the hashes agree; the rest goes to `own`, back to back.

    None if a full image is better: too little is unchanged, or too many files would be needed.
    """
    if (parent.image_bytes, parent.chunk_bytes) != (image_bytes, CHUNK):
        return None
    places: list[tuple[str, int]] = []
    fresh = 0
    for index, (source, at) in enumerate(_places(parent)):
        span = slice(index * HASH_BYTES, (index + 1) * HASH_BYTES)
        if parent.hashes[span] == hashes[span]:
            places.append((source, at))
        else:
            places.append((own, fresh * CHUNK))
            fresh += 1
    sources = tuple(dict.fromkeys(source for source, _ in places))
    if len(sources) > SOURCES_MAX or (len(places) - fresh) * WORTHWHILE < len(places):
        return None
    pieces = _join(places, sources)
    return Plan(sources, pieces, tuple(p for p in pieces if sources[p.source] == own))


def _places(manifest: Manifest) -> Iterator[tuple[str, int]]:
    for piece in manifest.pieces:
        for done in range(piece.count):
            yield manifest.sources[piece.source], piece.at + done * manifest.chunk_bytes


def _join(places: list[tuple[str, int]], sources: tuple[str, ...]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for index, (name, at) in enumerate(places):
        source = sources.index(name)
        last = pieces[-1] if pieces else None
        if last and last.source == source and last.at + last.count * CHUNK == at:
            pieces[-1] = Piece(last.first, last.count + 1, source, last.at)
        else:
            pieces.append(Piece(index, 1, source, at))
    return tuple(pieces)
