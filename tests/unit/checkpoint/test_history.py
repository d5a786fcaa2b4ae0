"""Shows what a run's journals tell of how its generations ended, and what only clocks hint at.

And `handfast plan`, which takes from them what they tell and nothing else.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_jobs import Job, trained

import handfast
from handfast.checkpoint.history import Hints, History, Life, history
from handfast.cli.main import app
from handfast.core import events
from handfast.core.lattice import Epoch
from handfast.core.retain import Keep


def told(path: Path) -> History:
    """What is read of a run."""
    return history(handfast.open(path).location.survey())


def plan(*arguments: object) -> Any:
    """The JSON of `handfast plan`, which must succeed."""
    done = CliRunner().invoke(app, ["plan", "--json", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_generations_are_told_by_how_they_ended(tmp_path: Path) -> None:
    """The first is cut between the votes of step 4, the second is not, the third goes on."""
    job = Job(tmp_path, 3)
    job.start()
    job.save(1, 2, 3)
    job.save(4, only=[0])
    job.start()
    job.save(6, 8)
    job.start()
    job.save(9)
    job.stop()
    found = told(tmp_path)
    assert [life.torn for life in found.lives] == [True, False, False]
    assert [life.ended for life in found.lives] == [True, True, False]
    assert [life.again for life in found.lives] == [1, 0, None]
    assert [str(life.base) for life in found.lives] == ["0/0", "1/3", "2/8"]
    assert found.lives[0].missing == found.domains[1:]
    assert found.votes == (10 + 6 + 3, 0)
    assert found.steps == 1
    assert len(found.ends) == 2
    assert found.struck == {"all": 2}
    assert found.together == (1.0, 1.0)


def test_a_domain_that_skips_is_no_tear(tmp_path: Path) -> None:
    """It had its word: the votes tell how often one fails, which is q of the rounds."""
    job = Job(tmp_path, 2)
    job.start()
    job.save(1, 2)
    job.ranks[0].take(events.Captured(Epoch(1, 3)))
    job.ranks[1].take(events.Forgone(Epoch(1, 3), "no room"))
    job.deliver()
    job.start()
    job.stop()
    found = told(tmp_path)
    assert found.votes == (5, 1)
    assert not found.lives[0].torn
    answer = plan("--fit", tmp_path)
    fitted, q = answer["setting"], answer["fit"]["q"]
    assert q["mean"] == pytest.approx(1 / 6)
    assert fitted["failure"] == q["high"] > 0.5
    assert fitted["domains"] == 2
    assert fitted["window"] == 60.0  # no journal tells it
    assert plan("--fit", tmp_path, "--failure", 0.25)["setting"]["failure"] == 0.25


def test_times_are_hints_and_taken_only_if_asked_for(tmp_path: Path) -> None:
    """Modification times that are set say 10 s from epoch to epoch, 1.5 s from first to last."""
    trained(tmp_path, 3)
    for rank, late in enumerate((0.0, 1.5, 0.5)):
        for file in Path(tmp_path, "domains", f"rank-{rank:05d}").rglob("*.manifest"):
            step = int(file.name.split(".")[0].split("-")[-1])
            os.utime(file, (0, 1e9 + 10 * step + late))
    hints = told(tmp_path).hints
    assert hints.epochs == 3
    assert hints.spread == pytest.approx(1.5)
    assert hints.interval == pytest.approx(10.0)
    setting = plan("--fit", "--hints", tmp_path)["setting"]
    assert setting["interval"] == pytest.approx(10.0)
    assert setting["window"] == pytest.approx(3.0)  # whose spread over three domains is the half


def test_a_guess_that_can_not_be_planned_for_is_told_as_one(tmp_path: Path) -> None:
    """Saves whose files say a minute from first to last, and a second from epoch to epoch."""
    trained(tmp_path, 3)
    for rank, late in enumerate((0.0, 60.0, 0.5)):
        for file in Path(tmp_path, "domains", f"rank-{rank:05d}").rglob("*.manifest"):
            os.utime(file, (0, 1e9 + int(file.name.split(".")[0].split("-")[-1]) + late))
    done = CliRunner().invoke(app, ["plan", "--fit", "--hints", str(tmp_path)])
    assert done.exit_code == 2
    assert "It is the files' times that told --interval and --window" in " ".join(
        done.output.split()
    )


def test_a_run_of_one_domain_is_not_planned_for_as_if_it_had_many(tmp_path: Path) -> None:
    """Shows that no default stands in for what its journals can't tell."""
    trained(tmp_path, 1)
    alone = CliRunner().invoke(app, ["plan", "--fit", str(tmp_path)])
    assert alone.exit_code == 2
    assert "has one domain, and nothing can be torn" in " ".join(alone.output.split())
    assert plan("--fit", tmp_path, "--domains", 8)["setting"]["domains"] == 8


