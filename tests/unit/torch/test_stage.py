"""Shows that what is staged is the state at that moment, bit for bit, whatever its dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from statekit import Snapshot, same_bytes, train
from torch import Tensor, nn

from handfast.store.image import plan
from handfast.torch import stage as stage_module
from handfast.torch.capture import capture
from handfast.torch.stage import Canvas, map_image, stage
from handfast.torch.types import TORCH_DTYPES

BASE = torch.arange(120, dtype=torch.uint8)

SHAPES = {
    "scalar": lambda t: t[0],
    "empty": lambda t: t[:0],
    "empty rows": lambda t: t[:0].reshape(3, 0),
    "flat": lambda t: t[:6],
    "turned": lambda t: t[:6].reshape(2, 3).t(),
    "every other": lambda t: t[:6:2],
    "channels last": lambda t: t[:6].reshape(1, 3, 1, 2).to(memory_format=torch.channels_last),
    "expanded": lambda t: t[:2].reshape(2, 1).expand(2, 3),
}


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Seven or more values of a dtype, some of them NaN or infinite where it has such."""
    if dtype == torch.bool:
        return BASE % 3 == 0
    return BASE.repeat(2).flip(0)[: 15 * dtype.itemsize].view(dtype)


def zeros(like: torch.Tensor) -> torch.Tensor:
    """As `zeros_like`, for dtypes too that torch can't fill."""
    made = torch.empty_like(like)
    made.untyped_storage().fill_(0)
    return made


@pytest.mark.filterwarnings("ignore:ComplexHalf support")  # experimental, and used
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(name: str, shape: str) -> None:
    """fp8, bf16, complex, unsigned, 0-d, empty, strided: nothing is cast on the way."""
    tensor = SHAPES[shape](sample(TORCH_DTYPES[name]))
    saved = Snapshot({"t": tensor, "kept": {"t": tensor.clone()}})
    live = zeros(tensor)
    if shape == "expanded":
        live = live[:, :1].clone().expand(2, 3)
    box = {"t": zeros(tensor)}
    saved.restore({"t": live, "kept": box})
    assert same_bytes(live, tensor)
    assert same_bytes(box["t"], tensor)


@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.randoms(use_true_random=False),
    st.sampled_from(["float32", "bfloat16", "complex64"]),
)
def test_strides_of_any_order_come_back(shape: list[int], order: object, name: str) -> None:
    """A law: whatever the order of the dimensions in memory, values and order are kept."""
    dims = list(range(len(shape)))
    order.shuffle(dims)
    tensor = torch.randn(shape).to(TORCH_DTYPES[name]).permute(dims)
    box: dict[str, torch.Tensor] = {}
    Snapshot({"box": {"t": tensor}}).restore({"box": box})
    assert same_bytes(box["t"], tensor)
    if tensor.numel():
        sizes = tensor.shape
        kept = [
            (a, b)
            for a, b, n in zip(box["t"].stride(), tensor.stride(), sizes, strict=True)
            if n > 1
        ]
        assert all(one == other for one, other in kept)


large = st.integers(-200, 200).map(lambda odd: stage_module.LARGE + odd)


