"""The few system calls that the store makes, behind one door.

Everything in the store does its input and output through a :class:`Files`, so that a test can
fail, shorten or stop each single call, and a simulation can lose what was never synced.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from typing import Protocol

from handfast.errors import Damaged, HandfastError, SaveFailed

__all__ = ["TEMPORARY", "Files", "Posix"]

TEMPORARY = ".tmp"  # the end of a name that is not published yet; readers never look at these

PIECE = 16 << 20  # bytes handed to the kernel in one call: large enough that the call costs nothing

GONE_BAD = {errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENODATA, errno.EBADMSG,
            errno.EUCLEAN, errno.ENXIO}  # fmt: skip

LOOKS = 10
"""How often a name is looked up again whose file is replaced while it is read."""

LANES = 6
"""Writes and reads under way at once: what keeps one NVMe disk busy while some of them hash."""

SAMPLE = 256
"""Pages of a file that are asked about at most, to know whether most of it is in the cache."""

UNALLOCATED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINTR}

# That of Python and the C library writes to each block where the file system has no such call: over
# a network, all of the file twice.
_FALLOCATE = ctypes.CDLL(None, use_errno=True).fallocate
_FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# Python's own gives no address of what it maps to be read only.
_MMAP, _MUNMAP, _MINCORE = (getattr(ctypes.PyDLL(None), n) for n in ("mmap", "munmap", "mincore"))
_MMAP.restype = ctypes.c_void_p
_MMAP.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_MUNMAP.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MINCORE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_FAILED = ctypes.c_void_p(-1).value

UNSYNCED = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS}

FULL = "free some space there, or keep fewer epochs, and save again"
BROKEN = (
    "the device or its file system reports errors: look at the kernel's log and replace it; what "
    "was being written is given up, and is never synced a second time"
)
DENIED = (
    "make it writable for this user, and each directory above it one that this user may enter "
    "(chmod u+x)"
)
NO_MEMORY = "free memory on this node, and try again"
OTHER = "mend what the system reports there, and try again"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: BROKEN,
    errno.EROFS: "the file system is mounted read-only: mount it read-write, or use another one",
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.ENOENT: "somebody took the file away: whoever has claimed this domain since, or an "
    "operator; look for a later incarnation before saving again",
    errno.EISDIR: "a directory is in the place of a file: move it away",
    errno.ELOOP: "the path's links lead in a circle: put back what they should lead to",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EAGAIN: "the system is out of something for a moment: try again",
    errno.ESTALE: "it was replaced or taken away while it was being read, or its server lost it: "
    "try again, and look who else uses this path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOMEM: NO_MEMORY,
    errno.EOPNOTSUPP: "this file system lacks hard links: use a local or POSIX file system",
}


class Files(Protocol):
    """What the store asks of an operating system.

    Every method but `forget`, `cached` and `direct` may raise OSError.
    """

    lanes: int
    """How many threads may move bytes at once; 1 where calls must come in one order."""

    def create(self, path: str) -> int:
        """Make a new file, open for reading and writing; FileExistsError if the name is taken."""

    def open(self, path: str) -> int:
        """Open a regular file for reading (a descriptor that can be synced all the same)."""

    def close(self, fd: int) -> None:
        """Close the descriptor; it is gone even when this raises."""

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write at an offset; returns the count of bytes taken, which may be short."""

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        """Read at an offset into a buffer; returns the count of bytes read, 0 at the end."""

    def fsync(self, fd: int) -> None:
        """Make the file's bytes and attributes durable. After an error: never again."""

    def fdatasync(self, fd: int) -> None:
        """Make the file's bytes and its length durable. After an error: never again."""

    def forget(self, fd: int) -> None:
        """Drop the file's clean pages from the cache, where the system allows; never raises."""

    def cached(self, fd: int) -> bool:
        """Whether nearly all of a file seems to lie in the page cache. Reads none; never raises.

        True where the system won't say.
        """

    def direct(self, fd: int, on: bool) -> bool:
        """Move whole blocks past the cache from now on, or not; gives whether that is so.

        The memory has to begin on a block boundary, too: else a call fails with EINVAL.
        """

    def allocate(self, fd: int, nbytes: int) -> None:
        """Give a new file its length, and room on the medium, if the system can promise that."""

    def size(self, fd: int) -> int:
        """The file's length in bytes."""

    def leads_to(self, path: str, fd: int) -> bool:
        """Whether the path is still a name of this open file."""

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, at once, replacing what had it."""

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, at once; FileExistsError if the name is taken."""

    def unlink(self, path: str) -> None:
        """Take a name away."""

    def mkdir(self, path: str, like: str = "") -> None:
        """Make a directory; FileExistsError if the name is taken.

        Where another one is named, it gets the mode of that and, if this user may give it away,
        the owner.
        """

    def rmdir(self, path: str) -> None:
        """Take an empty directory away."""

    def listdir(self, path: str) -> list[str]:
        """The names in a directory, sorted."""

    def exists(self, path: str) -> bool:
        """Whether the name is there."""

    def fsync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""

    def free_bytes(self, path: str) -> int:
        """Bytes that this user may still write to the path's file system."""


