"""handfast's own runs: their epochs, as journals and manifests show them, with verdicts.

What is found is what ``handfast verify`` finds (:mod:`handfast.checkpoint.status`); tensors and
counters are there for the checks that know no format. Stored objects are read as plain values: no
registered type is made, no pickle is read (docs/format.md, Objects).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import msgspec

from handfast.audit.extent import Extent, Reader, dense, inside
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.states import Piece, Split, number
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Role, Step, Tensor
from handfast.audit.place import Place
from handfast.checkpoint.location import Location
from handfast.checkpoint.status import EpochRow, Trouble, rows, troubles
from handfast.checkpoint.survey import Found as Domain
from handfast.checkpoint.survey import Survey
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.verdict import Verdict
from handfast.errors import UNREADABLE, Damaged, HandfastError
from handfast.store.claims import read_identity
from handfast.store.files import Posix
from handfast.store.image import Slot
from handfast.store.manifest import HASH_BYTES, Manifest, chunk_hash
from handfast.store.objects import VERSION, child

__all__ = ["find"]

CODES: Final[Mapping[Verdict, Code]] = {
    Verdict.CORRUPT: Code.CORRUPT,
    Verdict.MIXED: Code.EXTRA,
    Verdict.FOREIGN: Code.EXTRA,
    Verdict.MISSING: Code.MISSING,
}

RULE: Final = (
    "the recovery line: the greatest epoch of the living timeline of which every shard has a copy "
    "(handfast.core.recover.candidates)"
)

BOXES: Final = (0, 1)  # tags of lists and tuples in stored objects
DICTS: Final = (2, 3)  # and of dicts
ADAMS: Final = ("Adam", "AdamW", "NAdam", "RAdam")
CYCLED: Final = {"base_momentum", "max_momentum"}  # keys of groups whose betas a scheduler moves
FILES: Final = ("round.json", "round.lock")


def find(place: Place) -> Iterator[Found]:
    """Yield what is there of each run; one whose nodes have directories of their own is one.

    Directories with domains of one name are copies: each is looked at by itself.
    """
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for folder in place.folders:
        above, name = os.path.split(folder)
        there = [p for p in place.within(folder) if f"{p}/domain.json" in place.files]
        if name == "domains" and there:
            names = {os.path.basename(path) for path in there}
            known = groups[_run(place, above, folder)]
            group = next((group for group in known if not names & group.keys()), None)
            if group is None:
                known.append(group := {})
            group |= dict.fromkeys(names, above)
    for group in chain(*groups.values()):
        yield _found(place, list(dict.fromkeys(group.values())))


def _run(place: Place, root: str, folder: str) -> str:
    """The run that a directory has domains of; itself where none can be read."""
    for path in place.within(folder):
        try:
            return read_identity(Posix(), place.absolute(root), os.path.basename(path)).run
        except (HandfastError, ValueError):
            continue
    return f"\0{root}"


def _found(place: Place, roots: Sequence[str]) -> Found:
    found = Found("handfast", roots[0], files=frozenset(chain(*(_own(place, r) for r in roots))))
    try:
        survey = Location([place.absolute(root) for root in roots], Posix()).survey()
        wrong = troubles(survey)
    except HandfastError as error:
        found.findings = [_finding(Code.UNREADABLE, roots[0], f"it can't be looked at: {error}")]
        return found
    base = f"{roots[0]}/" if roots[0] else ""
    judged = [_step(place, survey, row, base, wrong) for row in reversed(rows(survey))]
    found.steps = judged
    found.findings = [_trouble(trouble, roots[0]) for trouble in wrong if trouble.epoch is None]
    if survey.line is not None:
        start = survey.line == GENESIS
        taken = "the beginning: nothing was saved" if start else _label(base, survey.line)
        found.resume = [Resume("all ranks", taken, RULE)]
    if survey.fallen is not None:
        says = f"a restore would take {survey.line}, and {survey.fallen} had converged"
        found.findings = [*found.findings, _finding(Code.TRACKER, roots[0], says)]
    return found


def _own(place: Place, root: str) -> Iterator[str]:
    """The files of a run below one of its directories."""
    base = f"{root}/" if root else ""
    for part in ("domains", "certificates"):
        yield from place.below(base + part)
    yield from (base + name for name in FILES if base + name in place.files)


def _label(base: str, epoch: Epoch) -> str:
    return f"{base}epoch {epoch}"


def _finding(code: Code, step: str, says: str, part: str = "") -> Finding:
    return Finding(code, Strength.CERTAIN, step, says, (part,) if part else ())


def _trouble(trouble: Trouble, step: str) -> Finding:
    return _finding(CODES.get(trouble.verdict, Code.CORRUPT), step, trouble.problem, trouble.domain)


def _step(place: Place, survey: Survey, row: EpochRow, base: str, wrong: Sequence[Trouble]) -> Step:
    """An epoch. One that is torn is no fault, since no restore takes it: a hint."""
    label = _label(base, row.epoch)
    findings = [_trouble(trouble, label) for trouble in wrong if trouble.epoch == row.epoch]
    if row.verdict is Verdict.TORN:
        lack = [name for name, cell in row.cells.items() if cell.verdict is not Verdict.COMPLETE]
        says = f"it never became whole: not all of it is in {', '.join(lack)}"
        findings.append(Finding(Code.UNCOMMITTED, Strength.HINT, label, says, tuple(lack)))
    parts = [
        _part(place, domain, entry.manifest)
        for domain in survey.places
        if domain is not None
        and (entry := domain.entries.get(row.epoch)) is not None
        and entry.manifest is not None
    ]
    return Step(label, row.epoch.step, parts, findings=findings)


def _part(place: Place, domain: Domain, manifest: Manifest) -> Part:
    stamp = manifest.stamp
    home = os.path.join(domain.root, "domains", domain.name)
    said = _Said(manifest)
    image = _Image(place.reader, home, manifest)
    tensors = [_tensor(image, slot, said) for slot in manifest.slots]
    mine = Counter(Clock.TRAINER, stamp.step, "stamp/step", updates=False)
    return Part(
        os.path.relpath(home, os.path.realpath(place.root)),
        {"rank": stamp.shard},
        manifest.image_bytes,
        tensors=tensors,
        counters=[mine, *_counted(tensors), *said.schedules],
        betas=said.betas,
        run=stamp.run,
        facts={
            "how many shards there are": stamp.shards,
            "the lineage": stamp.lineage,
            "the configuration": stamp.configuration,
        },
    )


def _counted(tensors: Sequence[Tensor]) -> Iterator[Counter]:
    """What an optimizer counted; it need not be what the user calls a step."""
    for tensor in tensors:
        if tensor.of and tensor.path.endswith("/step"):
            value = number(Split((Piece(tensor.values),)))
            if value is not None:
                yield Counter(Clock.PARAMETER, value, tensor.of, updates=False)


def _tensor(image: _Image, slot: Slot, said: _Said) -> Tensor:
    spec = slot.spec
    role, of, group = said.role(spec.path, spec.dtype)
    piece = spec.shape != spec.global_shape
    values = Extent(_Stretch(image, slot, spec.path), spec.dtype, spec.shape, dense(spec.shape))
    return Tensor(
        spec.path, role, values, of, group,
        spec.global_shape if piece else None, spec.offset if piece else None,
    )  # fmt: skip


class _Said:
    """What the objects of a state say of its tensors: kinds of components, and their groups."""

    def __init__(self, manifest: Manifest) -> None:
        tree = _plain(manifest.objects)
        self._kinds = _texts(tree.get(""))
        self._paths = {slot.spec.path for slot in manifest.slots}
        self._groups: dict[str, str] = {}
        self.betas: dict[str, tuple[float, float]] = {}
        self.schedules: list[Counter] = []
        for component, kind in self._kinds.items():
            state = tree.get(component)
            if type(state) is dict and kind.startswith("optimizer"):
                self._optimizer(component, state)
            elif type(state) is dict and kind.startswith("scheduler"):
                last = number(state.get("last_epoch"))
                if last is not None and "best" not in state:  # that one counts evaluations
                    path = f"{component}/last_epoch"
                    self.schedules.append(Counter(Clock.SCHEDULER, last, path, updates=False))

    def _optimizer(self, component: str, state: Mapping[Any, Any]) -> None:
        groups = state.get("param_groups")
        for at, group in enumerate(groups if type(groups) is list else ()):
            if type(group) is not dict:
                continue
            label = f"{component}/param_groups[{at}]"
            names = group.get("params")
            for name in names if type(names) is list else ():
                self._groups[child("", name)] = label
            betas = group.get("betas")
            if state.get("type") in ADAMS and not CYCLED & group.keys():
                match betas:
                    case [float(first), float(second)]:
                        self.betas[label] = (first, second)

    def role(self, path: str, dtype: str) -> tuple[Role, str, str]:
        """What a tensor is, which parameter it belongs to, and that one's group.

        A module's tensor that an optimizer trains is a parameter; where nothing is trained, any
        of numbers is. Whole numbers are none.
        """
        component, _, rest = path.partition("/")
        kind = self._kinds.get(component, "")
        if kind.startswith("optimizer") and rest.startswith("state/"):
            of, _, key = rest.removeprefix("state/").rpartition("/")
            return self._state_role(path, key), of, self._groups.get(of, "")
        if not kind.startswith("module"):
            return Role.OTHER, "", ""
        of = rest if rest in self._groups else f"{component}.{rest}"
        if of in self._groups or (not self._groups and not dtype.startswith(("int", "uint", "b"))):
            return Role.PARAMETER, of if of in self._groups else rest, ""
        return Role.BUFFER, "", ""

    def _state_role(self, path: str, key: str) -> Role:
        """torch 2.13, torch/optim/adam.py, rmsprop.py, sgd.py; Lion has a first moment alone."""
        if key == "exp_avg":
            beside = f"{path}_sq" in self._paths
            return Role.FIRST if beside else Role.MOMENTUM
        roles = {"exp_avg_sq": Role.SECOND, "square_avg": Role.SECOND}
        return roles.get(key, Role.MOMENTUM if key == "momentum_buffer" else Role.OTHER)


def _plain(objects: bytes) -> Mapping[Any, Any]:
    """The dict that stored objects are, as far as they are plain values; None stands for others."""
    try:
        root = msgspec.msgpack.decode(objects)
        if type(root) is list and len(root) == 2 and root[0] == VERSION:
            found = _node(root[1])
            return found if type(found) is dict else {}
    except (*UNREADABLE, IndexError, TypeError):
        pass
    return {}


def _node(node: Any) -> Any:
    if type(node) is not list:
        return node
    tag, *parts = node
    if tag in BOXES:
        return [_node(part) for part in parts]
    if tag in DICTS:
        return {_node(k): _node(v) for k, v in zip(parts[::2], parts[1::2], strict=True)}
    return None


def _texts(node: Any) -> dict[str, str]:
    """A dict's texts by texts."""
    pairs = node.items() if type(node) is dict else ()
    return {key: value for key, value in pairs if type(key) is type(value) is str}


