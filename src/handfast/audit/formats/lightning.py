"""Checkpoints of Lightning: ``.ckpt`` files, and directories of shards of that name.

What is in one: pytorch-lightning 2.6, trainer/connectors/checkpoint_connector.py,
``dump_checkpoint``. A file replaces its predecessor as a whole (lightning_fabric,
utilities/cloud_io.py, ``_atomic_save``); a directory is a distributed checkpoint with ``meta.pt``
for the rest, written last (strategies/fsdp.py and model_parallel.py), and ``last.ckpt`` is written
over again and again.

The global step counts updates of all optimizers together (trainer.py, ``Trainer.global_step``): it
is held against an optimizer's count only where there is one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import dcp
from handfast.audit.formats.names import joined, parent
from handfast.audit.formats.parts import Read, counting, torch_part
from handfast.audit.formats.states import number
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Step
from handfast.audit.place import Place

__all__ = ["find"]

VERSION: Final = "pytorch-lightning_version"
META: Final = "meta.pt"
_HPC: Final = re.compile(r"hpc_ckpt_(\d+)\.ckpt")
_STEP: Final = re.compile(r"step=(\d+)")
_LAST: Final = re.compile(r"last(-.*)?\.ckpt")
_PROGRESS: Final = "epoch_loop.automatic_optimization.optim_progress"

_COMMIT: Final = ".metadata, and then meta.pt, which is written when all shards are"
_HPC_RULE: Final = (
    "under SLURM fit() without a path takes the greatest N of hpc_ckpt_N in the root directory "
    "(pytorch-lightning 2.6, checkpoint_connector.py, _CheckpointConnector._hpc_resume_path)"
)
_LAST_RULE: Final = (
    'fit(ckpt_path="last") takes the last*.ckpt that was modified last '
    "(pytorch-lightning 2.6, checkpoint_connector.py, _parse_ckpt_path)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield each directory of checkpoints, its steps by what they counted."""
    steps: dict[str, list[Step]] = defaultdict(list)
    files: dict[str, set[str]] = defaultdict(set)
    for path in place.files:
        step = _file(place, path) if path.endswith(".ckpt") else None
        if step is not None:
            steps[parent(path)].append(step)
            files[parent(path)].add(path)
    for folder in dcp.folders(place):
        if folder.endswith(".ckpt") or joined(folder, META) in place.files:
            steps[parent(folder)].append(_directory(place, folder))
            files[parent(folder)] |= {*place.below(folder)}
    for root, found in steps.items():
        found.sort(key=lambda step: (-1 if step.number is None else step.number, step.path))
        known = frozenset(files[root])
        yield Found("Lightning", root, found, _resume(found), known, list(_behind(found)))


def _file(place: Place, path: str) -> Step | None:
    """A checkpoint in a file; None where it is not Lightning's, by its keys, or its name if it
    can't be read.
    """
    name = path.rpartition("/")[2]
    read = torch_part(place, path)
    known = type(read.root) is dict and VERSION in read.root
    named = any(each.search(name) for each in (_HPC, _STEP, _LAST))
    if not known and (read.root is not None or not named):
        return None
    step = Step(path, scaled=read.said.scaled)
    number = _count(read, path, [read.part], step.scaled)
    step.number, step.parts = number, [read.part]
    return step


def _directory(place: Place, folder: str) -> Step:
    """A checkpoint in shards, with the rest in a file beside them."""
    step = dcp.read_step(place, folder)
    meta = joined(folder, META)
    step.commit = _COMMIT
    if meta not in place.files:
        step.committed = False
        return step
    read = torch_part(place, meta)
    step.scaled = read.said.scaled
    step.parts = [read.part, *step.parts]
    step.number = _count(read, folder, step.parts, step.scaled)
    return step


def _count(read: Read, path: str, parts: Sequence[Part], scaled: bool) -> int | None:
    """Say of the counters of all parts which are held against each other; give the step's number.

    The name and the global step are one. An optimizer's count is, too, where there is one alone,
    which the loop steps (``automatic_optimization``).
    """
    match = _STEP.search(path.rpartition("/")[2])
    named = int(match[1]) if match and len(match[1]) < 19 else None
    if named is not None:
        told = Counter(Clock.DIRECTORY, named, "step=N")
        read.part.counters = [*read.part.counters, told]
    root = read.root if type(read.root) is dict else {}
    step = number(root.get("global_step"))
    optimizers = [c for part in parts for c in part.counters if c.clock is Clock.OPTIMIZER]
    alone = len(optimizers) == 1 and _automatic(root) == step
    for part in parts:
        part.counters = [
            msgspec.structs.replace(counter, updates=True)
            if counter.clock is Clock.TRAINER and counter.path == "global_step"
            else counter
            for counter in part.counters
        ]
        if alone:
            counting(part, Clock.OPTIMIZER, skips=scaled)
    return step if named is None else named


def _automatic(root: Any) -> Any:
    """How many updates the loop made by itself (pytorch-lightning 2.6, loops/progress.py)."""
    node = root
    for key in ("loops", "fit_loop", _PROGRESS, "optimizer", "step", "total", "completed"):
        node = node.get(key) if type(node) is dict else None
    return node


def _resume(steps: Sequence[Step]) -> list[Resume]:
    """What the two ways of a resume without a path take."""
    found = []
    hpc = {int(m[1]): step for step in steps if (m := _HPC.fullmatch(_name(step)))}
    if hpc:
        found.append(Resume("all ranks, under SLURM", hpc[max(hpc)].path, _HPC_RULE))
    last = [step for step in steps if _LAST.fullmatch(_name(step))]
    if last:
        newest = max(last, key=lambda step: max((part.saved for part in step.parts), default=0.0))
        found.append(Resume("all ranks", newest.path, _LAST_RULE))
    return found


def _name(step: Step) -> str:
    return step.path.rpartition("/")[2]


def _behind(steps: Sequence[Step]) -> Iterator[Finding]:
    """A last.ckpt that is not the last: a hint, since another callback may have saved the other."""
    last = [step for step in steps if _LAST.fullmatch(_name(step)) and step.number is not None]
    newest = max(steps, key=lambda step: step.number or 0)
    most = max((step.number or 0 for step in last), default=None)
    if most is not None and most < (newest.number or 0):
        says = f"{_name(last[-1])} is of step {most}, and {_name(newest)} is later"
        yield Finding(Code.TRACKER, Strength.HINT, last[-1].path, says, (newest.path,))
