"""Shows that trainer and agent understand each other, and notice each other's end, over a socket.

Real sockets, memfds, threads and processes; only the agent's answers are made up by the tests.
"""

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
from agentkit import open_fds, settled_fds
from hypothesis import given, settings
from hypothesis import strategies as st

from handfast.agent import frames, local, server
from handfast.agent.frames import MAX_FDS, CallFailed, Untrusted, image_size, make_image
from handfast.agent.local import AgentGone, AgentStuck, Client
from handfast.agent.server import Server, Trainer
from handfast.core.verdict import Verdict
from handfast.errors import Blocked, FormatError, Refused, SaveFailed, Superseded

SMALL_AGENT = Path(__file__).with_name("small_agent.py")
Kept = list[tuple[str, Any]]


class Agent:
    """A Server in a thread of its own, with the calls that these tests need."""

    def __init__(self, path: str, **options: Any) -> None:
        self.path = path
        self.options = options
        self.server: Server | None = None
        self.gone: list[int] = []
        self.begun: list[tuple[str, Any]] = []
        self.kept: list[int] = []
        self.cancelled: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> Self:
        self.thread.start()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(64)
        self.run(self.start())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.listener.close()
        for fd in self.kept:
            os.close(fd)

    async def start(self) -> None:
        self.holds = asyncio.Event()
        self.holds.set()
        self.server = Server(
            self.listener,
            on_call=self.answer,
            on_gone=lambda trainer: self.gone.append(trainer.pid),
            **self.options,
        )

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def trainers(self) -> frozenset[Trainer]:
        async def look() -> frozenset[Trainer]:
            assert self.server is not None
            return self.server.trainers

        return self.run(look())

    def push(self, topic: str, **fields: Any) -> None:
        async def tell() -> None:
            assert self.server is not None
            for trainer in self.server.trainers:
                trainer.push(topic, **fields)

        self.run(tell())

    async def answer(
        self, trainer: Trainer, name: str, fields: dict[str, Any], fds: list[int]
    ) -> dict[str, Any]:
        self.begun.append((name, fields))
        handler = getattr(self, f"on_{name}")
        return await handler(fields, fds)

    async def on_echo(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return fields

    async def on_length(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"length": len(fields["data"])}

    async def on_inodes(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"inodes": [os.fstat(fd).st_ino for fd in fds]}

    async def on_keep(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.kept.append(fds.pop())
        return {}

    async def on_give(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        await self.holds.wait()
        count = fields["count"]
        made = [make_image(1) for _ in range(min(count, 300))]
        for number, fd in enumerate(made):
            os.pwrite(fd, b"%d" % number, 0)
        asyncio.get_running_loop().call_soon(frames.close_all, made)
        return {"fds": made, "count": count}

    async def on_wait(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append("wait")
            raise
        return {}

    async def on_later(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        await asyncio.sleep(fields["seconds"])
        return fields

    async def on_raise(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        raise ERRORS[fields["which"]]

    async def on_unsendable(self, fields: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"object": object()}


class Odd(SaveFailed):
    """An error of ours with something on it that no frame can carry."""

    def __init__(self) -> None:
        self.handle = object()
        super().__init__("odd, but said")


ERRORS: dict[str, Exception] = {
    "blocked": Blocked("the window is full", by=("rank-3", "rank-5")),
    "refused": Refused("no line", verdict=Verdict.TORN, shards=["s0"], remedy="restore(step=7)"),
    "superseded": Superseded("by round 9"),
    "odd": Odd(),
    "bug": KeyError("a bug"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.fixture
def directory() -> Iterator[str]:
    """A directory with a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hf-") as path:
        yield path


@pytest.fixture
def agent(directory: str) -> Iterator[Agent]:
    with Agent(f"{directory}/agent") as agent:
        yield agent


@pytest.fixture
def client(agent: Agent) -> Iterator[Client]:
    with Client(agent.path, log="/runs/gpt/agent.log") as client:
        yield client


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


# -- calls -------------------------------------------------------------------------------------


def test_a_call_brings_its_fields_and_its_reply_back(client: Client) -> None:
    fields = {"n": 2**63, "x": float("inf"), "s": "é", "b": b"\0", "deep": [{"k": None}], "t": True}
    assert client.call("echo", **fields) == fields
    assert client.agent_pid == os.getpid()
    assert client.version == 1


def test_an_interrupt_in_the_middle_of_a_frame_ends_the_connection(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that nothing is sent behind half a frame, which the agent would take for its rest."""
    send = socket.socket.sendmsg

    def interrupted(*arguments: Any) -> int:
        sent = send(*arguments)
        if threading.current_thread() is threading.main_thread():  # the agent is in this process
            raise KeyboardInterrupt
        return sent

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "sendmsg", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.call("echo", x=1)
    with pytest.raises(AgentGone):
        client.call("echo", x=1)


def test_an_interrupt_of_the_waiting_leaves_the_connection_as_it_was(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the late answer is nobody's, and that the next call gets its own."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Client, "_await", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.call("echo", x=1)
    assert client.call("echo", x=2) == {"x": 2}


def test_frames_larger_than_any_socket_buffer_pass_both_ways(client: Client) -> None:
    data = os.urandom(1 << 20) * 24
    assert client.call("echo", data=data) == {"data": data}


def test_a_frame_above_the_bound_is_the_callers_error(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME", 1000)
    with pytest.raises(ValueError, match="passed as a descriptor"):
        client.call("echo", data=bytes(1001))
    assert client.call("echo", x=1) == {"x": 1}


def test_many_threads_call_at_once_and_each_gets_its_own_reply(client: Client) -> None:
    def work(number: int) -> bool:
        data = bytes([number % 256]) * (number * 300)
        return client.call("echo", data=data) == {"data": data}

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(400)))


def test_a_slow_call_holds_up_no_other(agent: Agent, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.call, "wait")
        until(lambda: agent.begun)
        assert client.call("echo", x=1) == {"x": 1}
        assert not slow.done()
        client.close()
        with pytest.raises(AgentGone):
            slow.result()


def test_calls_begin_in_the_order_in_which_they_were_made(agent: Agent, client: Client) -> None:
    for number in range(100):
        with contextlib.suppress(TimeoutError):
            client.call("wait", timeout=0, number=number)
    client.call("echo")
    assert [fields["number"] for name, fields in agent.begun[:-1]] == list(range(100))


def test_an_agent_that_is_asked_to_wait_is_not_taken_for_stopped(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Shows that it is named once it has had the time that it was given, and not before."""
    monkeypatch.setattr(local, "REMIND_S", 0.01)
    for wait_s, named in ((0.0, True), (30.0, False), (0.05, True)):
        caplog.clear()
        with pytest.raises(TimeoutError):
            client.call("wait", timeout=0.2, wait_s=wait_s)
        assert ("is it stopped?" in caplog.text) == named


def test_a_timeout_ends_the_waiting_and_the_late_reply_is_thrown_away(client: Client) -> None:
    with pytest.raises(TimeoutError, match=r"no reply to 'later' within 0\.01 s"):
        client.call("later", timeout=0.01, seconds=0.05)
    assert client.call("later", seconds=0.1, x=2) == {"seconds": 0.1, "x": 2}


# -- errors ------------------------------------------------------------------------------------


def test_our_own_errors_arrive_as_they_were_raised_dlrover_907(client: Client) -> None:
    with pytest.raises(Blocked, match="blocked by: rank-3, rank-5") as blocked:
        client.call("raise", which="blocked")
    assert blocked.value.by == ("rank-3", "rank-5")
    with pytest.raises(Refused, match="torn: no line") as refused:
        client.call("raise", which="refused")
    assert refused.value.verdict is Verdict.TORN
    assert (refused.value.shards, refused.value.remedy) == (("s0",), "restore(step=7)")
    with pytest.raises(Superseded, match="by round 9"):
        client.call("raise", which="superseded")


def test_an_error_that_can_not_be_carried_whole_still_says_its_text(client: Client) -> None:
    with pytest.raises(CallFailed, match="odd, but said"):
        client.call("raise", which="odd")


@pytest.mark.parametrize(
    ("name", "which", "text"),
    [
        ("raise", "bug", "the agent failed at 'raise': KeyError"),
        ("raise", "full", "No space left on device"),
        ("unsendable", "", "the agent failed at 'unsendable'"),
        ("never_heard_of", "", "the agent failed at 'never_heard_of'"),
    ],
)
def test_a_failing_agent_answers_with_its_failure_and_logs_it(
    client: Client, name: str, which: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CallFailed, match=text):
        client.call(name, which=which)
    assert f"call {name!r} of process {os.getpid()} failed" in caplog.text
    assert client.call("echo") == {}


# -- descriptors -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 64, MAX_FDS])
def test_descriptors_arrive_in_order_and_are_closed_when_the_call_is_done(
    client: Client, count: int
) -> None:
    before = settled_fds()
    images = [make_image(4096) for _ in range(count)]
    inodes = [os.fstat(fd).st_ino for fd in images]
    try:
        assert client.call("inodes", fds=images) == {"inodes": inodes}
    finally:
        frames.close_all(images)
    until(lambda: open_fds() == before)


def test_more_descriptors_than_the_kernel_passes_are_the_callers_error(client: Client) -> None:
    with pytest.raises(ValueError, match="at most 253"):
        client.call("inodes", fds=[0] * (MAX_FDS + 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        client.call("inodes", fds=[99999])
    assert client.call("echo") == {}


def test_each_call_gets_its_own_descriptors_among_many_that_have_none(client: Client) -> None:
    """Frames with and without descriptors, small and large, from many threads at once."""
    images = [make_image(1) for _ in range(40)]
    inodes = [os.fstat(fd).st_ino for fd in images]

    def work(number: int) -> None:
        if number % 3:
            assert client.call("length", data=bytes(number * 1000))["length"] == number * 1000
        else:
            first = number % 30
            mine = images[first : first + 1 + number % 10]
            reply = client.call("inodes", fds=mine, padding=bytes(number * 997))
            assert reply["inodes"] == inodes[first : first + 1 + number % 10]

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(300)))
    frames.close_all(images)


def test_an_image_outlives_its_maker_and_shows_what_it_wrote(
    agent: Agent, directory: str, processes: list[subprocess.Popen[str]]
) -> None:
    code = """if True:
        import mmap, os, sys, time
        from handfast.agent.local import Client
        from handfast.agent.frames import make_image
        fd = make_image(8192)
        memory = mmap.mmap(fd, 8192)
        memory[:5] = b"epoch"
        client = Client(sys.argv[1])
        client.call("keep", fds=[fd])
        os.kill(os.getpid(), 9)
    """
    process = subprocess.Popen([sys.executable, "-c", code, agent.path], text=True)
    processes.append(process)
    until(lambda: agent.gone)
    assert agent.gone == [process.pid]
    assert image_size(agent.kept[0]) == 8192
    with mmap.mmap(agent.kept[0], 8192, prot=mmap.PROT_READ) as memory:
        assert memory[:5] == b"epoch"


def test_the_agent_gives_descriptors_back_and_keeps_its_own(client: Client) -> None:
    before = settled_fds()
    for count in (1, 20, MAX_FDS):
        reply = client.call("give", count=count)
        assert [os.pread(fd, 9, 0).rstrip(b"\0") for fd in reply["fds"]] == [
            b"%d" % number for number in range(count)
        ]
        frames.close_all(reply["fds"])
    with pytest.raises(CallFailed, match="at most 253"):
        client.call("give", count=300)
    until(lambda: open_fds() == before)


def test_descriptors_of_a_reply_that_came_too_late_are_closed(agent: Agent, client: Client) -> None:
    before = settled_fds()
    agent.holds.clear()
    with pytest.raises(TimeoutError):
        client.call("give", timeout=0.01, count=5)
    agent.loop.call_soon_threadsafe(agent.holds.set)
    client.call("echo")
    until(lambda: open_fds() == before)


def test_descriptors_that_came_just_when_the_waiting_ended_are_closed(
    agent: Agent, client: Client
) -> None:
    before = settled_fds()
    agent.holds.clear()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.call, "give", timeout=0.2, count=5)
        until(lambda: client._waiting and agent.begun)
        with client._lock:  # the reader stands before it with the reply, then the caller without
            agent.loop.call_soon_threadsafe(agent.holds.set)
            time.sleep(0.3)
        with pytest.raises(TimeoutError):
            call.result(30)
    client.call("echo")
    until(lambda: open_fds() == before)


@contextlib.contextmanager
def room_for(more: int) -> Iterator[None]:
    """Let this process open only a few descriptors more than it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    limit = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1 + more
    while (fd := os.dup(0)) < limit:  # no holes below the limit
        held.append(fd)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    frames.close_all(held[len(held) - more :])
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        frames.close_all(held[: len(held) - more])


@pytest.mark.parametrize("more", [0, 3])
def test_descriptors_that_find_no_room_fail_their_own_call_only(client: Client, more: int) -> None:
    """The kernel cuts them off (MSG_CTRUNC); the next call's are not mistaken for this one's."""
    before = settled_fds()
    images = [make_image(1) for _ in range(6)]
    with room_for(more), pytest.raises(CallFailed, match=rf"{6 - more} of the 6 .*ulimit -n"):
        client.call("inodes", fds=images)
    for image in images:
        inode = os.fstat(image).st_ino
        assert client.call("inodes", fds=[image]) == {"inodes": [inode]}
    frames.close_all(images)
    until(lambda: open_fds() == before)


def test_descriptors_that_were_cut_off_are_not_replaced_by_the_next_frames() -> None:
    """A save must not be given another save's image, even where the kernel glues their bytes."""
    ours, theirs = socket.socketpair()
    image = make_image(1)
    with ours, theirs:
        incoming = frames.Incoming()
        first, second = (frames.encode(frames.Call(n, "save", 1, {})) for n in (1, 2))
        socket.send_fds(theirs, [first[:10]], [image])
        with room_for(0):
            assert list(incoming.receive(ours) or ()) == []
        theirs.sendall(first[10:])
        socket.send_fds(theirs, [second], [image])
        (one, none), (two, some) = incoming.receive(ours) or ()
        assert (one.id, none) == (1, [])
        assert (two.id, len(some)) == (2, 1)
        assert os.fstat(some[0]).st_ino == os.fstat(image).st_ino
        frames.close_all([image, *some])


def test_a_trainer_waits_at_the_door_while_the_agent_has_no_descriptors(
    agent: Agent, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    said = "no trainer can be accepted for now"
    with ThreadPoolExecutor(1) as pool:
        with room_for(1):
            waiting = pool.submit(Client, agent.path)
            until(lambda: said in caplog.text)
            for _ in range(200):  # turns of the agent's loop, which must not spin at the door
                client.call("echo")
            assert caplog.text.count(said) < 20
        with waiting.result(30) as late:
            assert late.call("echo", x=1) == {"x": 1}


def test_an_image_is_whole_blocks_that_nobody_can_resize() -> None:
    for nbytes, size in [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192)]:
        fd = make_image(nbytes)
        assert image_size(fd) == size
        for other in (0, size - 1, size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, other)
        os.close(fd)


def test_an_image_that_finds_no_memory_fails_when_it_is_made_not_when_it_is_written() -> None:
    before = settled_fds()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            make_image(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_fds() == before


def test_memory_that_could_shrink_under_the_agent_is_refused(directory: str) -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    with open(f"{directory}/file", "wb") as file:
        for fd in (unsealed, file.fileno()):
            with pytest.raises(FormatError, match="sealed against resizing"):
                image_size(fd)
    os.close(unsealed)


# -- pushes ------------------------------------------------------------------------------------


def test_states_are_pushed_and_the_last_of_each_topic_is_shown_to_a_late_listener(
    agent: Agent, client: Client
) -> None:
    agent.push("lattice", step=1)
    agent.push("lattice", step=2)
    agent.push("peers", up=3)
    client.call("echo")  # what was pushed before the reply has arrived with it
    until(lambda: len(client._states) == 2)
    seen: Kept = []
    client.on_push(lambda topic, fields: seen.append((topic, fields)))
    assert sorted(seen) == [("lattice", {"step": 2}), ("peers", {"up": 3})]
    agent.push("lattice", step=3)
    until(lambda: seen[-1] == ("lattice", {"step": 3}))


def test_pushes_that_nobody_reads_block_nobody_and_only_the_newest_waits(agent: Agent) -> None:
    """A stopped trainer must neither stop its agent nor pile up what it is told."""
    stopped = socket.socket(socket.AF_UNIX)
    stopped.connect(agent.path)
    stopped.sendall(call_frame(1, "hello", versions=(1, 1)))
    until(lambda: len(agent.trainers()) == 1)
    with Client(agent.path) as client:
        seen: Kept = []
        client.on_push(lambda topic, fields: seen.append((topic, fields["step"])))
        for step in range(200):
            agent.push("lattice", step=step, padding=bytes(100_000))
            agent.push("other", step=step)
        assert client.call("echo", x=1) == {"x": 1}
        until(lambda: ("lattice", 199) in seen and ("other", 199) in seen)
        idle = next(t for t in agent.trainers() if t._pushes)
        assert sorted(idle._pushes) == ["lattice", "other"]
        waited_for = {"lattice", "other"}

        def last(message: list[Any]) -> bool:
            if message[0] == 4 and message[2]["step"] == 199:
                waited_for.remove(message[1])
            return not waited_for

        messages = list(read_frames(stopped, last))
        steps = [message[2]["step"] for message in messages if message[1] == "lattice"]
        assert steps == sorted(steps)
        assert len(steps) < 100
        assert steps[-1] == 199
    stopped.close()


def test_a_callback_that_raises_ends_nothing(
    agent: Agent, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.on_push(lambda topic, fields: 1 // 0)
    agent.push("lattice", step=1)
    until(lambda: "callback for pushed state 'lattice' failed" in caplog.text)
    assert client.call("echo") == {}


def test_a_callback_that_calls_the_agent_is_told_that_it_would_wait_for_itself(
    agent: Agent, client: Client
) -> None:
    errors: list[BaseException] = []

    def callback(topic: str, fields: dict[str, Any]) -> None:
        try:
            client.call("echo")
        except RuntimeError as error:
            errors.append(error)

    client.on_push(callback)
    agent.push("lattice", step=1)
    until(lambda: errors)
    assert "wait for itself" in str(errors[0])


# -- the end of a trainer ----------------------------------------------------------------------

TRAINER = """if True:
    import os, signal, sys, threading, time
    from handfast.agent.local import Client
    client = Client(sys.argv[1])
    child = os.fork()
    if child == 0:
        try:
            client.call("echo")
        except RuntimeError as error:
            os.write(1, f"{error}\\n".encode())
        time.sleep(600)
    os.write(1, b"%d\\n" % child)
    threading.Thread(target=client.call, args=("wait",), daemon=True).start()
    time.sleep(600)
"""


def test_a_killed_trainer_is_gone_though_a_forked_loader_worker_holds_its_socket(
    agent: Agent, processes: list[subprocess.Popen[str]]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, agent.path], stdout=subprocess.PIPE, text=True
    )
    processes.append(process)
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    child = int(next(line for line in lines if line.strip().isdigit()))
    said = next(line for line in lines if not line.strip().isdigit())
    try:
        assert "a forked child makes its own" in said
        until(lambda: ("wait", {}) in agent.begun)
        assert agent.gone == []
        process.kill()
        until(lambda: agent.gone == [process.pid])
        until(lambda: agent.cancelled == ["wait"])
        os.kill(child, 0)  # it lives, and holds the socket
        assert agent.trainers() == frozenset()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_closes_its_copy_ends_nothing(
    agent: Agent, processes: list[subprocess.Popen[str]]
) -> None:
    code = """if True:
        import os, sys
        from handfast.agent.local import Client
        client = Client(sys.argv[1])
        child = os.fork()
        if child == 0:
            client.close()
            os._exit(0)
        os.waitpid(child, 0)
        client.call("echo", still="there")
        sys.stdin.readline()
        client.close()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, agent.path], stdin=subprocess.PIPE, text=True
    )
    processes.append(process)
    until(lambda: agent.begun == [("echo", {"still": "there"})])
    assert agent.gone == []
    process.communicate("end\n")
    until(lambda: agent.gone == [process.pid])
    assert process.returncode == 0


@pytest.mark.parametrize("option", [server._SO_PEERPIDFD, 0], ids=["Linux 6.5", "older"])
def test_a_trainer_that_died_before_it_was_accepted_is_nobody(
    option: int, directory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_SO_PEERPIDFD", option)
    code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"

    class Late(Agent):
        async def start(self) -> None:
            subprocess.run([sys.executable, "-c", code, self.path], check=True)
            await super().start()

    with Late(f"{directory}/agent") as agent, Client(agent.path) as client:
        assert client.call("echo", x=1) == {"x": 1}
        assert agent.gone == []
    assert option or "whose death could not be seen" in caplog.text


def test_a_trainer_is_watched_by_its_number_where_the_kernel_knows_no_better(
    agent: Agent, processes: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_SO_PEERPIDFD", 0)
    process = subprocess.Popen([sys.executable, "-c", TRAINER, agent.path], stdout=subprocess.PIPE)
    processes.append(process)
    assert process.stdout is not None
    numbers = [line.strip() for line in (process.stdout.readline(), process.stdout.readline())]
    child = int(next(number for number in numbers if number.isdigit()))
    try:
        process.kill()
        until(lambda: agent.gone == [process.pid])
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_push_to_a_trainer_that_has_just_closed_is_no_error(agent: Agent) -> None:
    closing = socket.socket(socket.AF_UNIX)
    closing.connect(agent.path)
    closing.sendall(call_frame(1, "hello", versions=(1, 1)))
    until(agent.trainers)
    (trainer,) = agent.trainers()

    async def push_into_the_void() -> None:
        closing.close()
        trainer.push("lattice", step=1)
        trainer.push("lattice", step=2)

    agent.run(push_into_the_void())
    until(lambda: agent.gone == [os.getpid()])


def test_a_trainer_that_closes_is_gone_once(agent: Agent) -> None:
    for number in range(1, 4):
        with Client(agent.path) as client:
            client.call("echo")
        until(lambda n=number: len(agent.gone) == n)
    assert agent.gone == [os.getpid()] * 3


def test_what_a_dying_trainer_had_sent_whole_is_still_begun(
    agent: Agent, processes: list[subprocess.Popen[str]]
) -> None:
    """The last image handed over before a SIGKILL must count; the half frame after it must not."""
    code = """if True:
        import os, sys
        from handfast.agent.local import Client
        from handfast.agent.frames import Call, encode, make_image, passing
        client = Client(sys.argv[1])
        image = make_image(1)
        whole = encode(Call(50, "keep", 1, {}))
        half = encode(Call(51, "echo", 1, {"half": bytes(100)}))[:60]
        client._sock.sendmsg([whole], passing([image]))
        client._sock.sendmsg([half], passing([image]))
        os.kill(os.getpid(), 9)
    """
    before = settled_fds()
    process = subprocess.Popen([sys.executable, "-c", code, agent.path])
    processes.append(process)
    until(lambda: agent.gone == [process.pid])
    assert [name for name, _ in agent.begun] == ["keep"]
    until(lambda: open_fds() == before + 1)


def test_all_that_a_dead_trainer_had_sent_is_begun_though_its_child_holds_the_socket(
    agent: Agent, processes: list[subprocess.Popen[str]]
) -> None:
    """The agent was busy when it all came at once: ten images, and the death of their trainer."""
    code = """if True:
        import os, sys, time
        from handfast.agent.local import Client
        from handfast.agent.frames import Call, encode, make_image, passing
        client = Client(sys.argv[1])
        os.write(1, b"ready\\n")
        sys.stdin.readline()
        for number in range(10):
            frame = encode(Call(50 + number, "keep", 1, {"number": number}))
            client._sock.sendmsg([frame], passing([make_image(1)]))
        child = os.fork()
        if child == 0:
            time.sleep(600)
        os.write(1, b"%d\\n" % child)
        os.kill(os.getpid(), 9)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, agent.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    processes.append(process)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    busy = threading.Event()
    agent.loop.call_soon_threadsafe(busy.wait)
    process.stdin.write("go\n")
    process.stdin.flush()
    child = int(process.stdout.readline())
    try:
        process.wait()
        busy.set()
        until(lambda: agent.gone == [process.pid])
        assert [fields["number"] for _, fields in agent.begun] == list(range(10))
        assert len(agent.kept) == 10
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_trainer_that_leaves_its_replies_unread_is_dropped(agent: Agent) -> None:
    greedy = socket.socket(socket.AF_UNIX)
    greedy.connect(agent.path)
    greedy.sendall(call_frame(1, "hello", versions=(1, 1)))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(3000):
            greedy.sendall(call_frame(number, "echo", data=bytes(2000)))
    until(lambda: agent.gone)
    greedy.close()


def test_a_trainer_with_too_many_waiting_calls_is_dropped(agent: Agent) -> None:
    greedy = socket.socket(socket.AF_UNIX)
    greedy.connect(agent.path)
    greedy.sendall(call_frame(1, "hello", versions=(1, 1)))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(2, 1100):
            greedy.sendall(call_frame(number, "wait"))
    until(lambda: agent.gone)
    until(lambda: len(agent.cancelled) > 1000)
    greedy.close()


# -- the end of an agent -----------------------------------------------------------------------


def start_agent(
    processes: list[subprocess.Popen[str]], place: str, *options: str
) -> subprocess.Popen[str]:
    os.chmod(place, 0o700)
    process = subprocess.Popen(
        [sys.executable, str(SMALL_AGENT), *options, place], stdout=subprocess.PIPE, text=True
    )
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("agent ")
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_agent_that_ends_during_a_call_is_named_with_its_log(
    how: signal.Signals, directory: str, processes: list[subprocess.Popen[str]]
) -> None:
    process = start_agent(processes, directory)
    with Client(f"{directory}/agent", log="/runs/gpt/agent.log") as client:
        assert client.agent_pid == process.pid
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(client.call, "wait") for _ in range(4)]
            client.call("who")
            process.send_signal(how)
            for call in calls:
                with pytest.raises(AgentGone) as gone:
                    call.result(30)
                assert gone.value.socket == f"{directory}/agent"
                assert gone.value.log == "/runs/gpt/agent.log"
                assert str(process.pid) in str(gone.value)
                assert "/runs/gpt/agent.log" in str(gone.value)
        with pytest.raises(AgentGone, match="'echo' was not sent"):
            client.call("echo")


def test_an_agent_that_ends_with_calls_unread_has_ended_and_no_more(
    directory: str, processes: list[subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """The system calls that a reset; whoever closes and opens a run again meets it, unwarned."""
    process = start_agent(processes, directory)
    with Client(f"{directory}/agent") as client, ThreadPoolExecutor(1) as pool:
        client.call("who")
        process.send_signal(signal.SIGSTOP)
        call = pool.submit(client.call, "who")
        until(lambda: bool(client._waiting))
        with client._sending:
            process.kill()
        with pytest.raises(AgentGone):
            call.result(30)
        until(lambda: client._ended)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_stopped_agent_lets_a_call_time_out_even_while_it_is_sent(
    directory: str, processes: list[subprocess.Popen[str]]
) -> None:
    process = start_agent(processes, directory)
    with Client(f"{directory}/agent") as client:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
            client.call("who", timeout=0.05)
        with pytest.raises(TimeoutError):
            client.call("who", timeout=0.05, data=bytes(8 << 20))
        # half a frame is in the socket: this connection can't be used any more, and says so
        with pytest.raises(AgentGone):
            client.call("who")
    with pytest.raises(AgentStuck, match=rf"process {process.pid} listens but does not answer"):
        Client(f"{directory}/agent", timeout=0.05)
    process.send_signal(signal.SIGCONT)
    with Client(f"{directory}/agent") as client:
        assert client.call("who")["pid"] == process.pid


def held_elsewhere(lock: "threading._RLock") -> bool:
    """Whether another thread holds a lock."""
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


def test_calls_that_queue_behind_a_stuck_one_time_out_or_end_with_the_connection(
    directory: str, processes: list[subprocess.Popen[str]]
) -> None:
    process = start_agent(processes, directory)
    client = Client(f"{directory}/agent")
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        stuck = pool.submit(client.call, "who", data=bytes(8 << 20))
        until(lambda: held_elsewhere(client._sending))
        with pytest.raises(TimeoutError):
            client.call("who", timeout=0.05)
        behind = pool.submit(client.call, "who")
        until(lambda: len(client._waiting) == 2)
        client.close()
        for call in (stuck, behind):
            with pytest.raises(AgentGone):
                call.result(30)


def test_descriptors_that_an_agent_promised_and_did_not_send_fail_the_call(directory: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(f"{directory}/agent")
        listener.listen(1)
        connecting = pool.submit(Client, f"{directory}/agent")
        with listener.accept()[0] as connection:
            assert connection.recv(4096).count(b"hello") == 1
            connection.sendall(frames.encode(frames.Reply(1, 0, {"version": 1})))
            with connecting.result(30) as client:
                call = pool.submit(client.call, "give")
                until(lambda: client._waiting)
                connection.sendall(frames.encode(frames.Reply(2, 3, {})))
                with pytest.raises(CallFailed, match="3 of the 3 descriptors that 'give' gave"):
                    call.result(30)


def test_an_agent_whose_backlog_is_full_is_called_stuck(directory: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(f"{directory}/agent")
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(f"{directory}/agent")
        with pytest.raises(AgentStuck, match="accepts no connection"):
            Client(f"{directory}/agent", timeout=0.05)


def test_an_agent_that_leaves_at_the_door_is_called_gone(directory: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(f"{directory}/agent")
        listener.listen(1)
        client = pool.submit(Client, f"{directory}/agent")
        listener.accept()[0].close()
        with pytest.raises(AgentGone, match="'hello' was not"):
            client.result(30)


def test_where_nobody_listens_the_system_says_so(directory: str) -> None:
    with pytest.raises(FileNotFoundError):
        Client(f"{directory}/agent")


def test_garbage_from_an_agent_ends_the_connection_not_the_trainer(
    directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(f"{directory}/agent")
        listener.listen(1)
        client = pool.submit(Client, f"{directory}/agent")
        connection = listener.accept()[0]
        connection.sendall(b"\0\0\0\3abc")
        with pytest.raises(AgentGone):
            client.result(30)
        connection.close()
    assert "a frame that can't be read" in caplog.text


# -- who is served -----------------------------------------------------------------------------


def test_another_user_is_refused(directory: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        Agent(f"{directory}/agent", uid=os.geteuid() + 1) as agent,
        pytest.raises(AgentGone, match="hello"),
    ):
        Client(agent.path)
    assert f"of user {os.geteuid()}: only {os.geteuid() + 1} is served" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_real_other_user_is_refused_by_both_ends(directory: str) -> None:
    code = """if True:
        import os, sys
        from handfast.agent.local import Client
        os.setuid(65534)
        try:
            Client(sys.argv[1])
        except Exception as error:
            print(type(error).__name__, error)
    """
    os.chmod(directory, 0o755)  # noqa: S103 - so that a stranger gets in
    with Agent(f"{directory}/agent") as agent:
        os.chmod(agent.path, 0o777)  # noqa: S103 - so that a stranger gets in
        done = subprocess.run(
            [sys.executable, "-c", code, agent.path], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(Untrusted.__name__)
        with socket.socket(socket.AF_UNIX) as stranger:
            os.seteuid(65534)
            try:
                stranger.connect(agent.path)
            finally:
                os.seteuid(0)
            assert stranger.recv(1) == b""


def call_frame(number: int, name: str, **fields: Any) -> bytes:
    return frames.encode(frames.Call(number, name, 0, fields))


def read_frames(sock: socket.socket, last: Callable[[list[Any]], object]) -> Iterator[list[Any]]:
    """The messages on a raw socket, as lists, up to and with the one that is ``last``."""
    sock.settimeout(30)
    file = sock.makefile("rb")
    with file:
        while True:
            (length,) = struct.unpack(">I", file.read(4))
            message = msgspec.msgpack.decode(file.read(length))
            yield message
            if last(message):
                return


# -- bad bytes and other versions --------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\0\0\0\1\xc1",
        b"\0\0\0\4\x91\xa2\xff\xfe",
        struct.pack(">I", 100_000) + b"\x91" * 100_000,
        frames.encode(frames.Push("topic", {})),
        frames.encode(frames.Reply(1, 0, {})),
    ],
)
def test_what_is_no_call_drops_its_sender_only(
    agent: Agent, client: Client, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(agent.path)
        stranger.sendall(data)
        stranger.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    until(lambda: "is dropped" in caplog.text)
    assert client.call("echo") == {}
    assert agent.gone == []


def test_descriptors_that_no_frame_names_drop_their_sender_and_are_closed(agent: Agent) -> None:
    before = settled_fds()
    for body in (call_frame(1, "echo"), call_frame(1, "echo")[:9]):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(agent.path)
            socket.send_fds(stranger, [body], [0, 1, 2])
            if len(body) == 9:
                socket.send_fds(stranger, [b"x"], [0])
            stranger.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(100):
                    pass
    until(lambda: open_fds() == before)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=5))
def test_made_up_bytes_raise_nothing_but_format_errors(chunks: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        incoming = frames.Incoming()
        for chunk in chunks:
            body = msgspec.msgpack.encode(list(chunk)) if len(chunk) % 2 else chunk
            theirs.sendall(struct.pack(">I", len(body)) + body)
            try:
                for _ in incoming.receive(ours) or ():
                    pass
            except FormatError:
                return


def test_a_call_before_hello_is_refused(agent: Agent) -> None:
    with socket.socket(socket.AF_UNIX) as early:
        early.connect(agent.path)
        early.sendall(call_frame(7, "echo"))
        (answer,) = read_frames(early, bool)
        assert answer[:3] == [3, 7, "FormatError"]
        early.sendall(call_frame(8, "hello"))
        (answer,) = read_frames(early, bool)
        assert answer[:2] == [3, 8]
    assert agent.begun == []


@pytest.mark.parametrize(
    ("agents", "trainers", "version"),
    [((1, 1), (1, 2), 1), ((1, 2), (1, 1), 1), ((1, 3), (2, 4), 3)],
)
def test_an_old_agent_serves_a_new_trainer_and_the_other_way_round(
    directory: str, agents: tuple[int, int], trainers: tuple[int, int], version: int
) -> None:
    with (
        Agent(f"{directory}/agent", versions=agents) as agent,
        Client(agent.path, versions=trainers) as client,
    ):
        assert client.version == version
        assert client.call("echo", x=1) == {"x": 1}


def test_an_agent_left_over_from_another_handfast_says_what_to_do(directory: str) -> None:
    with (
        Agent(f"{directory}/agent", versions=(1, 1)) as agent,
        pytest.raises(FormatError, match=r"versions 1\.\.1 .* trainer 2\.\.3.*SIGTERM"),
    ):
        Client(agent.path, versions=(2, 3))
    assert agent.gone == []


def test_closing_the_server_with_calls_under_way_leaves_nothing_open(directory: str) -> None:
    before = settled_fds()
    with Agent(f"{directory}/agent") as agent:
        client = Client(agent.path)
        image = make_image(1)
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(client.call, "wait", fds=[image])
            until(lambda: agent.begun)
            agent.run(agent.stop())
            with pytest.raises(AgentGone):
                waiting.result(30)
        client.close()
        os.close(image)
        assert agent.cancelled == ["wait"]
        assert agent.gone == []
    assert open_fds() == before


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        ("NoSuchError", {}),
        ("Sequence", {}),  # a name in the module that is no error
        ("Refused", {"verdict": "of a later release"}),
        ("Refused", {"verdict": []}),
    ],
)
def test_an_error_of_another_release_is_a_call_that_failed(
    kind: str, detail: dict[str, object]
) -> None:
    """Shows that what this release has no name for is told, and raises nothing else."""
    error = frames.revive(frames.Failure(1, kind, "no room", detail))
    assert type(error) is CallFailed
    assert str(error) == "no room"
