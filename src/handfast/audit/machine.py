"""The machine that pickles are read on: a stack, its marks, a memo, and limits.

It imports nothing and calls nothing. The calls by which older protocols write bytes, bytearrays,
complex numbers and sets are worked out here (CPython 3.11: Objects/bytesobject.c and the like have
the ``__reduce__`` of each); of every other one a :class:`~handfast.audit.inert.Call` is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from handfast.audit.inert import KEY_TEXT, SIMPLE, Call, Global, Key, weighed
from handfast.audit.room import BEYOND, MEMORY, SET_ITEM

__all__ = [
    "CutError",
    "LimitError",
    "Limits",
    "Machine",
    "Stop",
    "WrongError",
]

ALIKE = 64
"""Keys of one hash that are no accident."""

MODULUS: Final = (1 << 61) - 1  # Python's hash of an int is its remainder: smaller ones never clash

OLD_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Limits(msgspec.Struct, frozen=True):
    """How much one pickle may ask for.

    ``nbytes`` of the pickle; bytes of memory for what is made of it, and for the tree of that
    (``room``: :mod:`handfast.audit.room` has each opcode's share, the most that it may
    take); ``opcodes`` of it; entries of its ``memo``; values on its ``stack`` and open marks
    (``nesting``); bytes of any one string or number (``text``). A state dict of 100,000 tensors
    takes 4.5 million opcodes, 800,000 entries and a room of 400 MiB.
    """

    nbytes: int = 1 << 29
    room: int = MEMORY
    opcodes: int = 1 << 26
    memo: int = 1 << 24
    stack: int = 1 << 24
    nesting: int = 10_000
    text: int = 1 << 28


class WrongError(Exception):
    """What is wrong with the opcode that is being done."""


class LimitError(WrongError):
    """There may be nothing wrong, but it is more than is read."""


class CutError(Exception):
    """The argument of the opcode that is being done is not all there."""


class Stop(Exception):
    """The pickle is at its end."""


class Machine:
    """The stack, its marks and the memo; :func:`read` drives it."""

    __slots__ = ("alike", "buffers", "data", "extra", "globals", "limits", "made", "memo", "outer",
                 "room", "stack")  # fmt: skip

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.data = data
        self.limits = limits
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.alike: dict[int, list[Any]] = {}  # keys that might clash, by their hash
        self.buffers = 0
        self.extra = 0  # what was done beyond the count of opcodes
        self.made = 0  # parts that were copied from one value to another
        self.room = 0  # bytes of memory, of what takes more than its opcode's share

    def check(self, done: int, opcodes: int, room: int) -> None:
        """Hold what is in use against the limits: bytes done, opcodes, and the room they take."""
        limits = self.limits
        height = len(self.stack) + sum(map(len, self.outer))
        for what, used, most in (
            ("bytes", done, limits.nbytes),
            ("opcodes", opcodes + self.extra, limits.opcodes),
            ("bytes of memory for them", room + self.room, limits.room),
            ("entries in its memo", len(self.memo), limits.memo),
            ("values on its stack", height, limits.stack),
            ("marks within marks", len(self.outer), limits.nesting),
        ):
            if used > most:
                raise LimitError(f"{BEYOND}: more than {most:,} {what}")

    def items(self) -> list[Any]:
        """All down to the last mark, which is gone then."""
        if not self.outer:
            raise WrongError("there is no mark")
        found = self.stack
        self.stack = self.outer.pop()
        return found

    def key(self, value: Any) -> Any:
        """A value as a key of a dict or a set."""
        kind = type(value)
        if kind is str or kind is bytes:
            return value if len(value) <= KEY_TEXT else Key(value)
        if kind in SIMPLE or (kind is int and -MODULUS < value < MODULUS):
            return value
        key, parts = weighed(value)
        self.extra += parts
        if type(key) is not Key:
            clashing = self.alike.setdefault(hash(key), [])
            self.extra += parts * len(clashing)
            if not any(key is other or key == other for other in clashing):
                if len(clashing) >= ALIKE:
                    raise WrongError(f"{ALIKE} keys have one hash: it was made to take for ever")
                clashing.append(key)
        return key

    def pairs(self, flat: list[Any]) -> dict[Any, Any]:
        """A dict of keys and values in turn."""
        if len(flat) % 2:
            raise WrongError("a key has no value")
        return {self.key(flat[at]): flat[at + 1] for at in range(0, len(flat), 2)}

    def keys(self, items: Sequence[Any]) -> set[Any]:
        """A set."""
        self.room += SET_ITEM * len(items)
        return set(map(self.key, items))

    def named(self, module: str, name: str) -> Global:
        """What a pickle names, one node for all its mentions."""
        found = self.globals.get((module, name))
        if found is None:
            found = Global(OLD_MODULES.get(module, module), name)
            self.globals[module, name] = found
        return found

    def call(self, function: Any, args: Any) -> Any:
        """A call, or the value that it makes if it is one of those that stand for a plain one."""
        if type(args) is not tuple:
            raise WrongError(f"arguments that are no tuple but of type {type(args).__name__}")
        if type(function) is Global and function.module in _PLAIN_MODULES:
            plain = _PLAIN.get(function)
            if plain is not None:
                self.made += sum(len(part) for part in args if type(part) in _SIZED)
                if self.made > len(self.data):  # no writer copies a part twice
                    raise WrongError("it makes more of its values than it has bytes")
                value = plain(self, *args)
                if value is not None:
                    return value
        return Call(function, args)


# Calls that stand for plain values; None where the arguments are not theirs

_SIZED: Final = frozenset({str, bytes, list, tuple, set, frozenset})


def _plain_set(m: Machine, *args: Any) -> set[Any] | None:
    if not args:
        return m.keys(())
    fits = len(args) == 1 and type(args[0]) in (list, tuple)
    return m.keys(args[0]) if fits else None


def _plain_frozenset(m: Machine, *args: Any) -> frozenset[Any] | None:
    made = _plain_set(m, *args)
    return None if made is None else frozenset(made)


def _plain_bytes(_m: Machine, *args: Any) -> bytes | None:
    if not args:
        return b""
    fits = len(args) == 2 and type(args[0]) is str and args[1] in ("latin1", "latin-1")
    return args[0].encode("latin-1") if fits else None


def _plain_bytearray(m: Machine, *args: Any) -> bytearray | None:
    if len(args) == 1 and type(args[0]) is bytes:
        return bytearray(args[0])
    made = _plain_bytes(m, *args)
    return None if made is None else bytearray(made)


def _plain_complex(_m: Machine, *args: Any) -> complex | None:
    fits = len(args) == 2 and type(args[0]) is type(args[1]) is float
    return complex(*args) if fits else None


_PLAIN: Final[dict[Global, Callable[..., Any]]] = {
    Global("builtins", "set"): _plain_set,
    Global("builtins", "frozenset"): _plain_frozenset,
    Global("builtins", "bytes"): _plain_bytes,
    Global("_codecs", "encode"): _plain_bytes,
    Global("builtins", "bytearray"): _plain_bytearray,
    Global("builtins", "complex"): _plain_complex,
}
_PLAIN_MODULES: Final = frozenset(known.module for known in _PLAIN)
