"""The two files of a rank of DeepSpeed, as parts: the model's and the optimizer's.

A model's file has the weights, their shapes, and what the engine counted; with ZeRO a rank's
partition of the float32 masters and of the optimizer's state is in a file of its own. All tensors
of a parameter are given flattened, cut where the partitions are: so a master, its moments and its
weights have one place. Facts: DeepSpeed 0.19.8, runtime/engine.py (``_common_checkpoint_state``,
``_save_zero_checkpoint``), runtime/zero/stage_1_and_2.py and stage3.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from handfast.audit.archive import Record
from handfast.audit.extent import Extent
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.parts import by_record, with_checksums
from handfast.audit.formats.states import Said, is_extra, number, read_state
from handfast.audit.formats.zero import (
    ROLES,
    Shapes,
    Stretch,
    betas_of,
    cut_everywhere,
    cut_groups,
    cut_parameters,
    dotted,
    flat,
    mapped,
    named_shapes,
    settled,
)
from handfast.audit.found import Clock, Counter, Part, Role, Tensor
from handfast.audit.tree import Object, values
from handfast.errors import HandfastError
from handfast.store.objects import child

__all__ = [
    "Model",
    "Partition",
    "Share",
    "copies",
    "dtypes",
    "read_model",
    "read_partition",
    "stage_of",
]

_SAFE: Final = re.compile(r"\^?(?:\w|-|\\?\.|\\d\+|\.\*)*\$?")
"""Patterns of names that can't be made to take for ever, with two repetitions at most."""

REPEATED: Final = 2
NAME: Final = 512
"""Characters of a parameter's name that patterns are tried on."""

_SAME: Final = "as what is trained in float32 is its own master (ZeRO 1 and 2)"
_COPIED: Final = "by the patterns of its universal_checkpoint_info"


class Model(msgspec.Struct):
    """What the file of a model says. ``dp`` is -1 where data-parallel ranks share one."""

    part: Part
    root: dict[Any, Any]
    dp: int
    mp: int

    def number(self, key: str) -> int:
        """A number that it says; 0 where it does not."""
        return number(self.root.get(key)) or 0

    @property
    def shapes(self) -> Shapes | None:
        """The parameters that an optimizer trains, by its groups, where ZeRO is in use."""
        return named_shapes(self.root.get("param_shapes"))

    @property
    def frozen(self) -> Shapes:
        """The parameters that no optimizer trains, as one group."""
        return named_shapes(self.root.get("frozen_param_shapes")) or []


class Partition(msgspec.Struct):
    """What the file of a rank's partition says."""

    part: Part
    root: dict[Any, Any]
    dp: int
    mp: int
    bf16: bool

    @property
    def state(self) -> dict[Any, Any]:
        """ZeRO's own state."""
        found = self.root.get("optimizer_state_dict")
        return found if type(found) is dict else {}

    @property
    def base(self) -> tuple[Mapping[Any, Any], Sequence[Any]]:
        """The state of the optimizer that ZeRO wraps, by groups, and its groups."""
        found = self.state.get("base_optimizer_state", self.state.get("optimizer_state_dict"))
        if type(found) is list:  # an elastic one has no more than that
            return dict(enumerate(found)), ()
        if type(found) is not dict:
            return {}, ()
        state, groups = found.get("state"), found.get("param_groups")
        return (
            state if type(state) is dict else {},
            [group for group in groups if type(group) is dict] if type(groups) is list else (),
        )

    @property
    def rows(self) -> list[Extent]:
        """The float32 masters, a row a group."""
        found = self.state.get(
            "single_partition_of_fp32_groups", self.state.get("fp32_flat_groups")
        )
        rows = [values(row) for row in found] if type(found) is list else []
        return [row for row in rows if row is not None]

    @property
    def sizes(self) -> list[int]:
        """How long a row of each group is, with the padding that stages 1 and 2 do not save."""
        cut = self.state.get("group_paddings") if "zero_stage" in self.state else None
        paddings = cut if type(cut) is list else []
        return [
            row.shape[0] + (number(paddings[at]) or 0 if at < len(paddings) else 0)
            for at, row in enumerate(self.rows)
            if len(row.shape) == 1
        ]

    @property
    def paddings(self) -> list[list[int]]:
        """What follows each parameter of each group."""
        found = self.state.get("param_alignment_paddings")
        groups = found if type(found) is list else []
        return [
            [number(padding) or 0 for padding in group] for group in groups if type(group) is list
        ]

    @property
    def world(self) -> int:
        """In how many pieces each group was cut; the most, where experts have fewer."""
        count = self.state.get("partition_count")
        counts = [number(one) or 0 for one in (count if type(count) is list else [count])]
        return max(counts, default=0)

    @property
    def counts(self) -> bool:
        """Whether an optimizer's step counts updates, and nothing else."""
        return "zero_stage" in self.state and settled(self.root.get("ds_version"))

    @property
    def scaler(self) -> Mapping[Any, Any]:
        """The loss scaler's attributes."""
        found = self.state.get("loss_scaler")
        return found.fields if type(found) is Object else {}


