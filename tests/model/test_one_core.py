"""Shows that checkpoints and bundles rest on one core: what is wrong in it both halves find."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from handfast.core import converge, rollout
from handfast.model.rollouts import SETTINGS, search_fleet
from handfast.model.scenarios import SCENARIOS, search

Plant = Callable[[pytest.MonkeyPatch], None]


def counts_a_shard_that_has_not_voted(patch: pytest.MonkeyPatch) -> None:
    """An epoch is complete as soon as anybody has voted."""
    patch.setattr(converge, "complete", lambda roster, tier, ballot: bool(ballot.votes))


def test_both_halves_are_sound_as_they_are() -> None:
    """The same scenario and the same setting, without a fault."""
    assert search(SCENARIOS["saving"]).breach == ""
    assert search_fleet(SETTINGS["an upgrade of three"]).sound


def test_one_fault_in_converge_is_found_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that not all shards have, and a bundle that not all nodes have confirmed."""
    assert rollout.member.converge is converge
    counts_a_shard_that_has_not_voted(monkeypatch)
    found = search(SCENARIOS["saving"])
    print(f"checkpoints: {found.breach}", *found.story, sep="\n")
    assert found.breach.startswith("s2_knowledge_is_sound")
    report = search_fleet(SETTINGS["an upgrade of three"])
    (breach,) = report.breaches
    print(f"fleet: {breach.law}", *(f"{m.who} {m.what}" for m in breach.trace.labels), sep="\n")
    assert breach.law == "converged_is_attested_by_all"
