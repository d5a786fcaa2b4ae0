"""What ranks say of an epoch beside the protocol: what they hold alike, and where that came from.

Each rank's agent sends one word to the first shard's agent, once it has persisted its own. That is
no part of the protocol, and a word that is lost is not sent again.

Of what all ranks should hold alike it has one digest. A difference is silent data corruption, or a
training that is not deterministic where it was taken to be; which rank is right nobody can tell
from digests. Of what its rank loaded, by a restore or by hand, it says from where: each rank loads
by itself, and what two have from different epochs is a mixture, however well it is saved. So where
its own rank has loaded by hand since, the first shard's agent casts its vote only when it has heard
all, and skips a mixture. It waits no longer than the others' votes are outstanding.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import xxhash

from handfast.agent.routes import Route
from handfast.agent.speech import Said
from handfast.core.lattice import Epoch
from handfast.core.membership import Roster
from handfast.core.state import Member
from handfast.errors import UNREADABLE
from handfast.store.manifest import Manifest, Stamp
from handfast.store.provenance import NOTHING, Brought, found, spell_mixed, unlike

__all__ = ["MIXTURE", "Apart", "Divergence", "Hearsay", "Word", "word"]

logger = logging.getLogger(__name__)

MIXTURE: Final = "the ranks have loaded parts of different epochs"
"""How the reason of a SKIP begins where what is saved is no one epoch's."""

LOOK_S: Final = 0.01
GRACE_S: Final = 1.0
"""So long a word may come later than the vote of its rank, which goes another way."""
PATIENCE_S: Final = 30.0
"""So long the first shard's vote waits for words, whatever the others do."""

EPOCHS: Final = 16
"""Epochs of which words are kept while not all ranks were heard."""


class Word(msgspec.Struct, frozen=True, array_like=True):
    """What one shard's rank holds of an epoch: digests of the paths that are alike, and of all;
    nothing where they are not to be compared. And what it came from.
    """

    epoch: Epoch
    shard: int
    paths: bytes
    values: bytes
    brought: Brought = NOTHING


class Divergence(msgspec.Struct, frozen=True, array_like=True):
    """Groups of shards that hold the same; the largest first. There are two groups at least."""

    epoch: Epoch
    groups: tuple[tuple[int, ...], ...]


class Apart(msgspec.Struct, frozen=True, array_like=True):
    """An epoch whose ranks do not have one history: what each of them goes on as, by shard."""

    epoch: Epoch
    said: tuple[Brought, ...]


def word(manifest: Manifest, alike: Sequence[str]) -> bytes:
    """Spell out what is to be said of an epoch.

    ``alike`` are the paths that this rank takes to be alike on all ranks, whether it stores them or
    has left them to another of its node.
    """
    known: dict[str, bytes] = {}
    if alike:  # else a digest of each tensor would be looked up in each epoch, for nothing
        held = manifest.held() | (manifest.left.digests if manifest.left is not None else {})
        known = {path: held[path] for path in alike if path in held}
    paths, values = xxhash.xxh3_128(), xxhash.xxh3_128()
    for path in sorted(known):
        paths.update(path.encode() + b"\0")
        values.update(known[path])
    digests = (paths.digest(), values.digest()) if known else (b"", b"")
    stamp = manifest.stamp
    said = Word(stamp.epoch, stamp.shard, *digests, found(stamp))
    return msgspec.msgpack.encode(said)


