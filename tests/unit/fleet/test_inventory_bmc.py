"""Shows what is asked of a management controller, over a real socket, and what is never told it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from handfast.fleet.inventory.bmc import BMC
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.facts import Inventory, State, Tier, gather
from handfast.fleet.inventory.host import Host

V1 = "/redfish/v1"


def link(path: str) -> dict[str, str]:
    """A link of Redfish."""
    return {"@odata.id": path}


# The shape of DMTF's published mockups (DSP2043), with one manager and two systems.
DOCUMENTS: dict[str, Any] = {
    f"{V1}/": {
        "Managers": link(f"{V1}/Managers"),
        "Systems": link(f"{V1}/Systems"),
        "UpdateService": link(f"{V1}/UpdateService"),
    },
    f"{V1}/Managers": {"Members": [link(f"{V1}/Managers/BMC_0")]},
    f"{V1}/Managers/BMC_0": {"Id": "BMC_0", "FirmwareVersion": "25.04-3"},
    f"{V1}/Systems": {"Members": [link(f"{V1}/Systems/DGX"), link(f"{V1}/Systems/HGX_0")]},
    f"{V1}/Systems/DGX": {"Id": "DGX", "BiosVersion": "1.6.7"},
    f"{V1}/Systems/HGX_0": {"Id": "HGX_0"},
    f"{V1}/UpdateService": {"FirmwareInventory": link(f"{V1}/UpdateService/FirmwareInventory")},
    f"{V1}/UpdateService/FirmwareInventory": {
        "Members": [link(f"{V1}/UpdateService/FirmwareInventory/{n}") for n in ("A", "B")]
    },
    f"{V1}/UpdateService/FirmwareInventory/A": {"Id": "HGX_FW_GPU 1", "Version": "96.00.99.00.01"},
    f"{V1}/UpdateService/FirmwareInventory/B": {"Id": "HGX_FW_BMC_0"},
}


class Controller(ThreadingHTTPServer):
    """A management controller: its documents, and the headers of what it was asked."""

    def __init__(self) -> None:
        self.documents = dict(DOCUMENTS)
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Answering)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    """Answers GET with a document, a redirection (a text), or 404."""

    server: Controller

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Authorization"]))
        found = self.server.documents.get(self.path)
        body = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(302 if isinstance(found, str) else 404 if found is None else 200)
        if isinstance(found, str):
            self.send_header("Location", found)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def serve(controller: Controller) -> Iterator[Controller]:
    """Run a controller while a test does."""
    with controller:
        thread = threading.Thread(target=controller.serve_forever, args=(0.01,))
        thread.start()
        yield controller
        controller.shutdown()
        thread.join()


@pytest.fixture
def controller() -> Iterator[Controller]:
    """One that answers."""
    yield from serve(Controller())


@pytest.fixture
def other() -> Iterator[Controller]:
    """Another one, which nobody named."""
    yield from serve(Controller())


def ask(controller: Controller, **environ: str) -> Inventory:
    """What the collector finds, in this process."""
    return gather(BMC.collect(Host(environ={"HANDFAST_BMC_URL": controller.url, **environ})))


def test_firmware_is_listed_by_name(controller: Controller) -> None:
    """The controller's own, the BIOS of the system that has one, each part of the inventory."""
    host = Host(environ={"HANDFAST_BMC_URL": controller.url})
    taken = take(host, tiers=[Tier.HOST])
    assert taken.get("bmc.firmware").value == "25.04-3"
    assert taken.get("bmc.bios").value == "1.6.7"
    assert taken.get("bmc.inventory.HGX_FW_GPU_1").value == "96.00.99.00.01"
    assert taken.get("bmc.inventory.HGX_FW_BMC_0").state is State.ABSENT  # it tells no version
    assert {authorization for _, authorization in controller.asked} == {None}


def test_the_password_comes_from_a_file(controller: Controller, tmp_path: Path) -> None:
    """And is in no fact."""
    (tmp_path / "password").write_text("s3cret\n")
    file = str(tmp_path / "password")
    taken = ask(controller, HANDFAST_BMC_USER="root", HANDFAST_BMC_PASSWORD_FILE=file)
    words = base64.b64encode(b"root:s3cret").decode()
    assert {authorization for _, authorization in controller.asked} == {f"Basic {words}"}
    assert "s3cret" not in repr(taken)
    gone = {"HANDFAST_BMC_USER": "root", "HANDFAST_BMC_PASSWORD_FILE": "/gone"}
    lost = ask(controller, **gone)
    assert "/gone" in lost.get("bmc.firmware").problem


def test_nothing_leads_away_from_the_address(controller: Controller, other: Controller) -> None:
    """No redirection is followed, nor a link out of /redfish/: there goes the password."""
    controller.documents[f"{V1}/Managers"] = f"{other.url}{V1}/Managers"
    controller.documents[f"{V1}/Systems"] = {"Members": [link(f"{other.url}/x")]}
    controller.documents[f"{V1}/UpdateService"] = {"FirmwareInventory": link("@evil.example/x")}
    taken = ask(controller)
    assert "302" in taken.get("bmc.firmware").problem
    assert "not below /redfish/" in taken.get("bmc.bios").problem
    assert "not below /redfish/" in taken.get("bmc.inventory").problem
    assert other.asked == []


@pytest.mark.parametrize(
    ("spoil", "name", "words"),
    [
        (lambda d: d.pop(f"{V1}/"), "bmc.firmware", "404"),
        (lambda d: d.update({f"{V1}/": b"<html>"}), "bmc.bios", "JSON"),
        (lambda d: d.update({f"{V1}/": [1]}), "bmc.inventory", "Expected `object`"),
        (lambda d: d.update({f"{V1}/Systems": {"Members": [7]}}), "bmc.bios", "is no link"),
        (lambda d: d.update({f"{V1}/Managers/BMC_0": {}}), "bmc.firmware", "none of 1 documents"),
        (lambda d: d.pop(f"{V1}/UpdateService/FirmwareInventory/A"), "bmc.inventory", "404"),
        (lambda d: d.update({f"{V1}/": b"[" * (2 << 20)}), "bmc.firmware", ""),
    ],
)
def test_what_is_not_told_is_unknown(
    spoil: Callable[[dict[str, Any]], object], name: str, words: str, controller: Controller
) -> None:
    """A document that is missing, no JSON, without the property, far too long."""
    spoil(controller.documents)
    found = ask(controller).get(name)
    assert found.state is State.UNKNOWN
    assert words in found.problem


def test_a_service_that_is_not_offered_is_absent(controller: Controller) -> None:
    """The root links to none."""
    controller.documents[f"{V1}/"] = {}
    taken = ask(controller)
    assert [fact.state for fact in taken.facts] == [State.ABSENT] * 3


def test_a_controller_that_does_not_answer_is_unknown() -> None:
    """Nothing listens there."""
    taken = gather(BMC.collect(Host(environ={"HANDFAST_BMC_URL": "http://127.0.0.1:1"})))
    assert "refused" in taken.get("bmc.firmware").problem


@pytest.mark.parametrize("url", ["file:///etc", "ftp://bmc-17", "bmc-17"])
def test_an_address_of_another_kind_is_not_opened(url: str) -> None:
    """Python would read a file of this node by it, and call that a controller."""
    taken = gather(BMC.collect(Host(environ={"HANDFAST_BMC_URL": url})))
    assert {fact.state for fact in taken.facts} == {State.UNKNOWN}
    assert "give https://HOST" in taken.get("bmc.firmware").problem
