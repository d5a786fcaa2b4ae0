"""``handfast adopt``: a sound checkpoint of another library, taken into a run as its first epoch.

What it holds is read as the audit reads it, without executing anything, and put together from its
shards. Weights become a module of their names, so that ``guard.load(run, model=model)`` loads them,
or a box of tensors where no module can have such names; masters, moments and whatever else an
optimizer has of each parameter, its count of updates too, become boxes beside it, by the names of
the weights where these are known. Hyperparameters are not taken over: formats have no common word
for them. What is neither (schedulers, counts, random states, positions of a loader) stays where it
is, and its names are told; what can't be read as plain values is refused, unless it
is left out by name.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from handfast.audit import found as audited
from handfast.audit.checks import Look
from handfast.audit.checks.owners import owners
from handfast.audit.choice import Chosen, choose, refuse_unsound
from handfast.audit.extent import SIZES, Reader
from handfast.audit.found import Clock, Role, Step
from handfast.audit.place import look
from handfast.audit.room import MEMORY
from handfast.audit.run import founds
from handfast.checkpoint.reader import open_run
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import FormatError, NoRun, Refused
from handfast.model.optimizer import Index
from handfast.store.manifest import Fork
from handfast.torch.checkpointer import Checkpointer
from handfast.torch.lineage import History
from handfast.torch.marked import mark
from handfast.torch.memory import bytes_of
from handfast.torch.origins import Origin
from handfast.torch.types import TORCH_DTYPES

__all__ = ["Adopted", "adopt"]

LINEAGE: Final = "adopted"
BLOCK: Final = 1 << 20

MOST: Final = 8
"""How many times the bytes of its files the tensors of a checkpoint may take: names that share a
storage get one each."""

SHOWN: Final = 3

LITTLE: Final = 64 << 20
"""Bytes that they may take in any case."""

BOXES: Final = {
    Role.MASTER: "master",
    Role.FIRST: "exp_avg",
    Role.SECOND: "exp_avg_sq",
    Role.MOMENTUM: "momentum_buffer",
}
"""What is no weight, by the name that torch's optimizers give it."""

STEP: Final = "step"
"""The box of an optimizer's counts of updates, float32 as torch's are."""

_KEY: Final = re.compile(r"(?!model$|master$|step$)[A-Za-z_][A-Za-z0-9_]*")
"""Names of an optimizer's other tensors that are names of boxes, too."""


@dataclass(frozen=True)
class Adopted:
    """What was taken over: which step of which format, as which epoch; tensors by component.

    ``why`` says why that step; ``left`` names what stays behind as it is neither weights nor an
    optimizer's, and ``without`` what was left out because it was asked for.
    """

    format: str
    step: str
    why: str
    epoch: Epoch
    tensors: Mapping[str, int]
    left: tuple[str, ...]
    without: tuple[str, ...]


def adopt(
    path: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    step: int | None = None,
    without: Sequence[str] = (),
    trust: bool = False,
    memory: int = MEMORY,
) -> Adopted:
    """Take one checkpoint at ``path`` into a new run at ``run``; without ``step`` the newest.

    All of its values are read and checked first. ``step`` is what its files count, or its name
    says; ``trust`` takes one whose counts contradict each other or its name. ``without`` are names
    of what to leave out, files as well, or patterns of them ("optimizer/*"); ``memory`` is as for
    an audit. What was left out, and what stays behind, stands in the epoch's ``extra``. Raises
    Refused where there is none, or one of several would have to be chosen; where what was not read
    may hold another; where anything certain or strong speaks against it, or it has something that
    can't be carried over; where its shards don't make whole tensors, copies of one differ, or
    ``run`` has epochs already. FormatError for a dtype that this torch doesn't have; what a save
    raises.
    """
    _refuse_run(os.fspath(run))
    with Reader(room=memory) as reader:
        looking = Look(deep=True)
        place = look(path, reader)
        chosen = choose(list(founds(place)), step, place, os.fspath(path))
        refuse_unsound(chosen, looking, trust=trust)
        sorted_out = _sort(chosen.step, without)
        _refuse_swollen(sorted_out, sum(part.nbytes for part in chosen.step.parts))
        state = _state(sorted_out)
    return _save(os.fspath(path), os.fspath(run), chosen, state, sorted_out)


def _refuse_run(run: str) -> None:
    with suppress(NoRun):
        open_run(run)
        raise Refused(
            f"{run} is a run already",
            verdict=Verdict.FOREIGN,
            remedy="give a path with no run on it: what is adopted begins one",
        )


class _Piece(NamedTuple):
    """A tensor, or a piece or a copy of one, and the part that has it."""

    part: str
    tensor: audited.Tensor


