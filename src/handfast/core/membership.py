"""Who takes part: domains, configurations, rounds and generations.

A configuration says which domains must hold which shard, and how many of them have to. Excluding
a member is consensus, so nothing here decides it: a :class:`Change` is recorded by an engine that
has consensus, or by an operator, and takes effect only with a new round (the design, section 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import msgspec

from handfast.core.overlay import FANOUT, Tree
from handfast.core.verdict import Verdict

__all__ = [
    "Change",
    "Configuration",
    "Domain",
    "Entrant",
    "Formation",
    "Refusal",
    "Roster",
    "RoundRecord",
    "allocate",
    "form",
    "succession",
]

_COMPLETE_GRAPH_UP_TO: Final = 9


class Domain(msgspec.Struct, frozen=True, array_like=True):
    """Something that persists and fails on its own, and holds one shard.

    ``host`` names the failure domain that it shares with others.
    """

    id: str
    tier: str
    shard: int
    host: str = ""


class Configuration(msgspec.Struct, frozen=True, array_like=True):
    """Tiers, domains and how many domains of a tier must hold each shard.

    ``need`` pairs every tier with k_T; the order of ``domains`` is the order of every mask, vector
    and Merkle tree. ``fanout`` is that of the tree, see :class:`Roster`: 0 leaves it to the size,
    1 wants no tree.
    """

    run: str
    shards: int
    domains: tuple[Domain, ...]
    need: tuple[tuple[str, int], ...]
    fanout: int = 0

    def content(self) -> tuple[object, ...]:
        """List the fields as they are journaled and hashed.

        What the format did not have from the first is left out where it says nothing: so what an
        earlier release wrote has the same bytes, and the same name, in this one.
        """
        fields = (self.run, self.shards, self.domains, self.need, self.fanout)
        return fields if self.fanout else fields[:-1]

    def digest(self) -> str:
        """Name this configuration by its content: 32 hexadecimal characters."""
        return hashlib.blake2b(msgspec.msgpack.encode(self.content()), digest_size=16).hexdigest()


class Change(msgspec.Struct, frozen=True, array_like=True):
    """An engine's record: configuration ``old`` gives way to ``new``; ``fenced`` may never act."""

    old: str
    new: str
    fenced: tuple[str, ...]


class Roster:
    """A configuration with what follows from it worked out once. Equal where the digests are.

    A mask is an int with bit i set for ``configuration.domains[i]``. ``copies[t][s]`` lists the
    domains of tier t that hold shard s, P_T(s) in the design; ``holders[t][s]`` is their mask, and
    ``members[t]`` lists all of tier t. ``homes[s]`` is the rank's own voice: the first domain of
    its shard. ``neighbours[i]`` is whom member i talks to.

    ``tree`` is there where it can be, which is where every domain's vote is needed (k_T is all of
    P_T(s)) and each tier is one piece of the order; and where it is worth it, which is in a job
    that is not small. Else it is None, and all is gossip.
    """

    def __init__(self, configuration: Configuration) -> None:
        domains = configuration.domains
        self.configuration = configuration
        self.digest = configuration.digest()
        self.size = len(domains)
        self.everyone = (1 << self.size) - 1
        self.ids = tuple(domain.id for domain in domains)
        self.tiers = tuple(tier for tier, _ in configuration.need)
        self.needs = tuple(need for _, need in configuration.need)
        self.tier_of = tuple(self.tiers.index(domain.tier) for domain in domains)
        held: list[list[list[int]]] = [
            [[] for _ in range(configuration.shards)] for _ in self.tiers
        ]
        homes = [-1] * configuration.shards
        for i, (domain, tier) in enumerate(zip(domains, self.tier_of, strict=True)):
            if not 0 <= domain.shard < configuration.shards:
                raise ValueError(
                    f"domain {domain.id} is of shard {domain.shard}, which is not there"
                )
            held[tier][domain.shard].append(i)
            if homes[domain.shard] < 0:
                homes[domain.shard] = i
        self.copies = tuple(tuple(map(tuple, shards)) for shards in held)
        self.members = tuple(tuple(sorted(i for s in shards for i in s)) for shards in held)
        self.homes = tuple(homes)
        self._check()
        self._holders: tuple[tuple[int, ...], ...] = ()
        self.tree = _tree(self)
        self.neighbours = _Neighbours(self)

    @property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """Mask, for each tier and shard, the domains that hold it; worked out when asked for."""
        if not self._holders:
            copies = self.copies
            self._holders = tuple(tuple(sum(1 << i for i in s) for s in tier) for tier in copies)
        return self._holders

    def _check(self) -> None:
        if len(set(self.ids)) != self.size:
            raise ValueError("a configuration names one domain twice")
        for tier, need, shards in zip(self.tiers, self.needs, self.copies, strict=True):
            short = [s for s, held in enumerate(shards) if len(held) < need]
            if need < 1 or short:
                raise ValueError(
                    f"tier {tier!r} needs {need} domains a shard; shards {short} have fewer"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roster) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Roster({self.digest[:8]}: {', '.join(self.ids)})"

    def names(self, mask: int) -> tuple[str, ...]:
        """Name the domains of a mask, in configuration order."""
        return tuple(self.ids[i] for i in bits(mask))

    def index(self, domain_id: str) -> int | None:
        """Find a domain's place, or None where it is not a member."""
        return self.ids.index(domain_id) if domain_id in self.ids else None


