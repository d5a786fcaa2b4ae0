"""The process of :mod:`handfast.agent.examiner`: ``python -m handfast.torch.examine FD``.

One socket, one question at a time: an image, and which validators are to see it. What they raise is
what they found. It is the first to be ended where memory runs out, and ends with its agent. What
validators fork answers for nobody: a child has no socket, and ends where it would answer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import torch

from handfast.agent.examiner import Known
from handfast.agent.frames import Call, Incoming, Reply, close_all, encode, peer
from handfast.core.lattice import Epoch
from handfast.errors import HandfastError
from handfast.store.image import Slot
from handfast.torch.stage import map_image
from handfast.torch.validators import SHORT, Staged, find

__all__ = ["main"]

NICE: Final = 5
"""Niceness beside the agent's own: whoever writes goes first."""

ROOM: Final = 2 << 30
"""Bytes of memory beside four times the largest tensor, and what imports have mapped."""

WIDTH: Final = 80
"""Characters of a file's name that are told, its last ones."""

PR_SET_PDEATHSIG: Final = 1


@dataclass
class _Memory:
    """What is kept from epoch to epoch: decay rates, and how much was mapped after the imports."""

    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
    imported: int = 0


def main() -> int:
    """Answer until the agent is gone."""
    _humble()
    sock, incoming, own = socket.socket(fileno=int(sys.argv[1])), Incoming(), os.getpid()
    sock.set_inheritable(False)
    os.register_at_fork(after_in_child=sock.close)
    if peer(sock)[0] != os.getppid():  # it has gone before that could be heard of
        return 0
    memory = _Memory()
    while (arrived := incoming.receive(sock)) is not None:
        for message, fds in arrived:
            if isinstance(message, Call):
                problem = (
                    _examine(message.fields, fds, memory)[:400].encode(errors="replace").decode()
                )
                if os.getpid() != own:
                    os._exit(0)
                sock.sendall(encode(Reply(message.id, 0, {"problem": problem})))
    return 0


def _humble() -> None:
    """Take little, and be the first to go."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write("1000")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)


def _examine(fields: dict[str, Any], fds: Sequence[int], memory: _Memory) -> str:
    try:
        slots = msgspec.msgpack.decode(fields["slots"], type=tuple[Slot, ...])
        image = mmap.mmap(fds[0], fields["nbytes"], mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        close_all(fds)
    sys.path = list(fields["path"])
    _limit(ROOM + 4 * max((slot.nbytes for slot in slots), default=0), fields["validators"], memory)
    epoch = Epoch(*fields["epoch"])
    known = msgspec.msgpack.decode(fields["known"], type=Known)

    def staged() -> Staged:
        return Staged(epoch, map_image(slots, image), fields["objects"], known, memory.rates)

    ours = staged()  # what a user's own makes of its tensors and objects is nobody else's
    answers = (_ask(n, ours if n in SHORT else staged()) for n in fields["validators"])
    return next(filter(None, answers), "")


def _limit(room: int, validators: Iterable[str], memory: _Memory) -> None:
    """Bound what is mapped from now on, beside what imports have mapped, which is the node's doing:
    libraries map some for each of its processors. These themselves have as much room.
    """
    if not memory.imported:
        _bound(_mapped() + room)
        for name in validators:
            with suppress(ValueError):  # it is said where it is asked
                find(name)
        memory.imported = _mapped()
    _bound(memory.imported + room)


def _bound(nbytes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    nbytes = nbytes if most == resource.RLIM_INFINITY else min(nbytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, most))


def _mapped() -> int:
    """Bytes that RLIMIT_DATA counts, and the stack (proc(5), ``statm``)."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[5]) * mmap.PAGESIZE


def _ask(name: str, staged: Staged) -> str:
    try:
        validator = find(name)
    except ValueError as error:
        return f"{name}: {error}"
    try:
        with torch.inference_mode():
            found: object = validator(staged)
        if found is None or isinstance(found, str):
            return f"{name}: {found}" if found else ""
        return (
            f"{name}: a mistake of the validator: it returned a {type(found).__name__}, where a "
            "str says what is wrong, and None that nothing is"
        )
    except MemoryError as error:
        return f"{name}: it wants more memory than it may have: {error}"
    except Exception as error:
        if not (told := isinstance(error, ValueError | HandfastError)):
            traceback.print_exc()
        return f"{name}{_place(error, name)}: {error if told else repr(error)}"


def _place(error: Exception, name: str) -> str:
    """Where something was raised: the innermost line in the package of a user's validator."""
    package = name.partition(":")[0].partition(".")[0]
    own = [
        f" at {frame.f_code.co_filename[-WIDTH:]}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]
    return own[-1] if own else ""


if __name__ == "__main__":
    sys.exit(main())
