"""``handfast adopt``: a sound checkpoint of another library, taken into a run as its first epoch.

What it holds is read as the audit reads it, without executing anything, and put together from its
shards. Weights become a module of their names, so that ``guard.load(run, model=model)`` loads them,
or a box of tensors where no module can have such names; masters and moments become boxes beside it.
Hyperparameters are not taken over: formats have no common word for them.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from handfast.audit import found as audited
from handfast.audit.checks import Look, check
from handfast.audit.extent import SIZES, Reader, repeats
from handfast.audit.finding import Finding, Strength
from handfast.audit.found import Found, Role, Step
from handfast.audit.place import look
from handfast.audit.run import founds
from handfast.checkpoint.reader import open_run
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import FormatError, NoRun, Refused
from handfast.model.optimizer import Index
from handfast.store.manifest import Fork
from handfast.torch.checkpointer import Checkpointer
from handfast.torch.indices import Origin, mark
from handfast.torch.lineage import History
from handfast.torch.types import TORCH_DTYPES

__all__ = ["Adopted", "adopt"]

LINEAGE: Final = "adopted"
BLOCK: Final = 1 << 20

MOST_REPEATED: Final = 1 << 30
"""Bytes that a tensor may have which repeats the fewer ones that are in its file."""

BOXES: Final = {
    Role.MASTER: "master",
    Role.FIRST: "exp_avg",
    Role.SECOND: "exp_avg_sq",
    Role.MOMENTUM: "momentum_buffer",
}
"""What is no weight, by the name that torch's optimizers give it."""


@dataclass(frozen=True)
class Adopted:
    """What was taken over: which step of which format, as which epoch; tensors by component."""

    format: str
    step: str
    epoch: Epoch
    tensors: Mapping[str, int]


def adopt(
    path: str | os.PathLike[str], run: str | os.PathLike[str], *, step: int | None = None
) -> Adopted:
    """Take one checkpoint at ``path`` into a new run at ``run``; without ``step`` the newest.

    All of its values are read and checked first. Raises Refused where there is none, or one of
    several runs would have to be chosen; where anything certain or strong speaks against it, its
    shards don't make whole tensors, copies of one differ, or ``run`` has epochs already;
    FormatError for a dtype that this torch doesn't have; what a save raises.
    """
    _refuse_run(os.fspath(run))
    with Reader() as reader:
        looking = Look(deep=True)
        every = list(founds(look(path, reader)))
        chosen, of = _choose(every, step, os.fspath(path))
        _refuse_unsound(of, chosen, looking)
        state = _state(chosen)
    return _save(os.fspath(path), os.fspath(run), of, chosen, state)


def _refuse_run(run: str) -> None:
    with suppress(NoRun):
        open_run(run)
        raise Refused(
            f"{run} is a run already",
            verdict=Verdict.FOREIGN,
            remedy="give a path with no run on it: what is adopted begins one",
        )


def _choose(every: list[Found], step: int | None, path: str) -> tuple[Step, Found]:
    there = [(one, found) for found in every for one in found.steps]
    numbered = [(one, found) for one, found in there if step in (None, one.number)]
    if not numbered:
        known = ", ".join(str(one.number) for one, _ in there) or "none"
        raise Refused(
            f"{path} holds no checkpoint" + ("" if step is None else f" of step {step}"),
            verdict=Verdict.MISSING,
            remedy=f"`handfast audit` shows what is there: {known}",
        )
    runs = {id(found): (found, one) for one, found in numbered}
    if len(runs) > 1:
        raise Refused(
            f"{path} holds checkpoints of {len(runs)} runs",
            verdict=Verdict.FOREIGN,
            shards=[f"{found.format}: {one.path or found.root}" for found, one in runs.values()],
            remedy="give the path of one of them",
        )
    return max(numbered, key=lambda pair: pair[0].number or 0)


def _refuse_unsound(found: Found, step: Step, looking: Look) -> None:
    alone = Found(found.format, found.root, (step,), found.resume, found.files)
    bad: list[Finding] = [f for f in check(alone, looking) if f.strength is not Strength.HINT]
    if bad:
        raise Refused(
            f"{step.path or 'it'} is not sound",
            verdict=Verdict.CORRUPT,
            shards=[f"{finding.strength}: {finding.says}" for finding in bad],
            remedy="adopt another step; `handfast audit --deep` has the evidence",
        )


