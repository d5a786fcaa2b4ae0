"""A node's service: it answers any local user at a Unix socket with fresh facts of the node.

It reads, and changes nothing; issue by issue a node's agent may grow from it. One thread and one
loop: who is slow or silent waits alone, and is left at a limit. Facts are collected by one
collection at a time, in a thread, for all who wait for it.

**Who fills it loses his own.** Of more than 256 connections the user who has the most of them loses
his oldest, so nobody can keep another user's ranks from an answer.

**The socket** appears under its name when it already listens, so that a rank never finds it dead
but after a death. A lock beside it is held for life: a socket whose lock is free is of one that
died, and is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from handfast.agent.frames import peer
from handfast.errors import HandfastError
from handfast.fleet.gate.wire import LINE, read_request, refusal, reply
from handfast.fleet.identity import Key, sign
from handfast.fleet.inventory.facts import Inventory
from handfast.store.files import describe, try_lock

__all__ = ["FRESH_S", "serve"]

logger = logging.getLogger(__name__)

FRESH_S: Final = 10.0
CALLERS: Final = 256  # connections at once
LINE_S: Final = 5.0  # how long a caller may take to ask, and again to hear the answer
LOOK_S: Final = 5.0  # how often it looks whether its name still leads to it
PATH_LIMIT: Final = 107  # bytes of a socket's path: unix(7)
BACKLOG: Final = 128
NEW: Final = ".new"


class _Service:
    """Answers callers, with what is held or is collected anew for them."""

    def __init__(self, collect: Callable[[], Inventory], fresh_s: float, key: Key | None) -> None:
        self._collect = collect
        self._fresh_s = fresh_s
        self._key = key
        self._callers: dict[asyncio.Task[None], int] = {}  # and their users, the oldest first
        self._run: asyncio.Task[Inventory] | None = None
        self._held: tuple[float, Inventory] | None = None  # and when its collection began

    def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, in a task of its own; of too many, send one away."""
        task = asyncio.create_task(self._serve(reader, writer))
        self._callers[task] = peer(writer.get_extra_info("socket"))[1]
        task.add_done_callback(lambda done: self._callers.pop(done, None))
        task.add_done_callback(lambda _: writer.transport.abort())
        if len(self._callers) > CALLERS:
            ((most, _),) = Counter(self._callers.values()).most_common(1)
            oldest = next(each for each, uid in self._callers.items() if uid == most)
            del self._callers[oldest]
            oldest.cancel()

    async def finish(self) -> None:
        """Wait for those who were met; each has its limits."""
        while self._callers:
            await asyncio.wait(self._callers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await self._answer(reader)
        except asyncio.CancelledError:
            line = refusal("too many connections of one user. What to do: ask again, with fewer")
        writer.transport.set_write_buffer_limits(0)  # so that `drain` waits until all is sent
        with suppress(OSError):  # he is gone, or has not read it in time
            async with asyncio.timeout(LINE_S):
                writer.write(line)
                await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(LINE_S):
                line = await reader.readuntil()
        except TimeoutError:
            return refusal(f"no request came within {LINE_S:g} s")
        except asyncio.LimitOverrunError:
            return refusal(f"a request of more than {LINE} bytes")
        except asyncio.IncompleteReadError as error:
            line = error.partial
        except OSError:  # he is gone
            line = b""
        try:
            challenge = read_request(line)
            if challenge and self._key is None:
                return refusal(
                    "this node does not sign. What to do: `handfast fleet enroll DIR` on it, and "
                    "start the service with --state DIR"
                )
            found = await self._fresh()
            return reply(sign(self._key, found, challenge) if self._key and challenge else found)
        except HandfastError as error:
            return refusal(str(error))
        except OSError as error:  # no process could be started, say
            return refusal(f"nothing could be collected: {describe(error)}")
        except Exception as error:  # the asker is told whatever it is
            logger.exception("nothing could be collected")
            return refusal(f"nothing could be collected: {type(error).__name__}: {error}")

    async def _fresh(self) -> Inventory:
        """Give facts that were looked for at most so many seconds before this call, or after it."""
        oldest = time.monotonic() - self._fresh_s
        while self._held is None or self._held[0] < oldest:
            if self._run is None or self._run.done():
                self._run = asyncio.create_task(self._collected())
            await asyncio.shield(self._run)  # whoever is sent away does not end it for the others
        return self._held[1]

    async def _collected(self) -> Inventory:
        began = time.monotonic()
        found = await asyncio.to_thread(self._collect)
        self._held = began, found
        return found


async def serve(
    path: str,
    collect: Callable[[], Inventory],
    *,
    fresh_s: float = FRESH_S,
    key: Key | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer at a socket until SIGTERM or SIGINT: who was met is answered, and it is removed.

    ``collect`` takes the inventory, in a thread; it must have a limit of its own, and name the
    node of ``key`` where there is one. What is answered was looked for at most ``fresh_s`` seconds
    before it was asked for. ``ready`` is called when the socket is there. Raises HandfastError
    where another process serves there, something else lies there, or the socket was taken away;
    ValueError for a path that is too long; OSError.
    """
    service = _Service(collect, fresh_s, key)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    with _listening(path) as (listener, at):
        server = await asyncio.start_unix_server(
            service.meet, sock=listener, limit=LINE, backlog=BACKLOG
        )
        ready()
        try:
            while not told.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(told.wait(), LOOK_S)
                if _inode(path) != at:
                    raise HandfastError(
                        f"{path} was removed or replaced, so nobody would find this service. What "
                        "to do: start it again, and see what clears its directory"
                    )
        finally:
            server.close()
            await service.finish()


@contextmanager
def _listening(path: str) -> Iterator[tuple[socket.socket, tuple[int, int] | None]]:
    """Listen under a name that is ours alone; gives the socket, and which file it is."""
    beside = f"{path}{NEW}"
    if len(os.fsencode(beside)) > PATH_LIMIT:
        raise ValueError(f"{path}: too long for a socket: {PATH_LIMIT - len(NEW)} bytes at most")
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o755, exist_ok=True)
    with _alone(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise HandfastError(f"{path} is there, and no socket. What to do: give another path")
        with suppress(FileNotFoundError):  # of one who died here; the lock is ours now
            os.unlink(beside)
        listener.bind(beside)
        os.chmod(beside, 0o666)  # noqa: S103 - whatever the umask is: any user may ask
        listener.listen(BACKLOG)
        os.rename(beside, path)
        at = _inode(path)
        try:
            yield listener, at
        finally:
            if _inode(path) == at:
                os.unlink(path)


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """Hold the lock of a socket, which stays; the kernel lets go of it with the process."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(f"{path}.lock", flags, 0o600)
    try:
        if not try_lock(fd):
            raise HandfastError(
                f"another process serves at {path}. What to do: leave it, or end it first"
            )
        yield
    finally:
        os.close(fd)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
