"""Agents in threads of this process, and ranks that use them as a Checkpointer does."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from agentkit import HASTY, NBYTES, content, plan

from handfast.agent.host import Agent
from handfast.agent.local import Client
from handfast.checkpoint.collective import Collective, Place
from handfast.checkpoint.session import Session
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.retain import Keep
from handfast.store.files import Files

T = TypeVar("T")
PATIENCE_S = 30.0


class Node:
    """A node's agent, in a thread of its own; ``path`` is its socket."""

    def __init__(
        self,
        home: str,
        label: str = "node0",
        files: Files = HASTY,
        linger_s: float = 60.0,
        handover_s: float = 5.0,
    ) -> None:
        self.label = label
        self.path = os.path.join(home, label)
        self.agent: Agent
        self._loop: asyncio.AbstractEventLoop
        self._ready = threading.Event()
        options = {"label": label, "linger_s": linger_s, "handover_s": handover_s}
        self._thread = threading.Thread(target=self._run, args=(files, options), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self, files: Files, options: dict[str, Any]) -> None:
        async def main() -> None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(self.path)
                listener.listen()
                self._loop = asyncio.get_running_loop()
                self.agent = Agent(listener, files, **options)
                self._ready.set()
                await self.agent.serve()

        asyncio.run(main())

    def client(self) -> Client:
        """A trainer's connection."""
        return Client(self.path)

    def do(self, work: Callable[[], T]) -> T:
        """Do something in the agent's loop."""

        async def call() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(30)

    def stop(self) -> None:
        """What SIGTERM does."""
        self._loop.call_soon_threadsafe(self.agent.stop)

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, within some seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End it, and see it end."""
        if not self.ended():
            self.stop()
        assert self.ended(30), "the agent does not end"


class Gathering:
    """All ranks of one start, each in a thread."""

    def __init__(self, size: int, nodes: Sequence[str] = ("node0",)) -> None:
        self.size = size
        self.nodes = nodes
        self._barrier = threading.Barrier(size)
        self._laid: list[bytes] = [b""] * size

    def place(self, rank: int) -> Collective:
        """The collective of a rank."""
        return _Placed(self, rank)

    def gather(self, rank: int, data: bytes) -> list[bytes]:
        """Wait for all, and give what all laid on the table."""
        self._laid[rank] = data
        self._barrier.wait(PATIENCE_S)
        found = list(self._laid)
        self._barrier.wait(PATIENCE_S)
        return found


class _Placed:
    def __init__(self, among: Gathering, rank: int) -> None:
        node = among.nodes[rank * len(among.nodes) // among.size]
        self.place = Place(rank, among.size, rank, node)
        self._among = among

    def gather(self, what: str, data: bytes) -> list[bytes]:
        return self._among.gather(self.place.rank, data)


def seed(epoch: Epoch, rank: int) -> int:
    """What a rank's image of an epoch is made from: no two have the same bytes."""
    return (epoch.generation * 10_000 + epoch.step) * 10 + rank


class Rank:
    """One rank of a job: it saves images whose bytes follow from epoch and rank."""

    def __init__(
        self,
        collective: Collective,
        root: str,
        connect: Callable[[], Client],
        nbytes: int = NBYTES,
    ) -> None:
        self.rank = collective.place.rank
        self.nbytes = nbytes
        self.session = Session(collective, root, HASTY, connect=connect)
        self.plan = plan(nbytes)
        self.left = b""

    def restore(self, newest: int = 1, drain_s: float = 10.0, want: int | None = None) -> Epoch:
        """Meet, check, load, and be allowed to go on; gives the base."""
        session = self.session
        session.start(want=want, keep=Keep(newest=newest), window=2, drain_s=drain_s)
        proposal = session.await_proposal(PATIENCE_S)
        if proposal.epoch != GENESIS:
            loaded = session.load(proposal, self.rank)
            wanted = content(seed(proposal.epoch, self.rank), self.nbytes)
            held = loaded.read(range(len(wanted)))
            assert held == wanted, f"{proposal.epoch} is not what it was"
        session.accept(proposal)
        return session.await_certificate(PATIENCE_S).base

    def save(self, step: int) -> Epoch:
        """Hand an image over; gives its epoch."""
        epoch = Epoch(self.session.generation, step)
        image = self.session.staging.image_for(self.plan, 1, PATIENCE_S)
        assert image is not None, "no image is free"
        data = content(seed(epoch, self.rank), self.nbytes)
        image.map[: len(data)] = data
        why, by = self.session.staging.stage(epoch, image, b"objects", PATIENCE_S, self.left)
        assert not why, (why, by)
        return epoch

    def converged(self, epoch: Epoch) -> Epoch:
        """Wait until an epoch, or a later one, has converged."""
        return self.session.wait_converged(epoch, PATIENCE_S).epoch

    def close(self) -> None:
        """Leave."""
        self.session.close()

    @property
    def client(self) -> Client:
        """The connection to the agent; closing it is what a trainer's death looks like there."""
        client = self.session._line._client
        assert client is not None, "it is not connected"
        return client


class Job(list[Rank]):
    """All ranks of one start, each of which acts in a thread of its own."""

    def __init__(
        self, root: str, connects: Sequence[Callable[[], Client]], nodes: Sequence[str] = ("node0",)
    ) -> None:
        among = Gathering(len(connects), nodes)
        super().__init__(Rank(among.place(n), root, connect) for n, connect in enumerate(connects))

    def all(self, deed: Callable[[Rank], T]) -> list[T]:
        """Let every rank do something at once."""
        with ThreadPoolExecutor(len(self)) as pool:
            return list(pool.map(deed, self))

    def restore(self, **options: Any) -> Epoch:
        """Restore; gives the base, which is the same for all."""
        (base,) = set(self.all(lambda rank: rank.restore(**options)))
        return base

    def save(self, step: int) -> Epoch:
        """Save on all ranks, and wait until that has converged."""
        (epoch,) = set(self.all(lambda rank: rank.save(step)))
        self.all(lambda rank: rank.converged(epoch))
        return epoch

    def close(self) -> None:
        """Leave."""
        for rank in self:
            rank.close()
