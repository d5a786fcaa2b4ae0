"""How many events a second the protocol takes: ``handfast.core.member.step`` on one core.

Real members are driven through epochs in memory: captured, persisted, and every message that
follows from that, until nobody has anything to say. ``steps`` are those very states and events,
given to ``step`` once more; in ``carried`` the loop that carries messages is in the figure. Jobs of
4 (gossip), 64 and 512 domains (the tree). What an epoch costs in messages and bytes up to 131,072
domains is ``handfast simulate --scale``'s to say.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from benchmarks.common.figures import Figure, Setting
from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.lattice import Epoch
from handfast.core.state import Member
from handfast.sim.scale import Crowd, job

VARIES = ()
DOMAINS = (4, 64, 512)
LEAST_S = 0.5
"""Seconds of a lap at least."""
LEAST_STEPS = 1000
"""Steps at least that are taken again."""


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it."""
    for domains in DOMAINS:
        members = Members(domains)
        members.epoch()  # the first tells everybody of the generation, too
        for what, rate in (("steps", members.steps), ("carried", members.carried)):
            yield Figure(
                question="protocol",
                who="member.step",
                what=what,
                unit="events/s",
                values=tuple(rate() for _ in range(setting.repeat)),
                at={"domains": domains},
            )


class Members:
    """All members of a job, in one process."""

    def __init__(self, domains: int) -> None:
        self._members = Crowd(job(domains)).members
        self._step = 0

    def steps(self) -> float:
        """Take the steps of some epochs, without what lies between them; gives events a second."""
        taken: list[tuple[Member, ev.Event]] = []
        while len(taken) < LEAST_STEPS:
            self.epoch(taken)
        step, laps, began = door.step, 0, time.perf_counter()
        while (took := time.perf_counter() - began) < LEAST_S:
            for member, event in taken:
                step(member, event)
            laps += 1
        return laps * len(taken) / took

    def carried(self) -> float:
        """Take epochs for a while; gives events a second."""
        began, events = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < LEAST_S:
            events += self.epoch()
        return events / took

    def epoch(self, taken: list[tuple[Member, ev.Event]] | None = None) -> int:
        """Save once, and go on until nobody sends; gives how many events that took.

        Notes in ``taken`` each state and the event that was given to it. Raises RuntimeError where
        not all know the epoch converged.
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
            if taken is not None:
                taken.append((self._members[at], event))
            self._members[at], effects = door.step(self._members[at], event)
            todo.extend((send.to, ev.Received(send.message)) for send in effects.send)
            events += 1
        for member in self._members:
            line = member.tallies[0].line
            if line is None or line.epoch != epoch:
                raise RuntimeError(f"{member.id} does not know that {epoch} converged")
        return events
