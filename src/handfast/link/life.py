"""Which end speaks, and in which of its lives: a boot, and a counter that only rises."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Final

import msgspec

from handfast.errors import Damaged, HandfastError
from handfast.store.files import Posix

__all__ = ["BOOT_ID", "Node", "boot_id", "count", "counted", "write_new"]

BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


class Node(msgspec.Struct, frozen=True):
    """Which node, in which of its lives; ``boot`` is the kernel's boot id.

    ``key`` is its name: of one that is enrolled its public key, of an agent the label of its node.
    """

    key: str
    boot: str
    counter: Annotated[int, msgspec.Meta(ge=1)]


def boot_id(path: str = BOOT_ID) -> str:
    """Read the kernel's boot id, made anew by each boot (random(4)). Raises HandfastError."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read(64).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise HandfastError(
            f"{path}: {error}. What to do: run this where the kernel's /proc can be read"
        ) from error


def count(path: str, remedy: str) -> int:
    """Raise the counter in a file by one, durably, and only then give it. The caller holds a lock.

    Raises as :func:`counted` does, and OSError where it can't be written.
    """
    number = counted(path, remedy) + 1
    temporary = f"{path}.tmp"
    with suppress(FileNotFoundError):  # of one who died here; the lock is ours now
        os.unlink(temporary)
    write_new(temporary, f"{number}\n".encode())
    os.rename(temporary, path)
    Posix().fsync_dir(os.path.dirname(path))
    return number


def counted(path: str, remedy: str) -> int:
    """Read a counter. Raises Damaged, with the ``remedy``, where it is missing or no number."""
    try:
        with open(path, encoding="ascii") as file:
            text = file.read(32)
    except FileNotFoundError as error:  # from 0 on numbers would be used twice
        raise Damaged(f"{path}: the counter is missing. What to do: {remedy}") from error
    except UnicodeDecodeError:
        text = ""
    if not text.strip().isdigit():
        raise Damaged(f"{path}: {text!r} is no number. What to do: {remedy}")
    return int(text)


def write_new(path: str, data: bytes) -> None:
    """Make a new file of this user's alone, and its bytes durable. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb", buffering=0) as file:
        os.fchmod(fd, 0o600)  # whatever this process's umask is
        file.write(data)
        os.fsync(fd)
