"""Local checkpoints of NVIDIA's resiliency extension: a directory a rank, on its own node.

``RANK/iter_NNNNNNN_R_local.pt`` is rank R's file of an iteration, in RANK's directory: its own, or
a copy of another's. It is written as ``..._local.dirty.pt`` and renamed. When all have theirs, the
older iterations are deleted. Nothing in a name or a file says which run it is of. Facts:
nvidia-resiliency-ext 0.4.1, checkpointing/local/ckpt_managers/base_manager.py (``find_latest``,
``save``, ``load``), local_manager.py; what Megatron saves so: Megatron-Core 0.16.1,
dist_checkpointing/tensor_aware_state_dict.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit.extent import Extent
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.megatron_dist import all_betas, counted, named
from handfast.audit.formats.megatron_ranks import arguments, counters
from handfast.audit.formats.names import parent
from handfast.audit.formats.parts import checked, torch_part, untold
from handfast.audit.formats.states import LONGEST, beyond, read_state, sizes
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Role, Step, Tensor
from handfast.audit.place import Place
from handfast.audit.tree import DEEP, Object, inside, values
from handfast.errors import HandfastError

__all__ = ["find"]

_FILE: Final = re.compile(r"iter_(\d{7,18})_(\d{1,9})_local(\.dirty)?\.pt")
_PACKAGE: Final = "megatron.core.dist_checkpointing.mapping."
_STATES: Final = ("MCoreTensorAwareStateDict", "BasicTensorAwareStateDict")

_RULE: Final = (
    "the newest iteration of which a file of every rank is somewhere (nvidia-resiliency-ext 0.4.1, "
    "base_manager.py, find_latest)"
)
_FETCHED: Final = (
    "its own file is not there: it is sent a copy by a rank that has one "
    "(replication/strategies.py, CliqueReplicationStrategy.retrieve_plan)"
)
_COPY: Final = "as ranks with one key and one place in the whole have copies of it"


class _File(NamedTuple):
    """A file by its name: rank ``holder`` has rank ``rank``'s of an iteration; -1: not told."""

    path: str
    iteration: int
    rank: int
    holder: int
    dirty: bool


def find(place: Place) -> Iterator[Found]:
    """Yield what there is: all ranks' directories beside each other as one."""
    roots: dict[str, list[_File]] = defaultdict(list)
    for path in place.files:
        match = _FILE.fullmatch(path.rpartition("/")[2])
        if match:
            holder = parent(path).rpartition("/")[2]
            ranked = holder.isdigit() and len(holder) < 10
            file = _File(
                path, int(match[1]), int(match[2]), int(holder) if ranked else -1, bool(match[3])
            )
            roots[parent(parent(path)) if ranked else parent(path)].append(file)
    for root, files in roots.items():
        there = {
            int(name)
            for folder in place.within(root)
            if folder in place.folders and (name := folder.rpartition("/")[2]).isdigit()
        }
        ranks = there or {file.rank for file in files}
        steps = [
            _step(place, root, [file for file in files if file.iteration == iteration], ranks)
            for iteration in sorted({file.iteration for file in files if not file.dirty})
        ]
        yield Found(
            "NVRx local",
            root,
            steps,
            list(_resume(root, files, ranks)),
            frozenset(file.path for file in files),
            list(_left(files)),
        )


def _label(root: str, iteration: int) -> str:
    name = f"iter_{iteration:07d}"
    return f"{root}/{name}" if root else name


def _left(files: Sequence[_File]) -> Iterator[Finding]:
    """Files that were not renamed: of saves that did not end."""
    for file in files:
        if file.dirty:
            says = (
                f"{file.path} was not written to its end, and while it is there no save of this "
                "iteration can begin"
            )
            yield Finding(Code.LEFTOVER, Strength.STRONG, "", says, (file.path,))


def _resume(root: str, files: Sequence[_File], ranks: set[int]) -> Iterator[Resume]:
    """The newest iteration that covers all ranks whose directories are here."""
    holders: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for file in files:
        if not file.dirty:
            holders[file.iteration][file.rank].add(file.holder)
    covered = [iteration for iteration, found in holders.items() if found.keys() >= ranks]
    if not covered:
        yield Resume("all ranks", "", f"none has a file of every rank: {_RULE}")
        return
    newest = max(covered)
    path = _label(root, newest)
    yield Resume("all ranks, if those of other nodes have it as well", path, _RULE)
    for rank, has in sorted(holders[newest].items()):
        if rank not in has and -1 not in has:
            yield Resume(f"rank {rank}", path, _FETCHED)


