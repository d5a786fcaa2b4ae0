"""Shows rehearsals of real libraries: UCX in network namespaces, and NCCL at the gate.

The heavy ones download published libraries (100 MB of UCX, 700 MB of NCCL), unless LIBRARIES names
a directory that has them. They need root. What this machine does not give is named, and skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("yaml")

from handfast.errors import FormatError
from handfast.fleet.rehearse.fleet import Outcome
from handfast.fleet.rehearse.reading import Rehearsal, load
from handfast.fleet.rehearse.rehearsing import rehearse
from handfast.fleet.rehearse.report import Report, recorded, report

ROOM = Path(__file__).parent.parent / "rehearsals"
OLD, MIDDLE, NEW = "1.13.1", "1.18.1", "1.22.0"
ENDS = {(OLD, NEW), (NEW, OLD)}
LATER = {(MIDDLE, NEW), (NEW, MIDDLE)}
APART = ENDS | {(OLD, MIDDLE), (MIDDLE, OLD)}
TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0", "MEET": "listener"}
ONE_DEVICE = {"UCX_CM_USE_ALL_DEVICES": "n"}


def ask(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the rehearsals to its end."""
    return subprocess.run(
        [sys.executable, str(ROOM / script), *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libraries are, or will be."""
    given = os.environ.get("LIBRARIES")
    return Path(given) if given else tmp_path_factory.mktemp("libraries")


def get(libraries: Path, name: str) -> None:
    """Have the libraries of a rehearsal, or skip the test and say what could not be had."""
    if (done := ask("ucx_nccl_get.py", str(libraries), name)).returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])


@pytest.fixture
def namespaces(tmp_path: Path) -> None:
    """Skip where this machine makes no network namespaces, in its own words."""
    told = {"HANDFAST_REHEARSAL": json.dumps({"work": str(tmp_path), "nodes": ["a", "b"]})}
    made = ask("ucx_net.py", "up", **told)
    assert ask("ucx_net.py", "down", **told).returncode == 0
    if made.returncode:
        pytest.skip(made.stderr.strip())


@pytest.fixture
def node_names() -> None:
    """Skip where this machine gives a process no host name of its own."""
    done = subprocess.run(["unshare", "--uts", "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a rank can't be a node by name: {done.stderr.strip()}")


def go(
    monkeypatch: pytest.MonkeyPatch, file: str, nodes: tuple[str, ...], **env: str
) -> tuple[Report, dict[tuple[str, str], bool]]:
    """Go through a rehearsal on some nodes; gives its report, and which versions talked."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    rehearsal: Rehearsal = msgspec.structs.replace(load(str(ROOM / file)), nodes=nodes)
    came = rehearse(rehearsal)
    assert not came.untidy
    assert came.judged, [row.sentence for row in report(rehearsal, came).rows]
    results = recorded(rehearsal, came) if rehearsal.record else ()
    return report(rehearsal, came), {(*each.client, *each.server): each.passed for each in results}


@pytest.mark.heavy
@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(
    ("setting", "broken"),
    [
        pytest.param({"MEET": "address"}, set(), id="address"),
        pytest.param({}, APART, id="listener"),
        pytest.param({"UCX_PROTO_ENABLE": "n"}, APART | LATER, id="old protocols"),
        pytest.param(ONE_DEVICE, ENDS, id="one device"),
        pytest.param({**ONE_DEVICE, "UCX_TCP_PUT_ENABLE": "n"}, set(), id="one device, no put"),
    ],
)
def test_which_versions_of_ucx_talk_depends_on_settings(
    libraries: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: dict[str, str],
    broken: set[tuple[str, str]],
) -> None:
    """All nine ordered pairs of three versions, by each way to meet; each with itself talks."""
    get(libraries, "ucx")
    env = {"LIBRARIES": str(libraries), **TCP, **setting}
    found, passed = go(monkeypatch, "ucx.yaml", ("a", "b"), **env)
    assert len(found.rows) == len(passed) == 9
    assert {pair for pair, well in passed.items() if not well} == broken, found.rows
    bad = {row.worst for row in found.rows} - {Outcome.WORKS, Outcome.REFUSES, Outcome.FAILS}
    assert not bad, "an end hung"


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("namespaces")
def test_three_nodes_of_three_versions_of_ucx(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By UCX's listener: a fleet works where the oldest is alone, and is refused in words else."""
    get(libraries, "ucx")
    env = {"LIBRARIES": str(libraries), **TCP}
    found, _ = go(monkeypatch, "ucx.yaml", ("a", "b", "c"), **env)
    assert len(found.rows) == 27
    for row in found.rows:
        alone = len({each == OLD for each in row.versions}) == 1
        assert row.worst is (Outcome.WORKS if alone else Outcome.REFUSES), row
        assert alone or re.search(r"client [abc] \(1\.\S+\): .*; server [abc] \(1\.\S+\): ",
                                  row.sentence), row  # fmt: skip


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("node_names")
@pytest.mark.parametrize(
    ("way", "nodes"), [("preloaded", ("a", "b", "c")), ("beside", ("north", "south"))]
)
def test_ranks_of_other_versions_of_nccl_are_refused_at_the_gate(
    libraries: Path, monkeypatch: pytest.MonkeyPatch, way: str, nodes: tuple[str, ...]
) -> None:
    """Each rank is judged by the library that it was given, wherever it has it from.

    The sentence, the same on all ranks, names each node with its version; equal ones run on.
    """
    pytest.importorskip("torch")
    get(libraries, "nccl")
    found, _ = go(monkeypatch, "nccl.yaml", nodes, LIBRARIES=str(libraries), LOAD=way)
    assert len(found.rows) == 3 ** len(nodes)
    for row in found.rows:
        uniform = len(set(row.versions)) == 1
        assert row.worst is (Outcome.WORKS if uniform else Outcome.REFUSES), row
        if not uniform:
            told = row.sentence.partition("; ")[0]
            parts = re.findall(r"NCCL (\S+) on (.*?)(?=, NCCL|$)", told)
            named = {
                node: version for version, on in parts for node in re.findall(r"\((\w+)\)", on)
            }
            assert named == dict(zip(nodes, row.versions, strict=True)), row.sentence


@pytest.mark.parametrize("file", ["ucx.yaml", "nccl.yaml"])
def test_a_rehearsal_says_what_it_needs_of_the_environment(file: str) -> None:
    """With it the file can be read; without it the variable is named, before anything starts."""
    given = {"LIBRARIES": "/l", "MEET": "listener", "LOAD": "beside"}
    found = load(str(ROOM / file), given)
    assert all(each.startswith("/l/") for v in found.versions.values() for each in v.values())
    with pytest.raises(FormatError, match=r"line \d+: nothing fills \{env\.LIBRARIES\}"):
        load(str(ROOM / file), {})


def test_what_cannot_be_had_is_named(tmp_path: Path) -> None:
    """The package, and why; nothing half-got is left."""
    done = ask("ucx_nccl_get.py", str(tmp_path), "nccl", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 1
    assert "nvidia-nccl-cu12==2.19.3 could not be had: " in done.stderr
    assert list(tmp_path.iterdir()) == []
