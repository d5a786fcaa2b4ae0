"""What the ends of links must not forget, in a file that outlives the process.

Kept is what a new session is to offer, and whom this node knows, each in its newest life. A life
offers what the disk says, not what an earlier one offered: the peer may have been promised more by
then, or less.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import msgspec

from handfast.errors import UNREADABLE, Damaged, FormatError
from handfast.link.life import Node
from handfast.link.session import Bound, Record
from handfast.link.switch import Spoken
from handfast.store.files import Files, Posix, writing
from handfast.store.journal import Journal, scan

__all__ = ["Records", "recall"]

FEW: Final = 4096
"""After so many records more the file is written anew, with what counts alone."""

_REMEDY: Final = "take the link down at both ends, remove this file, and shake hands anew"


def recall(records: Iterable[Record]) -> tuple[tuple[Spoken, ...], dict[str, Node]]:
    """Read records, in order: what a session is to offer, and whom it knows, by key.

    Epochs are () where nothing is recorded.
    """
    spoken: tuple[Spoken, ...] = ()
    known: dict[str, Node] = {}
    for record in records:
        if isinstance(record, Bound):
            known[record.theirs.key] = record.theirs
        else:
            spoken = record.spoken
    return spoken, known


class Records:
    """The records of one link, or of all links of one end that speak the same: call it to add one.

    It is what a transport takes as its ``store``: a record is durable when the call returns. Safe
    in threads; one process has it at a time. Raises Damaged where the file can't be read, and
    SaveFailed where it can't be written: after that it is of no more use.
    """

    def __init__(self, path: str, files: Files | None = None) -> None:
        self._path = path
        self._files = files or Posix()
        self._lock = threading.Lock()
        self._kept = {_about(record)[0]: record for record in self._read()}
        self._journal = self._anew()
        self._more = 0

    @property
    def spoken(self) -> tuple[Spoken, ...]:
        """What a new session is to offer; () where nothing is recorded."""
        return recall(self._kept.values())[0]

    @property
    def known(self) -> dict[str, Node]:
        """The newest life of each peer that this node is bound to, by key."""
        return recall(self._kept.values())[1]

    def __call__(self, record: Record) -> None:
        """Make a record durable, unless it tells nothing new: so to meet again writes nothing."""
        name, told = _about(record)
        with self._lock:
            if (held := self._kept.get(name)) is not None and _about(held)[1] == told:
                return
            if self._more >= FEW:
                self._journal.close()
                self._journal, self._more = self._anew(), 0
            self._journal.append(msgspec.msgpack.encode(record))
            self._journal.sync()
            self._kept[name] = record
            self._more += 1

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._journal.close()

    def _read(self) -> list[Record]:
        if not self._files.exists(self._path):
            return []
        try:
            found = scan(self._files, self._path).records
            return [msgspec.msgpack.decode(data, type=Record) for data in found]
        except (*UNREADABLE, FormatError) as error:
            raise Damaged(f"{self._path}: {error}. What to do: {_REMEDY}") from error

    def _anew(self) -> Journal:
        """Write all that counts into a new file, and put that in the old one's place."""
        temporary = f"{self._path}.tmp"
        with writing("write the records", self._path):
            with suppress(FileNotFoundError):  # of one who died here
                self._files.unlink(temporary)
            journal = Journal.create(self._files, temporary)
            for record in self._kept.values():
                journal.append(msgspec.msgpack.encode(record))
            journal.sync()
            self._files.rename(temporary, self._path)
            self._files.fsync_dir(os.path.dirname(os.path.abspath(self._path)))
        return journal


def _about(record: Record) -> tuple[str, object]:
    """Tell what a record supersedes, of one peer or of this end, and what counts of it."""
    if isinstance(record, Bound):
        return record.theirs.key, record.theirs
    return "", record.spoken
