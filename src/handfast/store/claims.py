"""Who owns a domain: its identity, its incarnations, and the seals between them.

A domain is `ROOT/domains/<name>/` with `domain.json` and one directory an incarnation. No two
incarnations ever share a file that either writes.

**Why a frozen owner that wakes up can harm nothing.** An owner *must*: append a record, sync it,
look whether a later incarnation is claimed, and only if there is none act on the record. A
successor *must*: claim (mkdir, sync), and only then read the predecessors' journals. Whichever
way the two interleave, at least one sees the other (Dekker's argument): if the record came before
the successor's read, it is part of the successor's history; if it came after, the claim came
before the owner's look, and the owner does not act. So that the second kind stays void for all
later readers too, a successor seals each predecessor's journal at the length that it read: the
seal is the first record of its own journal, and durable before anything is built on the history.

The seal of the latest incarnation that has one binds. An earlier claim whose seal it did not
see can't have acted: it would have found itself superseded.

**Why a claim that failed may take its directory away.** Only as long as its journal is not
there, or shorter than its header. Then whoever has read it since has sealed it at length 0, which
is what stands for a journal that was not there; and an owner that saw it has at most stopped for
nothing. Nobody else can have its number until it is gone, so what is taken away is its own.
"""

import contextlib
import os
import re
import time
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
import xxhash

from handfast.core.verdict import Verdict
from handfast.errors import UNREADABLE, Damaged, FormatError, Refused
from handfast.store.files import (
    TEMPORARY,
    Files,
    closing,
    discard,
    make_directory,
    read_file,
    write_file,
    writing,
)
from handfast.store.journal import HEADER, LOST, Journal, scan

__all__ = [
    "Claim",
    "Identity",
    "domain_path",
    "domains_below",
    "identify",
    "incarnations",
    "lengths_now",
    "read_identity",
    "take",
]

FORMAT: Final = 1
IDENTITY_MAX: Final = 1 << 20  # bytes; it has some 300
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]{0,199}")
NUMBER = re.compile(r"[1-9][0-9]{0,17}")
RACED: Final = (
    "another launch has founded that run here since this one looked, perhaps at the same moment; "
    "one job may train a run: once the other has ended start this one again, or give this one a "
    "directory of its own"
)
_LOST: Final = f"What to do: {LOST}"


class Identity(msgspec.Struct, frozen=True):
    """What a domain is, for as long as it lives: one shard's home in one run.

    `id` is the name and 16 random hex characters, so that a domain made anew on an empty disk is
    another one. `created` is in seconds since 1970, for people only.
    """

    format: int
    id: str
    name: str
    run: str
    shard: int
    created: int


class IdentityFile(msgspec.Struct, frozen=True):
    """What stands in `domain.json`: the identity, as it was encoded, and the hash of its bytes."""

    check: str
    identity: msgspec.Raw


class Seal(msgspec.Struct, frozen=True, array_like=True):
    """The first record of a journal: whose it is, and how much of each earlier one counts."""

    domain: str
    incarnation: int
    lengths: dict[int, Annotated[int, msgspec.Meta(ge=0)]]

    def fits(self, identity: Identity, number: int) -> bool:
        """Whether it seals what came before this incarnation of this domain."""
        mine = (self.domain, self.incarnation) == (identity.id, number)
        return mine and all(0 < sealed < number for sealed in self.lengths)


# Made before any thread meets these types: see `frames.py` of the agent.
_FILE: Final = msgspec.json.Decoder(IdentityFile)
_IDENTITY: Final = msgspec.json.Decoder(Identity)
_SEAL: Final = msgspec.msgpack.Decoder(Seal)


class Claim(msgspec.Struct, frozen=True):
    """An incarnation that was taken: its directory's parent, journal and inherited history."""

    path: str
    identity: Identity
    incarnation: int
    journal: Journal
    history: tuple[bytes, ...]


