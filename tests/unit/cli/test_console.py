"""Shows how tables and figures look: in a pipe, on a narrow terminal, and in plain words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.table import Table

from handfast.cli.console import lay, tabulate
from handfast.cli.main import app
from handfast.model.exhibits import Exhibit

ROWS = [
    ("[bold]a short one[/]", "1", "held by everybody, in the end"),
    ("one with incomprehensibilities", "1,234,567", ""),
]


def test_words_wrap_at_blanks_and_nothing_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However narrow it is, each word and each figure stands there whole."""
    tabulate(("what", "how many", "note"), ROWS, words=(0, 2))
    wide = capsys.readouterr().out
    assert len(wide.splitlines()) == 3
    for width in (80, 50, 40, 1):
        monkeypatch.setattr("handfast.cli.console.WIDTH", width)
        tabulate(("what", "how many", "note"), ROWS, words=(0, 2))
        narrow = capsys.readouterr().out
        assert sorted(narrow.split()) == sorted(wide.split())
        assert "1,234,567" in narrow
        if width >= 50:
            assert max(map(len, narrow.splitlines())) <= width


def test_a_table_of_epochs_is_not_cut_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns that don't wrap go on in the terminal's next line."""
    monkeypatch.setattr("handfast.cli.console.WIDTH", 40)
    table = Table(box=None, padding=(0, 1))
    table.add_column("domain", no_wrap=True)
    for step in range(1000, 1010):
        table.add_column(f"3/{step}", justify="center", no_wrap=True)
    table.add_row("rank 0 on a-node-with-a-long-name", *"x" * 10)
    lay(table)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["domain", *(f"3/{step}" for step in range(1000, 1010))]
    assert row.startswith(" rank 0 on a-node-with-a-long-name  ")


@pytest.mark.parametrize("width", [200, 30])
@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"],
        ["plan", "--explain", "--trials", "100"],
        ["prove", "--protocol", "list"],
    ],
)
def test_no_line_of_a_pipe_ends_in_blanks(
    arguments: list[str], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is kept in a file can be compared, and looked for."""
    monkeypatch.setattr("handfast.cli.console.WIDTH", width)
    lines = CliRunner().invoke(app, arguments).output.splitlines()
    assert lines
    assert [line for line in lines if line != line.rstrip()] == []


def test_exhibits_are_told_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that belong together stand below their name; nothing is spelled as in Python."""
    figures = {"points": 1234, "depth by messages": {1: [0], 2: [1, 2]}, "share": 0.123456}
    shown = Exhibit("it is so", holds=True, figures=figures, conditions="always")
    monkeypatch.setattr("handfast.cli.prove.exhibits", lambda: iter([shown]))
    monkeypatch.setattr("handfast.cli.prove.import_module", _no_torch)
    done = CliRunner().invoke(app, ["prove", "--exhibits"])
    assert done.exit_code == 0
    assert [line.split() for line in done.output.splitlines()[1:6]] == [
        ["points", "1,234"],
        ["depth", "by", "messages"],
        ["1", "0"],
        ["2", "1,", "2"],
        ["share", "0.1235"],
    ]
    assert not set("{}[]'") & set(done.output)
    told = json.loads(CliRunner().invoke(app, ["prove", "--exhibits", "--json"]).output)
    assert told["exhibits"][0]["figures"]["depth by messages"] == {"1": [0], "2": [1, 2]}


def _no_torch(_: str) -> None:
    raise ModuleNotFoundError(name="torch")


def test_plan_says_what_it_wrote_and_which_directory_it_made(tmp_path: Path) -> None:
    """A directory that was there already is not called made."""
    where = tmp_path / "not" / "yet"
    asked = ["plan", "--svg", str(where), "--trials", "100"]
    made, *wrote = CliRunner().invoke(app, asked).output.splitlines()[-4:]
    assert made == f"made the directory {where}"
    assert sorted(wrote) == sorted(f"wrote {path}" for path in where.iterdir())
    assert "made" not in CliRunner().invoke(app, asked).output


def test_more_copies_than_domains_are_no_plan() -> None:
    """Each copy is in a domain of its own; exit code 2, with both numbers."""
    refused = CliRunner().invoke(app, ["plan", "--domains", "4", "--copies", "5"])
    assert refused.exit_code == 2
    assert "5 copies of a shard" in refused.output
    assert "only 4 domains" in refused.output
    assert CliRunner().invoke(app, ["plan", "--domains", "4", "--copies", "4"]).exit_code == 0
