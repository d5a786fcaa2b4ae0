"""Values whose encoding is kept from one save to the next."""

from collections.abc import Iterable, Sequence
from operator import is_

import msgspec

__all__ = ["Kept", "longer"]

_pack = msgspec.msgpack.Encoder().encode


class Kept:
    """Values that are encoded again and again, and that nobody changes: their bytes are kept.

    It goes by identity. They must be containers of what needs no pickle. ``encoded`` has the bytes
    by the id of the value, None before the first time.
    """

    def __init__(self, values: Iterable[object]) -> None:
        self._values = tuple(values)  # held, so that no other value can come to have their ids
        self.encoded: dict[int, msgspec.Raw | None] = {id(value): None for value in self._values}

    def of(self, values: Sequence[object]) -> bool:
        """Whether it is of these very values."""
        return len(self._values) == len(values) and all(map(is_, self._values, values))


def longer(encoded: bytes, more: Sequence[object]) -> msgspec.Raw:
    """An array of msgpack that goes on with ``more``."""
    first = encoded[0]
    if first >> 4 == 0x9:
        count, head = first & 0xF, 1
    else:
        head = 3 if first == 0xDC else 5
        count = int.from_bytes(encoded[1:head], "big")
    total = count + len(more)
    if total < 16:
        begin = bytes([0x90 | total])
    elif total < 1 << 16:
        begin = b"\xdc" + total.to_bytes(2, "big")
    else:
        begin = b"\xdd" + total.to_bytes(4, "big")
    return msgspec.Raw(b"".join((begin, memoryview(encoded)[head:], *map(_pack, more))))
