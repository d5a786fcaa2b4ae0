"""The trainer's end of the Unix socket: a blocking client that any number of threads may use."""

import contextlib
import itertools
import logging
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from handfast.agent.frames import (
    VERSIONS,
    Call,
    CallFailed,
    Failure,
    Incoming,
    Message,
    Push,
    Reply,
    Untrusted,
    close_all,
    encode,
    passing,
    peer,
    revive,
)
from handfast.agent.reminder import REMIND_S, Reminder
from handfast.errors import FormatError, HandfastError

__all__ = ["AgentGone", "AgentStuck", "Client"]

logger = logging.getLogger(__name__)

_Answer = tuple[Reply | Failure, list[int]]


class AgentGone(HandfastError):
    """The agent ended or could not be started. ``socket`` is its path, ``log`` what it wrote to."""

    def __init__(self, message: str, *, socket: str, log: str = "") -> None:
        self.socket = socket
        self.log = log
        where = f"; its log is {log}" if log else ""
        super().__init__(f"{message} (socket {socket}{where})")


class AgentStuck(AgentGone):
    """An agent is there, but does not answer; no other can be started in its place."""


class Client:
    """A connection to the agent behind the socket ``path``, for the process that made it.

    ``log`` is the agent's log file, named in errors. Raises OSError if nobody listens, Untrusted if
    another user does, AgentStuck if it does not answer within ``timeout`` seconds, AgentGone if it
    is just ending, and FormatError if it speaks no version of the protocol that we do. The
    connection tells the agent that this process lives; it must be closed.
    """

    def __init__(
        self,
        path: str,
        *,
        log: str = "",
        timeout: float = 10.0,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        self.path = path
        self.log = log
        self._owner = os.getpid()
        self._lock = threading.RLock()  # a signal handler may call, too, between two lines of this
        self._sending = threading.RLock()
        self._writing = False
        self._ids = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[_Answer | None]] = {}
        self._ended = False
        self._pushing = threading.Lock()
        self._states: dict[str, dict[str, Any]] = {}
        self._callback: Callable[[str, dict[str, Any]], None] | None = None
        self._sock = self._connect(timeout)
        self._reader = threading.Thread(target=self._listen, name="handfast-local", daemon=True)
        self._reader.start()
        try:
            self.version: int = self.call("hello", timeout=timeout, versions=versions)["version"]
        except TimeoutError:
            self.close()
            raise AgentStuck(
                f"agent process {self.agent_pid} listens but does not answer: is it stopped?",
                socket=path,
                log=log,
            ) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self, name: str, /, *, fds: Sequence[int] = (), timeout: float | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Ask the agent, pass it copies of ``fds``, and wait for its reply.

        Descriptors that come back are the field ``fds``, and the caller's to close. Raises what the
        agent raised; AgentGone if it ended before its reply; TimeoutError after ``timeout``
        seconds, which ends the waiting, not what the agent does. A field ``wait_s`` is for how many
        seconds the agent may wait for others: so long nobody takes it for stopped.
        """
        if os.getpid() != self._owner:
            raise RuntimeError(
                f"this connection belongs to process {self._owner}; a forked child makes its own"
            )
        if threading.current_thread() is self._reader:
            raise RuntimeError("a push callback that calls the agent would wait for itself")
        deadline = None if timeout is None else time.monotonic() + timeout
        call = Call(next(self._ids), name, len(fds), fields)
        frame, passed = encode(call), passing(fds)
        inbox: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        with self._lock:
            if self._ended:
                raise self._gone(f"is gone, {name!r} was not sent")
            self._waiting[call.id] = inbox
        try:
            self._send(frame, passed, deadline)
            answer = self._await(inbox, name, deadline, fields.get("wait_s", 0.0))
        except (queue.Empty, TimeoutError):
            raise TimeoutError(
                f"no reply to {name!r} within {timeout:g} s from agent process {self.agent_pid}"
            ) from None
        except ConnectionError:
            answer = None
            self._break()
        except BaseException:
            if self._writing:  # an interrupt in the middle of a frame: nothing after it can be read
                self._break()
            raise
        finally:
            with self._lock:
                del self._waiting[call.id]
            while not inbox.empty():  # a reply that came when the waiting had just ended
                _, late = inbox.get() or (None, [])
                close_all(late)
        if answer is None:
            raise self._gone(f"is gone, {name!r} was not answered")
        return _result(name, *answer)

    def _await(
        self,
        inbox: "queue.SimpleQueue[_Answer | None]",
        name: str,
        deadline: float | None,
        wait_s: float,
    ) -> _Answer | None:
        """Wait for the answer, and say every ten seconds who is waited for.

        Not in the ``wait_s`` seconds for which the agent is asked to wait for others itself.
        """
        reminder, pause = Reminder(), wait_s + REMIND_S
        while True:
            left = _left(deadline)
            try:
                return inbox.get(timeout=pause if left is None else min(left, pause))
            except queue.Empty:
                if _left(deadline) == 0:
                    raise
                pause = REMIND_S
                logger.warning(
                    "agent process %d has not answered %r for %.0f s: is it stopped?",
                    self.agent_pid,
                    name,
                    reminder.waited,
                )

    def _break(self) -> None:
        """End this connection now; whoever looks sees it, though the reader may not have yet."""
        self._ended = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    @property
    def ended(self) -> bool:
        """Whether the agent, or this connection to it, has ended; no I/O."""
        return self._ended

    def on_push(self, callback: Callable[[str, dict[str, Any]], None]) -> None:
        """Call ``callback(topic, fields)`` for each state pushed, and now for the last of each.

        It is called in the reader's thread: it must be quick and must not call the agent.
        """
        with self._pushing:
            self._callback = callback
            for topic, fields in self._states.items():
                callback(topic, fields)

    def close(self) -> None:
        """End the connection. Calls that wait in other threads raise AgentGone."""
        if os.getpid() == self._owner:  # in a forked child, a shutdown would end the parent's
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            if threading.current_thread() is not self._reader:
                self._reader.join()
            with self._sending:
                self._sock.close()
        else:
            self._sock.close()

    def _connect(self, timeout: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # not settimeout(): on a Unix socket that fails at once where the backlog is full
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout))
            sock.connect(self.path)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
            self.agent_pid, uid = peer(sock)
            if uid != os.geteuid():
                raise Untrusted(f"the socket {self.path} is served by user {uid}, not by us")
        except BlockingIOError:
            sock.close()
            raise AgentStuck(
                "the agent accepts no connection: is it stopped?", socket=self.path, log=self.log
            ) from None
        except BaseException:
            sock.close()
            raise
        return sock

    def _gone(self, what: str) -> AgentGone:
        return AgentGone(
            f"the agent (process {self.agent_pid}) {what}", socket=self.path, log=self.log
        )

    def _send(
        self, frame: bytes, passed: list[tuple[int, int, bytes]], deadline: float | None
    ) -> None:
        """Send a frame whole. Raises ConnectionError if the agent is gone, TimeoutError if late."""
        left = _left(deadline)
        if not self._sending.acquire(timeout=-1 if left is None else left):
            raise TimeoutError
        view = memoryview(frame)
        try:
            while view:
                if self._sock.fileno() < 0:
                    raise ConnectionAbortedError
                self._writing = True
                try:
                    sent = self._sock.sendmsg(
                        [view], passed, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                    )
                    view, passed = view[sent:], []
                    self._writing = False
                except OSError as error:
                    self._writing = False
                    if not isinstance(error, BlockingIOError):
                        raise
                    self._wait_for_room(deadline)
        finally:
            if 0 < len(view) < len(frame):  # half a frame: nothing after it could be read
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
            self._sending.release()

    def _wait_for_room(self, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        left = _left(deadline)
        if not poll.poll(None if left is None else left * 1000):
            raise TimeoutError

    # -- the reader's thread ---------------------------------------------------------------

    def _listen(self) -> None:
        incoming = Incoming()
        try:
            while (arrived := incoming.receive(self._sock)) is not None:
                for message, fds in arrived:
                    self._take(message, fds)
        except ConnectionResetError:
            logger.info("agent process %d ended with calls unread", self.agent_pid)
        except (OSError, FormatError) as error:
            logger.warning("the connection to agent process %d broke: %s", self.agent_pid, error)
        finally:
            incoming.close()
            with self._lock:
                self._ended = True
                for inbox in self._waiting.values():
                    inbox.put(None)

    def _take(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, Push):
            self._show(message)
            return
        with self._lock:
            inbox = self._waiting.get(message.id)
            if inbox is not None and not isinstance(message, Call):
                inbox.put((message, fds))
            else:  # nobody waits any more
                close_all(fds)

    def _show(self, push: Push) -> None:
        with self._pushing:
            self._states[push.topic] = push.fields
            if self._callback is not None:
                try:
                    self._callback(push.topic, push.fields)
                except Exception:
                    logger.exception("the callback for pushed state %r failed", push.topic)


def _result(name: str, answer: Reply | Failure, fds: list[int]) -> dict[str, Any]:
    if isinstance(answer, Failure):
        raise revive(answer)
    if len(fds) != answer.fds:
        close_all(fds)
        raise CallFailed(
            f"{answer.fds - len(fds)} of the {answer.fds} descriptors that {name!r} gave did not "
            "reach us: this process is at its limit of open files (ulimit -n)"
        )
    return answer.fields | {"fds": fds} if fds else answer.fields


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
