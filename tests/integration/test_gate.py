"""Shows what a rank under torchrun sees of the gate: one line and an exit code, or its script."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("torch")

from handfast.gate import EXIT

SCRIPT = """
import os, sys
rank = os.environ["RANK"]
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
open(f"{sys.argv[1]}.{rank}", "a").write(f"{__name__} {total.item():g} {sys.argv[2:]}\\n")
dist.destroy_process_group()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and "die" in sys.argv:
    sys.exit(7)
"""

# A rank that sets another algorithm than the others: harmless to gloo, so the plain job goes on.
# It leaves its own exit code: torchrun may not wait for it, and so SIGTERM does not end it.
ODD = """
import os, runpy, signal, sys
rank, count = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
if rank == "1" and count in os.environ["ODD_IN"].split():
    os.environ["NCCL_ALGO"] = "Ring"
if rank == "1" and "ABSENT" in os.environ:
    import time
    time.sleep(300)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = f"{sys.argv[2]}-{rank}.code"
try:
    runpy.run_module("handfast.gate", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    open(code, "w").write(str(ended.code))
    raise
"""

RULES = """
format: 1
facts: {env.NCCL_ALGO: NCCL_ALGO}
rules:
  algorithm: {source: a test, scope: group, absent-differs: true, exact: [env.NCCL_ALGO]}
"""

KERNEL = """
format: 1
facts: {kernel.release: kernel}
rules:
  kernel: {source: a test, scope: node, minimum: {fact: kernel.release, version: 999}}
"""


# A rank without an agent: rank 0 holds the store, and here it is slow to come back from the gate.
ALONE = """
import os, sys, time
import handfast.gate as gate

slow, heard = int(os.environ["SLOW"]), gate.attend
def attend(*arguments):
    verdict = heard(*arguments)
    if int(os.environ["RANK"]) == slow:
        time.sleep(1)
    return verdict
gate.attend = attend
print(gate.check().level, flush=True)
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
dist.barrier()
dist.destroy_process_group()
print(f"{total.item():g}", flush=True)
"""


class Job:
    """A job of two ranks under torchrun, through the gate or without it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        for name, text in (("train.py", SCRIPT), ("odd.py", ODD), ("rules.yaml", RULES)):
            (folder / name).write_text(text)

    def run(
        self, *arguments: str, gate: bool = True, restarts: int = 0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        argv = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
        argv += [f"--max-restarts={restarts}", "--master-addr=127.0.0.1", "--master-port=0"]
        argv += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--monitor-interval=0.1"]
        script = [str(self.folder / "train.py"), str(self.log), *arguments]
        gated = [str(self.folder / "odd.py"), *script] if gate else script
        given = {"HANDFAST_GATE_RULES": str(self.folder / "rules.yaml"), "ODD_IN": "",
                 "HANDFAST_GATE_NODE": str(self.folder / "node.json")} | env  # fmt: skip
        return subprocess.run(
            [sys.executable, *argv, *gated],
            env={**os.environ, "OMP_NUM_THREADS": "1", **given},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    def told(self) -> list[str]:
        """What the ranks' scripts wrote, in order of ranks."""
        logs = sorted(self.folder.glob("log.*"))
        return [line for log in logs for line in log.read_text().splitlines()]

    def ended(self) -> list[str]:
        """With which code each rank ended by itself, in order of ranks."""
        return [code.read_text() for code in sorted(self.folder.glob("log-*.code"))]


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of the gate."""
    return re.findall(r"handfast gate: .*", done.stderr)


def codes(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The ranks' exit codes, as torchrun tells them."""
    return set(re.findall(r"exitcode *: (-?\d+)", done.stderr))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job's files."""
    return Job(tmp_path)


@pytest.mark.xdist_group("jobs")
def test_equal_ranks_run_their_script_as_if_started_without_a_gate(job: Job) -> None:
    """As `__main__`, with its arguments, and its communicator forms after the gate."""
    done = job.run("--lr", "3", HANDFAST_GATE_MODE="enforce")
    assert done.returncode == 0, done.stderr[-3000:]
    assert job.told() == ["__main__ 2 ['--lr', '3']"] * 2
    assert lines(done) == []


@pytest.mark.xdist_group("jobs")
def test_a_mixture_is_one_line_on_each_rank_and_an_exit_code(job: Job) -> None:
    """Before any communicator; observed, rank 0 says so and the job goes on, as it does plain."""
    plain = job.run(gate=False)
    seen = job.run(ODD_IN="0")
    assert (plain.returncode, seen.returncode) == (0, 0), seen.stderr[-3000:]
    assert job.told() == ["__main__ 2 []"] * 4
    (line,) = lines(seen)
    assert "would be refused: group world runs no NCCL_ALGO on rank 0 (" in line
    warned = job.run(ODD_IN="0", HANDFAST_GATE_MODE="warn")
    assert warned.returncode == 0
    assert len(lines(warned)) == 2
    before = job.told()
    done = job.run(ODD_IN="0", HANDFAST_GATE_MODE="enforce")
    assert job.told() == before
    assert len(lines(done)) == 2, done.stderr[-3000:]
    assert len(set(lines(done))) == 1
    assert "NCCL_ALGO Ring on rank 1 (" in lines(done)[0]
    assert job.ended() == [str(EXIT)] * 2
    assert codes(done) == {str(EXIT)}


@pytest.mark.xdist_group("jobs")
def test_every_round_is_asked_again(job: Job) -> None:
    """The first is fine, and dies; the second has a mixture, and is not judged by the first."""
    done = job.run("die", restarts=1, ODD_IN="1", HANDFAST_GATE_MODE="enforce")
    assert job.told() == ["__main__ 2 ['die']"] * 2
    assert len(lines(done)) == 2, done.stderr[-3000:]
    assert str(EXIT) in codes(done)
    cured = job.run(restarts=1, ODD_IN="0", HANDFAST_GATE_MODE="enforce")
    assert cured.returncode == 0, cured.stderr[-3000:]
    assert len(lines(cured)) == 2


@pytest.mark.xdist_group("jobs")
def test_a_rank_that_never_comes_is_named_with_its_node(job: Job) -> None:
    """At the timeout, by those who came; they end, instead of hanging in their communicator."""
    env = {"HANDFAST_GATE_MODE": "enforce", "HANDFAST_GATE_TIMEOUT_S": "3", "ABSENT": "1"}
    done = job.run(**env)
    (line,) = lines(done)
    assert re.search(r"refused: rank 1 \(.+\) of 2 did not come to the gate in time", line)
    assert str(EXIT) in codes(done)
    assert job.told() == []


def alone(job: Job, *present: int, **given: str) -> list[tuple[int, str, str]]:
    """Start some of two ranks without an agent; how each ended, and what it said."""
    (job.folder / "alone.py").write_text(ALONE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLOW": "9",
            "OMP_NUM_THREADS": "1", "HANDFAST_GATE_MODE": "enforce",
            "HANDFAST_GATE_RULES": str(job.folder / "rules.yaml"),
            "HANDFAST_GATE_NODE": str(job.folder / "node.json")}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(job.folder / "alone.py")],
            env={**os.environ, **told, **given, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in present
    ]
    try:
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *each) for rank, each in zip(ranks, said, strict=True)]


