"""A distributed step of Megatron-Core: a checkpoint of torch DCP, and what is common beside it.

``common.pt`` has what is no sharded tensor, written by rank 0 first; ``metadata.json`` is written
last, and without it no load takes the directory for one. Sharded tensors have one name over all
layers and ranks; sharded objects are items called ``NAME/shard_OFFSET_SHAPE``. Facts:
Megatron-Core 0.16.1, dist_checkpointing/serialization.py (``save``), core.py
(``check_is_distributed_checkpoint``), mapping.py (``ShardedObject.unique_key``),
optimizer/distrib_optimizer.py (``sharded_param_state_dp_reshardable``).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import dcp
from handfast.audit.formats.distcp import Index, read_index, read_value
from handfast.audit.formats.megatron_ranks import arguments, counters, whole
from handfast.audit.formats.parts import torch_part, untold
from handfast.audit.formats.zero import ROLES, betas_of
from handfast.audit.found import Clock, Counter, Part, Role, Step, Tensor
from handfast.audit.place import Place
from handfast.errors import UNREADABLE, HandfastError

__all__ = ["all_betas", "counted", "named", "ours", "read_step"]

CONFIG: Final = "metadata.json"
COMMON: Final = "common.pt"
INDEX: Final = ".metadata"
CONFIG_MOST: Final = 1 << 16
OBJECTS: Final = 1 << 16
"""Sharded objects of one name at most."""

OPTIMIZERS: Final = 64
"""Optimizers in a chain at most."""

_OBJECT: Final = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")
_STATE: Final = re.compile(r"(?:.*\.)?optimizer\.state\.(\w+?)\.(.+)")
_ROW: Final = re.compile(r"(.*optimizer\.distributed\..*\.bucket_idx_\d+)\.(\w+)")
_ROLES: Final[Mapping[str, Role]] = {
    **ROLES, "fp32_param": Role.MASTER, "param": Role.MASTER, "master_param": Role.MASTER,
}  # fmt: skip
ALIGNED: Final = 64
"""Elements: where a parameter may begin in a buffer (distributed/param_and_grad_buffer.py)."""

_COMMIT: Final = "metadata.json, which is written when all ranks are done"


class _Config(msgspec.Struct):
    """What ``metadata.json`` says."""

    sharded_backend: str


def ours(place: Place, folder: str) -> bool:
    """Whether a directory is a distributed checkpoint, or what one leaves."""
    here = {path.rpartition("/")[2] for path in place.within(folder)}
    return bool(here & {CONFIG, COMMON}) and len(here) > 1


def read_step(place: Place, folder: str) -> tuple[Step, set[str]]:
    """Read a step, and say which files are of it."""
    top = f"{folder}/" if folder else ""
    files = {path for path in place.within(folder) if path in place.files}
    committed, findings, backend = _config(place, f"{top}{CONFIG}")
    if backend == "torch_dist":
        step = dcp.read_step(place, folder)
    else:  # zarr: a directory a tensor, whose values are not looked at
        step = Step(folder)
        files |= set(place.below(folder))
    step.commit, step.committed = _COMMIT, committed
    parts, missing = list(step.parts), list(step.missing)
    common: Mapping[Any, Any] = {}
    if f"{top}{COMMON}" in files:
        read = torch_part(place, f"{top}{COMMON}")
        read.part.tensors, read.part.counters, read.part.betas = (), (), {}
        read.part.untold = untold(read.said, ())
        if type(read.root) is dict:
            common = read.root
            _fill(read.part, common)
        elif read.root is not None:
            read.part.problem = f"{place.absolute(read.part.path)}: no state is in it"
        parts.insert(0, read.part)
    else:
        missing.append((f"{top}{COMMON}", "every load begins with it"))
    args = arguments(common)
    scaled = bool(args.get("fp16") or args.get("iterations_to_skip"))
    fresh = bool(args.get("no_load_optim") or args.get("finetune"))
    betas = set(all_betas(common.get("optimizer")))
    for part in parts:
        part.tensors = [named(tensor) for tensor in part.tensors]
    if backend == "torch_dist" and f"{top}{INDEX}" in files:
        findings += _objects(place, folder, parts, betas, updates=not fresh, skips=scaled)
    if len(betas) == 1 and (only := next(iter(betas))) is not None:
        for part in parts:
            part.betas = {"": only}
    told = [msgspec.structs.replace(finding, step=folder) for finding in findings]
    step.parts, step.missing, step.scaled = parts, missing, scaled
    step.findings = [*step.findings, *told]
    return step, files


def _config(place: Place, path: str) -> tuple[bool, list[Finding], str]:
    """Whether the step was committed, what is wrong with that, and how tensors are stored."""
    if path not in place.files:
        return False, [], "torch_dist"
    try:
        config = msgspec.json.decode(place.bytes(path, CONFIG_MOST), type=_Config)
    except (HandfastError, *UNREADABLE) as error:
        says = f"{path} says not how the step is stored, so no load takes it: {error}"
        return True, [Finding(Code.UNREADABLE, Strength.CERTAIN, "", says, (path,))], "torch_dist"
    return True, [], config.sharded_backend


def _fill(part: Part, root: Mapping[Any, Any]) -> None:
    """Fill in the part of ``common.pt``."""
    args = arguments(root)
    part.counters = [*counters(root), *_steps(root.get("optimizer"), args)]
    part.facts = {
        key: args[key]
        for key in ("world_size", "num_layers", "hidden_size")
        if type(args.get(key)) is int
    }


def _steps(optimizer: Any, args: Mapping[Any, Any]) -> Iterator[Counter]:
    """What the optimizer counted, where it is common: in its groups, or for all parameters."""
    scaled = bool(args.get("fp16") or args.get("iterations_to_skip"))
    fresh = bool(args.get("no_load_optim") or args.get("finetune"))
    found = list(counted(optimizer))
    if found:
        yield Counter(
            Clock.OPTIMIZER, max(found), "the greatest step", updates=not fresh, skips=scaled
        )


def counted(root: Any) -> Iterator[int]:
    """The steps of an optimizer's groups, and ``common_step``, in chains and wrappers."""
    for _, holder in _holders(root):
        for key in ("step", "common_step"):
            value = whole(holder.get(key))
            if value is not None:
                yield value


