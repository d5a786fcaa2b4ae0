"""An append-only log of opaque records, each framed by a checksum.

A file is a header of 16 bytes and then frames, all integers little-endian::

    header   magic "HFJRNL" | version u16 | nonce u32 | crc32 of the 12 bytes before, u32
    frame    marker u32 | crc32 of all that follows, u32 | sequence u64 | synced u64 | length u32
             | payload

The checksum of a frame starts from the header's, so a frame copied from another journal is none
here. `synced` is the length of the journal that was known durable when the frame was appended.
It tells a torn tail (bytes that no sync had promised, in whatever order the disk took them) from
damage (bytes that some later record proves to have been durable): the first is normal after a
crash and is cut off, the second is loud.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import msgspec

from handfast.errors import Damaged, FormatError, SaveFailed
from handfast.store.files import Files, closing, read_into, reading, write_all, writing

__all__ = ["HEADER", "LOST", "RECORD_MAX", "Journal", "Scan", "scan"]

LOST: Final = (
    "put the file, or the domain's whole directory, back from a copy; without a copy the run is "
    "lost: begin anew, on a fresh path"
)

MAGIC: Final = b"HFJRNL"
VERSION: Final = 1
HEADER: Final = 16  # bytes before the first frame
MARKER: Final = b"\xf1HF\x0a"
RECORD_MAX: Final = 16 << 20  # bytes in a record; a longer length is damage, not a record
TORN_MAX: Final = 64 << 20  # bytes that no sync has promised; a longer tail is damage, not torn

HEAD = struct.Struct("<6sHI")
GUARDED = struct.Struct("<QQI")  # sequence, synced, length: what the checksum covers first
CHECK = struct.Struct("<I")
PREFIX: Final = len(MARKER) + CHECK.size  # bytes of a frame before what its checksum covers
FRAME: Final = PREFIX + GUARDED.size  # bytes of a frame before its payload


class Scan(msgspec.Struct, frozen=True):
    """What a journal holds: its records, the bytes that they end at, and whether more follow."""

    records: tuple[bytes, ...]
    length: int
    torn: bool


class Journal:
    """The writing end. It has one owner, is never reopened, and is dead after its first error.

    Order that a caller *must* keep: `append`, `sync`, and only then act on the record.
    """

    def __init__(self, files: Files, path: str, fd: int, seed: int) -> None:
        self.path = path
        self.length = HEADER
        self._files = files
        self._fd = fd
        self._seed = seed
        self._sequence = 0
        self._synced = HEADER
        self._dead = ""

    @classmethod
    def create(cls, files: Files, path: str) -> "Journal":
        """Make a new journal with a durable header; its name is durable with its directory.

        The header *must* be durable before the first record is appended: that is how a reader
        knows that a journal with records and no sound header is damaged, not torn.
        Raises SaveFailed, also when the name is taken.
        """
        head = HEAD.pack(MAGIC, VERSION, int.from_bytes(os.urandom(4), "little"))
        seed = zlib.crc32(head)
        with writing("create the journal", path):
            fd = files.create(path)
            try:
                write_all(files, fd, head + CHECK.pack(seed), 0)
                files.fdatasync(fd)
            except OSError:
                with closing(files, fd):
                    raise
        return cls(files, path, fd, seed)

    def append(self, payload: bytes) -> None:
        """Add one record. Nothing is promised of it before `sync`; SaveFailed is final.

        Where so much is not synced that it could not pass for a torn tail, that is synced first.
        """
        if len(payload) > RECORD_MAX:
            raise ValueError(f"a record of {len(payload)} bytes; at most {RECORD_MAX} are allowed")
        guarded = GUARDED.pack(self._sequence, self._synced, len(payload)) + payload
        frame = MARKER + CHECK.pack(zlib.crc32(guarded, self._seed)) + guarded
        if self.length + len(frame) - self._synced >= TORN_MAX:
            self.sync()
        with self._step("append to the journal"):
            write_all(self._files, self._fd, frame, self.length)
        self.length += len(frame)
        self._sequence += 1

    def sync(self) -> None:
        """Make every record durable. SaveFailed is final: a second fdatasync may lie."""
        with self._step("sync the journal"):
            self._files.fdatasync(self._fd)
        self._synced = self.length

    def stands(self) -> bool:
        """Whether who looks for this journal finds it: it is open, and its name leads to it."""
        return self._fd >= 0 and self._files.leads_to(self.path, self._fd)

    def close(self) -> None:
        """Give the descriptor back. What was not synced is promised to nobody."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._dead = self._dead or "it was closed"
            with writing("close the journal", self.path):
                self._files.close(fd)

    @contextlib.contextmanager
    def _step(self, step: str) -> Iterator[None]:
        if self._dead:
            raise SaveFailed(
                f"{step}: {self.path}: this journal takes no more records: {self._dead}. "
                "What to do: claim the domain again"
            )
        try:
            with writing(step, self.path):
                yield
        except SaveFailed as error:
            self._dead = f"an earlier step failed ({error})"
            raise


