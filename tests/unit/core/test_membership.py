"""Show who takes part: configurations, who talks to whom, rounds and their generations.

What goes wrong for people: two starts of one job share a number, a directory changes ranks, a
lost disk is taken for an empty run, a first start that was cut short can't be repeated.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.core.membership import (
    Change,
    Configuration,
    Domain,
    Entrant,
    Formation,
    Refusal,
    Roster,
    RoundRecord,
    allocate,
    bits,
    form,
    succession,
)
from handfast.core.verdict import Verdict

NEED = (("dir", 1),)


def configuration(size: int = 2, run: str = "run", names: str = "d") -> Configuration:
    domains = tuple(Domain(f"{names}{i}", "dir", i, f"h{i}") for i in range(size))
    return Configuration(run, size, domains, NEED)


# --- rosters


def test_a_roster_works_out_who_holds_what():
    tower = Configuration(
        "run", 2,
        (Domain("a", "dir", 0), Domain("b", "dir", 1), Domain("c", "mem", 0), Domain("d", "mem", 1),
         Domain("e", "mem", 0)),
        (("dir", 1), ("mem", 1)),
    )  # fmt: skip
    roster = Roster(tower)
    assert roster.holders == ((0b00001, 0b00010), (0b10100, 0b01000))
    assert roster.homes == (0, 1)
    assert roster.tier_of == (0, 0, 1, 1, 1)
    assert roster.names(0b10010) == ("b", "e")
    assert roster.index("c") == 2
    assert roster.index("x") is None
    assert "a, b, c, d, e" in repr(roster)


def test_rosters_are_equal_where_their_configurations_are():
    assert Roster(configuration()) == Roster(configuration())
    assert hash(Roster(configuration())) == hash(Roster(configuration()))
    assert Roster(configuration()) != Roster(configuration(run="other"))
    assert Roster(configuration()) != configuration()


@pytest.mark.parametrize(
    ("domains", "need", "match"),
    [
        ((Domain("a", "dir", 0), Domain("a", "dir", 1)), NEED, "one domain twice"),
        ((Domain("a", "dir", 0),), NEED, r"shards \[1\] have fewer"),
        ((Domain("a", "dir", 0), Domain("b", "dir", 1)), (("dir", 2),), r"shards \[0, 1\]"),
        ((Domain("a", "dir", 0), Domain("b", "dir", 1)), (("dir", 0),), "needs 0"),
        ((Domain("a", "dir", 0), Domain("b", "dir", 2)), NEED, "b is of shard 2, which is not"),
    ],
)
def test_a_configuration_that_can_never_converge_is_refused(domains, need, match):
    with pytest.raises(ValueError, match=match):
        Roster(Configuration("run", 2, domains, need))


@given(st.integers(0, 2**70))
def test_bits_lists_what_a_mask_holds(mask):
    assert sum(1 << i for i in bits(mask)) == mask
    assert list(bits(mask)) == sorted(set(bits(mask)))


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10, 16, 17, 33, 64, 100])
def test_everybody_is_reached_within_log2_n_hops(size):
    """Shows that news crosses a large job in few hops, over few links, both ways (L2)."""
    roster = Roster(configuration(size))
    for me in range(size):
        near = roster.neighbours[me]
        assert me not in near
        assert all(me in roster.neighbours[i] for i in near)
        tree = roster.tree.next_to(me) if roster.tree is not None else ()
        assert size <= 9 or len(frozenset(near) - frozenset(tree)) <= 2 * size.bit_length()
    known = {0}
    hops = 0
    while len(known) < size:
        known |= {i for member in known for i in roster.neighbours[member]}
        hops += 1
    assert hops <= max(1, (size - 1).bit_length())


# --- configurations that follow each other


def test_a_configuration_follows_itself_nothing_or_a_recorded_change():
    old, new, newer = configuration(), configuration(names="e"), configuration(names="f")
    first = Change(old.digest(), new.digest(), ("d0",))
    second = Change(new.digest(), newer.digest(), ("e1",))
    assert succession(None, new, ()) is None
    assert succession(old, old, ()) is None
    assert succession(old, new, (first,)) is None
    assert succession(old, newer, (first, second)) is None
    assert succession(old, new, (first, second)) is None
    assert "no engine recorded the change" in (succession(old, new, ()) or "")
    assert "no engine recorded the change" in (succession(old, newer, (second,)) or "")
    assert "run other is not" in (succession(old, configuration(run="other"), ()) or "")


# --- generations


def test_a_round_gets_one_number_however_often_it_asks():
    first = allocate(None, "r1", 0)
    assert first == RoundRecord("r1", 1)
    assert allocate(first, "r1", 9) is first


def test_a_later_round_supersedes_for_good():
    """Shows that a launch which was frozen for an hour can't take the job back."""
    record = allocate(allocate(None, "r1", 0), "r2", 0)
    assert record is not None
    assert record.generation == 2
    assert allocate(record, "r1", 5) is None