def domain_path(root: str, name: str) -> str:
    """The directory of a domain; ValueError for a name that is no plain path segment."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} can't name a domain: use up to 200 letters, digits and any of _.+@=-, "
            "not beginning with a sign"
        )
    return f"{root}/domains/{name}"


def domains_below(files: Files, root: str) -> list[str]:
    """The names in a root's `domains/`, sorted, without those that no domain can have: a file
    manager's `rank-00000 copy`, say. They are left alone. Raises OSError.
    """
    home = f"{root}/domains"
    return [n for n in files.listdir(home) if NAME.fullmatch(n)] if files.exists(home) else []


def identify(files: Files, root: str, name: str, *, run: str, shard: int) -> Identity:
    """The domain's identity, made durable before anybody is told of it; never overwritten.

    Order: the directories, each synced in its parent; a temporary file, synced; a hard link to
    `domain.json`, which *must* fail if there is one (two that start at once agree on the first);
    the directory, synced. A failure leaves at most temporary names, or an identity that the next
    call finds and syncs. Raises SaveFailed for a failed call, Damaged or FormatError for a file
    that can't be read, Refused(FOREIGN) if the domain belongs to another run or shard.
    """
    path = domain_path(root, name)
    with writing("make the domain's directory", path):
        make_directory(files, path)
        known = files.exists(f"{path}/domain.json")
        if not known and incarnations(files, path) and not files.exists(f"{path}/domain.json"):
            raise Damaged(f"{path}/domain.json: missing, though incarnations are there. {_LOST}")
    if not known:
        _create_identity(files, path, name, run, shard)
    with writing("sync the domain's directory", path):
        files.fsync_dir(path)
    found = read_identity(files, root, name)
    if (found.run, found.shard) != (run, shard):
        raise Refused(
            f"{path} is the home of shard {found.shard} of run {found.run}, not of shard {shard} "
            f"of run {run}",
            verdict=Verdict.FOREIGN,
            shards=(found.id,),
            remedy=RACED if found.run != run else "start this run with the shards it had",
        )
    return found


def _create_identity(files: Files, path: str, name: str, run: str, shard: int) -> None:
    nonce = os.urandom(8).hex()
    raw = msgspec.json.encode(
        Identity(FORMAT, f"{name}-{nonce}", name, run, shard, int(time.time()))
    )
    check = xxhash.xxh3_128_hexdigest(raw)
    temporary = f"{path}/domain.json.{nonce}{TEMPORARY}"
    try:
        with writing("create the domain's identity", temporary):
            write_file(files, temporary, msgspec.json.encode(IdentityFile(check, msgspec.Raw(raw))))
            with contextlib.suppress(FileExistsError):  # somebody was first; theirs is the identity
                files.link(temporary, f"{path}/domain.json")
    finally:
        discard(files, temporary)


def read_identity(files: Files, root: str, name: str) -> Identity:
    """The identity of a domain that was identified; FormatError, or Damaged, if there is none."""
    path = f"{domain_path(root, name)}/domain.json"
    data = read_file(files, path, IDENTITY_MAX)
    try:
        envelope = _FILE.decode(data)
        sound = envelope.check == xxhash.xxh3_128_hexdigest(envelope.identity)
        version = msgspec.json.decode(envelope.identity, type=dict[str, object]).get("format")
        if sound and version != FORMAT:
            raise FormatError(
                f"{path}: a domain of format {version}; this handfast reads format {FORMAT}. "
                "What to do: use the release of handfast that wrote it, or a later one"
            )
        found = _IDENTITY.decode(envelope.identity)
    except UNREADABLE as error:
        raise Damaged(f"{path}: not the identity of a domain: {error}. {_LOST}") from error
    if not sound:
        raise Damaged(f"{path}: the identity differs from its own digest. {_LOST}")
    if found.name != name:
        raise Refused(
            f"{path} is the identity of the domain {found.name}",
            verdict=Verdict.FOREIGN,
            shards=(found.id,),
            remedy="give the directory that name back; if it is a copy, and the domain itself is "
            "beside it, move the copy out of domains/",
        )
    return found


def incarnations(files: Files, path: str) -> list[int]:
    """The incarnations that were claimed in a domain's directory, in order."""
    return sorted(int(name) for name in files.listdir(path) if NUMBER.fullmatch(name))


def take(files: Files, root: str, name: str) -> Claim:
    """Take the next incarnation of an identified domain.

    Order, all of it *must*: mkdir of the next number (exclusive) and sync of the domain's
    directory; then the predecessors' journals are settled and read; then the own journal is
    created, its first record seals them, both are synced, and so is the incarnation's directory.
    A failure at any step leaves an incarnation that never acted, or nothing where it has not come
    to a journal (on a full disk, say); the next claim takes another. Raises SaveFailed for a
    failed call, Damaged or FormatError for what can't be read.
    """
    path = domain_path(root, name)
    identity = read_identity(files, root, name)
    with writing("claim the domain", path):
        number = max(incarnations(files, path), default=0) + 1
        while True:
            try:
                files.mkdir(f"{path}/{number}")
                break
            except FileExistsError:  # another process claims at the same time
                number += 1
    here = f"{path}/{number}"
    try:
        with writing("claim the domain", path):
            files.fsync_dir(path)
            files.mkdir(f"{here}/chunks")
            files.mkdir(f"{here}/manifests")
            lengths, history = recall(files, path, identity, below=number, settle=True)
        journal = Journal.create(files, f"{here}/journal")
    except Exception:
        _withdraw(files, here)
        raise
    try:
        journal.append(msgspec.msgpack.encode(Seal(identity.id, number, lengths)))
        journal.sync()
        with writing("sync the incarnation's directory", here):
            files.fsync_dir(here)
    except BaseException:
        with contextlib.suppress(Exception):
            journal.close()
        raise
    return Claim(path, identity, number, journal, history)


