"""A legacy step of Megatron-LM: ``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``.

The first data-parallel rank of each model-parallel one writes all that it has; with the
distributed optimizer, ``distrib_optim.pt`` beside it has the float32 masters and moments as rows
that go through all parameters. Facts: Megatron-LM of August 2026,
megatron/training/checkpointing.py (``get_checkpoint_name``, ``generate_state_dict``);
Megatron-Core 0.16.1, optimizer/optimizer.py
(``Float16OptimizerWithFloat16Params.state_dict``), optimizer/distrib_optimizer.py
(``get_parameter_state_dp_zero``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit.extent import Extent
from handfast.audit.formats.parts import checked, torch_part, untold
from handfast.audit.formats.states import number
from handfast.audit.formats.zero import ROLES, betas_of, dotted, flat
from handfast.audit.found import Clock, Counter, Part, Role, Step, Tensor
from handfast.audit.place import Place
from handfast.audit.tree import Object, values

__all__ = ["arguments", "counters", "ours", "read_step", "whole"]

MODEL: Final = "model_optim_rng.pt"
ROWS: Final = "distrib_optim.pt"
_RANK: Final = re.compile(r"mp_rank_(\d{2,6})(?:_(\d{3,6}))?(?:_(\d{3,6}))?")
_LAYERED: Final = re.compile(r"layer_wise_optimizer_\d+\.pt")

RANKS: Final = 1 << 17
"""Model-parallel ranks that a job has at most."""

_ALIKE: Final = re.compile(
    r"(?!.*(?:mixer|expert))"  # a state space's norm is cut as its inputs are, experts otherwise
    r"(?:.*\.)?(?:\w*norm\w*\.(?:weight|bias)|\w+\.layer_norm_(?:weight|bias)"
    r"|(?:linear_proj|linear_fc2|dense|dense_4h_to_h)\.bias|position_embeddings\.weight)"
)
"""Parameters that all tensor-parallel ranks have whole (Megatron-Core, transformer/utils.py,
``make_sharded_tensors_for_checkpoint``: what is in no ``tensor_parallel_layers_axis_map``)."""

_HEADS: Final = (
    "output_layer.weight", "word_embeddings.weight", "word_embeddings_for_head.weight",
)  # fmt: skip

_NORMS: Final = "as tensor-parallel ranks have norms, and biases behind a reduction, whole"
_TIED: Final = "as the last stage's output layer is the first one's embedding"
_DRAWN: Final = "as tensor-parallel ranks draw alike outside of what they share"


class _Rank(NamedTuple):
    """Where a model-parallel rank stands."""

    tensor: int
    stage: int
    expert: int


def ours(place: Place, folder: str) -> bool:
    """Whether a directory has a directory of a rank with a file of Megatron's in it."""
    return any(
        _RANK.fullmatch(inner.rpartition("/")[2])
        and any(f"{inner}/{name}" in place.files for name in (MODEL, ROWS))
        for inner in place.within(folder)
    )


def read_step(place: Place, folder: str) -> tuple[Step, set[str]]:
    """Read a step, and say which files are of it."""
    parts: list[Part] = []
    files: set[str] = set()
    roots: dict[_Rank, Mapping[Any, Any]] = {}
    there: dict[str, list[str]] = {}
    for inner in place.within(folder):
        name = inner.rpartition("/")[2]
        match = _RANK.fullmatch(name)
        if not match or inner not in place.folders:
            continue
        there[name] = [path.rpartition("/")[2] for path in place.within(inner)]
        for file in there[name]:
            if file in (MODEL, ROWS) or _LAYERED.fullmatch(file):
                files.add(f"{inner}/{file}")
        if MODEL in there[name]:
            read = torch_part(place, f"{inner}/{MODEL}")
            part, root = read.part, read.root
            part.tensors, part.counters, part.betas = (), (), {}
            parts.append(part)
            if type(root) is dict and ("args" in root or "iteration" in root):
                roots[_rank(match, root)] = root
                _fill(part, root, _rank(match, root))
                part.untold = untold(read.said, part.tensors)
            elif root is not None:
                part.problem = part.problem or _foreign(place, part)
        if ROWS in there[name]:
            parts.append(_rows(place, f"{inner}/{ROWS}", roots, match))
    args = next((found for root in roots.values() if (found := arguments(root))), {})
    expected = dict(_expected(args))
    missing = [
        (f"{folder}/{name}/{file}".lstrip("/"), why)
        for name, (wanted, why) in expected.items()
        for file in wanted
        if file not in there.get(name, ())
    ]
    extra = [
        (f"{folder}/{name}".lstrip("/"), "the job by the arguments in its files has no such rank")
        for name in there
        if expected and name not in expected
    ]
    alien = tuple(f"{path}/" for path, _ in extra)
    kept = [part for part in parts if not part.path.startswith(alien)] if alien else parts
    scaled = bool(args.get("fp16") or args.get("iterations_to_skip"))
    return Step(folder, None, kept, missing, extra, scaled=scaled), files


