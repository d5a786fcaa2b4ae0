"""Values whose encoding is kept from one save to the next."""

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any, Final

import msgspec

__all__ = ["NOTHING", "Kept", "longer"]

_pack = msgspec.msgpack.Encoder().encode


class Kept:
    """Values that are encoded again and again, and that nobody changes: their bytes are kept.

    It goes by identity. They must be containers of what needs no pickle. ``begins`` is a dict among
    them that stands, in the bytes, before all entries of the dict that is encoded. ``encoded`` has
    the bytes by the id of the value, None before the first time.
    """

    def __init__(self, values: Iterable[object], begins: object = None) -> None:
        self._values = tuple(values)  # held, so that no other value can come to have their ids
        self.begins = begins
        self.encoded: dict[int, msgspec.Raw | None] = {id(value): None for value in self._values}

    def of(self, values: Sequence[object]) -> bool:
        """Whether it is of these very values."""
        return len(self._values) == len(values) and all(map(is_, self._values, values))


NOTHING: Final = Kept(())


def longer(array: Any, more: Sequence[object]) -> msgspec.Raw:
    """An array of msgpack, as ``Raw``, that goes on with ``more``."""
    encoded = memoryview(array)
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
    return msgspec.Raw(b"".join((begin, encoded[head:], *map(_pack, more))))