class Posix:
    """The real calls. Python retries EINTR by itself; short counts are returned as they are."""

    lanes = LANES

    def create(self, path: str) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open(self, path: str) -> int:
        # O_NONBLOCK: a pipe in a file's place would be waited for until somebody writes to it
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.ENXIO, "it is no regular file", path)
        return fd

    def leads_to(self, path: str, fd: int) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(fd))
        except FileNotFoundError:
            return False

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        return os.preadv(fd, [into], offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def forget(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def cached(self, fd: int) -> bool:
        try:
            size = self.size(fd)
        except OSError:
            return True
        # never touched, so that a file which is cut meanwhile does no harm
        at = _MMAP(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if at == _FAILED:
            return True
        page, step = ctypes.create_string_buffer(1), max(1 << 20, size // SAMPLE)
        some = range(at, at + size, step // mmap.PAGESIZE * mmap.PAGESIZE)
        held = sum(_MINCORE(here, 1, page) != 0 or page.raw[0] & 1 for here in some)
        _MUNMAP(at, size)
        return held > len(some) * 7 // 8

    def direct(self, fd: int, on: bool) -> bool:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | (os.O_DIRECT if on else 0))
        except OSError:  # this file system has no such way
            return False
        return on

    def allocate(self, fd: int, nbytes: int) -> None:
        if _FALLOCATE(fd, 0, 0, nbytes):
            error = ctypes.get_errno()
            if error not in UNALLOCATED:
                raise OSError(error, os.strerror(error))

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str, like: str = "") -> None:
        os.mkdir(path)
        if like:
            model = os.stat(like)
            with contextlib.suppress(PermissionError):
                os.chown(path, model.st_uid, model.st_gid)
            os.chmod(path, stat.S_IMODE(model.st_mode))  # whatever this process's umask is

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def exists(self, path: str) -> bool:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def fsync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: str) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


@contextlib.contextmanager
def writing(step: str, path: str) -> Iterator[None]:
    """Turn an OSError of the body into a SaveFailed that names the step, the path and a remedy."""
    try:
        yield
    except OSError as error:
        what = f"{step}: {path}: {describe(error)}. What to do: {remedy(error)}"
        raise SaveFailed(what) from error


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn an OSError of the body into Damaged (the bytes are gone) or a plain HandfastError.

    A lack of memory becomes a plain HandfastError, too.
    """
    try:
        yield
    except OSError as error:
        if error.errno in GONE_BAD:
            raise Damaged(
                f"{path}: can't be read: {describe(error)}. What to do: restore this domain "
                "from another epoch or another copy"
            ) from error
        to_do = remedy(error).replace("writ", "read")
        raise HandfastError(
            f"{path}: can't be read: {describe(error)}. What to do: {to_do}"
        ) from error
    except MemoryError as error:
        raise HandfastError(
            f"{path}: can't be read: there is no memory for it. What to do: free memory on this "
            "node; if the file is far longer than its like, put it back from a copy"
        ) from error


def describe(error: OSError) -> str:
    """The error's text and its symbolic name: `No space left on device (ENOSPC)`."""
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"


def remedy(error: OSError) -> str:
    """What can be done about an error of the system, for somebody who wanted to write."""
    return REMEDIES.get(error.errno or 0, OTHER)


@contextlib.contextmanager
def closing(files: Files, fd: int) -> Iterator[int]:
    """Close the descriptor after the body; an error of the body is not masked by one of close."""
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            files.close(fd)
        raise
    files.close(fd)


def write_all(files: Files, fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte, going on after short counts."""
    view = memoryview(data)
    while view:
        count = files.pwrite(fd, view[:PIECE], offset)
        if count <= 0:
            raise OSError(errno.EIO, "the system took no bytes and gave no reason")
        view, offset = view[count:], offset + count


def read_into(files: Files, fd: int, into: memoryview, offset: int) -> int:
    """Fill the buffer as far as the file goes; returns the count of bytes read."""
    done = 0
    while done < len(into):
        count = files.pread(fd, into[done : done + PIECE], offset + done)
        if count <= 0:
            break
        done += count
    return done


def read_file(files: Files, path: str, limit: int | None = None) -> bytes:
    """A small file's bytes, at most `limit` of them. Raises HandfastError; Damaged if it is gone.

    A length on a disk can go wild: where it is known how long such a file may be, say so.
    """
    return look(
        files, path, lambda fd: read_start(files, fd, files.size(fd) if limit is None else limit)
    )


def look(files: Files, path: str, read: Callable[[int], bytes]) -> bytes:
    """What is read from the open file that a name leads to now. Raises as :func:`read_file` does.

    On NFS and FUSE a name leads to the old file or to the new one as everywhere, but the old one
    may be taken from whoever has just looked it up (ESTALE; the kernel looks only once more).
    """
    left = LOOKS
    with reading(path):
        while True:
            left -= 1
            try:
                with closing(files, files.open(path)) as fd:
                    return read(fd)
            except OSError as error:
                if error.errno != errno.ESTALE or not left:
                    raise


def read_start(files: Files, fd: int, limit: int) -> bytes:
    """An open file's first bytes, at most `limit` of them."""
    buffer = bytearray(min(files.size(fd), limit))
    return bytes(buffer[: read_into(files, fd, memoryview(buffer), 0)])


def told_by_kernel(path: str) -> str:
    """What stands in a file of /proc, which has no length; empty where nothing is to be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def write_file(files: Files, path: str, data: bytes) -> None:
    """Make a new small file whose bytes are durable; its name is not yet."""
    with closing(files, files.create(path)) as fd:
        write_all(files, fd, data, 0)
        files.fsync(fd)


def discard(files: Files, *paths: str) -> None:
    """Take names away in this order, up to the first that will not go.

    So a manifest that stays keeps its data, too. What stays behind was never voted for.
    """
    with contextlib.suppress(OSError):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                files.unlink(path)


def try_lock(fd: int) -> bool:
    """Lock a file against all other holders, without waiting; False where another one has it.

    It is held until the descriptor is closed: the kernel does that, too, at the process's end.
    Raises OSError where the file system has no locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_directory(files: Files, path: str, above: str = "") -> None:
    """Make a directory and its parents where they are missing, each durable in its parent.

    Those that were there already are synced too, all the way up: whoever made them may have died
    before that. Not so `above`, which the caller knows to be durable.
    """
    parent = os.path.dirname(path) or "."
    if parent not in (above, path, "."):
        make_directory(files, parent, above)
    found = files.exists(path)
    if not found:
        with contextlib.suppress(FileExistsError):
            files.mkdir(path)
    try:
        files.fsync_dir(parent)
    except OSError as error:
        # a mount point made by an operator may stand in a directory that we can't read, or that
        # no sync is for: one that is read-only, or of the kernel's own making
        if not found or error.errno not in UNSYNCED:
            raise
