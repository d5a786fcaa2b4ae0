"""The benchmarks run as a whole, and what they print is what they have measured in that run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from benchmarks.__main__ import QUESTIONS, main
from benchmarks.common import machine, peers, picture, tables
from benchmarks.common.figures import Figure, beside
from benchmarks.common.goals import GOALS, judge
from benchmarks.common.processes import Sampler

ROOT = Path(__file__).parents[3]
REPEAT = 2
LONG = {"training", "imports", "frontier"}  # as small as they go they take half of all time

pytestmark = [pytest.mark.xdist_group("jobs"), pytest.mark.timeout(600)]  # it is all of them


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(set(QUESTIONS) - LONG, id="most"),
        pytest.param(set(QUESTIONS), id="all", marks=pytest.mark.heavy),
    ],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Questions, as small as they go, as a user asks: what was printed, and the files."""
    home = tmp_path_factory.mktemp("bench")
    disk = home / "disk"
    disk.mkdir()
    files = {kind: home / f"run.{kind}" for kind in ("json", "markdown", "picture")}
    asked = [name for name in QUESTIONS if name in request.param]
    command = [sys.executable, "-m", "benchmarks", *asked, "--mib", "8", "--small", "16"]
    command += ["--repeat", str(REPEAT), "--tensors", "64", "--home", str(disk)]
    command += ["--peers", "torch,safetensors,dcp,dcp-thread"]
    command += [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return {
        "asked": request.param,
        "printed": done.stdout,
        "left": os.listdir(disk),
        **{kind: path.read_text() for kind, path in files.items()},
    }


def test_every_question_is_answered_by_values_of_that_run(run: dict[str, Any]) -> None:
    """Shows that a figure is the median of its laps' values, and none is without values."""
    figures = json.loads(run["json"])["figures"]

    assert {figure["question"] for figure in figures} == run["asked"]
    for figure in figures:
        assert len(figure["values"]) >= 1
        assert figure["median"] == median(figure["values"])
        assert len(figure["ratios"]) in (0, len(figure["values"]))
    for question in ("blocking", "durable", "restore"):
        who = {figure["who"] for figure in figures if figure["question"] == question}
        assert {"handfast", "torch", "safetensors"} < who
        assert all(len(f["values"]) == REPEAT for f in figures if f["question"] == question)


def test_what_is_printed_is_what_was_measured(run: dict[str, Any]) -> None:
    """Shows that the tables of a terminal and of a page have the medians of the values."""
    rows = [line[2:-2].split(" | ") for line in run["markdown"].splitlines() if line[:2] == "| "]
    shown, heads = set(), rows[0]
    for row, below in zip(rows, [*rows[1:], []], strict=True):
        if set(below) == {"---"}:
            heads = row
        named = dict(zip(heads, row, strict=True))
        one = [(named["what"], named["median"])] if "what" in named else named.items()
        shown |= {(named.get("who"), *each) for each in one}
    for found in json.loads(run["json"])["figures"]:
        value = found["median"]
        told = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        assert (found["who"], found["what"], f"{told} {found['unit']}") in shown
        assert f"{told} {found['unit']}" in run["printed"]


def test_each_goal_is_told_and_nothing_is_left_behind(run: dict[str, Any]) -> None:
    """Shows that a goal is met, missed or, where all was asked, said to be unmeasured, and that
    the disk is as before."""
    judged = json.loads(run["json"])["goals"]

    # at one count of tensors only; what is for more of them is not there to be measured
    measured = {g.text for g in GOALS if g.question in run["asked"] and not g.tensors[0]}
    told = {goal.text for goal in GOALS} if run["asked"] == set(QUESTIONS) else measured
    assert {each["goal"] for each in judged} == told
    verdicts = {each["verdict"] for each in judged}
    assert verdicts <= {"met", "missed", "stated", "unmeasured"}
    unmeasured = {each["goal"] for each in judged if each["verdict"] == "unmeasured"}
    assert unmeasured <= told - measured
    assert run["left"] == []
    assert run["picture"].startswith("<svg")
    assert "handfast" in run["picture"]


def test_a_peer_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shows that who can't be measured is left out by name, with the way to install it."""
    monkeypatch.setattr(peers.Orbax, "needs", ("no_such_module.at_all", "no-such-package"))

    assert main(["protocol", "--peers", "orbax", "--repeat", "1", "--home", str(tmp_path)]) == 0
    assert "left out: orbax, which is not installed here: pip install no-such-package" in (
        re.sub(r"\s+", " ", capsys.readouterr().out)
    )


@pytest.mark.parametrize("option", ["--home", "--json", "--picture", "--markdown"])
def test_a_directory_that_is_missing_is_named_before_anything_is_measured(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shows that no minutes of measuring end in a file that can't be written."""
    missing = tmp_path / "no" / "where"
    with pytest.raises(SystemExit) as ended:
        main(["protocol", option, str(missing)])
    assert ended.value.code == 2
    assert "is no directory: make it first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "verdict"), [((4.9, 4.9, 99.0), "met"), ((5.1, 5.1, 0.0), "missed")]
)
def test_a_goal_is_held_against_the_median(values: tuple[float, ...], verdict: str) -> None:
    """Shows that one lap alone neither meets a goal nor misses it."""
    figure = Figure(
        question="certify", who="handfast", what="known", unit="ms", values=values, at={"ranks": 4}
    )
    judged = {each.goal: each.verdict for each in judge([figure])}

    known = next(goal for goal in GOALS if goal.question == "certify" and goal.of == "median")
    assert judged[known.text] == verdict
    assert "unmeasured" in judged.values()


def test_a_rate_is_held_against_its_lap() -> None:
    """Shows that ratios are of the same lap, so that a slow disk is slow for both."""
    base = Figure(
        question="durable", who="raw", what="durable", unit="GiB/s", values=(1.0, 4.0), at={}
    )
    own = Figure(
        question="durable", who="own", what="durable", unit="GiB/s", values=(0.5, 2.0), at={}
    )
    other = Figure(question="durable", who="own", what="else", unit="s", values=(1.0,), at={})
    found = beside([base, own, other], "raw", {"own": "nothing"})

    assert [figure.ratios for figure in found] == [(1.0, 1.0), (0.5, 0.5), ()]
    assert found[1].ratio == 0.5
    assert found[1].undone == "nothing"


def test_tables_are_put_into_their_place_and_no_other() -> None:
    """Shows that a page keeps its prose, and what was measured elsewhere."""
    page = "a\n<!-- one: how -->\nold\n<!-- /one -->\nb\n<!-- two: how -->\n<!-- /two -->\n"

    assert tables.fill(page, "one", "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="no <!-- three"):
        tables.fill(page, "three", "new\n")


def test_a_wide_table_has_a_row_for_each_contestant() -> None:
    """Shows that one with several figures takes one row, and that none is put in another's."""
    figures = [
        Figure(question="frontier", who=who, what=what, unit=unit, values=(value,), at=at)
        for who, what, unit, value, at in (
            ("planes", "size", "%", 84, {}), ("XOR", "size", "%", 64, {"steps": 1}),
            ("XOR", "size", "%", 80.5, {"steps": 100}), ("planes", "in", "MB/s", 1500, {}),
        )
    ]  # fmt: skip
    sheet = tables.wide("frontier", "how small", figures)

    assert sheet.heads == ("who", "at", "size", "in")
    assert sheet.rows == [
        ("planes", "", "84 %", "1,500 MB/s"),
        ("XOR", "1 step", "64 %", ""),
        ("XOR", "100 steps", "80.5 %", ""),
    ]


def test_curves_are_drawn_over_what_varies() -> None:
    """Shows that a run over several sizes has a picture for each, and a run over one has none."""
    figures = [
        Figure(
            question="durable", who="own", what="durable", unit="GiB/s", values=(rate,),
            at={"mib": mib, "ranks": 1},
        )
        for mib, rate in ((64, 1.0), (1024, 2.0))
    ]  # fmt: skip

    assert list(picture.draw_curves(figures)) == ["durable-durable-mib"]
    assert picture.draw_curves(figures[:1]) == {}


def test_the_machine_is_described(tmp_path: Path) -> None:
    """Shows that figures are never without where they come from."""
    facts = machine.facts(tmp_path)

    assert {"processor", "cores", "memory", "kernel", "file system", "device", "torch"} <= set(
        facts
    )
    assert all(facts.values())
    assert "torch" in tables.markdown(facts, {}, [])


def test_memory_that_is_taken_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that what a process takes is counted, also in a memfd that it has not mapped."""
    code = (
        "import os, sys; held = os.memfd_create('held'); whole = bytes(b'x' * (32 << 20)); "
        "os.write(held, whole); print(flush=True); sys.stdin.read()"
    )
    monkeypatch.setenv("HANDFAST_BENCHMARK", "test-of-memory")
    sampler = Sampler()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        began = time.monotonic()
        with sampler.running():
            while not sampler.samples:
                time.sleep(0.01)
        child.communicate()

    assert sampler.peak(began, time.monotonic()) > 64 << 20
