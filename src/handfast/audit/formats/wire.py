"""Numbers off some bytes, front to back: what OCDBT, LevelDB and protobuf have alike."""

from __future__ import annotations

from typing import Final

from handfast.errors import Damaged

__all__ = ["Cursor"]

LONGEST: Final = 10
"""Bytes of a varint of 64 bits."""


class Cursor:
    """Reads some bytes from ``at`` on. Errors name ``name``, and the offset in the bytes."""

    __slots__ = ("_data", "_name", "at")

    def __init__(self, data: bytes | memoryview, name: str, at: int = 0) -> None:
        self._data, self._name = memoryview(data), name
        self.at = at

    @property
    def left(self) -> int:
        """Bytes that are still ahead."""
        return len(self._data) - self.at

    def take(self, count: int) -> bytes:
        """Some bytes. Raises Damaged where there are fewer."""
        if not 0 <= count <= self.left:
            raise self.damaged(f"{count:,} bytes should follow, and there are {self.left:,}")
        self.at += count
        return bytes(self._data[self.at - count : self.at])

    def fixed(self, nbytes: int) -> int:
        """A little-endian number of so many bytes, without a sign."""
        return int.from_bytes(self.take(nbytes), "little")

    def varint(self) -> int:
        """A number of up to 64 bits, seven a byte, the lowest first; the last byte is below 128."""
        found = 0
        for place in range(LONGEST):
            if self.at >= len(self._data):
                break
            byte = self._data[self.at]
            self.at += 1
            found |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                if found >> 64:
                    break
                return found
        raise self.damaged("no number of 64 bits is there")

    def varints(self, count: int) -> list[int]:
        """Several numbers. Each takes a byte at least: more than are left are refused at once."""
        if count > self.left:
            raise self.damaged(f"{count:,} numbers should follow, in {self.left:,} bytes")
        return [self.varint() for _ in range(count)]

    def damaged(self, what: str) -> Damaged:
        """What to raise where the bytes are not what they should be."""
        return Damaged(
            f"{self._name}: byte {self.at:,}: {what}. What to do: it was damaged since it was "
            "written, or never written whole; take it from a copy"
        )