class Share(msgspec.Struct):
    """How the parameters of one model-parallel rank are cut, and what of them is where.

    ``world`` data-parallel ranks; ``several`` whether there are more model-parallel ones;
    ``dtypes`` the weights' by name; ``copies`` which parameters other model-parallel ranks have,
    too.
    """

    mp: int
    several: bool
    world: int
    stage: int
    shapes: Shapes
    frozen: Shapes = ()
    paddings: Sequence[Sequence[int]] = ()
    sizes: Sequence[int] = ()
    dtypes: Mapping[str, str] = {}
    copies: Sequence[re.Pattern[str]] = ()

    def of(self, name: str) -> str:
        """The parameter's name; of a share of one, with its rank."""
        return f"{name} of mp rank {self.mp}" if self.several else name

    def row(self, rank: int) -> list[Stretch]:
        """What lies in the rows of a data-parallel rank."""
        if self.stage == 3:
            return list(cut_parameters(self.shapes, self.world, rank))
        return list(cut_groups(self.shapes, self.paddings, self.sizes, rank))

    def tensor(
        self, path: str, role: Role, piece: Extent, place: Stretch, group: str = ""
    ) -> Tensor:
        """A piece of a parameter, or of what belongs to one."""
        shape = self.shapes[place.group].get(place.name, ()) if self.shapes else ()
        whole = 1
        for size in shape:
            whole *= size
        same, promise = self._same(place, role)
        return Tensor(
            path, role, piece, self.of(place.name), group, (whole,), (place.start,), same, promise
        )

    def _same(self, place: Stretch, role: Role) -> tuple[str, str]:
        """Under which key there are copies of a piece, and who promises that."""
        copied = self.several and any(p.match(place.name[:NAME]) for p in self.copies)
        name = place.name if copied else self.of(place.name)
        key = f"{name} from {place.start}"
        trained = self.stage < 3 and role in (Role.MASTER, Role.PARAMETER)
        if trained and self.dtypes.get(place.name) == "float32":
            return f"trained {key}", _SAME
        return (f"{role} {key}", _COPIED) if copied else ("", "")


def stage_of(models: Sequence[Model], partitions: Sequence[Partition]) -> int:
    """The stage of ZeRO, as a file says or its name; 0 without."""
    for partition in partitions:
        said = partition.state.get("zero_stage")
        found = number(said.args[0]) if type(said) is Object and said.args else number(said)
        if found is not None:
            return found
    if any(model.dp >= 0 for model in models):
        return 3
    for model in models:
        config = model.root.get("ds_config")
        settings = config.get("zero_optimization") if type(config) is dict else None
        if type(settings) is dict:
            return number(settings.get("stage")) or 0
    return 1 if partitions else 0


# The model's file


def read_model(model: Model, share: Share | None, scaled: bool, memory: int) -> None:
    """Fill in the part of a model's file. ``memory`` is as of :func:`read_state`."""
    root, part = model.root, model.part
    part.facts = {
        key: value
        for key in ("dp_world_size", "mp_world_size", "ds_version")
        if type(value := root.get(key)) in (int, str)
    }
    part.counters = list(_engine(model))
    tensors = list(_weights(model, share))
    if type(root.get("optimizer")) is dict:  # no ZeRO: the optimizer's state is here
        said = _whole(model, memory)
        tensors += with_checksums(said.tensors)
        part.betas = said.betas
        plain = "state" in root["optimizer"]  # one that is wrapped stepped once before it began
        part.counters += [
            msgspec.structs.replace(counter, updates=plain, skips=scaled)
            if counter.clock is Clock.OPTIMIZER
            else counter
            for _, counter in said.counters
        ]
    part.tensors = [*tensors, *_records(tensors)]


