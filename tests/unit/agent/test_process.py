"""Shows that a node has one agent a key, found by all and ended by none of their deaths.

Real processes throughout: `small_agent.py` stands in for the agent's program, and starters are
processes of their own where one of them has to die. Meeting places lie under a runtime directory of
each test's own.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from handfast.agent import process
from handfast.agent.frames import Untrusted
from handfast.agent.local import AgentGone, AgentStuck, Client
from handfast.agent.manners import Manners
from handfast.agent.process import connect, connect_or_start, meeting_place, settings, take_seat
from handfast.agent.speech import SPOKEN
from handfast.errors import FormatError, HandfastError
from handfast.store.files import try_lock

SMALL_AGENT = str(Path(__file__).with_name("small_agent.py"))
ARGV = [sys.executable, SMALL_AGENT]

STARTER = f"""if True:
    import os, signal, sys, time
    from handfast.agent.process import connect_or_start
    argv = [sys.executable, {SMALL_AGENT!r}, *sys.argv[3:]]
    client = connect_or_start(sys.argv[1], sys.argv[2], argv=argv)
    os.write(1, b"%d\\n" % client.agent_pid)
    sys.stdin.read()
"""


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with a short name, as a login gives one."""
    with tempfile.TemporaryDirectory(prefix="hf-") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield Path(path)


class Node:
    """What a test starts on this node, and ends by pid."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.pidfds: dict[int, int] = {}
        self.starters: list[subprocess.Popen[str]] = []
        self.clients: list[Client] = []

    def start(self, *options: str, key: str = "run@node", **waits: float) -> Client:
        argv = [*ARGV, *options]
        client = connect_or_start(key, str(self.log), argv=argv, **waits)
        self.clients.append(client)
        self.watch(client.agent_pid)
        return client

    def watch(self, pid: int) -> None:
        if pid not in self.pidfds:
            self.pidfds[pid] = os.pidfd_open(pid)

    def starter(self, *options: str, key: str = "run@node") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", STARTER, key, str(self.log), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.starters.append(process)
        return process

    def kill(self, pid: int) -> None:
        signal.pidfd_send_signal(self.pidfds[pid], signal.SIGKILL)
        self.await_end(pid)

    def await_end(self, pid: int) -> None:
        assert select.select([self.pidfds[pid]], [], [], 30)[0], f"agent {pid} does not end"

    def agents(self) -> list[int]:
        """The agents that took a seat, in order, as they wrote into the log."""
        lines = self.log.read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("agent ")]

    def end(self) -> None:
        for client in self.clients:
            client.close()
        for starter in self.starters:
            starter.kill()
            starter.wait()
            for pipe in (starter.stdin, starter.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if self.log.exists():
            for pid in self.agents():
                with contextlib.suppress(ProcessLookupError):
                    self.watch(pid)
        for pid, pidfd in self.pidfds.items():
            with contextlib.suppress(ProcessLookupError):
                self.kill(pid)
            os.close(pidfd)


@pytest.fixture
def node(runtime: Path, tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "agent.log")
    yield node
    node.end()


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


# -- one agent, found again --------------------------------------------------------------------


def test_a_started_agent_is_found_again(node: Node) -> None:
    assert connect("run@node") is None
    first = node.start()
    second = node.start()
    assert first.agent_pid == second.agent_pid == first.call("who")["pid"]
    found = connect("run@node")
    assert found is not None
    with found:
        assert found.agent_pid == first.agent_pid
    assert node.agents() == [first.agent_pid]


def test_each_key_has_an_agent_of_its_own(node: Node) -> None:
    pids = {node.start(key=key).agent_pid for key in ("a@node", "b@node", "a@other")}
    assert len(pids) == 3


def test_eight_processes_that_start_it_at_once_get_one_agent(node: Node) -> None:
    starters = [node.starter("late") for _ in range(8)]
    pids = {int(starter.stdout.readline()) for starter in starters if starter.stdout}
    assert len(pids) == 1
    assert node.agents() == list(pids)


def test_threads_that_race_to_replace_a_killed_agent_get_one(node: Node) -> None:
    """The stale socket of a SIGKILLed agent is there, and everybody sees it at once."""
    old = node.start().agent_pid
    node.kill(old)
    assert os.path.exists(os.path.join(meeting_place("run@node"), "agent"))
    with ThreadPoolExecutor(8) as pool:
        clients = list(pool.map(lambda _: node.start(), range(8)))
    new = {client.agent_pid for client in clients}
    assert len(new) == 1
    assert new != {old}
    assert node.agents() == [old, *new]


def test_a_starter_killed_half_way_leaves_neither_lock_nor_second_agent(node: Node) -> None:
    """Its agent is under way and has no seat yet when the next starter comes."""
    place = meeting_place("run@node")
    starter = node.starter("late")
    until(lambda: running(place))
    starter.kill()
    client = node.start("late")
    assert node.agents() == [client.agent_pid]
    # a second one, if it was started, finds the first one listening and ends
    until(lambda: list(running(place)) == [client.agent_pid])
    assert node.agents() == [client.agent_pid]


def running(place: str) -> dict[int, str]:
    """The processes that were started for a meeting place, by their command line."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            if line.endswith(f"{place}\0") and SMALL_AGENT in line:
                found[int(pid)] = line
    return found


