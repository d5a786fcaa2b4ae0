"""Shows what ranks of a node learn of each other's tensors before they leave any out."""

from __future__ import annotations

import asyncio

import pytest

from handfast.agent import witness
from handfast.agent.witness import Witness
from handfast.core.lattice import Epoch

ONE = Epoch(1, 1)
MINE = {"same": b"1", "other": b"2", "unknown": b"3"}
FIRST = {"same": b"1", "other": b"9"}


def test_whoever_comes_first_both_learn_of_it() -> None:
    """A rank waits for the node's first, and finds what it has said before."""

    async def meet(early: bool) -> tuple[list[str] | None, list[str] | None]:
        between = Witness()
        asking = asyncio.create_task(between.same("run", ONE, MINE, leads=False))
        await asyncio.sleep(0) if early else None
        first = await between.same("run", ONE, FIRST, leads=True)
        return first, await asking

    for early in (True, False):
        assert asyncio.run(meet(early)) == (["same", "other"], ["same"])


def test_a_first_rank_that_has_nothing_to_say_keeps_nobody_waiting() -> None:
    """It saves the epoch, and nothing seemed alike to it: then nothing is."""

    async def meet() -> list[str] | None:
        between = Witness()
        asking = asyncio.create_task(between.same("run", ONE, MINE, leads=False))
        await asyncio.sleep(0)
        between.settle("run", ONE)
        between.settle("run", ONE)
        return await asking

    assert asyncio.run(meet()) == []


def test_what_could_not_be_found_out_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank is late, or saves another epoch: nobody waits for ever, or shares a word."""
    monkeypatch.setattr(witness, "WAIT_S", 0.01)

    async def meet() -> list[list[str] | None]:
        between = Witness()
        between.settle("another run", ONE, MINE)
        between.settle("run", Epoch(1, 2), MINE)
        asked = [await between.same("run", ONE, MINE, leads=False)]
        asking = asyncio.create_task(between.same("run", Epoch(1, 3), MINE, leads=False))
        await asyncio.sleep(0)
        for step in range(witness.EPOCHS + 1):
            between.settle("run", Epoch(2, step))
        return [*asked, await asking]

    assert asyncio.run(meet()) == [None, None]