class _Sorted(NamedTuple):
    """What a checkpoint has, by what becomes of it.

    The pieces of each weight, which of these are buffers, the pieces of each box; the names of what
    stays behind, and of what was left out; how many updates an optimizer made of each parameter.
    """

    weights: dict[str, list[_Piece]]
    buffers: set[str]
    boxes: dict[str, dict[str, list[_Piece]]]
    left: list[str]
    without: list[str]
    counts: dict[str, int]


def _sort(step: Step, patterns: Sequence[str]) -> _Sorted:
    """Sort what a checkpoint has. Raises Refused for what can't be carried, unless it is named."""
    found = _Sorted(defaultdict(list), set(), defaultdict(lambda: defaultdict(list)), [], [], {})
    names = owners(step)
    whose: set[str] = set()  # of what is left out
    for part in step.parts:
        if _named(part.path, patterns):
            found.without.append(part.path)
            continue
        valueless = {*part.valueless}
        lost = [path for path in valueless if not _named(path, patterns)]
        if lost:
            raise Refused(
                f"{part.path} has what can't be read as plain values, and would be lost",
                verdict=Verdict.MISSING,
                shards=sorted(lost),
                remedy="save it dense, resolved and on a device; or leave it out by name "
                "(--without NAME), and it is told in the run what was left out",
            )
        found.without.extend(part.valueless)
        for path in (*part.aside, *part.untold):
            (found.without if _named(path, patterns) else found.left).append(path)
        for tensor in part.tensors:
            name = names.get((part.path, tensor.of), tensor.of or tensor.path)
            if tensor.path in valueless:
                continue
            if _named(tensor.path, patterns) or _named(name, patterns):
                found.without.append(tensor.path)
                whose.add(name)
            elif tensor.role in (Role.PARAMETER, Role.BUFFER):
                found.weights[name].append(_Piece(part.path, tensor))
                found.buffers.update({name} if tensor.role is Role.BUFFER else ())
            elif (box := _box(tensor)) is not None:
                found.boxes[box][name].append(_Piece(part.path, tensor))
            elif tensor.role is not Role.RECORD:
                found.left.append(tensor.path)
    found.counts.update(_updates(step, names, found))
    named = whose.union(found.without)
    idle = [one for one in patterns if not any(_named(path, [one]) for path in named)]
    if idle:
        raise Refused(
            f"nothing in it is called {', '.join(idle)}",
            verdict=Verdict.MISSING,
            remedy="names are as an audit and a refusal write them",
        )
    return found


def _updates(
    step: Step, names: Mapping[tuple[str, str], str], found: _Sorted
) -> Iterator[tuple[str, int]]:
    """How many updates an optimizer made of each parameter of which it has anything in a box."""
    there = {name for box in found.boxes.values() for name in box}
    for part in step.parts:
        for counter in part.counters:
            name = names.get((part.path, counter.path), counter.path)
            if counter.clock is Clock.PARAMETER and name in there:
                yield name, counter.value


def _named(path: str, patterns: Sequence[str]) -> bool:
    return any(path == one or fnmatchcase(path, one) for one in patterns)


def _box(tensor: audited.Tensor) -> str | None:
    """The box for a tensor of an optimizer; None for what is not known to be a parameter's."""
    if tensor.role in BOXES:
        return BOXES[tensor.role]
    if not tensor.of:
        return None
    key = tensor.path.removesuffix(tensor.of).rstrip("/.").rpartition("/")[2].rpartition(".")[2]
    return key if _KEY.fullmatch(key) else None


def _refuse_swollen(found: _Sorted, nbytes: int) -> None:
    """Refuse what would take far more memory than its files have bytes."""
    sizes = {
        f"{slot}/{name}": prod(one.whole or one.values.shape) * SIZES.get(one.values.dtype, 1)
        for slot, tensors in {"model": found.weights, **found.boxes}.items()
        for name, [(_, one), *_] in tensors.items()
    }
    made = sum(sizes.values())
    if made > max(LITTLE, MOST * nbytes):
        raise Refused(
            f"its tensors would take {made:,} bytes, and its files have {nbytes:,}: they repeat a "
            f"few values, and more than {MOST} times as many are not made",
            verdict=Verdict.CORRUPT,
            shards=sorted(sizes, key=sizes.__getitem__)[: -SHOWN - 1 : -1],
            remedy="if the shapes are meant, save tensors that don't share or repeat a storage",
        )


def _state(found: _Sorted) -> dict[str, Any]:
    """The state to be saved: a module of the weights, and boxes of what goes with them."""
    if not found.weights:
        raise Refused(
            "no weights are known in it",
            verdict=Verdict.MISSING,
            remedy="its format says of none of its tensors that it is a weight",
        )
    whole = {name: _whole(name, pieces) for name, pieces in found.weights.items()}
    module = _module(whole, found.buffers) if _bearable(whole) else whole
    state: dict[str, Any] = {"model": module}
    for slot, tensors in found.boxes.items():
        state[slot] = {name: _whole(name, pieces) for name, pieces in tensors.items()}
    if found.counts:
        state[STEP] = {name: torch.tensor(float(count)) for name, count in found.counts.items()}
    return state


