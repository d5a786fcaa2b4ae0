"""Shows that an owner that was frozen and wakes up after its successor can harm nothing.

First by the book: a successor lives its whole life at every single call of the owner's. Then for
real: a process is stopped by SIGSTOP, its successor claims, writes and releases, and it is woken.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from handfast.core.lattice import Epoch
from handfast.errors import HandfastError, SaveFailed, Superseded
from handfast.store.claims import identify, read_identity
from handfast.store.directory import Directory, claim
from handfast.store.files import Files
from handfast.store.shelf import Shelf
from handfast.testing.faults import FaultyFiles, Hasty
from handfast.testing.stores import picture, save

FILES = Hasty()
SIZE = (1 << 20) * 5 // 4
LAYOUT = picture(0, nbytes=SIZE)[0]
NAME = "rank0"


@functools.cache
def image(step: int) -> bytearray:
    return picture(step, nbytes=SIZE, frozen=1 << 19)[1]


class Owner:
    """A small agent: it votes by records, and acts only as the rule allows.

    Records are "STAGED step" and "FLOOR step" (older epochs are released). `sent` are the records
    on which it acted; `retained` what it believes to hold, by the records that it knows.
    """

    run, shard = "run-1", 0

    def __init__(self, files: Files, root: str) -> None:
        self.root = root
        self.tier: Directory = claim(files, root, NAME)
        self.tier.may_clean = True
        self.domain = self.tier.identity.id
        self.records = list(self.tier.history)
        self.sent: list[bytes] = []

    def retained(self) -> list[int]:
        said = [record.decode().split() for record in self.records]
        floor = max((int(step) for word, step in said if word == "FLOOR"), default=0)
        return sorted({int(step) for word, step in said if word == "STAGED" if int(step) >= floor})

    def record(self, text: str) -> None:
        self.tier.journal.append(text.encode())
        self.tier.journal.sync()
        self.records.append(text.encode())
        if not self.tier.current():
            raise Superseded(text)
        self.sent.append(text.encode())

    def save(self, step: int) -> None:
        held = self.retained()
        step = max(step, held[-1] + 1) if held else step
        found = self.tier.entry(Epoch(1, held[-1])) if held else None
        parent = found.sound() if found else None
        save(self.tier, self, Epoch(1, step), image(step), LAYOUT, parent=parent)
        self.record(f"STAGED {step}")

    def release(self, floor: int) -> None:
        self.record(f"FLOOR {floor}")
        self.tier.release([epoch for epoch in self.tier.manifests() if epoch.step < floor])


def born(root: str) -> None:
    identify(FILES, root, NAME, run=Owner.run, shard=Owner.shard)
    owner = Owner(FILES, root)
    with closing(owner.tier):
        owner.save(1)
        owner.save(2)


def predecessor(files: Files, root: str) -> Owner:
    """Claims, saves a delta, releases what is older, and saves another."""
    owner = Owner(files, root)
    with contextlib.suppress(Superseded, SaveFailed):  # its temporary files may have been swept
        owner.save(3)
        owner.release(3)
        owner.save(4)
    return owner


def check(root: str, owner: Owner, heirs: list[Owner]) -> None:
    """The successor and all later ones know what the owner acted upon, and hold what they know."""
    (successor,) = heirs
    assert successor.tier.incarnation != owner.tier.incarnation
    inherited = list(successor.tier.history)
    if successor.tier.incarnation > owner.tier.incarnation:
        assert all(record in inherited for record in owner.sent)
    last = Owner(FILES, root)
    with closing(last.tier):
        assert last.records[: len(inherited)] == inherited
        assert all(record in last.records for record in [*owner.sent, *successor.sent])
        for step in last.retained():
            into = bytearray(LAYOUT.nbytes)
            last.tier.read(Epoch(1, step), into)
            assert into == image(step)


@pytest.mark.parametrize("floor", [0, 10])
def test_a_successor_may_come_at_any_call(tmp_path: Path, floor: int) -> None:
    """Shows that at each of an owner's calls a successor may claim, save and release: whatever
    the owner acted upon is in the successor's history, and what it did afterwards is void."""
    born(str(tmp_path / "template"))
    voids = 0
    for k in range(1, 400):
        root = str(tmp_path / str(k))
        shutil.copytree(tmp_path / "template", root, copy_function=os.link)
        heirs: list[Owner] = []

        def succeed(root: str = root, heirs: list[Owner] = heirs) -> None:
            heir = Owner(FILES, root)
            heirs.append(heir)
            heir.save(10)
            if floor:
                heir.release(floor)

        files = FaultyFiles(FILES, fail_at=k, error=succeed)
        owner = predecessor(files, root)
        if not files.fired:
            break
        voids += len(owner.records) > len(owner.sent) + 2
        check(root, owner, heirs)
        for each in (owner, *heirs):
            each.tier.close()
        shutil.rmtree(root)
    assert voids > 5


