"""The question `corrections`, as small as it goes: what it holds against what, and shows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest
from benchmarks import corrections
from benchmarks.__main__ import QUESTIONS, main
from benchmarks.common.figures import Figure

SMALL = {"EVENT": 8, "AFTER": 20, "SKEWS": (1, 4), "WARMUP": 3, "WIDTH": 8, "HELD_OUT": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two seeds of a tiny training, asked as a user asks."""
    home = tmp_path_factory.mktemp("corrections")
    page = home / "page.md"
    page.write_text("before\n<!-- corrections: how -->\nold\n<!-- /corrections -->\nafter\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(corrections, name, value)
        code = main([
            "corrections", "--repeat", "2", "--peers", "", "--home", str(home),
            "--json", str(home / "run.json"), "--picture", str(home / "fix.svg"),
            "--markdown", f"{page}#corrections",
        ])  # fmt: skip
    return {
        "code": code,
        "figures": json.loads((home / "run.json").read_text())["figures"],
        "page": page.read_text(),
        "pictures": {path.name: path.read_text() for path in home.glob("*.svg")},
    }


def curve(run: dict[str, Any], who: str, what: str) -> list[list[float]]:
    """The values of one way over its steps, with the first betas."""
    wanted = f"{what}, betas (0.9, 0.999)"
    return [f["values"] for f in run["figures"] if (f["who"], f["what"]) == (who, wanted)]


def test_each_state_goes_on_in_each_way_that_there_is(run: dict[str, Any]) -> None:
    """With both betas, at the same steps, with a value for each seed; a skew of 1 is not damped."""
    assert run["code"] == 0
    ways: dict[str, set[str]] = {}
    for figure in run["figures"]:
        ways.setdefault(figure["what"], set()).add(figure["who"])
        assert len(figure["values"]) == 2
        assert figure["unit"] == "mnat"
    usual = {"as it is", "rollback", "reset, 3 steps"}
    lost = {"as it is", "rollback, 4 steps", "reset, 3 steps"}
    for betas in ("(0.9, 0.999)", "(0.9, 0.95)"):
        assert ways[f"whole, betas {betas}"] == {"other batches"}
        assert ways[f"moments 1 step behind, betas {betas}"] == usual
        assert ways[f"moments 4 steps behind, betas {betas}"] == usual | {"damp by 4"}
        assert ways[f"moments lost, betas {betas}"] == lost | {"rescale to 0"}
        assert ways[f"counter lost, betas {betas}"] == lost | {"rescale to 8"}
    assert [f["at"]["steps"] for f in run["figures"][:5]] == [1, 2, 5, 10, 20]


def test_a_counter_that_is_rescaled_is_the_uninterrupted_training(run: dict[str, Any]) -> None:
    """To the bit, so its figures are 0; those of what is left as it is are not."""
    assert curve(run, "rescale to 8", "counter lost") == [[0.0, 0.0]] * 5
    assert any(any(values) for values in curve(run, "as it is", "counter lost"))
    assert any(any(values) for values in curve(run, "as it is", "moments 1 step behind"))
    assert any(any(values) for values in curve(run, "other batches", "whole"))


def test_a_rollback_is_the_same_training_some_steps_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss after 5 steps, 4 behind, is the uninterrupted one's after 1."""
    for name, value in SMALL.items():
        monkeypatch.setattr(corrections, name, value)
    training = corrections.Training(0, (0.9, 0.999))
    epochs = training.first()
    whole = training.curve(corrections.Way(epochs[8], 8))
    back = training.curve(corrections.Way(epochs[4], 4))
    assert back[5] == whole[1]
    assert list(whole) == [1, 2, 5, 10, 20]


def test_the_table_and_the_pictures_show_those_values(run: dict[str, Any]) -> None:
    """The page keeps its prose; a picture for each fault, and none of ratios, of which none are."""
    assert run["page"].startswith("before\n<!-- corrections: how -->\n")
    assert run["page"].endswith("<!-- /corrections -->\nafter\n")
    assert "Goal by goal" not in run["page"]
    worst = [max(values) for values in zip(*curve(run, "as it is", "moments lost"), strict=True)]
    told = f"{median(worst):+.1f} ({min(worst):+.1f} to {max(worst):+.1f})"
    row = next(
        line for line in run["page"].splitlines()
        if line.startswith("| moments lost, betas (0.9, 0.999) | as it is |")
    )  # fmt: skip
    assert row.split(" | ")[3] == told
    assert set(run["pictures"]) == {
        f"fix-{name}.svg" for name in ("moments-1-step-behind", "moments-4-steps-behind",
                                       "moments-lost", "counter-lost")
    }  # fmt: skip
    lost = run["pictures"]["fix-moments-lost.svg"]
    assert "rescale to 0" in lost
    assert len(re.findall('class="line ', lost)) == 2 * 5  # and chance


def test_it_is_asked_by_name_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """So that `make bench` stays what it was; the help has it."""
    assert "corrections" not in QUESTIONS
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "corrections" in capsys.readouterr().out


def test_a_table_needs_no_more_than_the_figures() -> None:
    """Medians and ranges over seeds: at the first step, of each seed's worst, and at the end."""
    figures: Sequence[Figure] = [
        Figure(question="corrections", who="x", what="y", unit="mnat", values=values,
               at={"steps": step})
        for step, values in ((1, (1.0, 2.0, 3.0)), (9, (5.0, -1.0, 0.0)))
    ]  # fmt: skip
    sheet = corrections.lay("corrections", "about", figures)
    assert sheet.heads[-1] == "after 9 steps"
    assert sheet.rows == [
        ("y", "x", "+2.0 (+1.0 to +3.0)", "+3.0 (+2.0 to +5.0)", "+0.0 (-1.0 to +5.0)")
    ]
