"""Shows that values come out of files bit for bit, in blocks, whatever strides they have."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchkit import raw

from handfast.audit import extent
from handfast.audit.extent import SIZES, Extent, Held, Lost, Range, Reader, dense
from handfast.errors import Damaged, FormatError, HandfastError

DTYPES = sorted(name for name in SIZES if isinstance(getattr(torch, name, None), torch.dtype))


def joined(values: Extent, most: int = 1 << 20) -> bytes:
    """All bytes of some values; each block is within what was asked for, and of whole elements."""
    found = b""
    for block in values.blocks(most):
        assert block.readonly
        assert 0 < len(block) <= most * SIZES[values.dtype]
        assert len(block) % SIZES[values.dtype] == 0
        found += block
    return found


# Extents

BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@given(
    st.sampled_from(sorted(BY_SIZE)),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=5),
    st.integers(0, 6),
    st.integers(1, 40),
    st.booleans(),
)
def test_any_strides_are_put_in_order(
    size: int, dims: list[tuple[int, int]], offset: int, most: int, tight: bool
) -> None:
    """Shows it for transposed, expanded and overlapping tensors against torch itself.

    The same where little may be read at a time (``tight``), so that each piece is a read.
    """
    shape, stride = tuple(n for n, _ in dims), tuple(step for _, step in dims)
    numel = offset + 1 + sum((n - 1) * step for n, step in dims if n)
    storage = torch.arange(numel * size, dtype=torch.int64).to(torch.uint8).view(BY_SIZE[size])
    expected = storage.as_strided(shape, stride, offset)
    dtype = str(BY_SIZE[size]).removeprefix("torch.")
    values = Extent(Held(raw(storage), "held"), dtype, shape, stride, offset)
    with pytest.MonkeyPatch.context() as patch:
        if tight:
            patch.setattr(extent, "WHOLE", 0)
            patch.setattr(extent, "ROOM", 3 * size)
            patch.setattr(extent, "PAGE", 2 * size)
        assert joined(values, most) == raw(expected)


class Counted(Held):
    """Bytes in memory, and how many of them were read, and how often."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, "counted")
        self.reads: list[int] = []

    def read(self, into: memoryview, at: int) -> None:
        """Count, and read."""
        self.reads.append(len(into))
        super().read(into, at)


def test_a_dense_tensor_is_read_straight_into_its_block() -> None:
    """Shows that every byte is read once, a block at a time; dimensions of one do not matter."""
    source = Counted(bytes(range(256)) * 100)
    shape, stride = (1, 80, 1, 40), (7, 40, 99, 1)
    assert joined(Extent(source, "int64", shape, stride), 1000) == bytes(range(256)) * 100
    assert source.reads == [8000, 8000, 8000, 1600]


def test_a_large_transposed_tensor_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that what is read at a time stays small, and gaps that are long are not read."""
    monkeypatch.setattr(extent, "WHOLE", 1 << 12)
    monkeypatch.setattr(extent, "ROOM", 1 << 12)
    matrix = torch.arange(300 * 4000, dtype=torch.int32).reshape(300, 4000)
    source = Counted(raw(matrix))
    assert joined(Extent(source, "int32", (4000, 300), (1, 4000)), 30_000) == raw(matrix.t())
    assert max(source.reads) <= 1 << 12
    assert len(source.reads) == 40 * 300
    assert sum(source.reads) == source.nbytes
    source = Counted(raw(matrix))
    column = Extent(source, "int32", (300,), (4000,), 5)
    assert joined(column, 100) == raw(matrix[:, 5])
    assert sum(source.reads) == 300 * 4
    source = Counted(raw(matrix))
    every_third = Extent(source, "int32", (400_000,), (3,))
    assert joined(every_third, 50_000) == raw(matrix.reshape(-1)[::3])
    assert sum(source.reads) < 1.01 * source.nbytes


def test_a_few_elements_far_apart_are_read_by_themselves() -> None:
    """Shows that a storage is not read whole for two of its elements."""
    source = Counted(bytes(4 << 20))
    joined(Extent(source, "int32", (2,), ((1 << 20) - 1,)))
    assert sum(source.reads) == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_those_of_torch(dtype: str) -> None:
    """Shows it for each dtype that both know."""
    assert SIZES[dtype] == getattr(torch, dtype).itemsize


def test_no_dtype_of_torch_is_overlooked() -> None:
    """Shows that only those are left out of which several elements share a byte."""
    known = {str(kind).removeprefix("torch.") for kind in vars(torch).values()
             if isinstance(kind, torch.dtype)}  # fmt: skip
    assert known - set(SIZES) == {"quint4x2", "quint2x4"}


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32", "float64", "complex64",
                                   "complex128", "complex32"])  # fmt: skip
def test_numbers_of_big_endian_machines_are_turned_round(dtype: str) -> None:
    """Shows it against torch's own way, which keeps the halves of a complex number in order."""
    storage = torch.arange(160, dtype=torch.uint8).untyped_storage()
    data = bytes(storage)
    storage.byteswap(getattr(torch, dtype))
    numel = 160 // SIZES[dtype]
    values = Extent(Held(data, "held"), dtype, (numel,), (1,), 0, swapped=True)
    assert joined(values, 3) == bytes(storage)


