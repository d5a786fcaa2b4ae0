"""Shows what an agent keeps of a round, and in which life it speaks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handfast.agent import joining
from handfast.agent.joining import life_of, records_of
from handfast.agent.speech import SPOKEN
from handfast.errors import HandfastError
from handfast.link.life import Node
from handfast.link.session import Bound


def bound(peer: str, life: int) -> Bound:
    """A session with a life of a peer."""
    return Bound(bytes(16), Node("me", "boot", 1), Node(peer, "boot", life), SPOKEN[0])


def test_each_round_knows_its_own_peers_alone(tmp_path: Path) -> None:
    """A node that was replaced by another machine of its name begins to count anew."""
    path = str(tmp_path / "agent")
    held = records_of(path, "round-1")
    held(bound("a", 9))
    held.close()
    again = records_of(path, "round-1")
    assert again.known["a"].counter == 9
    again.close()
    later = records_of(path, "round-2")
    assert later.known == {}
    later(bound("a", 1))
    later.close()
    assert len(os.listdir(tmp_path)) == 1


def test_agents_of_one_directory_have_records_of_their_own(tmp_path: Path) -> None:
    """As in tests; one place has one agent otherwise."""
    for name in ("one", "two"):
        held = records_of(str(tmp_path / name), "round")
        held(bound(name, 1))
        held.close()
    assert set(records_of(str(tmp_path / "one"), "round").known) == {"one"}


def test_records_that_can_t_be_read_keep_no_agent_from_its_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are of this round alone; what is no file of ours and can't go is an error."""
    path = str(tmp_path / "agent")
    held = records_of(path, "round")
    held(bound("a", 1))
    held.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"what is this?" * 9)
    assert records_of(path, "round").known == {}
    assert "What to do" in caplog.text
    file.unlink(missing_ok=True)
    file.mkdir()
    with pytest.raises((HandfastError, OSError)):
        records_of(path, "round")


def test_each_life_has_a_higher_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one boot; whose id may be unknown."""
    one, other = life_of("a"), life_of("a")
    assert one.counter < other.counter
    assert one.boot == other.boot != ""

    def unreadable() -> str:
        raise HandfastError("no /proc")

    monkeypatch.setattr(joining, "boot_id", unreadable)
    assert life_of("a").boot == ""
