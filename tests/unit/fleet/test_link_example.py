"""Shows that the example of links runs as it says, and that its page has it word for word."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from handfast.fleet.identity import enroll

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "links" / "two.py"
CLOSED = "the link is down: the peer closed it. What to do: shake hands anew\n"


@contextmanager
def run(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Run the example; whatever still runs is killed, as by a crash."""
    argv = [sys.executable, str(EXAMPLE), *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_example_upgrades_is_restarted_and_rolls_back(tmp_path: Path) -> None:
    """Each line is a life of both: what was changed in one is where the next begins, and nothing
    is asked for twice."""
    left, right = str(tmp_path / "left"), str(tmp_path / "right")
    keys = [enroll(directory).id for directory in (left, right)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def lives(to: str) -> list[str]:
        """Start both, and wait until the dialer has left; gives what it said."""
        with run("listen", left, port, keys[1], to) as listens:
            for _ in range(100):
                with run("dial", right, port, keys[0], to) as dials:
                    said, _ = dials.communicate(timeout=60)
                if dials.returncode == 0:
                    break
                assert listens.poll() is None  # it does not listen yet
            assert listens.stdout is not None
            heard = [listens.stdout.readline() for _ in range(2)]
            assert heard == [said.splitlines(keepends=True)[0], CLOSED]
        return said.splitlines()

    def answers(first: str, then: str) -> list[str]:
        return [f"opened under {first}", f"{first} you said hello", f"{then} you said hello"]

    assert lives("1/1") == answers("1/1", "1/1")
    assert lives("1/2") == answers("1/1", "1/2")
    assert lives("1/2") == answers("1/2", "1/2")
    assert lives("1/3") == answers("1/2", "1/3")
    assert lives("1/3") == answers("1/3", "1/3")


def test_the_page_has_the_example_word_for_word() -> None:
    """So what can be read there can be run."""
    page = (ROOT / "docs" / "fleet" / "link.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(shown) == 1
    example = EXAMPLE.read_text(encoding="utf-8")
    assert f"\n{shown[0]}\n" in example
    assert {"import asyncio", "                await link.opened()"} <= set(shown[0].splitlines())
    assert len(example.splitlines()) < 80
