"""The values of a validated epoch, read from its files straight into the live state.

What is large is read to where it belongs, and held against its hash there; what is small is read
many at a time, verified, and copied. Bytes that fail by then, though they were found valid before,
stop the restore: the live state is of no epoch then, and nothing is saved of it.
"""

import ctypes
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from handfast.checkpoint.validated import Validated
from handfast.errors import Damaged, HandfastError
from handfast.store.image import Slot
from handfast.torch.saved import taken
from handfast.torch.stage import SMALL, move
from handfast.torch.tensors import copy_into, flat_bytes, is_dense
from handfast.torch.types import TORCH_DTYPES

__all__ = ["Stored"]


class Stored:
    """Fills :class:`handfast.torch.saved.Values` from copies of one epoch.

    The first copy is this rank's own; what its rank left to another is taken from the others.
    """

    def __init__(self, copies: Sequence[Validated]) -> None:
        own, *others = copies
        self._own = own
        self._ready: dict[str, Tensor] = {}
        self._live: frozenset[str] = frozenset()
        self._places = {slot.spec.path: (own, slot) for slot in own.manifest.slots}
        for other in others:
            theirs = {slot.spec.path: slot for slot in other.manifest.slots}
            self._places |= {
                path: (other, theirs[kept])
                for path, kept in taken(own.manifest, other.manifest)
                if kept in theirs
            }

    def preload(self, live: Mapping[str, Tensor], wanted: Collection[str]) -> None:
        """Read all of this rank's own copy at once, and what of others is wanted, verified.

        ``live`` are local tensors by the path that is stored: what of them is plain is filled. Of
        all else that is ``wanted`` new tensors are made. Raises Damaged where the own copy is, a
        plain HandfastError for another's, which this rank is not to judge: some are filled then.
        """
        filled, self._ready = set(), {}
        wants: dict[Validated, list[_Want]] = defaultdict(list)
        plain = []
        for path in wanted:
            copy, slot = self._places[path]
            dtype, target = TORCH_DTYPES[slot.spec.dtype], live.get(path)
            if target is not None and _is_plain(target, dtype, slot):
                filled.add(path)
                plain.append(target)
            else:
                target = torch.empty(slot.spec.shape, dtype=dtype)
            self._ready[path] = target
            if slot.nbytes:
                end = slot.start + slot.nbytes
                wants[copy].append(_Want(slot.start, end, target.data_ptr(), target))
        torch.autograd.graph.increment_version(plain)
        self._live = frozenset(filled)
        _Filling(wants.pop(self._own, [])).run(self._own, whole=True)
        for copy, some in wants.items():
            try:
                _Filling(some).run(copy)
            except Damaged as error:
                raise HandfastError(str(error)) from error

    def adopt(self, path: str) -> Tensor | None:
        """See the port."""
        return None if path in self._live else self._ready.pop(path, None)

    def view(self, path: str) -> Tensor:
        """See the port."""
        if path in self._ready:
            return self._ready[path].clone()
        copy, slot = self._places[path]
        dtype, shape = TORCH_DTYPES[slot.spec.dtype], slot.spec.shape
        with torch.inference_mode(False):
            if not slot.nbytes:
                return torch.empty(shape, dtype=dtype)
            data = copy.read(range(slot.start, slot.start + slot.nbytes))
            return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)

    def fill(self, pairs: Sequence[tuple[Tensor, str]]) -> None:
        """See the port."""
        wanted: dict[Validated, list[_Want]] = defaultdict(list)
        plain: list[Tensor] = []
        apart: list[tuple[Tensor, Tensor]] = []
        for target, path in pairs:
            ready = self._ready.get(path)
            if ready is not None:
                if target is not ready and target.data_ptr() != ready.data_ptr():
                    apart.append((target, ready))
                continue
            copy, slot = self._places[path]
            dtype = TORCH_DTYPES[slot.spec.dtype]
            if _is_plain(target, dtype, slot):
                plain.append(target)
                dense = target
            else:
                dense = torch.empty(slot.spec.shape, dtype=dtype)
                apart.append((target, dense))
            if slot.nbytes:
                end, at = slot.start + slot.nbytes, dense.data_ptr()
                wanted[copy].append(_Want(slot.start, end, at, dense))
        # What is moved by its address torch knows nothing of. Before, for what raises half-way.
        torch.autograd.graph.increment_version(plain)
        for copy, wants in wanted.items():
            _Filling(wants).run(copy)
        copy_into([target for target, _ in apart], [dense for _, dense in apart])


class _Want(NamedTuple):
    """Bytes ``start`` to ``end`` of an image, which belong into ``target``, at its ``address``."""

    start: int
    end: int
    address: int
    target: Tensor


def _is_plain(target: Tensor, dtype: torch.dtype, slot: Slot) -> bool:
    """Whether its memory holds just the bytes that the image has of it."""
    return (
        target.dtype == dtype
        and target.is_cpu
        and target.nbytes == slot.nbytes
        and is_dense(target)
        and not target.is_inference()
    )


class _Filling:
    """What is wanted of one image, in the order in which it lies there."""

    def __init__(self, wants: list[_Want]) -> None:
        self._wants = sorted(wants, key=itemgetter(0))
        self._starts = [want.start for want in self._wants]
        longest = max((want.end - want.start for want in wants), default=0)
        self._reach = longest  # a want that has a byte of a block begins no earlier before it

    def run(self, copy: Validated, *, whole: bool = False) -> None:
        """Read, verify and copy all of it; with ``whole`` what nobody wants is verified, too."""
        spans = None if whole else [range(want.start, want.end) for want in self._wants]
        copy.visit(self._take, spans, self._room)

    def _room(self, start: int, end: int) -> memoryview | None:
        """The memory of the one tensor that wants these bytes, all of them; else none."""
        found = self._overlapping(start, end)
        if len(found) != 1 or found[0].start > start or found[0].end < end:
            return None
        address = found[0].address + start - found[0].start
        return memoryview((ctypes.c_ubyte * (end - start)).from_address(address)).cast("B")

    def _overlapping(self, start: int, end: int) -> list[_Want]:
        """The wants that have some of these bytes."""
        first = bisect_right(self._starts, start - self._reach)
        some = self._wants[first : bisect_left(self._starts, end)]
        return [want for want in some if want.end > start]

    @torch.no_grad()
    def _take(self, start: int, data: memoryview) -> None:
        """Copy what a verified block has of each want; several threads do so at once."""
        end = start + len(data)
        block = torch.frombuffer(data, dtype=torch.uint8)
        shift = block.data_ptr() - start
        targets, sources = [], []
        for want in self._overlapping(start, end):
            begin, stop = max(start, want.start), min(end, want.end)
            if stop - begin <= SMALL:
                move(want.address + begin - want.start, shift + begin, stop - begin)
                continue
            flat = flat_bytes(want.target)
            targets.append(flat[begin - want.start : stop - want.start])
            sources.append(block[begin - start : stop - start])
        if targets:
            torch._foreach_copy_(targets, sources)
