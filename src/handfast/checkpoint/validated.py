"""A copy that its agent has validated, read again where it is loaded.

Nothing of it is kept in memory in between, which may hold the state itself and no second one. So
each byte is held against its hash once more, where it is loaded; what fails by then stops the
restore.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from handfast.errors import Damaged
from handfast.store.manifest import Manifest
from handfast.store.shelf import PART, PAUSE, Room, Shelf, nowhere

__all__ = ["Validated"]

KEPT: Final = 8
"""Parts of a few MiB that are kept for who reads tensors one by one, mostly in their order."""


class Validated:
    """One shard of one epoch, as ``manifest`` says: ``shelf`` is where it lies."""

    def __init__(self, shelf: Shelf, manifest: Manifest) -> None:
        self.manifest = manifest
        self._shelf = shelf
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def visit(
        self,
        take: Callable[[int, memoryview], None],
        only: Iterable[range] | None = None,
        room: Room = nowhere,
    ) -> None:
        """Read and verify spans of the image, or all of it, by several threads.

        ``take(start, data)`` gets what lies from byte ``start`` of the image on, in memory that it
        may not keep; some of it again, where a read that failed is repeated. What there is ``room``
        for is read to there, and verified there. Raises Damaged, naming file and offset, and
        HandfastError where the files can't be looked at.
        """
        spans = None if only is None else list(only)
        try:
            self._shelf.visit(self.manifest, take, spans, room)
        except Damaged:
            time.sleep(PAUSE)
            self._shelf.visit(self.manifest, take, spans, room)

    def verify(self) -> None:
        """Read every byte, and drop it. Raises what :meth:`visit` raises."""
        self._shelf.verify(self.manifest)

    def read(self, span: range) -> bytearray:
        """Read and verify some bytes of the image. Raises what :meth:`visit` raises."""
        unit = PART * self.manifest.chunk_bytes
        found = bytearray(len(span))
        for start in range(span.start // unit * unit, span.stop, unit):
            part = self._part(start, unit)
            here = range(max(span.start, start), min(span.stop, start + len(part)))
            found[here.start - span.start : here.stop - span.start] = part[
                here.start - start : here.stop - start
            ]
        return found

    def _part(self, start: int, unit: int) -> bytes:
        if start in self._kept:
            self._kept.move_to_end(start)
            return self._kept[start]
        end = min(start + unit, self.manifest.image_bytes)
        data = bytearray(end - start)

        def take(at: int, block: memoryview) -> None:
            # parts of the files end where pieces do: they may reach over this one's borders
            here = range(max(at, start), min(at + len(block), end))
            data[here.start - start : here.stop - start] = block[here.start - at : here.stop - at]

        self.visit(take, [range(start, end)])
        self._kept[start] = bytes(data)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[start]