def test_a_number_is_above_all_that_any_member_reports():
    """Shows that a lost round record does not make numbers be used twice."""
    assert allocate(None, "r9", 7) == RoundRecord("r9", 8)
    assert allocate(RoundRecord("r1", 3), "r2", 7) == RoundRecord("r2", 8, ("r1",))
    assert allocate(RoundRecord("r1", 9), "r2", 7) == RoundRecord("r2", 10, ("r1",))


def test_the_record_stays_small():
    record = None
    for i in range(200):
        record = allocate(record, f"r{i}", 0)
    assert record is not None
    assert (record.generation, len(record.past)) == (200, 64)


# --- rounds


def entrants(known: Configuration | None, *ids: str, shards: tuple[int, ...] = (0, 1)):
    pairs = zip(ids, shards, strict=False)
    return [Entrant(Domain(name, "dir", s, f"h{s}"), known, 0) for name, s in pairs]


def formed(brought, shards: int = 2, changes=()):
    return form(brought, shards=shards, need=NEED, run="run", changes=changes)


def test_a_fresh_run_is_founded():
    assert formed(entrants(None, "d0", "d1")) == Formation(configuration(), founding=True)


def test_a_run_is_resumed_by_its_own_domains():
    assert formed(entrants(configuration(), "d0", "d1")) == Formation(configuration(), True)


def test_a_domain_that_was_killed_while_founding_founds_again():
    """Shows that a first start of which only one rank was written can be repeated."""
    brought = [*entrants(configuration(), "d0"), *entrants(None, "d1", shards=(1,))]
    assert formed(brought) == Formation(configuration(), founding=True)


def test_who_comes_by_a_change_does_not_found():
    """Shows that a domain which replaces a lost one never claims to hold genesis."""
    old, new = configuration(), configuration(names="e")
    change = Change(old.digest(), new.digest(), ("d0", "d1"))
    brought = [*entrants(new, "e0"), *entrants(None, "e1", shards=(1,))]
    assert formed(brought, changes=(change,)) == Formation(new, founding=False)


def refused(brought, shards: int = 2, changes=()) -> Refusal:
    refusal = formed(brought, shards, changes)
    assert isinstance(refusal, Refusal)
    assert refusal.remedy
    return refusal


def test_an_empty_directory_is_no_silent_start_from_scratch():
    refusal = refused([*entrants(configuration(), "d0"), *entrants(None, "x1", shards=(1,))])
    assert refusal.verdict is Verdict.MISSING
    assert refusal.shards == ("d1: absent", "x1: not of this run")


def test_a_member_that_does_not_come_is_named():
    refusal = refused(entrants(configuration(), "d0"))
    assert (refusal.verdict, refusal.shards) == (Verdict.MISSING, ("d1: absent",))


def test_directories_of_several_runs_are_not_mixed():
    refusal = refused(
        [*entrants(configuration(), "d0"), *entrants(configuration(run="b"), "d1", shards=(1,)),
         *entrants(None, "d2", shards=(2,))]
    )  # fmt: skip
    assert refusal.verdict is Verdict.FOREIGN
    assert "several runs" in refusal.message
    assert refusal.shards == ("d0: run", "d1: b", "d2: empty")


def test_configurations_that_no_change_connects_are_refused():
    old, new = configuration(), configuration(names="e")
    brought = [*entrants(old, "d0"), *entrants(new, "e1", shards=(1,))]
    assert "several configurations of one run" in refused(brought).message
    change = Change(old.digest(), new.digest(), ("d0",))
    partly = [*entrants(old, "e0"), *entrants(new, "e1", shards=(1,))]
    assert formed(partly, changes=(change,)) == Formation(new, founding=False)


def test_another_world_size_is_refused():
    refusal = refused(entrants(configuration(), "d0", "d1"), shards=3)
    assert refusal.verdict is Verdict.FOREIGN
    assert "2 shards, this job has 3 ranks" in refusal.message


def test_directories_that_changed_ranks_are_refused():
    """Shows that swapped mounts can't hand rank 0 the state of rank 1."""
    refusal = refused(entrants(configuration(), "d0", "d1", shards=(1, 0)))
    assert refusal.verdict is Verdict.MIXED
    assert refusal.shards[0] == "d0: shard 0, brought by rank 1"
