"""Show what a node's service answers, to whom, and what a rank makes of one that does not."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

pytest.importorskip("yaml")

import msgspec
from click.testing import CliRunner
from inventorykit import inventory, machine

from handfast.agent.frames import Untrusted
from handfast.cli.fleet import fleet
from handfast.errors import Blocked, FormatError, HandfastError
from handfast.fleet.gate.ask import ask, ask_signed, node_facts
from handfast.fleet.gate.node import write_node
from handfast.fleet.gate.wire import (
    LINE,
    MOST,
    read_reply,
    reply,
    request,
)
from handfast.fleet.identity import Statement, verify
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.facts import Tier, decode
from handfast.fleet.inventory.host import here
from handfast.gate import EXIT

NOW = datetime(2026, 12, 1, tzinfo=UTC)

# A service whose collections are counted, and do what the folder's files say: `wait` for `go`,
# `fail` or `die`; `size` is how many facts of 1,000 bytes are found. Its arguments are times.
SERVICE = """
import asyncio, os, sys, time
from inventorykit import inventory
from handfast.fleet.gate import serve as module
folder, fresh, module.LINE_S, module.LOOK_S = sys.argv[1], *map(float, sys.argv[2:])
def note(word):
    with open(f"{folder}/log", "a") as file:
        file.write(word + "\\n")
def collect():
    note("begin")
    while os.path.exists(f"{folder}/wait") and not os.path.exists(f"{folder}/go"):
        time.sleep(0.01)
    if os.path.exists(f"{folder}/die"):
        os.kill(os.getpid(), 9)
    number = str(open(f"{folder}/log").read().count("begin"))
    size = int(open(f"{folder}/size").read()) if os.path.exists(f"{folder}/size") else 0
    many = {f"gpu.{n}": "x" * 1000 for n in range(size)}
    note("end")
    if os.path.exists(f"{folder}/fail"):
        raise OSError(11, "Resource temporarily unavailable")
    return inventory(**{"kernel.release": number}, **many)
def ready():
    print("ready", flush=True)
asyncio.run(module.serve(f"{folder}/n.sock", collect, fresh_s=fresh, ready=ready))
"""

# One that listens as another user does, or as the same user; what it does with who comes is given.
OTHER = """
import os, signal, socket, sys
path, uid, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    os.chmod(path, 0o666)
    if uid != os.geteuid():
        os.setuid(uid)
    listener.listen(0)
    print("ready", flush=True)
    if what == "nothing":
        signal.pause()
    sock, _ = listener.accept()
    print("heard", len(sock.recv(300)), flush=True)
    if what == "silence":
        signal.pause()
    if what == "half":
        sock.sendall(b'{"inventory":{"format":1,"node":null,"fa')
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "flood":
        while True:
            sock.sendall(b"x" * 65536)
    sock.sendall(what.encode() + b"\\n{")
    sock.recv(1)
"""

# Callers that connect, and say nothing or half a line, as some user; they stay until told.
CROWD = """
import os, resource, socket, sys
path, count, uid, said = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 50, count + 50))
if uid != os.geteuid():
    os.setuid(uid)
crowd = []
for _ in range(count):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(said)
    crowd.append(sock)
print("ready", flush=True)
sys.stdin.read()
for sock in crowd:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # it was left already
        pass
told = [sock.recv(200) for sock in crowd]
print(sum(b"too many connections" in each for each in told), flush=True)
"""

# A rank that asks its node.
TOLD = """
import sys
from handfast.fleet.gate.ask import node_facts
from handfast.fleet.gate.clock import now
print(tuple(fact.name for fact in node_facts(sys.argv[1], now()).facts))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place that other users may look into, and whose path a socket's name has room for."""
    for path in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            path.chmod(path.stat().st_mode | 0o011)
    return tmp_path


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process and wait until it is ready; all of them are ended."""
    begun = []

    def go(*argv: str, ready: bool = True) -> subprocess.Popen[str]:
        run = subprocess.Popen(
            [sys.executable, *argv],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(run)
        if ready:
            line = run.stdout.readline()
            assert "ready" in line or "answers at" in line, run.communicate()
        return run

    yield go
    for run in begun:
        run.kill()
        run.communicate()


@pytest.fixture
def serving(start: Start, folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a service whose collections are counted."""

    def go(
        *, fresh: float = 1000, patience: float = 60, look: float = 60, ready: bool = True
    ) -> subprocess.Popen[str]:
        times = (str(fresh), str(patience), str(look))
        return start("-c", SERVICE, str(folder), *times, ready=ready)

    return go