def scan(files: Files, path: str, limit: int | None = None, most: int | None = None) -> Scan:
    """Read a journal's records. A missing journal is Damaged; a foreign file is a FormatError.

    Without `limit`, a tail that no sync had promised is cut off (`torn`), and damage before it
    raises Damaged with the file and the offset. With `limit`, a length at which a successor
    sealed this journal, every byte before it was once read back whole, so anything wrong there
    is Damaged, and whatever stands behind it is void. A tail of TORN_MAX bytes is no torn one, and
    Damaged, too; not much more than that is held of it. `most` is the length that an unsealed
    journal had at the moment that is looked at: what was appended since is not read.
    """
    if limit == 0:  # sealed before it was created: whatever is there now came too late
        return Scan((), 0, torn=False)
    with reading(path), closing(files, files.open(path)) as fd:
        return _scan(path, _pieces(files, fd, most if limit is None else limit), limit)


def _scan(path: str, pieces: Iterator[bytearray], limit: int | None) -> Scan:
    data = bytearray()
    records: list[bytes] = []
    offset = seed = 0
    for piece in pieces:
        data += piece
        if len(data) < HEADER or (limit is None and len(data) == HEADER and not _is_whole(data)):
            continue  # its creator died before the header was durable, and so before any record
        if not offset:
            offset, seed = HEADER, _check_header(path, data)
        while (found := _frame(data, offset, seed)) is not None:
            sequence, _, payload = found
            if sequence != len(records):
                what = f"record {sequence} stands where {len(records)} belongs"
                raise _damaged(path, offset, what)
            records.append(payload)
            offset += FRAME + len(payload)
        if len(data) - offset >= TORN_MAX:
            what = f"{TORN_MAX} bytes or more that are no record: no crash leaves so many"
            raise _damaged(path, offset, what)
    if limit is not None and len(data) < limit:
        raise _damaged(path, len(data), f"the file ends here, though it was sealed at {limit}")
    torn = offset < len(data)
    if torn and (limit is not None or _promised(data, offset, seed)):
        raise _damaged(path, offset, f"record {len(records)} can't be read, though it was durable")
    return Scan(tuple(records), offset, torn)


def _pieces(files: Files, fd: int, limit: int | None) -> Iterator[bytearray]:
    """A file's bytes, up to a limit; so many at a time that a length gone wild takes no memory."""
    left = files.size(fd) if limit is None else min(files.size(fd), limit)
    at = 0
    while left > 0:
        piece = bytearray(min(left, TORN_MAX))
        got = read_into(files, fd, memoryview(piece), at)
        yield piece[:got]
        at, left = at + got, left - len(piece) if got == len(piece) else 0


def _is_whole(header: bytearray) -> bool:
    (check,) = CHECK.unpack_from(header, HEAD.size)
    return bool(check == zlib.crc32(header[: HEAD.size]))


def _check_header(path: str, data: bytearray) -> int:
    """The seed of the frames' checksums."""
    magic, version, _ = HEAD.unpack_from(data)
    (check,) = CHECK.unpack_from(data, HEAD.size)
    if not _is_whole(data):
        raise _damaged(path, 0, "the header's checksum differs")
    if magic != MAGIC:
        raise FormatError(f"{path}: not a journal of handfast. What to do: check the path")
    if version != VERSION:
        raise FormatError(
            f"{path}: a journal of format {version}; this handfast reads format {VERSION}. "
            "What to do: use the release of handfast that wrote it, or a later one"
        )
    return int(check)


def _frame(data: bytearray, offset: int, seed: int) -> tuple[int, int, bytes] | None:
    """The sequence, synced length and payload of a sound frame at this offset, else None."""
    start = offset + FRAME
    if not data.startswith(MARKER, offset) or start > len(data):
        return None
    (check,) = CHECK.unpack_from(data, offset + len(MARKER))
    sequence, synced, length = GUARDED.unpack_from(data, offset + PREFIX)
    end = start + length
    if length > RECORD_MAX or end > len(data):
        return None
    if zlib.crc32(memoryview(data)[offset + PREFIX : end], seed) != check:
        return None
    return sequence, synced, bytes(data[start:end])


def _promised(data: bytearray, offset: int, seed: int) -> bool:
    """Whether a later record proves that the bytes at this offset were durable once."""
    at = data.find(MARKER, offset + 1)
    while at >= 0:
        found = _frame(data, at, seed)
        if found is not None and found[1] > offset:
            return True
        at = data.find(MARKER, at + 1)
    return False


def _damaged(path: str, offset: int, what: str) -> Damaged:
    return Damaged(
        f"{path}: damaged at byte {offset}: {what}: this domain's record is not to be trusted. "
        f"What to do: {LOST}"
    )
