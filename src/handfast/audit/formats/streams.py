"""Bytes that come one after the other: as they lie, or unpacked while they are read.

zstd needs the package ``zstandard``: without it, what is packed so is a FormatError that says so.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import IO, Final, Protocol, cast

from handfast.audit.extent import Held, Source
from handfast.errors import Damaged, FormatError, HandfastError

__all__ = ["Stream", "opened", "unpacked"]

WINDOW: Final = 1 << 27
"""Bytes of memory that a zstd frame may ask for: 128 MiB, as the zstd tool allows unasked."""


class Stream(Protocol):
    """Bytes from a source, front to back."""

    def read(self, count: int, /) -> bytes:
        """The next bytes; fewer only where they end. Raises Damaged for what can't be had."""
        ...


class _Plain:
    """A source as it lies."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0

    def read(self, count: int, /) -> bytes:
        left = self._source.nbytes - self._at
        found = bytearray(left if count < 0 else min(count, left))
        self._source.read(memoryview(found), self._at)
        self._at += len(found)
        return bytes(found)


class _Unpacked:
    """What a stream unpacks to."""

    def __init__(self, packed: Stream, codec: str, name: str) -> None:
        self._stream = _OPENERS[codec](packed, name)
        self._codec, self._name = codec, name

    def read(self, count: int, /) -> bytes:
        pieces = []
        try:
            while count and (piece := self._stream.read(count)):
                pieces.append(piece)
                count -= len(piece)
        except HandfastError:
            raise
        except Exception as error:  # each library has errors of its own
            raise Damaged(
                f"{self._name}: can't be unpacked with {self._codec}: {error}. What to do: it was "
                "damaged since it was written, or never written whole; take it from a copy"
            ) from error
        return b"".join(pieces)


def opened(source: Source, codec: str = "") -> Stream:
    """Read a source that is packed with a codec: "zstd", "gzip" or "zlib"; "" where it is not.

    Raises FormatError for any other, and for zstd where ``zstandard`` is not installed.
    """
    packed = _Plain(source)
    if not codec:
        return packed
    if codec not in _OPENERS:
        raise FormatError(
            f"{source.name}: packed with {codec}, which is not read here. What to do: load it "
            "with the library that wrote it"
        )
    return _Unpacked(packed, codec, source.name)


def unpacked(data: bytes, codec: str, most: int, name: str) -> bytes:
    """Unpack some bytes at once. Raises FormatError beyond ``most``, and as :func:`opened` does."""
    found = opened(Held(data, name), codec).read(most + 1)
    if len(found) > most:
        raise FormatError(
            f"{name}: it unpacks to more than {most:,} bytes, which are read at most. What to do: "
            "if you trust its writer, have it write smaller nodes"
        )
    return found


def _zstd(packed: Stream, name: str) -> Stream:
    try:
        import zstandard
    except ImportError:
        raise FormatError(
            f"{name}: packed with zstd, which the package zstandard reads, and it is not "
            "installed. What to do: pip install zstandard"
        ) from None
    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    return unpacker.stream_reader(cast(IO[bytes], packed), read_across_frames=True)


class _Zlib:
    """A run of zlib's, which has no reader of its own in the standard library."""

    def __init__(self, packed: Stream, _: str) -> None:
        self._packed = packed
        self._step = zlib.decompressobj()

    def read(self, count: int, /) -> bytes:
        while not self._step.eof:
            piece = self._step.unconsumed_tail or self._packed.read(1 << 16)
            if found := self._step.decompress(piece, count):
                return found
            if not piece:
                break
        return b""


def _gzip(packed: Stream, _: str) -> Stream:
    return cast(Stream, gzip.GzipFile(fileobj=cast(IO[bytes], packed), mode="rb"))


_OPENERS: Final[Mapping[str, Callable[[Stream, str], Stream]]] = MappingProxyType(
    {"zstd": _zstd, "gzip": _gzip, "zlib": _Zlib}
)
