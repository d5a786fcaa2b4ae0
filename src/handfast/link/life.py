"""Which end speaks, and in which of its lives: a boot, and a counter that only rises."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Final

import msgspec

from handfast.errors import Damaged, HandfastError
from handfast.store.files import Files, Posix, read_file, write_file

__all__ = ["BOOT_ID", "Node", "Private", "boot_id", "count", "counted", "newer"]

BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


class Node(msgspec.Struct, frozen=True):
    """Which node, in which of its lives; ``boot`` is the kernel's boot id.

    ``key`` is its name: of one that is enrolled its public key, of an agent the label of its node.
    """

    key: str
    boot: str
    counter: Annotated[int, msgspec.Meta(ge=1)]


def newer(node: Node, than: Node | None) -> bool:
    """Say whether this is a later life than another one of the same key; so is any, than none."""
    return than is None or node.counter > than.counter


def boot_id(path: str = BOOT_ID) -> str:
    """Read the kernel's boot id, made anew by each boot (random(4)). Raises HandfastError."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read(64).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise HandfastError(
            f"{path}: {error}. What to do: run this where the kernel's /proc can be read"
        ) from error


class Private(Posix):
    """Files of this user's alone, whatever this process's umask is."""

    def create(self, path: str) -> int:
        """Create a file that nobody else may read."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)
        return fd


def count(files: Files, path: str, remedy: str) -> int:
    """Raise the counter in a file by one, durably, and only then give it. The caller holds a lock.

    Raises as :func:`counted` does, and OSError where it can't be written.
    """
    number = counted(files, path, remedy) + 1
    temporary = f"{path}.tmp"
    with suppress(FileNotFoundError):  # of one who died here; the lock is ours now
        files.unlink(temporary)
    write_file(files, temporary, f"{number}\n".encode())
    files.rename(temporary, path)
    files.fsync_dir(os.path.dirname(path))
    return number


def counted(files: Files, path: str, remedy: str) -> int:
    """Read a counter. Raises Damaged, with the ``remedy``, where it is missing or no number."""
    if not files.exists(path):  # from 0 on numbers would be used twice
        raise Damaged(f"{path}: the counter is missing. What to do: {remedy}")
    text = read_file(files, path, 32).decode(errors="replace")
    if not (text.isascii() and text.strip().isdigit()):
        raise Damaged(f"{path}: {text!r} is no number. What to do: {remedy}")
    return int(text)
