"""Starting the agent of a run on this node, and finding it again.

All processes of one user that name the same key meet in one directory, ``agent`` (the socket),
``starting.lock`` and ``alive.lock`` in it. A starter holds ``starting.lock`` from its last look for
an agent until the new one answers; an agent holds ``alive.lock`` for life. So one key has one
agent, though many start it at once and though a starter is killed half-way, and a socket left by an
agent that was killed is known to be stale: nobody holds the lock.

The agent itself binds the socket, after its start, rather than inherit it: then the kernel names
the agent, not the starter, as the one who listens (SO_PEERCRED), it inherits nothing at all, lock
and socket have one owner, and an agent that a service manager started is found in the same way.
The price is that the starter must look again until the socket answers.

The agent is in a session of its own and no child of the trainer, so that neither the signals of a
terminal or of a launcher's process group nor the trainer's death end it (DESIGN section 4, Agent).
"""

import contextlib
import errno
import hashlib
import logging
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from handfast.agent.frames import Untrusted
from handfast.agent.local import AgentGone, AgentStuck, Client
from handfast.agent.manners import Manners
from handfast.agent.speech import told
from handfast.errors import HandfastError
from handfast.link.switch import Spoken
from handfast.store.files import try_lock

__all__ = ["Seat", "connect", "connect_or_start", "meeting_place", "settings", "take_seat"]

_MODULE = (sys.executable, "-m", "handfast.agent")
_PATH_LIMIT = 100  # a socket's path has at most 107 bytes
_LOG_LIMIT = 4 << 20
_PAUSE_S = 0.01
_PATIENCE_S = 10.0

# Runs in an interpreter without site or environment, so it costs some 10 ms. A fork in the trainer
# itself would copy a process with threads and a GPU; the launcher has neither.
_LAUNCHER = """
import os, signal, sys
pid = os.fork()
if pid:
    os.write(1, b"%d" % pid)
    os._exit(0)
os.setsid()
signal.pthread_sigmask(signal.SIG_SETMASK, ())
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.dup2(2, 1)
os.execv(sys.argv[1], sys.argv[1:])
"""


def settings() -> tuple[int, float, Manners, tuple[Spoken, ...]]:
    """The agent's log level, how many seconds it lingers, its manners, and the epochs of the
    agents' protocol that it offers, as the environment says.

    Raises HandfastError, naming the variable, for what means nothing.
    """
    level = os.environ.get("HANDFAST_LOG") or "INFO"
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise HandfastError(
            f"HANDFAST_LOG={level!r} is no log level. What to do: set DEBUG, INFO, WARNING or "
            "ERROR, or leave it unset"
        )
    linger = os.environ.get("HANDFAST_LINGER_S") or "60"
    with contextlib.suppress(ValueError):
        if (seconds := float(linger)) >= 0:
            return levels[level.upper()], seconds, Manners.told(), told()
    raise HandfastError(
        f"HANDFAST_LINGER_S={linger!r} is no number of seconds. What to do: set 60, say, or leave "
        "it unset"
    )


def meeting_place(key: str) -> str:
    """The directory where the processes of ``key`` meet: made if it is not there, and checked.

    It lies in XDG_RUNTIME_DIR where that is ours and short enough, else in ``/tmp/handfast-<uid>``.
    Raises Untrusted if another user made it or may write to it.
    """
    text = key.encode(errors="backslashreplace")  # a reader's path may have bytes of no text
    name = hashlib.blake2b(text, digest_size=8).hexdigest()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = os.path.join(runtime, "handfast")
    if not (_ours(runtime) and len(_socket_in(os.path.join(base, name))) < _PATH_LIMIT):
        base = f"/tmp/handfast-{os.geteuid()}"  # noqa: S108 - its owner and mode are checked
    place = os.path.join(base, name)
    for path in (base, place):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        _check_private(path)
    return place


def connect(key: str, log_path: str = "") -> Client | None:
    """Connect to the agent of ``key``, or None if there is none.

    Raises what :class:`Client` and :func:`meeting_place` raise.
    """
    return _connect(meeting_place(key), log_path, time.monotonic() + _PATIENCE_S)


def connect_or_start(
    key: str,
    log_path: str,
    *,
    argv: Sequence[str] = _MODULE,
    wait_s: float = 30.0,
    patience_s: float | None = None,
) -> Client:
    """Connect to the agent of ``key``; where there is none, start it and wait until it answers.

    One that is started has ``wait_s`` seconds, one that is there ``patience_s``, if that is less.

    It is started as ``argv`` and the meeting place's path, with the environment as it is here, in
    the directory ``/`` and with its output appended to ``log_path``. A log above 4 MiB is first
    renamed to ``<log_path>.1``. Raises AgentGone if no agent answers within ``wait_s`` seconds,
    AgentStuck if there is one that does not answer, Untrusted and FormatError as :func:`connect`,
    OSError where the log can't be written, and what :func:`settings` raises: an agent would end by
    it, and only its log would say why.
    """
    settings()
    place = meeting_place(key)
    log_path = os.path.abspath(log_path)
    deadline = time.monotonic() + wait_s
    client = _connect(place, log_path, deadline, patience_s)
    if client is not None:
        return client
    with _starting(place, deadline, log_path):
        client = _connect(place, log_path, deadline, patience_s)
        if client is not None:  # another process was faster
            return client
        pid = _launch(argv, place, log_path)
        return _await_agent(pid, place, log_path, deadline)


