"""The examiner: a process that looks at staged values before the domain may vote.

Validators are a framework's, and users' own: what they do is none of the agent's. So they run in a
process of their own, which is started as the trainer says, sees the image read-only, and whose
crash, silence or hunger costs nothing but this epoch: the domain votes SKIP, with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from handfast.agent.frames import Call, Failure, Incoming, Reply, encode, passing
from handfast.core.lattice import Epoch
from handfast.errors import FormatError
from handfast.store.image import Slot

__all__ = ["Asked", "Examined", "Examiner", "Known"]

PATIENCE_S: Final = 600.0
"""Seconds in which an epoch has to be looked at; who takes longer is ended."""

MOMENT_S: Final = 5.0
"""Seconds that an interpreter may take to end once its socket is closed."""


SINGLE: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""What keeps libraries from a pool of threads, and its memory, for each processor of a node."""


class Known(msgspec.Struct, frozen=True, array_like=True):
    """What only the trainer knows of that which it has staged, by path; nothing to the agent.

    The tensors ``apart`` may hold anything (a module's buffers). ``masters`` are tensors, each with
    those that one of which is its rounding; ``adams`` are optimizers whose moments are Adam's.
    """

    apart: tuple[str, ...] = ()
    masters: tuple[tuple[str, tuple[str, ...]], ...] = ()
    adams: tuple[str, ...] = ()


class Examined(msgspec.Struct, frozen=True, array_like=True):
    """What is to be examined, and by whom.

    ``argv`` starts the examiner, ``path`` is where it finds modules, ``validators`` are the names
    of what it runs; ``known`` is for them.
    """

    argv: tuple[str, ...]
    path: tuple[str, ...]
    validators: tuple[str, ...]
    known: Known = Known()
    patience_s: float = PATIENCE_S


class Asked(msgspec.Struct, frozen=True):
    """An image that is to be examined: memory ``fd`` of ``nbytes``, which begins with the header.

    It is not to be overwritten before the answer is there.
    """

    what: Examined
    slots: tuple[Slot, ...]
    nbytes: int
    fd: int
    objects: bytes
    epoch: Epoch


class Examiner:
    """One domain's examiner: started when it is first needed, and again where it has ended.

    Each generation has a process of its own, or the validators that a job was stopped to mend would
    go on as they were.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "examiner")  # the process dies with it
        self._ids = itertools.count(1)
        self._asking = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        # what it was started as, and in which generation
        self._for: tuple[tuple[str, ...], int] = ((), 0)
        self._since = 0  # what is older than this generation is not examined any more
        self._lock = threading.Lock()  # of _since and _sock, which the loop's thread asks for, too

    async def examine(self, asked: Asked | None) -> str:
        """Say what is wrong with an image's values; nothing where there is nothing to ask."""
        if asked is None:
            return ""
        loop = asyncio.get_running_loop()
        self._asking += 1
        try:
            return await loop.run_in_executor(self._thread, self._examine, asked)
        finally:
            self._asking -= 1

    def interrupt(self, before: int) -> bool:
        """Leave the epochs of generations below ``before``: who examines one is ended at once.

        From the loop's thread; says whether something was being examined. Only the socket is shut:
        the thread that waits for the process hears an end of file, and ends it, so that nobody
        else's process is ever meant.
        """
        with self._lock:
            self._since = max(self._since, before)
            if self._sock is not None and self._for[1] < before:
                with contextlib.suppress(OSError):  # its other end may be gone
                    self._sock.shutdown(socket.SHUT_RDWR)
        return self._asking > 0

    def close(self) -> None:
        """End the process. Nothing is being examined any more."""
        self._thread.shutdown()
        self._end()

    def _examine(self, asked: Asked) -> str:
        try:
            return self._ask(asked)
        except TimeoutError:
            self._end()
            return f"the validators took more than {asked.what.patience_s:g} s, and were ended"
        except FormatError as error:
            self._end()
            return f"the validators' process speaks otherwise: {error}"
        except (OSError, ValueError) as error:  # a ValueError: argv is no command
            if asked.epoch.generation < self._since:
                self._end()
                return "the validators had no answer when the job started again, and were ended"
            why = self._ended() or str(error)
            self._end()
            return f"the validators ended half-way: {why}"

    def _ask(self, asked: Asked) -> str:
        """Raises OSError or ValueError where it can't be started, OSError where it ends,
        TimeoutError, FormatError.
        """
        what = asked.what
        sock, child = self._started(what.argv, asked.epoch.generation)
        sock.settimeout(what.patience_s)
        fields = {
            "path": what.path,
            "validators": what.validators,
            "known": msgspec.msgpack.encode(what.known),
            "slots": msgspec.msgpack.encode(asked.slots),
            "nbytes": asked.nbytes,
            "objects": asked.objects,
            "epoch": msgspec.structs.astuple(asked.epoch),
        }
        seen = os.open(f"/proc/self/fd/{asked.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            call = Call(next(self._ids), "examine", 1, fields)
            frame = encode(call)
            sent = sock.sendmsg([frame], passing([seen]), socket.MSG_NOSIGNAL)
            sock.sendall(frame[sent:], socket.MSG_NOSIGNAL)
        finally:
            os.close(seen)
        match _answer(sock, child.pid, what.patience_s):
            case Reply(id=call.id, fields={"problem": str(problem)}):
                return problem
            case Failure(id=call.id, message=message):
                return message
            case other:
                raise FormatError(f"an examiner that says {other}")

    def _started(
        self, argv: tuple[str, ...], generation: int
    ) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        sock, child = self._sock, self._child
        if (
            sock is None
            or child is None
            or child.poll() is not None  # whom nobody had asked anything
            or self._for != (argv, generation)
        ):
            self._end()
            sock, child = self._start(argv)
            self._child = child
            with self._lock:
                self._sock, self._for = sock, (argv, generation)
        with self._lock:
            if generation < self._since:  # before there was a socket that could be shut
                raise InterruptedError("the job has started again")
        return sock, child

    def _start(self, argv: tuple[str, ...]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = subprocess.Popen(
                    [*argv, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what validators print goes to the agent's log
                    start_new_session=True,
                    env=os.environ | SINGLE,
                )
            except BaseException:
                ours.close()
                raise
        return ours, child

    def _end(self) -> None:
        """End the process, if there is one, and those that validators have started."""
        with self._lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)  # it leads a session
            self._child.wait()
            self._child = None

    def _ended(self) -> str:
        """Say how the process has ended by itself, if it has; its socket may be a moment ahead."""
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return _how(self._child.wait(MOMENT_S))
        return ""


def _answer(sock: socket.socket, pid: int, patience_s: float) -> object:
    """Wait for one message; raises TimeoutError, FormatError, and OSError at the end.

    The process is watched beside its socket, whose other end may be held open by what it started.
    """
    incoming, deadline = Incoming(), time.monotonic() + patience_s
    process = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(process, select.POLLIN)
        while ready := poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            heard = any(fd == sock.fileno() for fd, _ in ready)
            arrived = incoming.receive(sock) if heard else None
            if arrived is None:
                raise ConnectionResetError("the examiner's process has ended")
            for message, _ in arrived:
                return message
        raise TimeoutError
    finally:
        os.close(process)


def _how(status: int) -> str:
    if status >= 0:
        return f"their process ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"their process was ended by {signal.Signals(-status).name}"
    return f"their process was ended by signal {-status}"
