"""What nodes reach each other by: Fabric Manager and IMEX as they run, NICs and their firmware.

**Of a running process.** Fabric Manager and IMEX are asked for the version by what they run from,
`/proc/PID/exe --version`: the kernel keeps the program of a process for as long as it lives, also
where its file was replaced or deleted since. Only what runs as root, or as we do, is run for that,
and in our own namespaces: anybody may name a process of his like that, or be root of a container,
and would have his program run as root of the machine. So that is looked at through the directory of
the process, held open, and its program is run through it, too: it leads nowhere once the process is
gone, and never to who has its number next (fs/proc/base.c, Linux 6.12). They print
`Fabric Manager version is : 580.159.03` and `IMEX version is: 570.148.08` (as seen in public logs
and parsers of these versions). A process is known by its name, of which the kernel keeps 15 bytes
(TASK_COMM_LEN, proc_pid_comm(5)). Others end all the while, and that means nothing. Where one of
these ends as it is asked, a restart say, it is looked for again.

That there is none can only be said by who sees all processes: of the first PID namespace, whose
number is 4026531836 (PROC_PID_INIT_INO in include/linux/proc_ns.h), and not past `hidepid`.

**NICs.** /sys/class/infiniband/DEVICE/fw_ver (Documentation/ABI/stable/sysfs-class-infiniband,
Linux 4.10 and later) and board_id, which the mlx5, mlx4 and hfi1 drivers have (same document).
RoCE devices are there too. Ethernet's firmware is what ETHTOOL_GDRVINFO says. What a NIC's kernel
driver is besides the kernel's own, /sys/module/mlx5_core/version says where NVIDIA's OFED or DOCA
is loaded; the driver of Linux itself has no such file, or the kernel's own release in it (so
NVIDIA's container entry points, which compare the two).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from handfast.fleet.inventory.collector import Collector
from handfast.fleet.inventory.facts import Fact, Kind, Tier, Want, spell
from handfast.fleet.inventory.host import DELETED, Host, Unsure, asked
from handfast.fleet.inventory.machine import PROC, SYS
from handfast.store.files import describe

__all__ = ["ETHERNET", "FABRIC_MANAGER", "IMEX", "INFINIBAND", "OFED"]

FIRST_PIDS: Final = "pid:[4026531836]"
COMM: Final = 15
LOOKS: Final = 3

_VERSION: Final = re.compile(r"version is\s*:\s*(\S+)")
_IB: Final = Want("nic", Tier.FABRIC, family=True)
_ETHERNET: Final = Want("ethernet", Tier.FABRIC, family=True)
_OFED: Final = Want("ofed.version", Tier.FABRIC)
_OFED_DISK: Final = Want("ofed.version-on-disk", Tier.FABRIC, Kind.IGNORED)


def _daemon(name: str, program: str) -> Collector:
    """Make the collector of a daemon's running version."""
    want = Want(f"{name}.version", Tier.FABRIC)

    def collect(host: Host) -> Iterator[Fact]:
        try:
            said = _answers(host, want, program)
        except Unsure as error:
            yield want.unknown(str(error), "/proc")
            return
        if not said:
            yield want.absent(f"no process {program}")
            return
        lost = next((fact for fact in said if fact.value is None), None)
        source = " ".join(_source(host, fact.source) for fact in said)
        yield lost or want.known(spell(str(fact) for fact in said), source)

    return Collector((want,), collect)


def _answers(host: Host, want: Want, program: str) -> list[Fact]:
    """Ask each process of a program for its version. Raises Unsure where they can't be found."""
    said: list[Fact] = []
    for _ in range(LOOKS):
        pids = _processes(host, comm := program[:COMM])
        said = [asked(want, _exe(pid), partial(_runs, host, comm, pid)) for pid in pids]
        if all(_owners(host, pid) for pid in pids):
            break
    return said


def _processes(host: Host, comm: str) -> list[str]:
    """Find processes by name. Raises Unsure where not all can be seen and none was found."""
    names = [name for name in host.names("/proc", PROC) or () if name.isdigit()]
    # one that ends meanwhile has no name any more, or no owners
    named = [pid for pid in names if host.text(f"/proc/{pid}/comm", PROC) == comm]
    found = {pid: owners for pid in named if (owners := _owners(host, pid))}
    ours = [pid for pid, owners in found.items() if owners <= {0, os.getuid()}]
    if found and not ours:
        other = next(iter(found))
        raise Unsure(f"process {other} is of another user than root, so its program is not run")
    trusted = [pid for pid in ours if not host.live or _beside(host, pid)]
    if not trusted and (apart := [pid for pid in ours if _owners(host, pid)]):
        raise Unsure(f"process {apart[0]} runs in a container, so its program is not run here")
    if not found:
        if "1" not in names:
            raise Unsure("/proc hides the processes of others (hidepid)")
        # of another machine's /proc `self` is nobody
        if (space := host.link(f"/proc/{'self' if host.live else 1}/ns/pid")) != FIRST_PIDS:
            raise Unsure(f"only the processes of a container can be seen ({space})")
    return trusted


def _beside(host: Host, pid: str) -> bool:
    """Say whether a process sees the files, users and processes that we do."""
    try:
        return all(
            host.link(f"/proc/{pid}/ns/{name}") == host.link(f"/proc/self/ns/{name}")
            for name in ("mnt", "user", "pid")
        ) and os.path.samefile(host.at(f"/proc/{pid}/root"), host.at("/proc/self/root"))
    except (Unsure, OSError):
        return False


