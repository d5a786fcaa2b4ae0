"""What every test shares: one thread, reproducible examples, and nothing left running behind it."""

import contextlib
import gc
import itertools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest
from hypothesis import settings

import handfast

ROOT = Path(__file__).resolve().parent.parent
MARK = "HANDFAST_TEST_ID"
GRACE_S = 10.0  # how long a process that was told to go may take
HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")  # one an interpreter

# Before any test imports torch, and for all processes that tests start: two cores are shared by
# all of them, and the order of a sum must not depend on how many threads share it.
os.environ["OMP_NUM_THREADS"] = "1"

# A script that starts tests in the background has Ctrl-C ignored, and so would all of its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("heavy", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rewrite`: write golden files anew instead of holding what is found against them."""
    parser.addoption("--rewrite", action="store_true", help="write golden files anew")


def pytest_sessionstart() -> None:
    """Refuse to judge another checkout's code than the one that these tests belong to."""
    found = Path(handfast.__file__).resolve().parent
    if found != ROOT / "src" / "handfast":
        pytest.exit(f"handfast is imported from {found}, not from {ROOT}: run `make venv`", 4)


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over all tests, and what they import: they stay anyway.

    With them a full collection takes a third of a second, and some tests need hundreds of them.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing is left out: there a test that could not be run is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what could not be run here, and why: a test that is skipped has shown nothing."""
    for skipped in terminalreporter.stats.get("skipped", []):
        why = skipped.longrepr[2] if isinstance(skipped.longrepr, tuple) else skipped.longrepr
        terminalreporter.write_line(f"could not run {skipped.nodeid}: {why}")


@pytest.fixture(scope="session", autouse=True)
def _session() -> Iterator[str]:
    """Keep this session's agents apart from all others, and see that none outlives it."""
    mark = f"{os.getpid()}-{time.time_ns()}"
    sockets = tempfile.mkdtemp(prefix="handfast-test-")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HANDFAST_")]:
            patch.delenv(name)
        patch.setenv("XDG_RUNTIME_DIR", sockets)
        patch.setenv("HANDFAST_BIND", "127.0.0.1")  # nodes that are played here have no network
        patch.setenv(MARK, mark)
        yield mark
    shutil.rmtree(sockets, ignore_errors=True)
    _fail_on(_leftovers(mark, frozenset()), "the tests")


@pytest.fixture(autouse=True)
def _nothing_left_running(
    _session: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fail a test that leaves a process behind: an agent, a trainer, a forked child."""
    mark = f"{_session}.{next(_numbers)}"
    monkeypatch.setenv(MARK, mark)
    before = _pids()
    yield
    _fail_on(_leftovers(mark, before), request.node.name)


_numbers = itertools.count()


def _fail_on(left: dict[int, str], who: str) -> None:
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        pytest.fail(f"{who} left running (killed now): {left}", pytrace=False)


def _leftovers(mark: str, before: AbstractSet[int]) -> dict[int, str]:
    """Processes that came and are still there after a while: by the mark, and by their parents.

    A child that only forked shows its parent's first environment, so the mark can't find it; an
    agent in a session of its own is nobody's child, so its parents can't. The mark of a session
    begins the marks of its tests.
    """
    deadline = time.monotonic() + GRACE_S
    while True:
        came = _pids() - before - {os.getpid()}
        left = {pid: _name(pid) for pid in came if _marked(pid, mark) or _ours(pid)}
        left = {pid: name for pid, name in left.items() if name}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def _marked(pid: int, mark: str) -> bool:
    wanted = re.escape(f"{MARK}={mark}".encode())
    return re.search(rb"(\A|\0)" + wanted + rb"[.\0]", _proc(pid, "environ")) is not None


def _ours(pid: int) -> bool:
    """A child, or a child's: what a fork server forks is its child, and looks like itself."""
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = _parent(pid)
    return False


def _name(pid: int) -> str:
    """The command line; empty for a zombie, and for the helpers that live with this process."""
    line = _proc(pid, "cmdline").replace(b"\0", b" ").strip()
    ours = any(name in line for name in HELPERS) and _parent(pid) == os.getpid()
    return "" if ours else line.decode(errors="replace")


def _parent(pid: int) -> int:
    fields = _proc(pid, "stat").rpartition(b") ")[2].split()  # the name before may hold anything
    return int(fields[1]) if fields else 0


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it is gone, or not ours
        return b""
