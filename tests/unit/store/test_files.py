"""Shows that the store's few system calls do what the store takes them to do."""

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from handfast.errors import Damaged, HandfastError, SaveFailed
from handfast.store.files import (
    LOOKS,
    Files,
    Posix,
    closing,
    discard,
    make_directory,
    read_file,
    read_into,
    reading,
    write_all,
    write_file,
    writing,
)
from handfast.testing.faults import Crash, FaultyFiles

FILES = Posix()


def test_names_are_taken_once(tmp_path: Path) -> None:
    """Shows that create, link and mkdir are exclusive: what all claims rest on."""
    taken, other = str(tmp_path / "taken"), str(tmp_path / "other")
    for path in (taken, other):
        FILES.close(FILES.create(path))
    for attempt in (
        lambda: FILES.create(taken),
        lambda: FILES.link(other, taken),
        lambda: FILES.mkdir(taken),
    ):
        with pytest.raises(FileExistsError):
            attempt()


def test_short_counts_are_gone_on_from(tmp_path: Path) -> None:
    """Shows that a call that moves only half of its bytes loses none of the rest."""
    data = os.urandom(100_000)
    path = str(tmp_path / "file")
    files = FaultyFiles(FILES, fail_at=1, error="short", kinds=("pwrite",))
    write_file(files, path, data)
    assert [call.kind for call in files.calls].count("pwrite") == 2
    files = FaultyFiles(FILES, fail_at=1, error="short", kinds=("pread",))
    assert read_file(files, path) == data
    assert [call.kind for call in files.calls].count("pread") == 2
    assert read_file(FILES, path, limit=7) == data[:7]


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket"])
def test_what_is_no_regular_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """A pipe would be waited for; the writer that this one has keeps a test that fails from it."""
    path = str(tmp_path / "journal")
    match kind:
        case "pipe":
            os.mkfifo(path)
            writer = os.open(path, os.O_RDWR)
        case "directory":
            os.mkdir(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path)
    with pytest.raises(OSError, match="journal"):
        FILES.open(path)
    with pytest.raises(Damaged, match=r"journal: can't be read: .*\(ENXIO\)"):
        read_file(FILES, path)
    if kind == "pipe":
        os.close(writer)


