"""What modules hold: digests by which a load that was taken back is seen to be none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from handfast.errors import Unstorable
from handfast.store.manifest import chunk_hash
from handfast.torch.names import is_torchs
from handfast.torch.origins import place
from handfast.torch.tensors import digest, local, spec_of

__all__ = ["brings_itself", "contents", "forget", "holds_again", "note"]

LOOKS = 4
"""So many loads may take a module back: one that is loaded all the time is never, and is read no
more."""


@dataclass
class _Held:
    """What a module held by itself since it was stepped last, but for what loads have brought."""

    digests: set[bytes] = field(default_factory=set)
    now: bool = True  # it holds the newest of them, or what was made of that without a load
    left: int = LOOKS


_held: Any = WeakIdKeyDictionary()


def note(part: nn.Module) -> None:
    """Remember what a module holds, before it is loaded: its own tensors, not those inside."""
    held = _held.setdefault(part, _Held())
    if held.now:
        held.now = False
        if (now := contents(part)) is not None:
            held.digests.add(now)


def brings_itself(part: nn.Module, state: Mapping[str, object], prefix: str) -> bool:
    """Whether a load brings a module nothing but tensors of its own, as after a load in place into
    what ``state_dict()`` gave: what it held before that nobody knows.
    """
    comes = [t for name, t in state.items() if name.startswith(prefix) and isinstance(t, Tensor)]
    own = {place(tensor) for module in part.modules() for _, tensor in _named(module)}
    return bool(comes) and all(place(tensor) in own for tensor in comes)


def holds_again(part: nn.Module) -> bool:
    """Whether a module that was loaded holds what it did before this load or an earlier one."""
    held: _Held | None = _held.get(part)
    if held is None:
        return False
    if not held.now and held.digests and held.left:
        held.now = contents(part) in held.digests
        held.left = LOOKS if held.now else held.left - 1
    return held.now


def forget(module: nn.Module) -> None:
    """Forget what was noted of a module and all in it: it was stepped since, or loaded anew."""
    if _held:
        for part in module.modules():
            _held.pop(part, None)


def contents(part: nn.Module) -> bytes | None:
    """Digest what a load of a module changes in itself, not in those inside, of this rank: 16
    bytes.

    That are its parameters and persistent buffers, bit for bit, with their shapes, dtypes and
    strides. Each is read once, and brought to the host from a device. Gives None where a load may
    change more (``set_extra_state``, a ``_load_from_state_dict`` that is not torch's), and where a
    tensor has no plain values.
    """
    kind = type(part)
    if not (is_torchs(kind._load_from_state_dict) and is_torchs(kind.set_extra_state)):
        return None
    try:
        found = [digest(spec_of("", tensor), local(tensor)) for _, tensor in _named(part)]
    except (Unstorable, RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return chunk_hash(b"".join(found))


def _named(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its own tensors that its ``state_dict()`` has, by name."""
    named = {**part._parameters, **part._buffers}
    for name, tensor in named.items():
        if tensor is not None and name not in part._non_persistent_buffers_set:
            yield name, tensor
