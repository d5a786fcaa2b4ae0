"""Checkpoints of DeepSpeed, with ZeRO of any stage or without, and what is at their side.

A directory a tag, ``global_stepN`` unless somebody names it, of a file for each model-parallel rank
(with stage 3: for each rank) and one for each rank's partition; ``latest`` names a tag. Nothing
commits a tag: rank 0 writes ``latest`` when *it* is done, before the barrier at which it waits for
the others. Facts: DeepSpeed 0.19.8, runtime/engine.py (``save_checkpoint``, ``_get_ckpt_name``,
``_get_rank_zero_ckpt_name``, ``load_checkpoint``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats import universal
from handfast.audit.formats.deepspeed_parts import (
    Model,
    Partition,
    Share,
    copies,
    dtypes,
    read_model,
    read_partition,
    stage_of,
)
from handfast.audit.formats.deepspeed_ranks import alike, padded, written
from handfast.audit.formats.names import parent
from handfast.audit.formats.parts import Read, torch_part, untold
from handfast.audit.formats.zero import RANKS
from handfast.audit.found import Clock, Counter, Found, Part, Resume, Step
from handfast.audit.place import Place
from handfast.errors import HandfastError

__all__ = ["find"]

_MODEL: Final = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")
_OPTIM: Final = re.compile(r"(bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_?optim_states\.pt")
_BESIDE: Final = re.compile(
    r"layer_\d+(-[\w-]+)?-model_states\.pt"  # one layer of a pipeline
    r"|(layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt"
    r"|expp_rank_\d+_mp_rank_\d+_optim_states\.pt"
)
_TAG: Final = re.compile(r"global_step(\d{1,18})(_universal)?")
_SCRIPTS: Final = ("zero_to_fp32.py", "zero_to_torch.py")

LATEST: Final = "latest"
LATEST_UNIVERSAL: Final = "latest_universal"
WORD: Final = 4096
"""Bytes of a tag's name at most."""
_LOADS: Final = (
    "load_checkpoint without a tag takes the one that `latest` names, on each rank by itself "
    "(DeepSpeed 0.19.8, runtime/engine.py, load_checkpoint)"
)
_ANEW: Final = (
    "there is no `latest`: load_checkpoint without a tag warns, and the training starts anew "
    "(DeepSpeed 0.19.8, runtime/engine.py, load_checkpoint)"
)
_NONE: Final = (
    "its partition is not there: torch.load raises; releases that only warned went on with new "
    "moments (DeepSpeed 0.19.8, runtime/engine.py, _get_all_zero_checkpoint_state_dicts)"
)
_IGNORES: Final = (
    "stage 3 then takes the weights from the tag that `latest` names, whichever was asked for "
    "(DeepSpeed 0.19.8, runtime/engine.py, _load_checkpoint: get_fp32_state_dict_from_zero_"
    "checkpoint is not given the tag)"
)
_UNIVERSAL: Final = (
    "with load_universal_checkpoint, the one that `latest_universal` names (DeepSpeed 0.19.8, "
    "runtime/engine.py, load_checkpoint)"
)


def find(place: Place) -> Iterator[Found]:
    """Yield what there is, each directory of tags as one."""
    roots: dict[str, list[str]] = defaultdict(list)
    for folder in sorted({parent(path) for path in place.files if _ours(path)}):
        roots[parent(folder)].append(folder)
    for path in place.files:
        if path.rpartition("/")[2] == LATEST and _names_a_lost_step(place, path):
            roots[parent(path)] += []
    for root, folders in roots.items():
        steps = [_read_step(place, folder) for folder in folders]
        steps.sort(key=lambda step: (step.number is not None, step.number or 0, step.path))
        files = {
            path
            for folder in folders
            for path in place.below(folder)
            if (_ours(path) and parent(path) == folder) or universal.ours(folder, path)
        }
        beside = (LATEST, LATEST_UNIVERSAL, *_SCRIPTS)
        files |= {path for name in beside if (path := _joined(root, name)) in place.files}
        latest, findings = _tracked(place, root, LATEST, steps)
        other, wrong = _tracked(place, root, LATEST_UNIVERSAL, steps)
        resume = [*_resume(latest, steps), *([other] if other else [])]
        yield Found("DeepSpeed", root, steps, resume, frozenset(files), [*findings, *wrong])


