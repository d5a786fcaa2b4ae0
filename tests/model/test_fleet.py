"""Shows that every law of a fleet holds in every state of small ones, over the real nodes, and that
the search finds each wrong rule by a law of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from handfast.core import converge, rollout
from handfast.core.rollout import Node, bundle
from handfast.model.explore import Report
from handfast.model.fleet import Move, Plan, Setting, World
from handfast.model.rollouts import HEAVY, SETTINGS, search_fleet

A, OPEN, C = Plan("a", final=True), Plan("b"), Plan("c")


def told(report: Report[World, Move]) -> str:
    """What was found, and how it came about."""
    found = f"{report.states:,} states, {report.transitions:,} moves, depth {report.depth}"
    for breach in report.breaches:
        found += f"\n{breach.law}: " + "; ".join(f"{m.who} {m.what}" for m in breach.trace.labels)
    return found


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in HEAVY])
def test_every_law_holds_in_every_state(name: str) -> None:
    """And from each state a plan ends, or says what is in its way."""
    report = search_fleet(SETTINGS[name])
    print(f"{name}: {told(report)}")
    assert report.exhaustive
    assert report.breaches == (), told(report)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [name for name in SETTINGS if name in HEAVY])
def test_every_law_holds_in_every_state_of_larger_ones(name: str) -> None:
    """The same with more crashes, plans and nodes."""
    report = search_fleet(SETTINGS[name])
    print(f"{name}: {told(report)}")
    assert report.exhaustive
    assert report.breaches == (), told(report)


# --- wrong rules --------------------------------------------------------------------------------


def acts_under_whatever_it_holds(patch: pytest.MonkeyPatch) -> None:
    """Of an abandoned plan, too."""

    def acts(node: Node) -> object:
        held = [copy for copy in node.member.retained if bundle(copy) == node.proven != ""]
        return held[-1] if held else None

    patch.setattr(rollout, "acts", acts)


def acts_on_after_it_has_accepted_another_base(patch: pytest.MonkeyPatch) -> None:
    """Though the others may be beyond that by now."""
    original = rollout.acts

    def acts(node: Node) -> object:
        return original(replace(node, promised=None))

    patch.setattr(rollout, "acts", acts)


def forgets_what_it_promised_where_another_plan_begins(patch: pytest.MonkeyPatch) -> None:
    """The member does: its recovery is then of the new plan alone."""
    original = rollout.acts

    def acts(node: Node) -> object:
        said = node.member.recovery and node.member.recovery.accepted[node.member.me]
        return original(replace(node, promised=said and said.epoch))

    patch.setattr(rollout, "acts", acts)


def confirms_what_it_has_not_booted(patch: pytest.MonkeyPatch) -> None:
    """It was installed, after all."""
    original = rollout._follows
    patch.setattr(
        rollout,
        "_follows",
        lambda node: original(replace(node, proven=rollout._wanted(node.member))),
    )


def raises_the_floor_before_it_gives_up_what_is_below(patch: pytest.MonkeyPatch) -> None:
    """A fallback wakes below the floor."""
    patch.setattr(rollout, "_given_up", lambda at: rollout._line(at) == rollout._epoch(at, 1))


def overwrites_what_it_holds(patch: pytest.MonkeyPatch) -> None:
    """The way back is gone."""
    patch.setattr(rollout, "must_stay", lambda at, digest: False)


def counts_a_shard_that_has_not_voted(patch: pytest.MonkeyPatch) -> None:
    """A fault of the one core of both halves."""
    patch.setattr(converge, "complete", lambda roster, tier, ballot: bool(ballot.votes))


WRONG: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Setting, str]] = {
    wrong.__name__: (wrong, setting, law)
    for wrong, setting, law in (
        (acts_under_whatever_it_holds, Setting((A, OPEN, C), over=1, boots=1),
         "f1_a_base_and_its_successor"),
        (acts_on_after_it_has_accepted_another_base,
         Setting((A, OPEN, C), over=1, boots=1), "f1_a_base_and_its_successor"),
        (forgets_what_it_promised_where_another_plan_begins,
         SETTINGS["adoption, that is overtaken, and overtaken"], "f1_a_base_and_its_successor"),
        (confirms_what_it_has_not_booted, SETTINGS["an upgrade of three"],
         "f7_confirmed_by_who_has_proven_it"),
        (raises_the_floor_before_it_gives_up_what_is_below, SETTINGS["an upgrade, and a crash"],
         "f3_floors_only_rise"),
        (overwrites_what_it_holds, SETTINGS["an upgrade that is overtaken by another"],
         "f8_what_is_held_boots"),
        (counts_a_shard_that_has_not_voted, SETTINGS["an upgrade of three"],
         "converged_is_attested_by_all"),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a named law, with a shortest trace."""
    plant, setting, law = WRONG[name]
    plant(monkeypatch)
    report = search_fleet(setting)
    assert law in [breach.law for breach in report.breaches], told(report)


def test_a_node_that_leaves_without_evidence_is_a_third_bundle() -> None:
    """It was taken for dead, and acts: nothing but fencing keeps it out."""
    report = search_fleet(Setting((Plan("a"), OPEN, C), over=1, nodes=3, leaves=True, fenced=False))
    assert [breach.law for breach in report.breaches] == ["f1_a_base_and_its_successor"], told(
        report
    )
