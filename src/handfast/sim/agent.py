"""One incarnation of a domain's agent: the real member, and the order persist -> send -> apply.

It does what :mod:`handfast.agent.domain` does: takes all events that wait as one batch, syncs their
records, looks whether a successor has claimed the domain, sends, applies. Here it can be cut or
frozen at every boundary of that.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import msgspec

from handfast.core import member as door
from handfast.core.events import Action, Effects, Event, Send
from handfast.core.messages import Record
from handfast.core.state import Member
from handfast.laws.truth import Turn
from handfast.sim.disk import Disk

__all__ = ["Agent", "Trap"]


class Trap(msgspec.Struct):
    """Where a batch is cut, or frozen: at its sync (a freeze), or after so many sends and deeds."""

    left: int
    freeze: bool


class Port(Protocol):
    """What an agent stands in."""

    def sync(self, agent: Agent) -> None:
        """Call ``agent.synced`` once the disk has done what it does, unless it fails."""

    def wrote(self, agent: Agent, turn: Turn) -> None:
        """Hear of a step, its records durable."""

    def send(self, agent: Agent, send: Send) -> None:
        """Post a message."""

    def act(self, agent: Agent, action: Action) -> None:
        """Do what a step asked for."""

    def fell(self, agent: Agent, why: str) -> None:
        """Hear that the agent has ended."""


class Agent:
    """One life. ``member`` is ahead of the disk while a batch is synced; ``shown`` is not.

    ``asleep``: it was frozen, and takes up where it was when it is woken.
    """

    __slots__ = (
        "_batch", "_looked", "_port", "_rest", "_void", "alive", "asleep", "busy", "disk", "id",
        "inbox", "incarnation", "member", "name", "shown", "trap", "turns",
    )  # fmt: skip

    def __init__(self, disk: Disk, member: Member, port: Port) -> None:
        self.disk = disk
        self.id = disk.domain.id
        self.incarnation = member.incarnation
        self.name = f"{self.id}.{self.incarnation}"
        self.member = self.shown = member
        self.alive = True
        self.asleep = False
        self.busy = False
        self.trap: Trap | None = None
        self.turns = 0
        self.inbox: list[Event] = []
        self._batch: list[Turn] = []
        self._rest: deque[Send | Action] = deque()
        self._looked = False
        self._void = False
        self._port = port

    def take(self, event: Event) -> None:
        """Hear of an event, now or once the batch before it is done."""
        if self.alive:
            self.inbox.append(event)
            if not (self.busy or self.asleep):
                self._turn()

    def _turn(self) -> None:
        member = self.member
        batch = self._batch = []
        persist = False
        for event in self.inbox:
            after, effects = door.step(member, event)
            self.turns += 1
            batch.append(Turn(member, event, after, effects, self.turns == 1))
            member = after
            persist = persist or bool(effects.persist)
        self.inbox.clear()
        self.member = member
        if persist:
            self.busy, self._looked = True, False
            if self.trap is not None and self.trap.freeze and self.trap.left == 0:
                self.trap, self.asleep = None, True
            self._port.sync(self)
        else:
            self._looked = True
            self._written()

    @property
    def pending(self) -> list[Event]:
        """The events that were taken, and have led to nothing durable yet."""
        return [*(turn.event for turn in self._batch), *self.inbox]

    @property
    def unsynced(self) -> list[Record]:
        """The records of the batch that is being synced."""
        return [record for turn in self._batch for record in turn.effects.persist]

    def synced(self) -> None:
        """Hear that the records are durable; they are, also where nobody is awake to hear it.

        Behind a seal they are void, and no disk tells: the look that follows does.
        """
        if self.alive:
            self._void = not self.disk.commit(self.incarnation, self.unsynced)
            self._written()

    def _written(self) -> None:
        batch, self._batch = self._batch, []
        rest = self._rest
        for turn in batch:
            if not self._void:
                self.shown = turn.after
                self._port.wrote(self, turn)
            rest.extend(turn.effects.send)
        for turn in batch:
            rest.extend(turn.effects.apply)
        self._go_on()

    def _go_on(self) -> None:
        """Look, send, apply: as far as it comes."""
        if self.asleep:
            return
        if not self._looked:
            self._looked = True
            if self.disk.claimed > self.incarnation:
                seal = ", behind whose seal it wrote" if self._void else ""
                self._end(f"it sees that it has a successor{seal}")
                return
        rest = self._rest
        self.busy = bool(rest)
        while rest and self.alive:
            if self.trap is not None and self._caught(self.trap):
                return
            effect = rest.popleft()
            if isinstance(effect, Send):
                self._port.send(self, effect)
            else:
                self._port.act(self, effect)
        self.busy = False
        if self.inbox and self.alive:
            self._turn()

    def _caught(self, trap: Trap) -> bool:
        trap.left -= 1
        if trap.left >= 0:
            return False
        self.trap = None
        if trap.freeze:
            self.asleep = True
        else:
            self._end("is cut off between its effects")
        return True

    def wake(self) -> None:
        """Go on after a freeze."""
        self.asleep = False
        if not self.alive:
            return
        if self.busy and self._batch:
            return  # the sync is still under way
        if self.busy:
            self._go_on()
        elif self.inbox:
            self._turn()

    def crash(self, kept: int) -> None:
        """End at once; of what was being synced the first ``kept`` records are durable."""
        if self.incarnation > self.disk.sealed:
            for turn in self._batch:
                part = turn.effects.persist[:kept]
                kept -= len(part)
                self.disk.commit(self.incarnation, part)
                if part:
                    done = Effects(part)
                    self._port.wrote(self, msgspec.structs.replace(turn, effects=done, cut=True))
        self._end("crashes")

    def _end(self, why: str) -> None:
        self.alive = False
        self._batch = []
        self._rest.clear()
        self.inbox.clear()
        self._port.fell(self, why)
