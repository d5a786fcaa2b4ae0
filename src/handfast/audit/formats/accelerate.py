"""Checkpoints of Accelerate: ``Accelerator.save_state``.

The files, in the order in which they are written: accelerate 1.15, checkpointing.py,
``save_accelerator_state``: for each model, optimizer, scheduler and loader one, the first without
a number; the loss scaler; a file of random states a rank; then what was registered. Nothing
commits it. A scheduler steps once a process for each update (scheduler.py), so its count is held
against no other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from handfast.audit.formats.fsdp import files_of_shards, read_shards, shards
from handfast.audit.formats.names import gaps, joined, numbered, parent, runs
from handfast.audit.formats.parts import torch_part
from handfast.audit.formats.weights import read_weights
from handfast.audit.found import Counter, Found, Resume, Step
from handfast.audit.place import Place

__all__ = ["find"]

_WEIGHTS: Final = re.compile(
    r"(model|pytorch_model)(_\d+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
_STATE: Final = re.compile(
    r"(optimizer|scheduler|sampler|dl_state_dict)(?:_(\d+))?\.bin|scaler\.pt"
    r"|custom_checkpoint_\d+\.pkl"
)
_RANDOM: Final = re.compile(r"random_states_(\d+)\.pkl")
_AUTOMATIC: Final = re.compile(r"(.*/)?checkpoints")

_COMMIT: Final = "random_states_RANK.pkl, which each rank writes last of its own"
_RULE: Final = (
    "load_state() takes the last of all entries of checkpoints/, by the first number in their "
    "names, whatever it lacks (accelerate 1.15, accelerator.py, Accelerator.load_state)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield the directories that have Accelerate's files; those that it numbered as one."""
    ours: dict[str, list[str]] = defaultdict(list)
    for path in place.files:
        if _is_ours(path):
            ours[parent(path)].append(path)
    known = [folder for folder, paths in ours.items() if any(map(_mark, paths))]
    for root, group in runs(known):
        steps = [_step(place, folder) for folder in group]
        files = {path for folder in group for path in ours[folder]}
        files |= {path for folder in group for path in files_of_shards(place, folder)}
        automatic = _AUTOMATIC.fullmatch(root) is not None
        resume = [Resume("all ranks", steps[-1].path, _RULE)] if automatic else []
        yield Found("Accelerate", root, steps, resume, frozenset(files))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _is_ours(path: str) -> bool:
    name = _name(path)
    return any(each.fullmatch(name) for each in (_WEIGHTS, _STATE, _RANDOM))


def _mark(path: str) -> bool:
    """Whether a file is of nothing but Accelerate."""
    name = _name(path)
    return _RANDOM.fullmatch(name) is not None or name.startswith(("optimizer", "custom_check"))


def _step(place: Place, folder: str) -> Step:
    here = {_name(path): path for path in place.within(folder) if path in place.files}
    weights = read_weights(place, [path for name, path in here.items() if _WEIGHTS.fullmatch(name)])
    sharded = read_shards(place, folder)
    parts = [*weights.parts, *sharded.parts]
    for name, path in here.items():
        random = _RANDOM.fullmatch(name)
        if random or _STATE.fullmatch(name):
            part = torch_part(place, path).part
            part.rank = {"rank": int(random[1])} if random else {}
            if name.startswith(("optimizer", "scheduler")):
                part.counters = [_of(counter, name) for counter in part.counters]
            parts.append(part)
    absent = _absent(folder, here, sharded=bool(shards(place, folder)))
    findings = [*weights.findings, *sharded.findings]
    return Step(
        folder,
        numbered(folder),
        parts,
        [*weights.missing, *sharded.missing, *absent],
        [*weights.extra, *sharded.extra],
        _COMMIT,
        any(map(_RANDOM.fullmatch, here)),
        "scaler.pt" in here,
        [msgspec.structs.replace(finding, step=folder) for finding in findings],
    )


def _of(counter: Counter, name: str) -> Counter:
    """A counter of one of several optimizers or schedulers, each of which counts for itself."""
    return msgspec.structs.replace(counter, path=f"{name.partition('.')[0]}: {counter.path}")


def _absent(folder: str, here: Mapping[str, str], *, sharded: bool) -> Iterator[tuple[str, str]]:
    """What leaves a gap: in the numbers of ranks, or of models and what trains them."""
    ranks = {int(m[1]) for name in here if (m := _RANDOM.fullmatch(name))}
    for rank in gaps(ranks):
        yield joined(folder, f"random_states_{rank}.pkl"), f"rank {max(ranks)} has one"
    for kind in ("optimizer", "scheduler"):
        yield from _gaps(folder, kind, [m for n in here if (m := _STATE.fullmatch(n))])
    if not sharded and not any(map(_WEIGHTS.fullmatch, here)):
        yield joined(folder, "model.safetensors"), "a checkpoint begins with the model"


def _gaps(folder: str, kind: str, found: Sequence[re.Match[str]]) -> Iterator[tuple[str, str]]:
    numbers = {int(match[2] or 0) for match in found if match[1] == kind}
    for number in gaps(numbers):
        name = f"{kind}_{number}.bin" if number else f"{kind}.bin"
        yield joined(folder, name), f"{kind}_{max(numbers)}.bin is there"
