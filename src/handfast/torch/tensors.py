"""One tensor: the part that this rank owns, what is said of it, and how it is made again."""

import ctypes
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from handfast.errors import Unstorable
from handfast.store.image import TensorSpec
from handfast.store.manifest import tensor_digest
from handfast.torch.names import loaded
from handfast.torch.types import DTYPE_NAMES, TORCH_DTYPES

__all__ = [
    "HOST",
    "PLAIN",
    "Place",
    "all_tensors",
    "any_dtensor",
    "block",
    "copy_into",
    "digest",
    "dims_of",
    "flat_bytes",
    "is_cut",
    "is_dense",
    "is_dtensor",
    "is_still",
    "local",
    "make",
    "place_like",
    "place_of",
    "placements",
    "reach",
    "spec_of",
    "whole_everywhere",
]

PLAIN: Final = frozenset({Tensor, nn.Parameter})
"""What is a tensor and nothing besides."""
TWICE: Final = (
    "FSDP2 and tensor parallel cut it along one dimension, which is not done yet: let "
    "fully_shard(shard_placement_fn=) cut it along another one, or use one of the two"
)


def is_dtensor(value: object) -> bool:
    """Whether the value is a DTensor, without importing what would define it."""
    if type(value) in PLAIN:  # asked several times of each of many thousands
        return False
    return isinstance(value, loaded("torch.distributed.tensor", "DTensor"))