def _whole(model: Model, memory: int) -> Said:
    """The state of an optimizer without ZeRO."""
    state = {"optimizer": model.root["optimizer"]}
    try:
        return read_state(state, within=f"mp rank {model.mp}", memory=memory)
    except HandfastError as error:
        model.part.problem = model.part.problem or f"{model.part.path}: {error}"
        return Said()


def _engine(model: Model) -> Iterator[Counter]:
    """What the engine counted, and its schedulers."""
    for key, updates in (("global_steps", True), ("skipped_steps", False)):
        value = number(model.root.get(key))
        if value is not None:
            yield Counter(Clock.TRAINER, value, key, updates=updates)
    scheduler = model.root.get("lr_scheduler")
    for key in ("last_batch_iteration", "last_epoch"):
        value = number(scheduler.get(key)) if type(scheduler) is dict else None
        if value is not None:
            yield Counter(Clock.SCHEDULER, value, f"lr_scheduler/{key}", updates=False)


def _weights(model: Model, share: Share | None) -> Iterator[Tensor]:
    """The module's tensors: buffers as they are, weights cut where the partitions are."""
    names = model.root.get("buffer_names")
    buffers = {name for name in names if type(name) is str} if type(names) is list else set()
    cuts: dict[str, list[Stretch]] = defaultdict(list)
    if share is not None and share.stage in (1, 2):
        for place in cut_everywhere(share.shapes, share.paddings, share.sizes):
            cuts[place.name].append(place)
    for name, node in dotted(model.root.get("module")):
        found = values(node)
        if found is None or 0 in found.shape:  # stage 3 leaves empty ones in their places
            continue
        path = f"module/{name}"
        if name in buffers or is_extra(name):
            yield Tensor(path, Role.OTHER if is_extra(name) else Role.BUFFER, found)
            continue
        pieces = [(place, flat(found, place.start, place.length)) for place in cuts.get(name, ())]
        if share is None or not pieces or any(piece is None for _, piece in pieces):
            of = name if share is None else share.of(name)
            yield Tensor(path, Role.PARAMETER, found, of)
            continue
        yield from (share.tensor(path, Role.PARAMETER, p, at) for at, p in pieces if p is not None)
    yield from _frozen(model, share)


def _frozen(model: Model, share: Share | None) -> Iterator[Tensor]:
    """Stage 3's shares of the parameters that no optimizer trains."""
    shares = model.root.get("frozen_param_fragments")
    if share is None or share.stage != 3 or type(shares) is not dict or model.dp < 0:
        return
    for place in cut_parameters(model.frozen, share.world, model.dp):
        found = values(shares.get(place.name))
        piece = None if found is None else flat(found, 0, place.length)
        if piece is not None:
            path = child("frozen_param_fragments", place.name)
            of = share.of(place.name)
            yield Tensor(path, Role.PARAMETER, piece, of, "", None, (place.start,))


def dtypes(model: Model) -> dict[str, str]:
    """The weights' dtypes, by name."""
    found = ((name, values(node)) for name, node in dotted(model.root.get("module")))
    return {name: weights.dtype for name, weights in found if weights is not None}


def copies(model: Model) -> list[re.Pattern[str]]:
    """The patterns of parameters that all tensor-parallel ranks have alike.

    ``ds_to_universal`` compares them, and stops where they differ (``merge_tp_slices``).
    """
    info = model.root.get("universal_checkpoint_info")
    found = info.get("tp_replicated_parameter_patterns") if type(info) is dict else None
    return [
        re.compile(pattern)
        for pattern in (found if type(found) is list else ())
        if type(pattern) is str
        and len(pattern) < NAME
        and _SAFE.fullmatch(pattern)
        and pattern.count("*") + pattern.count("+") <= REPEATED
    ]


# The partition's file


