"""What the management controller says of its firmware, by Redfish; only where its address is given.

Six GETs and no more: the root's Managers (`FirmwareVersion`), Systems (`BiosVersion`) and
UpdateService (`FirmwareInventory`, each `Id` with its `Version`). These are properties of the
schemas Manager, ComputerSystem and SoftwareInventory (DMTF DSP0268). It takes no library: `sushy`
and `redfish` bring sessions, tasks, caches and four to seven packages, for what are six GETs here.

Settings, all of the environment: HANDFAST_BMC_URL (`https://bmc-17`), HANDFAST_BMC_USER,
HANDFAST_BMC_PASSWORD_FILE, HANDFAST_BMC_CA_FILE. Nothing else is followed but paths below /redfish/
of that same address, and no redirection, so that the password reaches nobody else.
"""

from __future__ import annotations

import base64
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from handfast.errors import UNREADABLE
from handfast.fleet.inventory.collector import BMC_URL, Collector
from handfast.fleet.inventory.facts import Fact, Tier, Want, spell
from handfast.fleet.inventory.host import Host, Unsure, asked

__all__ = ["BMC"]

ROOT: Final = "/redfish/v1/"
MOST: Final = 1 << 20  # bytes of one answer
MEMBERS: Final = 500  # of one collection: an HGX tray has some sixty
WAIT_S: Final = 10.0

_MANAGER: Final = Want("bmc.firmware", Tier.HOST)
_BIOS: Final = Want("bmc.bios", Tier.HOST)
_INVENTORY: Final = Want("bmc.inventory", Tier.HOST, family=True)

Document = dict[str, Any]


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow no redirection: what it leads to was not named by the operator."""


def _client(host: Host) -> Callable[[str], Document]:
    """Make the function that gets a path's document. Raises Unsure, as that does."""
    environ, url = host.environ, host.environ[BMC_URL].rstrip("/")
    if not url.startswith(("https://", "http://")):
        raise Unsure(f"{BMC_URL} is {url[:100]!r}: give https://HOST")
    context = ssl.create_default_context(cafile=environ.get("HANDFAST_BMC_CA_FILE") or None)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), _Stay()
    )
    headers = {"Accept": "application/json"}
    if user := environ.get("HANDFAST_BMC_USER"):
        with open(environ.get("HANDFAST_BMC_PASSWORD_FILE", ""), encoding="utf-8") as file:
            word = f"{user}:{file.read().rstrip(chr(10))}"
        headers["Authorization"] = "Basic " + base64.b64encode(word.encode()).decode()

    def get(path: str) -> Document:
        if not path.startswith("/redfish/"):
            raise Unsure(f"{url} leads to {path[:100]!r}, which is not below /redfish/")
        try:
            whole = url + path
            request = urllib.request.Request(whole, headers=headers)  # noqa: S310 - http(s) alone
            with opener.open(request, timeout=WAIT_S) as answer:
                return msgspec.json.decode(answer.read(MOST), type=Document)
        except (OSError, ValueError, *UNREADABLE) as error:
            raise Unsure(f"{url}{path}: {error}") from error

    return get


def _members(get: Callable[[str], Document], holder: Document, name: str) -> list[Document] | None:
    """Get all members of a collection that a document links to; None where it links to none."""
    link = holder.get(name)
    if link is None:
        return None
    listed = get(_path(link)).get("Members", [])
    return [get(_path(member)) for member in listed[:MEMBERS]]


def _path(link: Any) -> str:
    """Give what a Redfish link leads to."""
    found = link.get("@odata.id") if isinstance(link, dict) else None
    if not isinstance(found, str):
        raise Unsure(f"{link!r:.100} is no link")
    return found


def _versions(documents: list[Document] | None, name: str) -> str | None:
    if documents is None:
        return None
    said = [each[name] for each in documents if isinstance(each.get(name), str)]
    if not said:
        raise Unsure(f"none of {len(documents)} documents has {name}")
    return spell(said)


def _bmc(host: Host) -> Iterator[Fact]:
    wants, source = (_MANAGER, _BIOS, _INVENTORY), host.environ[BMC_URL]
    try:
        get = _client(host)
        root = get(ROOT)
    except (Unsure, OSError) as error:
        yield from (want.unknown(str(error), source) for want in wants)
        return
    yield asked(
        _MANAGER, source, lambda: _versions(_members(get, root, "Managers"), "FirmwareVersion")
    )
    yield asked(_BIOS, source, lambda: _versions(_members(get, root, "Systems"), "BiosVersion"))
    yield from _inventory(get, root, source)


def _inventory(get: Callable[[str], Document], root: Document, source: str) -> Iterator[Fact]:
    try:
        service = get(_path(root["UpdateService"])) if "UpdateService" in root else {}
        listed = _members(get, service, "FirmwareInventory")
    except Unsure as error:
        yield _INVENTORY.unknown(str(error), source)
        return
    if listed is None:
        yield _INVENTORY.absent(source)
        return
    yield _INVENTORY.known("read", source)
    said: dict[Want, list[str]] = {}
    for each in listed:
        name, version = each.get("Id"), each.get("Version")
        if isinstance(name, str) and isinstance(version, str):
            said.setdefault(_INVENTORY.below(name), []).append(version)
    yield from (want.known(spell(versions), source) for want, versions in said.items())


BMC: Final = Collector((_MANAGER, _BIOS, _INVENTORY), _bmc)