def command(start: Start, *arguments: str, ready: bool = True) -> subprocess.Popen[str]:
    """Start the command."""
    return start("-m", "handfast", "fleet", "node", *arguments, ready=ready)


def log(folder: Path) -> list[str]:
    """What began and ended."""
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come; the test's own limit ends this."""
    pause = threading.Event()
    while not holds():
        pause.wait(0.01)


def at(folder: Path) -> str:
    """The service's socket."""
    return str(folder / "n.sock")


def caller(path: str, said: bytes = b"") -> socket.socket:
    """Connect and say something."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.sendall(said)
    return sock


def heard(sock: socket.socket) -> bytes:
    """All that is said to a caller."""
    told = b""
    with sock:
        while data := sock.recv(1 << 16):
            told += data
    return told


# What is answered


def test_it_answers_with_what_the_inventory_finds(start: Start, tmp_path: Path) -> None:
    """The host and fabric tiers of a recorded machine, to a rank, to `ask`, and to a shell."""
    machine("hgx", tmp_path / "root")
    path, root = at(tmp_path), str(tmp_path / "root")
    command(start, "--at", path, "--root", root)
    found = take(here(root), tiers=[Tier.HOST, Tier.FABRIC])
    assert ask(path) == found
    assert found.get("gpu.driver").value == "580.65.06"
    assert node_facts(path, NOW) == found
    line = heard(caller(path, b"handfast.node/1\n"))
    assert line.startswith(b'{"inventory":{"format":1,"node":null,"facts":[{"name":"')
    assert line.endswith(b"]}}\n")
    shown = CliRunner().invoke(fleet, ["ask", path])
    assert "580.65.06" in shown.output
    told = CliRunner().invoke(fleet, ["ask", path, "--json"])
    assert decode(told.output.encode(), "a test") == found
    (tmp_path / "rules.yaml").write_text(
        "{format: 1, facts: {gpu.driver: driver}, rules: {driver: {source: us, scope: node, "
        "minimum: {fact: gpu.driver, version: 590}}}}"
    )
    asked = ["admit", "--ask", path, "--rules", str(tmp_path / "rules.yaml"), "--enforce",
             "--into", str(tmp_path / "none.json")]  # fmt: skip
    judged = CliRunner().invoke(fleet, asked)
    assert (judged.exit_code, "runs driver 580.65.06" in judged.output) == (EXIT, True)
    assert not (tmp_path / "none.json").exists()


def test_it_signs_over_a_challenge_as_the_node_that_is_enrolled(
    start: Start, tmp_path: Path
) -> None:
    """Each start is another life of the node; nobody but the node of the key can answer so."""
    pytest.importorskip("cryptography")
    path, state = at(tmp_path), str(tmp_path / "state")
    key = CliRunner().invoke(fleet, ["enroll", state]).output.split()[-1]
    first = command(start, "--at", path, "--state", state)
    challenge = os.urandom(32)
    statement = ask_signed(path, challenge)
    node = verify(statement, "a test", challenge).node
    assert node is not None
    assert (node.key, node.counter) == (key, 1)
    assert ask(path).node == node
    told = CliRunner().invoke(fleet, ["ask", path, "--json", "--challenge", "00ff"])
    verify(msgspec.json.decode(told.output, type=Statement), "a test", b"\x00\xff")
    for words in (["inventory", "--state", state, "--json"], ["node", "--state", state]):
        other = CliRunner().invoke(fleet, words)  # it is the node for as long as it runs
        assert (other.exit_code, f"blocked by: process {first.pid}" in other.output) == (3, True)
    first.terminate()
    assert first.wait() == 0
    command(start, "--at", path, "--state", state)
    again = verify(ask_signed(path, challenge), "a test", challenge).node
    assert again is not None
    assert again.counter == 2


def test_without_a_key_it_says_that_it_does_not_sign(serving: Start, folder: Path) -> None:
    """And asks nobody to take an answer that is not signed for one."""
    serving()
    with pytest.raises(HandfastError, match="this node does not sign"):
        ask_signed(at(folder), b"\x01")
    assert log(folder) == []
    told = CliRunner().invoke(fleet, ["ask", at(folder), "--challenge", "01"])
    assert told.exit_code == 2
    for wrong in ("xyz", "00" * 65):
        told = CliRunner().invoke(fleet, ["ask", at(folder), "--json", "--challenge", wrong])
        assert told.exit_code == 2, told.output


# How often it collects


def test_eight_ranks_at_once_are_one_collection(serving: Start, folder: Path) -> None:
    """And those who ask later hear the same, for as long as it counts as fresh."""
    serving()
    (folder / "wait").touch()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, at(folder)) for _ in range(8)]
        until(lambda: log(folder) == ["begin"])
        (folder / "go").touch()
        assert {each.result().get("kernel.release").value for each in asked} == {"1"}
    ask(at(folder))
    assert log(folder) == ["begin", "end"]


def test_nothing_is_older_than_the_question_where_that_is_asked_for(
    serving: Start, folder: Path
) -> None:
    """Those who come while a collection runs share the next one; there are never two at once."""
    serving(fresh=0)
    (folder / "wait").touch()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, at(folder))
        until(lambda: log(folder) == ["begin"])
        others = [pool.submit(ask, at(folder)) for _ in range(7)]
        callers = [caller(at(folder), request()) for _ in range(3)]
        assert ask_refused(folder, b"nonsense\n")  # so all before it were heard
        (folder / "go").touch()
        assert first.result().get("kernel.release").value == "1"
        later = {each.result().get("kernel.release").value for each in others}
        assert "1" not in later
        assert all(b'"value":"1"' not in heard(each) for each in callers)
    assert log(folder) == ["begin", "end"] * (len(log(folder)) // 2)
    assert ask(at(folder)).get("kernel.release").value not in {"1", *later}


def ask_refused(folder: Path, said: bytes) -> str:
    """Say something that is no request; why it is refused."""
    with pytest.raises(HandfastError) as error:
        read_reply(heard(caller(at(folder), said)), "a test")
    return str(error.value)


def test_a_collection_that_fails_is_said_and_tried_again(serving: Start, folder: Path) -> None:
    """Nobody hears old facts for new ones, nor waits for ever."""
    serving(fresh=0)
    assert ask(at(folder)).get("kernel.release").value == "1"
    (folder / "fail").touch()
    with pytest.raises(HandfastError, match=r"nothing could be collected: .*\(EAGAIN\)"):
        ask(at(folder))
    (folder / "fail").unlink()
    assert ask(at(folder)).get("kernel.release").value == "3"


def test_an_answer_comes_whole_whatever_its_size(serving: Start, folder: Path) -> None:
    """Also where it is a little more than the kernel holds for one who reads later."""
    serving(fresh=0)
    for size in range(100, 320, 20):
        (folder / "size").write_text(str(size))
        assert len(ask(at(folder)).facts) == size + 1


def test_an_answer_that_nobody_would_read_is_not_sent(serving: Start, folder: Path) -> None:
    """The asker's bound is known to the service."""
    serving()
    (folder / "size").write_text("9000")
    with pytest.raises(HandfastError, match=f"; {MOST} are read"):
        ask(at(folder))


