"""Every promise of the protocol by name: what always holds, what must happen sometimes, and what
happens in the end, once the storm is over (the design, section 2).

A law reads a :class:`Truth`, which no member has: what really is in the journals and on the disks,
and what was really done. It yields its breaches in words. The same laws judge the tests' world,
and whoever else can gather a truth. Two promises are about bytes, which the core never sees:
the files behind S1 and the damage behind S14 are shown by the tests of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias, TypeVar

import msgspec

from handfast.core import events, gossip, messages
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster
from handfast.core.recover import Phase
from handfast.core.retain import Keep
from handfast.core.state import Member
from handfast.core.view import view

__all__ = ["ALWAYS", "EVENTUALLY", "SOMETIMES", "Truth", "Turn", "Written", "breaches"]

R = TypeVar("R", bound=messages.Record)
Law: TypeAlias = "Callable[[Truth], Iterator[str]]"


class Written(msgspec.Struct, frozen=True):
    """One durable record: whose, and in which life it was written."""

    domain: str
    incarnation: int
    record: messages.Record


class Turn(msgspec.Struct, frozen=True):
    """One call of ``step``; the ``first`` of an incarnation also concludes what its journal allows."""

    before: Member
    event: events.Event
    after: Member
    effects: events.Effects
    first: bool = False


class Truth(msgspec.Struct, frozen=True):
    """What really is, and was.

    ``rosters`` are the configurations, oldest first; the last is the engine's latest. ``journal``
    is in the order of syncing. ``sound`` are the images on the disks that are as they were written
    (domain, epoch, digest); ``spoilt`` the copies damaged, lost or fenced after their attestation.
    ``published`` and ``resumed`` are deeds, by domain; ``pinned`` what readers hold. ``members``
    are those that are up, ``turn`` the step just taken, ``exchanges`` the rounds of ticks since
    the storm ended.
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

    def records(self, kind: type[R]) -> Iterator[tuple[str, R]]:
        """List the durable records of one kind, with whose they are."""
        return ((w.domain, w.record) for w in self.journal if isinstance(w.record, kind))

    def roster(self, digest: str) -> Roster:
        """Find a configuration by its name."""
        return next(roster for roster in self.rosters if roster.digest == digest)

    def retained(self) -> set[tuple[str, Epoch]]:
        """List whose copies were attested and never released, damaged or not."""
        held = {(d, s.epoch) for d, s in self.records(messages.Staged)}
        held |= {(d, GENESIS) for d, c in self.records(messages.Configured) if c.founding}
        return held - {(d, e) for d, r in self.records(messages.Released) for e in r.epochs}

    def bases(self) -> dict[int, messages.RestoreCertificate]:
        """Find the restore certificate of each generation that has one."""
        return {r.certificate.generation: r.certificate for _, r in self.records(messages.Restored)}

    def newest(self) -> int:
        """Find the highest generation that was restored, as the present members know it."""
        here = self.rosters[-1].ids
        restored = self.records(messages.Restored)
        return max((r.certificate.generation for d, r in restored if d in here), default=0)

    def restorable(self) -> tuple[Epoch, ...]:
        """List the living epochs of which every shard has an intact copy, retained and present."""
        domains = self.rosters[-1].configuration.domains
        intact = {(d, e) for d, e, _ in self.sound} & self.retained()
        intact |= {(d, e) for d, e in self.retained() if e == GENESIS}
        shards = self.rosters[-1].configuration.shards
        return tuple(
            epoch
            for epoch in sorted({e for _, e in intact})
            if len({d.shard for d in domains if (d.id, epoch) in intact}) == shards
            and _living(self, epoch, self.newest())
        )


def _living(truth: Truth, epoch: Epoch, generation: int) -> bool:
    """Say whether the chain of bases from a generation down to genesis passes through an epoch."""
    bases, cap = truth.bases(), None
    while generation:
        if epoch.generation == generation:
            return cap is None or epoch <= cap
        cap = bases[generation].base
        generation = cap.generation
    return epoch == GENESIS and (cap is None or cap == GENESIS)