@given(
    st.lists(st.tuples(large, st.sampled_from(["uint8", "int16", "float32"])), max_size=5),
    st.integers(0, 2),
    st.sampled_from([1, 2, 3]),
)
def test_large_tensors_come_whole_wherever_they_begin_and_end(
    sizes: list[tuple[int, str]], skip: int, threads: int
) -> None:
    """A law: every byte of them is staged, from memory that begins anywhere; and torch is given
    whole cache lines, as many for each of its threads: what is odd at the ends is moved besides."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state = {}
        for number, (nbytes, name) in enumerate(sizes):
            dtype = TORCH_DTYPES[name]
            count = nbytes // dtype.itemsize
            bits = torch.randint(0, 256, ((count + skip) * dtype.itemsize,), dtype=torch.uint8)
            state[str(number)] = bits.view(dtype)[skip:]
        captured = capture({"box": state}, rng=False)
        layout = plan(captured.specs)
        buffer = bytearray(layout.padded)
        canvas = Canvas(layout.slots, buffer)
        stage(captured, canvas)
        views = map_image(layout.slots, buffer)
        assert all(same_bytes(views[f"box/{key}"], value) for key, value in state.items())
        for _, part, view in canvas.plan(captured).views:
            if part != stage_module.ALL:
                assert view.data_ptr() % 64 == view.numel() % (64 * threads) == 0
                assert view.numel() > stage_module.LARGE - 200 - 64 * (threads + 1)
    finally:
        torch.set_num_threads(before)


class Proud(torch.Tensor):
    """A tensor that is asked before torch does anything with it, and does not let itself be cut."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.as_strided:
            raise TypeError("not by strides")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_large_tensor_with_ways_of_its_own_is_copied_whole() -> None:
    tensor = torch.rand(100_001).as_subclass(Proud)
    captured = capture({"box": {"small": torch.ones(1), "large": tensor}}, rng=False)
    layout = plan(captured.specs)
    buffer = bytearray(layout.padded)
    stage(captured, Canvas(layout.slots, buffer))
    views = map_image(layout.slots, buffer)
    assert same_bytes(views["box/large"], tensor.as_subclass(torch.Tensor))


def test_an_image_that_was_planned_in_inference_mode_serves_outside_of_it() -> None:
    state = {"box": {"small": torch.ones(3), "large": torch.rand(200_001)}}
    captured = capture(state, rng=False)
    layout = plan(captured.specs)
    buffer = bytearray(layout.padded)
    canvas = Canvas(layout.slots, buffer)
    with torch.inference_mode():
        stage(captured, canvas)
    state["box"]["large"].add_(1)
    stage(capture(state, rng=False, previous=captured), canvas)
    assert same_bytes(map_image(layout.slots, buffer)["box/large"], state["box"]["large"])


def test_an_image_of_a_model_opens_with_safetensors() -> None:
    """Nobody is locked in."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    saved = Snapshot({"model": model})
    layout = plan(saved.captured.specs)
    saved.buffer[: len(layout.header)] = layout.header
    read = load(bytes(saved.buffer[: layout.nbytes]))
    assert {k: v.tolist() for k, v in read.items()} == {
        f"model/{k}": v.tolist() for k, v in model.state_dict().items()
    }


def test_training_after_the_stage_is_not_seen() -> None:
    """pytorch#144657 (CPU tensors) and nvidia-resiliency-ext#376 (the optimizer's step)."""
    model = nn.Linear(4, 4)
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt, steps=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saved = Snapshot({"model": model, "opt": opt})
    image = bytes(saved.buffer)
    train(model, opt, steps=3)
    assert bytes(saved.buffer) == image
    assert saved.views["opt/state/weight/step"] == 2
    assert all(same_bytes(saved.views[f"model/{key}"], value) for key, value in before.items())


def test_one_map_serves_many_stages() -> None:
    """Saves reuse the memory and its views while the structure stays."""
    model = nn.Linear(4, 4)
    saved = Snapshot({"model": model})
    train(model, torch.optim.SGD(model.parameters(), lr=1.0))
    again = capture({"model": model}, previous=saved.captured)
    stage(again, saved.canvas).wait()
    assert same_bytes(saved.views["model/weight"], model.weight)


def test_a_short_buffer_is_refused() -> None:
    """A map of another layout's memory would read and write past its end."""
    layout = plan(capture({"t": torch.ones(5000)}).specs)
    for make in (map_image, Canvas):
        with pytest.raises(ValueError, match="t: its slot ends at byte"):
            make(layout.slots, bytearray(layout.nbytes - 1))


