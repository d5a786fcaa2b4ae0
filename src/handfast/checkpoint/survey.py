"""A run as its journals and manifests show it, read without claiming or changing anything.

A reader needs no agent: every record is a fact that holds for ever, so joining the journals of all
domains gives what a restore would learn from their reports. Members are booted from their records
exactly as an agent boots them; the difference is only that nobody speaks for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from handfast.core import converge, recover
from handfast.core.fold import boot
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Domain, Roster
from handfast.core.messages import (
    Accepted,
    Bad,
    Converged,
    Copy,
    Frozen,
    Lost,
    Record,
    Released,
    Report,
    Skipped,
    Staged,
    Valid,
    decode_record,
)
from handfast.core.state import Member
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, FormatError, Refused
from handfast.store.claims import Identity, incarnations
from handfast.store.files import Files, reading
from handfast.store.journal import LOST
from handfast.store.pins import Pin, pins
from handfast.store.port import Entry
from handfast.store.shelf import Shelf

__all__ = ["TOGETHER", "Found", "Survey", "read_domain"]

TOGETHER: Final = "put the directories of one of the copies together again"

_NO_REPORT: Final = Report((), (), None, ())


class Found(msgspec.Struct, frozen=True):
    """One domain's directory as it was found.

    ``problem`` says why it can't be read and ``verdict`` of what kind that is; then ``member`` is
    None. ``votes`` are its own, ``certified`` the epochs whose certificates its journal holds.
    ``going`` are epochs that it retained at the moment of the look and has released since, so that
    their manifests need not be there any more.
    """

    root: str
    name: str
    identity: Identity | None = None
    incarnation: int = 0
    member: Member | None = None
    records: tuple[Record, ...] = ()
    entries: dict[Epoch, Entry] = {}
    going: frozenset[Epoch] = frozenset()
    pins: tuple[Pin, ...] = ()
    verdict: Verdict | None = None
    problem: str = ""
    other_format: bool = False

    @property
    def id(self) -> str:
        """The domain's identity, or the name of its directory where that can't be read."""
        return self.identity.id if self.identity is not None else self.name

    @property
    def votes(self) -> dict[Epoch, Staged | Skipped]:
        """The domain's own votes by epoch."""
        return {r.epoch: r for r in self.records if isinstance(r, Staged | Skipped)}

    @property
    def released(self) -> set[Epoch]:
        """Every epoch that the domain has let go."""
        return _released(self.records)

    @property
    def retained(self) -> dict[Epoch, str]:
        """The attested digest of every copy that the journal retains and that was not lost."""
        return {c.epoch: c.digest for c in self.member.retained} if self.member else {}

    @property
    def certified(self) -> set[Epoch]:
        """The epochs that the domain's journal proves converged."""
        known = {r.certificate.epoch for r in self.records if isinstance(r, Converged)}
        lines = (tally.line for tally in self.member.tallies) if self.member else ()
        return known | {line.epoch for line in lines if line is not None}


def read_domain(files: Files, root: str, name: str, then: Mapping[int, int] | None = None) -> Found:
    """Read one domain: its identity, its journals, its manifests, its pins.

    ``then`` are the lengths of its journals at the moment that is looked at; without them it is
    read as it is now. What is damaged or foreign is said in the result; raises HandfastError only
    where the system won't let us look (permissions, say).
    """
    identity = None
    try:
        shelf = Shelf(files, root, name)
        identity = shelf.identity
        records, member, entries, going = _boot(shelf, then)
        with reading(shelf.path):
            incarnation = max(incarnations(files, shelf.path), default=0)
        held = pins(files, root, name)
    except Refused as error:
        return Found(root, name, identity, verdict=error.verdict, problem=str(error))
    except FormatError as error:
        damaged = isinstance(error, Damaged)
        verdict = Verdict.CORRUPT if damaged else Verdict.FOREIGN
        return Found(
            root, name, identity, verdict=verdict, problem=str(error), other_format=not damaged
        )
    return Found(root, name, identity, incarnation, member, records, entries, going, held)


def _boot(
    shelf: Shelf, then: Mapping[int, int] | None
) -> tuple[tuple[Record, ...], Member, dict[Epoch, Entry], frozenset[Epoch]]:
    """Boot a member from its journals as they were, and hold that against the manifests there are.

    A live domain journals a release and then removes files. So a manifest that is missing is lost
    only where the journals, read again after the manifests, have not released its epoch.
    """
    records = _decode(shelf, shelf.records(then))
    member = _booted(shelf, records)
    entries = shelf.manifests()
    lost = _lost(shelf, member, entries)
    going: frozenset[Epoch] = frozenset()
    if lost:
        now = _released(_decode(shelf, shelf.records()))
        going = frozenset(item.epoch for item in lost if item.epoch in now)
        lost = [item for item in lost if item.epoch not in now]
    if lost:
        member = boot(shelf.identity.id, 0, records, lost)
    return records, member, entries, going


