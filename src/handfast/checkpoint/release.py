"""Letting epochs go without an agent: the protocol's own rule, by an operator's hand.

An agent releases by itself, so this is for runs that nobody trains any more. What may go is what
:func:`handfast.core.retain.releasable` says of a member booted from its own journal: below an own,
known, retained, converged epoch of the living timeline, never within a recovery, never what is
pinned. Beyond the protocol's rule, which trusts what was attested, every byte of that converged
epoch is read first, and nothing goes where a restore would have to take an older one: what is kept
must be worth keeping. That takes all domains; who sees only some of them must say that the others'
word is enough (``unseen``).

To act, a domain is claimed as a new incarnation. That **supersedes** an agent that is alive on
another node, which can't be seen from here; so whoever asks must say that the run is offline.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from handfast.agent.keeper import Keeper
from handfast.checkpoint.location import Location
from handfast.checkpoint.spelling import some
from handfast.checkpoint.survey import Found, Survey
from handfast.checkpoint.verify import verify_epochs
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Released
from handfast.core.retain import Keep, releasable
from handfast.core.state import Member
from handfast.core.verdict import Verdict
from handfast.errors import HandfastError, Refused, SaveFailed
from handfast.store.claims import domain_path, incarnations
from handfast.store.files import Files, describe, reading
from handfast.store.litter import KINDS, litter, references
from handfast.store.pins import Pin, pinned
from handfast.store.port import Progress

__all__ = ["DomainPlan", "Stay", "carry_out", "free_pins", "plan_release"]

ROOM: Final = "64 KiB"  # a journal, and the directories of an incarnation


class Stay(msgspec.Struct, frozen=True):
    """An epoch that stays, and why."""

    epoch: Epoch
    why: str


class DomainPlan(msgspec.Struct, frozen=True):
    """What one domain may let go (``gone``), what was never attested (``leftovers``), what stays.

    ``litter`` are files, relative to the domain's directory, that no epoch needs: of saves and
    releases that were cut short. ``line`` is the converged epoch that the domain keeps;
    ``blocked`` says why nothing may go.
    """

    domain: str
    root: str
    name: str
    line: Epoch | None
    gone: tuple[Epoch, ...] = ()
    leftovers: tuple[Epoch, ...] = ()
    litter: tuple[str, ...] = ()
    stays: tuple[Stay, ...] = ()
    blocked: str = ""
    nbytes: int = 0

    @property
    def anything(self) -> bool:
        """Whether anything may go."""
        return bool(self.gone or self.leftovers or self.litter)


def plan_release(
    location: Location,
    keep: Keep | None = None,
    step: int | Epoch | None = None,
    *,
    unseen: bool = False,
) -> tuple[DomainPlan, ...]:
    """Say what each domain here may let go, changing nothing. Raises as :meth:`Location.survey`.

    Without ``keep`` every epoch of the living timeline stays, and only orphans and left-overs go;
    with ``step``, of all that may go only that one does. ``unseen`` trusts what domains that are
    not here have attested, as an agent does.
    """
    survey = location.survey()
    placed = [found for found in survey.places if found is not None]
    return tuple(_plan(location.files, survey, found, keep, step, unseen) for found in placed)


def _plan(
    files: Files,
    survey: Survey,
    found: Found,
    keep: Keep | None,
    step: int | Epoch | None,
    unseen: bool,
) -> DomainPlan:
    member = found.member
    if member is None:
        return DomainPlan(found.id, found.root, found.name, None, blocked=found.problem)
    line = _line(member)
    pins = {pin.epoch for pin in found.pins}
    blocked = _blocked(survey, found, member, line, unseen)
    keep = keep or Keep(newest=len(member.retained) + 1)
    gone = () if blocked else _gone(member, keep, pins, step)
    leftovers = () if blocked or step is not None else _leftovers(found, pins)
    stays = [
        Stay(epoch, _why(survey, epoch, line, pins))
        for epoch in sorted(found.retained)
        if epoch not in gone and epoch != GENESIS
    ]
    nbytes = sum(
        entry.manifest.image_bytes
        for epoch in (*gone, *leftovers)
        if (entry := found.entries.get(epoch)) is not None and entry.manifest is not None
    )
    strays = () if blocked or step is not None else _litter(files, found, pins)
    return DomainPlan(
        found.id, found.root, found.name, line, gone, leftovers, strays, tuple(stays), blocked,
        nbytes,
    )  # fmt: skip


def _line(member: Member) -> Epoch | None:
    if member.roster is None:
        return None
    tally = member.tallies[member.roster.tier_of[member.me]]
    return tally.line.epoch if tally.line is not None else None


def _blocked(survey: Survey, found: Found, member: Member, line: Epoch | None, unseen: bool) -> str:
    if not member.open:
        return (
            f"generation {member.generation} holds no restore certificate yet: between a freeze "
            "and its certificate nothing is released"
        )
    if member.generation != survey.generation:
        return f"another domain is in generation {survey.generation}: start the job first"
    if line is None or line not in found.retained or line in member.doubted:
        return "no converged epoch is known, retained and sound here"
    if survey.missing and not unseen:
        return (
            f"not at the paths given: {some(survey.missing, 5)}. So nobody can tell whether their "
            f"copies of {line} are sound. What to do: give the paths of all domains; or --unseen, "
            "to trust what they attested, as an agent does"
        )
    if not survey.missing and (survey.line is None or survey.line < line):
        return (
            f"a restore would take {survey.line or 'nothing'}, not the converged {line}: a copy of "
            "that is lost, see `handfast verify`"
        )
    return ""


def _gone(
    member: Member, keep: Keep, pins: set[Epoch], step: int | Epoch | None
) -> tuple[Epoch, ...]:
    """The protocol's rule, and of that only the step asked for."""
    if member.restored is None:
        return ()
    may = releasable(
        member.retained,
        line=_line(member),
        timeline=member.restored.timeline,
        converged=member.converged,
        keep=keep,
        pinned=pins,
        void=(),
        doubted=member.doubted,
    )
    may = tuple(epoch for epoch in may if epoch != GENESIS)
    return tuple(epoch for epoch in may if step is None or step in (epoch, epoch.step))