def test_conjugated_and_negated_views_are_stored_as_they_look() -> None:
    """Their bits in memory are not their values."""
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    saved = Snapshot({"conj": tensor.conj(), "imag": tensor.conj().imag})
    assert saved.views["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert saved.views["imag"].tolist() == [-2.0, 4.0]


class Runtime:
    """Stands for the CUDA runtime, where there is no device: it only counts what is registered."""

    def __init__(self, answer: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.answer = answer

    def cudaHostRegister(self, start: int, size: int, _flags: int) -> int:  # noqa: N802 - its name
        if not self.answer:
            self.pinned[start] = size
        return self.answer

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802 - its name
        del self.pinned[start]
        return 0


@pytest.mark.parametrize("answer", [0, 2], ids=["pinned", "refused"])
def test_an_image_is_pinned_once_where_cuda_is_in_use_and_let_go_with_its_memory(
    monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """Not before CUDA was started, which a save must not do; and it works unpinned, too."""
    live = {"t": torch.ones(5000)}
    captured = capture(live)
    layout = plan(captured.specs)
    memory = bytearray(layout.padded)
    runtime = Runtime(answer)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    stage(captured, Canvas(layout.slots, memory))
    assert not runtime.pinned
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    canvas = Canvas(layout.slots, memory)
    assert list(runtime.pinned.values()) == ([] if answer else [layout.padded])
    stage(captured, canvas).wait()
    assert map_image(layout.slots, memory)["t"].tolist() == [1] * 5000
    del canvas
    assert not runtime.pinned


def test_each_image_of_a_state_gets_the_values_of_its_own_save() -> None:
    """Two that take turns, with tensors of all sizes, and one of them left to another rank."""
    live = {str(n): torch.full((n,), 0.0) for n in (0, 1, 3, 100, 9_000, 70_000)}
    live |= {f"b{n}": torch.full((n,), 0.0, dtype=torch.bfloat16) for n in (1, 7, 40_000)}
    captured = capture(live)
    layout = plan(spec for spec in captured.specs if spec.path != "100")
    memories = [bytearray(layout.padded) for _ in range(2)]
    canvases = [Canvas(layout.slots, memory) for memory in memories]
    views = [map_image(layout.slots, memory) for memory in memories]
    for turn in range(6):
        torch._foreach_add_(list(live.values()), 1.0)
        again = capture(live, previous=captured)
        assert again.looks is captured.looks
        stage(again, canvases[turn % 2]).wait()
        for number, values in enumerate(views):
            wanted = max(turn + 1 - (turn % 2 != number), 0)
            assert "100" not in values
            assert all((value == wanted).all() for value in values.values())


def test_names_that_change_places_are_not_mixed_up_in_one_image() -> None:
    """The tensors look as they did, in the same order, and belong elsewhere."""
    one, two = torch.ones(2), torch.zeros(2)
    first = capture({"a": one, "b": two})
    layout = plan(first.specs)
    memory = bytearray(layout.padded)
    canvas = Canvas(layout.slots, memory)
    stage(first, canvas)
    second = capture({"b": one, "a": two}, previous=first)
    assert second.looks is first.looks
    assert plan(second.specs) == layout
    stage(second, canvas)
    views = map_image(layout.slots, memory)
    assert (views["a"].tolist(), views["b"].tolist()) == ([0, 0], [1, 1])


class Stream:
    """A stream of a device that is not there; notes what it is asked for, in order."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def wait_stream(self, other: Stream) -> None:
        self.seen.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> Event:
        self.seen.append(f"event on {self.name}")
        return Event(self)


class Event:
    """One of its events."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.seen.append("host waits for the event")


def test_devices_are_copied_from_aside_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a copy sees all that the training had asked for, that nothing that it asks for
    afterwards is seen, and that the agent hears of the image when the bytes are in it."""
    seen: list[str] = []
    training, side = Stream("training", seen), Stream("side", seen)
    copied: list[tuple[object, ...]] = []

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        seen.append(f"on {stream.name}")
        yield
        seen.append(f"off {stream.name}")

    def copy(targets: list[Tensor], sources: list[Tensor], *, non_blocking: bool) -> None:
        seen.append("copy" if non_blocking else "copy, and wait")
        copied.append((targets, sources))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(stage_module, "_side_stream", lambda _: side)
    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    targets, sources = [torch.empty(3)], [torch.ones(3)]

    event = stage_module._copy_aside(torch.device("cuda", 0), targets, sources)
    stage_module.Staged((event,)).wait()

    assert copied == [(targets, sources)]
    assert seen == [
        "side waits for training", "on side", "copy", "event on side", "off side",
        "training waits for side", "host waits for the event",
    ]  # fmt: skip
