"""What is done to a disk that will lose its power, and how what is left is judged.

A *story* does something with the real store on a :class:`Disk` and notes what somebody was told.
:func:`judge` opens what a crash left with the real code, and holds it against what had been told.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from handfast.agent.frames import make_image
from handfast.agent.keeper import Image, Keeper, Plan
from handfast.checkpoint import export, rounds
from handfast.core import events
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import step
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import Record, Released, Skipped, decode_record, encode
from handfast.core.retain import Keep
from handfast.core.state import Member
from handfast.errors import Damaged, HandfastError, Superseded
from handfast.fleet import identity
from handfast.link import life
from handfast.link import records as links
from handfast.link.life import Node
from handfast.link.session import Bound, Offered, Taking
from handfast.link.switch import Spoken
from handfast.store import delta, directory, journal, manifest
from handfast.store.claims import domains_below, identify, incarnations, lengths_now
from handfast.store.files import Files, read_file
from handfast.store.pins import Pin, pin, pins
from handfast.store.shelf import Shelf
from handfast.testing.faults import Crash, FaultyFiles
from handfast.testing.powerloss import Disk, crashes
from handfast.testing.stores import picture

ROOT, NAME, RUN = "/disk/runs/gpt", "rank0", "run-1"
NBYTES = 300  # behind a header of 4096: two chunks, of which the first is the same in all epochs
CHUNK = 4096
TAIL = 6000
OLD, NEW = Spoken(Epoch(1, 1), "old"), Spoken(Epoch(1, 2), "new")


class Lost(AssertionError):
    """A crash left what must not be: torn and counted, or told and gone."""


# Facts: what somebody was told


class Identified(NamedTuple):
    """The domain has this identity."""

    id: str


class Begun(NamedTuple):
    """A claim returned: this is the whole history, and all of it is durable."""

    history: tuple[bytes, ...]


class Meant(NamedTuple):
    """Records are about to be appended: they may be there from here on, and need not."""

    records: tuple[bytes, ...]


class Said(NamedTuple):
    """What was meant is committed."""


class Kept(NamedTuple):
    """An epoch was attested."""

    epoch: Epoch


class Published(NamedTuple):
    """A certificate was shown."""

    epoch: Epoch


class Pinned(NamedTuple):
    """A reader was told that an epoch is held for it, or that it is no more; None: between both."""

    path: str
    epoch: Epoch
    held: bool | None


class Allocated(NamedTuple):
    """A round was told its generation, which stands in this file."""

    path: str
    nonce: str
    generation: int


class Enrolled(NamedTuple):
    """A node was told its key, which stands in this directory; "" is about to be."""

    path: str
    key: str


class Counted(NamedTuple):
    """A node's life was given this number, by the counter in this file."""

    path: str
    number: int


class Recorded(NamedTuple):
    """These records of links are durable in this file, or the last of them is about to be."""

    path: str
    records: tuple[Record, ...]
    done: bool = True


class Exported(NamedTuple):
    """A file was exported, of the epoch of this step; or is about to be."""

    path: str
    step: int
    done: bool = True


@functools.cache
def content(epoch: Epoch) -> bytes:
    """The image of an epoch; each has its own."""
    return bytes(picture(epoch.generation * 1000 + epoch.step, nbytes=NBYTES)[1])


LAYOUT = picture(0, nbytes=NBYTES)[0]
PLAN = Plan(
    slots=LAYOUT.slots,
    header=LAYOUT.header,
    nbytes=LAYOUT.nbytes,
    padded=LAYOUT.padded,
    aliases={},
    replicated=(),
    structure="s",
    environment={},
    lineage="main",
    verify="sampled",
)


