"""Shows what ``handfast audit`` answers, to people and to programs, and with which exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from handfast.audit.finding import Code
from handfast.audit.watch import STILL, watch
from handfast.cli.main import app

GOLDEN = Path(__file__).parents[2] / "audit" / "golden"
RUN = "deepspeed/zero1-bf16-dp2"
SHARD = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


class Enough(Exception):
    """Nobody watches any more."""


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """A run of whose last step one rank's shard is of the step before."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / RUN, run)
    shutil.copyfile(run / "global_step2" / SHARD, run / "global_step4" / SHARD)
    return run


def command(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


def test_a_sound_run_is_shown_with_what_a_resume_would_take() -> None:
    """Exit code 0; the step, and by which rule."""
    told = command(GOLDEN / RUN)
    assert told.exit_code == 0
    assert "global_step4" in told.output
    assert "all ranks would resume global_step4: " in told.output
    assert "sound (" in told.output


def test_a_tear_is_shown_with_its_evidence(torn: Path) -> None:
    """Exit code 1; which parts, which values, how sure."""
    told = command(torn)
    assert told.exit_code == 1
    assert "certain global_step4: one counter of the optimizer has the values 2, 4" in told.output
    assert f"global_step4/{SHARD}: the step of group 0 = 2 (optimizer)" in told.output
    assert "not whole" in told.output


def test_programs_are_told_the_same(torn: Path, tmp_path: Path) -> None:
    """JSON on the output, SARIF in a file: one result a finding, each with a rule and a place."""
    log = tmp_path / "log.sarif"
    told = command(torn, "--json", "--sarif", log)
    assert told.exit_code == 1
    answer = json.loads(told.output)
    assert answer["sound"] is False
    (listed,) = answer["found"]
    assert [step["whole"] for step in listed["steps"]] == [True, False, True]
    run = json.loads(log.read_text())["runs"][0]
    assert len(run["results"]) == len(listed["findings"]) > 0
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert rules == {code.value for code in Code}
    for result in run["results"]:
        assert result["ruleId"] in rules
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert (torn / uri).exists()
    assert run["results"][0]["level"] == "error"


def test_what_can_not_be_looked_at_is_no_sound_answer(tmp_path: Path) -> None:
    """Exit code 3: no such path, no checkpoint in it; 2: a wrong option."""
    assert command(tmp_path / "nothing").exit_code == 3
    (tmp_path / "notes.txt").write_text("no checkpoint")
    told = command(tmp_path)
    assert told.exit_code == 3
    assert "no checkpoint that is known" in told.output
    assert "1 files are of no format that is known: notes.txt" in told.output
    assert command(tmp_path, "--watch", "--sarif", "log").exit_code == 2
    assert command(tmp_path, "--sarif", tmp_path / "no" / "log").exit_code == 2


def test_watching_tells_a_tear_once_it_is_still_there(tmp_path: Path) -> None:
    """Not amid a save, whose files look torn; and what was told is not told again."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / RUN, run)
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 10:
            shutil.copyfile(run / "global_step2" / SHARD, run / "global_step4" / SHARD)
        if looks == 40:
            raise Enough

    told: list[tuple[int, Code]] = []
    with pytest.raises(Enough):
        told.extend((looks, finding.code) for finding in watch(run, sleep=sleep))
    assert {code for _, code in told} == {Code.COUNTERS, Code.MASTER}
    assert {at for at, _ in told} == {10 + STILL}


def test_more_memory_is_allowed_by_name() -> None:
    """Whole GiB; nothing else is."""
    assert command(GOLDEN / "torch/bare", "--memory", 3).exit_code == 0
    for odd in ("0", "1.5", "-1", "x"):
        assert command(GOLDEN / "torch/bare", "--memory", odd).exit_code == 2
