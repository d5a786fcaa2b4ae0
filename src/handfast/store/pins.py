"""Pins: how a reader keeps an epoch from being released while it reads.

A pin is a file `pins/<generation>-<step>-<nonce>.json` in the domain's directory. The reader
*must* make its pin durable and only then look whether the manifest is there; who releases *must*
rename the manifest away and only then look at the pins, and rename it back if there is one. So
one of the two sees the other. A pin never expires by time: it is taken away by the reader, by
somebody who has proof that the reader is dead, or by an operator (it is one file to unlink).
"""

import contextlib
import os
import re
import socket
from typing import Annotated, Final, Self

import msgspec

from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import UNREADABLE, HandfastError, Refused
from handfast.store.claims import domain_path
from handfast.store.files import (
    TEMPORARY,
    Files,
    discard,
    read_file,
    reading,
    told_by_kernel,
    write_file,
    writing,
)
from handfast.store.shelf import find

__all__ = ["Holder", "Pin", "pin", "pinned", "pins"]

NAME: Final = re.compile(r"(0|[1-9]\d*)-(0|[1-9]\d*)-[0-9a-f]+\.json")

HOLDER_MAX: Final = 1 << 20  # bytes; the purpose may have a path in it


class Holder(msgspec.Struct, frozen=True):
    """Who holds a pin, and what for: enough to ask, or to prove that it is dead.

    `boot` is the kernel's name for its boot, `namespaces` are those in which the process has its
    number and its start, and `started` is that start in clock ticks. Where one of them is empty
    (it could not be found out, or an older release made the pin), nothing can be proved.
    """

    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    host: str
    purpose: str
    boot: str = ""
    namespaces: str = ""
    started: str = ""

    @classmethod
    def here(cls, purpose: str) -> Self:
        """This process."""
        boot, namespaces = _within()
        return cls(os.getpid(), socket.gethostname(), purpose, boot, namespaces, _start_of("self"))


_HOLDER: Final = msgspec.json.Decoder(Holder)


class Pin:
    """One held epoch; `holder` is None if the pin's file can't be read (it holds all the same)."""

    def __init__(self, files: Files, path: str, epoch: Epoch, holder: Holder | None) -> None:
        self._files = files
        self.path = path
        self.epoch = epoch
        self.holder = holder

    def release(self) -> None:
        """Take the pin away; once more does no harm. Raises SaveFailed if it can't be done."""
        with writing("release the pin", self.path):
            with contextlib.suppress(FileNotFoundError):
                self._files.unlink(self.path)
            self._files.fsync_dir(os.path.dirname(self.path))

    def ended(self) -> bool | None:
        """Whether its reader has provably ended; None where that can't be told from here.

        A process has its number and its start within one boot of one kernel, and there within
        namespaces. Seen from others, the number is another process's or nobody's while the reader
        lives; and containers of several machines may have one host name.
        """
        holder = self.holder
        if holder is None or not (holder.boot and holder.namespaces):
            return None
        if (holder.boot, holder.namespaces) != _within():
            return None
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # there is one, of another user
        if os.readlink("/proc/self") != str(os.getpid()):
            return False  # this /proc counts otherwise; the number is taken, maybe by the reader
        started = _start_of(str(holder.pid))
        return bool(started and holder.started) and started != holder.started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def pin(files: Files, root: str, name: str, epoch: Epoch, purpose: str) -> Pin:
    """Hold an epoch of a domain until the pin is released, also beyond this process's death.

    Order: a temporary file, synced; its final name; the directory, synced; then a look for the
    manifest. Raises Refused(MISSING) if the epoch is not there, or is going this moment, and
    SaveFailed if the pin can't be made durable; both leave no pin.
    """
    domain = domain_path(root, name)
    holder = Holder.here(purpose)
    path = f"{domain}/pins/{epoch.generation}-{epoch.step}-{os.urandom(8).hex()}.json"
    made = Pin(files, path, epoch, holder)
    try:
        with writing("pin an epoch", path):
            if not files.exists(f"{domain}/pins"):
                with contextlib.suppress(FileExistsError):  # the domain's owner must list it
                    files.mkdir(f"{domain}/pins", like=domain)
            files.fsync_dir(domain)
            write_file(files, path + TEMPORARY, msgspec.json.encode(holder))
            files.rename(path + TEMPORARY, path)
            files.fsync_dir(f"{domain}/pins")
        with reading(domain):
            there = find(files, domain, epoch)
    except BaseException:
        discard(files, path + TEMPORARY, path)
        raise
    if not there:
        made.release()
        raise Refused(
            f"epoch {epoch} has no manifest in {domain}",
            verdict=Verdict.MISSING,
            shards=(name,),
            remedy="choose an epoch that the domain retains",
        )
    return made


def pins(files: Files, root: str, name: str) -> tuple[Pin, ...]:
    """All pins of a domain, oldest epoch first. Raises HandfastError where they can't be listed."""
    domain = domain_path(root, name)
    found = []
    for entry, epoch in _names(files, domain):
        path = f"{domain}/pins/{entry}"
        try:
            holder = _HOLDER.decode(read_file(files, path, HOLDER_MAX))
        except (HandfastError, *UNREADABLE):
            holder = None
        found.append(Pin(files, path, epoch, holder))
    return tuple(sorted(found, key=lambda made: (made.epoch, made.path)))


def pinned(files: Files, domain: str) -> set[Epoch]:
    """The epochs that are pinned in a domain's directory; the name alone holds.

    Raises HandfastError, naming the place, where it can't be told.
    """
    return {epoch for _, epoch in _names(files, domain)}


def _names(files: Files, domain: str) -> list[tuple[str, Epoch]]:
    with reading(f"{domain}/pins"):
        there = files.listdir(f"{domain}/pins") if files.exists(f"{domain}/pins") else ()
    return [
        (name, Epoch(int(match[1]), int(match[2])))
        for name in there
        if (match := NAME.fullmatch(name))
    ]


def _within() -> tuple[str, str]:
    """The boot of the kernel, and the namespaces in which processes have numbers and starts."""
    there = (f"/proc/self/ns/{kind}" for kind in ("pid", "time"))  # old kernels lack the second
    namespaces = " ".join(os.readlink(path) for path in there if os.path.lexists(path))
    return told_by_kernel("/proc/sys/kernel/random/boot_id"), namespaces


def _start_of(process: str) -> str:
    """When a process was started, in ticks since the boot; empty where it can't be told."""
    fields = told_by_kernel(f"/proc/{process}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""  # the 22nd; the name, which ends in ), is the 2nd
