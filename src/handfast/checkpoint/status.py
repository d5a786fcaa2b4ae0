"""What can be said of a run at a glance: epochs, domains, verdicts; plain values throughout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from enum import StrEnum
from typing import Final

import msgspec

from handfast.checkpoint.agents import AgentView
from handfast.checkpoint.brought import LEAVE
from handfast.checkpoint.survey import TOGETHER, Found, Survey
from handfast.core.lattice import GENESIS, Epoch, Skew, skew
from handfast.core.membership import Domain
from handfast.core.messages import Skipped
from handfast.core.verdict import Verdict
from handfast.store import provenance
from handfast.store.files import reading

__all__ = ["Cell", "DomainRow", "EpochRow", "Mark", "PinRow", "SkipRow", "Status", "Trouble",
    "apart", "rows", "status", "troubles"]  # fmt: skip

DAMAGE: Final = (Verdict.CORRUPT, Verdict.MIXED, Verdict.FOREIGN, Verdict.MISSING)


class Mark(StrEnum):
    """How far one domain is with one epoch."""

    CERTIFIED = "certified"  # retained, and its journal holds the proof that the epoch converged
    ATTESTED = "attested"  # retained: the domain's vote is durable
    SKIPPED = "skipped"  # the domain voted that it has none
    RELEASED = "released"  # the domain had it and let it go
    UNFINISHED = "unfinished"  # written, never voted for: it counts for nothing
    DAMAGED = "damaged"  # attested, and not there as it was attested
    ABSENT = "absent"  # nothing is there, nothing was said


class Cell(msgspec.Struct, frozen=True):
    """One epoch in one domain. ``verdict`` is None where the domain holds nothing of it."""

    mark: Mark
    verdict: Verdict | None = None
    problem: str = ""
    nbytes: int = 0


class EpochRow(msgspec.Struct, frozen=True):
    """One epoch of the job.

    ``verdict`` is None for an epoch that is being released. ``certified``: some journal proves that
    it converged. ``orphan``: it lies on an abandoned timeline, and no restore will ever take it.
    """

    epoch: Epoch
    verdict: Verdict | None
    certified: bool
    orphan: bool
    cells: dict[str, Cell]


class SkipRow(msgspec.Struct, frozen=True):
    """A domain's vote SKIP that its journal still has: this epoch never converged, nor will it."""

    epoch: Epoch
    domain: str
    reason: str


class PinRow(msgspec.Struct, frozen=True):
    """A reader's hold on an epoch. ``host`` is empty where the pin can't be read."""

    epoch: Epoch
    path: str
    pid: int
    host: str
    purpose: str


class DomainRow(msgspec.Struct, frozen=True):
    """One domain: where it is, what it holds, and what is wrong with it.

    ``newest`` is the greatest epoch of the living timeline that it retains; ``nbytes`` is what its
    directory takes on the disk.
    """

    id: str
    shard: int
    tier: str
    host: str
    path: str
    verdict: Verdict
    problem: str
    incarnation: int
    generation: int
    newest: Epoch | None
    retained: tuple[Epoch, ...]
    pins: tuple[PinRow, ...]
    nbytes: int


class Trouble(msgspec.Struct, frozen=True):
    """Something that is not as it was attested; ``epoch`` is None where it is a whole domain.

    ``domain`` is empty where it would keep the whole run from being started, or is no domain's own.
    """

    domain: str
    shard: int | None
    verdict: Verdict
    problem: str
    epoch: Epoch | None = None


class Status(msgspec.Struct, frozen=True):
    """A run at a glance.

    ``line`` is what a restore would take (GENESIS: nothing was saved yet; None: it would refuse),
    ``certified`` whether that is proved converged. ``timeline`` pairs each generation, the newest
    first, with the epoch that it resumed from. ``skew`` is over the newest epoch of each domain.
    ``phase`` and ``blocked_by`` are a live agent's word where there is one, else the journals'.
    ``skips`` begin with the newest epoch.
    """

    run: str
    configuration: str
    generation: int
    timeline: tuple[tuple[int, Epoch], ...]
    line: Epoch | None
    certified: bool
    converged: Epoch | None
    skew: Skew | None
    phase: str
    blocked_by: tuple[str, ...]
    domains: tuple[DomainRow, ...]
    epochs: tuple[EpochRow, ...]
    troubles: tuple[Trouble, ...]
    skips: tuple[SkipRow, ...]
    agents: tuple[AgentView, ...]
    nbytes: int

    @property
    def sound(self) -> bool:
        """Whether everything that was attested is there, and a restore would find an epoch.

        Manifests only: ``Run.verify`` reads the bytes.
        """
        return not self.troubles and (self.line is not None or not self.configuration)


