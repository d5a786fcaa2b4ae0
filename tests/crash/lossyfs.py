"""A file system in user space that loses all that was not synced, bytes and names, on a cue.

It is a `handfast.testing.powerloss.Disk` behind FUSE: `mkdir .cut-N` in its root cuts the power
(each change that was not synced persists or not, by the seed N), so that whoever used it must be
dead by then. With `--lies`, syncs are taken and not made.

    python lossyfs.py MOUNTPOINT [--lies]
"""

import contextlib
import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import mfusepy
except (ImportError, OSError) as error:  # no libfuse
    mfusepy, MISSING = None, str(error)
else:
    MISSING = ""

from handfast.testing.powerloss import Disk


class Lossy(mfusepy.Operations if mfusepy else object):
    """What FUSE asks for, answered by a disk in memory."""

    use_ns = True

    def __init__(self, *, lies: bool) -> None:
        self.disk = Disk()
        self.lies = lies
        self.modes: dict[int, int] = {}

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        node = self.disk._open[fh] if fh in self.disk._open else self.disk._find(path)
        found = self.disk._nodes[node]
        kind = stat.S_IFDIR | 0o755 if isinstance(found, dict) else stat.S_IFREG | 0o644
        mode = stat.S_IFMT(kind) | self.modes.get(node, stat.S_IMODE(kind))
        size = 4096 if isinstance(found, dict) else len(found)
        return {"st_mode": mode, "st_size": size, "st_nlink": 1, "st_ino": node + 1,
                "st_uid": os.getuid(), "st_gid": os.getgid(), "st_mtime": 0}  # fmt: skip

    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
        names = [".", "..", *self.disk.listdir(path)]
        return [(name, {"st_ino": 1}, 0) for name in names]  # libc hides names whose inode is 0

    def mkdir(self, path: str, mode: int) -> int:
        if path.startswith("/.cut-"):
            self.disk = self.disk.cut(random.Random(int(path.removeprefix("/.cut-"))))
            raise OSError(errno.ESTALE, "the power was cut")
        self.disk.mkdir(path)
        return 0

    def rmdir(self, path: str) -> int:
        self.disk.rmdir(path)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return self.disk.create(path)

    def open(self, path: str, flags: int) -> int:
        return self.disk.open(path)

    def release(self, path: str, fh: int) -> int:
        with contextlib.suppress(KeyError):  # opened before the cut
            self.disk.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        buffer = bytearray(size)
        return bytes(buffer[: self.disk.pread(fh, memoryview(buffer), offset)])

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return self.disk.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        if length != self.getattr(path, fh)["st_size"]:
            raise OSError(errno.EOPNOTSUPP, "the store never truncates")
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        if not self.lies:
            self.disk.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        if not self.lies:
            self.disk.fsync_dir(path)
        return 0

    def rename(self, old: str, new: str) -> int:
        self.disk.rename(old, new)
        return 0

    def link(self, target: str, source: str) -> int:
        self.disk.link(source, target)
        return 0

    def unlink(self, path: str) -> int:
        self.disk.unlink(path)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self.modes[self.disk._find(path)] = stat.S_IMODE(mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bavail": 1 << 20,
                "f_bfree": 1 << 20, "f_files": 1 << 20, "f_ffree": 1 << 20}  # fmt: skip


def unavailable() -> str:
    """Why it can't be mounted here; empty where it can."""
    if MISSING:
        return f"no FUSE: {MISSING}"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or not shutil.which("fusermount3"):
        return "no FUSE: /dev/fuse can't be opened, or there is no fusermount3"
    return ""


@contextlib.contextmanager
def mounted(home: Path, *, lies: bool = False) -> Iterator[Path]:
    """Mount one, and unmount it at the end."""
    point = home / "lossy"
    point.mkdir()
    argv = [sys.executable, __file__, str(point), *(["--lies"] if lies else [])]
    with subprocess.Popen(argv) as server:
        try:
            deadline = time.monotonic() + 20
            while not os.path.ismount(point):
                assert server.poll() is None, "the file system could not be mounted"
                assert time.monotonic() < deadline, "the file system was not mounted in time"
                time.sleep(0.01)
            yield point
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(point)], check=False)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def cut(point: Path, seed: int) -> None:
    """Cut the power."""
    with contextlib.suppress(OSError):
        os.mkdir(point / f".cut-{seed}")


if __name__ == "__main__":
    # nothing is cached: what a cut changes must be seen at once
    mfusepy.FUSE(
        Lossy(lies="--lies" in sys.argv), sys.argv[1], foreground=True, nothreads=True,
        attr_timeout=0, entry_timeout=0, negative_timeout=0, use_ino=True,
        hard_remove=True,
    )  # fmt: skip
