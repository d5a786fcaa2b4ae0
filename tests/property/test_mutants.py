"""Show that the laws have teeth: each planted fault is caught, by the law that speaks of it.

The faults are in `tests/mutants.py`. Seeded storms are searched, few and short, until a law breaks;
the search over all states hunts the same ones (`tests/model/test_mutants.py`). A law that no fault
can break would show nothing.
"""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import pytest
from msgspec.structs import replace
from world import SHAPES, Breach, Node, World, storm

from handfast.core import recover
from handfast.core.converge import STRANDED
from handfast.core.events import Tick
from handfast.core.lattice import Epoch
from handfast.core.membership import Roster
from handfast.core.messages import Accepted, RestoreCertificate, Restored, decode_message
from handfast.core.retain import Keep
from handfast.laws.invariants import (
    EVENTUALLY,
    l2_heals_in_diameter,
    l2_whoever_is_there_knows_alike,
    s13_no_interaction_across_epochs,
)
from handfast.laws.truth import Truth
from mutants import MUTANTS, Mutant

Patch = pytest.MonkeyPatch


# --- where to look: rare meetings, staged; then storms


def replay(where: World, rng: random.Random) -> None:
    """An agent comes back as a new incarnation, and then all that its past one said arrives."""
    advance(where, rng, saves=1)
    node = where.here()[-1]
    where.crash(node)
    where.boot(node)
    where.settle(rng)
    where.begin(where.rounds[-1], node)
    where.settle(rng)
    for packet in range(len(where.sent)):
        where.deliver(packet)


def tie(where: World, rng: random.Random) -> None:
    """Two engines give the same generation to two rounds, and each reaches one member first."""
    first, second = (where.launch(store=store) for store in range(2))
    assert first.generation == second.generation
    for node, round_ in zip(where.here(), (first, second, second, second), strict=False):
        where.begin(round_, node)
    where.settle(rng)


def half_told(where: World, rng: random.Random) -> None:
    """A rollback whose certificate reached all but the first member, and then a new start."""
    advance(where, rng, saves=2)
    round_ = where.launch(want=10)
    for node in where.here():
        where.begin(round_, node)
    first, *others = where.here()
    while where.pending or any(node.todo for node in where.here()):
        for node in where.here():
            while node.todo:
                where.work(node)
        packet = where.pending.pop(0)
        to, message = where.sent[packet][0], decode_message(where.sent[packet][1])
        last_words = any(isinstance(fact, Accepted | Restored) for fact in message.facts)
        if to != first.id or not last_words:
            where.deliver(packet)
    assert [node.member.open for node in others] == [True] * len(others)
    assert not first.member.open
    advance(where, rng)


def advance(where: World, rng: random.Random, saves: int = 0, want: int | None = None) -> None:
    round_ = where.launch(want=want)
    for node in where.here():
        where.look(node)
        where.begin(round_, node)
    where.settle(rng)
    go_on(where, rng, saves)


def go_on(where: World, rng: random.Random, saves: int) -> None:
    """All save in the round that is under way, and again once all is quiet."""
    for _ in range(saves):
        save(where)
        where.exchanges = 0
        where.settle(rng)


def save(where: World) -> None:
    for shard in sorted(where.rounds[-1].step):
        where.save(where.rounds[-1], shard)


def revive(where: World, node: Node) -> None:
    """An agent's next life, which its trainer finds in the same round."""
    where.boot(node)
    where.look(node)
    where.begin(where.rounds[-1], node)


def one_bad(where: World, rng: random.Random) -> None:
    """The newest epoch is damaged in one domain, then its other copy is, if there is one."""
    advance(where, rng, saves=2)
    for node in where.here()[:2]:
        if node.images:
            where.spoil(node, max(node.images), vanish=False)
        advance(where, rng)


def gone_apart(where: World, rng: random.Random) -> None:
    """A run is copied while no job runs, both go on, and one domain is put back from the copy."""
    advance(where, rng, saves=1)
    for node in where.here():
        where.crash(node)
    copy = deepcopy(where)
    copy.launch(store=1, asked=[])  # so that its rounds have names of their own from here on
    for one in (where, copy):
        for node in one.nodes.values():
            one.boot(node)
        advance(one, rng, saves=1)
    stranger = copy.nodes[where.here()[-1].id]
    where.put_back(stranger, copy)
    where.stuck.clear()
    advance(where, rng)
    assert not any(node.member.open for node in where.here())
    strayed = f"{stranger.id} did not begin generation 2 in the round of dir0a: {recover.APART}"
    assert {name: stuck.reasons for name, stuck in where.stuck.items()} == dict.fromkeys(
        where.nodes, (strayed,)
    )


BY_SEARCH = {
    "accepts_again_in_a_new_life", "restores_without_every_report",
    "votes_before_its_first_freeze_is_written", "never_trusts_again_what_was_bad_once",
    "saves_a_step_again", "saves_what_it_was_restored_from", "skips_after_a_freeze",
}  # fmt: skip
"""What so few storms miss, and the search of `tests/model/test_mutants.py` finds."""


def lost(where: World, rng: random.Random) -> None:
    """All that is said of an epoch at first is lost, and only ticks can make up for it."""
    advance(where, rng, saves=1)
    assert all(node.member.open for node in where.here())
    save(where)
    for node in where.here():
        while node.todo:
            where.work(node)
    where.pending.clear()
    where.exchanges = 0
    where.settle(rng)
    where.judge(laws=EVENTUALLY)


def deaf(where: World, rng: random.Random) -> None:
    """Nothing arrives for forty ticks: what comes then must not take as long again."""
    advance(where, rng, saves=1)
    save(where)
    for _ in range(40):
        for node in where.here():
            while node.todo:
                where.work(node)
            where.run(node, Tick())
        where.pending.clear()
    where.exchanges = 0
    where.settle(rng)
    where.judge(laws=EVENTUALLY)