def status(survey: Survey, agents: Iterable[AgentView] = ()) -> Status:
    """Put a survey, and what live agents say, into plain values."""
    alive = tuple(agents)
    phase, by = survey.waiting()
    newest = max(alive, key=lambda agent: agent.generation, default=None)
    if newest is not None and newest.generation >= survey.generation:
        phase, by = newest.phase, newest.blocked_by
    domains = tuple(
        _domain(survey, domain, found)
        for domain, found in zip(survey.domains, survey.places, strict=True)
    )
    vector = [row.newest for row in domains if row.newest is not None]
    return Status(
        run=survey.run,
        configuration=survey.roster.digest if survey.roster is not None else "",
        generation=survey.generation,
        timeline=tuple((branch.generation, branch.base) for branch in survey.timeline),
        line=survey.line,
        certified=survey.line is not None and survey.certified(survey.line),
        converged=survey.converged,
        skew=skew(vector, one_timeline=all(map(survey.eligible, vector))) if vector else None,
        phase=phase,
        blocked_by=by,
        domains=domains,
        epochs=rows(survey),
        troubles=troubles(survey),
        skips=_skips(survey),
        agents=alive,
        nbytes=sum(row.nbytes for row in domains),
    )


def _skips(survey: Survey) -> tuple[SkipRow, ...]:
    """List the votes SKIP of the domains that can be read."""
    said = [
        SkipRow(epoch, found.id, vote.reason)
        for found in survey.places
        if found is not None and found.member is not None
        for epoch, vote in found.votes.items()
        if isinstance(vote, Skipped)
    ]
    return tuple(sorted(said, key=lambda skip: (skip.epoch, skip.domain), reverse=True))


def rows(survey: Survey) -> tuple[EpochRow, ...]:
    """Judge every epoch that some domain holds something of, newest first."""
    known = {GENESIS}
    for found in survey.places:
        if found is not None and found.member is not None:
            known |= found.entries.keys() | found.retained.keys()
            known |= {lost.epoch for lost in found.member.lost}
    voices = [_Voice(survey, found) for found in survey.places]
    made = []
    for epoch in sorted(known - {GENESIS}, reverse=True):
        cells = [voice.cell(epoch) for voice in voices]
        names = (domain.id for domain in survey.domains)
        made.append(
            EpochRow(
                epoch,
                _judge(survey, epoch, cells),
                survey.certified(epoch),
                not survey.eligible(epoch),
                dict(zip(names, cells, strict=True)),
            )
        )
    return tuple(made)


class _Voice:
    """One domain's words, looked up once for all epochs."""

    def __init__(self, survey: Survey, found: Found | None) -> None:
        self.survey = survey
        self.found = found
        if found is not None and found.member is not None:
            self.retained = found.retained
            self.lost = {lost.epoch: lost.reason for lost in found.member.lost}
            self.certified = found.certified
            self.votes = found.votes
            self.released = found.released

    def cell(self, epoch: Epoch) -> Cell:
        """Say what this domain has of an epoch."""
        found = self.found
        if found is None:
            return Cell(Mark.ABSENT, Verdict.MISSING, "the domain is not at the paths given")
        if found.member is None:
            return Cell(Mark.DAMAGED, found.verdict, found.problem)
        entry = found.entries.get(epoch)
        if epoch in self.lost:
            verdict = Verdict.MISSING if entry is None else entry.verdict or Verdict.CORRUPT
            return Cell(Mark.DAMAGED, verdict, self.lost[epoch])
        nbytes = entry.manifest.image_bytes if entry is not None and entry.manifest else 0
        if epoch in self.retained:
            mark = Mark.CERTIFIED if epoch in self.certified else Mark.ATTESTED
            converged = self.survey.converged
            ahead = mark is Mark.ATTESTED and (converged is None or epoch > converged)
            return Cell(mark, Verdict.AHEAD if ahead else Verdict.COMPLETE, "", nbytes)
        vote = self.votes.get(epoch)
        if isinstance(vote, Skipped):
            return Cell(Mark.SKIPPED, None, vote.reason)
        if epoch in self.released:
            return Cell(Mark.RELEASED)
        if entry is not None:
            return Cell(Mark.UNFINISHED, Verdict.TORN, "it was never attested", nbytes)
        return Cell(Mark.ABSENT)


