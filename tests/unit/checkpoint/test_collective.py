"""Shows at which address an agent is found by those of other nodes."""

from __future__ import annotations

import socket

import pytest

from handfast.checkpoint.collective import address_among
from handfast.errors import HandfastError

NODES = ("node0", "node1")


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the test's own surroundings away."""
    monkeypatch.delenv("HANDFAST_BIND", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)


def named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let this host's name mean an address."""

    def look_up(_: str) -> str:
        if not address:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return address

    monkeypatch.setattr(socket, "gethostbyname", look_up)


def test_a_job_of_one_node_stays_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under launchers that set no LOCAL_WORLD_SIZE: what counts is where the ranks are."""
    named(monkeypatch, "10.1.2.3")
    assert address_among(["node0", "node0"]) == "127.0.0.1"


def test_what_the_user_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDFAST_BIND", "10.9.9.9")
    assert address_among(["node0"]) == address_among(NODES) == "10.9.9.9"


def test_a_host_whose_name_means_loopback_is_found_by_its_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Debian's /etc/hosts names the host 127.0.1.1: the agents of other nodes would knock at their
    own doors, and the job would wait for ever."""
    named(monkeypatch, "127.0.1.1")
    seen = []

    def connect(self: socket.socket, address: tuple[str, int]) -> None:
        seen.append(address[0])

    monkeypatch.setenv("MASTER_ADDR", "10.1.2.1")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "getsockname", lambda _: ("10.1.2.3", 40000))
    assert address_among(NODES) == "10.1.2.3"
    assert seen == ["10.1.2.1"]


def test_the_name_serves_where_the_first_node_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named(monkeypatch, "10.1.2.3")
    assert address_among(NODES) == "10.1.2.3"
    monkeypatch.setenv("MASTER_ADDR", "no such host.invalid")
    assert address_among(NODES) == "10.1.2.3"


@pytest.mark.parametrize("own", ["127.0.1.1", ""])
@pytest.mark.parametrize("master", ["", "127.0.0.1"])
def test_where_nobody_could_be_reached_it_is_said_at_once(
    own: str, master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that only this node reaches would make every restore wait for ever."""
    named(monkeypatch, own)
    if master:
        monkeypatch.setenv("MASTER_ADDR", master)
    with pytest.raises(HandfastError, match="set HANDFAST_BIND on each node"):
        address_among(NODES)
