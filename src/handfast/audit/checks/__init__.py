"""What may be wrong with a checkpoint of any format: each check knows :mod:`found` alone."""

from __future__ import annotations

from collections.abc import Iterator

from handfast.audit.checks import counters, shards, unpromised, values
from handfast.audit.checks.seen import Look
from handfast.audit.finding import Finding
from handfast.audit.found import Found, Step

__all__ = ["Look", "check"]


def check(found: Found, look: Look, *, only: Step | None = None) -> Iterator[Finding]:
    """Everything that is wrong, or may be, with what one format has at a path.

    With ``only`` what is wrong with that step, whose files alone are looked into.
    """
    parameters = counters.together(found.steps, counters.parameters)
    clocks = counters.together(found.steps, counters.clocks)
    counted = [unpromised.counts(step) for step in found.steps]
    if only is None:
        yield from found.findings
    for at, step in enumerate(found.steps):
        if only is not None and step is not only:
            continue
        yield from counters.own(step, steady=at in parameters)
        yield from shards.structure(step, look)
        yield from shards.spared(step, look)
        yield from shards.jobs(step)
        yield from counters.counters(step, steady=at in clocks)
        yield from unpromised.unpromised(at, found.steps, counted)
        yield from shards.replicas(step, look)
        yield from values.numbers(step, look)
        yield from values.moments(step, look)
        yield from values.masters(step, look)
        yield from shards.identical(step, look)
    if only is None:
        yield from shards.repeated(found.steps, look)
        yield from shards.times(found.steps)
