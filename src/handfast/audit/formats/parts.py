"""One file as a part: a file of ``torch.save`` by its states, a safetensors file by its header."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit.archive import Record
from handfast.audit.checked import Checked
from handfast.audit.extent import SIZES, Extent, dense
from handfast.audit.formats.safetensors_file import read_safetensors
from handfast.audit.formats.states import Said, buffer_or_parameter, pieces, read_state
from handfast.audit.found import Clock, Part, Tensor, Values
from handfast.audit.place import Place
from handfast.audit.torch_file import read_torch
from handfast.errors import Damaged, HandfastError
from handfast.store.objects import child

__all__ = [
    "Read",
    "aside",
    "bare",
    "by_record",
    "checked",
    "counting",
    "safetensors_part",
    "torch_part",
    "untold",
    "with_checksums",
]

NAMED: Final = 256
"""Entries of a file that are named at most."""


def by_record(values: Extent, record: Record) -> Checked:
    """Values that are all that a zip's record has, held against its CRC-32.

    torch writes it, and is built not to look at it (pytorch issue 126952; torch 2.13,
    MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS).
    """
    return Checked(values, record.crc, zlib.crc32, lambda crc: Damaged(record.differs(crc)))


def checked(values: Values) -> Values:
    """The same values, held against their checksum if they have one to themselves.

    A record without one says 0: ``torch.serialization.set_crc32_options(False)``.
    """
    if type(values) is not Extent or type(values.source) is not Record:
        return values
    whole = math.prod(values.shape) * SIZES[values.dtype] == values.source.nbytes
    plain = values.offset == 0 and values.stride == dense(values.shape) and not values.swapped
    known = whole and plain and values.source.crc
    return by_record(values, values.source) if known else values


class Read(NamedTuple):
    """A file as a part; what was in it, None where it can't be read; and what that says.

    ``name`` is what the file was called when it was written, without its ending, if it knows.
    """

    part: Part
    root: Any
    said: Said
    name: str = ""


def bare(place: Place, path: str) -> Part:
    """A part of which nothing is known but that it is there."""
    file = place.files[path]
    return Part(path, {}, file.nbytes, file.saved)


def torch_part(place: Place, path: str, *, within: str = "") -> Read:
    """Read a file of torch.save. ``within`` is as of :func:`read_state`. Raises nothing."""
    part = bare(place, path)
    try:
        file = read_torch(place.reader, place.absolute(path))
        said = read_state(file.root, within=within, memory=place.reader.room)
    except HandfastError as error:
        name = place.absolute(path)
        part.problem = str(error) if name in str(error) else f"{name}: {error}"
        return Read(part, None, Said())
    part.harmful = file.harmful
    if file.damage:
        part.problem = str(file.damage[0])
    part.tensors = with_checksums(said.tensors)
    part.counters = [counter for _, counter in said.counters]
    part.betas, part.valueless = said.betas, said.valueless
    part.aside = aside(file.root, said) if said.tensors else [path]
    return Read(part, file.root, said, file.facts.get("name", ""))


def aside(root: Any, said: Said) -> list[str]:
    """The paths of the entries at the top of a tree that have no tensor, and of parameter groups.

    A scheduler's state, a count, a rate: what a model and the state of parameters is not.
    """
    paths = (*(tensor.path for tensor in said.tensors), *said.valueless)
    heads = {path.partition("/")[0] for path in paths}
    heads |= {head.partition("[")[0] for head in heads}
    found: list[str] = []
    for key, node in root.items() if type(root) is dict else ():
        at = child("", key)
        if at not in heads and not pieces(node):
            found.append(at)
        elif type(node) is dict and any(str(one).startswith("param_groups") for one in node):
            found.append(child(at, "param_groups"))
        if len(found) == NAMED:
            break
    return found


def untold(said: Said, tensors: Iterable[Tensor]) -> list[str]:
    """The paths of what a file has, by its bytes, and a format's own reading of it has not."""
    told = {_source(tensor) for tensor in tensors}
    some = (tensor for tensor in said.tensors if 0 not in tensor.values.shape)
    return [tensor.path for tensor in some if _source(tensor) not in told]


def _source(tensor: Tensor) -> int:
    """Where a tensor's bytes lie, as a number: tied ones and pieces of one share it."""
    values = tensor.values.extent if type(tensor.values) is Checked else tensor.values
    return id(values.source) if type(values) is Extent else 0


def with_checksums(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors whose values are held against their checksums as they are read."""
    return [msgspec.structs.replace(tensor, values=checked(tensor.values)) for tensor in tensors]


def safetensors_part(place: Place, path: str) -> Part:
    """Read the header of a safetensors file. Raises nothing."""
    part = bare(place, path)
    try:
        file = read_safetensors(place, path)
    except HandfastError as error:
        part.problem = str(error)
        return part
    part.problem, part.valueless = file.problem, file.packed
    part.tensors = [
        Tensor(name, buffer_or_parameter(name, values.dtype), values, name)
        for name, values in file.tensors.items()
    ]
    return part


def counting(part: Part, *clocks: Clock, skips: bool = False) -> Part:
    """A part some of whose clocks count updates, as its format promises.

    ``skips``: but for those that a loss scaler skipped.
    """
    part.counters = [
        msgspec.structs.replace(counter, updates=True, skips=skips)
        if counter.clock in clocks
        else counter
        for counter in part.counters
    ]
    return part
