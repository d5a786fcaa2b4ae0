"""The opcodes of pickles, protocols 0 to 5, as steps of a machine.

What they are and do: CPython 3.11, Lib/pickletools.py and Lib/pickle.py. The strings of Python 2
become text where they are ASCII, and stay bytes elsewhere.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from handfast.audit.inert import NOTHING, Buffer, Call, Global, Persistent
from handfast.audit.machine import CutError, Machine, Stop, WrongError
from handfast.audit.room import SET_ITEM, WIDEST

__all__ = ["ARGUED", "NAMES", "STEPS"]

DIGITS = 4300
"""Digits of a decimal number at most: what Python itself reads (sys.int_info)."""

HIGHEST_PROTOCOL = 5

_U4: Final = struct.Struct("<I").unpack_from
_U8: Final = struct.Struct("<Q").unpack_from


# The opcodes: each step is given the offset of its argument, and gives that of the next opcode

Step: TypeAlias = Callable[[Machine, int], int]

NAMES: Final = {ord(op.code): op.name for op in pickletools.opcodes}
_CODES: Final = {name: code for code, name in NAMES.items()}
ARGUED: Final = frozenset(ord(op.code) for op in pickletools.opcodes if op.arg is not None)


def _unknown(_m: Machine, _at: int) -> int:
    raise WrongError("no pickle has such an opcode")


STEPS: Final[list[Step]] = [_unknown] * 256


def _opcode(*names: str) -> Callable[[Step], Step]:
    """Make a function the step of some opcodes."""

    def register(step: Step) -> Step:
        for name in names:
            STEPS[_CODES[name]] = step
        return step

    return register


def _constant(name: str, value: object) -> None:
    @_opcode(name)
    def push(m: Machine, at: int) -> int:
        m.stack.append(value)
        return at


_constant("NONE", None)
_constant("NEWTRUE", True)
_constant("NEWFALSE", False)
_constant("EMPTY_TUPLE", ())


def _fixed(name: str, form: str) -> None:
    unpack, size = struct.Struct(form).unpack_from, struct.calcsize(form)

    @_opcode(name)
    def push(m: Machine, at: int) -> int:
        m.stack.append(unpack(m.data, at)[0])
        return at + size


for _name, _form in (("BININT", "<i"), ("BININT1", "B"), ("BININT2", "<H"), ("BINFLOAT", ">d")):
    _fixed(_name, _form)


def _ascii(raw: bytes) -> str | bytes:
    """A string of Python 2: text where it is ASCII."""
    return raw.decode("ascii") if raw.isascii() else raw


def _text(raw: bytes) -> str:
    return str(raw, "utf-8", "surrogatepass")


def _integer(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _sized(name: str, form: str, make: Callable[[bytes], object]) -> None:
    unpack, prefix = struct.Struct(form).unpack_from, struct.calcsize(form)

    @_opcode(name)
    def push(m: Machine, at: int) -> int:
        start = at + prefix
        size = unpack(m.data, at)[0]
        if not 0 <= size <= m.limits.text:
            raise WrongError(f"a string or number of {size:,} bytes; {m.limits.text:,} at most")
        if start + size > len(m.data):
            raise CutError
        m.stack.append(make(m.data[start : start + size]))
        m.room += WIDEST * size
        return int(start + size)


for _name, _form, _make in (
    ("LONG1", "B", _integer), ("LONG4", "<i", _integer), ("BINSTRING", "<i", _ascii),
    ("SHORT_BINSTRING", "B", _ascii), ("BINBYTES", "<I", bytes), ("SHORT_BINBYTES", "B", bytes),
    ("BINBYTES8", "<Q", bytes), ("BYTEARRAY8", "<Q", bytearray), ("SHORT_BINUNICODE", "B", _text),
    ("BINUNICODE", "<I", _text), ("BINUNICODE8", "<Q", _text),
):  # fmt: skip
    _sized(_name, _form, _make)


def _line(m: Machine, at: int, most: int | None = None) -> tuple[bytes, int]:
    """The bytes up to the line's end, and the offset behind it."""
    most = m.limits.text if most is None else most
    end = m.data.find(b"\n", at, at + most + 1)
    if end < 0:
        if at + most >= len(m.data):
            raise CutError
        raise WrongError(f"a line of more than {most:,} bytes")
    m.room += WIDEST * (end - at)
    return m.data[at:end], end + 1


@_opcode("INT")
def _int(m: Machine, at: int) -> int:
    line, at = _line(m, at, DIGITS)
    m.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line, 0))
    return at


@_opcode("LONG")
def _long(m: Machine, at: int) -> int:
    line, at = _line(m, at, DIGITS + 2)
    m.stack.append(int(line.removesuffix(b"L"), 0))
    return at


