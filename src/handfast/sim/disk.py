"""One domain's disk: what is durable on it, and how it fails.

Of a journal only what was synced counts. A crash in the middle of a sync leaves any beginning of
what was being written; a record that is cut is no record. Images come whole or not at all, since
nothing names one before it is durable; what befalls it afterwards is rot, or that it is gone.
The owner of an incarnation syncs first and looks for a successor's claim afterwards; the successor
claims first and seals what it read (:mod:`handfast.store.claims` has the argument).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from handfast.core.lattice import Epoch
from handfast.core.membership import Domain
from handfast.core.messages import Record, Staged

__all__ = ["Disk", "Image"]


@dataclass(slots=True)
class Image:
    """A shard of one epoch; ``sound`` until it rots."""

    digest: str
    sound: bool = True


@dataclass(slots=True)
class Disk:
    """What one domain has, and keeps over its agent's lives.

    ``slow`` multiplies every delay. ``stuck``: nothing that was begun ends. ``failing``: the next
    sync fails, and the error is final. ``claimed`` and ``sealed`` are incarnations: the newest
    that was claimed, and the newest whose records count no more.
    """

    domain: Domain
    host: str
    records: list[Record] = field(default_factory=list)
    images: dict[Epoch, Image] = field(default_factory=dict)
    attested: set[Epoch] = field(default_factory=set)
    pins: tuple[Epoch, ...] = ()
    claimed: int = 0
    sealed: int = 0
    slow: int = 1
    full: bool = False
    failing: bool = False
    stuck: bool = False
    fenced: bool = False

    def commit(self, incarnation: int, records: Sequence[Record]) -> bool:
        """Make records durable; False where they fall behind a seal, and are void."""
        if incarnation <= self.sealed:
            return False
        self.records += records
        self.attested.update(r.epoch for r in records if isinstance(r, Staged))
        return True
