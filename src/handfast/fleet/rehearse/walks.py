"""Every order in which some of a few nodes are upgraded and then downgraded; pure.

A walk names the nodes in the order in which they are moved, each twice: all upgrades come first. A
state is the nodes that were moved so far, sorted. So a node that came back is told from one that
never left, which runs the same version, and has not what the newer one wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import permutations

__all__ = ["Edge", "State", "Walk", "edges", "orders", "pick"]

Walk = tuple[int, ...]
State = tuple[int, ...]
Edge = tuple[State, int]
"""A state, and the node that is moved from there."""


def orders(nodes: int) -> tuple[Walk, ...]:
    """Every walk of this many nodes: every order of some, then every order of these back.

    3 nodes have 51 walks, 4 have 748 and 5 have 17,685.
    """
    return tuple(
        up + down
        for some in range(1, nodes + 1)
        for up in permutations(range(nodes), some)
        for down in permutations(up)
    )


def edges(walk: Walk) -> tuple[Edge, ...]:
    """The moves of a walk, or of its beginning, each with the state that it starts from."""
    return tuple((tuple(sorted(walk[:at])), node) for at, node in enumerate(walk))


def pick(
    walks: Iterable[Walk], gone: Collection[Walk], broken: Collection[Walk], *, quick: bool
) -> Walk | None:
    """The next walk to go, or None where no other one shows anything new.

    ``gone`` were gone to their ends; of ``broken``, which are beginnings, the last move did not
    work, and no walk that begins so is gone. ``quick``: one only for the moves that it makes, from
    states from which they were not made yet, before it comes to one that did not work; the walk
    with most of them is next.
    """
    ahead = (w for w in walks if w not in gone and not any(w[: len(b)] == b for b in broken))
    if not quick:
        return next(ahead, None)
    made = {edge for walk in (*gone, *broken) for edge in edges(walk)}
    stops = {edges(walk)[-1] for walk in broken if walk}

    def news(walk: Walk) -> int:
        moves = edges(walk)
        end = next((at for at, edge in enumerate(moves) if edge in stops), len(moves))
        return len(set(moves[:end]) - made)

    best = max(ahead, key=news, default=())
    return best if news(best) else None
