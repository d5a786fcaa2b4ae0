"""Collectors that go wrong, each in a way of its own, and one that goes well."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from handfast.fleet.inventory.collector import Collector
from handfast.fleet.inventory.facts import Fact, Tier, Want
from handfast.fleet.inventory.host import Host

ONE, TWO = Want("test.one", Tier.HOST), Want("test.two", Tier.HOST)
FAMILY = Want("test.family", Tier.HOST, family=True)
MARK = "AWKWARD_PIDS"
SLEEP = ["sleep", "600.25"]  # a child that is known by this


def _well(host: Host) -> Iterator[Fact]:
    print("noise of a library")
    os.write(2, b"more noise\n")
    yield ONE.known("1", "here")
    yield FAMILY.known("read", "here")
    yield FAMILY.below("a b").known("2", "here")


def _hangs(host: Host) -> Iterator[Fact]:
    yield ONE.known("1", "here")
    time.sleep(600)


def _breeds(host: Host) -> Iterator[Fact]:
    """Leave children behind: one in the group, and one that has left it and holds the files."""
    with open(host.environ[MARK], "w", encoding="ascii") as file:
        for apart in (False, True):
            child = subprocess.Popen(SLEEP, start_new_session=apart)
            print(child.pid, file=file)
    if host.environ.get("AWKWARD_WAITS"):
        time.sleep(600)
    yield ONE.known("1", "here")


def _dies(host: Host) -> Iterator[Fact]:
    ctypes.string_at(0)
    yield ONE.known("1", "never said")


def _raises(host: Host) -> Iterator[Fact]:
    raise RuntimeError("the driver is of another planet")
    yield ONE.known("1", "never said")


def _leaves(host: Host) -> Iterator[Fact]:
    sys.exit(0)
    yield ONE.known("1", "never said")


def _floods(host: Host) -> Iterator[Fact]:
    for number in range(1 << 22):
        yield FAMILY.below(str(number)).known("x", "here")


def _bloats(host: Host) -> Iterator[Fact]:
    for number in range(2000):
        yield FAMILY.below(str(number)).known("x" * 4000, "here")


def _strays(host: Host) -> Iterator[Fact]:
    yield ONE.known("1", "here")
    yield Want("gpu.driver", Tier.HOST).known("1", "another's fact")


def _elsewhere(host: Host) -> Iterator[Fact]:
    yield Want(ONE.name, Tier.JOB).known("1", "another tier's")


def _stutters(host: Host) -> Iterator[Fact]:
    yield ONE.known("1", "here")
    yield ONE.known("2", "here")


def _babbles(host: Host) -> Iterator[Fact]:
    yield "all is well"  # that is what this one does wrong


WELL = Collector((ONE, TWO, FAMILY), _well)
HANGS = Collector((ONE, TWO), _hangs)
BREEDS = Collector((ONE,), _breeds)
DIES = Collector((ONE, TWO), _dies)
RAISES = Collector((ONE, TWO), _raises)
LEAVES = Collector((ONE, TWO), _leaves)
FLOODS = Collector((ONE, FAMILY), _floods)
BLOATS = Collector((ONE, FAMILY), _bloats)
STRAYS = Collector((ONE, TWO), _strays)
ELSEWHERE = Collector((ONE, TWO), _elsewhere)
STUTTERS = Collector((ONE, TWO), _stutters)
BABBLES = Collector((ONE, TWO), _babbles)
EMPTY = Collector((), lambda host: ())
NO_COLLECTOR = 17
