"""A few nodes as real processes on this machine: started, moved to other versions, probed, ended.

What goes wrong with them is found, and never raised.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from itertools import permutations
from pathlib import Path
from typing import Final

import msgspec

from handfast.fleet.rehearse.child import MOST, Child, tail, undisturbed
from handfast.fleet.rehearse.reading import PORTS, Each, Rehearsal, fill
from handfast.store.files import describe

__all__ = ["REFUSED", "Fleet", "Found", "Outcome", "worst"]

REFUSED: Final = 96
"""The exit code of a program that refuses in words: the gate's, ``handfast.gate.EXIT``."""

PAUSE_S: Final = 0.02  # between two questions whether a node is ready
LOWEST: Final = 10_000  # of the ports that a node may get
RANGE: Final = "/proc/sys/net/ipv4/ip_local_port_range"


class Outcome(StrEnum):
    """What came of a move, from good to bad."""

    WORKS = "works"
    REFUSES = "refuses"  # and says so: with an exit code of its own, and a sentence
    FAILS = "fails"
    HANGS = "hangs"
    DIES = "dies"  # a node's process ended by itself


class Found(msgspec.Struct, frozen=True):
    """An outcome in a sentence, with the last lines of what was said."""

    outcome: Outcome
    sentence: str = ""
    said: tuple[str, ...] = ()


def worst(found: Iterable[Found]) -> Found:
    """The first of the worst; it works where nothing was found."""
    return max(found, key=lambda each: tuple(Outcome).index(each.outcome), default=WORKS)


WORKS: Final = Found(Outcome.WORKS)


