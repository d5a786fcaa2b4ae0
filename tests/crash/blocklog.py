"""A file system of one file that logs every write and every flush of it: what a disk was told.

On the file lies ext4, by a loop device. Each write of the kernel's is appended to a log with its
offset and bytes, each flush as a mark, so that a power loss between any two of them can be laid
out again: all that came before a flush is there, and of the rest whatever we choose.

    python blocklog.py MOUNTPOINT LOG SIZE
"""

import contextlib
import errno
import os
import random
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lossyfs

mfusepy = lossyfs.mfusepy
HEAD = struct.Struct("<qq")  # the offset and the length of a write; -1 and 0 are a flush


class Write(NamedTuple):
    """Bytes that the disk was given, or (offset -1) told to make durable all before."""

    offset: int
    data: bytes


class BlockLog(mfusepy.Operations if mfusepy else object):
    """The one file, `image`, in memory."""

    use_ns = True

    def __init__(self, log: str, size: int) -> None:
        self.data = bytearray(size)
        self.log = open(log, "wb", buffering=0)  # noqa: SIM115 - for as long as it is mounted

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path != "/image":
            raise OSError(errno.ENOENT, path)
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": len(self.data)}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", "image"]

    def open(self, path: str, flags: int) -> int:
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self.data[offset : offset + len(data)] = data
        self.log.write(HEAD.pack(offset, len(data)) + data)
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self.log.write(HEAD.pack(-1, 0))
        return 0

    def flush(self, path: str, fh: int) -> int:
        return 0


def read_log(path: Path) -> list[Write]:
    """All that was logged, in order."""
    data = path.read_bytes()
    found, at = [], 0
    while at < len(data):
        offset, length = HEAD.unpack_from(data, at)
        at += HEAD.size
        found.append(Write(offset, data[at : at + length]))
        at += length
    return found


def unavailable() -> str:
    """Why no image can be mounted here; empty where one can."""
    if why := lossyfs.unavailable():
        return why
    with tempfile.TemporaryDirectory() as home:
        image = Path(home) / "image"
        with image.open("wb") as file:
            file.truncate(SIZE)
        try:
            with ext4(image, Path(home), make=True):
                return ""
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no loop device with ext4 can be mounted: {error}"


SIZE = 24 << 20
OPTIONS = "noatime,data=ordered"


@contextlib.contextmanager
def ext4(image: Path, home: Path, *, make: bool = False, options: str = OPTIONS) -> Iterator[Path]:
    """Mount an image as ext4, made anew if need be."""
    point = home / "ext4"
    point.mkdir(exist_ok=True)
    if make:
        command = ["mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0", str(image)]
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": path})
    subprocess.run(
        ["mount", "-o", f"loop,{options}", str(image), str(point)], check=True, capture_output=True
    )
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, capture_output=True)


def images(
    log: list[Write], start: bytes, chance: random.Random
) -> Iterator[tuple[int, bytearray]]:
    """What a power loss may have left: (how many entries were logged, the image).

    At each flush all that was written until then; and between two flushes, once, all that came
    before the last flush with a random half of what came behind it.
    """
    durable = bytearray(start)
    pending: list[Write] = []
    for n, entry in enumerate(log, 1):
        if entry.offset >= 0:
            pending.append(entry)
            continue
        some = bytearray(durable)
        cut = chance.randrange(len(pending) + 1)  # a prefix, of which a random half
        for write in pending[:cut]:
            if chance.random() < 0.5:
                some[write.offset : write.offset + len(write.data)] = write.data
        yield n - 1, some
        for write in pending:
            durable[write.offset : write.offset + len(write.data)] = write.data
        pending = []
        yield n, bytearray(durable)


if __name__ == "__main__":
    mfusepy.FUSE(
        BlockLog(sys.argv[2], int(sys.argv[3])), sys.argv[1], foreground=True, nothreads=True,
        attr_timeout=3600, entry_timeout=3600,
    )  # fmt: skip