def _ours(path: str) -> bool:
    name = path.rpartition("/")[2]
    return any(pattern.fullmatch(name) for pattern in (_MODEL, _OPTIM, _BESIDE))


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _names_a_lost_step(place: Place, path: str) -> bool:
    """Whether a file called `latest`, as many are, names a step of DeepSpeed's that is gone."""
    try:
        tag = place.bytes(path, WORD).decode().strip()
    except (HandfastError, UnicodeDecodeError):
        return False
    gone = not any(place.below(_joined(parent(path), tag)))
    return gone and _TAG.fullmatch(tag) is not None


# One tag


class _Job(NamedTuple):
    """What the model's files say of the job, and which of them; 0 where they do not."""

    dp: int
    mp: int
    stage: int
    scaled: bool
    says: str


def _read_step(place: Place, folder: str) -> Step:
    """Read one tag's directory."""
    here = [path for path in place.within(folder) if path in place.files]
    models, partitions, parts, reads = _opened(place, here)
    stage = stage_of(models, partitions)
    job = _job(models, partitions, stage)
    known = [model.part.path for model in models] + [one.part.path for one in partitions]
    extra = dict(_extra(folder, here, job))
    shares = {mp: _share(job, mp, models, partitions) for mp in {model.mp for model in models}}
    findings: list[Finding] = []
    for model in models:
        read_model(model, shares.get(model.mp), job.scaled, place.reader.room)
    for partition in partitions:
        fits = partition.part.path not in extra and partition.dp < max(job.dp, 1)
        share = shares.get(partition.mp) if fits else None
        findings += read_partition(partition, share, job.scaled)
        findings += padded(partition, share)
    findings += alike(partitions) if stage == 3 else ()
    for path, file in reads.items():
        findings += written(path, file.name, (_MODEL, _OPTIM))
    findings += _skipped(models, partitions, job)
    for part in parts:
        part.untold = untold(reads[part.path].said, part.tensors)
    if universal.inside(place, folder):
        read = universal.read(place, folder, models, job.scaled)
        parts += read.parts
        findings += read.findings
        missing = list(read.missing)
        for part in parts:
            part.saved = 0.0  # some are copies that keep their times, and none is of a save
    else:
        missing = list(_missing(folder, here, job, models))
    tag = _TAG.fullmatch(folder.rpartition("/")[2])
    number = int(tag[1]) if tag else None
    if number is not None and parts:
        named = Counter(Clock.DIRECTORY, number, "global_stepN")
        first = next((part for part in parts if part.path in known), parts[0])
        first.counters = [*first.counters, named]
    kept = [part for part in parts if part.path not in extra]
    told = [msgspec.structs.replace(finding, step=folder) for finding in findings]
    return Step(
        folder, number, kept, missing, list(extra.items()), scaled=job.scaled, findings=told
    )


def _opened(
    place: Place, here: Sequence[str]
) -> tuple[list[Model], list[Partition], list[Part], dict[str, Read]]:
    """The files of a tag: those that could be read, all as parts, and each as it was read."""
    models, partitions, parts = [], [], []
    reads: dict[str, Read] = {}
    for path in here:
        name = path.rpartition("/")[2]
        model, optim = _MODEL.fullmatch(name), _OPTIM.fullmatch(name)
        if not (model or optim or _BESIDE.fullmatch(name)):
            continue
        read = torch_part(place, path, within=name)
        part, root = read.part, read.root
        parts.append(part)
        reads[path] = read
        wanted = "module" if model else "optimizer_state_dict" if optim else None
        if wanted is None or root is None:
            continue
        part.tensors, part.counters, part.betas = (), (), {}
        if type(root) is not dict or wanted not in root:
            part.problem = part.problem or (
                f"{place.absolute(path)}: no {wanted!r} is in it, so DeepSpeed did not write it. "
                "What to do: take it from a copy"
            )
        elif model:
            dp, mp = int(model[1]) if model[1] else -1, int(model[2])
            part.rank = {"mp": mp} if dp < 0 else {"dp": dp, "mp": mp}
            models.append(Model(part, root, dp, mp))
        elif optim:
            dp, mp = int(optim[2]), int(optim[3])
            part.rank = {"dp": dp, "mp": mp}
            partitions.append(Partition(part, root, dp, mp, bool(optim[1])))
    return models, partitions, parts, reads