@pytest.mark.xdist_group("jobs")
@pytest.mark.parametrize("slow", [0, 1])
def test_without_an_agent_the_scripts_own_rendezvous_outlives_the_gates(
    job: Job, slow: int
) -> None:
    """Rank 0 holds the store: whoever leaves the gate first finds it, and does not lose it."""
    ended = alone(job, 0, 1, SLOW=str(slow))
    assert [each[:2] for each in ended] == [(0, "fine\n2\n")] * 2, ended


@pytest.mark.xdist_group("jobs")
def test_without_an_agent_a_rank_that_never_comes_is_named(job: Job) -> None:
    """Torch would wait for all before it let anybody meet, and name nobody."""
    ((code, out, err),) = alone(job, 0, HANDFAST_GATE_TIMEOUT_S="2")
    assert (code, out) == (1, "")
    assert "Refused: handfast gate: refused: rank 1 of 2 did not come to the gate in time" in err


@pytest.mark.xdist_group("jobs")
def test_what_the_nodes_service_tells_is_judged(job: Job) -> None:
    """Both ranks ask the socket of this node, and hear what its service finds on the host."""
    (job.folder / "rules.yaml").write_text(KERNEL)
    path = str(job.folder / "n.sock")
    with subprocess.Popen(
        [sys.executable, "-m", "handfast", "fleet", "node", "--at", path],
        stdout=subprocess.PIPE,
        text=True,
    ) as served:
        assert "answers at" in served.stdout.readline()
        done = job.run(HANDFAST_GATE_MODE="enforce", HANDFAST_GATE_NODE=path)
        served.terminate()
    assert served.returncode == 0
    assert job.told() == []
    assert len(lines(done)) == 2, done.stderr[-3000:]
    release = re.escape(os.uname().release)
    assert re.search(rf"refused: rank.* runs? kernel {release}; this job needs", lines(done)[0])
    assert job.ended() == [str(EXIT)] * 2
    assert codes(done) == {str(EXIT)}