def test_what_falls_together_is_set_against_what_would_fall_alone() -> None:
    """Two hosts, four ends: both at two of them, one at a third; apart that would be 3/4 of 2/4."""
    ends = [("a", "b", "c"), ("a", "c"), ("b",), ()]
    lives = [Life(g, None, None, (), 0, 0, 0, True, who, None) for g, who in enumerate(ends, 1)]
    lives.append(Life(5, None, None, (), 0, 0, 0, False, (), None))
    found = History(
        "run", ("a", "b", "c"), ("x", "x", "y"), (), tuple(lives), None, 0, Hints(0, None, None)
    )
    assert found.struck == {"all": 2, "x": 1, "none": 1}
    assert found.together == (2 / 4, 3 / 4 * 2 / 4)
    assert found.ends == ()  # none had voted on anything


def test_without_a_domain_nothing_is_judged(tmp_path: Path) -> None:
    """A generation may look torn only because somebody's journal is not here; it is named."""
    job = Job(tmp_path, 2, split=True, keep=Keep(newest=2))
    job.start()
    job.save(1, 2)
    job.start()
    job.stop()
    found = told(Path(job.roots[0]))
    assert found.unread == (found.domains[1],)
    assert found.lives == ()
    said = CliRunner().invoke(app, ["plan", "--fit", job.roots[0]])
    assert said.exit_code == 0
    assert f"not read: {found.domains[1]}" in said.output


def test_plan_says_what_it_does_not_know(tmp_path: Path) -> None:
    """In words, beside what was counted."""
    trained(tmp_path, 2)
    said = CliRunner().invoke(app, ["plan", "--fit", str(tmp_path)]).output
    assert "a journal has no clock" in said
    assert "8 staged, 0 skipped" in said
    assert "2 domains; commit times uniform" in said


def test_who_saw_nobody_fail_plans_for_failures_all_the_same(tmp_path: Path) -> None:
    """Eight votes without a skip leave q = 0.37 possible: that is planned by, and shown."""
    trained(tmp_path, 2)
    answer = plan("--fit", tmp_path)
    assert answer["fit"]["q"]["mean"] == 0
    assert answer["setting"]["failure"] == pytest.approx(1 - 0.025 ** (1 / 8))
    said = CliRunner().invoke(app, ["plan", "--fit", str(tmp_path)]).output
    assert "a share of 0 skipped, so q is in [0, 0.369]" in said
    assert "fails to stage at a try with q = 0.369" in said
    assert "nobody ever fails" not in said


def test_what_was_given_is_shown_as_it_was_given() -> None:
    """A time in its unit, q, and intervals with digits enough to have a width."""
    said = CliRunner().invoke(app, ["plan", "--explain", "--trials", "100", "--window", "5"]).output
    header = " ".join(said.split())
    assert "uniform, 5s; a save every 30m; mean time between failures of a domain 50,000h" in header
    assert "q = 0.01" in header
    ends = re.findall(r"true value in \[(\S+), (\S+)\]", header)
    assert len(ends) >= 8
    assert [low for low, high in ends if low == high] == []


