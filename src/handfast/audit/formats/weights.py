"""Weights as Hugging Face's libraries lay them out: a file, or shards with an index.

``NAME.safetensors``, or ``NAME-00001-of-00003.safetensors`` and so on with
``NAME.safetensors.index.json``, whose ``weight_map`` says the file of each tensor (huggingface_hub
2.4, serialization/_base.py, ``split_state_dict_into_shards_factory``; transformers 5.23,
modeling_utils.py, ``save_pretrained``); before that the same with ``.bin``, by torch.save.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

from handfast.audit.extent import SIZES
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.names import joined, numbered, parent, runs
from handfast.audit.formats.parts import bare, safetensors_part, torch_part
from handfast.audit.formats.states import number
from handfast.audit.found import Found, Part, Step, Tensor
from handfast.audit.place import Place
from handfast.errors import UNREADABLE, HandfastError

__all__ = ["Weights", "find", "read_weights"]

_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_INDEX: Final = re.compile(r"(.+)\.(safetensors|bin)\.index\.json")


class _Index(msgspec.Struct, frozen=True):
    """An index: the file of each tensor, and what they take all together, in bytes."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


class Weights(msgspec.Struct):
    """The weights in a directory, in the words of a step."""

    parts: list[Part] = []
    missing: list[tuple[str, str]] = []
    extra: list[tuple[str, str]] = []
    findings: list[Finding] = []


def find(place: Place) -> Iterator[Found]:
    """Yield the safetensors files of each directory as one step; those of runs together."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in place.files:
        if path.endswith((".safetensors", ".safetensors.index.json")):
            folders[parent(path)].append(path)
    for root, group in runs(folders):
        paths = [folders[folder] for folder in group]
        steps = [_step(place, folder, own) for folder, own in zip(group, paths, strict=True)]
        sharded = any(path.endswith(".json") for own in paths for path in own)
        name = "safetensors with index" if sharded else "safetensors"
        yield Found(name, root, steps, (), frozenset(path for own in paths for path in own))


def _step(place: Place, folder: str, paths: Iterable[str]) -> Step:
    found = read_weights(place, paths)
    return Step(
        folder, numbered(folder) if folder else None, found.parts, found.missing, found.extra,
        findings=[msgspec.structs.replace(each, step=folder) for each in found.findings],
    )  # fmt: skip


def read_weights(place: Place, paths: Iterable[str]) -> Weights:
    """Read files of weights and their indices, all of one directory. Raises nothing."""
    found = Weights()
    names = {path.rpartition("/")[2]: path for path in paths}
    parts = {
        name: safetensors_part(place, path)
        if name.endswith(".safetensors")
        else torch_part(place, path).part
        for name, path in names.items()
        if not _INDEX.fullmatch(name)
    }
    found.parts = list(parts.values())
    indexed = [match for name in names if (match := _INDEX.fullmatch(name))]
    for match in indexed:
        _hold(place, names[match[0]], match, parts, found)
    stems = {(match[1], match[2]) for match in indexed}
    shards: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for name in names:
        match = _SHARD.fullmatch(name)
        if match and (match[1], match[4]) not in stems:
            shards[match[1], int(match[3]), match[4]].append(int(match[2]))
    for (stem, total, kind), there in shards.items():
        folder = parent(next(iter(names.values())))
        for at in sorted(set(range(1, total + 1)) - set(there)):
            name = f"{stem}-{at:05}-of-{total:05}.{kind}"
            found.missing.append((joined(folder, name), f"there should be {total} by their names"))
        says = f"{stem}.{kind}.index.json is not there, without which nobody loads {total} shards"
        first = joined(folder, f"{stem}-{min(there):05}-of-{total:05}.{kind}")
        found.findings.append(Finding(Code.INDEX, Strength.HINT, "", says, (first,)))
    return found


def _hold(
    place: Place, path: str, match: re.Match[str], parts: Mapping[str, Part], found: Weights
) -> None:
    """Hold an index against the files that it names, and those that it should."""
    about = bare(place, path)
    found.parts.append(about)
    try:
        index = msgspec.json.decode(place.bytes(path), type=_Index)
    except (HandfastError, *UNREADABLE) as error:
        about.problem = f"{place.absolute(path)}: no index: {error}"
        return
    stem, kind = match[1], match[2]
    named: dict[str, set[str]] = defaultdict(set)
    for tensor, file in index.weight_map.items():
        named[file].add(tensor)
    total = 0
    for file, tensors in named.items():
        if file not in parts:
            why = f"{len(tensors)} tensors are in it by {match[0]}"
            found.missing.append((joined(parent(path), file), why))
        elif not parts[file].problem:
            there = {tensor.path for tensor in parts[file].tensors}
            found.findings += _apart(parts[file].path, path, tensors, there)
        total += sum(_nbytes(tensor) for tensor in parts[file].tensors) if file in parts else 0
    for file, part in parts.items():
        shard = _SHARD.fullmatch(file)
        if file not in named and shard and (shard[1], shard[4]) == (stem, kind):
            found.extra.append((part.path, f"{match[0]} names no tensor in it"))
    if (single := parts.get(f"{stem}.{kind}")) is not None and f"{stem}.{kind}" not in named:
        why = f"transformers loads it, and not the shards of {match[0]} beside it"
        found.extra.append((single.path, why))
    told = number(index.metadata.get("total_size"))
    whole = not found.missing and not any(part.problem for part in parts.values())
    if told is not None and kind == "safetensors" and whole and told != total:
        says = f"{match[0]} speaks of {told:,} bytes of tensors, and the files have {total:,}"
        found.findings.append(Finding(Code.INDEX, Strength.HINT, "", says, (path,)))


def _apart(path: str, index: str, named: set[str], there: set[str]) -> Iterator[Finding]:
    """A file that has other tensors than its index says."""
    lost, more = sorted(named - there), sorted(there - named)
    if lost or more:
        says = f"{path} lacks {len(lost)} tensors that the index says it has, and has {len(more)} "
        told = [f"only in {index}: {name}" for name in lost[:3]]
        told += [f"only in {path}: {name}" for name in more[:3]]
        says += "that it does not: file and index are of two saves"
        yield Finding(Code.INDEX, Strength.CERTAIN, "", says, (path, index), tuple(told))


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.values.shape) * SIZES[tensor.values.dtype]
