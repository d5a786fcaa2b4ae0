"""How much memory a pickle may ask for: the share of each opcode, at most.

What is made of it and the tree of that, in CPython 3.11, as measured on pickles of nothing but one
of them (tests/audit/test_hostile.py). So the limit is held before the memory is taken; what honest
pickles take is less, by a half or more.
"""

from __future__ import annotations

import pickletools
from typing import Final

__all__ = ["BEYOND", "MEMORY", "ROOM", "SET_ITEM", "WIDEST"]

MEMORY: Final = 2 << 30
"""Bytes of memory that the objects of a pickle may take, where nobody says another number."""

BEYOND: Final = "not read: too many objects"
"""How a problem says that there may be nothing wrong, but more than an audit reads."""

SET_ITEM: Final = 160
"""Bytes that an item of a set takes, beside its own; it is made twice."""

WIDEST: Final = 4
"""Bytes for one of text: each letter takes as many as the widest one of its string."""

ROOM: Final[list[int]] = [48] * 256
"""Bytes of each opcode, by its code: for what it makes, and for the place of that in what contains
it, in the stack, and in the tree. Strings and numbers take their length as well."""

_CODES: Final = {op.name: ord(op.code) for op in pickletools.opcodes}

for _room, _names in (
    (96, "PUT BINPUT LONG_BINPUT MEMOIZE APPEND APPENDS"),
    (150, "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 LONG INT"),
    (150, "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 LONG1 LONG4"),
    (208, "EMPTY_LIST LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3"),
    (240, "SETITEM SETITEMS"),
    (320, "REDUCE NEWOBJ NEWOBJ_EX OBJ INST GLOBAL STACK_GLOBAL EXT1 EXT2 EXT4 NEXT_BUFFER"),
    (416, "DICT PERSID BINPERSID"),
    (640, "EMPTY_SET FROZENSET"),
):
    for _name in _names.split():
        ROOM[_CODES[_name]] = _room
