"""Writes the golden run of format 1, once: every later handfast must go on from it.

    python tests/golden/write_run1.py

Two domains of two lives each, driven by hand through the real member and the real store, so that
their journals hold every kind of record: votes, a skip, freezes, judgements both ways, certificates
of both kinds, releases. Beside them what a run's directory has: identities, the record of rounds,
certificates for people, a pin. It refuses to overwrite: a file that changes is golden no more.
"""

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import msgspec

from handfast.agent.frames import make_image
from handfast.agent.keeper import Image, Keeper, Plan
from handfast.checkpoint.rounds import TIER, allocate_in, domain_name
from handfast.core import events
from handfast.core.lattice import Epoch
from handfast.core.member import step
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import decode_record
from handfast.core.retain import Keep
from handfast.store.claims import identify
from handfast.store.files import Posix
from handfast.store.image import TensorSpec
from handfast.store.image import plan as lay_out
from handfast.store.pins import pin
from handfast.store.shelf import Shelf

HERE = Path(__file__).parent
ROOT = HERE / "run1"
RUN = "90a1d0"
SIZE = 2
NBYTES = 600
FILES = Posix()


LAYOUT = lay_out([TensorSpec("model/weights", "uint8", (NBYTES,), (NBYTES,), (0,), (1,))])
PLAN = Plan(
    slots=LAYOUT.slots,
    header=LAYOUT.header,
    nbytes=LAYOUT.nbytes,
    padded=LAYOUT.padded,
    aliases={},
    replicated=(),
    structure="5eed",
    environment={"torch": "2.13.0"},
    lineage="main",
    verify="full",
)


def content(epoch: Epoch, shard: int) -> bytes:
    """What the image of an epoch holds, header and all."""
    seed = epoch.generation * 7 + epoch.step + shard
    return LAYOUT.header + bytes((seed * at + at * at) % 251 for at in range(NBYTES))


class Life:
    """Both domains, from a claim to the death of their agents."""

    def __init__(self, root: Path, roster: Roster) -> None:
        self.roster = roster
        names = map(domain_name, range(SIZE))
        claimed = [Keeper.claim(FILES, str(root), name) for name in names]
        self.keepers = [keeper for keeper, _ in claimed]
        self.members = [member for _, member in claimed]
        self.mail: list[events.Send] = []
        self.damaged: set[tuple[int, Epoch]] = set()
        for keeper in self.keepers:
            keeper.directory.may_clean = True

    def take(self, at: int, event: events.Event) -> None:
        """Let one thing happen to one domain, and all that follows from it."""
        self.members[at], effects = step(self.members[at], event)
        if effects.persist:
            self.keepers[at].commit(list(effects.persist))
        self.mail += effects.send
        for action in effects.apply:
            self.act(at, action)

    def act(self, at: int, action: events.Action) -> None:
        """Do what a member asks for."""
        match action:
            case events.Persist(epoch=epoch):
                self.take(at, events.Persisted(epoch, self.write(at, epoch)))
            case events.Check(generation=generation, epoch=epoch):
                reason = "damaged" if (at, epoch) in self.damaged else ""
                self.take(at, events.Checked(generation, epoch, reason))
            case events.Propose(generation=generation, epoch=epoch):
                self.take(at, events.Accept(generation, epoch, at))
            case events.Publish(certificate=certificate):
                self.keepers[at].publish(domain_name(at), certificate)
            case events.Release(epochs=epochs):
                self.keepers[at].release(epochs)

    def write(self, at: int, epoch: Epoch) -> str:
        """Persist an image; gives the digest of its manifest."""
        fd = make_image(PLAN.padded)
        image = Image(fd, PLAN)
        with open(fd, "r+b", closefd=False, buffering=0) as memory:
            memory.write(content(epoch, at))
        try:
            keeper, member = self.keepers[at], self.members[at]
            return keeper.write(member, self.roster, epoch, image, b"\x92\x01\xc0").digest
        finally:
            image.close()

    def deliver(self) -> None:
        """Deliver what was sent until nothing is."""
        while self.mail:
            send = self.mail.pop(0)
            self.take(send.to, events.Received(send.message))

    def start(self, root: Path, round_: str) -> None:
        """Begin a generation: it resumes by itself."""
        reported = max(member.generation for member in self.members)
        generation = allocate_in(FILES, str(root), round_, reported)
        begin = events.Begin(generation, round_, self.roster, founding=True, keep=Keep(2))
        for at in range(SIZE):
            self.take(at, events.Pinned(()))
            self.take(at, begin)
        self.deliver()
        if not all(member.open for member in self.members):
            raise SystemExit(f"generation {generation} did not resume")

    def save(self, epoch: Epoch, *, fails: bool = False) -> None:
        """Save an epoch in both domains; or not, in the second."""
        for at in range(SIZE):
            if fails and at:
                self.take(at, events.Forgone(epoch, "no space left on device"))
            else:
                self.take(at, events.Captured(epoch))
        self.deliver()

    def die(self) -> None:
        """End as an agent's death would."""
        for keeper in self.keepers:
            keeper.directory.close()


def write(root: Path) -> None:
    """Write the run."""
    ids = [identify(FILES, str(root), domain_name(n), run=RUN, shard=n).id for n in range(SIZE)]
    domains = tuple(Domain(name, TIER, n, f"node{n}") for n, name in enumerate(ids))
    roster = Roster(Configuration(RUN, SIZE, domains, ((TIER, 1),)))
    first = Life(root, roster)
    first.start(root, "a1" * 16)
    for step_ in (10, 20, 30):
        first.save(Epoch(1, step_))
    first.die()
    second = Life(root, roster)
    newest = max(copy.epoch for copy in second.members[0].retained)
    second.damaged.add((1, newest))
    second.start(root, "b2" * 16)
    second.save(Epoch(2, 40), fails=True)
    second.save(Epoch(2, 50))
    second.die()
    socket.gethostname = lambda: "node0"  # whoever writes it is nobody's business
    pin(FILES, str(root), domain_name(0), Epoch(2, 50), "golden")


def told(value: object) -> Any:
    """Spell a record out with the names of its fields, as JSON can hold it."""
    if isinstance(value, msgspec.Struct):
        fields = {name: told(getattr(value, name)) for name in value.__struct_fields__}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [told(item) for item in value]
    return value


def records(root: Path, name: str) -> list[Any]:
    """Spell out all records that count."""
    return [told(decode_record(data)) for data in Shelf(FILES, str(root), name).records()]


def main() -> None:
    """Write the run and, beside it, what it must be."""
    if ROOT.exists():
        raise SystemExit(f"{ROOT} is golden already, and never changes")
    write(ROOT)
    files = sorted(path for path in ROOT.rglob("*") if path.is_file())
    index = {
        "files": {
            str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
        "records": {name: records(ROOT, name) for name in map(domain_name, range(SIZE))},
    }
    (HERE / "run1.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
