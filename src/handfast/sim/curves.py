"""Curves over the number of domains, both axes logarithmic, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Final

__all__ = ["draw"]

Points = Sequence[tuple[float, float]]
WIDTH: Final = 640
HEIGHT: Final = 380
LEFT: Final = 70
RIGHT: Final = 150
TOP: Final = 40
BOTTOM: Final = 50
FONT: Final = 'font-family="sans-serif" font-size="12"'
INKS: Final = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")


def draw(title: str, across: str, up: str, curves: Mapping[str, Points]) -> str:
    """Draw named curves of positive points; one whose name begins with `=` is a formula, dashed.

    Raises ``ValueError`` where there is no point.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("there is nothing to draw")
    x0, x1 = _decades([x for x, _ in points])
    y0, y1 = _decades([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        right = (log10(x) - x0) / (x1 - x0) * wide
        return LEFT + right, HEIGHT - BOTTOM - (log10(y) - y0) / (y1 - y0) * high

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2 - 40, 20, title, "middle", bold=True),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, across, "middle"),
        f'<g transform="rotate(-90 16 {HEIGHT / 2:.0f})">{_text(16, HEIGHT / 2, up, "middle")}</g>',
    ]
    for decade in range(x0, x1 + 1):
        x, y = place(10**decade, 10**y0)
        parts += [_line((x, y), (x, TOP)), _text(x, y + 18, f"{10**decade:,}", "middle")]
    for decade in range(y0, y1 + 1):
        x, y = place(10**x0, 10**decade)
        parts += [
            _line((x, y), (WIDTH - RIGHT, y)), _text(x - 6, y + 4, f"{10**decade:,}", "end"),
        ]  # fmt: skip
    for ink, (name, curve) in zip(INKS * len(curves), curves.items(), strict=False):
        parts += _curve(name, [place(*point) for point in curve], ink)
    return "\n".join([*parts, "</svg>", ""])


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    return low, max(high, low + 1)


def _curve(name: str, places: Sequence[tuple[float, float]], ink: str) -> list[str]:
    formula = name.startswith("=")
    dash = ' stroke-dasharray="5 4"' if formula else ""
    track = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{track}" fill="none" stroke="{ink}" stroke-width="1.6"{dash}/>']
    if not formula:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{ink}"/>' for x, y in places]
    x, y = places[-1]
    parts.append(_text(x + 8, y + 4, name.removeprefix("=").strip(), "start", ink=ink))
    return parts


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#d8dee4"/>'


def _text(
    x: float, y: float, said: str, where: str, *, ink: str = "#24292f", bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{where}" fill="{ink}"{weight}>'
        f"{escape(said)}</text>"
    )
