"""Shows what ``handfast demo`` says and which exit code it gives, without training anything."""

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from demo_samples import sample
from rich.console import Console

from handfast.cli import demo
from handfast.cli.console import answer
from handfast.cli.main import app
from handfast.demo.result import DemoResult
from handfast.demo.run import Options

FOLDER = Path("out")


def test_a_directory_with_other_things_in_it_is_wrong_usage(tmp_path: Path) -> None:
    """Exit code 2, a way out, and nothing touched; in JSON too."""
    (tmp_path / "mine").touch()
    told = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert told.exit_code == 2
    assert "--out" in told.output
    told = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--json"])
    assert json.loads(told.stdout)["exit_code"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("arguments", [["--kills", "0"], ["--seed", "-1"], ["--nonsense"]])
def test_arguments_that_make_no_sense_are_wrong_usage(arguments: list[str]) -> None:
    """Before anything is started."""
    assert CliRunner().invoke(app, ["demo", *arguments]).exit_code == 2


@pytest.mark.parametrize("equal", [True, False])
def test_the_exit_code_follows_the_result(
    equal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A script must not need to read the words: 0 is equal, 1 is anything else."""
    asked: list[Options] = []

    def run(options: Options, stage: object) -> DemoResult:
        asked.append(options)
        return sample(equal=equal)

    monkeypatch.setattr(demo, "run", run)
    told = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--kills", "40", "--full"])
    assert told.exit_code == (0 if equal else 1)
    assert ("EQUAL, bit for bit" in told.output) == equal
    assert ("DIFFERENT" in told.output) != equal
    assert str(tmp_path / "report.html") in told.output.replace("\n", "")
    assert (asked[0].kills, asked[0].steps, asked[0].full) == (40, 600, True)


def test_the_end_of_the_demo_shows_digests_and_counts() -> None:
    """What was proved, side by side, and every way to save with what it resumed from."""
    text = io.StringIO()
    demo._print(Console(file=text, width=160), sample(equal=False), FOLDER)
    said = text.getvalue()
    for words in (
        "aa" * 16,
        "dd" * 16,
        "≠",
        "a usual way",
        "mixture",
        "2 steps were trained again",
    ):
        assert words in said


def test_json_holds_what_a_script_would_ask(capsys: pytest.CaptureFixture[str]) -> None:
    """Counts and digests; the points of the pictures are in result.json."""
    answer(demo.summary(sample(), FOLDER))
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] is True
    assert told["storm"] == told["reference"]
    assert told["peers"]["a usual way"]["resumes"]["mixture"] == 1
    assert told["report"] == "out/report.html"
