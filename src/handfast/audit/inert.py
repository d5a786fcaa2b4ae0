"""What stands where a pickle would have imported or called something: inert nodes.

Atoms, tuples, lists, dicts and sets of a pickle are Python's own; these are all else.

**What was read** may be shared, cyclic and deep: ten lines of opcodes make a tuple that would take
longer than the sun shines to print or to compare. So walk a value each node once, and with a list
of what is ahead, as :mod:`handfast.audit.torch_tree` does; never call repr, == or hash on one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

__all__ = [
    "KEY_TEXT",
    "NOTHING",
    "SIMPLE",
    "Buffer",
    "Call",
    "Global",
    "Key",
    "Persistent",
    "is_harmful",
    "weighed",
]

NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})

KEY_NODES = 1000
"""Parts of a tuple that serves as a key: hashing one follows all of them, each time."""

KEY_TEXT = 4096
"""Bytes or characters of a key: two equal ones are compared to their ends, each time."""


class Global(msgspec.Struct, frozen=True):
    """What a pickle names: a class or a function, not imported. Equal ones are one and the same.

    ``name`` may have dots. An extension (EXT1 and its like) is named by its code in
    ``copyreg._inverted_registry``, where pickle would look it up.
    """

    module: str
    name: str

    def __str__(self) -> str:
        """As Python spells it: "collections.OrderedDict"."""
        return f"{self.module}.{self.name}"


_MODULES: Final = frozenset((
    "commands", "ctypes", "importlib", "nt", "os", "posix", "pty", "runpy", "shutil", "socket",
    "subprocess",
))  # fmt: skip
"""Commands is what protocol 2, torch's, calls subprocess (``Lib/_compat_pickle.py``, 3.11)."""
_BUILTINS: Final = frozenset(["eval", "exec", "compile", "__import__", "open", "breakpoint"])


def is_harmful(named: Global) -> bool:
    """Whether it is what pickles that attack name, and no checkpoint needs. There are others."""
    if named.module in ("builtins", "__builtin__"):
        return named.name.partition(".")[0] in _BUILTINS
    return named.module.partition(".")[0] in _MODULES


class Persistent(msgspec.Struct, frozen=True, eq=False):
    """What a pickle left to whoever loads it, by the id that it gave."""

    pid: Any

    def __repr__(self) -> str:
        """Without the id, which may be of any size."""
        return "<persistent>"


class Buffer(msgspec.Struct, frozen=True):
    """One of the buffers that lie outside of a pickle of protocol 5, by its number from 0."""

    number: int


class Key(msgspec.Struct, frozen=True, eq=False):
    """Stands where a dict or a set has a value that can't be hashed, or had better not be."""

    value: Any

    def __repr__(self) -> str:
        """Without the value, which may be of any size."""
        return "<key>"


class Call(msgspec.Struct, eq=False):
    """A call that was not made: what of, with what, and what was to be done with the result.

    ``function`` is mostly a :class:`Global`, but whatever stood there. ``kwargs`` come from
    NEWOBJ_EX alone. ``state`` is what BUILD gave (None: nothing), ``items`` what was appended or
    added, ``pairs`` what was set by key.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[Any, Any] = NOTHING
    state: Any = None
    items: Sequence[Any] = ()
    pairs: Mapping[Any, Any] = NOTHING

    def __repr__(self) -> str:
        """Without arguments and results, which may be of any size."""
        return f"<call of {self.function}>" if type(self.function) is Global else "<call>"


SIMPLE: Final = frozenset({type(None), bool, float, Global, Call, Persistent, Key, Buffer})
"""Types whose values are cheap to hash, and which no pickle can make clash."""


def weighed(value: Any) -> tuple[Any, int]:
    """A value that may be hashed, itself or a :class:`Key` for it; and of how many parts it is."""
    left, ahead = KEY_NODES, [value]
    while ahead:
        part = ahead.pop()
        kind = type(part)
        left -= 1
        if kind is tuple or kind is frozenset:
            if len(part) > left:
                return Key(value), KEY_NODES
            ahead += part
        elif kind is str or kind is bytes:
            if len(part) > KEY_TEXT:
                return Key(value), KEY_NODES
        elif kind is int:
            if part.bit_length() > 2 * KEY_TEXT:  # Python prints no more than 4,300 digits
                return Key(value), KEY_NODES
        elif kind not in SIMPLE and kind is not complex:
            return Key(value), KEY_NODES
        if left < 0:
            return Key(value), KEY_NODES
    return value, KEY_NODES - left
