"""Images, rounds and domains for tests of the agent: small, real, and with no framework."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from handfast.agent.frames import make_image
from handfast.agent.keeper import Image, Keeper, Plan
from handfast.core import events
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.member import step
from handfast.core.membership import Configuration, Domain, Roster
from handfast.core.retain import Keep
from handfast.store.claims import identify
from handfast.store.files import Files
from handfast.store.image import Layout
from handfast.testing.faults import Hasty
from handfast.testing.stores import picture

RUN = "run-1"
NBYTES = 5000
HASTY = Hasty()


def plan(nbytes: int = NBYTES, verify: str = "sampled") -> Plan:
    """A plan as a trainer sends it; all images of one size have the same."""
    layout = picture(0, nbytes=nbytes)[0]
    return Plan(
        slots=layout.slots,
        header=layout.header,
        nbytes=layout.nbytes,
        padded=layout.padded,
        aliases={},
        replicated=(),
        structure="s",
        environment={},
        lineage="main",
        verify=verify,
    )


def content(seed: int, nbytes: int = NBYTES) -> bytes:
    """What an image of this seed holds."""
    layout, image = picture(seed, nbytes=nbytes)
    return bytes(image)[: layout.nbytes]


def memory(seed: int, nbytes: int = NBYTES) -> int:
    """A memfd with an image in it."""
    data = content(seed, nbytes)
    fd = make_image(len(data))
    os.pwrite(fd, data, 0)
    return fd


def image(seed: int, nbytes: int = NBYTES) -> Image:
    """An image as the agent holds it."""
    return Image(memory(seed, nbytes), plan(nbytes))


def layout_of(nbytes: int = NBYTES) -> Layout:
    """The layout of every image of this size."""
    return picture(0, nbytes=nbytes)[0]


def read_fd(fd: int, nbytes: int) -> bytes:
    """The first bytes of a memfd, which is closed."""
    try:
        return os.pread(fd, nbytes, 0)
    finally:
        os.close(fd)


def born(root: str, size: int = 1, files: Files = HASTY) -> Roster:
    """Identify the domains ``rank0`` ... of a run; gives their roster."""
    found = [identify(files, root, f"rank{n}", run=RUN, shard=n).id for n in range(size)]
    return roster(found)


def roster(ids: Sequence[str], run: str = RUN) -> Roster:
    """One directory domain a shard."""
    domains = tuple(Domain(name, "directory", n, f"host{n}") for n, name in enumerate(ids))
    return Roster(Configuration(run, len(ids), domains, (("directory", 1),)))


def begin(
    among: Roster, generation: int, round_: str | None = None, **options: Any
) -> events.Begin:
    """The start of a generation, in a round named after it; it keeps one epoch."""
    options = {"keep": Keep(newest=1), "founding": True, **options}
    return events.Begin(generation, round_ or f"round-{generation}", among, **options)


class Alone:
    """The only domain of a run: its keeper and its member, driven by hand."""

    def __init__(self, root: str, files: Files = HASTY) -> None:
        self.among = born(root, files=HASTY)
        self.keeper, self.member = Keeper.claim(files, root, "rank0")
        self.actions: list[events.Action] = []

    def take(self, *happened: events.Event) -> None:
        """Let events happen: all records are committed."""
        for event in happened:
            self.member, effects = step(self.member, event)
            if effects.persist:
                self.keeper.commit(list(effects.persist))
            self.actions += effects.apply

    def open(self, generation: int = 1, base: Epoch = GENESIS, **options: Any) -> None:
        """Freeze, judge, accept: afterwards the generation may vote."""
        self.take(begin(self.among, generation, **options))
        if base != GENESIS:
            self.take(events.Checked(generation, base))
        self.take(events.Accept(generation, base, 0))
        assert self.member.open, self.actions
        self.take(events.Pinned(()))

    def save(self, epoch: Epoch, seed: int | None = None, nbytes: int = NBYTES) -> str:
        """Persist an epoch and vote for it; gives the digest."""
        self.take(events.Captured(epoch))
        digest = self.write(epoch, seed, nbytes)
        self.take(events.Persisted(epoch, digest))
        return digest

    def write(self, epoch: Epoch, seed: int | None = None, nbytes: int = NBYTES) -> str:
        """Persist an epoch, and don't vote."""
        held = image(epoch.step if seed is None else seed, nbytes)
        try:
            member, among = self.member, self.among
            return self.keeper.write(member, among, epoch, held, b"objects").digest
        finally:
            held.close()

    def close(self) -> None:
        """End as an agent's death would: nothing is written."""
        self.keeper.directory.close()


def looped(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in a loop of its own, and show that it leaves no task behind."""

    async def main(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(120):
            await function(*args, **kwargs)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    def runner(*args: Any, **kwargs: Any) -> None:
        asyncio.run(main(*args, **kwargs))

    return functools.wraps(function)(runner)


def open_fds() -> int:
    """How many descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


def settled_fds() -> int:
    """The same, once what earlier tests left to the collector of garbage is closed."""
    gc.collect()
    return open_fds()


async def until(holds: Callable[[], object], what: str = "it") -> None:
    """Wait in the loop for something to come true."""
    try:
        async with asyncio.timeout(30):
            while not holds():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"{what} never came true") from None


def wait_for(holds: Callable[[], object], what: str = "it", seconds: float = 30.0) -> None:
    """Wait in a thread for something to come true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(0.003)