def _reports(truth: Truth, c: messages.RestoreCertificate) -> dict[str, messages.Frozen]:
    frozen = truth.records(messages.Frozen)
    return {d: f for d, f in frozen if (f.generation, f.round) == (c.generation, c.round)}


# --- always -------------------------------------------------------------------------------------


def s1_attested_is_durable(truth: Truth) -> Iterator[str]:
    """A vote STAGED stands in the journal before it is sent, and its image on the disk before."""
    kept = truth.retained() - truth.spoilt
    votes = {(d, v.epoch, v.digest) for d, v in truth.records(messages.Staged)}
    for domain, epoch, digest in votes - truth.sound:
        if (domain, epoch) in kept:
            yield f"{domain} attested {epoch} as {digest}; no such image is on its disk"
    for send in truth.turn.effects.send if truth.turn else ():
        roster = truth.roster(send.message.configuration)
        for fact in send.message.facts:
            if isinstance(fact, messages.Staged):
                if (roster.ids[fact.domain], fact.epoch, fact.digest) not in votes:
                    yield f"a vote on {fact.epoch} was sent before it was durable"


def s2_knowledge_is_sound(truth: Truth) -> Iterator[str]:
    """Whoever knows C_e: k_T domains of every shard of T staged e, or restored it as their base."""
    known = {c.certificate for _, c in truth.records(messages.Converged)}
    known |= {t.line for m in truth.members for t in m.tallies if t.line is not None}
    staged = {(d, v.epoch) for d, v in truth.records(messages.Staged)}
    bases = {(c.base, c.root): c for c in truth.bases().values()}
    for line in sorted(known, key=lambda c: c.epoch):
        roster = truth.roster(line.configuration)
        tier = roster.tiers.index(line.tier)
        restored = bases.get((line.epoch, line.root))
        if restored is not None:
            if roster.needs[tier] > 1 or any(roster.tier_of[i] != tier for i in restored.copies):
                yield f"{line.tier} counts {line.epoch} as converged from others' copies"
            continue
        for shard, mask in enumerate(roster.holders[tier]):
            held = sum((d, line.epoch) in staged for d in roster.names(mask))
            if held < roster.needs[tier]:
                yield f"{line.epoch} is known converged in {line.tier}; shard {shard} has {held}"


def s3_something_is_retained_by_all(truth: Truth) -> Iterator[str]:
    """Of every shard the same epoch of the living timeline is retained; damage apart."""
    held, shards = truth.retained(), truth.rosters[-1].configuration.shards
    told = {d for d, _ in truth.records(messages.Configured)}
    held |= {(d, GENESIS) for d in truth.rosters[0].ids if d not in told}  # founders to be
    at = {d.id: d.shard for roster in truth.rosters for d in roster.configuration.domains}
    newest = truth.newest()
    for epoch in {e for _, e in held}:
        if len({at[d] for d, e in held if e == epoch}) == shards and _living(truth, epoch, newest):
            return
    yield "no epoch is retained for every shard"


