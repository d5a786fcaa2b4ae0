"""The machine itself: the kernel that runs, its processor, its board.

Formats: /proc/sys/kernel/* of proc_sys_kernel(5); /proc/cpuinfo of proc_cpuinfo(5), whose x86 names
are `vendor_id`, `model name` and `microcode` (arch/x86/kernel/cpu/proc.c) and whose Arm names are
`CPU implementer` and `CPU part` (arch/arm64/kernel/cpuinfo.c); /sys/class/dmi/id/*, one value a
file, the serial's for root alone (drivers/firmware/dmi-id.c). All of Linux 6.12.

The names by which a machine is called are facts of each node for itself. None of them is its
identity: they are copied with a disk, changed by an operator, or empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Final

from handfast.fleet.inventory.collector import Collector
from handfast.fleet.inventory.facts import Fact, Kind, Tier, Want, spell
from handfast.fleet.inventory.host import Host, asked

__all__ = ["BOARD", "KERNEL", "PROC", "PROCESSOR", "SYS"]

PROC: Final = "/proc/version"  # always there where /proc shows the machine
SYS: Final = "/sys/class"  # always there where /sys does

_RELEASE: Final = Want("kernel.release", Tier.HOST)
_NAME: Final = Want("host.name", Tier.HOST, Kind.PER_NODE)
_ID: Final = Want("host.machine-id", Tier.HOST, Kind.PER_NODE)
_VENDOR: Final = Want("cpu.vendor", Tier.HOST)
_MODEL: Final = Want("cpu.model", Tier.HOST)
_MICROCODE: Final = Want("cpu.microcode", Tier.HOST)
_DMI: Final = {
    "product_name": Want("board.model", Tier.HOST),
    "bios_version": Want("board.bios", Tier.HOST),
    "product_serial": Want("board.serial", Tier.HOST, Kind.PER_NODE),
}


def _kernel(host: Host) -> Iterator[Fact]:
    for want, path, base in (
        (_RELEASE, "/proc/sys/kernel/osrelease", PROC),
        (_NAME, "/proc/sys/kernel/hostname", PROC),
        (_ID, "/etc/machine-id", "/etc"),
    ):
        yield asked(want, path, partial(host.text, path, base))


def _processor(host: Host) -> Iterator[Fact]:
    path = "/proc/cpuinfo"

    def among(*names: str) -> str | None:
        text = host.text(path, PROC) or ""
        for name in names:
            if values := re.findall(rf"^{name}\s*: *(.*?) *$", text, re.MULTILINE):
                return spell(dict.fromkeys(values))
        return None

    yield asked(_VENDOR, path, lambda: among("vendor_id", "CPU implementer"))
    yield asked(_MODEL, path, lambda: among("model name", "CPU part"))
    yield asked(_MICROCODE, path, lambda: among("microcode"))


def _board(host: Host) -> Iterator[Fact]:
    for name, want in _DMI.items():
        path = f"/sys/class/dmi/id/{name}"
        yield asked(want, path, partial(host.text, path, SYS))


KERNEL: Final = Collector((_RELEASE, _NAME, _ID), _kernel)
PROCESSOR: Final = Collector((_VENDOR, _MODEL, _MICROCODE), _processor)
BOARD: Final = Collector(tuple(_DMI.values()), _board)
