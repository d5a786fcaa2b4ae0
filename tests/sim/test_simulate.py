"""`handfast simulate`: what it answers, and with which exit code."""

import json
import os
import resource
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from handfast.cli.main import app
from handfast.cli.swarm import run_batch
from handfast.core import member
from handfast.core.retain import releasable
from handfast.sim.script import play
from handfast.sim.storm import Outcome


def simulate(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_a_swarm_is_the_same_in_any_number_of_processes() -> None:
    """Shows that figures and digest don't depend on who ran which seed."""
    one, two = (
        json.loads(simulate("--seeds", "20..24", "--jobs", jobs, "--json").output)
        for jobs in ("1", "2")
    )
    for answer in (one, two):
        assert answer.pop("wall_s") > 0
        assert answer.pop("busy_s") > 0
    assert one == two
    assert one["seeds"] == 4
    assert one["sound"] is True


def test_slices_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a long swarm can be run in pieces, each where the last one left off."""
    monkeypatch.setattr("handfast.cli.swarm.BATCH", 1)
    file = tmp_path / "tally.json"
    for _ in range(2):
        assert simulate("--minutes", "0.0001", "--jobs", "1", "--tally", str(file)).exit_code == 0
    sliced = json.loads(file.read_text())
    whole = json.loads(simulate("--seeds", str(sliced["seeds"]), "--json").output)
    assert sliced["next"] == sliced["seeds"] > 1
    for figure in ("events", "turns", "digest", "goals", "breaches"):
        assert sliced[figure] == whole[figure]


def test_no_seed_is_counted_twice(tmp_path: Path) -> None:
    """Shows that a tally goes on with further seeds, and refuses a range that it has counted."""
    file = tmp_path / "tally.json"
    for _ in range(2):
        assert simulate("--seeds", "2", "--jobs", "1", "--tally", str(file)).exit_code == 0
    sliced = json.loads(file.read_text())
    whole = json.loads(simulate("--seeds", "4", "--jobs", "1", "--json").output)
    assert (sliced["seeds"], sliced["next"], sliced["digest"]) == (4, 4, whole["digest"])
    again = simulate("--seeds", "3..5", "--tally", str(file))
    assert again.exit_code == 2
    assert f"{file} has counted up to seed 3" in again.output
    assert simulate("--seeds", "4..5", "--jobs", "1", "--tally", str(file)).exit_code == 0


def test_an_interruption_keeps_what_was_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that Ctrl-C costs a swarm no batch that it has counted, and says what is kept."""

    def interrupted(seeds: Iterable[int], *_: object) -> Iterator[list[tuple[Outcome, float]]]:
        yield run_batch(list(islice(seeds, 2)), thorough=False)
        raise KeyboardInterrupt

    monkeypatch.setattr("handfast.cli.swarm._run", interrupted)
    file = tmp_path / "tally.json"
    told = simulate("--minutes", "9", "--tally", str(file))
    assert told.exit_code == 128 + 2
    assert f"{file} has counted 2 seeds, and the next is 2" in told.output
    assert json.loads(file.read_text())["seeds"] == 2
    assert "nothing was kept" in simulate("--seeds", "8").output


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    """Shows that neither a tally nor a script is taken from bytes that are none."""
    file = tmp_path / "other"
    file.write_bytes(b"\xff\xfe")
    for option in ("--tally", "--script"):
        told = simulate(*(["--minutes", "1"] if option == "--tally" else []), option, str(file))
        assert (told.exit_code, f"{file} is no " in told.output) == (2, True), told.output
    file.write_text("nodes a\nlanch\n")
    assert f"{file}: line 2, 'lanch': no such verb" in simulate("--script", str(file)).output


def test_whichever_is_over_first_ends_a_swarm() -> None:
    """Shows that seeds which time did not suffice for are not counted, and are told."""
    both = ("--seeds", "100..900", "--jobs", "1", "--minutes")
    cut = simulate(*both, "0.0001")
    assert cut.exit_code == 0
    assert "time was over after 16 of 800 seeds" in cut.output
    assert cut.output.startswith("16 seeds: ")
    assert "time was over" not in simulate("--seeds", "2", "--jobs", "1", "--minutes", "9").output
    assert "whichever is over first" in " ".join(simulate("--help").output.split())


def test_a_seed_says_what_its_job_is_like() -> None:
    """Shows that ranks, copies, what an epoch needs of them and how votes go are words."""
    (job, troubles, *_) = simulate("--seed", "4").output.splitlines()
    assert job == (
        "seed 4, a job of 3 ranks; copies of each one's shard: 2 in tier dir (an epoch needs 1); "
        "votes go from neighbour to neighbour"
    )
    assert troubles.startswith("what troubles it: partitions, replays, ")
    (job, *_) = simulate("--seed", "0").output.splitlines()
    assert job == (
        "seed 0, a job of 1 rank; copies of each one's shard: 1 in tier dir, 1 in tier mem; "
        "votes go up a tree"
    )


def test_a_transcript_tells_everything() -> None:
    """Shows that one seed can be read from its first boot to its calm, and how it was judged."""
    told = simulate("--seed", "16", "--transcript").output
    assert "begins generation 1" in told
    assert "CONVERGED(" in told
    assert "digest" in told
    assert told.endswith("no law was broken\n")
    tail = json.loads(simulate("--seed", "16", "--transcript", "--json").output)["tail"]
    assert told.startswith("\n".join(tail))


def test_a_breach_names_its_seed_its_law_and_how_to_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shows what a planted fault looks like to whoever runs a seed, and that the exit code is 1."""
    monkeypatch.setattr(
        member, "releasable", lambda held, **rule: releasable(held, **{**rule, "pinned": ()})
    )
    seeds = (simulate("--seed", str(seed)) for seed in range(40))
    broken = next(result for result in seeds if result.exit_code)
    assert broken.exit_code == 1
    assert "broken: s8_release_follows_knowledge" in broken.output
    assert "a reader holds it" in broken.output
    assert "handfast simulate --seed" in broken.output


def test_a_goal_that_no_seed_reaches_fails_a_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a swarm that shows little does not pass for one that shows much."""
    monkeypatch.setattr("handfast.cli.swarm.GOALS", ("pigs fly",))
    monkeypatch.setattr("handfast.cli.swarm.ENOUGH", 4)
    few, enough = (simulate("--seeds", n, "--jobs", "1") for n in ("3", "4"))
    assert (few.exit_code, enough.exit_code) == (0, 1)
    assert "never reached: pigs fly" in enough.output


def test_a_scenario_is_checked_and_rewritten(tmp_path: Path) -> None:
    """Shows that a scenario that comes out otherwise is told line by line, with exit code 1."""
    script = tmp_path / "one.txt"
    script.write_text("nodes a\n----\nold\n")
    told = simulate("--script", str(script))
    assert told.exit_code == 1
    assert f"--- {script}, as written\n+++ what came out\n" in told.output
    assert "-old" in told.output
    assert "+a.1    boots" in told.output
    assert simulate("--script", str(script), "--rewrite").exit_code == 0
    again = simulate("--script", str(script))
    assert again.exit_code == 0
    assert again.output == "1 script came out as written; no law was broken\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"nodes a\ncalm now\n----\nold\n", "line 2, 'calm now': 'now' is too much"),
        (b"nodes a\n----\nold\ncalm\n", "line 4, 'calm': below `----`"),
        (b"", "there is no command in it"),
        (b"# one day\n", "there is no command in it"),
        (b"\x7fELF\xff", "is no script: byte 4 is no UTF-8 text"),
        (b"nodes a\0\n", "is no script: it holds bytes of 0"),
    ],
)
def test_a_script_that_is_none_is_left_as_it_is(tmp_path: Path, content: bytes, told: str) -> None:
    """Shows that it is named, with exit code 2, and that neither it nor another is rewritten."""
    good, wrong = tmp_path / "good.txt", tmp_path / "wrong.txt"
    good.write_text("nodes a\n----\nold\n")
    wrong.write_bytes(content)
    for more in ([], ["--rewrite"], ["--json"]):
        result = simulate("--script", str(good), "--script", str(wrong), *more)
        assert result.exit_code == 2
        said = json.loads(result.output)["error"] if "--json" in more else result.output
        assert f"{wrong}" in said
        assert told in said
    assert (good.read_text(), wrong.read_bytes()) == ("nodes a\n----\nold\n", content)
    assert sorted(tmp_path.iterdir()) == [good, wrong]