def s4_certified_is_not_lost(truth: Truth) -> Iterator[str]:
    """Each tier's newest certified epoch is intact, within its k - 1 losses; recovery finds it."""
    intact = {(d, e) for d, e in truth.retained() if e == GENESIS}
    intact |= {(d, e) for d, e, _ in truth.sound} & truth.retained()
    lines = [r.certificate for _, r in truth.records(messages.Converged)]
    certified = {(c.configuration, c.tier, c.epoch) for c in lines}
    for c in truth.bases().values():
        roster = truth.roster(c.configuration)
        tiers = {roster.tier_of[copy] for copy in c.copies}
        if len(tiers) == 1 and roster.needs[min(tiers)] == 1 and c.base != GENESIS:
            certified.add((c.configuration, roster.tiers[min(tiers)], c.base))
    newest = truth.newest()
    for tier in truth.rosters[-1].tiers:
        living = [c for c in certified if c[1] == tier and _living(truth, c[2], newest)]
        for configuration, _, epoch in sorted(living, key=lambda line: line[2])[-1:]:
            roster = truth.roster(configuration)
            if _beyond(truth, configuration, tier, epoch):
                continue
            for mask in roster.holders[roster.tiers.index(tier)]:
                if not any((d, epoch) in intact for d in roster.names(mask)):
                    yield f"no copy of {epoch} is left with {roster.names(mask)}"
    for c in truth.bases().values():
        frozen = _reports(truth, c).values()
        known = [f.report.restored.generation for f in frozen if f.report.restored is not None]
        for line in certified if all(f.want is None for f in frozen) else ():
            old = line[2]
            if c.base < old and old.generation < c.generation and not _beyond(truth, *line):
                if _living(truth, old, max(known)):
                    yield f"{old} had converged; generation {c.generation} resumed {c.base}"


def _beyond(truth: Truth, configuration: str, tier: str, epoch: Epoch) -> bool:
    roster = truth.roster(configuration)
    at = roster.tiers.index(tier)
    return any(
        sum((d, epoch) in truth.spoilt for d in roster.names(mask)) >= roster.needs[at]
        for mask in roster.holders[at]
    )


def s5_votes_are_write_once(truth: Truth) -> Iterator[str]:
    """One vote an epoch, one judgement a copy, one ACCEPT and one FREEZE a generation."""
    said: dict[tuple[object, ...], messages.Record] = {}
    for w in truth.journal:
        match w.record:
            case messages.Staged() | messages.Skipped():
                key: tuple[object, ...] = ("vote", w.domain, w.record.epoch)
            case messages.Valid() | messages.Bad():
                key = ("check", w.domain, w.record.generation, w.record.epoch)
            case messages.Accepted():
                key = ("accept", w.domain, w.record.generation)
            case messages.Frozen():
                key = ("freeze", w.domain, w.record.generation)
            case _:
                continue
        if key in said:
            yield f"{w.domain} wrote {said[key]} and then {w.record}"
        said[key] = w.record


def s6_certificates_are_of_one_whole(truth: Truth) -> Iterator[str]:
    """A certificate is of one generation, round and configuration, and all members took part."""
    first: dict[int, messages.RestoreCertificate] = {}
    for domain, record in truth.records(messages.Restored):
        c = record.certificate
        if first.setdefault(c.generation, c) != c:
            yield f"{domain} holds another certificate of generation {c.generation}"
        frozen = _reports(truth, c)
        if any(frozen[d].configuration != c.configuration for d in frozen):
            yield f"generation {c.generation} was frozen in two configurations"
        if absent := [d for d in truth.roster(c.configuration).ids if d not in frozen]:
            yield f"generation {c.generation} was restored without {absent}"
    configured, frozen_in = {}, {}
    for w in truth.journal:
        if isinstance(w.record, messages.Configured):
            configured[w.domain] = w.record.configuration.digest()
        elif isinstance(w.record, messages.Frozen):
            frozen_in[w.domain, w.record.generation] = w.record.configuration
        elif isinstance(w.record, messages.Staged | messages.Skipped):
            if frozen_in.get((w.domain, w.record.epoch.generation)) != configured[w.domain]:
                yield f"{w.domain} voted on {w.record.epoch} in another configuration"
    for domain, line in truth.published:
        if line.epoch.generation and line.epoch.generation not in first:
            yield f"{domain} published {line.epoch}, of a generation that never began"


