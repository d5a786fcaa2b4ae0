"""Shows when ``handfast audit --watch`` tells what, and how it tells programs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from handfast.audit import watch as watching
from handfast.audit.finding import Code, Finding
from handfast.audit.found import Found
from handfast.audit.place import Place
from handfast.audit.run import founds
from handfast.audit.watch import STILL, watch
from handfast.cli.main import app

Act = Callable[[int], object]
"""What a training does between two looks, of which it is told the number."""


class EndedError(Exception):
    """It was watched for long enough."""


def told(home: Path, act: Act, looks: int = 12) -> list[tuple[int, Finding]]:
    """What is told after how many looks, of a training that goes on meanwhile."""
    at = 0

    def sleep(_: float) -> None:
        nonlocal at
        at += 1
        if at > looks:
            raise EndedError
        act(at)

    found: list[tuple[int, Finding]] = []
    with suppress(EndedError):
        found.extend((at, finding) for finding in watch(home, sleep=sleep))
    return found


def data(home: Path) -> bytes:
    """The bytes of a file of torch.save."""
    torch.save({"w": torch.rand(300)}, home / "made.pt")
    made = (home / "made.pt").read_bytes()
    (home / "made.pt").unlink()
    return made


def logging(home: Path, act: Act = lambda _: None) -> Act:
    """A training that writes a log before each look, and does something else, too."""

    def both(look: int) -> None:
        with (home / "train.log").open("a") as log:
            log.write("a line\n")
        act(look)

    return both


def at(acts: dict[int, Callable[[], object]]) -> Act:
    """A training that does some things at their times."""
    return lambda look: acts[look]() if look in acts else None


def test_a_log_that_is_written_for_ever_hides_nothing_and_costs_no_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn file is told once it rests; without any other change there is one audit."""
    audits = 0

    def counted(place: Place) -> Iterator[Found]:
        nonlocal audits
        audits += 1
        return founds(place)

    monkeypatch.setattr(watching, "founds", counted)
    (tmp_path / "model_step_3.pt").write_bytes(data(tmp_path)[:-100])
    ((look, finding),) = told(tmp_path, logging(tmp_path), looks=20)
    assert (look, finding.parts, audits) == (STILL, ("model_step_3.pt",), 1)