def test_tied_values_are_equal_and_others_are_not() -> None:
    """Shows that a place in a source, a shape and a dtype are what makes values the same."""
    source = Held(bytes(100), "held")
    one = Extent(source, "int8", (5,), (1,), 3)
    assert {one, Extent(source, "int8", (5,), (1,), 3)} == {one}
    assert one not in (
        Extent(source, "int8", (5,), (1,), 4),
        Extent(source, "uint8", (5,), (1,), 3),
        Extent(source, "int8", (5, 1), (1, 1), 3),
        Extent(Held(bytes(100), "held"), "int8", (5,), (1,), 3),
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "stride", "offset", "kind", "says"),
    [
        ("quint4x2", (1,), (1,), 0, FormatError, "dtype 'quint4x2', which is not known"),
        ("int8", (1, 2), (1,), 0, FormatError, "that no tensor has"),
        ("int8", (1,) * 65, (1,) * 65, 0, FormatError, "that no tensor has"),
        ("int8", (-1,), (1,), 0, FormatError, "that no tensor has"),
        ("int8", (1,), (1,), -1, FormatError, "that no tensor has"),
        ("int8", (1 << 63,), (0,), 0, FormatError, "that no tensor has"),
        ("int8", (1 << 40,), (0,), 0, FormatError, "repeats its values"),
        ("int8", (11,), (1,), 0, Damaged, "ends at byte 11, but there are 10 bytes"),
        ("int16", (2, 2), (3, 1), 1, Damaged, "ends at byte 12, but there are 10 bytes"),
        ("int8", (1 << 62, 1 << 62), (1, 1), 0, Damaged, "but there are 10 bytes"),
    ],
)  # fmt: skip
def test_what_no_tensor_is_can_not_be_read(
    dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int,
    kind: type[Exception], says: str,
) -> None:  # fmt: skip
    """Shows that it is refused before anything is read, by the name of its source."""
    values = Extent(Counted(bytes(10)), dtype, shape, stride, offset)
    with pytest.raises(kind, match=rf"^counted: .*{says}.*What to do"):
        values.check()
    with pytest.raises(kind, match=says):
        next(values.blocks(5))


def test_empty_values_have_no_blocks_and_a_block_has_an_element_at_least() -> None:
    """Shows it for a source without a byte, and for one dimension of none among others."""
    assert joined(Extent(Held(b"", "held"), "float32", (0,), (1,))) == b""
    assert joined(Extent(Held(b"", "held"), "float32", (5, 0, 1 << 40), (1, 1, 1), 0)) == b""
    with pytest.raises(ValueError, match="blocks of 0 elements"):
        next(Extent(Held(b"12", "held"), "int8", (2,), (1,)).blocks(0))


@given(st.lists(st.integers(0, 4), max_size=4))
def test_dense_strides_are_those_of_torch(shape: list[int]) -> None:
    """Shows it for any shape."""
    assert dense(shape) == torch.empty(shape).stride()


# Sources


@pytest.fixture
def reader() -> Iterator[Reader]:
    """One that keeps two files open."""
    with Reader(2) as made:
        yield made


def put(path: Path, data: bytes) -> str:
    """Write a file."""
    path.write_bytes(data)
    return str(path)


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def test_a_range_is_a_part_of_a_file(tmp_path: Path, reader: Reader) -> None:
    """Shows that it is read where it lies, and not beyond."""
    path = put(tmp_path / "a", bytes(range(100)))
    part = Range(reader, path, 10, 20, f"{path}: part")
    assert joined(Extent(part, "int16", (5,), (2,)), 2) == bytes(
        byte for at in range(10, 30, 4) for byte in (at, at + 1)
    )
    with pytest.raises(Damaged, match="a: part: bytes 15 to 21 are asked for, and it has 20"):
        part.read(memoryview(bytearray(6)), 15)
    with pytest.raises(Damaged, match="held: bytes -1 to 0"):
        Held(b"x", "held").read(memoryview(bytearray(1)), -1)