def _leftovers(found: Found, pins: set[Epoch]) -> tuple[Epoch, ...]:
    """Manifests without a vote, or released and not yet removed."""
    held = {copy.epoch for copy in found.member.retained} if found.member is not None else set()
    lost = {lost.epoch for lost in found.member.lost} if found.member is not None else set()
    return tuple(epoch for epoch in found.entries if epoch not in held | lost | pins)


def _litter(files: Files, found: Found, pins: set[Epoch]) -> tuple[str, ...]:
    home = domain_path(found.root, found.name)
    strays: list[str] = []
    with reading(home):
        used = references(files, home, pins)
        if used is None:
            return ()
        for number in incarnations(files, home):
            for kind in KINDS if files.exists(f"{home}/{number}/manifests") else ():
                strays += litter(files, home, number, kind, used)
    return tuple(strays)


def _why(survey: Survey, epoch: Epoch, line: Epoch | None, pins: set[Epoch]) -> str:
    if epoch in pins:
        return "a reader has pinned it"
    if line is None or epoch > line:
        return "it is above the converged line"
    if epoch == line:
        return "it is the converged line"
    return "it is kept" if survey.eligible(epoch) else "an orphan, which may go"


def carry_out(
    location: Location,
    plans: Sequence[DomainPlan],
    keep: Keep | None,
    step: int | Epoch | None,
    progress: Progress | None = None,
    *,
    unseen: bool = False,
) -> tuple[DomainPlan, ...]:
    """Do what was planned; gives what was done.

    The converged lines are read, every byte, before anything goes. Then each domain is claimed,
    its plan is made anew from what it journaled up to the claim, the release is journaled and
    synced, and only then are files removed. Domains are independent: where one fails, those before
    it have released and those after it have not.

    Raises HandfastError where an agent of this node is alive, or root acts on a user's run, Refused
    where a converged line is damaged, SaveFailed or Superseded where a domain can't be written or
    was claimed meanwhile.
    """
    survey = location.survey()
    for agent in location.agents(survey):
        what = agent.problem or f"process {agent.pid} releases by itself"
        raise HandfastError(
            f"an agent on {agent.label} serves this run: {what}. What to do: set "
            "keep=Keep(newest=...) in the training; or end the job, wait for the agent to end, "
            "and try again"
        )
    lines = {plan.line for plan in plans if plan.gone and plan.line is not None}
    checked = verify_epochs(location.files, survey, sorted(lines - {GENESIS}), progress)
    unread = [found.id for found in survey.places if found is not None and found.member is None]
    bad = [f for f in checked.findings if f.epoch in lines or f.domain in unread]
    if lines and bad:
        raise Refused(
            "nothing is released: the epoch that would be kept is damaged",
            verdict=Verdict.CORRUPT,
            shards=[f"{finding.domain}: {finding.problem}" for finding in bad],
            remedy="keep the older epochs: a restore needs them now",
        )
    wanted = [plan for plan in plans if plan.anything]
    _check_owner(wanted)
    return tuple(_release(location.files, survey, plan, keep, step, unseen) for plan in wanted)


