"""Show that the protocol keeps its promises: scenes that once went wrong, storms, and laws.

Each scene drives the real member through `world.World`, which holds every law of
`handfast.core.invariants` against the truth after every step.
"""

import random

from world import SHAPES, World, shape

from handfast.core import events as ev
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.retain import Keep


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
    world, rng = started("one", keep=Keep(2))
    node = world.nodes["dir0a"]
    for step in (10, 20, 30):
        world.run(node, ev.Captured(Epoch(1, step)))
    world.work(node, at=1)
    world.work(node, at=0)
    for step in (30, 40):
        world.run(node, ev.Captured(Epoch(1, step)))
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
