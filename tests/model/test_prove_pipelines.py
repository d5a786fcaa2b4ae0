"""Shows what ``handfast prove --catalogue`` and ``--pipeline FILE`` say, and how they end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
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


def test_a_file_that_fails_is_told_with_its_line(tmp_path: Path) -> None:
    """Shows that whoever made a slip is told where, and not only that there is one."""
    source = tmp_path / "mine.py"
    source.write_text("from handfast.model.pipeline import Restart\n\nRestart(2).loads(1)\n")
    told = CliRunner().invoke(app, ["prove", "--pipeline", str(source)])
    assert told.exit_code == 2
    assert f"{source}, line 3: it can't be run: TypeError" in " ".join(told.output.split())


def test_no_output_replaces_the_pipeline_or_another(tmp_path: Path) -> None:
    """Shows that a file given twice is wrong usage, and stays as it is."""
    source = tmp_path / "mine.py"
    source.write_text("pipelines = []\n")
    for outputs in (["--svg", source], ["--promela", f"{tmp_path}/./mine.py"],
                    ["--svg", f"{tmp_path}/o", "--promela", f"{tmp_path}/o"]):  # fmt: skip
        told = CliRunner().invoke(app, ["prove", "--pipeline", str(source), *map(str, outputs)])
        assert told.exit_code == 2
        assert "name another one" in " ".join(told.output.split())
    assert source.read_text() == "pipelines = []\n"
    assert list(tmp_path.iterdir()) == [source]


def test_the_catalogue_says_which_are_broken_by_which_instant_and_how_soon() -> None:
    """One row a claim, and the paper's instants; 0, since what is called sound is sound."""
    done = prove("--catalogue")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    (row,) = (line for line in lines if "a member holds the certificate" in line)
    assert row.count("holds") == 3  # once in the claim's own words
    assert "The paper's checkpoint of 1 domain: broken at no instant." in lines
    assert any(
        line.startswith("The paper's checkpoint of 2 domains: broken after 4,") for line in lines
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
    "barrier_with_timeout.py": {"hasty": [False], "careful": [True]},
    "latest_after_barrier.py": {"latest-after-barrier": [False, False]},
    "peer_memory.py": {"peer-memory": [False, True]},
    "shared_store.py": {"shared-store": [True]},
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_examples_are_as_they_say(name: str) -> None:
    """A short file describes a pipeline; the exit code says whether a claim of its is broken."""
    done = prove("--pipeline", str(EXAMPLES / name), "--json")
    found = json.loads(done.output)["pipelines"]
    assert {p["pipeline"]: [c["sound"] for c in p["claims"][:-1]] for p in found} == SOUND[name]
    assert done.exit_code == (not all(map(all, SOUND[name].values())))


def test_who_loses_patience_and_goes_on_mixes() -> None:
    """The timeout of the example comes before the other rank's file; the page says how soon."""
    done = prove("--pipeline", str(EXAMPLES / "barrier_with_timeout.py"), "--json")
    hasty, _ = json.loads(done.output)["pipelines"]
    tear = hasty["claims"][0]["tears"][0]
    assert (tear["kind"], tear["moves"]) == ("mixed", 10)
    assert "rank 0 times out (epoch 1)" in tear["schedule"]


def test_what_was_written_is_said_with_its_pipeline(tmp_path: Path) -> None:
    """Of several in a file, which one was drawn, and which one went to spin."""
    svg, model = tmp_path / "timeout.svg", tmp_path / "model.pml"
    file = str(EXAMPLES / "barrier_with_timeout.py")
    asked = ("--pipeline", file, "--svg", str(svg), "--promela", str(model))
    lines = prove(*asked).output.splitlines()
    assert lines[-2:] == [
        f"wrote {model}: pipeline hasty, its model for spin",
        f"wrote {svg}: pipeline hasty, saved when `latest` is moved: mixed",
    ]
    written = json.loads(prove(*asked, "--json").output)["written"]
    assert [(w["path"], w["pipeline"]) for w in written] == [
        (str(model), "hasty"),
        (str(svg), "hasty"),
    ]


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
    assert "/* when the barrier returns: mixed after killed */" in model.read_text()
    if shutil.which("spin") is None:
        pytest.skip("spin is not installed (Debian: apt-get install spin)")
    subprocess.run(["spin", "-a", model.name], cwd=tmp_path, check=True, capture_output=True)


def test_a_place_that_the_restart_never_reads_is_named(tmp_path: Path) -> None:
    """Whatever is written there can't save anything, and that is said."""
    file = tmp_path / "mine.py"
    more = (
        ("late = Actor", "late, sign = Actor"),
        ('("rank 0",))', '("rank 0",)), Place("sign")'),
        (" >> STOP", " >> rank0.puts(sign, epoch) >> STOP"),
        ("servers=(file, late)", "servers=(file, late, sign)"),
    )
    text = FILE
    for old, new in more:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    assert "mine: its restart never reads sign" in prove("--pipeline", str(file)).output
    (found,) = json.loads(prove("--pipeline", str(file), "--json").output)["pipelines"]
    assert found["unread"] == ["sign"]


def drawn(file: str, svg: Path, *more: str) -> str:
    """What a picture says below its title."""
    prove("--pipeline", file, "--svg", str(svg), *more)
    (words,) = re.findall(r">(Saved [^<]*)<", svg.read_text())
    return str(words)


def test_the_worst_is_drawn_or_what_is_asked_for(tmp_path: Path) -> None:
    """What mixes in silence before what is lost; the clock's claim only by its name."""
    svg = tmp_path / "a.svg"
    file = str(EXAMPLES / "latest_after_barrier.py")
    assert drawn(file, svg) == "Saved when the barrier returns? No: mixed."
    assert drawn(file, svg, "--claim", "latest") == "Saved when `latest` is replaced? No: mixed."
    assert drawn(file, svg, "--claim", "12:00") == "Saved at 12:00? No: mixed."
    sound = str(EXAMPLES / "shared_store.py")
    assert drawn(sound, svg) == "Saved at 12:00? No: lost."
    for claim, words in (
        ("manifest", "nothing breaks 'when the manifest"),
        ("no", "no claim says"),
    ):
        refused = prove("--pipeline", sound, "--svg", str(svg), "--claim", claim)
        assert (refused.exit_code, words in refused.output) == (2, True), refused.output


def test_a_pipeline_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    """As a file that Python runs; and nobody's path is changed for good."""
    text = (EXAMPLES / "shared_store.py").read_text()
    (tmp_path / "parts_of_it.py").write_text(text)
    file = tmp_path / "mine.py"
    file.write_text("from parts_of_it import pipeline\n")
    before = list(sys.path)
    assert prove("--pipeline", str(file)).exit_code == 0
    assert sys.path == before


def test_what_can_not_be_looked_at_is_said_with_what_to_do(tmp_path: Path) -> None:
    """Wrong usage is 2, a file that is not there 3; a sound pipeline has nothing to draw."""
    nothing, broken = tmp_path / "nothing.py", tmp_path / "broken.py"
    sound, nowhere = EXAMPLES / "shared_store.py", tmp_path / "nowhere.svg"
    nowhere.symlink_to(tmp_path / "absent" / "x.svg")
    nothing.write_text("x = 1\n")
    broken.write_text("1 / 0\n")
    for arguments, code, words in (
        ((), 2, "say what to do"),
        (("--catalogue", "--calibrate"), 2, "--calibrate and --catalogue: one at a time"),
        (("--catalogue", "--pipeline", "x"), 2, "--catalogue and --pipeline FILE: one at a time"),
        (("--svg", "x"), 2, "--svg goes with --pipeline FILE"),
        (("--catalogue", "--svg", "x"), 2, "--svg goes with --pipeline FILE"),
        (("--paxos",), 2, "--paxos goes with --calibrate"),
        (("--catalogue", "--limit", "5"), 2, "--limit goes with --protocol SCENARIO"),
        (("--pipeline", "x", "--claim", "y"), 2, "--claim goes with --pipeline FILE --svg OUT"),
        (("--pipeline", "x", "--svg", "/absent/x.svg"), 2, "there is no directory /absent"),
        (("--pipeline", str(tmp_path)), 3, "is a directory"),
        (("--pipeline", str(sound), "--svg", str(nowhere)), 3, "check the path"),
        (("--pipeline", str(nothing)), 2, "describes no pipeline"),
        (("--pipeline", str(broken)), 2, "ZeroDivisionError"),
        (("--pipeline", str(tmp_path / "absent.py")), 3, "absent.py"),
    ):
        done = prove(*arguments)
        assert (done.exit_code, words in done.output) == (code, True), done.output


FILE = """
from handfast.model.pipeline import *

rank0, file, late = Actor("rank 0"), Place("a.pt", ranks=(0,)), Barrier("all", ("rank 0",))

@process
def rank(epoch):
    return rank0.replaces(file, epoch) >> rank0.meets(late, epoch) >> STOP

look = Restart(1)

@process
def restart():
    return look.reads(file, lambda value: look.loads([value]))

mine = Pipeline(
    name="mine", about="by a user", actors={"rank 0": rank(1)}, servers=(file, late),
    restart=restart(), claims=(Claim("when renamed", does="renames"),), epochs=1,
)
"""


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ('actors={"rank 0": rank(1)}', "actors=(rank(1),)", "it needs actors, by name"),
        ("restart=restart()", "restart=restart", "restart is to be a process"),
        ('does="renames"),)', 'does="renames"))', "claims is to be a tuple of one or more"),
        ("servers=(file, late)", "servers=[file, late]", "servers is to be a tuple of one or more"),
        ("epochs=1", 'epochs="1"', "at least one epoch"),
        ('("rank 0",)', '["rank 0"]', "a tuple of their names"),
        ('("rank 0",)', '("rank 1",)', "all waits for rank 1, who is none of the actors"),
        ('actors={"rank 0"', 'actors={"me"', "is done by actors['me']"),
        ("ranks=(0,)", "ranks=(0)", "a tuple of numbers, (0,) say, not 0"),
        (", ranks=(0,)", "", "line 14: `the restart loads rank 0: a torn piece` comes after"),
        (" >> STOP", ' >> rank0.does("loads", 1) >> STOP', "line 8: rank 0 can't do by itself"),
        ("epochs=1", "epochs=2", "goes on from epochs 1 to 1"),
        ("rank(1)}", "rank(2)}", "rank 0 drafts a.pt for epoch 2; epochs are 1 to 1"),
        (" >> STOP", "", "rank(1,) gives"),
        ("return rank0.replaces", "rank0.replaces", "rank(1,) gives None"),
        ("return rank0.replaces(file, epoch)", "return {}[epoch]", "line 8"),
        ("look.loads([value])", "None", "can't be followed"),
        ("look.loads([value])", "look.loads([7])", "a restart loads 7"),
        (
            "look.loads([value])",
            "look.loads([\n        1])",
            "line 14: `the restart loads rank 0: epoch 1` comes after `the restart reads a.pt",
        ),
        ("look.loads([value])", "look.refuses()", "the restart loads nothing on any way"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_as_the_files(
    tmp_path: Path, right: str, wrong: str, words: str
) -> None:
    """Exit code 2 and no traceback, though a process is first called when it is followed."""
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    assert prove("--pipeline", str(file)).exit_code in (0, 1)
    assert right in FILE
    file.write_text(FILE.replace(right, wrong))
    done = prove("--pipeline", str(file))
    said = " ".join(done.output.split())
    assert (done.exit_code, words in said) == (2, True), said
    assert "Traceback" not in said
