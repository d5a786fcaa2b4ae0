"""Shows that a rank goes on when its agent dies or its domain fails, and says so when it can't.

Agents are processes as they are in a job, killed by SIGKILL; where a disk has to fail at a given
call, the agent is a thread of this process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from agentkit import HASTY, wait_for
from hostkit import PATIENCE_S, Job, Node, Rank

from handfast.agent import process
from handfast.agent.keeper import Keeper
from handfast.agent.local import AgentGone, Client
from handfast.agent.process import connect_or_start
from handfast.checkpoint.connection import Connection
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Staged, decode_record
from handfast.core.retain import Keep
from handfast.errors import Blocked, Refused, SaveFailed, Superseded
from handfast.store.claims import domain_path, incarnations
from handfast.store.shelf import Shelf
from handfast.testing.faults import FaultyFiles

HELD_AGENT = str(Path(__file__).parents[2] / "integration" / "held_agent.py")
ONE, TWO = Epoch(1, 1), Epoch(1, 2)


class Agents:
    """Agents in processes of their own, by the name of their node; each is ended by its pidfd."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.program = [sys.executable, "-m", "handfast.agent"]
        self.held = home / "held"
        self.pids: dict[str, list[int]] = {}
        self._pidfds: dict[int, int] = {}

    def connect(self, label: str) -> Callable[[], Client]:
        """What a trainer of this node does to reach its agent."""

        def connect() -> Client:
            env = ["/usr/bin/env", f"HANDFAST_NODE={label}", f"HELD_AGENT={self.held}"]
            client = connect_or_start(
                f"{self.home}/{label}", self.log(label), argv=[*env, *self.program]
            )
            pid = client.agent_pid
            if pid not in self._pidfds:
                self._pidfds[pid] = os.pidfd_open(pid)
                self.pids.setdefault(label, []).append(pid)
            return client

        return connect

    def log(self, label: str) -> str:
        return f"{self.home}/{label}.log"

    def signal(self, label: str, number: int = signal.SIGKILL) -> None:
        """Signal the newest agent of a node; SIGKILL: until it is gone."""
        pidfd = self._pidfds[self.pids[label][-1]]
        signal.pidfd_send_signal(pidfd, number)
        if number == signal.SIGKILL:
            assert select.select([pidfd], [], [], 30)[0]

    def hold(self, what: str) -> None:
        """Let calls of this kind on this path wait, from now on; see held_agent.py."""
        self.held.with_suffix(".new").write_text(what)
        self.held.with_suffix(".new").rename(self.held)

    def reached(self) -> None:
        """Wait until such a call waits."""
        wait_for(self.held.with_suffix(".reached").exists, "the held call")

    def end(self) -> None:
        """Leave none."""
        for pidfd in self._pidfds.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert select.select([pidfd], [], [], 30)[0]
            os.close(pidfd)


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agents]:
    """Agents that are gone after the test."""
    with tempfile.TemporaryDirectory(prefix="hf-") as home:
        monkeypatch.setenv("XDG_RUNTIME_DIR", home)
        found = Agents(Path(home))
        yield found
        found.end()


@pytest.fixture
def root(tmp_path: Path) -> str:
    """The directory of a run."""
    return str(tmp_path / "run")


def votes(root: str, rank: int = 0) -> list[Epoch]:
    """What a rank's domain has voted STAGED on."""
    records = Shelf(HASTY, root, f"rank-{rank:05d}").records()
    found = [decode_record(data) for data in records]
    return [record.epoch for record in found if isinstance(record, Staged)]


def data_files(root: str, rank: int = 0) -> list[str]:
    path = domain_path(root, f"rank-{rank:05d}")
    return sorted(p.name for p in Path(path).glob("*/chunks/*"))


def test_an_agent_that_was_killed_between_calls_is_replaced(agents: Agents, root: str) -> None:
    """Shows that training goes on, that the generation stays, and that nothing is saved twice."""
    job = Job(root, [agents.connect("node0")])
    job.restore()
    job.save(1)
    for step in (2, 3):
        agents.signal("node0")
        assert job.save(step) == Epoch(1, step)
    assert len(set(agents.pids["node0"])) == 3
    assert job[0].session.snapshot.incarnation == 3
    assert votes(root) == [Epoch(1, step) for step in (1, 2, 3)]
    assert job.restore() == Epoch(1, 3)
    job.close()


