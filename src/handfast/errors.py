"""Every error that handfast raises on purpose: what is wrong, where, and what to do."""

from collections.abc import Sequence
from typing import Final

import msgspec

from handfast.core.verdict import Verdict

__all__ = [
    "UNREADABLE",
    "Blocked",
    "Damaged",
    "FormatError",
    "HandfastError",
    "NoRun",
    "Poisoned",
    "Refused",
    "SaveFailed",
    "Superseded",
    "Unstorable",
]


UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises of bytes that are no value: not its type, no UTF-8, or nested too deep."""


class HandfastError(Exception):
    """The root of all errors that handfast raises on purpose."""


class NoRun(HandfastError):
    """There is no run at the paths that were given."""


class FormatError(HandfastError):
    """Bytes that can't be read: not ours, of another version, or never written whole."""


class Damaged(FormatError):
    """Bytes that were right once: a digest differs, a file was cut, a record was overwritten."""


class Unstorable(HandfastError):
    """An object in the state that can't be stored.

    ``path`` is where it stands in the state, ``type_name`` its type's qualified name. Without a
    ``remedy`` the ways out are those of any object.
    """

    def __init__(self, path: str, type_name: str, why: str, remedy: str = "") -> None:
        self.path = path
        self.type_name = type_name
        way = f"What to do: {remedy}" if remedy else _ways_out(path, type_name)
        super().__init__(f"{path or 'the state'}: {type_name} can't be stored: {why}. {way}")


def _ways_out(path: str, type_name: str) -> str:
    return (
        "Ways out: give the object a state_dict() of plain values, "
        f"handfast.register({type_name.rpartition('.')[2]}, encode, decode), or "
        f"pickle=({path!r},) if you trust whoever can write the run"
    )


class Refused(HandfastError):
    """A restore or a read that would not be right. Nothing was changed.

    ``verdict`` says what was found, ``shards`` names where, ``remedy`` what can be done. It is None
    where nothing stored was judged: a rank could start no agent, say, or its disk is full.
    """

    def __init__(
        self, message: str, *, verdict: Verdict | None, shards: Sequence[str] = (), remedy: str = ""
    ) -> None:
        self.verdict = verdict
        self.shards = tuple(shards)
        self.remedy = remedy
        where = f" [{', '.join(self.shards)}]" if self.shards else ""
        tail = f". What to do: {remedy}" if remedy else ""
        found = f"{verdict}: " if verdict else ""
        super().__init__(f"{found}{message}{where}{tail}")


class Blocked(HandfastError):
    """A wait that ran out of time. ``by`` names every domain that is still missing."""

    def __init__(self, message: str, *, by: Sequence[str] = ()) -> None:
        self.by = tuple(by)
        names = ", ".join(self.by) if self.by else "nobody known"
        super().__init__(f"{message}; blocked by: {names}")


class SaveFailed(HandfastError):
    """An epoch could not be persisted here. Older epochs are untouched."""


class Superseded(HandfastError):
    """A later round of the job has taken over this run; this process must stop."""


class Poisoned(HandfastError):
    """A load failed half-way, so the live state is of no epoch; only a restore mends it."""
