"""What is said where ranks do not have one history, and whether they may go on."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.store.provenance import Brought, ranks, spell_mixed, unlike

__all__ = ["LEAVE", "refuse_mixed", "told", "warn"]

logger = logging.getLogger("handfast")

SAME: Final = (
    "load the same on every rank by guard.load, with step= and lineage=, which joins what is of "
    "several runs"
)
LEAVE: Final = (
    f"restore(step=) one before it; where there is none begin at a fresh path, and {SAME}"
)


def refuse_mixed(said: Sequence[Brought], what: str, remedy: str = SAME) -> None:
    """Raise Refused, MIXED, where ranks have loaded the same from different epochs."""
    if parts := spell_mixed(said):
        raise Refused(f"{what} is a mixture", verdict=Verdict.MIXED, shards=parts, remedy=remedy)


def warn(said: Sequence[Brought], what: str) -> None:
    """Warn where the ranks do not have one history in ``what``."""
    if unlike(said):
        logger.warning("%s", told(said, what))


def told(said: Sequence[Brought], what: str) -> str:
    """Tell of histories that are not one: who has which."""
    by: dict[str, list[int]] = defaultdict(list)
    for rank, one in enumerate(said):
        by[str(one)].append(rank)
    each = "; ".join(f"{ranks(at)}: {one}" for one, at in by.items())
    return (
        f"the ranks do not have one history in {what}: {each}. Where each has loaded its shard of "
        "another epoch that is a mixture, and where one has loaded for all, the epochs of the "
        f"others bear no word of it. What to do: {SAME}"
    )
