"""Show that the protocol keeps its promises: scenes that once went wrong, storms, and laws.

Each scene drives the real member through `world.World`, which holds every law of
`handfast.laws.invariants` against the truth after every step.
"""

import itertools
import random
from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from msgspec.structs import replace
from world import KEEP, LARGE, SHAPES, World, durable, shape, storm

from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import boot, step
from handfast.core.messages import Configured, Knows, decode_message
from handfast.core.overlay import Tree
from handfast.core.retain import Keep
from handfast.core.state import Peers
from handfast.laws.goals import SOMETIMES

SHAPE = {"spare": shape(1, dir=(2, 1))}


def started(name: str, saves: int = 0, **settings) -> tuple[World, random.Random]:
    """Give a world whose job has begun and has converged on so many epochs."""
    world, rng = World(SHAPES.get(name) or SHAPE[name], **settings), random.Random(0)
    resume(world, rng)
    for _ in range(saves):
        save(world, rng)
    return world, rng


def resume(world: World, rng: random.Random, want: int | None = None) -> None:
    round_ = world.launch(want=want)
    for node in world.here():
        world.look(node)
        world.begin(round_, node)
    world.settle(rng)


def save(world: World, rng: random.Random, failing: str = "") -> None:
    round_ = world.rounds[-1]
    for shard in round_.alive:
        world.save(round_, shard)
    if failing:
        world.work(world.nodes[failing], fail=True)
    world.settle(rng)


def lines(world: World) -> set[Epoch | None]:
    return {t.line and t.line.epoch for n in world.here() for t in n.member.tallies}


def retained(world: World, name: str) -> list[Epoch]:
    return [copy.epoch for copy in world.nodes[name].member.retained]


# --- scenes


def test_a_job_killed_while_it_is_founded_can_be_started_again():
    """Shows that a first start of which only one rank was written loses nobody their genesis."""
    world, rng = World(SHAPES["two"]), random.Random(0)
    first = world.launch()
    world.begin(first, world.nodes["dir0a"])
    world.pending.clear()
    for node in world.here():
        world.crash(node)
        world.boot(node)
    resume(world, rng)
    assert [node.member.restored.base for node in world.here()] == [GENESIS, GENESIS]


def test_members_that_wait_for_a_dead_one_fall_silent_to_each_other():
    """Shows that a job which waits all night for a node does not chatter all night (L5)."""
    world, rng = started("three", saves=1)
    world.calm(rng, away=1)
    for node in world.here():
        world.run(node, ev.Tick())
    assert {to for to, _ in world.sent[-4:]} == {"dir0a"}


def test_a_restarted_agent_releases_nothing_before_it_knows_what_is_wanted():
    """Shows that neither a reader's pin nor the user's `keep` is forgotten with the agent."""
    world, rng = started("two", saves=6, keep=Keep(5))
    node = world.nodes["dir0a"]
    world.pin(node, Epoch(1, 20))
    save(world, rng)
    held = retained(world, "dir0a")
    assert held == [Epoch(1, step) for step in range(20, 80, 10)]
    world.crash(node)
    world.boot(node)
    for nudge in (ev.Tick(), ev.Greet(1), world.rounds[-1].begin(Keep(5), 2), ev.Tick()):
        world.run(node, nudge)
        assert retained(world, "dir0a") == held
    world.pin(node)
    assert retained(world, "dir0a") == held[1:]


def test_an_image_that_was_persisted_late_is_not_kept_in_place_of_a_newer_one():
    """Shows that `keep` counts epochs by age, not by the order in which the disk took them."""
    world, _ = started("one", keep=Keep(2))
    node = world.nodes["dir0a"]
    for number in (10, 20, 30):
        world.run(node, ev.Captured(Epoch(1, number)))
    world.work(node, at=1)
    world.work(node, at=0)
    for number in (30, 40):
        world.run(node, ev.Captured(Epoch(1, number)))
        world.work(node)
    assert sorted(retained(world, "dir0a")) == [Epoch(1, 30), Epoch(1, 40)]


