"""Show that what docs/fleet/gate.md gives to copy does here what the page says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

import yaml
from inventorykit import machine

from handfast.fleet.gate.wire import SOCKET, request
from handfast.fleet.inventory.facts import decode
from handfast.gate import EXIT

PAGE = (Path(__file__).parents[3] / "docs" / "fleet" / "gate.md").read_text()
RUN = str(Path(SOCKET).parent)
RULES = """
format: 1
facts: {gpu.driver: driver}
rules: {driver: {source: us, scope: node, minimum: {fact: gpu.driver, version: %d}}}
"""
HANDFAST = """#!/bin/sh
case "$2" in
admit) set -- "$@" --root {0}/root --rules {0}/rules.yaml --into {0}/run/node.json ;;
node) set -- "$@" --root {0}/root --at {0}/run/node.sock ;;
ask) set -- "$@" {0}/run/node.sock ;;
esac
exec {1} -m handfast "$@"
"""
SRUN = """#!/bin/sh
[ "$1 $2 $3 $4" = "-N 2 -n 2" ] || exit 9
shift 4
exec "$@"
"""


def block(language: str, having: str) -> str:
    """The block of the page in a language that has some text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (one,) = [each for each in found if having in each]
    return one


class Node:
    """A node with these programs, whose /run is in a folder; it keeps what is logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run").mkdir()
        (folder / "bin").mkdir()
        machine("hgx", folder / "root")
        tools = {
            "handfast": HANDFAST.format(folder, shlex.quote(sys.executable)),
            "srun": SRUN,
            "logger": f'#!/bin/sh\necho "$@" >> {folder}/log\n',
        }
        for name, text in tools.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.want(580)

    def want(self, version: int) -> None:
        """Have a rule about the driver, which is 580.65.06."""
        (self.folder / "rules.yaml").write_text(RULES % version)

    def here(self, text: str) -> str:
        """A text of the page, with this node's places."""
        for place, to in ((RUN, "/run"), ("/opt/handfast/", "/"), ("/tmp/handfast-", "/handfast-")):
            text = text.replace(place, f"{self.folder}{to}")
        return text

    def start(self, text: str, **env: str) -> subprocess.Popen[str]:
        """Start a line of the page, with no more of an environment than is given."""
        return subprocess.Popen(
            ["/bin/sh", "-c", self.here(text)],
            env={"PYTHONPATH": os.pathsep.join(sys.path), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, text: str, **env: str) -> tuple[int, str]:
        """Run it to its end; its exit code, and all that it printed."""
        with self.start(text, **env) as started:
            out, errors = started.communicate(timeout=60)
        return started.returncode, out + errors

    def logged(self) -> str:
        """What was logged."""
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node without a service."""
    return Node(tmp_path)


@pytest.fixture
def served(node: Node) -> Iterator[Node]:
    """A node whose service was started by the unit's line, and ends by SIGTERM as it should."""
    (line,) = re.findall(r"^ExecStart=(.*)$", block("ini", "[Service]"), re.MULTILINE)
    with node.start(f"exec {line}") as run:
        assert "answers at" in run.stdout.readline()
        yield node
        run.terminate()
    assert run.returncode == 0


def test_the_prolog_reports_and_drains_nothing(node: Node) -> None:
    """Without a search path, and with nothing installed, too; it leaves the ranks their file."""
    script = block("sh", "PATH=")
    assert node.run(script) == (0, "")
    assert decode((node.folder / "run" / "node.json").read_bytes(), "a test").facts
    assert node.logged() == ""
    node.want(590)
    assert node.run(script) == (0, "")
    assert "handfast-admit handfast admit: refuse: " in node.logged()
    (node.folder / "bin" / "handfast").unlink()
    assert node.run(script) == (0, "")
    assert "not found" in node.logged()


def test_the_prolog_drains_for_a_broken_rule_alone_where_it_is_told_to(node: Node) -> None:
    """Not where it could not judge."""
    script = block("sh", "PATH=").replace("admit ", "admit --enforce ")
    assert node.run(script)[0] == 0
    node.want(590)
    assert node.run(script)[0] == 1
    (node.folder / "rules.yaml").write_text("{")
    assert node.run(script)[0] == 0
    assert "not judged" in node.logged()


def test_the_prolog_asks_the_service_where_there_is_one(served: Node) -> None:
    """And writes no file that would be older."""
    served.want(590)
    assert served.run(block("sh", "PATH=")) == (0, "")
    assert "runs driver 580.65.06" in served.logged()
    assert not (served.folder / "run" / "node.json").exists()


def test_a_job_asks_outside_of_its_container(served: Node) -> None:
    """And names a file of its own, which others may read and not write."""
    path = {
        "PATH": f"{served.folder}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
    }
    script = block("sh", "srun") + 'cat "$HANDFAST_GATE_NODE"'
    code, told = served.run(script, **path)
    assert code == 0
    assert decode(told.encode(), "a test").get("gpu.driver").value == "580.65.06"
    assert (served.folder / "handfast-17.json").stat().st_mode & 0o777 == 0o644


def test_the_pods_init_container_asks_what_its_ranks_ask(served: Node) -> None:
    """By one directory, mounted read-only; a broken rule ends it, and so does a service away."""
    pod: dict[str, Any] = yaml.safe_load(block("yaml", "initContainers"))["spec"]
    (volume,) = pod["volumes"]
    assert volume["hostPath"] == {"path": RUN, "type": "Directory"}
    for container in (*pod["initContainers"], *pod["containers"]):
        (mount,) = container["volumeMounts"]
        assert mount == {"name": volume["name"], "mountPath": RUN, "readOnly": True}
    (admit,) = pod["initContainers"]
    line = f"PATH={served.folder}/bin:$PATH {shlex.join(admit['command'])}"
    assert served.run(line, PATH="/usr/bin:/bin") == (0, "")
    served.want(590)
    code, told = served.run(line, PATH="/usr/bin:/bin")
    assert (code, "runs driver 580.65.06" in told) == (EXIT, True)
    code, told = served.run(line.replace("node.sock", "none.sock"), PATH="/usr/bin:/bin")
    assert (code, "not judged" in told) == (3, True)
    assert "-m, handfast.gate" in block("yaml", "initContainers")


def test_the_page_has_the_line_that_asks() -> None:
    """Byte for byte."""
    assert f"printf '{request().decode()[:-1]}\\n' | socat -t20 - UNIX-CONNECT:{SOCKET}" in PAGE
