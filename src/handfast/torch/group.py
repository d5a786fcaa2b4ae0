"""The ranks of a ``torch.distributed`` job, gathered when a round begins."""

from __future__ import annotations

import itertools
import time
from datetime import timedelta
from typing import Final

import torch.distributed as dist

from handfast.agent.reminder import Reminder
from handfast.checkpoint.collective import Place, place_of, reminding
from handfast.errors import Blocked

__all__ = ["Group"]

FOREVER_S: Final = 30 * 86400.0
GO: Final = "go on"
OFF: Final = "called off"


class Group:
    """The ranks of a ``torch.distributed`` job, by a gloo group of handfast's own.

    ``patience_s`` bounds how long a rank waits for the others to come.
    """

    def __init__(self, group: dist.ProcessGroup | None, patience_s: float | None = None) -> None:
        self._ours = group is None
        self._patience_s = FOREVER_S if patience_s is None else patience_s
        if group is None:
            limit = timedelta(seconds=self._patience_s + 60.0)
            group = dist.new_group(backend="gloo", timeout=limit)
        self._group = group
        self.place: Place = place_of(dist.get_rank(self._group), dist.get_world_size(self._group))

    def gather(self, what: str, data: bytes) -> list[bytes]:
        """Give every rank the data of all. Used when a round begins, never by a save.

        Raises Blocked, on every rank that waits, where some have not come within the patience, and
        names them: once they have, it can be tried again. Raises what the group raises where one
        has died.
        """
        self._meet(f"handfast/{self._group.group_name}/{what}")
        found: list[bytes] = [b""] * self.place.size
        dist.all_gather_object(found, data, group=self._group)
        return found

    def _meet(self, room: str) -> None:
        """Meet in the job's store first: a collective that waits in vain is broken for good, and
        could not say who is missing.
        """
        reminder = Reminder()
        never_came = set(range(self.place.size))
        with reminding("restore: waits for all ranks to come to it"):
            for number in itertools.count():
                meeting = _Meeting(f"{room}/{number}", self.place)
                if meeting.is_over():  # an earlier one
                    continue
                if meeting.attend(reminder, self._patience_s):
                    return
                absent = meeting.absent()
                never_came.intersection_update(absent)
                if absent and reminder.over(self._patience_s):
                    raise Blocked(
                        f"not all ranks have come to restore() in {self._patience_s:g} s",
                        by=[f"rank {n}" for n in sorted(never_came) or absent],
                    )

    def close(self) -> None:
        """Give up a group that was made here: each has threads and sockets of its own."""
        if self._ours and dist.is_initialized():
            self._ours = False
            dist.destroy_process_group(self._group)


class _Meeting:
    """One attempt of all ranks to be in one place at once.

    What becomes of it is one key of the job's store, written once, by compare-and-set: rank 0 says
    GO when all have laid down theirs, and whoever leaves before calls it OFF. So nobody goes on
    with a rank that has left, and who has left finds the next attempt free of what it laid down.
    """

    def __init__(self, name: str, place: Place) -> None:
        self._store = dist.distributed_c10d._get_default_store()
        self._outcome = f"{name}/outcome"
        self._here = [f"{name}/{rank}" for rank in range(place.size)]
        self._rank = place.rank

    def is_over(self) -> bool:
        """Say whether its outcome is decided."""
        return bool(self._store.check([self._outcome]))

    def absent(self) -> list[int]:
        """Give the ranks that never came to it."""
        return [n for n, key in enumerate(self._here) if not self._store.check([key])]

    def attend(self, reminder: Reminder, patience_s: float) -> bool:
        """Come, and wait; say whether all go on. Whatever ends the waiting ends the meeting."""
        self._store.set(self._here[self._rank], "here")
        try:
            while not self.is_over():
                if self._rank == 0 and self._store.check(self._here):
                    self._decide(GO)
                elif reminder.over(patience_s):
                    self._decide(OFF)
                else:
                    time.sleep(min(0.01 + reminder.waited / 10, 0.25))
        finally:
            outcome = self._decide(OFF)
        return outcome == GO

    def _decide(self, outcome: str) -> str:
        """Decide, unless that is done; give the outcome."""
        return str(self._store.compare_set(self._outcome, "", outcome).decode())