def _released(records: Iterable[Record]) -> set[Epoch]:
    return {epoch for r in records if isinstance(r, Released) for epoch in r.epochs}


def _decode(shelf: Shelf, raw: tuple[bytes, ...]) -> tuple[Record, ...]:
    try:
        return tuple(decode_record(data) for data in raw)
    except msgspec.MsgspecError as error:
        raise FormatError(
            f"{shelf.path}: a record of the journal is not known to this handfast: {error}. "
            "What to do: use the release of handfast that wrote it, or a later one"
        ) from error


def _booted(shelf: Shelf, records: tuple[Record, ...]) -> Member:
    try:
        return boot(shelf.identity.id, 0, records)
    except (ValueError, LookupError, converge.Conflict) as error:
        raise Damaged(
            f"{shelf.path}: its journal contradicts itself: {error}. What to do: {LOST}"
        ) from error


def _lost(shelf: Shelf, member: Member, entries: dict[Epoch, Entry]) -> list[Lost]:
    """Hold what the journal says is retained against the files that are there, unread."""
    lost = []
    for copy in member.retained:
        entry = entries.get(copy.epoch)
        if copy.epoch == GENESIS:
            continue
        if entry is None:
            lost.append(Lost(copy.epoch, "its manifest is missing"))
        elif entry.digest != copy.digest or entry.manifest is None:
            lost.append(
                Lost(copy.epoch, entry.problem or f"{entry.path}: not the manifest attested")
            )
        elif problem := shelf.lacks(entry.manifest):
            lost.append(Lost(copy.epoch, problem))
    return lost


class Survey:
    """All domains of a run, joined, as they were at one moment.

    Only then does what they hold fit together: what one domain has released, another that was read
    earlier would still lack the successor of.

    ``places`` has what was found of each domain of the configuration, in its order (None: not at
    the paths given); ``strangers`` what is there and belongs to another run or configuration.
    ``line`` is the epoch that a restore would take, unless its bytes turn out to be damaged:
    GENESIS where nothing was ever saved, None where a restore would refuse. ``converged`` is the
    highest epoch on the living timeline that some journal proves converged. ``rifts`` show that
    the domains are of copies of the run that went on apart. ``unfit`` says what else would keep a
    launch from being recorded.

    Raises FormatError where no domain is of a format that this handfast reads, and Refused where
    the domains are of several runs, none of which has more of them.
    """

    def __init__(self, found: Sequence[Found], unfit: Sequence[str] = ()) -> None:
        if found and all(item.other_format for item in found):
            raise FormatError(found[0].problem)
        self.found = tuple(found)
        self.unfit = tuple(unfit)
        self.run = _run_of(found)
        _refuse_twins(found)
        ours = [f for f in found if _of(f, self.run)]
        self.generation = max((f.member.generation for f in ours if f.member), default=0)
        self.roster = _newest_roster(ours)
        self.places: tuple[Found | None, ...] = ()
        if self.roster is not None:
            self.places = tuple(_place(d, found) for d in self.roster.configuration.domains)
        placed = [f for f in self.places if f is not None]
        self.strangers = tuple(f for f in found if f not in placed and not _empty(f, self.run))
        self.reports = tuple(_report(f) for f in self.places)
        self.timeline = recover.timeline_of(self.reports)
        self.rifts = recover.apart(self.roster, self.reports) if self.roster is not None else ()
        self.candidates: tuple[Epoch, ...] = ()
        if self.roster is not None and not self.absent:
            self.candidates = recover.candidates(self.roster, self.reports, None)
        self.line = next(iter(self.candidates), None)
        self.converged = self._converged()

    @property
    def domains(self) -> tuple[Domain, ...]:
        """The domains of the configuration."""
        return self.roster.configuration.domains if self.roster is not None else ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Name the domains of the configuration that are not at the paths given."""
        return tuple(d.id for d, f in zip(self.domains, self.places, strict=True) if f is None)

    @property
    def absent(self) -> tuple[str, ...]:
        """Name the domains that can't take part in a restore: missing, or not readable."""
        return tuple(
            d.id
            for d, f in zip(self.domains, self.places, strict=True)
            if f is None or f.member is None
        )

    def certified(self, epoch: Epoch) -> bool:
        """Say whether some journal holds the proof that this epoch has converged."""
        return any(epoch in f.certified for f in self.places if f is not None)

    def eligible(self, epoch: Epoch) -> bool:
        """Say whether an epoch lies on the living timeline; if not, it is an orphan."""
        return recover.eligible(epoch, self.timeline)

    @property
    def fallen(self) -> Epoch | None:
        """Give the converged epoch if a restore would take an older one, or none, though all of
        the domains are here: a copy of that is lost, or a journal has forgotten it.
        """
        if self.absent or self.rifts or self.converged is None or self.roster is None:
            return None
        return self.converged if (self.line or GENESIS) < self.converged else None

    def _converged(self) -> Epoch | None:
        known = {e for f in self.places if f is not None for e in f.certified}
        return max((e for e in known if e != GENESIS and self.eligible(e)), default=None)

    def recovery(self) -> recover.Recovery:
        """Open the recovery that the next generation would run, every report held.

        Raises ValueError where there is no configuration yet.
        """
        if self.roster is None:
            raise ValueError("a run without a configuration has nothing to recover")
        generation = self.generation + 1
        held = recover.begin(self.roster, generation)
        for place, found in enumerate(self.places):
            if found is not None and found.member is not None:
                report, digest = self.reports[place], self.roster.digest
                held = recover.join(held, Frozen(place, 0, generation, "", digest, report))
        return held

    def waiting(self) -> tuple[str, tuple[str, ...]]:
        """Name the phase that the newest generation is in, and whose word is awaited.

        From the journals of all domains at once: a running agent may know less than this, never
        more.
        """
        roster = self.roster
        if roster is None or self.generation == 0:
            return "idle", ()
        if self.absent:
            return "missing", self.absent
        members = [f.member for f in self.places if f is not None and f.member is not None]
        here = [m for m in members if m.generation == self.generation]
        if not any(m.open for m in here):
            return self._recovering(roster)
        late = sum(1 << i for i, m in enumerate(members) if m not in here or not m.open)
        if late:
            return "restoring", roster.names(late)
        for tier in range(len(roster.tiers)):
            tally = self._tally(roster, tier)
            for ballot in tally.ballots:
                late |= converge.awaited(roster, tier, tally, ballot)
        return ("converging" if late else "converged"), roster.names(late)

    def _recovering(self, roster: Roster) -> tuple[str, tuple[str, ...]]:
        """Join what every journal says of the newest generation's recovery."""
        held = recover.begin(roster, self.generation)
        for record in self._records():
            if (
                isinstance(record, Frozen | Valid | Bad | Accepted)
                and record.generation == self.generation
            ):
                held = recover.join(held, record)
        at = recover.standing(roster, held)
        return at.phase.value, roster.names(at.waiting)

    def _tally(self, roster: Roster, tier: int) -> converge.Tally:
        """Join the votes of the newest generation above the converged line."""
        tally = converge.Tally()
        floor = max(self.converged or GENESIS, Epoch(self.generation, 0))
        for record in self._records():
            if (
                isinstance(record, Staged | Skipped)
                and record.epoch > floor
                and roster.tier_of[record.domain] == tier
            ):
                tally = converge.join(roster, tally, record)
        return tally

    def _records(self) -> Iterable[Record]:
        return (record for f in self.places if f is not None for record in f.records)