def _judge(survey: Survey, epoch: Epoch, cells: list[Cell]) -> Verdict | None:
    """Join the cells of an epoch into one verdict."""
    holding = (Mark.CERTIFIED, Mark.ATTESTED)
    held: dict[int, bool] = {}
    for domain, cell in zip(survey.domains, cells, strict=True):
        held[domain.shard] = held.get(domain.shard, False) or cell.mark in holding
    if held and all(held.values()):
        mixed = any(epoch.generation >= rift.generation for rift in survey.rifts)
        return Verdict.MIXED if mixed or apart(survey, epoch) else Verdict.COMPLETE
    lacking = [
        cell for domain, cell in zip(survey.domains, cells, strict=True) if not held[domain.shard]
    ]
    for verdict in DAMAGE:
        if any(cell.verdict is verdict for cell in lacking):
            return verdict
    if all(cell.mark is Mark.RELEASED for cell in lacking):
        return None
    converged = survey.converged
    pending = all(cell.mark in (Mark.ABSENT, Mark.UNFINISHED) for cell in lacking)
    newest = epoch.generation == survey.generation and (converged is None or epoch > converged)
    return Verdict.AHEAD if pending and newest else Verdict.TORN


def apart(survey: Survey, epoch: Epoch) -> list[str]:
    """Spell out what the ranks of an epoch had loaded from different epochs, if they had."""
    entries = (place.entries.get(epoch) for place in survey.places if place is not None)
    stamps = [entry.manifest.stamp for entry in entries if entry is not None and entry.manifest]
    if len({(stamp.lineage, stamp.forks, stamp.came) for stamp in stamps}) < 2:
        return []
    said = {stamp.shard: provenance.found(stamp) for stamp in stamps}
    shards = range(max(said, default=-1) + 1)
    return provenance.spell_mixed([said.get(shard, provenance.NOTHING) for shard in shards])


def troubles(survey: Survey) -> tuple[Trouble, ...]:
    """List whatever is not as it was attested, as far as journals and manifests show it."""
    listed = []
    for domain, found in zip(survey.domains, survey.places, strict=True):
        if found is None:
            listed.append(Trouble(domain.id, domain.shard, Verdict.MISSING, _absent(domain)))
        elif found.member is None:
            verdict = found.verdict or Verdict.CORRUPT
            listed.append(Trouble(domain.id, domain.shard, verdict, found.problem))
        else:
            voice = _Voice(survey, found)
            for lost in found.member.lost:
                cell = voice.cell(lost.epoch)
                verdict = cell.verdict or Verdict.MISSING
                problem = f"{found.root}: epoch {lost.epoch}: {lost.reason}"
                listed.append(Trouble(domain.id, domain.shard, verdict, problem, lost.epoch))
    listed += _forgotten(survey)
    for rift in survey.rifts:
        domain = survey.domains[rift.member]
        problem = f"{domain.id} {rift.reason}. What to do: {TOGETHER}"
        listed.append(Trouble(domain.id, domain.shard, Verdict.MIXED, problem))
    for found in survey.strangers:
        shard = found.identity.shard if found.identity is not None else None
        listed.append(Trouble(found.id, shard, found.verdict or Verdict.FOREIGN, _strange(found)))
    listed += [Trouble("", None, Verdict.CORRUPT, problem) for problem in survey.unfit]
    return (*listed, *_mixtures(survey))


