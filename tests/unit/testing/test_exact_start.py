"""Shows that what was started for a job that is tried out ends with it."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from handfast.agent import process
from handfast.testing.exact import start


def begun(tmp_path: Path) -> int:
    """The process of an agent that waits for a trainer."""
    with process.connect_or_start("a run", str(tmp_path / "log")) as client:
        return client.agent_pid


@pytest.mark.parametrize("stopped", [False, True])
def test_agents_that_a_killed_job_leaves_are_ended(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait a minute for it to come back; also one that hears no signal but SIGKILL."""
    if stopped:
        monkeypatch.setattr(start, "DRAIN_S", 0.1)
    with start.own_agents() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        pid = begun(tmp_path)
        agent = os.pidfd_open(pid)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
    poll = select.poll()
    poll.register(agent, select.POLLIN)
    assert poll.poll(0)  # it has ended, whoever is to reap it
    os.close(agent)
    assert not os.path.exists(runtime)


def test_a_meeting_place_that_an_agent_has_left_is_no_trouble() -> None:
    """A socket without a listener is what an agent that was killed leaves."""
    with start.own_agents() as runtime:
        place = Path(runtime, "handfast", "0" * 16)
        place.mkdir(parents=True)
        (place / "agent").touch()
