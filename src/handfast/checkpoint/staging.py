"""A rank's images: made once a structure, filled in each save, and handed to the agent."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from handfast.agent.keeper import Plan
from handfast.agent.reminder import Reminder
from handfast.agent.snapshot import Snapshot
from handfast.checkpoint import fate
from handfast.checkpoint.connection import Connection
from handfast.checkpoint.images import StagingImage
from handfast.checkpoint.spelling import size
from handfast.core.lattice import Epoch
from handfast.errors import Blocked, HandfastError

__all__ = ["Put", "Staging"]

logger = logging.getLogger("handfast")

LOST: Final = "its save was interrupted, and the state is another one by now"

Put = Callable[[int, int, memoryview], None]
"""Copies bytes of an image, from the first to the second, to where they belong."""


class Staging:
    """The images of one rank, over its line to the agent. ``root`` is where they will lie."""

    def __init__(self, line: Connection, root: str) -> None:
        self._line = line
        self._root = root
        self._window = 0
        self._plan: Plan | None = None
        self._images: list[StagingImage] = []
        self._agreed = True  # the agent has been handed these images, and no others

    def renew(self, window: int) -> None:
        """Begin a round with images that no earlier one uses, at whichever agent it has now.

        What an earlier round left is its agent's to finish, in memory that is the agent's, too; an
        agent that died never will. ``window`` epochs may be on their way at once.
        """
        self._window = window
        if self._plan is not None:
            self._replace(self._plan, lambda image: not self._is_idle(image))

    def give_up(self) -> None:
        """Let the agent wait no longer for what an interrupted save was to hand over."""
        if self._plan is not None and any(map(self._is_lost, self._images)):
            self._agreed = False
            self._line.call("plan", **_handed(self._plan, []))

    def _replace(self, plan: Plan, which: Callable[[StagingImage], bool]) -> None:
        """Make some images anew, and hand all of them over; the agent finishes what it can.

        An interrupt leaves the former ones, whole, and a note to hand them over again.
        """
        self._agreed = False
        stale = [image for image in self._images if which(image)]
        images = [StagingImage(plan) if image in stale else image for image in self._images]
        self._hand_over(plan, images)
        self._images, self._agreed = images, True
        for image in stale:
            image.close()

    def image_for(self, plan: Plan, images: int, timeout: float | None) -> StagingImage | None:
        """Find an image of a structure that is not being persisted; None where time is up.

        For another structure (the plan is not the very one of the last time) it waits until none
        is, and then makes so many images.
        """
        if not self.has_idle(timeout, any if plan is self._plan else all):
            return None
        if plan is not self._plan:
            self._change(plan, images)
        return next(image for image in self._images if self._is_idle(image))

    def has_idle(self, timeout: float | None, enough: Callable[..., bool] = any) -> bool:
        """Wait until an image, or all, are not being persisted; say whether that is so by then."""
        self._make_sure()
        enough = enough if self._images else all
        with contextlib.suppress(Blocked):
            self._line.wait(lambda _: enough(map(self._is_idle, self._images)), timeout, "save")
        return enough(map(self._is_idle, self._images))

    def _change(self, plan: Plan, images: int) -> None:
        """Make memory for images of a structure and hand it to the agent, once a structure.

        The former images go first, here and there, so that no memory is there twice; none of them
        is being persisted. Whatever stops it, the next save finds that its plan is not this one.
        """
        former, self._images = self._images, []
        if self._plan is not None:
            gone, self._plan = self._plan, None
            self._line.call("plan", **_handed(gone, []))
        for image in former:
            image.close()
        fresh: list[StagingImage] = []
        try:
            fresh += [StagingImage(plan) for _ in range(images)]
            self._hand_over(plan, fresh)
        except BaseException:
            for image in fresh:
                image.close()
            raise
        self._images, self._plan, self._agreed = fresh, plan, True

    def _hand_over(self, plan: Plan, images: Sequence[StagingImage]) -> None:
        reply = self._line.call("plan", **_handed(plan, images))
        if reply["free"] < (self._window + 3) * plan.nbytes:
            logger.warning(
                "%s has %s free, and up to %d epochs of %s may be there at once: a full "
                "disk makes saves fail",
                *(self._root, size(reply["free"]), self._window + 3, size(plan.nbytes)),
            )

    def _is_idle(self, image: StagingImage) -> bool:
        """Say whether an image's epoch has an outcome, so that its memory may be overwritten."""
        if image.epoch is not None and fate.settled(self._line.snapshot, image.epoch):
            image.epoch = None
        return image.epoch is None

    def stage(
        self,
        epoch: Epoch,
        image: StagingImage,
        objects: bytes,
        patience_s: float | None,
        left: bytes = b"",
        put: Put | None = None,
    ) -> tuple[str, list[str]]:
        """Hand an image over, again whenever the window may have room, for so many seconds.

        One that passes through a window of memory is handed over by ``put``, all of it before this
        returns. Gives why it was not taken and who is in the way, or ("", []).
        """
        image.filling = True
        try:
            why, by = self._await_room(epoch, image, objects, patience_s, left)
            if put is not None and not why:
                self._feed(epoch, image, put)
            return why, by
        finally:
            image.filling = False

    def _await_room(
        self,
        epoch: Epoch,
        image: StagingImage,
        objects: bytes,
        patience_s: float | None,
        left: bytes,
    ) -> tuple[str, list[str]]:
        """Hand over until it is taken, or refused for good. Reminds every ten seconds."""
        reminder = Reminder()
        while True:
            seen = self._line.snapshot
            why, by = self._stage(epoch, image, objects, left)
            if not (why and by) or reminder.over(patience_s):
                return why, by
            with contextlib.suppress(Blocked):  # it names others, and later
                self._line.wait(partial(_more_room, seen), 1.0, "save")
            if reminder.due():
                who = ", ".join(by)
                logger.warning(
                    "the save of %s has waited %.0f s for %s", epoch, reminder.waited, who
                )

    def _stage(
        self, epoch: Epoch, image: StagingImage, objects: bytes, left: bytes
    ) -> tuple[str, list[str]]:
        """Hand an image over once."""
        image.epoch, image.unsure = epoch, True
        image.objects, image.left = objects, left
        told = self._offer(epoch, image)
        try:
            reply = self._line.call("stage", **told)
            if reply.get("failed"):
                self._line.renew(reply["reason"])
                reply = self._line.call("stage", **told)
        except Blocked:  # the agent may still take it: the memory stays its own
            raise
        except HandfastError:
            image.epoch, image.unsure = None, False
            raise
        image.unsure = False
        if not reply["taken"]:
            image.epoch = None
            return reply["reason"], list(reply["by"])
        return "", []

    def _feed(self, epoch: Epoch, image: StagingImage, put: Put) -> None:
        """Hand an image over piece by piece, and wait until it is persisted, or has failed.

        An agent that dies meanwhile is replaced, and its successor is given all of it again: until
        this returns the state is what it was.
        """
        told: dict[str, Any] = {"epoch": msgspec.structs.astuple(epoch), "there": (), "key": ""}
        while not self._is_idle(image):
            reply = self._line.call("feed", **told)
            with memoryview(image.map) as window:
                for at, start, end in reply["wants"]:
                    put(start, end, window[at : at + end - start])
            told |= {"there": [at for at, _, _ in reply["wants"]], "key": reply["key"]}
            if not reply["wants"]:
                with contextlib.suppress(Blocked):  # then it is asked again: it may be another one
                    self._line.wait(lambda _: self._is_idle(image), 0.5, f"epoch {epoch}")

    def _is_lost(self, image: StagingImage) -> bool:
        """Say whether an image can't be handed over any more: its save was interrupted."""
        through = image.plan.window > 0 and not image.filling
        return through and not self._is_idle(image)

    def _offer(self, epoch: Epoch, image: StagingImage) -> dict[str, Any]:
        """Spell out what the agent is asked to take."""
        return {
            "epoch": msgspec.structs.astuple(epoch),
            "image": self._images.index(image),
            "key": image.key,
            "objects": image.objects,
            "left": image.left,
        }

    def _make_sure(self) -> None:
        """Hand over again what nobody answered for: an interrupt, or a stopped agent, came between.

        Asking twice is no harm, and without it the image would be in use for ever.
        """
        lost = any(map(self._is_lost, self._images))
        if self._plan is not None and (lost or not self._agreed):
            self._replace(self._plan, self._is_lost)  # its agent gives a lost one up then
        for image in self._images:
            if image.unsure and image.epoch is not None and not self._is_idle(image):
                self._stage(image.epoch, image, image.objects, image.left)

    def again(self) -> None:
        """Hand over again what a dead agent had not persisted; it is still in memory here."""
        if self._plan is None:
            return
        domain = self._line.domain
        self._line.ask("plan", domain=domain, **_handed(self._plan, self._images))
        held = [(image.epoch, image) for image in self._images if image.epoch]
        for epoch, image in sorted(held, key=lambda item: item[0]):
            if self._is_lost(image):
                told = msgspec.structs.astuple(epoch)
                self._line.ask("skip", domain=domain, epoch=told, reason=LOST)
                continue
            reply = self._line.ask("stage", domain=domain, **self._offer(epoch, image))
            if not reply["taken"]:  # the dead agent had voted on it
                image.epoch = None

    def close(self) -> None:
        """Give the memory back; what the agent still needs of it stays the agent's."""
        for image in self._images:
            image.close()
        self._images = []


def _handed(plan: Plan, images: Sequence[StagingImage]) -> dict[str, Any]:
    """Spell out a hand-over of memory to the agent."""
    return {
        "fds": [image.fd for image in images],
        "plan": msgspec.msgpack.encode(plan),
        "images": list(range(len(images))),
        "keys": [image.key for image in images],
    }


def _more_room(seen: Snapshot, now: Snapshot) -> bool:
    """Say whether anything has come that can make room for an epoch."""
    parts = ("line", "skipped", "outcomes", "failure")
    return any(getattr(now, part) != getattr(seen, part) for part in parts)
