"""Shows that bytes arrive whole, by whichever way they go, and that the first error stops all."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import xxhash

from handfast.store.bulk import Count, Held, Scratch, Span, Tap, draw, pour, share_out, tap
from handfast.store.files import Files, Posix, closing
from handfast.store.image import BLOCK
from handfast.testing.faults import FaultyFiles
from handfast.testing.powerloss import Disk

MEBI = 1 << 20


def picture(nbytes: int, aligned: bool = True) -> memoryview:
    """Random bytes, at the beginning of a block or just not."""
    room = memoryview(mmap.mmap(-1, nbytes + BLOCK))
    view = room[:nbytes] if aligned else room[8 : nbytes + 8]
    view[:] = os.urandom(nbytes)
    return view


def spans(nbytes: int, step: int = MEBI) -> list[Span]:
    return [Span(at, min(at + step, nbytes), at) for at in range(0, nbytes, step)]


class Refusing(Posix):
    """A file system without direct I/O, without room that can be promised, or with both."""

    def __init__(self, direct: bool, allocates: bool) -> None:
        self.can, self.allocates = direct, allocates

    def direct(self, fd: int, on: bool) -> bool:
        return super().direct(fd, on) if self.can else False

    def allocate(self, fd: int, nbytes: int) -> None:
        if self.allocates:
            super().allocate(fd, nbytes)


def poured(files: Files, path: str, image: memoryview, parts: list[Span]) -> bytes:
    seen: list[tuple[int, int]] = []
    with closing(files, files.create(path)) as fd:
        pour(files, fd, Held(image), parts, lambda s, block: seen.append((s.start, len(block))))
        files.fsync(fd)
    assert sorted(seen) == [(span.start, span.end - span.start) for span in sorted(parts)]
    return xxhash.xxh3_128_digest(Path(path).read_bytes())


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("allocates", [True, False])
@pytest.mark.parametrize("nbytes", [1, BLOCK - 1, BLOCK, 5 * MEBI, 5 * MEBI + 1, 9 * MEBI + 5000])
def test_what_is_poured_is_what_is_found(
    nbytes: int, allocates: bool, direct: bool, aligned: bool, tmp_path: Path
) -> None:
    """Shows that a file holds an image's bytes and no more: whatever its length, with or without
    the page cache, from memory that begins on a block's boundary or not."""
    image = picture(nbytes, aligned)
    path = tmp_path / "file"
    found = poured(Refusing(direct, allocates), str(path), image, spans(nbytes))
    assert found == xxhash.xxh3_128_digest(image)
    assert path.stat().st_size == nbytes


def test_spans_may_lie_elsewhere_in_the_file(tmp_path: Path) -> None:
    """Shows that what a delta writes, some spans back to back, is where it is said to be."""
    image = picture(7 * MEBI + 100)
    chosen = [Span(2 * MEBI, 4 * MEBI, 0), Span(7 * MEBI, 7 * MEBI + 100, 2 * MEBI)]
    poured(Posix(), str(tmp_path / "file"), image, chosen)
    wanted = bytes(image[2 * MEBI : 4 * MEBI]) + bytes(image[7 * MEBI :])
    assert (tmp_path / "file").read_bytes() == wanted


def test_whole_blocks_are_not_in_the_page_cache(tmp_path: Path) -> None:
    """Shows that an image pushes nothing out of memory that the training has there."""
    files, path, image = Posix(), str(tmp_path / "file"), picture(2 * MEBI + 1)
    with closing(files, files.create(path)) as fd:
        if not files.direct(fd, True):
            pytest.skip("this file system has no direct I/O")
        files.direct(fd, False)
        pour(files, fd, Held(image), spans(len(image)), lambda *_: None)
        files.fsync(fd)
        try:
            os.preadv(fd, [bytearray(1)], 2 * MEBI, os.RWF_NOWAIT)
        except OSError as error:
            pytest.skip(f"this file system does not say what is cached: {error}")
        with pytest.raises(BlockingIOError):
            os.preadv(fd, [bytearray(BLOCK)], 0, os.RWF_NOWAIT)


def test_a_fault_of_one_thread_is_told_and_stops_the_others() -> None:
    """Shows that no thread goes on for long once one has failed, and none is left behind."""
    begun: list[int] = []
    failed = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 3:
            failed.set()
            raise OSError(errno.EIO, "the medium")
        failed.wait(30)

    threads = threading.active_count()
    with pytest.raises(OSError, match="the medium"):
        share_out(work, range(1000), 4)
    assert len(begun) < 1000
    assert threading.active_count() == threads


def test_one_lane_goes_in_order() -> None:
    """Shows that where order counts, as where each call may be made to fail, there is one."""
    seen: list[int] = []
    share_out(seen.append, range(100), 1)
    assert seen == list(range(100))


