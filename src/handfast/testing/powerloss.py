"""A disk in memory that keeps only what was synced, and every state that a power loss can leave.

**What is promised** (POSIX.1-2024, `fsync`, `fdatasync`, and the rationale of both): after a sync
of a file, its bytes and its length are durable; after a sync of a directory, so are the names in
it. Nothing else is, and in no order. What ALICE (Pillai et al., OSDI 2014, table 1 and section 4)
and CrashMonkey (Mohan et al., OSDI 2018) found file systems to do besides is given up here:

- a sync of a new file does not make its name durable, nor does one of a directory make those below
  it durable, nor the bytes of the files in it;
- what was not synced persists or not, each change for itself: names apart from bytes, a length
  apart from the bytes that it covers, later changes without earlier ones;
- a write is torn at every border of 512 bytes, and two writes to one such sector may persist
  apart, which is more than a page cache would do;
- where a length persisted without its bytes, there are zeros, or whatever lay there before.

**What is assumed**, as ALICE found on all file systems that it looked at: a single change of a
directory is never torn. A name leads to the old file or to the new one (so a `rename` replaces at
once), and a `rename` within one directory takes the old name away when it gives the new one. The
store moves nothing from one directory to another; a disk refuses it here, so that this stays true.

**A sync of a file that fails** (:meth:`Disk.fail_sync`) does what Linux does (Rebello et al., ATC
2020): its pages are clean from then on and their bytes never come to the medium, though whoever
reads the file still sees them; the next sync says nothing, and makes the length durable. Only who
drops the clean pages (`forget`) reads what the medium holds. Of a directory nothing is promised.

:func:`crashes` walks through **every prefix of what was done, and for each every subset of what was
not synced by then** (two prefixes may leave one state: each is given once). More than `limit`
changes that are pending at one moment have too many subsets: of these, all, none, each alone, all
but each, and `sampled` more by a seeded choice.
"""

import errno
import os
import random
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

__all__ = ["SECTOR", "Crashed", "Disk", "Told", "crashes"]

SECTOR: Final = 512  # bytes that a medium writes whole or not at all
STALE: Final = b"\xa5"  # what lay on the medium before

Name = tuple[str, int | None]  # a name, and the file that it leads to from then on, if any


class Names(NamedTuple):
    """A change of one directory, which persists whole: each name with what it leads to."""

    node: int
    names: tuple[Name, ...]


class Data(NamedTuple):
    """Bytes that were written to a file, which was `before` bytes long."""

    node: int
    offset: int
    data: bytes
    before: int


class Sync(NamedTuple):
    """A file or a directory was synced."""

    node: int


class Failed(NamedTuple):
    """A sync of a file failed: what was written to it since the last one is in the cache alone."""

    node: int


class Told(NamedTuple):
    """Somebody was told something: from here on it must outlive every crash."""

    fact: object


Step = Names | Data | Sync | Failed | Told
Node = bytes | bytearray | dict[str, int]
Found = bytes | dict[str, int]


