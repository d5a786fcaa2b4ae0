"""Shows what a node says, wants and may do, step by step; all orders of it are in tests/model."""

from __future__ import annotations

from typing import Any

import pytest

from handfast.core import events, rollout
from handfast.core.events import Stuck
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Change, Configuration, Domain, Roster
from handfast.core.messages import (
    Configured,
    Converged,
    Copy,
    Record,
    Released,
    Skipped,
    Staged,
    decode_record,
    encode,
)
from handfast.core.recover import Phase
from handfast.core.rollout import Finalise, Node, Proved, Unfit

IDS = ("n0", "n1")
ROSTER = Roster(
    Configuration(
        "fleet", 2, tuple(Domain(d, "fleet", i) for i, d in enumerate(IDS)), (("fleet", 1),)
    )
)


class Fleet:
    """Two nodes that hear each other at once, with the journals that they wrote."""

    def __init__(self, runs: str = "a") -> None:
        self.journals: dict[str, list[Record]] = {name: [] for name in IDS}
        self.nodes = [Node(rollout.boot(name, 1, ()).member, runs) for name in IDS]
        self.said: list[list[events.Action]] = [[], []]

    def do(self, who: int, event: rollout.Event) -> list[events.Action]:
        """Let a node take an event, and the others hear of it; gives what it asked for."""
        node, effects = rollout.step(self.nodes[who], event)
        self.nodes[who] = node
        self.journals[IDS[who]] += effects.persist
        for send in effects.send:
            self.do(send.to, events.Received(send.message))
        return list(effects.apply)

    def plan(self, number: int, digest: str, **options: Any) -> None:
        """Begin a plan on all."""
        name = rollout.round_name(f"plan{number}", digest)
        for who in (0, 1):
            self.do(who, events.Begin(number, name, ROSTER, founding=True, **options))

    def reboot(self, who: int, digest: str) -> None:
        """Wake up as the next incarnation, in a slot with this bundle."""
        old = self.nodes[who].member
        self.nodes[who] = rollout.boot(old.id, old.incarnation + 1, self.journals[old.id])
        if old.roster is not None:
            begin = events.Begin(old.generation, old.round, old.roster, founding=True)
            self.do(who, begin)
            self.do(who, events.Greet(1 - who))
            self.do(1 - who, events.Greet(who))
        self.do(who, Proved(digest))

    def wants(self) -> list[str]:
        return [rollout.wants(node) for node in self.nodes]

    def acts(self) -> list[str]:
        copies = [rollout.acts(node) for node in self.nodes]
        return [rollout.bundle(copy) if copy else "" for copy in copies]

    def wrote(self, who: int, kind: type[Record]) -> list[Record]:
        return [record for record in self.journals[IDS[who]] if isinstance(record, kind)]


def adopted() -> Fleet:
    """A fleet that runs `a`, and knows it."""
    fleet = Fleet()
    fleet.plan(1, "a")
    return fleet


def upgraded() -> Fleet:
    """And `b` beside it, confirmed by all."""
    fleet = adopted()
    fleet.plan(2, "b")
    fleet.reboot(0, "b")
    fleet.reboot(1, "b")
    return fleet


def test_nobody_acts_before_anything_was_confirmed() -> None:
    """Whatever runs there is under no number, and so under no epoch."""
    fleet = Fleet()
    assert (fleet.acts(), fleet.wants()) == (["", ""], ["", ""])
    assert rollout.aim(fleet.nodes[0].member) == ""
    assert not rollout.final(fleet.nodes[0].member)


def test_what_runs_is_adopted_without_a_boot() -> None:
    """The vote names the incarnation that has proven it."""
    fleet = adopted()
    assert fleet.wants() == ["", ""]
    assert fleet.acts() == ["a", "a"]
    assert fleet.wrote(0, Staged) == [Staged(0, Epoch(1, 1), "a@1")]
    assert len(fleet.wrote(0, Converged)) == 1


