"""Shows what ``handfast audit --watch`` tells programs."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from handfast.audit.watch import STILL, watch
from handfast.cli.main import app


def test_each_finding_is_a_line_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files that were cut; it ends with what it watches."""
    home, looks = tmp_path / "home", 0
    home.mkdir()
    for name in ("first_step_3.pt", "second_step_8[bold]:smile:.pt"):
        torch.save({"w": torch.rand(300)}, home / name)
        (home / name).write_bytes((home / name).read_bytes()[:-100])

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks > STILL + 2:
            shutil.rmtree(home)

    monkeypatch.setattr("handfast.cli.audit.watching", partial(watch, sleep=sleep))
    told = CliRunner().invoke(app, ["audit", str(home), "--watch", "--json"])
    *lines, _ = told.stdout.split("\n")
    found = [json.loads(line) for line in lines if '"code"' in line]
    assert sorted(finding["parts"] for finding in found) == [
        ["first_step_3.pt"],
        ["second_step_8[bold]:smile:.pt"],
    ]
    assert told.exit_code == 3
