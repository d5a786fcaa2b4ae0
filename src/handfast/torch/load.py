"""Weights for inference, and files for those who have only torch: whole tensors, verified bytes.

Neither an agent nor a process group is needed, and nothing of the run is changed, but for a pin
that holds the epoch while it is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from handfast.checkpoint.export import FORMATS, new_file
from handfast.checkpoint.reader import open_run
from handfast.checkpoint.weights import Weights
from handfast.checkpoint.whole import Block, Whole
from handfast.core.lattice import Epoch
from handfast.errors import FormatError
from handfast.store.files import Files, writing
from handfast.torch.types import TORCH_DTYPES

__all__ = ["load"]


def load(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    component: str = "model",
    *,
    step: int | Epoch | None = None,
    only: Sequence[str] = ("**",),
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Load whole tensors of one component, put together from all shards, by their keys.

    ``path`` is what :func:`handfast.open` takes (several in a list); the keys of a module are those
    of its ``state_dict()``. Without ``step`` it is the recovery line's epoch. ``only`` are
    ``fnmatch`` patterns of keys; an empty ``component`` is the whole state, by path. Tied tensors
    come as one tensor under each name. What ranks store each for itself comes as
    ``rank-00003/key``; where the job has a ``key``, too (rank 0's buffers, under DDP), only if a
    pattern of ``only`` begins with ``rank-``, and a warning names it.

    Every byte is verified before it is used. Raises Damaged where one is wrong, FormatError where
    shards have two values for one place of a tensor (stages of a pipeline that share their names),
    Refused where no whole epoch is there, ValueError for a component that is not in it, and what
    :func:`handfast.open` raises.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    run = open_run(*paths)
    with run.weights(step, component=component, only=only, purpose="load") as weights:
        loaded = {name: tensor.to(device) for name, tensor in assemble(weights).items()}
        loaded |= {name: loaded[kept] for name, kept in weights.tied.items()}
    return {_key(name): loaded[name] for name in sorted(loaded)}


@torch.no_grad()
def assemble(weights: Weights) -> dict[str, Tensor]:
    """Read the weights into new tensors in host memory, by name; ties are left to the caller.

    Raises FormatError for a dtype that this torch does not have.
    """
    made = {whole.name: _empty(whole) for whole in weights.tensors}
    for whole, block, data in weights.blocks():
        _put(made[whole.name], whole, block, data)
    return made


def _empty(whole: Whole) -> Tensor:
    dtype = TORCH_DTYPES.get(whole.dtype)
    if dtype is None:
        raise FormatError(
            f"{whole.name}: this torch ({torch.__version__}) has no dtype {whole.dtype}. What to "
            "do: read it with a torch that has"
        )
    return torch.empty(whole.shape, dtype=dtype, device="cpu")


def _put(target: Tensor, whole: Whole, block: Block, data: memoryview) -> None:
    """Copy a block to its place. No view of the image's memory is left when this returns."""
    if not len(data):
        return
    spec = block.slot.spec
    for dim, (at, size) in enumerate(zip(spec.offset, spec.shape, strict=True)):
        target = target.narrow(dim, at, size)
    source = torch.frombuffer(data, dtype=torch.uint8)
    target.copy_(source.view(TORCH_DTYPES[whole.dtype]).view(spec.shape))


def _key(name: str) -> str:
    """A key as its module has it: a path of one segment has its escapes taken back."""
    return name if "/" in name else _unescaped(name)


def _unescaped(segment: str) -> str:
    return segment.replace("~1", "/").replace("~0", "~")


def write_torch(files: Files, path: str, weights: Weights) -> int:
    """Write plain nested dicts of tensors by ``torch.save``; ``weights_only=True`` loads them."""
    tensors = assemble(weights)
    tensors |= {name: tensors[kept] for name, kept in weights.tied.items()}
    tree: dict[str, object] = {}
    for name in sorted(tensors):
        *boxes, last = map(_unescaped, name.split("/"))
        at = tree
        for box in boxes:
            inner = at.setdefault(box, {})
            if not isinstance(inner, dict):
                raise FormatError(f"{name}: {box} is a tensor and a box of tensors at once")
            at = inner
        at[last] = tensors[name]
    with (
        new_file(files, path) as temporary,
        writing("export", path),
        open(temporary, "xb") as file,
    ):
        torch.save(tree, file)
        return file.tell()


FORMATS["torch"] = write_torch
