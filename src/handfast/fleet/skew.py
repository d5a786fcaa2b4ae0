"""The skew of a fleet: which nodes are alike in a tier, and in what the others differ.

Skew is a normal condition. What an operator looks for is the odd one, so groups begin with the
largest, and a difference names the few. Two inventories that name one key are of two holders, or of
one that was asked twice: neither is counted, since nobody can say which is the node. What shows
that there are two is said (:func:`~handfast.fleet.identity.clones`).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Final

import msgspec

from handfast.errors import HandfastError
from handfast.fleet.identity import Sighting, clones, read_statement, verify
from handfast.fleet.inventory.facts import Fact, Inventory, Kind, Tier, decode, look, printable
from handfast.store.files import Posix, read_file

__all__ = ["Difference", "Group", "Holders", "Reading", "Skew", "TierSkew", "read_fleet", "skew"]

SUFFIX: Final = ".json"
MOST: Final = 4 << 20  # bytes of one inventory: one has some twenty thousand

SERIAL: Final = "board.serial"
NOT_LISTED: Final = "not reported"


class Group(msgspec.Struct, frozen=True):
    """Nodes of one digest, sorted by name. ``unknown`` names what none of them can tell."""

    digest: str
    nodes: tuple[str, ...]
    unknown: tuple[str, ...]


class Reading(msgspec.Struct, frozen=True):
    """One thing that nodes say of a fact; ``value`` is empty unless the state is "known"."""

    state: str
    value: str
    nodes: tuple[str, ...]


class Difference(msgspec.Struct, frozen=True):
    """A fact in which nodes differ: what most say first."""

    name: str
    readings: tuple[Reading, ...]


class TierSkew(msgspec.Struct, frozen=True):
    """One tier: its groups, the largest first, and in which facts they differ."""

    tier: Tier
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]


class Holders(msgspec.Struct, frozen=True):
    """A key that several inventories name: none of them is counted.

    ``why`` is what shows that several machines hold it. It is empty where the inventories may be of
    one machine, which was asked more than once.
    """

    key: str
    nodes: tuple[str, ...]
    why: str = ""


class Skew(msgspec.Struct, frozen=True):
    """The skew of a fleet of ``nodes`` nodes, tier by tier; ``refused`` are not among them."""

    nodes: int
    tiers: tuple[TierSkew, ...]
    refused: tuple[Holders, ...]

    @property
    def sound(self) -> bool:
        """Whether no key was named twice. That nodes differ is no fault."""
        return not self.refused


def skew(fleet: Mapping[str, Inventory]) -> Skew:
    """Compare the inventories of nodes, by name. Linear in their facts."""
    refused = _refused(fleet)
    out = {node for holders in refused for node in holders.nodes}
    counted = {name: fleet[name] for name in sorted(fleet) if name not in out}
    return Skew(len(counted), tuple(_tier(counted, tier) for tier in Tier), refused)


def read_fleet(directory: str) -> tuple[dict[str, Inventory], dict[str, str]]:
    """Read each `NODE.json` of a directory: an inventory, or a signed statement, which is verified.

    Gives the inventories by node, and for each file that can't be counted, why. Raises OSError
    where the directory can't be read. A file's name is a node's, and all of it can be printed.
    """
    fleet, unread = {}, {}
    for name in sorted(os.listdir(directory)):
        if name.endswith(SUFFIX):
            path, node = os.path.join(directory, name), name.removesuffix(SUFFIX)
            if (shown := printable(node)) != node:
                unread[shown] = "its name can't be printed. What to do: rename the file"
                continue
            try:
                fleet[node] = _read(path)
            except HandfastError as error:
                unread[node] = printable(str(error))
    return fleet, unread


def _read(path: str) -> Inventory:
    data = read_file(Posix(), path, MOST)
    if b'"body"' in data[:64]:
        return verify(read_statement(data, path), path)
    return decode(data, path)


def _refused(fleet: Mapping[str, Inventory]) -> tuple[Holders, ...]:
    holders = defaultdict(list)
    for name in sorted(fleet):
        node, serial = fleet[name].node, fleet[name].get(SERIAL).value
        if node is not None:
            holders[node.key].append(Sighting(node, serial or "", where=name))
    why = {each.key: each.why for each in clones(chain.from_iterable(holders.values()))}
    return tuple(
        Holders(key, tuple(each.where for each in of), why.get(key, ""))
        for key, of in sorted(holders.items())
        if len(of) > 1
    )


def _tier(fleet: Mapping[str, Inventory], tier: Tier) -> TierSkew:
    alike: dict[bytes, list[str]] = defaultdict(list)
    for name, inventory in fleet.items():
        alike[inventory.digest(tier)].append(name)
    groups = [
        Group(digest.hex(), tuple(names), fleet[names[0]].unknown(tier))
        for digest, names in alike.items()
    ]
    groups.sort(key=lambda group: (-len(group.nodes), group.nodes))
    # nodes of one digest say the same, so one of each group is asked
    facts = [_exact(fleet[group.nodes[0]].facts, tier) for group in groups]
    differences = []
    for name in sorted(set[str]().union(*facts)):
        said: dict[tuple[str, str], list[str]] = defaultdict(list)
        for group, known in zip(groups, facts, strict=True):
            said[_reading(known, name)] += group.nodes
        if len(said) > 1:
            readings = [Reading(*key, tuple(sorted(nodes))) for key, nodes in said.items()]
            readings.sort(key=lambda reading: (-len(reading.nodes), reading.nodes))
            differences.append(Difference(name, tuple(readings)))
    return TierSkew(tier, tuple(groups), tuple(differences))


def _exact(facts: Iterable[Fact], tier: Tier) -> dict[str, Fact]:
    return {f.name: f for f in facts if (f.tier, f.kind) == (tier, Kind.EXACT)}


def _reading(known: Mapping[str, Fact], name: str) -> tuple[str, str]:
    """Say what a node tells of a fact, also of one that it does not list."""
    fact = look(known, name)
    return (str(fact.state), fact.value or "") if fact is not None else (NOT_LISTED, "")