@_opcode("FLOAT")
def _float(m: Machine, at: int) -> int:
    line, at = _line(m, at, DIGITS)
    m.stack.append(float(line))
    return at


_ESCAPE: Final = re.compile(rb"""\\(?:([\\'"nrt])|x([0-9a-fA-F]{2}))""")
_ESCAPED: Final = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def _unescape(found: re.Match[bytes]) -> bytes:
    letter, code = found.groups()
    return bytes([int(code, 16)]) if code else _ESCAPED.get(letter, letter)


@_opcode("STRING")
def _string(m: Machine, at: int) -> int:
    line, at = _line(m, at)
    if len(line) < 2 or line[0] != line[-1] or line[0] not in b"\"'":
        raise WrongError("a string without its quotes")
    m.stack.append(_ascii(_ESCAPE.sub(_unescape, line[1:-1])))
    return at


@_opcode("UNICODE")
def _unicode(m: Machine, at: int) -> int:
    line, at = _line(m, at)
    m.stack.append(str(line, "raw-unicode-escape"))
    return at


@_opcode("MARK")
def _mark(m: Machine, at: int) -> int:
    m.outer.append(m.stack)
    m.stack = []
    return at


@_opcode("POP")
def _pop(m: Machine, at: int) -> int:
    if m.stack:
        m.stack.pop()
    else:
        m.items()
    return at


@_opcode("POP_MARK")
def _pop_mark(m: Machine, at: int) -> int:
    m.items()
    return at


@_opcode("DUP")
def _dup(m: Machine, at: int) -> int:
    m.stack.append(m.stack[-1])
    return at


# The memo


@_opcode("PUT")
def _put(m: Machine, at: int) -> int:
    line, at = _line(m, at, DIGITS)
    number = int(line)
    if not 0 <= number < 1 << 32:
        raise WrongError("a place in the memo that no pickle has")
    m.memo[number] = m.stack[-1]
    return at


@_opcode("BINPUT")
def _binput(m: Machine, at: int) -> int:
    m.memo[m.data[at]] = m.stack[-1]
    return at + 1


@_opcode("LONG_BINPUT")
def _long_binput(m: Machine, at: int) -> int:
    m.memo[_U4(m.data, at)[0]] = m.stack[-1]
    return at + 4


@_opcode("MEMOIZE")
def _memoize(m: Machine, at: int) -> int:
    m.memo[len(m.memo)] = m.stack[-1]
    return at


@_opcode("GET")
def _get(m: Machine, at: int) -> int:
    line, at = _line(m, at, DIGITS)
    m.stack.append(m.memo[int(line)])
    return at


@_opcode("BINGET")
def _binget(m: Machine, at: int) -> int:
    m.stack.append(m.memo[m.data[at]])
    return at + 1


@_opcode("LONG_BINGET")
def _long_binget(m: Machine, at: int) -> int:
    m.stack.append(m.memo[_U4(m.data, at)[0]])
    return at + 4


# Containers


def _fresh(name: str, make: Callable[[], object]) -> None:
    @_opcode(name)
    def push(m: Machine, at: int) -> int:
        m.stack.append(make())
        return at


_fresh("EMPTY_LIST", list)
_fresh("EMPTY_DICT", dict)


@_opcode("EMPTY_SET")
def _empty_set(m: Machine, at: int) -> int:
    m.stack.append(m.keys(()))
    return at


def _from_mark(name: str, make: Callable[[Machine, list[Any]], object]) -> None:
    @_opcode(name)
    def push(m: Machine, at: int) -> int:
        items = m.items()
        m.stack.append(make(m, items))
        return at


_from_mark("LIST", lambda _, items: items)
_from_mark("TUPLE", lambda _, items: tuple(items))
_from_mark("DICT", Machine.pairs)
_from_mark("FROZENSET", lambda m, items: frozenset(m.keys(items)))


@_opcode("TUPLE1")
def _tuple1(m: Machine, at: int) -> int:
    m.stack[-1] = (m.stack[-1],)
    return at


@_opcode("TUPLE2")
def _tuple2(m: Machine, at: int) -> int:
    m.stack[-2:] = [(m.stack[-2], m.stack[-1])]
    return at


@_opcode("TUPLE3")
def _tuple3(m: Machine, at: int) -> int:
    m.stack[-3:] = [(m.stack[-3], m.stack[-2], m.stack[-1])]
    return at


def _appendable(target: Any) -> list[Any]:
    """What grows when something is appended."""
    if type(target) is Call:
        if not target.items:
            target.items = []
        target = target.items
    if type(target) is not list:
        raise WrongError(f"something is appended to a value of type {type(target).__name__}")
    return target


