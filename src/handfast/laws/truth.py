"""What really is, and was: what no member knows, and every law of the protocol is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import msgspec

from handfast.core import events, messages
from handfast.core.converge import reach
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster
from handfast.core.retain import Keep
from handfast.core.state import Member

__all__ = ["Law", "Truth", "Turn", "Written", "rolled_up"]

R = TypeVar("R", bound=messages.Record)
Law: TypeAlias = "Callable[[Truth], Iterator[str]]"
"""Yields the breaches of one promise, in words."""


class Written(msgspec.Struct, frozen=True):
    """One durable record: whose, and in which life it was written."""

    domain: str
    incarnation: int
    record: messages.Record


class Turn(msgspec.Struct, frozen=True):
    """One call of ``step``; the ``first`` of a life also concludes what its journal allows.

    ``cut``: a crash came before all of its effects were carried out, and these are those that were.
    """

    before: Member
    event: events.Event
    after: Member
    effects: events.Effects
    first: bool = False
    cut: bool = False


class Truth(msgspec.Struct, frozen=True, dict=True):
    """What really is, and was.

    ``rosters`` are the configurations, the engine's latest last; ``journal`` is in the order of
    syncing. ``sound`` are the images on the disks that are as they were written (domain, epoch,
    digest), ``spoilt`` the copies damaged, lost or fenced after their attestation. ``published``
    and ``resumed`` are deeds, by domain; ``pinned`` is what readers hold. ``members`` are those
    that are up, ``turn`` the step just taken, ``exchanges`` the rounds of ticks in the calm.
    """

    rosters: tuple[Roster, ...]
    journal: tuple[Written, ...]
    sound: frozenset[tuple[str, Epoch, str]] = frozenset()
    spoilt: frozenset[tuple[str, Epoch]] = frozenset()
    published: tuple[tuple[str, messages.Certificate], ...] = ()
    resumed: tuple[tuple[str, messages.RestoreCertificate], ...] = ()
    pinned: frozenset[tuple[str, Epoch]] = frozenset()
    keep: Keep = Keep()
    members: tuple[Member, ...] = ()
    turn: Turn | None = None
    exchanges: int = 0

    def records(self, kind: type[R]) -> Sequence[tuple[str, R]]:
        """List the durable records of one kind, with whose they are."""
        return self._kinds.get(kind, ())

    @cached_property
    def _kinds(self) -> dict[type, list[tuple[str, Any]]]:
        kinds: dict[type, list[tuple[str, Any]]] = {}
        for w in self.journal:
            kinds.setdefault(type(w.record), []).append((w.domain, w.record))
        return kinds

    def roster(self, digest: str) -> Roster:
        """Find a configuration by its name."""
        return next(roster for roster in self.rosters if roster.digest == digest)

    @cached_property
    def retained(self) -> frozenset[tuple[str, Epoch]]:
        """List whose copies were attested and never released, damaged or not."""
        held = frozenset((d, s.epoch) for d, s in self.records(messages.Staged))
        held |= {(d, GENESIS) for d, c in self.records(messages.Configured) if c.founding}
        return held - {(d, e) for d, r in self.records(messages.Released) for e in r.epochs}

    @cached_property
    def bases(self) -> dict[int, messages.RestoreCertificate]:
        """Find the restore certificate of each generation that has one."""
        return {r.certificate.generation: r.certificate for _, r in self.records(messages.Restored)}

    @cached_property
    def newest(self) -> int:
        """Find the highest generation that was restored, as the present members know it."""
        held = self.records(messages.Restored)
        here = self.rosters[-1].ids
        return max((r.certificate.generation for d, r in held if d in here), default=0)

    @cached_property
    def bad(self) -> frozenset[tuple[str, Epoch]]:
        """List the copies that were BAD when they were last judged."""
        last: dict[tuple[str, Epoch], bool] = {}
        for w in self.journal:
            if isinstance(w.record, messages.Valid | messages.Bad):
                last[w.domain, w.record.epoch] = isinstance(w.record, messages.Bad)
        return frozenset(copy for copy, bad in last.items() if bad)

    def living(self, epoch: Epoch, generation: int) -> bool:
        """Say whether the chain of bases from a generation down passes through an epoch."""
        cap: Epoch | None = None
        while generation:
            if epoch.generation == generation:
                return cap is None or epoch <= cap
            cap = self.bases[generation].base
            generation = cap.generation
        return epoch == GENESIS and (cap is None or cap == GENESIS)

    def whole(self, epoch: Epoch, tier: str) -> bool:
        """Say whether an epoch converged in a tier, of whichever configuration: by all votes."""
        votes = self._votes.get(epoch, ())
        for roster in self.rosters:
            at = roster.tiers.index(tier) if tier in roster.tiers else None
            if at is not None and all(
                sum(d in votes for d in roster.names(mask)) >= roster.needs[at]
                for mask in roster.holders[at]
            ):
                return True
        return False

    @cached_property
    def _votes(self) -> dict[Epoch, set[str]]:
        votes: dict[Epoch, set[str]] = {}
        for d, vote in self.records(messages.Staged):
            votes.setdefault(vote.epoch, set()).add(d)
        return votes

    def frozen(self, generation: int, round_: str) -> dict[str, messages.Frozen]:
        """Find what each member reported when it froze in a round."""
        frozen = self.records(messages.Frozen)
        return {d: f for d, f in frozen if (f.generation, f.round) == (generation, round_)}

    @cached_property
    def intact(self) -> frozenset[tuple[str, Epoch]]:
        """List the copies that are retained and that a restore could read."""
        there = frozenset((d, e) for d, e, _ in self.sound)
        return frozenset(copy for copy in self.retained if copy[1] == GENESIS or copy in there)

    def beyond(self, line: messages.Certificate) -> bool:
        """Say whether k_T copies of some shard were lost: more than its tier promises to bear."""
        roster = self.roster(line.configuration)
        tier = roster.tiers.index(line.tier)
        return any(
            sum((d, line.epoch) in self.spoilt for d in roster.names(mask)) >= roster.needs[tier]
            for mask in roster.holders[tier]
        )

    @cached_property
    def restorable(self) -> tuple[Epoch, ...]:
        """List the living epochs of which every shard has an intact copy."""
        domains, intact = self.rosters[-1].configuration.domains, self.intact
        return tuple(
            epoch
            for epoch in sorted({e for _, e in intact})
            if len({d.shard for d in domains if (d.id, epoch) in intact})
            == self.rosters[-1].configuration.shards
            and self.living(epoch, self.newest)
        )


def rolled_up(member: Member) -> dict[tuple[object, ...], object]:
    """Find what came up a tree on epochs of this generation, by whose word it is."""
    tallies = member.tallies if member.roster and member.roster.tree else ()
    votes = [v for t in tallies for b in t.ballots for v in (*b.votes, *b.skips)]
    ours = [t.line for t in tallies if t.line and t.line.epoch.generation == member.generation]
    return {(v.epoch, *reach(v)): v for v in votes} | {(x.epoch, x.tier): x for x in ours}
