"""What may be wrong with a checkpoint of any format: each check knows :mod:`found` alone."""

from __future__ import annotations

from collections.abc import Iterator

from handfast.audit.checks import counters, shards, values
from handfast.audit.checks.seen import Look
from handfast.audit.finding import Finding
from handfast.audit.found import Found

__all__ = ["Look", "check"]


def check(found: Found, look: Look) -> Iterator[Finding]:
    """Everything that is wrong, or may be, with what one format has at a path."""
    yield from found.findings
    for step in found.steps:
        yield from step.findings
        yield from shards.structure(step, look)
        yield from shards.jobs(step)
        yield from counters.counters(step)
        yield from shards.replicas(step, look)
        yield from values.numbers(step, look)
        yield from values.moments(step, look)
        yield from values.masters(step, look)
        yield from shards.identical(step, look)
    yield from shards.repeated(found.steps, look)
    yield from shards.times(found.steps)
