"""Orbax checkpoints: the steps of a CheckpointManager, and what a Checkpointer saved by itself.

Layout by orbax-checkpoint 0.12.8. A step's directory has ``_CHECKPOINT_METADATA``, which names its
items (metadata/checkpoint.py), and a directory an item; what a Checkpointer saved without a manager
is an item itself. Both are written under ``NAME.orbax-checkpoint-tmp`` and renamed once whole
(path/atomicity.py, ``AtomicRenameTemporaryPath``); ``commit_success.txt`` says under which name.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import states
from handfast.audit.formats.ocdbt import MANIFEST
from handfast.audit.formats.optax import Path, meaning
from handfast.audit.formats.orbax_item import SHARDING, TREE, WRITTEN, Item, Piece, read_item
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Step, Tensor
from handfast.audit.place import Place
from handfast.errors import UNREADABLE, HandfastError

__all__ = ["find"]

ABOUT: Final = "_CHECKPOINT_METADATA"
DONE: Final = "commit_success.txt"
UNDONE: Final = ".orbax-checkpoint-tmp"
STEP: Final = re.compile(r"(?:(.+)_)?([0-9]+)")
"""Names of steps (path/step.py, ``_StandardNameFormat``): with a prefix, with zeros, or neither."""

OWN: Final = ("_ROOT_METADATA", "metadata/_ROOT_METADATA", "metadata/metadata")
"""Files of a manager, beside its steps (metadata/checkpoint.py)."""

TREES: Final = ("PyTreeCheckpointHandler", "StandardCheckpointHandler")
JSON: Final = "JsonCheckpointHandler"

RULE: Final = (
    "CheckpointManager.latest_step(): the greatest number of the directories {name} that are not "
    "temporary by their names, whatever is in them (orbax-checkpoint 0.12.8, path/step.py, "
    "_StandardNameFormat.find_all)"
)


class _About(msgspec.Struct):
    """What ``_CHECKPOINT_METADATA`` holds, as far as it is used here."""

    item_handlers: dict[str, str | None] | str | None = None
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None


def find(place: Place) -> Iterator[Found]:
    """Yield what is in each directory that holds steps, or what the place is if that is one."""
    roots: dict[str, set[str]] = defaultdict(set)
    for step in _steps(place):
        roots[os.path.dirname(step)].add(step)
    for folder in place.folders:
        root, name = os.path.split(folder)
        inside = any(root in steps for steps in roots.values())
        if UNDONE in name and UNDONE not in root and not inside:
            roots[root].update(())
    for root, steps in sorted(roots.items()):
        yield _found(place, root, steps)


def _steps(place: Place) -> set[str]:
    """The directories that are steps, by what is in them."""
    steps, items = set(), set()
    for path in place.files:
        folder, name = os.path.split(path)
        if UNDONE in folder:
            continue
        if name == ABOUT:
            steps.add(folder)
        elif name == TREE:
            items.add(folder)
    for item in sorted(items - steps):
        above, name = os.path.split(item)
        if above not in steps:
            inside = STEP.fullmatch(os.path.basename(above)) and not STEP.fullmatch(name)
            steps.add(above if inside else item)
    return steps


def _found(place: Place, root: str, steps: set[str]) -> Found:
    names = {step: STEP.fullmatch(os.path.basename(step)) for step in steps if step}
    prefixes = {match[1] for match in names.values() if match}
    undone = []
    for folder in place.within(root):
        match = STEP.fullmatch(os.path.basename(folder))
        if folder in place.files:
            continue
        if UNDONE in os.path.basename(folder):
            undone.append(folder)
        elif match and match[1] in prefixes:
            names[folder] = match
    every = sorted({*steps, *names}, key=lambda step: (_number(place, step) or 0, step))
    found, usual = [], set[str]()
    for step in every:
        found.append(_step(place, step, usual))
        usual |= set(_marks(place, step))
    mine = [_in(root, name) for name in OWN]
    inside = (path for step in (*every, *undone) for path in place.below(step))
    return Found(
        "Orbax",
        root,
        found,
        list(_resume(names)),
        frozenset({*inside, *(path for path in mine if path in place.files)}),
        [_left(place, folder, found) for folder in undone],
    )


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _number(place: Place, step: str) -> int | None:
    match = STEP.fullmatch(os.path.basename(step or place.root))
    return int(match[2]) if match else None


def _resume(names: dict[str, re.Match[str] | None]) -> Iterator[Resume]:
    """Say what a manager takes, for each prefix that it may have been given."""
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for step, match in names.items():
        if match:
            groups[f"{match[1]}_N" if match[1] else "N"].append((int(match[2]), step))
    for name, found in sorted(groups.items()):
        yield Resume("all processes that see this directory", max(found)[1], RULE.format(name=name))


def _left(place: Place, folder: str, steps: Sequence[Step]) -> Finding:
    """A save that never ended, or has not yet: what is newer says that it never will."""
    name = os.path.basename(folder).partition(UNDONE)[0]
    match = STEP.fullmatch(name)
    newest = max((step.number or 0 for step in steps), default=0)
    dead = match is not None and int(match[2]) < newest
    says = f"{folder} was never renamed to {name}: its save " + (
        f"died, as there is {newest} by now" if dead else "died, or is still going on"
    )
    strength = Strength.STRONG if dead else Strength.HINT
    count = sum(1 for _ in place.below(folder))
    return Finding(Code.LEFTOVER, strength, folder, says, (folder,), (f"{count} files in it",))


def _marks(place: Place, step: str) -> Iterator[str]:
    """What Orbax writes beside values, by paths in the step; newer releases write more of it."""
    for name in (ABOUT, DONE):
        if _in(step, name) in place.files:
            yield name
    for folder in place.within(step):
        for name in (DONE, SHARDING, WRITTEN):
            if f"{folder}/{name}" in place.files or any(place.within(f"{folder}/{name}")):
                yield f"{os.path.basename(folder)}/{name}"


def _step(place: Place, path: str, usual: Collection[str]) -> Step:
    """Read a step. ``usual`` are the marks of those before it."""
    number = _number(place, path)
    step = Step(path, number, commit=f"the commit time in {ABOUT}")
    if not any(place.below(path)):
        why = "its directory is empty, and CheckpointManager.latest_step() takes it all the same"
        return Step(path, number, missing=[(path, why)])
    parts: list[Part] = []
    said = _About()
    if _in(path, ABOUT) in place.files:
        try:
            said = msgspec.json.decode(place.bytes(_in(path, ABOUT)), type=_About)
        except (*UNREADABLE, HandfastError) as error:
            parts.append(Part(_in(path, ABOUT), problem=f"{error}"))
    begun = said.init_timestamp_nsecs is not None and said.commit_timestamp_nsecs is None
    step.committed = not begun or _in(path, DONE) in place.files
    missing: list[tuple[str, str]] = []
    items: dict[str, Item] = {}
    kinds = _items(place, path, said)
    for name, kind in kinds.items():
        folder = _in(path, name) if name else path
        if not any(place.below(folder)):
            missing.append((folder, f"{ABOUT} names this item"))
        elif kind == TREE:
            items[name] = read_item(place, folder, path)
        else:
            parts.append(_other(place, folder, kind))
    parts += _parts(place, step, items)
    if number is not None and parts:
        label = os.path.basename(path or place.root)
        mine = Counter(Clock.DIRECTORY, number, label, updates=False)
        parts[0].counters = [*parts[0].counters, mine]
    step.parts = parts
    step.missing = [*missing, *chain(*(item.missing for item in items.values()))]
    step.extra = [extra for item in items.values() for extra in item.extra]
    step.findings = [
        *chain(*(item.findings for item in items.values())),
        *_lacking(place, path, kinds, usual),
        *_moved(place, path, [name for name in kinds if name]),
        *_untimely(path, said, items),
    ]
    return step


def _items(place: Place, path: str, said: _About) -> dict[str, str]:
    """The items of a step, each with what it is: TREE, JSON or "" for all else.

    "" as a name is the step itself. Without metadata they are known by what is in them.
    """
    found: dict[str, str] = {}
    if isinstance(said.item_handlers, dict):
        for name, handler in said.item_handlers.items():
            found[name] = JSON if (handler or "").endswith(JSON) else ""
            if (handler or "").endswith(TREES):
                found[name] = TREE
    elif said.item_handlers is not None:
        return {"": TREE if said.item_handlers.endswith(TREES) else ""}
    for folder in ("", *(inside for inside in place.within(path) if inside not in place.files)):
        name = os.path.basename(folder)
        known = {_in(folder or path, TREE), _in(folder or path, MANIFEST)} & place.files.keys()
        if known and not name.startswith("ocdbt.") and UNDONE not in name:
            found[name] = TREE
    return found


def _other(place: Place, folder: str, kind: str) -> Part:
    """An item that is no tree: of JSON it is seen whether it is that."""
    part = Part(folder, nbytes=_size(place, folder), saved=_saved(place, folder))
    part.valueless = () if kind == JSON else (folder,)
    files = [path for path in place.below(folder) if os.path.basename(path) != DONE]
    if not files:
        part.problem = (
            f"{place.absolute(folder)}: nothing is in it. What to do: take it from a copy"
        )
    for path in files:
        if kind == JSON:
            try:
                msgspec.json.decode(place.bytes(path))
            except (*UNREADABLE, HandfastError) as error:
                part.problem = (
                    f"{place.absolute(path)}: no JSON: {error}. What to do: it was damaged, or "
                    "cut; take it from a copy"
                )
    return part


def _size(place: Place, folder: str) -> int:
    return sum(place.files[path].nbytes for path in place.below(folder))


def _saved(place: Place, folder: str) -> float:
    return max((place.files[path].saved for path in place.below(folder)), default=0.0)


def _parts(place: Place, step: Step, items: Mapping[str, Item]) -> list[Part]:
    """A part for each process of each item, with its tensors and counters."""
    arrays = {
        (*filter(None, (name,)), *array.path): (name, item, array)
        for name, item in items.items()
        for array in item.arrays
    }
    empty = [(*filter(None, (name,)), *at) for name, item in items.items() for at in item.empty]
    sense = meaning({path: array.grid.dtype for path, (_, _, array) in arrays.items()}, empty)
    step.scaled = sense.scaled
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    counters: dict[str, list[Counter]] = defaultdict(list)
    for path, (name, item, array) in arrays.items():
        role, of = sense.leaves[path]
        for piece in array.pieces:
            whole = array.grid.shape if piece.offset is not None else None
            tensors[_home(item, piece)].append(
                Tensor(_label(name, array.path), role, piece.values, of, "", whole, piece.offset)
            )
    for count in sense.counts:
        name, item, array = arrays[count.path]
        value = states.number(states.Split((states.Piece(array.pieces[0].values),)))
        if value is not None:
            label = _label(name, array.path)
            counter = Counter(count.clock, value, label, count.updates, count.skips)
            counters[_home(item, array.pieces[0])].append(counter)
    parts = []
    for item in items.values():
        for number, folder in (*item.processes.items(), ("", item.folder)):
            if number or tensors[folder] or not item.processes:
                rank = {"process": int(number)} if number.isdecimal() else {}
                size, saved = _size(place, folder), _saved(place, folder)
                parts.append(Part(folder, rank, size, saved, tensors[folder], counters[folder]))
        parts += [Part(path, problem=problem) for path, problem in item.problems.items()]
    return parts


def _home(item: Item, piece: Piece) -> str:
    """The directory of the part that a piece belongs to."""
    return item.processes.get(piece.process, item.folder)


def _label(name: str, path: Path) -> str:
    return _in(name, ".".join(path))


def _lacking(
    place: Place, path: str, items: Collection[str], usual: Collection[str]
) -> Iterator[Finding]:
    """Find what the steps before have beside their values, and this one has not, or no more.

    A release that writes one commit file writes all of them, and metadata, too (0.12.3 on).
    """
    here = set(_marks(place, path))
    wanted = set(usual)
    if any(os.path.basename(mark) == DONE for mark in here):
        wanted |= {ABOUT, DONE, *(f"{item}/{DONE}" for item in items if item)}
    for mark in sorted(wanted - here):
        item = os.path.dirname(mark)
        if item and (item not in items or not any(place.below(_in(path, item)))):
            continue
        code = Code.UNCOMMITTED if mark == DONE else Code.MISSING
        says = f"{_in(path, mark)} is missing, and should be there: the step was copied or "
        says += "deleted in part. "
        if mark == DONE:
            says += "On this disk Orbax takes it all the same; on GCS it does not"
        yield Finding(code, Strength.STRONG, path, says.strip(), (_in(path, mark),))
    for folder in (path, *(_in(path, item) for item in items if item)):
        done = _in(folder, DONE)
        if done in place.files and not _committed(place, folder):
            says = f"{done} does not say what Orbax writes there: it was damaged or overwritten"
            yield Finding(Code.CORRUPT, Strength.STRONG, path, says, (done,))


def _untimely(path: str, said: _About, items: Mapping[str, Item]) -> Iterator[Finding]:
    """Find items whose stores were committed before the step was begun, or after its commit.

    The primary process does all three (atomicity.py; ocdbt_utils.py), by its own clock.
    """
    begun, ended = said.init_timestamp_nsecs, said.commit_timestamp_nsecs
    for name, item in items.items():
        if begun and ended and item.committed and not begun <= item.committed <= ended:
            says = (
                f"{item.folder or name or 'its store'} was committed at {item.committed} ns, and "
                f"the step was saved from {begun} to {ended}: it, or {ABOUT}, is of another save"
            )
            yield Finding(Code.EXTRA, Strength.STRONG, path, says, (item.folder,))


def _moved(place: Place, path: str, items: Sequence[str]) -> Iterator[Finding]:
    """Find items that were committed as parts of another step, by what they say themselves."""
    own = _committed(place, path)
    if not own:
        return
    if path and os.path.basename(own) != os.path.basename(path):
        says = f"{path} was committed as {own}: it was renamed, or copied, since"
        yield Finding(Code.COUNTERS, Strength.HINT, path, says, (path,))
    for name in items:
        said = _committed(place, _in(path, name))
        if said and said != f"{own}/{name}":
            says = (
                f"{_in(path, name)} was committed as {said}, and the step as {own}: it is of "
                "another one"
            )
            yield Finding(Code.EXTRA, Strength.STRONG, path, says, (_in(path, name),))


def _committed(place: Place, folder: str) -> str:
    """Under which name a directory was committed; "" where that is not said."""
    try:
        text = place.bytes(_in(folder, DONE), 1 << 16).decode()
    except (KeyError, UnicodeDecodeError, HandfastError):
        return ""
    _, said, name = text.partition("commit was successful to ")
    return re.sub(re.escape(UNDONE) + r"[^/]*", "", name.strip()) if said else ""
