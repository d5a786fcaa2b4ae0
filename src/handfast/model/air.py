"""The network of the searched protocol: what is in the air to each place, as one number.

What is sent is in the air until it arrives, as late as it likes and in any order,
behind crashes, restarts and new generations. A lost message is one that never arrives: every
state is judged with any part of the air still there. A message that is in the air already is not
there twice; that it arrives twice is an *echo*, and bounded. Two kinds of messages are dropped
when they can do nothing any more but be refused: those of another round of the receiver's
generation, and, unless the scenario keeps them (``stale``), those of a generation that is past
for the receiver, whose only effect is one more answer. Links that are not in ``links`` never
deliver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from handfast.core.messages import Message
from handfast.model.judge import Table
from handfast.model.place import Place

__all__ = ["Air"]


class Air:
    """What is in the air to a place: message numbers by sender, in the order of sending, or a set.

    ``senders`` says, for each configuration, which place each of its members is.
    """

    def __init__(
        self,
        places: Table[Place],
        senders: Mapping[str, Sequence[int]],
        *,
        ordered: bool,
        stale: bool,
    ) -> None:
        self.places = places
        self.ordered, self.stale = ordered, stale
        self.messages: Table[Message] = Table()
        self.queues: Table[tuple[int, ...]] = Table()
        self._members = senders
        self._senders: list[int] = []
        self._arriving: dict[int, tuple[tuple[int, bool], ...]] = {}
        self._posted: dict[tuple[int, int], int] = {}
        self._taken: dict[tuple[int, int], int] = {}
        self._pruned: dict[tuple[int, int], int] = {}

    def message(self, message: Message) -> int:
        """Number a message."""
        number = self.messages.number(message)
        if number == len(self._senders):
            self._senders.append(self._members[message.configuration][message.sender])
        return number

    def number(self, held: Sequence[int]) -> int:
        """Number what is in the air to a place."""
        order = self._senders.__getitem__ if self.ordered else None
        return self.queues.number(tuple(sorted(held, key=order)))

    def post(self, place: int, air: int, message: int) -> int:
        """Put a message into the air to a place, unless it is there, or dead."""
        key = (air, message)
        found = self._posted.get(key)
        if found is None:
            held = self.queues.values[air]
            if self.ordered:
                sender = self._senders[message]
                there = [m for m in held if self._senders[m] == sender][-1:] == [message]
            else:
                there = message in held
            found = self._posted[key] = air if there else self.number((*held, message))
        return self.prune(place, found)

    def arriving(self, air: int) -> tuple[tuple[int, bool], ...]:
        """List what may arrive, and whether it overtakes nothing."""
        found = self._arriving.get(air)
        if found is None:
            senders: list[int] = []
            ways = []
            for message in self.queues.values[air]:
                sender = self._senders[message]
                ways.append((message, not self.ordered or sender not in senders))
                senders.append(sender)
            found = self._arriving[air] = tuple(ways)
        return found

    def take(self, air: int, message: int) -> int:
        """Take a message out of the air."""
        key = (air, message)
        found = self._taken.get(key)
        if found is None:
            held = self.queues.values[air]
            at = held.index(message)
            found = self._taken[key] = self.queues.number(held[:at] + held[at + 1 :])
        return found

    def prune(self, place: int, air: int) -> int:
        """Drop what is dead for a place as it is now."""
        key = (place, air)
        found = self._pruned.get(key)
        if found is None:
            here, told = self.places.values[place], self.messages.values
            held = [m for m in self.queues.values[air] if not self._dead(here, told[m])]
            found = self._pruned[key] = self.queues.number(tuple(held))
        return found

    def _dead(self, place: Place, message: Message) -> bool:
        member = place.member
        if member is None:
            return place.incarnation > 0 and not place.down  # fenced; an heir is still to come
        if self.stale or message.generation > member.generation:
            return False
        return message.generation < member.generation or message.round != member.round
