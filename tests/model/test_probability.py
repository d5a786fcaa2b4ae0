"""Shows that each formula of chance is right where everything can be enumerated, at its edges, and
where a closed form meets the integral that it comes from. Against simulations: tests/model.
"""

import decimal
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, product

import pytest

from handfast.model import probability as p

HALF = Fraction(1, 2)


def outcomes(levels: list[list[Fraction]]) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    """Every vector of levels, with its chance."""
    for vector in product(*(range(len(row)) for row in levels)):
        yield vector, math.prod(row[at] for row, at in zip(levels, vector, strict=True))


@pytest.mark.parametrize("domains", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_atomic_is_what_enumeration_counts(domains: int, levels: int) -> None:
    """Exactly, with unequal chances that differ from domain to domain."""
    rows = [
        [Fraction(1 + (i + k) % 3, sum(1 + (i + j) % 3 for j in range(levels)))
         for k in range(levels)]
        for i in range(domains)
    ]  # fmt: skip
    counted = sum(chance for vector, chance in outcomes(rows) if len(set(vector)) == 1)
    assert p.atomic(rows) == counted
    mixed = sum(len(set(vector)) > 1 for vector, _ in outcomes(rows))
    assert p.mixed_states(levels, domains) == mixed
    even = [[Fraction(1, levels)] * levels] * domains
    assert p.atomic_uniform(levels, domains) == p.atomic(even)
    assert p.atomic([list(map(float, row)) for row in rows]) == pytest.approx(float(counted))


def test_two_levels_are_the_product_of_both() -> None:
    """Prod p + prod (1-p); at 1/2 it is 2^(1-n)."""
    rows = [[1 - q, q] for q in (HALF, Fraction(1, 3), Fraction(1, 5))]
    assert p.atomic(rows) == Fraction(1, 30) + Fraction(8, 30)
    assert p.atomic([[HALF, HALF]] * 20) == Fraction(1, 2**19)


@pytest.mark.parametrize("levels", [[], [[HALF, HALF], [Fraction(1)]]])
def test_levels_that_do_not_fit_are_refused(levels: list[list[Fraction]]) -> None:
    """Of no domain nothing can be said, nor of levels that only some have."""
    with pytest.raises(ValueError, match="one row for each domain"):
        p.atomic(levels)


LAWS = [p.Uniform(60.0), p.Exponential(10.0)]


@pytest.mark.parametrize("domains", [2, 3, 64, 16_384])
@pytest.mark.parametrize("law", LAWS)
def test_closed_forms_of_the_spread_are_the_integral(law: p.Commit, domains: int) -> None:
    """E[max T - min T] = the integral of 1 - F^n - (1-F)^n, for both laws."""
    integral = p.spread(law.cdf, domains, 0.0, law.quantile(1 - 2**-53))
    assert law.spread(domains) == pytest.approx(integral, rel=1e-8)


def test_a_spread_of_two_uniform_commits_by_counting() -> None:
    """On a grid of 200 instants: a third of the window."""
    grid = range(200)
    mean = Fraction(sum(abs(a - b) for a, b in product(grid, grid)), 200**2)
    assert p.Uniform(200.0).spread(2) == pytest.approx(float(mean), rel=1e-3)


def test_any_law_has_a_spread() -> None:
    """For the normal one it stays below the well-known 2 sigma sqrt(2 ln n)."""
    found = p.spread(lambda t: 0.5 * math.erfc((30 - t) / (5 * math.sqrt(2))), 16_384, -30.0, 90.0)
    assert 10 * math.sqrt(2 * math.log(16_384)) > found > 39.0


@pytest.mark.parametrize("law", LAWS)
def test_quantiles_undo_what_a_law_says(law: p.Commit) -> None:
    """And nothing commits before the save begins."""
    for u in (0.0, 0.1, 0.5, 0.999):
        assert law.cdf(law.quantile(u)) == pytest.approx(u)
    assert law.cdf(-1.0) == 0.0


@pytest.mark.parametrize("domains", [2, 8, 16_384])
@pytest.mark.parametrize("law", LAWS)
def test_three_ways_of_saving_agree_where_saves_do_not_meet(law: p.Commit, domains: int) -> None:
    """A window far below the interval, and one that would fall between coarse samples."""
    for interval in (1800.0, 2e6):
        torn = p.torn(law.spread(domains), interval)
        assert p.torn_if_overlapping(law, domains, interval) == pytest.approx(torn, rel=1e-6)
        assert p.torn_if_waiting(law, domains, interval) == pytest.approx(torn, rel=1e-6)


@pytest.mark.parametrize("window", [70.0, 90.0, 150.0])
def test_beyond_the_interval_the_window_law_is_a_bound(window: float) -> None:
    """And it is cut off at 1, which both others stay below."""
    law = p.Uniform(window)
    bound = p.torn(law.spread(3), 60.0)
    overlapping = p.torn_if_overlapping(law, 3, 60.0)
    assert overlapping < bound <= 1.0
    assert p.torn_if_waiting(law, 3, 60.0) < bound
    # by hand, for w in [tau, 2 tau]: p_0 = u/w, p_1 = (1-u/w) F(u+tau), p_2 = the rest
    phases = [60.0 * (i + 0.5) / 20_000 for i in range(20_000)]
    if window <= 120.0:
        done = [(u / window, min(1.0, (u + 60.0) / window)) for u in phases]
        together = [a**3 + ((1 - a) * b) ** 3 + ((1 - a) * (1 - b)) ** 3 for a, b in done]
        assert overlapping == pytest.approx(1 - math.fsum(together) / 20_000, rel=1e-6)


def test_the_window_law_is_the_exponential_one_averaged() -> None:
    """Given the phase of the crash the domains are independent: 1 - E[F^n + (1-F)^n]."""
    law, count = p.Uniform(60.0), 20_000
    phases = [law.cdf(1800.0 * (i + 0.5) / count) for i in range(count)]
    together = math.fsum(p.atomic([[1 - f, f]] * 5) for f in phases) / count
    assert p.torn_if_overlapping(law, 5, 1800.0) == pytest.approx(1 - together, rel=1e-4)


def test_one_shot_counts_a_common_cause_once() -> None:
    """n domains at lambda are like one at n lambda; a shock is one more clock."""
    assert p.one_shot(16_384, 1e-8, 60.0) == pytest.approx(math.exp(-16_384 * 1e-8 * 60.0))
    assert p.one_shot(10, 1e-3, 5.0, 2e-3) == pytest.approx(p.one_shot(12, 1e-3, 5.0))


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("domains", [1, 2, 3])
def test_retrying_is_what_enumeration_counts(domains: int, rounds: int) -> None:
    """Over every outcome of every round of every domain, with q = 1/3."""
    q = Fraction(1, 3)
    chance = Fraction(0)
    for failed in product((True, False), repeat=domains * rounds):
        each = [failed[i * rounds : (i + 1) * rounds] for i in range(domains)]
        if not any(all(tries) for tries in each):
            chance += math.prod(q if no else 1 - q for no in failed)
    assert p.retried(domains, float(q), rounds) == pytest.approx(float(chance))
    assert p.retried(domains, 1.0, rounds) == 0.0


def test_sixteen_thousand_domains_need_six_rounds() -> None:
    """At q = 1 %, delta = 1e-6; the union bound says so, too. And the fewest are the fewest."""
    assert p.rounds_needed(16_384, 0.01, 1e-6) == 6
    assert math.ceil(math.log(16_384 / 1e-6) / math.log(100)) == 6
    assert p.rounds_needed(16_384, 0.0, 1e-6) == 1
    for domains, q, delta in product((1, 2, 1000), (0.1, 0.5, 0.9), (0.4, 1e-4)):
        rounds = p.rounds_needed(domains, q, delta)
        assert 1 - p.retried(domains, q, rounds) <= delta
        assert rounds == 1 or 1 - p.retried(domains, q, rounds - 1) > delta


@pytest.mark.parametrize(("q", "delta"), [(1.0, 0.1), (-0.1, 0.1), (0.5, 0.0), (0.5, 1.0)])
def test_rounds_without_end_are_refused(q: float, delta: float) -> None:
    """Who always fails never stages."""
    with pytest.raises(ValueError, match="failure rate"):
        p.rounds_needed(2, q, delta)


SHOCKS = [p.Shock(0.02, ("a", "b")), p.Shock(0.05, ("b", "c")), p.Shock(0.01, ("a", "b", "c"))]


@pytest.mark.parametrize("copies", [("a",), ("a", "b"), ("a", "b", "c"), ("a", "c")])
def test_lost_copies_are_what_enumeration_counts(copies: tuple[str, ...]) -> None:
    """Over every subset of clocks that ring; and by inclusion and exclusion."""
    clocks = [p.Shock(0.1, (domain,)) for domain in copies] + SHOCKS
    struck = [1 - math.exp(-clock.rate * 2.0) for clock in clocks]
    total = 0.0
    for rings in product((True, False), repeat=len(clocks)):
        hit = {d for clock, ring in zip(clocks, rings, strict=True) if ring for d in clock.domains}
        if hit >= set(copies):
            total += math.prod(s if r else 1 - s for s, r in zip(struck, rings, strict=True))
    found = p.lost(copies, 0.1, SHOCKS, 2.0)
    assert found == pytest.approx(total)
    excluded = 0.0
    for size in range(len(copies) + 1):
        for spared in combinations(copies, size):
            rate = sum(c.rate for c in clocks if set(c.domains) & set(spared))
            excluded += (-1) ** size * math.exp(-2.0 * rate)
    assert found == pytest.approx(excluded)


def test_tiny_chances_keep_their_digits() -> None:
    """Four copies at 1e-6 are 1e-24; inclusion and exclusion would give noise there."""
    found = p.lost("abcd", 1e-6, (), 1.0)
    assert found == pytest.approx((-math.expm1(-1e-6)) ** 4, rel=1e-12)
    assert p.lost("abcd", 1e-6, [p.Shock(1e-9, tuple("abcd"))], 1.0) > 1e14 * found
    assert p.lost(("a", "a"), 0.1, (), 1.0) == pytest.approx(1 - math.exp(-0.1))  # one place


@pytest.mark.parametrize(("cost", "mtbf"), [(1e-8, 9e7), (1.0, 4e16), (10.0, 1e4), (600.0, 36e2)])
def test_the_best_interval_keeps_its_digits(cost: float, mtbf: float) -> None:
    """Shows (1 - x) e^(x + delta/M) = 1 to sixty digits, where a save costs next to nothing too."""
    with decimal.localcontext() as exact:
        exact.prec = 60
        x = decimal.Decimal(p.best_interval(cost, mtbf)) / decimal.Decimal(mtbf)
        given = decimal.Decimal(cost) / decimal.Decimal(mtbf)
        assert float((-(1 - x).ln() - x) / given) == pytest.approx(1, rel=1e-9)


def test_where_a_save_takes_longer_than_the_job_lives_the_interval_is_all_of_it() -> None:
    """Shows that the end of the bisection is an end."""
    assert p.best_interval(7200.0, 60.0) == pytest.approx(60.0)


def test_the_best_interval_is_the_best_and_young_is_near() -> None:
    """No other interval costs less; Young's is longer, and hardly worse while delta << M."""
    cost, restart, mtbf = 10.0, 120.0, 11_124.0
    best, first = p.best_interval(cost, mtbf), p.young(cost, mtbf)
    least = p.slowdown(best, cost, restart, mtbf)
    assert all(p.slowdown(best * by, cost, restart, mtbf) > least for by in (0.9, 0.99, 1.01, 1.1))
    assert best < first < 1.05 * best
    root = math.sqrt(cost / (2 * mtbf))
    daly = first * (1 + root / 3 + root**2 / 9) - cost
    assert best == pytest.approx(daly, rel=1e-4)
    assert p.slowdown(best, cost, restart, mtbf) < p.slowdown(1800.0, cost, restart, mtbf)
    assert p.slowdown(1800.0, cost, restart, 1.0) == math.inf
