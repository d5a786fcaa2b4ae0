"""Where a trainer sits at its agent: its domain, its images, and who has them for now."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from handfast.agent.domain import DomainHost
from handfast.agent.keeper import Image, Plan
from handfast.agent.server import Trainer
from handfast.agent.snapshot import Snapshot
from handfast.agent.snapshot import encode as encode_snapshot

__all__ = ["Seat"]

REST_MOST_S: Final = 5.0  # the longest rest before a domain that keeps failing is opened again
SOUND_S: Final = 30.0  # a domain that worked for so long has not failed because it was opened


class Seat:
    """A domain that is open here, the trainer that owns it for now, and that trainer's images."""

    def __init__(self, root: str, name: str) -> None:
        self.root = root
        self.name = name
        self.lock = asyncio.Lock()
        self.host: DomainHost | None = None
        self.opened_at = 0.0
        self.failures = 0
        self.trainer: Trainer | None = None
        self.images: dict[int, Image] = {}
        self.retired: list[Image] = []
        self.spoken: Plan | None = None  # what others of this node may have heard of

    async def rest(self) -> None:
        """Wait the longer, the more often this domain failed as soon as it was open.

        Each opening is an incarnation, a directory on a disk that may be the very thing that fails.
        """
        lived = time.monotonic() - self.opened_at
        self.failures = 0 if lived > SOUND_S else min(self.failures + 1, 30)
        if self.failures > 1:
            await asyncio.sleep(min(0.05 * 2**self.failures, REST_MOST_S))

    def tell(self, snapshot: Snapshot) -> None:
        """Push the newest snapshot to the trainer, if there is one."""
        self.sweep()
        if self.trainer is not None:
            self.trainer.push("snapshot", data=encode_snapshot(snapshot))

    async def leave(self, host: DomainHost) -> None:
        """Close a domain that lives elsewhere now, and give its images back."""
        await host.close()
        self.sweep()

    def retire(self) -> None:
        """Keep images only for as long as they are being persisted.

        What was to come piece by piece, and is not all there, never will be.
        """
        for image in self.images.values():
            image.give_up("its trainer left before it had handed over all of it")
        self.retired += self.images.values()
        self.images = {}
        self.sweep()

    def sweep(self) -> None:
        """Give back the images that nothing is persisted from any more."""
        for image in [image for image in self.retired if image.busy is None]:
            self.retired.remove(image)
            image.close()