class Disk:
    """Files in memory; fills the port :class:`handfast.store.files.Files`.

    `there` are directories that were there, durably, before anything began. `steps` is what
    was done, `told` what had been told before that. A process that ends just stops calling: the
    disk stays as it is, and a successor sees all of it, as with a page cache. Only :func:`crashes`
    and :meth:`cut` lose anything.
    """

    lanes = 1

    def __init__(self, *there: str) -> None:
        self.steps: list[Step] = []
        self.told: tuple[object, ...] = ()
        self._nodes: dict[int, Node] = {0: {}}
        self._open: dict[int, int] = {}
        self._next_fd = 1000
        self._fails = False
        self._unlike: set[int] = set()  # files whose cache holds what the medium never will
        for path in there:
            at = self._directory(0)
            for part in filter(None, path.split("/")):
                if part not in at:
                    node = at[part] = len(self._nodes)
                    self._nodes[node] = {}
                at = self._directory(at[part])
        self._before = {n: _frozen(node) for n, node in self._nodes.items()}

    @classmethod
    def left(cls, nodes: Mapping[int, Found], told: tuple[object, ...]) -> "Disk":
        """What a crash left; all of it is durable."""
        made = cls()
        made.told = told
        made._nodes = {n: _frozen(x) for n, x in nodes.items()}
        made._before = {n: _frozen(x) for n, x in nodes.items()}
        return made

    def tell(self, fact: object) -> None:
        """Note that somebody was told this: no crash from here on may undo it."""
        self.steps.append(Told(fact))

    def cut(self, chance: random.Random) -> "Disk":
        """What is found if the power fails now: each change that was not synced by a coin."""
        media = self._medium()
        return Disk.left(media.leave(chance.getrandbits(len(media.pending)))[1], self.told)

    def fail_sync(self) -> None:
        """Let the next sync fail, by EIO."""
        self._fails = True

    def tree(self) -> dict[str, bytes]:
        """Every file by its path."""
        found: dict[str, bytes] = {}
        ahead = [("", 0)]
        while ahead:
            path, at = ahead.pop()
            if isinstance(node := self._nodes[at], dict):
                ahead += [(f"{path}/{name}", below) for name, below in node.items()]
            else:
                found[path] = bytes(node)
        return found

    # The port

    def create(self, path: str) -> int:
        return self._opened(self._make(path, bytearray()))

    def open(self, path: str) -> int:
        if isinstance(self._nodes[node := self._find(path)], dict):
            raise _error(errno.ENXIO, path)
        return self._opened(node)

    def close(self, fd: int) -> None:
        del self._open[fd]

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        file, taken = self._file(fd), bytes(data)
        self.steps.append(Data(self._open[fd], offset, taken, len(file)))
        if len(file) < offset:
            file.extend(bytes(offset - len(file)))
        file[offset : offset + len(taken)] = taken
        return len(taken)

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        part = self._file(fd)[offset : offset + len(into)]
        into[: len(part)] = part
        return len(part)

    def fsync(self, fd: int) -> None:
        self._sync(self._open[fd])

    def fdatasync(self, fd: int) -> None:
        self._sync(self._open[fd])

    def forget(self, fd: int) -> None:
        """Read what the medium holds, where a sync failed; dirty pages stay as they are."""
        node = self._open[fd]
        if node in self._unlike:
            held = self._medium().holds(node)
            assert isinstance(held, bytes)
            self._nodes[node] = bytearray(held)
            self._unlike.remove(node)

    def cached(self, fd: int) -> bool:  # noqa: ARG002 - it has no such cache
        return False

    def direct(self, fd: int, on: bool) -> bool:  # noqa: ARG002 - it makes nothing durable
        return on

    def allocate(self, fd: int, nbytes: int) -> None:
        file = self._file(fd)
        self.steps.append(Data(self._open[fd], nbytes, b"", len(file)))
        file.extend(bytes(max(0, nbytes - len(file))))

    def size(self, fd: int) -> int:
        return len(self._nodes[self._open[fd]])

    def leads_to(self, path: str, fd: int) -> bool:
        return self.exists(path) and self._find(path) == self._open[fd]

    def rename(self, source: str, target: str) -> None:
        home, old = self._parent(source)
        there, new = self._parent(target)
        node = self._find(source)
        if home != there:
            raise _error(errno.EXDEV, f"{source} to {target}: what a crash leaves is not told")
        self._change(home, (new, node), (old, None))

    def link(self, source: str, target: str) -> None:
        self._name(target, self._find(source))

    def unlink(self, path: str) -> None:
        self._find(path)
        home, name = self._parent(path)
        self._change(home, (name, None))

    def mkdir(self, path: str, like: str = "") -> None:  # noqa: ARG002 - nobody owns anything here
        self._make(path, {})

    def rmdir(self, path: str) -> None:
        if self.listdir(path):
            raise _error(errno.ENOTEMPTY, path)
        self.unlink(path)

    def listdir(self, path: str) -> list[str]:
        return sorted(self._directory(self._find(path)))

    def exists(self, path: str) -> bool:
        try:
            self._find(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def fsync_dir(self, path: str) -> None:
        self._directory(node := self._find(path))
        self._sync(node)

    def free_bytes(self, path: str) -> int:
        self._find(path)
        return 1 << 40

    # How it is kept

    def _sync(self, node: int) -> None:
        if self._fails:
            self._fails = False
            if not isinstance(self._nodes[node], dict):
                self.steps.append(Failed(node))
                self._unlike.add(node)
            raise _error(errno.EIO, str(node))
        self.steps.append(Sync(node))

    def _medium(self) -> "_Medium":
        media = _Medium(self)
        for step in self.steps:
            media.follow(step)
        return media

    def _name(self, path: str, node: int) -> None:
        home, name = self._parent(path)
        if name in self._directory(home):
            raise _error(errno.EEXIST, path)
        self._change(home, (name, node))

    def _make(self, path: str, made: Node) -> int:
        self._name(path, node := max(self._nodes) + 1)
        self._nodes[node] = made
        return node

    def _file(self, fd: int) -> bytearray:
        file = self._nodes[self._open[fd]]
        if not isinstance(file, bytearray):  # it was there before
            assert isinstance(file, bytes)
            file = self._nodes[self._open[fd]] = bytearray(file)
        return file

    def _opened(self, node: int) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = node
        return self._next_fd

    def _change(self, home: int, *names: Name) -> None:
        at = self._directory(home)
        for name, node in names:
            if node is None:
                del at[name]
            else:
                at[name] = node
        self.steps.append(Names(home, names))

    def _directory(self, node: int) -> dict[str, int]:
        if isinstance(at := self._nodes[node], dict):
            return at
        raise _error(errno.ENOTDIR, str(node))

    def _find(self, path: str) -> int:
        at = 0
        for part in path.split("/"):
            if part:
                names = self._nodes[at]
                if not isinstance(names, dict):
                    raise _error(errno.ENOTDIR, path)
                if part not in names:
                    raise _error(errno.ENOENT, path)
                at = names[part]
        return at

    def _parent(self, path: str) -> tuple[int, str]:
        home, _, name = path.rpartition("/")
        node = self._find(home)
        self._directory(node)
        return node, name


def _frozen(node: Node) -> Found:
    return dict(node) if isinstance(node, dict) else bytes(node)


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


class Crashed(NamedTuple):
    """What one crash left.

    `after` is how many steps had been done, `lost` which of the changes that were not synced did
    not persist (`kept` did), `told` what had been told by then. `key` is equal for crashes
    that left the same files; `files` is the disk, made anew by each call.
    """

    after: int
    kept: int
    lost: int
    told: tuple[object, ...]
    key: tuple[object, ...]
    nodes: dict[int, Found]

    def files(self) -> Disk:
        """The disk as it is found when the power is back."""
        return Disk.left(self.nodes, self.told)


class _Unit(NamedTuple):
    """The least that persists or not: names, a sector, a length, or what fills holes."""

    node: int
    names: tuple[Name, ...] = ()
    offset: int = 0
    data: bytes = b""
    length: int = 0
    stale: bool = False


def crashes(disk: Disk, *, limit: int = 12, sampled: int = 500, seed: int = 0) -> Iterator[Crashed]:
    """Every crash of what was done on a disk; how many are sampled, the module says."""
    media = _Medium(disk)
    chance = random.Random(seed)
    told = disk.told
    yield Crashed(0, 0, 0, told, *media.leave(0))
    for done, step in enumerate(disk.steps, 1):
        many = len(media.pending) > limit
        new = media.follow(step)
        if isinstance(step, Told):
            told = (*told, step.fact)
        elif isinstance(step, Sync | Failed) and not many:
            continue  # a crash just before it could leave all that one behind it can
        for mask in _subsets(len(media.pending), new, limit, sampled, chance):
            key, nodes = media.leave(mask)
            kept = mask.bit_count()
            yield Crashed(done, kept, len(media.pending) - kept, told, key, nodes)


def _subsets(
    count: int, new: int, limit: int, sampled: int, chance: random.Random
) -> Iterator[int]:
    """Masks over `count` pending changes, each with one of the `new` last at least, if any are."""
    fresh = ((1 << new) - 1) << (count - new)
    whole = (1 << count) - 1
    if count <= limit:
        yield from (mask for mask in range(whole + 1) if not new or mask & fresh)
        return
    ones = [1 << bit for bit in range(count)]
    chosen = {whole, fresh, 0, *ones, *(whole ^ one for one in ones)}
    chosen |= {chance.getrandbits(count) for _ in range(sampled)}
    # few losses and few survivors are where the faults are: half of the choices are thinned out
    chosen |= {chance.getrandbits(count) & chance.getrandbits(count) for _ in range(sampled // 2)}
    chosen |= {chance.getrandbits(count) | chance.getrandbits(count) for _ in range(sampled // 2)}
    yield from sorted(mask for mask in chosen if not new or mask & fresh)


class _Medium:
    """What is durable, and what is pending, as the steps go by."""

    def __init__(self, disk: Disk) -> None:
        self.pending: list[_Unit] = []
        self._durable: dict[int, Found] = dict(disk._before)
        self._made: dict[tuple[int, int], Found] = {}
        self._same: dict[object, Found] = {}
        self._bits: dict[int, int] = {}
        self._directories = {n for n, x in disk._nodes.items() if isinstance(x, dict)}

    def follow(self, step: Step) -> int:
        """Take a step; returns how many units are pending on account of it."""
        if isinstance(step, Sync):
            self._sync(step.node)
        elif isinstance(step, Failed):
            self.pending = [u for u in self.pending if u.node != step.node or not u.data]
            self._renew()
        elif not isinstance(step, Told):
            return self._add(step)
        return 0

    def holds(self, node: int) -> Found:
        """What is found in a file if all that is pending for it comes to the medium."""
        return self._with(node, [u for u in self.pending if u.node == node and not u.stale])

    def _add(self, step: Names | Data) -> int:
        """Make a change pending; returns how many units it consists of."""
        before = len(self.pending)
        if isinstance(step, Names):
            self.pending.append(_Unit(step.node, step.names))
        else:
            at = end = step.offset
            while at < step.offset + len(step.data):
                end = min((at // SECTOR + 1) * SECTOR, step.offset + len(step.data))
                part = step.data[at - step.offset : end - step.offset]
                self.pending.append(_Unit(step.node, offset=at, data=part))
                at = end
            if end > step.before:
                self.pending.append(_Unit(step.node, length=end))
                if not any(unit.stale and unit.node == step.node for unit in self.pending):
                    self.pending.append(_Unit(step.node, stale=True))
        self._renew()
        return len(self.pending) - before

    def _sync(self, node: int) -> None:
        """Make all that is pending for a file or a directory durable."""
        if node in self._bits:
            # a hole that stays within a durable length is filled with zeros, by the file system
            self._durable[node] = self.holds(node)
            self.pending = [unit for unit in self.pending if unit.node != node]
            self._renew()

    def leave(self, mask: int) -> tuple[tuple[object, ...], dict[int, Found]]:
        """What is found if of all pending units those of the mask have persisted."""
        key: list[object] = []
        nodes: dict[int, Found] = {}
        ahead = [0]
        while ahead:
            node = ahead.pop()
            if node in nodes:
                continue  # a second name of it
            found = nodes[node] = self._at(node, mask)
            key += (node, id(found))
            if isinstance(found, dict):
                ahead += found.values()
        return tuple(key), nodes

    def _renew(self) -> None:
        self._made.clear()
        self._bits.clear()
        for bit, unit in enumerate(self.pending):
            self._bits[unit.node] = self._bits.get(unit.node, 0) | 1 << bit

    def _at(self, node: int, mask: int) -> Found:
        ours = mask & self._bits.get(node, 0)
        found = self._made.get((node, ours))
        if found is None:
            chosen = [unit for bit, unit in enumerate(self.pending) if ours >> bit & 1]
            made = self._with(node, chosen)
            value = tuple(sorted(made.items())) if isinstance(made, dict) else made
            # kept for good, so that an id never comes to stand for something else
            found = self._made[node, ours] = self._same.setdefault(value, made)
        return found

    def _with(self, node: int, units: list[_Unit]) -> Found:
        start = self._durable.get(node)
        if start is None:
            start = {} if node in self._directories else b""
        if isinstance(start, dict):
            names = dict(start)
            for unit in units:
                for name, target in unit.names:
                    if target is None:
                        names.pop(name, None)
                    else:
                        names[name] = target
            return names
        fill = STALE if any(unit.stale for unit in units) else b"\0"
        length = max([len(start), *(unit.length for unit in units)])
        data = bytearray(start.ljust(length, fill))
        for unit in units:
            part = unit.data[: max(0, length - unit.offset)]  # behind the length nothing is seen
            data[unit.offset : unit.offset + len(part)] = part
        return bytes(data)
