"""Every byte of an epoch, read and held against what was attested; with typed findings.

Without a step this does what a restore would do, descending meet included: the recovery line's
copies are read, a damaged one is refuted, and the next epoch is tried until every shard has a valid
copy. So the answer is not only "what is wrong" but "what would a restore take".
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import msgspec

from handfast.checkpoint.location import Released, check_held
from handfast.checkpoint.status import EpochRow, Trouble, rows, troubles
from handfast.checkpoint.survey import Found, Survey, read_domain
from handfast.core import recover
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import bits
from handfast.core.messages import Bad, Valid
from handfast.core.verdict import Verdict
from handfast.errors import Damaged
from handfast.store.bulk import Scratch, Tap, draw, share_out, tap
from handfast.store.files import Files, reading
from handfast.store.manifest import HASH_BYTES, Manifest, Piece, chunk_hash
from handfast.store.port import Progress
from handfast.store.shelf import RUN, lengths, parts, read_chunk

__all__ = ["Finding", "Verification", "verify_epochs", "verify_line"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong. ``chunk`` and ``offset`` are -1 where it is not within a data file.

    ``chunk`` alone is -1 where bytes that no restore reads stand behind the end, at ``offset``.
    ``offset`` counts the bytes of the file ``path``; ``epoch`` is None for a whole domain.
    """

    domain: str
    shard: int | None
    verdict: Verdict
    problem: str
    epoch: Epoch | None = None
    path: str = ""
    chunk: int = -1
    offset: int = -1


class Verification(msgspec.Struct, frozen=True):
    """What was read and found. ``line`` is what a restore would take after all that was found.

    ``checked`` are the epochs whose every copy here was read, ``nbytes`` the bytes of images.
    """

    line: Epoch | None
    checked: tuple[Epoch, ...]
    findings: tuple[Finding, ...]
    nbytes: int

    @property
    def sound(self) -> bool:
        """Whether everything is as it was attested."""
        return not self.findings


class _Damage(NamedTuple):
    """What is wrong at one place of a copy: a finding, but for whose copy it is."""

    verdict: Verdict
    problem: str
    path: str
    chunk: int
    offset: int


class _Reader:
    """Reads copies of a survey's domains, counting bytes and collecting findings."""

    def __init__(
        self, files: Files, survey: Survey, epochs: Iterable[Epoch], progress: Progress | None
    ) -> None:
        self.files = files
        self.survey = survey
        self.findings = [_finding(trouble) for trouble in troubles(survey)]
        self.checked: list[Epoch] = []
        self.nbytes = 0
        self._progress = progress
        self._counting = threading.Lock()
        self._total = sum(_image_bytes(found, e) for e in epochs for found in survey.places)

    def grow(self, epoch: Epoch) -> None:
        """Tell the progress of an epoch that is read though nobody had meant to."""
        self._total += sum(_image_bytes(found, epoch) for found in self.survey.places)

    def copy(self, place: int, epoch: Epoch) -> bool:
        """Read one domain's copy; true where every byte is right that a restore reads."""
        check_held(self.survey, epoch)
        found = self.survey.places[place]
        entry = found.entries.get(epoch) if found is not None else None
        if found is None or entry is None or entry.manifest is None:
            return False
        shard = self.survey.domains[place].shard
        wrong = [
            Finding(found.id, shard, damage.verdict, damage.problem, epoch, damage.path,
                    damage.chunk, damage.offset)
            for damage in self._damage(found, entry.manifest)
        ]  # fmt: skip
        if wrong and epoch not in read_domain(self.files, found.root, found.name).retained:
            raise Released(f"epoch {epoch} was released by {found.id} while it was read")
        self.findings += wrong
        return all(finding.chunk < 0 for finding in wrong)

    def _damage(self, found: Found, manifest: Manifest) -> list[_Damage]:
        """What is wrong with a copy, in the order of its chunks."""
        home, unit = f"{found.root}/domains/{found.name}", manifest.chunk_bytes
        wrong: list[_Damage] = []
        scratch = Scratch(unit)

        def look(what: tuple[Piece, Tap]) -> None:
            with scratch.lend() as buffer:
                wrong.extend(self._part(manifest, *what, buffer))

        with ExitStack() as stack:
            taps: dict[int, Tap] = {}
            ends = lengths(manifest)
            ahead: list[tuple[Piece, Tap]] = []
            for piece in manifest.pieces:
                path = f"{home}/{manifest.sources[piece.source]}"
                try:
                    if piece.source not in taps:
                        taps[piece.source] = source = tap(self.files, stack, path, medium=True)
                        wrong += self._longer(source, ends.get(manifest.sources[piece.source]))
                except Damaged as error:
                    wrong.append(_Damage(Verdict.MISSING, str(error), path, piece.first, piece.at))
                    continue
                ahead += [(part, taps[piece.source]) for part in parts(piece, unit, RUN)]
            share_out(look, ahead, self.files.lanes)
        return sorted(wrong, key=attrgetter("chunk"))

    def _longer(self, source: Tap, end: int | None) -> Iterator[_Damage]:
        """Say where a file goes on behind its end; that it ends too early its chunks say."""
        with reading(source.path):
            size = self.files.size(source.fd)
        if end is not None and size > end:
            problem = (
                f"{source.path}: {size} bytes long, {size - end} more than were written. What to "
                "do: a restore does not read these, but other programs may refuse the file: cut "
                f"them off (truncate -s {end})"
            )
            yield _Damage(Verdict.CORRUPT, problem, source.path, -1, end)

    def _part(
        self, manifest: Manifest, part: Piece, source: Tap, buffer: memoryview
    ) -> list[_Damage]:
        """Read a part, chunk by chunk, to name all that are wrong. Several threads do so."""
        unit, size = manifest.chunk_bytes, manifest.image_bytes
        wrong = []
        for number in range(part.count):
            index, at = part.first + number, part.at + number * unit
            target = buffer[: min(unit, size - index * unit)]
            for again in (True, False):  # a read that failed may succeed
                try:
                    read_chunk(self.files, source, manifest, part, number, target)
                    break
                except Damaged as error:
                    if not again:
                        verdict, problem = self._origin(source, at, target, str(error))
                        wrong.append(_Damage(verdict, problem, source.path, index, at))
        with self._counting:
            self.nbytes += min(part.count * unit, size - part.first * unit)
            if self._progress is not None:
                self._progress(self.nbytes, max(self._total, self.nbytes))
        return wrong

    def _origin(self, source: Tap, at: int, chunk: memoryview, problem: str) -> tuple[Verdict, str]:
        """Tell bytes of another epoch or shard, whose provenance is known, from mere damage."""
        try:
            got = draw(self.files, source, chunk, at)
        except OSError:
            return Verdict.CORRUPT, problem
        whose = self._hashes.get(chunk_hash(chunk[:got]))
        if whose is None:
            return Verdict.CORRUPT, problem
        return Verdict.MIXED, f"{problem}. These are the bytes of {whose}"

    @cached_property
    def _hashes(self) -> dict[bytes, str]:
        """Whose each chunk is, over all sound manifests of the run."""
        whose = {}
        for found in [found for found in self.survey.places if found is not None]:
            for entry in found.entries.values():
                hashes = entry.manifest.hashes if entry.manifest is not None else b""
                for start in range(0, len(hashes), HASH_BYTES):
                    name = f"chunk {start // HASH_BYTES} of epoch {entry.epoch} in {found.id}"
                    whose[hashes[start : start + HASH_BYTES]] = name
        return whose

    def result(self, line: Epoch | None) -> Verification:
        """Close the books."""
        return Verification(line, tuple(self.checked), tuple(self.findings), self.nbytes)


