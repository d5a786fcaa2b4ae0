"""Show what the command says and writes, and how it ends."""

import json
import subprocess
import sys

import msgspec
import pytest
import rehearsalkit
from click.testing import CliRunner

from handfast.cli.rehearse import rehearse
from handfast.fleet.compat.rules import Probed
from handfast.fleet.rehearse.fleet import REFUSED
from handfast.gate import EXIT

JOB = """\
rehearsal: a job
versions: {"1": {}, "2": {}, "3": {}}
nodes: [a, b]
probe: {each: pair, run: [sh, -c, 'test "$1" != "$2" || exit 0; case "$1$2" in %s esac',
  sh, "{client.version}", "{server.version}"]}
"""
RECORD = 'record: {probe: ping, facts: {ucx.version: "{version}", way: tcp}}\n'
WORKS = "*) exit 0;;"
REFUSES = "12) echo too old >&2; exit 96;; *) exit 0;;"
FAILS = "12) echo too old >&2; exit 96;; 31) exit 1;; *) exit 0;;"


@pytest.fixture
def call(tmp_path):
    """Rehearse a job in which the pairs of versions do this."""

    def call(cases, *words, more=RECORD):
        path = tmp_path / "job.yaml"
        path.write_text(JOB % cases + more)
        return CliRunner().invoke(rehearse, [str(path), *words])

    return call


@pytest.mark.parametrize(
    ("cases", "code", "tally"),
    [
        (WORKS, 0, "start 9 work"),
        (REFUSES, 0, "start 7 work, 2 refuse"),
        (FAILS, 1, "start 5 work, 2 refuse, 2 fail"),
    ],
)
def test_the_exit_code_says_whether_something_is_broken(call, cases, code, tally):
    """A refusal in words is a clean answer, and is counted."""
    told = call(cases)
    assert told.exit_code == code
    assert f"a job: {tally} (9 fleets, " in told.stdout
    if cases == FAILS:
        lines = [line.split() for line in told.stdout.splitlines()]
        assert lines[0] == ["a", "b", "met", "start"]
        assert lines[2] == ["1", "2", "1", "refuses", "too", "old"]
        assert lines[3][:5] == ["1", "3", "1", "fails", "the"]
        assert lines[11] == ["client", "server", "asked", "worked"]
        assert lines[13] == ["1", "2", "2", "0", "refuses", "too", "old"]
        assert lines[14] == ["1", "3", "2", "2", "works"]
        assert lines[18][:7] == ["3", "1", "2", "0", "fails", "the", "probe"]


def test_a_walk_that_broke_something_is_told(tmp_path):
    """So that a person can go it again, with what was said."""
    path = rehearsalkit.service(tmp_path, nodes="a", notes="raise")
    told = CliRunner().invoke(rehearse, [path, "--quick"])
    assert told.exit_code == 0
    walk = "start a 1; restart a; upgrade a to 2; restart a; downgrade a to 1"
    assert f"refuses {walk}\n  these are notes of version 2, and this is 1\n" in told.stdout
    tally = "start 3 work; upgrade 1 works; downgrade 1 refuses; restart 2 work (3 fleets, "
    assert f"greeters: {tally}" in told.stdout
    assert told.stderr.splitlines() == [
        f"fleet {at}: {version}: start all" for at, version in enumerate("121", 1)
    ]


def test_json_has_it_all(call):
    """The matrix, the moves that broke it, and the tally."""
    found = json.loads(call(FAILS, "--json").stdout)
    assert (found["refused"], found["bad"], found["judged"]) == (2, 2, True)
    assert found["rows"][1] == {
        "versions": ["1", "2"],
        "met": 1,
        "worst": "refuses",
        "by": {"start": "refuses"},
        "sentence": "too old",
    }
    assert found["breaks"][0]["walk"] == ["start a 1, b 2"]
    assert found["tally"] == {"start": {"works": 5, "refuses": 2, "fails": 2}}
    assert found["pairs"][1]["worst"] == "refuses"
    assert found["cut"] is False


