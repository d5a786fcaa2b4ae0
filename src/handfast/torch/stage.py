"""Staging: the state's tensors copied into the memory of an image, before ``save`` returns.

After :func:`stage` nothing that the training does is seen in the image. Tensors in host memory
are copied when it returns, an optimizer's ``step`` counters too (pytorch#144657, where only
CUDA tensors were, and nvidia-resiliency-ext#376). CUDA tensors are copied on a side stream that
all later work of the current stream waits for, all of it, since anything may write to a parameter,
not the optimizer alone.

Large tensors are copied by torch, whole cache lines of the image by each of its threads: a store
that touches two lines costs as much as two, and slots begin and end anywhere. A small one is moved
by its address: to make a call of torch for each costs more than its bytes (``docs/adr/0015``).
"""

import ctypes
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import compress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from handfast.store.image import LINE, Slot, TensorSpec
from handfast.torch.looks import Look, pointers
from handfast.torch.tensors import PLAIN, flat_bytes, is_dense
from handfast.torch.types import TORCH_DTYPES

if TYPE_CHECKING:
    from handfast.torch.capture import Captured

__all__ = ["SMALL", "Canvas", "Staged", "map_image", "move", "stage"]

SMALL: Final = 32 << 10
"""Bytes of a tensor up to which a call of torch costs more than the copy itself."""

LARGE: Final = 256 << 10
"""Bytes of a tensor from which it pays to begin with a whole cache line."""

ALL: Final = slice(None)

RUN: Final = 4096
"""So many small ones are copied before another thread gets its turn."""

move = ctypes.PyDLL(None).memmove  # it keeps the GIL: to let go of it costs as much as the copy
move.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
move.restype = None


def map_image(slots: Iterable[Slot], buffer: object) -> dict[str, Tensor]:
    """The slots of an image as dense tensors that share the memory of ``buffer``, by path.

    ``buffer`` is writable and begins with the image's first byte. Raises ValueError if it is too
    short.
    """
    memory = _memory(buffer)
    with torch.inference_mode(False):
        return {slot.spec.path: _view(memory, slot) for slot in slots}


def _memory(buffer: object) -> Tensor:
    with torch.inference_mode(False):  # else nobody outside of that mode could ever write to it
        return torch.frombuffer(buffer, dtype=torch.uint8)


def _view(memory: Tensor, slot: Slot) -> Tensor:
    _check_end(memory, slot)
    dtype = TORCH_DTYPES[slot.spec.dtype]
    bytes_ = memory[slot.start : slot.start + slot.nbytes]
    return bytes_.view(dtype).view(slot.spec.shape)


def _check_end(memory: Tensor, slot: Slot) -> None:
    end = slot.start + slot.nbytes
    if end > len(memory):
        raise ValueError(
            f"{slot.spec.path}: its slot ends at byte {end} of a buffer of {len(memory)}: map a "
            "buffer of the layout's size"
        )


class _Plan(NamedTuple):
    """From where to where a structure is copied, while its tensors look as they did."""

    specs: Sequence[TensorSpec]
    looks: Sequence[Look]
    moves: list[tuple[list[int], list[int], list[int]]]  # targets, sources, bytes
    views: list[tuple[int, slice, Tensor]]  # place in ``tensors``, which bytes, and in the image