@contextlib.contextmanager
def small_world() -> Iterator[None]:
    """Chunks of one block and tails of a few records, so that their crashes can be counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "TORN_MAX", TAIL)
        for module in (manifest, delta, directory):
            patch.setattr(module, "CHUNK", CHUNK)
        patch.setattr(manifest.hash_chunks, "__defaults__", (CHUNK,))
        yield


class Agent:
    """The only domain of a run: the real keeper and the real member, and no process around them.

    It does what the agent's `_turn` does: persist, look for a successor, then act. What it has
    done is told to the disk.
    """

    def __init__(self, files: Files, tell: Callable[[object], None], root: str = ROOT) -> None:
        self.files, self.tell, self.root = files, tell, root
        mine = identify(files, root, NAME, run=RUN, shard=0)
        tell(Identified(mine.id))
        domains = (Domain(mine.id, "directory", 0, "host0"),)
        self.among = Roster(Configuration(RUN, 1, domains, (("directory", 1),)))
        self.keeper, self.member = Keeper.claim(files, root, NAME)
        tell(Begun(self.keeper.directory.history))

    def take(self, *happened: events.Event) -> None:
        """Let events happen, and carry out what follows."""
        for event in happened:
            self.member, effects = step(self.member, event)
            if effects.persist:
                self.commit(list(effects.persist))
            for action in effects.apply:
                self._act(action)

    def commit(self, records: list[Record]) -> None:
        """Commit records, and say so."""
        self.tell(Meant(tuple(encode(record) for record in records)))
        self.keeper.commit(records)
        self.tell(Said())

    def _act(self, action: events.Action) -> None:
        if isinstance(action, events.Publish):
            self.keeper.publish(NAME, action.certificate)
            self.tell(Published(action.certificate.epoch))
        elif isinstance(action, events.Release):
            self.keeper.release(action.epochs)
        elif isinstance(action, events.Resume):
            self.keeper.resume(self.member, action.certificate.base)

    def open(self, generation: int, *, keep: int = 1) -> None:
        """Begin a generation from the newest epoch that is retained."""
        base = max((copy.epoch for copy in self.member.retained), default=GENESIS)
        self.take(
            events.Begin(
                generation, f"round-{generation}", self.among, keep=Keep(keep), founding=True
            )
        )
        if base != GENESIS:
            self.take(events.Checked(generation, base))
        self.take(events.Accept(generation, base, 0))
        if not self.member.open:
            raise Lost(f"generation {generation} can't begin from {base}")
        self.pinned()

    def pinned(self) -> None:
        """Let the member know what readers hold."""
        self.take(events.Pinned(self.keeper.pinned()))

    def save(self, epoch: Epoch) -> None:
        """Persist an epoch, and vote for it."""
        self.take(events.Captured(epoch))
        digest = self.write(epoch)
        self.take(events.Persisted(epoch, digest))
        self.tell(Kept(epoch))

    def write(self, epoch: Epoch) -> str:
        """Persist an epoch, and don't vote."""
        memory = make_image(LAYOUT.padded)
        with open(memory, "r+b", closefd=False) as file:
            file.write(content(epoch))
        held = Image(memory, PLAN)
        try:
            return self.keeper.write(self.member, self.among, epoch, held, b"objects").digest
        finally:
            held.close()

    def append(self, records: list[Record]) -> None:
        """Append records and be killed before the sync: the kernel holds them all the same."""
        self.tell(Meant(tuple(encode(record) for record in records)))
        for record in records:
            self.keeper.directory.journal.append(encode(record))


# Stories: what is done to a disk by files that may fail; what was told is noted on the disk


def story_birth(disk: Disk, files: Files) -> None:
    """A first start, from the run's directory on, and a second one."""
    Agent(files, disk.tell).open(1)
    Agent(files, disk.tell).open(2)


def story_saves(disk: Disk, files: Files) -> None:
    """A full epoch, and a delta on it, which releases the one before."""
    agent = Agent(files, disk.tell)
    agent.open(1)
    for n in (1, 2):
        if agent.keeper.directory.free_bytes():
            agent.save(Epoch(1, n))
    agent.keeper.directory.close()


def story_claim(disk: Disk, files: Files) -> None:
    """A domain that holds an epoch is claimed anew."""
    story_birth(disk, disk)
    Agent(files, disk.tell)


def story_handover(disk: Disk, files: Files) -> None:
    """An agent is killed behind an append and before its sync; another takes over and saves."""
    agent = Agent(files, disk.tell)
    agent.open(1, keep=2)
    agent.save(Epoch(1, 1))
    agent.take(events.Captured(Epoch(1, 2)))
    digest = agent.write(Epoch(1, 2))
    _, effects = step(agent.member, events.Persisted(Epoch(1, 2), digest))
    agent.append(list(effects.persist))
    heir = Agent(files, disk.tell)
    heir.open(2, keep=2)
    heir.save(Epoch(2, 3))


def story_reader(disk: Disk, files: Files) -> None:
    """A reader pins an epoch, which outlives a release; then lets go, and it is released."""
    agent = Agent(files, disk.tell)
    agent.open(1)
    agent.save(Epoch(1, 1))
    held = pin(files, ROOT, NAME, Epoch(1, 1), "export")
    disk.tell(Pinned(held.path, held.epoch, held=True))
    agent.pinned()
    agent.save(Epoch(1, 2))
    disk.tell(Pinned(held.path, held.epoch, held=None))
    held.release()
    disk.tell(Pinned(held.path, held.epoch, held=False))
    agent.pinned()
    agent.save(Epoch(1, 3))


