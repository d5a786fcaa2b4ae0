"""Shows that the suite notices what a test leaves running, and kills it."""

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
    tests = tmp_path / "tests"
    tests.mkdir()
    source = CONFTEST.read_text().replace("GRACE_S = 10.0", "GRACE_S = 0.2")
    (tests / "conftest.py").write_text(source.replace('ROOT / "src"', f"Path({str(SOURCES)!r})"))
    (tests / "test_it.py").write_text(HEAD.format(name=name) + body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        [*command, "-c", os.devnull], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ("left running" in done.stdout) == left, done.stdout
    assert done.returncode == (1 if left else 0)
