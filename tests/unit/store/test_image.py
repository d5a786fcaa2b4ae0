"""Shows that an image is a safetensors file, laid out alike by all who plan it."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from handfast.errors import SaveFailed, Unstorable
from handfast.store import image
from handfast.store.image import BLOCK, DTYPES, LINE, Layout, TensorSpec, plan, tensor_bytes


def spec(path: str, dtype: str = "float32", shape: tuple[int, ...] = (2, 3)) -> TensorSpec:
    """A tensor that is stored whole."""
    zeros = (0,) * len(shape)
    return TensorSpec(path, dtype, shape, shape, zeros, torch.empty(shape, device="meta").stride())


def pattern(tensor: TensorSpec) -> bytes:
    """Bytes that belong to this tensor and are valid for every dtype, bool too."""
    seed = sum(tensor.path.encode())
    return bytes((seed + at) % 2 for at in range(tensor_bytes(tensor)))


def filled(layout: Layout) -> bytes:
    """A full image whose tensors hold their pattern."""
    return layout.header + b"".join(pattern(slot.spec) for slot in layout.slots)


EVERY_DTYPE = [
    spec(f"{dtype}/{'x'.join(map(str, shape))}", dtype, shape)
    for dtype in DTYPES
    for shape in [(), (0,), (5,), (2, 3), (4, 0, 2), (1, 1, 1, 7)]
]


def test_a_full_image_opens_with_the_safetensors_library(tmp_path: Path) -> None:
    """Every dtype, 0-d and empty tensors: same bytes, shapes and dtypes as were planned."""
    layout = plan(EVERY_DTYPE)
    file = tmp_path / "full.safetensors"
    file.write_bytes(filled(layout))
    with safe_open(str(file), "pt") as opened:
        assert opened.metadata() == {"format": "handfast image 1"}
        assert sorted(opened.keys()) == sorted(tensor.path for tensor in EVERY_DTYPE)
        for tensor in EVERY_DTYPE:
            read = opened.get_tensor(tensor.path)
            if DTYPES[tensor.dtype][1] is None:
                assert (read.dtype, read.shape) == (torch.uint8, (tensor_bytes(tensor),))
            else:
                assert (read.dtype, read.shape) == (getattr(torch, tensor.dtype), tensor.shape)
            raw = read.reshape(-1).view(torch.uint8) if read.numel() else torch.empty(0)
            assert bytes(raw.tolist()) == pattern(tensor)


def test_element_sizes_are_those_of_torch() -> None:
    """A wrong size would shift every tensor behind it."""
    assert {name: getattr(torch, name).itemsize for name in DTYPES} == {
        name: size for name, (size, _) in DTYPES.items()
    }


def test_all_tensors_are_aligned_to_their_elements() -> None:
    """Whole lines, then descending element size: from a block's boundary on that needs no gaps."""
    whole = [spec(f"{dtype}/whole", dtype, (64,)) for dtype in DTYPES]
    layout = plan([*EVERY_DTYPE, *whole])
    assert all(slot.start % DTYPES[slot.spec.dtype][0] == 0 for slot in layout.slots)
    sizes = [DTYPES[s.spec.dtype][0] for s in layout.slots if s.nbytes % LINE]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > len(DTYPES)


def test_a_counter_of_a_few_bytes_shifts_no_tensor_of_whole_lines() -> None:
    """Adam has one beside every pair of moments, BatchNorm in every layer (of 8 bytes)."""
    large = [spec(f"{at}/exp_avg", "float32", (64, 48)) for at in range(3)]
    small = [spec(f"{at}/step", "float32", ()) for at in range(3)]
    layout = plan([*large, *small, spec("0/num_batches_tracked", "int64", ())])
    starts = {slot.spec.path: slot.start for slot in layout.slots}
    assert all(starts[each.path] % LINE == 0 for each in large)


def test_order_is_by_size_then_path_whatever_the_order_of_asking() -> None:
    """Ranks that list their tensors in another order still write the same image."""
    assert plan(EVERY_DTYPE) == plan(EVERY_DTYPE[::-1])
    layout = plan([spec("b"), spec("a"), spec("c", "float64"), spec("d", "int8")])
    assert [slot.spec.path for slot in layout.slots] == ["c", "a", "b", "d"]


def test_what_stays_as_it_is_lies_behind_what_changes_among_odd_lengths() -> None:
    """Within one element size, so that all stay aligned, and few chunks have some of both."""
    specs = [spec("b"), spec("a"), spec("f"), spec("c", "float64"), spec("e", "float64")]
    layout = plan(specs, still={"a", "c", "not/there"})
    assert [slot.spec.path for slot in layout.slots] == ["e", "c", "b", "f", "a"]


