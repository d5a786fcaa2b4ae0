"""Every promise of the protocol by name: what always holds, and what happens in the end, once the
storm is over (the design, section 2).

A law reads a :class:`Truth`, which no member has: what really is in the journals and on the disks,
and what was really done. It yields its breaches in words. Two promises are about bytes, which the
core never sees: the files behind S1 and the damage behind S14 are for the tests of the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from handfast.core import gossip, messages
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster
from handfast.core.state import Member
from handfast.core.view import view
from handfast.laws import steps
from handfast.laws.truth import Law, Truth, Turn, Written, rolled_up

__all__ = [
    "ALWAYS",
    "EVENTUALLY",
    "STANDSTILL",
    "Law",
    "Truth",
    "Turn",
    "Written",
    "breaches",
]

# --- always -------------------------------------------------------------------------------------


def s1_attested_is_durable(truth: Truth) -> Iterator[str]:
    """A vote STAGED stands in the journal before it is sent, and its image on the disk before."""
    kept = truth.retained - truth.spoilt
    votes = [(d, v.epoch, v.digest) for d, v in truth.records(messages.Staged)]
    for vote in votes:
        if vote not in truth.sound and vote[:2] in kept:
            yield f"{vote[0]} attested {vote[1]}; no such image is on its disk"
    said = {(d, epoch): digest for d, epoch, digest in votes}
    for send in truth.turn.effects.send if truth.turn else ():
        roster = truth.roster(send.message.configuration)
        for fact in [f for f in send.message.facts if isinstance(f, messages.Staged)]:
            if said.get((roster.ids[fact.domain], fact.epoch)) != fact.digest:
                yield f"a vote on {fact.epoch} was sent before it was durable"
        for roll in send.message.rolled:
            ids = roster.ids[roll.first : roll.first + roll.size]
            root = messages.merkle_root([f"{d}={said.get((d, roll.epoch))}" for d in ids])
            if root != roll.root.hex():
                yield f"{ids} were rolled up; these are not their votes on {roll.epoch}"


def s2_knowledge_is_sound(truth: Truth) -> Iterator[str]:
    """Whoever knows C_e: k_T domains of every shard of T staged e, or restored it as their base."""
    known = {c.certificate: None for _, c in truth.records(messages.Converged)}
    known |= {t.line: None for m in truth.members for t in m.tallies if t.line is not None}
    staged = {(d, v.epoch): v.digest for d, v in truth.records(messages.Staged)}
    bases = {(c.base, c.root): c for c in truth.bases.values()}
    for line in known:
        roster = truth.roster(line.configuration)
        tier = roster.tiers.index(line.tier)
        restored = bases.get((line.epoch, line.root))
        if restored is not None:
            if roster.needs[tier] > 1 or any(roster.tier_of[i] != tier for i in restored.copies):
                yield f"{line.tier} counts {line.epoch} as converged from others' copies"
            continue
        for shard, mask in enumerate(roster.holders[tier]):
            if sum((d, line.epoch) in staged for d in roster.names(mask)) < roster.needs[tier]:
                yield f"{line.epoch} is known converged in {line.tier} without shard {shard}"
        names = roster.names(sum(roster.holders[tier]))
        said = [f"{d}={staged.get((d, line.epoch))}" for d in names]
        if roster.tree is not None and line.root != messages.merkle_root(said):
            yield f"{line.epoch} is known converged in {line.tier} by votes that are not its own"


def s3_something_is_retained_by_all(truth: Truth) -> Iterator[str]:
    """Of every shard the same epoch of the living timeline is retained; damage apart."""
    told = [d for d, _ in truth.records(messages.Configured)]
    held = truth.retained | {(d, GENESIS) for d in truth.rosters[0].ids if d not in told}
    at = {d.id: d.shard for roster in truth.rosters for d in roster.configuration.domains}
    shards, newest = truth.rosters[-1].configuration.shards, truth.newest
    if not any(
        len({at[d] for d, e in held if e == epoch}) == shards and truth.living(epoch, newest)
        for epoch in sorted({e for _, e in held})
    ):
        yield "no epoch is retained for every shard"


def s4_certified_is_not_lost(truth: Truth) -> Iterator[str]:
    """Each tier's newest certified epoch is intact, within its k - 1 losses; recovery finds it."""
    intact, newest, bases = truth.intact, truth.newest, truth.bases
    lines = [r.certificate for _, r in truth.records(messages.Converged)]
    for c in bases.values():
        roster = truth.roster(c.configuration)
        for tier, need in enumerate(roster.needs):
            if need == 1 and all(roster.tier_of[copy] == tier for copy in c.copies):
                name = roster.tiers[tier]
                lines.append(messages.Certificate("", roster.digest, name, c.base, c.root))
    for tier_name in truth.rosters[-1].tiers:
        certified = sorted((c for c in lines if c.tier == tier_name), key=lambda c: c.epoch)
        # Below an orphan that had converged, what was superseded by it may be gone.
        for last in certified[-1:]:
            roster = truth.roster(last.configuration)
            promised = truth.living(last.epoch, newest) and not truth.beyond(last)
            for mask in roster.holders[roster.tiers.index(tier_name)] if promised else ():
                if not any((d, last.epoch) in intact for d in roster.names(mask)):
                    yield f"no copy of {last.epoch} is left with {roster.names(mask)}"
        for generation, c in bases.items():
            reports = truth.frozen(generation, c.round).values()
            held = [f.report.restored.generation for f in reports if f.report.restored is not None]
            known = [line for line in certified if line.epoch < Epoch(generation, 0)]
            for last in known[-1:] if all(f.want is None for f in reports) else ():
                living = truth.living(last.epoch, max(held, default=0))
                if c.base < last.epoch and living and not truth.beyond(last):
                    yield f"{last.epoch} had converged; generation {generation} resumed {c.base}"