def test_ranks_that_ask_for_different_steps_are_told_so():
    """Shows that a mistyped `restore(step=)` on one rank ends the round, and names who asked."""
    world, rng = started("two", saves=2, keep=Keep(3))
    round_ = world.launch()
    world.begin(round_, world.nodes["dir0a"], want=10)
    world.begin(round_, world.nodes["dir1a"])
    world.settle(rng)
    for stuck in world.stuck.values():
        assert stuck.reasons == ("dir0a asks for step 10", "dir1a asks for the newest step")
    assert sorted(world.stuck) == ["dir0a", "dir1a"]


def test_a_domain_whose_copy_is_damaged_does_not_release_what_is_older():
    """Shows that another's sound copy is no licence to delete one's own last one (S8)."""
    world, rng = started("spare", saves=2, keep=Keep(1))
    bad = world.nodes["dir0a"]
    world.pin(bad, Epoch(1, 20))
    save(world, rng)
    world.spoil(bad, Epoch(1, 30), vanish=False)
    resume(world, rng)
    assert {node.member.restored.base for node in world.here()} == {Epoch(1, 30)}
    world.pin(bad)
    assert retained(world, "dir0a") == [Epoch(1, 20), Epoch(1, 30)]
    save(world, rng)
    assert retained(world, "dir0a") == [Epoch(2, 40)]


def test_a_tier_that_lost_the_base_to_another_tiers_copy_keeps_what_is_older():
    """Shows that dir is not emptied on the strength of an epoch that only memory still has (S8)."""
    world, rng = started("tiers", saves=1, keep=Keep(1))
    for name in ("dir0a", "dir1a"):
        world.pin(world.nodes[name], Epoch(1, 10))
    save(world, rng)
    world.spoil(world.nodes["dir0a"], Epoch(1, 20), vanish=False)
    resume(world, rng)
    assert {node.member.restored.base for node in world.here()} == {Epoch(1, 20)}
    world.pin(world.nodes["dir1a"])
    assert retained(world, "dir1a") == [Epoch(1, 10), Epoch(1, 20)]


def test_a_crash_between_a_new_configuration_and_its_freeze_leaves_no_way_to_vote():
    """Shows that no vote of an old generation is cast, or counted, in the new configuration."""
    world, rng = started("spare", saves=1)
    world.change(world.nodes["dir0b"])
    node, old = world.nodes["dir0a"], world.rounds[-1]
    node.armed = 1
    world.begin(world.launch(), node)
    world.boot(node)
    world.begin(old, node)
    world.look(node)
    world.save(old, 0)
    world.settle(rng)
    assert retained(world, "dir0a")[-1] == Epoch(1, 10)
    resume(world, rng)
    save(world, rng)
    assert lines(world) == {Epoch(3, 20)}


def test_a_certificate_of_an_old_configuration_releases_nothing_in_the_new_one():
    """Shows that an epoch is not counted on any more when the member that held it is fenced."""
    world, rng = started("tiers", keep=Keep(1))
    save(world, rng)
    for name in ("dir0a", "dir1a"):
        world.pin(world.nodes[name], Epoch(1, 10))
    save(world, rng)
    world.change(world.nodes["dir0a"])
    resume(world, rng)
    assert {node.member.restored.base for node in world.here()} == {Epoch(1, 20)}
    world.pin(world.nodes["dir1a"])
    assert retained(world, "dir1a") == [Epoch(1, 10), Epoch(1, 20)]
    for stale in range(len(world.sent)):
        world.deliver(stale)
    save(world, rng)
    assert lines(world) == {Epoch(2, 30)}


# --- laws


