"""Shows when what ranks have loaded can't be of one training."""

from __future__ import annotations

import msgspec
import pytest

from handfast.store.manifest import Fork, Source, Stamp
from handfast.store.provenance import NOTHING, brought, found, mixed, unlike


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


def source(step: int, run: str = "a", lineage: str = "main", path: str = "model") -> Source:
    return Source(path, run, lineage, 1, step)


@pytest.mark.parametrize(
    ("others", "apart"),
    [
        ([source(4)], []),
        ([source(2)], ["model"]),
        ([source(4, run="b")], ["model"]),
        ([source(2, path="critic")], []),
        ([], []),
    ],
    ids=["same", "step", "run", "other part", "nothing"],
)
def test_what_goes_on_as_it_was_is_of_one_epoch_of_one_run(
    others: list[Source], apart: list[str]
) -> None:
    """No lineage was begun: what two ranks train by one name came from one place."""
    said = [brought("main", (), came) for came in ([source(4)], others, [source(4)])]
    assert [what for what in mixed(said) if " of " not in what] == apart
    if apart:
        by = mixed(said)["model"]
        assert by["1/4 of run a"] == [0, 2]
        assert sorted(by.values()) == [[0, 2], [1]]


@pytest.mark.parametrize("others", [[source(4, lineage="sft")], [], [source(4)]])
def test_an_epoch_is_one_whatever_ranks_call_their_lineage(others: list[Source]) -> None:
    """One has loaded for all, a stage is new, a stage was reset: each restores its own epoch, under
    lineages that differ, and none of that is a mixture.
    """
    said = [brought("sft", (), [source(4, lineage="sft")]), brought("main", (), others)]
    assert mixed(said) == {}
    assert unlike(said)


def test_one_that_begins_a_lineage_and_one_that_does_not_are_of_one_epoch_too() -> None:
    """Else who names a lineage could mix."""
    said = [brought("x", (), [source(3)]), brought("main", (), [source(1)])]
    assert mixed(said) == {"model of a": {"1/3": [0], "1/1": [1]}}


def test_two_parts_that_came_by_one_name_are_held_against_each_other_both() -> None:
    """Two towers of one shape from two epochs: in whatever order a rank has loaded them."""
    forks = [Fork("clf", "a", "main", 1, step, "guard.load of model") for step in (3, 2)]
    both, other = [source(3), source(2)], [source(1), source(2)]
    one = brought("clf", forks, both)
    assert mixed([one, brought("clf", forks[::-1], both[::-1])]) == {}
    assert list(mixed([one, brought("clf", forks, other)])) == ["model of a"]


def test_what_begins_a_lineage_may_be_of_several_runs_and_of_one_epoch_each() -> None:
    """A language model and a vision tower, each in its stage; but no stage of two epochs."""
    text, vision = [source(4, run="text")], [source(7, run="vision")]
    assert not mixed([brought("vlm", (), text), brought("vlm", (), vision)])
    assert mixed([brought("vlm", (), text), brought("vlm", (), [source(5, run="text")])]) == {
        "model of text": {"1/4": [0], "1/5": [1]}
    }


def test_a_stamp_says_both_what_began_its_lineage_and_what_was_loaded_last() -> None:
    """In words that are put side by side; nothing of what nobody knows."""
    both = msgspec.structs.replace(stamp(4), came=(source(8, run="run", lineage="sft"),))
    assert str(found(both)) == (
        "sft (guard.load of model of run: 1/4, model: 1/8 of run run, model of run: 1/8)"
    )
    assert str(NOTHING) == "nothing known"
    assert not mixed([NOTHING, found(both)])
    assert unlike([NOTHING, found(both)])