def all_betas(root: Any) -> Iterator[tuple[float, float] | None]:
    """The betas of each group of an optimizer, in chains and wrappers."""
    return (betas_of(holder) for is_group, holder in _holders(root) if is_group)


def _holders(root: Any) -> Iterator[tuple[bool, Mapping[Any, Any]]]:
    """The groups of an optimizer (True), and its states (False), each once.

    A chain is a dict by numbers; what an item of DCP holds is a list of one.
    """
    ahead: list[Any] = [root]
    seen: set[int] = set()
    while ahead:
        node = ahead.pop()
        if type(node) not in (dict, list) or id(node) in seen:
            continue
        seen.add(id(node))
        if type(node) is list:
            ahead += node[:OPTIMIZERS]
            continue
        groups, state = node.get("param_groups"), node.get("state")
        for group in groups if type(groups) is list else ():
            if type(group) is dict:
                yield True, group
        if type(state) is dict:
            yield False, state
        ahead += [inner for key, inner in node.items() if key == "optimizer" or type(key) is int]


def named(tensor: Tensor) -> Tensor:
    """A tensor with its role, and what it belongs to, by its name."""
    state, row = _STATE.fullmatch(tensor.path), _ROW.fullmatch(tensor.path)
    if state:
        role, of = _ROLES.get(state[1], Role.OTHER), state[2]
    elif row:  # a flat buffer: pieces of parameters whose names nobody wrote, and between them
        # padding, which is memory as it was found
        between = (tensor.offset or (0,))[0] % ALIGNED != 0
        role, of = Role.OTHER if between else _ROLES.get(row[2], Role.OTHER), row[1]
    elif "optimizer." in tensor.path:
        role, of = Role.OTHER, ""
    else:
        return msgspec.structs.replace(tensor, of=tensor.path)
    return msgspec.structs.replace(tensor, role=role, of=of)


# Sharded objects


def _objects(
    place: Place,
    folder: str,
    parts: Sequence[Part],
    betas: set[tuple[float, float] | None],
    *,
    updates: bool,
    skips: bool,
) -> list[Finding]:
    """Read the optimizer's groups, which are sharded objects; find which are not all there."""
    try:
        index = read_index(place, f"{folder}/{INDEX}".lstrip("/"))
    except HandfastError:
        return []  # its part says so
    by_path = {part.path: part for part in parts}
    for item in index.items:
        match = _OBJECT.fullmatch(item.name) if item.offset is None else None
        part = by_path.get(f"{folder}/{item.file}".lstrip("/"))
        if match is None or part is None or not match[1].endswith(".optimizer") or item.coded:
            continue
        try:
            value = read_value(place, part.path, item)
        except HandfastError as error:
            part.problem = part.problem or str(error)
            continue
        found = list(counted(value))
        if found:
            path = "the greatest step"
            counter = Counter(Clock.OPTIMIZER, max(found), path, updates, skips)
            part.counters = [*part.counters, counter]
        betas |= set(all_betas(value))
    return list(_lost(index))


def _lost(index: Index) -> Iterator[Finding]:
    """Find names of sharded objects of which the index has not all shards."""
    there: dict[tuple[str, str], set[str]] = defaultdict(set)
    for item in index.items:
        match = _OBJECT.fullmatch(item.name) if item.offset is None else None
        if match:
            there[match[1], match[3]].add(match[2])
    lost = []
    for (name, shape), offsets in there.items():
        sizes = [int(size) for size in shape.split(".") if size.isdigit()]
        count = math.prod(sizes)
        if 0 < count <= OBJECTS and len(offsets) < count:
            lost.append(f"{name}: {len(offsets)} of {count} shards")
    if lost:
        says = f"the index has not all shards of {len(lost)} objects, which no save leaves out"
        yield Finding(Code.INDEX, Strength.CERTAIN, "", says, (), tuple(lost[:6]))
