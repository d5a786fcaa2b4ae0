"""Show how one tier gets from write-once votes to a certificate, and that nobody votes twice."""

import itertools

import pytest

from handfast.core import converge
from handfast.core.converge import Conflict, Tally
from handfast.core.lattice import Epoch
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import Skipped, Staged, merkle_root

E1, E2 = Epoch(1, 10), Epoch(1, 20)


def roster(copies: int = 1, need: int = 1, shards: int = 2) -> Roster:
    domains = [Domain(f"d{s}{c}", "dir", s) for s in range(shards) for c in range(copies)]
    return Roster(Configuration("run", shards, tuple(domains), (("dir", need),)))


def tally(of: Roster, *votes: Staged | Skipped) -> Tally:
    held = Tally()
    for vote in votes:
        held = converge.join(of, held, vote)
    return held


def test_an_epoch_converges_when_every_shard_has_its_copies():
    two = roster()
    half = tally(two, Staged(0, E1, "a"))
    assert converge.settle(two, 0, half) is half
    assert two.names(converge.waiting(two, 0, half.ballots[0])) == ("d10",)
    line = converge.settle(two, 0, converge.join(two, half, Staged(1, E1, "b"))).line
    assert line is not None
    assert (line.epoch, line.tier, line.configuration) == (E1, "dir", two.digest)
    assert line.root == merkle_root(["d00=a", "d10=b"])


def test_either_copy_will_do_where_one_is_needed_and_both_where_two_are():
    votes = Staged(0, E1, "a"), Staged(2, E1, "c")
    either, both = roster(copies=2), roster(copies=2, need=2)
    assert converge.settle(either, 0, tally(either, *votes)).line is not None
    held = tally(both, *votes)
    assert converge.settle(both, 0, held).line is None
    assert both.names(converge.waiting(both, 0, held.ballots[0])) == ("d01", "d11")


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_order_of_votes_does_not_matter(order):
    two = roster()
    votes = Staged(0, E1, "a"), Staged(1, E1, "b"), Skipped(0, E2, "full"), Staged(1, E2, "c")
    assert tally(two, *(votes[i] for i in order)) == tally(two, *votes)


def test_a_vote_heard_again_is_the_same_tally():
    two = roster()
    held = tally(two, Staged(0, E1, "a"), Skipped(1, E1, "full"))
    assert converge.join(two, held, Staged(0, E1, "a")) is held
    assert converge.join(two, held, Skipped(1, E1, "full")) is held


@pytest.mark.parametrize(
    "second", [Staged(0, E1, "b"), Skipped(0, E1, "a"), Skipped(0, E1, "full")]
)
def test_a_second_and_different_vote_is_refused(second):
    """Shows that a copied directory which votes under its owner's name is noticed."""
    two = roster()
    with pytest.raises(Conflict, match="d00 voted twice on 1/10"):
        converge.join(two, tally(two, Staged(0, E1, "a")), second)


def test_a_higher_epoch_supersedes_what_lies_below():
    """Shows that an epoch that one rank never saved does not hold up the ones after it."""
    two = roster()
    held = tally(two, Staged(0, E1, "a"), Staged(0, E2, "a"), Staged(1, E2, "b"))
    settled = converge.settle(two, 0, held)
    assert settled.line is not None
    assert settled.line.epoch == E2
    assert settled.ballots == ()
    assert converge.join(two, settled, Staged(1, E1, "b")) is settled
    older = converge.certify(two, 0, held.ballots[0])
    assert converge.learn(settled, older) is settled
    later = converge.join(two, settled, Staged(0, Epoch(1, 30), "c"))
    assert [b.epoch for b in later.ballots] == [Epoch(1, 30)]


def test_an_epoch_that_a_shard_skipped_everywhere_is_void():
    two, spare = roster(), roster(copies=2)
    assert converge.void(two, [tally(two, Skipped(0, E1, "full"))]) == (E1,)
    assert not converge.void(spare, [tally(spare, Skipped(0, E1, "full"))])
    gone = tally(spare, Skipped(0, E1, "full"), Skipped(1, E1, "full"))
    assert converge.void(spare, [gone]) == (E1,)
    assert converge.waiting(two, 0, tally(two, Skipped(0, E1, "full")).ballots[0]) == 0b10


def test_a_ballot_is_found_by_its_epoch():
    two = roster()
    held = tally(two, Staged(0, E2, "b"), Staged(0, E1, "a"))
    assert [b.epoch for b in held.ballots] == [E1, E2]


def test_a_spare_that_nobody_needs_is_not_waited_for():
    """Two copies of each shard, one needed: with one vote a shard nobody is in the way."""
    spare = roster(copies=2)
    held = tally(spare, *(Staged(at, E1, "a") for at in range(0, spare.size, 2)))
    assert converge.waiting(spare, 0, held.ballots[0]) == 0


def test_the_greatest_of_several_complete_epochs_is_certified_at_once():
    """Votes on two may come in one message; a later step has nothing left to conclude."""
    two = roster()
    held = tally(two, *(Staged(at, epoch, "a") for epoch in (E1, E2) for at in (0, 1)))
    settled = converge.settle(two, 0, held)
    assert settled.line is not None
    assert settled.line.epoch == E2
    assert converge.settle(two, 0, settled) is settled
