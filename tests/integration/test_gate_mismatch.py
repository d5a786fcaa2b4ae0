"""Shows the gate on a real mixture: two ranks whose versions of UCX hang on each other.

Without the gate the job hangs at its first big message, so a limit ends it here. It needs root,
and downloads UCX (81 MB) unless LIBRARIES names a directory that has it. What this machine does
not give is named, and skipped. `-rP` shows what the ranks said, and when.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("torch")

from handfast.gate import EXIT

ROOM = Path(__file__).parent.parent / "rehearsals"
OLD, MIDDLE, NEW = "1.14.1", "1.18.1", "1.20.0"  # the middle one talks to both
WHEELS = {OLD: "1.14.1.post1", MIDDLE: MIDDLE, NEW: NEW}
LIMIT_S = 10.0  # from when both have begun; ranks that don't hang need 0.1 s
TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0"}
NODES = ("node-a", "node-b")
NAMED = 'printf %s "$0" >/proc/sys/kernel/hostname && exec env "$@"'
BEGINS = "begins with UCX "
GATE = ("-m", "handfast.gate")
RULES = """
format: 1
facts: {ucx.version: UCX}
rules:
  ucx: {source: our own rehearsal, scope: group,
        must-probe: {probe: ucx-tag-send, facts: [ucx.version]}}
"""

pytestmark = pytest.mark.heavy


class Rank:
    """A rank on a node of its own by name and network, with its own UCX mapped ahead."""

    def __init__(self, job: Job, rank: int, version: str, *through: str, **env: str) -> None:
        site = job.libraries / f"ucx-{version}/libucx/lib"
        of_torchrun = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1",
                       "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1",
                       "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
        self._process = subprocess.Popen(
            ["nsenter", f"--net={job.folder}/{NODES[rank]}.net", "unshare", "--uts",
             "sh", "-c", NAMED, NODES[rank],
             f"LD_PRELOAD={site}/libucp.so.0", f"LD_LIBRARY_PATH={site}",
             sys.executable, *through, str(ROOM / "ucx_rank.py"), str(site), version],
            env={**os.environ, **TCP, **of_torchrun, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self._rank, self._began = rank, time.monotonic()
        self.lines: list[str] = []
        self.settled = threading.Event()  # it has begun, or ended
        self._ear = threading.Thread(target=self._hear)
        self._ear.start()

    def _hear(self) -> None:
        for line in self._process.stdout or ():
            self._show(line.rstrip())
            self.lines.append(line.rstrip())
            if BEGINS in line:
                self.settled.set()
        self.settled.set()

    def _show(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:5.1f} s  rank {self._rank}  {line}")

    def wait(self, deadline: float) -> int | None:
        """Give its exit code; None where it is still there at the deadline."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        code = self._process.poll()
        if code is not None:
            self._ear.join()
        self._show("is still there" if code is None else f"ended with {code}")
        return code

    def end(self) -> None:
        """Kill it, if it is still there."""
        self._process.kill()
        self._process.wait()
        self._ear.join()
        if self._process.stdout:
            self._process.stdout.close()

    @property
    def begun(self) -> bool:
        """Whether it came to its first call of UCX."""
        return any(line.startswith(BEGINS) for line in self.lines)

    @property
    def gate(self) -> list[str]:
        """What the gate said on it."""
        return [line for line in self.lines if line.startswith("handfast gate: ")]

    @property
    def step(self) -> str:
        """The last that it said itself; UCX's own log has a bracket in front."""
        return ([""] + [line for line in self.lines if not line.startswith("[")])[-1]


class Job:
    """Jobs of two ranks, in a folder that has their nodes' networks."""

    def __init__(self, folder: Path, libraries: Path) -> None:
        self.folder = folder
        self.libraries = libraries
        self.rules = folder / "rules.yaml"
        self.rules.write_text(RULES)

    def run(self, versions: tuple[str, str], *through: str, **env: str) -> list[Rank]:
        """Run it to its end or the limit; ``codes`` has the ranks' exit codes, or None."""
        print(f"\nUCX {' and '.join(versions)} {' '.join(through)} {env}")
        ranks = [Rank(self, n, each, *through, **env) for n, each in enumerate(versions)]
        try:
            for rank in ranks:
                rank.settled.wait(60)
            deadline = time.monotonic() + LIMIT_S
            self.codes = [rank.wait(deadline) for rank in ranks]
            self.steps = [rank.step for rank in ranks]  # now, before one hears of another's end
        finally:
            for rank in ranks:
                rank.end()
        return ranks

    def enforce(self, versions: tuple[str, str], **env: str) -> list[Rank]:
        """Run it through the gate, under the site's rules."""
        return self.run(versions, *GATE, HANDFAST_GATE_MODE="enforce", **self.site, **env)

    @property
    def site(self) -> dict[str, str]:
        """Where the site's rules are."""
        return {"HANDFAST_GATE_RULES": str(self.rules)}