def s5_votes_are_write_once(truth: Truth) -> Iterator[str]:
    """One vote an epoch, one judgement a copy, one ACCEPT and one FREEZE a generation."""
    said: dict[tuple[object, ...], messages.Record] = {}
    for w in truth.journal:
        match w.record:
            case messages.Staged() | messages.Skipped():
                key: tuple[object, ...] = ("vote", w.domain, w.record.epoch)
            case messages.Valid() | messages.Bad():
                key = ("check", w.domain, w.record.generation, w.record.epoch)
            case messages.Accepted() | messages.Frozen():
                key = (type(w.record), w.domain, w.record.generation)
            case _:
                continue
        if key in said:
            yield f"{w.domain} wrote {said[key]} and then {w.record}"
        said[key] = w.record


def s10_stale_is_not_written(truth: Truth) -> Iterator[str]:
    """After FREEZE(g) nothing of an older generation is written, nor of g before it."""
    at: dict[str, tuple[int, str]] = {}
    for w in truth.journal:
        match w.record:
            case messages.Frozen(generation=generation, configuration=digest):
                at[w.domain] = (generation, digest)
            case messages.Configured(configuration=configuration):
                at[w.domain] = (0, configuration.digest())
            case messages.Staged(epoch=epoch) | messages.Skipped(epoch=epoch):
                if at[w.domain][0] != epoch.generation:
                    yield f"{w.domain} voted on {epoch} in generation {at[w.domain][0]}"
            case messages.Valid() | messages.Bad() | messages.Accepted():
                if at[w.domain][0] != w.record.generation:
                    yield f"{w.domain} wrote {w.record} in generation {at[w.domain][0]}"
            case _:
                pass


def s6_certificates_are_of_one_whole(truth: Truth) -> Iterator[str]:
    """A certificate is of one generation, round and configuration, and all members took part."""
    first: dict[int, messages.RestoreCertificate] = {}
    for domain, r in truth.records(messages.Restored):
        c = r.certificate
        if first.setdefault(c.generation, c) != c:
            yield f"{domain} holds another certificate of generation {c.generation}"
        frozen = truth.frozen(c.generation, c.round)
        for member in truth.roster(c.configuration).ids:
            f = frozen.get(member)
            if f is None or f.configuration != c.configuration:
                yield f"generation {c.generation} was restored without {member}"
    for domain, line in truth.published:
        if line.epoch.generation and line.epoch.generation not in first:
            yield f"{domain} published {line.epoch}, of a generation that never began"


def s7_nothing_acts_without_a_certificate(truth: Truth) -> Iterator[str]:
    """What was published or resumed stood in the doer's own journal before."""
    held = {(d, c.certificate) for d, c in truth.records(messages.Converged)}
    begun = {(d, r.certificate) for d, r in truth.records(messages.Restored)}
    yield from (f"{d} published {c.epoch}" for d, c in truth.published if (d, c) not in held)
    yield from (f"{d} resumed {c.base}" for d, c in truth.resumed if (d, c) not in begun)


