"""What one rank runs, as it is posted: the facts that must be equal, and 32 bytes for them.

Facts of each node for itself (the name of an interface) are not among them. So the ranks of a job
have a few stacks, and not as many as there are ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Final, TypeAlias

import msgspec

from handfast.errors import UNREADABLE, FormatError
from handfast.fleet.compat.rules import ABSENT
from handfast.fleet.inventory.facts import Inventory, Kind, State, Tier

__all__ = ["NODE", "Stack", "decode", "digest", "encode", "held", "lost", "stack"]

LOST: Final = "collector."

NODE: Final = (
    "bmc", "board", "cpu", "ethernet", "fabric-manager", "gpu", "imex", "kernel", "nic", "ofed",
)  # fmt: skip
"""Above all exact facts of the host and fabric tiers; unknown to a rank whose node told nothing."""

Stack: TypeAlias = dict[str, str | None]
"""Facts by name: a value, ABSENT, or None for what nobody can tell."""


def stack(job: Inventory, node: Inventory | None) -> Stack:
    """Join the job tier of a rank with the other tiers of its node; None where it said nothing."""
    facts: Stack = dict.fromkeys(NODE) if node is None else {}
    for each, tiers in ((node, (Tier.HOST, Tier.FABRIC)), (job, (Tier.JOB,))):
        for fact in each.facts if each is not None else ():
            if fact.kind is Kind.EXACT and fact.tier in tiers:
                facts[fact.name] = ABSENT if fact.state is State.ABSENT else fact.value
            elif fact.name.startswith(LOST):
                facts[fact.name] = None
    return facts


def lost(facts: Mapping[str, str | None]) -> tuple[str, ...]:
    """Name the collectors that said nothing here, so that nobody knows what they would have."""
    return tuple(name.removeprefix(LOST) for name in facts if name.startswith(LOST))


def encode(facts: Stack) -> str:
    """Write a stack as JSON, sorted; equal stacks give equal texts."""
    return msgspec.json.encode(facts, order="deterministic").decode()


def digest(text: str) -> str:
    """Give the SHA-256 (32 bytes, as 64 hex digits) of an encoded stack."""
    return hashlib.sha256(f"handfast.gate/1\n{text}".encode()).hexdigest()


def decode(text: str, wanted: str) -> Stack:
    """Read a stack. Raises FormatError where it is none, or not the one of that digest."""
    try:
        facts = msgspec.json.decode(text.encode(), type=dict[str, str | None])
    except UNREADABLE as error:
        raise FormatError(f"the facts of {wanted[:16]} can't be read: {error}") from error
    if digest(text) != wanted:
        raise FormatError(
            f"the facts of {wanted[:16]} are those of {digest(text)[:16]}. What to do: run the "
            "same release of handfast on all nodes"
        )
    return facts


def held(
    facts: Mapping[str, str | None], names: Iterable[str], listed: Collection[str] = ()
) -> Stack:
    """Give what a stack says of some facts. ``listed`` are those that any stack speaks of.

    Below what is unknown everything is unknown, and so is what others list and this one does not;
    or what nobody lists, where a collector said nothing. Else what nobody lists is absent.
    """
    return {name: _look(facts, name, name in listed or bool(lost(facts))) for name in names}


def _look(facts: Mapping[str, str | None], name: str, elsewhere: bool) -> str | None:
    if name in facts:
        return facts[name]
    above = name
    while "." in above:
        above = above.rpartition(".")[0]
        if above in facts:
            return None if facts[above] is None else ABSENT
    return None if elsewhere else ABSENT