def test_what_stays_as_it_is_leads_where_whole_lines_are() -> None:
    """So all that changes lies in one run: frozen, trained, trained of odd lengths, frozen."""
    whole = [spec(path, "float32", (16,)) for path in "abc"]
    specs = [*whole, spec("h", "int8", (128,)), *(spec(path) for path in "def")]
    layout = plan(specs, still={"b", "e", "h"})
    assert "".join(slot.spec.path for slot in layout.slots) == "bhacdfe"


@pytest.mark.parametrize("count", [0, 1, 40, 41, 42, 43, 200])
def test_header_fills_whole_blocks_and_slots_tile_the_rest(count: int) -> None:
    """Around the size where the header grows by a block, too."""
    layout = plan([spec(f"layer.{at:04}", "int8", (at,)) for at in range(count)])
    (size,) = struct.unpack("<Q", layout.header[:8])
    assert len(layout.header) == size + 8
    assert len(layout.header) % BLOCK == 0
    assert not layout.header[8:].rstrip(b" ").endswith(b" ")
    assert len(json.loads(layout.header[8:])) == count + 1
    end = len(layout.header)
    for slot in layout.slots:
        assert slot.start == end
        end += slot.nbytes
    assert layout.nbytes == end
    assert layout.padded == end + -end % BLOCK


def test_a_sharded_tensor_is_stored_with_its_local_shape() -> None:
    """The global shape and the offset go to the manifest, not to the safetensors header."""
    shard = TensorSpec("w", "bfloat16", (2, 4), (6, 4), (4, 0), (4, 1))
    (slot,) = plan([shard]).slots
    assert (slot.spec, slot.nbytes) == (shard, 16)
    past_the_end = TensorSpec("w", "bfloat16", (0, 4), (6, 4), (6, 0), (4, 1))  # FSDP, uneven
    assert plan([past_the_end]).slots[0].nbytes == 0


def test_paths_of_any_alphabet_survive_the_header(tmp_path: Path) -> None:
    """Quotes, control characters and non-ASCII in a name must not break the JSON."""
    paths = ['a"b', "a\\b", "a\nb", "ä/ß", "模型", "\U0001f600", "a\0b", " "]
    file = tmp_path / "odd.safetensors"
    file.write_bytes(filled(plan([spec(path) for path in paths])))
    with safe_open(str(file), "pt") as opened:
        assert sorted(opened.keys()) == sorted(paths)


def test_two_tensors_of_one_path_are_an_error() -> None:
    """Else one would overwrite the other in silence."""
    with pytest.raises(ValueError, match="model/w: two tensors have this path"):
        plan([spec("model/w"), spec("model/w", "int8")])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (spec(""), "choose another name"),
        (spec("__metadata__"), "choose another name"),
        (spec("\ud800"), "no valid Unicode"),
        (TensorSpec("w", "int8", (2,), (2,), (0, 0), (1,)), "need one length"),
        (TensorSpec("w", "int8", (2,), (2,), (0,), ()), "need one length"),
        (TensorSpec("w", "int8", (-2,), (2,), (0,), (1,)), "negative"),
        (TensorSpec("w", "int8", (2,), (2,), (0,), (-1,)), "negative"),
        (TensorSpec("w", "int8", (2,), (3,), (2,), (1,)), "lies outside"),
        (TensorSpec("w", "int8", (2,), (2,), (1,), (1,)), "lies outside"),
        (TensorSpec("w", "int8", *[(1,) * 65] * 2, (0,) * 65, (1,) * 65), "at most 64"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(bad: TensorSpec, says: str) -> None:
    """A wrong shape must fail before anything is written."""
    with pytest.raises(ValueError, match=says):
        plan([bad])


def test_an_unknown_dtype_is_unstorable_by_name() -> None:
    """The error names the tensor, and the dtypes that can be stored."""
    with pytest.raises(Unstorable, match="model/q") as caught:
        plan([spec("model/q", "qint8")])
    assert caught.value.path == "model/q"
    assert "bfloat16" in str(caught.value)


def test_a_header_that_safetensors_would_not_read_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error counts the tensors; one block less is still fine."""
    specs = [spec(f"layer.{at:05}") for at in range(1000)]
    size = len(plan(specs).header) - 8
    monkeypatch.setattr(image, "HEADER_LIMIT", size)
    plan(specs)
    monkeypatch.setattr(image, "HEADER_LIMIT", size - 1)
    with pytest.raises(SaveFailed, match="1,000 tensors"):
        plan(specs)


def test_the_limit_is_the_one_of_the_library(tmp_path: Path) -> None:
    """A header of 100,000,000 bytes opens, a block more does not."""
    file = tmp_path / "header.safetensors"
    for size, opens in [(image.HEADER_LIMIT, True), (image.HEADER_LIMIT + 8, False)]:
        file.write_bytes(struct.pack("<Q", size) + b"{}".ljust(size))
        if opens:
            with safe_open(str(file), "pt") as opened:
                assert list(opened.keys()) == []
        else:
            with pytest.raises(SafetensorError, match="header too large"):
                safe_open(str(file), "pt")
