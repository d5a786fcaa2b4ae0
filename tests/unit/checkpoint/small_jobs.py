"""A whole job in one process: real members over real directories, messages delivered at once.

No agent, no trainer and no framework is needed to make a run of any shape: killed at any point,
rolled back, with ranks that never finish.
"""

from __future__ import annotations

import array
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from handfast.agent.keeper import Keeper
from handfast.core import events
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import step
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.messages import Message
from handfast.core.retain import Keep
from handfast.errors import HandfastError
from handfast.store import objects
from handfast.store.claims import identify
from handfast.store.files import Files
from handfast.store.image import Layout, TensorSpec, plan
from handfast.store.manifest import Stamp
from handfast.testing.faults import FaultyFiles, Hasty

ROWS = 3  # of the sharded tensor, a rank
FILES = Hasty()


def values(step_: int, rank: int, count: int) -> bytes:
    """The float32 values of some tensor of a rank at a step."""
    return array.array("f", [step_ * 1000 + rank * 100 + n for n in range(count)]).tobytes()


def spec(path: str, shape: Sequence[int], whole: Sequence[int], at: Sequence[int]) -> TensorSpec:
    """A float32 tensor."""
    return TensorSpec(path, "float32", tuple(shape), tuple(whole), tuple(at), (1,) * len(shape))


