"""Show the tree: its shape, that its root is that of gossip, what it costs, and what heals it.

The counts are of a network that delivers hop by hop. They are counts of messages, not of time.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from handfast.core import converge, gossip
from handfast.core import events as ev
from handfast.core.converge import Ballot, Conflict, Tally, reach
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import step
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import (
    Branch,
    Copy,
    Knows,
    RestoreCertificate,
    Rolled,
    Skipped,
    Staged,
    encode,
    leaf,
    merkle_root,
    node,
)
from handfast.core.overlay import Tree
from handfast.core.retain import Keep
from handfast.core.state import Member, Peer, Peers
from handfast.core.view import view

E1, E2 = Epoch(1, 10), Epoch(1, 20)


def roster(*tiers: int, fanout: int = 0, need: int = 1) -> Roster:
    """Give one shard a domain, each tier of so many; shards are held by one domain in each tier."""
    shards = max(tiers)
    domains = tuple(
        Domain(f"t{t}d{i}", f"t{t}", i % shards)
        for t, size in enumerate(tiers)
        for i in range(size)
    )
    names = tuple((f"t{t}", need) for t in range(len(tiers)))
    return Roster(Configuration("run", shards, domains, names, fanout))


# --- the shape


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    ends = list(itertools.accumulate(sizes))
    spans = tuple(zip([0, *ends], ends, strict=False))
    return Tree(spans, draw(st.sampled_from([2, 4, 8])))


@given(trees())
def test_everybody_but_the_first_has_one_above_it_and_no_edge_is_said_twice(tree):
    """Shows a spanning tree: n - 1 edges, on which everybody leads to the first of all."""
    size = tree.spans[-1][1]
    edges = [(tree.above(i), i) for i in range(size) if tree.above(i) is not None]
    assert len(edges) == size - 1
    assert edges == sorted(
        ((i, child) for i in range(size) for child in tree.below(i)), key=lambda edge: edge[1]
    )
    for i in range(size):
        assert [0, *reversed(list(tree.leaders(i)))][-1] == (tree.above(i) or 0)
        assert set(tree.next_to(i)) == {a for e in edges if i in e for a in e} - {i}


@given(trees())
def test_a_block_is_its_leader_and_the_blocks_below_it(tree):
    """Shows that a leader that heard all that are below has heard of its block, and no more."""
    for first, end in tree.spans:
        assert tree.block(first) == (first, end) == tree.span(end - 1)
        for i in range(first, end):
            inside = [tree.block(c) for c in tree.below(i) if first <= c < end]
            assert [i, *itertools.chain(*(range(*block) for block in sorted(inside)))] == list(
                range(*tree.block(i))
            )
            assert tree.aligned(*tree.block(i))


@given(trees())
def test_the_depth_is_the_most_digits_that_are_not_zero(tree):
    def digits(place: int) -> int:
        return (place % tree.fanout > 0) + digits(place // tree.fanout) if place else 0

    assert tree.depth() == max(digits(i - a) for a, b in tree.spans for i in range(a, b))


@pytest.mark.parametrize("fanout", [-2, 0, 1, 3, 6])
def test_a_fanout_must_be_a_power_of_two(fanout):
    with pytest.raises(ValueError, match="power of two"):
        Tree(((0, 9),), fanout)


@pytest.mark.parametrize("size", range(1, 34))
def test_aligned_blocks_are_the_inner_nodes_of_the_merkle_tree(size):
    """Shows that halves that join have the node of the whole, and ends up at the root."""
    tree = Tree(((0, size),), 2)
    leaves = [f"leaf {i}" for i in range(size)]
    blocks = [(a, b) for a in range(size) for b in range(a + 1, size + 1) if tree.aligned(a, b)]
    joined = 0
    for left, right in itertools.product(blocks, blocks):
        if tree.joins(left, right):
            joined += 1
            halves = (bytes.fromhex(merkle_root(leaves[a:b])) for a, b in (left, right))
            whole = leaves[left[0] : right[1]]
            assert tree.aligned(left[0], right[1])
            assert node(*halves).hex() == merkle_root(whole)
    assert joined == len([block for block in blocks if block[1] - block[0] > 1]) == size - 1


# --- where there is one


def test_a_tree_is_there_where_all_are_needed_and_the_job_is_not_small():
    assert roster(9).tree is None
    assert roster(10).tree is not None
    assert roster(10, fanout=1).tree is None
    assert roster(4, fanout=2).tree is not None
    assert roster(6, 6).tree.spans == ((0, 6), (6, 12))


def test_where_a_copy_may_be_spared_or_tiers_are_mixed_it_is_gossip():
    twice = tuple(Domain(f"d{i}", "dir", i // 2) for i in range(12))
    assert Roster(Configuration("run", 6, twice, (("dir", 1),), 2)).tree is None
    assert Roster(Configuration("run", 6, twice, (("dir", 2),), 2)).tree is not None
    mixed = tuple(Domain(f"d{i}", ("dir", "mem")[i % 2], i // 2) for i in range(12))
    assert Roster(Configuration("run", 6, mixed, (("dir", 1), ("mem", 1)), 2)).tree is None


def test_a_fanout_that_is_left_open_changes_no_name():
    """Shows that a configuration of an earlier release keeps its digest, and a wish shows in it."""
    plain = roster(4).configuration
    assert Roster(plain).digest != roster(4, fanout=2).digest
    assert plain.digest() == "aecdc4a81be1dbd75fbdb703e2d773c5"


# --- what is joined


def votes(of: Roster, epoch: Epoch = E1) -> list[Staged]:
    return [Staged(i, epoch, f"image{i}") for i in range(of.size)]


def rolled(of: Roster, first: int, end: int, epoch: Epoch = E1) -> Staged | Rolled:
    """Say, truly, what a block of domains staged."""
    said = votes(of, epoch)[first:end]
    if end - first == 1:
        return said[0]
    root = merkle_root([f"{of.ids[v.domain]}={v.digest}" for v in said])
    return Rolled(first, end - first, epoch, bytes.fromhex(root))


def tally(of: Roster, *facts: Staged | Rolled | Skipped) -> Tally:
    held = Tally()
    for fact in facts:
        assert converge.sound(of, fact)
        held = converge.join(of, held, fact)
    return held


@st.composite
def heard(draw: st.DrawFn) -> tuple[Roster, list[tuple[int, int]], list[tuple[int, int]]]:
    """A tier, blocks of it in some order, and the same in another, some twice."""
    of = roster(draw(st.integers(1, 20)), fanout=2)
    places = [(a, b) for a in range(of.size) for b in range(a + 1, of.size + 1)]
    blocks = [block for block in places if of.tree.aligned(*block)]
    some = draw(st.lists(st.sampled_from(blocks), max_size=12))
    return of, some, draw(st.permutations([*some, *draw(st.lists(st.sampled_from(some or blocks)))
                                           ] if some else []))  # fmt: skip


@given(heard())
def test_any_order_and_doubling_of_rolled_facts_and_votes_gives_the_same_join(drawn):
    """Shows that what is held is the union of the domains spoken for, whoever spoke, and how."""
    of, some, others = drawn
    one, other = (tally(of, *(rolled(of, *b) for b in blocks)) for blocks in (some, others))
    singly = tally(of, *(rolled(of, i, i + 1) for i in {i: 0 for b in some for i in range(*b)}))
    assert one == other == singly
    for ballot in one.ballots:
        assert [rolled(of, *reach(vote)) for vote in ballot.votes] == list(ballot.votes)
        assert not any(
            of.tree.joins(reach(a), reach(b)) for a, b in itertools.pairwise(ballot.votes)
        )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 16, 31, 33])
def test_the_tree_and_gossip_give_the_identical_certificate(size):
    """Shows one root: rolled up in blocks, joined singly, and without any tree."""
    tree, plain = roster(size, fanout=2), roster(size, fanout=1)
    halves = [rolled(tree, *block) for block in map(tree.tree.block, tree.tree.below(0))]
    lines = [
        converge.settle(of, 0, tally(of, *facts)).line
        for of, facts in [
            (tree, [rolled(tree, 0, 1), *halves]), (tree, votes(tree)), (plain, votes(plain)),
        ]
    ]  # fmt: skip
    assert {line.root for line in lines} == {
        merkle_root([f"{d}=image{i}" for i, d in enumerate(tree.ids)])
    }
    assert lines[0] == lines[1]


def test_a_skip_and_a_roll_do_not_go_together():
    """Shows that a summary never covers a skip, whichever came first."""
    of = roster(4, fanout=2)
    skip = Skipped(1, E1, "full")
    with pytest.raises(Conflict, match="t0d1 voted twice"):
        tally(of, skip, rolled(of, 0, 2))
    with pytest.raises(Conflict, match="t0d1 voted twice"):
        tally(of, rolled(of, 0, 2), skip)
    held = tally(of, skip, *(rolled(of, i, i + 1) for i in (0, 2, 3)))
    assert [reach(vote) for vote in held.ballots[0].votes] == [(0, 1), (2, 4)]
    assert converge.settle(of, 0, held) is held
    assert of.names(converge.waiting(of, 0, held.ballots[0])) == ()
    other = Rolled(0, 2, E2, bytes(16))
    with pytest.raises(Conflict, match="t0d0 voted twice"):
        tally(of, rolled(of, 0, 2, E2), other)


def test_nobody_is_told_of_its_own_vote_by_others():
    of = roster(4, fanout=2)
    with pytest.raises(Conflict, match="t0d1 never staged 1/10: 0 to 1"):
        converge.join(of, Tally(), rolled(of, 0, 2), 1)
    assert converge.join(of, Tally(), rolled(of, 1, 2), 1) == Tally()
    mine = converge.join(of, Tally(), rolled(of, 1, 2))
    assert converge.join(of, mine, rolled(of, 0, 2), 1) == tally(of, rolled(of, 0, 2))


@pytest.mark.parametrize(
    ("first", "size"), [(0, 1), (0, 4), (1, 2), (-1, 2), (2, 2), (4, 2), (0, 0), (5, 2), (0, 6)]
)
def test_a_roll_of_no_block_is_refused(first, size):
    """Shows it for members that are not there, blocks that are not aligned, and blocks of one."""
    of = roster(3, 3, fanout=2)
    assert not converge.sound(of, Rolled(first, size, E1, bytes(16)))
    assert not converge.sound(roster(7, fanout=1), Rolled(0, 2, E1, bytes(16)))
    assert converge.sound(of, Rolled(3, 3, E1, bytes(16)))


# --- members that talk: what it costs


def opened(of: Roster) -> list[Member]:
    """Give the members of a job that has begun, and has heard of each other."""
    base = RestoreCertificate(
        "run", of.digest, 1, "r1", GENESIS, (Branch(1, GENESIS, "r1"),), (), ""
    )
    told = Peer(1, Knows(restored=True, lines=(None,) * len(of.tiers)))
    return [
        Member(
            of.ids[i], 1, of, i, True, 1, "r1", (Copy(GENESIS, ""),), restored=base,
            tallies=(Tally(),) * len(of.tiers), keep=Keep(), pinned=(),
            peers=Peers(tuple((peer, told) for peer in of.neighbours[i])),
        )
        for i in range(of.size)
    ]  # fmt: skip


class Job:
    """Open members, and a network that delivers hop by hop; ``cut`` says what it loses."""

    def __init__(self, of: Roster, cut: Callable[[int, int], bool] = lambda a, b: False) -> None:
        self.roster, self.cut = of, cut
        self.members = opened(of)
        self.mail: list[tuple[int, ev.Send]] = []
        self.refused: list[ev.Reject] = []
        self.longest = 0
        self.old = -1

    def run(self, at: int, event: ev.Event) -> None:
        self.members[at], effects = step(self.members[at], event)
        self.mail += [(at, send) for send in effects.send]
        self.refused += [action for action in effects.apply if isinstance(action, ev.Reject)]
        for action in effects.apply:
            if isinstance(action, ev.Persist):
                self.run(at, ev.Persisted(action.epoch, f"image{at}"))

    def save(self, epoch: Epoch, *but: int) -> None:
        for at in range(self.roster.size):
            if at not in but:
                self.run(at, ev.Captured(epoch))

    def flood(self) -> tuple[int, int]:
        """Deliver all that is under way and what comes of it: so many messages, so many hops."""
        messages = hops = 0
        while self.mail:
            now, self.mail = self.mail, []
            messages, hops = messages + len(now), hops + 1
            for sender, send in now:
                self.longest = max(self.longest, len(encode(send.message)))
                message = send.message
                if send.to == self.old:  # what it does not know is skipped
                    message = replace(message, rolled=(), knows=replace(message.knows, spans=()))
                if not self.cut(sender, send.to):
                    self.run(send.to, ev.Received(message))
        return messages, hops

    def ticks(self, most: int = 99) -> Iterator[int]:
        """Let all tick, and deliver, until a tick sends nothing; give the messages of each."""
        for _ in range(most):
            for at in reversed(range(self.roster.size)):
                self.run(at, ev.Tick())
            if not self.mail:
                return
            yield self.flood()[0]

    def lines(self) -> set[Epoch | None]:
        return {t.line and t.line.epoch for m in self.members for t in m.tallies}


@pytest.mark.parametrize("size", [10, 16, 17, 64, 100, 512, 4096])
def test_an_epoch_takes_two_messages_a_link_and_twice_the_depth(size):
    """Shows 2(n - 1) messages and 2 depth hops where nothing is lost, and silence soon afterwards.

    The certificate is acknowledged by the next save, or by ticks: with one message a link, where
    the one below ticks first, and three at most.
    """
    job = Job(roster(size))
    depth = job.roster.tree.depth()
    for epoch in (E1, E2)[: 2 if size < 1000 else 1]:
        job.save(epoch)
        assert job.flood() == (2 * (size - 1), 2 * depth)
        assert job.lines() == {epoch}
    if size < 1000:
        assert list(job.ticks()) == [2 * (size - 1), size - 1]
        assert not any(map(gossip.restless, job.members))
    assert job.longest < 200
    assert not job.refused


@pytest.mark.parametrize("fanout", [2, 4, 16])
@pytest.mark.parametrize("tiers", [(20,), (4,), (12, 12), (3, 3, 3)])
def test_certificates_of_each_tier_reach_all(fanout, tiers):
    """Shows the same for any fanout, and for tiers beside each other: votes up, certificates on."""
    job = Job(roster(*tiers, fanout=fanout))
    size = job.roster.size
    job.save(E1)
    messages, hops = job.flood()
    up = sum(tier - 1 for tier in tiers)
    assert messages == up + len(tiers) * (size - 1)
    assert hops <= 2 * job.roster.tree.depth() + 2 * (len(tiers) > 1)
    assert job.lines() == {E1}


def test_what_a_member_holds_does_not_grow_with_the_job():
    """Shows that votes, peers and messages are few however many domains there are."""
    job = Job(roster(1024))
    job.save(E1, 7)
    job.flood()
    held = [m.tallies[0].ballots[0] for m in job.members if m.tallies[0].ballots]
    assert max(len(ballot.votes) for ballot in held) <= 12 * 8
    assert sum(len(ballot.votes) for ballot in held) < 2 * job.roster.size
    assert max(len(m.peers.heard) for m in job.members) <= 12 * 2 + 4 * 7 + 1
    assert job.longest < 200


# --- what heals it


def bound(size: int) -> int:
    """L2's bound on exchanges, as in `handfast.laws.invariants`."""
    return 4 * (size.bit_length() + 2)


