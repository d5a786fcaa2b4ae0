"""Shows which nodes differ and in what, that the odd one is named, and that no key counts twice."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inventorykit import fact, inventory

from handfast.fleet.identity import enroll, life, load, sign
from handfast.fleet.inventory.facts import Inventory, Kind, Tier, Want, encode, gather
from handfast.fleet.skew import Holders, Skew, TierSkew, read_fleet, skew
from handfast.link.life import Node

ENV = Want("env", Tier.JOB, family=True)


def host(found: Skew) -> TierSkew:
    """What was found of the host tier."""
    return found.tiers[0]


def test_nodes_that_say_the_same_are_one_group() -> None:
    """And differ in nothing."""
    found = skew({f"n{i}": inventory(driver="580") for i in range(3)})
    assert [group.nodes for group in host(found).groups] == [("n0", "n1", "n2")]
    assert host(found).differences == ()
    assert found.sound
    assert found.nodes == 3


def test_the_odd_one_is_named_with_what_it_says() -> None:
    """What most say comes first, the odd one last."""
    fleet = {f"n{i:02}": inventory(driver="580", kernel="6.8") for i in range(20)}
    fleet["n07"] = inventory(driver="590", kernel="6.8")
    fleet["n13"] = inventory(driver=None, kernel="6.8")
    found = host(skew(fleet))
    assert [len(group.nodes) for group in found.groups] == [18, 1, 1]
    (difference,) = found.differences
    assert difference.name == "driver"
    assert [(r.state, r.value, r.nodes) for r in difference.readings][1:] == [
        ("known", "590", ("n07",)),
        ("unknown", "", ("n13",)),
    ]
    assert [group.unknown for group in found.groups] == [(), (), ("driver",)]


def test_two_that_do_not_know_are_in_one_group_that_says_so() -> None:
    """Equal digests are equal knowledge, not equal nodes."""
    (group,) = host(skew({"a": inventory(driver=None), "b": inventory(driver=None)})).groups
    assert group.nodes == ("a", "b")
    assert group.unknown == ("driver",)


def test_a_variable_that_is_not_set_is_absent_and_a_fact_of_no_collector_not_reported() -> None:
    """Three ways not to have a value."""
    fleet = {
        "set": gather([ENV.known("read", "x"), ENV.below("NCCL_ALGO").known("Ring", "x")]),
        "unset": gather([ENV.known("read", "x")]),
        "unread": gather([ENV.unknown("no")]),
        "older": gather([]),
    }
    (env, algo) = skew(fleet).tiers[2].differences
    assert (env.name, algo.name) == ("env", "env.NCCL_ALGO")
    assert {(r.nodes, r.state) for r in algo.readings} == {
        (("set",), "known"),
        (("unset",), "absent"),
        (("unread",), "unknown"),
        (("older",), "not reported"),
    }


def test_what_is_right_for_each_node_is_no_difference() -> None:
    """Names of interfaces, levels of logging."""
    fleet = {
        name: gather([fact("x", name, kind=Kind.PER_NODE), fact("y", name, kind=Kind.IGNORED)])
        for name in "ab"
    }
    assert [len(tier.groups) for tier in skew(fleet).tiers] == [1, 1, 1]


def test_a_key_that_two_name_counts_for_neither() -> None:
    """Both are left out, by name; the rest is compared."""
    facts = inventory(driver="580").facts
    fleet = {
        "a": gather(facts, Node("ab" * 32, "b1", 1)),
        "b": gather(inventory(driver="590").facts, Node("ab" * 32, "b2", 2)),
        "c": gather(facts, Node("cd" * 32, "b3", 1)),
        "d": gather(facts),
        "e": gather(facts),
    }
    found = skew(fleet)
    assert found.refused == (Holders("ab" * 32, ("a", "b")),)
    assert not found.sound
    assert found.nodes == 3
    assert [group.nodes for group in host(found).groups] == [("c", "d", "e")]


def test_what_shows_that_a_key_has_two_holders_is_said() -> None:
    """Or that nothing does: one machine that was asked twice says no more than that."""

    def asked(counter: int, boot: str, serial: str | None = None) -> Inventory:
        facts = inventory(**{"board.serial": serial}).facts
        return gather(facts, Node("ab" * 32, boot, counter))

    cloned = skew({"a": asked(7, "x"), "b": asked(7, "y"), "c": asked(8, "y")}).refused
    assert [each.why for each in cloned] == ["number 7 was used under 2 boot ids: x, y"]
    copied = skew({"a": asked(7, "x", "S1"), "b": asked(8, "x", "S2")}).refused
    assert [each.why for each in copied] == ["boot x was seen on the serials S1, S2"]
    twice = skew({"a": asked(7, "x", "S1"), "b": asked(8, "x", "S1")}).refused
    assert [(each.nodes, each.why) for each in twice] == [(("a", "b"), "")]


small = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from([None, "1", "2"]))


@given(st.dictionaries(st.sampled_from(["n1", "n2", "n3", "n4"]), small, min_size=1))
def test_groups_and_differences_tell_one_story(said: dict[str, dict[str, str | None]]) -> None:
    """Groups part the nodes; there is a difference if there are two; readings part them, too."""
    fleet: dict[str, Inventory] = {name: inventory(**values) for name, values in said.items()}
    found = host(skew(fleet))
    assert sorted(node for group in found.groups for node in group.nodes) == sorted(fleet)
    assert (len(found.groups) > 1) is bool(found.differences)
    for difference in found.differences:
        assert sorted(n for r in difference.readings for n in r.nodes) == sorted(fleet)
        sizes = [len(r.nodes) for r in difference.readings]
        assert sizes == sorted(sizes, reverse=True)


def test_a_directory_of_files_is_read_and_bad_ones_are_named(tmp_path: Path) -> None:
    """Inventories and signed statements; what can't be counted, with the reason."""
    home = str(tmp_path / "state")
    pytest.importorskip("cryptography")
    key = enroll(home)
    with life(home, key, "boot") as node:
        taken = gather(inventory(driver="580").facts, node)
    (tmp_path / "plain.json").write_bytes(encode(inventory(driver="580")))
    statement = sign(load(home), taken)
    (tmp_path / "signed.json").write_bytes(msgspec.json.encode(statement))
    forged = msgspec.structs.replace(statement, signature="00" * 64)
    (tmp_path / "forged.json").write_bytes(msgspec.json.encode(forged))
    (tmp_path / "torn.json").write_bytes(encode(taken)[:-9])
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "notes.txt").write_text("no inventory")
    fleet, unread = read_fleet(str(tmp_path))
    assert sorted(fleet) == ["plain", "signed"]
    assert fleet["signed"] == taken
    assert sorted(unread) == ["folder", "forged", "torn"]
    assert "not signed by the node" in unread["forged"]
    assert "no inventory" in unread["torn"]
    with pytest.raises(FileNotFoundError):
        read_fleet(str(tmp_path / "gone"))
