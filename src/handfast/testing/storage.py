"""What a storage can be trusted with, tried out on the storage itself.

Each trial does what the store relies on (assumptions A2 and A3), with real processes, and says what
it saw. What only a power loss can show is not guessed at: `plug` writes until it is stopped, tells
how far it came each time that all is synced, and :func:`after` looks what is left of that, behind a
power loss or from another host.
"""

import contextlib
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from handfast.core.lattice import Epoch
from handfast.errors import HandfastError
from handfast.store.claims import identify
from handfast.store.directory import claim
from handfast.store.files import Files, Posix, closing, describe, write_file
from handfast.store.shelf import Shelf
from handfast.testing.samples import picture, save

__all__ = ["TRIALS", "Medium", "Trial", "after", "medium", "plug", "scratch", "try_out"]

NAME, RUN = "rank0", "crashtest"
NBYTES: Final = 1 << 20
LEFT: Final = "handfast-crashtest"  # what `plug` leaves, for `after` to find and to remove
PREFIX: Final = ".handfast-crashtest-"
MORE: Final = 8  # kills, where nothing was attested before any of those that were asked for
LONGEST_S: Final = 10.0  # that a writer on slow storage is given before it is killed

VOLATILE: Final = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
SHARED: Final = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "beegfs", "gpfs", "afs",
                 "gfs2", "ocfs2", "virtiofs"}  # fmt: skip
RISKY: Final = {
    "nobarrier": "the device's cache is not flushed",
    "barrier=0": "the device's cache is not flushed",
    "data=writeback": "files may hold old bytes after a crash",
    "volatile": "syncs are ignored",
    "fsync=volatile": "syncs are ignored",
    "fsync=nobarrier": "the device's cache is not flushed",
}


class Trial(NamedTuple):
    """One thing that was tried: whether it held, what was seen, and what rests on it."""

    name: str
    holds: bool
    seen: str
    rests: str


class Medium(NamedTuple):
    """What the kernel says of the file system that a directory lies on."""

    kind: str
    options: tuple[str, ...]
    device: str

    @property
    def volatile(self) -> bool:
        """Whether it is memory: nothing on it outlives a restart."""
        return self.kind in VOLATILE or not {"volatile", "fsync=volatile"}.isdisjoint(self.options)

    @property
    def shared(self) -> bool:
        """Whether other hosts may have it mounted, too, or a program of somebody's answers."""
        return self.kind.startswith("fuse") or self.kind in SHARED

    def warnings(self) -> tuple[str, ...]:
        """What its mount options give up."""
        return tuple(f"mounted with {o}: {RISKY[o]}" for o in self.options if o in RISKY)


def medium(path: str) -> Medium:
    """Look a directory's file system up in the kernel's table of mounts. Raises OSError."""
    real = os.path.realpath(path)
    best, found = -1, Medium("unknown", (), "")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields, _, rest = line.partition(" - ")
            _, _, _, _, point, options, *_ = fields.split()
            point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)
            kind, source, *more = rest.split()
            below = real == point or real.startswith(point.rstrip("/") + "/")
            if below and len(point) >= best:  # the last one on a place hides those before
                best = len(point)
                all_options = (*options.split(","), *",".join(more).split(","))
                found = Medium(kind, tuple(dict.fromkeys(all_options)), source)
    return found


@contextlib.contextmanager
def scratch(path: str) -> Iterator[str]:
    """A directory of our own below this one, which is gone afterwards. Raises OSError.

    NFS and FUSE keep a file that was open in a killed process under a name of their own, until the
    kernel has noticed: what is not empty yet is tried again.
    """
    made = tempfile.mkdtemp(prefix=PREFIX, dir=path)
    try:
        yield made
    finally:
        _remove(made)


def _remove(path: str) -> None:
    for pause in (0.05, 0.2, 1.0, 3.0):
        try:
            shutil.rmtree(path)
        except OSError:
            time.sleep(pause)
        else:
            return
    shutil.rmtree(path)


def try_out(home: str, *, kills: int, seed: int) -> Iterator[Trial]:
    """Try everything in an empty directory; each trial is given as soon as it is over."""
    for name, (trial, rests) in TRIALS.items():
        place = f"{home}/{name.replace(' ', '-')}"
        os.mkdir(place)
        try:
            holds, seen = trial(place)
        except OSError as error:
            holds, seen = False, f"it failed: {describe(error)}"
        yield Trial(name, holds, seen, rests)
    yield _killed_writers(f"{home}/kills", kills, seed)


# The trials: each gives whether it held, and what was seen

Seen = tuple[bool, str]
RACERS: Final = 4
ROUNDS = 25
REPLACED = 300


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
    """Run a body in a child of its own; its exit status is 0 where nothing was raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it makes system calls, and no threads
        pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            body()
            status = 0
        os._exit(status)
    return pid


def _ended(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


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
            with open(path, "rb") as file:
                data = file.read()
            wrong += len(data) != 8192 or len(set(data)) != 1
        except OSError:
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


def _locks(home: str) -> Seen:
    with open(f"{home}/lock", "w", encoding="ascii") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)

        def take() -> None:
            with open(f"{home}/lock", encoding="ascii") as theirs:
                fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)

        shut_out = not _ended(_fork(take))
        fcntl.flock(ours, fcntl.LOCK_UN)
        let_in = _ended(_fork(take))
    return shut_out and let_in, "held against others, and given back" if shut_out else "not held"


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
    "locks": (_locks, "one launch at a time records its round"),
}
"""What is tried, and what of handfast's rests on it. (Killed writers come last.)"""


