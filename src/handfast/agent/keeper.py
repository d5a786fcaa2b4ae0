"""A domain's store at work: the blocking half, always called from one thread of its own.

Writing, reading back, releasing and publishing take turns here, so that no file is released while
a write that may refer to it is under way.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from handfast.agent.examiner import Asked, Examined
from handfast.agent.feed import Feed
from handfast.agent.frames import image_size
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import boot
from handfast.core.membership import Roster
from handfast.core.messages import Certificate, Copy, Lost, Record, decode_record, encode
from handfast.core.state import Member
from handfast.errors import FormatError, HandfastError, Superseded
from handfast.store.directory import Directory, claim
from handfast.store.files import (
    Files,
    discard,
    make_directory,
    write_file,
    writing,
)
from handfast.store.image import Layout, Slot
from handfast.store.manifest import (
    CHUNK,
    HASH_BYTES,
    Fork,
    Left,
    Manifest,
    Source,
    Stamp,
    tensor_digest,
)
from handfast.store.pins import pinned
from handfast.store.port import Verify, Written
from handfast.store.shelf import PART, PAUSE, Shelf

__all__ = ["Image", "Keeper", "Plan", "held_alike"]


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """How a trainer's images are laid out; sent once, and again when the structure changes."""

    slots: tuple[Slot, ...]
    header: bytes
    nbytes: int
    padded: int
    aliases: dict[str, str]
    replicated: tuple[str, ...]
    structure: str
    environment: dict[str, str]
    lineage: str
    verify: Verify
    left: tuple[str, ...] = ()
    left_to: int = 0  # the shard that stores what this rank leaves out
    leads: bool = False  # whether others of this node may leave theirs to this one
    window: int = 0  # bytes of memory through which the image comes; 0: it is there whole
    forks: tuple[Fork, ...] = ()  # where the lineage began
    compared: tuple[str, ...] = ()  # what is held against all ranks, which should have it alike
    examined: Examined | None = None  # what its values are held against before it is voted on
    came: tuple[Source, ...] = ()  # where what is trained was loaded from


class Image:
    """A trainer's memory image, received as a memfd: it outlives the trainer.

    Takes ``fd`` over, unless it raises: FormatError where the memory could be resized by the
    trainer, or is smaller than the plan says. ``key`` is how the trainer calls this memory.
    """

    def __init__(self, fd: int, plan: Plan, key: str = "") -> None:
        size, needed = image_size(fd), plan.window or plan.padded
        if size < needed:
            raise FormatError(f"an image of {size} bytes is too small for its {needed}")
        self.fd = fd
        self.plan = plan
        self.key = key
        self.map = mmap.mmap(fd, needed, mmap.MAP_SHARED, mmap.PROT_READ)
        self.busy: Epoch | None = None
        self.feed: Feed | None = None

    @property
    def source(self) -> memoryview | Feed:
        """The bytes of the epoch that is being persisted: all at hand, or on their way."""
        return memoryview(self.map) if self.feed is None else self.feed

    def asked(self, epoch: Epoch, objects: bytes) -> Asked | None:
        """What its examiner is asked of an epoch, if it has one."""
        plan = self.plan
        if plan.examined is None:
            return None
        return Asked(plan.examined, plan.slots, plan.nbytes, self.fd, objects, epoch)

    def await_pieces(self) -> None:
        """Let the next epoch come piece by piece, where there is no memory for all of it.

        To be called in the agent's loop. Raises ValueError where there is none for one piece.
        """
        self.feed = Feed(memoryview(self.map), PART * CHUNK) if self.plan.window else None

    def give_up(self, why: str) -> None:
        """Let nobody wait for pieces that will not come."""
        if self.feed is not None:
            self.feed.end(why)

    def close(self) -> None:
        """Give the memory back; the errors of a write that failed may still hold views of it."""
        self.feed = None  # which has one, too
        try:
            self.map.close()
        except BufferError:
            gc.collect()
            with contextlib.suppress(BufferError):
                self.map.close()
        os.close(self.fd)


