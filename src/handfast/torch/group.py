"""The ranks of a ``torch.distributed`` job, gathered when a round begins.

They meet in the job's store, and in no collective: one that waits in vain is broken for good, can't
say who is missing, and a rank that is frozen in it holds up all others.
"""

from __future__ import annotations

import time
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch.distributed as dist

from handfast.agent.reminder import Reminder
from handfast.checkpoint.collective import Place, place_of, reminding
from handfast.errors import Blocked

__all__ = ["Group"]

GO: Final = "go on"
OFF: Final = "called off"
LAST_S: Final = 5.0
"""How long rank 0 stays for the others: the store may be its own, and ends with it."""


_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class Group:
    """The ranks of a ``torch.distributed`` job, or of one of its process groups.

    Ranks that come to the restore() of another Checkpointer never meet: the n-th that is made for a
    process group on one rank is that of the n-th on another. ``run`` is its path, as it was given;
    ``patience_s`` bounds how long a rank waits for the others.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, run: str, patience_s: float | None = None
    ) -> None:
        self._run = run
        self._patience_s = patience_s
        given: object = group
        if given is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group() gives to all others
            raise ValueError(
                "group=: this rank is not in it. What to do: make a Checkpointer only on the ranks "
                "of the group, and give those of another group a path of its own"
            )
        among = group or dist.distributed_c10d._get_default_group()
        _made[among] = _made.get(among, 0) + 1
        self._name = f"{among.group_name}/{_made[among]}"
        self.place: Place = place_of(dist.get_rank(group), dist.get_world_size(group))

    def gather(self, what: str, data: bytes) -> list[bytes]:
        """Give every rank the data of all. Used when a round begins, never by a save.

        Raises Blocked, on every rank that waits, where some have not come within the patience, and
        names them: once they have, it can be tried again. Raises what the store raises where that
        is gone.
        """
        room = f"handfast/{self._name}/{what}"
        patience_s, reminder = self._patience_s, Reminder()
        never_came = set(range(self.place.size))
        with reminding("restore: waits for all ranks to come to it"):
            number = 0
            while True:
                meeting = _Meeting(f"{room}/{number}", self.place)
                number += 1
                if meeting.is_over():  # an earlier one
                    continue
                if meeting.attend(data, reminder, patience_s):
                    return meeting.collect()
                absent = meeting.absent()
                never_came.intersection_update(absent)
                if absent and reminder.over(patience_s):
                    raise Blocked(
                        f"not all ranks have come to restore() of {self._run} in {patience_s:g} s",
                        by=[f"rank {n}" for n in sorted(never_came) or absent],
                    )


class _Meeting:
    """One attempt of all ranks to be in one place at once; each brings its data.

    What becomes of it is one key of the job's store, written once, by compare-and-set: rank 0 says
    GO when all have laid down theirs, and whoever leaves before calls it OFF. So nobody goes on
    with a rank that has left, and who has left finds the next attempt free of what it laid down.
    """

    def __init__(self, name: str, place: Place) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store()  # its stubs know no bytes
        self._outcome = f"{name}/outcome"
        self._read = f"{name}/read"
        self._laid = [f"{name}/{rank}" for rank in range(place.size)]
        self._rank = place.rank

    def is_over(self) -> bool:
        """Say whether its outcome is decided."""
        return bool(self._store.check([self._outcome]))

    def absent(self) -> list[int]:
        """Give the ranks that kept it from going on: who never came, else rank 0, who says so."""
        never = [n for n, key in enumerate(self._laid) if not self._store.check([key])]
        return never or ([0] if self._rank else [])

    def attend(self, data: bytes, reminder: Reminder, patience_s: float | None) -> bool:
        """Come, and wait; say whether all go on. Whatever ends the waiting ends the meeting."""
        self._store.set(self._laid[self._rank], data)
        try:
            while not self.is_over():
                if self._rank == 0 and self._store.check(self._laid):
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

    def collect(self) -> list[bytes]:
        """Give what all have laid down. Rank 0 goes last, and takes it away if all have read it."""
        found: list[bytes] = self._store.multi_get(self._laid)
        have_read = self._store.add(self._read, 1)
        if self._rank == 0:
            leaving = Reminder()
            while have_read < len(found) and not leaving.over(LAST_S):
                time.sleep(0.01)
                have_read = self._store.add(self._read, 0)
            if have_read == len(found):
                for key in (*self._laid, self._read):
                    self._store.delete_key(key)
        return found