@pytest.mark.parametrize("step", ["open", "size", "pread"])
@pytest.mark.parametrize("times", [1, LOOKS - 1, LOOKS])
def test_a_file_that_is_replaced_while_it_is_read_is_looked_up_again(
    step: str, times: int, tmp_path: Path
) -> None:
    """On NFS and FUSE whoever reads the old file may be told that it is gone (ESTALE)."""
    path = str(tmp_path / "manifest")
    write_file(FILES, path, b"the new one")
    left = [times]

    class Replaced(Posix):
        """One of its calls finds the old file gone, a few times."""

    def gone(self: Posix, *asked: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return getattr(FILES, step)(*asked)

    setattr(Replaced, step, gone)
    if times < LOOKS:
        assert read_file(Replaced(), path) == b"the new one"
    else:
        with pytest.raises(HandfastError, match=r"manifest: .*ESTALE.*replaced.*try again"):
            read_file(Replaced(), path)
    assert left[0] <= 0


class TakesNothing(Posix):
    """A file system that reports success and takes no byte."""

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return 0


def test_a_write_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    """Shows that a file system that never takes a byte is no endless loop."""
    with pytest.raises(OSError, match="took no bytes") as found:
        write_file(TakesNothing(), str(tmp_path / "file"), b"data")
    assert found.value.errno == errno.EIO


def drops_pages(path: Path) -> bool:
    """Whether the system itself can drop pages here; asked without the code that is tested."""
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
    return False


def test_forgotten_pages_are_read_from_the_medium(tmp_path: Path) -> None:
    """Shows that a read-back after a sync does not come out of the page cache."""
    path = str(tmp_path / "file")
    with closing(FILES, FILES.create(path)) as fd:
        write_all(FILES, fd, bytes(1 << 20), 0)
        FILES.fsync(fd)
        buffer = [bytearray(4096)]
        try:
            assert os.preadv(fd, buffer, 0, os.RWF_NOWAIT) == 4096
        except OSError as error:
            pytest.skip(f"this file system does not say what is cached: {error}")
        if not drops_pages(tmp_path / "other"):
            pytest.skip("this file system keeps its pages: a read-back reads the cache")
        FILES.forget(fd)
        with pytest.raises(BlockingIOError):
            os.preadv(fd, buffer, 0, os.RWF_NOWAIT)
        assert read_into(FILES, fd, memoryview(bytearray(1 << 20)), 0) == 1 << 20
    FILES.forget(fd)  # closed: forgetting is a hint, and never an error


def test_what_is_cached_is_told(tmp_path: Path) -> None:
    """Shows that a file in the page cache is told from one that is not, and from one half in it;
    and that what can't be told is taken to be there."""
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    with closing(FILES, FILES.open(str(path))) as fd:
        assert FILES.cached(fd)
        os.fsync(fd)
        if drops_pages(tmp_path / "other"):
            os.posix_fadvise(fd, 0, 4 << 20, os.POSIX_FADV_DONTNEED)
            assert not FILES.cached(fd)
            FILES.forget(fd)
            assert not FILES.cached(fd)
            assert read_into(FILES, fd, memoryview(bytearray(16 << 20)), 0) == 16 << 20
            assert FILES.cached(fd)
    assert FILES.cached(fd)  # it is closed
    with closing(FILES, FILES.create(str(tmp_path / "empty"))) as fd:
        assert FILES.cached(fd)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EIO, "replace it"),
        (errno.EROFS, "read-write"),
        (errno.EACCES, "writable"),
        (errno.EOPNOTSUPP, "hard links"),
        (errno.EISDIR, "move it away"),
        (errno.ELOOP, "links lead in a circle"),
        (errno.EAGAIN, "try again"),
        (errno.EBUSY, "mend what the system reports"),
    ],
)
def test_a_failed_write_says_where_why_and_what_to_do(code: int, remedy: str) -> None:
    """Shows that a full disk and a broken one are told apart."""
    expected = rf"write it: /the/path: .*\({errno.errorcode[code]}\)\. What to do: .*{remedy}"
    with pytest.raises(SaveFailed, match=expected), writing("write it", "/the/path"):
        raise OSError(code, os.strerror(code))


def test_a_failed_read_tells_lost_bytes_from_a_busy_system() -> None:
    """Shows that running out of descriptors is not taken for damage."""
    for code, kind in ((errno.EIO, Damaged), (errno.ENOENT, Damaged), (errno.EMFILE, None)):
        told = pytest.raises(HandfastError, match="/the/path: can't be read")
        with told as found, reading("/the/path"):
            raise OSError(code, os.strerror(code))
        assert isinstance(found.value, Damaged) == (kind is Damaged)


def test_a_lack_of_memory_names_the_file(tmp_path: Path) -> None:
    """Shows that a file of a length that went wild is no bare MemoryError."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 1 << 43)
    with pytest.raises(
        HandfastError, match=r"file: can't be read: .* no memory.*What to do"
    ) as found:
        read_file(NoMemory(), str(path))
    assert not isinstance(found.value, Damaged)


class NoMemory(Posix):
    """A node on which a large file finds no room: also one that would lend it on credit."""

    def size(self, fd: int) -> int:
        if super().size(fd) > 1 << 40:
            raise MemoryError
        return super().size(fd)


def test_an_error_of_close_masks_no_other(tmp_path: Path) -> None:
    """Shows that the first error is the one that is told, and close's own is not lost."""
    path = str(tmp_path / "file")
    files = FaultyFiles(FILES, fail_at=1, error=errno.EIO, kinds=("close",))
    with pytest.raises(OSError, match="Input/output"), closing(files, files.create(path)):
        pass
    files = FaultyFiles(FILES, fail_at=1, error=errno.EIO, kinds=("close",))
    with pytest.raises(ZeroDivisionError), closing(files, files.open(path)):
        raise ZeroDivisionError


