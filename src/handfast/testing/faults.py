"""Files that fail at the k-th call, so that every error path of a store can be walked.

The loop that finds them all, after SQLite: fail call 1, then call 2, and so on, until a run in
which nothing failed::

    for k in itertools.count(1):
        files = FaultyFiles(Posix(), fail_at=k, error=errno.EIO)
        ...
        if not files.fired:
            break
"""

import os
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeVar

from handfast.store.files import Files, Posix

__all__ = ["Call", "Crash", "Fault", "FaultyFiles", "Hasty"]

Result = TypeVar("Result")

Fault = int | Literal["short", "crash"] | Callable[[], None]
"""An errno: the call raises it. "short": a read or write moves half of its bytes. "crash": the
call and all later ones raise Crash. A function is called just before the call, which then
proceeds: stop the process there, or let another owner act in between."""

MOVERS: Final = ("pwrite", "pread")


class Call(NamedTuple):
    """One recorded call: its name, the path that it is about, and whether it was made to fail."""

    kind: str
    path: str
    failed: bool


class Crash(BaseException):
    """The process is gone: nothing catches this, and nothing can be cleaned up."""


class Hasty(Posix):
    """Real files without the waiting, for tests that end processes and lose no power."""

    def fsync(self, fd: int) -> None:
        """Leave it to the page cache."""

    fdatasync = forget = fsync

    def fsync_dir(self, path: str) -> None:
        """Leave it to the page cache."""


class FaultyFiles:
    """A `Files` that hands all calls to another one, but for the `fail_at`-th (from 1 on).

    `kinds` limits what is counted to some calls ("fsync", "rename" ...), `path` to paths that
    contain it. With `after=True` a call that fails, or is the last before a crash, is carried out
    all the same, as one whose answer was lost. With `lasting=True` all later ones fail, too, until
    :meth:`arm` is called again. `fired` tells whether the fault came, `calls` what
    was asked, in order.
    """

    lanes = 1

    def __init__(
        self,
        inner: Files,
        fail_at: int = 0,
        error: Fault = "crash",
        *,
        kinds: tuple[str, ...] = (),
        path: str = "",
        after: bool = False,
        lasting: bool = False,
    ) -> None:
        self.inner = inner
        self.fail_at = fail_at
        self.error = error
        self.kinds = MOVERS if error == "short" and not kinds else kinds
        self.path = path
        self.after = after
        self.lasting = lasting
        self.fired = False
        self.calls: list[Call] = []
        self._counted = 0
        self._dead = False
        self._halve = False
        self._paths: dict[int, str] = {}

    def _do(self, kind: str, path: str, action: Callable[[], Result]) -> Result:
        if self._dead:
            raise Crash
        counted = (not self.kinds or kind in self.kinds) and self.path in path
        self._counted += counted
        over = self._counted - self.fail_at
        now = counted and self.fail_at > 0 and (over == 0 or (self.lasting and over > 0))
        self.fired |= now
        self._halve = now and self.error == "short"
        self.calls.append(Call(kind, path, failed=now and isinstance(self.error, int)))
        if not now or self.error == "short":
            return action()
        if callable(self.error):
            self.error()
            return action()
        if self.after:
            result = action()
            if kind in ("create", "open") and isinstance(result, int):
                self.inner.close(result)  # the name is there, and nobody got the descriptor
        if isinstance(self.error, int):
            raise OSError(self.error, os.strerror(self.error), path)
        self._dead = True
        for fd in self._paths:
            self.inner.close(fd)
        raise Crash

    def _half(self, length: int) -> int:
        return max(1, length // 2) if self._halve else length

    def arm(self, fail_at: int) -> None:
        """Count anew: the fault comes at the `fail_at`-th call from now; with 0, none comes."""
        self.fail_at = fail_at
        self._counted = 0

    def create(self, path: str) -> int:
        fd = self._do("create", path, lambda: self.inner.create(path))
        self._paths[fd] = path
        return fd

    def open(self, path: str) -> int:
        fd = self._do("open", path, lambda: self.inner.open(path))
        self._paths[fd] = path
        return fd

    def leads_to(self, path: str, fd: int) -> bool:
        return self._do("leads_to", path, lambda: self.inner.leads_to(path, fd))

    def close(self, fd: int) -> None:
        if self._dead:
            raise Crash  # which closed all descriptors
        try:
            self._do("close", self._paths[fd], lambda: None)
        finally:
            if not self._dead:
                self.inner.close(fd)  # a descriptor is gone even when close reports an error
                del self._paths[fd]

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return self._do(
            "pwrite",
            self._paths[fd],
            lambda: self.inner.pwrite(fd, data[: self._half(len(data))], offset),
        )

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        return self._do(
            "pread",
            self._paths[fd],
            lambda: self.inner.pread(fd, into[: self._half(len(into))], offset),
        )

    def fsync(self, fd: int) -> None:
        self._do("fsync", self._paths[fd], lambda: self.inner.fsync(fd))

    def fdatasync(self, fd: int) -> None:
        self._do("fdatasync", self._paths[fd], lambda: self.inner.fdatasync(fd))

    def forget(self, fd: int) -> None:
        self.inner.forget(fd)  # never raises, so it is no place for a fault

    def cached(self, fd: int) -> bool:
        return self.inner.cached(fd)  # as before

    def direct(self, fd: int, on: bool) -> bool:
        return self.inner.direct(fd, on)  # nor does this one

    def allocate(self, fd: int, nbytes: int) -> None:
        self._do("allocate", self._paths[fd], lambda: self.inner.allocate(fd, nbytes))

    def size(self, fd: int) -> int:
        return self._do("size", self._paths[fd], lambda: self.inner.size(fd))

    def rename(self, source: str, target: str) -> None:
        self._do("rename", target, lambda: self.inner.rename(source, target))

    def link(self, source: str, target: str) -> None:
        self._do("link", target, lambda: self.inner.link(source, target))

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: self.inner.unlink(path))

    def mkdir(self, path: str, like: str = "") -> None:
        self._do("mkdir", path, lambda: self.inner.mkdir(path, like))

    def rmdir(self, path: str) -> None:
        self._do("rmdir", path, lambda: self.inner.rmdir(path))

    def listdir(self, path: str) -> list[str]:
        return self._do("listdir", path, lambda: self.inner.listdir(path))

    def exists(self, path: str) -> bool:
        return self._do("exists", path, lambda: self.inner.exists(path))

    def fsync_dir(self, path: str) -> None:
        self._do("fsync_dir", path, lambda: self.inner.fsync_dir(path))

    def free_bytes(self, path: str) -> int:
        return self._do("free_bytes", path, lambda: self.inner.free_bytes(path))