def _foreign(place: Place, part: Part) -> str:
    return (
        f"{place.absolute(part.path)}: neither args nor iteration is in it, so Megatron did not "
        "write it. What to do: take it from a copy"
    )


def _rank(match: re.Match[str], root: Mapping[Any, Any]) -> _Rank:
    """A rank by its directory: the second number is a stage, where there are several."""
    first, *rest = (int(one) for one in match.groups() if one is not None)
    staged = (arguments(root).get("pipeline_model_parallel_size") or 1) != 1
    stage = rest.pop(0) if rest and (staged or len(rest) == 2) else 0
    return _Rank(first, stage, rest[0] if rest else 0)


def arguments(root: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The training's arguments, by name."""
    args = root.get("args")
    return args.fields if type(args) is Object else {}


def _expected(args: Mapping[Any, Any]) -> Iterator[tuple[str, tuple[list[str], str]]]:
    """The directories of a job of this size, and their files."""
    sizes = [
        number(args.get(f"{axis}_model_parallel_size")) or 1
        for axis in ("tensor", "pipeline", "expert")
    ]
    tensor, stages, experts = sizes
    if not args or min(sizes) < 1 or math.prod(sizes) > RANKS:
        return
    files = [MODEL]
    if args.get("use_distributed_optimizer") is True and not args.get("no_save_optim"):
        files.append(ROWS)
    why = f"by its args: {tensor} tensor-parallel ranks, {stages} stages, {experts} expert-parallel"
    for rank in range(tensor):
        for stage in range(stages):
            for expert in range(experts):
                name = f"mp_rank_{rank:02d}"
                name += f"_{stage:03d}" if stages > 1 else ""
                yield name + (f"_{expert:03d}" if experts > 1 else ""), (files, why)


# A rank's file


def _fill(part: Part, root: Mapping[Any, Any], rank: _Rank) -> None:
    """Fill in a rank's part."""
    args = arguments(root)
    part.rank = {"tp": rank.tensor, "pp": rank.stage, "ep": rank.expert}
    part.facts = {
        key: args[key]
        for key in (
            "world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "num_layers", "hidden_size",
        )
        if type(args.get(key)) is int
    }  # fmt: skip
    part.counters = list(counters(root))
    weights = dict(_weights(root))
    same = _Same(root, rank)
    part.tensors = [
        _tensor(f"model/{name}", Role.PARAMETER, found, name, rank, same)
        for name, found in weights.items()
    ]
    optimizer = root.get("optimizer")
    if type(optimizer) is dict:
        _optimizer(part, optimizer, weights, rank, same, args)
    part.tensors = [*part.tensors, *_drawn(root, rank)]


def counters(root: Mapping[Any, Any]) -> Iterator[Counter]:
    """What is counted beside the model: iterations, and samples."""
    args = arguments(root)
    value = number(root.get("iteration"))
    if value is not None:
        yield Counter(Clock.TRAINER, value, "iteration")
    samples = number(args.get("consumed_train_samples"))
    if samples is not None:
        yield Counter(Clock.LOADER, samples, "args/consumed_train_samples", updates=False)
    scheduler = root.get("opt_param_scheduler", root.get("lr_scheduler"))
    steps = number(scheduler.get("num_steps")) if type(scheduler) is dict else None
    if steps is not None:
        path = "opt_param_scheduler/num_steps"
        yield Counter(Clock.SCHEDULER, steps, path, updates=False)


def whole(node: Any) -> int | None:
    """A whole number: an integer, a float that is one, or a tensor that holds one."""
    if type(node) is float:
        return number(int(node)) if node.is_integer() else None
    return number(node)


def _of(name: str, rank: _Rank) -> str:
    """A parameter's name; of a share, with its rank's place. Stages number their own layers."""
    return f"{name} of tp {rank.tensor}, pp {rank.stage}, ep {rank.expert}"


def _weights(root: Mapping[Any, Any]) -> Iterator[tuple[str, Extent]]:
    """The model's tensors, with names as Megatron-Core has them; of each virtual stage."""
    for key in root:
        if type(key) is str and re.fullmatch(r"model\d{0,3}", key):
            prefix = "" if key == "model" else f"{key}."
            for name, node in dotted(root[key]):
                found = values(node)
                if found is not None and found.dtype.startswith(("float", "bfloat")):
                    yield prefix + name, found


class _Same:
    """Which other ranks have the same bits of a parameter, as Megatron promises."""

    def __init__(self, root: Mapping[Any, Any], rank: _Rank) -> None:
        args = arguments(root)
        self.rank = rank
        self.several = (number(args.get("tensor_model_parallel_size")) or 1) > 1
        stages = number(args.get("pipeline_model_parallel_size")) or 1
        self.last = stages - 1 if args.get("untie_embeddings_and_output_weights") is False else 0

    def of(self, name: str, role: Role) -> tuple[str, str]:
        """The key that all copies of a parameter's tensor have, and who promises that."""
        rank = self.rank
        if self.last and role in (Role.PARAMETER, Role.MASTER):
            first = rank.stage == 0 and name.endswith("word_embeddings.weight")
            last = rank.stage == self.last and name.endswith(_HEADS)
            if first or last:
                return f"{role} of words, tp {rank.tensor}", _TIED
        if self.several and _ALIKE.fullmatch(name):
            return f"{role} {name}, pp {rank.stage}, ep {rank.expert}", _NORMS
        return "", ""


def _drawn(root: Mapping[Any, Any], rank: _Rank) -> Iterator[Tensor]:
    """The states of generators that tensor-parallel ranks share."""
    states = root.get("rng_state")
    for at, state in enumerate(states if type(states) is list else ()):
        trackers = state.get("rng_tracker_states") if type(state) is dict else None
        if type(trackers) is not dict:
            continue
        for name in ("data-parallel-rng", "default"):
            found = values(trackers.get(name))
            if found is not None:
                key = f"{name} of {at}, pp {rank.stage}, ep {rank.expert}"
                path = f"rng_state/{at}/rng_tracker_states/{name}"
                yield Tensor(path, Role.OTHER, found, replica=key, promise=_DRAWN)


# The optimizer in a rank's file


def _optimizer(
    part: Part,
    optimizer: Mapping[Any, Any],
    weights: Mapping[str, Extent],
    rank: _Rank,
    same: _Same,
    args: Mapping[Any, Any],
) -> None:
    """Read the optimizer's state: wrapped for 16 bits, or torch's own."""
    inner = optimizer.get("optimizer", optimizer)
    groups = inner.get("param_groups") if type(inner) is dict else None
    state = inner.get("state") if type(inner) is dict else None
    groups = [group for group in groups if type(group) is dict] if type(groups) is list else []
    state = state if type(state) is dict else {}
    rows = optimizer.get("fp32_from_fp16_params")
    masters = [
        [values(one) for one in group] if type(group) is list else []
        for group in (rows if type(rows) is list else ())
    ]
    names = _names(weights, groups, masters, state)
    part.betas = {
        f"group {at}": betas for at, group in enumerate(groups) if (betas := betas_of(group))
    }
    fresh = bool(args.get("no_load_optim") or args.get("finetune"))
    scaled = bool(args.get("fp16") or args.get("iterations_to_skip"))
    steps = [whole(group.get("step")) for group in groups]
    steps += [whole(own.get("step")) for own in state.values() if type(own) is dict]
    counted = [step for step in steps if step is not None]
    if counted:
        counter = Counter(
            Clock.OPTIMIZER, max(counted), "the greatest step", updates=not fresh, skips=scaled
        )
        part.counters = [*part.counters, counter]
    tensors = []
    for at, group in enumerate(masters):
        for place, found in enumerate(group):
            if found is not None:
                name = names.get((at, place), "")
                path = f"optimizer/fp32_from_fp16_params/{at}/{place}"
                tensors.append(_tensor(path, Role.MASTER, found, name, rank, same))
    for key, at, place in _members(groups):
        own = state.get(key)
        name = names.get((at, place), "")
        for field, node in own.items() if type(own) is dict else ():
            found = values(node)
            if type(field) is str and field != "step" and found is not None:
                role = ROLES.get(field, Role.OTHER)
                path = f"optimizer/state/{key}/{field}"
                made = _tensor(path, role, found, name, rank, same)
                tensors.append(msgspec.structs.replace(made, group=f"group {at}"))
    part.tensors = [*part.tensors, *tensors]


def _tensor(path: str, role: Role, found: Extent, name: str, rank: _Rank, same: _Same) -> Tensor:
    """A tensor that belongs to a parameter; where the name is "", to one that is not known."""
    if not name:
        return Tensor(path, role, checked(found))
    replica, promise = same.of(name, role)
    return Tensor(path, role, checked(found), _of(name, rank), replica=replica, promise=promise)


def _members(groups: Sequence[Mapping[Any, Any]]) -> Iterator[tuple[int, int, int]]:
    """Each parameter's key in the state, its group, and its place in the group."""
    for at, group in enumerate(groups):
        members = group.get("params")
        for place, key in enumerate(members if type(members) is list else ()):
            if type(key) is int:
                yield key, at, place


def _names(
    weights: Mapping[str, Extent],
    groups: Sequence[Mapping[Any, Any]],
    masters: Sequence[Sequence[Extent | None]],
    state: Mapping[Any, Any],
) -> dict[tuple[int, int], str]:
    """The names of the parameters of each group, which the optimizer does not have.

    A group has parameters in the model's order, those without decay apart: biases, and what has
    one dimension (``_get_param_groups``). Taken as known only where all shapes fit.
    """
    made: dict[tuple[int, int], str] = {}
    for decays in (True, False):
        own = [at for at, group in enumerate(groups) if (group.get("wd_mult") != 0.0) is decays]
        flat_one = {
            name: len(found.shape) == 1 or name.endswith(".bias") for name, found in weights.items()
        }
        names = [name for name, is_flat in flat_one.items() if is_flat is not decays]
        if len(own) != 1:
            continue
        shapes = _shapes(own[0], groups, masters, state)
        if shapes == [weights[name].shape for name in names]:
            made.update({(own[0], place): name for place, name in enumerate(names)})
    return made


def _shapes(
    at: int,
    groups: Sequence[Mapping[Any, Any]],
    masters: Sequence[Sequence[Extent | None]],
    state: Mapping[Any, Any],
) -> list[tuple[int, ...]]:
    """The shapes of a group's parameters, by their masters or their moments."""
    if at < len(masters) and masters[at]:
        return [found.shape for found in masters[at] if found is not None]
    shapes = []
    for key, group, _ in _members(groups):
        own = state.get(key) if group == at else None
        found = values(own.get("exp_avg")) if type(own) is dict else None
        if found is not None:
            shapes.append(found.shape)
    return shapes


# The distributed optimizer's file


def _rows(
    place: Place, path: str, roots: Mapping[_Rank, Mapping[Any, Any]], match: re.Match[str]
) -> Part:
    """The distributed optimizer's rows, cut by parameters where it is known how."""
    read = torch_part(place, path)
    part = read.part
    part.tensors, part.counters, part.betas = (), (), {}
    root = next((found for rank, found in roots.items() if _rank(match, found) == rank), {})
    rank = _rank(match, root)
    part.rank = {"tp": rank.tensor, "pp": rank.stage, "ep": rank.expert}
    if type(read.root) is not dict:
        if read.root is not None:
            part.problem = part.problem or _foreign(place, part)
        return part
    tensors = []
    optimizer = root.get("optimizer")
    inner = optimizer.get("optimizer") if type(optimizer) is dict else None
    groups = inner.get("param_groups") if type(inner) is dict else None
    known = {betas_of(one) for one in groups or () if type(one) is dict}
    if len(known) == 1 and (betas := next(iter(known))) is not None:
        part.betas = {"all": betas}  # a row goes through all groups
    same, weights = _Same(root, rank), dict(_weights(root))
    for label, row in _buffers(read.root):
        numel = number(row.get("numel_unpadded"))
        places = _laid(weights, numel)
        for key, role in (("param", Role.MASTER), *ROLES.items()):
            found = values(row.get(key))
            if found is None:
                continue
            whole = f"{label}, tp {rank.tensor}, pp {rank.stage}, ep {rank.expert}"
            if not places:
                tensors.append(Tensor(f"{label}/{key}", role, checked(found), whole, "all"))
                continue
            tensors.append(Tensor(f"{label}/{key}", Role.OTHER, checked(found)))
            for name, at in places.items():
                shape = weights[name].shape
                piece = flat(found, at, math.prod(shape))
                if piece is not None:
                    shaped = msgspec.structs.replace(
                        piece, shape=shape, stride=weights[name].stride
                    )
                    made = _tensor(f"{label}/{key}/{name}", role, shaped, name, rank, same)
                    tensors.append(msgspec.structs.replace(made, group="all"))
    part.tensors = tensors
    return part


def _buffers(root: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The rows of each buffer: by its number, and the dtypes of its parameters and gradients."""
    for buffer, kinds in root.items():
        if type(buffer) is int and type(kinds) is dict:
            for at, row in enumerate(kinds.values()):
                if type(row) is dict:
                    yield f"buffer {buffer}/{at}", row


def _laid(weights: Mapping[str, Extent], numel: int | None) -> dict[str, int]:
    """Where each parameter begins in a row, if the weights show it.

    They are views of one buffer, which the row goes along if it ends where they do: so it is with
    one bucket. With several, nobody knows where the padding of each is.
    """
    by_source: dict[int, list[str]] = {}
    for name, found in weights.items():
        by_source.setdefault(id(found.source), []).append(name)
    fits = [
        names
        for names in by_source.values()
        if max(weights[n].offset + math.prod(weights[n].shape) for n in names) == numel
    ]
    if len(fits) != 1 or len(fits[0]) < 2:
        return {}
    return {name: weights[name].offset for name in fits[0]}
