"""Every formula of :mod:`handfast.model.probability` for one setting, beside a simulation of it.

A figure without its conditions is worth little, so each finding carries them in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from random import Random
from typing import Final

import msgspec

from handfast.model import montecarlo
from handfast.model.montecarlo import Estimate
from handfast.model.probability import (
    Commit,
    Exponential,
    Shock,
    Uniform,
    atomic,
    atomic_uniform,
    best_interval,
    lost,
    mixed_states,
    one_shot,
    retried,
    rounds_needed,
    slowdown,
    torn,
    torn_if_overlapping,
    torn_if_waiting,
    young,
)

__all__ = ["Finding", "Setting", "explain"]

FEW: Final = 4
"""Domains of the rows on levels: with more, no simulation would ever see them at one level."""

PILE: Final = 100
"""Saves under way at once, from which on there is nothing to plan."""

LONG: Final = 100
"""Times longer than useful time, from which on no simulation would end."""


class Setting(msgspec.Struct, frozen=True):
    """What is planned for; times in seconds, infinite where something never fails.

    ``commits`` says how commit times are spread, uniform or exponential, and ``window`` how widely:
    the width of the one, the mean of the other. ``remaining`` is a chance that may be left. The
    mean times between failures are of one domain by itself, of one host, of the job as a whole.
    """

    domains: int
    commits: str
    window: float
    interval: float
    mtbf: float
    levels: int
    failure: float
    remaining: float
    copies: int
    repair: float
    host_mtbf: float
    job_mtbf: float
    per_host: int
    cost: float
    restart: float

    @property
    def commit(self) -> Commit:
        """Give how the commit times of one domain are spread."""
        return Uniform(self.window) if self.commits == "uniform" else Exponential(self.window)

    @property
    def shocks(self) -> float:
        """Give the rate of all common causes together: hosts, and the job."""
        return math.ceil(self.domains / self.per_host) / self.host_mtbf + 1 / self.job_mtbf

    @property
    def job_rate(self) -> float:
        """Give the rate at which anything at all stops the job."""
        return self.domains / self.mtbf + self.shocks


class Finding(msgspec.Struct, frozen=True):
    """One formula, its value here, what must be so for it to hold, and what was seen when played.

    ``bound`` says that the value is an upper bound in this setting, so only a simulation above it
    would contradict it.
    """

    name: str
    formula: str
    value: float
    conditions: str
    seen: Estimate | None
    note: str = ""
    bound: bool = False

    @property
    def shown(self) -> str:
        """Spell the value, near 1 by what it lacks."""
        near = 0.999 < self.value < 1
        spelled = f"1 - {1 - self.value:.3g}" if near else f"{self.value:.4g}"
        return f"at most {spelled}" if self.bound else spelled

    @property
    def tested(self) -> bool:
        """Say whether so many trials could tell the value from another one.

        What comes less than once in all of them (or fails to) they can't.
        """
        seen = self.seen
        if seen is None or math.isinf(seen.high):
            return False
        rare = seen.low <= 0 and self.value * seen.trials < 1
        return not (rare or (seen.high >= 1 and 0 <= (1 - self.value) * seen.trials < 1))

    @property
    def agrees(self) -> bool:
        """Say whether the simulation leaves the formula standing."""
        if self.seen is None:
            return True
        return self.seen.agrees(self.value) or (self.bound and self.seen.low <= self.value)


def explain(setting: Setting, seed: int, trials: int) -> Iterator[Finding]:
    """Work out every formula for a setting, each beside so many trials of chance, or none.

    Raises ValueError for fewer than two domains, more copies than domains, or a window of more
    than PILE intervals.
    """
    if setting.domains < 2:
        raise ValueError("one domain is never apart from itself. What to do: give two or more")
    if setting.copies > setting.domains:
        raise ValueError(
            f"{setting.copies} copies of a shard, each in a domain of its own, and only "
            f"{setting.domains} domains. What to do: give as many copies as domains at most"
        )
    if setting.window > PILE * setting.interval:
        raise ValueError(
            f"saves last {setting.window:g} s and begin every {setting.interval:g} s, so they pile "
            "up. What to do: give a longer interval, or a shorter window"
        )
    for part in (_levels, _windows, _commits, _copies, _intervals):
        yield from part(setting, Random(f"{seed} {part.__name__}"), trials)


def _share(values: Iterable[float], trials: int) -> Estimate | None:
    return montecarlo.proportion(values, trials) if trials else None


def _ratio(pairs: Iterable[tuple[float, float]], trials: int) -> Estimate | None:
    return montecarlo.ratio(pairs, trials) if trials else None


def _levels(setting: Setting, chance: Random, trials: int) -> Iterator[Finding]:
    n, k = min(FEW, setting.domains), setting.levels
    half = [[0.5, 0.5]] * n
    exponent = (1 - setting.domains) * math.log10(2)
    yield Finding(
        f"P(atomic | crash in the window), {n} domains, two levels",
        "prod p + prod (1-p), p = 1/2",
        atomic(half),
        "the crash landed inside the window, when each domain had committed with chance 1/2, "
        "independently of the others. This is the exponential statement; an instant at which it "
        "holds is rare",
        _share(montecarlo.play_levels(chance, half), trials),
        f"for all {setting.domains:,} domains 10^{exponent:.1f}",
    )
    yield Finding(
        f"P(atomic | crash in the window), {n} domains, {k} levels",
        "K^(1-n)",
        float(atomic_uniform(k, n)),
        "independent domains, all levels equally likely",
        _share(montecarlo.play_levels(chance, [[1 / k] * k] * n), trials),
        f"of {k**n:,} vectors {mixed_states(k, n):,} are mixed (K^n - K): counting, no chance",
    )
    draw = (setting.commit.quantile(chance.random()) for _ in range(2 * trials))
    ties = (float(first == second) for first, second in zip(draw, draw, strict=True))
    yield Finding(
        "two domains commit at the same instant",
        "0, already at n = 2",
        0.0,
        "commit times have a density. Another statement than the one above: it does not depend on "
        "n, and no crash comes in it",
        _share(ties, trials),
    )


def _windows(setting: Setting, chance: Random, trials: int) -> Iterator[Finding]:
    law, n, tau = setting.commit, setting.domains, setting.interval
    fits = law.cdf(tau) == 1
    form = "w(n-1)/((n+1) tau)" if setting.commits == "uniform" else "mu H_(n-1) / tau"
    seen = _share(montecarlo.play_torn(chance, law, n, tau), trials)
    crash = "the crash is uniform in the interval, takes all domains at once, and is independent "
    crash += "of the saves; commit times are independent and alike"
    yield Finding(
        "P(torn), by the window",
        f"E[max T - min T] / tau = {form}",
        torn(law.spread(n), tau),
        f"{crash}; exact if every commit comes before the next save begins (T <= tau), "
        f"else an upper bound. Here it is {'exact' if fits else 'a bound'}",
        seen,
        "it saturates or grows like log n; it is not exponential in n",
        bound=not fits,
    )
    yield Finding(
        "P(torn), saves may overlap",
        "1 - mean over u of sum_m p_m(u)^n",
        torn_if_overlapping(law, n, tau),
        f"{crash}; saves begin every tau, whether or not earlier ones have committed",
        seen,
    )
    yield Finding(
        "P(torn), a save waits for the last",
        "E[max T - min T] / E[max(tau, max T)]",
        torn_if_waiting(law, n, tau),
        f"{crash}; a save begins once the interval is over and the last save has committed "
        "everywhere",
        _ratio(montecarlo.play_waiting(chance, law, n, tau), trials),
    )


def _commits(setting: Setting, chance: Random, trials: int) -> Iterator[Finding]:
    n, q = setting.domains, setting.failure
    rate, window = 1 / setting.mtbf, setting.window
    for name, shocks in (("failures of domains only", 0.0), ("and common causes", setting.shocks)):
        yield Finding(
            f"one shot succeeds, {name}",
            "e^(-n lambda w)" if not shocks else "e^(-w (n lambda + Lambda))",
            one_shot(n, rate, window, shocks),
            "every domain must live through the window; failures are Poisson and independent"
            + ("; a common cause counts once, however many it takes" if shocks else ""),
            _share(montecarlo.play_one_shot(chance, n, rate, window, shocks), trials),
        )
        if not setting.shocks:
            break
    left = setting.remaining
    tries = rounds_needed(n, q, left)
    enough = math.log(n / left) / math.log(1 / q) if q else math.nan
    yield Finding(
        f"all have staged within {tries} {'try' if tries == 1 else 'tries'}",
        "(1 - q^k)^n",
        retried(n, q, tries),
        f"at each try a domain fails with q = {q:g}, independently of others and of tries past, "
        "and who has staged stays so",
        _share(montecarlo.play_rounds(chance, n, q, tries), trials) if q else None,
        f"the fewest that leave {left:g}; ln(n/{left:g})/ln(1/q) = {enough:.2f} would be "
        f"enough. At one go: 10^{n * math.log1p(-q) / math.log(10):.1f}"
        if q
        else "nobody ever fails",
    )


def _copies(setting: Setting, chance: Random, trials: int) -> Iterator[Finding]:
    copies = [f"copy {i}" for i in range(setting.copies)]
    own, host, window = 1 / setting.mtbf, 1 / setting.host_mtbf, setting.repair
    job = Shock(1 / setting.job_mtbf, tuple(copies))
    placements = {
        f"all {len(copies)} copies lost, on as many hosts": [
            *(Shock(host, (copy,)) for copy in copies),
            job,
        ],
        f"all {len(copies)} copies lost, on one host": [Shock(host, tuple(copies)), job],
    }
    alone = lost(copies, own + host + job.rate, (), window)
    for name, shocks in placements.items():
        yield Finding(
            name,
            "Marshall and Olkin's common shocks",
            lost(copies, own, shocks, window),
            "a strike destroys the copy (memory, or a disk that dies); each domain, each host and "
            "the job are struck by Poisson clocks, all independent; a lost copy is made anew "
            f"after {window:g} s, so what counts is all of them within that",
            _share(montecarlo.play_lost(chance, copies, own, shocks, window), trials),
            f"as if domains failed independently at the same rates: {alone:.3g}",
        )


def _intervals(setting: Setting, chance: Random, trials: int) -> Iterator[Finding]:
    cost, mtbf, restart = setting.cost, 1 / setting.job_rate, setting.restart
    best, first = best_interval(cost, mtbf), young(cost, mtbf)
    model = "failures of the job are Poisson, also during saves and restarts; a save holds the "
    model += "training up for its cost and counts at its end; a failure takes it back to the last"
    for name, interval in (("this interval", setting.interval), ("the best interval", best)):
        value = slowdown(interval, cost, restart, mtbf)
        played = montecarlo.play_slowdown(chance, interval, cost, restart, mtbf)
        yield Finding(
            f"wall time for useful time, {name}",
            "M e^(R/M) (e^((tau+C)/M) - 1) / tau",
            value,
            model,
            _ratio(played, trials) if value < LONG else None,
            f"tau = {interval:.4g} s, the job fails every {mtbf:.4g} s; Young: {first:.4g} s"
            + ("; such a job never gets on" if math.isinf(value) else ""),
        )
