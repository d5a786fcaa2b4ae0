"""The agent's end of the Unix socket: it serves the trainers of its node.

Both ends must belong to the same user, which the kernel tells (SO_PEERCRED). A trainer is gone when
its process is dead, which its pidfd tells although a forked loader worker may still hold the socket
(DESIGN section 4, Agent), or when it closes its end. A trainer that reads nothing blocks nobody:
of the states pushed to it only the newest of each topic waits, and its calls are bounded.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from handfast.agent.frames import (
    VERSIONS,
    Call,
    CallFailed,
    Failure,
    Incoming,
    Message,
    Push,
    Reply,
    agree,
    close_all,
    encode,
    failure,
    passing,
    peer,
)
from handfast.errors import FormatError, HandfastError

__all__ = ["Handler", "Server", "Trainer"]

logger = logging.getLogger(__name__)

Handler = Callable[["Trainer", str, dict[str, Any], list[int]], Awaitable[dict[str, Any]]]

_CALLS = 1024
"""The most calls of one trainer that may wait, and the most replies that it may leave unread."""

_SO_PEERPIDFD = 77  # Linux 6.5; the socket module has no name for it


class Server:
    """Accepts trainers on ``listener``, from within a running event loop.

    ``on_call(trainer, name, fields, fds)`` returns the reply's fields, or raises: a HandfastError
    reaches the trainer as it is. Calls of one trainer are begun in the order in which they came.
    Descriptors still in ``fds`` when the handler ends are closed; take out what is kept. To pass
    descriptors back, return them as the field ``fds``; copies are sent, the originals stay yours.

    ``on_gone(trainer)`` is called once when a trainer that has said hello is dead or has closed;
    every frame that it sent whole has been begun by then, and handlers that still wait are
    cancelled: what must outlive a trainer belongs in a task of the agent's own.

    ``uid`` is the only user served, by default our own.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        on_call: Handler,
        on_gone: Callable[["Trainer"], None],
        uid: int | None = None,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        self.on_call = on_call
        self.versions = versions
        self._on_gone = on_gone
        self._listener = listener
        self._uid = os.geteuid() if uid is None else uid
        self._loop = asyncio.get_running_loop()
        self._trainers: set[Trainer] = set()
        self._retry: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._watch()

    @property
    def trainers(self) -> frozenset["Trainer"]:
        """The trainers that have said hello and are not gone."""
        return frozenset(trainer for trainer in self._trainers if trainer.version)

    async def close(self) -> None:
        """Drop all trainers and stop accepting; the listener stays the caller's. No callbacks."""
        self._loop.remove_reader(self._listener)
        if self._retry is not None:
            self._retry.cancel()
        tasks = [task for trainer in self._trainers for task in trainer.end()]
        self._trainers.clear()
        if tasks:
            await asyncio.wait(tasks)

    def forget(self, trainer: "Trainer") -> None:
        """Take note that a trainer's connection has ended; called by the connection itself."""
        self._trainers.discard(trainer)
        if trainer.version:
            self._on_gone(trainer)

    def _watch(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors left: the loop would spin on a full backlog
            logger.warning("no trainer can be accepted for now: %s", error)
            self._loop.remove_reader(self._listener)
            self._retry = self._loop.call_later(0.2, self._watch)
            return
        pid, uid = peer(sock)
        if uid != self._uid:
            logger.warning("refused process %d of user %d: only %d is served", pid, uid, self._uid)
            sock.close()
            return
        try:
            pidfd = _pidfd(sock, pid)
        except OSError as error:
            logger.warning("refused process %d, whose death could not be seen: %s", pid, error)
            sock.close()
            return
        self._trainers.add(Trainer(self, self._loop, sock, pid, pidfd))


def _pidfd(sock: socket.socket, pid: int) -> int:
    """A descriptor of the process at the other end. Raises OSError if it can't be watched."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # an older kernel: by number, which may have been given anew in between
        return os.pidfd_open(pid)


class Trainer:
    """One trainer process, as its agent sees it: one connection. Made by the Server."""

    def __init__(
        self,
        server: Server,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        pid: int,
        pidfd: int,
    ) -> None:
        self.pid = pid
        self.version = 0
        """The protocol version agreed on; 0 before hello."""
        self._server = server
        self._loop = loop
        self._sock = sock
        self._pidfd = pidfd
        self._incoming = Incoming()
        self._tasks: set[asyncio.Task[None]] = set()
        self._replies: deque[tuple[bytes, list[int]]] = deque()
        self._pushes: dict[str, bytes] = {}
        self._sending = memoryview(b"")
        self._passing: list[int] = []
        self._open = True
        sock.setblocking(False)
        loop.add_reader(sock, self._readable)
        loop.add_reader(pidfd, self._died)

    def push(self, topic: str, /, **fields: Any) -> None:
        """Send a state to the trainer; one of the same topic that still waits is replaced."""
        if self._open:
            self._pushes[topic] = encode(Push(topic, fields))
            self._flush()

    def end(self) -> set[asyncio.Task[None]]:
        """Close the connection and cancel its handlers, which are returned."""
        self._stop_watching()
        self._sock.close()
        os.close(self._pidfd)
        self._incoming.close()
        close_all(self._passing)
        for _, fds in self._replies:
            close_all(fds)
        self._replies.clear()
        for task in self._tasks:
            task.cancel()
        return self._tasks

    # -- from the trainer ------------------------------------------------------------------

    def _readable(self) -> bool:
        """Take what has arrived; False where there was nothing, or nothing more will come."""
        try:
            arrived = self._incoming.receive(self._sock)
            if arrived is None:
                self._finish("closed its end")
            else:
                for message, fds in arrived:
                    self._begin(message, fds)
        except BlockingIOError:
            return False
        except (OSError, FormatError) as error:
            self._finish(f"is dropped: {error}")
        return self._open

    def _begin(self, message: Message, fds: list[int]) -> None:
        if not isinstance(message, Call):
            close_all(fds)
            raise FormatError(f"a {type(message).__name__} from a trainer")
        task = self._loop.create_task(self._work(message, fds))
        self._tasks.add(task)
        # not in the task itself: one that is cancelled before its first step runs no clean-up
        task.add_done_callback(partial(self._done, fds))
        if max(len(self._tasks), len(self._replies)) > _CALLS:
            raise FormatError(f"more than {_CALLS} calls that wait, or replies left unread")

    def _done(self, fds: list[int], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        close_all(fds)

    async def _work(self, call: Call, fds: list[int]) -> None:
        try:
            if len(fds) != call.fds:
                raise CallFailed(
                    f"{call.fds - len(fds)} of the {call.fds} descriptors of {call.name!r} did not "
                    "reach the agent: it is at its limit of open files (ulimit -n)"
                )
            if call.name == "hello":
                fields = self._hello(*call.fields["versions"])
            elif self.version:
                fields = dict(await self._server.on_call(self, call.name, call.fields, fds))
            else:
                raise FormatError(f"{call.name!r} before hello")
            passed = fields.pop("fds", ())
            self._reply(Reply(call.id, len(passed), fields), passed)
        except HandfastError as error:
            self._reply(failure(call, error))
        except Exception as error:
            logger.exception("call %r of process %d failed", call.name, self.pid)
            self._reply(failure(call, error))

    def _hello(self, low: int, high: int) -> dict[str, Any]:
        version = agree(self._server.versions, (low, high))
        if version is None:
            ours = "{}..{}".format(*self._server.versions)
            raise FormatError(
                f"the agent (process {os.getpid()}) speaks versions {ours} of the local protocol, "
                f"this trainer {low}..{high}: they are of different handfast. End the agent by "
                "SIGTERM; the next start brings one that fits"
            )
        self.version = version
        return {"version": version, "pid": os.getpid()}

    def _died(self) -> None:
        """The process is dead. What it had sent whole still counts."""
        for _ in range(64):  # far more than a socket holds; a forked child may go on sending
            if not self._readable():
                break
        self._finish("died")

    def _finish(self, why: str) -> None:
        if self._open:
            logger.info("trainer %d %s", self.pid, why)
            self._stop_watching()
            # after the first step of each handler, which is in the loop's queue before this
            self._loop.call_soon(self._gone)

    def _stop_watching(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._loop.remove_reader(self._pidfd)

    def _gone(self) -> None:
        if self._sock.fileno() >= 0:  # the server may have closed in between
            self.end()
            self._server.forget(self)

    # -- to the trainer --------------------------------------------------------------------

    def _reply(self, message: Reply | Failure, fds: Sequence[int] = ()) -> None:
        if self._open:
            frame = encode(message)
            passing(fds)  # refuses too many now, while the caller can still be told
            copies: list[int] = []  # the handler may close its own before the socket takes them
            self._replies.append((frame, copies))
            copies.extend(os.dup(fd) for fd in fds)
            self._flush()

    def _flush(self) -> None:
        """Send what the socket takes, replies first; the loop calls again when it takes more."""
        try:
            while self._sending or self._next():
                sent = self._sock.sendmsg(
                    [self._sending], passing(self._passing), socket.MSG_NOSIGNAL
                )
                self._sending = self._sending[sent:]
                close_all(self._passing)
                self._passing = []
            self._loop.remove_writer(self._sock)
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._flush)
        except OSError as error:
            self._finish(f"left its replies unread: {error}")

    def _next(self) -> bool:
        """Take the next frame to send, if there is one."""
        frame = b""
        if self._replies:
            frame, self._passing = self._replies.popleft()
        elif self._pushes:
            frame = self._pushes.pop(next(iter(self._pushes)))
        self._sending = memoryview(frame)
        return bool(frame)
