"""Shows what ranks tell each other before a round, and why one comes to nothing."""

from __future__ import annotations

from typing import Any

import pytest

from handfast.agent.joining import Opened
from handfast.agent.snapshot import Proposal, Stuck
from handfast.checkpoint.refusal import Hand, agree, below, lay, read, refusal, words
from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Refused


def hand(rank: int, **fields: Any) -> Hand:
    """What a rank lays on the table whose domain is open."""
    opened = Opened(f"d{rank}", 1, 0, None, f"node{rank}", ("127.0.0.1", 1))
    return Hand(opened, 3, **fields)


def test_ranks_that_begin_one_lineage_agree() -> None:
    """Also none at all; it goes over the wire and back."""
    for lineage in ("", "sft"):
        said = read([lay(hand(rank, lineage=lineage), "") for rank in range(2)])
        assert [one.lineage for one in said] == [lineage] * 2
        assert agree(said)[1] == 3


@pytest.mark.parametrize(("one", "other"), [("sft", "rlhf"), ("sft", ""), ("", "sft")])
def test_ranks_that_begin_different_lineages_are_refused(one: str, other: str) -> None:
    """On every rank, each named with what it said, before anything is changed."""
    said = [hand(0, lineage=one), hand(1, lineage=other)]
    with pytest.raises(Refused, match="the ranks begin different lineages") as caught:
        agree(said)
    assert caught.value.verdict is Verdict.MIXED
    assert caught.value.shards == (f"rank 0: {one or 'none'}", f"rank 1: {other or 'none'}")


def test_a_rank_that_can_take_no_part_is_said_first() -> None:
    """It had no lineage to name: that is not what is wrong."""
    with pytest.raises(Refused, match="a rank can't take part") as caught:
        agree([hand(0, lineage="sft"), Hand(problem="no disk")])
    assert caught.value.shards == ("rank 1: no disk",)


def test_a_step_down_is_refused_with_what_is_lost() -> None:
    """What ``policy="refuse"`` raises, and how to go down all the same."""
    found = below(Proposal(Epoch(1, 2), (0,), ("1/3: d0 lost it",)))
    assert found.verdict is Verdict.MISSING
    assert found.shards == ("1/3: d0 lost it",)
    assert "epoch 1/2 is the newest that can be had" in str(found)
    assert "policy='rollback'" in found.remedy


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Refused("what the ranks bring is a mixture", verdict=Verdict.MIXED), Verdict.MIXED),
        (Refused("the shapes differ", verdict=None), Verdict.FOREIGN),
        (ValueError("mixed up"), Verdict.FOREIGN),
    ],
)
def test_who_is_told_of_a_refusal_gives_the_same_verdict(
    error: Exception, verdict: Verdict
) -> None:
    """It may hear another rank's words before it finds out for itself."""
    stuck = Stuck("declined", Epoch(0, 0), (f"rank 1: {words(error)}",))
    assert refusal(stuck, (), None).verdict is verdict
