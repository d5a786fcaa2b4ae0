"""handfast: state that provably converges, for the training and the fleets of AI/ML.

This imports no framework. The Checkpointer for torch is in :mod:`handfast.torch`.
"""

import os as _os
from collections.abc import Callable as _Callable
from typing import TYPE_CHECKING
from typing import TypeVar as _TypeVar

from handfast.core.lattice import Epoch
from handfast.core.messages import Certificate
from handfast.core.retain import Keep
from handfast.core.verdict import Verdict
from handfast.core.view import Lattice
from handfast.errors import (
    Blocked,
    Damaged,
    FormatError,
    HandfastError,
    NoRun,
    Poisoned,
    Refused,
    SaveFailed,
    Superseded,
    Unstorable,
)
from handfast.store import objects as _objects

if TYPE_CHECKING:
    from handfast.checkpoint.reader import Run

__all__ = [
    "Blocked",
    "Certificate",
    "Damaged",
    "Epoch",
    "FormatError",
    "HandfastError",
    "Keep",
    "Lattice",
    "NoRun",
    "Poisoned",
    "Refused",
    "SaveFailed",
    "Superseded",
    "Unstorable",
    "Verdict",
    "open",
    "register",
]

_T = _TypeVar("_T")


def register(
    kind: type[_T], encode: _Callable[[_T], object], decode: _Callable[[object], _T]
) -> None:
    """Say how values of exactly this type are stored, in every state of this process.

    ``encode`` gives a plain value that can be stored, ``decode`` makes the value of it again. The
    stored bytes carry the type's module and qualified name. Raises ValueError for a type that
    handfast stores by itself.
    """
    _objects.register(kind, f"{kind.__module__}.{kind.__qualname__}", encode, decode)


def open(*paths: "str | _os.PathLike[str]") -> "Run":  # noqa: A001 - said as handfast.open
    """Open a run to be read: beside its training, or without any agent.

    Several paths are joined, as are globs (``/mnt/*/run``) and the templates that a training was
    given (``/mnt/{rank}/run``). Raises HandfastError where there is no run, or it can't be looked
    at; FormatError where it is of another format; Refused where the paths hold several runs.
    """
    from handfast.checkpoint.reader import open_run

    return open_run(*paths)