class Hearsay:
    """Says what one domain's rank holds, and hears the others where that is the first shard's.

    ``route`` is the way to other domains, ``member`` is what the domain knows by now.
    """

    def __init__(self, route: Route, member: Callable[[], Member]) -> None:
        self._route = route
        self._member = member
        self._heard: dict[Epoch, dict[int, Word]] = {}
        self._said: dict[Epoch, tuple[Brought, ...]] = {}  # what all ranks have said
        self._agreed: tuple[int, Brought] | None = None  # when they did the last time
        self._over = 0
        self.divergent: tuple[Divergence, ...] = ()
        self.apart: Apart | None = None

    def say(self, roster: Roster, manifest: Manifest, alike: Sequence[str]) -> None:
        """Tell the first shard's agent of an epoch that was persisted here."""
        if roster.configuration.shards > 1:
            first = next(d.id for d in roster.configuration.domains if d.shard == 0)
            self._route(Said(first, word(manifest, alike), word=True))

    async def mixture(self, manifest: Manifest) -> str:
        """Say what ranks have from different epochs in what was persisted here, if anything; waits
        for their words where this rank has loaded by hand since they were heard last.

        For the first shard alone; it goes on where a word was lost, or a rank, or another
        generation begins (:meth:`leave`): then the mixture is found once it is saved.
        """
        stamp = manifest.stamp
        mine = stamp.generation, found(stamp)
        first = stamp.shard == 0 and stamp.shards > 1
        if not first or mine == self._agreed or not _by_hand(stamp, self._member()):
            return ""
        if mute := self._mute():
            logger.warning("%s can say no words: a mixture is found once it is saved", mute)
            return ""
        began, quiet = time.monotonic(), 0.0
        while (said := self._said.get(stamp.epoch)) is None:
            quiet = 0.0 if _outstanding(self._member(), stamp.epoch) else quiet or time.monotonic()
            late = (quiet and time.monotonic() > quiet + GRACE_S) or self._over > stamp.generation
            if late or time.monotonic() > began + PATIENCE_S:
                return ""
            await asyncio.sleep(LOOK_S)
        if not (parts := spell_mixed(said)):
            self._agreed = mine
        return f"{MIXTURE}: {'; '.join(parts)}" if parts else ""

    def _mute(self) -> str:
        """Name a domain whose agent has no words: it is of an earlier build; "" where all do."""
        roster = self._member().roster
        among = roster.configuration.domains if roster is not None else ()
        return next((d.id for d in among if not self._route.has_words(d.id)), "")

    def leave(self, generation: int) -> None:
        """Wait for no word of generations before this one any more."""
        self._over = generation

    def hear(self, payload: bytes, shards: int) -> bool:
        """Take a word; say whether it completes an epoch of which there is something to tell.

        Ranks that take other paths to be alike are not compared: that has been told already.
        Raises ``msgspec.MsgspecError`` for what is no word.
        """
        try:
            said = msgspec.msgpack.decode(payload, type=Word)
        except UNREADABLE as error:
            raise msgspec.DecodeError(str(error)) from error
        heard = self._heard.setdefault(said.epoch, {})
        heard[said.shard] = said
        for old in sorted(self._heard)[:-EPOCHS]:
            del self._heard[old]
        if len(heard) < shards:
            return False
        self._heard.pop(said.epoch, None)
        words = [heard[shard] for shard in sorted(heard)]
        history = tuple(each.brought for each in words)
        self._said[said.epoch] = history
        for old in sorted(self._said)[:-EPOCHS]:
            del self._said[old]
        differ, apart = _divergence(words), unlike(history)
        if differ is not None:
            self.divergent = (*self.divergent, differ)[-EPOCHS:]
        former, self.apart = self.apart, None
        if apart:
            self.apart = Apart(said.epoch, history)
        return self.apart != former or differ is not None


def _by_hand(stamp: Stamp, member: Member) -> bool:
    """Say whether anything of an epoch was loaded otherwise than by the restore that all took."""
    base = member.restored.base if member.restored is not None else None
    return any((s.run, Epoch(s.generation, s.step)) != (stamp.run, base) for s in stamp.came)


def _outstanding(member: Member, epoch: Epoch) -> bool:
    """Say whether votes of others on an epoch may still come that would let it converge."""
    roster = member.roster
    if roster is None or not member.open or member.generation != epoch.generation:
        return False
    tier = roster.tier_of[member.me]
    held = [b for b in member.tallies[tier].ballots if b.epoch == epoch]
    others = {*roster.members[tier]} - {member.me}
    return not held or not (held[0].skipped or all(held[0].staged >> i & 1 for i in others))


def _divergence(words: list[Word]) -> Divergence | None:
    if len({each.paths for each in words}) > 1:
        return None
    groups: dict[bytes, list[int]] = defaultdict(list)
    for each in words:
        groups[each.values].append(each.shard)
    if len(groups) == 1:
        return None
    ordered = sorted(map(tuple, groups.values()), key=lambda group: (-len(group), group))
    return Divergence(words[0].epoch, tuple(ordered))
