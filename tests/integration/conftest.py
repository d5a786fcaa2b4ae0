"""Puts the helpers of this room where its tests, and the trainers that they start, find them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., object]]:
    """Start trainers: ``launch(ranks, nodes=1)`` gives a Job. All are gone after the test."""
    from trainers import Job, Launcher

    monkeypatch.setenv("HANDFAST_LINGER_S", "20")
    launcher = Launcher(tmp_path)

    def start(ranks: int = 1, nodes: int = 1, **env: str) -> Job:
        return launcher.start(ranks, nodes, env)

    yield start
    launcher.end()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of a run that trainers of this process use; its agents are gone after the test."""
    from trainers import end_agents

    monkeypatch.setenv("HANDFAST_LINGER_S", "20")
    yield str(tmp_path / "run")
    end_agents()
