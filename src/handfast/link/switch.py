"""The change of epoch on an open link: what one end knows, and what follows from it. Pure.

Each end goes through these phases on its own, by what it has made durable and by the newest word
that it has heard of the other::

    OLD       takes old, sends old
    BOTH      takes both, sends old     once its ACCEPT_BOTH is durable, and never before
    TURNED    takes both, sends new     once it has heard that the peer's ACCEPT_BOTH is durable
    NEW       takes new, sends new      once the peer, turned too, has named its last old sequence
                                        number, all up to that was taken or given up, and the
                                        promise to take nothing older is durable

As in :mod:`handfast.core.link`, a word holds all that its sender has to say, only grows, and is
sent again until the peer's word shows that it was heard. So loss, doubling and order make no
difference. No timer changes a phase, but that over datagrams an end gives up waiting for old data
that does not come.

An epoch's number only rises: a rollback is another change, to a higher number whose digest is the
old bundle's. A change that is abandoned half-way ends with the link; so does the link of a part
that can't speak two epochs at a time: it is taken down between, for another handshake.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from handfast.core.lattice import Epoch
from handfast.errors import Refused
from handfast.link.frame import LinkError, Reason

__all__ = [
    "Phase", "Spoken", "Switch", "Word", "accepted", "ask", "begin", "choose", "closed", "hear",
    "may_close", "may_turn", "phase", "says", "takes", "turn", "unheard",
]  # fmt: skip

_replace = msgspec.structs.replace


class Spoken(msgspec.Struct, frozen=True):
    """An epoch that an end can speak, and the digest of the bundle that it names."""

    epoch: Epoch
    digest: str


class Phase(StrEnum):
    """How far one end is with a change of epoch."""

    OLD = "old"
    BOTH = "both"
    TURNED = "turned"
    NEW = "new"


class Word(msgspec.Struct, frozen=True):
    """All that one end has to say on its link, as of its ``number``-th word.

    ``next`` is set once its ACCEPT_BOTH is durable. ``sending`` is what it sends under, from
    the sequence number after ``last`` on. ``heard`` is the number of the peer's newest word that
    it holds; 0 is none. ``asks``: its sender does not know yet that this was heard, so answer it.
    """

    number: int
    heard: int
    now: Spoken
    next: Spoken | None
    sending: Epoch
    last: int
    asks: bool


class Switch(msgspec.Struct, frozen=True):
    """One end of an open link: the epoch spoken, the one asked for, and the peer's newest word.

    ``last`` is the last sequence number that was sent before ``sending``; -1 is none.
    """

    now: Spoken
    sending: Epoch
    next: Spoken | None = None
    durable: bool = False
    last: int = -1
    number: int = 1
    peer: Word | None = None


def choose(mine: tuple[Spoken, ...], theirs: tuple[Spoken, ...]) -> Spoken:
    """Choose the highest epoch that both ends speak. Raises LinkError where there is none.

    One number for two bundles is refused, whatever else they have in common: somebody has used a
    number twice, and then no number can be trusted.
    """
    digests = {each.epoch: each.digest for each in mine}
    common = [each for each in theirs if each.epoch in digests]
    for each in common:
        if digests[each.epoch] != each.digest:
            raise _two_bundles(each.epoch, digests[each.epoch], each.digest)
    if not common:
        said = ", ".join(f"{each.epoch}" for each in theirs)
        ours = ", ".join(f"{each.epoch}" for each in mine)
        raise LinkError(Reason.EPOCH, f"the peer speaks {said}, this end {ours}: none in common")
    return max(common, key=lambda each: each.epoch)


def begin(spoken: Spoken) -> Switch:
    """Open a link under the epoch that its handshake chose."""
    return Switch(spoken, spoken.epoch)


def phase(switch: Switch) -> Phase:
    """Say how far this end is; NEW until the peer has come so far, then OLD again."""
    if switch.next is not None and switch.durable:
        return Phase.TURNED if switch.sending == switch.next.epoch else Phase.BOTH
    behind = switch.peer is not None and switch.peer.now.epoch < switch.now.epoch
    return Phase.NEW if behind else Phase.OLD


def ask(switch: Switch, to: Spoken) -> Switch:
    """Ask for a change. Nothing is said of it until its ACCEPT_BOTH is durable.

    Raises Refused for a number that is not above the one spoken, or while another change goes on.
    """
    if to.epoch <= switch.now.epoch:
        raise Refused(
            f"epoch {to.epoch} is not above {switch.now.epoch}, which this link speaks",
            verdict=None,
            remedy="give the bundle a new number, also when it is an old one: a rollback goes up",
        )
    if switch.next is not None or phase(switch) is Phase.NEW:
        raise Refused(
            f"this link's change to epoch {(switch.next or switch.now).epoch} is not over",
            verdict=None,
            remedy="wait until both ends are through, or take the link down and shake hands anew",
        )
    return _replace(switch, next=to, durable=False)


def accepted(switch: Switch) -> Switch:
    """Go on once ACCEPT_BOTH is durable: both epochs are taken, and it may be said."""
    return _replace(switch, durable=True, number=switch.number + 1)


def hear(switch: Switch, word: Word) -> Switch:
    """Hear a word of the peer's; one that is not newer changes nothing. Raises LinkError."""
    held = switch.peer
    if held is not None and (word.number, word.heard) <= (held.number, held.heard):
        return switch
    mine = {each.epoch: each.digest for each in (switch.now, switch.next) if each is not None}
    for each in (word.now, word.next):
        if each is not None and mine.get(each.epoch, each.digest) != each.digest:
            raise _two_bundles(each.epoch, mine[each.epoch], each.digest)
    if word.next is not None and word.next.epoch <= word.now.epoch:
        raise LinkError(
            Reason.EPOCH, f"the peer goes from {word.now.epoch} to {word.next.epoch}: used before"
        )
    return _replace(switch, peer=word)


