"""How a job's ranks meet: look, agree on who takes part, be counted.

A launch is a *round*. Its nonce, its secret and, for a new run, the run's name are made by rank 0;
its generation is allocated once, from a record in the run's directory that is changed under a
lock, and is higher than any that a member reports (the design, section 2, Generations). Two
engines with separate records could allocate the same number: then each domain freezes for
whichever came first, and the other round is told that it was overtaken.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from handfast.agent.joining import Round
from handfast.agent.reminder import Reminder
from handfast.checkpoint.collective import Collective
from handfast.checkpoint.evidence import certificates, lost
from handfast.core.membership import (
    Configuration,
    Domain,
    Entrant,
    Formation,
    Refusal,
    RoundRecord,
    allocate,
    form,
)
from handfast.core.messages import Configured, Frozen, decode_record
from handfast.core.verdict import Verdict
from handfast.errors import (
    UNREADABLE,
    Blocked,
    Damaged,
    HandfastError,
    Refused,
    SaveFailed,
    Superseded,
)
from handfast.store.claims import domains_below, read_identity
from handfast.store.files import (
    TEMPORARY,
    Files,
    describe,
    discard,
    make_directory,
    read_file,
    try_lock,
    write_file,
    writing,
)
from handfast.store.shelf import Shelf

__all__ = ["Meeting", "Peek", "allocate_in", "domain_name", "meet", "peek", "settle", "unfit"]

logger = logging.getLogger("handfast")

TIER: Final = "directory"
LOCK_PAUSE_S: Final = 0.05
RECORD_MAX: Final = 1 << 20  # bytes of a round's record; it has some 3000


def domain_name(shard: int) -> str:
    """Name the directory of a rank's domain."""
    return f"rank-{shard:05d}"


class Peek(msgspec.Struct, frozen=True):
    """What one rank's directory holds, looked at without touching it.

    ``known`` names the configuration that it knows, of so many ``shards``: a peek is small, or a
    thousand ranks could not tell it to each other. ``others`` are the domains of other ranks that
    it holds, where its own is not there; ``run`` and ``known`` are then what these say.
    ``certified`` are the domains whose certificates lie there, where none is known to have taken
    part in a run.
    """

    node: str
    root: str
    domain: str = ""
    run: str = ""
    shard: int = -1
    known: str = ""
    shards: int = 0
    generation: int = 0
    problem: str = ""
    others: tuple[str, ...] = ()
    certified: tuple[str, ...] = ()


class _Hand(msgspec.Struct, frozen=True):
    """What each rank lays on the table; only rank 0's offers count."""

    peek: Peek
    nonce: str
    run: str
    secret: bytes
    require: bool = False


class Meeting(msgspec.Struct, frozen=True):
    """A round before its agents are opened: all peeks, in order of rank, and what rank 0 made."""

    peeks: tuple[Peek, ...]
    nonce: str
    run: str
    secret: bytes


def peek(files: Files, root: str, node: str, shard: int) -> Peek:
    """Look at a rank's directory; what can't be read is said, not raised, so that all learn it."""
    try:
        certified = certificates(files, root)  # before the domains: a job may just be beginning
        found = _look(files, root, node, domain_name(shard)) or _look_beside(files, root, node)
        return msgspec.structs.replace(found, certified=() if found.known else certified)
    except HandfastError as error:
        return Peek(node, root, problem=str(error))
    except OSError as error:
        return Peek(node, root, problem=f"{root}: {error.strerror}: {error.filename}")
    except msgspec.MsgspecError as error:
        return Peek(node, root, problem=f"{root}: a record that this handfast can't read: {error}")


def _look(files: Files, root: str, node: str, name: str) -> Peek | None:
    if not files.exists(f"{root}/domains/{name}/domain.json"):
        return None
    identity = read_identity(files, root, name)
    known, shards, generation = "", 0, 0
    for data in Shelf(files, root, name).records():
        record = decode_record(data)
        if isinstance(record, Configured):
            known, shards = record.configuration.digest(), record.configuration.shards
        elif isinstance(record, Frozen):
            generation = record.generation
    return Peek(node, root, identity.id, identity.run, identity.shard, known, shards, generation)


def _look_beside(files: Files, root: str, node: str) -> Peek:
    """Look whose domains are here instead: disks that changed places are no first start."""
    names = domains_below(files, root)
    found = [peek for name in names if (peek := _look(files, root, node, name)) is not None]
    others = tuple(peek.domain for peek in found)
    begun = next((peek for peek in found if peek.known), None)
    if begun is None:
        return Peek(node, root, others=others)
    return Peek(node, root, run=begun.run, known=begun.known, shards=begun.shards, others=others)


