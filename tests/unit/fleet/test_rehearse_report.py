"""Show what is recorded of pairs that were asked more than once."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
from rehearsalkit import job

from handfast.fleet.rehearse.fleet import Found, Outcome
from handfast.fleet.rehearse.reading import load
from handfast.fleet.rehearse.rehearsing import Asked, Did, Kind, Rehearsed, Trail
from handfast.fleet.rehearse.report import recorded

TEXT = """\
probe: {each: pair, run: ['true']}
record: {probe: ping, facts: {ucx.version: '{version}'}}
"""
WORKS, FAILS = Found(Outcome.WORKS), Found(Outcome.FAILS, "once in three times")


def trail(found: Found) -> Trail:
    """A fleet of two versions in which one direction came to this, and the other one works."""
    asked = (Asked("1", "2", found), Asked("2", "1", WORKS))
    return (Did(Kind.START, "", ("1", "2"), found, asked),)


@pytest.mark.parametrize("came", sorted(set(permutations("ffw")) | set(permutations("fww"))))
def test_a_pair_passed_if_it_worked_each_time_that_it_was_asked(
    came: tuple[str, ...], tmp_path: Path
) -> None:
    """Wherever among the others the one stands that failed; the other direction is its own."""
    rehearsal = load(job(tmp_path, TEXT))
    trails = tuple(trail(FAILS if each == "f" else WORKS) for each in came)
    results = recorded(rehearsal, Rehearsed(trails, True, 0, (), 0.0))
    passed = {(each.client[0], each.server[0]): each.passed for each in results}
    assert passed == {("1", "2"): False, ("2", "1"): True}