# Who is slow, silent or many


def test_what_is_no_request_is_refused(serving: Start, folder: Path) -> None:
    """Half a line, a line too long, another form; each is told, and others are answered."""
    serving()
    assert "is no request" in ask_refused(folder, b"handfast.node/2\n")
    assert f"more than {LINE} bytes" in ask_refused(folder, b"x" * 10_000)
    half = caller(at(folder), b"handfast.no")
    half.shutdown(socket.SHUT_WR)
    assert b"is no request" in heard(half)
    caller(at(folder), b"handfast").close()
    ask(at(folder))


def test_who_is_silent_is_left_at_a_limit(serving: Start, folder: Path) -> None:
    """So are those who do not read what they asked for; meanwhile others are answered."""
    serving(patience=0.3)
    (folder / "size").write_text("2000")
    silent, greedy = caller(at(folder), b"handfast"), caller(at(folder), request())
    assert len(ask(at(folder)).facts) == 2001
    assert b"no request came within 0.3 s" in heard(silent)
    slow = caller(at(folder), request())
    slow.recv(1)
    gone = select.poll()
    gone.register(slow, select.POLLRDHUP)
    gone.poll()
    assert not heard(slow).endswith(b"\n")
    assert not heard(greedy).endswith(b"\n")
    ask(at(folder))


