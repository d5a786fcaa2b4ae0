"""Pickles, read without running them: what they would import or call stands as inert nodes.

Nothing is imported, called, or asked of an object whose type the pickle chose. What a hostile one
may cost is bounded by its :class:`Limits`: their memory, and a few microseconds an opcode. Beware
of what was read: see :mod:`handfast.audit.inert`.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

from handfast.audit.inert import is_harmful
from handfast.audit.machine import CutError, LimitError, Limits, Machine, Stop, WrongError
from handfast.audit.opcodes import ARGUED, NAMES, STEPS
from handfast.audit.room import ROOM
from handfast.errors import Damaged, FormatError

__all__ = ["LIMITS", "Cut", "Limits", "Pickle", "read"]

LIMITS: Final = Limits()

CHUNK = 4096
"""Opcodes between two looks at the limits."""


class Cut(Damaged):
    """The bytes end before the pickle does."""


class Pickle(NamedTuple):
    """A value, the offset in the bytes behind its STOP, where another pickle may begin, and what
    it names that runs code of whoever wrote it, where it is loaded by pickle.
    """

    value: Any
    end: int
    harmful: tuple[str, ...] = ()


def read(
    data: bytes, start: int = 0, *, limits: Limits = LIMITS, name: str = "a pickle", base: int = 0
) -> Pickle:
    """Read the pickle that begins at an offset of some bytes.

    Errors name ``name`` and the opcode's offset, to which ``base`` is added: where ``data`` begins
    in a file, say. Raises :class:`Cut` where the bytes end too early, FormatError for all else.
    """
    machine = Machine(data, limits)
    at, left, done, room = start, limits.opcodes, 0, 0
    value = None
    try:
        while True:
            for done in range(min(CHUNK, left)):  # noqa: B007 - it is wanted behind the loop
                code = data[at]
                room += ROOM[code]
                at = STEPS[code](machine, at + 1)
            left -= CHUNK
            machine.check(at - start, limits.opcodes - left, room)
    except Stop as stop:
        (value,) = stop.args
    except _WRONG as error:
        raise _error(error, data, at, name, base) from None
    try:
        machine.check(at + 1 - start, limits.opcodes - left + done, room)
    except WrongError as error:
        raise _error(error, data, at, name, base) from None
    harmful = (str(one) for one in machine.globals.values() if is_harmful(one))
    return Pickle(value, at + 1, tuple(harmful))


_WRONG: Final = (CutError, WrongError, struct.error, KeyError, IndexError, ValueError)


def _problem(error: Exception, data: bytes, at: int) -> str:
    """What an error says of the opcode at some offset; empty if the bytes end there.

    A missing argument, or value on the stack, is found by asking for it.
    """
    match error:
        case CutError() | struct.error():
            return ""
        case WrongError():
            return str(error)
        case KeyError():
            return "the memo has nothing under that number"
        case IndexError():
            ends = at >= len(data) or (at + 1 == len(data) and data[at] in ARGUED)
            return "" if ends else "there are too few values on the stack"
    return f"its argument can't be read: {error}"


def _error(error: Exception, data: bytes, at: int, name: str, base: int) -> FormatError:
    """The error of an opcode; of one whose bytes end if there is no other problem."""
    where = f"{name}: byte {base + at:,}"
    problem = _problem(error, data, at)
    if not problem:
        return Cut(
            f"{where}: the pickle goes on there, but its bytes end at {base + len(data):,}. "
            "What to do: the file was cut, or never written whole; take it from a copy"
        )
    opcode = NAMES.get(data[at], f"{data[at]:#04x}") if at < len(data) else "its end"
    to_do = "if this was a pickle once, it was damaged; take it from a copy"
    if type(error) is LimitError:
        to_do = "if you trust its writer, split what it saves; --memory allows more memory"
    return FormatError(f"{where} ({opcode}): {problem}. What to do: {to_do}")
