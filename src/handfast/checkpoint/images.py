"""Memory that a trainer and its agent share: images to be persisted, copies to be loaded.

No memory is unmapped by hand: it goes with its last view. Frameworks make views that the mapping
does not know of, and a traceback, or whoever prints one, may hold them for long.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import msgspec

from handfast.agent.frames import make_image
from handfast.agent.keeper import Plan
from handfast.core.lattice import Epoch
from handfast.store.manifest import Manifest

__all__ = ["Loaded", "StagingImage"]


class StagingImage:
    """One image of a trainer's state, laid out by its plan and reused for every save.

    ``epoch`` is what it holds while that is being persisted, else None; ``objects`` what goes
    into the manifest with it; ``unsure`` whether the agent was asked to take it and has not
    answered; ``views`` what the framework sees the memory as, kept for the next
    save. ``key`` names this very memory to the agent.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.key = os.urandom(8).hex()
        self.fd = make_image(plan.padded)
        self.map = mmap.mmap(self.fd, plan.padded, mmap.MAP_SHARED)
        self.map[: len(plan.header)] = plan.header
        self.epoch: Epoch | None = None
        self.objects = b""
        self.unsure = False
        self.views: Any = None

    def close(self) -> None:
        """Close the descriptor, and let the views go."""
        self.views = None
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
