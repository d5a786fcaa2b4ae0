"""Replicas that differ: what ranks hold alike by design, and do not, named by groups of ranks.

Each rank's agent sends one digest of all that its rank took to be alike on all ranks to the first
shard's agent, once it has persisted it. That is no part of the protocol: a word that is lost is not
sent again, and no epoch waits for one. A difference is silent data corruption, or a training that
is not deterministic where it was taken to be; which rank is right nobody can tell from digests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
import xxhash

from handfast.core.lattice import Epoch
from handfast.errors import UNREADABLE
from handfast.store.manifest import Manifest

__all__ = ["Divergence", "Replicas", "Word", "is_word", "word"]

EPOCHS: Final = 16
"""Epochs of which words are kept while not all ranks were heard."""

MARK: Final = b"\xc1"
"""What a word begins with among the protocol's messages: msgpack never uses this byte."""


class Word(msgspec.Struct, frozen=True, array_like=True):
    """What one shard's rank holds of an epoch: digests of the paths that are alike, and of all."""

    epoch: Epoch
    shard: int
    paths: bytes
    values: bytes


class Divergence(msgspec.Struct, frozen=True, array_like=True):
    """Groups of shards that hold the same; the largest first. There are two groups at least."""

    epoch: Epoch
    groups: tuple[tuple[int, ...], ...]


def word(manifest: Manifest, alike: Iterable[str]) -> bytes | None:
    """Spell out what is to be said of an epoch; None where nothing is alike by design.

    ``alike`` are the paths that this rank takes to be alike on all ranks, whether it stores them or
    has left them to another of its node.
    """
    left: Mapping[str, bytes] = manifest.left.digests if manifest.left is not None else {}
    held = manifest.held() | dict(left)
    known = {path: held[path] for path in alike if path in held}
    if not known:
        return None
    paths, values = xxhash.xxh3_128(), xxhash.xxh3_128()
    for path in sorted(known):
        paths.update(path.encode() + b"\0")
        values.update(known[path])
    said = Word(manifest.stamp.epoch, manifest.stamp.shard, paths.digest(), values.digest())
    return MARK + msgspec.msgpack.encode(said)


def is_word(payload: bytes) -> bool:
    """Say whether what came is a word, and none of the protocol's messages."""
    return payload.startswith(MARK)


class Replicas:
    """What the first shard's agent has heard, epoch by epoch."""

    def __init__(self) -> None:
        self._heard: dict[Epoch, dict[int, Word]] = {}
        self.found: tuple[Divergence, ...] = ()

    def hear(self, payload: bytes, shards: int) -> bool:
        """Take a word; say whether it completes an epoch in which ranks differ.

        Ranks that take other paths to be alike are not compared: that has been told already.
        Raises ``msgspec.MsgspecError`` for what is no word.
        """
        try:
            said = msgspec.msgpack.decode(payload[len(MARK) :], type=Word)
        except UNREADABLE as error:
            raise msgspec.DecodeError(str(error)) from error
        heard = self._heard.setdefault(said.epoch, {})
        heard[said.shard] = said
        for old in sorted(self._heard)[:-EPOCHS]:
            del self._heard[old]
        if len(heard) < shards or len({each.paths for each in heard.values()}) > 1:
            return False
        self._heard.pop(said.epoch, None)
        groups: dict[bytes, list[int]] = defaultdict(list)
        for shard in sorted(heard):
            groups[heard[shard].values].append(shard)
        if len(groups) == 1:
            return False
        ordered = sorted(map(tuple, groups.values()), key=lambda group: (-len(group), group))
        self.found = (*self.found, Divergence(said.epoch, tuple(ordered)))[-EPOCHS:]
        return True
