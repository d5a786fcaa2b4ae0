"""What an epoch costs many real members: that they all learn, and how it is counted and drawn."""

import json
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from handfast.cli.main import app
from handfast.core.membership import Configuration, Roster
from handfast.sim.curves import draw
from handfast.sim.scale import Crowd, job


@pytest.mark.parametrize("size", [2, 9, 10, 40])
def test_all_learn_of_an_epoch_in_few_hops(size: int) -> None:
    """Shows that hops grow with the logarithm of a job, and that the members fall silent."""
    crowd = Crowd(job(size))
    first, second = crowd.epoch(), crowd.epoch()
    for cost in (first, second):
        assert 1 <= cost.hops <= 4 * size.bit_length()
        assert 2 * (size - 1) <= cost.told <= cost.messages
        assert cost.size > 10 * cost.messages
    assert {str(member.tallies[0].line.epoch) for member in crowd.members} == {"1/20"}


@pytest.mark.parametrize(
    "size",
    [
        100,
        4_096,
        pytest.param(131_072, marks=[pytest.mark.heavy, pytest.mark.timeout(3600)]),
    ],
)
def test_a_tree_takes_the_least_messages_over_twice_its_depth(size: int) -> None:
    """Shows it for jobs as large as are simulated, and prints what an epoch costs them.

    It is the second one: with the first all tell each other of their generation, too.
    """
    shape = job(size, fanout=8)
    began = time.perf_counter()
    crowd = Crowd(shape)
    crowd.epoch(weigh=False)
    cost = crowd.epoch()
    seconds = time.perf_counter() - began
    print(
        f"\n{size:,} domains: {cost.told:,} messages over {cost.hops} hops until all know, "
        f"{cost.messages:,} messages of {cost.size:,} bytes until quiet; {seconds:.0f} s"
    )
    tree = Roster(shape).tree
    assert tree is not None
    assert cost.told == 2 * (size - 1)
    assert cost.hops == 2 * tree.depth()


def test_a_lost_rack_is_named_and_made_up_for() -> None:
    """Shows that nobody gets on without it, by how many it is named, and what its return costs."""
    crowd = Crowd(job(24))
    crowd.epoch()
    rack = range(8, 14)
    cost = crowd.epoch(rack)
    assert cost.waiting == len(rack)
    assert 1 <= cost.hops <= 20
    assert {member.incarnation for member in crowd.members} == {1, 2}
    assert {str(member.tallies[0].line.epoch) for member in crowd.members} == {"1/20"}


def test_messages_that_are_lost_are_made_up_for() -> None:
    """Shows that loss costs ticks, and no epoch: the same end, whatever arrived when."""
    fair, lossy = Crowd(job(20)), Crowd(job(20), loss=0.3, seed=1)
    assert lossy.epoch().ticks > fair.epoch().ticks
    assert lossy.members[0].tallies == fair.members[0].tallies


def test_the_command_measures_and_draws(tmp_path: Path) -> None:
    """Shows that the curves of the documentation are made by a command that anybody can run."""
    command = ["simulate", "--scale", "3,12", "--svg", str(tmp_path)]
    said = CliRunner().invoke(app, command).output
    assert "2(n-1)" in said
    assert said.endswith(f"wrote {tmp_path / 'scale-rack.svg'}\n")
    rows = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)["rows"]
    assert [(row["way"], row["epoch"]["domains"]) for row in rows] == [
        ("tree", 3), ("tree", 12), ("gossip", 3), ("gossip", 12),
    ]  # fmt: skip
    assert [row["epoch"]["told"] for row in rows[:2]] == [2 * (3 - 1), 2 * (12 - 1)]
    pictures = sorted(tmp_path.iterdir())
    assert len(pictures) == 4
    for picture in pictures:
        assert ET.fromstring(picture.read_text()).tag.endswith("svg")  # noqa: S314 - ours


def test_no_figure_is_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a row has all its figures in forty columns, and that they are explained."""
    wide = CliRunner().invoke(app, ["simulate", "--scale", "16"]).output
    monkeypatch.setattr("handfast.cli.console.WIDTH", 40)
    narrow = CliRunner().invoke(app, ["simulate", "--scale", "16"]).output
    assert narrow.split() == wide.split()
    assert "a rack of so many domains is lost" in wide
    (row,) = (line for line in wide.splitlines() if line.startswith("tree"))
    assert row.split()[:5] == ["tree", "16", "4", "30", "30"]


def test_a_curve_is_where_its_points_are() -> None:
    """Shows that a decade is as wide everywhere, and that a name can't break a picture."""
    picture = draw("t", "x", "y", {"<a>": [(1, 1), (10, 10), (100, 100)]})
    tree = ET.fromstring(picture)  # noqa: S314 - ours
    dots = [dot for dot in tree.iter() if dot.tag.endswith("circle")]
    x = [float(dot.get("cx")) for dot in dots]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert "&lt;a&gt;" in picture
    with pytest.raises(ValueError, match="nothing to draw"):
        draw("t", "x", "y", {})


def test_each_row_is_told_as_soon_as_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a size that takes too long costs no row that was measured before."""

    def never(size: int, **how: int) -> Configuration:
        if size == 4:
            raise KeyboardInterrupt
        return job(size, **how)

    monkeypatch.setattr("handfast.cli.scale.job", never)
    told = CliRunner().invoke(app, ["simulate", "--scale", "2,3,4"])
    assert told.exit_code == 128 + 2
    assert [line.split()[:2] for line in told.output.splitlines()[-2:]] == [
        ["tree", "2"], ["tree", "3"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "most"), [("--scale", 131_072), ("--synchrony", 1_024)], ids=["scale", "synchrony"]
)
def test_what_does_not_fit_is_refused(
    option: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that it is said before anything is measured, with the most that there may be."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr("handfast.cli.simulate.measure", lambda sizes, *_: asked.append(sizes))
    monkeypatch.setattr("handfast.cli.simulate.hold", lambda sizes, _: not asked.append(sizes))
    for above in (most + 1, 10**17):
        told = CliRunner().invoke(app, ["simulate", option, f"2,{above}"])
        assert told.exit_code == 2
        assert f"{above:,} domains do not fit: {most:,} at most" in told.output
    assert CliRunner().invoke(app, ["simulate", option, f"2,{most}"]).exit_code == 0
    assert asked == [(2, most)]


@pytest.mark.parametrize("wrong", ["1", "x", "4,,8", "", "9" * 99])
def test_wrong_sizes_are_wrong_usage(wrong: str) -> None:
    """Shows that a job of one is no job to measure."""
    assert CliRunner().invoke(app, ["simulate", "--scale", wrong]).exit_code == 2