def s8_release_follows_knowledge(truth: Truth) -> Iterator[str]:
    """Released is what can't be available, or lies below an own, known, retained, sound, living
    converged epoch of the present configuration; never what is pinned or to be kept."""
    member = truth.turn.after if truth.turn else None
    for record in truth.turn.effects.persist if truth.turn else ():
        for epoch in record.epochs if isinstance(record, messages.Released) else ():
            if member and member.roster and (why := _kept(truth, member, member.roster, epoch)):
                yield f"{member.id} released {epoch}: {why}"


def _kept(truth: Truth, member: Member, roster: Roster, epoch: Epoch) -> str:
    """Say why a member may not release an epoch, or nothing."""
    skipped = {(d, v.epoch) for d, v in truth.records(messages.Skipped)}
    # Only members of the configuration that it was saved in could ever have it, whoever came later.
    void = any(
        all((d, epoch) in skipped for d in past.names(sum(tier[s] for tier in past.holders)))
        for past in truth.rosters
        for s in range(len(past.homes))
    )
    if (member.id, epoch) in truth.pinned:
        return "a reader holds it"
    if not member.open:
        return "a recovery is under way"
    line = member.tallies[roster.tier_of[member.me]].line
    if void:
        return ""
    if line is None or line.epoch <= epoch:
        return "nothing above it is known converged"
    judged = truth.bad
    held = [c.epoch for c in member.retained if (member.id, c.epoch) not in judged]
    if line.epoch not in held:
        return f"{line.epoch} is not retained"
    if line.configuration != roster.digest or not truth.living(line.epoch, member.generation):
        return f"{line.epoch} is another configuration's, or an orphan"
    shards = [roster.names(mask) for mask in roster.holders[roster.tier_of[member.me]]]
    if any(all((d, line.epoch) in judged for d in names) for names in shards):
        return f"the tier has lost {line.epoch}"
    worthless = epoch == GENESIS or (member.id, epoch) in judged
    if worthless or not truth.living(epoch, member.generation):
        return ""
    if truth.keep.every is not None and epoch.step % truth.keep.every == 0:
        return "the user keeps it"
    tier = line.tier
    newer = sum(
        epoch < e <= line.epoch and truth.living(e, member.generation) and truth.whole(e, tier)
        for e in held
    )
    return "the user keeps it" if newer < truth.keep.newest and truth.whole(epoch, tier) else ""


def s9_joins_agree(truth: Truth) -> Iterator[str]:
    """Two members of one round never hold facts that differ, whatever reached them, and when."""
    pairs = [(a, b) for a in truth.members for b in truth.members if a.id < b.id]
    for a, b in pairs:
        if (a.generation, a.round) != (b.generation, b.round):
            continue
        if a.open and b.open and a.restored != b.restored:
            yield f"{a.id} and {b.id} resumed generation {a.generation} differently"
        if a.recovery is not None and b.recovery is not None:
            mine = (*a.recovery.reports, *a.recovery.accepted)
            theirs = (*b.recovery.reports, *b.recovery.accepted)
            if any(x and y and x != y for x, y in zip(mine, theirs, strict=True)):
                yield f"{a.id} and {b.id} hold different words of one member"
        held, other = rolled_up(a), rolled_up(b)
        if any(held[key] != other[key] for key in held if key in other):
            yield f"{a.id} and {b.id} hold different votes of the same members"


def s11_nothing_is_mutated_unvalidated(truth: Truth) -> Iterator[str]:
    """A rank resumes only what is VALID in a named copy of every shard, and every rank ACCEPTed."""
    valid = {(d, v.generation, v.epoch) for d, v in truth.records(messages.Valid)}
    accepted = {(d, a.generation, a.epoch, a.copy) for d, a in truth.records(messages.Accepted)}
    for domain, c in dict.fromkeys(truth.resumed):
        roster = truth.roster(c.configuration)
        for home, copy in zip(roster.homes, c.copies, strict=True):
            if (roster.ids[copy], c.generation, c.base) not in valid:
                yield f"{domain} resumed {c.base}: copy {roster.ids[copy]} was not validated"
            if (roster.ids[home], c.generation, c.base, copy) not in accepted:
                yield f"{domain} resumed {c.base}: {roster.ids[home]} did not accept"