class _Image:
    """The bytes of a shard's image, each chunk held against its hash when it is read."""

    def __init__(self, reader: Reader, home: str, manifest: Manifest) -> None:
        self._reader, self._manifest = reader, manifest
        self._files = [os.path.join(home, source) for source in manifest.sources]
        self._firsts = [piece.first for piece in manifest.pieces]
        self._last = (-1, b"")

    def read(self, into: memoryview, start: int) -> None:
        """Fill a buffer. Raises Damaged, naming file and chunk."""
        unit, done = self._manifest.chunk_bytes, 0
        while done < len(into):
            at = start + done
            piece = self._chunk(at // unit)[at % unit :][: len(into) - done]
            into[done : done + len(piece)] = piece
            done += len(piece)

    def _chunk(self, index: int) -> bytes:
        if self._last[0] != index:
            manifest = self._manifest
            unit = manifest.chunk_bytes
            piece = manifest.pieces[bisect_right(self._firsts, index) - 1]
            file, at = self._files[piece.source], piece.at + (index - piece.first) * unit
            size = min(unit, manifest.image_bytes - index * unit)
            data = self._reader.bytes(file, at, size)
            if chunk_hash(data) != manifest.hashes[index * HASH_BYTES :][:HASH_BYTES]:
                raise Damaged(
                    f"{file}: chunk {index} of epoch {manifest.stamp.epoch}, at byte {at:,}, "
                    "differs from its hash. What to do: restore this shard from another copy or "
                    "another epoch"
                )
            self._last = (index, data)
        return self._last[1]


class _Stretch:
    """A tensor's bytes in an image: a :class:`handfast.audit.extent.Source`."""

    __slots__ = ("_image", "_start", "name", "nbytes")

    def __init__(self, image: _Image, slot: Slot, name: str) -> None:
        self._image, self._start = image, slot.start
        self.name, self.nbytes = name, slot.nbytes

    def read(self, into: memoryview, at: int) -> None:
        """See the port."""
        inside(self, len(into), at)
        self._image.read(into, self._start + at)
