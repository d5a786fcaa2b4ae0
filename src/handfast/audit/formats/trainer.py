"""Checkpoints of Hugging Face's Trainer: ``checkpoint-N`` directories.

What is in one, and in which order it is written: transformers 5.23, trainer.py,
``_save_checkpoint``: the weights; unless only those are wanted the optimizer, the scheduler, the
loss scaler and a file of random states a rank; ``trainer_state.json`` last. Nothing commits it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.fsdp import files_of_shards, read_shards, shards
from handfast.audit.formats.names import gaps, joined, parent
from handfast.audit.formats.parts import bare, counting, torch_part
from handfast.audit.formats.states import number as whole
from handfast.audit.formats.weights import read_weights
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Step
from handfast.audit.place import Place
from handfast.errors import UNREADABLE, HandfastError

__all__ = ["find"]

_FOLDER: Final = re.compile(r"(tmp-)?checkpoint-(\d+)")
_RNG: Final = re.compile(r"rng_state(?:_(\d+))?\.pth")
_WEIGHTS: Final = re.compile(
    r"(adapter_model|model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
STATE: Final = "trainer_state.json"
ARGUMENTS: Final = "training_args.bin"
_STATES: Final = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_MARKS: Final = frozenset({STATE, ARGUMENTS})
"""Files of nothing but a Trainer: an ``optimizer.pt`` in a ``checkpoint-N`` is anybody's."""