class Keeper:
    """One claimed directory, and what is done with it on behalf of its member."""

    def __init__(self, files: Files, root: str, directory: Directory) -> None:
        self.files = files
        self.root = root
        self.directory = directory
        self.parent: Manifest | None = None
        self._former: Manifest | None = None
        self._held: tuple[Epoch, ...] = ()

    @classmethod
    def claim(cls, files: Files, root: str, name: str) -> tuple[Keeper, Member]:
        """Claim an identified domain and boot its member from all that it ever journaled.

        Raises what :func:`handfast.store.directory.claim` raises, and FormatError for a record
        that this handfast can't read.
        """
        directory = claim(files, root, name)
        try:
            records = [_decode(record, directory) for record in directory.history]
            domain, incarnation = directory.identity.id, directory.incarnation
            member = boot(domain, incarnation, records)
            lost = _lost(directory, member.retained)
            if lost:  # for good, once it is journaled
                time.sleep(PAUSE)
                lost = _lost(directory, member.retained)
            if lost:
                member = boot(domain, incarnation, records, lost)
        except BaseException:
            directory.close()
            raise
        return cls(files, root, directory), member

    def commit(self, records: list[Record]) -> None:
        """Make records durable, then look whether this incarnation may still speak of them.

        Raises SaveFailed where the journal can't be written (this incarnation has then said its
        last word), and Superseded where a later one has claimed the domain.
        """
        for record in records:
            self.directory.journal.append(encode(record))
        self.directory.journal.sync()
        self._look()

    def _look(self) -> None:
        if not self.directory.current():
            raise Superseded(
                f"a later agent has claimed {self.directory.identity.id}, or {self.directory.path} "
                "was replaced: this agent may not speak for it any more"
            )

    def stands(self) -> bool:
        """Say whether this is still the owner of what lies at the directory's path."""
        try:
            return self.directory.current()
        except HandfastError:
            return False

    def write(
        self,
        member: Member,
        roster: Roster,
        epoch: Epoch,
        image: Image,
        objects: bytes,
        left: bytes = b"",
    ) -> Written:
        """Persist one epoch from a trainer's image. Raises SaveFailed.

        ``left`` holds the digests of what the plan says is left to another rank.
        """
        plan, configuration = image.plan, roster.configuration
        parent = self.parent if self.parent and self.parent.stamp.epoch in _epochs(member) else None
        stamp = Stamp(
            run=configuration.run,
            lineage=plan.lineage,
            generation=epoch.generation,
            step=epoch.step,
            domain=member.id,
            shard=configuration.domains[member.me].shard,
            shards=configuration.shards,
            incarnation=member.incarnation,
            configuration=roster.digest,
            parent=parent.stamp.epoch if parent else None,
            forks=plan.forks,
            came=plan.came,
        )
        others = plan.leads or ((plan.replicated or plan.compared) and configuration.shards > 1)
        with ThreadPoolExecutor(1, "digests") as pool:  # beside the writing, which waits for a disk
            digests = pool.submit(_digests, image).result if others else None
            written = self.directory.write(
                stamp,
                Layout(plan.slots, plan.header, plan.nbytes, plan.padded),
                image.source,
                objects=objects,
                aliases=plan.aliases,
                environment=plan.environment,
                replicated=plan.replicated,
                structure=plan.structure,
                left=_left(plan, left),
                digests=digests,
                parent=parent,
                verify=plan.verify,
            )
        self._former, self.parent = parent, written.manifest
        return written

    def withdraw(self, manifest: Manifest) -> None:
        """Take away what was written last and is not voted for: nobody can ask for it.

        Raises what :meth:`release` raises; what stays then is a left-over (see :meth:`resume`).
        """
        self.parent = self._former
        self.release((manifest.stamp.epoch,))

    def unlike(
        self, manifest: Manifest, others: Sequence[tuple[str, str]]
    ) -> dict[str, tuple[str, ...]]:
        """Find what ranks of this node left out and hold otherwise: paths, by the ranks' domains.

        ``others`` are roots and names of their directories. Each rank asks once its own manifest is
        there, and before it votes. So of two one finds the other's, whoever is first, and whichever
        agent has died in between.
        """
        found = {}
        for root, name in others:
            entry = Shelf(self.files, root, name).entry(manifest.stamp.epoch)
            if entry is None:
                continue
            theirs = entry.sound()
            for rank, first in ((manifest, theirs), (theirs, manifest)):
                if paths := rank.apart(first):
                    found[rank.stamp.domain] = paths
        return found

    def check(
        self, member: Member, epoch: Epoch, progress: Callable[[int, int], None] | None = None
    ) -> Manifest:
        """Read and verify every byte of a copy; gives its manifest.

        What is damaged is looked at twice, since a copy that is called BAD may cost the epoch, and
        an error of a disk, a bus or a network may pass.

        Raises FormatError, Damaged or Refused where the copy is not what this domain attested, any
        other HandfastError where it can't be looked at now.
        """
        with contextlib.suppress(FormatError):
            return self._check(member, epoch, progress)
        time.sleep(PAUSE)
        return self._check(member, epoch, progress)

    def _check(
        self, member: Member, epoch: Epoch, progress: Callable[[int, int], None] | None
    ) -> Manifest:
        manifest = self.manifest(member, epoch)
        self.directory.verify(manifest, progress)
        return manifest

    def manifest(self, member: Member, epoch: Epoch) -> Manifest:
        """Give a copy's manifest, the one that was attested, without a look at its bytes.

        Raises what :meth:`check` raises.
        """
        digest = _attested(member, epoch)
        entry = self.directory.entry(epoch) if digest else None
        if entry is None:
            why = "its manifest is missing" if digest else "it is not retained"
            raise FormatError(f"{member.id} has no copy of {epoch}: {why}")
        return entry.sound(digest)

    def resume(self, member: Member, base: Epoch) -> None:
        """Begin a generation: the base is the parent of what comes, and left-overs may go.

        A left-over is an epoch that was written and never attested, or released and not yet
        removed. Nothing of a predecessor is touched before this.
        """
        self.directory.may_clean = True
        held = _epochs(member)
        found = self.directory.manifests()
        entry = found.get(base)
        self.parent = entry.manifest if entry and base in held else None
        self._held = ()
        self.release(tuple(epoch for epoch in found if epoch not in held))

    def release(self, epochs: tuple[Epoch, ...]) -> None:
        """Remove what the journal says is released, and what stayed of that until now.

        What a reader has pinned stays, and all of it where this raises (see
        :meth:`Directory.release`); that is tried again with the next release.
        """
        self._held = tuple({*epochs, *self._held} - {GENESIS})
        self._held = self.directory.release(self._held)

    def pinned(self) -> tuple[Epoch, ...]:
        """List the epochs that readers hold here. Raises HandfastError where it can't be told."""
        return tuple(sorted(pinned(self.files, self.directory.path)))

    def publish(self, name: str, certificate: Certificate) -> None:
        """Show a certificate to people and scripts, as ``ROOT/certificates/<domain>.json``.

        The journal is the record: of this, handfast reads only that it is there. Each domain has a
        file of its own, replaced as a whole, so that no two writers share one.

        An owner that was frozen can't put its certificate over its successor's. It looks once its
        temporary file is there, and a successor has claimed before it sweeps such files: so the
        one sees the claim, or the other takes the file away, and the rename fails.

        Raises SaveFailed, and Superseded where a later agent has claimed the domain.
        """
        home = f"{self.root}/certificates"
        path = f"{home}/{name}.json"
        with writing("publish the certificate", path):
            make_directory(self.files, home, above=self.root)
            temporary = f"{path}.{self.directory.incarnation}.tmp"
            left = re.compile(rf"{re.escape(name)}\.json\.\d+\.tmp")  # by calls that ended half-way
            found = filter(left.fullmatch, self.files.listdir(home))
            discard(self.files, *(f"{home}/{one}" for one in found))
            write_file(self.files, temporary, msgspec.json.encode(certificate_fields(certificate)))
            try:
                self._look()
            except HandfastError:
                discard(self.files, temporary)
                raise
            self.files.rename(temporary, path)
            self.files.fsync_dir(home)


