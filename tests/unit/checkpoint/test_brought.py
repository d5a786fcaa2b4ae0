"""Shows when ranks can't have one history, and what is said of it."""

from __future__ import annotations

import pytest

from handfast.checkpoint.brought import NOTHING, Brought, found, unlike, warn
from handfast.store.manifest import Fork, Stamp


def stamp(step: int, lineage: str = "sft", why: str = "guard.load of model") -> Stamp:
    """One shard's, of a lineage that began at a step."""
    fork = Fork(lineage, "run", "main", 1, step, why)
    return Stamp("run", lineage, 1, 9, "d0", 0, 2, 1, "c", None, (fork,))


@pytest.mark.parametrize(
    ("others", "apart"),
    [
        ([stamp(4)], False),
        ([stamp(2)], True),
        ([stamp(4, "other")], True),
        ([stamp(2, why="guard.load of stage1")], False),
    ],
    ids=["same", "step", "lineage", "stages"],
)
def test_ranks_load_the_same_from_one_epoch(others: list[Stamp], apart: bool) -> None:
    """One name, and one epoch for each load; stages of a pipeline load what others do not."""
    assert unlike([found(one) for one in (stamp(4), *others)]) is apart


def test_what_one_rank_alone_has_loaded_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """By rank, and what it came from; nothing is said where nobody has."""
    warn([NOTHING, NOTHING], "what they bring")
    assert caplog.messages == []
    warn([found(stamp(4)), Brought()], "what they bring")
    (said,) = caplog.messages
    assert (
        "what they bring: rank 0: sft (guard.load of model of run: main 1/4); rank 1: nothing "
        "known. Where" in said
    )