def verify_line(files: Files, survey: Survey, progress: Progress | None = None) -> Verification:
    """Read what a restore would read, and descend as it would.

    Raises Released where a live domain let an epoch go meanwhile.
    """
    reader = _Reader(files, survey, [survey.line] if survey.line else [], progress)
    if survey.roster is None:
        return reader.result(None)
    held = survey.recovery()
    while True:
        at = recover.standing(survey.roster, held)
        if at.phase is not recover.Phase.CHECKING or at.epoch is None:
            return reader.result(at.epoch if at.phase is recover.Phase.READY else None)
        if at.epoch != survey.line and at.epoch not in reader.checked:
            reader.grow(at.epoch)
        for place in bits(at.waiting):
            sound = at.epoch == GENESIS or reader.copy(place, at.epoch)
            fact = Valid(place, held.generation, at.epoch)
            held = recover.join(
                held, fact if sound else Bad(place, held.generation, at.epoch, "damaged")
            )
        if at.epoch != GENESIS:
            reader.checked.append(at.epoch)


def verify_epochs(
    files: Files,
    survey: Survey,
    epochs: Iterable[Epoch],
    progress: Progress | None = None,
    *,
    everything: bool = False,
) -> Verification:
    """Read every copy of these epochs, whoever has one; what is not refuted then is the ``line``.

    An epoch that is not whole is a finding, too. Raises Released as :func:`verify_line`.

    With ``everything`` the epochs are all that there are, not those that somebody relies on: one
    that is released meanwhile is left out (unless that leaves none), and one that is AHEAD is what
    it should be.
    """
    wanted = tuple(epochs)
    reader = _Reader(files, survey, wanted, progress)
    if survey.roster is None:
        return reader.result(None)
    held = survey.recovery()
    judged = {row.epoch: row for row in rows(survey)}
    for epoch in wanted:
        try:
            bad = [p for p in _holders(survey, epoch) if not reader.copy(p, epoch)]
        except Released:
            if not everything or (epoch == wanted[-1] and not reader.checked):
                raise
            continue
        for place in bad:
            held = recover.join(held, Bad(place, held.generation, epoch, "damaged"))
        if not (everything and judged[epoch].verdict is Verdict.AHEAD):
            reader.findings += _unwhole(survey, judged[epoch])
        reader.checked.append(epoch)
    return reader.result(recover.standing(survey.roster, held).epoch)


def _holders(survey: Survey, epoch: Epoch) -> list[int]:
    return [n for n, f in enumerate(survey.places) if f is not None and epoch in f.retained]


def _unwhole(survey: Survey, row: EpochRow) -> list[Finding]:
    """Say of an epoch that some shard never finished who lacks it."""
    if row.verdict not in (Verdict.TORN, Verdict.AHEAD):
        return []
    return [
        Finding(
            domain.id,
            domain.shard,
            row.verdict,
            f"epoch {row.epoch} is not whole: this domain has {cell.mark}"
            + (f" it ({cell.problem})" if cell.problem else " it"),
            row.epoch,
        )
        for domain in survey.domains
        if (cell := row.cells[domain.id]).verdict not in (Verdict.COMPLETE, Verdict.AHEAD)
    ]


def _finding(trouble: Trouble) -> Finding:
    return Finding(trouble.domain, trouble.shard, trouble.verdict, trouble.problem, trouble.epoch)


def _image_bytes(found: Found | None, epoch: Epoch) -> int:
    entry = found.entries.get(epoch) if found is not None and epoch in found.retained else None
    return entry.manifest.image_bytes if entry is not None and entry.manifest is not None else 0
