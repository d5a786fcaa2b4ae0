"""Show what the gate's call and command answer where settings are wrong or nobody can be met."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from inventorykit import machine

from handfast.errors import FormatError, Refused
from handfast.fleet.compat.rules import Level
from handfast.fleet.gate.ask import nothing
from handfast.fleet.gate.keys import Memory
from handfast.gate import EXIT, check

ENV = {"RANK": "0", "WORLD_SIZE": "1", "PATH": os.environ["PATH"], "SLURM_JOB_ID": "17"}
RULES = """
format: 1
facts: {env.NCCL_MIN_NCHANNELS: NCCL_MIN_NCHANNELS}
rules:
  algorithm: {source: us, scope: node, minimum: {fact: env.NCCL_MIN_NCHANNELS, version: 4}}
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A job of one rank, by a rule about one of its variables."""
    (tmp_path / "rules.yaml").write_text(RULES)
    return ENV | {
        "HANDFAST_GATE_RULES": str(tmp_path / "rules.yaml"),
        "HANDFAST_GATE_NODE": str(tmp_path / "node.json"),
        "HANDFAST_GATE_TIMEOUT_S": "5",
    }


def test_a_call_answers_or_refuses(env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Observed, warned of or refused; job and rank are named."""
    assert check(keys=Memory(), environ=env).line == "fine: 1 ranks, 1 stacks"
    assert capsys.readouterr().err == ""
    odd = env | {"NCCL_MIN_NCHANNELS": "2"}
    assert not check(keys=Memory(), environ=odd).refused
    assert "gate: would be refused: rank 0 (" in capsys.readouterr().err
    with pytest.raises(Refused, match=r"refused: rank 0 .* job 17 needs"):
        check(keys=Memory(), environ=odd | {"HANDFAST_GATE_MODE": "enforce"})


def test_an_override_lets_it_pass_on_record(env: dict[str, str], tmp_path: Path) -> None:
    """Until its day; the audit lies beside the overrides."""
    file = tmp_path / "overrides.yaml"
    odd = env | {"NCCL_MIN_NCHANNELS": "2", "HANDFAST_GATE_MODE": "enforce",
                 "HANDFAST_GATE_OVERRIDES": str(file)}  # fmt: skip
    one = "overrides: [{name: x, rule: algorithm, who: ada, why: y, until: %s-01-01T00:00:00Z}]"
    file.write_text(one % "9000")
    assert "override x of ada (y) holds until 9000" in check(keys=Memory(), environ=odd).line
    assert '"job 17"' in Path(f"{file}.log").read_text()
    file.write_text(one % "2020")
    with pytest.raises(Refused, match=r"override x of ada \(y\) expired at 2020"):
        check(keys=Memory(), environ=odd)


def test_a_node_that_told_nothing_is_said_with_what_to_do(
    env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, by rank 0, where a rule is about what nodes run; and else not at all."""
    check(keys=Memory(), environ=env)
    assert capsys.readouterr().err == ""
    (tmp_path / "rules.yaml").write_text(DRIVER)
    check(keys=Memory(), environ=env)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("handfast gate: warning: rank 0 (")
    assert (
        f": what the node runs is unknown: neither a node service nor a file is at {tmp_path}"
        "/node.json, which HANDFAST_GATE_NODE names. What to do: start `handfast fleet node` "
    ) in first
    assert "runs an unknown driver; job 17 needs" in second
    assert nothing("").startswith(
        "no node service at /run/handfast/node.sock and no /run/handfast/node.json. What to do: "
        "start `handfast fleet node`"
    )


def test_rules_with_a_mistyped_fact_are_not_judged_by(env: dict[str, str], tmp_path: Path) -> None:
    """They would never fire, and everybody would take that for the best of news."""
    (tmp_path / "rules.yaml").write_text(DRIVER.replace("gpu.driver", "gpu.drivr"))
    found = check(keys=Memory(), environ=env)
    assert "this round could not be judged: " in found.line
    assert "no inventory has the fact gpu.drivr (is it gpu.driver?)" in found.line


def test_a_file_of_the_node_that_does_not_count_is_said(
    env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its facts are unknown."""
    (tmp_path / "node.json").write_text("{")
    check(keys=Memory(), environ=env)
    assert "node.json: no inventory of a node" in capsys.readouterr().err


DRIVER = """
format: 1
facts: {gpu.driver: driver}
rules:
  driver: {source: us, scope: node, minimum: {fact: gpu.driver, version: 590}}
"""


def test_the_nodes_service_is_asked_and_a_dead_one_is_said(
    env: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it tells is judged; one that was killed leaves the node's facts unknown, in one line."""
    machine("hgx", tmp_path / "root")
    path = str(tmp_path / "n.sock")
    (tmp_path / "rules.yaml").write_text(DRIVER)
    asked = env | {"HANDFAST_GATE_NODE": path}
    argv = ["-m", "handfast", "fleet", "node", "--at", path, "--root", str(tmp_path / "root")]
    with subprocess.Popen(
        [sys.executable, *argv],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as served:
        assert "answers at" in served.stdout.readline()
        found = check(keys=Memory(), environ=asked)
        assert "would be refused: rank 0 (" in found.line
        assert "runs driver 580.65.06; job 17 needs at least 590" in found.line
        served.kill()
        served.wait()
    capsys.readouterr()
    found = check(keys=Memory(), environ=asked)
    assert found.level is Level.WARN
    assert "an unknown driver" in found.line
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"handfast gate: what this node runs is unknown: {path}: nobody answers"
    )


PROBE = """
format: 1
facts: {env.NCCL_MIN_NCHANNELS: NCCL_MIN_NCHANNELS}
rules:
  tried: {source: us, scope: node, must-probe: {probe: x, facts: [env.NCCL_MIN_NCHANNELS]}}
"""


def test_what_was_probed_is_read_from_a_file(env: dict[str, str], tmp_path: Path) -> None:
    """A rule of must-probe holds by it; a file that can't be read refuses, and says the line."""
    (tmp_path / "rules.yaml").write_text(PROBE)
    file = tmp_path / "probed"
    odd = env | {"NCCL_MIN_NCHANNELS": "2", "HANDFAST_GATE_PROBED": str(file)}
    line = '{"probe":"x","client":["%s"],"server":["%s"],"passed":true}\n'
    file.write_text(line % ("2", "2"))
    assert check(keys=Memory(), environ=odd).line == "fine: 1 ranks, 1 stacks"
    file.write_text(line % ("3", "3"))
    assert "needs probe x to have passed" in check(keys=Memory(), environ=odd).line
    file.write_text(line % ("2", "2") + "{\n")
    with pytest.raises(Refused, match=r"not be judged: .*probed: line 2: no result of a probe"):
        check(keys=Memory(), environ=odd | {"HANDFAST_GATE_MODE": "enforce"})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"RANK": ""}, "RANK is '', and no number"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1"),
        ({"HANDFAST_GATE_MODE": "strict"}, "observe, warn, enforce"),
        ({"HANDFAST_GATE_TIMEOUT_S": "soon"}, "give seconds"),
        ({"HANDFAST_GATE_TIMEOUT_S": "nan"}, "give seconds"),
    ],
)
def test_settings_that_can_not_be_meant(env: dict[str, str], given: dict, why: str) -> None:
    """They are named, with what to give."""
    with pytest.raises(ValueError, match=why):
        check(keys=Memory(), environ=env | given)