def _mixtures(survey: Survey) -> Iterator[Trouble]:
    """Name the epochs whose ranks had loaded the same from different epochs."""
    held = set[Epoch]().union(*(place.retained for place in survey.places if place is not None))
    for epoch in sorted(held):
        if parts := apart(survey, epoch):
            problem = (
                f"its ranks had loaded this from different epochs: {'; '.join(parts)}. A restore "
                f"refuses it. What to do: {LEAVE}"
            )
            yield Trouble("", None, Verdict.MIXED, problem, epoch)


def _forgotten(survey: Survey) -> Iterator[Trouble]:
    """Name who knows nothing of a converged epoch: a directory that is older than the others."""
    epoch = survey.fallen
    held = {
        domain.shard
        for domain, found in zip(survey.domains, survey.places, strict=True)
        if found is not None and epoch in found.retained
    }
    for domain, found in zip(survey.domains, survey.places, strict=True):
        if epoch is None or found is None or found.member is None or domain.shard in held:
            continue
        if epoch not in {lost.epoch for lost in found.member.lost}:
            taken = f"takes {survey.line}" if survey.line else "finds nothing"
            problem = (
                f"{found.root}/domains/{found.name}: it knows nothing of {epoch}, and another "
                "domain's certificate proves that it had it: an older copy of the directory was "
                "put back, or a part of it is gone. What to do: put the newest copy back; as it "
                f"is, a restore {taken}, and what came later is lost"
            )
            yield Trouble(domain.id, domain.shard, Verdict.MISSING, problem, epoch)


def _absent(domain: Domain) -> str:
    host = f" (it was on {domain.host})" if domain.host else ""
    return (
        f"the domain of shard {domain.shard} is not at the paths given{host}. What to do: give "
        "the path of its directory too; if its disk is lost, so is every epoch's shard "
        f"{domain.shard}"
    )


def _strange(found: Found) -> str:
    where = f"{found.root}/domains/{found.name}"
    if found.problem:
        return found.problem
    run = found.identity.run if found.identity is not None else "?"
    return (
        f"{where}: a domain of run {run} that the configuration does not know. What to do: give "
        "its paths apart from this run's, and move it away from here"
    )


def _domain(survey: Survey, domain: Domain, found: Found | None) -> DomainRow:
    if found is None:
        return DomainRow(
            domain.id, domain.shard, domain.tier, domain.host, "", Verdict.MISSING,
            _absent(domain), 0, 0, None, (), (), 0,
        )  # fmt: skip
    path = f"{found.root}/domains/{found.name}"
    member = found.member
    living = [epoch for epoch in found.retained if survey.eligible(epoch)]
    newest = max(living, default=None)
    return DomainRow(
        id=domain.id,
        shard=domain.shard,
        tier=domain.tier,
        host=domain.host,
        path=path,
        verdict=_standing(survey, found, newest),
        problem=found.problem,
        incarnation=found.incarnation,
        generation=member.generation if member is not None else 0,
        newest=newest,
        retained=tuple(sorted(epoch for epoch in found.retained if epoch != GENESIS)),
        pins=tuple(
            PinRow(
                pin.epoch,
                pin.path,
                pin.holder.pid if pin.holder else 0,
                pin.holder.host if pin.holder else "",
                pin.holder.purpose if pin.holder else "",
            )
            for pin in found.pins
        ),
        nbytes=_disk_bytes(path),
    )


def _standing(survey: Survey, found: Found, newest: Epoch | None) -> Verdict:
    """Judge a domain by the worst of what it lost, else by where it stands to the others."""
    if found.member is None:
        return found.verdict or Verdict.CORRUPT
    if found.member.lost:
        voice = _Voice(survey, found)
        worst = {voice.cell(lost.epoch).verdict for lost in found.member.lost}
        return next(verdict for verdict in DAMAGE if verdict in worst)
    if any(survey.places[rift.member] is found for rift in survey.rifts):
        return Verdict.MIXED
    converged = survey.converged or GENESIS
    if newest is None or newest < converged:
        return Verdict.BEHIND
    return Verdict.AHEAD if newest > converged else Verdict.COMPLETE


def _disk_bytes(path: str) -> int:
    """Count what a domain's files take; those that vanish meanwhile take nothing."""
    total = 0
    for home, _, names in os.walk(path):
        for name in names:
            file = os.path.join(home, name)
            with reading(file), suppress(FileNotFoundError):
                total += os.lstat(file).st_blocks * 512
    return total