def meet(collective: Collective, mine: Peek, *, require: bool = False) -> Meeting:
    """Lay all peeks side by side. Every rank sees the same, so every rank raises the same.

    Raises Refused: CORRUPT for a directory that can't be read, FOREIGN for several runs, MIXED for
    directories that have changed ranks, MISSING where the run exists on some ranks and another's
    directory is empty, where only certificates are left of it, or where there is none and some rank
    does ``require`` one. Nothing has been created.
    """
    nonce, run, secret = secrets.token_hex(16), secrets.token_hex(8), secrets.token_bytes(32)
    hand = _Hand(mine, nonce, run, secret, require)
    hands = [
        msgspec.msgpack.decode(data, type=_Hand)
        for data in collective.gather("peek", msgspec.msgpack.encode(hand))
    ]
    peeks = tuple(h.peek for h in hands)
    _refuse(peeks)
    if any(h.require for h in hands) and not any(p.known for p in peeks):
        raise none_begun([f"rank {r}: {p.root} on {p.node}" for r, p in enumerate(peeks)])
    runs = sorted({p.run for p in peeks if p.run})
    return Meeting(peeks, hands[0].nonce, runs[0] if runs else hands[0].run, hands[0].secret)


def none_begun(shards: Sequence[str] = ()) -> Refused:
    """Say that a first start is not what was asked for."""
    return Refused(
        "nothing was ever saved in this run, and restore(require=True) asks for an epoch",
        verdict=Verdict.MISSING,
        shards=shards,
        remedy="look at the path; without require=True this is a first start",
    )


def _refuse(peeks: Sequence[Peek]) -> None:
    broken = [f"rank {rank}: {p.problem}" for rank, p in enumerate(peeks) if p.problem]
    if broken:
        raise Refused(
            "a rank's directory can't be read",
            verdict=Verdict.CORRUPT,
            shards=broken,
            remedy="see `handfast verify`; put the named file back from a copy if there is one",
        )
    runs = sorted({p.run for p in peeks if p.run})
    began = [p for p in peeks if p.known]
    if len(runs) > 1:
        saved = began or any(p.certified for p in peeks)
        raise Refused(
            f"the ranks' directories belong to {len(runs)} runs",
            verdict=Verdict.FOREIGN,
            shards=[f"rank {r}: run {p.run or 'none'} in {p.root}" for r, p in enumerate(peeks)],
            remedy="give every rank the directory that it had"
            if saved
            else "nothing was saved in them (two launches at the same moment leave such): begin "
            "anew on a fresh path, or remove their domains/",
        )
    if began and len(peeks) != began[0].shards:
        _refuse_world(began[0].shards, len(peeks))
    if began and not all(p.domain for p in peeks):
        _refuse_absent(began[0].run, peeks)
    left = [name for p in peeks for name in p.certified]
    if left and not began:
        what = "no domain is left" if not runs else "no journal of a domain is left"
        raise lost(left, what, [f"rank {r}: {p.root} on {p.node}" for r, p in enumerate(peeks)])


def _refuse_absent(run: str, peeks: Sequence[Peek]) -> None:
    at_home = {p.domain for p in peeks}
    empty = [(r, p, set(p.others) - at_home) for r, p in enumerate(peeks) if not p.domain]
    if any(moved for _, _, moved in empty):
        raise Refused(
            f"directories of the run {run} have changed ranks",
            verdict=Verdict.MIXED,
            shards=[
                f"rank {r}: {p.root} on {p.node} holds {', '.join(sorted(moved)) or 'nothing'}"
                for r, p, moved in empty
            ],
            remedy="start each rank on the directory of its own shard",
        )
    raise Refused(
        f"the run {run} exists, but some of its directories are not here",
        verdict=Verdict.MISSING,
        shards=[f"rank {r}: {p.root} on {p.node}" for r, p, _ in empty],
        remedy="bring the missing directory back, or begin anew on a fresh path",
    )


def _refuse_world(was: int, now: int) -> None:
    raise Refused(
        f"the run was saved by {was} ranks, and this job has {now}",
        verdict=Verdict.FOREIGN,
        remedy=f"start {was} ranks, or `handfast export` the run and begin a new one",
    )


