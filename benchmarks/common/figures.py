"""What is measured: values, one a lap, and what of the same lap they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec

__all__ = ["Figure", "Setting", "beside", "short"]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One point at which questions are asked.

    ``mib`` MiB of state a rank, ``small`` of its tensors small; ``ranks`` processes; ``repeat``
    laps that count; ``tensors`` the counts of the question of that name; ``home`` a directory of
    the disk that is asked about, which is there and whose content may go.
    """

    mib: int
    small: int
    ranks: int
    repeat: int
    peers: tuple[str, ...]
    tensors: tuple[int, ...]
    home: Path

    @property
    def gib(self) -> float:
        """GiB of state of all ranks together."""
        return self.mib * self.ranks / 1024


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """What ``who`` came to, in ``unit``; ``at`` says where, as ``{"mib": 1024, "ranks": 2}``.

    ``ratios`` are to the value of ``beside`` in the same lap, so that a disk that is slow for a
    while is slow for both. ``undone`` is what its maker leaves out that others do.
    """

    question: str
    who: str
    what: str
    unit: str
    values: tuple[float, ...]
    at: dict[str, int]
    beside: str = ""
    ratios: tuple[float, ...] = ()
    undone: str = ""

    @property
    def where(self) -> str:
        """What ``at`` says, in words."""
        words = {"mib": "MiB", "small": "small tensors"}
        told = [f"{size:,} {words.get(name, name)}" for name, size in self.at.items()]
        return ", ".join(each.rstrip("s") if each.startswith("1 ") else each for each in told)

    @property
    def median(self) -> float:
        """The median of the laps."""
        return median(self.values)

    @property
    def ratio(self) -> float | None:
        """The median of the laps' ratios; None for a figure that stands alone."""
        return median(self.ratios) if self.ratios else None


def beside(figures: Sequence[Figure], who: str, undone: Mapping[str, str]) -> list[Figure]:
    """Hold figures against that of ``who`` for the same, and say what their makers leave undone.

    A figure for which ``who`` has none stays alone.
    """
    base = {figure.what: figure.values for figure in figures if figure.who == who}
    return [
        msgspec.structs.replace(
            figure,
            beside=who if figure.what in base else "",
            ratios=tuple(
                value / of for value, of in zip(figure.values, base[figure.what], strict=True)
            )
            if figure.what in base
            else (),
            undone=undone.get(figure.who, ""),
        )
        for figure in figures
    ]


def short(value: float) -> str:
    """Spell a value with three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