class Fleet:
    """A fleet that is made anew below the empty directory ``root``; its end ends all processes.

    What they say is in ``root``/said, in files that are numbered in the order of the starts.
    """

    def __init__(self, rehearsal: Rehearsal, root: str, versions: Iterable[str]) -> None:
        self._is = rehearsal
        self.root = root
        """Where it lies."""
        self._children: list[Child] = []  # all that run: nodes, and what is asked just now
        self._nodes: dict[str, Child] = {}
        self._versions = dict(zip(rehearsal.nodes, versions, strict=True))
        self._started = 0
        free = _free_ports(PORTS * len(rehearsal.nodes))
        self._ports = {node: [next(free) for _ in range(PORTS)] for node in rehearsal.nodes}
        for name in ("work", "said", *(f"nodes/{node}" for node in rehearsal.nodes)):
            os.makedirs(f"{root}/{name}")

    @property
    def versions(self) -> tuple[str, ...]:
        """What each node runs, in the order of the nodes."""
        return tuple(self._versions.values())

    def start(self) -> Found:
        """Set the fleet up, start all nodes, and wait until each serves."""
        if self._is.setup:
            found = self._once(self._is.setup, "setup")
            if found.outcome is not Outcome.WORKS:
                return found
        if not self._is.run:
            return WORKS
        for node in self._is.nodes:
            if lost := self._launch(node):
                return lost
        until = time.monotonic() + self._is.ready_s
        served = (self._serves(node, until) for node in self._is.nodes)
        return next((each for each in served if each.outcome is not Outcome.WORKS), WORKS)

    def move(self, node: str, version: str) -> Found:
        """Stop a node, start it with a version, and wait until it serves."""
        self._stop([self._nodes.pop(node)])
        self._versions[node] = version
        return self._launch(node) or self._serves(node, time.monotonic() + self._is.ready_s)

    def probe(self) -> dict[tuple[str, ...], Found]:
        """Ask whether it works: by the nodes that were asked about, of a fleet by ()."""
        size = tuple(Each).index(self._is.probe.each)
        return {ends: self._probe(ends) for ends in permutations(self._is.nodes, size)}

    def _probe(self, ends: tuple[str, ...]) -> Found:
        own = self._own(ends[0]) if len(ends) == 1 else {}
        if len(ends) == 2:
            for end, node in zip(("client", "server"), ends, strict=True):
                own |= {f"{end}.{name}": text for name, text in self._own(node).items()}
        what = " ".join(("the probe", " -> ".join(map(self._tell, ends)))).rstrip()
        out = self._file("-".join(("probe", *ends)))
        return self._ask(self._is.probe.run, own, self._is.probe_s, what, out)

    def lost(self) -> Found:
        """Whether a node's process ended by itself since it was started."""
        ended = [node for node, child in self._nodes.items() if child.wait(0)]
        return worst([self._fate(node) for node in ended])

    def close(self) -> Found:
        """End all processes, and take back what was set up; gives what came of that.

        Who interrupts it waits, ``stop-s`` and ``setup-s`` at the most: what is not taken back here
        nobody takes back.
        """
        with undisturbed():
            self._stop(tuple(self._children))  # also one whose start was interrupted
            return self._once(self._is.teardown, "teardown") if self._is.teardown else WORKS

    def _once(self, argv: Iterable[str], what: str) -> Found:
        """Run what is run once for the whole fleet."""
        return self._ask(argv, {}, self._is.setup_s, what, self._file(what))

    def _launch(self, node: str) -> Found | None:
        """Start a node's process; gives why it could not be."""
        argv = self._filled(self._is.run, self._own(node))
        try:
            out = self._file(f"{node}-{self._versions[node]}")
            self._nodes[node] = self._child(argv, out, out)
        except (OSError, ValueError) as error:
            return _unstarted(Outcome.DIES, self._tell(node), argv, error)
        return None

    def _serves(self, node: str, until: float) -> Found:
        """Ask again and again whether a node is ready, until it is, ended, or it is too late."""
        child = self._nodes[node]
        out = self._file(f"ready-{node}")  # for all the answers until it is
        while True:
            left = max(PAUSE_S, until - time.monotonic())
            ready = self._ask(self._is.ready, self._own(node), left, "ready", out)
            if child.wait(0):
                return self._fate(node)
            if ready.outcome is Outcome.WORKS:
                return WORKS
            if time.monotonic() >= until:
                said = tail(child.out)
                what = f"{self._tell(node)} was not ready within {self._is.ready_s:g} s"
                return _told(Outcome.HANGS, what, said or ready.said)
            child.wait(PAUSE_S)

    def _fate(self, node: str) -> Found:
        """Tell how a node's process ended by itself, and end what it has left behind."""
        child = self._nodes.pop(node)
        code = child.end()
        outcome = Outcome.REFUSES if code == REFUSED else Outcome.DIES
        return _told(outcome, f"{self._tell(node)} {_ended(code)}", tail(child.out))

    def _ask(
        self, argv: Iterable[str], own: Mapping[str, str], limit_s: float, what: str, out: str
    ) -> Found:
        """Run a program to its end, or to the limit."""
        filled = self._filled(argv, own)
        try:
            child = self._child(filled, out, f"{out}.err")
        except (OSError, ValueError) as error:
            return _unstarted(Outcome.FAILS, what, filled, error)
        try:
            ended = child.wait(limit_s)
        finally:
            code = child.end()
        said = tail(child.err) or tail(child.out)
        if not ended:
            flood = f" and said more than {MOST >> 20} MiB" if child.flooded else ""
            return _told(Outcome.HANGS, f"{what} gave no answer within {limit_s:g} s{flood}", said)
        if code == 0:
            return WORKS
        outcome = Outcome.REFUSES if code == REFUSED else Outcome.FAILS
        return _told(outcome, f"{what} {_ended(code)}", said)

    def _file(self, name: str) -> str:
        """Name a file for what is said next."""
        self._started += 1
        return f"{self.root}/said/{self._started:03}-{name}"

    def _child(self, argv: list[str], out: str, err: str) -> Child:
        """Start a process; what it says goes to one file, or to two."""
        told = {
            "nodes": self._is.nodes,
            "versions": self._versions,
            "ports": self._ports,
            "dirs": {node: self._dir(node) for node in self._is.nodes},
            "variables": {node: self._is.versions[v] for node, v in self._versions.items()},
            "work": f"{self.root}/work",
        }
        env = {**os.environ, "HANDFAST_REHEARSAL": msgspec.json.encode(told).decode()}
        return Child(argv, self._children, env=env, cwd=f"{self.root}/work", out=out, err=err)

    def _filled(self, argv: Iterable[str], own: Mapping[str, str]) -> list[str]:
        values = {"work": f"{self.root}/work", **own}
        for node in self._is.nodes:
            values |= {f"{node}.{name}": text for name, text in self._own(node).items()}
        return [fill(each, values) for each in argv]

    def _own(self, node: str) -> dict[str, str]:
        """What fills a node's own holes."""
        version, ports = self._versions[node], self._ports[node]
        return {
            "node": node,
            "index": str(self._is.nodes.index(node)),
            "version": version,
            "dir": self._dir(node),
            "port": str(ports[0]),
            **{f"port.{at}": str(port) for at, port in enumerate(ports)},
            **self._is.versions[version],
        }

    def _dir(self, node: str) -> str:
        return f"{self.root}/nodes/{node}"

    def _tell(self, node: str) -> str:
        return f"{node} ({self._versions[node]})"

    def _stop(self, children: Collection[Child]) -> None:
        """SIGTERM, and SIGKILL for what still runs after the limit."""
        for child in children:
            child.ask_to_stop()
        until = time.monotonic() + self._is.stop_s
        for child in children:
            child.wait(until - time.monotonic())
            child.end()


def _told(outcome: Outcome, what: str, said: tuple[str, ...]) -> Found:
    """Put a finding into a sentence: of a refusal it is what was said."""
    if outcome is Outcome.REFUSES and said:
        return Found(outcome, said[-1], said)
    return Found(outcome, f"{what}: {said[-1]}" if said else f"{what}, and said nothing", said)


def _unstarted(outcome: Outcome, what: str, argv: list[str], error: Exception) -> Found:
    why = describe(error) if isinstance(error, OSError) else str(error)
    return Found(outcome, f"{what} can't be started: {argv[0]}: {why}")


def _ended(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"died of {signal.strsignal(-code)} ({-code})"


def _free_ports(count: int) -> Iterator[int]:
    """Give ports of loopback that nobody has now, and that the system gives nobody of itself.

    One from the system's own range might go to any connection while its node is down.
    """
    first, last = LOWEST, LOWEST + count * 100
    with suppress(OSError, ValueError):
        last = max(last, int(Path(RANGE).read_text().split()[0]))
    given: set[int] = set()
    while len(given) < count:
        port = first + secrets.randbelow(last - first)
        with suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            if port not in given:
                given.add(port)
                yield port
