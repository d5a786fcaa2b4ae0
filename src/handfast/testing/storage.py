"""What a storage can be trusted with, tried out on the storage itself.

Each trial does what the store relies on (assumptions A2 and A3), with real processes, and says what
it saw. What only a power loss can show is not guessed at: :mod:`~handfast.testing.writer` has that.
"""

import contextlib
import fcntl
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from handfast.core.lattice import GENESIS
from handfast.errors import UNREADABLE, HandfastError
from handfast.store.files import (
    Posix,
    closing,
    describe,
    read_file,
    write_file,
    writing,
)
from handfast.store.pins import Holder, Pin
from handfast.testing.writer import HOLDER, Trial, lost

__all__ = ["TRIALS", "scratch", "try_out"]

PREFIX: Final = ".handfast-crashtest-"
MORE: Final = 8  # kills, where nothing was attested before any of those that were asked for
LONGEST_S: Final = 10.0  # that a writer on slow storage is given before it is killed


@contextlib.contextmanager
def scratch(path: str) -> Iterator[str]:
    """A directory of our own below this one, which is gone afterwards.

    Those of others who have provably ended, by SIGKILL say, are removed first. Raises
    HandfastError where nothing can be made there.
    """
    _sweep(path)
    try:
        made = tempfile.mkdtemp(prefix=PREFIX, dir=path)
    except OSError as error:
        raise HandfastError(
            f"{path}: nothing can be made there: {describe(error)}. What to do: name a directory "
            "for files, in which this user may write"
        ) from error
    try:
        with writing("try this storage", made):
            write_file(Posix(), f"{made}/{HOLDER}", msgspec.json.encode(Holder.here("crashtest")))
        yield made
    finally:
        _remove(made)


def _sweep(path: str) -> None:
    """NFS and FUSE keep a file that was open in a killed process under a name of their own, until
    the kernel has noticed: what will not go now is left for the next time.
    """
    for name in os.listdir(path):
        holder = f"{path}/{name}/{HOLDER}"
        if name.startswith(PREFIX) and os.path.exists(holder):
            with contextlib.suppress(HandfastError, *UNREADABLE):
                by = msgspec.json.decode(read_file(Posix(), holder), type=Holder)
                if Pin(Posix(), holder, GENESIS, by).ended():
                    shutil.rmtree(f"{path}/{name}", ignore_errors=True)


def _remove(path: str) -> None:
    """Try again what is not empty yet, for the reason that `_sweep` has, too."""
    for pause in (0.05, 0.2, 1.0, 3.0):
        try:
            shutil.rmtree(path)
        except OSError:
            time.sleep(pause)
        else:
            return
    shutil.rmtree(path)


def try_out(home: str, *, kills: int, seed: int) -> Iterator[Trial]:
    """Try everything in a directory of our own; each trial is given as soon as it is over.

    Raises HandfastError where writers end by themselves though all else holds: on a full disk, say.
    """
    sound = True
    for name, (trial, rests) in TRIALS.items():
        place = f"{home}/{name.replace(' ', '-')}"
        os.mkdir(place)
        try:
            holds, seen = trial(place)
        except OSError as error:
            holds, seen = False, f"it failed: {describe(error)}"
        sound &= holds
        yield Trial(name, holds, seen, rests)
    try:
        yield _killed_writers(f"{home}/kills", kills, seed)
    except HandfastError as error:
        if sound:
            raise
        yield Trial("killed writers", holds=False, seen=str(error), rests=WRITERS)


# The trials: each gives whether it held, and what was seen

Seen = tuple[bool, str]
RACERS: Final = 4
ROUNDS = 25
REPLACED = 300
SHUT_OUT: Final = 2  # the exit status of a child that did not get a lock


def _syncs(home: str) -> Seen:
    files = Posix()
    took = []
    for n in range(ROUNDS):
        path = f"{home}/{n}"
        started = time.monotonic()
        write_file(files, path, bytes(4096))
        files.fsync_dir(home)
        took.append(time.monotonic() - started)
        with closing(files, files.open(path)) as fd:
            files.fdatasync(fd)
    return (
        True,
        f"no sync was refused; {statistics.median(took) * 1e3:.2f} ms for a file and its name",
    )


def _race(home: str, act: Callable[[str], None]) -> Seen:
    """Several processes do one thing to one name at one moment: one of them must succeed."""
    wrong = 0
    for n in range(ROUNDS):
        held, go = os.pipe()

        def race(held: int = held, go: int = go, path: str = f"{home}/{n}") -> None:
            os.close(go)
            os.read(held, 1)  # ends for all of them at once, when nobody holds the other end
            act(path)

        racers = [_fork(race) for _ in range(RACERS)]
        os.close(held)
        os.close(go)
        wrong += sum([_ended(racer) for racer in racers]) != 1
    return wrong == 0, f"{ROUNDS - wrong} of {ROUNDS} names went to one of {RACERS} processes"


