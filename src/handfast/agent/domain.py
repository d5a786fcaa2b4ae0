"""One domain at work: a claimed store, a member of the protocol, and the order between them.

Events are taken in batches; each batch's records are appended and synced **before** any of its
messages is sent or any of its actions done, and a look at the disk in between makes sure that no
successor has claimed the domain (see :mod:`handfast.store.claims`). That loop is here and nowhere
else, so there is one place in which the order persist -> send -> apply could be wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import msgspec

from handfast.agent.feed import Want
from handfast.agent.hearsay import Hearsay
from handfast.agent.judging import Judging
from handfast.agent.keeper import Image, Keeper
from handfast.agent.persisting import Persisting
from handfast.agent.routes import Route
from handfast.agent.snapshot import FORGONE, Outcome, Proposal, Skip, Snapshot, Stuck, skips
from handfast.agent.speech import Said
from handfast.agent.witness import Witness
from handfast.core import events
from handfast.core.gossip import restless
from handfast.core.lattice import Epoch
from handfast.core.member import step
from handfast.core.membership import Roster, bits
from handfast.core.messages import encode
from handfast.core.state import Member
from handfast.core.view import left_behind, view
from handfast.errors import HandfastError, Superseded
from handfast.store.files import Files
from handfast.store.manifest import Manifest

__all__ = ["DomainHost"]

T = TypeVar("T")
Shelves = Mapping[str, tuple[str, str]]

logger = logging.getLogger(__name__)

OUTCOMES: Final = 64
TICK_FIRST_S: Final = 0.02
TICK_MOST_S: Final = 2.0
SNAPSHOT_S: Final = 0.005
ENDING_S: Final = 5.0
"""Seconds in which who was interrupted ends, and its epoch is voted on."""
ANSWERING: Final = 2
"""Turns of the loop until a trainer has its answer: only then does the writer want the GIL."""


class _Pending(msgspec.Struct):
    """An image on its way: ``outcome`` is set once it is written, and told once it is voted on."""

    image: Image
    objects: bytes
    left: bytes
    decided: asyncio.Future[events.Refuse | None]
    outcome: Outcome | None = None


class DomainHost:
    """Drives one member over one claimed directory.

    ``route(said)`` leads to other domains and may lose it; ``notify(snapshot)`` is called in the
    loop when there is something new to tell. ``witness`` knows what ranks of this node do not hold
    alike.
    """

    def __init__(
        self,
        keeper: Keeper,
        member: Member,
        *,
        name: str,
        route: Route,
        notify: Callable[[Snapshot], None],
        witness: Witness | None = None,
    ) -> None:
        self.keeper = keeper
        self.member = member
        self.name = name
        self._route = route
        self._notify = notify
        self._witness = witness or Witness()
        self._loop = asyncio.get_running_loop()
        self._queue: deque[events.Event] = deque()
        self._wake = asyncio.Event()
        self._calm = asyncio.Event()
        self._calm.set()
        self._journal = ThreadPoolExecutor(1, f"journal-{member.id}")
        self._writer = ThreadPoolExecutor(1, f"store-{member.id}")
        self._pending: dict[Epoch, _Pending] = {}
        self._hearsay = Hearsay(route, lambda: self.member)
        self._persisting = Persisting(keeper, self._blocking, self._witness, self._hearsay)
        self.judging = Judging(keeper, self._blocking, self.post)
        self._jobs: set[asyncio.Task[None]] = set()
        self._outcomes: deque[Outcome] = deque(maxlen=OUTCOMES)
        self._skipped: deque[Skip] = deque(maxlen=OUTCOMES)
        self._proposal: Proposal | None = None
        self._stuck: Stuck | None = None
        self.overtaken = 0
        self._tick: asyncio.TimerHandle | None = None
        self._pause = TICK_FIRST_S
        self._telling: asyncio.TimerHandle | None = None
        self._told: object = None
        self.rejected = 0
        self.failure = ""
        self._task = self._loop.create_task(self._run(), name=f"domain-{member.id}")

    @classmethod
    async def open(
        cls,
        files: Files,
        root: str,
        name: str,
        *,
        route: Route,
        notify: Callable[[Snapshot], None],
        witness: Witness | None = None,
    ) -> DomainHost:
        """Claim an identified domain and boot its member from the journals.

        Raises what :meth:`handfast.agent.keeper.Keeper.claim` raises.
        """
        loop = asyncio.get_running_loop()
        keeper, member = await loop.run_in_executor(None, Keeper.claim, files, root, name)
        return cls(keeper, member, name=name, route=route, notify=notify, witness=witness)

    # --- what the agent asks -------------------------------------------------------------------

    def post(self, event: events.Event) -> None:
        """Queue an event for the member."""
        if not self.failure:
            self._queue.append(event)
            self._wake.set()
            self._calm.clear()
            if isinstance(event, events.Received):
                self._pause = TICK_FIRST_S

    async def begin(
        self,
        event: events.Begin,
        drain_s: float,
        shelves: Shelves | None = None,
        by_trainer: bool = False,
    ) -> None:
        """Drain what is being persisted, for ``drain_s`` seconds at most, then freeze.

        What is still examined then is interrupted. ``shelves`` are where this node's domains lie,
        by root and name; ``by_trainer`` says that the trainer judges copies, as it reads them.
        """
        self._persisting.shelves, self.judging.by_trainer = dict(shelves or {}), by_trainer
        if event.generation > self.member.generation:
            self._hearsay.leave(event.generation)
            await self.drain(drain_s)
            if self._persisting.interrupt(event.generation):
                await self.drain(ENDING_S)  # for the vote, which says why
        if event.generation > self.member.generation:
            self._proposal = self._stuck = None
            self.judging.begin()
        self.post(event)

    async def stage(
        self, epoch: Epoch, image: Image, objects: bytes, left: bytes = b""
    ) -> events.Refuse | None:
        """Take an image to persist; says why not where it can't be taken.

        Asking again is no harm: a trainer whose agent died before it answered does.
        """
        if self.failure:
            return events.Refuse(epoch, self.failure)
        if self._voted(epoch):
            return None
        if epoch not in self._pending:
            if image.busy is not None:
                return events.Refuse(epoch, f"its image is still being persisted for {image.busy}")
            image.await_pieces()
            decided: asyncio.Future[events.Refuse | None] = self._loop.create_future()
            self._pending[epoch] = _Pending(image, objects, left, decided)
            image.busy = epoch
            self.post(events.Captured(epoch))
        return await asyncio.shield(self._pending[epoch].decided)

    async def feed(self, epoch: Epoch, there: Sequence[int], key: str) -> tuple[list[Want], str]:
        """Tell what is wanted next of an image that comes piece by piece; nothing: it is all taken.

        ``there`` is where pieces were put meanwhile, for the one that gave this ``key``.
        """
        pending = self._pending.get(epoch)
        feed = pending.image.feed if pending is not None else None
        if feed is None:
            return [], ""
        return await feed.wanted(there if key == feed.key else ()), feed.key

    def _voted(self, epoch: Epoch) -> bool:
        """Say whether an image of an epoch was taken before, and voted on: its fate is told."""
        told = [copy.epoch for copy in self.member.retained] + [o.epoch for o in self._outcomes]
        told += [  # of an agent that died before it could tell an outcome
            skip.epoch
            for skip in self._skips()
            if skip.domain == self.member.id and not skip.reason.startswith(FORGONE)
        ]
        return epoch in told

    @property
    def busy(self) -> bool:
        """Say whether something is being persisted, read or released, or half-way taken in."""
        reading = any(not task.done() for task in self.judging.tasks)
        return bool(self._jobs) or reading or not self._calm.is_set()

    @property
    def settled(self) -> bool:
        """Say whether nothing is left to persist or to tell."""
        return not self.busy and (bool(self.failure) or not restless(self.member))

    async def drain(self, limit_s: float | None = None) -> None:
        """Wait until nothing is being persisted and all votes are cast, or the limit has passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self.busy:
                    working = {*self._jobs, *self.judging.tasks}
                    if working:
                        await asyncio.wait(working)
                    await self._calm.wait()

    async def close(self) -> None:
        """Stop. What was journaled stays true; what was not was never said."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for timer in (self._tick, self._telling):
            if timer is not None:
                timer.cancel()
        self._persisting.interrupt(self.member.generation + 1)
        self._hearsay.leave(self.member.generation + 1)
        working = {*self._jobs, *self.judging.tasks}
        if working:
            await asyncio.wait(working)
        self._journal.shutdown()
        self._writer.shutdown()
        self._persisting.close()
        for pending in self._pending.values():
            pending.image.busy = None
        self.keeper.directory.close()

    def judged(self, epoch: Epoch, problem: str | None) -> None:
        """Hear what the trainer has found in a copy; None: it did not look, and the agent is to."""
        if epoch != self.member.checking:
            return
        if problem is None:
            self._start(self.judging.check(self.member, epoch))
        else:
            self.judging.vote(self.member.generation, epoch, problem)

    async def judge(self, epoch: Epoch) -> Manifest:
        """See :meth:`handfast.agent.judging.Judging.judge`."""
        return await self.judging.judge(self.member, epoch)

    # --- the loop ------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._turn()
                if not self._queue:
                    self._calm.set()
        except asyncio.CancelledError:
            raise
        except HandfastError as error:
            self._fail(str(error))
        except Exception as error:
            logger.exception("domain %s stopped", self.member.id)
            self._fail(f"{type(error).__name__}: {error}")

    async def _turn(self) -> None:
        """Take what is queued: step, then persist, then send, then apply.

        ``self.member`` changes only in between: it is what snapshots show at any moment, and
        nothing may be shown that is not durable.
        """
        member = self.member
        batch: list[tuple[events.Event, Roster | None, events.Effects]] = []
        while self._queue:
            event = self._queue.popleft()
            member, effects = step(member, event)
            batch.append((event, member.roster, effects))
        records = [record for _, _, effects in batch for record in effects.persist]
        if records:
            self._pause = TICK_FIRST_S
            await self._loop.run_in_executor(self._journal, self.keeper.commit, records)
        if self.failure:
            return
        self.member = member
        for _, roster, effects in batch:
            for send in effects.send:
                if roster is not None:
                    self._route(Said(roster.ids[send.to], encode(send.message)))
        for event, _, effects in batch:
            if isinstance(event, events.Persisted | events.Failed):
                self._conclude(event.epoch, voted=bool(effects.persist))
            for action in effects.apply:
                self._apply(action)
        self._schedule()

    def _fail(self, problem: str) -> None:
        self.failure = problem
        self._queue.clear()
        self._calm.set()
        logger.error("domain %s: %s", self.member.id, problem)
        for epoch, pending in self._pending.items():
            pending.image.give_up(problem)
            if not pending.decided.done():
                pending.decided.set_result(events.Refuse(epoch, problem))
        self._tell()

    def _schedule(self) -> None:
        """Arrange the next tick, if any peer seems to lack something, and tell the trainer."""
        if restless(self.member) and self._tick is None:
            pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
            self._tick = self._loop.call_later(pause, self._tock)
        if self._told != self._news():
            self._tell()
        elif self._telling is None:
            self._telling = self._loop.call_later(SNAPSHOT_S, self._tell)

    def _news(self) -> object:
        """What a trainer waits for: it is told at once, all else together a little later."""
        member = self.member
        line = member.tallies[member.roster.tier_of[member.me]].line if member.roster else None
        outcome = self._outcomes[-1] if self._outcomes else None
        told = self._proposal, self._stuck, member.open, member.checking
        return line, outcome, self.overtaken, told

    def _tock(self) -> None:
        self._tick = None
        self._pause = min(self._pause * 2, TICK_MOST_S)
        self.post(events.Tick())

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._told = self._news()
        self._notify(self.snapshot())

    def snapshot(self) -> Snapshot:
        """Show everything that a trainer may want to know."""
        member = self.member
        tally = member.tallies[member.roster.tier_of[member.me]] if member.roster else None
        return Snapshot(
            domain=member.id,
            incarnation=member.incarnation,
            generation=member.generation,
            round=member.round,
            lattice=view(member),
            checking=member.checking if self.judging.by_trainer else None,
            proposal=None if member.open else self._proposal,
            stuck=self._stuck,
            resumed=member.restored if member.open else None,
            line=tally.line if tally else None,
            retained=tuple(copy.epoch for copy in member.retained),
            persisting=tuple(self._pending),
            outcomes=tuple(self._outcomes),
            skipped=self._skips(),
            unlike=self._witness.unlike(member.id),
            overtaken=self.overtaken,
            failure=self.failure,
            divergent=self._hearsay.divergent,
            apart=self._hearsay.apart,
        )

    def _skips(self) -> tuple[Skip, ...]:
        self._skipped += [skip for skip in skips(self.member) if skip not in self._skipped]
        return tuple(self._skipped)

    # --- actions -------------------------------------------------------------------------------

    def _apply(self, action: events.Action) -> None:
        match action:
            case events.Persist(epoch):
                self._decide(epoch, None)
                self._start(self._persist(epoch))
            case events.Refuse(epoch):
                self._decide(epoch, action)
            case events.Check(_, epoch):
                if not self.judging.by_trainer:
                    self._start(self.judging.check(self.member, epoch))
            case events.Propose(_, epoch, copies):
                chosen = tuple(bits(mask)[0] for mask in copies)
                self._proposal = Proposal(epoch, chosen, left_behind(self.member, epoch))
            case events.Stuck(phase, epoch, reasons):
                self._stuck = Stuck(phase.value, epoch, reasons)
            case events.Resume(certificate):
                self.judging.begin()  # every rank has what it loads by now
                self._start(self._tidy(self.keeper.resume, self.member, certificate.base))
            case events.Publish(certificate):
                self._start(self._forgive(self.keeper.publish, self.name, certificate))
            case events.Release(epochs):
                self._start(self._tidy(self.keeper.release, epochs))
            case events.Overtaken(generation):
                self.overtaken = max(self.overtaken, generation)
            case events.Reject(reason):
                self.rejected += 1
                logger.info("domain %s refused a message: %s", self.member.id, reason)

    def _start(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            known = isinstance(error, HandfastError)
            self._fail(str(error) if known else f"{type(error).__name__}: {error}")

    async def _blocking(self, work: Callable[..., T], *args: object) -> T:
        """Do the store's work in its one thread, in the order in which it was asked."""
        return await self._loop.run_in_executor(self._writer, work, *args)

    def _decide(self, epoch: Epoch, refusal: events.Refuse | None) -> None:
        """Answer the trainer, who may be gone by now."""
        pending = self._pending.get(epoch)
        if pending is None:
            return
        if refusal is not None:
            pending.image.busy = None
            del self._pending[epoch]
        if not pending.decided.done():
            pending.decided.set_result(refusal)

    def _conclude(self, epoch: Epoch, *, voted: bool) -> None:
        """Tell what became of an image: only now, when the vote is durable."""
        pending = self._pending.pop(epoch)
        pending.image.busy = None
        outcome = pending.outcome or Outcome(epoch)
        if not voted and not outcome.problem:
            outcome = Outcome(epoch, "its generation had ended before it was persisted")
        self._outcomes.append(outcome)

    async def _persist(self, epoch: Epoch) -> None:
        pending, roster = self._pending[epoch], self.member.roster
        began = time.monotonic()
        for _ in range(ANSWERING):
            await asyncio.sleep(0)
        member = self.member  # as it is now: what was released meanwhile can't be a parent
        event: events.Event
        try:
            written = await self._persisting.persist(
                member, roster, epoch, pending.image, pending.objects, pending.left
            )
        except (HandfastError, ValueError) as error:  # a ValueError: the image is not its plan's
            event = events.Failed(epoch, str(error)[:500])
            pending.outcome = Outcome(epoch, str(error))
        else:
            event = events.Persisted(epoch, written.digest)
            seconds, total = time.monotonic() - began, written.bytes_total
            pending.outcome = Outcome(epoch, "", written.bytes_written, total, seconds)
        pending.image.give_up("it is all taken")
        self.post(event)

    def hear(self, said: bytes) -> None:
        """Hear what another rank holds. Raises ``msgspec.MsgspecError`` for what is no word."""
        roster = self.member.roster
        if roster is not None and self._hearsay.hear(said, roster.configuration.shards):
            self._tell()

    async def _tidy(self, work: Callable[..., None], *args: object) -> None:
        """Free space, and look who holds what."""
        await self._forgive(work, *args)
        pinned = await self._forgive(self.keeper.pinned)
        if pinned is not None:
            self.post(events.Pinned(pinned))

    async def _forgive(self, work: Callable[..., T], *args: object) -> T | None:
        """Do what may fail: that costs space or a page for people, not safety.

        The next release, certificate or boot tries again.
        """
        try:
            return await self._blocking(work, *args)
        except Superseded:
            raise
        except HandfastError as error:
            logger.warning("domain %s: %s", self.member.id, error)
            return None
