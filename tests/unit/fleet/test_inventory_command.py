"""Shows what `handfast fleet` answers, to people and to programs, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from inventorykit import inventory, machine

from handfast.cli.fleet import fleet
from handfast.fleet.identity import read_statement, verify
from handfast.fleet.inventory.facts import Tier, decode, encode, gather
from handfast.link.life import Node


def command(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(fleet, [str(each) for each in arguments])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's files."""
    machine("hgx", tmp_path / "root")
    return tmp_path / "root"


def test_people_are_shown_values_states_and_reasons(root: Path) -> None:
    """A table for each tier."""
    told = command("inventory", "--root", root, "--tier", "host", "--tier", "fabric")
    assert told.exit_code == 0, told.output
    assert "580.65.06" in told.output
    assert "on the machine itself only" in told.output
    assert "nccl.version" not in told.output


def test_programs_are_given_what_can_be_read_back(root: Path) -> None:
    """The inventory as it is written to a file, and its digests."""
    told = command("inventory", "--root", root, "--json", "--tier", "host")
    assert told.exit_code == 0
    taken = decode(told.output.encode(), "told")
    assert taken.node is None
    assert taken.get("gpu.driver").value == "580.65.06"
    assert json.loads(told.output)["digests"] == {"host": taken.digest(Tier.HOST).hex()}


def test_labels_and_metrics_are_lines(root: Path) -> None:
    """One a line, for `kubectl label` and for a file."""
    told = command("inventory", "--root", root, "--labels", "--tier", "host").output.splitlines()
    assert "handfast/gpu.driver=580.65.06" in told
    text = command("inventory", "--root", root, "--metrics", "--tier", "host").output
    assert 'name="gpu.driver",state="known",value="580.65.06"} 1\n' in text


def test_a_node_that_is_enrolled_signs(root: Path, tmp_path: Path) -> None:
    """Each time in a life of its own; whoever is not enrolled can't."""
    pytest.importorskip("cryptography")
    state = tmp_path / "state"
    asked = ("inventory", "--root", root, "--tier", "host", "--json", "--state", state)
    lost = command(*asked)
    assert lost.exit_code == 1
    assert "not enrolled" in json.loads(lost.output)["error"]
    enrolled = command("enroll", state, "--json")
    assert enrolled.exit_code == 0
    nodes = [verify(read_statement(command(*asked).output.encode(), "x"), "x").node for _ in "ab"]
    assert [node.counter for node in nodes if node] == [1, 2]
    assert {node.key for node in nodes if node} == {json.loads(enrolled.output)["key"]}
    again = command("enroll", state)
    assert again.exit_code == 1
    assert "enrolled already" in again.stderr


@pytest.mark.parametrize(
    "wrong",
    [("--json", "--labels"), ("--state", "x"), ("--limit", "0"), ("--tier", "cloud")],
)
def test_what_does_not_go_together_is_wrong_usage(wrong: tuple[str, ...]) -> None:
    """Exit code 2."""
    assert command("inventory", *wrong).exit_code == 2


def write(directory: Path, **nodes: bytes) -> None:
    """Write files of nodes."""
    for name, data in nodes.items():
        (directory / f"{name}.json").write_bytes(data)


def test_skew_names_the_odd_one_and_is_no_fault(tmp_path: Path) -> None:
    """Exit code 0; the odd node, and what it says."""
    same = encode(inventory(driver="580"))
    write(tmp_path, a=same, b=same, c=encode(inventory(driver="590")), d=same)
    told = command("skew", tmp_path)
    assert told.exit_code == 0, told.output
    assert "host: 2 groups, of 3, 1 nodes" in told.output
    assert "fabric: 4 nodes say the same" in told.output
    (odd,) = [line for line in told.output.splitlines() if "590" in line]
    assert odd.split() == ["590", "1", "c"]
    answer = json.loads(command("skew", tmp_path, "--json").output)
    assert answer["sound"] is True
    assert answer["tiers"][0]["differences"][0]["readings"][1]["nodes"] == ["c"]


def test_skew_names_who_is_not_counted(tmp_path: Path) -> None:
    """Exit code 3 for what can't be read, 1 for a key that two name; both are shown."""
    write(
        tmp_path, a=encode(inventory(driver="580")), torn=b"{", odd=encode(inventory(driver=None))
    )
    told = command("skew", tmp_path)
    assert told.exit_code == 3
    assert "not counted torn" in told.output
    assert "unknown to some: driver" in told.output
    taken = encode(gather(inventory(driver="580").facts, Node("ab" * 32, "b", 1)))
    write(tmp_path, one=taken, two=taken)
    told = command("skew", tmp_path)
    assert told.exit_code == 1
    assert "refused one, two: all name the key abababababababab" in told.output
    assert json.loads(command("skew", tmp_path, "--json").output)["sound"] is False


def test_skew_of_nothing_is_no_answer(tmp_path: Path) -> None:
    """Exit code 3, and what was looked for; 2 for a directory that is not there."""
    told = command("skew", tmp_path)
    assert told.exit_code == 3
    assert "NODE.json" in told.output
    assert command("skew", tmp_path / "gone").exit_code == 2
