"""What the lattice costs: how often a crash finds domains apart, and what asking again mends.

No formula here is unconditional. Each says what must be so for it to hold; ``handfast plan
--explain`` prints those words beside the figure and beside a simulation of the same. Times are in
one unit throughout (seconds, say), rates in its inverse, ``domains`` is n. *Torn* means that the
newest epochs in the domains differ when a crash that takes all of them comes; it says nothing of
older epochs, which a recovery may still hold (:func:`handfast.core.lattice.recovery_line`).
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TypeVar

import msgspec

__all__ = ["Commit", "Exponential", "Shock", "Uniform", "atomic", "atomic_uniform", "best_interval",
    "lost", "mixed_states", "one_shot", "retried", "rounds_needed", "slowdown", "spread", "torn",
    "torn_if_overlapping", "torn_if_waiting", "young"]  # fmt: skip

_N = TypeVar("_N", Fraction, float)
_NEGLIGIBLE = 1e-18


# Levels: the exponential statement, and what it hangs on


def atomic(levels: Sequence[Sequence[_N]]) -> _N:
    """Give P(every domain is at one level), where ``levels[i][k]`` is P(domain i is at level k).

    It is the sum over k of the product over i: with two levels, prod p_i + prod (1 - p_i). Holds
    if the domains are independent *given that the crash came*, so mostly not of one instant: see
    :func:`torn_if_overlapping`. Exact where the entries are Fractions. Our reading of the
    exponential statement in the abstract of arXiv 2603.02603.

    Raises ValueError where there is no domain, or they have different numbers of levels.
    """
    if not levels or len({len(row) for row in levels}) != 1:
        raise ValueError("give one row for each domain, all with the same number of levels")
    products: list[_N] = [
        math.prod(column[1:], start=column[0]) for column in zip(*levels, strict=True)
    ]
    return sum(products[1:], start=products[0])


def atomic_uniform(levels: int, domains: int) -> Fraction:
    """Give P(every domain is at one level) if all of K levels are equally likely: K^(1-n).

    Independence as in :func:`atomic`, and the crash must have landed inside the window.
    """
    return Fraction(1, levels ** (domains - 1))


def mixed_states(levels: int, domains: int) -> int:
    """Count the vectors of n domains over K levels that are mixed: K^n - K. Counting, no chance."""
    return int(levels**domains) - levels


# The window: what an operator wants to know


class Uniform(msgspec.Struct, frozen=True):
    """Commits are durable at any time within ``width`` after a save began, all equally likely."""

    width: float

    def cdf(self, t: float) -> float:
        """Give P(T <= t)."""
        return min(1.0, max(0.0, t / self.width))

    def quantile(self, u: float) -> float:
        """Give the time by which a domain has committed with probability ``u``."""
        return self.width * u

    def spread(self, domains: int) -> float:
        """Give E[max T - min T] = w (n-1)/(n+1) (David and Nagaraja, Order Statistics, 2003)."""
        return self.width * (domains - 1) / (domains + 1)


class Exponential(msgspec.Struct, frozen=True):
    """A commit that is not durable yet has always the same rate to become so; ``mean`` is mu."""

    mean: float

    def cdf(self, t: float) -> float:
        """Give P(T <= t)."""
        return -math.expm1(-max(0.0, t) / self.mean)

    def quantile(self, u: float) -> float:
        """Give the time by which a domain has committed with probability ``u``, below 1."""
        return -self.mean * math.log1p(-u)

    def spread(self, domains: int) -> float:
        """Give E[max T - min T] = mu H_(n-1), a harmonic number (Renyi, 1953)."""
        return self.mean * math.fsum(1 / i for i in range(1, domains))


Commit = Uniform | Exponential


def spread(cdf: Callable[[float], float], domains: int, low: float, high: float) -> float:
    """Give E[max T - min T], the integral of 1 - F^n - (1-F)^n, for T iid with any F = ``cdf``.

    All of F must lie between ``low`` and ``high``. Numerical, to about nine digits.
    """
    return _integral(lambda t: 1 - cdf(t) ** domains - (1 - cdf(t)) ** domains, low, high)


def torn(spread: float, interval: float) -> float:
    """Give P(torn) = E[max T - min T] / tau, for a crash uniform in the interval tau of saves.

    Exact if every commit comes before the next save begins (T <= tau): the crash tears exactly
    between the first commit and the last. Commit times need be neither independent nor alike. If
    they may exceed tau it is an upper bound, since only inside of some save's span is anything
    torn, and 1 at most. The crash must be independent of the saves and take all domains at once.
    """
    return min(1.0, spread / interval)


def torn_if_overlapping(law: Commit, domains: int, interval: float) -> float:
    """Give P(torn) if saves begin every tau, whether or not earlier ones have committed; T iid.

    Given the crash's phase u the domains *are* independent: the newest epoch of each is m saves
    back with p_m(u) = F(u + m tau) prod_{l<m} (1 - F(u + l tau)), so this is the mean over u of
    :func:`atomic`, taken from 1. For T <= tau it equals :func:`torn`; far beyond it tends to 1.
    """

    def at_one_level(u: float) -> float:
        found, none_yet = 0.0, 1.0
        while none_yet > _NEGLIGIBLE:
            done = law.cdf(u)
            found += (none_yet * done) ** domains
            none_yet *= 1 - done
            u += interval
        return found

    # A window that is narrow beside the interval must not fall between the places looked at.
    knots = [law.quantile(u) % interval for u in (0.5, 1 - 0.5 / domains, 1 - 2**-53)]
    parts = pairwise([0.0, *sorted(knots), interval])
    return 1 - math.fsum(_integral(at_one_level, low, high) for low, high in parts) / interval


def torn_if_waiting(law: Commit, domains: int, interval: float) -> float:
    """Give P(torn) if a save waits for the last to commit everywhere: E[R] / E[max(tau, max T)].

    By renewal and reward (Ross, Stochastic Processes, 1996, 3.6): saves then begin max(tau, max T)
    apart, and R = max T - min T of that is torn. T iid; the crash as in :func:`torn`.
    """
    end = law.quantile(1 - 2**-53)
    late = _integral(lambda t: 1 - law.cdf(t) ** domains, interval, max(interval, end))
    return law.spread(domains) / (interval + late)


# One shot, or asking again


def one_shot(domains: int, rate: float, window: float, shocks: float = 0.0) -> float:
    """Give P(all of n domains live through the window w): e^(-w (n lambda + Lambda)).

    Each fails by itself at ``rate`` lambda (Poisson, independent), and ``shocks`` Lambda is the
    rate of all common causes together: one counts once, however many domains it takes. The price
    of a commit that must succeed at one go; the independent model is the case Lambda = 0.
    """
    return math.exp(-window * (domains * rate + shocks))


def retried(domains: int, failure: float, rounds: int) -> float:
    """Give P(all of n domains have staged within k rounds) = (1 - q^k)^n.

    Each round a domain that has not staged fails with q = ``failure``, independently of others
    and of rounds past; who has staged stays so (a vote is write-once).
    """
    return math.exp(domains * math.log1p(-(failure**rounds))) if failure < 1 else 0.0


def rounds_needed(domains: int, failure: float, delta: float) -> int:
    """Give the least k with 1 - (1 - q^k)^n <= delta; ln(n/delta) / ln(1/q) is enough.

    Conditions as in :func:`retried`. Raises ValueError unless 0 <= q < 1 and 0 < delta < 1.
    """
    if not (0 <= failure < 1 and 0 < delta < 1):
        raise ValueError("a failure rate lies in [0, 1), and delta in (0, 1)")
    rounds = max(1, math.ceil(math.log(domains / delta) / math.log(1 / failure))) if failure else 1
    while rounds > 1 and -math.expm1(domains * math.log1p(-(failure ** (rounds - 1)))) <= delta:
        rounds -= 1
    return rounds


# Correlated crashes


class Shock(msgspec.Struct, frozen=True):
    """A common cause (a host, a rack, the job) that takes all of ``domains`` at once, at a rate."""

    rate: float
    domains: tuple[str, ...]


def lost(copies: Sequence[str], own: float, shocks: Sequence[Shock], window: float) -> float:
    """Give P(every domain that holds a copy is struck within the window).

    The common-shock model of Marshall and Olkin (A multivariate exponential distribution, 1967):
    each domain has a Poisson clock of rate ``own``, each shock one for all that it takes, all
    independent. The window is the time until a lost copy is made anew. Copies in one failure
    domain go together, which is why (own w)^k says little. Terms are only ever added and
    multiplied, so a tiny chance keeps its digits. Time O(shocks 2^k).
    """
    chances = [1.0] + [0.0] * ((1 << len(copies)) - 1)  # by the mask of copies struck so far
    causes = [Shock(own, (domain,)) for domain in dict.fromkeys(copies)]
    for shock in (*causes, *shocks):
        taken = sum(1 << i for i, domain in enumerate(copies) if domain in shock.domains)
        struck = -math.expm1(-shock.rate * window)
        after = [chance * (1 - struck) for chance in chances]
        for mask, chance in enumerate(chances):
            after[mask | taken] += chance * struck
        chances = after
    return chances[-1]


# How often to save: prior art


def young(cost: float, mtbf: float) -> float:
    """Give Young's interval, sqrt(2 delta M) (CACM 17(9), 1974): for delta much below M."""
    return math.sqrt(2 * cost * mtbf)


