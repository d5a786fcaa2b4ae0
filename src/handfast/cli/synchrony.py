"""What ``handfast simulate --synchrony`` measures and prints."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Final

import msgspec

from handfast.agent.domain import TICK_MOST_S
from handfast.cli.console import answer, out, tabulate, telling_how_far
from handfast.cli.scale import WAYS
from handfast.sim.agenda import MS, SECOND
from handfast.sim.scale import job
from handfast.sim.synchrony import Synchronous, Timed

__all__ = ["MOST", "hold"]

MOST: Final = 1_024
"""Each member holds the reports of all: a storm of 64 takes 3 s, one of 128 takes 20 s."""

DELAY_US: Final = 20 * MS
TICK_US: Final = int(TICK_MOST_S * SECOND)
CHECK_US: Final = 500 * MS
ACCEPT_US: Final = 300 * MS
STORMS: Final = 6


class Row(msgspec.Struct, frozen=True):
    """A job and one thing that it does: the bound, the worst and the mean time; in seconds."""

    way: str
    domains: int
    what: str
    storms: int
    bound_s: float
    worst_s: float
    mean_s: float


def hold(sizes: tuple[int, ...], as_json: bool) -> bool:
    """Hold the bounds of partial synchrony against jobs of these sizes; say whether they held."""
    rows: list[Row] = []
    with telling_how_far() as tell:
        for way in WAYS:
            for size in sizes:
                tell(f"{way}, {size:,} domains: {STORMS} storms, and the calm after each")
                rows += _rows(way, size)
    late = [row for row in rows if row.worst_s > row.bound_s]
    if as_json:
        times = {"delay_s": DELAY_US / SECOND, "tick_s": TICK_US / SECOND}
        answer({**times, "rows": rows}, sound=not late)
    else:
        _show(rows)
        for row in late:
            where = f"{row.way}, {row.domains:,} domains, {row.what}"
            out().print(f"[bold red]broken:[/] {where}: later than its bound")
        if not late:
            out().print("every bound held")
    return not late


def _rows(way: str, size: int) -> Iterator[Row]:
    epochs, restores = [], []
    for seed in range(STORMS):
        run = Synchronous(
            job(size, **WAYS[way]), delay_us=DELAY_US, tick_us=TICK_US, check_us=CHECK_US,
            accept_us=ACCEPT_US, back=min(size - 1, seed % 3), worst=seed == 0, seed=seed,
        )  # fmt: skip
        epochs.append(run.converge())
        restores.append(run.restore())
    yield _row(way, size, "an epoch converges", epochs)
    yield _row(way, size, "a recovery ends", restores)


def _row(way: str, size: int, what: str, timed: list[Timed]) -> Row:
    """The worst is the one that came nearest to its own bound."""
    worst = max(timed, key=lambda one: one.took_us / one.bound_us)
    mean = fmean(one.took_us for one in timed)
    return Row(
        way, size, what, len(timed), worst.bound_us / SECOND, worst.took_us / SECOND, mean / SECOND
    )


def _show(rows: list[Row]) -> None:
    heads = ("", "domains", "", "storms", "bound s", "worst s", "mean s", "worst / bound")
    lines = [
        (
            row.way, f"{row.domains:,}", row.what, str(row.storms), f"{row.bound_s:.2f}",
            f"{row.worst_s:.2f}", f"{row.mean_s:.2f}", f"{row.worst_s / row.bound_s:.3f}",
        )
        for row in rows
    ]  # fmt: skip
    tabulate(heads, lines, words=(0, 2))
    out().print(
        f"If from some moment on every message takes at most {DELAY_US / SECOND} s, members that "
        f"lack something tick every {TICK_US / SECOND} s, a copy is read within "
        f"{CHECK_US / SECOND} s, ranks answer within {ACCEPT_US / SECOND} s, and nobody crashes. "
        "Seconds are virtual, since that moment. Nothing is promised without these."
    )