class Canvas:
    """The memory of an image, as :func:`stage` writes to it; it serves every save of one layout.

    ``buffer`` is writable and begins with the image's first byte; tensors without a slot are left
    out. Where CUDA is in use the memory is pinned, so that devices copy into it at their full rate
    and by themselves. Raises ValueError if the buffer is too short.
    """

    def __init__(self, slots: Iterable[Slot], buffer: object) -> None:
        self._memory = _memory(buffer)
        self._slots: Mapping[str, Slot] = {slot.spec.path: slot for slot in slots}
        for slot in self._slots.values():
            _check_end(self._memory, slot)
        self._plan: _Plan | None = None
        cuda: Any = torch.cuda
        if cuda.is_available() and cuda.is_initialized():
            self._pin(cuda.cudart())

    def _pin(self, runtime: Any) -> None:
        """Register the memory with CUDA for as long as this lives; without it copies are slower."""
        start = self._memory.data_ptr()
        if int(runtime.cudaHostRegister(start, self._memory.numel(), 0)) == 0:
            weakref.finalize(self, runtime.cudaHostUnregister, start)

    def plan(self, captured: "Captured") -> _Plan:
        """How to copy a capture: the very plan of the last one, if no tensor has moved since."""
        plan = self._plan
        if plan is None or plan.looks is not captured.looks or plan.specs is not captured.specs:
            plan = self._plan = self._planned(captured)
        return plan

    @torch.inference_mode(False)  # what is kept must serve saves outside of that mode, too
    def _planned(self, captured: "Captured") -> _Plan:
        moves: list[tuple[int, int, int]] = []
        views: list[tuple[int, slice, Tensor]] = []
        starts = list(compress(pointers(captured.looks), captured.stored))
        base = self._memory.data_ptr()
        rows = zip(captured.specs, captured.tensors, starts, strict=True)
        for index, (spec, tensor, start) in enumerate(rows):
            slot = self._slots.get(spec.path)
            if slot is None or not slot.nbytes:
                continue
            at, plain = base + slot.start, _is_plain(tensor)
            if plain and slot.nbytes <= SMALL:
                moves.append((at, start, slot.nbytes))
                continue
            view = _view(self._memory, slot)
            large = plain and slot.nbytes >= LARGE and type(tensor) in PLAIN
            part = _whole_lines(at, slot.nbytes) if large else ALL
            if part != ALL:
                moves.append((at, start, part.start))
                moves.append((at + part.stop, start + part.stop, slot.nbytes - part.stop))
                view = flat_bytes(view)[part]
            views.append((index, part, view))
        runs = [moves[at : at + RUN] for at in range(0, len(moves), RUN)]
        columns: list[Any] = [tuple(map(list, zip(*run, strict=True))) for run in runs]
        return _Plan(captured.specs, captured.looks, columns, views)


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are the bytes that begin at its address, in order."""
    return tensor.is_cpu and is_dense(tensor)


def _whole_lines(at: int, nbytes: int) -> slice:
    """The bytes of a slot at this address that torch's threads share out in whole lines.

    Torch uses fewer than it has for less than 32 KiB each, and cuts anywhere then: it pays less.
    """
    unit = LINE * torch.get_num_threads()
    odd = -at % LINE
    lines = (nbytes - odd) // unit * unit
    return ALL if (odd, lines) == (0, nbytes) else slice(odd, odd + lines)


class Staged(NamedTuple):
    """A copy under way. Its values are in the image once :meth:`wait` has returned."""

    events: tuple["torch.cuda.Event", ...]

    def wait(self) -> None:
        """Wait for the copies from CUDA devices. Call it before the agent hears of the image."""
        for event in self.events:
            event.synchronize()


@torch.no_grad()
def stage(captured: "Captured", canvas: Canvas) -> Staged:
    """Copy a capture's tensors into an image of its layout, from the devices by themselves.

    What is small, dense and in host memory is moved by its address, which that capture has asked
    each tensor for, and which holds while ``captured.tensors`` do.
    """
    plan = canvas.plan(captured)
    by_device = defaultdict[torch.device, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
    for index, part, view in plan.views:
        source = captured.tensors[index]
        if part != ALL:
            source = flat_bytes(source)[part]
        targets, sources = by_device[source.device]
        targets.append(view)
        sources.append(source)
    devices = [device for device in by_device if device.type == "cuda"]
    events = tuple(_copy_aside(device, *by_device.pop(device)) for device in devices)
    for targets, sources in by_device.values():
        torch._foreach_copy_(targets, sources)  # with all of torch's threads for large ones
    for run in plan.moves:
        deque(map(move, *run), maxlen=0)
    return Staged(events)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    make: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
    return make(device)


def _copy_aside(
    device: torch.device, targets: list[Tensor], sources: list[Tensor]
) -> torch.cuda.Event:
    training = torch.cuda.current_stream(device)
    side = _side_stream(device)
    side.wait_stream(training)
    with torch.cuda.stream(side):
        torch._foreach_copy_(targets, sources, non_blocking=True)
        event: torch.cuda.Event = side.record_event()
    # The next optimizer step must not overwrite what is still being read. It waits on the device;
    # the host goes on.
    training.wait_stream(side)
    return event
