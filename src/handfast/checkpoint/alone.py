"""One call at a time: calls of a Checkpointer share images and a connection, and take no turns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

__all__ = ["alone"]

P = ParamSpec("P")
R = TypeVar("R")


class _Doer(Protocol):
    _doing: str


D = TypeVar("D", bound=_Doer)


def alone(call: Callable[Concatenate[D, P], R]) -> Callable[Concatenate[D, P], R]:
    """Refuse a call that comes while another one runs: from a signal handler, or a second thread.

    Raises RuntimeError. A handler that saved in the middle of a save would wait for itself.
    """

    def guarded(self: D, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._doing:
            raise RuntimeError(
                f"{call.__name__}() was called while {self._doing}() runs: a Checkpointer is for "
                "one thread, and not for signal handlers. Set a flag there, and save at the next "
                "step"
            )
        self._doing = call.__name__
        try:
            return call(self, *args, **kwargs)
        finally:
            self._doing = ""

    functools.update_wrapper(guarded, call)
    return guarded