def read_partition(partition: Partition, share: Share | None, scaled: bool) -> list[Finding]:
    """Fill in the part of a partition's file, and say where it does not fit its place."""
    part, (state, groups) = partition.part, partition.base
    part.facts = {"partition_count": partition.world} if partition.world else {}
    scale, seen = partition.scaler.get("cur_scale"), number(partition.scaler.get("cur_iter"))
    if type(scale) in (int, float):
        part.facts = {**part.facts, "loss scale": scale}
    counters = []
    if seen is not None:
        counters.append(Counter(Clock.LOADER, seen, "loss_scaler/cur_iter", updates=False))
    for at, group in enumerate(groups):
        label = f"group {at}"
        if (betas := betas_of(group)) is not None:
            part.betas = {**part.betas, label: betas}
        own = state.get(at)
        step = number(own.get("step")) if type(own) is dict else None
        if step is not None:
            path = f"the step of {label}"
            counters.append(
                Counter(Clock.OPTIMIZER, step, path, updates=partition.counts, skips=scaled)
            )
    part.counters = counters
    wrong = _misfit(partition, share)
    tensors = list(_rows(partition, state, share if wrong is None else None))
    part.tensors = [*tensors, *_records(tensors)]
    return [] if wrong is None else [wrong]


def _misfit(partition: Partition, share: Share | None) -> Finding | None:
    """A finding where a rank's rows are not what its place in the job has."""
    if share is None or not share.shapes:
        return None
    path = partition.part.path
    expected = share.row(partition.dp)
    said = mapped(partition.state.get("param_slice_mappings"))
    if said is not None and share.stage < 3:
        places: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
        for place in expected:
            places[place.group][place.name] = place.at, place.length
        for group, theirs in enumerate(said):
            ours = places.get(group, {})
            if theirs != ours:
                what = sorted(theirs.keys() ^ ours.keys()) or [
                    name for name in theirs if theirs[name] != ours[name]
                ]
                says = (
                    f"{path} does not hold what its rank has of group {group}, by the shapes in "
                    "the model's file: it is of a job of another size, or of another model"
                )
                return Finding(Code.INDEX, Strength.CERTAIN, "", says, (path,), tuple(what[:6]))
    rows = partition.rows
    for place in expected:
        row = rows[place.group] if place.group < len(rows) else None
        if row is None or flat(row, place.at, place.length) is None:
            has = "none" if row is None else f"{row.shape}"
            says = (
                f"{path} has too short a row of group {place.group} ({has}) for what its rank has "
                "of it, by the shapes in the model's file: it is of a job of another size"
            )
            return Finding(Code.INDEX, Strength.CERTAIN, "", says, (path,))
    return None


def _rows(partition: Partition, state: Mapping[Any, Any], share: Share | None) -> Iterator[Tensor]:
    """The rows of a partition: by parameters where they are known, else whole."""
    places: dict[int, list[Stretch]] = defaultdict(list)
    if share is not None and share.shapes:
        for place in share.row(partition.dp):
            places[place.group].append(place)
    stage3 = "fp32_flat_groups" in partition.state
    masters = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
    base = "optimizer_state_dict" if stage3 else "base_optimizer_state"
    for group, row in enumerate(partition.rows):
        found = [(child(masters, group), Role.MASTER, row)]
        own = state.get(group)
        moments = own if type(own) is dict else {}
        for key, node in moments.items():
            extent = values(node)
            if type(key) is str and key != "step" and extent is not None:
                role = ROLES.get(key, Role.OTHER)
                if role is Role.FIRST and "exp_avg_sq" not in moments:  # Lion's is a momentum
                    role = Role.MOMENTUM
                found.append((child(child(child(base, "state"), group), key), role, extent))
        for path, role, extent in found:
            yield from _row(path, role, extent, places.get(group, ()), share, f"group {group}")


def _row(
    path: str,
    role: Role,
    row: Extent,
    places: Sequence[Stretch],
    share: Share | None,
    group: str,
) -> Iterator[Tensor]:
    pieces = [(place, flat(row, place.at, place.length)) for place in places]
    if share is None or not pieces or any(piece is None for _, piece in pieces):
        if 0 not in row.shape:
            yield Tensor(path, role, row, "", group)
        return
    for place, piece in pieces:
        if piece is not None:
            yield share.tensor(f"{path}/{place.name}", role, piece, place, group)


def _records(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """What was cut in pieces, whole as well: only so can it be held against its checksum."""
    seen: dict[int, Record] = {}
    for tensor in tensors:
        source = tensor.values.source if type(tensor.values) is Extent else None
        if type(source) is Record and source.crc:
            seen[id(source)] = source
    for record in seen.values():
        whole = Extent(record, "uint8", (record.nbytes,), (1,))
        yield Tensor(f"record {record.key}", Role.RECORD, by_record(whole, record))