# -- a life of its own -------------------------------------------------------------------------


def test_an_agent_inherits_nothing_and_stands_on_its_own(node: Node, tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w") as secret, socket.socket() as port:
        os.set_inheritable(secret.fileno(), True)
        os.set_inheritable(port.fileno(), True)
        who = node.start().call("who")
        inode = os.fstat(port.fileno()).st_ino
    pid = who["pid"]
    links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert str(tmp_path / "secret") not in links
    assert f"socket:[{inode}]" not in links
    standard = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
    assert standard == ["/dev/null", str(node.log), str(node.log)]
    files = {link for link in links if link.startswith("/") and not link.startswith("/dev/")}
    assert files == {str(node.log), os.path.join(meeting_place("run@node"), "alive.lock")}
    assert who["sid"] == pid != os.getsid(0)
    assert who["cwd"] == "/"
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != os.getpid()


def test_an_agent_hears_sigterm_though_its_starter_blocks_or_ignores_it(node: Node) -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pid = node.start().agent_pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        signal.signal(signal.SIGINT, ignored)
    status = Path(f"/proc/{pid}/status").read_text()
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    assert int(masks["SigBlk"], 16) == 0
    assert not int(masks["SigIgn"], 16) & 1 << (signal.SIGINT - 1)
    os.kill(pid, signal.SIGTERM)
    node.await_end(pid)
    assert node.log.read_text().endswith("left\n")


def test_an_agent_survives_the_sigkill_of_its_starters_process_group(node: Node) -> None:
    """torchrun and terminals signal a whole group; the agent must finish what it persists."""
    starter = node.starter()
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    os.killpg(starter.pid, signal.SIGKILL)  # a group of its own: start_new_session
    starter.wait()
    until(lambda: f"gone {starter.pid}" in node.log.read_text())
    assert node.start().agent_pid == pid


def test_an_agent_ends_when_told_and_leaves_no_socket(node: Node) -> None:
    client = node.start()
    client.call("stop")
    node.await_end(client.agent_pid)
    assert not os.path.exists(client.path)
    again = node.start()
    assert again.agent_pid != client.agent_pid
    assert node.agents() == [client.agent_pid, again.agent_pid]


def test_a_new_agent_waits_for_the_old_one_to_leave(node: Node, runtime: Path) -> None:
    """The old one holds its place but has stopped listening: it drains."""
    place = meeting_place("run@node")
    seat = take_seat(place)
    assert seat is not None
    os.unlink(os.path.join(place, "agent"))
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(node.start)
        until(lambda: running(place))
        assert node.agents() == []
        seat.leave()
        assert starting.result(30).agent_pid == node.agents()[0]


def test_a_trainer_that_meets_an_agent_just_leaving_starts_the_next_one(node: Node) -> None:
    """It was accepted, or stood at the door, when the idle agent made up its mind."""
    place = meeting_place("run@node")
    seat = take_seat(place)
    assert seat is not None
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(node.start)
        seat.socket.accept()[0].close()
        poll = select.poll()
        poll.register(seat.socket, select.POLLIN)
        assert poll.poll(30_000)  # it looks again, now as the only starter
        seat.leave()
        assert starting.result(30).agent_pid == node.agents()[0]


def test_a_relative_python_path_still_leads_an_agent_home(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer started with PYTHONPATH=src from its checkout has an agent in `/`."""
    source = Path(process.__file__).parents[2]
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("PYTHONPATH", source.name)
    assert node.start().call("who")["cwd"] == "/"


# -- the seat ----------------------------------------------------------------------------------


def test_a_seat_is_taken_once_and_free_after_it_was_left(runtime: Path) -> None:
    place = meeting_place("key")
    seat = take_seat(place)
    assert seat is not None
    assert seat.reachable()
    assert take_seat(place, wait_s=1e6) is None  # the first one listens: nothing to wait for
    seat.leave()
    again = take_seat(place)
    assert again is not None
    again.leave()
    assert os.listdir(place) == ["alive.lock"]


def test_a_seat_whose_socket_was_removed_is_no_longer_reachable(runtime: Path) -> None:
    """A cleaner of /tmp took the socket: trainers will start another agent, this one should end."""
    place = meeting_place("key")
    seat = take_seat(place)
    assert seat is not None
    os.unlink(os.path.join(place, "agent"))
    assert not seat.reachable()
    Path(place, "agent").touch()  # and what is there now is not ours to remove
    assert not seat.reachable()
    seat.leave()
    assert os.path.exists(os.path.join(place, "agent"))


def test_a_seat_held_by_one_who_never_listens_is_given_up(runtime: Path) -> None:
    place = meeting_place("key")
    seat = take_seat(place)
    assert seat is not None
    os.unlink(os.path.join(place, "agent"))
    assert take_seat(place, wait_s=0.05) is None
    seat.leave()


def test_a_seat_that_can_not_be_taken_is_not_held(runtime: Path) -> None:
    place = meeting_place("key")
    os.mkdir(os.path.join(place, "agent"))
    with pytest.raises(OSError, match="agent"):
        take_seat(place)
    os.rmdir(os.path.join(place, "agent"))
    seat = take_seat(place)
    assert seat is not None
    seat.leave()


# -- what goes wrong ---------------------------------------------------------------------------


def test_an_agent_that_fails_at_once_is_reported_with_what_it_said(node: Node) -> None:
    with pytest.raises(AgentGone, match="this agent fails on purpose") as gone:
        node.start("fails")
    assert gone.value.log == str(node.log)
    assert "ended at once" in str(gone.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HANDFAST_LINGER_S", "soon"), ("HANDFAST_LINGER_S", "-1"), ("HANDFAST_LINGER_S", "nan"),
        ("HANDFAST_LOG", "loud"), ("HANDFAST_NICE", "very"),
    ],
)  # fmt: skip
def test_a_setting_that_means_nothing_is_named_before_an_agent_is_started(
    node: Node, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the trainer is told, by the variable's name, and not by an agent's traceback."""
    monkeypatch.setenv(name, value)
    with pytest.raises(HandfastError, match=f"{name}='{value}'.*What to do: set") as caught:
        node.start()
    assert not isinstance(caught.value, AgentGone)
    assert not node.log.exists()


def test_settings_are_read_as_they_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANDFAST_LOG", raising=False)
    monkeypatch.delenv("HANDFAST_LINGER_S", raising=False)
    monkeypatch.delenv("HANDFAST_SPEAKS", raising=False)
    assert settings() == (logging.INFO, 60.0, Manners(), SPOKEN)
    monkeypatch.setenv("HANDFAST_LOG", "")
    assert settings() == (logging.INFO, 60.0, Manners(), SPOKEN)
    monkeypatch.setenv("HANDFAST_LOG", "debug")
    monkeypatch.setenv("HANDFAST_LINGER_S", "0.5")
    monkeypatch.setenv("HANDFAST_NICE", "7")
    monkeypatch.setenv("HANDFAST_SPEAKS", "1")
    assert settings() == (logging.DEBUG, 0.5, Manners(nice=7), SPOKEN[:1])


def test_an_agent_that_was_dead_before_anybody_looked_is_reported(node: Node) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    node.log.write_text("what it said")
    place = meeting_place("run@node")
    with pytest.raises(AgentGone, match="ended at once; it said:\nwhat it said"):
        process._await_agent(done.pid, place, str(node.log), time.monotonic() + 30)


def test_a_program_that_is_not_there_is_reported(node: Node) -> None:
    with pytest.raises(AgentGone, match="No such file or directory"):
        connect_or_start("run@node", str(node.log), argv=["/no/such/program"])


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "signal 9 ended it"),
        ("raise OSError('no process left')", r"it said:\n[\s\S]*no process left\s"),
    ],
)
def test_a_launcher_that_dies_is_reported(
    node: Node, launcher: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives for some ten milliseconds, and a node that runs out of memory kills as it likes."""
    monkeypatch.setattr(process, "_LAUNCHER", launcher)
    with pytest.raises(AgentGone, match=f"launcher of the agent failed: {said}.*What to do: see"):
        node.start()


def test_a_launcher_that_can_not_be_started_is_reported(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that can't fork for want of memory or of processes gets an OSError, too."""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(AgentGone, match=r"/no/such/python.*What to do: see"):
        connect_or_start("run@node", str(node.log), argv=["true"])


def test_an_agent_that_does_not_listen_in_time_is_reported(node: Node) -> None:
    with pytest.raises(AgentGone, match="did not listen in time"):
        node.start("late", wait_s=0.05)
    assert node.start().agent_pid == node.agents()[0]  # it comes after all, and is found


def test_a_starter_that_hangs_is_reported(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = process._open_lock(meeting_place("run@node"), "starting.lock")
    assert try_lock(lock)
    with pytest.raises(AgentGone, match="another process is starting the agent"):
        node.start(wait_s=0.05)
    os.close(lock)


def test_a_stopped_agent_is_named_and_not_replaced(node: Node) -> None:
    """Two agents on one set of domains would fence each other; a person must look."""
    client = node.start()
    os.kill(client.agent_pid, signal.SIGSTOP)
    with pytest.raises(AgentStuck, match=f"agent process {client.agent_pid} listens but"):
        node.start(wait_s=0.1)
    assert node.agents() == [client.agent_pid]


def test_who_looks_for_a_stopped_agent_waits_no_longer_than_wished(node: Node) -> None:
    """However long one that had to be started would be given: a test that fails here hangs."""
    client = node.start()
    os.kill(client.agent_pid, signal.SIGSTOP)
    with pytest.raises(AgentStuck, match="listens but"):
        node.start(wait_s=3600.0, patience_s=0.1)


def test_an_agent_of_another_handfast_is_named_and_not_replaced(node: Node) -> None:
    with pytest.raises(FormatError, match=r"versions 9\.\.9 .* trainer 1\.\.1.* SIGTERM"):
        node.start("old")
    assert len(node.agents()) == 1


def test_a_log_that_can_not_be_written_is_reported(node: Node, tmp_path: Path) -> None:
    node.log = tmp_path / "missing" / "agent.log"
    with pytest.raises(FileNotFoundError, match=r"missing/agent\.log"):
        node.start()


def test_a_log_is_kept_small_by_one_previous_one(node: Node) -> None:
    previous = Path(f"{node.log}.1")
    node.log.write_text("earlier\n")
    node.kill(node.start().agent_pid)
    assert node.log.read_text().startswith("earlier\n")
    assert not previous.exists()
    with open(node.log, "ab") as log:
        log.truncate(5 << 20)
    node.kill(node.start().agent_pid)
    assert previous.stat().st_size == 5 << 20
    assert node.log.stat().st_size < 1000


# -- where they meet ---------------------------------------------------------------------------


def test_the_meeting_place_is_private_and_short_and_the_same_for_all(runtime: Path) -> None:
    place = meeting_place("/a/very/long/path/" * 30 + "@node")
    assert place == meeting_place("/a/very/long/path/" * 30 + "@node")
    assert place != meeting_place("another")
    assert len(os.path.join(place, "agent")) < 100
    for path in (place, os.path.dirname(place)):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
        assert os.stat(path).st_uid == os.geteuid()
    assert os.path.dirname(place) == str(runtime / "handfast")


@pytest.mark.parametrize("why", ["unset", "missing", "too long", "another user's"])
def test_without_a_usable_runtime_directory_they_meet_in_tmp(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "unset":
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    elif why == "missing":
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    elif why == "too long":
        (tmp_path / ("x" * 80)).mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 80)))
    elif os.geteuid():
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/")
    else:
        os.chown(tmp_path, 65534, 65534)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = meeting_place(f"test_process {os.getpid()}")
    try:
        assert os.path.dirname(place) == f"/tmp/handfast-{os.geteuid()}"
        assert len(os.path.join(place, "agent")) < 100
    finally:
        os.rmdir(place)