def _job(models: Sequence[Model], partitions: Sequence[Partition], stage: int) -> _Job:
    """The job's size: the first model's file knows it."""
    dynamic = any(partition.state.get("dynamic_loss_scale") is True for partition in partitions)
    skipped = any(model.number("skipped_steps") for model in models)
    whole = [m.root["optimizer"] for m in models if type(m.root.get("optimizer")) is dict]
    scaled = dynamic or skipped or any(o.get("dynamic_loss_scale") is True for o in whole)
    for model in models:
        dp, mp = model.number("dp_world_size"), model.number("mp_world_size")
        if dp > 0 and mp > 0 and dp * mp <= RANKS:
            name = model.part.path.rpartition("/")[2]
            return _Job(
                dp, mp, stage, scaled, f"by {name}, {dp} data- by {mp} model-parallel ranks"
            )
    return _Job(0, 0, stage, scaled, "")


def _share(
    job: _Job, mp: int, models: Sequence[Model], partitions: Sequence[Partition]
) -> Share | None:
    """How a model-parallel rank's parameters are cut; None where no file says it."""
    own = [model for model in models if model.mp == mp]
    shapes = next((found for model in own if (found := model.shapes) is not None), None)
    if not job.dp:
        return None
    rows = [one for one in partitions if one.mp == mp and one.dp < job.dp]
    first = min(rows, key=lambda one: one.dp, default=None)
    fits = first is not None and first.world in (0, job.dp)
    return Share(
        mp,
        job.mp > 1,
        job.dp,
        job.stage,
        (shapes or ()) if fits else (),
        own[0].frozen,
        first.paddings if first is not None else (),
        first.sizes if first is not None else (),
        dtypes(own[0]),
        copies(own[0]) if job.mp > 1 else (),
    )


def _missing(
    folder: str, here: Sequence[str], job: _Job, models: Sequence[Model]
) -> Iterator[tuple[str, str]]:
    """The files that a tag should have, by the job's size."""
    names = {path.rpartition("/")[2] for path in here}
    if not job.dp:
        if not any(_MODEL.fullmatch(name) for name in names):
            name = "zero_pp_rank_0_mp_rank_00" if job.stage == 3 else "mp_rank_00"
            yield _joined(folder, f"{name}_model_states.pt"), "no file of a model is there at all"
        return
    zero = any(model.shapes is not None for model in models)
    for name in _expected(job, zero, _prefix(names, models)):
        old = name.replace("_optim_states", "optim_states")
        if name not in names and old not in names:
            yield _joined(folder, name), job.says


def _prefix(names: set[str], models: Sequence[Model]) -> str:
    """How partitions' names begin: by those that are there, else by the configuration."""
    found = [match for name in names if (match := _OPTIM.fullmatch(name))]
    if found:
        return "bf16_" if sum(bool(match[1]) for match in found) * 2 >= len(found) else ""
    config = models[0].root.get("ds_config") if models else None
    half = config.get("bf16", config.get("bfloat16")) if type(config) is dict else None
    return "bf16_" if type(half) is dict and half.get("enabled") is True else ""


def _expected(job: _Job, zero: bool, prefix: str) -> Iterator[str]:
    for mp in range(job.mp):
        for dp in range(job.dp):
            if job.stage == 3:
                yield f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt"
            elif not dp:
                yield f"mp_rank_{mp:02d}_model_states.pt"
            if zero:
                yield f"{prefix}zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"


def _extra(folder: str, here: Sequence[str], job: _Job) -> Iterator[tuple[str, str]]:
    """The files that a job of this size does not write."""
    if not job.dp:
        return
    names = [path.rpartition("/")[2] for path in here]
    optims = [match for name in names if (match := _OPTIM.fullmatch(name))]
    many = sum(bool(match[1]) for match in optims) * 2 >= len(optims)
    for name in names:
        model, optim = _MODEL.fullmatch(name), _OPTIM.fullmatch(name)
        ranks: tuple[int, int] | None = None
        if model:
            ranks = int(model[1] or 0), int(model[2])
            if (model[1] is None) == (job.stage == 3):
                yield _joined(folder, name), f"with ZeRO stage {job.stage} no file has such a name"
                continue
        elif optim:
            ranks = int(optim[2]), int(optim[3])
            if bool(optim[1]) != many:
                yield _joined(folder, name), "the others are of another precision: an older save's"
                continue
        if ranks is not None and (ranks[0] >= job.dp or ranks[1] >= job.mp):
            yield _joined(folder, name), f"of a larger job: {job.says}"