@given(st.integers(0, 10_000), st.sampled_from(["three", "tree"]), st.data())
@settings(max_examples=30)
def test_the_order_of_what_is_heard_does_not_matter(
    seed: int, name: str, data: st.DataObject
) -> None:
    """S9: any order, any repetition, a part first and the rest later: the same join."""
    world, rng = started(name, saves=1)
    round_ = world.launch()
    for node in world.here():
        world.begin(round_, node)
    world.settle(random.Random(seed))
    if seed % 2:
        save(world, rng)
    founded = Configured(world.rosters[-1].configuration, True)
    hearer, _ = step(boot("dir0a", 9, [founded]), round_.begin(KEEP, 2))
    heard = [decode_message(data) for to, data in world.sent if to == "dir0a"]
    heard = [m for m in heard if m.round == round_.name]
    ends = []
    for _ in range(2):
        order = data.draw(st.permutations([*range(len(heard)), *range(0, len(heard), 2)]))
        late = hearer
        for at in (*order, *range(len(heard))):  # what came too early is sent again
            late, _ = step(late, ev.Received(heard[at]))
        ends.append(replace(late, peers=Peers()))
    assert ends[0] == ends[1]


@given(st.integers(0, 400))
@settings(max_examples=3)
def test_a_step_is_a_function_of_its_arguments(seed: int) -> None:
    """S12, S15: the same state and event give the same result, and neither is changed by it."""
    taken = []

    def watched(state, event):
        image = deepcopy((state, event))
        result = step(state, event)
        assert (state, event) == image
        assert step(state, event) == result
        taken.append(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "step", watched)
        storm(seed, "two", moves=10)
    assert taken


@given(st.integers(0, 400))
@settings(max_examples=8)
def test_the_journal_holds_all_that_must_last(seed: int) -> None:
    """Shows that at every point of a storm a reboot finds the durable part of the running state.

    The world compares them after each step; here also after every prefix of a finished journal.
    """
    world = storm(seed, "two", moves=30)
    for node in world.here():
        for end in range(len(node.records)):
            boot(node.id, 1, node.records[:end])
        assert durable(boot(node.id, node.incarnation, node.records, node.member.lost)) == durable(
            node.member
        )


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_storms_break_no_law_and_every_calm_heals(name: str) -> None:
    """Shows all of S1-S15 after every step, and L1-L6 in the calm, in each shape of a job."""
    for seed in range(4):
        storm(seed, name, moves=40)


@pytest.mark.parametrize(("name", "moves"), [("tree", 60), ("ragged", 40), ("wood", 10)])
def test_a_storm_that_the_tree_stands_in_breaks_no_law(name: str, moves: int) -> None:
    """Shows the same in larger jobs, and that votes were rolled up in them, not told singly."""
    world = storm(1, name, moves=moves)
    assert any(decode_message(data).rolled for _, data in world.sent)


