"""What a directory lies on, by what the kernel says of it: memory, a disk, something shared.

A file system may lie on another one: an overlay on that of its upper directory, a loop device on
that of its backing file, a mapped device on several disks. All of it is followed, as far as it can
be seen from here. In a container much of it can't, and then that is said.
"""

import os
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from handfast.store.files import told_by_kernel

__all__ = ["Medium", "medium"]

VOLATILE: Final = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
MEMORY: Final = re.compile(r"(zram|ram)\d+")  # disks that are made of it
SHARED: Final = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "beegfs", "gpfs", "afs",
                 "gfs2", "ocfs2", "virtiofs"}  # fmt: skip
RISKY: Final = {
    "nobarrier": "the device's cache is not flushed",
    "barrier=0": "the device's cache is not flushed",
    "data=writeback": "files may hold old bytes after a crash",
    "volatile": "syncs are ignored",
    "fsync=volatile": "syncs are ignored",
    "fsync=nobarrier": "the device's cache is not flushed",
}
DEEPEST: Final = 8  # file systems one on another; in a container a path may lead back to itself


class Medium(NamedTuple):
    """What the kernel says of a file system, or of a disk in memory, and of what that lies on.

    `unseen` is what could not be looked at from here.
    """

    kind: str
    options: tuple[str, ...]
    device: str
    below: tuple["Medium", ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def volatile(self) -> bool:
        """Whether it is memory somewhere on the way down: nothing on it outlives a restart."""
        here = self.kind in VOLATILE or bool(MEMORY.fullmatch(os.path.basename(self.device)))
        lies = not {"volatile", "fsync=volatile"}.isdisjoint(self.options)
        return here or lies or any(each.volatile for each in self.below)

    @property
    def shared(self) -> bool:
        """Whether other hosts may have it mounted, too, or a program of somebody's answers."""
        here = self.kind.startswith("fuse") or self.kind in SHARED
        return here or any(each.shared for each in self.below)

    def __str__(self) -> str:
        return " on ".join([f"{self.kind} ({self.device})", *map(str, self.below)])

    def warnings(self) -> tuple[str, ...]:
        """What its mount options give up, and what could not be seen."""
        risks = [f"{self.kind} is mounted with {o}: {RISKY[o]}" for o in self.options if o in RISKY]
        hidden = [f"{self.kind} lies on {what}: whether that is memory is not known"
                  for what in self.unseen]  # fmt: skip
        return (*risks, *hidden, *(line for each in self.below for line in each.warnings()))


def medium(path: str, deep: int = 0) -> Medium:
    """Look a directory's file system up in the kernel's table of mounts. Raises OSError."""
    real = os.path.realpath(path)
    best, number, found = -1, "", Medium("unknown", (), "")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields, _, rest = line.partition(" - ")
            _, _, device, _, point, options, *_ = fields.split()
            point = _spelled(point)
            kind, source, *more = rest.split()
            below = real == point or real.startswith(point.rstrip("/") + "/")
            if below and len(point) >= best:  # the last one on a place hides those before
                best, number = len(point), device
                all_options = (*options.split(","), *_spelled(",".join(more)).split(","))
                found = Medium(kind, tuple(dict.fromkeys(all_options)), source)
    return _with_what_is_below(found, number, deep)


def _spelled(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)


def _with_what_is_below(found: Medium, number: str, deep: int) -> Medium:
    below: list[Medium] = []
    unseen: list[str] = []

    def follow(place: str) -> None:
        if deep < DEEPEST and os.path.isabs(place) and os.path.exists(place):
            below.append(medium(place, deep + 1))
        else:
            unseen.append(f"{place or 'something'}, which can't be seen from here")

    if found.kind == "overlay":
        named = (o.removeprefix("upperdir=") for o in found.options if o.startswith("upperdir="))
        follow(next(named, ""))
    for disk in _disks(number, found.device):
        name = os.path.basename(disk)
        if MEMORY.fullmatch(name) and name != os.path.basename(found.device):
            below.append(Medium("disk", (), f"/dev/{name}"))
        if os.path.isdir(f"{disk}/loop"):
            follow(told_by_kernel(f"{disk}/loop/backing_file"))
        elif name.startswith("loop"):
            unseen.append(f"the loop device {name}, whose file can't be seen from here")
    return found._replace(below=tuple(below), unseen=tuple(unseen))


def _disks(number: str, device: str) -> Iterator[str]:
    """Where /sys shows the disks that a device consists of in the end."""
    if number.startswith("0:") and device.startswith("/dev/"):  # btrfs has numbers of its own
        try:
            own = os.stat(device).st_rdev
        except OSError:
            return
        number = f"{os.major(own)}:{os.minor(own)}"
    ahead = [os.path.realpath(f"/sys/dev/block/{number}")]
    while ahead:
        at = ahead.pop()
        if os.path.exists(f"{at}/partition"):
            at = os.path.dirname(at)
        made_of = os.listdir(f"{at}/slaves") if os.path.isdir(f"{at}/slaves") else []
        ahead += [os.path.realpath(f"{at}/slaves/{name}") for name in made_of]
        if not made_of and os.path.isdir(at):
            yield at