@pytest.mark.parametrize("option", [[], ["--rewrite"]])
def test_a_directory_is_no_script(tmp_path: Path, option: list[str]) -> None:
    """Shows that it is told, as wrong usage."""
    told = simulate("--script", str(tmp_path), *option)
    assert told.exit_code == 2
    assert "is a directory" in told.output


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_a_rewritten_script_keeps_what_it_was(tmp_path: Path, end: str, last: bool) -> None:
    """Shows that line ends, rights, links and an end without one are the user's, and stay."""
    file, link = tmp_path / "one.txt", tmp_path / "link.txt"
    link.symlink_to(file)
    lines = ["# why", "nodes a", "----", "old", "", "crash a", "----"]
    file.write_bytes((end.join(lines) + end * last).encode())
    file.chmod(0o640)
    if os.geteuid() == 0:  # whose it is can only be tried by one who may give it away
        os.chown(file, 65534, 65534)
    owner = file.stat().st_uid
    assert simulate("--script", str(link)).exit_code == 1
    assert simulate("--script", str(link), "--rewrite").exit_code == 0
    lines[3:4] = ["a.1    boots", "a.1    sees pins on nothing"]
    lines += ["a.1    crashes"]
    assert file.read_bytes() == (end.join(lines) + end * last).encode()
    assert (link.is_symlink(), file.stat().st_mode & 0o777) == (True, 0o640)
    assert file.stat().st_uid == owner
    assert sorted(tmp_path.iterdir()) == [link, file]
    again = simulate("--script", str(link))
    assert again.output == "1 script came out as written; no law was broken\n"


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"nodes a\n----\nold\n", 0o444, "is read-only"),
        (b"nodes a\r\n----\nold\n", 0o644, "ends its lines in more than one way"),
        (b"# a\r# remark\nnodes a\n----\nold\n", 0o644, "ends its lines in more than one way"),
    ],
)
def test_what_can_not_be_kept_is_not_rewritten(
    tmp_path: Path, content: bytes, mode: int, why: str
) -> None:
    """Shows that a script stays as it is where its rights or its line ends would be lost."""
    script = tmp_path / "one.txt"
    script.write_bytes(content)
    script.chmod(mode)
    told = simulate("--script", str(script), "--rewrite")
    assert told.exit_code == 2
    assert f"{script} {why}, and was not rewritten" in " ".join(told.output.split())
    assert script.read_bytes() == content
    assert list(tmp_path.iterdir()) == [script]


