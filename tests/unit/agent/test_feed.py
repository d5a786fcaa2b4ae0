"""Shows that an image which comes piece by piece comes whole, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from agentkit import looped

from handfast.agent.feed import Feed, Want
from handfast.errors import SaveFailed
from handfast.store.bulk import Span

PIECE = 4096


def image(pieces: int) -> bytes:
    return os.urandom(pieces * PIECE - 100)


def spans(nbytes: int) -> list[Span]:
    return [Span(at, min(at + PIECE, nbytes), at) for at in range(0, nbytes, PIECE)]


async def serve(feed: Feed, window: memoryview, data: bytes) -> int:
    """What a trainer does; gives how often it had to ask."""
    there: list[int] = []
    asked = 0
    while wants := await feed.wanted(there):
        asked += 1
        for want in wants:
            window[want.at : want.at + want.end - want.start] = data[want.start : want.end]
        there = [want.at for want in wants]
    return asked


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("lanes", [1, 4])
@looped
async def test_every_piece_comes_once_and_whole(slots: int, lanes: int) -> None:
    """Shows it for fewer slots than threads, and for more: whoever asks gets what was asked for,
    and what is lent is not overwritten."""
    window, data = memoryview(mmap.mmap(-1, slots * PIECE)), image(40)
    feed = Feed(window, PIECE)
    found: dict[int, bytes] = {}

    def take(span: Span) -> None:
        with feed.lend(span) as block:
            first = bytes(block)
            os.sched_yield()
            assert bytes(block) == first
            found[span.start] = first

    def write() -> None:
        with ThreadPoolExecutor(lanes) as pool:
            list(pool.map(take, spans(len(data))))

    async def work() -> None:
        await asyncio.to_thread(write)
        feed.end("all is there")

    _, asked = await asyncio.gather(work(), serve(feed, window, data))
    assert b"".join(found[at] for at in sorted(found)) == data
    assert 40 / slots <= asked <= 40


@looped
async def test_a_trainer_that_goes_ends_the_wait_of_all() -> None:
    """Shows that neither who waits for a piece, nor who waits for a slot, waits for ever."""
    feed = Feed(memoryview(mmap.mmap(-1, PIECE)), PIECE)

    def take(span: Span) -> None:
        with feed.lend(span):
            raise AssertionError("nothing ever came")

    waiting = [asyncio.create_task(asyncio.to_thread(take, span)) for span in spans(3 * PIECE)]
    assert len(await feed.wanted(())) == 1
    feed.end("its trainer has gone")
    for failed in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(failed, SaveFailed)
        assert "its trainer has gone" in str(failed)
    assert await feed.wanted(()) == []


@looped
async def test_what_does_not_fit_is_said() -> None:
    """Shows that no window is too small in silence."""
    with pytest.raises(ValueError, match="a window of 10 bytes for pieces of 4096"):
        Feed(memoryview(bytearray(10)), PIECE)
    feed = Feed(memoryview(bytearray(PIECE)), PIECE)
    with (
        pytest.raises(ValueError, match="5000 bytes in pieces of 4096"),
        feed.lend(Span(0, 5000, 0)),
    ):
        pass
    assert Want(0, 0, 5) == (0, 0, 5)
