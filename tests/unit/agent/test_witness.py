"""Shows what ranks of a node learn of each other's tensors before they leave any out."""

from __future__ import annotations

import asyncio

import pytest

from handfast.agent import witness
from handfast.agent.witness import First, Witness
from handfast.core.lattice import Epoch

ONE = Epoch(1, 1)
RANK0 = First("run", 0)
MINE = {"same": b"1", "other": b"2", "unknown": b"3"}
FIRST = {"same": b"1", "other": b"9"}


def test_whoever_comes_first_the_other_learns_of_it() -> None:
    """A rank waits for the node's first, and finds what it has said before."""

    async def meet(early: bool) -> list[str] | None:
        between = Witness()
        asking = asyncio.create_task(between.same("d1", RANK0, ONE, MINE))
        await asyncio.sleep(0) if early else None
        between.settle(RANK0, ONE, FIRST)
        between.settle(RANK0, ONE, MINE)  # the first word counts
        return await asking

    assert asyncio.run(meet(True)) == asyncio.run(meet(False)) == ["same"]


def test_a_first_rank_that_says_nothing_keeps_nobody_waiting() -> None:
    """Nothing was found out then; that it holds nothing alike is something else."""

    async def meet() -> list[list[str] | None]:
        between = Witness()
        asking = asyncio.create_task(between.same("d1", RANK0, ONE, MINE))
        await asyncio.sleep(0)
        between.settle(RANK0, ONE)
        between.settle(RANK0, Epoch(1, 2), {})
        return [await asking, await between.same("d1", RANK0, Epoch(1, 2), MINE)]

    assert asyncio.run(meet()) == [None, []]


def test_who_has_not_heard_is_waited_for_until_it_has() -> None:
    """Each for itself; and a word that was said of an epoch is not asked for again."""

    async def meet() -> list[bool]:
        between = Witness()
        found = [between.wanted(RANK0, ONE)]
        for domain in ("d1", "d2"):
            await between.same(domain, RANK0, ONE, MINE, wait_s=0.0)
        found += [between.wanted(RANK0, ONE), between.wanted(First("run", 2), ONE)]
        between.settle(RANK0, ONE, FIRST)
        found += [between.wanted(RANK0, ONE), between.wanted(RANK0, Epoch(1, 2))]
        for domain in ("d1", "d2"):
            await between.same(domain, RANK0, ONE, MINE)
            found.append(between.wanted(RANK0, Epoch(1, 2)))
        return found

    assert asyncio.run(meet()) == [False, True, False, False, True, True, False]


def test_what_could_not_be_found_out_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank is late, or saves another epoch: nobody waits for ever, or shares a word."""
    monkeypatch.setattr(witness, "WAIT_S", 0.01)

    async def meet() -> list[list[str] | None]:
        between = Witness()
        between.settle(First("another run", 0), ONE, MINE)
        between.settle(First("run", 2), ONE, MINE)
        between.settle(RANK0, Epoch(1, 2), MINE)
        asked = [await between.same("d1", RANK0, ONE, MINE)]
        asking = asyncio.create_task(between.same("d1", RANK0, Epoch(1, 3), MINE))
        await asyncio.sleep(0)
        for step in range(witness.EPOCHS + 1):
            between.settle(RANK0, Epoch(2, step))
        return [*asked, await asking]

    assert asyncio.run(meet()) == [None, None]
