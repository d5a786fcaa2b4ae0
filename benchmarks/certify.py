"""How long four agents need to know that an epoch converged, once the last of them has it durable.

Four ranks, each with an agent of its own, over loopback. ``known`` is from the moment the last rank
hears that its shard is persisted (bytes, manifest and vote synced) until the last rank hears that
the epoch converged; ``whole`` is from the first call of save, of a state so small that only syncs
are left in it. The limit: the same shape of tree in bare sockets, from the moment the last leaf
sends a word to its root until the last leaf has heard the root's answer. No peer certifies
anything: DCP's barrier says that a call returned.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import torch.distributed as dist

from benchmarks.common.figures import Figure, Setting, beside
from benchmarks.common.peers import HANDFAST, Handfast
from benchmarks.common.ranks import Rank, on_ranks
from benchmarks.common.state import change, make_state

VARIES = ()
RANKS = 4
MIB = 1
SMALL = 16
WORD = bytes(256)
"""As long as a vote or a certificate."""

Times = dict[str, list[float]]
"""CLOCK_MONOTONIC, which all processes share, at each lap's events."""


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it."""
    deed = partial(_measure, setting)
    ranks = on_ranks(RANKS, setting.home, deed, nodes=RANKS)
    at = {"mib": MIB, "small": SMALL, "ranks": RANKS}

    def span(who: str, what: str, since: str, until: str) -> Figure:
        last = [max(times) for times in zip(*(each[since] for each in ranks), strict=True)]
        ends = [max(times) for times in zip(*(each[until] for each in ranks), strict=True)]
        took = tuple((end - begin) * 1e3 for begin, end in zip(last, ends, strict=True))
        return Figure(question="certify", who=who, what=what, unit="ms", values=took, at=at)

    figures = [
        span("bare sockets", "known", "sent", "answered"),
        span(HANDFAST, "known", "persisted", "converged"),
    ]
    yield from beside(figures, "bare sockets", {})
    yield span(HANDFAST, "whole", "called", "converged")


def _measure(setting: Setting, rank: Rank) -> Times:
    times: Times = {name: [] for name in ("called", "persisted", "converged", "sent", "answered")}

    def now(name: str) -> None:
        times[name].append(time.monotonic())

    state = make_state(MIB, SMALL, rank.rank)
    own = setting.home / HANDFAST
    with closing(Handfast(own, state, rank)) as saver, closing(Tree(rank)) as tree:
        for _ in range(5 * setting.repeat + 1):
            change(state.values())
            dist.barrier()
            now("called")
            saver.save()
            saver.finish()
            now("persisted")
            saver.settle()
            now("converged")
            dist.barrier()
            now("sent")
            tree.ask()
            now("answered")
    return {name: values[1:] for name, values in times.items()}


class Tree:
    """A root and its leaves, each with a socket to the other."""

    def __init__(self, rank: Rank) -> None:
        self._root = rank.rank == 0
        with socket.create_server(("127.0.0.1", 0)) as own:
            ports: list[object] = [own.getsockname()[1]]
            dist.broadcast_object_list(ports)
            if self._root:
                self._sockets = [own.accept()[0] for _ in range(rank.size - 1)]
            else:
                self._sockets = [socket.create_connection(("127.0.0.1", int(str(ports[0]))))]
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self) -> None:
        """Send a word up and wait for the one that comes down."""
        if not self._root:
            self._sockets[0].sendall(WORD)
        for each in self._sockets:
            each.recv(len(WORD), socket.MSG_WAITALL)
        if self._root:
            for each in self._sockets:
                each.sendall(WORD)

    def close(self) -> None:
        """Close the sockets."""
        for each in self._sockets:
            each.close()