def s7_nothing_acts_without_a_certificate(truth: Truth) -> Iterator[str]:
    """What was published or resumed stood in the doer's own journal before."""
    held = {(d, c.certificate) for d, c in truth.records(messages.Converged)}
    begun = {(d, r.certificate) for d, r in truth.records(messages.Restored)}
    yield from (f"{d} published {c.epoch} uncertified" for d, c in truth.published
                if (d, c) not in held)  # fmt: skip
    yield from (f"{d} resumed {c.base} uncertified" for d, c in truth.resumed
                if (d, c) not in begun)  # fmt: skip


def s8_release_follows_knowledge(truth: Truth) -> Iterator[str]:
    """Only below an own, known, retained, living converged epoch, or what can't be available;
    and never what a reader holds or the user wants to keep.
    """
    turn = truth.turn
    gone = [e for r in turn.effects.persist if isinstance(r, messages.Released) for e in r.epochs
            ] if turn else []  # fmt: skip
    if turn is None or turn.after.roster is None or not gone:
        return
    member, roster = turn.after, turn.after.roster
    line = member.tallies[roster.tier_of[member.me]].line
    skipped = {(d, v.epoch) for d, v in truth.records(messages.Skipped)}
    domains = roster.configuration.domains
    judged = {(d, b.epoch) for d, b in truth.records(messages.Bad)}
    newest = member.generation
    held = [c.epoch for c in member.retained]
    for epoch in gone:
        void = any(
            all((d.id, epoch) in skipped for d in domains if d.shard == shard)
            for shard in range(roster.configuration.shards)
        )
        if (member.id, epoch) in truth.pinned:
            yield f"{member.id} released {epoch}, which a reader holds"
        if not member.open:
            yield f"{member.id} released {epoch} during a recovery"
        elif not void and (line is None or line.epoch <= epoch):
            yield f"{member.id} released {epoch}, not below what it knows converged"
        elif not void and line is not None:
            newer = [e for e in held if epoch < e <= line.epoch and _living(truth, e, newest)]
            every = truth.keep.every is not None and epoch.step % truth.keep.every == 0
            kept = every or len(newer) < truth.keep.newest
            if kept and epoch != GENESIS and _living(truth, epoch, newest):
                yield f"{member.id} released {epoch}, which the user keeps"
            if line.epoch not in held or (member.id, line.epoch) in judged:
                yield f"{member.id} released {epoch}, and does not retain {line.epoch}"
            if line.configuration != roster.digest:
                yield f"{member.id} released {epoch} by a certificate of another configuration"
            for mask in roster.holders[roster.tier_of[member.me]]:
                copies = {(d, line.epoch) for d in roster.names(mask)}
                if copies <= judged:
                    yield f"{member.id} released {epoch}; of {line.epoch} {mask:b} is all bad"
            if not _living(truth, line.epoch, newest):
                yield f"{member.id} released {epoch} below the orphan {line.epoch}"


def s9_joins_agree(truth: Truth) -> Iterator[str]:
    """Two members of one round never hold facts that differ, whatever reached them, and when."""
    for a in truth.members:
        for b in truth.members:
            if a.id >= b.id or (a.generation, a.round) != (b.generation, b.round):
                continue
            if a.open and b.open and a.restored != b.restored:
                yield f"{a.id} and {b.id} resumed generation {a.generation} differently"
            if a.recovery is None or b.recovery is None:
                continue
            mine = (*a.recovery.reports, *a.recovery.accepted)
            theirs = (*b.recovery.reports, *b.recovery.accepted)
            if any(x and y and x != y for x, y in zip(mine, theirs, strict=True)):
                yield f"{a.id} and {b.id} hold different words of one member"


def s10_stale_is_refused(truth: Truth) -> Iterator[str]:
    """What is of another generation, round, configuration or a past incarnation changes nothing."""
    turn = truth.turn
    if turn is None or turn.first or not isinstance(turn.event, events.Received):
        return
    if turn.before.roster is None:
        return
    m, before = turn.event.message, turn.before
    here = (before.generation, before.round, turn.before.roster.digest)
    past = m.incarnation < before.peers[m.sender].incarnation if m.sender != before.me else False
    if past or (m.generation, m.round, m.configuration) != here:
        quiet = msgspec.structs.replace(turn.after, peers=before.peers)
        if turn.effects.persist or quiet != before:
            yield f"{before.id} took {m.generation}/{m.incarnation} from member {m.sender}"


