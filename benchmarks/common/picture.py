"""A run as one picture: how far each is from its limit; and curves where sizes vary."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from benchmarks.common.figures import Figure
from benchmarks.common.peers import HANDFAST
from handfast.drawing import Scale, frame, rule, tag, text
from handfast.sim import curves

__all__ = ["bars", "draw_curves"]

WIDTH: Final = 760
LEFT, RIGHT, TOP, ROW, GAP = 150.0, 690.0, 64.0, 18.0, 30.0
STYLE: Final = """
svg { background:#fbfaf7; font:12px system-ui,sans-serif; }
text { fill:#1d1c1a; } .title { font-size:15px; font-weight:650; } .soft { fill:#6a6761; }
.grid { stroke:#e4e0d8; } .limit { stroke:#b3123f; stroke-width:1.4; }
.own { fill:#0f766e; } .peer { fill:#b9b3a7; } .head { font-weight:650; }
"""
AXES: Final = {
    "mib": "MiB of state a rank",
    "tensors": "tensors",
    "ranks": "ranks",
    "domains": "domains",
}
"""What may vary over the figures of a run, and how an axis is called."""


def bars(figures: Sequence[Figure], facts: Mapping[str, str]) -> str:
    """Draw the ratios of a run on one logarithmic axis, question by question; gives an SVG.

    None is drawn for what stands in the heading itself, nor for one that took nothing.
    """
    shown = [f for f in figures if (f.ratio or 0.0) > 0 and f.who != f.beside]
    ratios = [figure.ratio or 1.0 for figure in shown] or [1.0]
    low = min(-1, math.floor(math.log10(min(ratios))))
    x = Scale(low, max(1, math.ceil(math.log10(max(ratios)))), LEFT, RIGHT)
    parts, at, last = [], TOP, ""
    for figure in shown:
        better = "more" if figure.unit.endswith("/s") else "less"
        about = dict.fromkeys((figure.question, figure.what))
        head = f"{', '.join(about)}: {figure.unit}, {better} is better"
        head += f", to {figure.beside} ({figure.where})"
        if head != last:
            at += GAP
            parts.append(text(16, at - 8, head, "head"))
            last = head
        parts += _bar(figure, x, at)
        at += ROW
    grid = [rule(x(p), TOP, x(p), at, "grid") for p in range(round(x.low), round(x.high) + 1)]
    ticks = [text(x(p), TOP - 4, f"{10.0**p:g} x", "soft", "middle")
             for p in range(round(x.low), round(x.high) + 1)]  # fmt: skip
    limit = rule(x(0), TOP, x(0), at, "limit")
    told = ", ".join(facts[name] for name in ("processor", "file system", "date") if name in facts)
    words = [text(16, 22, "Measured, as a ratio to what stands in each heading", "title"),
             text(16, 40, told, "soft")]  # fmt: skip
    body = "".join([*words, *grid, *ticks, limit, *parts])
    return frame(WIDTH, at + 16, "Ratios of a benchmark's run", body, STYLE)


def _bar(figure: Figure, x: Scale, at: float) -> Iterator[str]:
    ratio = figure.ratio or 1.0
    start, end = sorted((x(0), x(math.log10(ratio))))
    own = figure.who.startswith(HANDFAST)
    yield text(LEFT - 8, at + 11, figure.who, "soft", "end")
    yield tag("rect", x=start, y=at + 2, width=max(1.5, end - start), height=ROW - 6,
              cls="own" if own else "peer")  # fmt: skip
    yield text(end + 5, at + 11, f"{ratio:.3g} x")


def draw_curves(figures: Sequence[Figure]) -> dict[str, str]:
    """Draw each kind of figure over what varies in the run; gives SVGs by a name for the file."""
    found = {}
    kinds = dict.fromkeys((figure.question, figure.what, figure.unit) for figure in figures)
    for axis, label in AXES.items():
        for question, what, unit in kinds:
            alike = [f for f in figures if (f.question, f.what, f.unit) == (question, what, unit)]
            lines = _lines(alike, axis)
            if lines:
                name = re.sub(r"\W+", "-", f"{question} {what} {axis}")
                title = f"{question}: {what}"
                found[name] = curves.draw(title, label, unit, lines)
    return found


def _lines(figures: Sequence[Figure], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Give the points of those for whom the axis takes more than one value, all else alike."""
    ats = [figure.at for figure in figures if axis in figure.at and figure.median > 0]
    others = {key for at in ats for key in at if len({each.get(key) for each in ats}) > 1} - {axis}
    lines: dict[str, dict[float, float]] = {}
    for figure in figures:
        if axis in figure.at and figure.median > 0:
            alone = [f"{size:,} {key}" for key, size in figure.at.items() if key in others]
            name = f"{figure.who} ({', '.join(alone)})" if alone else figure.who
            lines.setdefault(name, {})[figure.at[axis]] = figure.median
    return {name: sorted(line.items()) for name, line in lines.items() if len(line) > 1}
