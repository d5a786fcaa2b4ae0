"""A state copied piece by piece, where there is no memory for all of it at once."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from handfast.store.image import Layout
from handfast.torch.tensors import flat_bytes, is_dense

__all__ = ["Pieces"]


class Pieces:
    """A layout's bytes, as they would lie in an image, of ``tensors`` in the order of its slots.

    The tensors are held, and have to stay as they are for as long as pieces are asked for.
    """

    def __init__(self, layout: Layout, tensors: Sequence[Tensor]) -> None:
        self._header = layout.header
        held = [(slot, t) for slot, t in zip(layout.slots, tensors, strict=True) if slot.nbytes]
        self._tensors = [tensor for _, tensor in held]
        self._starts = [slot.start for slot, _ in held]
        self._ends = [slot.start + slot.nbytes for slot, _ in held]
        self._dense: tuple[int, Tensor] | None = None  # the last one that had to be made so

    @torch.no_grad()
    def put(self, start: int, end: int, into: memoryview) -> None:
        """Copy bytes ``start`` to ``end`` of the image to where they are wanted."""
        head = self._header[start:end]
        into[: len(head)] = head
        with torch.inference_mode(False):
            block = torch.frombuffer(into, dtype=torch.uint8)
        for index in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            at = self._starts[index]
            first, behind = max(start, at), min(end, self._ends[index])
            flat = self._flat(index)
            block[first - start : behind - start].copy_(flat[first - at : behind - at])

    def _flat(self, index: int) -> Tensor:
        """A tensor's bytes, in the order of its elements, on its own device."""
        tensor = self._tensors[index]
        if not is_dense(tensor):
            if self._dense is None or self._dense[0] != index:
                self._dense = index, tensor.resolve_conj().resolve_neg().contiguous()
            tensor = self._dense[1]
        return flat_bytes(tensor)
