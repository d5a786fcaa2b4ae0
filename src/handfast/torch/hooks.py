"""Hooks that hear of loads, and are nothing in a pickle."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Hook", "is_own", "watch"]

_watched: Any = WeakIdKeyDictionary()


class Hook:
    """Sees that a part is loaded. Pickled with its module, it is nothing, and needs no handfast."""

    def __init__(self, hear: Callable[..., None]) -> None:
        self._hear = hear

    def __call__(self, part: Any, *args: Any) -> None:
        self._hear(part, *args)

    def __deepcopy__(self, _: object) -> Hook:
        return self  # what it watches it knows by identity

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes anything, and returns None


def is_own(hook: object) -> bool:
    """Whether a hook on loads is one that is set here, or what was pickled for it: it makes
    nothing of what is loaded.
    """
    hook = getattr(hook, "hook", hook)  # torch wraps those that come before
    return isinstance(hook, Hook) or getattr(hook, "__func__", None) is nullcontext.__exit__


def watch(part: object, register: Any, hook: Hook) -> None:
    """Register a hook with a part, once."""
    seen = _watched.setdefault(part, set())
    if hook not in seen:
        seen.add(hook)
        with suppress(AttributeError):  # a wrapper that is an Optimizer by name alone
            register(hook)