@pytest.mark.parametrize(("name", "moves"), [("tree", 60), ("trees", 40), ("ragged", 20)])
def test_the_tree_may_be_another_at_every_step(
    name: str, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a tree may be left and rebuilt at any time, by each member as it likes: blocks of
    all trees meet in one job, no law breaks, and every calm heals."""
    step, chance, rolled = door.step, random.Random(0), Counter()

    def rebuilt(state, event):
        if (roster := state.roster) is not None:
            roster.tree = Tree(roster.tree.spans, chance.choice([2, 4, 8]))
        after, effects = step(state, event)
        rolled.update(roster.tree.fanout for send in effects.send if send.message.rolled)
        return after, effects

    monkeypatch.setattr(door, "step", rebuilt)
    for seed in range(3):
        storm(seed, name, moves=moves)
    assert set(rolled) == {2, 4, 8}


def forgetful(step, told: Counter[str]):
    """Let each step be taken a second time by a member that knows nothing of its peers, from a
    message that shows nothing of its sender: what is written and done has to be the same."""

    def unknowing(state):
        return replace(state, peers=Peers(), turned=-1)

    def held(state, event):
        after, effects = step(state, event)
        late = isinstance(event, ev.Received) and (
            event.message.incarnation < state.peers[event.message.sender].incarnation
        )
        if not late:  # whom a member listens to is what the exact network is searched for
            if isinstance(event, ev.Received):
                event = replace(event, message=replace(event.message, knows=Knows()))
            again, did = step(unknowing(state), event)
            assert (did.persist, did.apply) == (effects.persist, effects.apply)
            assert unknowing(again) == unknowing(after)
            told[type(event).__name__] += state.peers != Peers() and after != state
        return after, effects

    return held


@pytest.mark.parametrize("name", ["two", "either", "tiers", "tree"])
def test_what_is_known_of_peers_decides_only_what_is_sent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows the ground on which jobs are searched over a soup (handfast.model.soup, 1)."""
    told: Counter[str] = Counter()
    monkeypatch.setattr(door, "step", forgetful(door.step, told))
    for seed in range(3):
        storm(seed, name, moves=40)
    assert {"Received", "Persisted", "Begin", "Checked", "Pinned"} <= {k for k in told if told[k]}


def test_a_member_that_acts_on_what_a_peer_shows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above can fail: here what a peer shows to have converged is released."""
    original = door._HANDLERS[ev.Received]

    def received(turn, event):
        original(turn, event)
        lines = [line for line in event.message.knows.lines if line is not None]
        below = tuple(c.epoch for c in turn.state.retained if lines and c.epoch < min(lines))
        if below:
            turn.do(ev.Release(below))

    monkeypatch.setitem(door._HANDLERS, ev.Received, received)
    monkeypatch.setattr(door, "step", forgetful(door.step, Counter()))
    with pytest.raises(AssertionError, match="Release") as caught:
        [storm(seed, "two", moves=40) for seed in range(20)]
    assert caught.type is AssertionError  # and no breach of a law


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["tree", "trees", *sorted(LARGE)])
def test_many_storms_break_no_law_of_the_tree(name: str) -> None:
    """Shows it over a hundred storms on small trees, and ten on the others."""
    for seed in range(100 if name in SHAPES else 10):
        storm(seed, name, moves=60)


def test_storms_reach_what_they_must() -> None:
    """Shows that the search is no walk in the park: every goal is met somewhere."""
    met: Counter[str] = Counter()
    for seed in itertools.count():
        met += storm(seed, "either" if seed % 4 == 0 else "two", moves=60).goals
        if set(met) >= set(SOMETIMES):
            return
        assert seed < 60, set(SOMETIMES) - set(met)


class Protocol(RuleBasedStateMachine):
    """The world, with Hypothesis choosing, so that what breaks a law is shrunk to a short story."""

    @initialize(
        name=st.sampled_from(sorted(SHAPES)),
        keep=st.sampled_from([Keep(1), Keep(2), Keep(3, every=20)]),
        window=st.integers(1, 3),
        stores=st.integers(1, 2),
    )
    def found(self, name: str, keep: Keep, window: int, stores: int) -> None:
        self.world = World(SHAPES[name], keep=keep, window=window, stores=stores)
        self.rng = random.Random(0)
        self.losses = 3
        resume(self.world, self.rng)

    def pick(self, at: int, of: list) -> object:
        return of[at % len(of)] if of else None

    @rule(want=st.sampled_from([None, None, 10, 20]), store=st.integers(0, 1), asked=st.integers(0))
    def launch(self, want: int | None, store: int, asked: int) -> None:
        here = self.world.here()
        some = [node for i, node in enumerate(here) if asked >> i & 1]
        self.world.launch(want=want, store=store % len(self.world.stores), asked=some)

    @rule(at=st.integers(0, 7), back=st.integers(1, 2))
    def begin(self, at: int, back: int) -> None:
        if node := self.pick(at, self.world.here()):
            self.world.begin(self.world.rounds[-min(back, len(self.world.rounds))], node)

    @rule()
    def begin_everywhere(self) -> None:
        for node in self.world.here():
            self.world.begin(self.world.rounds[-1], node)

    @rule(at=st.integers(0))
    def hear(self, at: int) -> None:
        pending = self.world.pending
        if pending:
            self.world.deliver(pending.pop(at % len(pending)))

    @rule(at=st.integers(0))
    def hear_again(self, at: int) -> None:
        self.world.deliver(at % len(self.world.sent)) if self.world.sent else None

    @rule(at=st.integers(0))
    def lose(self, at: int) -> None:
        pending = self.world.pending
        if pending:
            pending.pop(at % len(pending))

    @rule(at=st.integers(0, 7), job=st.integers(0, 3), fail=st.booleans())
    def work(self, at: int, job: int, fail: bool) -> None:
        if node := self.pick(at, [node for node in self.world.here() if node.todo]):
            self.world.work(node, job % len(node.todo), fail=fail and job == 3)

    @rule(at=st.integers(0, 3), forgo=st.sampled_from([False] * 5 + [True]))
    def train(self, at: int, forgo: bool) -> None:
        running = [(r, s) for r in self.world.rounds for s in sorted(r.step) if r.alive[s]]
        if rank := self.pick(-1 - at, running):
            self.world.save(*rank, forgo=forgo)

    @rule(seed=st.integers(0, 9))
    def settle(self, seed: int) -> None:
        self.world.settle(random.Random(seed))

    @rule(at=st.integers(0, 7), cut=st.none() | st.integers(0, 11))
    def crash(self, at: int, cut: int | None) -> None:
        node = self.pick(at, self.world.here())
        if node and cut is None:
            self.world.crash(node)
        elif node:
            node.armed = cut

    @rule(at=st.integers(0, 7))
    def boot(self, at: int) -> None:
        down = [n for n in self.world.nodes.values() if n.member is None and not n.fenced]
        if node := self.pick(at, down):
            self.world.boot(node)

    @rule(at=st.integers(0, 7), which=st.integers(0, 5), vanish=st.booleans())
    def spoil(self, at: int, which: int, vanish: bool) -> None:
        node = self.pick(at, list(self.world.nodes.values()))
        held = sorted(e for e, i in node.images.items() if i.sound and self.world.attested(node, e))
        if held and self.losses:
            self.losses -= 1
            self.world.spoil(node, self.pick(which, held), vanish=vanish)

    @rule(at=st.integers(0, 7), which=st.none() | st.integers(0, 5))
    def pin(self, at: int, which: int | None) -> None:
        if node := self.pick(at, self.world.here()):
            held = [copy.epoch for copy in node.member.retained]
            chosen = self.pick(which, held) if which is not None else None
            self.world.pin(node, *([chosen] if chosen else []))

    @rule(at=st.integers(0, 7))
    def fence(self, at: int) -> None:
        if not self.world.changes and self.world.resumed and len(self.world.nodes) > 1:
            self.world.change(self.pick(at, list(self.world.nodes.values())))

    @rule(at=st.integers(0, 7))
    def tick(self, at: int) -> None:
        if node := self.pick(at, self.world.here()):
            self.world.run(node, ev.Tick())

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.calm(self.rng)


Protocol.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
TestProtocol = Protocol.TestCase


@pytest.mark.parametrize("shape", ["two", "tiers", "tree"])
def test_epochs_that_a_rank_can_t_save_do_not_fill_the_others_disks(shape: str) -> None:
    """Of a shard that every tier has skipped no copy will ever be: the others' go at once."""
    where, rng = World(SHAPES[shape], keep=Keep(1)), random.Random(0)
    round_ = where.launch()
    for node in where.here():
        where.look(node)
        where.begin(round_, node)
    where.settle(rng)
    for save in range(12):
        for shard in sorted(round_.step):
            where.save(round_, shard)
        for node in where.here():
            while node.todo:
                where.work(node, fail=save > 0 and node.domain.shard == 0)
        where.settle(rng)
    assert {len(node.member.retained) for node in where.here()} == {1}
