"""What a module holds, as one digest: whether it holds again what it held before."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from handfast.errors import Unstorable
from handfast.store.manifest import chunk_hash
from handfast.torch.names import is_torchs
from handfast.torch.tensors import digest, local, spec_of

__all__ = ["contents"]


def contents(module: nn.Module) -> bytes | None:
    """Digest all that a load of a module changes, of this rank: 16 bytes.

    That are its parameters and persistent buffers, bit for bit, with their shapes, dtypes and
    strides. Each is read once, and brought to the host from a device. Gives None where a load may
    change more (``set_extra_state``, a ``_load_from_state_dict`` that is not torch's), and where a
    tensor has no plain values.
    """
    parts = list(module.modules())
    if not all(map(_is_plain, parts)):
        return None
    try:
        found = [digest(spec_of("", t), local(t)) for part in parts for t in _tensors(part)]
    except (Unstorable, RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return chunk_hash(b"".join(found))


def _is_plain(part: nn.Module) -> bool:
    kind = type(part)
    return is_torchs(kind._load_from_state_dict) and is_torchs(kind.set_extra_state)


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    """Its own tensors that its ``state_dict()`` has."""
    named = {**part._parameters, **part._buffers}
    for name, tensor in named.items():
        if tensor is not None and name not in part._non_persistent_buffers_set:
            yield tensor
