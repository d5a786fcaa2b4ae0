"""Checkpoints of Megatron-LM: directories ``iter_N`` beside a file that says which one is the last.

Legacy ones have a file for each model-parallel rank (:mod:`megatron_ranks`), Megatron-Core's
distributed ones are a checkpoint of torch DCP with what is common beside it (:mod:`megatron_dist`).
The tracker ``latest_checkpointed_iteration.txt`` is written by rank 0, in place, when all are done.
Facts: Megatron-LM of August 2026, megatron/training/checkpointing.py (``get_checkpoint_name``,
``read_metadata``, ``_load_base_checkpoint``, ``_get_checkpoint_format``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import megatron_dist, megatron_ranks
from handfast.audit.formats.names import parent
from handfast.audit.found import Clock, Counter, Found, Resume, Step
from handfast.audit.place import Place
from handfast.errors import HandfastError

__all__ = ["find"]

TRACKER: Final = "latest_checkpointed_iteration.txt"
RELEASE: Final = "release"
WORD: Final = 64
"""Bytes of a tracker at most."""

_STEP: Final = re.compile(r"iter_(\d{7,18})")
_LOADS: Final = (
    "the iteration in latest_checkpointed_iteration.txt, the greatest that any rank reads there "
    "(megatron/training/checkpointing.py, read_metadata); with a newer one in non_persistent/, that"
)
_ANEW: Final = (
    "there is no latest_checkpointed_iteration.txt: a warning, and the training starts from random "
    "weights (megatron/training/checkpointing.py, _load_base_checkpoint)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield what there is, each directory of steps as one."""
    roots: dict[str, list[str]] = defaultdict(list)
    for folder in place.folders:
        name = folder.rpartition("/")[2]
        if (_STEP.fullmatch(name) or name == RELEASE) and _ours(place, folder):
            roots[parent(folder)].append(folder)
    if (name := place.root.rpartition("/")[2]) and _STEP.fullmatch(name) and _ours(place, ""):
        roots[""].append("")
    for path in place.files:  # veRL has trackers of this name as well, and other directories
        if path.rpartition("/")[2] == TRACKER and place.within(parent(path)) == [path]:
            roots[parent(path)] += []
    for root, folders in roots.items():
        steps, files = [], set()
        for folder in folders:
            dist = megatron_dist.ours(place, folder)
            read = megatron_dist.read_step if dist else megatron_ranks.read_step
            step, own = read(place, folder)
            _name(place, step)
            steps.append(step)
            files |= own
        steps.sort(key=lambda step: (step.number is not None, step.number or 0))
        resume, findings = _tracked(place, root, steps)
        findings += _empty(place, root, folders)
        path = f"{root}/{TRACKER}".lstrip("/")
        files |= {path} & place.files.keys()
        core = any(megatron_dist.ours(place, folder) for folder in folders)
        name = "Megatron-Core" if core else "Megatron-LM"
        yield Found(name, root, steps, resume, frozenset(files), findings)


def _ours(place: Place, folder: str) -> bool:
    return megatron_dist.ours(place, folder) or megatron_ranks.ours(place, folder)


def _name(place: Place, step: Step) -> None:
    """Take the iteration from the directory's name."""
    name = (step.path or place.root).rpartition("/")[2]
    match = _STEP.fullmatch(name)
    if match:
        step.number = int(match[1])
        if step.parts:
            first = step.parts[0]
            counter = Counter(Clock.DIRECTORY, step.number, "iter_N")
            first.counters = [*first.counters, counter]


def _empty(place: Place, root: str, known: Sequence[str]) -> list[Finding]:
    """Directories of iterations that nothing is left in, or that nothing came to."""
    found = []
    for folder in place.within(root):
        name = folder.rpartition("/")[2]
        of_step = folder in place.folders and _STEP.fullmatch(name) and folder not in known
        if of_step and not any(place.below(folder)):
            says = f"{folder} is empty: its save did not come to a file, or it was deleted"
            found.append(Finding(Code.LEFTOVER, Strength.STRONG, "", says, (folder,)))
    return found


def _tracked(place: Place, root: str, steps: Sequence[Step]) -> tuple[list[Resume], list[Finding]]:
    """What the tracker leads to, and what is wrong with it."""
    path = f"{root}/{TRACKER}".lstrip("/")
    if path not in place.files:
        alone = len(steps) == 1 and steps[0].path.rpartition("/")[2] != RELEASE and not root
        return [] if alone and not steps[0].path else [Resume("all ranks", "", _ANEW)], []
    try:
        word = place.bytes(path, WORD).decode().strip()
        number = int(word) if word != RELEASE else None
    except (HandfastError, ValueError) as error:
        says = f"{path} names no iteration, and Megatron exits over it: {error}"
        return [], [Finding(Code.TRACKER, Strength.CERTAIN, "", says, (path,))]
    name = RELEASE if number is None else f"iter_{number:07d}"
    folder = f"{root}/{name}".lstrip("/")
    there = next((step for step in steps if step.path == folder), None)
    if there is None:
        says = f"{path} names {name}, and no such step is there"
        return [], [Finding(Code.TRACKER, Strength.CERTAIN, "", says, (path,))]
    later = [step for step in steps if step.number and number and step.number > number]
    findings = []
    if later:
        says = (
            f"{later[-1].path} is later than {name}, which {path} names: its save did not come to "
            "its end"
        )
        findings.append(Finding(Code.TRACKER, Strength.HINT, later[-1].path, says, (path,)))
    return [Resume("all ranks", folder, _LOADS)], findings