@pytest.mark.parametrize("size", [12, 64, 130])
def test_all_that_is_lost_is_made_up_for_by_one_tick(size):
    job = Job(roster(size), cut=lambda a, b: True)
    job.save(E1)
    job.flood()
    job.cut = lambda a, b: False
    assert next(job.ticks()) >= 2 * (size - 1)
    assert job.lines() == {E1}


@pytest.mark.parametrize("size", [12, 64, 130])
@pytest.mark.parametrize("dead", ["all of it", "an inner node", "the first"])
def test_a_tree_whose_links_are_down_heals_within_the_bound(size, dead):
    """Shows L2: beside the tree, a neighbour at a time, all learn in a logarithm of exchanges."""
    tree = roster(size).tree
    gone = {"an inner node": 8, "the first": 0}.get(dead)

    def cut(a: int, b: int) -> bool:
        return (a in tree.next_to(b)) and (gone is None or gone in (a, b))

    job = Job(roster(size), cut)
    job.save(E1)
    job.flood()
    assert job.lines() != {E1}
    needed = next(n for n, _ in enumerate(job.ticks(), 1) if job.lines() == {E1})
    assert needed <= bound(size)


def test_once_a_link_is_back_all_fall_silent():
    """Shows that what was said beside the tree comes to an end, too (L5)."""
    of = roster(64)
    job = Job(of, cut=lambda a, b: 8 in (a, b) and a in of.tree.next_to(b))
    job.save(E1)
    job.flood()
    assert len(list(job.ticks(20))) == 20
    job.cut = lambda a, b: False
    assert len(list(job.ticks())) <= bound(64)
    assert not any(map(gossip.restless, job.members))