def story_sudden_reader(disk: Disk, files: Files) -> None:
    """A reader pins an epoch at the very moment in which its manifest is taken away."""
    story_saves(disk, disk)
    agent = Agent(disk, disk.tell)
    agent.open(2)

    def hold() -> None:
        held = pin(disk, ROOT, NAME, Epoch(1, 2), "export")
        disk.tell(Pinned(held.path, held.epoch, held=True))

    files = FaultyFiles(files, 1, hold, kinds=("rename",), path=".released")
    agent.keeper.directory.files = files
    agent.save(Epoch(2, 3))


def story_twice_begun(disk: Disk, files: Files) -> None:
    """Somebody died after each name that a first start makes, and before it was synced."""
    for kind in ("mkdir", "mkdir", "mkdir", "mkdir", "link"):
        with contextlib.suppress(Crash):
            identify(FaultyFiles(files, 1, kinds=(kind,), after=True), ROOT, NAME, run=RUN, shard=0)
    Agent(files, disk.tell).open(1)


def story_half_claimed(disk: Disk, files: Files) -> None:
    """Agents were killed in their claims: before the journal, and before its name was durable."""
    with contextlib.suppress(Crash):
        Agent(FaultyFiles(files, 1, kinds=("create",), path="/journal"), disk.tell)
    with contextlib.suppress(Crash):
        Agent(FaultyFiles(files, 2, kinds=("fdatasync",), after=True), disk.tell)
    Agent(files, disk.tell).open(1)


def story_void(disk: Disk, files: Files) -> None:
    """An agent that was frozen wakes up behind its heir's claim, and commits what is void."""
    frozen = Agent(files, disk.tell)
    frozen.open(1)
    Agent(files, disk.tell)
    with contextlib.suppress(Superseded):
        frozen.keeper.commit([Skipped(0, Epoch(1, 1), "woke up late")])


