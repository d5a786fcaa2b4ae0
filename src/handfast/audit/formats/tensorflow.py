"""Checkpoints of ``tf.train.Checkpoint``, as CheckpointManager, Keras and others write them.

Layout by TensorFlow 2.21 (python/checkpoint): a prefix with an index and files of values
(:mod:`handfast.audit.formats.bundle`), and the file ``checkpoint``, which names the prefix to take.
Values are written first, then the index, both under temporary names, and ``checkpoint`` last.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.bundle import (
    DATA,
    INDEX,
    TEXT,
    Bundle,
    data_file,
    pieces,
    read_bundle,
    read_text,
)
from handfast.audit.formats.optax import Leaf
from handfast.audit.formats.states import Piece, Split, number
from handfast.audit.formats.table import MAGIC
from handfast.audit.formats.trackable import GRAPH, Graph, read_graph
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Role, Step, Tensor
from handfast.audit.place import Place
from handfast.errors import HandfastError

__all__ = ["find"]

STATE: Final = "checkpoint"
STATE_MOST: Final = 1 << 20
VALUE: Final = "/.ATTRIBUTES/VARIABLE_VALUE"

_NUMBER: Final = re.compile(r".*?([0-9]+)")
_SAID: Final = re.compile(r'\s*([a-z_]+)\s*:\s*(?:"((?:[^"\\]|\\.)*)"|[-+.0-9e]+)\s*')
_UNDONE: Final = re.compile(r"(.+?)(?:_temp/part-.*|\.(?:index|data-[-of0-9]*)\.tempstate[0-9]+)")
"""Names of files until they are whole (core/util/tensor_bundle, core/kernels/save_restore_v2)."""

RULE: Final = (
    "tf.train.latest_checkpoint: what the file `checkpoint` names, if its index is there; whether "
    "its values are is not looked at (TensorFlow 2.21, python/checkpoint/checkpoint_management.py)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield what is in each directory that has such checkpoints, or what a save left of one."""
    homes: dict[str, _Home] = defaultdict(lambda: _Home({}, []))
    for path in place.files:
        undone, data = _UNDONE.fullmatch(path), DATA.fullmatch(path)
        if undone:
            homes[os.path.dirname(undone[1])].undone.append((undone[1], path))
        elif data:
            homes[os.path.dirname(path)].prefixes.setdefault(data[1], []).append(path)
        elif path.endswith(INDEX) and _is_index(place, path):
            prefix = path.removesuffix(INDEX)
            homes[os.path.dirname(path)].prefixes.setdefault(prefix, [])
    for folder, home in sorted(homes.items()):
        yield _found(place, folder, home)


class _Home(NamedTuple):
    """A directory: prefixes with their files of values, and what is not whole, of which prefix."""

    prefixes: dict[str, list[str]]
    undone: list[tuple[str, str]]


def _is_index(place: Place, path: str) -> bool:
    """Whether a file is a table, or the values beside it say that it should be."""
    beside = place.within(os.path.dirname(path))
    if any(other.startswith(path.removesuffix(INDEX) + ".data-") for other in beside):
        return True
    size = place.files[path].nbytes
    if size < len(MAGIC):
        return False
    try:
        tail = place.reader.bytes(place.absolute(path), size - len(MAGIC), len(MAGIC))
    except HandfastError:
        return False
    return tail == MAGIC


def _number(prefix: str) -> int | None:
    found = _NUMBER.fullmatch(os.path.basename(prefix))
    return int(found[1]) if found else None


def _found(place: Place, folder: str, home: _Home) -> Found:
    order = sorted(home.prefixes, key=lambda prefix: (_number(prefix) or 0, prefix))
    steps = [_step(place, prefix, home.prefixes[prefix]) for prefix in order]
    files = {path for paths in home.prefixes.values() for path in paths}
    files |= {prefix + INDEX for prefix in order if prefix + INDEX in place.files}
    files |= {path for _, path in home.undone}
    state = f"{folder}/{STATE}" if folder else STATE
    found = Found("TensorFlow", folder, steps, findings=list(_left(home, steps)))
    if state in place.files:
        files.add(state)
        _track(place, folder, state, found)
    elif any(
        c.clock is Clock.TRACKER and c.value for s in steps for p in s.parts for c in p.counters
    ):
        says = f"{state} is missing, which every save writes: a restart finds no checkpoint here"
        hint = Finding(Code.TRACKER, Strength.HINT, folder, says, (state,))
        found.findings = [*found.findings, hint]
    found.files = frozenset(files)
    return found


def _left(home: _Home, steps: Sequence[Step]) -> Iterator[Finding]:
    """What saves left that never ended, or have not yet; what is newer says that they won't."""
    newest = max((step.number or 0 for step in steps), default=0)
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for prefix, path in home.undone:
        by_prefix[prefix].append(path)
    for prefix, paths in by_prefix.items():
        own = _number(prefix)
        dead = own is not None and own < newest
        tail = f"died, as there is {newest} by now" if dead else "died, or is still going on"
        yield Finding(
            Code.LEFTOVER,
            Strength.STRONG if dead else Strength.HINT,
            prefix,
            f"{len(paths)} files of {prefix} have temporary names: its save {tail}",
            tuple(paths),
        )


