"""Two parties: what one member and one peer know of each other's vote on an epoch.

An edge's state is a function of joined facts, so it never moves back and no timer changes it:
timers only resend. Of the states in the design, section 2, this table has those that safety and
quiescence need. REFLECTED means that the peer has shown that it holds my offer, which is all that
resending waits for: m delivered messages give E^(m-1) knowledge, and common knowledge is never
reached (Halpern and Moses 1990), so no further round would settle anything that matters here.
"""

from enum import StrEnum
from typing import Final

__all__ = ["TRANSITIONS", "Edge", "Heard", "advance", "edge"]


class Edge(StrEnum):
    """How far an edge has come, for one (peer, epoch)."""

    NONE = "none"
    OFFERED = "offered"  # my vote is durable and was sent
    HEARD = "heard"  # and the peer's vote is held here
    ECHOED = "echoed"  # the peer holds my vote, its own is not held here
    REFLECTED = "reflected"  # both
    VOID = "void"  # one of the two voted SKIP: the epoch can't converge over this edge


class Heard(StrEnum):
    """What can happen on an edge."""

    OFFER = "I offer"
    THEIRS = "peer offers"
    ECHO = "peer holds mine"
    SKIP = "either skips"


TRANSITIONS: Final[dict[tuple[Edge, Heard], Edge]] = {
    (Edge.NONE, Heard.OFFER): Edge.OFFERED,
    (Edge.OFFERED, Heard.THEIRS): Edge.HEARD,
    (Edge.OFFERED, Heard.ECHO): Edge.ECHOED,
    (Edge.HEARD, Heard.ECHO): Edge.REFLECTED,
    (Edge.ECHOED, Heard.THEIRS): Edge.REFLECTED,
    **{(state, Heard.SKIP): Edge.VOID for state in Edge if state is not Edge.VOID},
}


def advance(state: Edge, heard: Heard) -> Edge:
    """Follow the table; whatever it does not list changes nothing."""
    return TRANSITIONS.get((state, heard), state)


def edge(*, offered: bool, theirs: bool, echoed: bool, skipped: bool) -> Edge:
    """Derive the state of an edge from the facts that are held.

    Before I offer there is no edge, whatever the peer has said: its vote waits in the tally.
    """
    state = Edge.NONE
    for happened, heard in (
        (offered, Heard.OFFER),
        (theirs, Heard.THEIRS),
        (echoed, Heard.ECHO),
        (skipped, Heard.SKIP),
    ):
        if happened:
            state = advance(state, heard)
    return state