@contextmanager
def networks(folder: Path) -> Iterator[str]:
    """Make the nodes' networks, and take them down again; gives why this can't be, or nothing."""
    told = {"HANDFAST_REHEARSAL": json.dumps({"work": str(folder), "nodes": NODES})}
    net = [sys.executable, str(ROOM / "ucx_net.py")]
    env = {**os.environ, **told}
    made = subprocess.run([*net, "up"], env=env, capture_output=True, text=True, check=False)
    try:
        yield made.stderr.strip()
    finally:
        subprocess.run([*net, "down"], env=env, check=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where this machine gives a process no name or no network of its own."""
    argv = ["unshare", "--uts", "true"]
    named = subprocess.run(argv, capture_output=True, text=True, check=False)
    if named.returncode:
        pytest.skip(f"a rank can't be a node by name: {named.stderr.strip()}")
    with networks(tmp_path_factory.mktemp("networks")) as why:
        if why:
            pytest.skip(why)


@pytest.fixture(scope="module")
def libraries(nodes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the versions are; skip and say what could not be had."""
    given = os.environ.get("LIBRARIES")
    place = Path(given) if given else tmp_path_factory.mktemp("libraries")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOM))
        import ucx_nccl_get

        wanted = {version: f"libucx-cu12=={wheel}" for version, wheel in WHEELS.items()}
        patch.setitem(ucx_nccl_get.WANTED, "ucx", wanted)
        if missing := ucx_nccl_get.main(str(place), "ucx"):
            pytest.skip(missing)
    return place


@pytest.fixture
def job(tmp_path: Path, libraries: Path) -> Iterator[Job]:
    """Jobs on two nodes, whose networks are gone after the test."""
    with networks(tmp_path) as why:
        assert not why
        yield Job(tmp_path, libraries)


@pytest.fixture(scope="module")
def record(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rehearse each pair of the versions by the command, and give what it recorded."""
    folder = tmp_path_factory.mktemp("rehearsal")
    rest = (ROOM / "ucx.yaml").read_text().partition("setup:")[2]
    ours = "".join(f'  {v}: {{lib: "{{env.LIBRARIES}}/ucx-{v}/libucx/lib"}}\n' for v in WHEELS)
    text = f"rehearsal: UCX\nnodes: [a, b]\nversions:\n{ours}setup:{rest}"
    (folder / "ucx.yaml").write_text(text.replace("{here}", str(ROOM)))
    done = subprocess.run(
        [sys.executable, "-m", "handfast", "fleet", "rehearse", str(folder / "ucx.yaml"),
         "--record", str(folder / "probed.jsonl")],
        env={**os.environ, **TCP, "LIBRARIES": str(libraries), "MEET": "listener"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode == 1, "some mixture hangs"
    return folder / "probed.jsonl"


@pytest.mark.parametrize("versions", [(OLD, NEW), (NEW, OLD)], ids="-".join)
def test_without_the_gate_the_job_hangs(job: Job, versions: tuple[str, str]) -> None:
    """Small messages pass, both ways; then the older sends 2 MiB, and the newer waits for it.

    It is the same whoever dials. Neither ends, and each version by itself comes to its end.
    """
    job.run(versions)
    assert job.codes == [None, None]
    steps = dict(zip(versions, job.steps, strict=True))
    assert steps == {OLD: "sends 2,097,152 bytes", NEW: "waits for 2,097,152 bytes"}
    job.run((versions[0], versions[0]))
    assert job.codes == [0, 0]
    assert job.steps == ["has all messages"] * 2


def test_the_gate_ends_it_before_the_first_call_of_ucx(job: Job) -> None:
    """Both ranks say the same line, which has ranks, nodes and versions, and end with 96.

    The file of rules is a site's, in which the rule refuses what was not probed.
    """
    first, second = job.enforce((OLD, NEW))
    assert job.codes == [EXIT, EXIT]
    assert first.lines == second.lines == first.gate
    line, _ = first.gate
    assert line.startswith(
        "handfast gate: refused: rank 0 (node-a) runs UCX 1.14.1 and talks to rank 1 (node-b), "
        "which runs UCX 1.20.0; this job needs probe ucx-tag-send to have passed "
    )


@pytest.mark.timeout(600)
def test_what_was_rehearsed_decides(job: Job, record: Path) -> None:
    """Pairs that passed run to their end, though older and newer than the pair that did not."""
    found = [json.loads(line) for line in record.read_text().splitlines()]
    failed = {(*each["client"], *each["server"]) for each in found if not each["passed"]}
    assert len(found) == 9
    assert failed == {(OLD, NEW), (NEW, OLD)}
    probed = {"HANDFAST_GATE_PROBED": str(record)}
    for versions in ((OLD, MIDDLE), (MIDDLE, NEW)):
        ranks = job.enforce(versions, **probed)
        assert job.codes == [0, 0]
        assert job.steps == ["has all messages"] * 2
        assert not any(rank.gate for rank in ranks)
    ranks = job.enforce((NEW, OLD), **probed)
    assert job.codes == [EXIT, EXIT]
    assert not any(rank.begun for rank in ranks)
    assert all("refused: rank 0 (node-a) runs UCX 1.20.0" in rank.gate[0] for rank in ranks)


def test_by_default_rank_0_says_it_and_the_job_goes_on(job: Job) -> None:
    """The mode is observe: the job is not stopped, and so it hangs."""
    first, second = job.run((OLD, NEW), *GATE, **job.site)
    (line,) = first.gate
    assert line.startswith("handfast gate: would be refused: rank 0 (node-a) runs UCX 1.14.1 and ")
    assert second.gate == []
    assert first.begun
    assert second.begun
    assert job.codes == [None, None]


def test_the_shipped_rules_only_warn_of_it(job: Job) -> None:
    """In enforce mode, too: which pairs hang is known where it was tried, so a site says it."""
    first, second = job.run((OLD, NEW), *GATE, HANDFAST_GATE_MODE="enforce")
    assert first.gate[0].startswith("handfast gate: warning: ")
    assert first.begun
    assert second.begun
    assert job.codes == [None, None]