def test_directories_are_durable_in_their_parents(tmp_path: Path) -> None:
    """Shows that each level is synced, also one that somebody made and died."""
    files = FaultyFiles(FILES)
    make_directory(files, str(tmp_path / "a/b"))
    make_directory(files, str(tmp_path / "a/b"))
    synced = [call.path for call in files.calls if call.kind == "fsync_dir"]
    above = [str(path) for path in reversed(tmp_path.parents)]
    once = ["/", *above, str(tmp_path), str(tmp_path / "a")]  # "/" stands in itself
    assert synced == once * 2
    files.calls.clear()
    make_directory(files, str(tmp_path / "a/c"), above=str(tmp_path / "a"))
    assert [call.path for call in files.calls if call.kind == "fsync_dir"] == [str(tmp_path / "a")]


def test_a_mount_point_in_a_closed_directory_is_good_enough(tmp_path: Path) -> None:
    """Shows that a directory made by an operator where we can't read is used as it is."""
    for existed in (True, False):
        path = str(tmp_path / str(existed))
        files = FaultyFiles(
            FILES, fail_at=len(tmp_path.parents) + 2, error=errno.EACCES, kinds=("fsync_dir",)
        )
        if existed:
            FILES.mkdir(path)
            make_directory(files, path)
        else:
            with pytest.raises(PermissionError):
                make_directory(files, path)
        assert files.fired


def test_discarding_stops_at_what_will_not_go(tmp_path: Path) -> None:
    """Shows that a manifest that can't be unlinked keeps its data."""
    paths = [str(tmp_path / name) for name in ("manifest", "missing", "data")]
    for path in (paths[0], paths[2]):
        write_file(FILES, path, b"")
    discard(FaultyFiles(FILES, fail_at=1, error=errno.EROFS, kinds=("unlink",)), *paths)
    assert all(map(FILES.exists, (paths[0], paths[2])))
    discard(FILES, *paths)
    assert os.listdir(tmp_path) == []


def test_exists_tells_absence_from_trouble(tmp_path: Path) -> None:
    """Shows that a path that can't be looked at is not taken for a missing one."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert FILES.exists(str(file))
    assert not FILES.exists(str(file / "below"))
    assert not FILES.exists(str(tmp_path / "none"))
    with pytest.raises(OSError, match="too long"):
        FILES.exists(str(tmp_path / ("x" * 300)))


def test_faulty_files_record_count_and_crash(tmp_path: Path) -> None:
    """Shows the test tool itself: which call fails, what a crash leaves, what is recorded."""
    path = str(tmp_path / "file")
    files: Files = FaultyFiles(FILES)
    assert files.free_bytes(str(tmp_path)) > 0
    crashing = FaultyFiles(FILES, fail_at=2, kinds=("create", "pwrite"), after=True)
    with pytest.raises(Crash):
        write_file(crashing, path, b"data")
    assert crashing.fired
    assert [call.kind for call in crashing.calls] == ["create", "pwrite"]
    assert Path(path).read_bytes() == b"data"
    for late in (lambda: crashing.unlink(path), lambda: crashing.listdir(str(tmp_path))):
        with pytest.raises(Crash):
            late()
    seen: list[str] = []
    calling = FaultyFiles(FILES, fail_at=1, error=lambda: seen.append("now"), path="file")
    assert calling.exists(path)
    assert seen == ["now"]
    failing = FaultyFiles(FILES, fail_at=1, error=errno.EIO, after=True)
    with pytest.raises(OSError, match="Input/output"):
        failing.unlink(path)
    assert not Path(path).exists()
