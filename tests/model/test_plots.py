"""Shows that a plot of P(torn) can be passed on alone: it needs nothing, and says what it needs."""

import math
import re
from xml.etree import ElementTree as ET

import msgspec
import pytest

from handfast.model.explained import Setting
from handfast.model.plots import FLOOR, LOWEST, PLOTS, TOP, plot
from handfast.model.probability import torn

AT = Setting(
    domains=256, commits="uniform", window=60.0, interval=1800.0, mtbf=1e8, levels=3, failure=0.01,
    remaining=1e-6, copies=2, repair=600.0, host_mtbf=math.inf, job_mtbf=math.inf, per_host=8,
    cost=10.0, restart=300.0,
)  # fmt: skip
NS = "{http://www.w3.org/2000/svg}"


def parsed(drawn: str) -> ET.Element:
    """A picture of ours, as its elements."""
    return ET.fromstring(drawn)  # noqa: S314 - we have just drawn it


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_stands_alone_and_says_what_it_hangs_on(name: str) -> None:
    """Well-formed, no reference outside, the conditions in it as text, simulations drawn."""
    drawn = plot(PLOTS[name], AT, seed=1, trials=1000)
    picture = parsed(drawn)
    words = " ".join(text.text or "" for text in picture.iter(f"{NS}text"))
    assert "Holds if: the crash comes at a time uniform in the interval and independent" in words
    assert "is not in it" in words
    assert "1,000 crashes each" in words
    assert ("GIVEN that the crash hit the window" in words) == (name == "domains")
    assert not re.search(r"href|url\(|<script|@import", drawn)
    assert len(picture.findall(f"{NS}circle[@class='seen']")) > 5
    for line in picture.iter(f"{NS}text"):
        assert len(line.text or "") < 120  # or it would leave the picture


def test_lines_go_where_the_formula_says() -> None:
    """The bound's line, read back from the picture at its first and last domain."""
    picture = parsed(plot(PLOTS["domains"], AT, seed=1, trials=100))
    (path,) = (p for p in picture.findall(f"{NS}path[@class='bound']") if "L" in p.get("d", ""))
    heights = [float(point.split()[1]) for point in path.get("d", "")[1:].split("L")]
    for height, domains in ((heights[0], 2), (heights[-1], 1 << 17)):
        power = LOWEST * (height - TOP) / (FLOOR - TOP)
        assert 10**power == pytest.approx(torn(AT.commit.spread(domains), 1800.0), rel=0.01)


def test_rare_tears_are_drawn_too() -> None:
    """A window of a tenth of a second in a day: the axis goes as far down as the curve."""
    rare = msgspec.structs.replace(AT, window=0.1, interval=86_400.0)
    picture = parsed(plot(PLOTS["domains"], rare, seed=1, trials=100))
    (path,) = (p for p in picture.findall(f"{NS}path[@class='exact']") if "L" in p.get("d", ""))
    assert path.get("d", "").count("L") > 30
    ticks = [t.text or "" for t in picture.findall(f"{NS}text[@class='tick']")]
    assert "1e-05 %" in ticks