# Killed writers


def _killed_writers(home: str, kills: int, seed: int) -> Trial:
    """Kill a process that saves, again and again; hold what it had told against what is there.

    Where storage is slow it is given more time, until some epochs are attested at all. Raises
    HandfastError where none is: that would show nothing.
    """
    rests = "an epoch that was attested is there, whole, whoever is killed"
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
            problem = _lost(home, told)
        except HandfastError as error:
            problem = str(error)
        if problem:
            break
    if not (told or problem):
        raise HandfastError(
            f"{home}: no epoch was attested before any of {count} kills, so nothing was tried. "
            "What to do: use more --kills, or faster storage"
        )
    seen = problem or f"{count} kills, {len(told)} epochs attested, all of them read back whole"
    return Trial("killed writers", not problem, seen, rests)


def _until_killed(home: str, after_s: float) -> list[int]:
    """Start a writer and kill it so long behind its first words; returns what it attested."""
    argv = [sys.executable, "-m", "handfast.testing.storage", home]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        first = writer.stdout.readline()  # from here on it writes
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(after_s if first else 0)
        ended = writer.returncode is not None
        writer.send_signal(signal.SIGKILL)
        lines = (first + writer.stdout.read()).split(b"\n")[:-1]  # one without an end was not told
    if ended or not lines:
        raise HandfastError(
            "a process that writes there ended by itself. What to do: see what it wrote above"
        )
    return [int(line) for line in lines[1:]]


class _Home(NamedTuple):
    run: str
    domain: str
    shard: int


def _picture(step: int) -> bytearray:
    return picture(step, nbytes=NBYTES)[1]


def _write(root: str, tell: Callable[[str], None], files: Files) -> None:
    """Save epoch after epoch, and tell of each that is attested; never ends by itself."""
    identity = identify(files, root, NAME, run=RUN, shard=0)
    tier = claim(files, root, NAME)
    layout, _ = picture(0, nbytes=NBYTES)
    last = max((int(record) for record in tier.history), default=0)
    tell("writing")
    for step in itertools.count(last + 1):
        home = _Home(RUN, identity.id, 0)
        save(tier, home, Epoch(tier.incarnation, step), _picture(step), layout)
        tier.journal.append(b"%d" % step)
        tier.journal.sync()
        if tier.current():
            tell(str(step))
        if step > 3:
            found = sorted(tier.manifests())
            tier.may_clean = True
            tier.release(found[:-3])


def _lost(root: str, told: list[int]) -> str:
    """What is missing or torn of all that was told; empty where nothing is."""
    files = Posix()
    shelf = Shelf(files, root, NAME)
    recorded = [int(record) for record in shelf.records()]
    if missing := set(told) - set(recorded):
        return f"attested and not in the journals: {sorted(missing)}"
    found = shelf.manifests()
    layout, _ = picture(0, nbytes=NBYTES)
    for step in told[-1:]:
        if not any(epoch.step == step for epoch in found):
            return f"epoch {step} was attested, and its manifest is gone"
    for epoch in found:
        into = bytearray(layout.nbytes)
        shelf.read(epoch, into)
        if into != _picture(epoch.step):
            return f"epoch {epoch} reads well and holds other bytes than were written"
    return ""


# Pulling the plug, and looking from elsewhere


def plug(path: str, tell: Callable[[str], None]) -> None:
    """Save below a directory until this process is ended; tell of each epoch that is durable.

    What it leaves stays for :func:`after`. Raises HandfastError, also where an earlier one left
    something, and OSError.
    """
    if os.path.lexists(f"{path}/{LEFT}"):
        raise HandfastError(
            f"{path}/{LEFT} is there, from an earlier --plug. What to do: look what is left of it "
            "with --after N, which removes it where all is well; or remove it"
        )
    os.mkdir(f"{path}/{LEFT}")
    Posix().fsync_dir(path)
    _write(f"{path}/{LEFT}", lambda line: None if line == "writing" else tell(line), Posix())


def after(path: str, step: int) -> Trial:
    """Look whether all up to the last epoch that `plug` told of is there, and remove it.

    Raises HandfastError where `plug` was never begun.
    """
    root = f"{path}/{LEFT}"
    problem = ""
    if not os.path.isdir(root):
        if not step:
            raise HandfastError(f"{root} is not there. What to do: begin with --plug")
        problem = f"{root} is gone, though it was synced (or --plug wrote to another directory)"
    try:
        problem = problem or _lost(root, list(range(1, step + 1)))
    except HandfastError as error:
        problem = str(error)
    if not problem:
        shutil.rmtree(root)
    seen = problem or f"all {step} epochs that were told of are recorded, and the last are whole"
    rests = "what was synced is there, behind a power loss and from another host"
    return Trial("after the plug", not problem, seen, rests)


if __name__ == "__main__":
    _write(sys.argv[1], lambda line: print(line, flush=True), Posix())
