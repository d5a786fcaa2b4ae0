"""Shows that the suite notices what a test leaves running, kills it, and names what it skips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
SOURCES = CONFTEST.parent.parent / "src"

EXECUTED = """
    subprocess.Popen([sys.executable, "-c", WAIT], start_new_session=True)
"""
ORPHANED = """
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WAIT!r}])"
    subprocess.run([sys.executable, "-c", starts], check=True)
"""
FORKED = """
    if os.fork() == 0:
        while os.getppid():
            time.sleep(1)
"""
SERVED = """
    import multiprocessing
    multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,)).start()
"""
SERVER = """
    import multiprocessing
    child = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
"""
REAPED = """
    child = subprocess.Popen([sys.executable, "-c", WAIT])
    child.kill()
    child.wait()
"""
HEAD = """
import os, subprocess, sys, time
WAIT = "import time; time.sleep(600)  # left by {name}"
def test_something():
"""


@pytest.mark.parametrize(
    ("name", "body", "left"),
    [
        ("executed", EXECUTED, True),
        ("orphaned", ORPHANED, True),
        ("forked", FORKED, True),
        ("served", SERVED, True),
        ("server", SERVER, False),
        ("reaped", REAPED, False),
    ],
)
def test_a_test_that_leaves_a_process_fails(
    tmp_path: Path, name: str, body: str, left: bool
) -> None:
    """Whether it was started anew, given to init, or forked, by itself or by a fork server."""
    done = suite(tmp_path, HEAD.format(name=name) + body)
    assert ("left running" in done.stdout) == left, done.stdout
    assert done.returncode == (1 if left else 0)


@pytest.mark.parametrize("ci", ["", "true"])
def test_what_could_not_be_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str
) -> None:
    """Shows that a skip is told with its reason, whoever asks for the shortest output, and that
    it fails CI, where nothing is left out."""
    monkeypatch.setenv("CI", ci)
    done = suite(tmp_path, "import pytest\ndef test_one():\n    pytest.skip('no spin here')\n")
    assert "could not run tests/test_it.py::test_one: Skipped: no spin here" in done.stdout
    assert done.returncode == (1 if ci else 0)


@pytest.mark.xdist_group("jobs")
def test_groups_are_kept_together(request: pytest.FixtureRequest) -> None:
    """Shows that workers know of groups: what is measured once for a module is measured once, and
    jobs of several processes don't take the processors from each other. pytest 9.2 hides them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("there are no workers")
    assert request.node.nodeid.endswith("@jobs")


def suite(home: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run one file of tests under the suite's own conftest."""
    tests = home / "tests"
    tests.mkdir()
    source = CONFTEST.read_text().replace("GRACE_S = 10.0", "GRACE_S = 0.2")
    (tests / "conftest.py").write_text(source.replace('ROOT / "src"', f"Path({str(SOURCES)!r})"))
    (tests / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    return subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(home)],
        cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
