"""One item of an Orbax checkpoint: a tree of arrays in OCDBT or in directories, or another thing.

Layout by orbax-checkpoint 0.12.8: ``_METADATA`` names the tree's leaves (metadata/tree.py), each
process writes an OCDBT store of its own, ``ocdbt.process_N``, and the item's own manifest refers to
their values (serialization/ocdbt_utils.py, ``merge_ocdbt_per_process_files``);
``array_metadatas/process_N`` says how each process wrote its arrays (array_metadata_store.py).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Final, NamedTuple, TypeVar

import msgspec

from handfast.audit.extent import Range
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.ocdbt import MANIFEST, Database, Value, read_database
from handfast.audit.formats.optax import Path
from handfast.audit.formats.zarr import METADATA, Chunked, Grid, places, read_grid
from handfast.audit.place import Place
from handfast.errors import UNREADABLE, HandfastError

__all__ = ["SHARDING", "TREE", "WRITTEN", "Array", "Item", "Piece", "read_item"]

TREE: Final = "_METADATA"
WRITTEN: Final = "array_metadatas"
SHARDING: Final = "_sharding"
SHOWN: Final = 6
PROCESS: Final = re.compile(r"ocdbt\.process_(?:replica_)?([0-9A-Za-z]+)")
NO_VALUES: Final = ("None", "Dict", "List", "Tuple", "NamedTuple", "string")
"""Types of leaves without arrays (metadata/empty_values.py); strings are in ``_strings.json``."""


_Any = TypeVar("_Any")


class _Key(msgspec.Struct):
    key: str | int


class _Type(msgspec.Struct):
    value_type: str
    skip_deserialize: bool = False


class _Leaf(msgspec.Struct):
    key_metadata: list[_Key]
    value_metadata: _Type


class _Tree(msgspec.Struct):
    """What ``_METADATA`` holds, as far as it is used here."""

    tree_metadata: dict[str, _Leaf]
    store_array_data_equal_to_fill_value: bool = False


class _Array(msgspec.Struct):
    param_name: str
    chunk_shape: tuple[int, ...]


class _Entry(msgspec.Struct):
    array_metadata: _Array


class _Written(msgspec.Struct):
    """What ``array_metadatas/process_N`` holds, as far as it is used here."""

    array_metadatas: list[_Entry]


class Piece(NamedTuple):
    """Some of an array: its values, where it begins in the array, and which process wrote it."""

    values: Chunked
    offset: tuple[int, ...] | None
    process: str


class Array(NamedTuple):
    """A leaf: its path in the tree, how it lies, and its pieces."""

    path: Path
    grid: Grid
    pieces: tuple[Piece, ...]


class Item(msgspec.Struct):
    """What an item is, and what is wrong with it.

    ``processes`` are the directories of the processes that wrote it, by their numbers; ``empty``
    the paths of leaves without values; ``committed`` is when its store was (see
    :class:`handfast.audit.formats.ocdbt.Database`). ``problems`` go by the path of what can't be
    read; the rest is as in :class:`handfast.audit.found.Step`.
    """

    folder: str
    committed: int = 0
    arrays: list[Array] = []
    empty: list[Path] = []
    processes: dict[str, str] = {}
    problems: dict[str, str] = {}
    missing: list[tuple[str, str]] = []
    extra: list[tuple[str, str]] = []
    findings: list[Finding] = []


class _Stored(NamedTuple):
    """An array as it was found: how it lies, and its chunks by their names."""

    grid: Grid
    chunks: Mapping[str, Value]


def read_item(place: Place, folder: str, step: str) -> Item:
    """Read an item's directory: names and metadata, and no values. Nothing is raised."""
    return _Reading(place, folder, step).item


