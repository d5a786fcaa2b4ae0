"""How many events a second the protocol takes: ``handfast.core.member.step`` on one core.

Real members are driven through epochs in memory: captured, persisted, and every message that
follows from that, until nobody has anything to say. The loop that carries messages is in the
figure. Jobs of 4 (gossip), 64 and 512 domains (the tree). What an epoch costs in messages and bytes
up to 131,072 domains is ``handfast simulate --scale``'s to say.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from benchmarks.common.figures import Figure, Setting
from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.lattice import Epoch
from handfast.sim.scale import Crowd, job

VARIES = ()
DOMAINS = (4, 64, 512)
LEAST_S = 0.5
"""Seconds of a lap at least."""


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it."""
    for domains in DOMAINS:
        members = Members(domains)
        members.epoch()  # the first tells everybody of the generation, too
        yield Figure(
            question="protocol",
            who="member.step",
            what="events",
            unit="events/s",
            values=tuple(members.rate() for _ in range(setting.repeat)),
            at={"domains": domains},
        )


class Members:
    """All members of a job, in one process."""

    def __init__(self, domains: int) -> None:
        self._members = Crowd(job(domains)).members
        self._step = 0

    def rate(self) -> float:
        """Take epochs for a while; gives events a second."""
        began, events = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < LEAST_S:
            events += self.epoch()
        return events / took

    def epoch(self) -> int:
        """Save once, and go on until nobody sends; gives how many events that took.

        Raises RuntimeError where not all know the epoch converged.
        """
        self._step += 10
        epoch = Epoch(1, self._step)
        todo: deque[tuple[int, ev.Event]] = deque()
        for at in range(len(self._members)):
            todo.append((at, ev.Captured(epoch)))
            todo.append((at, ev.Persisted(epoch, f"{at}:{epoch}")))
        events = 0
        while todo:
            at, event = todo.popleft()
            self._members[at], effects = door.step(self._members[at], event)
            todo.extend((send.to, ev.Received(send.message)) for send in effects.send)
            events += 1
        for member in self._members:
            line = member.tallies[0].line
            if line is None or line.epoch != epoch:
                raise RuntimeError(f"{member.id} does not know that {epoch} converged")
        return events