@pytest.mark.parametrize("said", ["", "handfast.no", "handfast.node/1\n"])
def test_a_thousand_connections_keep_nobody_from_an_answer(
    serving: Start, start: Start, folder: Path, said: str
) -> None:
    """They are another user's (or, where we are no root, our own): he loses his oldest."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < 1100:
        pytest.skip("no process here may have a thousand connections")
    serving()
    (folder / "wait").touch()
    uid = 12345 if os.geteuid() == 0 else os.geteuid()
    with ThreadPoolExecutor(8) as pool:
        ranks = [pool.submit(ask, at(folder)) for _ in range(8 if os.geteuid() == 0 else 0)]
        until(lambda: log(folder) == ["begin"] or not ranks)
        crowd = start("-c", CROWD, at(folder), "1000", str(uid), said)
        ranks += [pool.submit(ask, at(folder)) for _ in range(8)]
        assert ask_refused(folder, b"nonsense\n")
        (folder / "go").touch()
        assert {each.result().get("kernel.release").value for each in ranks} == {"1"}
    told, _ = crowd.communicate("")
    assert int(told) >= 1000 - 256
    assert log(folder) == ["begin", "end"]


# One that ends


def test_a_socket_of_a_dead_service_is_replaced(serving: Start, folder: Path) -> None:
    """Until then it is dead: nobody answers, and no older file is taken for the answer."""
    first = serving()
    ask(at(folder))
    first.kill()
    first.wait()
    assert (folder / "n.sock").is_socket()
    with pytest.raises(HandfastError, match=r"nobody answers: .*ECONNREFUSED"):
        node_facts(at(folder), NOW)
    (folder / "n.sock.new").touch()  # of one that died before it had the name
    serving()
    ask(at(folder))
    assert sorted(each.name for each in folder.glob("n.sock*")) == ["n.sock", "n.sock.lock"]


def test_two_services_are_not_at_one_socket(start: Start, folder: Path) -> None:
    """The second ends with 3 and says why; the first goes on."""
    command(start, "--at", at(folder))
    second = command(start, "--at", at(folder), ready=False)
    _, why = second.communicate()
    assert (second.returncode, "another process serves at" in why) == (3, True)
    ask(at(folder))


def test_what_is_no_socket_is_not_replaced(start: Start, folder: Path) -> None:
    """Nor is a path taken that no socket can have."""
    (folder / "n.sock").write_text("mine")
    run = command(start, "--at", at(folder), ready=False)
    assert "is there, and no socket" in run.communicate()[1]
    assert (run.returncode, (folder / "n.sock").read_text()) == (3, "mine")
    run = command(start, "--at", f"{folder}/{'x' * 100}", ready=False)
    assert "too long for a socket" in run.communicate()[1]
    assert run.returncode == 2


def test_sigterm_answers_who_was_heard_and_removes_the_socket(serving: Start, folder: Path) -> None:
    """So that a restart costs no rank its facts; afterwards there is no socket, and no fault."""
    run = serving()
    (folder / "wait").touch()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, at(folder))
        until(lambda: log(folder) == ["begin"])
        run.send_signal(signal.SIGTERM)
        (folder / "go").touch()
        assert asked.result().get("kernel.release").value == "1"
    assert (run.wait(), run.stderr.read()) == (0, "")
    assert not (folder / "n.sock").exists()
    assert node_facts(at(folder), NOW) is None


def test_a_service_that_nobody_finds_ends(serving: Start, folder: Path) -> None:
    """Its socket was replaced by another's, which it leaves alone."""
    run = serving(look=0.05)
    with socket.socket(socket.AF_UNIX) as other:
        (folder / "n.sock").unlink()
        other.bind(at(folder))
        assert run.wait() == 1
        assert "was removed or replaced" in run.stderr.read()
        assert (folder / "n.sock").is_socket()


