"""Persisting one image: written, held against its neighbours', its validators and other ranks.

All of that is before the vote: what fails here is a SKIP with its reason, and no epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from handfast.agent.examiner import Examiner
from handfast.agent.hearsay import Hearsay
from handfast.agent.keeper import Image, Keeper
from handfast.agent.snapshot import INVALID, UNLIKE
from handfast.agent.witness import Witness
from handfast.core.lattice import Epoch
from handfast.core.membership import Roster
from handfast.core.state import Member
from handfast.errors import HandfastError, SaveFailed
from handfast.store.manifest import Manifest
from handfast.store.port import Written

__all__ = ["Persisting"]


class Persisting:
    """What one domain does with an image. ``blocking`` does the store's work in its one thread.

    ``shelves`` are where this node's domains lie, by id: root and name.
    """

    def __init__(
        self,
        keeper: Keeper,
        blocking: Callable[..., Awaitable[Any]],
        witness: Witness,
        hearsay: Hearsay,
    ) -> None:
        self.shelves: Mapping[str, tuple[str, str]] = {}
        self._keeper = keeper
        self._blocking = blocking
        self._witness = witness
        self._hearsay = hearsay
        self._examiner = Examiner()

    async def persist(
        self,
        member: Member,
        roster: Roster | None,
        epoch: Epoch,
        image: Image,
        objects: bytes,
        left: bytes,
    ) -> Written:
        """Write an image and find nothing wrong with it. It is not read any more after this.

        Raises SaveFailed, and ValueError where the image is not its plan's.
        """
        examining = asyncio.ensure_future(self._examiner.examine(image.asked(epoch, objects)))
        try:
            written: Written = await self._blocking(
                self._keeper.write, member, roster, epoch, image, objects, left
            )
            await self._compare(member, written.manifest)
        finally:
            refused = await examining
        problem = f"{INVALID}: {refused}" if refused else ""
        if roster is not None and not refused:
            image.give_up("it is all taken")
            self._hearsay.say(roster, written.manifest, image.plan.compared)
            problem = await self._hearsay.mixture(written.manifest)
        if problem:
            with contextlib.suppress(HandfastError):
                await self._blocking(self._keeper.withdraw, written.manifest)
            raise SaveFailed(problem)
        return written

    async def _compare(self, member: Member, manifest: Manifest) -> None:
        """Hold what ranks of this node left to its first against that. Raises SaveFailed."""
        if manifest.left is None and manifest.digests is None:
            return  # nobody leaves anything to this rank
        shelves = [at for domain, at in self.shelves.items() if domain != member.id]
        found = await self._blocking(self._keeper.unlike, manifest, shelves)
        if found:
            self._witness.note(found)  # before the vote: whoever hears that, hears this too
            named = ", ".join(sorted({path for paths in found.values() for path in paths})[:5])
            raise SaveFailed(f"{UNLIKE}: {named}. From the next save on each rank stores its own")

    def interrupt(self, before: int) -> bool:
        """Examine nothing any more of generations below ``before``; says if something still was."""
        return self._examiner.interrupt(before)

    def close(self) -> None:
        """End what examines."""
        self._examiner.close()