def test_a_plan_asks_for_its_bundle_and_acts_under_base_and_successor() -> None:
    """One node after the other; a new boot has confirmed nothing until its probes say so."""
    fleet = adopted()
    fleet.plan(2, "b")
    assert fleet.wants() == ["b", "b"]
    assert fleet.acts() == ["a", "a"]
    fleet.reboot(0, "b")
    assert (fleet.acts(), fleet.wants()) == (["b", "a"], ["", "b"])
    assert fleet.wrote(0, Staged)[-1] == Staged(0, Epoch(2, 2), "b@2")
    assert len(fleet.wrote(0, Converged)) == 1
    fleet.reboot(1, "b")
    assert fleet.acts() == ["b", "b"]
    assert len(fleet.wrote(0, Converged)) == 2


def test_who_falls_back_acts_under_the_base_and_is_asked_to_come_again() -> None:
    """What it confirmed stands: an incarnation before it did."""
    fleet = upgraded()
    fleet.reboot(0, "a")
    assert (fleet.acts(), fleet.wants()) == (["a", "b"], ["b", ""])


def test_the_base_is_given_up_where_all_have_confirmed_and_an_operator_says_so() -> None:
    """Released first, then FLOOR is said; the certificate over it is final and frees the slot."""
    fleet = upgraded()
    at = fleet.nodes[0].member
    assert rollout.must_stay(at, "a")
    fleet.do(0, Finalise("b"))
    at = fleet.nodes[0].member
    assert fleet.wrote(0, Released) == [Released((GENESIS, Epoch(1, 1)))]
    assert fleet.wrote(0, Staged)[-1] == Staged(0, Epoch(2, 3), "b")
    assert rollout.must_stay(at, "a")
    assert not rollout.final(at)
    fleet.do(1, Finalise("b"))
    at = fleet.nodes[0].member
    assert rollout.final(at)
    assert not rollout.must_stay(at, "a")
    assert rollout.must_stay(at, "b")
    assert not rollout.must_stay(at, "")
    fleet.reboot(0, "a")
    assert fleet.acts() == ["", "b"]


def rejected(actions: list[events.Action]) -> list[str]:
    return [action.reason for action in actions if isinstance(action, events.Reject)]


def test_nothing_is_given_up_that_is_not_confirmed_by_all() -> None:
    """Nor another bundle, nor none, nor by an incarnation that runs the old one."""
    fleet = adopted()
    assert rejected(fleet.do(0, Finalise("")))
    fleet.plan(2, "b")
    fleet.reboot(0, "b")
    assert rejected(fleet.do(0, Finalise("b"))) == ["b is not confirmed by all"]
    fleet.reboot(1, "b")
    assert rejected(fleet.do(0, Finalise("a"))) == ["a is not confirmed by all"]
    fleet.reboot(0, "a")
    assert rejected(fleet.do(0, Finalise("b"))) == ["this incarnation of n0 has not proved b"]
    assert fleet.wrote(0, Released) == []


def test_a_bundle_that_does_not_work_is_skipped_with_its_reason() -> None:
    """It converges nowhere, the node wants nothing more of this plan, and acts under the base."""
    fleet = adopted()
    fleet.plan(2, "b")
    fleet.do(0, Unfit("c", "another one"))
    assert fleet.wrote(0, Skipped) == []
    fleet.do(0, Unfit("b", "its probes fail"))
    assert fleet.wrote(0, Skipped) == [Skipped(0, Epoch(2, 2), "its probes fail")]
    assert fleet.wants() == ["", "b"]
    assert fleet.acts() == ["a", "a"]
    fleet.do(0, Unfit("b", "still"))
    assert len(fleet.wrote(0, Skipped)) == 1


def test_what_was_confirmed_and_fails_later_has_to_be_made_fit() -> None:
    """A vote is not taken back."""
    fleet = upgraded()
    fleet.do(0, Unfit("b", "broken since"))
    assert fleet.wrote(0, Skipped) == []


def test_a_rollback_is_a_plan_without_a_bundle() -> None:
    """One node had `b`, the other never: both begin again from `a`; `b`'s number is nobody's."""
    fleet = adopted()
    fleet.plan(2, "b")
    fleet.reboot(0, "b")
    fleet.plan(3, "")
    assert fleet.wants() == ["a", ""]
    fleet.reboot(0, "a")
    assert (fleet.wants(), fleet.acts()) == (["", ""], ["a", "a"])
    assert rollout.aim(fleet.nodes[0].member) == ""
    assert not rollout.must_stay(fleet.nodes[0].member, "b")
    fleet.plan(4, "b")
    fleet.reboot(0, "b")
    assert fleet.wrote(0, Staged)[-1] == Staged(0, Epoch(4, 2), "b@4")