def story_long_tail(disk: Disk, files: Files) -> None:
    """So much is appended without a sync that it could not pass for a torn tail."""
    agent = Agent(files, disk.tell)
    agent.open(1)
    agent.append([Skipped(0, Epoch(1, n), "x" * (TAIL // 3)) for n in range(6)])


def story_rounds(disk: Disk, files: Files) -> None:
    """Three launches are given their generations; the lock alone is a real file."""
    with tempfile.TemporaryDirectory() as home:
        for n in (1, 2, 3):
            generation = rounds.allocate_in(files, home, f"nonce-{n}", 0)
            disk.tell(Allocated(f"{home}/round.json", f"nonce-{n}", generation))


def story_export(disk: Disk, files: Files) -> None:
    """Two epochs are taken out into files; for the second the file system has no links."""
    unlinked = FaultyFiles(files, 1, errno.EOPNOTSUPP, kinds=("link",))
    with tempfile.TemporaryDirectory() as home:  # that it is there is asked of the system itself
        disk.mkdir(home)
        disk.fsync_dir(os.path.dirname(home))
        for n, door in ((1, files), (2, unlinked)):
            weights = SimpleNamespace(tensors=(), tied={}, epoch=Epoch(1, n), blocks=tuple)
            disk.tell(Exported(f"{home}/{n}", n, done=False))
            export.write_safetensors(door, f"{home}/{n}", weights)
            disk.tell(Exported(f"{home}/{n}", n))


def story_lives(disk: Disk, files: Files) -> None:
    """A node is enrolled, and begins ten lives: the tenth number is longer."""
    home = f"{ROOT}/node"
    disk.tell(Enrolled(home, ""))
    disk.tell(Enrolled(home, identity.enroll(home, files).id))
    for number in range(1, 11):
        assert life.count(files, f"{home}/counter", "") == number
        disk.tell(Counted(f"{home}/counter", number))


def story_links(disk: Disk, files: Files) -> None:
    """Two lives of an end of links: what they record, and a file that is written anew."""
    path, told = "/disk/runs/links", ()
    for born in (1, 2):
        held = links.Records(path, files)
        for record in (
            Offered(Node("me", "boot", born), (OLD, NEW)),
            *(
                Bound(bytes(16), Node("me", "boot", born), Node(who, "b", born), OLD)
                for who in "ab"
            ),
            Taking(bytes(16), (NEW,)),
        ):
            told = (*told, record)
            disk.tell(Recorded(path, told, done=False))
            held(record)
            disk.tell(Recorded(path, told))
        held.close()


def story_looks(disk: Disk, files: Files) -> None:
    """Somebody looks at all that a domain holds, and writes nothing."""
    story_saves(disk, disk)
    domains_below(files, ROOT)
    lengths_now(files, f"{ROOT}/domains/{NAME}")
    shelf = Shelf(files, ROOT, NAME)
    shelf.records()
    for epoch, entry in shelf.manifests().items():
        shelf.lacks(entry.sound())
        shelf.read(epoch)
    pins(files, ROOT, NAME)
    rounds.peek(files, ROOT, "node", 0)
    path = f"{ROOT}/domains/{NAME}/domain.json"
    disk.rename(path, f"{path}.away")
    try:
        with contextlib.suppress(Damaged):  # it is not made anew over incarnations
            identify(files, ROOT, NAME, run=RUN, shard=0)
    finally:
        disk.rename(f"{path}.away", path)


Story = Callable[[Disk, Files], None]
STORIES: dict[str, Story] = {
    name.removeprefix("story_"): story
    for name, story in list(globals().items())
    if name.startswith("story_")
}


LOOKS = "looks"  # takes an identity away for a while, and does nothing that a power loss could undo


def there(name: str) -> tuple[str, str]:
    """The directories that are there before a story begins."""
    return "/disk" if name in ("birth", "twice_begun") else "/disk/runs", tempfile.gettempdir()


def disk_for(name: str) -> Disk:
    """A disk for a story, with what was there before it."""
    return Disk(*there(name))


def told(name: str) -> Disk:
    """The disk of a story that went well."""
    disk = disk_for(name)
    STORIES[name](disk, disk)
    return disk


class Tale:
    """A story that a seed makes up: saves, readers, kills at any call, and power losses.

    The steps since the last power loss are on `disk`; what came before is durable there, and what
    was told by then is told again.
    """

    def __init__(self, seed: int, deeds: int = 12) -> None:
        self.chance = random.Random(seed)
        self.disk = Disk("/disk")
        self.step = 0
        self.agent: Agent | None = None
        self.pins: list[Pin] = []
        for _ in range(deeds):
            if self.agent is None:
                self._killed(self._begin)
            else:
                deed = self.chance.choices(
                    [self._save, self._pin, self._unpin, self._hand_over, self._power],
                    [10, 2, 2, 3, 2],
                )[0]
                self._killed(deed)

    def _killed(self, deed: Callable[[Files], None]) -> None:
        """Do something; now and then be killed at one of its calls, or right behind it."""
        at = self.chance.randrange(1, 120)
        files = FaultyFiles(self.disk, at, "crash", after=self.chance.random() < 0.5)
        try:
            deed(files)
        except Crash:
            self.agent = None

    def _begin(self, files: Files) -> None:
        agent = Agent(files, self.disk.tell)
        agent.open(agent.member.generation + 1, keep=self.chance.choice((1, 1, 2)))
        self.agent = agent

    def _lent(self, files: Files) -> Agent:
        """The agent, with files that may be its last."""
        assert self.agent is not None
        held = self.agent.keeper
        if isinstance(files, FaultyFiles):
            files._paths = {held.directory.journal._fd: held.directory.journal.path}
        self.agent.files = held.files = held.directory.files = files
        held.directory.journal._files = files
        return self.agent

    def _save(self, files: Files) -> None:
        agent = self._lent(files)
        self.step += 1
        agent.save(Epoch(agent.member.generation, self.step))

    def _hand_over(self, files: Files) -> None:
        """Die with an append that was not synced."""
        agent = self._lent(files)
        self.step += 1
        epoch = Epoch(agent.member.generation, self.step)
        agent.take(events.Captured(epoch))
        _, effects = step(agent.member, events.Persisted(epoch, agent.write(epoch)))
        agent.append(list(effects.persist))
        self.agent = None

    def _pin(self, files: Files) -> None:
        agent = self._lent(self.disk)
        held = [copy.epoch for copy in agent.member.retained if copy.epoch != GENESIS]
        if held:
            made = pin(files, ROOT, NAME, self.chance.choice(held), "export")
            self.disk.tell(Pinned(made.path, made.epoch, held=True))
            self.pins.append(made)
            agent.pinned()

    def _unpin(self, files: Files) -> None:
        if self.pins:
            made = self.pins.pop(self.chance.randrange(len(self.pins)))
            self.disk.tell(Pinned(made.path, made.epoch, held=None))
            made._files = files
            made.release()
            self.disk.tell(Pinned(made.path, made.epoch, held=False))
            self._lent(self.disk).pinned()

    def _power(self, _: Files) -> None:
        """Lose the power at any moment since the last time, and go on from one of its states."""
        found = list(crashes(self.disk, limit=6, sampled=8, seed=self.chance.randrange(1 << 30)))
        crash = self.chance.choice(found)
        judge(crash.files(), crash.told)
        self.disk = crash.files()
        if any(isinstance(fact, Begun) for fact in crash.told):
            self.disk.told += (Begun(Shelf(crash.files(), ROOT, NAME).records()),)
        self.agent, self.pins = None, []


# The judge


def judge(
    files: Files,
    told: tuple[object, ...],
    *,
    goes_on: bool = False,
    root: str = ROOT,
    unreadable: Collection[Epoch] = (),
) -> None:
    """Open what a crash left with the real code; raises Lost where it breaks a promise.

    Epochs that were `unreadable` for a while may have been given up for it, but not in silence.
    """
    _judge_files(files, told, root)
    if any(isinstance(fact, Allocated | Exported | Enrolled | Recorded) for fact in told):
        return  # of no domain
    found = identify(files, root, NAME, run=RUN, shard=0)
    known = next((fact for fact in told if isinstance(fact, Identified)), None)
    if known is not None and found.id != known.id:
        raise Lost(f"the identity {known.id} is gone")
    keeper, member = Keeper.claim(files, root, NAME)
    meant: tuple[bytes, ...] = ()
    said = 0
    for fact in told:
        if isinstance(fact, Begun):
            meant, said = fact.history, len(fact.history)
        elif isinstance(fact, Meant):
            meant += fact.records
        elif isinstance(fact, Said):
            said = len(meant)
    history = keeper.directory.history
    if history != meant[: len(history)]:
        raise Lost("a record is there that nobody appended, or in another order")
    if len(history) < said:
        raise Lost(f"{said} records were committed, {len(history)} are left")
    if any(lost.epoch not in unreadable for lost in member.lost):
        raise Lost(f"attested and gone: {member.lost}")
    given_up = {lost.epoch for lost in member.lost}
    _judge_epochs(keeper, member, files, told, given_up)
    if goes_on:
        _go_on(files, member, root)
    keeper.directory.close()


def _judge_epochs(
    keeper: Keeper,
    member: Member,
    files: Files,
    told: tuple[object, ...],
    given_up: set[Epoch],
) -> None:
    records = map(decode_record, keeper.directory.history)
    gone = given_up | {epoch for r in records if isinstance(r, Released) for epoch in r.epochs}
    retained = {copy.epoch: copy.digest for copy in member.retained if copy.epoch != GENESIS}
    for fact in told:
        if isinstance(fact, Kept) and fact.epoch not in retained.keys() | gone:
            raise Lost(f"epoch {fact.epoch} was attested and is not retained")
    for epoch, entry in keeper.directory.manifests().items():
        entry.sound()
        into = bytearray(LAYOUT.nbytes)
        keeper.directory.read(epoch, into, digest=retained.get(epoch, ""))
        if into != content(epoch):
            raise Lost(f"epoch {epoch} reads well and is none that was written")
    _judge_images(keeper.directory.path, files)
    there = {made.path: made for made in pins(files, keeper.root, NAME)}
    for made in there.values():
        if made.holder is None:
            raise Lost(f"the pin {made.path} is nobody's: it would hold for ever")
    for path, held in {f.path: f for f in told if isinstance(f, Pinned)}.items():
        if held.held and path not in there:
            raise Lost(f"the pin {path} is gone")
        if held.held and not keeper.directory.entry(held.epoch):
            keeper.directory.may_clean = True  # a release that was cut off is taken up by the next
            keeper.directory.release([])
        if held.held and not keeper.directory.entry(held.epoch):
            raise Lost(f"epoch {held.epoch} was pinned, and is gone")
        if held.held is False and path in there:
            raise Lost(f"the pin {path} was given back, and holds again")


def _judge_images(path: str, files: Files) -> None:
    """What has the name of an image or a delta is whole, whether a manifest refers to it or not."""
    for number in incarnations(files, path):
        home = f"{path}/{number}/chunks"
        for name in files.listdir(home) if files.exists(home) else ():
            if name.endswith((".safetensors", ".delta")):
                stem = name.split(".")[0]
                data = read_file(files, f"{home}/{name}")
                generation, step_ = map(int, stem.split("-"))
                if not data or not content(Epoch(generation, step_)).endswith(data):
                    raise Lost(f"{home}/{name} has its name, and is not whole")


def _judge_files(files: Files, told: tuple[object, ...], root: str) -> None:
    """What is judged by its file alone: certificates, rounds, exports."""
    for fact in [f for f in told if isinstance(f, Allocated)][-1:]:
        found = rounds._read(files, fact.path)
        if found is None or found.generation < fact.generation:
            raise Lost(f"generation {fact.generation} was given out, and {fact.path} has {found}")
    for fact in told:
        if isinstance(fact, Exported):
            data = _bytes(files, fact.path)
            if data is None and not fact.done:
                continue
            data = data or b""
            text = data[8:].rstrip()
            if len(data) != 4096 or msgspec.json.decode(text)["__metadata__"]["epoch"] != (
                f"1/{fact.step}"
            ):
                raise Lost(f"{fact.path} is there or was exported, and is not what was written")
    _judge_lives(files, told)
    published = [f.epoch for f in told if isinstance(f, Published)]
    data = _bytes(files, f"{root}/certificates/{NAME}.json")
    if published and data is None:
        raise Lost(f"the certificate of {published[-1]} was shown, and is gone")
    if data is not None:
        shown = msgspec.json.decode(data, type=dict[str, Any])
        epoch = Epoch(shown["generation"], shown["step"])
        if published and epoch < published[-1]:
            raise Lost(f"the certificate of {published[-1]} was shown, and {epoch}'s is there")


def _judge_lives(files: Files, told: tuple[object, ...]) -> None:
    """What nodes and links were told of themselves and of each other."""
    for fact in told:
        if isinstance(fact, Enrolled):
            pem = _bytes(files, f"{fact.path}/node.key")
            found = "" if pem is None else identity.Key(load_pem_private_key(pem, None)).id
            if fact.key not in ("", found):
                raise Lost(f"the key {fact.key[:8]} was given, and is gone")
    for fact in [f for f in told if isinstance(f, Counted)][-1:]:
        if (number := life.counted(files, fact.path, "")) < fact.number:
            raise Lost(f"life {fact.number} was begun, and the counter is at {number}")
    for fact in [f for f in told if isinstance(f, Recorded)][-1:]:
        held = links.Records(fact.path, files)
        durable = [fact.records] if fact.done else [fact.records, fact.records[:-1]]
        if (held.spoken, held.known) not in [links.recall(each) for each in durable]:
            raise Lost(f"{len(fact.records)} records are durable, and others are there")
        held.close()


def _bytes(files: Files, path: str) -> bytes | None:
    return read_file(files, path) if files.exists(path) else None


def _go_on(files: Files, member: Member, root: str) -> None:
    """The next life: it resumes, saves twice, releases, and all of it is there."""
    agent = Agent(files, lambda _: None, root)
    generation = member.generation + 1
    agent.open(generation)
    newest = max((copy.epoch.step for copy in member.retained), default=0)
    for n in (newest + 1, newest + 2):
        agent.save(Epoch(generation, n))
    into = bytearray(LAYOUT.nbytes)
    agent.keeper.directory.read(Epoch(generation, newest + 2), into)
    if into != content(Epoch(generation, newest + 2)):
        raise Lost("the next life's epoch reads well, and is none that was written")
    agent.keeper.directory.close()


class Count(NamedTuple):
    """How many crashes there were, how many left different files, and the first that lost."""

    crashes: int
    different: int
    lost: str


def try_all(
    disk: Disk, *, limit: int = 12, sampled: int = 500, every: int = 100, since: int = 0
) -> Count:
    """Judge every crash of a disk's story; one of `every` different ones goes on with its life.

    Those of the first steps, up to `since`, are left out. Ends with the first that lost something.
    """
    seen: set[object] = set()
    count = 0
    for crash in crashes(disk, limit=limit, sampled=sampled):
        if crash.after < since:
            continue
        count += 1
        key = (crash.key, len(crash.told))
        if key not in seen:
            seen.add(key)
            try:
                judge(crash.files(), crash.told, goes_on=len(seen) % every == 0)
            except (
                Lost,
                HandfastError,
                OSError,
                ValueError,
            ) as error:  # it can't be opened, or it lies
                where = f"crash after step {crash.after}, {crash.kept} kept, {crash.lost} lost"
                return Count(count, len(seen), f"{where}: {error}")
    return Count(count, len(seen), "")
