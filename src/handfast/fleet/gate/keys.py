"""Where the ranks of a round meet: a few calls on keys and texts, in memory or in torch's store."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, Protocol

from handfast.errors import Blocked

__all__ = ["Keys", "Memory", "Torch"]


class Keys(Protocol):
    """A store of texts that all ranks of a round reach. Raises Blocked where it is gone."""

    def set(self, key: str, text: str) -> None:
        """Put a text."""

    def claim(self, key: str) -> int:
        """Count one more at a key; the first is told 1."""

    def once(self, key: str, text: str) -> str:
        """Put a text unless there is one; give the one that is there now."""

    def get(self, key: str, wait_s: float) -> str | None:
        """Give a text, waiting for it up to so many seconds; None where it did not come."""


class Memory:
    """A store within one process, for simulations and for threads."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._change = threading.Condition()

    def set(self, key: str, text: str) -> None:
        with self._change:
            self._texts[key] = text
            self._change.notify_all()

    def claim(self, key: str) -> int:
        with self._change:
            self._counts[key] = self._counts.get(key, 0) + 1
            return self._counts[key]

    def once(self, key: str, text: str) -> str:
        with self._change:
            self._change.notify_all()
            return self._texts.setdefault(key, text)

    def get(self, key: str, wait_s: float) -> str | None:
        with self._change:
            self._change.wait_for(lambda: key in self._texts, wait_s)
            return self._texts.get(key)


class Torch:
    """A store of torch.distributed, as its rendezvous gives it.

    Calls: `set`, `get`, `add`, `check`, `wait`, `compare_set` of torch.distributed.Store, 2.13. A
    text never holds a NUL, and is never empty: `compare_set` takes an empty text for none.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def set(self, key: str, text: str) -> None:
        self._call("set", key, text)

    def claim(self, key: str) -> int:
        return int(self._call("add", key, 1))

    def once(self, key: str, text: str) -> str:
        return bytes(self._call("compare_set", key, "", text)).decode()

    def get(self, key: str, wait_s: float) -> str | None:
        if not self._call("check", [key]):
            if wait_s <= 0:
                return None
            try:
                self._store.wait([key], timedelta(seconds=wait_s))
            except RuntimeError:  # a timeout, or the store is gone: the next call tells
                if not self._call("check", [key]):
                    return None
        return bytes(self._call("get", key)).decode()

    def _call(self, name: str, *arguments: object) -> Any:
        try:
            return getattr(self._store, name)(*arguments)
        except RuntimeError as error:  # torch's errors of stores are all of these
            what = str(error).partition("\n")[0]
            raise Blocked(f"the store of the rendezvous failed at {name}: {what}") from error