class _Reading:
    """An item that is being read. ``sure``: all of its stores could be, so what lacks is lost."""

    def __init__(self, place: Place, folder: str, step: str) -> None:
        self._place, self._step = place, step
        self._base = f"{folder}/" if folder else ""
        self.item = Item(folder)
        self._writers: dict[str, str] = {}
        tree = self._tree()
        self._sure = True
        if self._base + MANIFEST in place.files:
            stored = self._arrays(self._merged())
        else:
            stored = self._arrays(self._files())
        whole = tree is not None and tree.store_array_data_equal_to_fill_value
        for name, path in self._paths(tree, stored).items():
            array = stored[name]
            if whole and self._sure:
                self._count(name, array)
            self.item.arrays.append(
                Array(path, array.grid, tuple(self._pieces(name, array, whole)))
            )
        self._written(stored)

    def _tree(self) -> _Tree | None:
        path = self._base + TREE
        if path not in self._place.files:
            self.item.missing.append((path, "Orbax writes it for every tree (metadata/tree.py)"))
            return None
        return self._json(path, _Tree)

    def _json(self, path: str, kind: type[_Any]) -> _Any | None:
        """A file's JSON; None of what can't be read, which is a problem then."""
        try:
            return msgspec.json.decode(self._place.bytes(path), type=kind)
        except UNREADABLE as error:
            self.item.problems[path] = (
                f"{self._place.absolute(path)}: not what Orbax writes there: {error}. What to do: "
                "it was damaged, or cut; take it from a copy"
            )
        except HandfastError as error:
            self.item.problems[path] = str(error)
        return None

    def _merged(self) -> Mapping[str, Value]:
        """The values of the item's own store by key; who wrote each is known from then on."""
        folder = self.item.folder
        merged = self._store(folder)
        self.item.committed = merged.committed
        for path in self._place.within(folder):
            found = PROCESS.fullmatch(os.path.basename(path))
            if found is not None and path not in self._place.files:
                self.item.processes[found[1]] = path
                own = self._store(path)
                self._writers |= dict.fromkeys(own.values, found[1])
                if not merged.problems:
                    self._compare(path, own, merged)
        orphans = merged.values.keys() - self._writers.keys()
        if self._sure and self.item.processes and orphans:
            why = (
                f"{len(orphans)} of {len(merged.values)} values of {MANIFEST}, {min(orphans)} for "
                "one, are in no process's store that is here"
            )
            self.item.missing.append((f"{self._base}ocdbt.process_*", why))
        return merged.values

    def _store(self, folder: str) -> Database:
        """Read a store, and hold what it refers to against the files that are there."""
        found = read_database(self._place, folder)
        if found.problems:
            self._sure = False
            more = len(found.problems) - 1
            tail = f" (and {more} more that can't be read)" if more else ""
            self.item.problems[f"{folder}/{MANIFEST}".lstrip("/")] = found.problems[0] + tail
        for file, end in sorted(found.reaches.items()):
            if file not in self._place.files:
                self.item.missing.append((file, f"{folder}/{MANIFEST} refers to it".lstrip("/")))
            elif (size := self._place.files[file].nbytes) < end:
                says = f"{file} ends at byte {size:,}, and {MANIFEST} refers to {end:,} bytes"
                self._add(Code.TRUNCATED, says, file)
        return found

    def _compare(self, path: str, own: Database, merged: Database) -> None:
        """All of a process's store was merged, and as it is: one save wrote both."""
        apart = [k for k, value in own.values.items() if not _same(value, merged.values.get(k))]
        if apart:
            says = (
                f"{path} is of another save: {len(apart)} of its {len(own.values)} values are not "
                "those that were merged"
            )
            self._add(Code.EXTRA, says, path, tuple(sorted(apart)[:SHOWN]))

    def _files(self) -> dict[str, Value]:
        """The values of an item without OCDBT: a directory an array, a file a chunk."""
        values = {}
        for path in self._place.below(self.item.folder):
            key = path[len(self._base) :]
            if "/" in key and not key.startswith(f"{WRITTEN}/"):
                file, size = self._place.absolute(path), self._place.files[path].nbytes
                values[key] = Value(Range(self._place.reader, file, 0, size, file), path, 0)
        return values

    def _arrays(self, values: Mapping[str, Value]) -> dict[str, _Stored]:
        """Put keys together to arrays: metadata lies in a directory of the array's name."""
        grids: dict[str, Grid] = {}
        for key, value in values.items():
            name, _, last = key.rpartition("/")
            if last in METADATA:
                try:
                    grids[name] = read_grid(value.bytes(), value.source.name)
                except HandfastError as error:
                    self._sure = False
                    self.item.problems.setdefault(value.path, str(error))
        chunks: dict[str, dict[str, Value]] = defaultdict(dict)
        for key, value in values.items():
            name, _, rest = key.rpartition("/")
            while name and name not in grids:
                name, _, last = name.rpartition("/")
                rest = f"{last}/{rest}"
            if rest not in METADATA:
                chunks[name][rest] = value
        return {name: _Stored(grid, chunks[name]) for name, grid in grids.items()}

    def _paths(self, tree: _Tree | None, stored: Mapping[str, _Stored]) -> dict[str, Path]:
        """Which leaf each array is; says what only the tree or only the store has."""
        paths: dict[str, Path] = {}
        for leaf in tree.tree_metadata.values() if tree is not None else ():
            path = tuple(str(key.key) for key in leaf.key_metadata)
            if leaf.value_metadata.skip_deserialize or leaf.value_metadata.value_type in NO_VALUES:
                self.item.empty.append(path)
            else:
                paths[".".join(path)] = path
        if tree is not None and self._sure:
            folder = self.item.folder or "."
            for name in sorted(paths.keys() - stored.keys()):
                self.item.missing.append((f"{folder}: {name}", f"{TREE} names this array"))
            for name in sorted(stored.keys() - paths.keys()):
                self.item.extra.append((f"{folder}: {name}", f"{TREE} does not name this array"))
        return {name: paths.get(name, tuple(name.split("."))) for name in stored}

    def _count(self, name: str, array: _Stored) -> None:
        """Find chunks that an array should have, or has no place for."""
        folder = self.item.folder or "."
        there = {array.grid.place(chunk) for chunk in array.chunks}
        wanted = (at for at in places(array.grid.counts) if at not in there)
        for place in islice(wanted, SHOWN):
            path = f"{folder}: {name}/{array.grid.name(place)}"
            self.item.missing.append((path, f"{TREE} says that all chunks are stored"))
        for chunk in array.chunks:
            if array.grid.place(chunk) is None:
                path = f"{folder}: {name}/{chunk}"
                self.item.extra.append((path, "its array has no such chunk"))

    def _pieces(self, name: str, array: _Stored, whole: bool) -> Iterator[Piece]:
        """The array in one piece, or a piece a chunk where several processes wrote them."""
        grid, folder = array.grid, self.item.folder
        sources = {chunk: value.source for chunk, value in array.chunks.items()}
        title = f"{self._place.absolute(folder)}: {name}"
        writers = {self._writers.get(f"{name}/{chunk}".lstrip("/"), "") for chunk in array.chunks}
        if len(writers) < 2:
            first = (0,) * len(grid.shape)
            values = Chunked(title, grid, sources, whole, grid.shape, first)
            yield Piece(values, None, next(iter(writers), ""))
            return
        for chunk in array.chunks:
            place = grid.place(chunk)
            if place is not None:
                offset, shape = grid.box(place)
                writer = self._writers.get(f"{name}/{chunk}".lstrip("/"), "")
                own = {chunk: sources[chunk]}
                yield Piece(Chunked(title, grid, own, whole, shape, place), offset, writer)

    def _written(self, stored: Mapping[str, _Stored]) -> None:
        """Hold what each process said of its arrays against how they lie."""
        there = self._place.within(f"{self._base}{WRITTEN}")
        for number in self.item.processes if there else ():
            path = f"{self._base}{WRITTEN}/process_{number}"
            if number.isdecimal() and path not in there:
                self.item.missing.append((path, "every process that wrote arrays has one"))
        if (path := self._base + SHARDING) in self._place.files:
            self._json(path, dict[str, str])
        for path in there:
            said = self._json(path, _Written) if path in self._place.files else None
            apart = []
            for entry in said.array_metadatas if said is not None and self._sure else ():
                array = stored.get(entry.array_metadata.param_name)
                shape = entry.array_metadata.chunk_shape
                if array is None or shape not in (array.grid.chunk, array.grid.inner):
                    apart.append(f"{entry.array_metadata.param_name}: chunks of {shape}")
            if apart:
                says = f"{path} is of another save: {len(apart)} arrays do not lie as it says"
                self._add(Code.WORLD, says, path, tuple(apart[:SHOWN]))

    def _add(self, code: Code, says: str, path: str, evidence: tuple[str, ...] = ()) -> None:
        found = Finding(code, Strength.CERTAIN, self._step, says, (path,), evidence)
        self.item.findings.append(found)


def _same(one: Value, other: Value | None) -> bool:
    """Whether two stores have the same value: the same bytes in nodes, or at the same place."""
    if other is None or (one.start < 0) != (other.start < 0):
        return False
    if one.start < 0:
        return one.bytes() == other.bytes()
    return (one.path, one.start, one.source.nbytes) == (
        other.path, other.start, other.source.nbytes
    )  # fmt: skip