def _of(found: Found, run: str) -> bool:
    return found.identity is not None and found.identity.run == run


def _empty(found: Found, run: str) -> bool:
    """A domain of this run that never took part: its launch was cut short."""
    return _of(found, run) and found.member is not None and found.member.roster is None


def _run_of(found: Sequence[Found]) -> str:
    """The run that most domains belong to."""
    counts = Counter(f.identity.run for f in found if f.identity is not None).most_common(2)
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        raise Refused(
            f"the paths hold domains of several runs: {counts[0][0]} and {counts[1][0]}",
            verdict=Verdict.FOREIGN,
            shards=[f"{f.root}: {f.id}" for f in found],
            remedy="give the paths of one run only",
        )
    return counts[0][0] if counts else ""


def _refuse_twins(found: Sequence[Found]) -> None:
    counts = Counter(f.identity.id for f in found if f.identity is not None)
    twins = [f"{f.root}: {f.id}" for f in found if counts[f.id] > 1]
    if twins:
        raise Refused(
            "a domain was found at two places, and they may differ",
            verdict=Verdict.MIXED,
            shards=twins,
            remedy="give the path of one of them only, and keep copies of a run elsewhere",
        )


def _newest_roster(ours: Sequence[Found]) -> Roster | None:
    members = [f.member for f in ours if f.member is not None and f.member.roster is not None]
    newest = max(members, key=lambda member: member.generation, default=None)
    return newest.roster if newest is not None else None


def _place(domain: Domain, found: Sequence[Found]) -> Found | None:
    """Find a configured domain; one whose identity can't be read goes by its directory's name.

    An identity is the name and 16 random hexadecimal characters.
    """
    known = [f for f in found if f.identity is not None and f.identity.id == domain.id]
    nameless = [f for f in found if f.identity is None and f.name == domain.id[:-17]]
    return next(iter(known or nameless), None)


def _report(found: Found | None) -> Report:
    """What the member would say if it froze now."""
    member = found.member if found is not None else None
    if member is None:
        return _NO_REPORT
    if member.roster is None:  # the others have begun: it is about to, and founds the run with them
        return Report((Copy(GENESIS, ""),), (), None, ())
    lines = tuple(tally.line for tally in member.tallies if tally.line is not None)
    return Report(member.retained, member.lost, member.restored, lines)
