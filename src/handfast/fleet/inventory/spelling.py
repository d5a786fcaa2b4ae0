"""An inventory in other tongues: labels of a Kubernetes node, metrics of a node's exporter.

Labels: a key is `PREFIX/NAME`, where NAME has at most 63 characters of letters, digits, `-`, `_`
and `.`, and letters or digits at both ends; a value likewise, or empty (Kubernetes documentation,
"Labels and Selectors"). What does not fit is changed, and then ends in 8 hex digits of its hash,
so that two values stay two. Job-tier facts are no property of a node and make no label.

Metrics: the text format of Prometheus and of node_exporter's textfile collector. Labels' values are
escaped as there: backslash and quote ("Exposition formats"); a fact has no line feed.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from handfast.fleet.inventory.facts import Fact, Inventory, Kind, State, Tier

__all__ = ["labels", "metrics"]

PREFIX: Final = "handfast"
LONGEST: Final = 63
RESERVED: Final = frozenset({str(State.ABSENT), str(State.UNKNOWN)})


def labels(inventory: Inventory) -> dict[str, str]:
    """Give the labels of a node: its exact facts and digests of the host and fabric tiers."""
    made = {}
    for tier in (Tier.HOST, Tier.FABRIC):
        made[f"{PREFIX}/digest.{tier}"] = inventory.digest(tier).hex()[:32]
        for fact in inventory.facts:
            if (fact.tier, fact.kind) == (tier, Kind.EXACT):
                made[f"{PREFIX}/{_fit(fact.name)}"] = _value(fact)
    return made


def _value(fact: Fact) -> str:
    if fact.value is None:
        return str(fact.state)
    # a value that reads like a state must not be taken for it
    return _fit(fact.value, always=fact.value in RESERVED)


def _fit(text: str, *, always: bool = False) -> str:
    """Make text fit for a label; what is changed gets its hash."""
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", text).strip("._-")
    if clean == text and len(text) <= LONGEST and not always:
        return text
    tail = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{clean[: LONGEST - 9].rstrip('._-')}-{tail}".lstrip("-")


def metrics(inventory: Inventory) -> str:
    """Give the metrics of a node as text: each fact, each tier's digest and its unknown facts."""
    lines = _head("fact", "A fact about what runs on this node; always 1.")
    lines += [
        _line("fact", 1, tier=f.tier, kind=f.kind, name=f.name, state=f.state, value=f.value or "")
        for f in inventory.facts
    ]
    lines += _head("digest", "The digest over a tier's exact facts; always 1.")
    lines += [_line("digest", 1, tier=t, digest=inventory.digest(t).hex()) for t in Tier]
    lines += _head("unknown_facts", "How many exact facts of a tier nobody can tell here.")
    lines += [_line("unknown_facts", len(inventory.unknown(t)), tier=t) for t in Tier]
    return "\n".join(lines) + "\n"


def _head(name: str, text: str) -> list[str]:
    return [f"# HELP handfast_{name} {text}", f"# TYPE handfast_{name} gauge"]


def _line(metric: str, number: int, /, **marks: str) -> str:
    told = ",".join(f'{key}="{_escape(value)}"' for key, value in marks.items())
    return f"handfast_{metric}{{{told}}} {number}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')