ACTOR = """
import os, signal, sys
sys.path.insert(0, {here!r})
from test_zombie import predecessor
from handfast.store.files import Posix
from handfast.testing.faults import FaultyFiles

root, kind, path, k = sys.argv[1:]
stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)
owner = predecessor(FaultyFiles(Posix(), int(k), stop, kinds=(kind,), path=path), root)
print([record.decode() for record in owner.sent])
"""


@pytest.mark.parametrize(
    ("kind", "path", "k"),
    [
        ("mkdir", "", 1),  # before it claims
        ("mkdir", "", 2),  # claimed, and not yet read
        ("create", "journal", 1),  # read, and not yet sealed
        ("pwrite", "chunks", 1),  # in the middle of the data
        ("rename", "manifests", 1),  # before the manifest is published
        ("pwrite", "journal", 3),  # before it votes
        ("fdatasync", "journal", 3),  # voted, and the vote not yet durable
        ("rename", ".released", 1),  # in the middle of a release
        ("unlink", "chunks", 1),
    ],
)
def test_a_frozen_process_that_wakes_up_harms_nothing(
    tmp_path: Path, kind: str, path: str, k: int
) -> None:
    """Shows it with a real process under SIGSTOP and SIGCONT, and that the process finds out."""
    root = str(tmp_path)
    born(root)
    script = ACTOR.format(here=os.path.dirname(__file__))
    zombie = subprocess.Popen(
        [sys.executable, "-c", script, root, kind, path, str(k)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert os.WIFSTOPPED(os.waitpid(zombie.pid, os.WUNTRACED)[1])
        heir = Owner(FILES, root)
        heir.save(10)
        heir.release(10)
        before = Shelf(FILES, root, NAME).records()
        os.kill(zombie.pid, signal.SIGCONT)
        out, _ = zombie.communicate(timeout=60)
    finally:
        zombie.kill()
    late = kind == "mkdir" and k == 1  # it woke up before its claim, and is the successor
    if not late:
        assert zombie.returncode == 0
        assert Shelf(FILES, root, NAME).records() == before
        assert heir.tier.current()
        heir.save(11)
    assert out
    heir.tier.close()
    last = Owner(FILES, root)
    with closing(last.tier):
        assert all(repr(record.decode()) in out or record in last.records for record in heir.sent)
        for step in last.retained():
            into = bytearray(LAYOUT.nbytes)
            last.tier.read(Epoch(1, step), into)
            assert into == image(step)


CLAIMANT = """
import sys
from handfast.store.directory import claim
from handfast.store.files import Posix
sys.stdin.read(1)
for _ in range(5):
    tier = claim(Posix(), sys.argv[1], "rank0")
    tier.journal.append(b"%d" % tier.incarnation)
    tier.journal.sync()
    print(tier.incarnation, tier.current())
"""


def test_processes_that_claim_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    """Shows that several processes on one domain never share an incarnation, nor lose a record
    on which one of them acted."""
    root = str(tmp_path)
    identify(FILES, root, NAME, run="run-1", shard=0)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMANT, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    outs = []
    for process in started:
        assert process.stdin is not None
        process.stdin.write("!")
        process.stdin.flush()
    for process in started:
        outs.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    lines = [line.split() for out in outs for line in out.splitlines()]
    assert sorted(int(number) for number, _ in lines) == list(range(1, 21))
    acted = {number.encode() for number, current in lines if current == "True"}
    assert b"20" in acted
    assert acted <= set(Shelf(FILES, root, NAME).records())


def test_two_runs_can_not_share_a_domain(tmp_path: Path) -> None:
    """Shows that a second job on the same directories is told whose they are."""
    born(str(tmp_path))
    with pytest.raises(HandfastError, match="is the home of shard 0 of run run-1"):
        identify(FILES, str(tmp_path), NAME, run="run-2", shard=0)
    assert read_identity(FILES, str(tmp_path), NAME).run == "run-1"
