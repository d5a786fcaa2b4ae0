"""The index of a distributed checkpoint of torch, and the items that it finds in ``.distcp`` files.

``.metadata`` is a pickle of ``Metadata``: for each tensor its dtype, shape and chunks; for each
chunk, and each other value, the file, the offset and the length of an item; and for each name the
path that it had in the nested state. An item is a file of ``torch.save`` within the file: the
chunk, or the value. Facts: torch 2.13, torch/distributed/checkpoint: metadata.py, filesystem.py
(``_StorageInfo``, ``_write_item``), default_planner.py (``transform_object``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit import pickles
from handfast.audit.archive import MAGIC
from handfast.audit.extent import Extent, Reader
from handfast.audit.formats.parts import checked
from handfast.audit.formats.states import sizes
from handfast.audit.place import SMALL, Place
from handfast.audit.torch_file import read_torch
from handfast.audit.torch_tree import tree
from handfast.audit.tree import Object, values
from handfast.errors import Damaged, FormatError

__all__ = [
    "INDEX_MOST",
    "Index",
    "Item",
    "Stored",
    "Whole",
    "misplaced",
    "read_index",
    "read_value",
]

INDEX_MOST: Final = 1 << 29
"""Bytes of an index that are read at most: some four million items."""

NESTED: Final = 64
"""Keys of a path in the state at most."""

_END: Final = b"PK\x05\x06"
_END_SIZE: Final = 22  # torch writes no comment behind it
_PLACE: Final = "torch.distributed.checkpoint."


class Item(NamedTuple):
    """Where an item lies: a chunk of the tensor ``name`` from ``offset`` on, or a whole value.

    ``file`` is relative to the index's directory, ``start`` and ``nbytes`` count bytes. ``coded``:
    an extension has changed the bytes, so that they can't be read here.
    """

    name: str
    offset: tuple[int, ...] | None
    file: str
    start: int
    nbytes: int
    coded: bool = False


class Whole(NamedTuple):
    """A tensor: its dtype, its shape, and the sizes of its chunks by their offsets."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], tuple[int, ...]]

    @property
    def covered(self) -> bool:
        """Whether its chunks have as many elements as it has, all together."""
        return sum(map(math.prod, self.chunks.values())) == math.prod(self.shape)


class Index(msgspec.Struct, frozen=True):
    """What an index says. ``paths`` lead to each name in the nested state, where that is known.

    ``folder`` is the directory that the save was given, "" where it is not told.
    """

    items: tuple[Item, ...]
    tensors: Mapping[str, Whole]
    paths: Mapping[str, tuple[str | int, ...]]
    folder: str = ""


def read_index(place: Place, path: str) -> Index:
    """Read an index. Raises FormatError where it is none, Damaged where it was cut."""
    name = place.absolute(path)
    data = place.bytes(path, INDEX_MOST)
    limits = pickles.Limits(room=place.reader.room)
    root = tree(pickles.read(data, limits=limits, name=name).value, name=name).root
    if type(root) is not Object or root.type != f"{_PLACE}metadata.Metadata":
        raise FormatError(f"{name}: a pickle, but not of DCP's Metadata. {_TO_DO}")
    fields = root.fields
    state, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(state) is not dict or type(storage) is not dict:
        raise FormatError(f"{name}: it lacks the tensors or where they lie. {_TO_DO}")
    try:
        tensors = {n: _whole(about) for n, about in state.items() if _is(about, "Tensor")}
        items = tuple(_item(key, info) for key, info in storage.items())
    except _WrongError as error:
        raise FormatError(f"{name}: {error}. {_TO_DO}") from None
    planned = fields.get("planner_data")
    paths = dict(_paths(planned)) if type(planned) is dict else {}
    return Index(items, tensors, paths, _folder(fields.get("storage_meta")))


_TO_DO: Final = "What to do: if DCP wrote it, it was damaged; take the directory from a copy"


class _WrongError(Exception):
    """What an index has that no save writes."""


def _is(about: Any, kind: str) -> bool:
    return type(about) is Object and about.type == f"{_PLACE}metadata.{kind}StorageMetadata"


def _numbers(node: Any) -> tuple[int, ...]:
    found = sizes(node)
    if found is None:
        raise _WrongError("a shape or an offset that is no row of numbers")
    return found


def _whole(about: Object) -> Whole:
    """A tensor by its TensorStorageMetadata. Its properties begin with the dtype."""
    about_it, chunks = about.fields.get("properties"), about.fields.get("chunks")
    state = about_it.state if type(about_it) is Object else None
    dtype = state[0] if type(state) is tuple and state else None
    if type(dtype) is not str or type(chunks) is not list:
        raise _WrongError("a tensor without a dtype, or without chunks")
    parts = [chunk.fields for chunk in chunks if type(chunk) is Object]
    return Whole(
        dtype.removeprefix("torch."),
        _numbers(about.fields.get("size")),
        {_numbers(part.get("offsets")): _numbers(part.get("sizes")) for part in parts},
    )


