"""Chance played out, to be held against the formulas of :mod:`handfast.model.probability`.

Each simulation plays what the formula's conditions say, domain by domain, and knows no formula.
Where the domains are many and only the first or the last of them matters, the least and the
greatest of n uniform draws are drawn themselves (L. Devroye, *Non-Uniform Random Variate
Generation*, 1986, on order statistics); below :data:`DIRECT` domains each one is drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from random import Random
from statistics import fmean, variance
from typing import Final

import msgspec

from handfast.model.probability import Commit, Exponential, Shock

__all__ = ["DIRECT", "MISTAKE", "Estimate", "extremes", "play_levels", "play_lost",
    "play_one_shot", "play_rounds", "play_slowdown", "play_torn", "play_waiting", "proportion",
    "ratio"]  # fmt: skip

DIRECT: Final = 256
MISTAKE: Final = 1e-6
"""How often, at most, an interval may miss the true value."""

SIGMAS: Final = 4.9
"""Standard errors of a normal law that are exceeded as rarely as that."""


ODD: Final = 30
"""Trials that must come out otherwise than the rest, for a sum of them to be near to normal."""


class Estimate(msgspec.Struct, frozen=True):
    """A mean over so many trials, and the interval in which the true one lies but for MISTAKE.

    ``by`` is what the interval rests on.
    """

    mean: float
    low: float
    high: float
    trials: int
    by: str

    def agrees(self, value: float) -> bool:
        """Say whether a value lies in the interval; rounding of the last digits is no dissent."""
        slack = 1e-12 * abs(value)
        return self.low - slack <= value <= self.high + slack


def proportion(values: Iterable[float], trials: int, mistake: float = MISTAKE) -> Estimate:
    """Average independent values in [0, 1], with an interval that holds for any number of them.

    By Chernoff's bound, which Hoeffding (1963, theorem 1) shows for any values in [0, 1]: the true
    mean p has trials * KL(mean, p) > ln(2 / mistake) with a chance of ``mistake`` at most.
    """
    mean = fmean(islice(values, trials))
    limit = math.log(2 / mistake) / trials
    by = "Chernoff and Hoeffding"
    return Estimate(mean, _edge(mean, 0.0, limit), _edge(mean, 1.0, limit), trials, by)


def _edge(mean: float, end: float, limit: float) -> float:
    """The p furthest from the mean, towards ``end``, whose divergence is within the limit."""
    near, far = mean, end
    for _ in range(100):
        middle = (near + far) / 2
        near, far = (middle, far) if _divergence(mean, middle) <= limit else (near, middle)
    return far


def _divergence(q: float, p: float) -> float:
    """Kullback and Leibler's, of two coins."""
    there = 0.0 if q == 0 else math.inf if p == 0 else q * math.log(q / p)
    away = 0.0 if q == 1 else math.inf if p == 1 else (1 - q) * math.log((1 - q) / (1 - p))
    return there + away


def ratio(pairs: Iterable[tuple[float, float]], trials: int) -> Estimate:
    """Estimate E[x] / E[y] from independent pairs, y > 0, by the central limit theorem.

    So the interval is no bound: it misses about as rarely as MISTAKE if the trials are many. It is
    the wider the fewer of them came out otherwise than the rest, since sums of rare events lean;
    below ``ODD`` of them it is all numbers.
    """
    played = list(islice(pairs, trials))
    mean = math.fsum(x for x, _ in played) / math.fsum(y for _, y in played)
    odd = trials - max(Counter(played).values())
    if odd < ODD:
        return Estimate(mean, -math.inf, math.inf, trials, "almost all of them alike")
    error = math.sqrt(variance([x - mean * y for x, y in played]) / trials)
    reach = SIGMAS * (1 + SIGMAS / math.sqrt(odd)) * error / fmean(y for _, y in played)
    return Estimate(mean, mean - reach, mean + reach, trials, "the central limit theorem")


def _forever(play: Callable[[], float]) -> Iterable[float]:
    while True:
        yield play()


def extremes(chance: Random, count: int, direct: int = DIRECT) -> tuple[float, float]:
    """Draw the least and the greatest of ``count`` uniform draws from [0, 1)."""
    if count <= direct:
        drawn = [chance.random() for _ in range(count)]
        return min(drawn), max(drawn)
    greatest = (1 - chance.random()) ** (1 / count)
    return greatest * -math.expm1(math.log1p(-chance.random()) / (count - 1)), greatest


def play_levels(chance: Random, levels: Sequence[Sequence[float]]) -> Iterable[float]:
    """Draw a level for each domain by its weights: 1 where all are at one."""

    def play() -> float:
        drawn = {chance.choices(range(len(row)), row)[0] for row in levels}
        return float(len(drawn) == 1)

    return _forever(play)


def play_torn(chance: Random, law: Commit, domains: int, interval: float) -> Iterable[float]:
    """Crash at a uniform time among saves that begin an interval apart: 1 where it tears.

    From the newest save backwards: none of it is durable, or some (torn), or all.
    """

    def play() -> float:
        age = chance.random() * interval
        while True:
            first, last = extremes(chance, domains)
            if law.quantile(first) <= age:
                return float(law.quantile(last) > age)
            age += interval

    return _forever(play)


def play_waiting(
    chance: Random, law: Commit, domains: int, interval: float
) -> Iterable[tuple[float, float]]:
    """Save, each time only once the last save has ended: (how long torn, how long in all)."""
    while True:
        first, last = (law.quantile(u) for u in extremes(chance, domains))
        yield last - first, max(interval, last)


def play_one_shot(
    chance: Random, domains: int, rate: float, window: float, shocks: float
) -> Iterable[float]:
    """Wait for the first failure, a domain's own or a common one: 1 where none is in the window."""

    def play() -> float:
        own = Exponential(1 / rate).quantile(extremes(chance, domains)[0]) if rate else math.inf
        common = chance.expovariate(shocks) if shocks else math.inf
        return float(min(own, common) > window)

    return _forever(play)


def play_rounds(chance: Random, domains: int, failure: float, rounds: int) -> Iterable[float]:
    """Ask all domains again and again: 1 where the last of them has staged in so many rounds."""

    def play() -> float:
        if domains > DIRECT * (1 - failure):  # how often the slowest fails, which is geometric
            slowest = math.log1p(-extremes(chance, domains)[1]) / math.log(failure)
            return float(slowest < rounds)
        left = domains
        for _ in range(rounds):
            left = sum(chance.random() < failure for _ in range(left))
        return float(left == 0)

    return _forever(play)


def play_lost(
    chance: Random, copies: Sequence[str], own: float, shocks: Sequence[Shock], window: float
) -> Iterable[float]:
    """Let every clock run for the window: 1 where each copy's domain was struck by some."""

    def play() -> float:
        struck = {d for d in dict.fromkeys(copies) if own and chance.expovariate(own) <= window}
        for shock in shocks:
            if shock.rate and chance.expovariate(shock.rate) <= window:
                struck.update(shock.domains)
        return float(struck.issuperset(copies))

    return _forever(play)


def play_slowdown(
    chance: Random, interval: float, cost: float, restart: float, mtbf: float
) -> Iterable[tuple[float, float]]:
    """Train and save, failing now and then: (wall time, useful work) from one save to the next."""
    while True:
        wall, ahead = 0.0, interval + cost
        while (failure := chance.expovariate(1 / mtbf)) < ahead:
            wall += failure
            while (failure := chance.expovariate(1 / mtbf)) < restart:
                wall += failure
            wall += restart
        yield wall + ahead, interval