def takes(switch: Switch, epoch: Epoch) -> bool:
    """Say whether a frame that was sent under this epoch is taken now."""
    both = switch.next is not None and switch.durable and epoch == switch.next.epoch
    return both or epoch == switch.now.epoch


def may_turn(switch: Switch) -> bool:
    """Say whether the new epoch may be sent: each end has durably promised to take it."""
    to, peer = switch.next, switch.peer
    if to is None or not switch.durable or switch.sending == to.epoch or peer is None:
        return False
    return peer.next == to


def turn(switch: Switch, last: int) -> Switch:
    """Send the new epoch from now on; ``last`` is the last sequence number sent before."""
    if switch.next is None:
        raise RuntimeError("turn() without a change that was asked for")
    return _replace(switch, sending=switch.next.epoch, last=last, number=switch.number + 1)


def may_close(switch: Switch, settled: int) -> bool:
    """Say whether the old epoch may go: turned, and the peer's last old frame is settled.

    Every sequence number below ``settled`` was taken or given up.
    """
    to, peer = switch.next, switch.peer
    if to is None or switch.sending != to.epoch or peer is None or peer.sending != to.epoch:
        return False
    return peer.last < settled


def closed(switch: Switch) -> Switch:
    """Go on once the promise to take nothing older is durable: only the new epoch is left."""
    if switch.next is None:
        raise RuntimeError("closed() without a change that was asked for")
    return _replace(switch, now=switch.next, next=None, durable=False, number=switch.number + 1)


def says(switch: Switch) -> Word:
    """Put all that this end has to say into a word."""
    return Word(
        number=switch.number,
        heard=switch.peer.number if switch.peer is not None else 0,
        now=switch.now,
        next=switch.next if switch.durable else None,
        sending=switch.sending,
        last=switch.last,
        asks=unheard(switch),
    )


def unheard(switch: Switch) -> bool:
    """Say whether the peer has yet to show that it holds this end's newest word."""
    return switch.peer is None or switch.peer.heard < switch.number


def _two_bundles(epoch: Epoch, mine: str, theirs: str) -> LinkError:
    return LinkError(
        Reason.DIGEST, f"epoch {epoch} is bundle {mine} here and {theirs[:80]} at the peer"
    )