def _check_owner(plans: Iterable[DomainPlan]) -> None:
    """What root writes into a user's run may keep that user out, by the umask of the moment."""
    for plan in plans:
        home = domain_path(plan.root, plan.name)
        with reading(home):
            owner = os.stat(home).st_uid
        if os.geteuid() == 0 != owner:
            raise HandfastError(
                f"{home} belongs to user {owner}, whom files of root's in it may lock out. What to "
                f"do: release as that user (sudo -u '#{owner}' handfast release ...)"
            )


def _release(
    files: Files,
    survey: Survey,
    plan: DomainPlan,
    keep: Keep | None,
    step: int | Epoch | None,
    unseen: bool,
) -> DomainPlan:
    with _needing_room(plan):
        keeper, member = Keeper.claim(files, plan.root, plan.name)
    directory = keeper.directory
    try:
        found = Found(
            plan.root, plan.name, directory.identity, directory.incarnation, member,
            entries=directory.manifests(),
            pins=tuple(Pin(files, "", e, None) for e in pinned(files, directory.path)),
        )  # fmt: skip
        now = _plan(files, survey, found, keep, step, unseen)
        if now.gone:
            with _needing_room(now):
                keeper.commit([Released(now.gone)])
        if now.anything:
            directory.may_clean = True  # this generation's certificate is in the journal
            directory.release((*now.gone, *now.leftovers))
        return now
    finally:
        directory.close()


@contextmanager
def _needing_room(plan: DomainPlan) -> Iterator[None]:
    """Where the disk is full, say what a release needs: to free space is what it was asked for."""
    try:
        yield
    except SaveFailed as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        home = domain_path(plan.root, plan.name)
        ours = "nothing may be deleted by hand"
        if plan.litter:
            ours = f"only this may be deleted by hand: {', '.join(plan.litter)}"
        raise SaveFailed(
            f"{home}: the disk is full: {describe(cause)}. A release is recorded before anything "
            f"goes, and nothing went, for there is no room for the record. What to do: free {ROOM} "
            f"on that file system, of other things than this run (below {home} {ours}, and that "
            "while no job trains it), and try again"
        ) from error


# --- pins ---------------------------------------------------------------------------------------


def free_pins(pins: Iterable[Pin]) -> int:
    """Take pins away; gives how many. Raises SaveFailed where one can't be."""
    freed = 0
    for pin in pins:
        pin.release()
        freed += 1
    return freed
