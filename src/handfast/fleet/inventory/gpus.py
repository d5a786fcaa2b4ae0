"""The GPU driver that is loaded, and the firmware that its GPUs run. No driver call is made.

Formats, of NVIDIA's open-gpu-kernel-modules 580, kernel-open/nvidia/nv-procfs.c:
/proc/driver/nvidia/version begins with `NVRM version: NVIDIA UNIX x86_64 Kernel Module  VERSION`
or, for the open modules, `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  VERSION`;
/proc/driver/nvidia/gpus/ADDRESS/information has a line each for `Model`, `Video BIOS` and, where
the driver knows it, `GPU Firmware` (that of the GSP; N/A where none is in use). A GPU that the
driver has not initialised shows `??.??.??.??.??` for its BIOS.

What `modinfo` says is the driver on the disk, which the next load would take. It is told, and never
compared: the two differ from an upgrade to the next reboot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from handfast.fleet.inventory.collector import Collector
from handfast.fleet.inventory.facts import Fact, Kind, State, Tier, Want, spell
from handfast.fleet.inventory.host import Host, Unsure, asked
from handfast.fleet.inventory.machine import PROC

__all__ = ["DRIVER", "GPUS"]

_HOME: Final = "/proc/driver/nvidia"
_VERSION: Final = re.compile(
    r"NVRM version: +NVIDIA UNIX (?P<flavour>.*?Kernel Module.*?) {2,}(?P<version>\d+(\.\d+)+)"
)
_LOADED: Final = Want("gpu.driver", Tier.HOST)
_FLAVOUR: Final = Want("gpu.driver-flavour", Tier.HOST)
_DISK: Final = Want("gpu.driver-on-disk", Tier.HOST, Kind.IGNORED)
_COUNT: Final = Want("gpu.count", Tier.HOST)
_MODEL: Final = Want("gpu.model", Tier.HOST)
_VBIOS: Final = Want("gpu.vbios", Tier.HOST)
_GSP: Final = Want("gpu.gsp", Tier.HOST)


def _driver(host: Host) -> Iterator[Fact]:
    path = f"{_HOME}/version"

    def said() -> re.Match[str] | None:
        text = host.text(path, PROC)
        if text is None:
            if (host.names("/sys/module", "/sys/module") or []).count("nvidia"):
                raise Unsure(f"the module is loaded, but {path} is not there")
            return None
        match = _VERSION.search(text)
        if match is None:
            raise Unsure(f"{path}: can't be read as a driver's version: {text[:100]!r}")
        return match

    def version() -> str | None:
        match = said()
        return match["version"] if match else None

    def flavour() -> str | None:
        match = said()
        return ("open" if "Open" in match["flavour"] else "proprietary") if match else None

    yield asked(_LOADED, path, version)
    yield asked(_FLAVOUR, path, flavour)
    command = ("modinfo", "-F", "version", "nvidia")
    yield asked(_DISK, " ".join(command), lambda: host.run(*command))


def _gpus(host: Host) -> Iterator[Fact]:
    path = f"{_HOME}/gpus"
    wants = (_COUNT, _MODEL, _VBIOS, _GSP)
    try:
        places = host.names(path, PROC)
        told = [host.text(f"{path}/{place}/information", path) or "" for place in places or ()]
    except Unsure as error:
        yield from (want.unknown(str(error), path) for want in wants)
        return
    if not told:
        yield from (want.absent(path) for want in wants)
        return
    yield _COUNT.known(str(len(told)), path)
    source = f"{path}/*/information"
    yield asked(_MODEL, source, lambda: spell(_line("Model", text) for text in told))
    yield asked(_VBIOS, source, lambda: spell(_line("Video BIOS", text) for text in told))
    firmware = asked(_GSP, source, lambda: spell(_line("GPU Firmware", text) for text in told))
    none_used = firmware.state is State.KNOWN and firmware.value == "N/A"
    yield _GSP.absent(source) if none_used else firmware


def _line(name: str, text: str) -> str:
    found = re.search(rf"^{name}:\s*(.*?)\s*$", text, re.MULTILINE)
    if found is None:
        raise Unsure(f"a GPU has no line `{name}`: the driver is older, or has not initialised it")
    if "??" in found[1]:
        raise Unsure(f"`{name}` is {found[1]}: the driver has not initialised that GPU")
    return found[1]


DRIVER: Final = Collector((_LOADED, _FLAVOUR, _DISK), _driver)
GPUS: Final = Collector((_COUNT, _MODEL, _VBIOS, _GSP), _gpus)