def test_what_is_kept_is_named(call, tmp_path):
    """Below each move that broke something; the directory is made."""
    told = call(FAILS, "--keep", str(tmp_path / "new" / "kept"))
    kept = sorted(map(str, (tmp_path / "new" / "kept").iterdir()))
    assert len(kept) == 4
    assert sorted(line[8:] for line in told.stdout.splitlines() if "  kept: " in line) == kept
    assert "refuses start a 1, b 2\n  too old\n  kept: " in told.stdout


def test_what_is_found_of_pairs_is_recorded(call, tmp_path):
    """As rules of must-probe need it; a pair that refuses did not pass, nor one that fails."""
    path = tmp_path / "probed.jsonl"
    assert call(FAILS, "--record", str(path)).exit_code == 1
    decode = msgspec.json.Decoder(Probed).decode
    found = [decode(line) for line in path.read_bytes().splitlines()]
    assert {each.probe for each in found} == {"ping"}
    assert {each.client[1] for each in found} == {"tcp"}
    passed = {(each.client[0], each.server[0]): each.passed for each in found}
    assert len(passed) == len(found) == 9
    assert [pair for pair, ok in passed.items() if not ok] == [("1", "2"), ("3", "1")]
    assert call(WORKS, "--record", str(path)).exit_code == 0
    assert len(path.read_bytes().splitlines()) == 18  # what failed once is not forgotten


def test_nothing_is_judged_where_a_version_does_not_work_alone(call, tmp_path):
    """Exit code 3, and nothing is recorded."""
    path = tmp_path / "probed.jsonl"
    told = call(WORKS, "--record", str(path), more="setup: [sh, -c, 'exit {a.version}']\n" + RECORD)
    assert told.exit_code == 3
    assert "not judged: a fleet of one version does not work" in told.stdout
    assert "setup ended with 1" in told.stdout
    assert not path.exists()


def test_wrong_usage(call, tmp_path):
    """Before anything is started."""
    told = call(WORKS, "--record", str(tmp_path / "probed.jsonl"), more="")
    assert told.exit_code == 2
    assert "has no `record:`" in told.stderr
    assert call(WORKS, "--record", str(tmp_path / "none" / "probed.jsonl")).exit_code == 2
    assert CliRunner().invoke(rehearse, [str(tmp_path / "none")]).exit_code == 2
    told = call(WORKS, "--json", more="foo: 1\n")
    assert told.exit_code == 3
    assert "line 6: Object contains unknown field `foo`" in json.loads(told.stdout)["error"]


@pytest.mark.parametrize("cases", [WORKS, FAILS])
def test_what_was_left_behind_is_no_success(call, tmp_path, cases):
    """Whatever came of the versions: later fleets ran beside it, so nothing is recorded either."""
    path = tmp_path / "probed.jsonl"
    more = "teardown: [sh, -c, 'echo busy; exit 3']\n" + RECORD
    told = call(cases, "--record", str(path), more=more)
    assert told.exit_code == 3
    lines = told.stdout.splitlines()
    assert "not taken back: teardown ended with 3: busy" in lines
    assert lines[-1].startswith("left behind: it may have been in the way of later fleets")
    assert "What to do: remove it, correct `teardown`, and rehearse again" in lines[-1]
    assert not path.exists()
    told = call(cases, "--json", more=more)
    assert told.exit_code == 3
    assert json.loads(told.stdout)["untidy"] == ["teardown ended with 3: busy"]


def test_the_command_itself_ends_with_3_for_what_it_left_behind(tmp_path):
    """A directory that its own teardown can't remove, as it is not empty; and with 0 without."""
    path, left = tmp_path / "job.yaml", tmp_path / "left"
    text = f"setup: [mkdir, -p, {left}]\nteardown: [rmdir, {left}]\n"
    argv = [sys.executable, "-m", "handfast", "fleet", "rehearse", str(path)]

    def run():
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)

    path.write_text(JOB % WORKS + text)
    assert (run().returncode, left.exists()) == (0, False)
    (left / "in-the-way").mkdir(parents=True)
    told = run()
    assert (told.returncode, left.exists()) == (3, True)
    assert "not taken back: teardown ended with 1: rmdir: " in told.stdout


def test_a_refusal_is_spelled_as_the_gate_spells_it():
    """So that a probe may ask by `python -m handfast.gate`."""
    assert REFUSED == EXIT
