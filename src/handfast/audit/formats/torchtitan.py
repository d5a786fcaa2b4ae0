"""Checkpoints of TorchTitan: ``step-N`` directories, each a distributed checkpoint of torch.

Its own keys, beside the model's names at the top (TorchTitan 0.3.0, components/checkpointer/base.py
and dcp.py): ``optimizer``, ``lr_scheduler``, ``dataloader`` and ``train_state``, whose ``step``
counts updates as the others do (trainer.py). With torchft each replica saves its loader in every
step, by itself (experiments/torchft/checkpoint.py, ``_ft_save``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import dcp
from handfast.audit.formats.distcp import INDEX_MOST
from handfast.audit.formats.names import joined, parent
from handfast.audit.formats.parts import counting
from handfast.audit.found import Clock, Counter, Found, Resume, Step
from handfast.audit.place import Place
from handfast.errors import HandfastError

__all__ = ["find"]

_STEP: Final = re.compile(r"step-(\d+)")
_REPLICA: Final = re.compile(r"ft-replicat?-(.+)")
_MARK: Final = b"train_state.step"

_RULE: Final = (
    "the greatest N of step-N that has .metadata or model.safetensors.index.json, whatever else it "
    "lacks (TorchTitan 0.3.0, components/checkpointer/dcp.py, CheckpointManager._find_load_step)"
)
_LOADER_RULE: Final = (
    "the greatest N of the replica's own step-N, whichever the model takes (TorchTitan 0.3.0, "
    "experiments/torchft/checkpoint.py, _ft_load)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield each directory of step-N directories of which one at least has TorchTitan's keys."""
    places: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for folder in dcp.folders(place):
        if match := _STEP.fullmatch(folder.rpartition("/")[2]):
            places[parent(folder)].append((int(match[1]), folder))
    for root, named in places.items():
        loader = _REPLICA.fullmatch(root.rpartition("/")[2]) and parent(root) in places
        if not loader and any(_is_titan(place, folder) for _, folder in named):
            yield _found(place, root, sorted(named), places)


def _is_titan(place: Place, folder: str) -> bool:
    """Whether the mark is among the names of an index, which is not taken apart for that."""
    path = joined(folder, dcp.INDEX)
    try:
        return path in place.files and _MARK in place.bytes(path, INDEX_MOST)
    except HandfastError:
        return False


def _found(
    place: Place,
    root: str,
    named: Sequence[tuple[int, str]],
    places: dict[str, list[tuple[int, str]]],
) -> Found:
    steps = [_step(place, folder, number) for number, folder in named]
    files = {path for _, folder in named for path in dcp.own_files(place, folder)}
    whole = [step for step in steps if step.committed]
    resume = [Resume("all ranks", whole[-1].path, _RULE)] if whole else []
    findings = []
    for folder, loaders in places.items():
        match = _REPLICA.fullmatch(folder.rpartition("/")[2])
        own = [pair for pair in loaders if joined(pair[1], dcp.INDEX) in place.files]
        if match is None or parent(folder) != root or not own:
            continue
        number, path = max(own)
        files |= {each for _, loader in loaders for each in dcp.own_files(place, loader)}
        resume.append(Resume(f"the loader of replica {match[1]}", path, _LOADER_RULE))
        if whole and number != whole[-1].number:
            findings.append(_ahead(whole[-1], path, number))
    return Found("TorchTitan", root, steps, resume, frozenset(files), findings)


def _ahead(step: Step, path: str, number: int) -> Finding:
    says = (
        f"a resume takes the model of step {step.number} and a loader of step {number}: some "
        "batches would be left out, or come twice"
    )
    return Finding(Code.COUNTERS, Strength.STRONG, step.path, says, (step.path, path))


def _step(place: Place, folder: str, number: int) -> Step:
    """A step: its name, its trainer, its optimizers and its schedulers count the same updates."""
    step = dcp.read_step(place, folder)
    for part in step.parts:
        counting(part, Clock.TRAINER, Clock.OPTIMIZER, Clock.SCHEDULER)
    if step.parts:
        first = step.parts[0]
        first.counters = [*first.counters, Counter(Clock.DIRECTORY, number, "step-N")]
    return step