def s12_recovery_is_a_function(truth: Truth) -> Iterator[str]:
    """The base is the greatest epoch that the frozen reports and the chain allow: no orphan."""
    judged = {(d, b.generation, b.epoch) for d, b in truth.records(messages.Bad)}
    for generation, c in truth.bases.items():
        frozen, roster = truth.frozen(generation, c.round), truth.roster(c.configuration)
        reports = [f.report for f in frozen.values()]
        top = max((r.restored.generation for r in reports if r.restored), default=0)
        wants = {f.want for f in frozen.values()}
        held = {(d, copy.epoch) for d, f in frozen.items() for copy in f.report.retained}
        good = {(d, e) for d, e in held if (d, generation, e) not in judged}
        if not truth.living(c.base, top):
            yield f"generation {generation} resumed {c.base}, an orphan"
        for epoch in sorted({e for _, e in good if e > c.base}):
            shards = {d.shard for d in roster.configuration.domains if (d.id, epoch) in good}
            wanted = wants == {None} or wants == {epoch.step}
            if len(shards) == len(roster.homes) and wanted and truth.living(epoch, top):
                yield f"generation {generation} resumed {c.base}, and {epoch} was there"
        if wants - {None, c.base.step}:
            yield f"generation {generation} resumed {c.base}, which some did not ask for"


def s13_no_interaction_across_epochs(truth: Truth) -> Iterator[str]:
    """Ranks that act in one generation act from the same epoch, attested by all in one round."""
    first: dict[int, Epoch] = {}
    rounds = {(d, f.generation): f.round for d, f in truth.records(messages.Frozen)}
    for domain, c in truth.resumed:
        if first.setdefault(c.generation, c.base) != c.base:
            yield f"{domain} acts from {c.base}, others from {first[c.generation]}"
        ids = truth.roster(c.configuration).ids
        if len({rounds.get((ids[copy], c.base.generation)) for copy in c.copies}) > 1:
            yield f"{domain} acts from {c.base}, which was attested in two rounds"


def s14_what_is_corrupt_never_counts(truth: Truth) -> Iterator[str]:
    """VALID is said of what was sound when it was read; no certificate names what was BAD, and
    nobody counts on what it has reported lost.
    """
    for name, frozen in truth.records(messages.Frozen):
        both = {c.epoch for c in frozen.report.retained} & {x.epoch for x in frozen.report.lost}
        if both:
            yield f"{name} reports {min(both)} as lost, and as retained"
    sound = {(d, e) for d, e, _ in truth.sound}
    who = truth.turn.after.id if truth.turn else ""
    said = truth.turn.effects.persist if truth.turn else ()
    for record in [r for r in said if isinstance(r, messages.Valid)]:
        if record.epoch != GENESIS and (who, record.epoch) not in sound:
            yield f"{who} called its copy of {record.epoch} valid"
    judged = {(d, b.generation, b.epoch) for d, b in truth.records(messages.Bad)}
    for c in truth.bases.values():
        for copy in c.copies:
            if (truth.roster(c.configuration).ids[copy], c.generation, c.base) in judged:
                yield f"generation {c.generation} took {c.base} from a bad copy"


# --- eventually: judged in the calm after a storm, once what was restored has saved once more ----


def l1_all_learn(truth: Truth) -> Iterator[str]:
    """With fair links and all up, every member knows the same epochs converged."""
    if len({tuple(t.line and t.line.epoch for t in m.tallies) for m in truth.members}) > 1:
        yield "members know different epochs converged"
    for m in truth.members:
        if view(m).blocked_by:
            yield f"{m.id} still waits for {view(m).blocked_by}"


def l2_heals_in_diameter(truth: Truth) -> Iterator[str]:
    """The exchanges needed grow with the diameter (log2 n), not with the length of the storm."""
    if truth.exchanges > 4 * (truth.rosters[-1].size.bit_length() + 2):
        yield f"it took {truth.exchanges} exchanges"


def l2_whoever_is_there_knows_alike(truth: Truth) -> Iterator[str]:
    """With someone away the others still learn all that there is to know of each other."""
    first: dict[tuple[object, ...], Member] = {}
    for m in truth.members:
        other = first.setdefault((m.generation, m.round, m.roster, m.open), m)
        if _learnt(m) != _learnt(other):
            yield f"{m.id} and {other.id} do not know the same votes"


