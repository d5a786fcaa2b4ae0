"""What is found in copies: by the agent that reads them, or by the trainer that loads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from handfast.agent.keeper import Keeper
from handfast.core import events
from handfast.core.lattice import Epoch
from handfast.core.state import Member
from handfast.errors import FormatError, Refused, Superseded
from handfast.store.manifest import Manifest

__all__ = ["Judging"]


class Judging:
    """The copies of one domain in one generation, each judged once.

    ``blocking`` does the store's work in its thread; ``post`` queues an event for the member.
    """

    def __init__(
        self, keeper: Keeper, blocking: Callable[..., Any], post: Callable[[events.Event], None]
    ) -> None:
        self.by_trainer = False
        """Whether the trainer judges, as it reads copies to where they belong."""
        self._keeper, self._blocking, self._post = keeper, blocking, post
        self._tasks: dict[Epoch, asyncio.Task[Manifest]] = {}

    @property
    def tasks(self) -> Collection[asyncio.Task[Manifest]]:
        """The reads of this generation, under way or done."""
        return self._tasks.values()

    def begin(self) -> None:
        """Forget what was found: each generation judges its copies by reading them."""
        self._tasks.clear()

    async def judge(self, member: Member, epoch: Epoch) -> Manifest:
        """Read every byte of a copy, once a generation; gives its manifest.

        Raises what :meth:`handfast.agent.keeper.Keeper.check` raises. Whoever asks may go away in
        the middle; the read does not.
        """
        if epoch not in self._tasks:
            work = self._blocking(self._keeper.check, member, epoch)
            self._tasks[epoch] = asyncio.get_running_loop().create_task(work)
            self._tasks[epoch].add_done_callback(partial(self._read, epoch))
        reading = self._tasks[epoch]
        found = await asyncio.shield(reading)
        if self._tasks.get(epoch) is not reading:
            raise Superseded(f"{epoch} was given up while it was read: a later round has begun")
        return found

    def _read(self, epoch: Epoch, reading: asyncio.Task[Manifest]) -> None:
        """Keep what was read; what could not be read may be asked for again."""
        failed = reading.cancelled() or reading.exception() is not None
        if failed and self._tasks.get(epoch) is reading:
            del self._tasks[epoch]

    async def check(self, member: Member, epoch: Epoch) -> None:
        """Read every byte of the own copy, and vote.

        A copy is BAD where its bytes are; that it can't be looked at now (no memory, no
        permission) refutes no epoch, and stops this domain.
        """
        try:
            await self.judge(member, epoch)
        except (FormatError, Refused) as error:
            self.vote(member.generation, epoch, str(error))
        except Superseded:
            return
        else:
            self.vote(member.generation, epoch, "")

    def vote(self, generation: int, epoch: Epoch, problem: str) -> None:
        """Vote on a copy: VALID where there is no problem."""
        self._post(events.Checked(generation, epoch, problem[:500]))

    async def manifest(self, member: Member, epoch: Epoch) -> Manifest:
        """Give a copy's manifest, which nobody has judged yet; raises as :meth:`judge` does."""
        return await asyncio.to_thread(self._keeper.manifest, member, epoch)
