"""Which facts handfast's own inventory has, for rules to be held against when they are read.

What another package collects is not among them: its module is imported by a child process only
(:mod:`handfast.fleet.inventory.collect`), so a file of rules says of such facts that the site
brings them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from itertools import chain

from handfast.fleet.inventory.bmc import BMC
from handfast.fleet.inventory.collector import OURS, Collector, Entry

__all__ = ["known_facts"]


@cache
def known_facts() -> frozenset[str]:
    """Names of facts; a family is there as its own name, and as that and ``.*``."""
    wants = chain.from_iterable(each.wants for each in (BMC, *map(_collector, OURS)))
    return frozenset(
        chain.from_iterable((w.name, f"{w.name}.*") if w.family else (w.name,) for w in wants)
    )


def _collector(entry: Entry) -> Collector:
    module, _, name = entry.target.partition(":")
    found: Collector = getattr(import_module(module), name)
    return found