def _learnt(member: Member) -> tuple[object, ...]:
    """Give what is said in this generation; what had converged before, a restore will level."""
    if held := member.recovery:
        return held.reports, held.checks, held.accepted, held.declined
    lines = [t.line and t.line.epoch for t in member.tallies]
    return lines, [[(b.epoch, b.staged, b.skipped) for b in t.ballots] for t in member.tallies]


def l3_no_orphaned_knowledge(truth: Truth) -> Iterator[str]:
    """After restarts every member holds the newest restore certificate; none is stuck between."""
    for m in truth.members:
        if not m.open or m.generation != truth.newest:
            yield f"{m.id} is not in generation {truth.newest}"


def l4_whoever_blocks_is_named(truth: Truth) -> Iterator[str]:
    """With someone away nobody gets on, and all the others name exactly who has not frozen."""
    for m in truth.members:
        here = truth.frozen(m.generation, m.round)
        away = tuple(d for d in m.roster.ids if d not in here) if m.roster else ()
        if away and (m.open or view(m).blocked_by != away):
            yield f"{m.id} names {view(m).blocked_by}; {away} are away"


def l5_traffic_quiesces(truth: Truth) -> Iterator[str]:
    """Once all agree, a tick sends nothing to anybody who is there."""
    here = [m.id for m in truth.members]
    for m in truth.members:
        names = m.roster.names(gossip.restless(m)) if m.roster is not None else ()
        if loud := [name for name in names if name in here]:
            yield f"{m.id} still sends to {loud}"


def l6_storage_is_bounded(truth: Truth) -> Iterator[str]:
    """After progress a domain holds what is to be kept or pinned, the window, and nothing else.

    To be kept is whatever lives and is as new as the last of the ``newest`` that it was itself
    told had converged; between them may lie some that it was not told of.
    """
    for m in truth.members:
        line = m.tallies[m.roster.tier_of[m.me]].line if m.roster is not None else None
        if line is None or not m.open:
            continue
        held = [copy.epoch for copy in m.retained]
        beyond = [e for e in held if e > line.epoch]
        if len(beyond) > m.window + 1:
            yield f"{m.id} retains {beyond} above its line"
        told = {line.epoch}
        told |= {
            c.certificate.epoch for d, c in truth.records(messages.Converged)
            if (d, c.certificate.tier) == (m.id, line.tier)
        }  # fmt: skip
        living = [e for e in held if e != GENESIS and truth.living(e, m.generation)]
        known = sorted(e for e in living if e in told and (m.id, e) not in truth.bad)
        floor = known[-truth.keep.newest] if len(known) >= truth.keep.newest else GENESIS
        for e in held:
            every = truth.keep.every is not None and e.step % truth.keep.every == 0
            wanted = e in living and (every or e >= floor)
            if e < line.epoch and not wanted and (m.id, e) not in truth.pinned:
                yield f"{m.id} still retains {e}"


ALWAYS: Final[tuple[Law, ...]] = (
    s1_attested_is_durable, s2_knowledge_is_sound, s3_something_is_retained_by_all,
    s4_certified_is_not_lost, s5_votes_are_write_once, s6_certificates_are_of_one_whole,
    s10_stale_is_not_written,
    s7_nothing_acts_without_a_certificate, s8_release_follows_knowledge, s9_joins_agree,
    s11_nothing_is_mutated_unvalidated, s12_recovery_is_a_function,
    s13_no_interaction_across_epochs, s14_what_is_corrupt_never_counts, *steps.OF_A_STEP,
)  # fmt: skip
EVENTUALLY: Final[tuple[Law, ...]] = (
    l1_all_learn, l2_heals_in_diameter, l3_no_orphaned_knowledge, l5_traffic_quiesces,
    l6_storage_is_bounded,
)  # fmt: skip
STANDSTILL: Final[tuple[Law, ...]] = (
    l2_whoever_is_there_knows_alike, l4_whoever_blocks_is_named, l5_traffic_quiesces,
)  # fmt: skip


def breaches(truth: Truth, laws: tuple[Law, ...] = ALWAYS) -> tuple[str, ...]:
    """List what breaks the laws, each with the name of the law: none, one hopes."""
    return tuple(f"{law.__name__}: {words}" for law in laws for words in law(truth))