def is_dense(tensor: Tensor) -> bool:
    """Whether a local tensor's memory holds its values in order, and nothing else."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def flat_bytes(dense: Tensor) -> Tensor:
    """The bytes of a dense tensor, on its device and sharing its memory."""
    # one element is contiguous by any stride, and only the stride 1 can be viewed so
    return dense.detach().as_strided((dense.numel(),), (1,)).view(torch.uint8)


def is_still(value: object) -> bool:
    """Whether it is a parameter that nothing trains, such as those below an adapter."""
    return isinstance(value, torch.nn.Parameter) and not value.requires_grad


def all_tensors(values: Iterable[object]) -> bool:
    """Whether all are tensors; asked of types, since ten thousand may be of one type."""
    return all(issubclass(kind, Tensor) for kind in set(map(type, values)))


def any_dtensor(values: Iterable[object]) -> bool:
    """Whether there is a DTensor among them; asked of types, too."""
    dtensor = loaded("torch.distributed.tensor", "DTensor")
    return any(issubclass(kind, dtensor) for kind in set(map(type, values)))


def local(tensor: Any) -> Tensor:
    """The part that lies on this rank, sharing memory; call it with gradients disabled.

    DTensors are unwrapped because ``_foreach_copy_`` refuses a mix of them and plain tensors.
    """
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return part


def digest(spec: TensorSpec, tensor: Tensor) -> bytes:
    """Digest a plain tensor with what is said of it, as it would lie in an image: dense."""
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    size = dense.numel() * dense.element_size()
    if not size:
        return tensor_digest(spec, b"")
    data = memoryview((ctypes.c_char * size).from_address(dense.data_ptr()))
    return tensor_digest(spec, data)


def block(
    shape: Sequence[int], mesh: Sequence[int], at: Sequence[int], dims: Sequence[int | None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Local shape and offset of a tensor of ``shape`` on the rank at ``at`` of a ``mesh``.

    ``dims`` has one entry a mesh dimension: the tensor's dimension that is sharded over it, or
    None for replicated. Shards are those of ``torch.chunk``, outermost mesh dimension first: all
    but the last ones are of one size, and the last ones may be empty.
    """
    here, offset = list(shape), [0] * len(shape)
    for ranks, rank, dim in zip(mesh, at, dims, strict=True):
        if dim is None:
            continue
        chunk = -(-here[dim] // ranks)
        start = min(rank * chunk, here[dim])
        here[dim] = min(chunk, here[dim] - start)
        offset[dim] = offset[dim] + start if here[dim] else shape[dim]
    return tuple(here), tuple(offset)


def spec_of(path: str, tensor: Any) -> TensorSpec:
    """What the image says of a tensor. Raises Unstorable for one that no image can hold."""
    if unfit := _why_not(tensor):
        raise Unstorable(path, _type_name(tensor), *unfit)
    if is_dtensor(tensor):
        part = local(tensor)
        whole = tuple(tensor.shape)
        shape, offset = _block_of(path, tensor)
        if shape != tuple(part.shape):
            raise Unstorable(
                path,
                _type_name(tensor),
                f"its local part has shape {tuple(part.shape)} where its placements say {shape}",
                "make it with distribute_tensor(), or from_local() of equal chunks",
            )
    else:
        part = tensor
        shape = whole = tuple(part.shape)
        offset = (0,) * len(shape)
    return TensorSpec(path, DTYPE_NAMES[part.dtype], shape, whole, offset, tuple(part.stride()))


def _type_name(tensor: object) -> str:
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"


def _why_not(tensor: Any) -> tuple[str, str] | None:
    """Why a tensor can't be stored, and what to do; None if it can."""
    if (
        type(tensor) in PLAIN
        and (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dtype in DTYPE_NAMES
        and not is_cut(tensor)
    ):
        return None  # most are so, and none of what follows is true of them
    if is_lazy(tensor):
        return "it has no shape before the first forward", "run one before the first save"
    if tensor.is_nested:
        return "it is a nested tensor", "store the list that its unbind() gives"
    if tensor.device.type == "meta":
        return "it is on the meta device and has no values", "materialize it first"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}", "store .to_dense(), or its indices and values"
    if is_dtensor(tensor):
        return _why_not(local(tensor))
    if is_cut(tensor):
        return "its storage was resized, and is smaller than it", "give it its memory back first"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return "it is a tensor subclass whose bytes are not all of it", "store its parts"
    if tensor.dtype not in DTYPE_NAMES:
        return f"images know no {tensor.dtype}", "store its parts, such as int_repr() and scales"
    return None


def reach(part: Tensor) -> int:
    """Bytes from a local tensor's first to the one behind its last; 0 of one without plain memory:
    sparse, nested, or not there yet.
    """
    if part.layout is not torch.strided or part.is_nested or is_lazy(part) or not part.numel():
        return 0
    if part.is_contiguous():
        return part.nbytes
    sizes = zip(part.shape, part.stride(), strict=True)
    return (sum((size - 1) * step for size, step in sizes) + 1) * part.element_size()


def is_cut(part: Tensor) -> bool:
    """Whether a local tensor reaches beyond its storage, which somebody resized."""
    far = reach(part)
    return far > 0 and (
        part.untyped_storage().nbytes() < part.storage_offset() * part.element_size() + far
    )


def _block_of(path: str, tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    dims: list[int | None] = []
    for placement in tensor.placements:
        kind = type(placement).__name__
        if kind not in ("Shard", "Replicate"):
            remedy = TWICE if kind == "_StridedShard" else "redistribute it to Shard or Replicate"
            why = f"the placement {placement} makes no single block of it"
            raise Unstorable(path, _type_name(tensor), why, remedy)
        dims.append(placement.dim if placement.is_shard() else None)
    mesh = tensor.device_mesh
    at = mesh.get_coordinate()
    if at is None:
        why, remedy = "this rank is not in its device mesh", "leave it out on this rank"
        raise Unstorable(path, _type_name(tensor), why, remedy)
    return block(tensor.shape, mesh.shape, at, dims)


def whole_everywhere(tensor: Any) -> bool:
    """Whether it is a DTensor that each rank of the job holds whole."""
    return (
        is_dtensor(tensor)
        and all(placement.is_replicate() for placement in tensor.placements)
        and tensor.device_mesh.size() == torch.distributed.get_world_size()
    )


class Place(NamedTuple):
    """Where a tensor is to be made: on a device, and over a mesh if it is to be a DTensor."""

    device: torch.device
    mesh: Any = None
    placements: Any = None

    def cut(self, spec: TensorSpec, dims: Sequence[int | None]) -> "Place | None":
        """This place with other cuts; None if this rank would not have that part of it there."""
        at = None if self.mesh is None else self.mesh.get_coordinate()
        if at is None or len(at) != len(dims):
            return None
        if block(spec.global_shape, self.mesh.shape, at, dims) != (spec.shape, spec.offset):
            return None
        return Place(self.device, self.mesh, placements(dims))


HOST = Place(torch.device("cpu"))


def place_of(tensor: Any) -> Place:
    """Where a tensor is."""
    if is_dtensor(tensor):
        return Place(tensor.device, tensor.device_mesh, tensor.placements)
    return Place(tensor.device)


def place_like(
    spec: TensorSpec,
    dims: Sequence[int | None],
    near: Place,
    live: Sequence[tuple[tuple[int, ...], Place]],
) -> Place | None:
    """Where a tensor that was cut so belongs: on the mesh of the one ``near`` it, if it is on one.

    Else on that of all ``live`` ones of its shape, or of all: None if they are on several, or none.
    """
    if found := near.cut(spec, dims):
        return found
    for kin in (True, False):
        places = [p.cut(spec, dims) for shape, p in live if not kin or shape == spec.global_shape]
        meshes = {place.mesh: place for place in places if place is not None}
        if meshes:
            return meshes.popitem()[1] if len(meshes) == 1 else None
    return None


def dims_of(tensor: Any) -> tuple[int | None, ...]:
    """The tensor's dimension that is cut over each of its mesh; empty if it is no DTensor."""
    placed = tensor.placements if is_dtensor(tensor) else ()
    return tuple(p.dim if p.is_shard() else None for p in placed)


def placements(dims: Iterable[int | None]) -> tuple[Any, ...]:
    """The inverse of :func:`dims_of`."""
    tensor = sys.modules["torch.distributed.tensor"]
    return tuple(tensor.Replicate() if dim is None else tensor.Shard(dim) for dim in dims)


def make(spec: TensorSpec, place: Place) -> Tensor:
    """A tensor without values as ``spec`` says: its dtype, its shape, its strides if dense."""
    dtype = TORCH_DTYPES[spec.dtype]
    if _dense(spec.shape, spec.stride):
        part = torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=place.device)
    else:
        part = torch.empty(spec.shape, dtype=dtype, device=place.device)
    if place.mesh is None:
        return part
    made: Tensor = loaded("torch.distributed.tensor", "DTensor").from_local(
        part,
        place.mesh,
        place.placements,
        run_check=False,
        shape=torch.Size(spec.global_shape),
        stride=_like_strides(spec.global_shape, part.stride()),
    )
    return made


def _like_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Dense strides for ``shape`` whose dimensions lie in the order that ``stride`` has."""
    made, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (stride[dim], -dim)):
        made[dim] = step
        step *= max(shape[dim], 1)
    return tuple(made)


def _dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the strides fill their memory without gaps or overlaps, in whatever order."""
    expected = 1
    for step, size in sorted((st, n) for st, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return True


def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy values into live local tensors, in place.

    Along a dimension that a target merely repeats (``expand``) one element is written. Tensors
    that were made in inference mode can be written to in that mode only.
    """
    pairs = list(zip(targets, sources, strict=True))
    for mode in {target.is_inference() for target in targets}:
        with torch.inference_mode(mode), torch.no_grad():
            _copy([pair for pair in pairs if pair[0].is_inference() is mode])


def _copy(given: Sequence[tuple[Tensor, Tensor]]) -> None:
    pairs = [_without_repeats(target, source) for target, source in given]
    plain = [pair for pair in pairs if not (pair[0].is_conj() or pair[0].is_neg())]
    if plain:
        torch._foreach_copy_([t for t, _ in plain], [s for _, s in plain])
    if len(plain) < len(pairs):  # _foreach_copy_ refuses views that are conjugated lazily
        for target, source in pairs:
            if target.is_conj() or target.is_neg():
                target.copy_(source)


def _without_repeats(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    for dim, (size, step) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if size > 1 and step == 0:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    return target, source
