"""Show what a node leaves for its ranks, whom they trust for it, and what its prolog answers."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from click.testing import CliRunner, Result
from inventorykit import fact, inventory, machine

from handfast.cli.fleet import fleet
from handfast.errors import FormatError
from handfast.fleet.gate.node import AGE, read_node, write_node
from handfast.fleet.gate.stack import NODE, decode, digest, encode, held, stack
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.facts import Kind, State, Tier, Want, gather
from handfast.gate import EXIT

NOW = datetime(2026, 12, 1, tzinfo=UTC)
SAID = inventory(**{"gpu.driver": "580.65.06", "gpu.model": None})
RULE = """
format: 1
facts: {gpu.driver: driver}
rules:
  driver: {source: us, scope: node, minimum: {fact: gpu.driver, version: %s}}
"""


def wrote(path: Path, at: datetime = NOW) -> Path:
    """A node's file, from a time."""
    write_node(str(path), SAID)
    os.utime(path, (at.timestamp(), at.timestamp()))
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Also in a directory that was not there; and nothing is beside it."""
    path = wrote(tmp_path / "run" / "node.json")
    assert read_node(str(path), NOW) == SAID
    assert os.listdir(path.parent) == ["node.json"]
    assert read_node(str(tmp_path / "none.json"), NOW) is None


def test_what_others_could_have_written_does_not_count(tmp_path: Path) -> None:
    """Nor what is old, is from tomorrow, or is no plain file."""
    path = wrote(tmp_path / "node.json")

    def refused(why: str, at: datetime = NOW) -> None:
        with pytest.raises(FormatError, match=why):
            read_node(str(path), at)

    refused("is from 2026-12-01", NOW + AGE + timedelta(seconds=1))
    refused("is from 2026-12-01", NOW - timedelta(hours=1))
    for mode in (0o664, 0o646, 0o620, 0o602):  # its group is as much another as everybody is
        path.chmod(mode)
        refused("others may write it")
    path.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(path, 65534, -1)
        refused("it is of user 65534")
        os.chown(path, 0, -1)
    directory = tmp_path / "made-by-a-mount"
    directory.mkdir()
    with pytest.raises(FormatError, match="it is no plain file"):
        read_node(str(directory), NOW)
    path.write_text("{")
    os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    refused("no inventory of a node")
    with path.open("wb") as file:
        file.truncate(5 << 20)
    os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    refused("more than 4194304 bytes")
    path.unlink()
    path.symlink_to("/etc/hostname")
    refused("does not count")
    path.unlink()
    os.mkfifo(path)
    refused("no plain file")


def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    """And no half of a new one."""
    (tmp_path / "node.json" / "in-the-way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"node\.json"):
        write_node(str(tmp_path / "node.json"), SAID)
    assert os.listdir(tmp_path) == ["node.json"]


def test_a_stack_is_what_must_be_equal() -> None:
    """Unknown is None, and so is what a node did not say; a rank's own facts are its own."""
    job = gather(
        [
            fact("nccl.version", "2.27.5", Tier.JOB),
            fact("env.NCCL_SOCKET_IFNAME", "eth0", Tier.JOB, Kind.PER_NODE),
        ]
    )
    both = stack(job, SAID)
    assert both == {"nccl.version": "2.27.5", "gpu.driver": "580.65.06", "gpu.model": None}
    asked = ("gpu.driver", "cpu.vendor", "fabric-manager.version", "slurm.slurmd", "nccl.version")
    alone = held(stack(job, None), asked)
    assert list(alone.values()) == [None, None, None, "", "2.27.5"]
    assert held({"env": "read"}, ["env.NCCL_ALGO"]) == {"env.NCCL_ALGO": ""}
    with_job = gather([*SAID.facts, fact("nccl.version", "2.19.3", Tier.JOB)])
    assert stack(job, with_job) == both  # a node can't tell what its ranks run
    gone = Want("nccl.plugin.net", Tier.JOB).absent("looked for")
    assert stack(gather([*job.facts, gone]), None)["nccl.plugin.net"] == ""
    text = encode(both)
    assert decode(text, digest(text)) == both
    with pytest.raises(FormatError, match="can't be read"):
        decode("[]", digest("[]"))


def test_every_fact_of_a_node_is_below_a_name_that_can_be_unknown(tmp_path: Path) -> None:
    """Else a rank whose node said nothing would take one of them for absent."""
    found = take(machine("hgx", tmp_path / "root"), tiers=[Tier.HOST, Tier.FABRIC])
    exact = [each for each in found.facts if each.kind is Kind.EXACT]
    assert len(exact) > 10
    assert {each.name.partition(".")[0] for each in exact} <= set(NODE) | {"collector"}
    assert any(each.state is State.KNOWN for each in exact)


def admit(tmp_path: Path, *arguments: str, version: str = "") -> Result:
    """Admit a recorded machine."""
    if not (tmp_path / "root").exists():
        machine("hgx", tmp_path / "root")
    if version:
        (tmp_path / "rules.yaml").write_text(RULE % version)
        arguments = ("--rules", str(tmp_path / "rules.yaml"), *arguments)
    into = str(tmp_path / "node.json")
    asked = ["admit", "--root", str(tmp_path / "root"), "--into", into, *arguments]
    return CliRunner().invoke(fleet, asked)


def test_a_prolog_reports_and_never_fails(tmp_path: Path) -> None:
    """A failing one would drain the node; with --enforce it is meant to."""
    told = admit(tmp_path, version="590")
    assert told.exit_code == 0
    assert "handfast admit: refuse: " in told.output
    assert "runs driver 580.65.06" in told.output
    assert (tmp_path / "node.json").stat().st_mode & 0o777 == 0o644
    assert admit(tmp_path, "--enforce", version="590").exit_code == EXIT
    assert admit(tmp_path, "--enforce", version="580").exit_code == 0


def test_a_prolog_that_can_not_judge_says_so(tmp_path: Path) -> None:
    """And still does not drain the node."""
    told = admit(tmp_path, version="{")
    assert (told.exit_code, "not judged" in told.output) == (0, True)
    assert admit(tmp_path, "--enforce", version="{").exit_code == 3


@pytest.mark.parametrize("wrong", ["0", "xyz", "", "0 0", "00" * 65])
def test_a_challenge_that_is_none_is_wrong_usage(wrong: str) -> None:
    """Before anybody is asked, and with what one looks like."""
    done = CliRunner().invoke(fleet, ["ask", "/nowhere/n.sock", "--json", "--challenge", wrong])
    assert done.exit_code == 2
    assert "give 2 to 128 hex digits, an even number" in " ".join(done.output.split())