class _Piece(NamedTuple):
    """A tensor, or a piece or a copy of one, and the part that has it."""

    part: str
    tensor: audited.Tensor


def _state(step: Step) -> dict[str, Any]:
    """The state to be saved: a module of the weights, and boxes of what goes with them."""
    weights: dict[str, list[_Piece]] = defaultdict(list)
    boxes: dict[str, dict[str, list[_Piece]]] = defaultdict(lambda: defaultdict(list))
    buffers: set[str] = set()
    for part in step.parts:
        if part.valueless:
            raise Refused(
                f"{part.path} has tensors without plain values",
                verdict=Verdict.MISSING,
                shards=list(part.valueless),
                remedy="save them dense, resolved and on a device, or without them",
            )
        for tensor in part.tensors:
            name = tensor.of or tensor.path
            if tensor.role in (Role.PARAMETER, Role.BUFFER):
                weights[name].append(_Piece(part.path, tensor))
                buffers |= {name} if tensor.role is Role.BUFFER else set()
            elif tensor.role in BOXES:
                boxes[BOXES[tensor.role]][name].append(_Piece(part.path, tensor))
    if not weights:
        raise Refused(
            "no weights are known in it",
            verdict=Verdict.MISSING,
            remedy="its format says of none of its tensors that it is a weight",
        )
    whole = {name: _whole(name, pieces) for name, pieces in weights.items()}
    state: dict[str, Any] = {"model": _module(whole, buffers) if _bearable(whole) else whole}
    for slot, tensors in boxes.items():
        state[slot] = {name: _whole(name, pieces) for name, pieces in tensors.items()}
    return state


def _whole(name: str, pieces: list[_Piece]) -> Tensor:
    """One tensor of its pieces. Raises Refused where some lack, or copies of one differ."""
    first = pieces[0].tensor
    dtype = TORCH_DTYPES.get(first.values.dtype)
    if dtype is None:
        raise FormatError(f"{name}: this torch ({torch.__version__}) has no {first.values.dtype}")
    shape = first.whole if first.whole is not None else first.values.shape
    for _, piece in pieces:
        _refuse_repeated(name, piece)
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
        elif not _same(target, read):
            raise Refused(
                f"{name}: {filled[offset]} and {part} have other values of it",
                verdict=Verdict.MIXED,
                remedy="adopt the file of one of them by itself, if you know which is right",
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


def _refuse_repeated(name: str, piece: audited.Tensor) -> None:
    nbytes = prod(piece.values.shape) * SIZES.get(piece.values.dtype, 1)
    if repeats(piece.values) and nbytes > MOST_REPEATED:
        raise Refused(
            f"{name}: it repeats the few values that the file has of it, to {piece.values.shape}",
            verdict=Verdict.CORRUPT,
            remedy="if the shape is meant, save a tensor that is not expanded",
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    left, right = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(left, right)


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


def _save(path: str, run: str, found: Found, step: Step, state: dict[str, Any]) -> Adopted:
    number = step.number or 0
    why = f"adopted from {found.format}, {step.path or path}: an audit found nothing against it"
    began = Fork(LINEAGE, found.format, path, 0, number, why)
    index = Index(LINEAGE, 0, number, "")
    mark([(state["model"], Origin(found.format, index, "model", History(LINEAGE, (began,))))])
    with Checkpointer(run, state, rng=False) as checkpointer:
        checkpointer.restore()
        told = {"format": found.format, "path": path, "step": step.path}
        saved = checkpointer.save(max(number, 1), force=True, extra={"adopted": told})
        saved.converged()
        epoch = saved.epoch
    if epoch is None:
        raise Refused(f"nothing was saved: {saved.reason}", verdict=Verdict.MISSING)
    sizes = {name: sum(1 for _ in _tensors(part)) for name, part in state.items()}
    return Adopted(found.format, step.path, epoch, sizes)


def _tensors(part: Any) -> Iterator[object]:
    return iter(part.state_dict() if isinstance(part, nn.Module) else part)