def test_a_planted_directory_link_or_file_is_refused(runtime: Path, tmp_path: Path) -> None:
    """Whoever may make the directory first could stand in for the agent, and read every weight."""
    base = runtime / "handfast"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    base.symlink_to(elsewhere)
    with pytest.raises(Untrusted, match="is no directory"):
        meeting_place("key")
    base.unlink()
    base.touch()
    with pytest.raises(Untrusted, match="is no directory"):
        meeting_place("key")
    base.unlink()
    for mode in (0o770, 0o701, 0o755):
        base.mkdir()
        base.chmod(mode)
        with pytest.raises(Untrusted, match=f"open to others .mode {mode:04o}"):
            meeting_place("key")
        base.rmdir()
    assert list(elsewhere.iterdir()) == []
    place = Path(meeting_place("key"))
    place.chmod(0o777)
    for use in (lambda: meeting_place("key"), lambda: take_seat(str(place))):
        with pytest.raises(Untrusted, match="mode 0777"):
            use()


def test_a_planted_lock_link_is_not_followed(runtime: Path, tmp_path: Path) -> None:
    place = Path(meeting_place("key"))
    (place / "alive.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"alive\.lock"):
        take_seat(str(place))
    assert not (tmp_path / "victim").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
def test_a_directory_of_another_user_is_refused(runtime: Path) -> None:
    base = runtime / "handfast"
    base.mkdir(mode=0o700)
    os.chown(base, 65534, 65534)
    with pytest.raises(Untrusted, match="belongs to user 65534"):
        meeting_place("key")