def _whole(name: str, pieces: list[_Piece]) -> Tensor:
    """One tensor of its pieces. Raises Refused where some lack, or copies of one differ."""
    first = pieces[0].tensor
    dtype = TORCH_DTYPES.get(first.values.dtype)
    if dtype is None:
        raise FormatError(f"{name}: this torch ({torch.__version__}) has no {first.values.dtype}")
    shape = first.whole if first.whole is not None else first.values.shape
    made = torch.empty(shape, dtype=dtype)
    filled: dict[tuple[int, ...], str] = {}
    count = 0
    for part, piece in pieces:
        sizes = piece.values.shape
        offset = piece.offset if piece.offset is not None else (0,) * len(shape)
        target = _place(made, offset, sizes)
        if target is None or piece.values.dtype != first.values.dtype:
            raise Refused(
                f"{name}: {piece.values.dtype} {sizes} at {offset} in {part} is no part of "
                f"{first.values.dtype} {shape}, as {pieces[0].part} has it",
                verdict=Verdict.MIXED,
                remedy="its files are of two models: adopt one of them by itself",
            )
        read = _read(piece, dtype)
        if offset not in filled:
            filled[offset] = part
            count += prod(sizes)
            target.copy_(read)
        elif not torch.equal(bytes_of(target), bytes_of(read)):
            raise Refused(
                f"{name}: {filled[offset]} and {part} have other values of it",
                verdict=Verdict.MIXED,
                remedy="leave the other one out (--without FILE), if you know which is right",
            )
    if count != made.numel():
        raise Refused(
            f"{name}: its shards hold {count} of {made.numel()} elements",
            verdict=Verdict.MISSING,
            remedy="audit the files of all ranks together",
        )
    return made


def _place(whole: Tensor, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor | None:
    """Where a piece belongs in its whole; None where it doesn't fit in."""
    if not len(offset) == len(sizes) == whole.dim():
        return None
    for dim, (at, size) in enumerate(zip(offset, sizes, strict=True)):
        if at + size > whole.shape[dim]:
            return None
        whole = whole.narrow(dim, at, size)
    return whole


def _read(piece: audited.Tensor, dtype: torch.dtype) -> Tensor:
    flat = torch.empty(piece.values.shape, dtype=dtype).reshape(-1)
    raw, at = flat.view(torch.uint8) if flat.numel() else flat, 0
    for block in piece.values.blocks(BLOCK):
        data = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        raw[at : at + len(data)] = data
        at += len(data)
    return flat.view(piece.values.shape)


def _bearable(names: Iterable[str]) -> bool:
    """Whether a module can have tensors by all of these names, and modules above them."""
    own = {*dir(nn.Module())}
    leaves = {*names}
    for name in leaves:
        words = name.split(".")
        above = {".".join(words[:at]) for at in range(1, len(words))}
        if above & leaves or own & {*words} or "" in words:
            return False
    return True


def _module(tensors: Mapping[str, Tensor], buffers: set[str]) -> nn.Module:
    """A module that has these tensors by these names, and does nothing."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *above, last = name.split(".")
        holder = root
        for step in above:
            if step not in holder._modules:
                holder.add_module(step, nn.Module())
            holder = holder.get_submodule(step)
        if name in buffers:
            holder.register_buffer(last, tensor)
        else:
            holder.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def _save(path: str, run: str, chosen: Chosen, state: dict[str, Any], found: _Sorted) -> Adopted:
    step, of, why, said = chosen
    number = said or 0
    at = max(number, 1)
    told = f"adopted from {of.format}, {step.path or path}: an audit found nothing against it"
    began = Fork(LINEAGE, of.format, path, 0, number, told)
    index = Index(LINEAGE, 0, number, "")
    mark([(state["model"], Origin(of.format, index, "model", History(LINEAGE, (began,))))])
    left, without = tuple(dict.fromkeys(found.left)), tuple(dict.fromkeys(found.without))
    if said != at:
        none = said is None
        word = "nothing says its step" if none else f"its step is {number}, and epochs begin at 1"
        why += f"; {word}, so that it is {at} here"
    extra = {"format": of.format, "path": path, "step": step.path, "why": why, "left": list(left),
             "without": list(without)}  # fmt: skip
    with Checkpointer(run, state, rng=False) as checkpointer:
        checkpointer.restore()
        saved = checkpointer.save(at, force=True, extra={"adopted": extra})
        saved.converged()
        epoch = saved.epoch
    if epoch is None:
        raise Refused(f"nothing was saved: {saved.reason}", verdict=Verdict.MISSING)
    sizes = {name: sum(1 for _ in _tensors(part)) for name, part in state.items()}
    return Adopted(of.format, step.path, why, epoch, sizes, left, without)


def _tensors(part: Any) -> Iterator[object]:
    return iter(part.state_dict() if isinstance(part, nn.Module) else part)