def _step(place: Place, root: str, files: Sequence[_File], ranks: set[int]) -> Step:
    """One iteration: the files of all ranks, copies too."""
    whole = [file for file in files if not file.dirty]
    iteration = files[0].iteration
    has = {file.rank for file in whole}
    missing = [
        (
            f"{root}/{rank}/iter_{iteration:07d}_{rank}_local.pt".lstrip("/"),
            "other ranks have theirs of this iteration, and no copy of it is here",
        )
        for rank in sorted(ranks - has)
    ]
    parts = [_part(place, file) for file in whole]
    scaled = any(part.facts.get("fp16") is True for part in parts)
    return Step(
        _label(root, iteration), iteration, parts, missing,
        commit="a file of every rank", committed=not missing, scaled=scaled,
    )  # fmt: skip


def _part(place: Place, file: _File) -> Part:
    """A rank's file."""
    read = torch_part(place, file.path, within=f"rank {file.rank}")
    part, root = read.part, read.root
    own = file.holder in (file.rank, -1)
    part.rank = {"rank": file.rank} if own else {"rank": file.rank, "copy on": file.holder}
    part.tensors, part.counters, part.betas = (), (), {}
    name = root.type.rpartition(".")[2] if type(root) is Object else ""
    if name not in _STATES:
        if root is not None:
            part.problem = part.problem or (
                f"{place.absolute(file.path)}: no state of a rank is in it, so the extension did "
                "not write it. What to do: take it from a copy"
            )
        return part
    part.counters = [Counter(Clock.DIRECTORY, file.iteration, "iter_N")]
    try:
        _state(part, root, f"rank {file.rank}", place.reader.room)
    except HandfastError as error:
        part.problem = part.problem or f"{place.absolute(file.path)}: {error}"
    part.untold = untold(read.said, part.tensors)
    return part


def _state(part: Part, root: Object, within: str, memory: int) -> None:
    """What a rank saved: a plain state, or Megatron's. Raises FormatError beyond what is read."""
    plain = root.fields.get("state_dict")
    if plain is not None:
        said = read_state(plain, within=within, memory=memory)
        part.tensors, part.betas, part.valueless = said.tensors, said.betas, said.valueless
        part.counters = [*part.counters, *(counter for _, counter in said.counters)]
        return
    common = root.fields.get("common")
    _common(part, common if type(common) is dict else {})
    _sharded(part, root.fields.get("sharded_state_dict"))


def _common(part: Part, common: Mapping[Any, Any]) -> None:
    """What Megatron keeps beside the tensors."""
    args = arguments(common)
    part.facts = {
        key: args[key]
        for key in ("world_size", "num_layers", "hidden_size", "fp16")
        if type(args.get(key)) in (int, bool)
    }
    part.counters = [*part.counters, *counters(common)]
    _stepped(part, common.get("optimizer"))


def _stepped(part: Part, optimizer: Any) -> None:
    """The optimizer's count, and its betas."""
    found = list(counted(optimizer))
    if found:
        scaled = part.facts.get("fp16") is True
        path = "the greatest step"
        counter = Counter(Clock.OPTIMIZER, max(found), path, updates=True, skips=scaled)
        part.counters = [*part.counters, counter]
    betas = set(all_betas(optimizer))
    if len(betas) == 1 and (only := next(iter(betas))) is not None:
        part.betas = {"": only}


def _sharded(part: Part, root: Any) -> None:
    """The sharded tensors and objects: what they hold, and where that lies in the whole."""
    tensors = []
    for path, node in _leaves(root):
        key = node.fields.get("key")
        if type(key) is not str:
            continue
        if node.type == f"{_PACKAGE}ShardedTensor":
            found = values(node.fields.get("data"))
            if found is not None:
                tensors.append(_tensor(path, key, found, node))
            elif node.fields.get("data") is not None:
                part.valueless = [*part.valueless, path]
        elif key.endswith(".optimizer"):
            _stepped(part, node.fields.get("data"))
    part.tensors = tensors


def _tensor(path: str, key: str, found: Extent, node: Object) -> Tensor:
    """A sharded tensor. Padding between parameters is nobody's copy."""
    offset, shape = sizes(node.fields.get("global_offset")), sizes(node.fields.get("global_shape"))
    made = named(Tensor(key, Role.PARAMETER, checked(found), key, "", shape, offset))
    replica = "" if made.role is Role.OTHER or offset is None else f"{key} at {offset}"
    return msgspec.structs.replace(
        made, path=path, replica=replica, promise=_COPY if replica else ""
    )


def _leaves(root: Any) -> Iterator[tuple[str, Object]]:
    """The objects in dicts and lists, each once, with their paths; not those within objects."""
    ahead = [iter([("", root)])]
    seen: set[int] = set()
    while ahead:
        path, node = next(ahead[-1], ("", None))
        if node is None:
            ahead.pop()
        elif type(node) in (Object, dict, list, tuple) and id(node) not in seen:
            seen.add(id(node))
            if type(node) is Object:
                yield path, node
            elif (parts := inside(path, node)) is not None:
                ahead.append((where, part) for where, part in parts if part is not None)
            if len(ahead) > DEEP or len(path) > LONGEST:
                raise beyond(path, f"{DEEP:,} levels")
