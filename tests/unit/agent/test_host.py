"""Shows that a node's agent serves its trainers and outlives them, and talks to other agents.

Agents run in threads of this process, with sockets and stores as they are; trainers that have to
die are processes. What kills agents is in the tests of surviving, beside those of the Checkpointer.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agentkit import HASTY, RUN, content, memory, open_fds, plan, roster, wait_for
from hostkit import PATIENCE_S, Job, Node, Rank, seed

from handfast.agent import frames, witness
from handfast.agent import seat as seats
from handfast.agent.domain import DomainHost
from handfast.agent.frames import CallFailed
from handfast.agent.joining import Opened, Round, life_of
from handfast.agent.links import Links
from handfast.agent.local import AgentGone, Client
from handfast.agent.server import Trainer
from handfast.agent.speech import Said
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Knows, Message, Staged, decode_record, encode
from handfast.core.verdict import Verdict
from handfast.errors import FormatError, Refused, SaveFailed
from handfast.link.records import Records
from handfast.store.claims import domain_path, identify
from handfast.store.manifest import tensor_digest
from handfast.store.shelf import Shelf
from handfast.testing.faults import Hasty

TRAINER = str(Path(__file__).with_name("plain_trainer.py"))
SECRET = bytes(32)


@pytest.fixture
def home() -> Iterator[str]:
    """A directory with a short name, for sockets."""
    with tempfile.TemporaryDirectory(prefix="hf-") as path:
        yield path


@pytest.fixture
def root(tmp_path: Path) -> str:
    """The directory of a run."""
    return str(tmp_path / "run")


@pytest.fixture
def start(home: str) -> Iterator[Callable[..., Node]]:
    """Start agents; all have ended after the test."""
    nodes: list[Node] = []

    def begin(label: str = "node0", **options: Any) -> Node:
        nodes.append(Node(home, label, **options))
        return nodes[-1]

    yield begin
    for node in nodes:
        node.close()


class Process:
    """A trainer in a process of its own."""

    def __init__(self, node: Node, root: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, TRAINER, root, "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PLAIN_SOCKET": node.path, "HANDFAST_NODE": node.label},
        )
        assert self.hear() == "ready"

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def hear(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def do(self, line: str) -> str:
        self.tell(line)
        return self.hear()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)
        self.popen.wait(30)

    def end(self) -> None:
        self.kill()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture
def trainer(root: str) -> Iterator[Callable[[Node], Process]]:
    """Start trainers; all are gone after the test."""
    started: list[Process] = []

    def begin(node: Node) -> Process:
        started.append(Process(node, root))
        return started[-1]

    yield begin
    for process in started:
        process.end()


def votes(root: str, name: str = "rank-00000") -> list[Epoch]:
    """What a domain has voted STAGED on, as its journals say."""
    records = [decode_record(data) for data in Shelf(HASTY, root, name).records()]
    return [record.epoch for record in records if isinstance(record, Staged)]


class Gate(Hasty):
    """Images are written only while the gate is open."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.reached = threading.Event()

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if "/chunks/" in os.readlink(f"/proc/self/fd/{fd}"):
            self.reached.set()
            assert self.may.wait(60)
        return super().pwrite(fd, data, offset)


# --- convergence ------------------------------------------------------------------------------


def test_the_domains_of_one_node_converge_without_any_network(
    start: Callable[..., Node], root: str
) -> None:
    node = start()
    job = Job(root, [node.client] * 3)
    assert job.restore() == GENESIS
    assert job.save(1) == Epoch(1, 1)
    with node.client() as client:
        status = client.call("status")
    assert len(status["domains"]) == 3
    assert not status["links"]
    job.close()


