"""Show that no fleet that works is refused, and that those which broke jobs are, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml")

from gatekit import FLEETS, meet, ranks, read, rules_of

from handfast.fleet.compat.rules import Level
from handfast.fleet.gate.round import Mode

LEGIT = sorted(FLEETS.glob("legit-*.yaml"))
MIXED = sorted(FLEETS.glob("mixed-*.yaml"))


def test_there_are_enough_of_them() -> None:
    """As many as the pages say; a glob that finds none would show nothing."""
    assert (len(LEGIT), len(MIXED)) == (29, 9)


@pytest.mark.parametrize("path", LEGIT, ids=lambda path: path.stem)
def test_a_fleet_that_may_differ_is_not_refused(path: Path) -> None:
    """In enforce mode, by the shipped rules: at the level that the fleet says, no higher."""
    fleet = read(path)
    found = meet(ranks(fleet), rules_of(""), groups=fleet.get("groups", ""))
    assert {verdict.refused for verdict in found} == {False}
    assert found[0].level == fleet.get("level", "fine"), found[0].findings
    assert found[0].stacks == int(fleet.get("stacks", found[0].stacks))


@pytest.mark.parametrize("path", MIXED, ids=lambda path: path.stem)
def test_a_mixture_is_refused_in_one_sentence_on_every_rank(path: Path) -> None:
    """Naming rank, node and component; in observe mode it is said, and nobody is stopped."""
    fleet = read(path)
    rules, groups = rules_of(fleet.get("rules", "")), fleet.get("groups", "")
    found = meet(ranks(fleet), rules, groups=groups)
    assert len(found) == len(ranks(fleet))
    assert {verdict.refused for verdict in found} == {True}
    assert {verdict.line for verdict in found} == {found[0].line}
    assert found[0].line.startswith(f"refused: {fleet['refused']}")
    assert "\n" not in found[0].line
    seen = meet(ranks(fleet), rules, groups=groups, mode=Mode.OBSERVE)[0]
    assert (seen.level, seen.refused) == (Level.REFUSE, False)
    assert seen.line.startswith(f"would be refused: {fleet['refused']}")