def slowdown(interval: float, cost: float, restart: float, mtbf: float) -> float:
    """Give the expected wall time for each unit of work: M e^(R/M) (e^((tau+delta)/M) - 1) / tau.

    Exponential times between failures of mean M = ``mtbf``, also during saves and restarts R; a
    save holds the training up for delta = ``cost`` and counts at its end; a failure takes it back
    to the last one (Daly, FGCS 22(3), 2006). Asynchronous saves hold up for less than they last.
    Infinite where it is beyond all floats.
    """
    if restart + interval + cost > 700 * mtbf:
        return math.inf
    return mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf) / interval


def best_interval(cost: float, mtbf: float) -> float:
    """Give the interval of least :func:`slowdown`: (1 - x) e^(x + delta/M) = 1 for x = tau/M.

    Daly's higher-order formula approximates it; Young's is its first order, from above. Bisected in
    the form delta/M = -ln(1 - x) - x, which is x^2/2 + x^3/3 + ...: a small x loses no digit so.
    """
    low, high = 0.0, 1.0
    while low < (x := (low + high) / 2) < high:
        series = sum(x**power / power for power in range(2, 10))
        beyond = series if x < 0.01 else -math.log1p(-x) - x
        low, high = (x, high) if beyond < cost / mtbf else (low, x)
    return low * mtbf


def _integral(f: Callable[[float], float], low: float, high: float) -> float:
    """Adaptive Simpson, each halving with the correction of Lyness (JACM 16(3), 1969)."""

    def rule(a: float, fa: float, b: float, fb: float) -> tuple[float, float, float]:
        middle = (a + b) / 2
        at = f(middle)
        return middle, at, (b - a) / 6 * (fa + 4 * at + fb)

    def halve(a: float, fa: float, b: float, fb: float, m: float, fm: float, whole: float,
              error: float, depth: int) -> float:  # fmt: skip
        left, right = rule(a, fa, m, fm), rule(m, fm, b, fb)
        gain = left[2] + right[2] - whole
        if depth == 0 or (abs(gain) <= 15 * error and depth < 40):
            return left[2] + right[2] + gain / 15
        less = (error / 2, depth - 1)
        return halve(a, fa, m, fm, *left, *less) + halve(m, fm, b, fb, *right, *less)

    fa, fb = f(low), f(high)
    return halve(low, fa, high, fb, *rule(low, fa, high, fb), 1e-10 * (high - low), 44)