def s11_nothing_is_mutated_unvalidated(truth: Truth) -> Iterator[str]:
    """A rank resumes only what is VALID in a named copy of every shard, and every rank ACCEPTed."""
    valid = {(d, v.generation, v.epoch) for d, v in truth.records(messages.Valid)}
    accepted = {(d, a.generation, a.epoch, a.copy) for d, a in truth.records(messages.Accepted)}
    for domain, c in dict.fromkeys(truth.resumed):
        roster = truth.roster(c.configuration)
        for shard, copy in enumerate(c.copies):
            if (roster.ids[copy], c.generation, c.base) not in valid:
                yield f"{domain} resumed {c.base}: copy {roster.ids[copy]} was not validated"
            home = roster.ids[roster.homes[shard]]
            if (home, c.generation, c.base, copy) not in accepted:
                yield f"{domain} resumed {c.base}: rank {shard} did not accept"


def s12_recovery_is_a_function(truth: Truth) -> Iterator[str]:
    """The base is the greatest epoch that the frozen reports and the chain allow, never an orphan."""
    judged = {(d, b.generation, b.epoch) for d, b in truth.records(messages.Bad)}
    for c in truth.bases().values():
        frozen, roster = _reports(truth, c), truth.roster(c.configuration)
        known = [f.report.restored.generation for f in frozen.values() if f.report.restored]
        top, wants = max(known, default=0), {f.want for f in frozen.values()}
        held = {(d, copy.epoch) for d, f in frozen.items() for copy in f.report.retained}
        good = {(d, e) for d, e in held if (d, c.generation, e) not in judged}
        if not _living(truth, c.base, top):
            yield f"generation {c.generation} resumed {c.base}, an orphan"
        for epoch in {e for _, e in good if e > c.base}:
            got = {d.shard for d in roster.configuration.domains if (d.id, epoch) in good}
            wanted = wants == {None} or wants == {epoch.step}
            if len(got) == roster.configuration.shards and wanted and _living(truth, epoch, top):
                yield f"generation {c.generation} resumed {c.base}, and {epoch} was there"
        if wants - {None, c.base.step}:
            yield f"generation {c.generation} resumed {c.base}; asked for was {wants}"


def s13_no_interaction_across_epochs(truth: Truth) -> Iterator[str]:
    """Ranks that act in one generation act from the same epoch."""
    first: dict[int, Epoch] = {}
    for domain, c in truth.resumed:
        if first.setdefault(c.generation, c.base) != c.base:
            yield f"{domain} acts from {c.base}, others from {first[c.generation]}"


def s14_what_is_corrupt_never_counts(truth: Truth) -> Iterator[str]:
    """No restore certificate names a copy that its holder found BAD."""
    judged = {(d, b.generation, b.epoch) for d, b in truth.records(messages.Bad)}
    for c in truth.bases().values():
        for copy in truth.roster(c.configuration).names(sum({1 << i for i in c.copies})):
            if (copy, c.generation, c.base) in judged:
                yield f"generation {c.generation} took {c.base} from {copy}, which is bad"


def s15_time_changes_nothing(truth: Truth) -> Iterator[str]:
    """A tick, early or late, only sends."""
    turn = truth.turn
    if turn is not None and isinstance(turn.event, events.Tick) and not turn.first:
        if turn.effects.persist or turn.effects.apply:
            yield f"a tick made {turn.before.id} do {turn.effects}"


def _did(turn: Turn, kind: type) -> bool:
    return any(isinstance(action, kind) for action in turn.effects.apply)


# --- eventually: judged in the calm after a storm, once what was restored has saved one more epoch


