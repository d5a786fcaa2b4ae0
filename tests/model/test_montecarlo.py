"""Shows that formulas and simulations of chance agree, and that a wrong formula would be found out.

Each interval misses the truth once in a million; seeds are fixed, so a test that passes once
passes always.
"""

import math
from collections.abc import Callable
from random import Random

import pytest

from handfast.model import montecarlo as mc
from handfast.model import probability as p
from handfast.model.montecarlo import Estimate, proportion, ratio

TRIALS = 20_000
SHOCKS = [p.Shock(0.05, ("a", "b")), p.Shock(0.02, ("a", "b", "c"))]
LEVELS = [[0.7, 0.3], [0.5, 0.5], [0.4, 0.6]]
UNIFORM, LONG, MEMORYLESS = p.Uniform(30.0), p.Uniform(150.0), p.Exponential(10.0)

Case = tuple[Callable[[Random], Estimate], float, float]

CASES: dict[str, Case] = {
    "levels": (
        lambda r: proportion(mc.play_levels(r, LEVELS), TRIALS),
        p.atomic(LEVELS),
        math.prod(row[1] for row in LEVELS),  # forgets that all may be at the old one
    ),
    "even levels": (
        lambda r: proportion(mc.play_levels(r, [[1 / 3] * 3] * 3), TRIALS),
        float(p.atomic_uniform(3, 3)),
        3.0**-3,  # forgets that any level will do
    ),
    "torn, uniform": (
        lambda r: proportion(mc.play_torn(r, UNIFORM, 4, 60.0), TRIALS),
        p.torn(UNIFORM.spread(4), 60.0),
        p.torn(30.0 * 4 / 5, 60.0),  # n/(n+1), the mean of the last commit
    ),
    "torn, exponential": (
        lambda r: proportion(mc.play_torn(r, MEMORYLESS, 8, 600.0), TRIALS),
        p.torn(MEMORYLESS.spread(8), 600.0),
        p.torn(MEMORYLESS.spread(16), 600.0),  # grows like the log, so doubling shows
    ),
    "torn, many": (
        lambda r: proportion(mc.play_torn(r, MEMORYLESS, 16_384, 600.0), TRIALS),
        p.torn_if_overlapping(MEMORYLESS, 16_384, 600.0),
        1 - 2.0 ** (1 - 16_384),  # the exponential claim without its condition
    ),
    "torn, overlapping": (
        lambda r: proportion(mc.play_torn(r, LONG, 3, 60.0), TRIALS),
        p.torn_if_overlapping(LONG, 3, 60.0),
        p.torn(LONG.spread(3), 60.0),  # only a bound here
    ),
    "torn, waiting": (
        lambda r: ratio(mc.play_waiting(r, LONG, 3, 120.0), TRIALS),
        p.torn_if_waiting(LONG, 3, 120.0),
        LONG.spread(3) / (150.0 * 3 / 4),  # forgets that the interval is waited for, too
    ),
    "one shot": (
        lambda r: proportion(mc.play_one_shot(r, 100, 1e-4, 60.0, 5e-3), TRIALS),
        p.one_shot(100, 1e-4, 60.0, 5e-3),
        p.one_shot(100, 1e-4 + 5e-3, 60.0),  # counts a common cause once a domain
    ),
    "rounds, few domains": (
        lambda r: proportion(mc.play_rounds(r, 50, 0.2, 3), TRIALS),
        p.retried(50, 0.2, 3),
        p.retried(50, 0.2, 2),
    ),
    "rounds, many domains": (
        lambda r: proportion(mc.play_rounds(r, 16_384, 0.01, 2), TRIALS),
        p.retried(16_384, 0.01, 2),
        p.retried(8_192, 0.01, 2),
    ),
    "lost": (
        lambda r: proportion(mc.play_lost(r, ("a", "b", "c"), 0.2, SHOCKS, 2.0), TRIALS),
        p.lost(("a", "b", "c"), 0.2, SHOCKS, 2.0),
        p.lost(("a", "b", "c"), 0.2 + 0.07, (), 2.0),  # independent, at the same rates
    ),
    "slowdown": (
        lambda r: ratio(mc.play_slowdown(r, 300.0, 20.0, 60.0, 1000.0), TRIALS),
        p.slowdown(300.0, 20.0, 60.0, 1000.0),
        p.slowdown(300.0, 20.0, 0.0, 1000.0),  # forgets the restarts
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_formula_agrees_with_its_simulation_and_a_wrong_one_does_not(name: str) -> None:
    """The same trials must leave the formula standing and refute the one that is nearly right."""
    play, right, wrong = CASES[name]
    seen = play(Random(name))
    assert seen.agrees(right), (seen, right)
    assert not seen.agrees(wrong), (seen, wrong)


@pytest.mark.parametrize("count", [2, 5, 300])
def test_extremes_drawn_themselves_are_those_of_single_draws(count: int) -> None:
    """The shortcut for many domains changes no law: all moments that can be checked agree."""
    for direct in (0, 1000):
        chance = Random(count)
        drawn = [mc.extremes(chance, count, direct) for _ in range(TRIALS)]
        lows, highs, spans = zip(*((a, b, b - a) for a, b in drawn), strict=True)
        assert proportion(lows, TRIALS).agrees(1 / (count + 1))
        assert proportion(highs, TRIALS).agrees(count / (count + 1))
        assert proportion(spans, TRIALS).agrees((count - 1) / (count + 1))
        both = proportion((float(a > 0.3 and b < 0.9) for a, b in drawn), TRIALS)
        assert both.agrees(0.6**count)


def test_few_rounds_by_coin_are_many_by_the_slowest_domain() -> None:
    """Both ways of playing rounds, at the same setting on either side of the border."""
    for domains in (mc.DIRECT // 2, mc.DIRECT):
        seen = proportion(mc.play_rounds(Random(7), domains, 0.3, 4), 5_000)
        assert seen.agrees(p.retried(domains, 0.3, 4))


def test_nothing_fails_where_no_clock_runs() -> None:
    """Rates of zero are no failures, not errors."""
    assert proportion(mc.play_one_shot(Random(1), 5, 0.0, 9.0, 0.0), 100).mean == 1.0
    still = [p.Shock(0.0, ("a",))]
    assert proportion(mc.play_lost(Random(1), ("a",), 0.0, still, 9.0), 100).mean == 0.0


@pytest.mark.parametrize("chance", [0.001, 0.1, 0.5, 1.0])
def test_intervals_hold_as_often_as_they_say(chance: float) -> None:
    """With a mistake of 5 %, at most 5 % of 400 intervals may miss."""
    coin = Random(3)
    missed = 0
    for _ in range(400):
        seen = proportion((float(coin.random() < chance) for _ in range(500)), 500, mistake=0.05)
        missed += not seen.agrees(chance)
    assert missed <= 20
    assert not proportion([1.0] * 500, 500).agrees(0.9)