def test_a_figure_that_is_none_is_told_with_what_may_be_given() -> None:
    """In words and not in those of a parser."""
    for option, value, words in (
        ("--domains", "x", "'x' is no whole number from 2 to 10000000"),
        ("--failure", "nan", "'nan' is no number from 0 to 0.99"),
    ):
        said = CliRunner().invoke(app, ["plan", option, value])
        assert (said.exit_code, words in said.output) == (2, True), said.output


def test_explaining_plays_every_formula(tmp_path: Path) -> None:
    """Each has its conditions and a simulation that agrees; plots come with theirs."""
    found = plan("--explain", "--domains", 64, "--commits", "exponential", "--window", "10m",
                 "--svg", tmp_path, "--trials", 2000, "--host-mtbf", "30d",
                 "--mtbf", "500h")  # fmt: skip
    assert len(found["findings"]) >= 12
    for finding in found["findings"]:
        assert finding["conditions"]
        assert finding["agrees"], finding
        assert finding["seen"]["trials"] == 2000
    assert found["setting"]["job_mtbf"] is None
    bounds = [finding for finding in found["findings"] if finding["bound"]]
    assert [finding["name"] for finding in bounds] == ["P(torn), by the window"]
    assert sorted(found["plots"]) == sorted(map(str, tmp_path.glob("torn-*.svg")))
    assert len(found["plots"]) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ["--window", "5x"],
        ["--window", "0s"],
        ["--interval", "never"],
        ["--domains", "1"],
        ["--fit"],
        ["--hints"],
        ["some-run"],
        ["--window", "2d", "--interval", "1m"],
    ],
)
def test_what_is_given_wrongly_is_refused(wrong: list[str]) -> None:
    """With exit code 2 and a reason; what piles up can't be planned for."""
    done = CliRunner().invoke(app, ["plan", *wrong])
    assert done.exit_code == 2, done.output
    assert "rror" in done.output


def test_a_run_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    """With exit code 3: it could not look."""
    assert CliRunner().invoke(app, ["plan", "--fit", str(tmp_path / "none")]).exit_code == 3


def test_what_is_too_rare_for_the_trials_is_not_said_to_agree() -> None:
    """A chance of 1e-11 is never seen in thousands of trials, nor would one of 1e-6 be."""
    found = CliRunner().invoke(app, ["plan", "--explain", "--json", "--trials", "2000"])
    rows = {row["name"]: row for row in json.loads(found.output)["findings"]}
    rare = [row for name, row in rows.items() if "copies lost" in name]
    assert rare
    assert not any(row["tested"] for row in rare)
    assert any(row["tested"] for row in rows.values())
    shown = CliRunner().invoke(app, ["plan", "--explain", "--trials", "2000"]).output
    assert "too rare for so many trials to tell" in " ".join(shown.split())


@pytest.mark.parametrize("domains", ["2", "8"])
def test_a_job_that_hardly_fails_refutes_no_formula(domains: str) -> None:
    """Of 20,000 intervals two or none have a failure: that is no ground for any interval."""
    done = CliRunner().invoke(app, ["plan", "--explain", "--json", "--domains", domains])
    rows = {row["name"]: row for row in json.loads(done.output)["findings"]}
    wall = rows["wall time for useful time, this interval"]
    assert (done.exit_code, wall["tested"], wall["seen"]["high"]) == (0, False, None)
    shown = CliRunner().invoke(app, ["plan", "--explain", "--domains", domains]).output
    assert "almost all of them alike" in " ".join(shown.split())


def test_figures_that_are_beyond_all_floats_are_infinite() -> None:
    """A job that fails a billion times in each save, and one whose saves cost next to nothing."""
    hopeless = CliRunner().invoke(app, ["plan", "--cost", "999999999999d", "--mtbf", "1s"])
    assert hopeless.exit_code == 0
    assert "such a job never gets on" in " ".join(hopeless.output.split())
    short = ["--domains", "2", "--mtbf", "999999999999d", "--cost", "1s", "--interval", "1s"]
    easy = CliRunner().invoke(app, ["plan", *short, "--window", "1s", "--restart", "1s"])
    assert easy.exit_code == 0
    assert "tau = 2.939e+08 s" in easy.output
