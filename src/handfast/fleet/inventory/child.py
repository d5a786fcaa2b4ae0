"""One collector's process: it says what it will report, then reports it, and is gone.

What libraries print goes where errors go; the answer has a descriptor of its own. It ends without
what Python and libraries do at an exit, which may hang as well.
"""

from __future__ import annotations

import os
import resource
import sys
from itertools import islice
from pkgutil import resolve_name
from typing import Final, NoReturn

import msgspec

from handfast.fleet.inventory.collector import Collector
from handfast.fleet.inventory.host import Host

__all__ = ["MOST", "Job", "main"]

MOST: Final = (
    4 << 20
)  # bytes that a collector may write to any file: an answer has some ten thousand
FACTS: Final = 10_000


class Job(msgspec.Struct, frozen=True):
    """What the parent asks for, as JSON on the standard input."""

    target: str
    host: Host


def main(answer: int) -> NoReturn:
    """Do the job that the standard input names, and answer at a descriptor; never returns."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, MOST))
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    collector = resolve_name(job.target)
    if not isinstance(collector, Collector):
        raise TypeError(f"{job.target} is no Collector")
    with open(answer, "wb") as file:
        file.write(msgspec.json.encode(collector.wants) + b"\n")
        file.flush()
        facts = tuple(islice(collector.collect(job.host), FACTS + 1))
        if len(facts) > FACTS:
            raise ValueError(f"it reports more than {FACTS} facts")
        file.write(msgspec.json.encode(facts) + b"\n")
    os._exit(0)
