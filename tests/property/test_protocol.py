"""Show that the protocol keeps its promises: scenes that once went wrong, storms, and laws.

Each scene drives the real member through `world.World`, which holds every law of
`handfast.core.invariants` against the truth after every step.
"""

import random

from world import SHAPES, World

from handfast.core import events as ev
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.retain import Keep


def started(name: str, saves: int = 0, **settings) -> tuple[World, random.Random]:
    """Give a world whose job has begun and has converged on so many epochs."""
    world, rng = World(SHAPES[name], **settings), random.Random(0)
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


def save(world: World, rng: random.Random) -> None:
    round_ = world.rounds[-1]
    for shard in round_.alive:
        world.save(round_, shard)
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
