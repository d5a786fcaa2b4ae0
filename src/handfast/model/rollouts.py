"""What is searched of rollouts: small fleets over the real nodes, and links between two ends.

A fleet's setting is searched for the laws of :mod:`handfast.model.fleet`, and from each state for a
calm way to an end. A link's plan is searched for those of :mod:`handfast.model.link`; its decisions
are given, since they lie in a room above this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.model.explore import Report, explore
from handfast.model.fleet import LAWS, Fleet, Laws, Move, Plan, Setting, World
from handfast.model.link import Link, State

__all__ = ["HEAVY", "LINKS", "PLAN", "SETTINGS", "Ends", "search_fleet", "search_link"]

_A, _B, _C = Plan("a", final=True), Plan("b", final=True), Plan("c")
_OPEN, _BACK = Plan("b"), Plan("")

SETTINGS: Final = {
    "adoption, and a crash": Setting((_A,), boots=1),
    "an upgrade, and a crash": Setting((_A, _B), over=1, boots=1),
    "an upgrade of three": Setting((_A, _B), over=1, nodes=3),
    "an upgrade that is overtaken by another": Setting((_A, _OPEN, _C), over=1),
    "adoption, that is overtaken, and overtaken": Setting((Plan("a"), _OPEN, _BACK)),
    "a rollback": Setting((_A, _OPEN, _BACK), over=1),
    "a rollback from one that one node can't have": Setting(
        (_A, _OPEN, _BACK), over=1, unfit=((1, "b"),)
    ),
    "a rollback that asks for a step": Setting((_A, _OPEN, Plan("", want=1)), over=1),
    "a node joins": Setting((_A, _OPEN), over=1, nodes=3, joins=Epoch(1, 2)),
    "a node joins whose probes fail": Setting(
        (_A, _OPEN), over=1, nodes=3, joins=Epoch(1, 2), unfit=((2, "a"),)
    ),
    "a node is fenced": Setting((_A, _OPEN, _C), over=1, nodes=3, leaves=True),
    "an upgrade of three that is overtaken by another": Setting(
        (_A, _OPEN, _C), over=1, nodes=3
    ),
    "two upgrades, and a crash": Setting((_A, _B, _C), over=1, boots=1),
    "an upgrade, and two crashes": Setting((_A, _B), over=1, boots=2),
    "an upgrade of three, and a crash": Setting((_A, _B), over=1, nodes=3, boots=1),
    "a rollback, and a crash": Setting((_A, _OPEN, _BACK), over=1, boots=1),
}  # fmt: skip
"""Fleets by name. What a plan aims at is approved in the end where it is a `final` one."""

PLAN: Final = ((1, "a"), (2, "b"), (3, "a"))
"""An upgrade, and a rollback to the old bits under a new number."""


class Ends(msgspec.Struct, frozen=True):
    """Two ends: their plan, how often each may live, and whether parts come back alone (one epoch
    at a time)."""

    plan: tuple[tuple[int, str], ...]
    lives: tuple[int, int]
    alone: bool = False


LINKS: Final = {
    "a link: an upgrade and a rollback": Ends(PLAN, (1, 1)),
    "a link: an upgrade, and a crash": Ends(PLAN[:2], (2, 1), alone=True),
    "a link: both, and a crash": Ends(PLAN, (2, 1), alone=True),
}
"""Links by name."""

HEAVY: Final = frozenset({*list(SETTINGS)[11:], *list(LINKS)[2:]})
"""Those that take from half a minute to many."""


def search_fleet(setting: Setting) -> Report[World, Move]:
    """Search every state, and from each a calm way to an end."""
    laws = Laws(Fleet(setting))
    return explore(
        Fleet(setting),
        always={law: getattr(laws, law) for law in LAWS},
        eventually={"ends": laws.ends},
        calm=lambda move: move.calm,
    )


def search_link(
    link: Link, goals: Mapping[str, Callable[[State], bool]] | None = None
) -> Report[State, str]:
    """Search every state of two ends; ``goals`` are what must be reached somewhere."""
    laws = {"f10": link.f10, "own": link.own, "agreed": link.agreed, "promised": link.promised}
    return explore(link, always=laws, sometimes=goals)