def _skipped(
    models: Sequence[Model], partitions: Sequence[Partition], job: _Job
) -> Iterator[Finding]:
    """Hold the optimizer's step against the steps that were taken, less those that were skipped."""
    taken = [m for m in models if "global_steps" in m.root and "skipped_steps" in m.root]
    if not job.scaled or not taken:
        return
    model = taken[0]
    expected = model.number("global_steps") - model.number("skipped_steps")
    steps = {
        counter.value: part.path
        for part in [one.part for one in partitions] + [model.part]
        for counter in part.counters
        if counter.clock is Clock.OPTIMIZER and counter.updates
    }
    wrong = {value: path for value, path in steps.items() if value != expected}
    if wrong and max(wrong) <= model.number("global_steps"):
        says = (
            f"the optimizer made {', '.join(map(str, sorted(wrong)))} updates, and global_steps "
            f"less skipped_steps are {expected}"
        )
        paths = (model.part.path, *wrong.values())
        yield Finding(Code.COUNTERS, Strength.STRONG, "", says, paths)


# What names a tag


def _tracked(
    place: Place, root: str, name: str, steps: Sequence[Step]
) -> tuple[Resume | None, list[Finding]]:
    """What a file that names a tag leads to, and what is wrong with that."""
    path = _joined(root, name)
    wanted = _UNIVERSAL if name == LATEST_UNIVERSAL else _LOADS
    if path not in place.files:
        return None, []
    try:
        tag = place.bytes(path, WORD).decode().strip()
    except (HandfastError, UnicodeDecodeError) as error:
        says = f"{path} can't be read: {error}"
        return None, [Finding(Code.TRACKER, Strength.CERTAIN, "", says, (path,))]
    folder = _joined(root, tag)
    there = next((step for step in steps if step.path == folder), None)
    if there is None:
        says = f"{path} names {tag!r:.80}, and no such step is there"
        return None, [Finding(Code.TRACKER, Strength.CERTAIN, "", says, (path,))]
    findings = []
    plain = [step for step in steps if not universal.inside(place, step.path)]
    later = [s for s in plain if None not in (s.number, there.number) and _after(s, there)]
    if name == LATEST and later:
        says = (
            f"{later[-1].path} is later than {folder}, which {path} names: its save did not come "
            "to its end, or was told not to be the latest"
        )
        findings.append(Finding(Code.TRACKER, Strength.HINT, later[-1].path, says, (path,)))
    return Resume("all ranks", folder, wanted), findings


def _after(step: Step, other: Step) -> bool:
    return (step.number or 0) > (other.number or 0)


def _resume(latest: Resume | None, steps: Sequence[Step]) -> Iterator[Resume]:
    """What each rank would take."""
    if latest is None:
        yield Resume("all ranks", "", _ANEW)
        return
    step = next(step for step in steps if step.path == latest.step)
    lost: Mapping[int, list[int]] = _lost(step)
    if not lost:
        yield latest
    else:
        yield Resume("all other ranks", latest.step, latest.rule)
    for mp, ranks in lost.items():
        told = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
        yield Resume(f"dp ranks {told} of mp rank {mp}", "", _NONE)
    if any(part.rank.keys() == {"dp", "mp"} and _stage3(part) for part in step.parts):
        yield Resume("all ranks, with load_optimizer_states=False", latest.step, _IGNORES)


def _stage3(part: Part) -> bool:
    return part.path.endswith("_model_states.pt")


def _lost(step: Step) -> dict[int, list[int]]:
    """The data-parallel ranks whose partition is not there, by model-parallel ranks."""
    lost: dict[int, list[Any]] = defaultdict(list)
    for path, _ in step.missing:
        match = _OPTIM.fullmatch(path.rpartition("/")[2])
        if match:
            lost[int(match[3])].append(int(match[2]))
    return lost