def _withdraw(files: Files, here: str) -> None:
    """Take a claim's directory away, if nobody can have read a journal in it."""
    journal = f"{here}/journal"
    with contextlib.suppress(OSError):
        if files.exists(journal):
            with closing(files, files.open(journal)) as fd:
                if files.size(fd) >= HEADER:
                    return
            files.unlink(journal)
        for part in (f"{here}/manifests", f"{here}/chunks", here):
            if files.exists(part):
                files.rmdir(part)


def lengths_now(files: Files, path: str) -> dict[int, int]:
    """How long the journal of each incarnation is, counting what no sync has promised yet.

    Journals only grow. So where two looks at several domains give the same lengths, all of them
    had these lengths at any one moment between the looks. Raises OSError.
    """
    found = {}
    for number in incarnations(files, path):
        journal = f"{path}/{number}/journal"
        found[number] = 0
        if files.exists(journal):
            with closing(files, files.open(journal)) as fd:
                found[number] = files.size(fd)
    return found


def recall(
    files: Files,
    path: str,
    identity: Identity,
    *,
    below: int | None = None,
    then: Mapping[int, int] | None = None,
    settle: bool = False,
) -> tuple[dict[int, int], tuple[bytes, ...]]:
    """The length of each journal that counts, and all records within, oldest first.

    `then` is what `lengths_now` gave at some moment: what came later is left out.

    `settle` is for who builds on what it reads: the dirty pages of a journal that nobody sealed,
    and its name, are synced and its clean pages dropped first, because what only the kernel holds
    may vanish, and a page that failed to be written looks clean. What is read afterwards is what
    the medium holds; who sealed a journal had done so before. It is read as far as it went *before*
    that sync: an owner that is alive, or wakes up, may append behind it, which no sync of ours
    covers. It does not act on that, for it looks after the append and finds the claim.

    Raises Damaged, FormatError or Refused for what can't be read, OSError for a failed call.
    """
    there = incarnations(files, path) if then is None else sorted(then)
    found = [n for n in there if below is None or n < below]
    lengths: dict[int, int] = {}
    parts: list[tuple[bytes, ...]] = []
    sealed: dict[int, int] | None = None
    while found:
        number = found.pop()
        limit = None if sealed is None else sealed.get(number, 0)
        journal = f"{path}/{number}/journal"
        if limit is None and not files.exists(journal):
            _check_unused(files, path, number)
            lengths[number] = 0
            continue
        most = None if then is None else then.get(number)
        if settle and limit is None:
            with closing(files, files.open(journal)) as fd:
                most = files.size(fd)
                files.fsync(fd)
                files.forget(fd)
            files.fsync_dir(f"{path}/{number}")  # its owner may have died before its name was
        read = scan(files, journal, limit, most)
        lengths[number] = read.length
        if limit is None and not read.records and not scan(files, journal).records:
            _check_unused(files, path, number)
        if read.records:
            seal = _seal(journal, read.records[0], identity, number)
            parts.append(read.records[1:])
            if sealed is None:
                sealed = seal.lengths
                found = sorted({*found, *(n for n, length in sealed.items() if length)})
    return lengths, tuple(record for part in reversed(parts) for record in part)


def _check_unused(files: Files, path: str, number: int) -> None:
    """Raise Damaged if an incarnation without a seal has manifests: it sealed before it wrote."""
    here = f"{path}/{number}"
    if files.exists(f"{here}/manifests") and files.listdir(f"{here}/manifests"):
        raise Damaged(f"{here}/journal: missing or cut, though manifests are there. {_LOST}")


def _seal(journal: str, record: bytes, identity: Identity, number: int) -> Seal:
    try:
        seal = _SEAL.decode(record)
    except UNREADABLE as error:
        raise FormatError(f"{journal}: its first record is no seal: {error}. {_LOST}") from error
    if not seal.fits(identity, number):
        raise Refused(
            f"{journal} is the journal of incarnation {seal.incarnation} of {seal.domain}",
            verdict=Verdict.FOREIGN,
            shards=(identity.id,),
            remedy=LOST,
        )
    return seal
