"""The network: it delays, loses, doubles, reorders, partitions one way, and replays what is old."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Final

import msgspec

from handfast.core.messages import Message
from handfast.sim.agenda import MS, SECOND, Agenda

__all__ = ["Network", "Packet"]

MEMORY: Final = 2_048
"""So many messages of the past may come again."""


class Packet(msgspec.Struct, frozen=True):
    """A message on its way between two domains."""

    source: str
    target: str
    message: Message


class Network:
    """Fair-lossy links between hosts.

    A delay is ``base_us`` and an exponential part of mean ``spread_us``; one in ``tail`` messages
    takes up to four seconds (0: none). So messages overtake each other. ``cut`` holds directed
    pairs of hosts that nothing passes between, ``slow`` those whose delays are multiplied. While
    ``hold`` is set everything waits in ``held`` for somebody who chooses. ``goals`` counts what it
    has done to messages.
    """

    def __init__(
        self,
        agenda: Agenda,
        chance: Random,
        deliver: Callable[[Packet], None],
        goals: Counter[str],
    ) -> None:
        self.base_us = MS // 2
        self.spread_us = 2 * MS
        self.tail = 0.0
        self.loss = 0.0
        self.twice = 0.0
        self.cut: set[tuple[str, str]] = set()
        self.slow: dict[tuple[str, str], int] = {}
        self.hold = False
        self.held: list[Packet] = []
        self.past: list[Packet] = []
        self.sent = 0
        self.lost = 0
        self._agenda, self._chance, self._deliver, self._goals = agenda, chance, deliver, goals
        self._latest: dict[tuple[str, str], int] = {}

    def send(self, packet: Packet, link: tuple[str, str]) -> None:
        """Take a message from one host to another, perhaps."""
        self.sent += 1
        if len(self.past) < MEMORY:
            self.past.append(packet)
        else:
            self.past[self.sent % MEMORY] = packet
        chance = self._chance
        if link in self.cut or (self.loss and chance.random() < self.loss):
            self.lost += 1
            self._goals["a message is lost"] += link not in self.cut
            return
        if self.hold:
            self.held.append(packet)
            return
        self._agenda.after(self._delay(link), self._arrive, packet, self.sent)
        if self.twice and chance.random() < self.twice:
            self._goals["a message comes twice"] += 1
            self._agenda.after(self._delay(link), self._arrive, packet, self.sent)

    def _arrive(self, packet: Packet, number: int) -> None:
        way = (packet.source, packet.target)
        if number < self._latest.get(way, 0):
            self._goals["a message is overtaken"] += 1
        else:
            self._latest[way] = number
        self._deliver(packet)

    def _delay(self, link: tuple[str, str]) -> int:
        chance = self._chance
        delay = self.base_us + int(chance.expovariate(1.0) * self.spread_us)
        if self.tail and chance.random() < self.tail:
            self._goals["a message is very late"] += 1
            delay += int(chance.random() * 4 * SECOND)
        if self.slow and link in self.slow:
            self._goals["a message goes over a slow link"] += 1
            delay *= self.slow[link]
        return delay

    def replay(self) -> bool:
        """Deliver again something that was sent at any time; False where nothing was."""
        if self.past:
            self._goals["an old message comes again"] += 1
            packet = self.past[self._chance.randrange(len(self.past))]
            self._agenda.after(MS, self._deliver, packet)
        return bool(self.past)

    def heal(self) -> None:
        """Be fair from now on."""
        self.loss = self.twice = self.tail = 0.0
        self.cut.clear()
        self.slow.clear()
