"""Names in a state that stay the same when its wrappers come and go.

A path is the component, then keys, joined by ``/``; a ``/`` inside a key is escaped (see
``handfast.store.objects.child``). Segments that only a wrapper adds (``module`` of DDP,
``_orig_mod`` of ``torch.compile``) are dropped, so that a run saved compiled loads uncompiled, and
the other way.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

__all__ = ["clean", "cleaned", "is_torchs", "loaded", "matches", "unwrapped"]


class _NoSuchClass:
    """Stands for a class whose module was never imported: nothing is an instance of it."""


def loaded(module: str, name: str) -> Any:
    """The class if its module was imported by anybody, else one without instances.

    Nothing can be an instance of a class that nobody imported, and importing DTensor or dynamo
    only to ask would cost a second.
    """
    return getattr(sys.modules.get(module), name, _NoSuchClass)


def is_torchs(call: Any) -> bool:
    """Whether a method or a hook is torch's own: those only serve what torch itself loads."""
    return str(getattr(getattr(call, "hook", call), "__module__", "")).startswith("torch.")


_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


def _wrapped(module: nn.Module | None) -> str | None:
    """The name under which a wrapper holds what it wraps; None for all other modules."""
    for where, name, segment in _WRAPPERS:
        if isinstance(module, loaded(where, name)):
            return segment
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """What wrappers such as DDP's and ``torch.compile``'s hold in the end."""
    while (inner := _wrapped(module)) is not None and (held := module._modules[inner]) is not None:
        module = held
    return module


def clean(root: nn.Module, key: str) -> str:
    """A ``state_dict`` key of ``root`` without the segments that wrappers add.

    It goes by the modules' types, not by their names: a user's own child that is called
    ``module`` keeps its name.
    """
    kept = []
    module: nn.Module | None = root
    for segment in key.split("."):
        inner = _wrapped(module)
        while module is not None and inner is not None and inner != segment:
            # Checkpoint wrappers take their segment out of the keys by a hook of their own.
            module = module._modules[inner]
            inner = _wrapped(module)
        if inner is None:
            kept.append(segment)
        module = module._modules.get(segment) if module is not None else None
    return ".".join(kept)


def cleaned(root: nn.Module, keys: Iterable[str]) -> list[str]:
    """What :func:`clean` makes of each of many keys: nothing else, where no module is a wrapper."""
    kinds = set(map(type, root.modules()))
    wrappers = tuple(loaded(where, name) for where, name, _ in _WRAPPERS)
    if not any(issubclass(kind, wrappers) for kind in kinds):
        return list(keys)
    return [clean(root, key) for key in keys]


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names the path or something that holds it.

    Patterns follow ``fnmatch``, where ``*`` crosses ``/``: ``model``, ``model/*`` and
    ``model/**`` are the component and all of it, ``**`` is everything.
    """
    if not patterns or "**" in patterns:
        return bool(patterns)
    return any(
        # Literally first: in a glob the index of "a[3]" would be a class of characters.
        path == name
        or path.startswith((f"{name}/", f"{name}["))
        or fnmatchcase(path, name)
        or fnmatchcase(path, f"{name}/*")
        for name in (re.sub(r"/\*\*?\Z", "", pattern) for pattern in patterns)
    )