class Seat:
    """The place of the one agent of a key: its listening socket, held until :meth:`leave`."""

    def __init__(self, place: str, lock: int, listener: socket.socket) -> None:
        self.socket = listener
        self._path = _socket_in(place)
        self._lock = lock
        self._inode = _inode(self._path)

    def reachable(self) -> bool:
        """Whether a trainer that looks for us finds us; False once the socket file was removed."""
        return _inode(self._path) == self._inode

    def leave(self) -> None:
        """Stop listening and let another agent take the place. To be called last of all."""
        if self.reachable():
            os.unlink(self._path)
        self.socket.close()
        os.close(self._lock)


def take_seat(place: str, *, wait_s: float = 10.0) -> Seat | None:
    """Become the agent of a meeting place, or None if another one is and answers.

    Where another one holds the place but does not listen, it is still starting or already leaving:
    it is waited for, ``wait_s`` seconds at most. A socket left by a dead agent is replaced.
    """
    _check_private(place)
    lock = _open_lock(place, "alive.lock")
    deadline = time.monotonic() + wait_s
    while not try_lock(lock):
        if time.monotonic() > deadline or _listens(place):
            os.close(lock)
            return None
        time.sleep(_PAUSE_S)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_socket_in(place))
        listener.bind(_socket_in(place))
        listener.listen(128)
    except BaseException:
        listener.close()
        os.close(lock)
        raise
    return Seat(place, lock, listener)


# -- the place ---------------------------------------------------------------------------------


def _socket_in(place: str) -> str:
    return os.path.join(place, "agent")


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _ours(path: str) -> bool:
    try:
        return os.stat(path).st_uid == os.geteuid()
    except OSError:
        return False


def _check_private(path: str) -> None:
    """Refuse a directory that anybody else made, could write to, or led us to by a link."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        why = "is no directory"
    elif found.st_uid != os.geteuid():
        why = f"belongs to user {found.st_uid}"
    elif found.st_mode & 0o077:
        why = f"is open to others (mode {stat.S_IMODE(found.st_mode):04o}, not 0700)"
    else:
        return
    raise Untrusted(
        f"{path} {why}, so whoever made it could stand in for the agent. Remove it, or set "
        "XDG_RUNTIME_DIR to a directory of your own"
    )


def _open_lock(place: str, name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(os.path.join(place, name), flags, 0o600)


@contextlib.contextmanager
def _starting(place: str, deadline: float, log_path: str) -> Iterator[None]:
    """Be the only starter of this place. The lock ends with its holder, however that ends."""
    lock = _open_lock(place, "starting.lock")
    try:
        while not try_lock(lock):
            if time.monotonic() > deadline:
                raise AgentGone(
                    "another process is starting the agent and does not finish",
                    socket=_socket_in(place),
                    log=log_path,
                )
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(lock)


# -- finding and starting ----------------------------------------------------------------------


def _listens(place: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # EAGAIN: a full backlog, so somebody does
        return probe.connect_ex(_socket_in(place)) in (0, errno.EAGAIN)


def _connect(
    place: str, log_path: str, deadline: float, patience_s: float | None = None
) -> Client | None:
    timeout = max(_PAUSE_S, deadline - time.monotonic())
    if patience_s is not None:
        timeout = min(timeout, max(_PAUSE_S, patience_s))
    try:
        return Client(_socket_in(place), log=log_path, timeout=timeout)
    except AgentStuck:
        raise
    except (AgentGone, FileNotFoundError, ConnectionRefusedError):
        return None


def _await_agent(pid: int, place: str, log_path: str, deadline: float) -> Client:
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        dead = False
        try:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            poll.register(pidfd, select.POLLIN)
        except ProcessLookupError:
            dead = True
        while True:
            # also after its death: it may have found another one here
            client = _connect(place, log_path, deadline)
            if client is not None:
                return client
            if dead or time.monotonic() > deadline:
                why = "ended at once" if dead else "did not listen in time"
                raise AgentGone(
                    f"the agent that was started (process {pid}) {why}; it said:\n"
                    f"{_tail(log_path)}\n",
                    socket=_socket_in(place),
                    log=log_path,
                )
            dead = bool(poll.poll(_PAUSE_S * 1000))


def _launch(argv: Sequence[str], place: str, log_path: str) -> int:
    """Start ``argv`` on its own: new session, no parent, no descriptors but log and /dev/null.

    Gives its process id. Raises AgentGone where the launcher could not be started, or ended early.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.stat(log_path).st_size > _LOG_LIMIT:
            os.replace(log_path, f"{log_path}.1")
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        launched = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, *argv, place],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            env=_environment(),
            close_fds=True,
            start_new_session=True,
            check=False,
        )
        code = launched.returncode
        if code == 0:
            return int(launched.stdout)
        why = f"signal {-code} ended it" if code < 0 else f"it said:\n{_tail(log_path)}\n"
    except OSError as error:
        why = str(error)
    finally:
        os.close(log)
    raise AgentGone(
        f"the launcher of the agent failed: {why}. What to do: see whether this node has memory "
        "and processes left, and who kills processes on it, and try again",
        socket=_socket_in(place),
        log=log_path,
    )


def _environment() -> dict[str, str]:
    """Our environment, but for relative PYTHONPATH entries: they mean nothing in ``/``."""
    environment = dict(os.environ)
    if "PYTHONPATH" in environment:
        parts = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in parts)
    return environment


def _tail(log_path: str) -> str:
    with open(log_path, "rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - 2000))
        return log.read().decode(errors="replace").strip()