def _left(plan: Plan, digests: bytes) -> Left | None:
    return Left(plan.left_to, _by_path(plan.left, digests)) if plan.left else None


def _by_path(paths: Sequence[str], digests: bytes) -> dict[str, bytes]:
    parts = [digests[at : at + HASH_BYTES] for at in range(0, len(digests), HASH_BYTES)]
    return dict(zip(paths, parts, strict=True))


def _digests(image: Image) -> bytes:
    """Digest each slot: 16 bytes each, back to back."""
    with memoryview(image.map) as view:
        slots = image.plan.slots
        return b"".join(tensor_digest(s.spec, view[s.start : s.start + s.nbytes]) for s in slots)


def held_alike(image: Image) -> dict[str, bytes]:
    """Digest what seems alike on all ranks to the one of this image, by path and by ties to it."""
    plan = image.plan
    held = _by_path([slot.spec.path for slot in plan.slots], _digests(image))
    found = {path: held[path] for path in plan.replicated}
    return found | {alias: held[path] for alias, path in plan.aliases.items() if path in found}


def certificate_fields(certificate: Certificate) -> dict[str, object]:
    """Spell a certificate out for JSON."""
    return {
        "run": certificate.run,
        "configuration": certificate.configuration,
        "tier": certificate.tier,
        "generation": certificate.epoch.generation,
        "step": certificate.epoch.step,
        "root": certificate.root,
    }


def _attested(member: Member, epoch: Epoch) -> str:
    return next((copy.digest for copy in member.retained if copy.epoch == epoch), "")


def _epochs(member: Member) -> tuple[Epoch, ...]:
    return tuple(copy.epoch for copy in member.retained)


def _decode(data: bytes, directory: Directory) -> Record:
    try:
        return decode_record(data)
    except msgspec.MsgspecError as error:
        raise FormatError(
            f"{directory.path}: a record of the journal is not known to this handfast: {error}. "
            "What to do: use the release of handfast that wrote it, or a later one"
        ) from error


def _lost(directory: Directory, retained: tuple[Copy, ...]) -> list[Lost]:
    """Hold what the journal says is retained against what is there, manifests only."""
    found = directory.manifests()
    lost = []
    for copy in retained:
        entry = found.get(copy.epoch)
        if copy.epoch == GENESIS or (entry is not None and entry.digest == copy.digest):
            continue
        if entry is None:
            lost.append(Lost(copy.epoch, "its manifest is missing"))
        else:
            lost.append(Lost(copy.epoch, entry.problem or "its manifest is not the attested one"))
    return lost