def test_what_was_written_meanwhile_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a script that somebody goes on with, while it is played, is not rewritten."""
    script = tmp_path / "one.txt"
    script.write_text("nodes a\n----\nold\n")

    def playing(text: str) -> str:
        script.write_text(f"{text}\ncrash a\n")
        return play(text)

    monkeypatch.setattr("handfast.cli.simulate.play", playing)
    told = simulate("--script", str(script), "--rewrite")
    assert told.exit_code == 2
    assert "has changed while it was played" in " ".join(told.output.split())
    assert script.read_text().endswith("\ncrash a\n")


def test_a_script_that_tells_nothing_is_told_how_to(tmp_path: Path) -> None:
    """Shows that "as written" is not said of what was compared with nothing."""
    script = tmp_path / "one.txt"
    script.write_text("nodes a\nlaunch\n")
    told = simulate("--script", str(script))
    assert told.exit_code == 0
    assert f"{script}: no block has a line ----, so nothing was compared" in told.output


def test_a_rewriting_that_fails_costs_nothing(tmp_path: Path) -> None:
    """Shows that where there is no room the script is left as it was: it was emptied first."""
    script = tmp_path / "one.txt"
    script.write_text("nodes a\n----\nold\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        told = simulate("--script", str(script), "--rewrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.exit_code == 3
    assert script.read_text() == "nodes a\n----\nold\n"
    assert list(tmp_path.iterdir()) == [script]


def test_a_scenario_that_breaks_a_law_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a broken law is a finding with its file's name, and no failure of the command."""
    monkeypatch.setattr(
        member, "releasable", lambda held, **rule: releasable(held, **{**rule, "pinned": ()})
    )
    script = tmp_path / "one.txt"
    calm = "save\ncalm\n"
    script.write_text(f"nodes a\nlaunch\n{calm}pin a 1/10\n{calm * 3}")
    told = simulate("--script", str(script))
    assert told.exit_code == 1
    assert f"{script}: broken: s8_release_follows_knowledge" in told.output
    found = json.loads(simulate("--script", str(script), "--json").output)
    assert (list(found["broken"]), found["sound"]) == ([str(script)], False)


@pytest.mark.parametrize(
    "wrong",
    [[], ["--seed", "1", "--seeds", "2"], ["--seeds", "5..5"], ["--seeds", "x"],
     ["--seeds", "2", "--transcript"], ["--minutes", "nan"], ["--minutes", "-1"],
     ["--seeds", "1", "--tally", "/nowhere/at/all"], ["--synchrony", "2", "--scale", "2"],
     ["--seeds", "2", "--svg", "d"], ["--seed", "2", "--tally", "t"], ["--seed", "2", "--rewrite"],
     ["--scale", "2", "--thorough"], ["--seed", "2", "--jobs", "x"]],
)  # fmt: skip
def test_wrong_usage_is_2(wrong: list[str]) -> None:
    """Shows that what can't be run is said before anything runs."""
    assert simulate(*wrong).exit_code == 2


def test_what_does_not_go_together_is_named() -> None:
    """Shows that an option is never left out of account in silence."""
    assert "--svg goes with --scale N,N..." in simulate("--seeds", "2", "--svg", "d").output
    both = simulate("--seed", "2", "--scale", "2").output
    assert "--seed N and --scale N,N...: one at a time" in both