def test_what_is_lost_says_why() -> None:
    """Shows that values of it exist, and can't be read."""
    values = Extent(Lost(8, Damaged("x.pt: data/1 is missing"), "x.pt: data/1"), "int8", (8,), (1,))
    values.check()
    with pytest.raises(Damaged, match=r"x\.pt: data/1 is missing"):
        joined(values)


def test_few_files_are_open_at_a_time(tmp_path: Path, reader: Reader) -> None:
    """Shows it while many are read in turn, and by several threads; none is left open."""
    paths = [put(tmp_path / str(n), bytes([n]) * 10_000) for n in range(20)]
    before, failed = open_files(), []

    def read(turn: int) -> None:
        for n in range(200):
            which = (n * turn) % len(paths)
            if reader.bytes(paths[which], n, 50) != bytes([which]) * 50:
                failed.append(which)

    threads = [threading.Thread(target=read, args=(turn,)) for turn in (1, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    reader.bytes(paths[0], 0, 1)
    assert open_files() <= before + 2
    reader.close()
    assert open_files() == before


def test_a_file_that_is_in_use_is_not_closed(tmp_path: Path, reader: Reader) -> None:
    """Shows that what a thread reads from stays open while others want more than may be open."""
    paths = [put(tmp_path / str(n), b"x") for n in range(5)]
    with reader._lend(paths[0]) as fd:
        for path in paths[1:]:
            reader.bytes(path, 0, 1)
        assert os.pread(fd, 1, 0) == b"x"


def test_a_file_that_is_too_short_is_damaged(tmp_path: Path, reader: Reader) -> None:
    """Shows the byte where it ends, and how many are missing."""
    path = put(tmp_path / "a", bytes(500))
    values = Extent(Range(reader, path, 0, 1000, path), "int8", (1000,), (1,))
    blocks = values.blocks(400)
    next(blocks)
    with pytest.raises(Damaged, match=r"a: byte 500: the file ends there, and 300 bytes more"):
        next(blocks)


def test_a_file_that_is_cut_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, reader: Reader
) -> None:
    """Shows that somebody may be writing it, and the way out."""
    path = put(tmp_path / "a", bytes(1000))
    assert reader.bytes(path, 0, 1000) == bytes(1000)
    os.truncate(path, 500)
    with pytest.raises(HandfastError, match="while it was audited") as raised:
        reader.bytes(path, 0, 1000)
    assert not isinstance(raised.value, FormatError)


def test_a_file_that_was_replaced_is_not_taken_for_the_old_one(
    tmp_path: Path, reader: Reader
) -> None:
    """Shows it for one that was replaced by one of equal length, or written to."""
    for change in ("replace", "write"):
        path = put(tmp_path / change, b"old")
        other = put(tmp_path / "other", b"new")
        assert reader.bytes(path, 0, 3) == b"old"
        assert reader.changed() == []
        if change == "replace":
            os.rename(other, path)
            assert reader.bytes(path, 0, 3) == b"old"  # it is still open
        else:
            Path(path).write_bytes(b"newer")
        assert reader.changed() == [path]
        reader.close()
        with pytest.raises(HandfastError, match="was written or replaced while it was audited"):
            reader.bytes(path, 0, 3)
        reader = Reader(2)
    assert reader.changed() == []
    assert reader.bytes(path, 0, 3) == b"new"
    os.unlink(path)
    assert reader.changed() == [path]


def test_files_that_are_gone_or_none_are_damaged(tmp_path: Path, reader: Reader) -> None:
    """Shows it for a missing file and a directory; the error names it and what to do."""
    (tmp_path / "directory").mkdir()
    for name, says in (("missing", "ENOENT"), ("directory", "ENXIO")):
        with pytest.raises(Damaged, match=rf"{name}: can't be read: .*{says}.*What to do"):
            reader.size(str(tmp_path / name))


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, Damaged), (errno.EACCES, HandfastError)])
def test_errors_of_the_system_are_told(
    code: int,
    kind: type[Exception],
    tmp_path: Path,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shows that bytes that the medium can't give are damaged, and others only can't be read."""
    path = put(tmp_path / "a", b"x")

    def fails(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(extent._FILES, "pread", fails)
    with pytest.raises(kind, match=f"a: can't be read: .*{errno.errorcode[code]}") as raised:
        reader.bytes(path, 0, 1)
    assert type(raised.value) is kind