def _track(place: Place, folder: str, path: str, found: Found) -> None:
    """Say what a restart takes, by the file ``checkpoint``, and whether that is there."""
    latest, every, problem = _state(place, path)
    findings = [*found.findings]
    there = {step.path for step in found.steps if step.path + INDEX in place.files}
    newest = max((s.number for s in found.steps if s.path in there and s.number), default=None)

    def add(strength: Strength, says: str) -> None:
        findings.append(Finding(Code.TRACKER, strength, folder, says, (path,)))

    if problem or not latest:
        add(Strength.CERTAIN, problem or f"{path} names no checkpoint: a restart finds none")
    elif os.path.isabs(latest) and os.path.dirname(latest) != place.absolute(folder).rstrip("/"):
        add(Strength.HINT, f"{path} names {latest}, which is elsewhere: a restart looks there")
    else:
        taken = os.path.normpath(os.path.join(folder, os.path.basename(latest)))
        if taken in there:
            found.resume = [Resume("whoever reads this directory", taken, RULE)]
            number = _number(taken)
            if number is not None and newest is not None and number < newest:
                add(Strength.HINT, f"{path} names {latest}, and {newest} is there, which is newer")
        else:
            add(
                Strength.CERTAIN, f"{path} names {latest}, which is not there: a restart finds none"
            )
    gone = [
        name for name in every
        if name != latest and os.path.normpath(os.path.join(folder, os.path.basename(name)))
        not in there
    ]  # fmt: skip
    if gone:
        add(Strength.HINT, f"{path} lists {', '.join(gone[:3])}, and not all of these are there")
    found.findings = findings


def _state(place: Place, path: str) -> tuple[str, list[str], str]:
    """What the file says: the latest one, all of them, and why it can't be read."""
    try:
        text = place.bytes(path, STATE_MOST).decode()
    except (HandfastError, UnicodeDecodeError) as error:
        return "", [], f"{path} can't be read: {error}"
    said: dict[str, list[str]] = defaultdict(list)
    for line in filter(str.strip, text.splitlines()):
        match = _SAID.fullmatch(line)
        if match and match[2] is not None:
            said[match[1]].append(re.sub(r"\\(.)", r"\1", match[2]))
        elif not match:
            return "", [], f"{path}: {line.strip()!r:.80} is cut or damaged: a restart finds none"
    latest = said["model_checkpoint_path"]
    return latest[-1] if latest else "", said["all_model_checkpoint_paths"], ""


def _step(place: Place, prefix: str, there: Sequence[str]) -> Step:
    step = Step(prefix, _number(prefix))
    index = Part(prefix + INDEX)
    if prefix + INDEX not in place.files:
        step.missing = [(prefix + INDEX, "there are values of it: its save died, or it is gone")]
        return step
    index.nbytes, index.saved = place.files[prefix + INDEX]
    step.parts = [index]
    try:
        bundle = read_bundle(place, prefix)
    except HandfastError as error:
        index.problem = str(error)
        return step
    named = [data_file(prefix, shard, bundle.shards) for shard in range(bundle.shards)]
    step.missing = [(p, "its index names it") for p in named if p not in place.files]
    step.extra = [(p, "its index does not name it") for p in there if p not in named]
    step.findings = list(_reached(place, prefix, bundle))
    graph = Graph({}, {})
    if GRAPH in bundle.entries and place.files.keys() >= set(named):
        try:
            graph = read_graph(read_text(place, prefix, bundle, GRAPH), f"{prefix}: {GRAPH}")
        except HandfastError as error:
            index.problem = str(error)
    step.parts = [index, *_parts(place, prefix, bundle, graph)]
    if step.number is not None:
        label = os.path.basename(prefix)
        index.counters = [Counter(Clock.DIRECTORY, step.number, label, updates=False)]
    return step


def _reached(place: Place, prefix: str, bundle: Bundle) -> Iterator[Finding]:
    """Files that end before the values that the index has in them."""
    ends: dict[str, int] = defaultdict(int)
    for entry in (*bundle.entries.values(), *bundle.slices.values()):
        path = data_file(prefix, entry.shard, bundle.shards)
        ends[path] = max(ends[path], entry.start + entry.nbytes)
    for path, end in sorted(ends.items()):
        size = place.files[path].nbytes if path in place.files else end
        if size < end:
            says = f"{path} ends at byte {size:,}, and its index refers to {end:,} bytes"
            yield Finding(Code.TRUNCATED, Strength.CERTAIN, prefix, says, (path,))


def _parts(place: Place, prefix: str, bundle: Bundle, graph: Graph) -> Iterator[Part]:
    """A part for each file of values."""
    tensors: Mapping[int, list[Tensor]] = defaultdict(list)
    counters: Mapping[int, list[Counter]] = defaultdict(list)
    problem = ""
    texts: Mapping[int, list[str]] = defaultdict(list)
    for name, entry in bundle.entries.items():
        if entry.dtype == TEXT:
            texts[entry.shard] += [name.removesuffix(VALUE)] * (name != GRAPH)
            continue
        leaf = graph.leaves.get(name, Leaf(Role.OTHER, ""))
        label = name.removesuffix(VALUE)
        try:
            found = list(pieces(place, prefix, bundle, name))
        except HandfastError as error:
            problem = str(error)
            continue
        for piece in found:
            whole = entry.shape if piece.offset is not None else None
            tensors[piece.shard].append(
                Tensor(label, leaf.role, piece.values, leaf.of, "", whole, piece.offset)
            )
        clock = graph.counts.get(name)
        value = number(Split((Piece(found[0].values),))) if clock and found else None
        if clock is not None and value is not None:
            counters[found[0].shard].append(Counter(clock, value, label, updates=False))
    for shard in range(bundle.shards):
        path = data_file(prefix, shard, bundle.shards)
        if path in place.files:
            size, saved = place.files[path]
            rank = {"file": shard} if bundle.shards > 1 else {}
            made = Part(path, rank, size, saved, tensors[shard], counters[shard])
            made.valueless = texts[shard]
            yield made
    if problem:
        yield Part(prefix + INDEX, problem=problem)
