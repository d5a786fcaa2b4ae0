"""Pictures as plain SVG, without a script: elements, axes, and a frame that scales with its box.

Colours and fonts come by class from a style sheet: the page's, or one that the picture brings.
"""

import math
from html import escape

__all__ = ["Scale", "frame", "rule", "tag", "text"]


def tag(name: str, /, body: str = "", **attributes: object) -> str:
    """One SVG element; ``cls`` stands for class, underscores for hyphens, floats are shortened."""
    parts = [name]
    for key, value in attributes.items():
        shown = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        word = "class" if key == "cls" else key.replace("_", "-")
        parts.append(f'{word}="{escape(shown)}"')
    return f"<{' '.join(parts)}>{body}</{name}>"


def text(x: float, y: float, words: str, cls: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    return tag("text", escape(words), x=x, y=y, cls=cls, text_anchor=anchor)


def rule(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls)


def frame(width: float, height: float, label: str, body: str, style: str = "") -> str:
    """A picture of a fixed shape that scales with its box.

    ``style`` is a style sheet of its own, for a picture that stands in no page.
    """
    return tag(
        "svg",
        (tag("style", style) if style else "") + body,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        xmlns="http://www.w3.org/2000/svg",
    )


class Scale:
    """From values to places on one axis."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self._start = start
        self._factor = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        """The place of ``value``."""
        return self._start + (value - self.low) * self._factor

    def ticks(self, count: int) -> list[float]:
        """About ``count`` round values within the axis."""
        span = (self.high - self.low) / max(1, count)
        power = 10.0 ** math.floor(math.log10(span or 1.0))
        size = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= span * 0.999)
        first = math.ceil(self.low / size)
        return [i * size for i in range(first, math.floor(self.high / size) + 1)]
