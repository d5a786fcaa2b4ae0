"""Shows that a meeting of ranks has one outcome, however its ends overlap."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch.distributed as dist

from handfast.agent.reminder import Reminder
from handfast.checkpoint.collective import Place
from handfast.torch.group import _Meeting


class Interposed:
    """The job's store; before the first decision that reaches it, something else happens."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self.before: Callable[[], object] | None = None

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Decide, after what comes before."""
        before, self.before = self.before, None
        if before is not None:
            before()
        return self._store.compare_set(key, expected, desired)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Interposed:
    """A store of two ranks in one process."""
    store = Interposed()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return store


def attend(rank: int, patience_s: float) -> bool:
    """Let a rank come, and wait so long."""
    return _Meeting("room/0", Place(rank, 2, rank, "node")).attend(b"", Reminder(), patience_s)


def test_nobody_goes_on_with_a_rank_that_gives_up_as_all_are_there(store: Interposed) -> None:
    """Rank 0 has seen all; before it says so, rank 1's patience ends."""
    left: list[bool] = []
    store.set("room/0/1", "here")
    store.before = lambda: left.append(not attend(1, 0.0))
    assert not attend(0, 60.0)
    assert left == [True]


def test_a_rank_whose_patience_ends_as_all_go_on_goes_on(store: Interposed) -> None:
    """Rank 1 has had enough; before it says so, rank 0 has seen all."""
    gone_on: list[bool] = []
    store.set("room/0/1", "here")
    store.before = lambda: gone_on.append(attend(0, 60.0))
    assert attend(1, 0.0)
    assert gone_on == [True]


def test_what_ends_the_waiting_ends_the_meeting(
    store: Interposed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: who comes later finds it over, and waits in the next."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("handfast.torch.group.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attend(1, 60.0)
    meeting = _Meeting("room/0", Place(0, 2, 0, "node"))
    assert meeting.is_over()
    assert meeting.absent() == [0]
    assert not attend(0, 60.0)


def test_a_rank_that_freezes_once_all_go_on_holds_up_nobody(store: Interposed) -> None:
    """Rank 1 came, and never reads what was laid down; with a collective rank 0 waited for it."""
    store.set("room/0/1", b"of 1\0")
    meeting = _Meeting("room/0", Place(0, 2, 0, "node"))
    assert meeting.attend(b"of 0\0", Reminder(), 60.0)
    assert meeting.collect() == [b"of 0\0", b"of 1\0"]


def test_whoever_waits_for_a_frozen_rank_0_names_it(store: Interposed) -> None:
    """It came, and so did all others; nobody else can say that they go on."""
    store.set("room/0/0", b"")
    meeting = _Meeting("room/0", Place(1, 2, 1, "node"))
    assert not meeting.attend(b"", Reminder(), 0.0)
    assert meeting.absent() == [0]


def test_rank_0_stays_until_all_have_read(store: Interposed) -> None:
    """The store may be its own, and it may have nothing more to do: the others would lose both."""
    store.set("room/0/1", b"of 1")
    first, other = (_Meeting("room/0", Place(n, 2, n, "node")) for n in range(2))
    assert first.attend(b"of 0", Reminder(), 60.0)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(first.collect)
        assert not wait([reading], 0.3).done
        assert other.collect() == reading.result() == [b"of 0", b"of 1"]
    assert not store.check(["room/0/0"])
    assert other.is_over()
