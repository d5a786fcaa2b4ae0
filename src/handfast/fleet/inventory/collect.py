"""Takes a node's inventory: each collector in a process of its own, ended as a group at a limit.

A driver's call may hang for ever, a library may take its process down, a plugin may say nonsense.
Each costs the facts of that one collector: they are unknown, with the reason.

A process that hangs inside the kernel does not even die when it is killed. It is left behind, and
the inventory is not late for it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO, Final

import msgspec

from handfast.errors import UNREADABLE
from handfast.fleet.inventory.child import MOST, Job
from handfast.fleet.inventory.collector import Entry, found
from handfast.fleet.inventory.facts import ALL, Fact, Inventory, Tier, Want, gather
from handfast.fleet.inventory.host import Host
from handfast.link.life import Node

__all__ = ["LIMIT_S", "take"]

LIMIT_S: Final = 15.0
GRACE_S: Final = 1.0  # how long a process that was killed may take to be gone
CHILD: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from handfast.fleet.inventory.child import main; main(int(sys.argv[2]))"
)
"""The program of a collector's process: it imports what this process would. The answer's file is
named by its descriptor, so that nothing which prints as Python starts is taken for one."""


# Made before any thread meets these types: msgspec 0.22 builds what it knows of one when it first
# does, and a second thread that meets it meanwhile ends the process by SIGSEGV.
_WANTS: Final = msgspec.json.Decoder(tuple[Want, ...])
_FACTS: Final = msgspec.json.Decoder(tuple[Fact, ...])


class _Answer(msgspec.Struct, frozen=True):
    """What came of one collector; ``problem`` is empty where it ended well."""

    wants: tuple[Want, ...]
    facts: tuple[Fact, ...]
    problem: str


def take(
    host: Host,
    *,
    tiers: Collection[Tier] = ALL,
    node: Node | None = None,
    entries: Iterable[Entry] | None = None,
    limit_s: float = LIMIT_S,
) -> Inventory:
    """Take the inventory of a machine, its facts of some tiers; changes nothing there.

    All collectors run at once; the call takes hardly longer than ``limit_s``, whatever they do.
    ``entries`` are all that are found unless they are given. Raises OSError where no process can be
    started.
    """
    chosen = found(host) if entries is None else tuple(entries)
    asked = [entry for entry in chosen if entry.tiers & frozenset(tiers)]
    with ThreadPoolExecutor(max_workers=max(1, len(asked))) as pool:
        answers = list(pool.map(lambda entry: _ask(entry, host, limit_s), asked))
    facts: dict[str, Fact] = {}
    for entry, answer in zip(asked, answers, strict=True):
        told = list(_judge(entry, answer))
        if taken := sorted({fact.name for fact in told} & facts.keys()):
            told = [_lost(entry, f"{', '.join(taken)}: another collector reports that already")]
        facts |= {fact.name: fact for fact in told}
    return gather((fact for fact in facts.values() if fact.tier in tiers), node)


def _ask(entry: Entry, host: Host, limit_s: float) -> _Answer:
    """Run one collector to its end, or to the limit."""
    with _memory() as asked, _memory() as answer, _memory() as errors:
        asked.write(msgspec.json.encode(Job(entry.target, host)))
        asked.seek(0)
        child = subprocess.Popen(
            (
                sys.executable,
                "-P",
                "-c",
                CHILD,
                json.dumps(sys.path, default=os.fspath),
                str(answer.fileno()),
            ),
            stdin=asked,
            stdout=errors,
            stderr=errors,
            pass_fds=(answer.fileno(),),
            start_new_session=True,
        )
        fd = os.pidfd_open(child.pid)
        try:
            watch = select.poll()  # select() takes no descriptor above 1,023
            watch.register(fd, select.POLLIN)
            ended = bool(watch.poll(limit_s * 1000))
        finally:
            os.close(fd)
            with suppress(ProcessLookupError):  # not reaped yet: its number is nobody else's
                os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        for file in (answer, errors):
            file.seek(0)
        problem = "" if ended else f"it gave no answer within {limit_s:g} s and was ended"
        if ended and child.returncode:
            problem = f"it {_fate(child.returncode)}: {_last(errors.read(MOST))}"
        return _read(answer.read(MOST), problem)


def _memory() -> BinaryIO:
    """Make a file that lies on no disk: what is asked holds the whole environment."""
    return open(os.memfd_create("handfast-collector"), "w+b")


def _fate(code: int) -> str:
    return f"ended with {code}" if code > 0 else f"died of {signal.Signals(-code).name}"


def _last(errors: bytes) -> str:
    """Give the last line of what was printed: of a Python error that is the error itself."""
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1][-500:] if lines else "it said nothing"


def _read(data: bytes, problem: str) -> _Answer:
    """Read what a collector wrote, as far as it came."""
    first, _, rest = data.partition(b"\n")
    try:
        wants = _WANTS.decode(first) if first else ()
        facts = _FACTS.decode(rest) if rest and not problem else ()
    except UNREADABLE as error:
        return _Answer((), (), problem or f"it said nonsense: {error}")
    return _Answer(wants, facts, problem)


def _judge(entry: Entry, answer: _Answer) -> Iterator[Fact]:
    """Let only those facts pass that the collector wanted to report, and miss none of those."""
    problem = answer.problem
    names = [fact.name for fact in answer.facts]
    stray = [f.name for f in answer.facts if not any(want.covers(f) for want in answer.wants)]
    if not problem and stray:
        problem = f"it reported what it never said it would: {', '.join(stray[:3])}"
    if not problem and len(set(names)) < len(names):
        problem = "it reported a fact twice"
    if not answer.wants:
        yield _lost(entry, problem or "it reports nothing")
    elif problem:
        yield from (want.unknown(f"collector {entry.name}: {problem}") for want in answer.wants)
    else:
        yield from answer.facts
        for want in answer.wants:
            if want.name not in names:
                yield want.unknown(f"collector {entry.name} did not report it")


def _lost(entry: Entry, problem: str) -> Fact:
    """Say of a collector as a whole that what it would have reported is unknown."""
    tier = next((tier for tier in Tier if tier in entry.tiers), Tier.HOST)
    return Want("collector", tier).below(entry.name).unknown(problem, entry.target)