def l1_all_learn(truth: Truth) -> Iterator[str]:
    """With fair links and all up, every member knows the same epoch converged."""
    if len({tuple(t.line and t.line.epoch for t in m.tallies) for m in truth.members}) > 1:
        yield "members know different epochs converged"
    yield from (f"{m.id} still waits for {view(m).blocked_by}" for m in truth.members
                if view(m).blocked_by)  # fmt: skip


def l2_heals_in_diameter(truth: Truth) -> Iterator[str]:
    """The exchanges needed grow with the diameter (log2 n here), not with the length of the storm."""
    if truth.exchanges > 4 * (truth.rosters[-1].size.bit_length() + 2):
        yield f"it took {truth.exchanges} exchanges"


def l3_no_orphaned_knowledge(truth: Truth) -> Iterator[str]:
    """After restarts every member holds the newest restore certificate: none is stuck in between."""
    for m in truth.members:
        if not m.open or m.generation != truth.newest():
            yield f"{m.id} is not in generation {truth.newest()}"


def l4_whoever_blocks_is_named(truth: Truth) -> Iterator[str]:
    """With someone away nobody gets on, and all the others name exactly who has not frozen."""
    for m in truth.members:
        frozen = {d for d, f in truth.records(messages.Frozen) if f.generation == m.generation}
        away = tuple(d for d in m.roster.ids if d not in frozen) if m.roster else ()
        if away and (m.open or view(m).blocked_by != away):
            yield f"{m.id} names {view(m).blocked_by}; {away} are away"


def l5_traffic_quiesces(truth: Truth) -> Iterator[str]:
    """Once all agree, a tick sends nothing to anybody who is there."""
    for m in truth.members:
        here = {other.id for other in truth.members}
        names = m.roster.names(gossip.restless(m)) if m.roster is not None else ()
        if loud := here.intersection(names):
            yield f"{m.id} still sends to {sorted(loud)}"


def l6_storage_is_bounded(truth: Truth) -> Iterator[str]:
    """After progress a domain holds what is to be kept or pinned, the window, and nothing else."""
    for m in truth.members:
        every, newest = truth.keep.every, truth.keep.newest
        kept = [c.epoch for c in m.retained if every is None or c.epoch.step % every]
        free = [e for e in kept if (m.id, e) not in truth.pinned]
        if len(free) > newest + m.window + 1:
            yield f"{m.id} retains {len(m.retained)} epochs"


ALWAYS: Final[tuple[Law, ...]] = (
    s1_attested_is_durable,
    s2_knowledge_is_sound,
    s3_something_is_retained_by_all,
    s4_certified_is_not_lost,
    s5_votes_are_write_once,
    s6_certificates_are_of_one_whole,
    s7_nothing_acts_without_a_certificate,
    s8_release_follows_knowledge,
    s9_joins_agree,
    s10_stale_is_refused,
    s11_nothing_is_mutated_unvalidated,
    s12_recovery_is_a_function,
    s13_no_interaction_across_epochs,
    s14_what_is_corrupt_never_counts,
    s15_time_changes_nothing,
)
EVENTUALLY: Final[tuple[Law, ...]] = (
    l1_all_learn,
    l2_heals_in_diameter,
    l3_no_orphaned_knowledge,
    l5_traffic_quiesces,
    l6_storage_is_bounded,
)


def an_epoch_converges(truth: Truth) -> bool:
    return truth.turn is not None and _did(truth.turn, events.Publish)


SOMETIMES: Final[tuple[Callable[[Truth], bool], ...]] = (an_epoch_converges,)
STANDSTILL: Final[tuple[Law, ...]] = (l4_whoever_blocks_is_named, l5_traffic_quiesces)


def breaches(truth: Truth, laws: tuple[Law, ...] = ALWAYS) -> tuple[str, ...]:
    """List what breaks the laws, each with the name of the law: none, one hopes."""
    return tuple(f"{law.__name__}: {words}" for law in laws for words in law(truth))
