"""What ranks each store as their own, and might store once: digests to be held together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from handfast.checkpoint.validated import Validated
from handfast.store.image import Slot
from handfast.store.manifest import HASH_BYTES, Manifest, chunk_hash
from handfast.torch.saved import GRADS

__all__ = ["own_digests"]

HINTS: Final = 100
READ: Final = 8 << 20
"""Bytes of tensors without a whole chunk that are read once more for a hint."""


def own_digests(copies: Sequence[Validated]) -> dict[str, bytes]:
    """Digest whole tensors that a rank stores itself, neither sharded nor declared, empty nor tiny.

    By path, the first of them only: every rank is told those of all, for a hint. ``copies`` are its
    own shard, and what holds what it left to another. Raises what reading them raises.
    """
    manifest = copies[0].manifest
    known = {path for copy in copies for path in copy.manifest.replicated}
    own = (
        slot
        for slot in manifest.slots
        if slot.spec.path not in known
        and not slot.spec.path.startswith(f"{GRADS}/")
        and slot.spec.shape == slot.spec.global_shape
        and slot.nbytes >= 4096
    )
    marks: dict[str, bytes] = {}
    left = READ
    for slot in islice(own, HINTS):
        chunks = _chunks(manifest, slot)
        left -= 0 if chunks else slot.nbytes
        if left >= 0:
            marks[slot.spec.path] = chunks or chunk_hash(copies[0].read(_range(slot)))
    return marks


def _range(slot: Slot) -> range:
    return range(slot.start, slot.start + slot.nbytes)


def _chunks(manifest: Manifest, slot: Slot) -> bytes:
    """Tell a tensor's bytes from others by the hashes of the chunks in it; b"" if it has none."""
    unit = manifest.chunk_bytes
    first, behind = -(-slot.start // unit), (slot.start + slot.nbytes) // unit
    if first >= behind:
        return b""
    hashes = manifest.hashes[first * HASH_BYTES : behind * HASH_BYTES]
    return chunk_hash(hashes + (slot.start % unit).to_bytes(8, "little"))
