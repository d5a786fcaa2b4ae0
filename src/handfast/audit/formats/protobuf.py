"""Protocol buffers off the wire, without their descriptions: numbers and strings by field.

The encoding is protobuf's public one ("Encoding", protobuf.dev): a varint of field and type, then a
varint, eight bytes, a length and bytes, or four bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from handfast.audit.formats.wire import Cursor

__all__ = ["Message"]

VARINT, WIDE, TEXT, NARROW = 0, 1, 2, 5
MOST: Final = 1 << 22
"""Fields of a message that are read at most."""


class Message:
    """A message: its fields' values, in order. Raises Damaged for bytes that are none."""

    def __init__(self, data: bytes, name: str) -> None:
        self._name = name
        self._fields: Mapping[int, list[int | bytes]] = defaultdict(list)
        cursor = Cursor(data, name)
        for _ in range(MOST):
            if not cursor.left:
                return
            field, kind = divmod(cursor.varint(), 8)
            if kind == VARINT:
                self._fields[field].append(cursor.varint())
            elif kind == TEXT:
                self._fields[field].append(cursor.take(cursor.varint()))
            elif kind in (WIDE, NARROW):
                self._fields[field].append(cursor.fixed(8 if kind == WIDE else 4))
            else:
                raise cursor.damaged(f"field {field} is of type {kind}, and there is no such one")
        raise cursor.damaged(f"more than {MOST:,} fields")

    def numbers(self, field: int) -> list[int]:
        """The numbers of a field; those that were packed into one string, too."""
        found = []
        for value in self._fields.get(field, ()):
            if isinstance(value, int):
                found.append(value)
            else:
                cursor = Cursor(value, self._name)
                while cursor.left:
                    found.append(cursor.varint())
        return found

    def number(self, field: int) -> int:
        """The last number of a field; 0 where there is none, as protobuf has it."""
        return next(reversed(self.numbers(field)), 0)

    def signed(self, field: int) -> int:
        """The same of an int32 or int64, which may be negative."""
        found = self.number(field)
        return found - (1 << 64) if found >> 63 else found

    def texts(self, field: int) -> list[bytes]:
        """The strings of a field."""
        return [value for value in self._fields.get(field, ()) if isinstance(value, bytes)]

    def text(self, field: int) -> str:
        """The last string of a field; "" where there is none."""
        return next(reversed(self.texts(field)), b"").decode("utf-8", "backslashreplace")

    def messages(self, field: int) -> list[Message]:
        """The messages of a field."""
        return [Message(value, self._name) for value in self.texts(field)]
