"""What collects: a list of what it reports, and a function; ours, and those of other packages.

Another package brings its own by an entry point of the group `handfast.collectors`, which names a
:class:`Collector`. No collector's module is imported by who asks for it: a child process does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Final

import msgspec

from handfast.fleet.inventory.facts import ALL, Fact, Tier, Want
from handfast.fleet.inventory.host import Host

__all__ = ["BMC_URL", "GROUP", "OURS", "Collector", "Entry", "found"]

GROUP: Final = "handfast.collectors"
BMC_URL: Final = "HANDFAST_BMC_URL"


@dataclass(frozen=True)
class Collector:
    """What it undertakes to report, and how it finds that out.

    It may hang, crash or lie: it runs in a process of its own, and only what it wants is lost.
    """

    wants: tuple[Want, ...]
    collect: Callable[[Host], Iterable[Fact]]


class Entry(msgspec.Struct, frozen=True):
    """Where a collector is: ``target`` is `module:attribute`. ``tiers`` are what it can report."""

    name: str
    target: str
    tiers: frozenset[Tier] = ALL


def _ours(module: str, tier: Tier, names: str) -> list[Entry]:
    tiers = frozenset({tier})
    return [
        Entry(name, f"{module}:{name.upper().replace('-', '_')}", tiers) for name in names.split()
    ]


HOST: Final = (
    *_ours("handfast.fleet.inventory.machine", Tier.HOST, "kernel processor board"),
    *_ours("handfast.fleet.inventory.gpus", Tier.HOST, "driver gpus"),
)
FABRIC: Final = _ours(
    "handfast.fleet.inventory.fabric", Tier.FABRIC, "fabric-manager imex infiniband ethernet ofed"
)
JOB: Final = (
    *_ours("handfast.fleet.inventory.settings", Tier.JOB, "environment files"),
    *_ours("handfast.fleet.inventory.libraries", Tier.JOB, "nccl plugins ucx libfabric cuda torch"),
)
OURS: Final = (*HOST, *FABRIC, *JOB)
MANAGEMENT: Final = _ours("handfast.fleet.inventory.bmc", Tier.HOST, "bmc")


def found(host: Host) -> tuple[Entry, ...]:
    """List the collectors: ours, the BMC's where its address is given, then other packages'."""
    others = [Entry(each.name, each.value) for each in entry_points(group=GROUP)]
    asked = MANAGEMENT if host.environ.get(BMC_URL) else []
    return (*OURS, *asked, *sorted(others, key=lambda entry: (entry.name, entry.target)))