def bits(mask: int) -> tuple[int, ...]:
    """List the set bits of a mask, lowest first."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return tuple(found)


def _tree(roster: Roster) -> Tree | None:
    fanout = roster.configuration.fanout
    if fanout == 1 or (not fanout and roster.size <= _COMPLETE_GRAPH_UP_TO):
        return None
    spans = []
    for need, shards in zip(roster.needs, roster.copies, strict=True):
        places = sorted(i for held in shards for i in held)
        first, end = places[0], places[-1] + 1
        if not len(places) == need * len(shards) == end - first:
            return None
        spans.append((first, end))
    return Tree(tuple(sorted(spans)), fanout or FANOUT)


class _Neighbours(dict[int, tuple[int, ...]]):
    """Whom each member talks to, worked out for whoever is asked for.

    That is everyone in a small job, else i +- 2^k round the ring, and those next to it in the tree
    if there is one. The ring with chords has degree 2 log2 n and diameter at most log2 n, needs no
    coordination to build, and stays connected when any log2 n members are away.
    """

    def __init__(self, roster: Roster) -> None:
        super().__init__()
        self._size, self._tree = roster.size, roster.tree

    def __missing__(self, me: int) -> tuple[int, ...]:
        size, tree = self._size, self._tree
        near = set(tree.next_to(me)) if tree is not None else set()
        if size <= _COMPLETE_GRAPH_UP_TO:
            near.update(range(size))
        else:
            reach = [1 << k for k in range((size // 2).bit_length())]
            near.update((me + d) % size for d in (*reach, *(-d for d in reach)))
        self[me] = tuple(sorted(near - {me}))
        return self[me]


def succession(
    current: Configuration | None, proposed: Configuration, changes: Sequence[Change]
) -> str | None:
    """Say why ``proposed`` may not follow ``current``; None where it may.

    A configuration follows itself, a member that has none yet, or another by a chain of recorded
    changes (the design, section 2: CHANGE takes effect only with a new round).
    """
    if current is None:
        return None
    at, goal = current.digest(), proposed.digest()
    if current.run != proposed.run:
        return f"run {proposed.run} is not this domain's run {current.run}"
    for change in changes:
        if at != goal and change.old == at:
            at = change.new
    if at != goal:
        return f"configuration {goal[:8]} does not follow {at[:8]}: no engine recorded the change"
    return None


class RoundRecord(msgspec.Struct, frozen=True, array_like=True):
    """The one record that an engine's store keeps by compare-and-set: who holds the counter."""

    round: str
    generation: int
    past: tuple[str, ...] = ()


