"""A network of one node a namespace, joined by a bridge in one more: for rehearsals of UCX.

    ucx_net.py up|down

The namespaces are files below {work}, so nothing on the machine has a name for them, and no packet
leaves them. A node's only device is eth0; its address is 192.0.2.1, .2 and so on, which RFC 5737
keeps for examples. Needs root, and `unshare` and `nsenter` of util-linux, and `ip` of iproute2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

LIMIT_S = 10.0  # until a link is up; the kernel tells that late


def ip(namespace: Path, *commands: str, reads: bool = False) -> str:
    """Run commands of `ip` within a namespace."""
    how = (*commands[0].split(),) if reads else ("-batch", "-")
    given = None if reads else "\n".join(commands)
    argv = ("nsenter", f"--net={namespace}", "ip", *how)
    return subprocess.run(argv, input=given, check=True, capture_output=True, text=True).stdout


def make(namespace: Path) -> None:
    """Make a namespace that lasts until its file is unmounted."""
    namespace.touch()
    argv = ("unshare", f"--net={namespace}", "true")
    subprocess.run(argv, check=True, capture_output=True, text=True)


def up(work: Path, nodes: list[str]) -> None:
    """Make the bridge and the nodes, and wait until their links are up."""
    hub = work / "hub.net"
    make(hub)
    ip(hub, "link add name bridge type bridge", "link set bridge up")
    for at, node in enumerate(nodes, 1):
        own = work / f"{node}.net"
        make(own)
        ip(
            hub,
            f"link add name to-{node} type veth peer name eth0 netns {own}",
            f"link set to-{node} master bridge up",
        )
        ip(own, "link set lo up", f"address add 192.0.2.{at}/24 dev eth0", "link set eth0 up")
    end = time.monotonic() + LIMIT_S
    while not all("state UP" in ip(work / f"{n}.net", "link show eth0", reads=True) for n in nodes):
        if time.monotonic() > end:
            raise OSError(f"a link was not up within {LIMIT_S:g} s")
        time.sleep(0.02)


def down(work: Path, nodes: list[str]) -> None:
    """Unmount what is there of it; the kernel removes the devices."""
    for name in ("hub", *nodes):
        with suppress(subprocess.CalledProcessError):  # it was not made
            subprocess.run(("umount", work / f"{name}.net"), check=True, capture_output=True)


if __name__ == "__main__":
    told = json.loads(os.environ["HANDFAST_REHEARSAL"])
    try:
        {"up": up, "down": down}[sys.argv[1]](Path(told["work"]), told["nodes"])
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        sys.exit(f"this machine gives no network namespaces: {why.strip().splitlines()[-1]}")