def picture(
    step_: int, rank: int, ranks: int, big: int, extra: Sequence[TensorSpec] = (),
    own: Mapping[TensorSpec, bytes] = MappingProxyType({}),
) -> tuple[Layout, bytearray]:  # fmt: skip
    """A rank's image: shares of model/w and model/big, model/b of rank 0, an own optimizer/step.

    ``extra`` is more of that kind, ``own`` has its values with it.
    """
    specs = [
        spec("model/w", (ROWS, 4), (ROWS * ranks, 4), (ROWS * rank, 0)),
        spec("optimizer/step", (), (), ()),
        spec("model/big", (big,), (big * ranks,), (big * rank,)),
        *extra,
        *own,
    ]
    if rank == 0:
        specs.append(spec("model/b", (5,), (5,), (0,)))
    layout = plan(specs)
    image = bytearray(layout.padded)
    image[: len(layout.header)] = layout.header
    for slot in layout.slots:
        data = own.get(slot.spec) or values(step_, rank, slot.nbytes // 4)
        image[slot.start : slot.start + slot.nbytes] = data
    return layout, image


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Damage one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def meanwhile(
    part: str,
    deed: Callable[[], object],
    inner: Files = FILES,
    *,
    calls: tuple[str, ...] = ("open", "listdir"),
    at: int = 1,
) -> FaultyFiles:
    """A system on which something happens just before a path is first opened or listed.

    A survey opens each data file once, to see how long it is; ``at=2`` is whoever reads it then.
    """
    return FaultyFiles(inner, at, lambda: (deed(), None)[1], kinds=calls, path=part)


class Rank:
    """One claimed domain and its member."""

    def __init__(self, job: Job, number: int) -> None:
        self.job = job
        self.number = number
        root, name = job.roots[number], f"rank-{number:05d}"
        self.keeper, self.member = Keeper.claim(FILES, root, name)

    def take(self, event: events.Event) -> None:
        """Step, then persist, then send, then apply."""
        self.member, effects = step(self.member, event)
        if effects.persist:
            self.keeper.commit(list(effects.persist))
        for send in effects.send:
            self.job.mail.append((self.number, send.to, send.message))
        for action in effects.apply:
            self.apply(action)

    def apply(self, action: events.Action) -> None:
        match action:
            case events.Persist(epoch):
                self.take(events.Persisted(epoch, self.write(epoch)))
            case events.Check(generation, epoch):
                try:
                    self.keeper.directory.read(epoch)
                except HandfastError as error:
                    self.take(events.Checked(generation, epoch, str(error)))
                else:
                    self.take(events.Checked(generation, epoch))
            case events.Propose(generation, epoch):
                self.take(events.Accept(generation, epoch, self.number))
            case events.Resume(certificate):
                self.keeper.resume(self.member, certificate.base)
                self.take(events.Pinned(self.keeper.pinned()))
            case events.Release(epochs):
                self.keeper.release(epochs)
                self.take(events.Pinned(self.keeper.pinned()))
            case _:
                pass

    def write(self, epoch: Epoch) -> str:
        """Persist this rank's image of an epoch; gives its digest."""
        directory, configuration = self.keeper.directory, self.job.configuration
        job = self.job
        own = job.own.get(self.number, {})
        layout, image = picture(epoch.step, self.number, len(job.roots), job.big, job.extra, own)
        parent = self.keeper.parent if self.job.deltas else None
        written = directory.write(
            Stamp(
                configuration.run, "main", epoch.generation, epoch.step, self.member.id,
                self.number, configuration.shards, directory.incarnation,
                configuration.digest(), parent.stamp.epoch if parent else None,
            ),
            layout,
            image,
            objects=objects.encode({"": {"model": "module"}, "scheduler": {"lr": 0.5, 3: (1, 2)}}),
            aliases={"model/tied": "model/w"},
            environment={"torch": "2.x"},
            replicated=("model/b",) if self.number == 0 else (),
            structure="5eed",
            parent=parent,
        )  # fmt: skip
        self.keeper.parent = written.manifest
        return written.digest


class Job:
    """A job of so many ranks. ``split``: each has a directory of its own. ``big`` counts floats.

    ``own`` are tensors of one rank alone, with their bytes.
    """

    def __init__(
        self, path: Path, ranks: int = 3, *, split: bool = False, deltas: bool = False,
        keep: Keep | None = None, big: int = 8, extra: Sequence[TensorSpec] = (),
    ) -> None:  # fmt: skip
        self.roots = [str(path / f"disk{n}" if split else path) for n in range(ranks)]
        self.deltas = deltas
        self.big = big
        self.extra = tuple(extra)
        self.own: dict[int, dict[TensorSpec, bytes]] = {}
        self.keep = keep or Keep(newest=3)
        self.mail: deque[tuple[int, int, Message]] = deque()
        self.cut: set[int] = set()
        self.generation = 0
        run = secrets.token_hex(8)
        ids = [
            identify(FILES, root, f"rank-{n:05d}", run=run, shard=n).id
            for n, root in enumerate(self.roots)
        ]
        domains = tuple(Domain(d, "directory", n, f"node{n}") for n, d in enumerate(ids))
        self.configuration = Configuration(run, ranks, domains, (("directory", 1),))
        self.ranks: list[Rank] = []

    def start(self, want: int | None = None, only: Iterable[int] | None = None) -> Epoch | None:
        """Launch again: a new generation; gives the epoch resumed from, None if cut short.

        ``only`` these ranks take part, so that the others stay in the generation before.
        """
        self.stop()
        self.generation += 1
        self.ranks = [Rank(self, n) for n in range(len(self.roots))]
        self.cut = set() if only is None else set(range(len(self.roots))) - set(only)
        begin = events.Begin(
            self.generation, secrets.token_hex(4), Roster(self.configuration),
            True, (), want, self.keep, 2,
        )  # fmt: skip
        for rank in self.ranks:
            if rank.number not in self.cut:
                rank.take(begin)
        self.deliver()
        restored = self.ranks[min(set(range(len(self.roots))) - self.cut)].member.restored
        open_ = restored is not None and restored.generation == self.generation
        return restored.base if restored is not None and open_ else None

    def save(self, *steps: int, only: Iterable[int] | None = None) -> Epoch:
        """Save steps on all ranks, or only on some; messages go between ranks that are not cut."""
        for number in steps:
            for rank in self.ranks:
                if only is None or rank.number in only:
                    rank.take(events.Captured(Epoch(self.generation, number)))
            self.deliver()
        return Epoch(self.generation, steps[-1])

    def deliver(self) -> None:
        """Deliver all mail but that of ranks that are cut off."""
        while self.mail:
            sender, to, message = self.mail.popleft()
            if not {sender, to} & self.cut:
                self.ranks[to].take(events.Received(message))

    def stop(self) -> None:
        """Kill everything."""
        for rank in self.ranks:
            rank.keeper.directory.close()
        self.ranks, self.mail = [], deque()

    def path(self, rank: int) -> Path:
        """A rank's domain."""
        return Path(self.roots[rank], "domains", f"rank-{rank:05d}")

    def find(self, rank: int, pattern: str) -> Path:
        """The one file of a rank's domain that matches."""
        (found,) = self.path(rank).glob(pattern)
        return found


def trained(path: Path, ranks: int = 3, **options: Any) -> Job:
    """A job that has saved steps 1 to 4 and ended; it keeps three."""
    job = Job(path, ranks, **options)
    if job.start() != GENESIS:
        raise RuntimeError("a first start begins at genesis")
    job.save(1, 2, 3, 4)
    job.stop()
    return job
