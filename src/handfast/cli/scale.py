"""What ``handfast simulate --scale`` measures, prints and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from handfast.cli.console import answer, make, out, telling_how_far, write_into
from handfast.sim.curves import draw
from handfast.sim.scale import Cost, Crowd, job

__all__ = ["MOST", "measure"]

MOST: Final = 131_072
"""The most domains that an epoch was ever measured for: 2 minutes for a tree's."""
HEADS: Final = (
    "", "domains", "hops", "messages", "2(n-1)", "until quiet", "bytes",
    "rack lost", "named", "hops*", "until quiet*", "bytes*",
)  # fmt: skip
ROW: Final = "{:6} {:>7}  {:>4}  {:>11}  {:>7}  {:>11}  {:>15}  {:>9}  {:>5}  {:>5}  {:>12}  {:>15}"

WAYS: Final[Mapping[str, Mapping[str, int]]] = {"tree": {"fanout": 8}, "gossip": {"fanout": 1}}
"""How votes travel, and the wish of a configuration for it."""


class Row(msgspec.Struct, frozen=True):
    """A job: what its second epoch cost, and what a third did in which a rack was lost."""

    way: str
    rack: int
    epoch: Cost
    lost: Cost


def measure(sizes: tuple[int, ...], svg: Path | None, as_json: bool) -> None:
    """Measure jobs of these sizes; tell each as soon as it is measured, and draw them.

    ``svg`` is the directory that they are drawn into, if they are.
    """
    wrote = [] if svg is None else make(svg)  # before the work, not after it
    if not as_json:
        _explain()
    rows = []
    for way, wish in WAYS.items():
        for size in sizes:
            with telling_how_far() as tell:
                rows.append(_job(way, size, wish, tell))
            if not as_json:
                _show(rows[-1])
    if svg is not None:
        wrote += write_into(svg, _pictures(rows))
    if as_json:
        answer({"rows": rows})
        return
    for line in wrote:
        out().print(line, markup=False)


def _job(way: str, size: int, wish: Mapping[str, int], tell: Callable[[str], None]) -> Row:
    name = f"{way}, {size:,} domains"
    tell(f"{name}: the members begin")
    crowd = Crowd(job(size, **wish))
    tell(f"{name}: the first epoch, which is not measured")
    crowd.epoch(weigh=False)  # the first tells everybody of the generation, too
    tell(f"{name}: an epoch that nothing disturbs")
    epoch = crowd.epoch()
    rack = min(64, max(1, size // 8))
    tell(f"{name}: an epoch in which a rack of {rack} is lost")
    return Row(way, rack, epoch, crowd.epoch(range(size // 2, size // 2 + rack)))


def _explain() -> None:
    show = out()
    show.print(
        "An epoch that nothing disturbs: hops and messages until all know, the least that these "
        "can be, messages and bytes until quiet.\n"
        "Then one in the middle of which a rack of so many domains is lost, as many are named, and "
        "they come back (*): from there on."
    )
    show.print(ROW.format(*HEADS), markup=False, style="bold")


def _show(row: Row) -> None:
    one, lost = row.epoch, row.lost
    cells = (
        one.domains, one.hops, one.told, 2 * (one.domains - 1), one.messages, one.size,
        row.rack, lost.waiting, lost.hops, lost.messages, lost.size,
    )  # fmt: skip
    out().print(ROW.format(row.way, *(f"{cell:,}" for cell in cells)))


def _pictures(rows: list[Row]) -> dict[str, str]:
    ways = list(dict.fromkeys(row.way for row in rows))
    sizes = sorted({row.epoch.domains for row in rows})

    def curves(of: Callable[[Row], int]) -> dict[str, list[tuple[float, float]]]:
        return {way: [(row.epoch.domains, of(row)) for row in rows if row.way == way]
                for way in ways}  # fmt: skip

    told = curves(lambda row: row.epoch.told)
    told["= 2(n - 1)"] = [(size, 2 * (size - 1)) for size in sizes]
    across = "domains"
    return {
        "scale-messages.svg": draw("Messages until all know", across, "messages", told),
        "scale-hops.svg": draw(
            "Hops until all know", across, "hops", curves(lambda row: row.epoch.hops)
        ),
        "scale-bytes.svg": draw(
            "Bytes of an epoch, until quiet", across, "bytes", curves(lambda row: row.epoch.size)
        ),
        "scale-rack.svg": draw(
            "After a rack came back: messages until quiet", across, "messages",
            curves(lambda row: row.lost.messages),
        ),
    }  # fmt: skip