def _fork(body: Callable[[], object]) -> int:
    """Run a body in a child of its own; its exit status is 0 where nothing was raised.

    It is SHUT_OUT where somebody else holds a lock.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it makes system calls, and no threads
        pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                body()
                status = 0
            except BlockingIOError:
                status = SHUT_OUT
        os._exit(status)
    return pid


def _status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _ended(pid: int) -> bool:
    return _status(pid) == 0


def _create(home: str) -> Seen:
    files = Posix()
    return _race(home, lambda path: files.close(files.create(path)))


def _mkdir(home: str) -> Seen:
    return _race(home, os.mkdir)


def _link(home: str) -> Seen:
    with open(f"{home}/source", "x", encoding="ascii"):
        pass
    return _race(home, lambda path: os.link(f"{home}/source", path))


def _rename(home: str) -> Seen:
    """A reader looks all the while: it must find one of the two files, and find it whole."""
    files = Posix()
    path = f"{home}/name"
    write_file(files, path, b"0" * 8192)

    def replace() -> None:
        for n in range(REPLACED):
            write_file(files, f"{path}.tmp", b"%d" % (n % 10) * 8192)
            files.rename(f"{path}.tmp", path)
        os.mkdir(f"{home}/over")

    writer = _fork(replace)
    looks = wrong = 0
    while not os.path.exists(f"{home}/over"):
        looks += 1
        try:
            data = read_file(files, path)
            wrong += len(data) != 8192 or len(set(data)) != 1
        except HandfastError:
            wrong += 1
        if looks % 1000 == 0 and os.waitpid(writer, os.WNOHANG)[0]:
            return os.path.exists(f"{home}/over") and not wrong, f"{wrong} of {looks} looks failed"
    return _ended(writer) and not wrong, f"{looks - wrong} of {looks} looks found a whole file"


def _seen_at_once(home: str) -> Seen:
    """What one process has written and named, another finds as soon as it is told."""
    files = Posix()
    wrong = 0
    for n in range(ROUNDS):
        path = f"{home}/{n}"
        os.path.exists(path)  # so that a cache would remember that it was not there
        read, write = os.pipe()

        def show(path: str = path, told: int = write) -> None:
            write_file(files, path, path.encode())
            os.write(told, b"!")

        child = _fork(show)
        os.close(write)
        told = os.read(read, 1)
        os.close(read)
        found = b""
        with contextlib.suppress(OSError), open(path, "rb") as file:
            found = file.read()
        wrong += not told or found != path.encode() or str(n) not in os.listdir(home)
        _ended(child)
    return wrong == 0, f"{ROUNDS - wrong} of {ROUNDS} files were seen by another process at once"


def _named(home: str) -> Seen:
    """An owner looks whether its journal's name still leads to what it has open."""
    files = Posix()
    path = f"{home}/file"
    with closing(files, files.create(path)) as fd:
        wrong = sum(not files.leads_to(path, fd) for _ in range(ROUNDS))
    return wrong == 0, f"{ROUNDS - wrong} of {ROUNDS} looks found the file that was open"


def _locks(home: str) -> Seen:
    def take() -> int:
        # writable: NFS gives an exclusive lock to no other, and the store opens it so
        fd = os.open(f"{home}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    ours = take()
    while_held = _status(_fork(take))
    os.close(ours)
    once_free = _status(_fork(take))
    seen = {
        (SHUT_OUT, 0): "held against others, and given back",
        (SHUT_OUT, SHUT_OUT): "held against others, and not given back",
    }.get((while_held, once_free), "not held: two had it at once")
    if not {while_held, once_free} <= {0, SHUT_OUT}:
        seen = "not tried: another process that asked for it met an error"
    return (while_held, once_free) == (SHUT_OUT, 0), seen


TRIALS: Final[dict[str, tuple[Callable[[str], Seen], str]]] = {
    "syncs": (_syncs, "whatever is to outlive a power loss"),
    "exclusive files": (_create, "an identity, a journal and a pin have one maker"),
    "exclusive directories": (_mkdir, "an incarnation has one owner"),
    "exclusive links": (_link, "two that start at once agree on one identity"),
    "renames replace": (
        _rename,
        "a manifest, a certificate and a round are the old or the new one",
    ),
    "seen at once": (_seen_at_once, "a late process notices that it has a successor"),
    "names lead back": (_named, "an owner notices that its directory was replaced"),
    "locks": (_locks, "one launch at a time records its round"),
}
"""What is tried, and what of handfast's rests on it. (Killed writers come last.)"""


# Killed writers

WRITERS: Final = "an epoch that was attested is there, whole, whoever is killed"


def _killed_writers(home: str, kills: int, seed: int) -> Trial:
    """Kill a process that saves, again and again; hold what it had told against what is there.

    Where storage is slow it is given more time, until some epochs are attested at all. Raises
    HandfastError where none is: that would show nothing.
    """
    chance = random.Random(seed)
    os.mkdir(home)
    told: list[int] = []
    problem, longest_s = "", 0.1
    count = 0
    while count < kills or (not told and count < kills + MORE):
        count += 1
        said = _until_killed(home, chance.uniform(0.0, longest_s))
        longest_s = longest_s if said else min(2 * longest_s, LONGEST_S)
        told += said
        try:
            problem = lost(home, max(told, default=0))
        except HandfastError as error:
            problem = str(error)
        if problem:
            break
    if not (told or problem):
        raise HandfastError(
            f"{home}: no epoch was attested before any of {count} kills, so nothing was tried. "
            "What to do: use more --kills, or faster storage"
        )
    more = f" ({count - kills} more than asked for: none was attested)" if count > kills else ""
    killed = f"{count} kill{'s' * (count != 1)}{more}"
    whole = f"{len(told)} epoch{'s' * (len(told) != 1)} attested, all read back whole"
    seen = problem or f"{killed}, {whole}"
    return Trial("killed writers", not problem, seen, WRITERS)


def _until_killed(home: str, after_s: float) -> list[int]:
    """Start a writer and kill it so long behind its first words; returns what it attested."""
    argv = [sys.executable, "-m", "handfast.testing.writer", home]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        try:
            first = writer.stdout.readline()  # from here on it writes
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(after_s if first else LONGEST_S)
            ended = writer.returncode is not None
        finally:
            writer.kill()  # also where we are told to end ourselves
        lines = (first + writer.stdout.read()).split(b"\n")[:-1]  # one without an end was not told
        said = writer.stderr.read().decode(errors="replace").strip()
    if ended or not lines:
        raise HandfastError(f"a process that writes there ended by itself: {said}")
    return [int(line) for line in lines[1:]]