def command(env: dict[str, str], *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the gate's command."""
    return subprocess.run(
        [sys.executable, "-m", "handfast.gate", *arguments],
        env={**env, "PYTHONPATH": os.pathsep.join(sys.path), **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_keeps_it_from_asking_ends_a_job_in_enforce_mode_only(
    env: dict[str, str], tmp_path: Path
) -> None:
    """A job that only observes goes on, as a script or as a module, with its exit code."""
    (tmp_path / "train.py").write_text("import sys, beside; sys.exit(len(sys.argv))")
    (tmp_path / "beside.py").write_text("")
    done = command(env, str(tmp_path / "train.py"), "a", "b", RANK="x")
    assert (done.returncode, done.stdout) == (3, "")
    assert "handfast gate: nobody was judged: RANK is 'x'" in done.stderr
    module = command(env, "-m", "this", RANK="x")
    assert "Zen" in module.stdout
    ended = command(env, "-m", "this", RANK="x", HANDFAST_GATE_MODE="enforce")
    assert (ended.returncode, ended.stdout) == (EXIT, "")
    for setting in ({"HANDFAST_GATE_MODE": "enforced"},
                    {"HANDFAST_GATE_MODE": "enforce", "HANDFAST_GATE_TIMEOUT_S": "soon"},
                    {"HANDFAST_GATE_MODE": "enforce", "WORLD_SIZE": "many"}):  # fmt: skip
        ended = command(env, "-m", "this", **setting)
        assert (ended.returncode, ended.stdout) == (EXIT, ""), setting
        assert "handfast gate: nobody was judged: " in ended.stderr
    observed = command(env, "-m", "this", HANDFAST_GATE_TIMEOUT_S="soon")
    assert "HANDFAST_GATE_TIMEOUT_S is 'soon'" in observed.stderr
    assert "Zen" in observed.stdout


def test_a_script_finds_what_it_would_find_without_the_gate(
    env: dict[str, str], tmp_path: Path
) -> None:
    """Its own directory in front, or, where Python was told so, nothing."""
    train = tmp_path / "train.py"
    train.write_text("import json, sys; print(json.dumps([sys.path, sys.argv, __file__]))")
    for safe in ("", "1"):
        plain = subprocess.run(
            [sys.executable, str(train), "a"],
            env={**env, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": safe},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        gated = command(env, str(train), "a", RANK="x", PYTHONSAFEPATH=safe)
        assert json.loads(gated.stdout) == json.loads(plain.stdout)


@pytest.mark.parametrize("wrong", [(), ("-m",), ("--hlep",), ("-m", "--help"), ("-x", "train.py")])
def test_what_is_no_script_is_wrong_usage(env: dict[str, str], wrong: tuple[str, ...]) -> None:
    """It is said how to call it; whoever asks for help is helped."""
    done = command(env, *wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: python -m handfast.gate SCRIPT [ARGUMENTS]" in done.stderr
    assert "Traceback" not in done.stderr
    if not wrong:
        assert "no option" not in done.stderr
        for word in ("-h", "--help"):
            helped = command(env, word)
            assert (helped.returncode, helped.stderr) == (0, "")
            assert helped.stdout == done.stderr


def test_a_store_that_can_not_be_reached_is_said(env: dict[str, str]) -> None:
    """Nobody listens at the port of the rendezvous: a rank ends, and not with torch's traceback."""
    pytest.importorskip("torch")
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        asked = {"RANK": "1", "WORLD_SIZE": "2", "HANDFAST_GATE_TIMEOUT_S": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]),
                 "HANDFAST_GATE_MODE": "enforce"}  # fmt: skip
        done = command(env, "-m", "this", **asked)
    assert done.returncode == EXIT, done.stderr
    assert "handfast gate: nobody was judged: the store of the rendezvous can't" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_torch_a_call_needs_keys(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so."""
    monkeypatch.setitem(sys.modules, "torch.distributed.rendezvous", None)
    with pytest.raises(FormatError, match="torch is not installed"):
        check(environ=env)