@_opcode("APPEND")
def _append(m: Machine, at: int) -> int:
    item = m.stack.pop()
    _appendable(m.stack[-1]).append(item)
    return at


@_opcode("APPENDS")
def _appends(m: Machine, at: int) -> int:
    items = m.items()
    _appendable(m.stack[-1]).extend(items)
    return at


@_opcode("ADDITEMS")
def _additems(m: Machine, at: int) -> int:
    items = m.items()
    target = m.stack[-1]
    if type(target) is set:
        m.room += SET_ITEM * len(items)
        target.update(map(m.key, items))
    else:
        _appendable(target).extend(items)
    return at


def _settable(target: Any) -> dict[Any, Any]:
    """What has a key more when one is set."""
    if type(target) is Call:
        if target.pairs is NOTHING:
            target.pairs = {}
        target = target.pairs
    if type(target) is not dict:
        raise WrongError(f"a key is set in a value of type {type(target).__name__}")
    return target


@_opcode("SETITEM")
def _setitem(m: Machine, at: int) -> int:
    value, key = m.stack.pop(), m.stack.pop()
    _settable(m.stack[-1])[m.key(key)] = value
    return at


@_opcode("SETITEMS")
def _setitems(m: Machine, at: int) -> int:
    items = m.items()
    _settable(m.stack[-1]).update(m.pairs(items))
    return at


# What would have been imported or called


@_opcode("GLOBAL")
def _global(m: Machine, at: int) -> int:
    found, at = _two_lines(m, at)
    m.stack.append(found)
    return at


def _two_lines(m: Machine, at: int) -> tuple[Global, int]:
    module, at = _line(m, at)
    name, at = _line(m, at)
    return m.named(module.decode(), name.decode()), at


@_opcode("STACK_GLOBAL")
def _stack_global(m: Machine, at: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise WrongError("a name that is no string")
    m.stack.append(m.named(module, name))
    return at


def _extension(name: str, form: str) -> None:
    unpack, size = struct.Struct(form).unpack_from, struct.calcsize(form)

    @_opcode(name)
    def push(m: Machine, at: int) -> int:
        m.stack.append(m.named("copyreg._inverted_registry", str(unpack(m.data, at)[0])))
        return at + size


for _name, _form in (("EXT1", "B"), ("EXT2", "<H"), ("EXT4", "<i")):
    _extension(_name, _form)


@_opcode("INST")
def _inst(m: Machine, at: int) -> int:
    function, at = _two_lines(m, at)
    items = m.items()
    m.stack.append(m.call(function, tuple(items)))
    return at


@_opcode("OBJ")
def _obj(m: Machine, at: int) -> int:
    function, *args = m.items() or [None]
    m.stack.append(m.call(function, tuple(args)))
    return at


@_opcode("REDUCE", "NEWOBJ")
def _reduce(m: Machine, at: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)
    return at


@_opcode("NEWOBJ_EX")
def _newobj_ex(m: Machine, at: int) -> int:
    kwargs, args = m.stack.pop(), m.stack.pop()
    if type(args) is not tuple or type(kwargs) is not dict:
        raise WrongError("arguments that are no tuple and dict")
    m.stack[-1] = Call(m.stack[-1], args, kwargs)
    return at


@_opcode("BUILD")
def _build(m: Machine, at: int) -> int:
    state = m.stack.pop()
    target = m.stack[-1]
    if type(target) is not Call:
        raise WrongError(f"a state is set in a value of type {type(target).__name__}")
    target.state = state
    return at


@_opcode("PERSID")
def _persid(m: Machine, at: int) -> int:
    line, at = _line(m, at)
    m.stack.append(Persistent(line.decode("ascii")))
    return at


@_opcode("BINPERSID")
def _binpersid(m: Machine, at: int) -> int:
    m.stack[-1] = Persistent(m.stack[-1])
    return at


@_opcode("NEXT_BUFFER")
def _next_buffer(m: Machine, at: int) -> int:
    m.stack.append(Buffer(m.buffers))
    m.buffers += 1
    return at


@_opcode("READONLY_BUFFER")
def _readonly_buffer(m: Machine, at: int) -> int:
    m.stack.append(m.stack.pop())
    return at


# The frame of it all


@_opcode("PROTO")
def _proto(m: Machine, at: int) -> int:
    if m.data[at] > HIGHEST_PROTOCOL:
        raise WrongError(f"protocol {m.data[at]}; up to {HIGHEST_PROTOCOL} are known")
    return at + 1


@_opcode("FRAME")
def _frame(m: Machine, at: int) -> int:
    size: int = _U8(m.data, at)[0]
    if at + 8 + size > len(m.data):
        raise CutError
    return at + 8


@_opcode("STOP")
def _stop(m: Machine, _at: int) -> int:
    raise Stop(m.stack[-1])
