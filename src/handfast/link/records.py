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

from handfast.errors import UNREADABLE, Damaged, FormatError, SaveFailed
from handfast.link.life import Node, newer
from handfast.link.session import Bound, Record
from handfast.link.switch import Spoken
from handfast.store.files import Files, Posix, writing
from handfast.store.journal import Journal, scan

__all__ = ["Records", "recall"]

_RECORD: Final[msgspec.msgpack.Decoder[Record]] = msgspec.msgpack.Decoder(Record)

FEW: Final = 4096
"""After so many records more the file is written anew, with what counts alone."""

_REMEDY: Final = "take the link down at both ends, remove this file, and shake hands anew"


def recall(records: Iterable[Record]) -> tuple[tuple[Spoken, ...], dict[str, Node]]:
    """Read records, in order: what a session is to offer, and whom it knows, in the newest life.

    Epochs are () where nothing is recorded.
    """
    spoken: tuple[Spoken, ...] = ()
    known: dict[str, Node] = {}
    for record in records:
        if not isinstance(record, Bound):
            spoken = record.spoken
        elif newer(record.theirs, known.get(record.theirs.key)):
            known[record.theirs.key] = record.theirs
    return spoken, known


class Records:
    """The records of one link, or of all links of one end that speak the same: call it to add one.

    It is what a transport takes as its ``store``, and a session as whom it knows: a record is
    durable when the call returns. Safe in threads; one process has the file at a time, which is
    made when there is something to record. Raises Damaged where it can't be read, and SaveFailed
    where it can't be written; the next call tries again, in a new file.
    """

    def __init__(self, path: str, files: Files | None = None) -> None:
        self._path = path
        self._files = files or Posix()
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._more = 0
        self.spoken: tuple[Spoken, ...] = ()
        """What a new session is to offer; () where nothing is recorded."""
        self.known: dict[str, Node] = {}
        """The newest life of each peer that this node is bound to, by key; replaced, never changed.
        """
        self._kept: dict[str, Record] = {}
        for record in self._read():
            self._keep(record)

    def get(self, peer: str) -> Node | None:
        """Give the newest life of a peer."""
        return self.known.get(peer)

    def news(self, record: Record) -> bool:
        """Say whether a record tells anything new: so to meet again writes nothing."""
        if isinstance(record, Bound):
            return newer(record.theirs, self.known.get(record.theirs.key))
        return record.spoken != self.spoken

    def __call__(self, record: Record) -> None:
        """Make a record durable, unless it tells nothing new."""
        with self._lock:
            if not self.news(record):
                return
            if self._journal is None or self._more >= FEW or not self._journal.stands():
                self._drop()
                self._journal, self._more = self._anew(), 0
            try:
                self._journal.append(msgspec.msgpack.encode(record))
                self._journal.sync()
            except SaveFailed:  # such a journal is dead
                self._drop()
                raise
            self._keep(record)
            self._more += 1

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            with suppress(SaveFailed):
                journal.close()

    def _keep(self, record: Record) -> None:
        if not self.news(record):
            return
        if isinstance(record, Bound):
            self._kept[record.theirs.key] = record
            self.known = {**self.known, record.theirs.key: record.theirs}
        else:
            self._kept[""] = record
            self.spoken = record.spoken

    def _read(self) -> list[Record]:
        if not self._files.exists(self._path):
            return []
        try:
            found = scan(self._files, self._path).records
            return [_RECORD.decode(data) for data in found]
        except (*UNREADABLE, FormatError, Damaged) as error:
            why = str(error).partition(". What to do")[0].partition(": this domain's")[0]
            raise Damaged(f"{self._path}: {why}. What to do: {_REMEDY}") from error

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
        journal.path = self._path
        return journal
