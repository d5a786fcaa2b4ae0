"""Where collectors look: a root directory, an environment, a process, and commands with a limit.

Everything is relative to a root, so that a node agent in a container can look at its host (mounted
at `/host`, say), and the recorded files of a real machine can be looked at in a test.

That a file is not there means something only where files of its kind can be seen at all: a
container without `/sys` knows nothing of its NICs. So whoever reads names a second path that is
always there where the first could be. A file below /proc/PID whose process ends after it was
opened is not there either: its read fails with ESRCH (fs/proc/base.c, Linux 6.12).
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import pwd
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from handfast.fleet.inventory.facts import Fact, Want
from handfast.store.files import describe

__all__ = ["Host", "Unsure", "asked", "here", "mapped_files"]

LIMIT: Final = 1 << 20  # bytes of a file that are read: files of the kernel are far shorter
GONE: Final = (FileNotFoundError, NotADirectoryError, ProcessLookupError)
DELETED: Final = " (deleted)"

# linux/sockios.h and linux/ethtool.h, Linux 6.12: a request, and its answer of 196 bytes, of which
# bytes 4 to 36 are the driver's name and bytes 68 to 100 the firmware's version.
SIOCETHTOOL: Final = 0x8946
ETHTOOL_GDRVINFO: Final = 3
DRVINFO: Final = 196


class Unsure(Exception):
    """It can't be known here; the message says why."""


class Host(msgspec.Struct, frozen=True):
    """A machine, and the process on it whose job tier is asked for. Plain values throughout.

    ``maps`` are the files that are mapped in that process, as /proc/PID/maps names them;
    ``modules`` the versions of Python modules that it has loaded. ``commands`` is None on a live
    machine; else it holds the output of each command line that was recorded.
    """

    root: str = "/"
    environ: dict[str, str] = {}
    maps: tuple[str, ...] = ()
    modules: dict[str, str] = {}
    home: str = ""
    directory: str = "/"
    commands: dict[str, str] | None = None

    @property
    def live(self) -> bool:
        """Whether this is the machine that we run on, seen from within."""
        return self.commands is None and self.root == "/"

    def at(self, path: str) -> str:
        """Give where a path of the machine is to be found."""
        return path if self.root == "/" else f"{self.root.rstrip('/')}{path}"

    def data(self, path: str, base: str, limit: int = LIMIT) -> bytes | None:
        """Read a file's bytes; None where it is not there and ``base`` is. Raises Unsure."""
        try:
            with open(self.at(path), "rb") as file:
                found = file.read(limit + 1)
        except GONE:
            self._look(path, base)
            return None
        except OSError as error:
            raise Unsure(f"{path}: {describe(error)}") from error
        if len(found) > limit:
            raise Unsure(f"{path}: longer than {limit} bytes")
        return found

    def text(self, path: str, base: str) -> str | None:
        """Read a short file's text without blanks around it, else as :meth:`data`."""
        found = self.data(path, base)
        return None if found is None else found.decode(errors="replace").strip("\0 \n\t")

    def names(self, path: str, base: str) -> list[str] | None:
        """List a directory, sorted; None where it is not there and ``base`` is. Raises Unsure."""
        try:
            return sorted(os.listdir(self.at(path)))
        except GONE:
            self._look(path, base)
            return None
        except OSError as error:
            raise Unsure(f"{path}: {describe(error)}") from error

    def _look(self, path: str, base: str) -> None:
        """Raise Unsure where it means nothing that a path is not there."""
        if not os.path.lexists(self.at(base)):
            raise Unsure(f"{path}: {base} can't be seen here either")

    def link(self, path: str) -> str:
        """Give what a link of the kernel leads to, as text. Raises Unsure."""
        try:
            return os.readlink(self.at(path))
        except OSError as error:
            raise Unsure(f"{path}: {describe(error)}") from error

    def run(self, *command: str) -> str:
        """Run a command of the machine and give what it prints, errors too. Raises Unsure.

        There is no limit here: whoever collects is ended as a whole, with all that it started.
        """
        line = " ".join(command)
        if self.commands is not None:
            if line not in self.commands:
                raise Unsure(f"the output of `{line}` was not recorded")
            return self.commands[line]
        if self.root != "/":
            raise Unsure(f"`{line}` can be run on the machine itself only, not on {self.root}")
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
        except OSError as error:
            raise Unsure(f"`{line}`: {describe(error)}") from error
        told = (done.stdout + done.stderr).decode(errors="replace").strip()
        if done.returncode:
            raise Unsure(f"`{line}` ended with {done.returncode}: {told[-200:]}")
        return told

    def firmware(self, interface: str) -> tuple[str, str]:
        """Ask a network interface's driver for its name and its firmware's version.

        Either is empty where the driver has none. Raises Unsure.
        """
        if self.commands is not None:
            told = self.run("ethtool", "-i", interface)
            said = dict(re.findall(r"^([\w-]+): *(.*?) *$", told, re.MULTILINE))
            return said.get("driver", ""), said.get("firmware-version", "")
        if self.root != "/":
            raise Unsure(f"{interface}: drivers can be asked on the machine itself only")
        answer = array.array("B", struct.pack("I", ETHTOOL_GDRVINFO).ljust(DRVINFO, b"\0"))
        request = struct.pack("16sP16x", interface.encode()[:15], answer.buffer_info()[0])
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
                fcntl.ioctl(door, SIOCETHTOOL, request)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # a driver without that call
                return "", ""
            raise Unsure(f"{interface}: ETHTOOL_GDRVINFO: {describe(error)}") from error
        words = answer.tobytes()
        driver, version = words[4:36], words[68:100]
        return driver.split(b"\0")[0].decode(), version.split(b"\0")[0].decode(errors="replace")


def here(root: str = "/", environ: Mapping[str, str] | None = None) -> Host:
    """Describe this machine and this process; bytes that are no text are spelled out."""
    loaded = getattr(sys.modules.get("torch"), "__version__", None)
    env = os.environ if environ is None else environ
    return Host(
        root=root,
        environ={_text(name): _text(value) for name, value in env.items()},
        maps=mapped_files(),
        modules={} if loaded is None else {"torch": str(loaded)},
        # as NCCL does it, and not $HOME: userHomeDir() of src/misc/param.cc, NCCL 2.30
        home=_home(),
        directory=_text(os.getcwd()),
    )


def _text(name: str) -> str:
    """Spell out what Python keeps as halves of a pair (PEP 383): they are no text, nor JSON."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def mapped_files(pid: str = "self") -> tuple[str, ...]:
    """Name the libraries that are mapped in a process, sorted; one that is gone says so at its end.

    Raises OSError where the process is gone, or may not be looked at.
    """
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        fields = [line.rstrip("\n").split(maxsplit=5) for line in file]
    return tuple(sorted({each[5] for each in fields if len(each) == 6 and ".so" in each[5]}))


def asked(want: Want, source: str, ask: Callable[[], str | None]) -> Fact:
    """Make what is found a fact: a value, nothing (None, or empty), or why nobody can say."""
    try:
        value = ask()
    except Unsure as error:
        return want.unknown(str(error), source)
    return want.known(value, source) if value else want.absent(source)
