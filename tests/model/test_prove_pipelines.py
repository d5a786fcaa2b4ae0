"""Shows what ``handfast prove --catalogue`` and ``--pipeline FILE`` say, and how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from handfast.cli import pipelines
from handfast.cli.main import app
from handfast.model.catalogue import handfast, manifest_last, rename_each, two_phase

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "pipelines"


def prove(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, ["prove", *arguments])


def test_the_catalogue_says_which_are_torn_by_which_instant_and_how_soon() -> None:
    """One row a claim, and the paper's instants; 0, since what is called sound is sound."""
    done = prove("--catalogue")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    (row,) = (line for line in lines if "a member holds the certificate" in line)
    assert row.count("holds") == 3  # once in the claim's own words
    assert "The paper's checkpoint of 1 domain: torn at no instant." in lines
    assert any(
        line.startswith("The paper's checkpoint of 2 domains: torn after 4,") for line in lines
    )


def test_the_catalogue_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value, with every schedule in words; 1 where one that is called sound is not there."""
    short = (rename_each, two_phase, manifest_last)
    monkeypatch.setattr(pipelines, "CATALOGUE", short)
    assert prove("--catalogue", "--json").exit_code == 1
    monkeypatch.setattr(pipelines, "CATALOGUE", (*short, handfast))
    done = prove("--catalogue", "--json")
    found = json.loads(done.output)
    assert (done.exit_code, found["sound"]) == (0, True)
    claims = {(p["pipeline"], c["claim"]): c for p in found["catalogue"] for c in p["claims"]}
    tear = claims["rename-each", "when the rename happens"]["tears"][0]
    assert (tear["kind"], tear["moves"]) == ("mixed", 3)
    assert tear["schedule"][-1] == "the restart loads rank 0: epoch 1, rank 1: nothing"
    assert found["torn_instants"]["1"] == []


SOUND = {
    "latest_after_barrier.py": [False, False],
    "peer_memory.py": [False, True],
    "shared_store.py": [True],
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_examples_are_as_they_say(name: str) -> None:
    """A short file describes a pipeline; the exit code says whether a claim of its is torn."""
    done = prove("--pipeline", str(EXAMPLES / name), "--json")
    (found,) = json.loads(done.output)["pipelines"]
    assert [c["sound"] for c in found["claims"][:-1]] == SOUND[name]
    assert done.exit_code == (not all(SOUND[name]))


def test_memory_of_peers_holds_until_the_power_goes() -> None:
    """The example's two tiers: the quick one survives the job, the slow one the power too."""
    done = prove("--pipeline", str(EXAMPLES / "peer_memory.py"), "--json")
    quick, slow, _ = json.loads(done.output)["pipelines"][0]["claims"]
    assert [(tear["fault"], tear["kind"]) for tear in quick["tears"]] == [("power", "lost")]
    assert slow["sound"]


def test_a_schedule_is_told_drawn_and_exported(tmp_path: Path) -> None:
    """In words, as a picture, and for spin, which accepts it."""
    svg, model = tmp_path / "torn.svg", tmp_path / "model.pml"
    file = str(EXAMPLES / "latest_after_barrier.py")
    done = prove("--pipeline", file, "--svg", str(svg), "--promela", str(model))
    assert done.exit_code == 1
    assert "MIXED: epoch 1 was claimed, after 18 moves a crash is enough" in done.output
    ET.fromstring(svg.read_text())  # noqa: S314 - our own text
    assert "init {" in model.read_text()
    if shutil.which("spin") is None:
        pytest.skip("spin is not installed (Debian: apt-get install spin)")
    subprocess.run(["spin", "-a", model.name], cwd=tmp_path, check=True, capture_output=True)


def test_what_can_not_be_looked_at_is_said_with_what_to_do(tmp_path: Path) -> None:
    """Wrong usage is 2, a file that is not there 3; a sound pipeline has nothing to draw."""
    nothing, broken = tmp_path / "nothing.py", tmp_path / "broken.py"
    nothing.write_text("x = 1\n")
    broken.write_text("1 / 0\n")
    for arguments, code, words in (
        ((), 2, "say what to prove"),
        (("--catalogue", "--calibrate"), 2, "say what to prove"),
        (("--svg", "x"), 2, "say what to prove"),
        (("--catalogue", "--svg", "x"), 2, "go with --pipeline"),
        (("--pipeline", str(nothing)), 2, "describes no pipeline"),
        (("--pipeline", str(broken)), 2, "ZeroDivisionError"),
        (("--pipeline", str(tmp_path / "absent.py")), 3, "absent.py"),
    ):
        done = prove(*arguments)
        assert (done.exit_code, words in done.output) == (code, True), done.output