@pytest.mark.parametrize("killed", [0, 1], ids=["who dials", "who is dialed"])
def test_an_agent_that_was_killed_while_a_rank_waits_is_found_again_by_its_peers(
    agents: Agents, root: str, killed: int
) -> None:
    """Shows that a new agent takes its predecessor's port in the same round, so that the peers,
    which know no other, come back to it, and what both ranks have saved converges."""
    labels = ["node0", "node1"]
    job = Job(root, [agents.connect(label) for label in labels], labels)
    job.restore()
    job.save(1)
    waiting, late = job[killed], job[1 - killed]
    waiting.save(2)
    waiting.session.wait_persisted(TWO, PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(waiting.converged, TWO)
        agents.signal(labels[killed])
        wait_for(lambda: len(agents.pids[labels[killed]]) == 2, "the new agent")
        assert not done.done()
        late.save(2)
        assert done.result(PATIENCE_S) == TWO
    assert late.converged(TWO) == TWO
    assert job.save(3) == Epoch(1, 3)
    assert votes(root, killed) == [Epoch(1, step) for step in (1, 2, 3)]
    job.close()


def test_an_agent_that_is_killed_in_the_middle_of_a_call_is_asked_again(
    agents: Agents, root: str
) -> None:
    """Shows that a save whose agent dies before it has answered is taken by the next one."""
    job = Job(root, [agents.connect("node0")])
    job.restore()
    job.save(1)
    agents.signal("node0", signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(job[0].save, 2)
        with contextlib.suppress(TimeoutError):
            saving.result(0.1)
        assert not saving.done()
        agents.signal("node0")
        assert saving.result(PATIENCE_S) == TWO
    assert job[0].converged(TWO) == TWO
    assert votes(root) == [ONE, TWO]
    job.close()


def test_an_image_that_was_staged_and_not_persisted_is_handed_over_again(
    agents: Agents, root: str
) -> None:
    """Shows that an agent killed in the middle of a write costs nothing while the trainer lives:
    the image is still in its memory, is not overwritten meanwhile, and is saved whole."""
    agents.program = [sys.executable, HELD_AGENT]
    job = Job(root, [agents.connect("node0")])
    job.restore()
    job.save(1)
    agents.hold("pwrite /chunks/")
    assert job[0].save(2) == TWO
    agents.reached()
    assert votes(root) == [ONE]
    agents.signal("node0")
    agents.held.unlink()
    assert (
        job[0].session.staging.image_for(job[0].plan, 1, 0.0) is None
    )  # it holds an epoch that has no vote
    assert job[0].converged(TWO) == TWO
    assert votes(root) == [ONE, TWO]
    assert job.restore() == TWO  # which compares every byte
    job.close()


def test_an_interrupt_while_an_agent_is_replaced_is_made_up_for(
    agents: Agents, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a rank whose new agent was reached, and not told anything yet, tells it at the
    next call, whatever the agent says meanwhile."""
    job = Job(root, [agents.connect("node0")])
    job.restore()
    job.save(1)
    agents.signal("node0")

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "_open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job[0].save(2)
    assert job[0].save(2) == TWO
    assert job[0].converged(TWO) == TWO
    job.close()


def test_an_image_that_was_voted_for_is_not_saved_again(agents: Agents, root: str) -> None:
    """Shows that after its agent's death a rank goes by the journal: the vote is there, the image
    is free, and the epoch converges once the other rank has voted."""
    labels = ["node0", "node1"]
    job = Job(root, [agents.connect(label) for label in labels], labels)
    job.restore()
    job[0].save(1)
    job[0].session.wait_persisted(ONE, PATIENCE_S)
    agents.signal("node0")
    assert job[0].session.staging.image_for(job[0].plan, 1, PATIENCE_S) is not None
    assert job[0].save(2) == TWO
    job[0].session.wait_persisted(TWO, PATIENCE_S)
    assert votes(root) == [ONE, TWO]
    assert data_files(root) == ["1-1.safetensors", "1-2.safetensors"]
    for step in (1, 2):
        job[1].save(step)
    assert set(job.all(lambda rank: rank.converged(TWO))) == {TWO}
    assert votes(root) == [ONE, TWO]
    job.close()


@pytest.mark.parametrize("kind", ["pwrite", "fdatasync"])
def test_a_domain_whose_journal_failed_is_opened_anew_under_the_same_agent(
    agents: Agents, root: str, kind: str
) -> None:
    """Shows that one bad write costs an incarnation and neither the agent, the generation, nor the
    epoch that was being saved."""
    files = FaultyFiles(HASTY, error=errno.EIO, kinds=(kind,), path="/journal")
    node = Node(str(agents.home), files=files)
    job = Job(root, [node.client])
    job.restore()
    job.save(1)
    wait_for(lambda: not any(host.busy for host in node.agent._hosts.values()))
    files.arm(1)
    assert job[0].save(2) == TWO
    assert job[0].converged(TWO) == TWO
    assert files.fired
    assert job[0].session.snapshot.incarnation == 2
    assert job[0].session.generation == 1
    assert votes(root) == [ONE, TWO]
    assert job.save(3) == Epoch(1, 3)
    job.close()
    node.close()


def test_a_domain_that_fails_again_and_again_is_given_up_aloud(
    agents: Agents, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a domain which can be opened and fails at once, each time, ends the waiting with
    its last cause; and that the rank goes on once it works again."""
    node = Node(str(agents.home))
    job = Job(root, [node.client])
    job.restore()
    assert job.save(1) == ONE
    tries = []

    def commit(keeper: Keeper, records: object) -> None:
        tries.append(keeper)
        raise SaveFailed("the disk takes nothing")

    with monkeypatch.context() as broken:
        broken.setattr(Keeper, "commit", commit)
        with pytest.raises((AgentGone, SaveFailed), match=r"5 times in a row.*takes nothing"):
            job.save(2)
        assert len(tries) == len(set(tries)) == 6
    assert job.save(2) == TWO
    job.close()
    node.close()


def test_a_rank_whose_agent_can_t_be_replaced_is_told_where_to_look(
    agents: Agents, root: str
) -> None:
    """Shows that the error names socket and log, and quotes what the agent said last; and that the
    rank goes on as soon as an agent can be started again."""
    job = Job(root, [agents.connect("node0")])
    job.restore()
    job.save(1)
    good, agents.program = agents.program, [sys.executable, "-c", "raise SystemExit('no luck')"]
    agents.signal("node0")
    for ask in (lambda: job[0].save(2), lambda: job[0].converged(TWO)):
        with pytest.raises(AgentGone, match="no luck") as caught:
            ask()
        assert caught.value.log == agents.log("node0")
        assert caught.value.socket
        assert agents.log("node0") in str(caught.value)
        assert caught.value.socket in str(caught.value)
    agents.program = good
    assert job.save(2) == TWO
    job.close()


@pytest.mark.parametrize("where", ["launcher", "agent"])
def test_an_agent_that_could_not_be_started_is_started_again(
    where: str, agents: Agents, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that one failure is none, at the start and at a save; where each start fails, a save
    says so, and at the next round every rank is refused, without a verdict on what is stored."""
    trap = tmp_path / "trap"
    spring = f"import os; os.path.exists({str(trap)!r}) and (os.unlink({str(trap)!r}), os._exit(7))"
    if where == "launcher":
        monkeypatch.setattr(process, "_LAUNCHER", f"{spring}\n{process._LAUNCHER}")
    else:
        run = (
            "import runpy; runpy.run_module('handfast.agent', run_name='__main__', alter_sys=True)"
        )
        agents.program = [sys.executable, "-c", f"{spring}\n{run}"]
    trap.touch()
    job = Job(root, [agents.connect("node0")] * 2)
    job.restore()
    job.save(1)
    agents.signal("node0")
    trap.touch()
    assert job.save(2) == TWO
    assert not trap.exists()
    agents.signal("node0")
    agents.program = ["/bin/sh", "-c", "echo no luck; exit 7"]
    with pytest.raises(AgentGone, match="no luck"):
        job[0].save(3)
    for error in job.all(refused):
        assert error.verdict is None
        assert re.search(r"^a rank can't take part \[rank 0: .*no luck", str(error), re.DOTALL)
        assert "missing" not in str(error)
    job.close()


def refused(rank: Rank) -> Refused:
    """The error that a rank's restore ends with."""
    with pytest.raises(Refused) as caught:
        rank.restore()
    return caught.value


def test_who_is_waited_for_is_named(agents: Agents, root: str) -> None:
    """Shows that a save which can't converge says whose vote is missing, and on which node, and
    that it converges afterwards all the same."""
    node = Node(str(agents.home))
    job = Job(root, [node.client] * 2)
    job.restore()
    job[0].save(1)
    job[0].session.wait_persisted(ONE, PATIENCE_S)
    with pytest.raises(Blocked) as caught:
        job[0].session.wait_converged(ONE, 0.3)
    (missing,) = caught.value.by
    assert missing.startswith("rank-00001-")
    assert missing.endswith("(on node0)")
    assert "epoch 1/1 is not done after 0.3 s (converging)" in str(caught.value)
    job[1].save(1)
    assert set(job.all(lambda rank: rank.converged(ONE))) == {ONE}
    job.close()
    node.close()


def test_a_restore_that_waits_for_a_rank_names_it(agents: Agents, root: str) -> None:
    """Shows that a rank whose process never accepts blocks by name."""
    node = Node(str(agents.home))
    job = Job(root, [node.client] * 2)
    asked = threading.Event()

    def half(rank: Rank) -> None:
        rank.session.start(want=None, keep=Keep(), window=2, drain_s=1.0)
        proposal = rank.session.await_proposal(PATIENCE_S)
        assert proposal.epoch == GENESIS
        if rank.rank == 1:
            assert asked.wait(PATIENCE_S)
            return
        rank.session.accept(proposal)
        with pytest.raises(Blocked) as caught:
            rank.session.await_certificate(0.3)
        asked.set()
        assert [name.startswith("rank-00001-") for name in caught.value.by] == [True]
        assert "(ready)" in str(caught.value)

    job.all(half)
    job.close()
    node.close()


def test_a_job_that_was_overtaken_stops_and_claims_nothing(agents: Agents, root: str) -> None:
    """Shows that a trainer of an older generation, whose agent is gone and which finds another
    one, is told to stop before it takes the domain away from the new job."""
    nodes = [Node(str(agents.home), label) for label in ("node0", "node1", "new0", "late0")]
    old = Job(root, [node.client for node in nodes[:2]], ["node0", "node1"])
    old.restore()
    old.save(1)
    visitor = nodes[1].client()  # keeps this agent from ending as soon as all is settled
    old[1].close()
    nodes[0].close()
    new = Job(root, [nodes[2].client, nodes[1].client], ["new0", "node1"])
    assert new.restore() == ONE
    claimed = incarnations(HASTY, domain_path(root, "rank-00000"))
    old[0].session._line._connect = nodes[3].client
    for ask in (lambda: old[0].save(2), lambda: old[0].session.wait_converged(TWO, PATIENCE_S)):
        with pytest.raises(Superseded, match=r"generation 2 has begun.*generation 1, must stop"):
            ask()
    assert incarnations(HASTY, domain_path(root, "rank-00000")) == claimed
    assert new.save(2) == Epoch(2, 2)
    assert votes(root) == [ONE, Epoch(2, 2)]
    new.close()
    old.close()
    visitor.close()
    for node in nodes:
        if not node.ended():
            node.close()


def test_an_acceptance_that_an_agent_heard_too_early_or_died_of_is_said_again(
    agents: Agents, root: str
) -> None:
    """Shows that an agent killed inside of a restore, between the proposal and the acceptance, is
    replaced by one that gets there, too: before all have frozen again it can't take the word."""
    connects = [agents.connect("node0"), agents.connect("node1")]
    job = Job(root, connects, ["node0", "node1"])
    job.restore()
    job.save(1)

    def again(rank: Rank) -> Epoch:
        rank.session.start(want=None, keep=Keep(), window=2, drain_s=1.0)
        proposal = rank.session.await_proposal(PATIENCE_S)
        if rank is job[0]:
            agents.signal("node0")
        rank.session.accept(proposal)
        return rank.session.await_certificate(PATIENCE_S).base

    assert set(job.all(again)) == {ONE}
    job.close()


def test_a_clock_that_is_set_back_changes_nothing(
    agents: Agents, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that neither the time of day nor the age of a file decides anything: each look at the
    clock is an hour before the last one, and the older epoch's files are the younger ones."""
    hours = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * 10**9)
    for expected, saved in ((GENESIS, 1), (ONE, 2), (Epoch(2, 2), 3)):
        node = Node(str(agents.home), f"node{saved}")
        job = Job(root, [node.client], [f"node{saved}"])
        assert job.restore() == expected
        assert job.save(saved).step == saved
        job.close()
        node.close()
        for age, path in enumerate(sorted(Path(root).rglob("*"), key=lambda p: p.name)):
            os.utime(path, (1e9 - age, 1e9 - age))


def test_each_opening_is_one_incarnation(agents: Agents, root: str) -> None:
    """Shows that restores under one agent claim nothing anew."""
    node = Node(str(agents.home))
    job = Job(root, [node.client])
    for _ in range(3):
        job.restore()
    assert incarnations(HASTY, domain_path(root, "rank-00000")) == [1]
    job.close()
    node.close()
    shutil.rmtree(root)