def test_who_is_late_is_named_by_all_and_the_rest_is_silent():
    """Shows L4 and L5 with two that are slow; then they vote, and it takes two messages a link."""
    job = Job(roster(64))
    job.save(E1, 5, 9)
    job.flood()
    silent = len(list(job.ticks()))
    assert silent <= bound(64)
    assert {view(m).blocked_by for m in job.members} == {("t0d5", "t0d9")}
    for late in (5, 9):
        job.run(late, ev.Captured(E1))
    job.flood()
    assert job.lines() == {E1}


def test_a_skip_reaches_all_and_closes_the_window_for_nobody():
    """Shows that where one skips, gossip tells all, and nobody is awaited any more."""
    job = Job(roster(20))
    job.save(E1, 3)
    job.run(3, ev.Forgone(E1, "no time"))
    job.flood()
    assert len(list(job.ticks())) <= bound(20)
    skips = {m.tallies[0].ballots[0].skips for m in job.members}
    assert skips == {(Skipped(3, E1, "no time"),)}
    assert {view(m).blocked_by for m in job.members} == {()}
    job.save(E2)
    job.flood()
    assert job.lines() == {E2}


def test_a_vote_that_is_not_of_this_generation_or_configuration_is_refused():
    job = Job(roster(20))
    job.save(E1)
    up = next(send for at, send in job.mail if at == 9)
    assert up.to == 8
    assert [type(fact) for fact in up.message.facts] == [Staged]
    for wrong in (Rolled(16, 4, Epoch(2, 10), bytes(16)), Rolled(16, 8, E1, bytes(16))):
        told = type(up.message)(9, 1, 1, "r1", job.roster.digest, (), Knows(), False, (wrong,))
        before = job.members[8].tallies
        job.run(8, ev.Received(told))
        assert job.members[8].tallies == before
    assert len(job.refused) == 2


def test_an_agent_of_an_earlier_release_slows_the_others_and_stops_nobody():
    """Shows it as an inner node: it reads no roll, tells its ring, and learns the certificate."""
    job = Job(roster(20))
    old = Roster(job.roster.configuration)
    old.tree = None
    job.members[8] = replace(job.members[8], roster=old)
    job.old = 8
    for epoch in (E1, E2):
        job.save(epoch)
        job.flood()
        assert len(list(job.ticks())) <= bound(20)
        assert job.lines() == {epoch}
    assert not any(map(gossip.restless, job.members))


def test_a_node_of_the_tree_is_no_leaf():
    assert leaf("ab") != node(b"a", b"b")
    assert Ballot(E1).staged == Ballot(E1).skipped == 0
