"""P(torn) against domains, window and interval, with the conditions written into the picture.

A plot that is passed on without its page must not lose what it hangs on.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Final

import msgspec
from msgspec.structs import replace

from handfast.drawing import Scale, frame, rule, tag, text
from handfast.model.explained import Setting
from handfast.model.montecarlo import play_torn, proportion
from handfast.model.probability import torn, torn_if_overlapping, torn_if_waiting

__all__ = ["PLOTS", "plot"]

WIDTH: Final = 760
LEFT, RIGHT, TOP, FLOOR = 58.0, 742.0, 58.0, 372.0
LOWEST: Final = -3.0  # the power of ten at which plots end below, if that shows anything
CURVES: Final = 64  # points of a curve
DOTS: Final = 9  # simulations of a plot

STYLE: Final = """
svg { background:#fbfaf7; font:12px system-ui,sans-serif; }
text { fill:#1d1c1a; } .title { font-size:15px; font-weight:650; } .soft { fill:#6a6761; }
.tick { fill:#6a6761; font-size:11px; } .grid { stroke:#e4e0d8; stroke-width:1; }
path { fill:none; stroke-width:2; stroke-linejoin:round; }
.exact { stroke:#9fd0c7; stroke-width:6; } .bound { stroke:#b07a00; stroke-dasharray:6 4; }
.waiting { stroke:#3a56d4; stroke-dasharray:2 3; }
.claim { stroke:#b3123f; stroke-dasharray:9 3 2 3; stroke-width:1.4; }
.seen { stroke:#1d1c1a; stroke-width:1.2; } circle.seen { fill:#fbfaf7; }
"""

Curve = tuple[str, str, Callable[[Setting], float]]


class Axis(msgspec.Struct, frozen=True):
    """What a plot varies: the setting's field, its values from the lowest to the highest."""

    name: str
    label: str
    span: Callable[[Setting], tuple[float, float]]

    def at(self, setting: Setting, value: float) -> Setting:
        """Give the setting with this value in place of its own."""
        whole = max(2, round(value))
        return replace(setting, **{self.name: whole if self.name == "domains" else value})

    def of(self, setting: Setting) -> float:
        """Give the setting's value."""
        return float(getattr(setting, self.name))


PLOTS: Final = {
    "domains": Axis("domains", "domains", lambda _: (2, 1 << 17)),
    "window": Axis(
        "window", "window, seconds", lambda at: (at.interval / 1024, at.interval * 2)
    ),
    "interval": Axis(
        "interval", "interval of saves, seconds", lambda at: (at.window / 2, at.window * 1024)
    ),
}  # fmt: skip


def plot(axis: Axis, setting: Setting, seed: int, trials: int) -> str:
    """Draw P(torn) along an axis, both scales logarithmic; the rest is as in the setting.

    Gives one SVG that needs nothing else.
    """
    low, high = axis.span(setting)
    x = Scale(math.log10(low), math.log10(high), LEFT, RIGHT)
    drawn = _curves(axis)
    steps = [low * (high / low) ** (i / CURVES) for i in range(CURVES + 1)]
    along = [axis.at(setting, step) for step in steps]
    lines = {cls: {axis.of(at): value(at) for at in along} for cls, _, value in drawn}
    # two decades below the most that happens, so that rare tears are drawn, too
    highest = max(lines["exact"].values())
    y = Scale(min(LOWEST, math.floor(math.log10(highest)) - 1), 0.0, FLOOR, TOP)
    parts = [
        text(LEFT, 22, f"How often a crash tears the newest save, against {axis.name}", "title"),
        text(LEFT, 41, _rest(axis, setting), "soft"),
        *_grid(x, y, axis.label),
    ]
    for cls, points in lines.items():
        places = ((x(math.log10(at)), p) for at, p in points.items() if p >= 10**y.low)
        shown = (f"{at:.1f} {y(math.log10(p)):.1f}" for at, p in places)
        parts.append(tag("path", d="M" + "L".join(shown), cls=cls))
    parts += _dots(axis, setting, (x, y), Random(f"{seed} {axis.name}"), trials)
    legend = [*((cls, words) for cls, words, _ in drawn), ("seen", _seen(trials))]
    return _finished(parts, legend, _conditions(axis, setting))


def _curves(axis: Axis) -> list[Curve]:
    curves: list[Curve] = [
        ("exact", "saves begin every tau, whether or not the last has committed",
         lambda s: torn_if_overlapping(s.commit, s.domains, s.interval)),
        ("bound", "E[max T - min T] / tau: exact where T <= tau, else a bound",
         lambda s: torn(s.commit.spread(s.domains), s.interval)),
        ("waiting", "a save waits for the last to commit everywhere",
         lambda s: torn_if_waiting(s.commit, s.domains, s.interval)),
    ]  # fmt: skip
    if axis.name == "domains":
        words = "1 - 2^(1-n): only GIVEN a crash inside the window, half of it done, independent"
        curves.append(("claim", words, lambda s: 1 - 2.0 ** (1 - s.domains)))
    return curves


def _rest(axis: Axis, setting: Setting) -> str:
    wide = f" of {setting.window:g} s" if axis.name != "window" else ""
    window = f"uniform in a window{wide}"
    if setting.commits == "exponential":
        window = "exponential" + (f" with mean {setting.window:g} s" if wide else "")
    parts = {
        "domains": f"{setting.domains:,} domains",
        "window, too": f"commit times {window}",
        "interval": f"a save every {setting.interval:g} s",
    }
    return "; ".join(words for name, words in parts.items() if name != axis.name)


def _conditions(axis: Axis, setting: Setting) -> list[str]:
    law = "uniform over the window" if setting.commits == "uniform" else "exponential"
    words = (
        "Holds if: the crash comes at a time uniform in the interval and independent of the saves, "
        f"and takes all domains at once; commit times of domains are independent and {law}, alike "
        "for all. A crash of some domains only, or a slow host that delays all of its domains "
        "together, is not in it. Torn means that the newest epochs differ, not that no older epoch "
        "is left to go back to. Lines are formulas; circles were played out."
    )
    if axis.name == "domains":
        words += " The exponential statement is a chance GIVEN that the crash hit the window."
    return textwrap.wrap(words, 112)


def _seen(trials: int) -> str:
    return f"simulated, {trials:,} crashes each; bars miss the truth once in a million"


def _grid(x: Scale, y: Scale, label: str) -> Iterator[str]:
    for power in range(round(y.low), 1):
        at = y(power)
        yield rule(LEFT, at, RIGHT, at, "grid")
        yield text(LEFT - 8, at + 4, f"{100 * 10.0**power:g} %", "tick", "end")
    for power in range(math.ceil(x.low), math.floor(x.high) + 1):
        yield rule(x(power), TOP, x(power), FLOOR, "grid")
        yield text(x(power), FLOOR + 17, f"{10.0**power:,g}", "tick", "middle")
    yield text(RIGHT, FLOOR + 34, label, "soft", "end")


def _dots(
    axis: Axis, setting: Setting, scales: tuple[Scale, Scale], chance: Random, trials: int
) -> Iterator[str]:
    x, y = scales
    for i in range(DOTS):
        value = 10 ** (x.low + (x.high - x.low) * (i + 0.5) / DOTS)
        at = axis.at(setting, value)
        seen = proportion(play_torn(chance, at.commit, at.domains, at.interval), trials)
        if seen.mean >= 10**y.low:
            place = x(math.log10(axis.of(at)))
            low, high = (
                y(max(y.low, math.log10(edge or 1e-300))) for edge in (seen.low, seen.high)
            )
            yield rule(place, low, place, high, "seen")
            yield tag("circle", cx=place, cy=y(math.log10(seen.mean)), r=3.5, cls="seen")


def _finished(parts: list[str], legend: Sequence[tuple[str, str]], words: Sequence[str]) -> str:
    at = FLOOR + 62
    for cls, said in legend:
        if cls == "seen":
            parts.append(tag("circle", cx=LEFT + 14, cy=at - 4, r=3.5, cls=cls))
        else:
            parts.append(tag("path", d=f"M{LEFT} {at - 4}h28", cls=cls))
        parts.append(text(LEFT + 38, at, said))
        at += 18
    at += 10
    for line in words:
        parts.append(text(LEFT, at, line, "soft"))
        at += 16
    return frame(WIDTH, at + 4, "P(torn), formulas and simulations", "".join(parts), STYLE)
