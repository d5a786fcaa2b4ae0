"""The port that a framework fills: how its objects are read, copied, compared and written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from handfast.agent.keeper import Plan
from handfast.checkpoint.images import StagingImage
from handfast.checkpoint.staging import Put
from handfast.checkpoint.validated import Validated
from handfast.store.provenance import Brought

__all__ = ["Copied", "Prove", "State"]

Prove = Callable[[int, Mapping[str, bytes]], Collection[str] | None]
"""Takes the first shard of the node, and digests by path; gives the paths that the first one's rank
holds alike, and None where it could not be heard now."""


class Copied(NamedTuple):
    """What goes with an image: the encoded objects, and digests of what is left to another rank.

    ``put`` copies the image's own bytes piece by piece, where it is but a window.
    """

    objects: bytes
    left: bytes
    put: Put | None = None


class State(Protocol):
    """What a framework does for the Checkpointer. One thread at a time calls it."""

    def capture(self, extra: object, grads: bool, prove: Prove) -> Plan:
        """Read the live state; gives the very plan of the last capture where that still fits.

        With ``grads`` the gradients, too. What is to be left to another rank for the first time is
        proven first. Raises Unstorable, ValueError or TypeError for what can't be stored.
        """

    def copy(self, image: StagingImage) -> Copied:
        """Copy what was captured into an image of the newest plan, if that has room for it."""

    def pending(self, grads: bool) -> Sequence[str]:
        """Name what a save would leave out, as this is the middle of a step; empty if nothing."""

    def compare(self, copies: Sequence[Validated], only: Sequence[str], strict: bool) -> None:
        """Hold a saved state against the live one; raises Refused and changes nothing.

        The first copy is this rank's own shard; the others hold what it shares with its node.
        """

    def preload(self, copies: Sequence[Validated], only: Sequence[str]) -> None:
        """Read what was compared to where it belongs, all of this rank's own copy verified.

        What can't stand there before all is decided is kept for :meth:`apply`. Raises Damaged.
        """

    def apply(
        self, copies: Sequence[Validated], only: Sequence[str], keep_live: Sequence[str]
    ) -> object:
        """Put a saved state in place; gives what was saved as ``extra``. Raises Poisoned."""

    def brought(self) -> Brought:
        """What the live state has come from by now, as far as it is known. Never raises."""

    def begins(self, copies: Sequence[Validated], only: Sequence[str], lineage: str) -> object:
        """See whether the state may go on from copies so; no copies: nothing, a first start.

        A ``lineage`` is the name of one that begins here; without one it is that of the copies.
        Raises Refused and ValueError, and changes nothing.
        """

    def began(
        self, copies: Sequence[Validated], only: Sequence[str], lineage: str, run: str
    ) -> None:
        """Hear that it does, and what the ``run`` is called."""

    def replicas(self, copies: Sequence[Validated]) -> dict[str, bytes]:
        """Digest each tensor that every rank stores as its own, by path."""

    def shares(self, rank: int, node: Sequence[int]) -> None:
        """Hear which ranks are on this node, in order.

        The first stores all that it has; so does every rank before it has heard.
        """

    def keeps(self, paths: Collection[str]) -> None:
        """Hear what this rank left to the first of its node, and holds otherwise: it keeps it."""
