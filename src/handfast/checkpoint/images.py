"""Memory that a trainer and its agent share: images to be persisted, copies to be loaded."""

from __future__ import annotations

import contextlib
import mmap
import os

import msgspec

from handfast.agent.frames import make_image
from handfast.agent.keeper import Plan
from handfast.core.lattice import Epoch
from handfast.store.manifest import Manifest

__all__ = ["Loaded", "StagingImage"]


class StagingImage:
    """One image of a trainer's state, laid out by its plan and reused for every save.

    ``epoch`` is what it holds while that is being persisted, else None; ``objects`` what goes
    into the manifest with it.
    """

    def __init__(self, plan: Plan) -> None:
        self.fd = make_image(plan.padded)
        self.map = mmap.mmap(self.fd, plan.padded, mmap.MAP_SHARED)
        self.map[: len(plan.header)] = plan.header
        self.epoch: Epoch | None = None
        self.objects = b""

    def close(self) -> None:
        """Give this process's hold on the memory back, at the latest with the last view."""
        with contextlib.suppress(BufferError):
            self.map.close()
        os.close(self.fd)


class Loaded(msgspec.Struct, frozen=True):
    """A verified copy: what was validated is what is loaded, from the same memory."""

    memory: mmap.mmap
    manifest: Manifest

    @classmethod
    def take(cls, fd: int, manifest: Manifest) -> Loaded:
        """Map a memfd that the agent passed, and close the descriptor."""
        try:
            # Copy on write: frameworks want writable memory, and nothing here may reach the agent.
            memory = mmap.mmap(fd, manifest.image_bytes, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)
        return cls(memory, manifest)

    def close(self) -> None:
        """Unmap, unless a view is still in use: then the memory goes with the last view."""
        with contextlib.suppress(BufferError):
            self.memory.close()