def test_a_service_that_is_killed_half_way_leaves_the_facts_unknown(
    serving: Start, start: Start, folder: Path
) -> None:
    """While it collects, or within its answer: an error, and never half of the facts."""
    run = serving(fresh=0)
    (folder / "size").write_text("2000")
    slow = caller(at(folder), request())
    slow.recv(1)
    run.kill()
    assert not heard(slow).endswith(b"\n")
    serving()
    (folder / "die").touch()
    with pytest.raises(HandfastError, match=r"ended after 0 bytes|ECONNRESET"):
        ask(at(folder))
    other = str(folder / "other.sock")
    start("-c", OTHER, other, str(os.geteuid()), "half")
    with pytest.raises(HandfastError, match="ended after 40 bytes of its answer"):
        ask(other)


# Whom a rank believes


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_users_service_is_not_asked(start: Start, folder: Path) -> None:
    """Whoever made the socket: it counts who listens. He hears not a byte."""
    path = at(folder)
    other = start("-c", OTHER, path, "12345", reply(inventory(gpu="1")).decode().strip())
    with pytest.raises(Untrusted, match="user 12345 listens there"):
        node_facts(path, NOW)
    assert other.stdout.readline() == "heard 0\n"


def test_in_a_user_namespace_nobody_passes_for_this_user(serving: Start, folder: Path) -> None:
    """There, users that are not mapped all look like one: also like a rank that is not mapped.

    What this user wrote is its own where it is mapped itself.
    """
    unshare = shutil.which("unshare")
    able = unshare and subprocess.run([unshare, "-Ur", "true"], check=False).returncode == 0
    if not able:
        pytest.skip("no user namespace can be made here")
    serving()

    def inside(how: str, path: str) -> str:
        done = subprocess.run(
            [unshare, how, sys.executable, "-c", TOLD, path],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    assert "listens there, and neither root nor this user" in inside("-U", at(folder))
    assert log(folder) == []
    file = str(folder / "node.json")
    write_node(file, inventory(gpu="1"))
    assert "and neither root's nor ours" in inside("-U", file)
    assert inside("-Ur", file) == "('gpu',)\n"
    assert inside("-Ur", at(folder)) == "('kernel.release',)\n"


@pytest.mark.parametrize(
    ("what", "error", "why"),
    [
        ("nothing", Blocked, "did not answer within 0.3 s; blocked by: .*n.sock"),
        ("silence", Blocked, "did not answer within 0.3 s"),
        ("flood", FormatError, f"more than {MOST} bytes"),
        ("{}", FormatError, "not one thing"),
        ('{"error":"no","statement":null}', HandfastError, "answers: no"),
        ("hello", FormatError, "no answer of a node"),
        ('{"statement":{"body":"","challenge":"","signature":""}}', FormatError, "nobody put"),
        ('{"inventory":{"format":2}}', FormatError, "format 2"),
        ('{"inventory":null}', FormatError, "no inventory of a node"),
    ],
)
def test_what_is_no_answer_is_an_error(
    start: Start, folder: Path, what: str, error: type[Exception], why: str
) -> None:
    """In time, in bounds, and named; where nobody accepts, too."""
    path, crowd = at(folder), []
    start("-c", OTHER, path, str(os.geteuid()), what)
    if what == "nothing":  # nor is there room to wait in
        crowd = [caller(path)]
    with pytest.raises(error, match=why):
        ask(path, 60.0 if what == "flood" else 0.3 if what in {"nothing", "silence"} else 20.0)
    for each in crowd:
        each.close()


def test_an_answer_to_a_challenge_is_signed(start: Start, folder: Path) -> None:
    """What is not signed is no answer."""
    start("-c", OTHER, at(folder), str(os.geteuid()), reply(inventory(gpu="1")).decode().strip())
    with pytest.raises(FormatError, match="without a statement"):
        ask_signed(at(folder), b"\x01")


def test_the_file_counts_where_there_is_no_socket_at_all(folder: Path) -> None:
    """And nothing is known where there is neither; what can't be looked at is not nothing."""
    path, said = str(folder / "node.json"), inventory(gpu="1")
    assert node_facts(path, NOW) is None
    write_node(path, said)
    os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    assert node_facts(path, NOW) == said
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(HandfastError, match="ELOOP"):
        node_facts(str(folder / "loop"), NOW)
    deep = folder / ("d" * 100)
    deep.mkdir()
    with contextlib.chdir(deep), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("n.sock")
    with pytest.raises(HandfastError, match="nobody answers: AF_UNIX path too long"):
        node_facts(str(deep / "n.sock"), NOW)
