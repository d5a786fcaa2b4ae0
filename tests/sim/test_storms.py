"""Storms in virtual time: no law breaks, every goal is met, a seed is a seed, faults are caught."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from handfast.core import events
from handfast.core.fold import boot
from handfast.core.lattice import Epoch
from handfast.core.membership import Roster
from handfast.core.retain import Keep
from handfast.laws.truth import Turn
from handfast.sim.agenda import SECOND
from handfast.sim.agent import Agent
from handfast.sim.job import Job
from handfast.sim.ledger import Ledger
from handfast.sim.storm import GOALS, draw, storm
from handfast.sim.world import World, shape
from mutants import MUTANTS

QUIET = events.Effects((), (), ())


def test_storms_break_no_law_and_reach_every_goal() -> None:
    """Shows all laws in every storm and calm, and that the storms are no walk in the park."""
    met: Counter[str] = Counter()
    for seed in itertools.count():
        outcome = storm(seed)
        assert outcome.laws == (), (seed, outcome.found, outcome.tail)
        met.update(outcome.goals)
        if seed >= 20 and set(met) >= set(GOALS):
            return
        assert seed < 300, set(GOALS) - set(met)


def test_the_narrow_look_and_the_thorough_one_see_the_same_storms() -> None:
    """Shows that what is left out of the judging of a step changes nothing in the world."""
    for seed in (16, 22):
        assert storm(seed) == storm(seed, thorough=True)


def test_a_seed_is_a_seed_whatever_the_hash_seed() -> None:
    """Shows that the same seed gives the same digest of everything in any process."""
    program = "from handfast.sim.storm import storm; print([storm(n).digest for n in (5, 14, 16)])"
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for hash_seed in ("0", "1", "2")
    }  # fmt: skip
    assert said == {f"{[storm(n).digest for n in (5, 14, 16)]}\n"}


def test_what_an_owner_saw_that_wakes_up_late_is_not_what_readers_hold() -> None:
    """Shows that a release is judged by the pins that the present owner has seen."""
    ledger = Ledger(Roster(shape(1)), Keep())
    for incarnation, held in ((1, ()), (2, (Epoch(1, 10),)), (1, (Epoch(1, 20),))):
        member = boot("dir0", incarnation, [])
        ledger.turn("dir0", incarnation, Turn(member, events.Pinned(held), member, QUIET))
    assert ledger.holds() == {("dir0", Epoch(1, 10))}


def test_seeds_differ() -> None:
    """Shows that the digest is of what happened, and that seeds draw worlds of their own."""
    assert len({storm(seed).digest for seed in range(6)}) == 6
    assert len({draw(seed) for seed in range(40)}) == 40


class Steady(random.Random):
    """Everything takes its usual time, so that two worlds can be compared record by record."""

    def random(self) -> float:
        """Always the same."""
        return 0.5


def journals(jumps: bool) -> tuple[dict[str, list], int]:
    """Run a job for a minute; give what all domains wrote, and how often a timer was due."""
    world = World(shape(3, dir=(1, 1)), Steady(), keep=Keep(2), window=2)
    job = Job(world)
    for disk in world.disks.values():
        world.boot(disk)
    job.running = True
    world.start_clocks()
    job.watch()
    clock = random.Random(0)
    for second in range(60):
        world.agenda.run(second * SECOND)
        if jumps:
            world.jump(f"host{second % 3}", clock.choice([-3600, -3, 3, 3600]) * SECOND)
    ticks = sum(isinstance(entry[2], events.Tick) for entry in world.log)
    return {name: disk.records for name, disk in world.disks.items()}, ticks


def test_clocks_that_jump_change_nothing_that_is_written() -> None:
    """S15 from outside: timers that are early, late or never due, and the very same journals."""
    (steady, often), (jumped, otherwise) = journals(False), journals(True)
    assert steady == jumped
    assert often != otherwise
    assert all(len(records) > 100 for records in steady.values())


# --- faults that are planted, and must be caught in the narrow look as in the thorough one

FAULTS = (
    "votes_before_the_image_is_durable",
    "counts_one_copy_where_two_are_promised",
    "keeps_the_last_k_without_a_certificate",
    "publishes_before_it_writes",
    "overlooks_pins",
    "takes_words_of_a_past_generation",
    "restores_without_validating",
    "overlooks_what_was_asked_for",
    "skips_after_a_timeout",
    "never_sends_again",
    "rolls_up_a_skip_as_if_it_were_a_vote",
    "rolls_up_the_second_half_first",
    "keeps_a_block_under_another_root",
)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_at_the_same_step_by_both_looks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that judging a step by what it did overlooks nothing, and what a breach tells."""
    (fault,) = (mutant for mutant in MUTANTS if mutant.name == name)
    fault.plant(monkeypatch)
    caught = next(outcome for outcome in map(storm, range(60)) if outcome.laws)
    thorough = storm(caught.seed, thorough=True)
    assert {law.upper() for law in fault.laws} & set(thorough.laws)
    assert set(caught.laws) <= set(thorough.laws)
    assert caught.events == thorough.events
    assert caught.tail


def test_an_owner_that_never_looks_for_its_successor_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shows that no disk of the simulator does the agent's looking: what is void looks written."""
    original = Agent._go_on

    def go_on(agent: Agent) -> None:
        agent._looked = True
        original(agent)

    monkeypatch.setattr(Agent, "_go_on", go_on)
    caught = next(outcome for outcome in map(storm, range(60)) if outcome.laws)
    assert {"S1", "S7"} & set(caught.laws)


def test_a_block_that_is_told_wrongly_is_caught_when_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the step that tells it writes nothing: a block's leader heard the last vote."""
    (fault,) = (mutant for mutant in MUTANTS if mutant.name == "rolls_up_the_second_half_first")
    fault.plant(monkeypatch)
    trees = [seed for seed in range(30) if draw(seed).fanout and draw(seed).shards > 1]
    assert len(trees) > 5
    for seed in trees:
        narrow, thorough = storm(seed), storm(seed, thorough=True)
        assert (narrow.events, narrow.laws) == (thorough.events, thorough.laws)
