"""Shows that known, absent and unknown are never taken for each other, and what a digest says."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inventorykit import fact, inventory

from handfast.errors import FormatError
from handfast.fleet.inventory.facts import (
    Fact,
    Inventory,
    Kind,
    Node,
    State,
    Tier,
    Want,
    decode,
    encode,
    gather,
    spell,
)

DRIVER = Want("gpu.driver", Tier.HOST)
ENV = Want("env", Tier.JOB, family=True)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
names = st.from_regex(r"[a-z][a-z0-9]{0,5}(\.[A-Z_]{1,5})?", fullmatch=True)


@st.composite
def facts(draw: st.DrawFn) -> Fact:
    """Any fact."""
    want = Want(draw(names), draw(st.sampled_from(Tier)), draw(st.sampled_from(Kind)))
    return draw(
        st.one_of(
            st.builds(want.known, texts, texts),
            st.builds(want.absent, texts),
            st.builds(want.unknown, texts, texts),
        )
    )


inventories = st.lists(facts(), max_size=8, unique_by=lambda f: f.name).map(gather)


@given(inventories)
def test_an_inventory_comes_back_equal(taken: Inventory) -> None:
    """And so does each digest."""
    again = decode(encode(taken), "here")
    assert again == taken
    assert [again.digest(t) for t in Tier] == [taken.digest(t) for t in Tier]


@given(inventories, inventories)
def test_equal_digests_are_equal_exact_facts(one: Inventory, other: Inventory) -> None:
    """Names, states and values of the tier, and nothing besides."""

    def compared(taken: Inventory, tier: Tier) -> list[tuple[str, State, str | None]]:
        mine = [f for f in taken.facts if f.tier is tier and f.kind is Kind.EXACT]
        return [(f.name, f.state, f.value) for f in mine]

    for tier in Tier:
        same = compared(one, tier) == compared(other, tier)
        assert (one.digest(tier) == other.digest(tier)) is same
        assert len(one.digest(tier)) == 32


def test_three_states_and_every_value_have_digests_of_their_own() -> None:
    """A value may read like a state; a missing driver is no unknown one."""
    said = [
        DRIVER.known("580.65.06", ""),
        DRIVER.known("absent", ""),
        DRIVER.known("unknown", ""),
        DRIVER.known("", ""),
        DRIVER.absent(""),
        DRIVER.unknown("nobody may look"),
    ]
    digests = {gather([each]).digest(Tier.HOST) for each in [*said]}
    assert len(digests | {gather([]).digest(Tier.HOST)}) == len(said) + 1


def test_the_reason_of_an_unknown_is_in_no_digest() -> None:
    """It may hold a process's number. That nobody knows is said apart from the digest."""
    one, other = (gather([DRIVER.unknown(why)]) for why in ("/proc/17: gone", "/proc/18: gone"))
    assert one.digest(Tier.HOST) == other.digest(Tier.HOST)
    assert one.unknown(Tier.HOST) == ("gpu.driver",)
    assert one.unknown(Tier.JOB) == ()


def test_where_a_fact_is_from_and_what_is_not_compared_are_in_no_digest() -> None:
    """A path, an interface's name, a level of logging."""
    one = gather([DRIVER.known("1", "/proc"), fact("x", "eth0", kind=Kind.PER_NODE)])
    other = gather([DRIVER.known("1", "/sys"), fact("y", "INFO", kind=Kind.IGNORED)])
    assert one.digest(Tier.HOST) == other.digest(Tier.HOST)


def test_the_digest_is_pinned() -> None:
    """Nodes of two releases compare digests; a change of the encoding changes its number, too."""
    taken = gather([DRIVER.known("580.65.06", ""), Want("imex.version", Tier.FABRIC).absent("")])
    assert taken.digest(Tier.HOST).hex()[:16] == "b713fce06f1793f8"
    assert taken.digest(Tier.FABRIC).hex()[:16] == "8439fe66a6caa63b"


def test_what_a_known_family_does_not_list_is_absent() -> None:
    """And of one that is not known, or not there at all, unknown with the reason."""
    known = gather([ENV.known("read", "x"), ENV.below("NCCL_ALGO").known("Ring", "x")])
    assert known.get("env.NCCL_ALGO").value == "Ring"
    assert known.get("env.NCCL_PROTO").state is State.ABSENT
    lost = gather([ENV.unknown("no permission")]).get("env.NCCL_PROTO")
    assert (lost.state, lost.problem, lost.tier) == (State.UNKNOWN, "no permission", Tier.JOB)
    assert "no collector" in gather([]).get("env.NCCL_PROTO").problem


@pytest.mark.parametrize(
    ("state", "value", "problem"),
    [
        (State.KNOWN, None, ""),
        (State.KNOWN, "1", "but"),
        (State.ABSENT, "1", ""),
        (State.ABSENT, None, "but"),
        (State.UNKNOWN, None, ""),
        (State.UNKNOWN, "1", "guessed"),
    ],
)
def test_a_fact_that_contradicts_itself_can_not_be_made(
    state: State, value: str | None, problem: str
) -> None:
    """Least of all an unknown with a value, or one without a reason; nor can it be read."""
    with pytest.raises(ValueError, match=r"^x is"):
        Fact("x", Tier.HOST, Kind.EXACT, state, value, problem)
    told = {"name": "x", "tier": "host", "kind": "exact", "state": state, "value": value}
    body = {"format": 1, "node": None, "facts": [told | {"problem": problem}]}
    with pytest.raises(FormatError, match="no inventory of a node"):
        decode(msgspec.json.encode(body), "n.json")


def test_bytes_that_are_no_inventory_are_refused_by_name() -> None:
    """Of another version, out of order, a name twice, a node without a key, or nothing at all."""
    twice = [msgspec.to_builtins(fact("a", "1"))] * 2
    for body, words in (
        ({"format": 2, "node": None, "facts": []}, "an inventory of format 2"),
        ({"format": 1, "node": None, "facts": twice}, "not sorted by name"),
        ({"format": 1, "node": {"key": "ab", "boot": "b", "counter": 1}, "facts": []}, "64 hex"),
        ([], "no inventory"),
    ):
        with pytest.raises(FormatError, match=rf"^node-3\.json: .*{words}.*What to do"):
            decode(msgspec.json.encode(body), "node-3.json")
    with pytest.raises(FormatError, match="no inventory"):
        decode(b"\xff", "x")


def test_a_value_that_is_too_long_keeps_its_hash() -> None:
    """So that two of them stay two."""
    one, other = (DRIVER.known("x" * 5000 + end, "").value for end in "ab")
    assert one != other
    assert max(len(one or ""), len(other or "")) <= 4096


def test_several_devices_are_one_value_where_they_agree() -> None:
    """A mixture in one node can't be read as a version."""
    assert spell(["96.00.99.00.01"] * 8) == "96.00.99.00.01"
    assert spell(["b", "a", "b"]) == "a (1), b (2)"


def test_the_node_of_an_inventory_is_written_down() -> None:
    """Key, boot and counter come back."""
    node = Node("ab" * 32, "b00t", 3)
    assert decode(encode(gather(inventory(x="1").facts, node)), "x").node == node
