"""The tables and pictures of the theory's pages, worked out by the code that they are about.

``python -m tests.docs_theory`` writes them anew; ``tests/test_docs.py`` fails where they are stale.
Tables hold no figure that was simulated, and pictures are compared without what was: that may
differ from one Python to the next.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from tests.docs_page import filled

from handfast.cli.main import app
from handfast.model.exhibits import Exhibit, exhibits
from handfast.model.optimizer import moment_bound, moments_zeroed, step_reset
from handfast.torch.splice import exhibit

DOCS = Path(__file__).parents[1] / "docs"
IMG = DOCS / "img"
TINY = 1e-12  # what is left of float64 after a few steps


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    spelled = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in spelled)


def plan() -> str:
    """What `handfast plan` says of its default setting."""
    found = json.loads(CliRunner().invoke(app, ["plan", "--json"]).output)["findings"]
    rows = [[f["name"], f"`{f['formula']}`", f["shown"], f["note"]] for f in found]
    return table(["", "formula", "value", ""], rows)


def bounds() -> str:
    """K_t, and the factors of a wrong counter, for the usual betas."""
    head = ["betas", "K_1", "K_10", "K_100", "K", "counter reset, times", "moments zeroed, in η"]
    rows = []
    for betas in ((0.9, 0.999), (0.9, 0.95)):
        values = [moment_bound(*betas, t) for t in (1, 10, 100)] + [moment_bound(*betas)]
        values += [step_reset(*betas), moments_zeroed(*betas)]
        rows.append([str(betas), *(f"{value:.4g}" for value in values)])
    return table(head, rows)


def splice() -> str:
    """The exhibit's figures, to what is alike on every machine."""
    return table(["", ""], _figures(exhibit()))


def knowledge() -> str:
    """What was searched, and found."""
    shown = [each for each in exhibits() if "betas" not in str(each.figures)]
    found = ["; ".join(": ".join(row) for row in _figures(each)) for each in shown]
    return table(["shown", "figures"], [[e.claim, f] for e, f in zip(shown, found, strict=True)])


def _figures(shown: Exhibit) -> list[list[str]]:
    return [[name, _spelled(value)] for name, value in shown.figures.items()]


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_spelled, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} → {_spelled(each)}" for key, each in value.items())
    if isinstance(value, float):
        return "0" if value == 0 else f"below {TINY:g}" if value < TINY else f"{value:.1g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


Part = tuple[str, Callable[[], str]]

PAGES: dict[str, tuple[Part, ...]] = {
    "theory-probability.md": (("plan: made from handfast.model.explained", plan),),
    "knowledge.md": (("knowledge: made from handfast.model.exhibits", knowledge),),
    "optimizer.md": (
        ("bounds: made from handfast.model.optimizer", bounds),
        ("splice: made from handfast.torch.splice", splice),
    ),
}


def page(name: str, text: str) -> str:
    """Put the tables into a page's places for them."""
    for mark, made in PAGES[name]:
        text = filled(text, mark, made())
    return text


def draw(directory: Path) -> None:
    """Draw the pictures of P(torn) as `handfast plan` does."""
    CliRunner().invoke(app, ["plan", "--svg", str(directory)], catch_exceptions=False)


def formulas(picture: str) -> str:
    """A picture without what was simulated."""
    return re.sub(r"<(line|circle)[^>]*class=\"seen\"[^>]*></\1>", "", picture)


if __name__ == "__main__":
    for name in PAGES:
        path = DOCS / name
        path.write_text(page(name, path.read_text(encoding="utf-8")), encoding="utf-8")
    draw(IMG)