def out_of_step(where: World, rng: random.Random) -> None:
    """Each rank saves at steps of its own: nobody ever joins, and in the end all are refused."""
    advance(where, rng)
    round_ = where.rounds[-1]
    for shard in round_.step:
        round_.step[shard] += shard
    for _ in range(STRANDED * where.window + 2):
        save(where)
        where.settle(rng)


def cut_off(where: World, rng: random.Random) -> None:
    """Of a tree the first domain and another go away while all save: the others still meet."""
    advance(where, rng, saves=1)
    for node in where.here()[0::2]:
        where.crash(node)
    save(where)
    for _ in range(2 * len(where.nodes)):
        where.drain(rng)
        for node in where.here():
            where.run(node, Tick())
    where.drain(rng)
    where.judge(laws=(l2_whoever_is_there_knows_alike,))


def torn_between(where: World, rng: random.Random) -> None:
    """Between epochs that converge lies one that tore; what is kept is of those that did."""
    advance(where, rng, saves=3)
    first = where.here()[0]
    save(where)
    where.crash(first)
    where.settle(rng)
    revive(where, first)
    where.settle(rng)
    go_on(where, rng, saves=2)
    where.judge(laws=EVENTUALLY)


def gone_back(where: World, rng: random.Random) -> None:
    """A rollback over two epochs: orphans are not what is to be kept."""
    advance(where, rng, saves=4)
    advance(where, rng, saves=3, want=20)
    where.judge(laws=EVENTUALLY)


def fenced(where: World, rng: random.Random) -> None:
    """A spare member that has had two lives is fenced, and its heir begins with its first."""
    advance(where, rng, saves=1)
    last = where.here()[-1]
    where.crash(last)
    revive(where, last)
    where.settle(rng)
    where.change(last)
    advance(where, rng, saves=1)
    where.judge(laws=EVENTUALLY)


SCENES = (
    replay, tie, half_told, one_bad, gone_apart, lost, out_of_step, cut_off, torn_between,
    gone_back, fenced, deaf,
)  # fmt: skip


def staged(shape: str) -> list[Callable[[World, random.Random], None]]:
    """List what can be staged: where no shard has a spare copy, nobody can be fenced."""
    return [scene for scene in SCENES if scene is not fenced or shape == "either"]


def searches(fault: Mutant) -> Iterator[Callable[[], object]]:
    """List where a fault is looked for, the cheapest first."""
    for scene in staged(fault.shape):
        where = World(SHAPES[fault.shape], keep=Keep(3), stores=2)
        yield partial(scene, where, random.Random(0))
    for seed in range(40):
        yield partial(storm, seed, fault.shape, moves=40, **dict(fault.settings))


@pytest.mark.parametrize(
    ("shape", "scene"),
    [
        pytest.param(shape, scene, id=f"{shape}-{scene.__name__}")
        for shape in ("two", "three", "tiers", "either", "tree", "trees")
        for scene in staged(shape)
    ],
)
def test_a_staged_meeting_harms_nobody(scene: Callable[..., None], shape: str) -> None:
    """Shows that without a fault none of these meetings breaks a law."""
    scene(World(SHAPES[shape], keep=Keep(3), stores=2), random.Random(0))


@pytest.mark.parametrize(
    "fault", [f for f in MUTANTS if f.name not in BY_SEARCH], ids=lambda fault: fault.name
)
def test_a_planted_fault_is_caught(fault: Mutant, monkeypatch: Patch) -> None:
    """Shows that the law that forbids a fault finds it, within few storms."""
    fault.plant(monkeypatch)
    found = next((breach for breach in map(outcome, searches(fault)) if breach), None)
    assert found is not None
    assert found.laws & fault.laws, found


def test_ranks_that_act_from_two_epochs_break_a_law() -> None:
    """S13 follows from S6 and S11, so no fault of a member breaks it first: here is its breach."""
    roster = Roster(SHAPES["two"])
    one = RestoreCertificate("run", roster.digest, 2, "r", Epoch(1, 10), (), (0, 1), "root")
    other = replace(one, base=Epoch(1, 20))
    later = replace(other, generation=3)
    seen = partial(Truth, (roster,), ())
    assert not list(s13_no_interaction_across_epochs(seen(resumed=(("a", one), ("b", later)))))
    (said,) = s13_no_interaction_across_epochs(seen(resumed=(("a", one), ("b", other))))
    assert said == "b acts from 1/20, others from 1/10"


def test_a_relay_that_backs_off_heals_too_late(monkeypatch: Patch) -> None:
    """Of the two laws of L2 it is the one on how many exchanges healing takes that it breaks."""
    (fault,) = (one for one in MUTANTS if one.name == "waits_ever_longer_to_say_it_again")
    fault.plant(monkeypatch)
    with pytest.raises(Breach, match=r"l2_heals_in_diameter: it took 2[0-9] exchanges"):
        deaf(World(SHAPES["two"]), random.Random(0))


def test_gossip_that_takes_too_many_rounds_breaks_a_law() -> None:
    """L2's bound on two members, to the exchange."""
    roster = Roster(SHAPES["two"])
    assert not list(l2_heals_in_diameter(Truth((roster,), (), exchanges=16)))
    assert list(l2_heals_in_diameter(Truth((roster,), (), exchanges=17)))


def outcome(search: Callable[[], object]) -> Breach | None:
    """Give the breach that a search finds; a fault may also keep a scene from being staged."""
    try:
        search()
    except Breach as breach:
        return breach
    except AssertionError:
        pass
    return None