def test_a_trainer_has_its_answer_before_its_image_is_worked_on(
    start: Callable[..., Node], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a save does not wait for the GIL while a writer encodes what it was handed."""
    order: list[str] = []
    reply, blocking = Trainer._reply, DomainHost._blocking

    def replied(self: Trainer, message: Any, fds: Sequence[int] = ()) -> None:
        if "taken" in getattr(message, "fields", ()):
            order.append("answer")
        reply(self, message, fds)

    async def worked(self: DomainHost, work: Callable[..., Any], *args: object) -> Any:
        if work == self.keeper.write:
            order.append("write")
        return await blocking(self, work, *args)

    monkeypatch.setattr(Trainer, "_reply", replied)
    monkeypatch.setattr(DomainHost, "_blocking", worked)
    job = Job(root, [start().client])
    job.restore()
    for step in range(1, 6):
        job.save(step)
    job.close()
    assert order == ["answer", "write"] * 5


@pytest.mark.parametrize("size", [2, 4])
def test_agents_converge_over_the_network(start: Callable[..., Node], root: str, size: int) -> None:
    """Shows that ranks on nodes of their own save, learn of it, restart and restore the newest."""
    labels = [f"node{n}" for n in range(size)]
    nodes = [start(label) for label in labels]
    connects = [node.client for node in nodes]
    job = Job(root, connects, labels)
    assert job.restore() == GENESIS
    for step in (1, 2, 3):
        assert job.save(step) == Epoch(1, step)
    lattices = [rank.session.lattice for rank in job]
    assert {lattice.converged for lattice in lattices} == {Epoch(1, 3)}
    for rank in job:
        rank.client.close()
    again = Job(root, connects, labels)
    assert again.restore() == Epoch(1, 3)
    assert again.save(4) == Epoch(2, 4)
    again.close()
    for rank in job:
        rank.close()
    for node in nodes:
        assert node.ended(30)  # told, settled, and so gone


@pytest.mark.parametrize("then", [("node1", "node0"), ("node0", "node0"), ("node2", "node1")])
def test_ranks_that_change_nodes_find_each_other_while_old_agents_linger(
    start: Callable[..., Node], root: str, then: tuple[str, str]
) -> None:
    """Shows that an agent that still has a domain open which lives elsewhere now does not keep
    what is meant for it, and lets go of it; and that the ranks may change back."""
    nodes = {label: start(label) for label in ("node0", "node1", "node2")}

    def launch(labels: Sequence[str]) -> Job:
        return Job(root, [nodes[label].client for label in labels], labels)

    def kill(job: Job) -> None:
        for rank in job:
            rank.client.close()

    base = GENESIS
    for generation, labels in enumerate((("node0", "node1"), then, ("node0", "node1")), 1):
        job = launch(labels)
        assert job.restore() == base
        base = job.save(generation)
        kill(job)
    for node in nodes.values():
        held = node.do(lambda node=node: len(node.agent._hosts))
        assert held <= 1


def test_the_images_of_a_domain_that_moved_are_given_back(
    start: Callable[..., Node], root: str
) -> None:
    """Shows that an image that was being persisted as its rank changed nodes is not kept: it is
    memory of the size of the state, and nobody would ask for it again."""
    gate = Gate()
    nodes = {"node0": start("node0", files=gate), "node1": start("node1"), "node2": start("node2")}
    for labels in (("node0", "node1"), ("node2", "node0")):
        job = Job(root, [nodes[label].client for label in labels], labels)
        assert job.restore() == GENESIS
        if labels[0] == "node0":
            job[0].save(1)
            assert gate.reached.wait(30)
        for rank in job:
            rank.client.close()
    gate.may.set()

    def kept() -> int:
        return sum(len(seat.retired) for seat in nodes["node0"].agent._seats.values())

    wait_for(lambda: nodes["node0"].do(kept) == 0)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("agents", [1, 2])
def test_what_a_rank_left_out_is_compared_before_it_counts(
    late: int, agents: int, start: Callable[..., Node], root: str
) -> None:
    """Shows that an epoch in which the first rank of a node holds other bytes than a rank that left
    its own to it does not converge, whoever is late, and though the agent that took the first of
    them has died; and that the rank which left them hears which they are."""
    node = start()
    job = Job(root, [node.client] * 2)
    first, other = job[0], job[1]
    slot = next(slot for slot in first.plan.slots if slot.nbytes)
    path, at, size = slot.spec.path, slot.start, slot.nbytes
    first.plan = msgspec.structs.replace(first.plan, leads=True)
    other.plan = msgspec.structs.replace(other.plan, left=(f"{path}/alike",), left_to=0)
    first.plan = msgspec.structs.replace(first.plan, aliases={f"{path}/alike": path})
    job.restore()

    def save(step: int, rank: Rank, alike: bool) -> None:
        held = content(seed(Epoch(1, step), 0))[at : at + size]
        other.left = tensor_digest(slot.spec, held if alike else b"other")
        rank.save(step)

    def persisted(rank: Rank, step: int) -> None:
        rank.session.wait_persisted(Epoch(1, step), PATIENCE_S)

    for step in (1, 2):
        alike = step == 1
        save(step, job[1 - late], alike)
        persisted(job[1 - late], step)
        if agents == 2:
            node.close()
            os.unlink(node.path)
            node = start()
        save(step, job[late], alike)
        if alike:
            assert job.all(lambda rank: rank.converged(Epoch(1, 1))) == [Epoch(1, 1)] * 2
        else:
            with pytest.raises(SaveFailed, match=f"taken to be alike on all .* and not: {path}"):
                persisted(job[late], step)
    other.session.prove(Epoch(1, 3), 0.0, 0, {})  # whatever it asks, it finds its agent again
    wait_for(lambda: other.session.snapshot.unlike == (f"{path}/alike",))
    assert first.session.snapshot.unlike == ()
    assert first.session.new_problems() == other.session.new_problems() == []
    for rank in job:
        rank.client.close()


def test_nobody_waits_for_a_first_rank_that_will_not_speak(
    start: Callable[..., Node], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a rank beside one without memory for a second state stores its own at once."""
    monkeypatch.setattr(witness, "WAIT_S", 3600.0)
    node = start()
    job = Job(root, [node.client] * 2)
    job.restore()
    job[0].save(1)
    assert job[1].session.prove(Epoch(1, 1), 3600.0, 0, {"a": b"0" * 16}) is None
    job.close()


def test_a_first_rank_speaks_when_its_structure_is_new_or_it_is_wanted(
    start: Callable[..., Node], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that ranks hear what the first of their node holds and takes for alike, by path and by
    tie, in the save of a new structure; later only if somebody asked in vain; and that one which
    skips an epoch keeps nobody waiting."""
    monkeypatch.setattr(witness, "WAIT_S", 3600.0)
    node = start()
    job = Job(root, [node.client] * 2)
    first, other = job
    path, apart = (slot.spec.path for slot in first.plan.slots[:2])
    first.plan = msgspec.structs.replace(
        first.plan, leads=True, replicated=(path,), aliases={"tied": path}
    )
    job.restore()

    def held(step: int) -> dict[str, bytes]:
        data = content(seed(Epoch(1, step), 0))
        found = {
            slot.spec.path: tensor_digest(slot.spec, data[slot.start : slot.start + slot.nbytes])
            for slot in first.plan.slots
        }
        return {**found, "tied": found[path]}

    def prove(step: int, wait_s: float = 0.0) -> list[str] | None:
        return other.session.prove(Epoch(1, step), wait_s, 0, held(step))

    first.save(1)
    assert prove(1) == [path, "tied"]
    assert apart in held(1)
    first.save(2)
    assert prove(2) is None
    other.save(2)
    first.save(3)
    assert prove(3) == [path, "tied"]
    other.save(3)
    first.save(4)
    assert prove(4) is None
    first.session.forgo(Epoch(1, 5), "busy")
    assert prove(5, 3600.0) is None
    job.close()


def test_what_strangers_and_the_past_say_changes_nothing_and_is_counted(
    start: Callable[..., Node], root: str
) -> None:
    """Shows that an agent of another run or secret is not let in, and that a message of another
    generation, configuration or round, or of no sense at all, is refused by name."""
    node = start("node0")
    other = identify(HASTY, root, "rank1", run=RUN, shard=1).id
    with node.client() as client:
        opened = open_domain(client, root)
        among = roster([opened.domain, other])

        async def intrude() -> None:
            async with friend(opened.address) as (links, up):
                await begin_round(client, opened, other, links)
                await asyncio.wait_for(up.wait(), 20)
                await try_links(node, "signature", secret=bytes(31) + b"x")
                await try_links(node, "realm", run="another run")
                home = node.agent._hosts[opened.domain]
                await poll(lambda: home.member.generation == 1 and not home.busy)
                before = home.snapshot()
                good = Message(1, 1, 1, "nonce", among.digest, (), Knows())
                wrong = [
                    {"generation": 0},
                    {"round": "another"},
                    {"configuration": "0" * 32},
                    {"sender": 5},
                ]
                for change in wrong:
                    said = encode(msgspec.structs.replace(good, **change))
                    links.send("node0", Said(opened.domain, said))
                links.send("node0", Said(opened.domain, b"\xc1 no message"))
                links.send("node0", Said(opened.domain, b"\xc1 no word", word=True))
                links.send("node0", Said("nobody", encode(good)))
                await poll(lambda: home.rejected >= len(wrong))
                await poll(lambda: not home.busy)
                assert home.snapshot() == before
                assert home.rejected == len(wrong)
            assert not node.agent._hosts[opened.domain].failure

        asyncio.run(intrude())
        counted = client.call("status")["links"]
        assert counted["refused_signature"]
        assert counted["refused_realm"]
        client.call("close")


def open_domain(client: Client, root: str, run: str = RUN, **changes: Any) -> Opened:
    """Open the domain ``rank0``."""
    fields = {"root": root, "name": "rank0", "shard": 0, "run": run, "nonce": "nonce",
              "secret": SECRET, "bind": "127.0.0.1", "port": 0}  # fmt: skip
    reply = client.call("open", **(fields | changes))
    return msgspec.msgpack.decode(reply["opened"], type=Opened)


async def begin_round(client: Client, opened: Opened, other: str, links: Links) -> None:
    """A round of two domains, of which the other one lives at the agent ``a``."""
    address = await links.listen("127.0.0.1")
    spec = Round(
        1, "nonce", roster([opened.domain, other]).configuration, True,
        {opened.domain: "node0", other: "a"}, {"node0": opened.address, "a": address},
    )  # fmt: skip
    data = msgspec.msgpack.encode(spec)
    await asyncio.to_thread(client.call, "begin", domain=opened.domain, round=data)


@contextlib.asynccontextmanager
async def friend(address: tuple[str, int], secret: bytes = SECRET, run: str = RUN) -> Any:
    """Links of an agent named ``a`` that dials ``node0``."""
    up = asyncio.Event()
    place = tempfile.mkdtemp()
    held = Records(f"{place}/links")
    links = Links(
        secret=secret, run=run, me=life_of("a"), records=held, on_said=lambda *_: None,
        on_up=lambda _: up.set(), on_down=lambda _: None,
    )  # fmt: skip
    links.set_peers({"node0": address})
    try:
        yield links, up
    finally:
        await links.close()
        held.close()
        shutil.rmtree(place)


async def try_links(node: Node, why: str, **options: Any) -> None:
    """Dial with something wrong, until that is counted."""
    assert node.agent._links is not None
    counters = node.agent._links.counters
    async with friend(node.agent._address, **options) as (_, up):
        await poll(lambda: counters[f"refused_{why}"])
        assert not up.is_set()


async def poll(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.003)


# --- trainers that die ------------------------------------------------------------------------


def test_an_image_outlives_the_trainer_that_handed_it_over(
    start: Callable[..., Node], root: str, trainer: Callable[[Node], Process]
) -> None:
    """Shows that a trainer killed while its image is being persisted loses nothing: the image is
    persisted and converges, and the next start resumes from it."""
    gate = Gate()
    node = start(files=gate, handover_s=0.0)
    one = trainer(node)
    assert one.do("restore") == "0/0"
    assert one.do("save 7") == "1/7"
    assert gate.reached.wait(30)
    one.kill()
    wait_for(lambda: not node.agent._server.trainers)
    assert not votes(root)
    gate.may.set()
    wait_for(lambda: votes(root) == [Epoch(1, 7)], "the vote")
    two = trainer(node)
    assert two.do("restore") == "1/7"
    assert two.do("close") == "closed"


def test_the_seat_of_a_dead_trainer_is_free_at_once(
    start: Callable[..., Node], root: str, trainer: Callable[[Node], Process]
) -> None:
    """Shows that a restarted trainer need not wait for a lease to run out."""
    node = start(handover_s=0.0)
    for generation in (1, 2):
        process = trainer(node)
        assert process.do("restore").startswith(("0/0", f"{generation - 1}/"))
        assert process.do(f"save {generation}") == f"{generation}/{generation}"
        assert process.do(f"converged {generation} {generation}") == f"{generation}/{generation}"
        process.kill()
        wait_for(lambda: not node.agent._server.trainers)


def test_two_nodes_of_one_name_are_named_at_once(start: Callable[..., Node], root: str) -> None:
    """Shows that machines cloned from one image, all called localhost, don't wait for each other
    until somebody's patience ends: an agent takes what is sent to its own name for its own."""
    with tempfile.TemporaryDirectory(prefix="hf-") as away:
        there = Node(away)
        job = Job(root, [start().client, there.client])
        try:
            with pytest.raises(Refused, match="different nodes have one name: node0") as caught:
                job.restore()
            assert caught.value.verdict is Verdict.MIXED
            assert [shard[:16] for shard in caught.value.shards] == [
                "rank 0: on node0", "rank 1: on node0",
            ]  # fmt: skip
            assert "set HANDFAST_NODE to a name of its own" in str(caught.value)
        finally:
            job.close()
            there.close()


def test_an_agent_and_its_successor_are_of_one_node() -> None:
    """Shows that one that takes over between two ranks' first calls is not taken for a namesake."""
    with tempfile.TemporaryDirectory(prefix="hf-") as here:
        first, second = Node(here), Node(here, "later")
        assert first.agent._place == second.agent._place != ""
        first.close()
        second.close()


@pytest.mark.parametrize("address", ["no such host.invalid", "192.0.2.1", "a..b"])
def test_an_address_that_is_none_of_this_node_is_named(
    start: Callable[..., Node], root: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that HANDFAST_BIND, mistyped or another node's, is an error at once, with a remedy."""
    monkeypatch.setenv("HANDFAST_BIND", address)
    job = Job(root, [start().client])
    with pytest.raises(Refused, match=f"listen on '{address}'.*set HANDFAST_BIND to an address"):
        job.restore()
    job.close()


def test_two_jobs_on_one_run_are_told_of_each_other(start: Callable[..., Node], root: str) -> None:
    """Shows that a second start, while the first one trains, is refused by name, and that the
    first one is not disturbed; where both are one process, nobody is told to stop it."""
    node = start(handover_s=0.05)
    first = Job(root, [node.client])
    first.restore()
    second = Job(root, [node.client])
    with pytest.raises(Refused) as caught:
        second.restore()
    assert caught.value.verdict is Verdict.FOREIGN
    assert f"process {os.getpid()} trains this run already" in str(caught.value)
    assert "rank-00000" in str(caught.value)
    assert "this very process, by another Checkpointer" in str(caught.value)
    assert "close() that one" in str(caught.value)
    assert "stop that job" not in str(caught.value)
    first.close()
    assert second.restore() == GENESIS
    second.close()


def test_a_run_that_was_deleted_under_its_agent_begins_anew(
    start: Callable[..., Node], root: str
) -> None:
    """Shows that who removes a run's directory, and starts again while the old agent lingers, gets
    a first start and not the ghost of the old run."""
    node = start()
    first = Job(root, [node.client])
    first.restore()
    first.save(5)
    first[0].client.close()
    # its certificate may still be on its way into the directory
    wait_for(lambda: node.do(lambda: all(host.settled for host in node.agent._hosts.values())))
    shutil.rmtree(root)
    second = Job(root, [node.client])
    assert second.restore() == GENESIS
    assert second.save(1) == Epoch(1, 1)
    second.close()
    first.close()


# --- the end ----------------------------------------------------------------------------------


def test_an_agent_ends_once_its_trainers_are_done_and_all_is_settled(
    start: Callable[..., Node], root: str
) -> None:
    node = start(linger_s=3600.0)
    job = Job(root, [node.client] * 2)
    job.restore()
    job.save(1)
    job[0].close()
    assert not node.ended(0.5)  # one is still there
    job[1].close()
    assert node.ended(30)


def test_an_agent_that_nobody_dismissed_lingers_and_ends(
    start: Callable[..., Node], root: str
) -> None:
    node = start()
    job = Job(root, [node.client])
    job.restore()
    job.save(1)
    node.agent._linger_s = 0.6
    client = job[0].session._line._client
    assert client is not None
    assert not node.ended(0.8)  # its trainer is there
    client.close()
    assert not node.ended(0.3)
    assert node.ended(30)
    job.close()


def test_an_agent_does_not_end_while_it_persists(start: Callable[..., Node], root: str) -> None:
    """Shows that neither the end of the training nor the linger time cuts a save off."""
    gate = Gate()
    node = start(files=gate)
    job = Job(root, [node.client])
    job.restore()
    node.agent._linger_s = 0.0
    job[0].save(1)
    assert gate.reached.wait(30)
    job.close()
    assert not node.ended(0.8)
    gate.may.set()
    assert node.ended(30)
    assert votes(root) == [Epoch(1, 1)]


def test_a_stopped_agent_casts_the_vote_that_it_was_persisting_for(
    start: Callable[..., Node], root: str
) -> None:
    """Shows that SIGTERM loses no image that was handed over: it is persisted and voted on."""
    gate = Gate()
    node = start(files=gate)
    job = Job(root, [node.client])
    job.restore()
    job[0].save(1)
    assert gate.reached.wait(30)
    node.stop()
    assert not node.ended(0.3)
    gate.may.set()
    assert node.ended(30)
    assert votes(root) == [Epoch(1, 1)]
    with pytest.raises(AgentGone):
        job[0].client.call("status")
    job.close()


# --- calls that are wrong ---------------------------------------------------------------------


def test_wrong_calls_are_answered_clearly_and_harm_nothing(
    start: Callable[..., Node], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows what a trainer of another handfast, or one with a bug, is told; afterwards another
    trainer is served as ever."""
    node = start(handover_s=0.05)
    with node.client() as client:
        with pytest.raises(FormatError, match=r"knows no call 'fly'.*another handfast"):
            client.call("fly")
        with pytest.raises(FormatError, match="rank0-x is not open at this agent"):
            client.call("load", domain="rank0-x", epoch=(1, 1))
        with pytest.raises(CallFailed, match="KeyError"):
            client.call("open", root=root)
        with monkeypatch.context() as patch:
            patch.setattr(frames, "MAX_FRAME", 1 << 20)
            with pytest.raises(ValueError, match="the bound is 1048576"):
                client.call("stage", objects=bytes((1 << 20) + 1))
        opened = open_domain(client, root)
        with node.client() as other:
            for name, fields in {
                "begin": {"round": b""},
                "plan": {"plan": b"", "images": [], "keys": []},
                "stage": {"epoch": (1, 1), "image": 0, "key": "", "objects": b""},
                "skip": {"epoch": (1, 1), "reason": ""},
                "accept": {"generation": 1, "epoch": (1, 1), "copy": 0},
                "decline": {"generation": 1, "epoch": (1, 1), "reason": ""},
            }.items():
                with pytest.raises(FormatError, match="open it first"):
                    other.call(name, domain=opened.domain, **fields)
        check_images(client, opened.domain)
        with pytest.raises(FormatError, match="image 3 was never handed over"):
            client.call("stage", domain=opened.domain, epoch=(1, 1), image=3, key="", objects=b"")
        with pytest.raises(FormatError, match="no copy of 1/1: it is not retained"):
            client.call("load", domain=opened.domain, epoch=(1, 1))
        with pytest.raises(CallFailed, match="ValidationError"):
            client.call("begin", domain=opened.domain, round=msgspec.msgpack.encode([1]))
    job = Job(root + "2", [node.client])
    assert job.restore() == GENESIS
    assert job.save(1) == Epoch(1, 1)
    job.close()


def check_images(client: Client, domain: str) -> None:
    small, loose = memory(0, 10), os.memfd_create("loose")
    os.truncate(loose, 1 << 22)
    good = msgspec.msgpack.encode(plan(1 << 20))
    try:
        with pytest.raises(FormatError, match="too small"):
            client.call("plan", fds=[small], domain=domain, plan=good, images=[0], keys=[""])
        with pytest.raises(FormatError, match="sealed against resizing"):
            client.call("plan", fds=[loose], domain=domain, plan=good, images=[0], keys=[""])
        with pytest.raises(CallFailed, match="IndexError"):
            client.call("plan", fds=[], domain=domain, plan=good, images=[0], keys=[""])
        with pytest.raises(CallFailed, match="ValidationError"):
            client.call(
                "plan", fds=[], domain=domain, plan=msgspec.msgpack.encode([]), images=[], keys=[]
            )
    finally:
        os.close(small)
        os.close(loose)


def test_a_frame_without_end_drops_its_sender_and_nobody_else(
    start: Callable[..., Node], root: str
) -> None:
    node = start()
    job = Job(root, [node.client])
    job.restore()
    with node.client() as client:
        client._sock.sendall(b"\xff\xff\xff\xff" + bytes(100))
        wait_for(lambda: client.ended)
    assert job.save(1) == Epoch(1, 1)
    job.close()


# --- nothing is left --------------------------------------------------------------------------


def held() -> tuple[int, int, int]:
    """Descriptors, maps of images, and threads of this process.

    Without those of an event loop's own pool, which grows by need up to a bound of its own.
    """
    maps = Path("/proc/self/maps").read_text().count("memfd:handfast")
    threads = [t for t in threading.enumerate() if not t.name.startswith("asyncio_")]
    return open_fds(), maps, len(threads)


def test_a_thousand_saves_leave_nothing_behind(start: Callable[..., Node], root: str) -> None:
    """Shows that a long training costs its agent neither descriptors nor memory nor threads, nor
    the disk more than what is kept, and that restores give back what they took."""
    node = start()
    job = Job(root, [node.client])
    job.restore()
    job.save(1)
    wait_for(lambda: not node.do(lambda: any(h.busy for h in node.agent._hosts.values())))
    gc.collect()
    before = held()
    for step in range(2, 1002):
        job[0].save(step)
    job[0].converged(Epoch(1, 1001))
    for _ in range(3):
        assert job.restore() == Epoch(1, 1001)
    wait_for(lambda: not node.do(lambda: any(h.busy for h in node.agent._hosts.values())))
    wait_for(lambda: held() <= before, f"{held()}, as before: {before}")
    files = [p.name for p in Path(domain_path(root, "rank-00000")).rglob("*-*.*")]
    assert sorted(files) == ["1-1001.manifest", "1-1001.safetensors"]
    home = node.do(lambda: next(iter(node.agent._hosts.values())))
    assert len(home._outcomes) <= 64
    assert not home._pending
    job.close()


def test_a_domain_that_fails_as_soon_as_it_is_open_is_opened_ever_more_rarely(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a trainer that asks again and again does not fill a sick disk with incarnations,
    and that one failure after a long time costs no wait."""
    rests: list[float] = []
    clock = 1000.0

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(seats.asyncio, "sleep", sleep)
    monkeypatch.setattr(seats.time, "monotonic", lambda: clock)
    seat = seats.Seat(root, "rank0")

    def fail(after: float) -> None:
        nonlocal clock
        seat.opened_at, clock = clock, clock + after
        asyncio.run(seat.rest())

    fail(3600.0)
    fail(0.0)
    assert not rests
    for _ in range(8):
        fail(0.0)
    assert rests == sorted(rests)
    assert rests[0] < 0.5
    assert rests[-1] == seats.REST_MOST_S
    rests.clear()
    fail(3600.0)
    assert not rests