@pytest.mark.parametrize("first", ["{}", "{}.tmp", ".{}.x7", "tmpq81"])
def test_a_save_under_way_in_a_steps_directory_is_no_alarm(first: str, tmp_path: Path) -> None:
    """Files in turn, each cut at first and perhaps under another name, with pauses of two looks;
    a log lies beside the steps. What is still wrong when all rest is told.
    """
    whole = data(tmp_path)
    names = ("model.pt", "optimizer.pt", "scheduler.pt")
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        for name in names:
            (tmp_path / f"step_{step}" / name).write_bytes(whole)
    folder = tmp_path / "step_3"

    def saving(look: int) -> None:
        folder.mkdir(exist_ok=True)
        for nth, name in enumerate(names):
            early = folder / first.format(name)
            if look == 4 * nth + 1:
                early.write_bytes(whole[: len(whole) // 2])
            elif look == 4 * nth + 3:
                early.write_bytes(whole)
                os.replace(early, folder / name)

    assert told(tmp_path, logging(tmp_path, saving), looks=20) == []
    (folder / "scheduler.pt").unlink()
    ((_, finding),) = told(tmp_path, logging(tmp_path))
    assert (finding.code, finding.step) == (Code.MISSING, "step_3")


@pytest.mark.parametrize("early", ["optim_3.pt", "optim_3.pt.tmp", "optim_3.part", "tmpq81"])
def test_files_of_a_step_that_lie_beside_others_are_looked_at_by_steps(
    early: str, tmp_path: Path
) -> None:
    """``model_3.pt`` is at rest for long while ``optim_3.pt`` is written; a log moves as well."""
    whole = data(tmp_path)
    for step in (1, 2):
        for name in ("model", "optim"):
            (tmp_path / f"{name}_{step}.pt").write_bytes(whole)
    (tmp_path / "model_3.pt").write_bytes(whole)

    def saving(look: int) -> None:
        if look < 10:
            (tmp_path / early).write_bytes(whole[: 100 * look])
        elif look == 10:
            (tmp_path / early).write_bytes(whole)
            os.replace(tmp_path / early, tmp_path / "optim_3.pt")

    assert told(tmp_path, logging(tmp_path, saving), looks=20) == []
    (tmp_path / "optim_2.pt").write_bytes(whole[:-100])
    ((_, finding),) = told(tmp_path, logging(tmp_path))
    assert finding.parts == ("optim_2.pt",)


def test_another_steps_fault_waits_for_no_save(tmp_path: Path) -> None:
    """A step that is torn at rest is told while the next one is written."""
    whole = data(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
    (tmp_path / "step_1" / "model.pt").write_bytes(whole[:-100])

    def saving(look: int) -> None:
        (tmp_path / "step_2" / "model.pt").write_bytes(whole[: 10 * look])

    ((_, finding),) = told(tmp_path, saving)
    assert finding.parts == ("step_1/model.pt",)


def test_files_that_are_removed_are_missed_when_all_rest(tmp_path: Path) -> None:
    """Of a step that is cleared away, a file every two looks, nothing is said; of a rank's file
    that is gone all is.
    """
    whole = data(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        for rank in range(4):
            (tmp_path / f"step_{step}" / f"rank_{rank}.pt").write_bytes(whole)
    acts = {
        3 + 2 * nth: (tmp_path / "step_1" / f"rank_{rank}.pt").unlink
        for nth, rank in enumerate((1, 0, 2, 3))
    }
    assert told(tmp_path, at(acts), looks=20) == []
    lost = at({6: (tmp_path / "step_2" / "rank_1.pt").unlink})
    ((look, finding),) = told(tmp_path, lost)
    assert (finding.code, look) == (Code.MISSING, 6 + STILL)


def test_what_was_mended_and_is_wrong_again_is_told_again(tmp_path: Path) -> None:
    """And what stays as it is once, however often something else is written."""
    whole = data(tmp_path)
    path, other = tmp_path / "model_step_3.pt", tmp_path / "other_step_3.pt"
    path.write_bytes(whole[:-100])
    acts = {
        5: partial(other.write_bytes, whole),
        10: partial(path.write_bytes, whole),
        15: partial(path.write_bytes, whole[:-100]),
    }
    assert [look for look, _ in told(tmp_path, at(acts), looks=25)] == [STILL, 15 + STILL]


def test_a_file_that_is_overwritten_while_it_is_audited_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that begins between the look and the end of the audit."""
    whole = data(tmp_path)
    for rank in range(2):
        (tmp_path / f"rank_{rank}.pt").write_bytes(whole)

    def meanwhile(place: Place) -> Iterator[Found]:
        (tmp_path / "rank_1.pt").write_bytes(whole[:100])
        return founds(place)

    monkeypatch.setattr(watching, "founds", meanwhile)
    assert told(tmp_path, lambda _: None, looks=STILL) == []
    monkeypatch.undo()
    ((_, finding),) = told(tmp_path, lambda _: None)
    assert finding.parts == ("rank_1.pt",)


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
    answer = CliRunner().invoke(app, ["audit", str(home), "--watch", "--json"])
    *lines, _ = answer.stdout.split("\n")
    found = [json.loads(line) for line in lines if '"code"' in line]
    assert sorted(finding["parts"] for finding in found) == [
        ["first_step_3.pt"],
        ["second_step_8[bold]:smile:.pt"],
    ]
    assert answer.exit_code == 3
    assert f"watching {home}, until it is interrupted" in answer.stderr