def _owners(host: Host, pid: str) -> set[int]:
    """Give the users that a process runs as; none where it has ended, be it reaped or not.

    The owner of its directory may be another: root for each that is not dumpable (proc(5)).
    """
    text = host.text(f"/proc/{pid}/status", PROC)
    if text is None or re.search(r"^State:\s+[XZ]", text, re.MULTILINE):
        return set()
    match = re.search(r"^Uid:((\s+\d+){4})$", text, re.MULTILINE)
    if match is None:
        raise Unsure(f"/proc/{pid}/status names no user")
    return set(map(int, match[1].split()))


def _exe(pid: str) -> str:
    return f"/proc/{pid}/exe"


def _runs(host: Host, comm: str, pid: str) -> str:
    """Ask what a process runs for its version, if it still is one by that name, and trusted."""
    if not host.live:
        return _version(host, pid)
    try:
        fd = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Unsure(f"/proc/{pid}: {describe(error)}") from error
    held = f"{os.getpid()}/fd/{fd}"  # the same process, by a name that nobody else gets
    try:
        named = host.text(f"/proc/{held}/comm", PROC) == comm
        if not (named and _owners(host, held) <= {0, os.getuid()} and _beside(host, held)):
            raise Unsure(f"process {pid} ended before its program could be run")
        return _version(host, held)
    except Unsure as error:
        raise Unsure(str(error).replace(held, pid)) from error
    finally:
        os.close(fd)


def _version(host: Host, pid: str) -> str:
    told = host.run(link := _exe(pid), "--version")
    match = _VERSION.search(told)
    if match is None:
        raise Unsure(f"`{link} --version` names no version: {told[:100]!r}")
    return match[1]


def _source(host: Host, link: str) -> str:
    """Name a process's program, and say so where its file is another one by now."""
    try:
        program = host.link(link)
    except Unsure:
        return link
    gone = program.endswith(DELETED)
    return f"{link} ({program.removesuffix(DELETED)}{', replaced since' if gone else ''})"


def _infiniband(host: Host) -> Iterator[Fact]:
    path = "/sys/class/infiniband"
    boards: dict[str, list[str]] = defaultdict(list)
    try:
        for device in host.names(path, SYS) or ():
            boards[_board(host, f"{path}/{device}")].append(device)
    except Unsure as error:
        yield _IB.unknown(str(error), path)
        return
    yield from _family(_IB, boards, path, lambda device: _firmware(host, f"{path}/{device}/fw_ver"))


def _board(host: Host, device: str) -> str:
    """Name a device's kind of board: by the vendor's own id, else by its PCI ids."""
    for name in ("board_id", "hca_type"):
        if found := host.text(f"{device}/{name}", SYS):
            return found
    ids = [host.text(f"{device}/device/{name}", SYS) for name in ("vendor", "device")]
    return "-".join(each or "unknown" for each in ids)


def _firmware(host: Host, path: str) -> str:
    found = host.text(path, SYS)
    if not found:
        raise Unsure(f"{path}: its driver does not say")
    return found


def _family(
    want: Want, boards: dict[str, list[str]], path: str, ask: Callable[[str], str | None]
) -> Iterator[Fact]:
    """Report what boards there are, and the firmware of each kind of board."""
    if not boards:
        yield want.absent(path)
        return
    yield want.known(spell(b for b, devices in boards.items() for _ in devices), path)
    for board, devices in boards.items():

        def versions(devices: list[str] = devices) -> str | None:
            found = [ask(device) for device in devices]
            return spell(each or "none" for each in found) if any(found) else None

        yield asked(want.below(f"{board}.firmware"), f"{path} {' '.join(devices)}", versions)


def _ethernet(host: Host) -> Iterator[Fact]:
    path = "/sys/class/net"
    drivers: dict[str, list[str]] = defaultdict(list)
    said: dict[str, str] = {}
    try:
        for name in host.names(path, SYS) or ():
            if host.names(f"{path}/{name}/device", path) is not None:  # there is hardware behind it
                driver, said[name] = host.firmware(name)
                drivers[driver or "unknown"].append(name)
    except Unsure as error:
        yield _ETHERNET.unknown(str(error), path)
        return
    yield from _family(_ETHERNET, drivers, path, lambda name: said[name] or None)


def _ofed(host: Host) -> Iterator[Fact]:
    home = "/sys/module/mlx5_core"

    def loaded() -> str | None:
        if host.names(home, "/sys/module") is None:
            return None
        own = host.text(f"{home}/version", home)
        same = own == host.text("/proc/sys/kernel/osrelease", PROC)
        return own if own and not same else "of the kernel"

    yield asked(_OFED, f"{home}/version", loaded)
    yield asked(_OFED_DISK, "ofed_info -s", lambda: host.run("ofed_info", "-s").rstrip(":"))


FABRIC_MANAGER: Final = _daemon("fabric-manager", "nv-fabricmanager")
IMEX: Final = _daemon("imex", "nvidia-imex")
INFINIBAND: Final = Collector((_IB,), _infiniband)
ETHERNET: Final = Collector((_ETHERNET,), _ethernet)
OFED: Final = Collector((_OFED, _OFED_DISK), _ofed)