def test_every_error_of_a_pour_is_raised(tmp_path: Path) -> None:
    """Shows that no failed call goes unnoticed, whichever it is."""
    image = picture(3 * MEBI + 1)
    for kinds in (("pwrite",), ("allocate",)):
        files = FaultyFiles(Posix(), 1, errno.ENOSPC, kinds=kinds)
        with (
            pytest.raises(OSError, match="No space"),
            closing(files, files.create(str(tmp_path / kinds[0]))) as fd,
        ):
            pour(files, fd, Held(image), spans(len(image)), lambda *_: None)


def test_memory_that_is_refused_half_way_is_written_all_the_same(tmp_path: Path) -> None:
    """Shows that a file system which takes some blocks past its cache, and then no more, has all
    bytes in the end."""

    class Fickle(Posix):
        lanes = 1
        calls = 0
        now = False

        def direct(self, fd: int, on: bool) -> bool:
            self.now = super().direct(fd, on)
            return on

        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            self.calls += 1
            if self.now and self.calls > 2:
                raise OSError(errno.EINVAL, "not so")
            return super().pwrite(fd, data, offset)

    image = picture(5 * MEBI + 10)
    found = poured(Fickle(), str(tmp_path / "file"), image, spans(len(image)))
    assert found == xxhash.xxh3_128_digest(image)


class Witness(Posix):
    """Notes by which descriptor bytes were read; may refuse to read past the cache."""

    def __init__(self, has: bool, refuses: bool = False) -> None:
        self.has, self.refuses = has, refuses
        self.read: list[tuple[bool, int]] = []

    def cached(self, fd: int) -> bool:
        return self.has

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        if direct and self.refuses:
            raise OSError(errno.EINVAL, "not from here")
        self.read.append((direct, len(into)))
        return super().pread(fd, into, offset)


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize(
    ("has", "how", "direct"),
    [
        (False, {}, False),
        (False, {"past": True}, True),
        (True, {"past": True}, False),
        (True, {"medium": True}, True),
        (True, {"past": True, "medium": True}, True),
    ],
)
def test_what_the_cache_has_not_is_read_past_it(
    has: bool, how: dict[str, bool], direct: bool, refuses: bool, tmp_path: Path
) -> None:
    """Whole blocks are, if that was asked for; all bytes arrive, also where that is refused. What
    is to be the medium's is never the cache's, which can't drop what somebody has mapped."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(data := os.urandom(MEBI + 100))
        os.fsync(file.fileno())
    files = Witness(has, refuses)
    if direct and not can_go_past(path):
        pytest.skip("this file system reads nothing past its cache")
    into = picture(len(data))
    with ExitStack() as stack:
        source = tap(files, stack, str(path), **how)
        assert (source.past is not None) is direct
        assert draw(files, source, into, 0) == len(data)
        assert draw(files, source, into[: 2 * BLOCK], len(data)) == 0
    assert into == data
    if direct and not refuses:
        assert files.read[:2] == [(True, MEBI), (False, 100)]
    else:
        assert not any(past for past, _ in files.read)


def can_go_past(path: Path) -> bool:
    """Whether the system itself reads past its cache here; asked without the code tested."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_an_error_of_the_medium_is_none_of_the_way(tmp_path: Path) -> None:
    """Shows that a read which fails past the cache is not tried again through it."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * BLOCK))
    files = FaultyFiles(Witness(has=False), 1, errno.EIO, kinds=("pread",))
    with ExitStack() as stack:
        fd = stack.enter_context(closing(files, files.open(str(path))))
        with pytest.raises(OSError, match="Input/output"):
            draw(files, Tap(str(path), fd, fd), picture(2 * BLOCK), 0)
    assert [call.kind for call in files.calls].count("pread") == 1


def test_what_is_allocated_is_durable_only_once_it_is_synced() -> None:
    """Shows that the laboratory's disk counts a length apart from the bytes that it covers."""
    disk = Disk("/disk")
    fd = disk.create("/disk/file")
    disk.fsync_dir("/disk")
    disk.allocate(fd, 1024)
    assert disk.size(fd) == 1024

    def left() -> set[bytes]:
        return {disk.cut(random.Random(n)).tree()["/disk/file"] for n in range(64)}

    assert left() == {b"", bytes(1024), b"\xa5" * 1024}
    disk.fsync(fd)
    assert left() == {bytes(1024)}


def test_scratch_is_made_once_a_thread() -> None:
    """Shows that what is lent out twice at once is not the same, and is used again afterwards."""
    scratch = Scratch(2 * BLOCK)
    with scratch.lend() as one, scratch.lend() as other:
        one[:4] = b"mine"
        other[:4] = b"your"
        assert bytes(one[:4]) == b"mine"
        assert (len(one), len(other)) == (2 * BLOCK, 2 * BLOCK)
    with scratch.lend() as again:
        assert bytes(again[:4]) in (b"mine", b"your")


def test_progress_rises_to_the_whole() -> None:
    """Shows that bytes are counted once, whichever thread has moved them."""
    told: list[tuple[int, int]] = []
    count = Count(100 * 7, lambda done, total: told.append((done, total)))
    share_out(lambda _: count.add(7), range(100), 4)
    assert told == [(7 * (n + 1), 700) for n in range(100)]