def allocate(record: RoundRecord | None, round_: str, reported: int) -> RoundRecord | None:
    """Give a round its generation: one more than any that the store or a member has seen.

    ``reported`` is the greatest generation that any member reports. Asking again gives the same
    answer. None: a later round is recorded, so this one is superseded (the design, section 2).
    """
    if record is None:
        return RoundRecord(round_, reported + 1)
    if record.round == round_:
        return record
    if round_ in record.past:
        return None
    past = (*record.past, record.round)[-64:]
    return RoundRecord(round_, max(record.generation, reported) + 1, past)


class Entrant(msgspec.Struct, frozen=True, array_like=True):
    """What one domain brings to a round: who it is, and the configuration that it knows."""

    domain: Domain
    known: Configuration | None
    generation: int


class Formation(msgspec.Struct, frozen=True):
    """The configuration of a round.

    ``founding``: it is the run's first one, so whoever takes it now for the first time holds
    genesis, in this round or in a later one if the first start was cut short.
    """

    configuration: Configuration
    founding: bool


class Refusal(msgspec.Struct, frozen=True):
    """Why a round can't be formed, which shards are to blame, and what can be done."""

    verdict: Verdict
    message: str
    shards: tuple[str, ...]
    remedy: str


def form(
    entrants: Sequence[Entrant],
    *,
    shards: int,
    need: tuple[tuple[str, int], ...],
    run: str,
    changes: Sequence[Change] = (),
) -> Formation | Refusal:
    """Decide, from what all domains bring, under which configuration a round begins.

    A pure function of its arguments, so every rank that sees the same entrants decides alike.
    ``run`` names the run if this founds it. A domain that knows nothing may found with others, or
    take the place that a known configuration holds for its very identity; an empty disk is a new
    identity, and a lost run is MISSING, never a start from scratch (the design, section 5).
    """
    known = {e.known.digest(): e.known for e in entrants if e.known is not None}
    domains = tuple(
        e.domain for e in sorted(entrants, key=lambda e: (e.domain.tier, e.domain.shard))
    )
    proposed = Configuration(run, shards, domains, need)
    if not known:
        return Formation(proposed, founding=True)
    latest = _latest(tuple(known.values()), changes)
    if latest is None:
        by_run = {c.run for c in known.values()}
        word = "several runs" if len(by_run) > 1 else "several configurations of one run"
        return Refusal(
            Verdict.FOREIGN,
            f"the domains belong to {word}",
            tuple(f"{e.domain.id}: {e.known.run if e.known else 'empty'}" for e in entrants),
            "give every rank the directory that it had; see `handfast status` for each",
        )
    return _fits(latest, entrants, shards, changes)


def _latest(known: Sequence[Configuration], changes: Sequence[Change]) -> Configuration | None:
    """Find the one configuration that follows all the others, if there is one."""
    for candidate in known:
        if all(succession(other, candidate, changes) is None for other in known):
            return candidate
    return None


def _fits(
    latest: Configuration, entrants: Sequence[Entrant], shards: int, changes: Sequence[Change]
) -> Formation | Refusal:
    if shards != latest.shards:
        return Refusal(
            Verdict.FOREIGN,
            f"the run has {latest.shards} shards, this job has {shards} ranks",
            (),
            f"start {latest.shards} ranks, or export the run and begin a new one",
        )
    places = {domain.id: domain for domain in latest.domains}
    strangers = [e for e in entrants if e.domain.id not in places]
    present = {e.domain.id for e in entrants}
    absent = tuple(d.id for d in latest.domains if d.id not in present)
    if strangers or absent:
        brought = tuple(f"{e.domain.id}: not of this run" for e in strangers)
        return Refusal(
            Verdict.MISSING,
            f"the run {latest.run} exists, but not all of its domains are here",
            (*(f"{name}: absent" for name in absent), *brought),
            "bring the missing directory back, or give every rank a fresh path to begin anew",
        )
    moved = [e.domain for e in entrants if places[e.domain.id].shard != e.domain.shard]
    if moved:
        return Refusal(
            Verdict.MIXED,
            "directories have changed ranks",
            tuple(f"{d.id}: shard {places[d.id].shard}, brought by rank {d.shard}" for d in moved),
            "start each rank on the directory of its own shard",
        )
    return Formation(latest, founding=latest.digest() not in [change.new for change in changes])