_COMMIT: Final = "trainer_state.json, which is written last"
_RULE: Final = (
    "the greatest N of checkpoint-N, whatever it lacks; each process lists the directory by itself "
    "(transformers 5.23, trainer_utils.py, get_last_checkpoint)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield each output directory that has checkpoint-N directories of a Trainer's files.

    One that is looked at by itself is its own.
    """
    outputs: dict[str, list[str]] = defaultdict(list)
    for folder in place.folders:
        if _named(place, folder):
            outputs[parent(folder)].append(folder)
    for root, folders in outputs.items():
        inside = [{path.rpartition("/")[2] for path in place.within(folder)} for folder in folders]
        if any(map(_is_trainers, inside)):
            yield _found(place, root, folders)


def _named(place: Place, folder: str) -> re.Match[str] | None:
    """What a directory's name says; of the place itself, if it is looked at alone."""
    return _FOLDER.fullmatch((folder or place.root).rpartition("/")[2])


def _is_trainers(names: set[str]) -> bool:
    """Whether a Trainer wrote a directory, by the names in it.

    Of a save that was killed there may be no more than what it writes first: weights by Hugging
    Face's names, and states by the Trainer's.
    """
    states = {"optimizer.pt", "scheduler.pt"} <= names or any(map(_RNG.fullmatch, names))
    return bool(names & _MARKS) or (states and any(map(_WEIGHTS.fullmatch, names)))


def _found(place: Place, root: str, folders: Sequence[str]) -> Found:
    numbers = {folder: _named(place, folder) for folder in folders}
    named = sorted((int(m[2]), folder) for folder, m in numbers.items() if m and not m[1])
    steps = [_step(place, folder, number) for number, folder in named]
    for step, finding in _unseeded(place, steps):
        step.findings = [*step.findings, finding]
    left = [folder for folder, match in numbers.items() if match and match[1]]
    findings = [_left_over(folder) for folder in left]
    files = {path for _, folder in named for path in place.within(folder) if _ours(place, path)}
    files |= {path for folder in left for path in place.below(folder)}
    files |= {path for _, folder in named for path in files_of_shards(place, folder)}
    alone = folders == [""]
    findings += () if alone else _best(place, root, named)
    resume = [Resume("all ranks", steps[-1].path, _RULE)] if steps and not alone else []
    return Found("Hugging Face Trainer", root, steps, resume, frozenset(files), findings)


def _ours(place: Place, path: str) -> bool:
    name = path.rpartition("/")[2]
    fits = name in (STATE, ARGUMENTS, *_STATES) or _RNG.fullmatch(name) or _WEIGHTS.fullmatch(name)
    return path in place.files and bool(fits)


def _left_over(folder: str) -> Finding:
    says = (
        "a save that did not end: transformers 4.36 and 4.37 wrote under this name, and renamed it "
        "when it was whole"
    )
    return Finding(Code.LEFTOVER, Strength.STRONG, folder, says, (folder,))


def _step(place: Place, folder: str, number: int) -> Step:
    here = {path.rpartition("/")[2]: path for path in place.within(folder)}
    weights = read_weights(place, [path for name, path in here.items() if _WEIGHTS.fullmatch(name)])
    sharded = read_shards(place, folder)
    parts = [*weights.parts, *sharded.parts]
    scaled = "scaler.pt" in here
    for name, path in here.items():
        random = _RNG.fullmatch(name)
        if name in _STATES or random:
            part = torch_part(place, path).part
            counting(part, Clock.OPTIMIZER, Clock.SCHEDULER, skips=scaled)
            part.rank = {"rank": int(random[1] or 0)} if random else {}
            parts.append(part)
    parts += _state(place, number, here)
    absent = _absent(folder, here, sharded=bool(shards(place, folder)))
    findings = [*weights.findings, *sharded.findings]
    return Step(
        folder,
        number,
        parts,
        [*weights.missing, *sharded.missing, *absent],
        [*weights.extra, *sharded.extra, *_other_world(here)],
        _COMMIT,
        STATE in here,
        scaled,
        [msgspec.structs.replace(finding, step=folder) for finding in findings],
    )


def _state(place: Place, number: int, here: Mapping[str, str]) -> Iterator[Part]:
    """What the trainer itself says: its steps, which are updates (``_inner_training_loop``)."""
    if ARGUMENTS in here:
        yield msgspec.structs.replace(bare(place, here[ARGUMENTS]), aside=[here[ARGUMENTS]])
    if STATE not in here:
        return
    part = bare(place, here[STATE])
    part.counters, part.aside = [Counter(Clock.DIRECTORY, number, "checkpoint-N")], [part.path]
    try:
        state = msgspec.json.decode(place.bytes(here[STATE]), type=dict[str, Any])
    except (HandfastError, *UNREADABLE) as error:
        part.problem = f"{place.absolute(here[STATE])}: no state of a trainer: {error}"
    else:
        steps = whole(state.get("global_step"))
        if steps is not None:
            part.counters = [*part.counters, Counter(Clock.TRAINER, steps, "global_step")]
    yield part


def _absent(folder: str, here: Mapping[str, str], *, sharded: bool) -> Iterator[tuple[str, str]]:
    """What has to be there if anything but the weights is; not so with DeepSpeed's own files."""
    ranks = {int(m[1]) for name in here if (m := _RNG.fullmatch(name)) and m[1]}
    states = [name for name in here if name in _STATES]
    random = [name for name in here if _RNG.fullmatch(name)]
    own = any(re.fullmatch(r"global_step\d+", name) for name in here)
    why = "the same save wrote it, by what else is there"
    if not own and not sharded and not any(map(_WEIGHTS.fullmatch, here)):
        yield joined(folder, "model.safetensors"), "a checkpoint begins with the weights"
    if (random or states) and not own:
        optimizer = sharded or {"optimizer.pt", "optimizer.bin"} & here.keys()
        if not optimizer:
            yield joined(folder, "optimizer.pt"), f"{why}; a resume goes on with a fresh optimizer"
        if "scheduler.pt" not in here:
            yield joined(folder, "scheduler.pt"), f"{why}; a resume goes on with a fresh optimizer"
    for rank in gaps(ranks):
        yield joined(folder, f"rng_state_{rank}.pth"), f"rank {max(ranks)} has one"


def _unseeded(place: Place, steps: Sequence[Step]) -> Iterator[tuple[Step, Finding]]:
    """Steps with an optimizer's state and without any random one, which some people remove.

    Strong where another step of the run has one.
    """
    inside = [{path.rpartition("/")[2] for path in place.within(step.path)} for step in steps]
    seeded = [any(map(_RNG.fullmatch, names)) for names in inside]
    for step, names, has in zip(steps, inside, seeded, strict=True):
        if has or names.isdisjoint(_STATES):
            continue
        path = joined(step.path, "rng_state.pth")
        says = f"{path} is missing: the same save wrote it, by what else is there"
        strength = Strength.STRONG if any(seeded) else Strength.HINT
        yield step, Finding(Code.MISSING, strength, step.path, says, (path,))


def _other_world(here: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """A file that one process alone writes, beside those of several."""
    if "rng_state.pth" in here and any(m[1] for n in here if (m := _RNG.fullmatch(n))):
        yield here["rng_state.pth"], "a single process wrote it, and several the ones beside it"


def _best(place: Place, root: str, named: Sequence[tuple[int, str]]) -> Iterator[Finding]:
    """The best checkpoint, by the last one's state: a hint where it is gone."""
    path = joined(named[-1][1], STATE) if named else ""
    if path not in place.files:
        return
    try:
        state = msgspec.json.decode(place.bytes(path), type=dict[str, Any])
    except (HandfastError, *UNREADABLE):
        return
    best = state.get("best_model_checkpoint")
    name = best.rstrip("/").rpartition("/")[2] if type(best) is str else ""
    if name and joined(root, name) not in {folder for _, folder in named}:
        says = f"the trainer's best checkpoint is {name}, which is not there"
        yield Finding(Code.TRACKER, Strength.HINT, root, says, (path,))