def test_a_base_that_does_not_work_any_more_is_said_to_be_bad() -> None:
    """While it is being checked: the next lower one that all hold is looked at then."""
    fleet = upgraded()
    fleet.reboot(1, "a")
    fleet.plan(3, "c")
    assert fleet.wants() == ["", "b"]
    fleet.do(1, Unfit("b", "the disk is bad"))
    assert fleet.wants() == ["a", ""]
    fleet.reboot(0, "a")
    assert fleet.wants() == ["c", "c"]
    assert fleet.acts() == ["a", "a"]


def test_who_can_no_more_take_a_base_that_was_judged_declines_it() -> None:
    """Its copy was found good by an incarnation before, and now it can't boot it: all are told."""
    fleet = upgraded()
    for who in (0, 1):
        fleet.reboot(who, "a")
    fleet.plan(3, "c")
    fleet.do(1, Proved("b"))
    fleet.reboot(1, "a")
    fleet.do(0, Proved("b"))
    assert fleet.wants() == ["", "b"]
    stuck = [action for action in fleet.do(1, Unfit("b", "no kernel")) if isinstance(action, Stuck)]
    assert stuck == [Stuck(Phase.DECLINED, Epoch(2, 2), ("rank 1: no kernel",))]
    assert fleet.acts() == ["b", "a"]


def test_a_node_that_promised_a_base_acts_under_that_alone_until_it_is_certified() -> None:
    """Though yet another plan begins, and the member knows of that one alone."""
    fleet = adopted()
    fleet.plan(2, "b")
    fleet.reboot(0, "b")
    node = fleet.nodes[0]
    for epoch, runs, acts in ((Epoch(1, 1), "b", ""), (Epoch(1, 1), "a", "a")):
        promised = Node(node.member, runs, epoch)
        copy = rollout.acts(promised)
        assert (rollout.bundle(copy) if copy else "") == acts


def test_a_copy_that_is_lost_was_not_given_up() -> None:
    """It may be found again, so nobody says FLOOR for it."""
    fleet = upgraded()
    before = fleet.journals["n0"]
    node = rollout.boot("n0", 7, before)
    assert Copy(Epoch(1, 1), "a@1") in node.member.retained


def test_a_number_needs_a_base() -> None:
    """Before any plan there is none."""
    with pytest.raises(ValueError, match="n0 has no base"):
        rollout._epoch(Fleet().nodes[0].member, 1)


def test_a_node_that_joins_holds_what_it_brought() -> None:
    """Said once, by who lets it join, and durable; a later configuration brings it nothing more."""
    ids = (*IDS, "n2")
    domains = tuple(Domain(d, "fleet", i) for i, d in enumerate(ids))
    roster = Roster(Configuration("fleet", 3, domains, (("fleet", 1),)))
    brought = (Copy(Epoch(1, 2), "a"),)
    begin = events.Begin(3, rollout.round_name("plan3", "b"), roster, brought=brought)
    node, effects = rollout.step(rollout.boot("n2", 1, ()), begin)
    configured = effects.persist[0]
    assert isinstance(configured, Configured)
    assert (configured.founding, configured.brought) == (False, brought)
    assert decode_record(encode(configured)) == configured
    assert node.member.retained == brought
    assert rollout.boot("n2", 2, effects.persist).member.retained == brought
    left = tuple(Domain(d, "fleet", i) for i, d in enumerate(ids[1:]))
    fewer = Roster(Configuration("fleet", 2, left, (("fleet", 1),)))
    change = Change(roster.digest, fewer.digest, ("n0",))
    later = events.Begin(
        4,
        rollout.round_name("plan4", "b"),
        fewer,
        changes=(change,),
        brought=(Copy(Epoch(9, 9), "x"),),
    )
    node, effects = rollout.step(node, later)
    assert node.member.retained == brought


@pytest.mark.parametrize("digest", ["sha256:ab", "ab@1"])
def test_a_digest_with_a_mark_that_parts_names_is_refused(digest: str) -> None:
    """Its plan would aim at half of it, and never end."""
    with pytest.raises(ValueError, match="by its digest alone"):
        rollout.round_name("plan", digest)