def beside(started: Round, shard: int) -> list[int]:
    """List the shards that are on one node with this one, and were when the run was founded.

    Ranks that share must be there together when they come back, so those that were apart once do
    not begin to: they may be apart again.
    """
    domains, homes = started.configuration.domains, started.homes
    mine = domains[shard]
    here = [d for d in domains if (d.host, homes[d.id]) == (mine.host, homes[mine.id])]
    return sorted(domain.shard for domain in here)


def settle(
    collective: Collective, meeting: Meeting, domains: Sequence[tuple[str, Configuration | None]]
) -> Formation:
    """Decide the configuration from what all agents opened: (domain id, what it knows) by rank.

    Raises Refused with what :func:`handfast.core.membership.form` found.
    """
    entrants = [
        Entrant(Domain(domain, TIER, shard, meeting.peeks[shard].node), known, 0)
        for shard, (domain, known) in enumerate(domains)
    ]
    size = collective.place.size
    formed = form(entrants, shards=size, need=((TIER, 1),), run=meeting.run)
    if isinstance(formed, Refusal):
        raise Refused(
            formed.message, verdict=formed.verdict, shards=formed.shards, remedy=formed.remedy
        )
    return formed


def allocate_in(
    files: Files, root: str, nonce: str, reported: int, patience_s: float | None = None
) -> int:
    """Allocate a round's generation from ``ROOT/round.json``, changed under a lock.

    ``reported`` is the greatest generation that any member knows. Raises Blocked where another
    process holds the lock for ``patience_s`` seconds, Superseded where a later
    round is recorded already, Damaged where the record can't be read or a directory is in the
    place of its lock, SaveFailed where it can't be written (nothing was allocated then) and OSError
    where it can't be locked.
    """
    path = _record_of(root)
    with writing("make the run's directory", root):
        try:
            make_directory(files, root)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SaveFailed(
                f"{root}: the run's directory can't be made: {describe(error)}. What to do: look "
                "at the path, or make the directory above it"
            ) from error
    _check_lock(root)
    lock = os.open(_lock_of(root), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(lock, _lock_of(root), patience_s)
        record = allocate(_read(files, path), nonce, reported)
        if record is None:
            raise Superseded(f"a later launch is recorded in {path}: this one must stop")
        _write(files, path, record)
        return record.generation
    finally:
        os.close(lock)


def _take(lock: int, path: str, patience_s: float | None) -> None:
    """Lock a file, and say for what that waits; nobody holds it for longer than a write."""
    reminder = Reminder()
    who = f"another process has locked {path}"
    while not try_lock(lock):
        if reminder.over(patience_s):
            raise Blocked(
                f"the round can't be recorded: {who}. What to do: `lslocks` and `fuser` name who "
                "holds it; a launch that hangs in the middle of this must be ended",
                by=[path],
            )
        if reminder.due():
            logger.warning("restore has waited %.0f s: %s", reminder.waited, who)
        time.sleep(LOCK_PAUSE_S)


def unfit(files: Files, root: str) -> str:
    """Say why a launch could not be recorded in a directory; only look. Empty where it could."""
    try:
        _check_lock(root)
        _read(files, _record_of(root))
    except Damaged as error:
        return str(error)
    return ""


def _record_of(root: str) -> str:
    return f"{root}/round.json"


def _lock_of(root: str) -> str:
    return f"{root}/round.lock"


def _check_lock(root: str) -> None:
    if os.path.isdir(_lock_of(root)):
        raise Damaged(
            f"{_lock_of(root)}: a directory, in the place of a file that is locked while the round "
            "is recorded. What to do: remove it"
        )


def _read(files: Files, path: str) -> RoundRecord | None:
    if not files.exists(path):
        return None
    try:
        return msgspec.json.decode(read_file(files, path, RECORD_MAX), type=RoundRecord)
    except (Damaged, *UNREADABLE) as error:
        why = "it can't be read" if isinstance(error, Damaged) else error
        raise Damaged(
            f"{path}: not a record of a round: {why}. What to do: remove the file; the members' "
            "own journals keep generations from being used twice"
        ) from error


def _write(files: Files, path: str, record: RoundRecord) -> None:
    temporary = path + TEMPORARY
    with writing("record the round", path):
        discard(files, temporary)  # what a launch left that was killed half-way
        write_file(files, temporary, msgspec.json.encode(record))
        files.rename(temporary, path)
        files.fsync_dir(os.path.dirname(path))