def _item(key: Any, info: Any) -> Item:
    """An item by its MetadataIndex and its _StorageInfo."""
    if type(key) is not Object or type(info) is not Object:
        raise _WrongError("an item that is not described")
    name, offset = key.fields.get("fqn"), key.fields.get("offset")
    file = info.fields.get("relative_path")
    if type(name) is not str or type(file) is not str:
        raise _WrongError("an item without a name, or without a file")
    start, nbytes = _numbers((info.fields.get("offset"), info.fields.get("length")))
    where = None if offset is None else _numbers(offset)
    return Item(name, where, file, start, nbytes, bool(info.fields.get("transform_descriptors")))


def _paths(planned: Mapping[Any, Any]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    for name, path in planned.items():
        fits = type(path) is tuple and 0 < len(path) <= NESTED
        if type(name) is str and fits and all(type(key) in (str, int) for key in path):
            yield name, path


def _folder(meta: Any) -> str:
    """The directory's own name, of the path that the save was given."""
    found = meta.fields.get("checkpoint_id") if type(meta) is Object else None
    parts = found.args if type(found) is Object else (found,)
    last = parts[-1] if parts else None
    return last.rstrip("/").rpartition("/")[2] if type(last) is str else ""


# Items


class _Stretch(Reader):
    """Reads a stretch of one file as if it were a file of its own, whatever it is called."""

    def __init__(self, reader: Reader, path: str, start: int, nbytes: int) -> None:
        super().__init__(room=reader.room)
        self._under, self._path, self._start, self._nbytes = reader, path, start, nbytes

    def size(self, path: str) -> int:  # noqa: ARG002 - a reader is asked by paths; here is one
        """Its length, where the file goes that far."""
        left = max(0, self._under.size(self._path) - self._start)
        return min(self._nbytes, left)

    def read(self, path: str, into: memoryview, at: int) -> None:
        """Fill a buffer with its bytes from ``at`` on; raises as a reader does."""
        if at < 0 or at + len(into) > self._nbytes:
            raise Damaged(
                f"{path}: bytes {at:,} to {at + len(into):,} of an item of {self._nbytes:,}. What "
                "to do: its file is not the one that was indexed; take the directory from a copy"
            )
        self._under.read(self._path, into, self._start + at)


class Stored:
    """The values of a chunk where they lie: a :class:`handfast.audit.found.Values`.

    The item is opened when they are asked for, and held against the index.
    """

    __slots__ = ("_place", "dtype", "item", "path", "shape")

    def __init__(
        self, place: Place, path: str, item: Item, dtype: str, shape: tuple[int, ...]
    ) -> None:
        self._place, self.path, self.item = place, path, item
        self.dtype, self.shape = dtype, shape

    def blocks(self, most: int) -> Iterator[memoryview]:
        """See the port. Raises Damaged as well for an item that is another tensor's."""
        found = values(read_value(self._place, self.path, self.item))
        if type(found) is not Extent or (found.dtype, found.shape) != (self.dtype, self.shape):
            holds = "no tensor" if found is None else f"a {found.dtype} tensor of {found.shape}"
            raise Damaged(
                f"{_named(self._place, self.path, self.item)}: it holds {holds}, and by the index "
                f"a {self.dtype} one of {self.shape}. What to do: index and file are of two saves; "
                "take another step"
            )
        yield from checked(found).blocks(most)


def read_value(place: Place, path: str, item: Item) -> Any:
    """What an item holds, as a tree. Raises FormatError, and Damaged where too little is left."""
    name = _named(place, path, item)
    if item.coded:
        raise FormatError(
            f"{name}: an extension of DCP has encoded it. What to do: load it with torch, and save "
            "it without"
        )
    if (size := place.files[path].nbytes) < item.start + item.nbytes:
        raise Damaged(
            f"{name}: an item of {item.nbytes:,} bytes, and the file ends there or in it, at byte "
            f"{size:,}. What to do: it was cut; take another step"
        )
    if item.offset is None and item.nbytes > SMALL:
        raise FormatError(f"{name}: {item.nbytes:,} bytes, more than is read of a value")
    return read_torch(
        _Stretch(place.reader, place.absolute(path), item.start, item.nbytes), name
    ).root


def misplaced(place: Place, path: str, item: Item) -> bool:
    """Whether no file of torch.save begins and ends where an item should; its bytes must be there.

    Raises HandfastError where they can't be read.
    """
    if item.coded:
        return False
    if item.nbytes < len(MAGIC) + _END_SIZE:
        return True
    where = place.absolute(path)
    head = place.reader.bytes(where, item.start, len(MAGIC))
    tail = place.reader.bytes(where, item.start + item.nbytes - _END_SIZE, len(_END))
    return head != MAGIC or tail != _END


def _named(place: Place, path: str, item: Item) -> str:
    shown = (
        item.name if item.offset is None or not any(item.offset) else f"{item.name}{item.offset}"
    )
    return f"{place.absolute(path)}: byte {item.start:,}: {shown:.200}"
